"The GRPO step: ratio one, the same run twice, processes that add up, and a policy that learns."
import copy
import math
import time
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
from runs import ranks
from safetensors.torch import load_file

from grpo_chess import batch as batch_module
from grpo_chess import train
from grpo_chess import trainer as trainer_module
from grpo_chess.batch import make_fabric, tempered_gap
from grpo_chess.board import encode, move_to_action
from grpo_chess.guards import GuardConfig
from grpo_chess.model import ChessTransformer, ModelConfig, MoveDist
from grpo_chess.panel import read_metrics
from grpo_chess.reward import step_rewards
from grpo_chess.sampler import action_agreement
from grpo_chess.trainer import AblateConfig, NotFinite, TrainerConfig, lr_factor
from small import QUEEN, SMALL, always, flat, gradient, make, nan_scores, steps, untimed, weights

TOP = Path(__file__).resolve().parent.parent
DROPOUT = ModelConfig(width=32, layers=2, heads=2, dropout=.3)

# Law 1: ratio one

@pytest.mark.parametrize("temperature", [.5, 1., 1.3, 2.])
@pytest.mark.parametrize("model", [SMALL, DROPOUT])
def test_ratio_is_one_before_the_first_update(temperature, model):
    t = make(model=model, sharpen=30., sampler=dict(temperature=temperature), minibatches=2, micro_batch=5)
    for _ in range(3): assert t.step()["ratio_error"] < 1e-5

@pytest.mark.parametrize("temperature", [.5, 2.])
def test_ratio_is_one_in_bfloat16_too(temperature):
    "Both passes go through one kernel in one precision, whatever the batches' sizes."
    t = make(fabric=make_fabric("bf16-mixed", "cpu"), sharpen=30., sampler=dict(temperature=temperature), minibatches=2,
             micro_batch=7)
    for _ in range(3): assert t.step()["ratio_error"] < 1e-3

@pytest.mark.parametrize("sampler", [dict(learn="starter"), dict(noise=.3), dict(temperature=1.5, temperature_end=1.)])
def test_ratio_is_one_however_the_games_are_played(sampler):
    t = make(sharpen=30., sampler=sampler)
    for _ in range(3):
        row = t.step()
        assert row["ratio_error"] < 1e-5 and abs(row["kl_exact"]) < 1e-5 and row["clip_region"] == 0

@pytest.mark.parametrize("ablate, model", [
    (AblateConfig(loss_temperature=1.), SMALL), (AblateConfig(dropout=True), DROPOUT)])
def test_known_bugs_show_in_the_ratio(ablate, model):
    assert make(sharpen=30., model=model, ablate=ablate, sampler=dict(temperature=1.3)).step()["ratio_error"] > .05

def test_a_group_of_one_needs_all_moves():
    with pytest.raises(ValueError, match="siblings"): make(sampler=dict(group=1))

def test_a_stale_behaviour_policy_is_refreshed_on_schedule():
    errors = [row["ratio_error"] for row in steps(make(sync_every=3, sharpen=30.), 7)]
    assert [e < 1e-5 for e in errors] == [True, False, False, True, False, False, True]

# What a step does and says

def test_learns_to_take_the_queen():
    "One position, a free queen: its capture becomes the usual move."
    t = make(starts=always(QUEEN), sampler=dict(boards=2, group=16, plies=1), lr=3e-3, steps=30)
    tokens, legal = map(torch.as_tensor, encode([chess.Board(QUEEN)]))
    capture = legal[0] == move_to_action(chess.Move.from_uci("e4d5"), True)

    def probability(): return t.policy(t.model).dist(tokens, legal).probs[0, capture].item()
    before = probability()
    steps(t, 30)
    assert before < .3 and probability() > .9

