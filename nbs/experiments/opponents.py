"""Weights against opponents that had no part in training: Elo over the start, with intervals over the openings.

    .ci/setup opponents
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --games 200 --out data/opponents.csv

The first weights are the start. Everybody plays the most likely move, by the rules of chess, from the same random
openings, each with both colours. Three opponents are engines that are not Stockfish, with a fixed share of random
moves that was chosen so that the start scores between 0.05 and 0.5; two are Stockfish's own, unseeded levels. The
difference to the start is the mean over the opponents of the difference of the logistic Elo; its interval is a
bootstrap over the openings, which are shared.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from grpo_chess.arena import ArenaConfig, run
from grpo_chess.matches import JudgeConfig

PANEL = {
    "gnuchess": "engine:path=gnuchessu,depth=1,errs=0.2,seed=1",
    "toga2": "engine:path=toga2,depth=1,errs=0.2,seed=1",
    "fairy-stockfish": "engine:path=fairy-stockfish,depth=1,skill=-3",
    "level 0": "stockfish:skill=0",
    "level 2": "stockfish:skill=2",
}


def score_pairs(weights: str, opponent: str, games: int, seed: int) -> np.ndarray:
    "Mean score of each opening's two games."
    cfg = ArenaConfig(
        a=weights,
        b=opponent,
        games=games,
        seed=seed,
        max_plies=300,
        floor=False,
        judge=JudgeConfig(on=False),
    )
    return run(cfg, say=lambda *_, **__: None)["match"].pairs


def elo(score):
    "Logistic Elo of a score, kept finite by half a point on either side of 200."
    score = np.clip(score, 1 / 400, 1 - 1 / 400)
    return 400 * np.log10(score / (1 - score))


def difference(ours: dict, start: dict, seed: int = 0, n: int = 2000) -> tuple[float, float, float]:
    "Elo over the start, and its 95 % interval."
    rng = np.random.default_rng(seed)

    def mean(index):
        return np.mean([elo(ours[k][index].mean()) - elo(start[k][index].mean()) for k in ours])

    size = len(next(iter(ours.values())))
    drawn = [mean(rng.integers(0, size, size)) for _ in range(n)]
    return mean(np.arange(size)), *np.quantile(drawn, (0.025, 0.975))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="the start, then what is compared with it")
    parser.add_argument("--games", type=int, default=200, help="against each opponent")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=list(PANEL), choices=list(PANEL))
    parser.add_argument("--out", type=Path, help="CSV file of the scores")
    args = parser.parse_args()
    found, rows = {}, []
    for weights in args.weights:
        found[weights] = {name: score_pairs(weights, PANEL[name], args.games, args.seed) for name in args.only}
        gain = difference(found[weights], found[args.weights[0]])
        for name, pairs in found[weights].items():
            rows.append(dict(weights=weights, opponent=name, games=2 * len(pairs), score=round(pairs.mean(), 4)))
        scores = " ".join(f"{name} {pairs.mean():.3f}" for name, pairs in found[weights].items())
        print(f"{weights}: {scores}; over the start {gain[0]:+.0f} [{gain[1]:+.0f}, {gain[2]:+.0f}] Elo", flush=True)
        rounded = json.dumps([round(g) for g in gain])
        rows.append(dict(weights=weights, opponent="over the start", games=0, score=rounded))
    if args.out:
        with args.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
