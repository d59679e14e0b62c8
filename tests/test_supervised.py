"Supervised training: it resumes, it keeps the best, and it refuses what is damaged, of another run, or not finite."
import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tqdm import tqdm

import grpo_chess.pretrain as pretrain
from grpo_chess.checkpoint import CheckpointError
from grpo_chess.convert import ConvertConfig, convert
from grpo_chess.labels import LabelError, read_shard
from grpo_chess.model import MODELS, ChessTransformer, Policy, WeightsError, load_model, pretrained, save_model
from grpo_chess.panel import read_metrics
from grpo_chess.settings import ConfigError
from grpo_chess.supervised import Pretrainer, TrainConfig, TrainError, lr_share, resume_run, run_folder, save_run, train
from grpo_chess.targets import measure_labels
from made_up import ENV, folder_of

@pytest.fixture
def labels(tmp_path): return folder_of(tmp_path/"labels", 4)

TINY = dict(batch=32, warmup=1, precision="32-true", accelerator="cpu", eval_positions=40)
def config(labels, tmp_path, **kw):
    return TrainConfig(**(TINY | dict(labels=str(labels), out=str(tmp_path/"net.safetensors")) | kw))

def weights(path): return torch.cat([p.flatten() for p in load_model(path).parameters()])
def rows_of(path): return [{k: v for k, v in r.items() if k != "minutes"} for r in read_metrics(path)]

def test_a_run_stopped_by_a_signal_ends_like_one_that_was_not(labels, tmp_path, capsys):
    def args(out):
        return list(map(str, ["train", "--labels", labels, "--out", tmp_path/out, "--steps", 24, "--batch", 8,
                              "--eval_every", 8, "--eval_positions", 20, "--ema", .9, "--mirror", "true",
                                          "--precision", "32-true", "--accelerator", "cpu", "--warmup", 2]))
    assert pretrain.main(args("whole.safetensors")) == 0
    run = subprocess.Popen([sys.executable, "-m", "grpo_chess.pretrain", *args("broken.safetensors")], env=ENV,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in run.stdout:
        if line.startswith("step"): break
    run.send_signal(signal.SIGTERM)
    run.stdout.read()
    assert run.wait() == 130
    assert not (tmp_path/"broken.safetensors").exists()
    capsys.readouterr()
    assert pretrain.main(args("broken.safetensors")) == 0 and "going on after step" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path/"whole.safetensors"), weights(tmp_path/"broken.safetensors"))
    assert rows_of(tmp_path/"whole"/"metrics.jsonl") == rows_of(tmp_path/"broken"/"metrics.jsonl")
    # finished: nothing to do
    assert pretrain.main(args("broken.safetensors")) == 0 and "\nstep" not in capsys.readouterr().out

def test_the_same_settings_give_the_same_weights_and_another_seed_does_not(labels, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(labels, tmp_path, out=str(tmp_path/f"{name}.safetensors"), steps=3, seed=seed), quiet=True)
        runs.append(weights(tmp_path/f"{name}.safetensors"))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

def test_micro_batches_change_nothing_but_rounding(labels, tmp_path):
    grads = []
    for micro in (32, 7):
        t = Pretrainer(config(labels, tmp_path, micro=micro, steps=2, grad_clip=0.))
        t.optimizer.step = lambda *a, **k: None
        loss = t.step()["loss"]
        grads.append((loss, torch.cat([p.grad.flatten() for p in t.model.parameters()])))
    assert abs(grads[0][0] - grads[1][0]) < 1e-5 and torch.allclose(grads[0][1], grads[1][1], atol=1e-6)

def test_it_learns_and_keeps_the_best(labels, tmp_path):
    cfg = config(labels, tmp_path, steps=45, eval_every=15, lr=3e-3)
    start = measure_labels(Policy(Pretrainer(cfg).model.eval()), read_shard(labels/"shard-00001.parquet"))
    train(cfg, quiet=True)
    after = measure_labels(Policy(load_model(cfg.out)), read_shard(labels/"shard-00001.parquet"))
    assert after["loss"] < start["loss"] - .05
    rows = read_metrics(run_folder(cfg)/"metrics.jsonl")
    best = min(rows, key=lambda r: r["regret_greedy"])
    with safe_open(cfg.out, "pt") as f: about = f.metadata()
    assert json.loads(about["measured"]) == best and json.loads(about["labels"])["seed"] == 0
    assert json.loads(about["trained"])["lr"] == 3e-3
    assert Path(cfg.out).stat().st_size < 1e6

