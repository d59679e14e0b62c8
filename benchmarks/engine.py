"""How fast the pool is, against python-chess's SimpleEngine: `python benchmarks/engine.py [positions] [rounds]`.

Both get the same boards in the same process, in alternating rounds; medians. Ours includes writing the FENs. One engine process on each
side, hash 1 MB, one thread. `SimpleEngine` is measured with history kept (`game=None`) and with a new game for each position (`game=object()`).
"""
import os, random, statistics, sys, time

import chess, chess.engine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grpo_chess.board import position_key
from grpo_chess.engine import EngineConfig, EnginePool, find_engine

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

def simple(eng, boards, depth, fresh):
    for b in boards: eng.analyse(b, chess.engine.Limit(depth=depth), game=object() if fresh else None)["score"]

def ours(pool, boards, depth): return pool.evaluate([position_key(b) for b in boards], depth=depth, trusted=True)
def checked(pool, boards, depth): return pool.evaluate([position_key(b) for b in boards], depth=depth)
def moves(pool, boards, depth): return pool.evaluate_moves([position_key(b) for b in boards], depth=depth, trusted=True)

def measure(runs, boards, rounds):
    "Median wall time and Python CPU time of each run, in seconds; the runs alternate."
    took = {name: [] for name in runs}
    for f in runs.values(): f(boards[:50])                  # engines started, pages touched
    for _ in range(rounds):
        for name, f in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            f(boards)
            took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: [statistics.median(x) for x in zip(*t)] for name, t in took.items()}

def main(n=1500, rounds=5):
    boards = played(n)
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as eng, \
            EnginePool(EngineConfig(processes=1)) as clean, EnginePool(EngineConfig(processes=1, deterministic=False)) as kept, \
            EnginePool() as clean_all, EnginePool(EngineConfig(deterministic=False)) as kept_all:
        eng.configure({"Hash": 1, "Threads": 1})
        print(f"{n} positions, medians of {rounds} rounds, {clean_all.processes} cores\n")
        print("depth  how                                        positions/s  Python us/position")
        for depth in 4, 1, 8:
            some = boards if depth < 8 else boards[:n//5]
            t = measure({
                "SimpleEngine, history kept": lambda b: simple(eng, b, depth, False),
                "SimpleEngine, new game each": lambda b: simple(eng, b, depth, True),
                "pool of 1, history kept": lambda b: ours(kept, b, depth),
                "pool of 1, deterministic": lambda b: ours(clean, b, depth),
                "pool of 1, deterministic, FENs checked": lambda b: checked(clean, b, depth),
                f"pool of {clean_all.processes}, history kept": lambda b: ours(kept_all, b, depth),
                f"pool of {clean_all.processes}, deterministic": lambda b: ours(clean_all, b, depth),
            }, some, rounds)
            for name, (wall, cpu) in t.items(): print(f"{depth:5}  {name:42} {len(some)/wall:11,.0f}  {1e6*cpu/len(some):18.0f}")
            wall = [w for w, _ in t.values()]
            print(f"       ratios: kept/kept {wall[0]/wall[2]:.2f}   deterministic/kept {wall[0]/wall[3]:.2f}   "
                  f"deterministic/new game each {wall[1]/wall[3]:.2f}\n")
        total = sum(b.legal_moves.count() for b in boards)
        t = measure({f"MultiPV depth 1, pool of {p.processes}, {how}": (lambda b, p=p: moves(p, b, 1))
                     for p, how in ((kept, "history kept"), (clean, "deterministic"), (kept_all, "history kept"), (clean_all, "deterministic"))}, boards, rounds)
        for name, (wall, cpu) in t.items(): print(f"{name:48} {n/wall:7,.0f} positions/s  {total/wall:9,.0f} move values/s  {1e6*cpu/n:5.0f} us of Python/position")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
