"""All that has to be measured on a GPU, in one script and under ten minutes.

    python benchmarks/gpu.py                        # writes gpu.md beside this file, part by part
    python benchmarks/gpu.py --device cpu --small   # the same script on a CPU, in about a minute, to see that it runs

Parts: the ratio error right after sampling in each precision; forward + backward + AdamW of `record` and `base` against
this GPU's own matrix product; rollout and reward with a network on the GPU and an engine on every core, against the
engines alone; the `colab` preset as a user runs it. A part that fails says so in its row, and the next one begins.
"""
import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from rollout import make_policy, measure
from training import matmul_rate, update_rate

from grpo_chess.config import preset
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import MODELS, ChessTransformer, forward_flops
from grpo_chess.positions import PositionsConfig, start_positions
from grpo_chess.reward import Judge, RewardConfig
from grpo_chess.sampler import SamplerConfig
from grpo_chess.train import run
from grpo_chess.trainer import Trainer, TrainerConfig

TYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SIZES = dict(models=("record", "base"), matrix=8192, positions=2048, boards=64, plies=16, steps=8, colab={})
SMALL = dict(models=("tiny",), matrix=128, positions=4, boards=2, plies=2, steps=2, colab={
    "model": dict(width=32, layers=1, heads=2), "sampler": dict(boards=2, group=4, plies=2), "trainer.micro_batch": 8})


def fabric_of(precision, device):
    "Fabric in a precision; float16 on a CPU has a loss scaler too, which Fabric itself refuses."
    scaled = precision == "16-mixed"
    own = MixedPrecision(precision, device, torch.amp.GradScaler(device)) if scaled else None
    fabric = Fabric(accelerator=device, devices=1, plugins=[own]) if own else Fabric(
        accelerator=device, devices=1, precision=precision)
    fabric.launch()
    return fabric


def ratio_errors(args, size):
    "Largest |log ratio| before the first update of a step, over some steps, in each precision."
    def starts(step, first, n): return start_positions(n, PositionsConfig(window_cp=0), 0, step, first=first)
    for precision in TYPES:
        torch.manual_seed(0)
        net = ChessTransformer(MODELS[size["models"][0]])
        with torch.no_grad(): net.head.source.weight.mul_(30)          # scores as far apart as after training
        games = SamplerConfig(boards=size["boards"], group=4, plies=size["plies"])
        trainer = Trainer(fabric_of(precision, args.device), net, starts, Judge(RewardConfig(judge="material")), games,
                          trainer=TrainerConfig(steps=100, lr=1e-4, micro_batch=1024, budget_every=0))
        rows = [trainer.step() for _ in range(size["steps"])]
        worst, rate = max(r["ratio_error"] for r in rows), rows[-1]["plies"]/min(r["seconds"] for r in rows)
        yield (f"ratio error, {size['models'][0]}, {precision}", f"{worst:.1e}",
               f"{rate:,.0f} plies/s with the material judge; gradient norm {rows[-1]['grad_norm']:.2f}")


def updates(args, size):
    "Training throughput against the matrix product of this machine."
    for precision, dtype in TYPES.items():
        peak = matmul_rate(args.device, dtype, size["matrix"])
        yield f"matrix product, {precision}", f"{peak/1e12:,.2f} TFLOP/s", ""
        for name in size["models"]:
            rate = update_rate(name, args.device, dtype, size["positions"])
            share = 3*forward_flops(MODELS[name])*rate/peak
            yield (f"update of {name}, {precision}", f"{share:.0%} of the matrix product",
                   f"{rate:,.0f} positions/s, {rate/size['positions']:.2f} steps/s of {size['positions']}")


def rollouts(args, size):
    "Playing and judging, with an engine on every core."
    with EnginePool(EngineConfig()) as pool:
        for name in ("uniform", size["models"][0]):
            done, ratio = measure(pool, make_policy(name, args.device), size["boards"], 16, size["plies"], 4, 3)
            yield (f"rollout and reward, {name}, {pool.processes} engines", f"{ratio:.2f} of the engines alone",
                   f"{done:,.0f} positions/s at depth 4")


def colab(args, size):
    "The preset for a Colab GPU, as a user runs it, without its matches."
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        changes = dict(out=out, accelerator=args.device, match=dict(games=0)) | size["colab"]
        cfg = preset("colab", **changes)
        steps = 10**4 if args.minutes else size["steps"]
        cfg = replace(cfg, minutes=args.minutes, trainer=replace(cfg.trainer, steps=steps))
        rows = run(cfg, quiet=True).rows
    rows, took = rows[1:] or rows, time.perf_counter() - began
    seconds = sum(r["seconds"] for r in rows)
    yield ("preset colab, end to end", f"{sum(r['plies'] for r in rows)/seconds:,.0f} plies/s",
           f"{len(rows)} steps of {seconds/len(rows):.2f} s, {sum(r['seconds_play'] for r in rows)/seconds:.0%} of it "
           f"playing and judging; ratio error {max(r['ratio_error'] for r in rows):.1e}; {took:.0f} s in all")
    if args.device == "cuda":
        used, there = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        yield "peak GPU memory so far", f"{used/2**30:.1f} GiB", f"of {there/2**30:.0f} GiB"


def write(path, args, rows, took):
    "The table as it is now."
    name = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU, which says nothing about a GPU"
    cores = len(os.sched_getaffinity(0))
    head = (f"# GPU measurements\n\nMade by `python benchmarks/gpu.py` on {name}, {cores} cores, torch "
            f"{torch.__version__}, in {took/60:.1f} minutes.\n\n| | | |\n|---|---|---|\n")
    path.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU and for a test")
    parser.add_argument("--minutes", type=float, help="for the colab preset (default: 2, with --small a few steps)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.md"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here that torch can use; --device cpu --small shows that the script runs")
    if args.minutes is None: args.minutes = 0. if args.small else 2.
    began, rows = time.perf_counter(), []
    for part in (ratio_errors, updates, rollouts, colab):
        try:
            for row in part(args, SMALL if args.small else SIZES):
                print(" | ".join(row), flush=True)
                rows.append(row)
                write(args.out, args, rows, time.perf_counter() - began)
        except Exception as e:
            rows.append((part.__name__, "failed", f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"))
            print(*rows[-1], sep=" | ", flush=True)
            write(args.out, args, rows, time.perf_counter() - began)
    print(f"{args.out} written after {time.perf_counter() - began:.0f} s")
    sys.exit(any(row[1] == "failed" for row in rows))


if __name__ == "__main__": main()
