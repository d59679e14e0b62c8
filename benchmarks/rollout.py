"""Rollout and reward with a free policy, against what the engine pool alone does for as many positions.

    python benchmarks/rollout.py                                  # B=32 G=16 T=16, depth 4, all cores, a policy that costs nothing
    python benchmarks/rollout.py --scaling                        # also with B, G and T doubled
    python benchmarks/rollout.py --model record --device cuda     # a network's share of the time
"""
import argparse
import statistics
import time

import torch
from torch import nn

from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import MODELS, ChessTransformer, Policy
from grpo_chess.positions import PositionsConfig, start_positions
from grpo_chess.reward import Judge, RewardConfig, step_rewards
from grpo_chess.sampler import SamplerConfig, rollout


class Uniform(nn.Module):
    "A policy that costs nothing: every legal move alike."
    def forward(self, tokens, legal): return torch.zeros(legal.shape).masked_fill(legal < 0, -torch.inf)


def make_policy(model, device):
    "A free policy, or an untrained network of a preset."
    if model == "uniform": return Policy(Uniform())
    torch.manual_seed(0)
    return Policy(ChessTransformer(MODELS[model]).to(device).eval())


def measure(pool, policy, boards, group, plies, depth, repeats):
    "Seconds of rollout + reward, and of the pool alone on the same positions, in turn; medians and their ratio."
    cfg = SamplerConfig(boards=boards, group=group, plies=plies)
    together, alone, positions = [], [], 0
    for step in range(repeats + 1):
        starts = start_positions(boards, PositionsConfig(window_cp=0), 0, step)
        judge = Judge(RewardConfig(depth=depth), pool)                       # a fresh cache
        t = time.perf_counter()
        step_rewards(rollout(policy, starts, cfg, 0, step, on_new=judge.submit), judge)
        t, fens = time.perf_counter() - t, list(judge.known)
        s = time.perf_counter()
        pool.evaluate(fens, depth=depth, trusted=True)
        s = time.perf_counter() - s
        if step: together.append(t); alone.append(s); positions = len(fens)  # the first round warms up
    ratio = statistics.median(a/t for a, t in zip(alone, together))
    print(f"B={boards} G={group} T={plies}: {positions} positions; rollout + reward {positions/statistics.median(together):,.0f} positions/s, "
          f"pool alone {positions/statistics.median(alone):,.0f}; ratio {ratio:.2f} (median of {repeats}; {min(a/t for a, t in zip(alone, together)):.2f}–{max(a/t for a, t in zip(alone, together)):.2f})", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, default=4); p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--scaling", action="store_true", help="also with B, G and T doubled")
    p.add_argument("--model", default="uniform", choices=["uniform", *MODELS]); p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = p.parse_args()
    torch.set_num_threads(1)                                                 # the cores belong to the engines
    policy = make_policy(args.model, args.device)
    with EnginePool(EngineConfig()) as pool:
        measure(pool, policy, 32, 16, 16, args.depth, args.repeats)
        if args.scaling:
            for b, g, t in ((64, 16, 16), (32, 32, 16), (32, 16, 32)): measure(pool, policy, b, g, t, args.depth, max(2, args.repeats//2))
