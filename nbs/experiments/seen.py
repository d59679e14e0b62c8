"""What a run learned from: how far one side was ahead, in pawns, in the positions of its memory or of its labels.

    python nbs/experiments/seen.py runs/long0 LABELS --out data/imitator_seen.csv

A run folder keeps the memory of judged positions in its checkpoints; a folder of labels has them in its shards. Some
thousand positions of each are drawn, evenly from all steps or shards.
"""

import argparse
import csv
from pathlib import Path

import chess
import numpy as np
import torch

from grpo_chess.checkpoint import checkpoints
from grpo_chess.labels import read_manifest, read_shard
from grpo_chess.model import describe

WORTH = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9, chess.KING: 0}
LEADS = {"0 or 1": (0, 1), "2 to 4": (2, 4), "5 to 9": (5, 9), "10 and more": (10, 99)}


def parts(folder: Path) -> list:
    "Tokens [n, 65] of each step of a run's memory, or of each shard that labels train with."
    if (folder / "manifest.json").exists():
        shards = read_manifest(folder)["shards"][1:]  # the first is held out
        return [read_shard(folder / shard["name"]).tokens for shard in shards]
    state = torch.load(checkpoints(folder / "checkpoint")[-1] / "state.pt", weights_only=True, mmap=True)
    return [part["tokens"].numpy() for part in state["replay"]]


def lead(tokens: np.ndarray) -> int:
    "Pawns by which one side is ahead."
    pieces = chess.Board(describe(tokens)).piece_map().values()
    return abs(sum(WORTH[p.piece_type] * (1 if p.color else -1) for p in pieces))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders or folders of labels")
    parser.add_argument("--positions", type=int, default=6000, help="drawn from each")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        rng, found = np.random.default_rng(0), parts(folder)
        drawn = [found[k][rng.integers(len(found[k]))] for k in np.arange(args.positions) % len(found)]
        leads = np.array([lead(tokens) for tokens in drawn])
        for name, (low, high) in LEADS.items():
            share = ((low <= leads) & (leads <= high)).mean()
            rows.append(dict(source=folder.name, positions=len(leads), lead=name, share=round(float(share), 4)))
            print(*rows[-1].values())
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
