"The GRPO step: ratio one, exact resumption, processes that add up, and a policy that learns."
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo_chess.loss import LossConfig, group_advantage
from grpo_chess.model import MODELS, ChessTransformer, ModelConfig, MoveDist, WeightsError
from grpo_chess.positions import PositionsConfig, start_positions
from grpo_chess.reward import Judge, RewardConfig, step_rewards
from grpo_chess.sampler import SamplerConfig, action_agreement
from grpo_chess.trainer import METRICS, AblateConfig, CheckpointError, NotFinite, Trainer, TrainerConfig, checkpoints, draw_panel, load_checkpoint, lr_factor, make_fabric, read_metrics, save_checkpoint

TOP = Path(__file__).resolve().parent.parent
SMALL = ModelConfig(width=32, layers=2, heads=2)
TIMES = {"seconds", "seconds_play", "seconds_update", "judged"}

@pytest.fixture(scope="module")
def fabric(): return make_fabric(accelerator="cpu")

def make(fabric, seed=0, model=SMALL, sampler=None, loss=None, ablate=None, starts=None, sharpen=1., **trainer):
    torch.manual_seed(seed)
    net = ChessTransformer(model)
    with torch.no_grad(): net.head.source.weight.mul_(sharpen)
    starts = starts or (lambda step, first, n: start_positions(n, PositionsConfig(window_cp=0), seed, step, first=first))
    return Trainer(fabric, net, starts, Judge(RewardConfig(judge="material")), sampler or SamplerConfig(boards=6, group=4, plies=3),
                   loss or LossConfig(), TrainerConfig(**dict(steps=8, warmup=0, lr=1e-3) | trainer), ablate, seed)

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
                                  LossConfig(kl_to="reference", kl_coef=1., kl="k3"), LossConfig(kl_to="reference", kl_coef=1.)])
def test_micro_batches_change_nothing(fabric, loss):
    grads = []
    for size in (1, 10_000):
        t = make(fabric, loss=loss, micro_batch=size); t.step()                # the second batch, so that policy and reference differ
        batch = t.play(); t.optimizer.zero_grad(); t.minibatch(batch, list(range(6)))
        grads.append(torch.cat([p.grad.flatten() for p in t.params]))
    assert torch.allclose(*grads, atol=1e-7, rtol=1e-3)

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

# Knobs

def test_learning_rate_schedule():
    cfg = TrainerConfig(steps=20, warmup=4)
    f = [lr_factor(cfg, s) for s in range(20)]
    assert lr_factor(cfg, 25) == 0 and f[:5] == [.2, .4, .6, .8, 1.] and all(a > b > 0 for a, b in zip(f[4:], f[5:]))
    assert lr_factor(TrainerConfig(steps=20, warmup=0, decay="constant"), 19) == 1
    assert abs(lr_factor(TrainerConfig(steps=20, warmup=0, decay="cosine"), 10) - .5) < 1e-9

def test_frozen_layers_stay_and_the_head_has_its_own_rate(fabric):
    t = make(fabric, freeze=1, head_lr=1e-5, lr=1e-3)
    before = copy.deepcopy(t.model.state_dict()); t.step(); after = t.model.state_dict()
    moved = lambda prefix: max((before[k] - after[k]).abs().max().item() for k in before if k.startswith(prefix))
    assert moved("piece") == moved("square") == moved("blocks.0") == 0
    assert moved("blocks.1") > 5e-4 and 0 < moved("head") < 2e-5

@pytest.mark.parametrize("bad", [dict(steps=0), dict(lr=0.), dict(lr=-1.), dict(decay="exp"), dict(precision="8"), dict(epochs=0), dict(grad_clip=-1.), dict(keep=0)])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"trainer.{next(iter(bad))} = "): TrainerConfig(**bad)

def test_boards_must_be_shared_out(fabric):
    with pytest.raises(ValueError, match="minibatches"): make(fabric, minibatches=7)

# Law 5: seed + config = run

def test_same_seed_same_run_other_seed_other_run(fabric):
    a, b, c = (make(fabric, seed=s, epochs=2, minibatches=2) for s in (0, 0, 1))
    rows = [[untimed(t.step()) for _ in range(3)] for t in (a, b, c)]
    assert rows[0] == rows[1] != rows[2] and torch.equal(weights(a), weights(b))

@pytest.mark.parametrize("kw", [dict(), dict(sync_every=2, epochs=2, minibatches=3), dict(freeze=1, head_lr=1e-4)])
def test_a_resumed_run_equals_one_that_never_stopped(fabric, tmp_path, kw):
    whole = make(fabric, **kw); rows = [untimed(whole.step()) for _ in range(6)]
    first = make(fabric, **kw); [first.step() for _ in range(3)]; save_checkpoint(first, tmp_path)
    again = make(fabric, seed=0, **kw); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(3)] == rows[3:] and torch.equal(weights(whole), weights(again))

def test_resuming_with_a_reference_keeps_the_first_policy(fabric, tmp_path):
    loss = LossConfig(kl_to="reference", kl_coef=.5)
    whole = make(fabric, loss=loss); rows = [untimed(whole.step()) for _ in range(4)]
    first = make(fabric, loss=loss); [first.step() for _ in range(2)]; save_checkpoint(first, tmp_path)
    again = make(fabric, loss=loss); load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert [untimed(again.step()) for _ in range(2)] == rows[2:]

ARGS = ["--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0", "--sampler.boards", "6", "--sampler.group", "4", "--sampler.plies", "3", "--trainer.steps", "2",
        "--trainer.minibatches", "3", "--accelerator", "cpu", "--model.width", "32", "--model.layers", "2", "--model.heads", "2"]

@pytest.mark.parametrize("extra", [[], ["--loss.ratio", "trajectory", "--loss.aggregate", "trajectory", "--loss.scale", "std"]], ids=["default", "gspo"])
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
        for key in ("train/avg_reward", "entropy", "loss", "grad_norm", "plies", "advantage_std", "agreement_mean"): assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key

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
