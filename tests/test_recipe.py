"The experiment of nbs/experiments/recipe.py: one change an arm, and each is what it is called."

import sys

import numpy as np
import pytest
import torch

from grpo_chess.improved import improved_terms
from grpo_chess.model import MoveDist
from test_headline import headline, labels  # noqa: F401, fixtures
from test_law import SCORES, WIN, Batch
from test_population import FOLDER, experiment


@pytest.fixture(scope="module")
def recipe():
    sys.path.append(str(FOLDER))
    yield experiment("recipe")
    sys.path.remove(str(FOLDER))


def drawn(recipe, numbers, chance=None, **kw):
    "The positions of each update."
    rng = np.random.default_rng(0)
    chance = np.ones(len(numbers)) if chance is None else chance
    return list(recipe.numbers_of(recipe.Recipe(**kw), numbers, chance, rng))


def test_an_arm_changes_one_thing(recipe):
    usual = vars(recipe.Recipe())
    for arm, change in recipe.ARMS.items():
        assert len(change) == (arm != "the recipe")
        assert all(usual[name] != value for name, value in change.items()), arm


def test_what_is_drawn(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "JUDGED", 1000)
    monkeypatch.setattr(recipe, "DRAWN", 4000)
    numbers = np.random.default_rng(1).permutation(5000)[:1000]
    often, once = drawn(recipe, numbers, batch=50), drawn(recipe, numbers, batch=50, again=False)
    assert len(often) == 80 and all(len({*x}) == 50 for x in often) and {*np.concatenate(often)} <= {*numbers}
    assert np.concatenate(once).tolist() == numbers.tolist()
    grows, place = drawn(recipe, numbers, batch=50, grows=True), {n: i for i, n in enumerate(numbers)}
    last = [max(place[n] for n in x) for x in grows]
    assert all(k < max(50, round((i + 1) / 80 * 1000)) for i, k in enumerate(last)) and last[-1] > 900
    chance = np.where(np.arange(1000) < 500, 1.0, 0.25)
    spread = np.concatenate(drawn(recipe, numbers, chance, batch=50, spread=0.12))
    assert abs(np.mean([place[n] < 500 for n in spread]) - 0.8) < 0.04


def test_a_position_is_drawn_by_its_spread(recipe, labels):  # noqa: F811
    by = recipe.spreads(labels)
    cfg = recipe.Recipe(spread=float(by.max()) * 0.9)
    assert np.allclose(recipe.chances(cfg, labels, np.arange(len(labels))), np.minimum(1, by / cfg.spread))
    assert (recipe.chances(recipe.Recipe(), labels, np.arange(len(labels))) == 1).all()


def test_the_recipe_s_loss_is_that_of_the_trainer(recipe):
    "The distance to the improved policy of the start; or of the policy as it is now, where that is the arm."
    old = MoveDist.from_logits(torch.tensor([[0.0, 1.0, -0.5, -torch.inf], [0.3, 0.2, 0.1, 0.0]]))
    now, legal = MoveDist.from_logits(SCORES), SCORES > -torch.inf
    win = WIN.nan_to_num(0.0)
    for who, whose in (("start", old), ("now", now)):
        adv = torch.where(legal, win - (whose.probs * win).sum(-1, keepdim=True), 0.0)
        weight = whose.probs / 2
        told = improved_terms(now.finite, whose.finite, adv, legal, weight, recipe.TAU, 1.0, True)
        given = old if who == "start" else None
        assert recipe.loss(recipe.Recipe(old=who), now, given, Batch(WIN), None).isclose(told)
