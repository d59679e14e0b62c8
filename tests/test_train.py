"The command line as a user meets it: settings, bad input, the run folder, resuming, stopping, the report."
import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chess.pgn
import pytest
import torch
import yaml
from safetensors.torch import load_file

from grpo_chess import train
from grpo_chess.board import ACTION_TO
from grpo_chess.model import MODELS, ChessTransformer, save_model
from grpo_chess.settings import known_keys, make_parser
from grpo_chess.train import Config, main, parse, presets, run
from grpo_chess.panel import METRICS, read_metrics

TOP = Path(__file__).resolve().parent.parent
NET = ["--model.width", "32", "--model.layers", "2", "--model.heads", "2"]
TINY = ["--preset", "scratch", *NET, "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0", "--sampler.boards", "4", "--sampler.group", "4", "--sampler.plies", "2", "--trainer.steps", "4",
        "--trainer.checkpoint_every", "2", "--accelerator", "cpu"]

def command(*args, **kw):
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-m", "grpo_chess.train", *map(str, args)], env=env, capture_output=True, text=True, timeout=300, **kw)

def start(*args):
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-m", "grpo_chess.train", *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def untimed(path): return [{k: v for k, v in r.items() if "seconds" not in k and k != "judged"} for r in read_metrics(path)]

# Settings

@pytest.mark.parametrize("name", presets())
def test_presets_parse_and_name_only_known_keys(name):
    cfg, _ = parse(["--preset", name])
    assert isinstance(cfg, Config) and (cfg.sampler.group >= 2 or cfg.loss.moves == "all")

def test_default_is_tiny():
    cfg, how = parse([])
    assert how["preset"] == cfg.init == "tiny" and cfg.model == MODELS["tiny"] and cfg.loss.moves == "all"

def test_the_default_is_what_the_page_on_learning_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(TOP/"nbs/experiments"))
    from run import settings
    plan = yaml.safe_load((TOP/"nbs/experiments/plan.yaml").read_text())["learning"]
    ran, _ = parse(["--preset", "scratch", "--minutes", "15", *settings([*plan["base"], *plan["arms"]["tiny"]])])
    ran.engine.processes = 0                                                # they ran on one core each
    assert parse([])[0] == ran

def test_the_command_ends_its_process_group(tmp_path, capsys):
    "Left to the interpreter's exit, a process of torchrun aborts now and then; also after an error."
    import torch.distributed as dist
    for bad in ([], ["--resume", str(tmp_path/"nothing")]):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert main(["--preset", "scratch", "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0", "--sampler.boards", "2", "--sampler.group", "2", "--sampler.plies", "2", "--trainer.steps", "1", "--model.width", "32",
                         "--model.layers", "1", "--model.heads", "2", "--accelerator", "cpu", "--out", str(tmp_path)] if not bad else bad) == (2 if bad else 0)
            assert not dist.is_initialized()
        finally:
            if dist.is_initialized(): dist.destroy_process_group()

def test_order_of_precedence(tmp_path):
    file = tmp_path/"my.yaml"; file.write_text("sampler: {boards: 5}\nseed: 7\n")
    cfg, _ = parse(["--preset", "record", "--config", str(file), "--seed", "9"])
    assert (cfg.sampler.boards, cfg.seed, cfg.model.width) == (5, 9, 256)

def test_resolved_settings_read_back_as_themselves(tmp_path):
    cfg, _ = parse(["--preset", "colab", "--loss.delta", "3"])
    file = tmp_path/"config.yaml"; file.write_text(yaml.safe_dump(dataclasses.asdict(cfg)))
    assert parse(["--config", str(file)])[0] == cfg

def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as e: parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    sections = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
    for action in make_parser(Config, "train")._actions: assert action.help and ("SUPPRESS" not in str(action.help) or action.dest in sections), action.option_strings
    assert "default: 600)" in text                                            # the preset's steps, not the dataclass's
    def fields(cls, prefix=""):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.default_factory): yield from fields(f.default_factory, f"{prefix}{f.name}.")
            else: yield f"{prefix}{f.name}", f.name, cls.__doc__
    for dotted, name, doc in fields(Config):
        described = re.search(rf"^\s+{name}: (.+)$", doc, re.M)
        assert described, f"{dotted} has no description"
        assert f"--{dotted} " in text and " ".join(described.group(1).split())[:30].replace("%", "%") in text, dotted

