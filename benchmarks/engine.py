"""How fast the pool is, against python-chess's SimpleEngine: `python benchmarks/engine.py [positions] [rounds]`.

Both get the same boards in the same process, in alternating rounds; medians. Ours includes writing the FENs. One engine
process on each side, hash 1 MB, one thread. `SimpleEngine` is measured with history kept (`game=None`) and with a new
game for each position (`game=object()`).
"""
import os
import random
import statistics
import sys
import time
from functools import partial

import chess
import chess.engine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grpo_chess.board import position_key
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.uci import find_engine

def played(n, seed=0):
    "`n` boards reached by random play."
    rng, out = random.Random(seed), []
    while len(out) < n:
        b = chess.Board()
        for _ in range(rng.randrange(2, 80)):
            if b.is_game_over(): break
            b.push(rng.choice(list(b.legal_moves)))
        if not b.is_game_over(): out.append(b)
    return out

def simple(eng, depth, fresh, boards):
    "Scores by python-chess's SimpleEngine, one position at a time."
    for b in boards: eng.analyse(b, chess.engine.Limit(depth=depth), game=object() if fresh else None)["score"]

def ours(pool, depth, boards): return pool.evaluate([position_key(b) for b in boards], depth=depth, trusted=True)
def checked(pool, depth, boards): return pool.evaluate([position_key(b) for b in boards], depth=depth)
def moves(pool, depth, boards): return pool.evaluate_moves([position_key(b) for b in boards], depth=depth, trusted=True)

def measure(runs, boards, rounds):
    "Median wall time and Python CPU time of each run, in seconds; the runs alternate."
    took = {name: [] for name in runs}
    for run in runs.values(): run(boards[:50])              # engines started, pages touched
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(boards)
            took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: [statistics.median(x) for x in zip(*t)] for name, t in took.items()}

def scores_table(eng, pools, boards, rounds, depth):
    "One position at a time, pipelined, and pipelined on all cores; print positions a second and ratios."
    kept, clean, kept_all, clean_all = pools
    runs = {
        "SimpleEngine, history kept": partial(simple, eng, depth, False),
        "SimpleEngine, new game each": partial(simple, eng, depth, True),
        "pool of 1, history kept": partial(ours, kept, depth),
        "pool of 1, deterministic": partial(ours, clean, depth),
        "pool of 1, deterministic, FENs checked": partial(checked, clean, depth),
        f"pool of {clean_all.processes}, history kept": partial(ours, kept_all, depth),
        f"pool of {clean_all.processes}, deterministic": partial(ours, clean_all, depth),
    }
    found = measure(runs, boards, rounds)
    for name, (wall, cpu) in found.items():
        print(f"{depth:5}  {name:42} {len(boards)/wall:11,.0f}  {1e6*cpu/len(boards):18.0f}")
    wall = [w for w, _ in found.values()]
    print(f"       ratios: kept/kept {wall[0]/wall[2]:.2f}   deterministic/kept {wall[0]/wall[3]:.2f}   "
          f"deterministic/new game each {wall[1]/wall[3]:.2f}\n")

def moves_table(pools, boards, rounds):
    "Every legal move by MultiPV at depth 1."
    total = sum(b.legal_moves.count() for b in boards)
    runs = {f"MultiPV depth 1, pool of {p.processes}, {how}": partial(moves, p, 1)
            for p, how in zip(pools, ("history kept", "deterministic")*2)}
    for name, (wall, cpu) in measure(runs, boards, rounds).items():
        print(f"{name:48} {len(boards)/wall:7,.0f} positions/s  {total/wall:9,.0f} move values/s  "
              f"{1e6*cpu/len(boards):5.0f} us of Python/position")

def main(n=1500, rounds=5):
    boards, warm, lone = played(n), EngineConfig(deterministic=False), EngineConfig(processes=1)
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as eng, \
            EnginePool(EngineConfig(processes=1, deterministic=False)) as kept, EnginePool(lone) as clean, \
            EnginePool(warm) as kept_all, EnginePool() as clean_all:
        eng.configure({"Hash": 1, "Threads": 1})
        print(f"{n} positions, medians of {rounds} rounds, {clean_all.processes} cores\n")
        print("depth  how                                        positions/s  Python us/position")
        pools = kept, clean, kept_all, clean_all
        for depth in 4, 1, 8: scores_table(eng, pools, boards if depth < 8 else boards[:n//5], rounds, depth)
        moves_table(pools, boards, rounds)

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
