"The GRPO step: ratio one, exact resumption, processes that add up, and a policy that learns."
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo_chess.board import action_to_move
from grpo_chess.loss import LossConfig, group_advantage
from grpo_chess.model import MODELS, ChessTransformer, ModelConfig, MoveDist, WeightsError, load_model
from grpo_chess.positions import PositionsConfig, start_positions
from grpo_chess.reward import Judge, RewardConfig, material, step_rewards
from grpo_chess.sampler import SamplerConfig, action_agreement
from grpo_chess.trainer import (METRICS, AblateConfig, CheckpointError, GuardConfig, NotFinite, Trainer, TrainerConfig, check_guard, checkpoints, draw_panel, load_checkpoint, lr_factor, make_fabric, packs,
                                multiplicative_kl, proportional_kl, read_metrics, save_checkpoint)

TOP = Path(__file__).resolve().parent.parent
SMALL = ModelConfig(width=32, layers=2, heads=2)
TIMES = {"seconds", "seconds_play", "seconds_update", "judged"}

@pytest.fixture(scope="module")
def fabric(): return make_fabric("32-true", "cpu")

def make(fabric, seed=0, model=SMALL, sampler=None, loss=None, ablate=None, starts=None, sharpen=1., guard=None, **trainer):
    torch.manual_seed(seed)
    net = ChessTransformer(model)
    with torch.no_grad(): net.head.source.weight.mul_(sharpen)
    starts = starts or (lambda step, first, n: start_positions(n, PositionsConfig(window_cp=0), seed, step, first=first))
    return Trainer(fabric, net, starts, Judge(RewardConfig(judge="material")), sampler or SamplerConfig(boards=6, group=4, plies=3),
                   loss or LossConfig(), TrainerConfig(**dict(steps=8, warmup=0, lr=1e-3) | trainer), ablate, seed, guard=guard)

weights = lambda t: torch.cat([p.detach().flatten() for p in t.model.parameters()]).clone()
untimed = lambda row: {k: v for k, v in row.items() if k not in TIMES and v == v}

# Law 1: ratio one

@pytest.mark.parametrize("temperature", [.5, 1., 1.3, 2.])
@pytest.mark.parametrize("model", [SMALL, ModelConfig(width=32, layers=2, heads=2, dropout=.3)])
def test_ratio_is_one_before_the_first_update(fabric, temperature, model):
    t = make(fabric, model=model, sharpen=30., sampler=SamplerConfig(boards=6, group=4, plies=3, temperature=temperature), minibatches=2, micro_batch=5)
    for _ in range(3):
        row = t.step()
        assert row["ratio_error"] < 1e-5

@pytest.mark.parametrize("temperature", [.5, 2.])
def test_ratio_is_one_in_bfloat16_too(temperature):
    "Both passes go through one kernel in one precision, whatever the batches' sizes."
    t = make(make_fabric("bf16-mixed", "cpu"), sharpen=30., sampler=SamplerConfig(boards=6, group=4, plies=3, temperature=temperature), minibatches=2, micro_batch=7)
    for _ in range(3): assert t.step()["ratio_error"] < 1e-3

@pytest.mark.parametrize("kw", [dict(learn="starter"), dict(noise=.3), dict(temperature=1.5, temperature_end=1.)])
def test_ratio_is_one_however_the_games_are_played(fabric, kw):
    t = make(fabric, sharpen=30., sampler=SamplerConfig(boards=6, group=4, plies=3, **kw))
    for _ in range(3):
        row = t.step()
        assert row["ratio_error"] < 1e-5 and abs(row["kl_exact"]) < 1e-5 and row["clip_region"] == 0

@pytest.mark.parametrize("ablate, model", [(AblateConfig(loss_temperature=1.), SMALL), (AblateConfig(dropout=True), ModelConfig(width=32, layers=2, heads=2, dropout=.3))])
def test_known_bugs_show_in_the_ratio(fabric, ablate, model):
    t = make(fabric, sharpen=30., model=model, ablate=ablate, sampler=SamplerConfig(boards=6, group=4, plies=3, temperature=1.3))
    assert t.step()["ratio_error"] > .05

ALL = LossConfig(moves="all")

@pytest.mark.parametrize("group", [1, 4])
def test_ratio_is_one_for_every_legal_move(fabric, group):
    t = make(fabric, sharpen=30., loss=ALL, sampler=SamplerConfig(boards=6, group=group, plies=3, temperature=1.3), minibatches=2, micro_batch=5)
    for _ in range(3):
        row = t.step()
        assert row["ratio_error"] < 1e-5 and abs(row["mean_ratio"] - 1) < .02 and row["plies"] == 18*group and row["advantage_std"] == pytest.approx(1, abs=.01)
    assert math.isnan(row["agreement_mean"]) == math.isnan(row["reward_spread"]) == (group == 1)
    titles = [ax.get_title(loc="left") for ax in draw_panel([row]).axes]
    assert ("regret of the policy" in titles) == ("reward spread" not in titles) == (group == 1)

def test_a_group_of_one_needs_all_moves(fabric):
    with pytest.raises(ValueError, match="siblings"): make(fabric, sampler=SamplerConfig(boards=6, group=1, plies=3))
    with pytest.raises(ValueError, match="agree"): make(fabric, loss=ALL, sampler=SamplerConfig(boards=6, group=1, plies=3), guard=GuardConfig(agreement_ceiling=.9, floor_action="abort"))