def test_the_bar_shows_no_regret_before_one_was_measured(labels, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix", lambda bar, row, refresh: shown.append(row))
    train(config(labels, tmp_path, steps=4, eval_every=2), quiet=True)
    assert [sorted(row) for row in shown] == [["loss"]]*2 + [["loss", "regret"]]*2
    assert all(math.isfinite(float(x)) for row in shown for x in row.values())

def test_a_checkpoint_of_something_else_is_refused(labels, tmp_path):
    cfg = config(labels, tmp_path, steps=4, eval_every=2)
    train(cfg, quiet=True)
    folder = run_folder(cfg)/"checkpoint"
    with pytest.raises(WeightsError, match=r"checkpoint.00000002.model.safetensors holds another shape"):
        train(dataclasses.replace(cfg, model="record", steps=6), quiet=True)
    with pytest.raises(ConfigError, match="lr = 0.002 .here 0.1."):
        train(dataclasses.replace(cfg, lr=.1, steps=6), quiet=True)
    newest = folder/"00000004"/"state.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    t = Pretrainer(cfg)
    resume_run(t, folder)
    assert t.done == 2               # the one before it is whole
    older = folder/"00000002"/"state.pt"
    older.write_bytes(b"")
    with pytest.raises(CheckpointError, match="00000002/state.pt is not as it was"): resume_run(Pretrainer(cfg), folder)
    save_model(ChessTransformer(MODELS["record"]), tmp_path/"big.safetensors")
    with pytest.raises(WeightsError, match="big.safetensors holds another shape"):
        Pretrainer(dataclasses.replace(cfg, init=str(tmp_path/"big.safetensors")))

def test_another_folder_can_be_held_out(labels, tmp_path):
    other = folder_of(tmp_path/"other", 1, seed=50)
    cfg = config(labels, tmp_path, steps=2, heldout=str(other))
    t = Pretrainer(cfg)
    assert len(t.stream.rows) == 4
    assert math.isfinite(train(cfg, quiet=True)["regret"])

PGN = '[Event "?"]\n[WhiteElo "2000"]\n[BlackElo "1000"]\n[Result "0-1"]\n\n1. f3 e5 2. g4 Qh4# 0-1\n\n'

def test_train_on_other_people_s_data(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*20)
    convert(ConvertConfig(files=str(tmp_path/"g.pgn"), out=str(tmp_path/"out"), rows=20), quiet=True)
    # the same game twenty times
    with pytest.raises(LabelError, match="also trained on"):
        train(config(tmp_path/"out", tmp_path, steps=1), quiet=True)
    labels = folder_of(tmp_path/"mine", 1)
    row = train(config(tmp_path/"out", tmp_path, steps=8, lr=5e-3, heldout=str(labels)), quiet=True)
    net = Policy(load_model(tmp_path/"net.safetensors"))
    assert math.isfinite(row["regret"])
    assert measure_labels(net, read_shard(tmp_path/"out"/"shard-00000.parquet"))["loss"] < 3

def test_a_run_starts_from_the_package_weights_by_name(labels, tmp_path):
    cfg = config(labels, tmp_path, model="tiny", init="tiny")
    assert all(torch.equal(a, b) for a, b in zip(Pretrainer(cfg).model.parameters(), pretrained("tiny").parameters()))

def test_muon_moves_the_matrices_of_the_blocks_and_adamw_all_else(labels, tmp_path):
    """Muon's step is as long as its rate in its strongest direction; AdamW's first step moves every entry by the rate.
    Both follow one schedule, each from its own rate."""
    t = Pretrainer(config(labels, tmp_path, optimizer="muon", lr=1e-3, muon_lr=.05, weight_decay=0., warmup=1,
                          grad_clip=0., ema=0.))
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    t.step()
    share = lr_share(0, 0., 1)
    moved = {k: v - before[k] for k, v in t.model.state_dict().items()}
    assert share == .5 and sorted({g["lr"] for g in t.optimizer.param_groups}) == pytest.approx([.5e-3, .025])
    for name, x in moved.items():
        if name.startswith("blocks") and x.dim() == 2:
            s = torch.linalg.svdvals(x)
            # orthogonalised: about the rate, however large the matrix; AdamW's at this rate is ten times longer
            assert 5e-3 < s[0] < .1, name
        elif x.abs().max() > 0: assert x.abs().max() < .6e-3, name
    assert any(moved[k].abs().max() > 1e-4 for k in moved if not k.startswith("blocks"))

# Weights and losses that are not finite

def test_training_that_diverges_stops_with_one_line(labels, tmp_path, capsys):
    "At this rate the weights are NaN within a few steps; that was measured as a loss of 0.0000 and kept as the best."
    argv = ["train", "--labels", labels, "--out", tmp_path/"net.safetensors", "--steps", 40, "--batch", 16,
            "--eval_every", 40,
            "--eval_positions", 20, "--optimizer", "adamw", "--lr", 1e9, "--precision", "32-true", "--accelerator",
            "cpu"]
    assert pretrain.main(list(map(str, argv))) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "diverged" in said[0]
    assert not (tmp_path/"net.safetensors").exists() and not (tmp_path/"net/best.safetensors").exists()

@pytest.mark.parametrize("poisoned_step", [6, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_last_good_weights_stay_when_a_run_diverges(labels, tmp_path, monkeypatch, poisoned_step, bad):
    "Between two evaluations the next loss says it; at the last step of all, the evaluation does."
    cfg, step = config(labels, tmp_path, steps=8, eval_every=4), Pretrainer.step
    def poison(self):
        moved = step(self)
        if self.done == poisoned_step:
            with torch.no_grad(): self.model.blocks[0].qkv.weight[0, 0] = bad
        return moved
    train(dataclasses.replace(cfg, out=str(tmp_path/"good.safetensors")), quiet=True)
    monkeypatch.setattr(Pretrainer, "step", poison)
    with pytest.raises(TrainError, match="diverged") as e: train(cfg, quiet=True)
    assert "\n" not in str(e.value) and not Path(cfg.out).exists()
    best = load_model(run_folder(cfg)/"best.safetensors")
    assert all(p.isfinite().all() for p in best.parameters())
    assert [p.name for p in sorted((run_folder(cfg)/"checkpoint").iterdir())] == ["00000004"]
    assert [r["step"] for r in read_metrics(run_folder(cfg)/"metrics.jsonl")] == [4]

# Checkpoints

def test_a_damaged_checkpoint_is_replaced(labels, tmp_path):
    "It was left where it stood, so that every resumption did the same steps again."
    cfg = config(labels, tmp_path, steps=4, eval_every=2)
    train(cfg, quiet=True)
    newest = run_folder(cfg)/"checkpoint/00000004/state.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    Path(cfg.out).unlink()
    train(cfg, quiet=True)
    t = Pretrainer(cfg)
    resume_run(t, run_folder(cfg)/"checkpoint")
    assert t.done == 4 and Path(cfg.out).exists()
    inode = newest.stat().st_ino
    save_run(t, run_folder(cfg)/"checkpoint")                       # one that is whole stays as it is
    assert newest.stat().st_ino == inode

@pytest.mark.parametrize("setting, match", [
    (dict(out="folder.safetensors"), "is a folder"), (dict(out="x.pt"), "must end in"), (dict(lr=0.), "lr = 0.0"),
    (dict(tau=math.nan), "tau = nan"), (dict(ema=1.), "ema = 1.0"), (dict(model="huge"), "must be one of tiny"),
    (dict(minutes=math.nan), "minutes = nan"), (dict(precision="8"), "precision")])
def test_settings_out_of_range_are_refused_by_name(setting, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=match) as e: TrainConfig(**setting)
    assert "\n" not in str(e.value)
