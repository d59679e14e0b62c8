"Checkpoints: a resumed run equals the one that never stopped, and what is damaged, broken or foreign is refused."
import os
import subprocess

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from safetensors.torch import save
from torch import nn

from grpo_chess.checkpoint import (
    CheckpointError, checkpoints, load_checkpoint, read_weights, save_checkpoint, save_weights)
from grpo_chess.files import SUMS, digest
from grpo_chess.guards import GuardConfig
from grpo_chess.model import MODELS, WeightsError, load_model
from grpo_chess.trainer import NotFinite
from small import flat, make, steps, weights

def half_precision(**scaler):
    "What a T4 runs in: float16 with a loss scaler, on the CPU."
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))
    fabric = Fabric(accelerator="cpu", plugins=[precision])
    fabric.launch()
    return fabric

# Law 5: a resumed run is the run

@pytest.mark.parametrize("kw", [
    dict(), dict(sync_every=2, epochs=2, minibatches=3), dict(freeze=1, head_lr=1e-4), dict(muon_lr=.02),
    dict(loss=dict(moves="all"), epochs=2), dict(loss=dict(kl_to="reference", kl_coef=.5)),
    dict(ema=.7, sync_every=2), dict(weight_decay=.1, sampler=dict(noise=.3))])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, kw):
    whole, first, again = (make(**kw) for _ in range(3))
    rows = steps(whole, 6)
    steps(first, 3)
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert steps(again, 3) == rows[3:] and torch.equal(weights(whole), weights(again))
    assert torch.equal(flat(whole.kept), flat(again.kept))

def test_a_run_that_is_short_of_time_goes_on_where_its_schedules_were(tmp_path):
    "After four of eight steps there is time for two more: the learning rate is further down its curve."
    def hurried(): return make(loss=dict(entropy_coef=.4), entropy_end=.1)
    whole, first, again = hurried(), hurried(), hurried()
    for t in (whole, first):
        steps(t, 3)
        t.steps_left = 3
        steps(t, 1)
    rows = []
    for whole.steps_left in (2, 1): rows += steps(whole, 1)
    first.elapsed = 720.
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert again.schedule_place == first.schedule_place > again.done == 4 and again.elapsed == 720.
    resumed = []
    for again.steps_left in (2, 1): resumed += steps(again, 1)
    assert resumed == rows and torch.equal(weights(whole), weights(again)) and rows[0]["lr"] < .45e-3