def values_by_hand(t, ro):
    "Row -> value of each legal move, by pushing it, for the positions in which a ply trains."
    out = {}
    for r in ro.node[..., :-1][ro.train].unique().tolist():
        board = chess.Board(ro.fens[r])
        out[r] = []
        for a in ro.legal[r][ro.legal[r] >= 0].tolist():
            board.push(action_to_move(a, board.turn))
            out[r].append(1. if board.is_checkmate() else .5 if board.is_stalemate() or board.is_insufficient_material() or board.halfmove_clock >= 100 else 1 - float(t.judge.scale.value(material([board.fen()]))[0]))
            board.pop()
    return out

@pytest.mark.parametrize("scale", ["none", "std", "rms"])
def test_all_moves_give_the_policy_gradient(fabric, scale):
    "Against the formula, position by position, with values found by hand; games that meet a position twice count it twice."
    t = make(fabric, sharpen=30., loss=LossConfig(moves="all", scale=scale), sampler=SamplerConfig(boards=5, group=3, plies=4, temperature=1.3), micro_batch=7)
    batch = t.play(); t.minibatch(batch, list(range(5)))
    ro, value, loss, spread, met = batch.rollout, None, 0., [], []
    value = values_by_hand(t, ro)
    for b, g, k in ro.train.nonzero().tolist():
        r = int(ro.node[b, g, k])
        q = torch.tensor(value[r])
        pi = t.policy(t.model).dist(ro.tokens[r:r+1], ro.legal[r:r+1, :len(q)]).probs[0]
        adv = q - (pi.detach() @ q); var = pi.detach() @ adv**2
        spread.append(var); met.append((pi @ (adv/(var.sqrt() + 1e-4) if scale == "std" else adv)))
    loss = -torch.stack(met).mean()/((torch.stack(spread).mean().sqrt() + 1e-4) if scale == "rms" else 1.)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, t.params)])
    got = torch.cat([p.grad.flatten() for p in t.params])
    assert want.norm() > 1e-3 and (got - want).norm() < 1e-4*want.norm()
    assert batch.stats["expected_regret"] == pytest.approx(np.mean([max(value[r]) - float(ro.logp[r][:len(value[r])].exp() @ torch.tensor(value[r])) for r in ro.node[..., :-1][ro.train].tolist()]), abs=1e-5)

def test_sampled_moves_converge_to_all_moves(fabric):
    "One start, one ply, a very large group: the sampled gradient is the exact one, up to noise."
    start = lambda step, first, n: [chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")]*n
    def gradient(group, moves):
        t = make(fabric, loss=LossConfig(moves=moves, scale="none"), starts=start, sampler=SamplerConfig(boards=1, group=group, plies=1))
        t.minibatch(t.play(), [0])
        return torch.cat([p.grad.flatten() for p in t.params])
    exact = gradient(1, "all")
    assert (gradient(4000, "sampled") - exact).norm() < .1*exact.norm() and (gradient(8, "sampled") - exact).norm() > .1*exact.norm()

def test_a_stale_player_is_refreshed_on_schedule(fabric):
    t = make(fabric, sync_every=3, sharpen=30.)
    errors = [t.step()["ratio_error"] for _ in range(7)]
    assert [e < 1e-5 for e in errors] == [True, False, False, True, False, False, True]

# The step is the gradient of the formula

def test_first_update_is_the_policy_gradient(fabric):
    "On fresh games the loss's gradient is -Σ w A ∇log π, computed here ply by ply from boards."
    from grpo_chess.board import encode
    t = make(fabric, micro_batch=7, loss=LossConfig(scale="none"))
    batch = t.play(); ro = batch.rollout
    adv = group_advantage(step_rewards(ro, t.judge), ro.train)
    total = 0.
    for b in range(6):
        for g in range(4):
            board = t.starts(0, 0, 6)[b]
            for step, move in enumerate(ro.moves(b, g)):
                tokens, legal = map(torch.as_tensor, encode([board]))
                slot = [i for i in range(legal.shape[1]) if int(legal[0, i]) == int(ro.legal[ro.node[b, g, step], ro.slot[b, g, step]])][0]
                total = total - adv[b, g, step]*t.model(tokens, legal).log_softmax(-1)[0, slot]
                board.push(move)
    (total/ro.train.sum()).backward()
    by_hand = torch.cat([p.grad.flatten().clone() for p in t.params])
    t.optimizer.zero_grad(); t.minibatch(batch, list(range(6)))
    ours = torch.cat([p.grad.flatten() for p in t.params])
    assert torch.allclose(ours, by_hand, atol=1e-7, rtol=1e-3) and ours.abs().max() > 1e-4

@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(ratio="trajectory", aggregate="trajectory"), LossConfig(aggregate="constant", kl_coef=.1, entropy_coef=.1),
                                  LossConfig(kl_to="reference", kl_coef=1., kl="k3"), LossConfig(kl_to="reference", kl_coef=1.),
                                  LossConfig(moves="all", kl_to="reference", kl_coef=1., entropy_coef=.1)])
def test_micro_batches_change_nothing(fabric, loss):
    grads = []
    for size in (1, 10_000):
        t = make(fabric, loss=loss, micro_batch=size); t.step()                # the second batch, so that policy and reference differ
        batch = t.play(); t.optimizer.zero_grad(); t.minibatch(batch, list(range(6)))
        grads.append(torch.cat([p.grad.flatten() for p in t.params]))
    assert torch.allclose(*grads, atol=1e-7, rtol=1e-3)

def test_packs_hold_everything_once_and_no_more_than_they_may():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes, most = rng.integers(0, 9, rng.integers(0, 12)).tolist(), int(rng.integers(1, 20))
        got = [sizes[at] for at in packs(sizes, most)]
        assert sum(got, []) == sizes and all(p and (sum(p) <= most or len(p) == 1) for p in got)
        assert all(sum(a) + b[0] > most for a, b in zip(got, got[1:]))                 # none could have taken one more

