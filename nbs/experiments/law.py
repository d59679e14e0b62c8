"""When does learning from the judge help? Starts that know more or less, methods, amounts; writes data/law.csv.

    python -m grpo_chess.pretrain label --positions 1000000 --depth 1 --seed 201 --out KNOWN   # for the starts
    python -m grpo_chess.pretrain label --positions 1050000 --depth 1 --seed 202 --out NEW     # first shard: exam
    python nbs/experiments/law.py rates KNOWN NEW GAMES DIR    # which learning rate for which method, with a seed apart
    python nbs/experiments/law.py runs KNOWN NEW GAMES DIR     # a small network; every run is a file of DIR, kept
    python nbs/experiments/law.py test KNOWN NEW GAMES DIR     # starts and amounts that are not among the runs
    python nbs/experiments/law.py table KNOWN NEW GAMES DIR    # data/law.csv of the runs that are there

GAMES are moves as they were played, made as population.py says. Labels take half an hour of one core, and the runs of
one seed an hour and a half: 14 million positions; `--seeds` divides them among processes. A group is moves of one
position and ends there: no engine plays, the values of all moves are in the labels. A position is used once.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grpo_chess.improved import improved_policy
from grpo_chess.labels import join, read_manifest, read_shard
from grpo_chess.loss import clipped_surrogate, group_advantage, no_spread_share
from grpo_chess.model import ChessTransformer, ModelConfig, MoveDist, Policy
from grpo_chess.optimizer import make_optimizer
from grpo_chess.targets import cross_entropy, measure, to_batch

HERE = Path(__file__).resolve().parent
SHAPE, BATCH, WARMUP, TAU, EXAM = ModelConfig(width=48, layers=2, heads=2), 128, 30, 0.03, 20_000
# of AdamW, the best of `rates`; Muon's is ten times as high
RATES = {"supervised": 1e-3, "improved": 3e-4, "all moves": 3e-4, "G=64": 3e-4, "G=8": 3e-4}
STARTS = [("judge", n) for n in (0, 30_000, 100_000, 300_000, 1_000_000)] + [("games", 300_000)]
AMOUNTS = (30_000, 100_000, 300_000)


def labels_of(folder, first=0, end=None):
    "The positions of a folder's shards."
    return join([read_shard(folder / shard["name"]) for shard in read_manifest(folder)["shards"][first:end]])


def apart(labels, *others):
    "Some positions that are nowhere else; a shard begins with openings, so they are drawn from all of it."
    seen = {t.tobytes() for other in others for t in other.tokens}
    mixed = np.random.default_rng(203).permutation(len(labels))
    return labels.take(np.array([i for i in mixed if labels.tokens[i].tobytes() not in seen][:EXAM]))


def sampled_loss(dist, win, groups, rng):
    "GRPO: a group of moves drawn from the policy, advantages in units of the group's deviation, PPO's clip."
    old = MoveDist(dist.logp.detach())
    u = torch.as_tensor(rng.random((len(win), groups), dtype=np.float32))
    slots = torch.stack([old.sample(u[:, i]) for i in range(groups)], 1)  # [n, G]
    reward, mask = win.gather(1, slots)[..., None], torch.ones(*slots.shape, 1, dtype=torch.bool)
    adv = group_advantage(reward, mask, scale="std")[..., 0]
    ratio = (dist.logp.gather(1, slots) - old.logp.gather(1, slots)).exp()
    return clipped_surrogate(ratio, adv).mean(), no_spread_share(reward, mask)


def loss_of(method, dist, batch, rng):
    "The loss of one batch, and the share of its groups in which all rewards are the same."
    win = batch.win.nan_to_num(0.0)
    if method == "supervised":  # towards the judge's values, or the one move that was played
        return cross_entropy(dist, batch.target).mean(), 0.0
    if method.startswith("G="):
        return sampled_loss(dist, win, int(method[2:]), rng)
    adv = torch.where(dist.legal, win - (dist.probs.detach() * win).sum(-1, keepdim=True), 0.0)
    if method == "all moves":  # the exact gradient of the expected reward
        scale = (dist.probs.detach() * adv**2).sum(-1, keepdim=True).sqrt() + 1e-4
        return -(dist.probs * adv / scale).sum(-1).mean(), 0.0
    aim = improved_policy(dist.finite.detach(), adv, dist.legal, TAU)
    return (aim * (aim.clamp_min(1e-30).log() - dist.finite)).sum(-1).mean(), 0.0


def train(model, labels, numbers, method, rate, seed):
    "Use each position once, the rate falling to 0; the mean share of groups without spread."
    optimizer, rng = make_optimizer(model, rate, 0.01, muon_lr=10 * rate), np.random.default_rng(seed)
    total, flat = len(numbers) // BATCH, 0.0
    for k in range(total):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (k + 1) / WARMUP) * (1 - k / total)
        batch = to_batch(labels, numbers[k * BATCH : (k + 1) * BATCH])
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(batch.tokens, batch.legal)
        loss, share = loss_of(method, MoveDist.from_logits(scores), batch, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        flat += share / total
    return flat


@torch.no_grad()
def exam_of(model, labels):
    "Position by position: what the most likely move and a sampled one give away; the policy's entropy."
    found = []
    for index in np.array_split(np.arange(len(labels)), -(-len(labels) // 256)):
        batch = to_batch(labels, index)
        found.append(measure(Policy(model).dist(batch.tokens, batch.legal), batch))
    return {k: torch.cat([f[k] for f in found]).numpy() for k in ("regret_greedy", "regret", "entropy", "accuracy")}


class Runs:
    "The runs of a folder, each a file; what is there is not made again."

    def __init__(self, known, new, games, folder):
        self.folder, self.new = folder, labels_of(new, 1)
        self.taught = dict(judge=labels_of(known), games=labels_of(games))
        self.exam, self.exams = apart(labels_of(new, 0, 1), self.new, *self.taught.values()), {}
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def start(self, kind, n, seed):
        "The network that has seen n positions, and its exam."
        weights = self.folder / f"start_{kind}_{n}_{seed}.safetensors"
        torch.manual_seed(seed)
        model = ChessTransformer(SHAPE)
        if weights.exists():
            model.load_state_dict(load_file(weights), strict=False)
        else:
            labels = self.taught[kind]
            train(
                model, labels, np.random.default_rng([201, seed]).permutation(len(labels))[:n], "supervised", 1e-3, seed
            )
            save_file(model.state_dict(), weights)
        if weights not in self.exams:
            self.exams[weights] = exam_of(model, self.exam)
        return model, self.exams[weights]

    def run(self, kind, n, method, m, seed, rate):
        "One run of m positions from a start; its row."
        done = self.folder / f"{kind}_{n}_{method.replace('=', '').replace(' ', '')}_{m}_{seed}_{rate}.json"
        if not done.exists():
            model, before = self.start(kind, n, seed)
            numbers = np.random.default_rng([202, seed]).permutation(len(self.new))[:m]
            flat = train(model, self.new, numbers, method, rate, seed)
            save_file(model.state_dict(), done.with_suffix(".safetensors"))
            after = exam_of(model, self.exam)
            gain = before["regret_greedy"] - after["regret_greedy"]
            gain = gain[~np.isnan(gain)]
            row = dict(start=kind, seen=n, method=method, positions=m, seed=seed, rate=rate)
            exams = dict(before=before, after=after)
            row |= {f"{k}_{when}": float(np.nanmean(x[k])) for when, x in exams.items() for k in x}
            row |= dict(gain=float(gain.mean()), half=float(1.96 * gain.std(ddof=1) / len(gain) ** 0.5), flat=flat)
            done.write_text(json.dumps(row))
            print(done.stem, f"{row['regret_greedy_before']:.4f} -> {row['regret_greedy_after']:.4f}", flush=True)
        return json.loads(done.read_text())


def rates(runs):
    "Every method at five rates from a weak and from a good start; a seed that is used for nothing else."
    for n in (100_000, 1_000_000):
        for method in RATES:
            for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
                runs.run("judge", n, method, 100_000, 9, rate)


FEW = [("judge", 0), ("judge", 100_000), ("judge", 1_000_000)]  # starts from which every method has 300,000 positions


def methods_of(start, m):
    "Exact gradients and large groups are like G=8, and are not run everywhere."
    return RATES if m == 100_000 or (m == 300_000 and start in FEW) else ("supervised", "improved", "G=8")


def plan(seeds):
    "All runs, seed by seed: the smallest amounts first, and two long runs of the first seed last."
    for seed in seeds:
        for m in AMOUNTS:
            yield from ((*start, k, m, seed, RATES[k]) for start in STARTS for k in methods_of(start, m))
    for n, method in ((0, "supervised"), (300_000, "G=8")):
        yield "judge", n, method, 1_000_000, seeds[0], RATES[method]


def test_plan(seeds):
    "Starts and amounts that are between those of `plan`."
    for seed in seeds:
        for n in (60_000, 550_000):
            for m in (60_000, 170_000):
                yield from (("judge", n, k, m, seed, RATES[k]) for k in ("supervised", "improved", "G=8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "runs", "test", "table"))
    parser.add_argument("folders", type=Path, nargs=4, metavar="FOLDER", help="KNOWN, NEW, GAMES and DIR")
    parser.add_argument("--seeds", type=int, nargs="*", help="0 and 1; of test 2")
    args = parser.parse_args()
    if args.what == "table":
        rows = [json.loads(f.read_text()) for f in sorted(args.folders[3].glob("*.json"))]
        with (HERE / "data/law.csv").open("w", newline="") as f:
            out = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            out.writeheader()
            out.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        return
    runs = Runs(*args.folders)
    if args.what == "rates":
        return rates(runs)
    for run in plan(args.seeds or [0, 1]) if args.what == "runs" else test_plan(args.seeds or [2]):
        runs.run(*run)


if __name__ == "__main__":
    main()