def test_a_run_that_its_time_limit_ended_can_learn_again(tmp_path):
    "Its schedules were at their end, where the learning rate is 0; with more time they go on from its number of steps."
    t, again = make(), make()
    t.steps_left = 2
    t.step()
    t.steps_left = 1
    t.step()
    assert t.schedule_place == 8
    save_checkpoint(t, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    before = weights(again)
    assert again.step()["lr"] == pytest.approx(1e-3*(1 - 2/8)) and not torch.equal(before, weights(again))

def test_the_loss_scale_of_float16_goes_on(tmp_path):
    "A scale that doubles every two updates: a resumed run has the one that it was stopped with, and the same steps."
    growing = dict(init_scale=256., growth_interval=2)
    whole, first, again = (make(fabric=half_precision(**growing), epochs=2) for _ in range(3))
    rows = steps(whole, 4)
    steps(first, 2)
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    scales = [t.fabric.strategy.precision.scaler.get_scale() for t in (first, again)]
    assert scales == [1024., 1024.]
    assert steps(again, 2) == rows[2:] and torch.equal(weights(whole), weights(again))

@pytest.mark.parametrize("stop", [1e-9, 1e-3])
def test_early_stopping_leaves_a_float16_run_able_to_go_on(stop):
    "The gradients of an update that is not made were unscaled all the same."
    t = make(fabric=half_precision(), epochs=4, lr=3e-3, guard=GuardConfig(stop_kl=stop))
    rows = steps(t, 3)
    assert all(r["updates"] < 4 and "stop" in r["guard"] for r in rows)

def test_a_stale_policy_that_appears_on_resume_is_the_trained_one(tmp_path):
    t, stale = make(), make(sync_every=3)
    steps(t, 2)
    save_checkpoint(t, tmp_path)
    load_checkpoint(stale, checkpoints(tmp_path)[-1])
    assert torch.equal(flat(stale.behaviour), weights(t))

def test_the_average_is_kept_beside_the_weights(tmp_path):
    t = make(ema=.5)
    steps(t, 2)
    path = save_checkpoint(t, tmp_path)
    assert torch.equal(flat(load_model(path/"average.safetensors")), flat(t.kept))
    assert torch.equal(flat(load_model(path/"model.safetensors")), weights(t))

# A model of one's own

class Bag(nn.Module):
    "The least that a policy can be: a number for each action and piece on the board."
    def __init__(self):
        super().__init__()
        self.scores = nn.Embedding(16, 1968)
        self.tied = self.scores                                            # two names for one tensor

    def forward(self, tokens, legal):
        scores = self.scores(tokens[:, :64].long()).mean(1).gather(1, legal.clamp_min(0).long())
        return scores.masked_fill(legal < 0, -torch.inf)

def bag(**kw):
    torch.manual_seed(1)
    return make(net=Bag(), lr=.1, **kw)

def test_a_model_of_ones_own_trains_and_resumes(tmp_path):
    whole, first, again = (bag(ema=.5, sync_every=2) for _ in range(3))
    rows = steps(whole, 4)
    assert rows[0]["ratio_error"] < 1e-5 and rows[3]["kl_step"] > 0
    steps(first, 2)
    save_checkpoint(first, tmp_path)
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert steps(again, 2) == rows[2:] and torch.equal(weights(whole), weights(again))
    with pytest.raises(WeightsError, match="another shape than this Linear"):
        load_checkpoint(make(net=nn.Linear(2, 2)), checkpoints(tmp_path)[-1])
    (checkpoints(tmp_path)[-1]/"model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not as it was written"):
        load_checkpoint(again, checkpoints(tmp_path)[-1])

def test_what_a_model_of_ones_own_lacks_is_said_in_a_line():
    with pytest.raises(ValueError, match="trainer.freeze = 1 needs a ChessTransformer, not Bag"): bag(freeze=1)
    with pytest.raises(ValueError, match="head_lr = 0.01 needs a `head` that trains: Bag has none"): bag(head_lr=.01)
    with pytest.raises(ValueError, match="muon_lr = 0.01 needs `blocks` with matrices that train: Bag has none"):
        bag(muon_lr=.01)

# What is whole, and what is not

def test_checkpoints_are_whole_or_absent(tmp_path):
    t = make(keep=2)
    for _ in range(4):
        t.step()
        save_checkpoint(t, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000003", "000004"]
    (tmp_path/"000009.tmp").mkdir()                                         # a crash while writing
    assert checkpoints(tmp_path)[-1].name == "000004"
    inode = checkpoints(tmp_path)[-1].stat().st_ino
    save_checkpoint(t, tmp_path)
    assert checkpoints(tmp_path)[-1].name == "000004" and checkpoints(tmp_path)[-1].stat().st_ino == inode

def test_the_millionth_step_comes_after_the_ones_before_it(tmp_path):
    t = make(keep=2)
    for t.done in (999_998, 999_999, 1_000_000, 1_000_001): save_checkpoint(t, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["1000000", "1000001"]

@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_replaced(tmp_path, file):
    "The run goes on from the one before it, and when it comes to the same step again the damaged one makes room."
    t = make()
    for _ in range(2):
        t.step()
        save_checkpoint(t, tmp_path)
    newest = tmp_path/"000002"/file
    newest.write_bytes(newest.read_bytes()[:200])
    again = make()
    with pytest.raises((CheckpointError, WeightsError)): load_checkpoint(again, tmp_path/"000002")
    load_checkpoint(again, tmp_path/"000001")
    again.step()
    save_checkpoint(again, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000001", "000002"]
    assert (tmp_path/"000002.damaged"/file).stat().st_size == 200            # aside, for whoever wants to look
    third = make()
    load_checkpoint(third, tmp_path/"000002")
    assert torch.equal(weights(third), weights(t))

def seal(path):
    "Checksums of what is there: for files that were never right."
    names = [p.name for p in path.iterdir() if p.name != SUMS]
    (path/SUMS).write_text("".join(f"{digest((path/n).read_bytes())}  {n}\n" for n in names))

class Bomb:
    "Runs a command when it is read as a pickle."
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f"touch {self.file}",)

def test_a_checkpoint_runs_no_code(tmp_path):
    path = save_checkpoint(make(), tmp_path)
    torch.save(Bomb(tmp_path/"ran"), path/"state.pt")
    seal(path)
    with pytest.raises(CheckpointError, match="cannot be read"): load_checkpoint(make(), path)
    assert not (tmp_path/"ran").exists()

def test_a_checkpoint_without_checksums_says_how_to_make_them(tmp_path):
    "One of an earlier version, or one whose list was lost."
    path = save_checkpoint(make(), tmp_path)
    (path/SUMS).unlink()
    with pytest.raises(CheckpointError, match="sha256sum") as e: load_checkpoint(make(), path)
    subprocess.run(str(e.value).rpartition("them: ")[2], shell=True, check=True)
    load_checkpoint(make(), path)

def test_anybody_can_check_a_checkpoint(tmp_path):
    path = save_checkpoint(make(ema=.5), tmp_path)
    said = subprocess.run(["sha256sum", "-c", SUMS], cwd=path, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count(": OK") == 3

def test_weights_of_ones_own_that_are_nan_are_refused(tmp_path):
    net = nn.Linear(2, 2)
    with torch.no_grad(): net.weight[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="NaN"): save_weights(net, tmp_path/"x.safetensors")
    (tmp_path/"x.safetensors").write_bytes(save(net.state_dict()))
    with pytest.raises(WeightsError, match="NaN"): read_weights(net, tmp_path/"x.safetensors")

def test_a_damaged_checkpoint_is_named(tmp_path):
    t = make()
    t.step()
    path = save_checkpoint(t, tmp_path)
    good = (path/"state.pt").read_bytes()
    for bad in (b"", b"x"*100, good[:len(good)//2]):
        (path/"state.pt").write_bytes(bad)
        with pytest.raises(CheckpointError, match="000001/state.pt is not as it was"): load_checkpoint(make(), path)
        seal(path)
        with pytest.raises(CheckpointError, match="000001/state.pt cannot be read"): load_checkpoint(make(), path)
    torch.save(dict(done=1), path/"state.pt")
    seal(path)
    with pytest.raises(CheckpointError, match="lacks optimizer, precision"): load_checkpoint(make(), path)

def test_an_error_of_our_own_is_not_called_damage(tmp_path, monkeypatch):
    t = make()
    path = save_checkpoint(t, tmp_path)
    def wrong(state): raise KeyError("ours")
    monkeypatch.setattr(t, "load_state", wrong)
    with pytest.raises(KeyError, match="ours"): load_checkpoint(t, path)

def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    save_checkpoint(make(), tmp_path)
    with pytest.raises(WeightsError, match="another shape"):
        load_checkpoint(make(model=MODELS["tiny"]), checkpoints(tmp_path)[-1])

def test_weights_that_play_nan_become_no_checkpoint(tmp_path):
    t, again = make(), make()
    t.step()
    save_checkpoint(t, tmp_path)
    good = weights(t)
    t.step()
    with torch.no_grad(): t.model.head.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match="step 2"): t.step()
    assert save_checkpoint(t, tmp_path) is None and [p.name for p in checkpoints(tmp_path)] == ["000001"]
    load_checkpoint(again, checkpoints(tmp_path)[-1])
    assert torch.equal(weights(again), good)
    load_checkpoint(t, checkpoints(tmp_path)[-1])                            # whole again
    t.step()
    assert save_checkpoint(t, tmp_path).name == "000002"