def test_learns_to_take_the_queen(fabric):
    "One position, a free queen: its capture becomes the usual move."
    board = chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")
    t = make(fabric, starts=lambda step, first, n: [board]*n, sampler=SamplerConfig(boards=2, group=16, plies=1), lr=3e-3, steps=30)
    from grpo_chess.board import encode, move_to_action
    tokens, legal = map(torch.as_tensor, encode([board]))
    prob = lambda: t.policy(t.model).dist(tokens, legal).probs[0, (legal[0] == move_to_action(chess.Move.from_uci("e4d5"), True))].item()
    before = prob()
    for _ in range(30): t.step()
    assert before < .3 and prob() > .9

def test_what_is_logged_of_a_step_is_what_happened(fabric):
    "kl_step, entropy and agreement, computed here from the games played again by the policy before the step."
    t, twin = make(fabric, lr=3e-3), make(fabric, lr=3e-3)
    row, ro = t.step(), twin.play().rollout
    rows = ro.node[..., :-1][ro.train]
    old, new = (x.policy(x.model).dist(ro.tokens[rows.unique()], ro.legal[rows.unique()]) for x in (twin, t))
    assert row["kl_step"] == pytest.approx(old.kl(new).mean().item(), rel=1e-4) and row["kl_step"] > 1e-5
    plies = [MoveDist(ro.logp[r]).entropy().item() for r in rows]
    assert row["entropy"] == pytest.approx(sum(plies)/len(plies), rel=1e-5) and row["effective_moves"] == pytest.approx(math.exp(row["entropy"]))
    assert row["agreement_mean"] == pytest.approx(action_agreement(ro).mean().item())

def test_the_time_of_a_step_is_all_of_it(fabric, monkeypatch):
    "Playing, updating and measuring: what a reader waits for is what the report adds up."
    t, slow = make(fabric), lambda f, by: lambda *a, **kw: (time.sleep(by), f(*a, **kw))[1]
    for name, by in (("play", .1), ("update", .2), ("moved_kl", .3)): monkeypatch.setattr(t, name, slow(getattr(t, name), by))
    row = t.step()
    assert row["seconds_play"] >= .1 and row["seconds_update"] >= .2 and row["seconds"] >= row["seconds_play"] + row["seconds_update"] + .3

# Knobs

def test_learning_rate_schedule():
    cfg = TrainerConfig(steps=20, warmup=4)
    f = [lr_factor(cfg, s) for s in range(20)]
    assert lr_factor(cfg, 25) == 0 and f[:5] == [.2, .4, .6, .8, 1.] and all(a > b > 0 for a, b in zip(f[4:], f[5:]))
    assert lr_factor(TrainerConfig(steps=20, warmup=0, decay="constant"), 19) == 1
    assert abs(lr_factor(TrainerConfig(steps=20, warmup=0, decay="cosine"), 10) - .5) < 1e-9

def test_the_entropy_bonus_follows_its_schedule(fabric):
    t, flat = (make(fabric, loss=LossConfig(entropy_coef=.4), steps=5, lr=3e-3, entropy_end=end) for end in (0., -1.))
    rows = [t.step() for _ in range(5)]
    assert [r["entropy_coef"] for r in rows] == pytest.approx([.4, .3, .2, .1, 0.])
    assert [r["entropy_term"] for r in rows] == pytest.approx([-r["entropy_coef"]*r["entropy"] for r in rows], rel=1e-4)
    assert {flat.step()["entropy_coef"] for _ in range(5)} == {.4} and not torch.equal(weights(t), weights(flat))

def test_frozen_layers_stay_and_the_head_has_its_own_rate(fabric):
    t = make(fabric, freeze=1, head_lr=1e-5, lr=1e-3)
    before = copy.deepcopy(t.model.state_dict()); t.step(); after = t.model.state_dict()
    moved = lambda prefix: max((before[k] - after[k]).abs().max().item() for k in before if k.startswith(prefix))
    assert moved("piece") == moved("square") == moved("blocks.0") == 0
    assert moved("blocks.1") > 5e-4 and 0 < moved("head") < 2e-5

@pytest.mark.parametrize("bad", [dict(steps=0), dict(lr=0.), dict(lr=-1.), dict(decay="exp"), dict(precision="8"), dict(epochs=0), dict(grad_clip=-1.), dict(ema=1.), dict(ema=-.1), dict(keep=0), dict(budget_every=-1)])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"trainer.{next(iter(bad))} = "): TrainerConfig(**bad)

def test_boards_must_be_shared_out(fabric):
    with pytest.raises(ValueError, match="minibatches"): make(fabric, minibatches=7)

# Law 5: seed + config = run

def test_same_seed_same_run_other_seed_other_run(fabric):
    a, b, c = (make(fabric, seed=s, epochs=2, minibatches=2) for s in (0, 0, 1))
    rows = [[untimed(t.step()) for _ in range(3)] for t in (a, b, c)]
    assert rows[0] == rows[1] != rows[2] and torch.equal(weights(a), weights(b))

@pytest.mark.parametrize("kw", [dict(), dict(sync_every=2, epochs=2, minibatches=3), dict(freeze=1, head_lr=1e-4), dict(loss=LossConfig(moves="all"), epochs=2), dict(ema=.7, sync_every=2)])
def test_a_resumed_run_equals_one_that_never_stopped(fabric, tmp_path, kw):
    whole = make(fabric, **kw); rows = [untimed(whole.step()) for _ in range(6)]
    first = make(fabric, **kw); [first.step() for _ in range(3)]; save_checkpoint(first, tmp_path)
    again = make(fabric, seed=0, **kw); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(3)] == rows[3:] and torch.equal(weights(whole), weights(again))
    assert all(torch.equal(a, b) for a, b in zip(whole.kept.parameters(), again.kept.parameters()))

