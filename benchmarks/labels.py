"""Labels made by self-play, against the engines alone on the same positions:

    python benchmarks/labels.py [positions] [rounds] [depth]

Self-play has to choose and make moves, find the legal ones, encode and collect; the engines alone are given all
positions of the same shard together. Alternating rounds in one process, medians, all cores. Then the same with shards
written to disk.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grpo_chess.engine import EnginePool  # noqa: E402
from grpo_chess.labels import LabelConfig, make_shard, write_shard  # noqa: E402

class Recorder:
    "A pool that remembers what it was asked."
    def __init__(self, pool): self.pool, self.fens = pool, []
    def submit_moves(self, fens, **kw):
        self.fens += fens
        return self.pool.submit_moves(fens, **kw)

def timed(f):
    "Seconds by the clock, and of this process."
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu

def report(took, n):
    "Rates, the process's own time, and ratios to the first row, round by round."
    first = next(iter(took.values()))
    for name, rounds in took.items():
        ratio = [a[0]/b[0] for a, b in zip(first, rounds)]
        rate, own = n/statistics.median(wall for wall, _ in rounds), statistics.median(cpu for _, cpu in rounds)
        print(f"{name:20} {rate:7,.0f} positions/s   {1e6*own/n:5.0f} us of Python a position   "
              f"ratio {statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})")

def main(n=10_000, rounds=3, depth=1):
    cfg = LabelConfig(rows=n, depth=depth)
    with EnginePool() as pool, tempfile.TemporaryDirectory() as folder:
        recorder, path = Recorder(pool), Path(folder)/"x.parquet"
        shard = make_shard(recorder, cfg, 0)
        fens = recorder.fens[:n]
        runs = {"engines alone": lambda: pool.evaluate_moves(fens, depth=depth, trusted=True),
                "self-play labels": lambda: make_shard(pool, cfg, 0),
                "and written to disk": lambda: write_shard(path, make_shard(pool, cfg, 0), {})}
        took = {name: [] for name in runs}
        for _ in range(rounds):
            for name, f in runs.items(): took[name].append(timed(f))
        print(f"{n} positions, {len(shard.actions)/n:.1f} moves each, depth {depth}, {pool.processes} engines, "
              f"{rounds} rounds\n")
        report(took, n)
        print(f"{path.stat().st_size/n:.0f} bytes a position on disk")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
