"""Small runs on stored positions: the data behind nbs/findings/entropy_collapse.ipynb and
nbs/findings/learning_rate.ipynb.

nbs/data/positions.jsonl holds 256 real positions with the engine's value of every legal move. A game of one ply
from one of them
ends in a position whose value is known, so that these runs need no engine and their regret is exact. They train on
every second
position, and regret is measured on the others.

    python nbs/experiments/grid.py lr_entropy_grid     # -> nbs/data/lr_entropy_grid.csv, 60 runs
    python nbs/experiments/grid.py forgetting          # -> nbs/data/forgetting.csv, 36 runs
    # -> nbs/data/mismatch.csv, 12 runs; up to five minutes each on one idle core
    python nbs/experiments/grid.py mismatch
"""

import argparse
import csv
import itertools
import json
import math
from pathlib import Path

import chess
import numpy as np
import torch

from grpo_chess.batch import make_fabric
from grpo_chess.board import action_to_move, encode, position_key
from grpo_chess.loss import LossConfig
from grpo_chess.model import MoveDist, Policy, load_model
from grpo_chess.reward import Judge, RewardConfig, win_probability
from grpo_chess.sampler import SamplerConfig
from grpo_chess.trainer import AblateConfig, Trainer, TrainerConfig

START = Path(__file__).resolve().parent.parent / "data/start.safetensors"  # the first weights that the package shipped
DATA = START.parent


class Stored(Judge):
    "A judge that knows the stored positions and what follows from every legal move there, and nothing else."

    def __init__(self, path: Path = DATA / "positions.jsonl"):
        super().__init__(RewardConfig(judge="material"))
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        self.boards = [chess.Board(line["fen"]) for line in lines]
        self.tokens, self.legal = map(torch.as_tensor, encode(self.boards))  # [256, 65], [256, L]
        self.value = torch.zeros(self.legal.shape)  # [256, L] of each move, for its mover
        for i, (board, line) in enumerate(zip(self.boards, lines)):
            value = dict(zip(line["moves"], win_probability(np.array(list(line["moves"].values()))).tolist()))
            self.known[position_key(board)] = max(value.values())
            for move, v in value.items():
                board.push_uci(move)
                self.known[position_key(board)] = 1 - v
                board.pop()
            for j, a in enumerate(self.legal[i].tolist()):
                if a >= 0:
                    self.value[i, j] = value[action_to_move(a, board.turn).uci()]
        self.train, self.held_out = range(0, len(lines), 2), range(1, len(lines), 2)

    def submit(self, fens: list[str]) -> None:
        if missing := [f for f in fens if f not in self.known]:
            raise KeyError(f"not among the stored positions: {missing[0]}")

    def starts(self, seed: int):
        "Start positions of a step, drawn without repetition from those that train."
        return lambda step, first, n: [
            self.boards[i] for i in np.random.default_rng([seed, step]).permutation(self.train)[first : first + n]
        ]

    @torch.no_grad()
    def measure(self, model, temperature: float = 1.0) -> dict[str, float]:
        """On the positions that do not train: expected win probability lost when sampling, and when playing the
        most likely move; entropy."""
        rows = list(self.held_out)
        dist = Policy(model, temperature).dist(self.tokens[rows], self.legal[rows])
        lost = self.value[rows].max(-1, keepdim=True).values - self.value[rows]
        return dict(
            regret=(dist.probs * lost).sum(-1).mean().item(),
            regret_argmax=lost.gather(1, dist.argmax()[:, None]).mean().item(),
            entropy=dist.entropy().mean().item(),
        )


@torch.no_grad()
def tempered(
    judge: Stored,
    model,  # not trained any further
    low: float = 0.02,  # temperatures from here
    high: float = 3.0,  # ... to here
    n: int = 80,  # how many
) -> tuple[np.ndarray, np.ndarray]:  # entropy, which rises, and regret when sampling, both held out
    """What temperature alone does: a policy sampled at many temperatures, to be compared with a trained one at the
    same entropy."""
    rows = list(judge.held_out)
    logp = Policy(model).dist(judge.tokens[rows], judge.legal[rows]).logp
    lost = judge.value[rows].max(-1, keepdim=True).values - judge.value[rows]
    dists = [MoveDist.from_logits(logp, temperature) for temperature in np.geomspace(low, high, n).tolist()]
    return np.array([d.entropy().mean().item() for d in dists]), np.array(
        [(d.probs * lost).sum(-1).mean().item() for d in dists]
    )