def test_the_average_is_one_of_the_weights_after_each_step_and_changes_nothing(fabric, tmp_path):
    plain, mean = make(fabric), make(fabric, ema=.5)
    flat, want = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()]), weights(plain)
    for done in range(1, 6):
        assert untimed(plain.step()) == untimed(mean.step()) and torch.equal(weights(plain), weights(mean))
        keep = min(.5, (1 + done)/(10 + done)); want = keep*want + (1 - keep)*weights(mean)
        assert torch.allclose(flat(mean.kept), want, atol=1e-6)
    assert plain.kept is plain.model and not torch.allclose(want, weights(mean), atol=1e-4)
    at = save_checkpoint(mean, tmp_path)
    assert torch.equal(flat(load_model(at/"average.safetensors")), flat(mean.kept)) and torch.equal(flat(load_model(at/"model.safetensors")), weights(mean))

def test_a_run_that_is_short_of_time_ends_with_its_schedules(fabric):
    "And one that has time enough is not touched."
    kw = dict(loss=LossConfig(entropy_coef=.4), entropy_end=.1, sampler=SamplerConfig(boards=2, group=4, plies=2, temperature=2., temperature_end=1.))
    full, same, short = (make(fabric, **kw) for _ in range(3))
    rows = [full.step() for _ in range(8)]
    same.left = 100
    assert [untimed(same.step()) for _ in range(8)] == [untimed(r) for r in rows]
    some = [short.step() for _ in range(2)]
    for short.left in (3, 2, 1): some.append(short.step())
    assert [untimed(r) for r in some[:2]] == [untimed(r) for r in rows[:2]]
    schedule = lambda r: (r["lr"], r["entropy_coef"], r["temperature"])
    assert schedule(some[-1]) == pytest.approx((1e-3*(1 - 6/8), .4 - .3*6/7, 2 - 6/7)) and short.at == full.at == 8 and short.done == 5
    assert all(a > b for x, y in zip(some, some[1:]) for a, b in zip(schedule(x), schedule(y)))

def test_resuming_with_a_reference_keeps_the_first_policy(fabric, tmp_path):
    loss = LossConfig(kl_to="reference", kl_coef=.5)
    whole = make(fabric, loss=loss); rows = [untimed(whole.step()) for _ in range(4)]
    first = make(fabric, loss=loss); [first.step() for _ in range(2)]; save_checkpoint(first, tmp_path)
    again = make(fabric, loss=loss); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(2)] == rows[2:]

ARGS = ["--preset", "scratch", "--trainer.precision", "32-true", "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0", "--sampler.boards", "6", "--sampler.group", "4", "--sampler.plies", "3", "--trainer.steps", "2",
        "--trainer.minibatches", "3", "--accelerator", "cpu", "--model.width", "32", "--model.layers", "2", "--model.heads", "2"]

GUARDED = ["--trainer.lr", "0.01", "--trainer.steps", "4", "--loss.entropy_coef", "0.1", "--loss.kl_coef", "0.01", "--guard.entropy_floor", "5", "--guard.floor_patience", "2", "--guard.kl_controller", "proportional",
           "--guard.kl_horizon", "50", "--guard.target_kl", "0.001", "--guard.stop_kl", "0.002"]

@pytest.mark.parametrize("extra", [[], ["--loss.ratio", "trajectory", "--loss.aggregate", "trajectory", "--loss.scale", "std"], GUARDED,
                                   ["--loss.moves", "all", "--trainer.epochs", "2", "--loss.entropy_coef", "0.05"]], ids=["default", "gspo", "guarded", "all moves"])
def test_two_processes_equal_one(tmp_path, extra):
    "torchrun with two processes of three boards does what one process with six does, within rounding."
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    runs = {1: [sys.executable, "-m"], 2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]}
    for n, start in runs.items():
        subprocess.run([*start, "grpo_chess.train", *ARGS, *extra, "--out", str(tmp_path), "--name", f"n{n}"], env=env, check=True, capture_output=True, timeout=300)
    one, two = (load_file(tmp_path/f"n{n}/model.safetensors") for n in (1, 2))
    torch.manual_seed(0); start = ChessTransformer(SMALL).state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    assert moved > 2e-4 and max((one[k] - two[k]).abs().max().item() for k in one) < .02*moved
    rows = [read_metrics(tmp_path/f"n{n}/metrics.jsonl") for n in (1, 2)]
    for a, b in zip(*rows):
        for key in ("train/avg_reward", "entropy", "loss", "grad_norm", "plies", "advantage_std", "agreement_mean", "clip_region", "mean_ratio", "expected_regret", "entropy_coef", "kl_coef", "kl_exact", "collapsed", "updates", "grad_policy", "grad_entropy"):
            if a[key] is None: assert b[key] is None, key                  # not measured in this step
            else: assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
        assert a["guard"] == b["guard"]
    if extra is GUARDED: assert {r["updates"] for r in rows[0]} != {3} and rows[0][-1]["entropy_coef"] > .1 and rows[0][-1]["kl_coef"] != .01

# Guards and controllers

BOOST = GuardConfig(entropy_floor=5., floor_patience=2, boost_max=.2)      # nothing reaches 5 nats: the policy always counts as collapsed

def queen(fabric, guard, **kw):
    "A run whose entropy falls: one position with a free queen, at a high learning rate."
    board = chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")
    return make(fabric, starts=lambda step, first, n: [board]*n, sampler=SamplerConfig(boards=2, group=16, plies=1), guard=guard, **dict(lr=3e-3, steps=30) | kw)

@pytest.fixture(scope="module")
def falling(fabric):
    t = queen(fabric, None); return [t.step()["entropy"] for _ in range(20)]