def test_what_is_logged_of_a_step_is_what_happened():
    "kl_step, entropy and agreement, computed here from the games played again by the policy before the step."
    t, twin = make(lr=3e-3), make(lr=3e-3)
    row, ro = t.step(), twin.play().rollout
    rows = ro.node[..., :-1][ro.train]
    old, new = (x.policy(x.model).dist(ro.tokens[rows.unique()], ro.legal[rows.unique()]) for x in (twin, t))
    assert row["kl_step"] == pytest.approx(old.kl(new).mean().item(), rel=1e-4) and row["kl_step"] > 1e-5
    plies = [MoveDist(ro.logp[r]).entropy().item() for r in rows]
    assert row["entropy"] == pytest.approx(sum(plies)/len(plies), rel=1e-5)
    assert row["effective_moves"] == pytest.approx(math.exp(row["entropy"]))
    assert row["agreement_mean"] == pytest.approx(action_agreement(ro).mean().item())

def test_the_gain_of_a_step_is_what_its_own_positions_say(monkeypatch):
    "Expected value after the step less that before it, by the games played again; against the gradient it is lost."
    t, twin = (make(lr=3e-3, loss=dict(moves="all")) for _ in range(2))
    row, batch = t.step(), twin.play()
    ro = batch.rollout
    rows = ro.node[..., :-1][ro.train].unique()
    old, new = (x.policy(x.model).dist(ro.tokens[rows], ro.legal[rows]).probs for x in (twin, t))
    value = t.judge.of_moves([ro.fens[r] for r in rows.tolist()], ro.legal[rows])
    gain = ((new - old)*value).sum(-1).mean().item()
    assert row["gain_step"] == pytest.approx(gain, rel=1e-4) and gain > 0
    assert math.isnan(make().step()["gain_step"])                     # nobody has judged the other moves
    def upside_down(play=t.play):
        batch = play()
        batch.adv = -batch.adv
        return batch
    monkeypatch.setattr(t, "play", upside_down)
    assert max(row["gain_step"] for row in steps(t, 3)[1:]) < 0       # the first still has the old momentum

def sharpen(t, times):
    "The same order of moves, and more certain."
    with torch.no_grad():
        for p in t.model.head.source.parameters(): p.mul_(times)

@pytest.mark.parametrize("times", (.6, 1., 1.7))
def test_a_start_that_was_only_sharpened_has_learned_nothing(times):
    "Beside the start at the same entropy; measured here on the positions that it plays then."
    t, plain = (make(loss=dict(moves="all"), lr=1e-12, sharpen=30.) for _ in range(2))
    sharpen(t, times)
    row = t.step()
    assert row["start_regret"] == pytest.approx(row["expected_regret"], abs=2e-4*(times != 1) + 1e-6)
    assert times == 1 or abs(row["entropy"] - plain.step()["entropy"]) > .1

def test_what_was_learned_is_what_the_start_would_lose_more():
    t = make(loss=dict(moves="all"), lr=3e-3, steps=100)
    rows = steps(t, 12)
    assert rows[0]["start_regret"] == pytest.approx(rows[0]["expected_regret"], abs=1e-6)
    assert np.mean([r["start_regret"] - r["expected_regret"] for r in rows[6:]]) > .01
    assert math.isnan(make().step()["start_regret"])                  # nobody has judged the other moves
    waits = make(loss=dict(moves="all"), replay=1, replay_batch=8, collect=.5, steps=4)
    filling = steps(waits, 2)                                         # it is the start that plays
    assert [r["start_regret"] for r in filling] == pytest.approx([r["expected_regret"] for r in filling], abs=1e-6)

def test_the_start_at_an_entropy_is_found_by_hand():
    "The power at which the start is as undecided, by bisection."
    t = make(loss=dict(moves="all"), lr=3e-3, steps=100)
    steps(t, 5)
    batch = t.play()
    ro, value = batch.rollout, batch.value
    rows = ro.node[..., :-1][ro.train].unique()
    begun = t.policy(t.start).dist(ro.tokens[rows], ro.legal[rows]).logp.double()
    old = MoveDist(ro.logp[rows].double())
    low, high = .1, 50.
    for _ in range(60):
        b = (low*high)**.5
        p = MoveDist((begun*b).log_softmax(-1))
        low, high = (b, high) if p.entropy().mean() > old.entropy().mean() else (low, b)
    gap = ((old.probs - p.probs)*value[rows].nan_to_num()).sum(-1).mean().item()
    assert tempered_gap(t.fabric, t.policy(t.start), ro, value) == pytest.approx(gap, abs=3e-4) and gap > 1e-3

