"""Weights against opponents that had no part in training: Elo over the start, with intervals over the openings.

    .ci/setup opponents
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --games 200 --out data/opponents.csv
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --regret data/imitator_regret.csv
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --regret regret.csv --each where.csv
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --regret regret.csv --labels LABELS
    python nbs/experiments/opponents.py imitator tiny --ends data/won_draws.csv
    python nbs/experiments/opponents.py imitator runs/x/model.safetensors --imitated --games 100 --pairs met.json

The second command plays nothing: it measures what each policy gives away on held-out positions, and the difference to
the start with the interval over the positions, which are shared. The third keeps the regret in each position too. The
fourth does so on labels that were made for it, of which there can be as many as a small difference needs. The fifth
counts how games end against two other opponents,
which are not of the panel, and which draws were won positions: four pawns ahead, by material. The last meets those whom
`imitator` imitated, in place of the panel.

The first weights are the start. Everybody plays the most likely move, by the rules of chess, from the same random
openings, each with both colours. Three opponents are engines that are not Stockfish, with a fixed share of random
moves that was chosen so that the start scores between 0.05 and 0.5; two are Stockfish's own, unseeded levels. The
difference to the start is the mean over the opponents of the difference of the logistic Elo; its interval is a
bootstrap over the openings, which are shared.
"""

import argparse
import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from grpo_chess.arena import ArenaConfig, run
from grpo_chess.labels import read_shard
from grpo_chess.matches import JudgeConfig
from grpo_chess.measures import read_labels, regret
from grpo_chess.model import Policy
from grpo_chess.players import load_player_model
from grpo_chess.report import elo_gain
from grpo_chess.reward import material
from grpo_chess.targets import measure, to_batch, training_shards

HELD_OUT = Path(__file__).resolve().parent.parent / "data/heldout.jsonl"

PANEL = {
    "gnuchess": "engine:path=gnuchessu,depth=1,errs=0.2,seed=1",
    "toga2": "engine:path=toga2,depth=1,errs=0.2,seed=1",
    "fairy-stockfish": "engine:path=fairy-stockfish,depth=1,skill=-3",
    "level 0": "stockfish:skill=0",
    "level 1": "stockfish:skill=1",
    "level 2": "stockfish:skill=2",
}