def small_run(
    judge: Stored, seed: int = 0, loss: dict = None, sampler: dict = None, ablate=None, guard=None, net=None, **trainer
) -> Trainer:
    """A trainer on the stored positions, from `start.safetensors` unless `net` is given; advantages are centred
    and not divided, as in the record."""
    torch.manual_seed(seed)
    return Trainer(
        make_fabric("32-true", "cpu"),
        net or load_model(START),
        judge.starts(seed),
        judge,
        SamplerConfig(**dict(boards=8, group=16, plies=1) | (sampler or {})),
        LossConfig(**dict(scale="none") | (loss or {})),
        TrainerConfig(**dict(warmup=0, decay="constant", budget_every=0) | trainer),
        ablate,
        seed,
        guard=guard,
    )


def history(judge: Stored, trainer: Trainer, steps: int, every: int, columns: tuple[str, ...]):
    """Held-out measures after 0, `every`, ... steps, with the mean of some of the log's columns over the steps
    since the row before."""
    rows = []
    for step in range(steps + 1):
        if step % every == 0:
            measured = judge.measure(trainer.model)
            yield (
                dict(step=step)
                | measured
                | {k: float(np.mean([r[k] for r in rows[-every:]])) if rows else math.nan for k in columns}
            )
        if step < steps:
            rows.append(trainer.step())


def lr_entropy_grid(judge: Stored):
    """Learning rate against entropy coefficient (exact entropy): does the policy become certain, and does it
    become good?"""
    for lr, coef, seed in itertools.product((3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (0.0, 0.01, 0.02, 0.03), range(3)):
        for row in history(
            judge,
            small_run(judge, seed, dict(entropy_coef=coef), lr=lr),
            40,
            8,
            ("agreement_mean", "reward_spread", "advantage_std", "train/avg_reward"),
        ):
            yield dict(lr=lr, entropy_coef=coef, seed=seed) | row


def forgetting(judge: Stored):
    "Learning rate, PPO epochs and frozen layers: what becomes of the policy that was there?"
    for lr, (epochs, freeze), seed in itertools.product((3e-5, 1e-4, 3e-4, 1e-3), ((1, 0), (4, 0), (4, 2)), range(3)):
        for row in history(
            judge, small_run(judge, seed, lr=lr, epochs=epochs, freeze=freeze), 24, 8, ("clip_region", "kl_step")
        ):
            yield dict(lr=lr, epochs=epochs, freeze=freeze, seed=seed) | row


def mismatch(judge: Stored):
    "Games at temperature 1.3, with a loss at the same temperature and at 1: does the wrong ratio stop a run?"
    for lr, loss_temperature, seed in itertools.product((1e-4, 3e-4), (1.3, 1.0), range(3)):
        t = small_run(
            judge,
            seed,
            sampler=dict(temperature=1.3),
            ablate=AblateConfig(loss_temperature=loss_temperature if loss_temperature != 1.3 else 0.0),
            lr=lr,
        )
        for row in history(judge, t, 60, 20, ("clip_region", "clip_binding")):
            yield dict(lr=lr, loss_temperature=loss_temperature, seed=seed) | row


def main() -> None:
    "Run one of the experiments and write its table."
    torch.set_num_threads(1)
    known, parser = (
        dict(lr_entropy_grid=lr_entropy_grid, forgetting=forgetting, mismatch=mismatch),
        argparse.ArgumentParser(description=__doc__.splitlines()[0]),
    )
    parser.add_argument("name", choices=known)
    name = parser.parse_args().name
    made, rows = known[name], []
    with open(DATA / f"{name}.csv.tmp", "w", newline="") as f:
        for row in made(Stored()):
            if not rows:
                writer = csv.DictWriter(f, row.keys(), lineterminator="\n")
                writer.writeheader()
            rows.append(row)
            writer.writerow({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})
            f.flush()
    (DATA / f"{name}.csv.tmp").rename(DATA / f"{name}.csv")


if __name__ == "__main__":
    main()