def test_every_dataclass_field_is_a_setting():
    assert len(known_keys(Config)) > 70

# Bad input: one clear line, exit 2, no traceback

def bad_input(tmp_path):
    yaml_key = tmp_path/"key.yaml"; yaml_key.write_text("sampler: {boards: 4, grup: 8}\n")
    yaml_bad = tmp_path/"bad.yaml"; yaml_bad.write_text("a: [1\n")
    yaml_list = tmp_path/"list.yaml"; yaml_list.write_text("- 1\n")
    yaml_preset = tmp_path/"preset.yaml"; yaml_preset.write_text("preset: record\n")
    yaml_empty = tmp_path/"empty.yaml"; yaml_empty.write_text("trainer:\n")
    fen = tmp_path/"bad.fen"; fen.write_text("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1\n8/8/8/8/8/8/8/8 w - - 0 1\n")
    net = tmp_path/"tiny.safetensors"; save_model(ChessTransformer(MODELS["tiny"]), net)
    cut = tmp_path/"cut.safetensors"; cut.write_bytes(net.read_bytes()[:1000])
    notes = tmp_path/"notes.txt"; notes.write_text("I am no engine")
    (tmp_path/"taken").mkdir()
    return {
        "unknown key": (["--sampler.grup", "8"], "sampler.group"),
        "unknown key in a file": (["--config", yaml_key], "sampler.group"),
        "short key": (["--boards=8"], "sampler.boards"),
        "not YAML": (["--config", yaml_bad], "is not YAML"),
        "a list": (["--config", yaml_list], "expected settings"),
        "no such file": (["--config", tmp_path/"none.yaml"], "none.yaml"),
        "no such preset": (["--preset", "huge"], "tiny"),
        "a preset named in a file": (["--config", yaml_preset], "preset"),
        "a section without content": (["--config", yaml_empty], "trainer"),
        "negative seed": ([*TINY, "--seed", "-1"], "seed = -1"),
        "no GPU": ([*TINY, "--accelerator", "cuda"], "no GPU"),
        "float16 without a GPU": ([*TINY, "--trainer.precision", "16-mixed"], "16-mixed"),
        "a penalty that does nothing": ([*TINY, "--loss.kl_coef", "0.1", "--trainer.minibatches", "1"], "does nothing"),
        "a boost of nothing": ([*TINY, "--loss.entropy_coef", "0", "--guard.entropy_floor", "1.5"], "loss.entropy_coef = 0.0"),
        "a controller of nothing": ([*TINY, "--guard.kl_controller", "multiplicative"], "loss.kl_coef = 0.0"),
        "a controller that sees nothing": ([*TINY, "--loss.kl_coef", "0.01", "--loss.kl", "k1", "--guard.kl_controller", "multiplicative", "--guard.controller_kl", "k1", "--trainer.minibatches", "1"], "reads 0 at every step"),
        "a stop that cannot stop": ([*TINY, "--guard.stop_kl", "0.02", "--trainer.minibatches", "1"], "only one update"),
        "a guard's wrong choice": (["--guard.floor_action", "cry"], "boost, rollback, abort"),
        "a temperature of almost nothing": ([*TINY, "--sampler.temperature", "1e-40"], "sampler.temperature"),
        "another preset for a resumed run": (["--resume", tmp_path/"none", "--preset", "record"], "--preset"),
        "a value without its key": (["huge"], "huge"),
        "out of range": ([*TINY, "--sampler.group", "1"], "sampler.group = 1"),
        "not a number": (["--trainer.lr", "fast"], "trainer.lr"),
        "a key without its value": (["--trainer.lr"], "trainer.lr"),
        "wrong choice": (["--loss.scale", "max"], "none, std, rms"),
        "odd games": (["--match.games", "3"], "match.games = 3"),
        "FEN that is no position": ([*TINY, "--positions.file", fen], "line 2"),
        "FEN file that is absent": ([*TINY, "--positions.file", tmp_path/"none.fen"], "none.fen"),
        "weights of another shape": ([*TINY, "--init", net], "another shape"),
        "weights cut short": ([*TINY, "--init", cut], "cut.safetensors"),
        "weights that are absent": ([*TINY, "--init", tmp_path/"none.safetensors"], "none.safetensors"),
        "run folder exists": ([*TINY, "--name", "taken"], "exists"),
        "resume what is not there": (["--resume", tmp_path/"none"], "none"),
        "engine path that is no engine": ([*TINY, "--reward.judge", "engine", "--engine.path", notes], "notes.txt"),
        "engine path that is absent": ([*TINY, "--reward.judge", "engine", "--engine.path", tmp_path/"fish"], "fish"),
    }