class Elsewhere(torch.Tensor):
    "A tensor on a device: numpy cannot read it."
    def numpy(self, **_): raise TypeError("can't convert a device's tensor to numpy")
    def cpu(self): return self.as_subclass(torch.Tensor)

def test_the_start_is_measured_where_sums_are_on_a_device(monkeypatch):
    t = make(loss=dict(moves="all"), lr=3e-3)
    t.step()
    batch = t.play()
    here = tempered_gap(t.fabric, t.policy(t.start), batch.rollout, batch.value)
    monkeypatch.setattr(batch_module, "sum_of_all", lambda fabric, x: x.as_subclass(Elsewhere))
    assert tempered_gap(t.fabric, t.policy(t.start), batch.rollout, batch.value) == here

def test_the_time_of_a_step_is_all_of_it(monkeypatch):
    "Playing, updating and measuring: what a reader waits for is what the report adds up."
    def slow(f, by):
        def later(*args, **kw):
            time.sleep(by)
            return f(*args, **kw)
        return later
    t = make()
    for owner, name, by in ((t, "play", .1), (t, "update", .2), (trainer_module, "measure", .3)):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name), by))
    row = t.step()
    assert row["seconds_play"] >= .1 and row["seconds_update"] >= .2
    assert row["seconds"] >= row["seconds_play"] + row["seconds_update"] + .3

# Knobs

def test_learning_rate_schedule():
    cfg = TrainerConfig(steps=20, warmup=4)
    f = [lr_factor(cfg, s) for s in range(20)]
    assert lr_factor(cfg, 25) == 0 and f[:5] == [.2, .4, .6, .8, 1.] and all(a > b > 0 for a, b in zip(f[4:], f[5:]))
    assert lr_factor(TrainerConfig(steps=20, warmup=0, decay="constant"), 19) == 1
    assert abs(lr_factor(TrainerConfig(steps=20, warmup=0, decay="cosine"), 10) - .5) < 1e-9

def test_the_entropy_bonus_follows_its_schedule():
    t, constant = (make(loss=dict(entropy_coef=.4), steps=5, lr=3e-3, entropy_end=end) for end in (0., -1.))
    rows = steps(t, 5)
    assert [r["entropy_coef"] for r in rows] == pytest.approx([.4, .3, .2, .1, 0.])
    assert [r["entropy_term"] for r in rows] == pytest.approx([-r["entropy_coef"]*r["entropy"] for r in rows], rel=1e-4)
    assert {r["entropy_coef"] for r in steps(constant, 5)} == {.4} and not torch.equal(weights(t), weights(constant))

def test_a_run_that_is_short_of_time_ends_with_its_schedules():
    "And one that has time enough is not touched."
    games = dict(boards=2, plies=2, temperature=2., temperature_end=1.)
    whole, same, short = (make(loss=dict(entropy_coef=.4), entropy_end=.1, sampler=games) for _ in range(3))
    rows = steps(whole, 8)
    same.steps_left = 100
    assert steps(same, 8) == rows
    some = steps(short, 2)
    for short.steps_left in (3, 2, 1): some += steps(short, 1)

    def schedule(r): return (r["lr"], r["entropy_coef"], r["temperature"])
    assert some[:2] == rows[:2] and schedule(some[-1]) == pytest.approx((1e-3*(1 - 6/8), .4 - .3*6/7, 2 - 6/7))
    assert short.schedule_place == whole.schedule_place == 8 and short.done == 5
    assert all(a > b for x, y in zip(some, some[1:]) for a, b in zip(schedule(x), schedule(y)))

