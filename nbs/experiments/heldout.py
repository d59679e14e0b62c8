"""Held-out positions for the experiments on learning: from all phases of a game, every legal move valued deeper
than in training, and none that supervised training saw, nor its mirror image.

    # self-play of a seed of its own; a whole shard, so that its games reach their ends
    python -m grpo_chess.pretrain label --positions 50000 --seed 99 --out games
    # LABELS: the folders that supervised training used; three minutes on one core
    python nbs/experiments/heldout.py games LABELS ...

writes nbs/data/heldout.jsonl, which `grpo_chess.measures.read_labels` reads. Positions are written as their mover
sees them: White to move.
nbs/data/heldout_openings.jsonl, on which a few experiments followed their regret, is an earlier set, of openings
alone: `pretrain label --positions 2000 --rows 2000 --seed 99 --depth 8` ends its 256 games after eight plies,
and all of its positions that stand in no label of seed 0 were taken.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from grpo_chess.engine import EngineConfig, EnginePool, engine_name
from grpo_chess.model import describe
from grpo_chess.labels import LabelError, fingerprint, held_out, read_manifest, read_tokens
from grpo_chess.targets import turn_round

OUT = Path(__file__).resolve().parent.parent / "data/heldout.jsonl"
SIZE, DEPTH = 2000, 8


def new_positions(games, folders):
    "Tokens of SIZE positions of these games that stand in none of the folders, either way round."
    shards = [Path(f) / s["name"] for f in folders for s in read_manifest(f)["shards"]]
    tokens = held_out(games, 0, 10 * SIZE, shards).tokens
    image = fingerprint(turn_round(tokens, np.zeros((len(tokens), 1), int), np.ones(len(tokens), bool))[0])
    for path in shards:
        keep = ~np.isin(image, fingerprint(read_tokens(path)))
        tokens, image = tokens[keep], image[keep]
    if len(tokens) < SIZE:
        sys.exit(f"{games} holds {len(tokens)} new positions, and {SIZE} are wanted: label more of them")
    return tokens[np.sort(np.random.default_rng(0).permutation(len(tokens))[:SIZE])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("games")
    parser.add_argument("labels", nargs="+")
    games, folders = vars(parser.parse_args()).values()
    try:
        fens = [describe(t) for t in new_positions(games, folders)]
    except LabelError as e:
        sys.exit(f"error: {e}")
    with EnginePool(EngineConfig()) as pool:
        moves = pool.evaluate_moves(fens, depth=DEPTH)
    seen = " and ".join(f"{m['rows_in_all']:,} labels of seed {m['seed']}" for m in map(read_manifest, folders))
    lines = [
        dict(
            engine=engine_name(),
            depth=DEPTH,
            seed=read_manifest(games)["seed"],
            unseen=f"not among {seen}, nor mirrored",
        )
    ]
    lines += [dict(fen=fen, moves=dict(sorted(m.items(), key=lambda x: -x[1]))) for fen, m in zip(fens, moves)]
    OUT.write_text("".join(json.dumps(x, separators=(",", ":")) + "\n" for x in lines))
    print(f"{len(fens):,} positions, {sum(map(len, moves)):,} moves")


if __name__ == "__main__":
    main()