@pytest.mark.parametrize("case", bad_input(Path(__import__("tempfile").mkdtemp())))
def test_bad_input_is_one_clear_line(case, tmp_path, capsys):
    args, says = bad_input(tmp_path)[case]
    code = main([*map(str, args), "--out", str(tmp_path)])
    err = capsys.readouterr().err.strip()
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and says in err, err
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "taken"] == [], "a run folder was left behind"

def test_bad_input_has_an_exit_status_and_no_traceback(tmp_path):
    out = command("--sampler.grup", 8, "--out", tmp_path)
    assert out.returncode == 2 and out.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in out.stderr

# A run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    done = command(*TINY, "--out", out, "--name", "a", "--match.games", 8, "--match.adjudicate", "false", "--match.max_plies", 30)
    assert done.returncode == 0, done.stderr
    return out/"a", done

def test_the_folder_holds_what_it_should(finished):
    folder, done = finished
    have = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert have == {"config.yaml", "start.safetensors", "metrics.jsonl", "report.md", "report.png", "model.safetensors", "games/sampling.pgn", "games/most.pgn",
                    *(f"checkpoint/{s}/{f}" for s in ("000002", "000004") for f in ("model.safetensors", "state.pt"))}
    rows = read_metrics(folder/"metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and all(set(r) == set(METRICS) for r in rows)
    assert (folder/"report.png").read_bytes()[:4] == b"\x89PNG"

def test_strength_is_printed_with_games_and_interval(finished):
    folder, done = finished
    for text in (done.stdout, (folder/"report.md").read_text()):
        lines = re.findall(r"new - old: 8 games \+(\d+) =(\d+) -(\d+), score (\S+) \[(\S+), (\S+)\], Elo", text)
        assert len(lines) == 2
        for w, d, l, score, low, high in lines:
            assert int(w) + int(d) + int(l) == 8 and abs(float(score) - (int(w) + int(d)/2)/8) < 6e-4 and float(low) <= float(score) <= float(high)

def test_the_games_can_be_read(finished):
    with open(finished[0]/"games/sampling.pgn") as f: games = [g for g in iter(lambda: chess.pgn.read_game(f), None)]
    assert len(games) == 8 and not any(g.errors for g in games)

def test_final_weights_are_those_of_the_last_checkpoint(finished):
    a, b = load_file(finished[0]/"model.safetensors"), load_file(finished[0]/"checkpoint/000004/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_same_command_same_run(finished, tmp_path):
    assert command(*TINY, "--out", tmp_path, "--name", "b").returncode == 0
    assert untimed(tmp_path/"b/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")

def test_killed_and_resumed_equals_never_stopped(finished, tmp_path):
    "SIGKILL after the first checkpoint; --resume repeats what was lost and ends at the same weights."
    process = start(*TINY, "--out", tmp_path, "--name", "k")
    log = tmp_path/"k/metrics.jsonl"
    while not (tmp_path/"k/checkpoint/000002").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.01)
    process.kill(); process.wait()
    with open(log, "a") as f: f.write('{"step": 3, "torn')                                    # as a crash may leave it
    done = command("--resume", tmp_path/"k")
    assert done.returncode == 0, done.stderr
    assert untimed(log) == untimed(finished[0]/"metrics.jsonl")
    a, b = load_file(tmp_path/"k/model.safetensors"), load_file(finished[0]/"model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_resumed_run_keeps_its_settings_and_its_beginning(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path/"r")
    for change in ("--seed", "--init", "--sampler.boards", "--loss.scale"):
        assert main(["--resume", str(tmp_path/"r"), change, "3"]) == 2 and "cannot change" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path/"r"), "--trainer.steps", "6", "--trainer.keep", "5"]) == 0
    assert len(read_metrics(tmp_path/"r/metrics.jsonl")) == 6 and yaml.safe_load((tmp_path/"r/config.yaml").read_text())["trainer"]["steps"] == 6
    assert (tmp_path/"r/start.safetensors").read_bytes() == (finished[0]/"start.safetensors").read_bytes()
    assert "6 of 6 steps" in (tmp_path/"r/report.md").read_text()

