"""Games a second: all games of a match in one batch, against a loop with one forward pass and one engine call a move.

    python benchmarks/arena.py                       # tiny against skill 2, 256 games in the batch, a few in the loop
    python benchmarks/arena.py --games 1024 --rounds 3
    python benchmarks/arena.py --self                # a policy against itself with a judge, as at the end of a run

Same policy (most likely move), same openings, same rules (claimed draws, at most 400 plies), same opponent:
Stockfish's skill 2, whose move is drawn when depth 3 is complete. The loop asks it as the research record did, for
50 ms a move, and again with `go depth 3`; the arena plays its seeded skill 2. Rounds of all alternate; medians of plies
a second, because the loop plays too few games to have a fair share of the long ones; a game is as long as the batch's
are on average. On a machine with other work the loop at 50 ms loses less than the batch, which computes all the time:
measure on an idle one.
"""

import argparse
import statistics
import time
from contextlib import contextmanager

import chess
import chess.engine
import torch

from grpo_chess.engine import EngineConfig, EnginePool, find_engine
from grpo_chess.matches import JudgeConfig, play_match
from grpo_chess.model import Policy, pretrained
from grpo_chess.players import policy_player, random_openings, weak_engine_player


def loop_games(player, openings, limit):
    "One game after the other: plies played."
    plies = 0
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as engine:
        engine.configure({"Skill Level": 2, "Threads": 1, "Hash": 128})
        for k, opening in enumerate(openings):
            board = opening.copy()
            for ply in range(400):
                if board.is_game_over(claim_draw=True):
                    break
                ours = board.turn == (k % 2 == 0)
                board.push(player([board], [k], ply)[0] if ours else engine.play(board, limit).move)
                plies += 1
    return plies


class Clock:
    "A player that adds up its own time."

    def __init__(self, player):
        self.player, self.seconds, self.positions = player, 0.0, 0
        if hasattr(player, "begin"):
            self.begin = self.asked

    @contextmanager
    def running(self, boards):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.positions += len(boards)

    def __call__(self, boards, games, ply):
        with self.running(boards):
            return self.player(boards, games, ply)

    def asked(self, boards, games, ply):
        wait = self.player.begin(boards, games, ply)

        def answer():
            with self.running(boards):
                return wait()

        return answer


def batch(a, b, openings, **kw):
    "One match: seconds, plies, and where the time went."
    a, b, start, cpu = Clock(a), Clock(b), time.perf_counter(), time.process_time()
    match = play_match(a, b, openings, **kw)
    where = (
        f"{time.process_time() - cpu:.1f} s of CPU in this process, engines apart; network {a.seconds:.1f} s for "
        f"{a.positions} positions, the other player {b.seconds:.1f} s for {b.positions}; {match}"
    )
    return time.perf_counter() - start, a.positions + b.positions, where


def has_bf16():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def against_skill(args, policy, pool):
    "The loop in both ways and the batch in both precisions."
    openings, found = random_openings(args.games // 2, seed=1), {}
    few = {"loop, 50 ms a move": (chess.engine.Limit(time=0.05), 8), "loop, depth 3": (chess.engine.Limit(depth=3), 16)}
    kinds = {"batch, float32": False} | ({"batch, bfloat16": True} if has_bf16() else {})
    for r in range(args.rounds):
        for name, (limit, games) in few.items():
            start, cpu = time.perf_counter(), time.process_time()
            plies = loop_games(policy_player(policy, True), openings[games * r : games * (r + 1)], limit)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            found.setdefault(name, []).append(plies / seconds)
            print(f"{name}: {games} games, {plies} plies in {seconds:.1f} s; {cpu:.1f} s of CPU here", flush=True)
        for name, bf16 in kinds.items():
            players = policy_player(policy, True, bf16=bf16), weak_engine_player(pool, 2)
            seconds, plies, where = batch(*players, openings, max_plies=400, claims=True)
            found.setdefault(name, []).append(plies / seconds)
            length = plies / args.games
            print(f"{name}: {args.games} games in {seconds:.1f} s; {where}", flush=True)
    rate = {name: statistics.median(x) / length for name, x in found.items()}
    print(f"\ngames of {length:.0f} plies a second: " + ", ".join(f"{name} {x:.2f}" for name, x in rate.items()))
    for fast in kinds:
        print(f"{fast}: " + ", ".join(f"{rate[fast] / rate[slow]:.0f} x the {slow}" for slow in few))


def against_itself(args, policy, pool):
    "A run's last step: two networks, a judge."
    openings = random_openings(args.games // 2, seed=1)
    for bf16 in (False, True):
        players = policy_player(policy, bf16=bf16), policy_player(policy, seed=1, bf16=bf16)
        seconds, _, where = batch(*players, openings, max_plies=200, judge=pool, rule=JudgeConfig())
        print(
            f"{'bfloat16' if bf16 else 'float32'}: {args.games} games in {seconds:.1f} s, "
            f"{args.games / seconds:.2f} a second; {where}",
            flush=True,
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--games", type=int, default=256)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--self", action="store_true", help="a policy against itself, with a judge")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with EnginePool(EngineConfig()) as pool:
        (against_itself if args.self else against_skill)(args, Policy(pretrained("tiny").to(args.device)), pool)