def test_controllers_by_hand():
    assert multiplicative_kl(.01, .02, .01, 1.5) == pytest.approx(.015) and multiplicative_kl(.01, .01, .01, 1.5) == pytest.approx(.01/1.5)
    assert multiplicative_kl(.09, .02, .01, 1.5) == .1 and multiplicative_kl(1.2e-4, 0., .01, 1.5) == 1e-4
    assert proportional_kl(.01, .011, 500, .01, 1000.) == pytest.approx(.01*1.05) and proportional_kl(.01, .009, 500, .01, 1000.) == pytest.approx(.01*.95)
    assert proportional_kl(.01, 9., 500, .01, 1000.) == pytest.approx(.01*1.1) and proportional_kl(.01, -9., 500, .01, 1000.) == pytest.approx(.01*.9)
    assert proportional_kl(.0999, 9., 1000, .01, 1000.) == .1 and proportional_kl(1.01e-4, 0., 1000, .01, 1000.) == 1e-4

def test_a_boost_comes_when_patience_ends_and_stops_at_its_maximum(fabric):
    t = make(fabric, loss=LossConfig(entropy_coef=.1), guard=BOOST); rows = [t.step() for _ in range(7)]
    assert [r["entropy_coef"] for r in rows] == pytest.approx([.1, .1, .15, .15, .2, .2, .2]) and [r["collapsed"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [bool(r["guard"]) for r in rows] == [False, True]*3 + [False] and "maximum" in rows[5]["guard"] and "0.1 -> 0.15" in rows[1]["guard"]
    for r in rows: assert r["entropy_term"] == pytest.approx(-r["entropy_coef"]*r["entropy"], rel=1e-3)       # the loss uses what the log says

def test_a_boost_changes_what_is_learned(fabric):
    a, b = (make(fabric, loss=LossConfig(entropy_coef=.1), guard=g) for g in (None, BOOST))
    for _ in range(2): a.step(); b.step()
    assert torch.equal(weights(a), weights(b)); a.step(); b.step(); assert not torch.equal(weights(a), weights(b))

def test_only_steps_in_a_row_count(fabric):
    t = make(fabric, loss=LossConfig(entropy_coef=.1), guard=GuardConfig(entropy_floor=1., floor_patience=2, boost_max=.2))
    assert [t.guard.due(h, .5) for h in (.5, 2., .5, .5, .5, .5, 2., .5)] == [False, False, False, True, False, True, False, False]
    assert not t.guard.low(1., 1.)                                         # exactly at the floor, and no ceiling

def test_agreement_counts_as_collapse_too(fabric):
    ceiling = make(fabric, guard=GuardConfig(agreement_ceiling=.01, floor_action="abort", floor_patience=3))
    rows = [ceiling.step() for _ in range(3)]
    assert [r["collapsed"] for r in rows] == [1, 2, 3] and ceiling.aborted and rows[2]["guard"].startswith("abort")
    t = make(fabric, guard=GuardConfig(agreement_ceiling=1., floor_action="abort", floor_patience=1)); t.step(); assert not t.aborted

def test_a_rollback_returns_to_weights_from_above_the_floor_at_a_lower_rate(fabric, falling):
    floor = (falling[4] + falling[8])/2
    assert falling[4] > floor > max(falling[8:])
    guard = GuardConfig(entropy_floor=floor, floor_action="rollback", floor_patience=3, rollback_every=4, rollbacks=1)
    t, twin = queen(fabric, guard), queen(fabric, None)
    rows = []
    while not (rows and rows[-1]["guard"]): rows.append(t.step())
    at = rows[-1]["step"]
    [twin.step() for _ in range(4)]                                        # the policy that played step 4 is the last above the floor at a multiple of 4
    assert "rollback 1 of 1: weights of step 4" in rows[-1]["guard"] and torch.equal(weights(t), weights(twin)) and t.done == at + 1
    for a, b in zip(t.optimizer.state_dict()["state"].values(), twin.optimizer.state_dict()["state"].values()): assert all(torch.equal(a[k], b[k]) for k in a)
    row = t.step()
    assert row["step"] == at + 1 and row["entropy"] == pytest.approx(falling[4], abs=1e-5) and row["lr"] == pytest.approx(.5*3e-3*lr_factor(t.tcfg, at + 1))
    while not t.aborted and t.done < 60: rows.append(t.step())
    assert "all 1 rollbacks were used" in t.aborted and rows[-1]["collapsed"] == 3

def test_a_rollback_without_a_good_state_aborts(fabric):
    t = make(fabric, guard=GuardConfig(entropy_floor=5., floor_action="rollback", floor_patience=2)); t.step(); t.step()
    assert "no state from before" in t.aborted

@pytest.mark.parametrize("kind, read", [("multiplicative", "exact"), ("multiplicative", "k1"), ("proportional", "exact"), ("proportional", "k1")])
def test_a_controller_follows_what_it_reads(fabric, kind, read):
    guard = GuardConfig(kl_controller=kind, controller_kl=read, target_kl=2e-4, kl_horizon=100., adapt_rate=1.1)
    t = make(fabric, loss=LossConfig(kl_coef=.01), guard=guard, minibatches=2); rows = [t.step() for _ in range(6)]
    coef = .01
    for r in rows:
        assert r["kl_coef"] == pytest.approx(coef)
        kl = r["kl_step"] if read == "exact" else r["approx_kl"]
        assert r["kl_ratio"] == pytest.approx(kl/2e-4)
        coef = multiplicative_kl(coef, kl, 2e-4, 1.1) if kind == "multiplicative" else proportional_kl(coef, kl, 24, 2e-4, 100.)
    assert len({r["kl_coef"] for r in rows}) > 3
    plain = make(fabric, loss=LossConfig(kl_coef=.01), minibatches=2); [plain.step() for _ in range(6)]
    assert not torch.equal(weights(plain), weights(t))

def test_with_a_reference_the_controller_reads_the_distance_to_it(fabric):
    t = make(fabric, loss=LossConfig(kl_coef=.01, kl_to="reference"), guard=GuardConfig(kl_controller="multiplicative", target_kl=1e-4)); rows = [t.step() for _ in range(4)]
    assert [r["kl_ratio"] for r in rows] == pytest.approx([r["kl_term"]/r["kl_coef"]/1e-4 for r in rows], abs=1e-6) and rows[0]["kl_ratio"] == pytest.approx(0, abs=1e-3) and rows[3]["kl_ratio"] > 1
    assert rows[1]["kl_coef"] < .01 < .0101 < rows[3]["kl_coef"]*1.2**2

@pytest.mark.parametrize("read", ["exact", "k1"])
def test_updates_end_when_the_policy_has_gone_far_enough(fabric, read):
    # seed 1, because k1 of the very moves that were trained on may be negative: it is so with seed 0, and then never stops anything
    free = make(fabric, seed=1, epochs=4, lr=3e-3); full = free.step()
    assert full["updates"] == 4
    t = make(fabric, seed=1, epochs=4, lr=3e-3, guard=GuardConfig(stop_kl=1e-6, controller_kl=read)); row = t.step()
    twin = make(fabric, seed=1, lr=3e-3); twin.step()
    assert row["updates"] == 1 and "1 of 4" in row["guard"] and torch.equal(weights(t), weights(twin))       # one update, then the KL was seen
    never = make(fabric, seed=1, epochs=4, lr=3e-3, guard=GuardConfig(stop_kl=100., controller_kl=read))
    assert never.step()["guard"] == "" and torch.equal(weights(never), weights(free))

def test_early_stopping_reads_the_kl_that_it_is_told_to(fabric):
    t = make(fabric, guard=GuardConfig(stop_kl=.1, controller_kl="k1"), epochs=2); s = make(fabric, guard=GuardConfig(stop_kl=.1), epochs=2)
    far = dict(approx_kl=.2, kl_exact=.05)
    assert t.too_far(far) and not s.too_far(far)

def test_exact_kl_is_logged_whatever_the_penalty_is(fabric):
    rows = [make(fabric, epochs=3, lr=3e-3, loss=loss).step() for loss in (LossConfig(), LossConfig(kl="k1"), LossConfig(kl="k3", kl_to="reference"))]
    assert rows[0]["kl_exact"] > 1e-5 and [r["kl_exact"] for r in rows[1:]] == [rows[0]["kl_exact"]]*2

@pytest.mark.parametrize("guard, kw", [
    (BOOST, dict(loss=LossConfig(entropy_coef=.1))),
    (GuardConfig(kl_controller="multiplicative", target_kl=1e-4, stop_kl=1e-3), dict(loss=LossConfig(kl_coef=.01), epochs=3, lr=3e-3)),
    (GuardConfig(kl_controller="proportional", target_kl=1e-4, kl_horizon=50., controller_kl="k1"), dict(loss=LossConfig(kl_coef=.01), sync_every=2, minibatches=2))], ids=["boost", "multiplicative", "proportional"])
def test_a_resumed_run_remembers_its_guards(fabric, tmp_path, guard, kw):
    whole = make(fabric, guard=guard, **kw); rows = [untimed(whole.step()) for _ in range(7)]
    first = make(fabric, guard=guard, **kw); [first.step() for _ in range(3)]; save_checkpoint(first, tmp_path)
    again = make(fabric, guard=guard, **kw); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(4)] == rows[3:] and torch.equal(weights(whole), weights(again))

@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_resumed_run_can_still_roll_back(fabric, tmp_path, falling, stop):
    "The state to go back to is part of the checkpoint: one taken after it, and after the rollback, ends at the same weights."
    guard = GuardConfig(entropy_floor=(falling[4] + falling[8])/2, floor_action="rollback", floor_patience=3, rollback_every=4)
    whole = queen(fabric, guard); rows = [untimed(whole.step()) for _ in range(16)]
    assert any("rollback" in r["guard"] for r in rows)
    first = queen(fabric, guard); [first.step() for _ in range(stop)]; save_checkpoint(first, tmp_path)
    again = queen(fabric, guard); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(16 - stop)] == rows[stop:] and torch.equal(weights(whole), weights(again))