def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path/"d")
    state = tmp_path/"d/checkpoint/000004/state.pt"; state.write_bytes(state.read_bytes()[:500])
    assert main(["--resume", str(tmp_path/"d")]) == 0
    assert "trying the one before" in capsys.readouterr().err and untimed(tmp_path/"d/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")
    for p in (tmp_path/"d/checkpoint").glob("*/state.pt"): p.write_bytes(b"x")
    assert main(["--resume", str(tmp_path/"d")]) == 2 and "cannot be read" in capsys.readouterr().err

def test_two_processes_that_cannot_start_say_so_and_end(tmp_path):
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    (tmp_path/"taken").mkdir()
    for args, says in ((["--sampler.boards", "3"], "cannot be shared by 2 processes"), (["--name", "taken"], "exists")):
        out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "grpo_chess.train", *TINY, *args, "--out", str(tmp_path)],
                             env=env, capture_output=True, text=True, timeout=120)
        assert out.returncode != 0 and "error: " in out.stderr and says in out.stderr and "grpo_chess/train.py" not in out.stderr, out.stderr

def test_the_floor_is_played_when_the_run_starts_from_weights(finished, tmp_path):
    cfg, _ = parse([*TINY, "--init", str(finished[0]/"model.safetensors"), "--trainer.steps", "1", "--match.games", "4", "--match.adjudicate", "false", "--match.max_plies", "6", "--out", str(tmp_path), "--name", "f"])
    _, matches = run(cfg, quiet=True)
    assert [m.names[0] for m in matches.values()] == ["new", "new", "new", "untrained"]

def test_the_matches_are_what_their_names_say(monkeypatch):
    monkeypatch.setattr(train, "policy_player", lambda policy, greedy, seed: ("most likely" if greedy else "samples", policy.temperature))
    monkeypatch.setattr(train, "play_match", lambda a, b, *args, names, **kw: (names[0], a, b))
    net, samples, greedy = ChessTransformer(MODELS["tiny"]), ("samples", 1.), ("most likely", 1.)
    assert train.old_against_new(net, net, train.MatchConfig(games=2), None, 0, net) == {
        "sampling at T=1": ("new", samples, samples), "most likely move": ("new", greedy, greedy),
        "against the old one's most likely move, sampling at T=1": ("new", samples, greedy), "floor, sampling at T=1": ("untrained", samples, samples)}

def test_the_match_is_the_final_policy_against_the_first(tmp_path, monkeypatch):
    met = {}
    def spy(new, old, *args): met.update(new=new.state_dict(), old=old.state_dict()); return {}
    monkeypatch.setattr(train, "old_against_new", spy)
    cfg, _ = parse([*TINY, "--match.games", "2", "--match.adjudicate", "false", "--out", str(tmp_path), "--name", "m"])
    folder, _ = run(cfg, quiet=True)
    for who, file in (("new", "model"), ("old", "start")):
        kept = load_file(folder/f"{file}.safetensors")
        assert all(torch.equal(kept[k], met[who][k]) for k in kept)
    assert any(not torch.equal(met["new"][k], met["old"][k]) for k in kept)

