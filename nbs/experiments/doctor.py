"""Plant one fault in a small run, and see whether the doctor names it.

    python nbs/experiments/doctor.py light DIR [--jobs N]   # make the runs that are missing, as DIR/*.json.gz
    python nbs/experiments/doctor.py runs DIR [--jobs N]    # the same with the real trainer, ten times as long
    python nbs/experiments/doctor.py verdicts DIR [--split tuned]   # ask the doctor; writes data/doctor.csv
    python nbs/experiments/doctor.py runs DIR --split unseen --few 6 --healthy 24      # a part of them
    python nbs/experiments/doctor.py runs DIR --split fresh --healthy 12
    python nbs/experiments/doctor.py verdicts DIR --table doctor_trainer.csv

The runs are small networks on real positions with a judge that counts material, so that they need no engine. The
light ones are games of one move (planted.py), which share the loss, the advantages and the ratio statistics with the
real trainer and take a few milliseconds a step.
Each fault has settings on which thresholds were tuned and settings that were looked at once, at the end. `verdicts
--split tuned` looks at the former alone and writes nothing. `--few 6` makes the first six runs of each fault: two of
each of three settings.
A healthy run has no fault. What the doctor is told of a run are its columns and those settings that a user has in
a configuration file; never what was planted.
"""

import argparse
import copy
import csv
import gzip
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch

from grpo_chess.batch import make_fabric
from grpo_chess.board import encode, parse_fen, position_key
from grpo_chess.detectors import tempered_regret
from grpo_chess.doctor import diagnose
from grpo_chess.firststep import keep_top
from grpo_chess.guards import GuardConfig
from grpo_chess.history import from_rows
from grpo_chess.loss import LossConfig
from grpo_chess.model import ChessTransformer, ModelConfig, MoveDist, Policy
from grpo_chess.reward import SCALES, Judge, RewardConfig, material, step_rewards
from grpo_chess.sampler import SamplerConfig
from grpo_chess.trainer import AblateConfig, NotFinite, Trainer, TrainerConfig
from planted import Light

HERE = Path(__file__).resolve().parent
STEPS = 100
FABRIC = make_fabric("32-true", "cpu")
LOOKS = (1, 2, 3, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90)  # rows that are there when the doctor looks


class Truncated:
    "A policy that keeps only its likely moves, as top-p and top-k do."

    def __init__(self, policy, keep):
        self.policy, self.keep = policy, keep

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def dist(self, tokens, legal):
        logp = self.policy.dist(tokens, legal).logp
        kept = torch.as_tensor(keep_top(logp.detach().double().numpy(), self.keep)).float()
        return MoveDist(torch.where(logp.isfinite(), kept.clamp_min(-60.0), -torch.inf))  # -inf would make KL a NaN


class Rounded(Truncated):
    "A policy whose log-probabilities are computed in bfloat16."

    def dist(self, tokens, legal):
        logp = self.policy.dist(tokens, legal).logp
        rough = logp.nan_to_num(neginf=-1e4).to(torch.bfloat16).float()
        return MoveDist.from_logits(torch.where(logp.isfinite(), rough, -torch.inf))


class Planted(Trainer):
    "A trainer whose sampler, rewards or updates may have a fault."

    wrap, times, rescored, sharper, tables = None, 1.0, False, 1.0, None

    def policy(self, model, loss=False):
        made = super().policy(model, loss)
        return self.wrap(made) if self.wrap and not loss else made

    def play(self):
        batch = super().play()
        batch.adv = batch.adv * self.times
        batch.stats["advantage_std"] *= abs(self.times)
        if self.rescored:  # judge the same games again
            first = step_rewards(batch.rollout, self.judge).sum(-1)
            self.judge.known.clear()
            again = step_rewards(batch.rollout, self.judge).sum(-1)
            batch.stats["reward_noise"] = ((first - again).std() / 2**0.5).item()
        if self.tables:
            entropy = MoveDist(batch.rollout.logp).entropy()[batch.rollout.node[..., :-1][batch.rollout.train]].mean()
            batch.stats["start_regret"] = float(tempered_regret(np.array([float(entropy)]), self.tables)[0])
        return batch

    def update(self, batch):
        moved = super().update(batch)
        if self.sharper != 1:
            with torch.no_grad():
                self.model.head.source.weight.mul_(self.sharper)
        return moved