def test_a_checkpoint_from_before_there_were_guards_loads(fabric, tmp_path):
    t = make(fabric); t.step(); path = save_checkpoint(t, tmp_path)
    old = torch.load(path/"state.pt", weights_only=True); del old["guard"], old["good"]; torch.save(old, path/"state.pt")
    again = make(fabric); load_checkpoint(again, path); assert untimed(again.step()) == untimed(t.step())

@pytest.mark.parametrize("bad", [dict(entropy_floor=-1.), dict(entropy_floor=9.), dict(agreement_ceiling=1.5), dict(floor_patience=0), dict(floor_action="cry"), dict(boost_factor=1.), dict(boost_max=0.),
                                 dict(rollback_every=0), dict(rollback_lr=1.), dict(rollbacks=-1), dict(kl_controller="pid"), dict(controller_kl="k2"), dict(target_kl=0.), dict(adapt_rate=.5), dict(kl_horizon=0.),
                                 dict(kl_coef_min=0.), dict(kl_coef_max=1e-5), dict(stop_kl=-1.)])
def test_guards_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"guard.{next(iter(bad))} = "): GuardConfig(**bad)

@pytest.mark.parametrize("guard, loss, one, says", [
    (dict(entropy_floor=1.5), dict(), False, "entropy_coef = 0.0"), (dict(agreement_ceiling=.9), dict(), False, "entropy_coef = 0.0"), (dict(entropy_floor=1.5, boost_max=.1), dict(entropy_coef=.1), False, "boost_max = 0.1"),
    (dict(kl_controller="proportional"), dict(), False, "kl_coef = 0.0"), (dict(kl_controller="multiplicative"), dict(kl_coef=.2), False, "kl_coef_max = 0.1"),
    (dict(kl_controller="multiplicative", controller_kl="k1"), dict(kl_coef=.01, kl="k1"), True, "reads 0 at every step"), (dict(stop_kl=.01), dict(), True, "only one update")])