def test_frozen_layers_stay_and_the_head_has_its_own_rate():
    t = make(freeze=1, head_lr=1e-5, lr=1e-3)
    before = copy.deepcopy(t.model.state_dict())
    t.step()
    after = t.model.state_dict()

    def moved(prefix): return max((before[k] - after[k]).abs().max().item() for k in before if k.startswith(prefix))
    assert moved("piece") == moved("square") == moved("blocks.0") == 0
    assert moved("blocks.1") > 5e-4 and 0 < moved("head") < 2e-5

def test_muon_moves_the_matrices_of_the_blocks_and_adamw_all_else():
    "AdamW's first step moves a number by its rate at most; a matrix in a block moves as one, all directions alike."
    t, rate = make(muon_lr=.02, lr=1e-4), .02
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    t.step()
    for name, p in t.model.named_parameters():
        step = before[name] - p.detach()
        if name.startswith("blocks.") and p.ndim == 2:
            assert .5*rate < torch.linalg.matrix_norm(step, 2) < 2*rate*max(1, p.shape[0]/p.shape[1])**.5, name
        else: assert step.abs().max() < 1.01e-4, name

def test_gradients_are_clipped_to_their_limit():
    "What the optimizer is given is as long as the limit; what the log says is the length before."
    free, clipped, loose = (make(grad_clip=limit) for limit in (0., .01, 100.))
    norms = [t.update(t.play())["grad_norm"] for t in (free, clipped, loose)]
    assert norms[0] == norms[1] == norms[2] > .1
    given = [gradient(t).norm().item() for t in (free, clipped, loose)]
    assert given == pytest.approx([norms[0], .01, norms[0]], rel=1e-4)

def test_weight_decay_is_decoupled():
    "One step with it and one without differ by lr × decay × weights, whatever the gradient."
    plain, decayed, start = make(), make(weight_decay=.5), weights(make())
    for t in (plain, decayed): t.step()
    assert torch.allclose(weights(decayed) - weights(plain), -1e-3*.5*start, atol=1e-6) and start.abs().max() > .1

def test_the_average_is_one_of_the_weights_after_each_step_and_changes_nothing():
    plain, mean = make(), make(ema=.5)
    want = weights(plain)
    for done in range(1, 6):
        assert untimed(plain.step()) == untimed(mean.step()) and torch.equal(weights(plain), weights(mean))
        keep = min(.5, (1 + done)/(10 + done))
        want = keep*want + (1 - keep)*weights(mean)
        assert torch.allclose(flat(mean.kept), want, atol=1e-6)
    assert plain.kept is plain.model and not torch.allclose(want, weights(mean), atol=1e-4)

@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(lr=0.), dict(lr=-1.), dict(decay="exp"), dict(precision="8"), dict(epochs=0),
    dict(grad_clip=-1.), dict(ema=1.), dict(ema=-.1), dict(keep=0), dict(budget_every=-1)])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"trainer.{next(iter(bad))} = "): TrainerConfig(**bad)

def test_boards_must_be_shared_out():
    with pytest.raises(ValueError, match="minibatches"): make(minibatches=7)

# Law 5: seed + config = run

def test_same_seed_same_run_other_seed_other_run():
    a, b, c = (make(seed=s, epochs=2, minibatches=2) for s in (0, 0, 1))
    rows = [steps(t, 3) for t in (a, b, c)]
    assert rows[0] == rows[1] != rows[2] and torch.equal(weights(a), weights(b))

ARGS = ["--preset=scratch", "--trainer.precision=32-true", "--reward.judge=material", "--positions.window_cp=0",
        "--match.games=0", "--sampler.boards=6", "--sampler.group=4", "--sampler.plies=3",
        "--trainer.steps=2", "--trainer.minibatches=3", "--accelerator=cpu",
        "--model.width=32", "--model.layers=2", "--model.heads=2"]
GUARDED = ["--trainer.lr=0.01", "--trainer.steps=4", "--loss.entropy_coef=0.1", "--loss.kl_coef=0.01",
           "--guard.entropy_floor=5", "--guard.floor_patience=2", "--guard.kl_controller=proportional",
           "--guard.target_kl=0.001", "--guard.stop_kl=0.002"]
