"""Held-out positions for the experiments on learning: every legal move valued deeper than in training, and no position that supervised training saw.

    python -m grpo_chess.pretrain label --positions 2000 --rows 2000 --seed 99 --depth 8 --out deep      # seven minutes on one core
    python nbs/experiments/heldout.py deep LABELS          # LABELS: the folder that supervised training used

writes nbs/data/heldout.jsonl, which `grpo_chess.arena.read_labels` reads. Positions are written as their mover sees them: White to move.
"""
import json
import sys
from pathlib import Path

from grpo_chess.model import describe
from grpo_chess.pretrain import held_out, read_manifest
from grpo_chess.reward import MOVE_NAMES

OUT = Path(__file__).resolve().parent.parent/"data/heldout.jsonl"

def main(deep, seen):
    made, train = read_manifest(deep), read_manifest(seen)
    labels = held_out(deep, 0, made["rows_in_all"], [Path(seen)/s["name"] for s in train["shards"]])
    lines = [dict(engine=made["engine"], depth=made["depth"], seed=made["seed"], unseen=f"not among {train['rows_in_all']:,} labels of seed {train['seed']}")]
    for i in range(len(labels)):
        at = slice(labels.offset[i], labels.offset[i + 1])
        moves = {MOVE_NAMES[True][a]: int(s) for a, s in zip(labels.actions[at], labels.scores[at])}
        lines.append(dict(fen=describe(labels.tokens[i]), moves=dict(sorted(moves.items(), key=lambda x: -x[1]))))
    OUT.write_text("".join(json.dumps(x, separators=(",", ":")) + "\n" for x in lines))
    print(f"{len(lines) - 1} positions of {made['rows_in_all']} are new")

if __name__ == "__main__": main(*sys.argv[1:])
