"""Labels made by self-play, against the engines alone on the same positions: `python benchmarks/labels.py [positions] [rounds] [depth]`.

Self-play has to choose and make moves, find the legal ones, encode and collect; the engines alone are given all positions of the same shard at once. Alternating rounds in one
process, medians, all cores. Then the same with shards written to disk.
"""
import os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grpo_chess.engine import EnginePool
from grpo_chess.labels import LabelConfig, make_shard, write_shard

class Recorder:
    "A pool that remembers what it was asked."
    def __init__(self, pool): self.pool, self.fens = pool, []
    def submit_moves(self, fens, **kw): self.fens += fens; return self.pool.submit_moves(fens, **kw)

def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu

def main(n=10_000, rounds=3, depth=1):
    cfg = LabelConfig(rows=n, depth=depth)
    with EnginePool() as pool, tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(pool)
        shard = make_shard(recorder, cfg, 0)
        fens = recorder.fens[:n]
        runs = {"engines alone": lambda: pool.evaluate_moves(fens, depth=depth, trusted=True), "self-play labels": lambda: make_shard(pool, cfg, 0),
                "and written to disk": lambda: write_shard(Path(folder)/"x.parquet", make_shard(pool, cfg, 0), {})}
        took = {name: [] for name in runs}
        for _ in range(rounds):
            for name, f in runs.items(): took[name].append(timed(f))
        rate = {name: n/statistics.median(w for w, _ in t) for name, t in took.items()}
        print(f"{n} positions, {len(shard.actions)/n:.1f} moves each, depth {depth}, {pool.processes} engines, {rounds} rounds\n")
        for name, t in took.items():
            ratio = [a[0]/b[0] for a, b in zip(took["engines alone"], t)]
            print(f"{name:20} {rate[name]:7,.0f} positions/s   {1e6*statistics.median(c for _, c in t)/n:5.0f} us of Python a position   "
                  f"ratio {statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})")
        print(f"{os.path.getsize(os.path.join(folder, 'x.parquet'))/n:.0f} bytes a position on disk")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