def test_the_stronger_side_of_the_match_is_called_new():
    "A policy that takes what hangs beats one that does not, and the score is the new one's."
    torch.manual_seed(0)
    old = ChessTransformer(MODELS["tiny"]).eval()
    class Taker(torch.nn.Module):                     # prefers moves onto squares where an enemy piece stands
        def forward(self, tokens, legal):
            prey = torch.tensor([0., *[0]*6, 1, 3, 3, 5, 9, 0, 0, 5, 0])[tokens[:, :64].long()]
            return (prey.gather(1, torch.as_tensor(ACTION_TO).long()[legal.long().clamp_min(0)])*5).masked_fill(legal < 0, -torch.inf)
    from grpo_chess.engine import EnginePool
    with EnginePool() as pool: m = train.old_against_new(Taker(), old, train.MatchConfig(games=20, max_plies=60, depth=1), pool)
    assert m["sampling at T=1"].interval[0] > .5

def test_change_is_last_minus_first():
    line = train.change([dict(x=float(i)) for i in range(20)], "x")
    assert [c.split("±")[0].strip() for c in line.split("|")[2:5]] == ["0.5", "18.5", "18"]

def test_engines_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    cfg, _ = parse(TINY)
    assert train.engine_share(cfg).processes == 0                       # alone: all cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4"); assert train.engine_share(cfg).processes == 2
    cfg.engine.processes = 3; assert train.engine_share(cfg).processes == 3

