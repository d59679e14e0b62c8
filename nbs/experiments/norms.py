"""How long the weight matrices have grown: the mean Frobenius norm over the blocks, by kind of matrix.

python nbs/experiments/norms.py imitator long{0,1}.safetensors longsup1.safetensors --out data/imitator_norms.csv
"""

import argparse
import csv
from pathlib import Path

from opponents import short

from grpo_chess.players import load_player_model


def lengths(name: str) -> dict:
    "Of weights; all of a network's blocks together."
    found: dict[str, list[float]] = {}
    for where, p in load_player_model(name).named_parameters():
        if where.startswith("blocks.") and p.ndim == 2:
            found.setdefault(where.removesuffix(".weight").split(".", 2)[2], []).append(float(p.detach().norm()))
    return dict(weights=short(name)) | {kind: round(sum(each) / len(each), 2) for kind, each in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="imitator, tiny or a file; all of one shape")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    rows = [lengths(name) for name in args.weights]
    for row in rows:
        print(*(f"{k} {v}" for k, v in row.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
