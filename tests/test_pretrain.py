"The four commands: evaluation, the card and the command line."
import dataclasses
import json
import math

import pytest
from safetensors.torch import save_file

import grpo_chess.pretrain as pretrain
from grpo_chess.engine import EngineConfig
from grpo_chess.files import FileError
from grpo_chess.labels import held_out, read_manifest
from grpo_chess.model import MODELS, ChessTransformer, Policy, load_model
from grpo_chess.pretrain import EvaluateConfig, evaluate
from grpo_chess.settings import known_keys
from grpo_chess.supervised import TrainConfig, train
from grpo_chess.targets import measure_labels
from made_up import cli, folder_of

@pytest.fixture
def labels(tmp_path): return folder_of(tmp_path/"labels", 4)

TINY = dict(batch=32, warmup=1, precision="32-true", accelerator="cpu", eval_positions=40)
def config(labels, tmp_path, **kw):
    return TrainConfig(**(TINY | dict(labels=str(labels), out=str(tmp_path/"net.safetensors")) | kw))

@pytest.mark.parametrize("argv", [[], ["lable"], ["label", "--dept", "1"], ["label", "--depth", "0"],
                                  ["label", "--games", "3"], ["train", "--tau", "0"], ["train", "--out", "x.pt"],
                                  ["train", "--labels", "nowhere"],
                                  ["train", "--model", "huge"], ["evaluate", "--weights", "no.safetensors"],
                                  ["evaluate", "--games", "3"], ["convert", "--form", "what"],
                                  ["label", "--out", "/proc/no/such"]])
def test_wrong_arguments_are_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")

def test_help_names_every_setting(capsys):
    def said(*argv):
        with pytest.raises(SystemExit) as e: pretrain.main([*argv, "--help"])
        assert not e.value.code
        return capsys.readouterr().out
    assert all(c in said() for c in pretrain.COMMANDS)
    for command, (cls, _) in pretrain.COMMANDS.items():
        text = said(command)
        assert all(f"--{k}" in text for k in known_keys(cls))

def test_the_module_runs(tmp_path):
    r = cli("train", "--labels", "nowhere", cwd=tmp_path)
    assert r.returncode == 2 and "error: nowhere is no folder of labels" in r.stderr and "Traceback" not in r.stderr

def test_evaluate_does_not_measure_what_was_trained_on(labels, tmp_path):
    "Held-out positions that stand in another shard too do not count; a file that cannot be written is found out first."
    train(config(labels, tmp_path, steps=2), quiet=True)
    shards, net = [labels/s["name"] for s in read_manifest(labels)["shards"]], str(tmp_path/"net.safetensors")
    new = held_out(labels, 1, 1000, shards[1:])
    assert len(new) < len(held_out(labels, 1, 1000))
    got = evaluate(EvaluateConfig(weights=net, games=0, labels=str(labels), positions=1000), quiet=True)["measured"]
    assert got == measure_labels(Policy(load_model(net)), new)
    with pytest.raises(FileError, match="there is no folder"):
        evaluate(EvaluateConfig(weights=net, games=0, labels=str(labels), card=str(tmp_path/"no/net.md")), quiet=True)

def test_evaluate_writes_scores_with_their_intervals(labels, tmp_path):
    train(config(labels, tmp_path, steps=2, tau=.05), quiet=True)
    out = evaluate(EvaluateConfig(weights=str(tmp_path/"net.safetensors"), games=2, max_plies=6, labels=str(labels),
                                  positions=20, out=str(tmp_path/"e.json"), card=str(tmp_path/"net.md"),
                                  engine=EngineConfig(processes=1)), quiet=True)
    card = (tmp_path/"net.md").read_text()
    assert all(x in card for x in ("# net", "tau 0.05", "2 steps, 64 positions",
                                   f"| regret | {out['measured']['regret']:.4f} |",
                                   "| untrained, argmax | Stockfish depth 1 | 2 |"))
    assert json.loads((tmp_path/"e.json").read_text())["measured"] == out["measured"] and len(out["matches"]) == 8 + 2*3
    assert [r["player"] for r in out["ratings"]] == ["net, argmax", "untrained, argmax"]
    assert all(f"{r['player']}: {r['rating']}" in card for r in out["ratings"])
    for m in out["matches"]: assert m["interval"][0] <= m["score"] <= m["interval"][1] and m["games"] == 2

def test_the_card_gives_the_commands_that_make_the_weights_again():
    "Every setting that is not the default is there, and the command line takes them."
    made = dict(rows_in_all=650_000, depth=1, seed=3, games=256)
    lines = pretrain.recipe(made, dataclasses.asdict(TrainConfig(steps=1200, seed=4, lr=1e-3)))
    label, train = (pretrain.parse(line.split()[3:])[1] for line in lines)
    assert (label.positions, label.depth, label.seed, label.out) == (650_000, 1, 3, train.labels)
    assert dataclasses.replace(train, out=TrainConfig.out) == TrainConfig(steps=1200, seed=4, lr=1e-3)
    label = pretrain.parse(pretrain.recipe(made | dict(rows=500, games=50), {})[0].split()[3:])[1]
    assert (label.rows, label.games) == (500, 50) and "--rows" not in lines[0] and "--games" not in lines[0]
    # labels from elsewhere cannot be made again by us
    assert len(pretrain.recipe(dict(source="a.pgn"), {})) == 1

def test_evaluate_refuses_weights_that_are_not_finite(labels, tmp_path, capsys):
    state = ChessTransformer(MODELS["tiny"]).state_dict()
    state["blocks.1.bias"][0, 3, 3] = math.nan
    save_file(state, tmp_path/"net.safetensors", metadata=dict(config=json.dumps(dataclasses.asdict(MODELS["tiny"]))))
    assert pretrain.main(["evaluate", "--weights", str(tmp_path/"net.safetensors"), "--labels", str(labels), "--games",
                          "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "blocks.1.bias" in said[0]
