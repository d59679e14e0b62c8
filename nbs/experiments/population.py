"""Games of a population of weak players, as PGN: what `imitator` learns from, as the record learned from people.

    python nbs/experiments/population.py runs/population --games 8000      # an hour on one core; goes on where it ended
    python -m grpo_chess.pretrain convert --files 'runs/population/*.pgn' --out runs/moves
    python -m grpo_chess.pretrain train --labels runs/moves --minutes 30 --out runs/imitator.safetensors

The players are Stockfish's skill levels 0 to 4 and Glaurung at depth 1, each with no, 5 % or 15 % random moves. The
opponents of the panel (gnuchess, fairy-stockfish, toga2) are not among them. Every pairing begins with 2 to 10 random
plies. Real games of people take the place of the first command: `convert` reads Lichess' PGN and Parquet files.
"""

import argparse
import random
from contextlib import ExitStack
from pathlib import Path

from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.matches import play_match
from grpo_chess.players import OtherEngine, erring_player, random_openings, weak_engine_player

ERRS, LEVELS, PAIRS = (0.0, 0.05, 0.15), range(5), 32  # PAIRS: openings of a pairing, each played with both colours


def players(engines: EnginePool, other: OtherEngine | None, seed: int) -> dict:
    "Everybody who plays, by name."
    sound = {f"level {k}": weak_engine_player(engines, k, seed) for k in LEVELS}
    if other:
        sound["Glaurung depth 1"] = other
    return {
        f"{name}, {share:.0%} random": erring_player(player, share, seed)
        for name, player in sound.items()
        for share in ERRS
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the games, a file for each pairing")
    parser.add_argument("--games", type=int, default=8000)
    parser.add_argument("--other", default="glaurung", help="another UCI engine; empty for none")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pool = stack.enter_context(EnginePool(EngineConfig(processes=args.processes)))
        other = OtherEngine(args.other, depth=1) if args.other else None
        if other:
            stack.callback(other.close)
        for number in range(-(-args.games // (2 * PAIRS))):
            path = args.out / f"{number:04}.pgn"
            if path.exists():
                continue
            rng = random.Random(f"population {args.seed} {number}")
            everybody = players(pool, other, args.seed + 1000 * number)
            names = rng.choices(list(everybody), k=2)
            openings = random_openings(PAIRS, seed=args.seed + 1000 * number, plies=rng.randint(2, 10))
            match = play_match(*(everybody[n] for n in names), openings, max_plies=240, names=tuple(names))
            path.with_suffix(".tmp").write_text(match.pgn())
            path.with_suffix(".tmp").rename(path)
            plies = sum(len(g.board.move_stack) for g in match.games)
            print(f"{path.name}: {match}, {plies} plies", flush=True)


if __name__ == "__main__":
    main()