SAME = ("train/avg_reward", "entropy", "loss", "grad_norm", "plies", "advantage_std", "agreement_mean", "clip_region",
        "mean_ratio", "expected_regret", "entropy_coef", "kl_coef", "kl_exact", "collapsed", "updates",
        "grad_policy", "grad_entropy")

@pytest.mark.parametrize("extra", ids=["default", "gspo", "guarded", "all moves"], argvalues=[
    [], ["--loss.ratio=trajectory", "--loss.aggregate=trajectory", "--loss.scale=std"], GUARDED,
    ["--loss.moves=all", "--trainer.epochs=2", "--loss.entropy_coef=0.05"]])
def test_two_processes_equal_one(tmp_path, extra, quick_pictures):
    "Two processes of three boards do what one with six does, within rounding."
    assert train.main([*ARGS, *extra, f"--out={tmp_path}", "--name=n1"]) == 0
    done = ranks(2, *ARGS, *extra, f"--out={tmp_path}", "--name=n2", folder=tmp_path)
    assert done.returncode == [0, 0], done.stderr
    single, double = (load_file(tmp_path/f"n{n}/model.safetensors") for n in (1, 2))
    torch.manual_seed(0)
    start = ChessTransformer(SMALL).state_dict()
    moved = max((single[k] - start[k]).abs().max().item() for k in single)
    assert moved > 2e-4 and max((single[k] - double[k]).abs().max().item() for k in single) < .02*moved
    logs = [read_metrics(tmp_path/f"n{n}/metrics.jsonl") for n in (1, 2)]
    for a, b in zip(*logs):
        for key in SAME:
            if a[key] is None: assert b[key] is None, key                  # not measured in this step
            else: assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
        assert a["guard"] == b["guard"]
    if extra is not GUARDED: return
    assert {r["updates"] for r in logs[0]} != {3} and logs[0][-1]["entropy_coef"] > .1 and logs[0][-1]["kl_coef"] != .01

# The loss's budget

def test_exact_kl_is_logged_whatever_the_penalty_is():
    penalties = (dict(), dict(kl="k1"), dict(kl="k3", kl_to="reference"))
    rows = [make(epochs=3, lr=3e-3, loss=loss).step() for loss in penalties]
    assert rows[0]["kl_exact"] > 1e-5 and [r["kl_exact"] for r in rows[1:]] == [rows[0]["kl_exact"]]*2

def test_the_budget_is_measured_every_so_many_steps():
    t = make(loss=dict(kl_coef=.3, kl="k1", entropy_coef=.2), epochs=2, budget_every=2, micro_batch=7)
    rows = [t.step() for _ in range(4)]
    assert [math.isfinite(r["grad_policy"]) for r in rows] == [True, False, True, False]
    assert all(math.isnan(rows[1][k]) for k in rows[1] if k.startswith(("grad_k", "cos_")))

def test_the_budget_is_the_gradients_of_the_terms():
    "Norms and cosines in the last update, from three runs of one term each."
    def of(**loss):
        t = make(loss=loss)
        t.optimizer.zero_grad()
        t.minibatch(t.play(), list(range(6)))
        return gradient(t)
    policy = of()
    grads = dict(policy=policy, kl=of(kl_coef=.3, kl="k1") - policy, entropy=of(entropy_coef=.2) - policy)
    t = make(loss=dict(kl_coef=.3, kl="k1", entropy_coef=.2), micro_batch=7)
    row = t.update(t.play())
    for name, g in grads.items(): assert row[f"grad_{name}"] == pytest.approx(g.norm().item(), rel=1e-3)
    for a, b in (("kl", "policy"), ("entropy", "policy"), ("kl", "entropy")):
        cosine = torch.cosine_similarity(grads[a], grads[b], 0).item()
        assert row[f"cos_{a}_{b}"] == pytest.approx(cosine, abs=1e-3)

@pytest.mark.parametrize("kw", [
    dict(minibatches=2), dict(model=DROPOUT, ablate=AblateConfig(dropout=True)),
    dict(guard=GuardConfig(stop_kl=1e-3), epochs=3, lr=3e-3)], ids=["plain", "dropout", "stop"])
