"Detectors that look while a run goes on: warnings, actions, patience, and a memory that a checkpoint keeps."
import inspect
import re
from itertools import pairwise

import pytest

from grpo_chess import watch
from grpo_chess.figures import data
from grpo_chess.guards import GuardConfig, check_guard, collapse_action
from grpo_chess.history import CASES
from grpo_chess.loss import LossConfig
from grpo_chess.panel import read_metrics
from grpo_chess.trainer import AblateConfig
from grpo_chess.watch import FIRST_ROWS, LAST_ROWS, MIDDLE_ROWS, kept_rows, look, parse_actions
from small import make, untimed

OFTEN = dict(look_every=2)

def faulty(**guard):
    "A run that is sampled at one temperature and scored at another."
    return make(sharpen=40., ablate=AblateConfig(loss_temperature=.7), loss=dict(entropy_coef=.01), lr=1e-5,
                guard=GuardConfig(**OFTEN | guard))

def test_a_fault_is_warned_of_once_and_changes_no_number():
    loud, quiet = ([untimed(t.step()) for _ in range(6)] for t in (faulty(), faulty(warnings=False)))
    assert "two temperatures" in loud[1]["guard"] and not any("two temp" in r["guard"] for r in loud[2:])
    assert not any(r["guard"] for r in quiet)
    assert [{k: v for k, v in r.items() if k != "guard"} for r in loud] == [
        {k: v for k, v in r.items() if k != "guard"} for r in quiet]

def test_a_sound_run_gets_no_warning_about_its_ratios():
    t = make(loss=dict(entropy_coef=.01), guard=GuardConfig(**OFTEN))
    said = " ".join(t.step()["guard"] for _ in range(6))
    assert not [x for x in ("temperature", "noise in the ratio", "stale", "truncated", "rounding") if x in said]

def test_an_action_comes_after_its_patience():
    t = faulty(act_on="two_temperatures:abort:2")
    rows = [t.step() for _ in range(4)]
    assert not rows[1]["guard"].count("abort") and "abort: two temperatures" in rows[3]["guard"] and t.aborted
    t = faulty(act_on="two_temperatures:boost:1")
    rows = [t.step() for _ in range(4)]
    assert rows[2]["entropy_coef"] == pytest.approx(1.5*rows[1]["entropy_coef"]) and "boost" in rows[1]["guard"]
    t = faulty(act_on="two_temperatures:rollback:1")
    assert "no state from before" in [t.step() for _ in range(2)][1]["guard"] or t.guard.rolled == 1

def test_after_a_rollback_its_steps_are_not_held_against_the_run():
    "Weights that are sound again were rolled back by the rows of those that were not, until the run was aborted."
    t = faulty(floor_action="rollback", entropy_floor=.1)
    rows = [row for _ in range(30) for row in kept_rows([], t.step())]
    t.guard.rows, t.guard.looks = rows, dict(lr_too_high=3)
    done, said = collapse_action(t.guard, 1., dict(done=20), "rollback", "x")
    assert done == "rollback" and "weights of step 20" in said and not t.guard.looks
    assert [r["step"] for r in t.guard.rows] == [*range(20)] and t.guard.wants_state(40, 9.)

def test_a_finding_is_given_an_action_with_or_without_patience():
    assert parse_actions("entropy_collapse:abort, clip_fraction:boost:3") == dict(entropy_collapse=("abort", 1),
                                                                                  clip_fraction=("boost", 3))
    with pytest.raises(ValueError, match="could never act"): parse_actions("reward_rises:abort:1")

def test_what_never_alarms_is_known():
    "By the severities that stand in the checks."
    found = [re.findall(r'Finding\(\s*"(\w+)",\s*([^,]+)', inspect.getsource(page)) for page in watch.PAGES]
    severities = {}
    for name, severity in sum(found, []): severities.setdefault(name, set()).add(severity)
    quiet = {n for n, s in severities.items() if s <= {'"note"', '"healthy"'}}
    assert len(severities) > 30 and quiet == {*watch.QUIET} and quiet < {*CASES}

def test_a_resumed_run_says_what_the_other_says():
    whole, part = faulty(act_on="two_temperatures:boost:2"), faulty(act_on="two_temperatures:boost:2")
    rows = [untimed(whole.step()) for _ in range(8)]
    for _ in range(3): part.step()
    state, other = part.state(), faulty(act_on="two_temperatures:boost:2")
    other.load_state(state)
    assert [untimed(other.step()) for _ in range(5)] == rows[3:]

def test_what_is_kept_has_no_clock_and_an_end():
    rows = []
    for i in range(3000):
        rows = kept_rows(rows, dict(step=i, entropy=1., seconds=3., guard="x", loss=float("nan")))
        assert len(rows) <= FIRST_ROWS + MIDDLE_ROWS + LAST_ROWS
    assert rows[0] == dict(step=0., entropy=1.)
    steps = [int(r["step"]) for r in rows]
    assert steps[:FIRST_ROWS] == [*range(20)] and steps[-LAST_ROWS:] == [*range(2820, 3000)] and steps == sorted(steps)
    middle = [19, *steps[FIRST_ROWS:-LAST_ROWS], 2820]
    assert len(middle) > MIDDLE_ROWS/2 and max(b - a for a, b in pairwise(middle)) <= 4*3000/MIDDLE_ROWS

@pytest.mark.parametrize("name", ["tiny", "imitator", "scratch"])
def test_nothing_is_warned_of_while_a_stored_run_goes_on(name):
    "By the rows that a guard keeps: without the middle of `tiny` its last steps look like a slow collapse."
    rows, looks, told = [], {}, []
    for step, row in enumerate(read_metrics(data(f"{name}_metrics.jsonl")), 1):
        rows = kept_rows(rows, row)
        if step % 10 == 0: look(rows, {}, looks, told, {})
    assert told == []

def test_patience_counts_looks_in_a_row():
    rows, looks, told = [dict(step=i, kl_coef=min(.1, .01*1.2**i)) for i in range(40)], {}, []
    wanted = parse_actions("controller_saturated:abort:2")
    assert look(rows, {}, looks, told, wanted)[1] == "" and looks == dict(controller_saturated=1)
    assert look(rows, {}, looks, told, wanted)[1:] == ("abort", "KL controller at its maximum")
    assert look(rows[:5], {}, looks, told, wanted)[1] == "" and looks == {}

@pytest.mark.parametrize("bad", [dict(act_on="collapse:abort"), dict(act_on="entropy_collapse:explode"),
                                 dict(act_on="entropy_collapse"), dict(act_on="entropy_collapse:abort:0"),
                                 dict(act_on="a:b:c:d"), dict(look_every=0), dict(clip_limit=0.)])
def test_what_cannot_act_is_refused_in_one_line(bad):
    with pytest.raises(ValueError, match=f"guard.{next(iter(bad))}") as e: GuardConfig(**bad)
    assert "\n" not in str(e.value)

def test_a_boost_needs_a_coefficient():
    with pytest.raises(ValueError, match="boost"):
        check_guard(GuardConfig(act_on="slow_collapse:boost:1"), LossConfig(), one_update=True)
