"Guards and controllers: what they read, what they do, and what is refused."
import shutil

import numpy as np
import pytest
import torch

from grpo_chess import guards
from grpo_chess.checkpoint import checkpoints, load_checkpoint, save_checkpoint, state_bytes
from grpo_chess.files import SUMS, write_folder
from grpo_chess.guards import GuardConfig, check_guard, multiplicative_kl, proportional_kl
from grpo_chess.loss import LossConfig
from grpo_chess.trainer import AblateConfig, lr_factor
from small import make, queen, steps, untimed, weights

BOOST = GuardConfig(entropy_floor=5., floor_patience=2)      # nothing reaches 5 nats

@pytest.fixture
def low_maximum(monkeypatch): monkeypatch.setattr(guards, "BOOST_MAX", .2)

@pytest.fixture
def often(monkeypatch): monkeypatch.setattr(guards, "ROLLBACK_EVERY", 4)

@pytest.fixture(scope="module")
def falling():
    "Entropy of a run that collapses, step by step."
    t = queen()
    return [t.step()["entropy"] for _ in range(20)]

def test_controllers_by_hand():
    approx = pytest.approx
    assert multiplicative_kl(.01, .02, .01, 1.5) == approx(.015)
    assert multiplicative_kl(.01, .01, .01, 1.5) == approx(.01/1.5)
    assert multiplicative_kl(.09, .02, .01, 1.5) == .1 and multiplicative_kl(1.2e-4, 0., .01, 1.5) == 1e-4
    assert proportional_kl(.01, .011, 500, .01, 1000.) == approx(.01*1.05)
    assert proportional_kl(.01, .009, 500, .01, 1000.) == approx(.01*.95)
    assert proportional_kl(.01, 9., 500, .01, 1000.) == approx(.01*1.1)
    assert proportional_kl(.01, -9., 500, .01, 1000.) == approx(.01*.9)
    assert proportional_kl(.0999, 9., 1000, .01, 1000.) == .1 and proportional_kl(1.01e-4, 0., 1000, .01, 1000.) == 1e-4

# The floor

