"The configurations of the research record are valid runs and say what its documents say."

import csv
from pathlib import Path

import pytest

from grpo_chess.train import parse

TOP = Path(__file__).resolve().parent.parent / "research_docs"
CONFIGS = sorted(p for p in (TOP / "configs").glob("*.yaml") if p.stem != "small")
FILE = {"dk88cqs1": "bxp7", "f11u4id9": "nryk", "recommended 0206": "recommended-0206"}
# a parameter of the record -> what it is called here, and how its value reads there
KEY = {
    "lr": ("trainer.lr", float),
    "entropy_coef": ("loss.entropy_coef", float),
    "kl_coef": ("loss.kl_coef", float),
    "clip_ratio": ("loss.epsilon_low", float),
    "rollout_temperature": ("sampler.temperature", float),
    "num_trajectories": ("sampler.group", int),
    "trajectory_depth": ("sampler.plies", int),
    "freeze_layers": ("trainer.freeze", int),
    "ppo_steps": ("trainer.epochs", int),
    "sync_every_n_steps": ("trainer.sync_every", int),
    "teacher_forcing_prob": ("sampler.teacher_forcing", float),
    "target_kl": ("guard.target_kl", float),
    "kl_coef_min": ("guard.kl_coef_min", float),
    "kl_coef_max": ("guard.kl_coef_max", float),
    "kl_adapt_rate": ("guard.adapt_rate", float),
    "entropy_floor": ("guard.entropy_floor", float),
    "entropy_floor_action": ("guard.floor_action", str),
    "entropy_boost_factor": ("guard.boost_factor", float),
}
SAID = [
    r
    for r in csv.DictReader((TOP / "runs/hyperparameters.csv").open())
    if (TOP / f"configs/{FILE.get(r['run_id'], r['run_id'])}.yaml").exists()
]


def config(name):
    return parse(["--preset", "scratch", "--config", str(TOP / f"configs/{name}.yaml")])[0]


def get(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_is_a_valid_run_at_both_sizes(path):
    full, small = (
        parse(["--preset", "scratch", "--config", str(path), *more])[0]
        for more in ([], ["--config", str(TOP / "configs/small.yaml")])
    )
    assert full.model.width == 256 and small.model.width == 96
    assert full.trainer.precision == small.trainer.precision == "32-true"  # its trainer set none
    assert (
        small.loss == full.loss and small.guard == full.guard and small.ablate == full.ablate
    )  # smaller, and otherwise the same run


@pytest.mark.parametrize("row", SAID, ids=lambda r: f"{r['run_id']}-{r['parameter']}")
def test_says_what_the_documents_say(row):
    cfg, value, T = config(FILE.get(row["run_id"], row["run_id"])), row["value"], row["parameter"]
    if T == "loss_temperature":
        assert (cfg.ablate.loss_temperature or cfg.sampler.temperature) == float(value)
    elif T == "adaptive_kl":
        assert (cfg.guard.kl_controller == "multiplicative") == (value == "true")
    elif T == "use_entropy_floor":
        assert (cfg.guard.entropy_floor > 0) == (value == "true")
    elif T == "steps":
        assert cfg.trainer.steps == int(value)
    elif T in KEY:
        assert get(cfg, KEY[T][0]) == KEY[T][1](value)
    else:
        assert T in ("epochs", "eval_every_n_epochs"), f"nothing here knows what {T} is"


def test_every_run_described_by_hyperparameters_has_a_file():
    "Runs with a learning rate of their own in the table; others are named only."
    named = {r["run_id"] for r in csv.DictReader((TOP / "runs/hyperparameters.csv").open()) if r["parameter"] == "lr"}
    assert len(named) >= 10 and all((TOP / f"configs/{FILE.get(n, n)}.yaml").exists() for n in named)
