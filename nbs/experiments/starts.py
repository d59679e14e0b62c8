"""Start positions from labels: those of one shard, or of several, which are apart from the held-out ones.

    # half a minute on two cores
    python -m grpo_chess.pretrain label --positions 50000 --depth 1 --seed 0 --out LABELS
    python nbs/experiments/starts.py LABELS runs/starts.fen

Groups of one ply need a new start for each group; a file is cheaper than random play. Positions are written as
their mover sees them: White to move.
"""

import argparse
import sys
from pathlib import Path

from grpo_chess.model import describe
from grpo_chess.labels import LabelError, read_manifest, read_shard


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path)
    parser.add_argument("out", type=Path, help=".fen file to write")
    parser.add_argument("--shards", type=int, nargs=2, default=(0, 1), metavar=("FIRST", "END"), help="shards to take")
    args = parser.parse_args()
    try:
        shards = read_manifest(args.labels)["shards"][slice(*args.shards)]
        fens = dict.fromkeys(describe(t) for shard in shards for t in read_shard(args.labels / shard["name"]).tokens)
    except LabelError as e:
        sys.exit(f"error: {e}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text("\n".join(fens) + "\n")
    print(f"{len(fens)} positions of {len(shards)} shards")


if __name__ == "__main__":
    main()