POSITIONS = [json.loads(line)["fen"] for line in (HERE.parent / "data" / "positions.jsonl").open() if '"fen"' in line]


def positions_of(seed):
    "Start positions: real ones, drawn by step and board."

    def starts(step, first, n):
        rng = np.random.default_rng([seed, step, first])
        return [parse_fen(POSITIONS[i]) for i in rng.choice(len(POSITIONS), n, replace=False)]

    return starts


CENTRE = [3 - max(abs(2 * (q % 8) - 7), abs(2 * (q // 8) - 7)) // 2 for q in range(64)]  # 0 at the edge
KNOWN = {}


def worth(board):
    "Material and, so that moves differ, the pieces' nearness to the centre; centipawns for the side to move."
    key = position_key(board)
    if key not in KNOWN:
        place = sum((6 if p.color else -6) * CENTRE[q] for q, p in board.piece_map().items())
        KNOWN[key] = int(material([key])[0]) + (place if board.turn else -place)
    return KNOWN[key]


class Remembering(Judge):
    "A judge that keeps the values of all moves of the positions it has met."

    table: dict = {}

    def of_moves(self, fens, legal):
        for fen, row in zip(fens, legal):
            if fen not in self.table:
                self.table[fen] = super().of_moves([fen], row[row >= 0][None])[0]
        out = torch.zeros(legal.shape)
        for k, fen in enumerate(fens):
            out[k, : len(self.table[fen])] = self.table[fen]
        return out


def judge_of(noise=0.0, shrink=1.0, seed=0):
    "Win probability by material and place, shrunk towards a half, with noise."
    rng = np.random.default_rng(seed)

    def value(boards):
        x = SCALES["win"].value(np.array([worth(b) for b in boards])).astype(float)
        return np.clip(0.5 + shrink * (x - 0.5) + noise * rng.standard_normal(len(x)), 0, 1)

    plain = not noise and shrink == 1
    return (Remembering if plain else Judge)(RewardConfig(judge="own"), value=value)


FAULTS = {  # name: settings to tune on, settings to be judged on; each is what differs from a healthy run
    "two_temperatures": (
        [dict(gap=1.35), dict(gap=0.75), dict(gap=1.3, tau=1.3), dict(gap=1.2), dict(gap=0.8), dict(gap=1.5, tau=1.5)],
        [dict(gap=1.15), dict(gap=0.7), dict(gap=1.4, tau=1.4), dict(gap=1.6), dict(gap=0.85), dict(gap=0.8, tau=0.8)],
    ),
    "ratio_noise": (
        [dict(dropout=0.1), dict(dropout=0.05), dict(dropout=0.2), dict(dropout=0.3)],
        [dict(dropout=0.08), dict(dropout=0.15), dict(dropout=0.25), dict(dropout=0.4)],
    ),
    "truncated_sampling": (
        [dict(keep=0.9), dict(keep=0.8), dict(keep=0.95), dict(keep=5)],
        [dict(keep=0.85), dict(keep=0.7), dict(keep=8), dict(keep=3)],
    ),
    "rounding": (
        [dict(rounded=True), dict(rounded=True, sharpen=60), dict(rounded=True, sharpen=20)],
        [dict(rounded=True, sharpen=30), dict(rounded=True, sharpen=50), dict(rounded=True, sharpen=80)],
    ),
    "stale_policy": ([dict(sync=4), dict(sync=3), dict(sync=6), dict(sync=20)], [dict(sync=n) for n in (2, 5, 8, 10)]),
    "entropy_collapse": (
        [dict(bonus=-5.0, lr=5e-4), dict(bonus=-4.0, lr=8e-4), dict(bonus=-10.0, lr=5e-4)],
        [dict(bonus=-6.0, lr=6e-4), dict(bonus=-3.0, lr=1e-3), dict(bonus=-20.0, lr=3e-4)],
    ),
    "bonus_dominates": ([dict(bonus=x) for x in (10.0, 6.0, 30.0)], [dict(bonus=x) for x in (8.0, 15.0, 50.0)]),
    "controller_saturated": (
        [dict(target=1e-9, top=0.1), dict(target=1e-8, top=0.05), dict(target=1e-10, top=1.0)],
        [dict(target=3e-9, top=0.2), dict(target=1e-7, top=0.03), dict(target=3e-10, top=0.5)],
    ),
    "controller_idle": ([dict(target=x) for x in (10.0, 3.0, 100.0)], [dict(target=x) for x in (5.0, 30.0, 1000.0)]),
    "monitor_silent": ([dict(floor=x) for x in (0.05, 0.02, 0.1)], [dict(floor=x) for x in (0.03, 0.08, 0.01)]),
    "no_spread": (
        [dict(shrink=0.0), dict(shrink=0.0, sharpen=30)],
        [dict(shrink=0.0, sharpen=20), dict(shrink=0.0, lr=2e-4)],
    ),
    "group_collapse": ([dict(sharpen=x) for x in (3000, 2000, 10000)], [dict(sharpen=x) for x in (1500, 5000, 30000)]),
    "reward_noise": ([dict(noise=x) for x in (0.2, 0.1, 0.4)], [dict(noise=x) for x in (0.15, 0.3, 0.8)]),
    "advantage_vanishes": ([dict(times=x) for x in (1e-4, 3e-5, 2e-4)], [dict(times=x) for x in (5e-5, 1e-5, 1.5e-4)]),
    "advantage_explodes": ([dict(times=x) for x in (300.0, 100.0, 3e3)], [dict(times=x) for x in (50.0, 1e3, 1e4)]),
    "terms_cancel": ([dict(cancel=x) for x in (0.1, 0.03, 0.3)], [dict(cancel=x) for x in (0.05, 0.2, 0.5)]),
    "lr_too_low": ([dict(lr=x) for x in (1e-9, 3e-9, 1e-11)], [dict(lr=x) for x in (2e-9, 1e-10, 5e-12)]),
    "lr_too_high": ([dict(lr=x) for x in (0.01, 0.03, 0.1)], [dict(lr=x) for x in (0.015, 0.05, 0.2)]),
    "reward_falls": (
        [dict(times=-1.0, lr=5e-4), dict(times=-2.0, lr=8e-4), dict(times=-0.7, lr=5e-4, sharpen=20)],
        [dict(times=-1.5, lr=6e-4), dict(times=-0.5, lr=1e-3), dict(times=-3.0, lr=4e-4, sharpen=30)],
    ),
    "sharpening": (
        [dict(sharper=1.015), dict(sharper=1.02), dict(curve=True, learned=True)],
        [dict(sharper=1.012), dict(sharper=1.025), dict(sharper=1.03)],
    ),
    "not_a_number": ([dict(nan=x) for x in (40, 25, 75)], [dict(nan=x) for x in (10, 55, 90)]),
    "throughput_falls": ([dict(slow=x) for x in (3.0, 2.5, 5.0)], [dict(slow=x) for x in (2.75, 4.0, 8.0)]),
}
FRESH = {  # for the real trainer, of those faults whose rules were mended after its unseen runs had been looked at
    "two_temperatures": [dict(gap=1.1), dict(gap=0.65), dict(gap=1.25, tau=1.25), dict(gap=0.9)],
    "truncated_sampling": [dict(keep=0.88), dict(keep=0.75), dict(keep=6), dict(keep=12)],
    "group_collapse": [dict(sharpen=2500), dict(sharpen=20000)],
}
BRIEF = ("two_temperatures", "ratio_noise", "truncated_sampling", "rounding", "stale_policy")  # seen at once
SAMPLED = ("reward_noise", "group_collapse", "no_spread", "terms_cancel")
ONE_MODE = dict.fromkeys(SAMPLED, "sampled") | dict(sharpening="all")
SEEDS = 6


def healthy_settings(split):
    "Runs without a fault: sampled and all moves, several sizes, rates and starts."
    width, start, rate, bonus, tau, count = dict(
        tuned=((16, 24, 32), (1, 20, 40), (1e-4, 5e-5, 2e-4), (0.0, 0.01, 0.003), (1.0, 1.3), 44),
        fresh=((18, 28, 36), (1, 25, 35), (9e-5, 6e-5, 1.8e-4), (0.0, 0.015, 0.008), (1.1, 0.95), 24),
        unseen=((12, 20, 40), (1, 15, 30), (8e-5, 4e-5, 1.5e-4), (0.0, 0.02, 0.005), (1.2, 0.9), 88),
    )[split]
    return [
        dict(
            mode=("sampled", "all")[k % 2],
            width=width[k % 3],
            layers=(1, 2)[k // 3 % 2],
            sharpen=start[k // 6 % 3],
            lr=rate[k // 2 % 3] * (10 if k // 6 % 3 == 0 else 1),
            bonus=bonus[k // 4 % 3],
            minibatches=(1, 2)[k // 8 % 2],
            tau=tau[k // 16 % 2],
            curve=k % 4 == 1,
        )
        for k in range(count)
    ]


def plan(fresh=False):
    "name -> (fault, split, settings, seed) of every run; the fresh ones are for the real trainer."
    jobs = {}
    for split, seed, faults in (
        ("tuned", 0, {name: tuned for name, (tuned, _) in FAULTS.items()}),
        ("unseen", 300, {name: unseen for name, (_, unseen) in FAULTS.items()}),
        ("fresh", 600, FRESH if fresh else {}),
    ):
        for fault, options in faults.items():
            for k in range(2 * len(options) if split == "fresh" else max(SEEDS, 2 * len(options))):
                base = dict(mode=ONE_MODE.get(fault, ("sampled", "all")[k % 2]), sharpen=(40, 25)[k % 2])
                jobs[f"{fault}-{split}-{k}"] = (fault, split, base | options[k // 2 % len(options)], k + seed)
    for split, seed in (("tuned", 1000), ("unseen", 5000), ("fresh", 9000))[: 2 + fresh]:
        for k, settings in enumerate(healthy_settings(split)):
            jobs[f"healthy-{split}-{k}"] = ("", split, settings, seed + k)
    return jobs


def tempered(net, judge, table=(0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)):
    "Entropy and regret of a network at several temperatures, on all positions that runs begin from."
    boards = [parse_fen(f) for f in POSITIONS]
    tokens, legal = encode(boards)
    tokens, legal = torch.as_tensor(tokens), torch.as_tensor(legal)
    value = judge.of_moves([position_key(b) for b in boards], legal)
    out = []
    with torch.no_grad():
        for tau in table:
            dist = Policy(net, tau).dist(tokens, legal)
            best = value.masked_fill(legal < 0, -torch.inf).amax(-1)
            regret = (best - (dist.probs * value).sum(-1)).mean()
            out.append((dist.entropy().mean().item(), regret.item()))
    return out


def learn_first(net, steps=60):
    "A start that knows something: supervised training on soft targets, on the positions that runs begin from."
    tokens, (legal, value) = torch.as_tensor(encode([parse_fen(f) for f in POSITIONS])[0]), table()
    target, optimizer = (value / 0.05).softmax(-1), torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        logp = Policy(net, 1.0).dist(tokens, legal).finite
        optimizer.zero_grad()
        (-(target * logp).sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def table():
    "The positions' legal moves [256, L] and the value of each, once."
    boards = [parse_fen(f) for f in POSITIONS]
    legal = torch.as_tensor(encode(boards)[1]).long()
    value = judge_of().of_moves([position_key(b) for b in boards], legal)
    return legal, value.masked_fill(legal < 0, -torch.inf)


def told_of(x):
    "What a user's configuration would say of a run with these settings."
    cancel, target = x.get("cancel", 0.0), x.get("target", 0.0)
    told = {"sampler.temperature": x.get("tau", 1.0), "loss.moves": x.get("mode", "sampled")}
    told |= {"loss.kl": "k1" if cancel else "exact", "loss.entropy": "sampled" if cancel else "exact"}
    told |= {"loss.epsilon_low": 0.2, "loss.epsilon_high": 0.2, "guard.entropy_floor": x.get("floor", 0.0)}
    return told | ({"guard.kl_coef_max": x.get("top", 0.1), "guard.kl_coef_min": 1e-4} if target else {})


def trainer_of(x, seed):
    "A trainer with the fault that the settings ask for, and what a user's configuration would say of it."
    torch.manual_seed(seed)
    model = ModelConfig(width=x.get("width", 24), layers=x.get("layers", 1), heads=2, dropout=x.get("dropout", 0.0))
    net = ChessTransformer(model)
    with torch.no_grad():
        net.head.source.weight.mul_(x.get("sharpen", 40))
    if "sharper" in x or x.get("learned"):
        learn_first(net)
    judge = judge_of(x.get("noise", 0.0), x.get("shrink", 1.0), seed)
    tau, cancel, target = x.get("tau", 1.0), x.get("cancel", 0.0), x.get("target", 0.0)
    flat = "sharper" in x or x.get("curve")
    sampler = SamplerConfig(boards=12, group=6, plies=x.get("plies", 1), temperature=tau)
    loss = LossConfig(
        moves=x.get("mode", "sampled"),
        entropy_coef=cancel or x.get("bonus", 0.003),
        kl_coef=cancel or (0.001 if target else 0.0),
        kl="k1" if cancel else "exact",
        entropy="sampled" if cancel else "exact",
    )
    guard = GuardConfig(
        entropy_floor=x.get("floor", 0.0),
        floor_action="abort",
        kl_controller="multiplicative" if target else "none",
        target_kl=target or 0.01,
        kl_coef_max=x.get("top", 0.1),
    )
    settings = TrainerConfig(
        steps=STEPS,
        warmup=0,
        decay="constant",
        lr=1e-12 if "sharper" in x else x.get("lr", 1e-4),
        minibatches=x.get("minibatches", 1),
        sync_every=x.get("sync", 1),
        precision="32-true",
        budget_every=5,
    )
    ablate = AblateConfig(loss_temperature=tau / x["gap"] if "gap" in x else 0.0, dropout="dropout" in x)
    t = Planted(FABRIC, net, positions_of(seed), judge, sampler, loss, settings, ablate, seed, guard=guard)
    if "keep" in x:
        t.wrap = lambda policy: Truncated(policy, x["keep"])
    if x.get("rounded"):
        t.wrap = lambda policy: Rounded(policy, 1)
    t.times, t.rescored, t.sharper = x.get("times", 1.0), "noise" in x, x.get("sharper", 1.0)
    if flat:
        t.tables = tempered(copy.deepcopy(net), judge_of())
    return t, told_of(x)


def make_run(name, job, folder):
    "One run, as rows and configuration in a file; a step's seconds are the processor's, so that others do not count."
    fault, split, x, seed = job
    torch.set_num_threads(1)
    t, told = (Light(*LIGHT, x, seed), told_of(x)) if LIGHT else trainer_of(x, seed)
    rows = []
    for step in range(16 if fault in BRIEF else STEPS):
        begun = time.process_time()
        try:
            rows.append(t.step())
            rows[-1]["seconds"] = time.process_time() - begun
        except (NotFinite, FloatingPointError):
            rows.append((rows[-1] if rows else {}) | dict(step=step, loss=math.nan, grad_norm=math.nan))
            break
    for row in rows:
        if row["step"] >= x.get("nan", STEPS):
            row |= dict(loss=math.nan, grad_norm=math.nan, entropy=math.nan)
        if "slow" in x:
            row["seconds"] *= 1 + (x["slow"] - 1) * max(0, row["step"] - 20) / 40
    kept = [{k: float(f"{v:.6g}") for k, v in r.items() if isinstance(v, int | float)} for r in rows]
    with gzip.open(folder / f"{name}.tmp", "wt") as f:
        json.dump(dict(fault=fault, split=split, settings=x, seed=seed, config=told, rows=kept), f)
    os.replace(folder / f"{name}.tmp", folder / f"{name}.json.gz")


LIGHT: tuple = ()  # the table of the small trainer; empty for the real one


def light(folder, jobs=1, asked=None):
    "Make the runs that are missing with the small trainer of planted.py."
    global LIGHT
    LIGHT = table()
    runs(folder, jobs, asked)


def part_of(jobs, split="", few=0, healthy=0):
    "The runs of one split, the first so many of each fault and of the healthy ones; 0 and nothing are all of them."
    def wanted(name, fault):
        most = few if fault else healthy
        return (not split or jobs[name][1] == split) and (not most or int(name.rpartition("-")[2]) < most)

    chosen = [name for name, job in jobs.items() if wanted(name, job[0])]
    chosen.sort(key=lambda name: (bool(jobs[name][0]), int(name.rpartition("-")[2])))  # healthy ones, then in rounds
    return {name: jobs[name] for name in chosen}


def runs(folder, jobs=1, asked=None):
    "Make the runs that are missing."
    folder.mkdir(parents=True, exist_ok=True)
    wanted = part_of(plan(fresh=not LIGHT), **(asked or {}))
    todo = {n: j for n, j in wanted.items() if not (folder / f"{n}.json.gz").exists()}
    print(f"{len(todo)} of {len(wanted)} runs to make", flush=True)
    boards = [parse_fen(f) for f in POSITIONS]
    judge_of().of_moves([position_key(b) for b in boards], torch.as_tensor(encode(boards)[1]))  # known to all processes
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for n, done in enumerate([pool.apply_async(make_run, (name, job, folder)) for name, job in todo.items()], 1):
            done.get()
            if n % 20 == 0:
                print(n, flush=True)


def read(path):
    "A stored run; NaN of a column that is not measured is left out."
    with gzip.open(path, "rt") as f:
        run = json.load(f)
    always = {"loss", "grad_norm", "entropy"}
    run["rows"] = [{k: v for k, v in r.items() if v == v or k in always} for r in run["rows"]]
    return run


def verdict(path):
    "What the doctor says of a whole run, and what it said while the run went on."
    run = read(path)
    rows, config, fault = run["rows"], run["config"], run["fault"]
    lengths = [n for n in LOOKS if n < len(rows)] + [len(rows)]
    said = {n: diagnose(from_rows(rows[:n], config)) for n in lengths}
    names = {n: [f.name for f in d.findings if f.severity != "healthy"] for n, d in said.items()}
    end = names[len(rows)]
    alarms = {n: [f.name for f in d.alarms] for n, d in said.items()}
    return dict(
        run=path.name.removesuffix(".json.gz"),
        fault=fault or "healthy",
        split=run["split"],
        mode=run["settings"].get("mode", ""),
        seed=run["seed"],
        settings=" ".join(f"{k}={v}" for k, v in run["settings"].items() if k != "mode"),
        begins=run["settings"].get("nan", 20 if "slow" in run["settings"] else 0),  # step
        first=next(iter(end), ""),
        all=" ".join(end),
        alarms=" ".join(alarms[len(rows)]),
        named=int(fault in end) if fault else int(not alarms[len(rows)]),
        rows=next((n for n in lengths if fault in names[n]), 0),
        top=next((n for n in lengths if names[n][:1] == [fault]), 0),
        looks=" ".join(f"{n}:{','.join(x)}" for n, x in alarms.items() if x and not fault),
    )


def verdicts(folder, jobs=1, only="", name="doctor.csv"):
    "A row for each run, in a table below data; of one split alone they are printed."
    paths = sorted(folder.glob(f"*-{only or '*'}-*.json.gz"))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        table = pool.map(verdict, paths, 4)
    if only:
        wrong = [r for r in table if r["first"] != r["fault"] and r["fault"] != "healthy" or r["looks"]]
        print("\n".join(f"{r['run']:28} {r['all'] if r['fault'] != 'healthy' else r['looks']}" for r in wrong))
    else:
        written(table, name)
    summary(table)


def written(table, name):
    "The table as it is kept."
    with (HERE / "data" / name).open("w", newline="") as f:
        out = csv.DictWriter(f, list(table[0]))
        out.writeheader()
        out.writerows(table)


def summary(table):
    "Counts by fault and split."
    for split in sorted({r["split"] for r in table}):
        for fault in FAULTS:
            part = [r for r in table if r["fault"] == fault and r["split"] == split]
            right, top = sum(r["named"] for r in part), sum(r["first"] == fault for r in part)
            print(f"{split:7} {fault:22} {right}/{len(part)} named, {top} first")
        part = [r for r in table if r["fault"] != "healthy" and r["split"] == split]
        print(f"{split:7} {'all':22} {sum(r['named'] for r in part)}/{len(part)} named, "
              f"{sum(r['first'] == r['fault'] for r in part)} first")
        part = [r for r in table if r["fault"] == "healthy" and r["split"] == split]
        print(f"{split:7} healthy: {sum(not r['named'] for r in part)}/{len(part)} alarmed at the end, "
              f"{sum(bool(r['looks']) for r in part)} at some look")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("light", "runs", "verdicts"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--split", choices=("tuned", "unseen", "fresh"), default="", help="these runs only")
    parser.add_argument("--few", type=int, default=0, help="light, runs: at most so many runs of a fault and split")
    parser.add_argument("--healthy", type=int, default=0, help="light, runs: at most so many healthy runs of a split")
    parser.add_argument("--table", default="doctor.csv", help="verdicts: the file below data")
    asked = parser.parse_args()
    if asked.command == "verdicts":
        verdicts(asked.folder, asked.jobs, asked.split, asked.table)
    else:
        few = dict(split=asked.split, few=asked.few, healthy=asked.healthy)
        dict(light=light, runs=runs)[asked.command](asked.folder, asked.jobs, few)