# as in population.py: six players, each with no, 5 % and 15 % random moves
IMITATED = {
    f"{name}, {errs:.0%} random": f"{spec},errs={errs},seed=3"
    for name, spec in [(f"level {k}", f"weak:level={k}") for k in range(5)]
    + [("glaurung", "engine:path=glaurung,depth=1")]
    for errs in (0, 0.05, 0.15)
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


def short(weights: str) -> str:
    "A run's name, or the package's; never a folder of this machine."
    path = Path(weights)
    return path.parent.name if path.name == "model.safetensors" else path.stem


def given_away(policy: Policy, folder: Path | None) -> tuple[np.ndarray, float, float]:
    "Regret of the most likely move in each position, how often it is a best one, and the mean of a sampled move."
    if folder is None:
        labels = read_labels(HELD_OUT)
        greedy = regret(policy, labels, True)
        return greedy.each, greedy.best, regret(policy, labels).mean
    each, sampled = [], []
    for name in training_shards(folder, 0):
        shard = read_shard(folder / name)
        for index in np.array_split(np.arange(len(shard)), -(-len(shard) // 256)):
            batch = to_batch(shard, index, "soft", 0.03)
            with torch.no_grad():
                found = measure(policy.dist(batch.tokens, batch.legal), batch)
            each.append(found["regret_greedy"].numpy())
            sampled.append(found["regret"].numpy())
    known = np.concatenate(each)
    known = known[~np.isnan(known)]
    return known, (known == 0).mean(), np.nanmean(np.concatenate(sampled))


def regrets(weights: list[str], folder: Path | None) -> tuple[list[dict], dict[str, np.ndarray]]:
    "What the most likely move and a sampled one give away, and the change of the former against the first; of each."
    rows, start, found = [], None, {}
    for name in weights:
        each, best, sampled = given_away(Policy(load_player_model(name)), folder)
        found[short(name)] = each
        start = each if start is None else start
        change = each - start
        half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
        row = dict(greedy=each.mean(), best=best, sampled=sampled, change=change.mean(), half=half)
        rows.append(dict(weights=short(name), positions=len(each)) | {k: round(float(v), 5) for k, v in row.items()})
        print(*(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows, found


def positions(found: dict[str, np.ndarray]) -> list[dict]:
    "A row for each held-out position: its value in centipawns for the side to move, and what each policy gives away."
    labelled = (json.loads(line) for line in HELD_OUT.read_text().splitlines())
    values = [max(row["moves"].values()) for row in labelled if "fen" in row]
    columns = dict(best=values) | {name: each.round(5) for name, each in found.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]


OTHERS = {
    "glaurung": "engine:path=glaurung,depth=1,errs=0.3,seed=5",
    "erring stockfish": "engine:path=stockfish,depth=1,errs=0.4,seed=7",
}
AHEAD = 400  # centipawns of material by which a side is winning


def end_of(game) -> str:
    "How a game ended for the first player: a draw says how, and whether that player was winning."
    if game.score != 0.5:
        return "win" if game.score else "loss"
    balance = int(material([game.board.fen()])[0])
    ours = balance if game.board.turn == game.a_white else -balance
    return f"{game.reason} when winning" if ours >= AHEAD else "other draw"


def ends(weights: list[str], games: int, seed: int) -> list[dict]:
    "How the games of each policy's most likely moves end, by the rules."
    rows = []
    for name, (other, spec) in itertools.product(weights, OTHERS.items()):
        cfg = ArenaConfig(
            a=name, b=spec, games=games, seed=seed, max_plies=300, floor=False, judge=JudgeConfig(on=False)
        )
        match = run(cfg, say=lambda *_, **__: None)["match"]
        count = Counter(map(end_of, match.games))
        rows += [
            dict(weights=short(name), opponent=other, games=games, end=end, count=n) for end, n in count.most_common()
        ]
        print(name, other, f"{match.score:.3f}", dict(count), flush=True)
    return rows


def write(path: Path, rows: list[dict]):
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="the start, then what is compared with it")
    parser.add_argument("--games", type=int, default=200, help="against each opponent")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--only", nargs="*", help="some of them, by name", choices=[*PANEL, *IMITATED])
    parser.add_argument(
        "--imitated", action="store_true", help="meet the players that imitator imitated, not the panel"
    )
    parser.add_argument("--out", type=Path, help="CSV file of the scores")
    parser.add_argument("--pairs", type=Path, help="JSON file of each opening's points, in quarters of two games")
    parser.add_argument("--regret", type=Path, help="CSV file of the regrets; nothing is played")
    parser.add_argument("--each", type=Path, help="CSV file of the regrets in each position, beside --regret")
    parser.add_argument("--labels", type=Path, help="labels on which the regrets are measured")
    parser.add_argument("--ends", type=Path, help="CSV file of how games end, against two other opponents")
    args = parser.parse_args()
    if unmet := set(args.only or ()) - {*(IMITATED if args.imitated else PANEL)}:
        parser.error(f"{', '.join(unmet)}: with --imitated only those, without it only the panel")
    if args.each and (args.labels or not args.regret):
        parser.error("--each goes with --regret, on the held-out positions")
    if args.ends:
        write(args.ends, ends(args.weights, args.games, args.seed))
        return
    if args.regret:
        rows, each = regrets(args.weights, args.labels)
        write(args.regret, rows)
        if args.each:
            write(args.each, positions(each))
        return
    found, rows, panel = {}, [], IMITATED if args.imitated else PANEL
    for weights in args.weights:
        met = {name: panel[name] for name in args.only or panel}
        found[weights] = {name: score_pairs(weights, spec, args.games, args.seed) for name, spec in met.items()}
        gain = elo_gain(found[weights], found[args.weights[0]])
        for name, pairs in found[weights].items():
            rows.append(dict(weights=short(weights), opponent=name, games=2 * len(pairs), score=round(pairs.mean(), 4)))
        scores = " ".join(f"{name} {pairs.mean():.3f}" for name, pairs in found[weights].items())
        print(f"{weights}: {scores}; over the start {gain[0]:+.0f} [{gain[1]:+.0f}, {gain[2]:+.0f}] Elo", flush=True)
        rounded = json.dumps([round(g) for g in gain])
        rows.append(dict(weights=short(weights), opponent="over the start", games=0, score=rounded))
    if args.out:
        write(args.out, rows)
    if args.pairs:
        points = {short(w): {o: "".join(f"{4 * x:.0f}" for x in p) for o, p in f.items()} for w, f in found.items()}
        args.pairs.write_text(json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    main()