def test_guards_that_cannot_act_are_refused(guard, loss, one, says):
    with pytest.raises(ValueError, match=says): check_guard(GuardConfig(**guard), LossConfig(**loss), one)

def test_a_boost_that_the_schedule_of_entropy_undoes_is_refused():
    "Both set the entropy coefficient: near the end of the run the schedule would take back what the guard has raised."
    floor, loss = GuardConfig(entropy_floor=1.5), LossConfig(entropy_coef=.4)
    with pytest.raises(ValueError, match="trainer.entropy_end = 0.05"): check_guard(floor, loss, True, .05)
    check_guard(floor, loss, True, -1.); check_guard(GuardConfig(entropy_floor=1.5, floor_action="rollback"), loss, True, .05)

def test_guards_that_can_act_are_not_refused():
    check_guard(GuardConfig(entropy_floor=1.5, floor_action="abort"), LossConfig(), True)
    check_guard(GuardConfig(entropy_floor=1.5, floor_action="rollback"), LossConfig(), True)
    check_guard(GuardConfig(kl_controller="multiplicative", controller_kl="exact"), LossConfig(kl_coef=.01, kl="k1"), True)
    check_guard(GuardConfig(kl_controller="multiplicative", controller_kl="k1"), LossConfig(kl_coef=.01, kl="k1"), False)
    check_guard(GuardConfig(kl_controller="multiplicative", controller_kl="k1"), LossConfig(kl_coef=.01, kl_to="reference"), True)

def test_the_trainer_itself_refuses_a_guard_that_cannot_act(fabric):
    with pytest.raises(ValueError, match="only one update"): make(fabric, guard=GuardConfig(stop_kl=.01))
    make(fabric, guard=GuardConfig(stop_kl=.01), epochs=2); make(fabric, guard=GuardConfig(stop_kl=.01), ablate=AblateConfig(loss_temperature=.5))

# The loss's budget

def test_the_budget_is_the_gradients_of_the_terms(fabric):
    "Norms and cosines, from three runs of one term each; measured every budget_every steps, in the last update."
    coef = dict(kl_coef=.3, kl="k1", entropy_coef=.2)
    t = make(fabric, loss=LossConfig(**coef), epochs=2, budget_every=2, micro_batch=7); rows = [t.step() for _ in range(4)]
    assert [math.isfinite(r["grad_policy"]) for r in rows] == [True, False, True, False] and all(math.isnan(rows[1][k]) for k in rows[1] if k.startswith(("grad_k", "cos_")))
    t = make(fabric, loss=LossConfig(**coef), micro_batch=7); batch = t.play()
    grads = {}
    for name, kw in dict(policy={}, kl=dict(kl_coef=.3, kl="k1"), entropy=dict(entropy_coef=.2)).items():
        twin = make(fabric, loss=LossConfig(**kw)); twin.optimizer.zero_grad(); twin.minibatch(twin.play(), list(range(6)))
        grads[name] = torch.cat([p.grad.flatten() for p in twin.params])
    grads["kl"], grads["entropy"] = grads["kl"] - grads["policy"], grads["entropy"] - grads["policy"]
    row = t.update(batch)
    for k, g in grads.items(): assert row[f"grad_{k}"] == pytest.approx(g.norm().item(), rel=1e-3)
    for a, b in (("kl", "policy"), ("entropy", "policy"), ("kl", "entropy")): assert row[f"cos_{a}_{b}"] == pytest.approx(torch.cosine_similarity(grads[a], grads[b], 0).item(), abs=1e-3)

@pytest.mark.parametrize("kw", [dict(minibatches=2), dict(model=ModelConfig(width=32, layers=2, heads=2, dropout=.3), ablate=AblateConfig(dropout=True)), dict(guard=GuardConfig(stop_kl=1e-3), epochs=3, lr=3e-3)], ids=["plain", "dropout", "stop"])
def test_measuring_the_budget_changes_nothing(fabric, kw):
    loss = LossConfig(kl_coef=.1, entropy_coef=.1)
    a, b = (make(fabric, loss=loss, budget_every=n, **kw) for n in (0, 1))
    seen = [[{k: v for k, v in untimed(t.step()).items() if not k.startswith(("grad_p", "grad_k", "grad_e", "cos_"))} for _ in range(3)] for t in (a, b)]
    assert seen[0] == seen[1] and torch.equal(weights(a), weights(b))

def test_the_panel_shows_gradients_where_there_are_some(fabric):
    t = make(fabric, loss=LossConfig(entropy_coef=.1), budget_every=2); rows = [t.step() for _ in range(3)]
    ax = draw_panel(rows).axes[7]
    assert "gradient" in ax.get_title(loc="left") and [list(l.get_xdata()) for l in ax.lines] == [[0, 2]]*3
    assert ax.lines[0].get_ydata()[1] == rows[2]["grad_policy"] and np.isnan(ax.lines[1].get_ydata()).all()      # no KL term
    old = [{k: v for k, v in r.items() if not k.startswith(("grad_", "cos_"))} for r in rows]
    assert draw_panel(old).axes[7].get_title(loc="left") == "loss budget" and len(draw_panel(old).axes[7].lines) == 3
    missing = [r | dict(grad_policy=None) for r in rows]
    assert draw_panel(missing).axes[7].get_title(loc="left") == "loss budget"