def test_ctrl_c_finishes_the_step_and_reports(tmp_path):
    args = [a if a != "4" or TINY[i-1] != "--trainer.steps" else "100000" for i, a in enumerate(TINY)]
    process = start(*args, "--out", tmp_path, "--name", "c")
    while not (tmp_path/"c/metrics.jsonl").exists() or not (tmp_path/"c/metrics.jsonl").read_text(): assert process.poll() is None; time.sleep(.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Stopped by a signal" in out and "--resume" in out, out + err
    rows = read_metrics(tmp_path/"c/metrics.jsonl")
    assert (tmp_path/f"c/checkpoint/{len(rows):06d}").exists() and (tmp_path/"c/report.png").exists()

def test_a_run_ends_with_the_average_of_its_weights(tmp_path, monkeypatch):
    "It is what plays the matches and what is written; a resumed run goes on from both."
    played = []
    monkeypatch.setattr(train, "old_against_new", lambda new, old, *a: played.append([p.detach().clone() for p in new.parameters()]) or {})
    assert main([*TINY, "--match.games", "2", "--match.adjudicate", "false", "--out", str(tmp_path), "--name", "e", "--trainer.ema", ".5"]) == 0
    end, average, last = (load_file(tmp_path/"e"/f) for f in ("model.safetensors", "checkpoint/000004/average.safetensors", "checkpoint/000004/model.safetensors"))
    assert all(torch.equal(end[k], average[k]) for k in end) and any(not torch.equal(end[k], last[k]) for k in end)
    assert sorted(float(p.sum()) for p in played[0]) == pytest.approx(sorted(float(v.sum()) for v in end.values()), abs=1e-5)

def test_time_limit_stops_and_says_so(tmp_path, capsys):
    args = [a if a != "4" or TINY[i-1] != "--trainer.steps" else "100000" for i, a in enumerate(TINY)]
    assert main([*args, "--out", str(tmp_path), "--name", "t", "--minutes", "0.02"]) == 0
    assert "time limit" in capsys.readouterr().out

def test_steps_left_is_what_there_is_time_for():
    assert train.steps_left([0, 1, 2], 100) == math.inf                           # too early to say
    assert train.steps_left([0, 9, 10, 11, 12], 20) == 8 and train.steps_left([0, 9, 10, 11, 12], 20.5) == 9   # the slow first step does not count, and the last one passes the limit
    assert train.steps_left([0, 1, 2, 3], 2) == 1 and train.steps_left([0, 1, 2, 3], math.inf) == math.inf

def test_a_run_that_its_time_limit_ends_has_finished_its_schedules(tmp_path, monkeypatch):
    "A clock that says one second a step."
    clock = iter(range(10**6)); monkeypatch.setattr(train.time, "time", lambda: next(clock))
    args = [a if a != "4" or TINY[i-1] != "--trainer.steps" else "1000" for i, a in enumerate(TINY)]
    assert main([*args, "--out", str(tmp_path), "--name", "t", "--minutes", ".25", "--trainer.warmup", "0", "--trainer.checkpoint_every", "5", "--match.games", "0"]) == 0
    rows = read_metrics(tmp_path/"t/metrics.jsonl")
    assert 10 < len(rows) < 20 and rows[-1]["lr"] < .2*rows[0]["lr"]
    assert sorted(int(p.name) for p in (tmp_path/"t/checkpoint").iterdir()) == [5*((len(rows) - 1)//5), len(rows)]        # one when it is due, one at the end

def test_a_run_that_its_guard_aborts_reports_and_says_why(tmp_path, capsys):
    args = [*TINY, "--guard.entropy_floor", "5", "--guard.floor_action", "abort", "--guard.floor_patience", "3", "--match.games", "2", "--match.adjudicate", "false", "--match.max_plies", "4"]
    assert main([*args, "--out", str(tmp_path), "--name", "g"]) == 3
    out, err = capsys.readouterr()
    says = err.strip().splitlines()[-1]
    assert says.startswith("stopped: Aborted by its guard after 3 of 4 steps: entropy ") and "guard.entropy_floor = 5" in says and "Traceback" not in err
    report = (tmp_path/"g/report.md").read_text()
    assert "Aborted by its guard after 3 of 4 steps" in report and "Guards: step 2, abort" in report and "## New against old" in report and "Aborted" in out
    assert len(read_metrics(tmp_path/"g/metrics.jsonl")) == 3 and (tmp_path/"g/checkpoint/000003").exists() and (tmp_path/"g/model.safetensors").exists()
    assert main(["--resume", str(tmp_path/"g"), "--match.games", "0"]) == 0        # it goes on, and has again the guard's patience
    assert len(read_metrics(tmp_path/"g/metrics.jsonl")) == 4

def test_the_report_tells_what_the_guards_did(tmp_path):
    cfg, _ = parse([*TINY, "--loss.entropy_coef", "0.1", "--guard.entropy_floor", "5", "--guard.floor_patience", "1", "--guard.stop_kl", "1e-9", "--trainer.epochs", "2", "--out", str(tmp_path), "--name", "g"])
    folder, _ = run(cfg, quiet=True)
    line = next(l for l in (folder/"report.md").read_text().splitlines() if l.startswith("Guards:"))
    assert "step 0, boost: entropy_coef 0.1 -> 0.15" in line and re.search(r"ended early in \d steps", line)

def test_a_long_list_of_actions_is_cut():
    rows = [dict(step=i, guard="stop: 1 of 2 updates; boost: x") for i in range(12)] + [dict(step=12, guard=""), dict(step=13)]
    text = train.guard_actions(rows)
    assert text.count("boost") == 10 and "and 2 more" in text and "early in 12 steps" in text and train.guard_actions(rows[12:]) == ""

def test_with_stockfish_and_a_teacher(tmp_path):
    cfg, _ = parse([*TINY, "--reward.judge", "engine", "--reward.depth", "1", "--sampler.teacher_forcing", "0.5", "--sampler.teacher_depth", "1", "--positions.window_cp", "300",
                    "--trainer.steps", "2", "--match.games", "4", "--match.max_plies", "10", "--match.depth", "1", "--out", str(tmp_path), "--name", "e"])
    folder, matches = run(cfg, quiet=True)
    rows = read_metrics(folder/"metrics.jsonl")
    assert len(rows) == 2 and all(r["ratio_error"] < 1e-5 and r["plies"] < 4*4*2 for r in rows) and {len(m.games) for m in matches.values()} == {4}

def test_wandb_works_offline_without_a_login(tmp_path):
    done = command(*TINY, "--trainer.steps", "1", "--track", "wandb", "--out", tmp_path, "--name", "w")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path/"w").rglob("*.wandb"))
