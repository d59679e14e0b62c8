"""This project's doctor beside three others: rldoctor, rlprobe and rlwatch, each on everybody's synthetic runs.

    pip install rldoctor rlprobe rlwatch                  # in an environment of its own that has grpo_chess too
    python nbs/experiments/others.py DIR [--steps 400]    # data/doctor_others.csv and data/doctor_others.json

DIR holds the runs that `doctor.py light DIR` made; of each fault the first unseen one is taken, and twelve healthy
ones. A package that is not installed has no column of verdicts, and the table says so. A verdict is what a package
calls a warning or worse (rlprobe: warn, rlwatch: warning), in its own words, the gravest first. Columns have the names
that each package asks for; what it does not ask for it does not get. Nothing of these packages is part of this project.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import tempfile
from pathlib import Path

from doctor import FAULTS, read
from grpo_chess.doctor import diagnose
from grpo_chess.histories import as_history
from grpo_chess.history import from_rows

HERE = Path(__file__).resolve().parent
NAMES = {  # our column: name in TRL or verl, field of rlprobe, argument of rlwatch
    "train/avg_reward": ("reward", "reward_mean", "reward_mean"),
    "reward_spread": ("reward_std", "reward_std", "reward_std"),
    "entropy": ("entropy", "entropy_mean", "entropy"),
    "approx_kl": ("actor/ppo_kl", "kl_mean", "kl_divergence"),
    "kl_reference": ("kl", "kl_mean", "kl_divergence"),
    "clip_region": ("clip_ratio/region_mean", "clip_fraction", ""),
    "mean_ratio": ("", "ratio_mean", ""),
    "advantage_std": ("critic/advantages/std", "adv_std", "advantage_std"),
    "no_spread": ("frac_reward_zero_std", "zero_variance_group_frac", ""),
    "grad_norm": ("grad_norm", "grad_norm", "grad_norm"),
    "loss": ("loss", "loss", "loss"),
    "lr": ("learning_rate", "lr", ""),
    "seconds": ("step_time", "step_time_s", ""),
}
PACKAGES = ("rldoctor", "rlprobe", "rlwatch")


def version(package):
    "Its version, or an empty text where it is not installed."
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def renamed(rows, place):
    "Rows under the names of another package."
    pairs = {ours: names[place] for ours, names in NAMES.items() if names[place]}
    return [{"step": r["step"], **{new: r[k] for k, new in pairs.items() if k in r}} for r in rows]


def by_rldoctor(rows, config):
    from rl_doctor.detectors.base import Severity
    from rl_doctor.diagnosis import diagnose as ask
    from rl_doctor.ingest import load_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_text("\n".join(json.dumps(r) for r in rows))
        found = ask(load_run(str(path))).problems
    return [f"{f.detector}" for f in found if f.severity >= Severity.WARNING]


def by_rlprobe(rows, config):
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, StepRecord

    known = set(StepRecord.model_fields)
    records = [StepRecord(**{k: v for k, v in r.items() if k in known}) for r in rows]
    manifest = RunManifest(run_id="x", created_at="2026-01-01T00:00:00", algorithm="grpo", trainer_config=config)
    return [f.signature_id.lower() for f in diagnose_view(RunView(manifest, records)) if f.severity != "info"]


def by_rlwatch(rows, config):
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite = DetectorSuite(RLWatchConfig())
    names = ("entropy", "kl_divergence", "reward_mean", "reward_std", "advantage_std", "loss", "grad_norm")
    alerts = [a for r in rows for a in suite.check_step(int(r["step"]), **{k: r[k] for k in names if k in r})]
    alerts.sort(key=lambda a: a.severity != "critical")
    return list(dict.fromkeys(a.detector for a in alerts))


ASK = dict(rldoctor=by_rldoctor, rlprobe=by_rlprobe, rlwatch=by_rlwatch)


def of_rldoctor(steps):
    "Its simulated runs, in the names of TRL and verl."
    from rl_doctor.simulate import SCENARIOS, simulate

    back = {names[0]: ours for ours, names in NAMES.items() if names[0]}
    for name in SCENARIOS:
        rows, config = simulate(name, n_steps=steps)
        known = [{back[k]: v for k, v in r.items() if k in back} for r in rows]
        ours = [{"step": r.get("step", i)} | x for i, (r, x) in enumerate(zip(rows, known))]
        yield name, ours, config, as_history(rows, config), dict(rldoctor=rows)


def of_rlprobe(steps):
    "Its fabricated runs; what is one number a step."
    from rlprobe.storage import RunReader
    from rlprobe.testing.synth import PATHOLOGIES, generate_run

    back = {names[1]: ours for ours, names in NAMES.items() if names[1] and ours != "approx_kl"}
    for name in ("healthy", *PATHOLOGIES):
        with tempfile.TemporaryDirectory() as folder:
            where = generate_run(Path(folder) / "run", None if name == "healthy" else name, n_steps=steps)
            records = [r.model_dump() for r in RunReader(where).steps()]
        theirs = [{k: v for k, v in r.items() if isinstance(v, int | float)} for r in records]
        rows = [{"step": r["step"], **{back[k]: v for k, v in r.items() if k in back}} for r in theirs]
        yield name, rows, {}, from_rows(rows), dict(rlprobe=theirs)


def of_ours(folder):
    "One unseen run of each planted fault, and twelve healthy ones."
    names = [f"{fault}-unseen-0" for fault in FAULTS] + [f"healthy-unseen-{k}" for k in range(12)]
    for name in names:
        run = read(folder / f"{name}.json.gz")
        yield name.replace("-unseen-", " "), run["rows"], run["config"], from_rows(run["rows"], run["config"]), {}


def table(folder, steps):
    "A row for each run: what was planted, and each doctor's verdict."
    sources = {"grpo_chess": of_ours(folder)}
    sources |= {p: make(steps) for p, make in dict(rldoctor=of_rldoctor, rlprobe=of_rlprobe).items() if version(p)}
    for source, runs in sources.items():
        for name, rows, config, history, native in runs:
            said = {"grpo_chess": [f.name for f in diagnose(history).alarms]}
            for place, package in enumerate(PACKAGES):
                if version(package):
                    said[package] = ASK[package](native.get(package) or renamed(rows, place), config)
            yield dict(source=source, run=name) | {
                p: " ".join(dict.fromkeys(said[p])) if p in said else "not installed" for p in ("grpo_chess", *PACKAGES)
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="length of the other packages' runs")
    asked = parser.parse_args()
    rows = list(table(asked.folder, asked.steps))
    with (HERE / "data" / "doctor_others.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    told = dict(date=datetime.date.today().isoformat(), versions={p: version(p) for p in PACKAGES})
    (HERE / "data" / "doctor_others.json").write_text(json.dumps(told) + "\n")
    for r in rows:
        print(" | ".join(r.values()))


if __name__ == "__main__":
    main()
