"""Matches of trained weights: against their start, and against Stockfish's weak levels under the record's protocol.

    python nbs/experiments/strength.py OUT.csv START NAME=WEIGHTS ...  [--games 1000] [--levels 0,1,2]
    python nbs/experiments/strength.py OUT.csv tiny "tiny 0=DIR/learning tiny 0.safetensors"
    # the start and the floor themselves
    python nbs/experiments/strength.py OUT.csv tiny "start=tiny" "untrained=untrained" --only level

Weights are named as `grpo_chess.players` names them. It appends a row for each match that OUT.csv does not have
yet. Openings are six random plies, each played twice with colours swapped; every name has openings of its own, so
that
an interval over seeds contains their chance too (`--openings` takes those of another row again). Games against the
start are adjudicated by Stockfish at depth 8; those against a level follow the record (its claim rule, 400 plies,
no adjudication), with seeded levels.
"""

import argparse
import csv
import zlib
from pathlib import Path

from grpo_chess.matches import play_match
from grpo_chess.players import load_player_model, policy_player, random_openings, weak_engine_player
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import Policy


def player(path, temperature, seed):
    "Weights at a temperature; 0 is the most likely move."
    return policy_player(Policy(load_player_model(path), temperature or 1.0), greedy=not temperature, seed=seed)


def matches(start, file, levels):
    "Kind -> function that plays it."
    against = {
        "most likely move, both": (0, 0),
        "sampling, both": (1, 1),
        "sampling, against the start's most likely move": (1, 0),
    }
    for kind, (ours, theirs) in against.items():
        yield (
            kind,
            lambda pool, openings, a=ours, b=theirs: play_match(
                player(file, a, 1), player(start, b, 2), openings, 200, judge=pool, judge_depth=8
            ),
        )
    for how, temperature in (("most likely move", 0), ("sampling", 1)):
        for level in levels:
            yield (
                f"{how}, level {level}",
                lambda pool, openings, t=temperature, n=level: play_match(
                    player(file, t, 1), weak_engine_player(pool, n, n), openings, 400, claims=True
                ),
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("start")
    parser.add_argument("weights", nargs="+", help="NAME=WEIGHTS")
    parser.add_argument("--games", type=int, default=1000)
    parser.add_argument("--levels", default="0,1,2")
    parser.add_argument("--only", default="", help="kinds that contain this")
    parser.add_argument("--openings", type=int, default=-1, help="seed of the openings; below 0 it comes from the name")
    args = parser.parse_args()
    if bad := [w for w in args.weights if "=" not in w]:
        parser.error(f"{bad[0]!r} is not NAME=WEIGHTS")
    out = Path(args.out)
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    with EnginePool(EngineConfig()) as pool:
        for name, file in (w.split("=", 1) for w in args.weights):
            seed = zlib.crc32(name.encode()) if args.openings < 0 else args.openings
            openings = random_openings(args.games // 2, seed)
            for kind, play in matches(args.start, file, [int(x) for x in args.levels.split(",") if x]):
                if args.only not in kind or any((r["name"], r["match"]) == (name, kind) for r in rows):
                    continue
                m = play(pool, openings)
                print(name, "|", kind, "|", m, flush=True)
                low, high = m.interval
                rows.append(
                    dict(
                        name=name,
                        match=kind,
                        games=len(m.games),
                        wins=m.wins,
                        draws=m.draws,
                        losses=m.losses,
                        score=f"{m.score:.4f}",
                        low=f"{low:.4f}",
                        high=f"{high:.4f}",
                        elo=f"{m.elo:.0f}",
                        elo_low=f"{m.elo_interval[0]:.0f}",
                        elo_high=f"{m.elo_interval[1]:.0f}",
                        openings=seed,
                    )
                )
                with out.with_suffix(".tmp").open("w", newline="") as f:
                    w = csv.DictWriter(f, list(rows[0]))
                    w.writeheader()
                    w.writerows(rows)
                out.with_suffix(".tmp").replace(out)


if __name__ == "__main__":
    main()
