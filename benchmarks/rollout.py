"""Rollout and reward with a free policy, against what the engine pool alone does for as many positions.

    python benchmarks/rollout.py                                  # B=32 G=16 T=16, depth 4, all cores, a free policy
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
from grpo_chess.reward import Judge, RewardConfig, move_values, step_rewards
from grpo_chess.sampler import SamplerConfig, rollout


class Uniform(nn.Module):
    "A policy that costs nothing: every legal move alike."
    def forward(self, tokens, legal): return torch.zeros(legal.shape).masked_fill(legal < 0, -torch.inf)


def make_policy(model, device):
    "A free policy, or an untrained network of a preset."
    if model == "uniform": return Policy(Uniform())
    torch.manual_seed(0)
    return Policy(ChessTransformer(MODELS[model]).to(device).eval())


def judged(pool, policy, starts, cfg, step, depth, every):
    "Play and judge, sampled moves or every legal one; the positions that the engines were asked."
    judge = Judge(RewardConfig(depth=depth), pool)                           # a fresh cache
    if not every:
        step_rewards(rollout(policy, starts, cfg, 0, step, on_new=judge.submit), judge)
        return list(judge.known)
    ro = rollout(policy, starts, cfg, 0, step, on_turn=judge.submit_moves)
    move_values(ro, judge)
    return [ro.fens[r] for r in ro.node[..., :-1][ro.train].unique().tolist()]


def measure(pool, policy, boards, group, plies, depth, repeats, every=False):
    "Rollout + reward, and the pool alone on the same positions, in turn: positions a second, and the ratio of times."
    cfg = SamplerConfig(boards=boards, group=group, plies=plies)
    alone_too = pool.evaluate_moves if every else pool.evaluate
    both, alone, positions = [], [], 0
    for step in range(repeats + 1):
        starts = start_positions(boards, PositionsConfig(window_cp=0), 0, step)
        begin = time.perf_counter()
        fens = judged(pool, policy, starts, cfg, step, depth, every)
        middle = time.perf_counter()
        alone_too(fens, depth=depth, trusted=True)
        end = time.perf_counter()
        if step == 0: continue                                               # the first round warms up
        both.append(middle - begin)
        alone.append(end - middle)
        positions = len(fens)
    return report(f"B={boards} G={group} T={plies}{' every move' if every else ''}", positions, both, alone)


def report(name, positions, both, alone):
    "One line: positions a second of rollout and reward, of the pool alone, and the ratio of their times."
    ratios = sorted(a/b for a, b in zip(alone, both))
    print(f"{name}: {positions} positions; rollout + reward {positions/statistics.median(both):,.0f} positions/s, "
          f"pool alone {positions/statistics.median(alone):,.0f}; ratio {statistics.median(ratios):.2f} "
          f"(median of {len(ratios)}; {ratios[0]:.2f}–{ratios[-1]:.2f})", flush=True)
    return positions/statistics.median(both), statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="also with B, G and T doubled")
    parser.add_argument("--model", default="uniform", choices=["uniform", *MODELS])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(1)                                                 # the cores belong to the engines
    policy = make_policy(args.model, args.device)
    with EnginePool(EngineConfig()) as pool:
        measure(pool, policy, 32, 16, 16, args.depth, args.repeats)
        measure(pool, policy, 16, 1, 32, 1, args.repeats, True)              # as in the default run
        if not args.scaling: return
        for sizes in ((64, 16, 16), (32, 32, 16), (32, 16, 32)):
            measure(pool, policy, *sizes, args.depth, max(2, args.repeats//2))


if __name__ == "__main__": main()