# Failures

def test_nan_names_the_step_and_keeps_the_last_good_state(fabric):
    t = make(fabric); t.step(); before = weights(t); state = copy.deepcopy(t.optimizer.state_dict())
    real, t.judge.scale = t.judge.scale, type(t.judge.scale)(lambda s: np.full(len(s), np.nan, np.float32), 1., 0., .5); t.judge.known.clear()
    with pytest.raises(NotFinite, match="step 1"): t.step()
    assert torch.equal(before, weights(t)) and t.done == 1
    t.judge.scale = real; t.judge.known.clear()
    other = make(fabric); other.step()
    for a, b in zip(state["state"].values(), t.optimizer.state_dict()["state"].values()): assert all(torch.equal(a[k], b[k]) for k in a)
    assert untimed(t.step()) == untimed(other.step())                       # it goes on as if nothing had happened

def test_weights_broken_by_an_update_stop_the_run_before_they_are_saved(fabric):
    t = make(fabric); t.step(); before, real = weights(t), t.optimizer.step
    def broken(*a, **k):
        real(*a, **k)
        with torch.no_grad(): t.params[0][0] = math.nan
    t.optimizer.step = broken
    with pytest.raises(NotFinite, match="step 1"): t.step()
    assert torch.equal(before, weights(t))

def test_a_policy_that_is_nan_names_the_step(fabric):
    t = make(fabric); t.step()
    with torch.no_grad(): t.model.head.norm.weight.fill_(math.nan)
    with pytest.raises(NotFinite, match="step 1"): t.step()

def test_a_float16_scaler_is_patient_but_not_for_ever(fabric, monkeypatch):
    t = make(fabric)
    with pytest.raises(NotFinite): t.check_finite(1., math.inf)
    monkeypatch.setattr(t.fabric.strategy.precision, "precision", "16-mixed"); t.skipped = 0
    for _ in range(20): t.check_finite(1., math.inf)
    with pytest.raises(NotFinite): t.check_finite(1., math.inf)
    t.check_finite(1., 2.); assert t.skipped == 0
    with pytest.raises(NotFinite): t.check_finite(math.nan, 1.)

def test_a_player_that_becomes_stale_on_resume_is_the_trained_one(fabric, tmp_path):
    t = make(fabric); [t.step() for _ in range(2)]; save_checkpoint(t, tmp_path)
    s = make(fabric, sync_every=3); load_checkpoint(s, checkpoints(tmp_path)[-1])
    assert all(torch.equal(a, b) for a, b in zip(s.player.state_dict().values(), t.model.state_dict().values()))

def test_a_damaged_checkpoint_is_named(fabric, tmp_path):
    t = make(fabric); t.step(); path = save_checkpoint(t, tmp_path); good = (path/"state.pt").read_bytes()
    for bad in (b"", b"x"*100, good[:len(good)//2]):
        (path/"state.pt").write_bytes(bad)
        with pytest.raises(CheckpointError, match="000001"): load_checkpoint(make(fabric), path)

def test_checkpoints_are_whole_or_absent(fabric, tmp_path):
    t = make(fabric, keep=2)
    for _ in range(4): t.step(); save_checkpoint(t, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000003", "000004"]
    (tmp_path/"000009.tmp").mkdir()                                         # a crash while writing
    assert checkpoints(tmp_path)[-1].name == "000004"
    save_checkpoint(t, tmp_path); assert checkpoints(tmp_path)[-1].name == "000004"

def test_checkpoint_of_another_shape_is_refused(fabric, tmp_path):
    save_checkpoint(make(fabric), tmp_path)
    with pytest.raises(WeightsError, match="another shape"): load_checkpoint(make(fabric, model=MODELS["tiny"]), checkpoints(tmp_path)[-1])

# Log and panel

def test_every_column_is_explained_and_drawn(fabric):
    t = make(fabric); rows = [t.step() for _ in range(2)]
    assert set(rows[0]) == set(METRICS)
    json.dumps(rows[0])
    fig = draw_panel(rows + [{**rows[1], "ratio_error": None, "entropy": None}], "x")
    assert len(fig.axes) == 8 and all(ax.lines for ax in fig.axes)

def test_a_torn_last_line_is_dropped_and_any_other_is_named(tmp_path):
    path = tmp_path/"metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste'); assert [r["step"] for r in read_metrics(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"): read_metrics(path)

# Stored positions

def test_games_on_stored_positions_are_worth_what_the_engine_said(monkeypatch):
    "The judge of nbs/experiments/grid.py: a one-ply game earns its move's value less the best one's, and nothing else is known."
    monkeypatch.syspath_prepend(str(TOP/"nbs"/"experiments"))
    grid = __import__("grid")
    judge = grid.Stored()
    t = grid.small_run(judge, 3, lr=1e-4); ro = t.play().rollout
    reward, row_of = step_rewards(ro, judge), {b.fen(): i for i, b in enumerate(judge.boards)}
    for b, board in enumerate(t.starts(0, 0, 8)):
        i = row_of[board.fen()]
        assert i % 2 == 0                                                   # the other half is held out
        for g in range(16):
            action = ro.legal[ro.node[b, g, 0], ro.slot[b, g, 0]]
            assert reward[b, g, 0].item() == pytest.approx((judge.value[i][judge.legal[i] == action] - judge.value[i].max()).item(), abs=1e-6)
    with pytest.raises(KeyError, match="not among the stored positions"): judge.values([chess.STARTING_FEN])
    sure = judge.measure(t.model, .01)
    assert sure["regret"] == pytest.approx(sure["regret_argmax"], abs=5e-3) and sure["entropy"] < .1