def test_measuring_the_budget_changes_nothing(kw):
    without, measured = (make(loss=dict(kl_coef=.1, entropy_coef=.1), budget_every=n, **kw) for n in (0, 1))
    budget = ("grad_p", "grad_k", "grad_e", "cos_")
    logs = (steps(without, 3), steps(measured, 3))
    rows = [[{k: v for k, v in row.items() if not k.startswith(budget)} for row in log] for log in logs]
    assert rows[0] == rows[1] and torch.equal(weights(without), weights(measured))

# Failures

def test_nan_names_the_step_and_keeps_the_last_good_state(monkeypatch):
    t, other = make(), make()
    steps(t, 1)
    steps(other, 1)
    before, state = weights(t), copy.deepcopy(t.optimizer.state_dict())
    with monkeypatch.context() as broken:
        broken.setattr(t.judge, "scale", type(t.judge.scale)(nan_scores, 1., 0., .5))
        t.judge.known.clear()
        with pytest.raises(NotFinite, match="step 1"): t.step()
    assert torch.equal(before, weights(t)) and t.done == 1 and t.playable
    t.judge.known.clear()
    for a, b in zip(state["state"].values(), t.optimizer.state_dict()["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert untimed(t.step()) == untimed(other.step())                       # it goes on as if nothing had happened

def test_weights_broken_by_an_update_stop_the_run_before_they_are_saved(monkeypatch):
    t = make()
    t.step()
    before, real = weights(t), t.optimizer.step

    def broken(*args, **kw):
        real(*args, **kw)
        with torch.no_grad(): t.params[0][0] = math.nan
    monkeypatch.setattr(t.optimizer, "step", broken)
    with pytest.raises(NotFinite, match="step 1"): t.step()
    assert torch.equal(before, weights(t)) and t.playable

def test_a_policy_that_is_nan_names_the_step():
    t = make()
    t.step()
    with torch.no_grad(): t.model.head.norm.weight.fill_(math.nan)
    with pytest.raises(NotFinite, match="step 1"): t.step()
    assert not t.playable

def test_a_float16_scaler_is_patient_but_not_for_ever(monkeypatch):
    t = make()
    with pytest.raises(NotFinite): t.check_finite(1., math.inf)
    monkeypatch.setattr(t.fabric.strategy.precision, "precision", "16-mixed")
    t.skipped = 0
    for _ in range(20): t.check_finite(1., math.inf)
    with pytest.raises(NotFinite): t.check_finite(1., math.inf)
    t.check_finite(1., 2.)
    assert t.skipped == 0
    with pytest.raises(NotFinite): t.check_finite(math.nan, 1.)

# Stored positions

def test_games_on_stored_positions_are_worth_what_the_engine_said(monkeypatch):
    "The judge of nbs/experiments/grid.py: a one-ply game earns its move's value less the best one's."
    monkeypatch.syspath_prepend(str(TOP/"nbs"/"experiments"))
    grid = __import__("grid")
    judge = grid.Stored()
    t = grid.small_run(judge, 3, lr=1e-4)
    ro = t.play().rollout
    reward, row_of = step_rewards(ro, judge), {b.fen(): i for i, b in enumerate(judge.boards)}
    for b, board in enumerate(t.starts(0, 0, 8)):
        i = row_of[board.fen()]
        assert i % 2 == 0                                                   # the other half is held out
        for g in range(16):
            action = ro.legal[ro.node[b, g, 0], ro.slot[b, g, 0]]
            worth = judge.value[i][judge.legal[i] == action] - judge.value[i].max()
            assert reward[b, g, 0].item() == pytest.approx(worth.item(), abs=1e-6)
    with pytest.raises(KeyError, match="not among the stored positions"): judge.values([chess.STARTING_FEN])
    sure = judge.measure(t.model, .01)
    assert sure["regret"] == pytest.approx(sure["regret_argmax"], abs=5e-3) and sure["entropy"] < .1
