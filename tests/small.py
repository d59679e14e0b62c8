"Small runs on the material judge, which need no engine."
import chess
import numpy as np
import torch

from grpo_chess.batch import make_fabric
from grpo_chess.loss import LossConfig
from grpo_chess.model import ChessTransformer, ModelConfig
from grpo_chess.positions import PositionsConfig, start_positions
from grpo_chess.reward import Judge, RewardConfig
from grpo_chess.sampler import SamplerConfig
from grpo_chess.trainer import Trainer, TrainerConfig

SMALL = ModelConfig(width=32, layers=2, heads=2)
GAMES = dict(boards=6, group=4, plies=3)
TIMES = {"seconds", "seconds_play", "seconds_update", "judged"}
FABRIC = make_fabric("32-true", "cpu")

def make(seed=0, model=SMALL, sampler=None, loss=None, ablate=None, starts=None, sharpen=1., guard=None,
         fabric=FABRIC, net=None, **trainer):
    "A small trainer; `sharpen` spreads the scores as training does."
    torch.manual_seed(seed)
    if net is None:
        net = ChessTransformer(model)
        with torch.no_grad(): net.head.source.weight.mul_(sharpen)

    def random_openings(step, first, n):
        return start_positions(n, PositionsConfig(window_cp=0), seed, step, first=first)
    settings = TrainerConfig(**dict(steps=8, warmup=0, lr=1e-3) | trainer)
    return Trainer(fabric, net, starts or random_openings, Judge(RewardConfig(judge="material")),
                   SamplerConfig(**GAMES | (sampler or {})), LossConfig(**(loss or {})), settings, ablate, seed,
                   guard=guard)

def always(fen):
    "Start positions: this one."
    def starts(step, first, n): return [chess.Board(fen) for _ in range(n)]
    return starts

QUEEN = "4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1"       # the pawn takes it

def queen(guard=None, **kw):
    "A run whose entropy falls: one position with a free queen, at a high learning rate."
    games = dict(boards=2, group=16, plies=1)
    return make(starts=always(QUEEN), sampler=games, guard=guard, **dict(lr=3e-3, steps=30) | kw)

def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

def weights(t): return flat(t.model)

def gradient(t): return torch.cat([p.grad.flatten() for p in t.params])

def untimed(row): return {k: v for k, v in row.items() if k not in TIMES and v == v}

def steps(t, n): return [untimed(t.step()) for _ in range(n)]

def nan_scores(scores): return np.full(len(scores), np.nan, np.float32)
