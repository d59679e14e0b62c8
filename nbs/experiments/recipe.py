"""What is each choice of the recipe worth? One change at a time, the same judged positions, three seeds.

    # labels: for the starts; for the runs, of which the first shard is the exam
    python -m grpo_chess.pretrain label --positions 100000 --rows 20000 --depth 1 --seed 201 --out KNOWN
    python -m grpo_chess.pretrain label --positions 300000 --rows 20000 --depth 1 --seed 202 --out NEW
    python nbs/experiments/recipe.py runs KNOWN NEW DIR      # every run is a file of DIR, kept; --seeds divides them
    python nbs/experiments/recipe.py table DIR               # data/recipe.csv of the runs that are there

The small network of law.py, from a start that has seen 100,000 of the judge's positions. A run has 30,000 new ones and
draws 120,000 times from them, in batches of 64: the default run's way, without its games.
"""

import argparse
import csv
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from headline import Runs
from law import SHAPE, TAU, exam_of, loss_of

from grpo_chess.improved import improved_policy
from grpo_chess.model import ChessTransformer, MoveDist
from grpo_chess.optimizer import make_optimizer, move_average
from grpo_chess.targets import spreads, to_batch

HERE = Path(__file__).resolve().parent
SEEN, JUDGED, DRAWN, WARMUP = 100_000, 30_000, 120_000, 30


@dataclass
class Recipe:
    "How a run learns; the default run's values."

    aim: str = "improved"  # or supervised, all moves, G=8: the methods of law.py
    old: str = "start"  # whose policy the improved one starts from: the start's, or the present one
    batch: int = 64
    lr: float = 1e-3
    muon: float = 10.0  # Muon's rate over AdamW's; 0 is AdamW alone
    decay: float = 0.0
    spread: float = 0.0  # of a position that is surely drawn
    mirror: bool = False
    ema: float = 0.0
    again: bool = True  # from the memory; else each position once, as it comes
    grows: bool = False  # learn from the first step on, from what is there


ARMS = {
    "the recipe": {},
    "each position once": dict(again=False),
    "from the first step on": dict(grows=True),
    "towards softmax(Q/τ)": dict(aim="supervised"),
    "towards π·exp(A/τ), π as it is now": dict(old="now"),
    "the exact policy gradient": dict(aim="all moves"),
    "eight sampled moves": dict(aim="G=8"),
    "AdamW alone": dict(muon=0.0),
    "twice the rates": dict(lr=2e-3),
    "half the rates": dict(lr=5e-4),
    "weight decay 0.01": dict(decay=0.01),
    "batches of 256": dict(batch=256),
    "boards turned": dict(mirror=True),
    "positions by their spread": dict(spread=0.12),
    "an average of the weights": dict(ema=0.99),
}


def chances(recipe, labels, numbers):
    "How likely each position is to be kept when it is drawn."
    if not recipe.spread:
        return np.ones(len(numbers))
    return np.minimum(1.0, spreads(labels.take(numbers)) / recipe.spread)


def numbers_of(recipe, numbers, chance, rng):
    "The positions of each update."
    updates = (DRAWN if recipe.again else JUDGED) // recipe.batch
    for k in range(updates):
        if not recipe.again:
            yield numbers[k * recipe.batch : (k + 1) * recipe.batch]
            continue
        there = max(recipe.batch, round((k + 1) / updates * len(numbers))) if recipe.grows else len(numbers)
        p = chance[:there] / chance[:there].sum()
        yield numbers[rng.choice(there, recipe.batch, replace=recipe.spread > 0, p=p if recipe.spread else None)]


def loss(recipe, dist, old, batch, rng):
    "The loss of one batch."
    if recipe.aim != "improved":
        return loss_of(recipe.aim, dist, batch, rng)[0]
    win, old = batch.win.nan_to_num(0.0), old or MoveDist(dist.logp.detach())
    adv = torch.where(dist.legal, win - (old.probs * win).sum(-1, keepdim=True), 0.0)
    aim = improved_policy(old.finite, adv, dist.legal, TAU)
    return (aim * (aim.clamp_min(1e-30).log() - dist.finite)).sum(-1).mean()


def dist_of(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return MoveDist.from_logits(model(batch.tokens, batch.legal))


def learn(model, start, labels, numbers, recipe, seed):
    "One run; what it ends with."
    rng = np.random.default_rng([204, seed])
    optimizer = make_optimizer(model, recipe.lr, recipe.decay, muon_lr=recipe.muon * recipe.lr)
    drawn = list(numbers_of(recipe, numbers, chances(recipe, labels, numbers), rng))
    kept = ChessTransformer(SHAPE)
    kept.load_state_dict(model.state_dict())
    for k, index in enumerate(drawn):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (k + 1) / WARMUP) * (1 - k / len(drawn))
        batch = to_batch(labels, index, mirror=rng.random(len(index)) < 0.5 if recipe.mirror else None)
        old = None
        if recipe.aim == "improved" and recipe.old == "start":
            with torch.no_grad():
                old = dist_of(start, batch)
        optimizer.zero_grad()
        loss(recipe, dist_of(model, batch), old, batch, rng).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if recipe.ema:
            move_average(kept, model, recipe.ema, k + 1)
    return kept if recipe.ema else model


class Recipes(Runs):
    "The runs of a folder, each a file, from the starts of headline.py; what is there is not made again."

    def learned(self, arm, seed):
        "One run; its row."
        done = self.folder / f"recipe_{list(ARMS).index(arm)}_{seed}.json"
        if done.exists():
            return
        start, model = self.start(SEEN, seed), self.start(SEEN, seed)
        numbers = np.random.default_rng([202, seed]).permutation(len(self.new))[:JUDGED]
        ended = learn(model, start, self.new, numbers, Recipe(**ARMS[arm]), seed)
        before, after = exam_of(start, self.exam), exam_of(ended, self.exam)
        gain = before["regret_greedy"] - after["regret_greedy"]
        gain = gain[~np.isnan(gain)]
        row = dict(arm=arm, seed=seed)
        for when, x in dict(before=before, after=after).items():
            row |= {f"{k}_{when}": float(np.nanmean(x[k])) for k in x}
        row |= dict(gain=float(gain.mean()), half=float(1.96 * gain.std(ddof=1) / len(gain) ** 0.5))
        done.write_text(json.dumps(row))
        print(f"{arm}, {seed}: {row['regret_greedy_before']:.4f} -> {row['regret_greedy_after']:.4f}", flush=True)


def table(folder):
    "The runs that are there."
    rows = [json.loads(f.read_text()) for f in folder.glob("recipe_*.json")]
    rows.sort(key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))
    with (HERE / "data/recipe.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("runs", "table"))
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="KNOWN, NEW and DIR; of table DIR")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    if args.what == "table":
        return table(args.folders[-1])
    runs = Recipes(*args.folders)
    for seed, arm in itertools.product(args.seeds, ARMS):
        runs.learned(arm, seed)


if __name__ == "__main__":
    main()
