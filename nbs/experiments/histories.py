"""Small histories for the doctor's pages.

    python nbs/experiments/histories.py six       # nbs/data/histories.json: six runs for the reader to guess
    python nbs/experiments/histories.py record    # data/doctor_record.csv: the doctor on the record's published runs

The six are made by the small trainer of planted.py with settings and seeds that doctor.py does not have. The record's
runs are what its documents published: a few rows, some of them with one number. Where only a range was published, and
for all of a run, its middle stands in each row.
"""

import argparse
import csv
import json
from pathlib import Path

import torch

from grpo_chess.doctor import diagnose
from grpo_chess.history import from_rows

HERE = Path(__file__).resolve().parent
SIX = {  # letter: what was planted, in which settings; all have all moves as a group and two updates a step
    "A": ("entropy_collapse", dict(bonus=-7.0, lr=7e-4)),
    "B": ("", dict(lr=1.2e-4)),
    "C": ("two_temperatures", dict(gap=1.25)),
    "D": ("sharpening", dict(sharper=1.018)),
    "E": ("ratio_noise", dict(dropout=0.12)),
    "F": ("lr_too_high", dict(lr=0.02)),
}
KEPT = ("expected_regret", "start_regret", "entropy", "clip_region", "kl_exact", "mean_ratio", "ratio_error")
KEPT += ("entropy_gap", "kl_step", "grad_norm", "agreement_mean", "advantage_std")


