"""Is it the wrong ratio that kept the record's runs from learning? Its settings where a run can learn.

    # labels: for the starts; for the runs, of which the first shard is the exam
    python -m grpo_chess.pretrain label --positions 100000 --rows 20000 --depth 1 --seed 201 --out KNOWN
    python -m grpo_chess.pretrain label --positions 300000 --rows 20000 --depth 1 --seed 202 --out NEW
    python nbs/experiments/headline.py rates KNOWN NEW DIR   # which learning rate: the right ratio, a seed apart
    python nbs/experiments/headline.py runs KNOWN NEW DIR    # every run is a file of DIR, kept; --seeds divides them
    python nbs/experiments/headline.py table DIR             # data/headline.csv of the runs that are there

The trainer of this package with what the record's clean run had: 32 positions, groups of 16, games at temperature 1.3,
AdamW, advantages that are centred and not divided, no entropy bonus, a network with dropout of 0.1. An arm scores the
games at 1.3 or at 1, with dropout off or on; a fifth has the right ratio, no dropout, and a small bonus. A game is one
ply from a labelled position, so no engine is needed; a position is used once. A run takes eight minutes of a core.
"""

import argparse
import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import chess
import numpy as np
import torch
from grid import Stored
from law import SHAPE, apart, exam_of, labels_of
from law import train as teach
from safetensors.torch import load_file, save_file

from grpo_chess.batch import make_fabric
from grpo_chess.board import action_to_move, position_key
from grpo_chess.loss import LossConfig
from grpo_chess.model import ChessTransformer, describe
from grpo_chess.reward import Judge, RewardConfig
from grpo_chess.sampler import SamplerConfig
from grpo_chess.targets import to_batch
from grpo_chess.trainer import AblateConfig, Trainer, TrainerConfig

HERE = Path(__file__).resolve().parent
STEPS, EVERY, BOARDS, TEMPERATURE = 2000, 500, 32, 1.3
RATES = {100_000: 3e-4}  # by what the start has seen: of the two best of `rates`, which are alike, the higher
# the loss's temperature, dropout, entropy bonus
ARMS = [*itertools.product((TEMPERATURE, 1.0), (False, True), (0.0,)), (TEMPERATURE, False, 0.02)]
KEPT = ("train/avg_reward", "clip_region", "clip_binding", "ratio_error", "no_spread", "kl_step")


class Labelled(Judge):
    "A judge that knows the labelled positions of one step, and what follows from every legal move there."

    submit = Stored.submit

    def __init__(self, labels):
        super().__init__(RewardConfig(judge="material"))
        self.labels = labels

    def starts(self, numbers):
        "Start positions of a step, each used once, in the order of `numbers`."

        def of_step(step, first, n):
            at = numbers[step * BOARDS + first : step * BOARDS + first + n]
            batch, boards = to_batch(self.labels, at), []
            self.known.clear()
            for tokens, legal, win in zip(batch.tokens.numpy(), batch.legal.tolist(), batch.win.tolist()):
                boards.append(board := chess.Board(describe(tokens)))
                values = {a: v for a, v in zip(legal, win) if a >= 0}
                self.known[position_key(board)] = max(values.values())
                for a, v in values.items():
                    board.push(action_to_move(a, board.turn))
                    self.known[position_key(board)] = 1 - v
                    board.pop()
            return boards

        return of_step


class Runs:
    "The runs of a folder, each a file; what is there is not made again."

    def __init__(self, known, new, folder):
        self.folder, self.known, self.new = folder, labels_of(known), labels_of(new, 1)
        self.exam = apart(labels_of(new, 0, 1), self.new, self.known)
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def start(self, seen, seed):
        "The network that has seen some positions of the judge."
        weights = self.folder / f"start_{seen}_{seed}.safetensors"
        torch.manual_seed(seed)
        model = ChessTransformer(replace(SHAPE, dropout=0.1)).eval()
        if weights.exists():
            model.load_state_dict(load_file(weights), strict=False)
        else:
            numbers = np.random.default_rng([201, seed]).permutation(len(self.known))[:seen]
            teach(model, self.known, numbers, "supervised", 1e-3, seed)
            save_file(model.state_dict(), weights)
        return model

    def run(self, seen, scored, dropout, bonus, seed, rate):
        "One run; its rows."
        what = f"{seen}_{scored:g}_{'dropout' if dropout else 'none'}_{bonus:g}_{seed}_{rate:g}"
        done = self.folder / f"{what}.json"
        if done.exists():
            return
        model, judge = self.start(seen, seed), Labelled(self.new)
        numbers = np.random.default_rng([202, seed]).permutation(len(self.new))
        trainer = Trainer(
            make_fabric("32-true", "cpu"),
            model,
            judge.starts(numbers),
            judge,
            SamplerConfig(boards=BOARDS, group=16, plies=1, temperature=TEMPERATURE),
            LossConfig(scale="none", entropy_coef=bonus),
            TrainerConfig(steps=STEPS, lr=rate, warmup=20, budget_every=0),
            AblateConfig(loss_temperature=scored if scored != TEMPERATURE else 0.0, dropout=dropout),
            seed,
        )
        who = dict(seen=seen, loss_temperature=scored, dropout=int(dropout), seed=seed, rate=rate, bonus=bonus)
        before, rows, steps = None, [], []
        for step in range(STEPS + 1):
            if step % EVERY == 0:
                now = exam_of(model.eval(), self.exam)
                model.train(dropout)
                before = now if before is None else before
                gain = before["regret_greedy"] - now["regret_greedy"]
                gain = gain[~np.isnan(gain)]
                row = dict(who, step=step, **{k: float(np.nanmean(x)) for k, x in now.items()})
                row |= dict(gain=float(gain.mean()), half=float(1.96 * gain.std(ddof=1) / len(gain) ** 0.5))
                rows.append(row | {k: float(np.mean([s[k] for s in steps])) if steps else None for k in KEPT})
                steps = []
            if step < STEPS:
                steps.append(trainer.step())
        save_file(model.state_dict(), done.with_suffix(".safetensors"))
        done.write_text(json.dumps(rows))
        print(done.stem, *[f"{r['regret_greedy']:.4f}" for r in rows], flush=True)


def table(folder):
    "All rows of the runs that are there."
    rows = [r for f in sorted(folder.glob("[0-9]*.json")) for r in json.loads(f.read_text())]
    with (HERE / "data/headline.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "runs", "table"))
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="KNOWN, NEW and DIR; of table DIR")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seen", type=int, nargs="*", default=list(RATES), help="what the start has seen")
    args = parser.parse_args()
    if args.what == "table":
        return table(args.folders[-1])
    runs = Runs(*args.folders)
    for seen in args.seen:
        if args.what == "rates":
            for rate in (1e-4, 3e-4, 1e-3):
                runs.run(seen, TEMPERATURE, False, 0.0, 9, rate)
        else:
            for seed, arm in itertools.product(args.seeds, ARMS):
                runs.run(seen, *arm, seed, RATES[seen])


if __name__ == "__main__":
    main()
