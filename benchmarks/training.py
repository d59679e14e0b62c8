"""One training step of a preset: positions per second, share of this machine's own matrix-product rate, memory.

python benchmarks/training.py                    # tiny and record on the CPU, float32 and bfloat16
python benchmarks/training.py --models record base --device cuda
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

from grpo_chess.board import encode
from grpo_chess.model import MODELS, ChessTransformer, Policy, forward_flops
from grpo_chess.positions import PositionsConfig, start_positions


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(f, device, repeats=5):
    "Median seconds of a call, after one that is not counted."
    f()
    sync(device)
    out = []
    for _ in range(repeats):
        t = time.perf_counter()
        f()
        sync(device)
        out.append(time.perf_counter() - t)
    return statistics.median(out)


def matmul_rate(device, dtype, n=0):
    "Best FLOP/s of a square matrix product here."
    n = n or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / timed(lambda: a @ b, device, 3) for _ in range(3))


def update_rate(name, device, dtype, positions):
    "Positions per second of forward + backward + AdamW on positions from random play."
    torch.manual_seed(0)
    model = ChessTransformer(MODELS[name]).to(device).eval()
    boards = start_positions(positions, PositionsConfig(window_cp=0), 0, 0)
    tokens, legal = (torch.as_tensor(x).to(device) for x in encode(boards))
    optimizer, policy = torch.optim.AdamW(model.parameters(), lr=1e-4), Policy(model)
    slot = torch.zeros(positions, dtype=torch.long, device=device)

    def step():
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = -policy.dist(tokens, legal).log_prob(slot).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return positions / timed(step, device)


def step_memory(name, boards=32, group=16, plies=16):
    "Time and peak resident memory (Linux, CPU) of one GRPO step, in a process of its own."
    code = f"""
from pathlib import Path
from grpo_chess.reward import Judge, RewardConfig
from grpo_chess.sampler import SamplerConfig
from grpo_chess.batch import make_fabric
from grpo_chess.trainer import Trainer, TrainerConfig
from grpo_chess.model import MODELS, ChessTransformer
from grpo_chess.positions import PositionsConfig, start_positions
def peak():      # MiB, of this process alone
    status = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in status if line.startswith('VmHWM')).split()[1])/2**10
def starts(step, first, n): return start_positions(n, PositionsConfig(window_cp=0), 0, step, first=first)
base = peak()
t = Trainer(make_fabric('32-true', 'cpu'), ChessTransformer(MODELS[{name!r}]), starts,
            Judge(RewardConfig(judge='material')), SamplerConfig(boards={boards}, group={group}, plies={plies}),
            trainer=TrainerConfig())
row = t.step(); print(base, peak(), row['plies'], row['seconds'])
"""
    base, peak, n, seconds = map(
        float,
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-4:],
    )
    print(
        f"{name}: one step at B={boards} G={group} T={plies} ({n:,.0f} plies): peak {peak:,.0f} MiB, "
        f"of which {base:,.0f} before it; {seconds:.1f} s with the material judge",
        flush=True,
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["tiny", "record"])
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--positions", type=int, default=512)
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--scaling", action="store_true", help="also a step of the first model with B, G and T doubled")
    args = p.parse_args()
    print(
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "· torch",
        torch.__version__,
    )
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_rate(args.device, dtype)
        print(f"{dtype}: matrix product {peak / 1e9:,.0f} GFLOP/s")
        for name in args.models:
            rate = update_rate(name, args.device, dtype, args.positions)
            flops = 3 * forward_flops(MODELS[name]) * rate
            print(
                f"  {name}: {rate:,.0f} positions/s, {flops / 1e9:,.0f} GFLOP/s, {flops / peak:.0%} "
                "of the matrix product",
                flush=True,
            )
    if args.device == "cpu" and not args.no_memory:
        for name in args.models:
            step_memory(name)
        for shape in ((64, 16, 16), (32, 32, 16), (32, 16, 32)) if args.scaling else ():
            step_memory(args.models[0], *shape)
    if args.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