def six(steps=100):
    "Make the six histories, four digits of each number."
    from doctor import table, told_of
    from planted import Light

    torch.set_num_threads(1)
    legal_and_value, out = table(), {}
    for k, (letter, (fault, x)) in enumerate(SIX.items()):
        x = dict(mode="all", sharpen=30, minibatches=2, curve=True) | x
        run = Light(*legal_and_value, x, 9000 + k)
        rows = [run.step() for _ in range(steps)]
        columns = {name: [float(f"{r[name]:.4g}") for r in rows] for name in KEPT}
        out[letter] = dict(planted=fault or "healthy", config=told_of(x), columns=columns)
    (HERE.parent / "data" / "histories.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


def published(name):
    "A table of research_docs/runs, numbers as numbers."

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    path = HERE.parent.parent / "research_docs" / "runs" / f"{name}.csv"
    return [{k: number(v) for k, v in row.items() if v} for row in csv.DictReader(path.open())]


RENAMED = dict(mean_clip_fraction="clip_region", mean_kl_divergence="approx_kl", train_total_loss="loss")
UNTRAINED = 0.018  # score of an untrained network by the record's protocol, floor.csv


def settings_of(run):
    "What the documents say of a run's configuration."
    rows = [r for r in published("hyperparameters") if r["run_id"] in ("network", run)]
    known = {r["parameter"]: r["value"] for r in rows if isinstance(r["value"], float)}
    if run not in ("dk88cqs1", "f11u4id9"):
        known.pop("loss_temperature", None)  # nobody knew it before it was mended
    return known | {"loss.kl": "k1", "loss.entropy": "sampled", "eval_floor": UNTRAINED}


def column(rows, name, pairs):
    "Put the values of a column into the rows of their steps."
    for step, value in pairs:
        rows.setdefault(int(step), {"step": int(step)})[name] = value


def ends_of(run, rows, last):
    "First, middle and last value of each metric, as far as they were published."
    tables = [r for r in published("after_fix") if r["run_id"] == run]
    tables += published("p9u63rgu_summary") if run == "p9u63rgu" else []
    tables += published("ksumd93q") if run == "ksumd93q" else []
    tables += published("gnt9fhq0") if run == "gnt9fhq0" else []
    for r in tables:
        name = RENAMED.get(r["metric"], r["metric"])
        if name.startswith(("eval", "train/reward_")):
            continue
        pairs = [(0, r["first"]), (last // 2, r.get("middle")), (last, r["last"])]
        column(rows, name, [(s, v) for s, v in pairs if v is not None])
    if run == "p9u63rgu":  # whose mean ratio stands in the document's text
        column(rows, "mean_ratio", [(0, 1.012)])


def windows_of(run, rows):
    "Means over windows stand at the middle of their window."
    if run == "p9u63rgu":
        for r in published("p9u63rgu_windows"):
            if r["metric"] == "train/avg_reward":
                column(rows, r["metric"], [((r["step_from"] + r["step_to"]) / 2, r["mean"])])
    if run == "xkbkwo4s":
        for r in published("xkbkwo4s_rewards"):
            column(rows, "train/avg_reward", [((r["step_from"] + r["step_to"]) / 2, r["avg_reward"])])


def budget_of_1iaa(rows):
    "The terms of the loss, and what follows from them and from the coefficients."
    clip = next(r for r in published("xkbkwo4s_ranges") if r["metric"] == "mean_clip_fraction")
    for r in published("xkbkwo4s_budget"):
        step, coef = r["step"], 0.012 if r["step"] == 0 else 0.1
        told = dict(ppo_loss=r["ppo_loss"], kl_term=r["kl_penalty"], entropy_term=r["entropy_bonus"], loss=r["total"])
        told |= dict(entropy=-r["entropy_bonus"] / 0.1, approx_kl=r["kl_penalty"] / coef, kl_coef=coef)
        told |= dict(kl_ratio=r["kl_penalty"] / coef / 0.012, entropy_coef=0.1, collapsed=0.0)
        for name, value in told.items():
            column(rows, name, [(step, value)])
        column(rows, "clip_region", [(step, (clip["low"] + clip["high"]) / 2)])


def history_of(run):
    "What was published of a run, as a history."
    facts = next(r for r in published("runs") if r["run_id"] == run)
    rows, last = {}, int(facts.get("steps", 1000))
    if run == "p26atclv":
        column(rows, "entropy", [(r["step"], r["entropy"]) for r in published("p26atclv_entropy")])
    ends_of(run, rows, last)
    windows_of(run, rows)
    if run == "xkbkwo4s":
        budget_of_1iaa(rows)
    for r in published("pretrain_runs"):
        if r["run_id"] == run:
            first = settings_of(run).get("kl_coef", r["kl_coef_first"])
            column(rows, "kl_coef", [(0, first), (124, r["kl_coef_last"]), (last, r["kl_coef_last"])])
    coef = facts.get("entropy_coef")
    if coef is not None and "loss" in {name for row in rows.values() for name in row}:
        column(rows, "entropy_coef", [(s, coef) for s in (0, last)])
    if isinstance(facts.get("final_entropy"), float) and not any("entropy" in row for row in rows.values()):
        column(rows, "entropy", [(last, facts["final_entropy"])])
    places = dict(first=0, middle=last // 2, last=last)
    for r in published("evals"):
        if r["run_id"] == run and "games" in r:
            step = int(places.get(r.get("step", "last"), r.get("step", last)))
            column(rows, "eval_score", [(step, r["score"])])
            column(rows, "eval_games", [(step, r["games"])])
    return from_rows([rows[s] for s in sorted(rows)], settings_of(run), run)


CORRECTED = {  # run: what the ledger says of it, its statements, and the findings that say so
    "26kjpms2": ("two draws of 32: what an untrained network gets", "0119-14 0206-33", "evaluation_floor"),
    "p26atclv": ("the policy became certain: 24 effective moves to 2", "0118-01", "entropy_collapse"),
    "594y62v3": ("not shown to be the best of five; nothing is known to be wrong with it", "0119-10", ""),
    "3zbv7l8m": ("the settings of 594y62v3, and another end: one run shows no cause", "0119-23", "evaluation_floor"),
    "ksumd93q": ("its loss rose because it holds the bonus, and entropy fell", "0119-02", "loss_is_entropy"),
    "z7s89e1z": ("a KL coefficient at its lower limit, by the document's word", "0129-05", "controller_idle"),
    "pjjfjmis": ("a KL coefficient at its lower limit, by the document's word", "0129-05", "controller_idle"),
    "gnt9fhq0": ("a KL coefficient at its upper limit by step 124", "0129-04", "controller_saturated"),
    "xkbkwo4s": (
        "two temperatures; KL penalty and bonus cancel; the controller is a constant, the floor never fires",
        "0206-12 0206-35 0206-13 0206-36",
        "two_temperatures terms_cancel controller_saturated monitor_silent",
    ),
    "p9u63rgu": ("two temperatures, probably dropout; rewards flat", "0207-01 0207-11", "two_temperatures flat_reward"),
    "dk88cqs1": ("not mended: noise in the ratio, such as dropout, is left", "0207-33", "ratio_noise"),
    "f11u4id9": ("no staleness: noise in the ratio, with a refresh at every step", "0207-41", "ratio_noise"),
}


def judged(run):
    "A row of the table: what the doctor says of a run, and what the ledger says."
    history = history_of(run)
    said, (corrected, claims, wanted) = diagnose(history), CORRECTED[run]
    names = [f.name for f in said.findings if f.severity != "healthy"]
    alarms = [f.name for f in said.alarms if f.name != "evaluation_floor"] or [f.name for f in said.alarms]
    right = set(wanted.split()) <= set(names) and set(alarms[:1]) <= {*wanted.split(), "evaluation_floor"}
    return dict(
        run=run,
        known=sum(len(x) for _, x in history.columns.values()),
        first=said.alarms[0].title if said.alarms else "no alarm",
        certainty=f"{said.alarms[0].certainty:.2f}" if said.alarms else "",
        findings=" ".join(names),
        corrected=corrected,
        claims=claims,
        wanted=wanted,
        agrees="yes" if right else "no",
    )


def record():
    "The doctor on all runs of the record."
    rows = [judged(run) for run in CORRECTED]
    with (HERE / "data" / "doctor_record.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    for r in rows:
        print(f"{r['run']:9} {r['agrees']:3} {r['first']:28} {r['findings']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("six", "record"))
    dict(six=six, record=record)[parser.parse_args().command]()