def test_a_boost_comes_when_patience_ends_and_stops_at_its_maximum(low_maximum):
    t = make(loss=dict(entropy_coef=.1), guard=BOOST)
    rows = [t.step() for _ in range(7)]
    assert [r["entropy_coef"] for r in rows] == pytest.approx([.1, .1, .15, .15, .2, .2, .2])
    assert [r["collapsed"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [bool(r["guard"]) for r in rows] == [False, True]*3 + [False]
    assert "maximum" in rows[5]["guard"] and "0.1 -> 0.15" in rows[1]["guard"]
    for r in rows: assert r["entropy_term"] == pytest.approx(-r["entropy_coef"]*r["entropy"], rel=1e-3)

def test_a_boost_changes_what_is_learned():
    plain, boosted = (make(loss=dict(entropy_coef=.1), guard=g) for g in (None, BOOST))
    steps(plain, 2), steps(boosted, 2)
    assert torch.equal(weights(plain), weights(boosted))
    steps(plain, 1), steps(boosted, 1)
    assert not torch.equal(weights(plain), weights(boosted))

def test_only_steps_in_a_row_count():
    guard = guards.Guard(GuardConfig(entropy_floor=1., floor_patience=2), LossConfig(entropy_coef=.1))
    acts = [guard.should_act(h) for h in (.5, 2., .5, .5, .5, .5, 2., .5)]
    assert acts == [False, False, False, True, False, True, False, False]
    assert not guard.is_collapsed(1.)                                      # exactly at the floor

def test_a_rollback_returns_to_weights_from_above_the_floor_at_a_lower_rate(often, falling):
    floor = (falling[4] + falling[8])/2
    assert falling[4] > floor > max(falling[8:])
    t, twin = queen(GuardConfig(entropy_floor=floor, floor_action="rollback", floor_patience=3, rollbacks=1)), queen()
    rows = []
    while not (rows and rows[-1]["guard"]): rows.append(t.step())
    last = rows[-1]["step"]
    steps(twin, 4)                                # the policy of step 4 is the last above the floor at a multiple of 4
    assert "rollback 1 of 1: weights of step 4" in rows[-1]["guard"]
    assert torch.equal(weights(t), weights(twin)) and t.done == last + 1
    for a, b in zip(t.optimizer.state_dict()["state"].values(), twin.optimizer.state_dict()["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    row = t.step()
    assert row["step"] == last + 1 and row["entropy"] == pytest.approx(falling[4], abs=1e-5)
    assert row["lr"] == pytest.approx(.5*3e-3*lr_factor(t.tcfg, last + 1))
    while not t.aborted and t.done < 60: rows.append(t.step())
    assert "all 1 rollbacks were used" in t.aborted and rows[-1]["collapsed"] == 3

def test_a_rollback_without_a_good_state_aborts():
    t = make(guard=GuardConfig(entropy_floor=5., floor_action="rollback", floor_patience=2))
    steps(t, 2)
    assert "no state from before" in t.aborted

# The controllers

@pytest.mark.parametrize("kind", ["multiplicative", "proportional"])
@pytest.mark.parametrize("read", ["exact", "k1"])
def test_a_controller_follows_what_it_reads(monkeypatch, kind, read):
    monkeypatch.setattr(guards, "KL_HORIZON", 100.)
    t = make(loss=dict(kl_coef=.01), minibatches=2,
             guard=GuardConfig(kl_controller=kind, controller_kl=read, target_kl=2e-4, adapt_rate=1.1))
    rows, coef = [t.step() for _ in range(6)], .01
    for r in rows:
        kl = r["kl_step"] if read == "exact" else r["approx_kl"]
        assert r["kl_coef"] == pytest.approx(coef) and r["kl_ratio"] == pytest.approx(kl/2e-4)
        if kind == "multiplicative": coef = multiplicative_kl(coef, kl, 2e-4, 1.1)
        else: coef = proportional_kl(coef, kl, 24, 2e-4, 100.)
    assert len({r["kl_coef"] for r in rows}) > 3
    plain = make(loss=dict(kl_coef=.01), minibatches=2)
    steps(plain, 6)
    assert not torch.equal(weights(plain), weights(t))

def test_with_a_reference_the_controller_reads_the_distance_to_it():
    guard = GuardConfig(kl_controller="multiplicative", target_kl=1e-4)
    t = make(loss=dict(kl_coef=.01, kl_to="reference"), guard=guard)
    rows = [t.step() for _ in range(4)]
    assert [r["kl_ratio"] for r in rows] == pytest.approx([r["kl_term"]/r["kl_coef"]/1e-4 for r in rows], abs=1e-6)
    assert rows[0]["kl_ratio"] == pytest.approx(0, abs=1e-3) and rows[3]["kl_ratio"] > 1
    assert rows[1]["kl_coef"] < .01 < .0101 < rows[3]["kl_coef"]*1.2**2

@pytest.mark.parametrize("read", ["exact", "k1"])
def test_updates_end_when_the_policy_has_gone_far_enough(read):
    # seed 1, because k1 of the very moves that were trained on may be negative, as with seed 0, and then stops nothing
    free = make(seed=1, epochs=4, lr=3e-3)
    assert free.step()["updates"] == 4
    t = make(seed=1, epochs=4, lr=3e-3, guard=GuardConfig(stop_kl=1e-6, controller_kl=read))
    row, twin = t.step(), make(seed=1, lr=3e-3)
    twin.step()
    assert row["updates"] == 1 and "1 of 4" in row["guard"]
    assert torch.equal(weights(t), weights(twin))                              # one update, then the KL was seen
    never = make(seed=1, epochs=4, lr=3e-3, guard=GuardConfig(stop_kl=100., controller_kl=read))
    assert never.step()["guard"] == "" and torch.equal(weights(never), weights(free))

def test_early_stopping_reads_the_kl_that_it_is_told_to():
    k1, exact = (make(guard=GuardConfig(stop_kl=.1, controller_kl=kl), epochs=2) for kl in ("k1", "exact"))
    far = dict(approx_kl=.2, kl_exact=.05)
    assert k1.too_far(far) and not exact.too_far(far)

# Memory

@pytest.mark.parametrize("guard, kw", [
    (BOOST, dict(loss=dict(entropy_coef=.1))),
    (GuardConfig(kl_controller="multiplicative", target_kl=1e-4, stop_kl=1e-3),
     dict(loss=dict(kl_coef=.01), epochs=3, lr=3e-3)),
    (GuardConfig(kl_controller="proportional", target_kl=1e-4, controller_kl="k1"),
     dict(loss=dict(kl_coef=.01), sync_every=2, minibatches=2))], ids=["boost", "multiplicative", "proportional"])
def test_a_resumed_run_remembers_its_guards(monkeypatch, low_maximum, tmp_path, guard, kw):
    monkeypatch.setattr(guards, "KL_HORIZON", 50.)
    whole, first, again = (make(guard=guard, **kw) for _ in range(3))
    rows = steps(whole, 7)
    steps(first, 3)
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert steps(again, 4) == rows[3:] and torch.equal(weights(whole), weights(again))

@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_resumed_run_can_still_roll_back(often, tmp_path, falling, stop):
    "The state to go back to is part of the checkpoint, whether the rollback is still to come or was."
    guard = GuardConfig(entropy_floor=(falling[4] + falling[8])/2, floor_action="rollback", floor_patience=3)
    whole, first, again = (queen(guard) for _ in range(3))
    rows = steps(whole, 16)
    assert any("rollback" in r["guard"] for r in rows)
    steps(first, stop)
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert steps(again, 16 - stop) == rows[stop:] and torch.equal(weights(whole), weights(again))

def test_a_checkpoint_from_before_there_were_guards_loads(tmp_path):
    t = make()
    t.step()
    path = save_checkpoint(t, tmp_path)
    old = torch.load(path/"state.pt", weights_only=True)
    for name in ("guard", "good", "schedule_place", "elapsed"): del old[name]
    contents = {f.name: f.read_bytes() for f in path.iterdir() if f.name != SUMS} | {"state.pt": state_bytes(old)}
    shutil.rmtree(path)
    write_folder(path, contents)
    again = make()
    load_checkpoint(again, path)
    assert untimed(again.step()) == untimed(t.step())

# What is refused

@pytest.mark.parametrize("bad", [
    dict(entropy_floor=-1.), dict(entropy_floor=9.), dict(entropy_floor=np.nan), dict(floor_patience=0),
    dict(floor_action="cry"),
    dict(boost_factor=1.), dict(rollback_lr=1.), dict(rollbacks=-1), dict(kl_controller="pid"),
    dict(controller_kl="k2"), dict(target_kl=0.),
    dict(adapt_rate=.5), dict(kl_coef_min=0.), dict(kl_coef_max=1e-5), dict(stop_kl=-1.)])
def test_guards_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"guard.{next(iter(bad))} = "): GuardConfig(**bad)

@pytest.mark.parametrize("guard, loss, single, says", [
    (dict(entropy_floor=1.5), dict(), False, "entropy_coef = 0.0"),
    (dict(entropy_floor=1.5), dict(entropy_coef=1.), False, "up to 1: it must lie"),
    (dict(kl_controller="proportional"), dict(), False, "kl_coef = 0.0"),
    (dict(kl_controller="multiplicative"), dict(kl_coef=.2), False, "kl_coef_max = 0.1"),
    (dict(kl_controller="multiplicative", controller_kl="k1"), dict(kl_coef=.01, kl="k1"), True, "reads 0"),
    (dict(stop_kl=.01), dict(), True, "only one update")])
def test_guards_that_cannot_act_are_refused(guard, loss, single, says):
    with pytest.raises(ValueError, match=says): check_guard(GuardConfig(**guard), LossConfig(**loss), single)

def test_a_boost_that_the_schedule_of_entropy_undoes_is_refused():
    "Both set the entropy coefficient: near the end of the run the schedule would take back what the guard has raised."
    floor, loss = GuardConfig(entropy_floor=1.5), LossConfig(entropy_coef=.4)
    with pytest.raises(ValueError, match="trainer.entropy_end = 0.05"): check_guard(floor, loss, True, .05)
    check_guard(floor, loss, True, -1.)
    check_guard(GuardConfig(entropy_floor=1.5, floor_action="rollback"), loss, True, .05)

def test_guards_that_can_act_are_not_refused():
    check_guard(GuardConfig(entropy_floor=1.5, floor_action="abort"), LossConfig(), True)
    check_guard(GuardConfig(entropy_floor=1.5, floor_action="rollback"), LossConfig(), True)
    reads_k1 = GuardConfig(kl_controller="multiplicative", controller_kl="k1")
    check_guard(GuardConfig(kl_controller="multiplicative"), LossConfig(kl_coef=.01, kl="k1"), True)
    check_guard(reads_k1, LossConfig(kl_coef=.01, kl="k1"), False)
    check_guard(reads_k1, LossConfig(kl_coef=.01, kl_to="reference"), True)

def test_the_trainer_itself_refuses_a_guard_that_cannot_act():
    with pytest.raises(ValueError, match="only one update"): make(guard=GuardConfig(stop_kl=.01))
    make(guard=GuardConfig(stop_kl=.01), epochs=2)
    make(guard=GuardConfig(stop_kl=.01), ablate=AblateConfig(loss_temperature=.5))
