"""Run the small experiments and keep their histories.

    python nbs/experiments/run.py                    # what there is, and how many of its runs are done
    python nbs/experiments/run.py settings            # make the runs of one experiment that are missing
    python nbs/experiments/run.py settings "freeze 2"  # of this arm only
    python nbs/experiments/run.py settings --again    # all of them anew, or those of the arms that are named
    # and keep the weights of its checkpoints and ends there, for matches
    python nbs/experiments/run.py learning --weights DIR

`plan.yaml` says what is run: `base` comes before and `after` behind the settings of every arm, an arm has settings
of `python -m grpo_chess.train`, and each arm has seeds.
A row of `data/NAME.csv` is a step of one run; `data/NAME_end.csv` holds the regret of the policy before and after,
on positions that no run starts from.
Where the plan says `every: N`, `data/NAME_curve.csv` holds it every N steps, with the time and the engine's
evaluations so far, and regret is taken on `nbs/data/heldout.jsonl`, or on the file that it names as `labels`.
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from filelock import FileLock  # torch needs it and brings it

from grpo_chess.measures import read_labels, regret
from grpo_chess.model import Policy, load_model
from grpo_chess.panel import read_metrics

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
KEEP = [
    "train/avg_reward",
    "expected_regret",
    "entropy",
    "agreement_mean",
    "reward_spread",
    "advantage_std",
    "clip_region",
    "clip_binding",
    "approx_kl",
    "kl_step",
    "kl_coef",
    "entropy_coef",
    "loss",
    "ppo_loss",
    "mean_ratio",
    "ratio_error",
    "grad_norm",
    "grad_policy",
    "grad_kl",
    "grad_entropy",
    "lr",
    "temperature",
    "judged",
]


def number(x):
    "Four significant digits; an empty cell for what was not measured."
    return "" if x is None else f"{x:.4g}"


def write(path, rows):
    "A CSV file, whole or not at all."
    tmp = path.with_suffix(f".{os.getpid()}.tmp")
    with tmp.open("w", newline="") as f:
        out = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        out.writeheader()
        out.writerows(rows)
    tmp.replace(path)


def read(path):
    return list(csv.DictReader(path.open())) if path.exists() else []


def flat(arm):
    return [x for part in arm for x in (flat(part) if isinstance(part, list) else [part])]


def settings(arm):
    return [f"--{k}={v}" if k != "config" else f"--config={TOP / v}" for part in flat(arm) for k, v in part.items()]


def result(at):
    "What a run would end with at a checkpoint: its model, or the average of its weights."
    return average if (average := at / "average.safetensors").exists() else at / "model.safetensors"


def loses(path, labels):
    "Regret of weights, sampling and at the most likely move."
    policy = Policy(load_model(path))
    return {how: regret(policy, labels, how == "argmax") for how in ("sampling", "argmax")}


def course(folder, rows, labels):
    "Regret, time and evaluations at each checkpoint."
    for at in sorted((folder / "checkpoint").glob("[0-9]*")):
        past = rows[: int(at.name)]
        yield dict(
            step=len(past),
            seconds=number(sum(r["seconds"] for r in past)),
            judged=past[-1]["judged"] if past else 0,
            plies=sum(r["plies"] for r in past),
            entropy=number(past[-1]["entropy"]) if past else "",
            **{how: number(r.mean) for how, r in loses(result(at), labels).items()},
        )


def one(name, arm, args, seed, x, weights):
    "One run: its history, its course, and its regret before and after."
    keep, every = [k for k in KEEP if k in x["keep"]], x.get("every")
    labels = read_labels(HERE.parent / "data" / x.get("labels", "heldout.jsonl" if every else "positions.jsonl"))
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "x"
        command = [
            sys.executable,
            "-m",
            "grpo_chess.train",
            "--preset=scratch",
            *args,
            f"--seed={seed}",
            f"--out={top}",
            "--name=x",
            "--match.games=0",
            "--minutes=0",
        ]
        if every:
            command += [f"--trainer.checkpoint_every={every}", "--trainer.keep=1000000"]
        done = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
        rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
        if done.returncode and not rows:
            sys.exit(f"{name}, {arm}, seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
        who = dict(arm=arm, seed=seed)
        history = [dict(**who, step=r["step"], **{k: number(r.get(k)) for k in keep}) for r in rows]
        end = dict(**who, steps=len(rows), plies=sum(r["plies"] for r in rows), exit=done.returncode)
        for when, file in (("before", "start"), ("after", "model")):
            if (at := folder / f"{file}.safetensors").exists():
                end |= {f"{how}_{when}": number(r.mean) for how, r in loses(at, labels).items()}
        if result(last := folder / f"checkpoint/{len(rows):06d}").name != "model.safetensors":
            end |= {f"{how}_unaveraged": number(r.mean) for how, r in loses(last / "model.safetensors", labels).items()}
        if weights:
            Path(weights).mkdir(parents=True, exist_ok=True)
            for at in [folder, *sorted((folder / "checkpoint").glob("[0-9]*"))]:
                shutil.copy(
                    result(at),
                    Path(weights) / f"{name} {arm} {seed}{'' if at == folder else f' {int(at.name)}'}.safetensors",
                )
        return history, [end], [dict(**who, **row) for row in course(folder, rows, labels)] if every else []


def main():
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    for name, x in plan.items():
        x["runs"] = [(str(arm), seed) for arm in x["arms"] for seed in x["seeds"]]
    if len(sys.argv) < 2:
        for name, x in plan.items():
            done = {(r["arm"], int(r["seed"])) for r in read(HERE / f"data/{name}_end.csv")}
            print(f"{name:14} {len(done & set(x['runs'])):3} of {len(x['runs']):3} runs   {x['question']}")
        return
    name = sys.argv[1]
    if name not in plan:
        sys.exit(f"there is no experiment {name!r} in plan.yaml; there are {', '.join(plan)}")
    x, files = plan[name], [HERE / f"data/{name}{part}.csv" for part in ("", "_end", "_curve")]
    lock = TOP / f"runs/{name}.lock"
    lock.parent.mkdir(exist_ok=True)
    rest = sys.argv[2:]
    at = rest.index("--weights") + 1 if "--weights" in rest else 0
    if at == len(rest) > 0:
        sys.exit("--weights needs a folder")
    weights = rest.pop(at) if at else ""
    wanted = [a for a in rest if not a.startswith("-")]
    if unknown := [a for a in wanted if a not in x["arms"]]:
        sys.exit(f"{name} has no arm {unknown[0]!r}; it has {', '.join(map(repr, x['arms']))}")
    run, order = lambda r: (r["arm"], int(r["seed"])), {run: i for i, run in enumerate(x["runs"])}
    for arm, seed in x["runs"]:
        if wanted and arm not in wanted or "--again" not in rest and (arm, seed) in map(run, read(files[1])):
            continue
        made = one(name, arm, settings([*x.get("base", []), *x["arms"][arm], *x.get("after", [])]), seed, x, weights)
        with FileLock(lock):  # another process may make other arms of the same experiment
            for file, rows in zip(files, made):
                kept = [r for r in read(file) if run(r) != (arm, seed)]  # only now does an earlier run go
                if rows:
                    write(file, sorted(kept + rows, key=lambda r: order.get(run(r), -1)))
        print(made[1][0], flush=True)


if __name__ == "__main__":
    main()
