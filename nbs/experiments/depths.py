"""What a perfect pupil of Stockfish's depth d would still give away: regret of the move that a search of all moves
at that depth prefers. Writes data/depths.csv.

python nbs/experiments/depths.py      # three minutes on one core
"""

import csv
import time
from pathlib import Path

import numpy as np

from grpo_chess.measures import read_labels
from grpo_chess.engine import EngineConfig, EnginePool

HERE = Path(__file__).resolve().parent


def main():
    labels = read_labels(HERE.parent / "data/heldout.jsonl")
    fens, rows = [label.board.fen() for label in labels], []
    with EnginePool(EngineConfig()) as pool:
        for depth in range(1, 8):
            start = time.perf_counter()
            moves = pool.evaluate_moves(fens, depth=depth)
            seconds = time.perf_counter() - start
            loss = np.array([label.loss[max(m, key=m.get)] for label, m in zip(labels, moves)])
            rows.append(
                dict(
                    depth=depth,
                    positions=len(loss),
                    regret=f"{loss.mean():.5f}",
                    stderr=f"{loss.std(ddof=1) / len(loss) ** 0.5:.5f}",
                    seconds=f"{seconds:.2f}",
                )
            )
            print(rows[-1], flush=True)
    with (HERE / "data/depths.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


if __name__ == "__main__":
    main()
