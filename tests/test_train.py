"The command line as a user meets it: bad input, the run folder, resuming, stopping, failing."
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import chess.pgn
import pytest
import torch
import yaml
from runs import ENV, MATCH, TINY, command, long, ranks, start, untimed
from safetensors.torch import load_file

from grpo_chess import arena, train
from grpo_chess.board import ACTION_TO
from grpo_chess.config import MatchConfig, parse, preset
from grpo_chess.engine import EngineError
from grpo_chess.model import MODELS, ChessTransformer, save_model
from grpo_chess.panel import METRICS, read_metrics
from grpo_chess.settings import ConfigError
from grpo_chess.train import NotFinite, Trainer, main, run
from grpo_chess.uci import find_engine

pytestmark = pytest.mark.usefixtures("quick_pictures")

# Bad input: one clear line, exit 2, no traceback

def bad_files(folder):
    "Files that are not what they should be."
    texts = dict(key="sampler: {boards: 4, grup: 8}\n", bad="a: [1\n", list="- 1\n", preset="preset: record\n",
                 empty="trainer:\n", alias="seed: &a [*a]\n", nan="minutes: .nan\n")
    for name, text in texts.items(): (folder/f"{name}.yaml").write_text(text)
    (folder/"bad.fen").write_text(f"{chess.STARTING_FEN}\n8/8/8/8/8/8/8/8 w - - 0 1\n")
    save_model(ChessTransformer(MODELS["tiny"]), folder/"tiny.safetensors")
    (folder/"cut.safetensors").write_bytes((folder/"tiny.safetensors").read_bytes()[:1000])
    (folder/"notes.txt").write_text("I am no engine")
    (folder/"taken").mkdir()

KL = ["--trainer.minibatches", "1"]
BAD = {     # arguments, which may name files of the folder above by {}; what the line says
    "unknown key": (["--sampler.grup", "8"], "sampler.group"),
    "unknown key in a file": (["--config", "{}/key.yaml"], "sampler.group"),
    "short key": (["--boards=8"], "sampler.boards"),
    "not YAML": (["--config", "{}/bad.yaml"], "is not YAML"),
    "a list": (["--config", "{}/list.yaml"], "expected settings"),
    "no such file": (["--config", "{}/none.yaml"], "none.yaml"),
    "a file that names itself": (["--config", "{}/alias.yaml"], "aliases"),
    "a time that is none": (["--config", "{}/nan.yaml"], "minutes = nan"),
    "a huge time": (["--minutes", "1e300"], "minutes = 1e+300"),
    "a huge seed": (["--seed", "9"*26], "too large"),
    "no such preset": (["--preset", "huge"], "tiny"),
    "a preset named in a file": (["--config", "{}/preset.yaml"], "preset"),
    "a section without content": (["--config", "{}/empty.yaml"], "trainer"),
    "negative seed": ([*TINY, "--seed", "-1"], "seed = -1"),
    "no GPU": ([*TINY, "--accelerator", "cuda"], "no GPU"),
    "float16 without a GPU": ([*TINY, "--trainer.precision", "16-mixed"], "16-mixed"),
    "a penalty that does nothing": ([*TINY, *KL, "--loss.kl_coef", "0.1"], "does nothing"),
    "a boost of nothing": ([*TINY, "--loss.entropy_coef", "0", "--guard.entropy_floor", "1.5"],
                           "loss.entropy_coef = 0.0"),
    "a controller of nothing": ([*TINY, "--guard.kl_controller", "multiplicative"], "loss.kl_coef = 0.0"),
    "a controller that sees nothing": (
        [*TINY, *KL, "--loss.kl_coef", "0.01", "--loss.kl", "k1", "--guard.kl_controller", "multiplicative",
         "--guard.controller_kl", "k1"], "reads 0 at every step"),
    "a stop that cannot stop": ([*TINY, *KL, "--guard.stop_kl", "0.02"], "only one update"),
    "a guard's wrong choice": (["--guard.floor_action", "cry"], "boost, rollback, abort"),
    "a temperature of almost nothing": ([*TINY, "--sampler.temperature", "1e-40"], "sampler.temperature"),
    "another preset for a resumed run": (["--resume", "{}/none", "--preset", "record"], "--preset"),
    "a value without its key": (["huge"], "huge"),
    "out of range": ([*TINY, "--sampler.group", "1"], "sampler.group = 1"),
    "not a number": (["--trainer.lr", "fast"], "trainer.lr"),
    "a key without its value": (["--trainer.lr"], "trainer.lr"),
    "wrong choice": (["--loss.scale", "max"], "none, std, rms"),
    "odd games": (["--match.games", "3"], "match.games = 3"),
    "FEN that is no position": ([*TINY, "--positions.file", "{}/bad.fen"], "line 2"),
    "FEN file that is absent": ([*TINY, "--positions.file", "{}/none.fen"], "none.fen"),
    "weights of another shape": ([*TINY, "--init", "{}/tiny.safetensors"], "another shape"),
    "weights cut short": ([*TINY, "--init", "{}/cut.safetensors"], "cut.safetensors"),
    "weights that are absent": ([*TINY, "--init", "{}/none.safetensors"], "none.safetensors"),
    "run folder exists": ([*TINY, "--name", "taken"], "exists"),
    "a name that leaves its folder": ([*TINY, "--name", "../away"], "--out"),
    "a name that is a path": ([*TINY, "--name", "{}/away"], "--out"),
    "resume what is not there": (["--resume", "{}/none"], "none"),
    "resume what is no run": (["--resume", "{}/taken"], "cannot read"),
    "engine that is no engine": ([*TINY, "--reward.judge", "engine", "--engine.path", "{}/notes.txt"], "notes.txt"),
    "others that are no players": ([*TINY, *MATCH, "--match.others", "weak:levle=0"], "'levle'"),
    "others with weights": ([*TINY, *MATCH, "--match.others", "random tiny"], "tiny is no player without weights"),
    "others that are absent": ([*TINY, *MATCH, "--match.others", "engine:path={}/fish,depth=1"], "fish"),
    "engine path that is absent": ([*TINY, "--reward.judge", "engine", "--engine.path", "{}/fish"], "fish"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, capsys):
    bad_files(tmp_path)
    args, says = BAD[case]
    status = main([*(a.replace("{}", str(tmp_path)) for a in args), "--out", str(tmp_path)])
    err = capsys.readouterr().err.strip()
    assert status == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and says in err, err
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["taken"], "a run folder was left behind"

def test_bad_input_has_an_exit_status_and_no_traceback(tmp_path):
    process = start("--sampler.grup", 8, "--out", tmp_path)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err

def test_the_command_ends_its_process_group(tmp_path, capsys):
    "Left to the interpreter's exit, a process of torchrun aborts now and then; also after an error."
    import torch.distributed as dist
    short = [*TINY, "--trainer.steps", "1", "--out", str(tmp_path)]
    for args, status in ((short, 0), (["--resume", str(tmp_path/"no")], 2)):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try: assert main(args) == status and not dist.is_initialized()
        finally:
            if dist.is_initialized(): dist.destroy_process_group()

# A run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    done = command(*TINY, "--out", out, "--name", "a", *MATCH)
    assert done.returncode == 0, done.stderr
    return out/"a", done

def test_the_folder_holds_what_it_should(finished):
    folder, done = finished
    have = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    files = ("model.safetensors", "state.pt", "SHA256SUMS")
    states = {f"checkpoint/{s}/{f}" for s in ("000002", "000004") for f in files}
    assert have == states | {"config.yaml", "run.json", "start.safetensors", "metrics.jsonl", "report.md", "report.png",
                             "report.html", "model.safetensors", "games/sampling.pgn", "games/most.pgn"}
    rows = read_metrics(folder/"metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and all(set(r) == set(METRICS) for r in rows)
    assert (folder/"report.png").read_bytes()[:4] == b"\x89PNG"

def test_strength_is_printed_with_games_and_interval(finished):
    folder, done = finished
    for text in (done.stdout, (folder/"report.md").read_text()):
        lines = re.findall(r"new - old: 8 games \+(\d+) =(\d+) -(\d+), score (\S+) \[(\S+), (\S+)\], Elo", text)
        assert len(lines) == 2 and "not played yet" not in text
        for *counts, score, lower, upper in lines:
            wins, draws, losses = map(int, counts)
            assert wins + draws + losses == 8 and abs(float(score) - (wins + draws/2)/8) < 6e-4
            assert float(lower) <= float(score) <= float(upper)

def test_the_games_can_be_read(finished):
    with open(finished[0]/"games/sampling.pgn") as f: games = [*iter(lambda: chess.pgn.read_game(f), None)]
    assert len(games) == 8 and not any(g.errors for g in games)

def test_final_weights_are_those_of_the_last_checkpoint(finished):
    end, last = (load_file(finished[0]/f) for f in ("model.safetensors", "checkpoint/000004/model.safetensors"))
    assert all(torch.equal(end[k], last[k]) for k in end)

def test_same_command_same_run(finished, tmp_path):
    assert main([*TINY, "--out", str(tmp_path), "--name", "b"]) == 0
    assert untimed(tmp_path/"b/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")

def test_the_floor_is_played_when_the_run_starts_from_weights(finished, tmp_path):
    args = [*TINY, *MATCH, "--init", str(finished[0]/"model.safetensors"), "--trainer.steps", "1", "--match.games", "4"]
    result = run(parse([*args, "--match.max_plies", "6", "--out", str(tmp_path), "--name", "f"])[0], quiet=True)
    assert [m.names[0] for m in result.matches.values()] == ["new", "new", "new", "untrained"]

def test_a_run_says_what_it_gained_against_others(tmp_path):
    "Stockfish is started for them, though it neither judges nor calls a game."
    args = [*TINY, *MATCH, "--trainer.steps", "1", "--out", str(tmp_path), "--name", "o"]
    result = run(parse([*args, "--match.others", "weak:level=0,errs=0.5 random"])[0], quiet=True)
    assert list(result.matches)[2:] == [f"{who} against {name}" for name in ("weak:level=0,errs=0.5", "random")
                                        for who in ("old", "new")]
    assert result.text.index("**Against others:**") < result.text.index("**Too few games")
    for text in (result.text, (tmp_path/"o/report.md").read_text()): assert "| random moves (`random`) |" in text
    assert "<h2>Against others</h2>" in (tmp_path/"o/report.html").read_text()
    assert (tmp_path/"o/games/other-2-new.pgn").exists()

def test_others_are_nobody_where_no_match_is_played(tmp_path):
    args = [*TINY, "--trainer.steps", "1", "--match.others", "weak:level=0", "--out", str(tmp_path), "--name", "n"]
    assert main(args) == 0 and "Against" not in (tmp_path/"n/report.md").read_text()

def test_the_match_is_the_final_policy_against_the_first(tmp_path, monkeypatch):
    met = {}
    def spy(new, old, *args):
        met.update(new=new.state_dict(), old=old.state_dict())
        return iter(())
    monkeypatch.setattr(train, "matches_of", spy)
    result = run(parse([*TINY, *MATCH, "--out", str(tmp_path), "--name", "m"])[0], quiet=True)
    for who, file in (("new", "model"), ("old", "start")):
        kept = load_file(result.folder/f"{file}.safetensors")
        assert all(torch.equal(kept[k], met[who][k]) for k in kept)
    assert any(not torch.equal(met["new"][k], met["old"][k]) for k in kept)

def test_the_stronger_side_of_the_match_is_called_new():
    "A policy that takes what hangs beats one that does not, and the score is the new one's."
    torch.manual_seed(0)
    old = ChessTransformer(MODELS["tiny"]).eval()
    class Taker(torch.nn.Module):                     # prefers moves onto squares where an enemy piece stands
        def forward(self, tokens, legal):
            prey = torch.tensor([0., *[0]*6, 1, 3, 3, 5, 9, 0, 0, 5, 0])[tokens[:, :64].long()]
            taken = prey.gather(1, torch.as_tensor(ACTION_TO).long()[legal.long().clamp_min(0)])
            return (taken*5).masked_fill(legal < 0, -torch.inf)
    from grpo_chess.engine import EnginePool
    cfg = MatchConfig(games=20, max_plies=60, depth=1)
    with EnginePool() as pool: found = dict(train.matches_of(Taker(), old, cfg, pool))
    assert found["sampling at T=1"].interval[0] > .5

def test_engines_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(train, "usable_cores", lambda: 8)
    cfg, _ = parse(TINY)
    assert train.engine_share(cfg).processes == 8                       # alone: all cores that the quota leaves
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.engine_share(cfg).processes == 2
    cfg.engine.processes = 3
    assert train.engine_share(cfg).processes == 3

def test_a_run_ends_with_the_average_of_its_weights(tmp_path, monkeypatch):
    "It is what plays the matches and what is written; a resumed run goes on from both."
    played = []
    def spy(new, old, *args):
        played.append({k: v.clone() for k, v in new.state_dict().items()})
        return iter(())
    monkeypatch.setattr(train, "matches_of", spy)
    assert main([*TINY, *MATCH, "--out", str(tmp_path), "--name", "e", "--trainer.ema", ".5"]) == 0
    files = "model", "checkpoint/000004/average", "checkpoint/000004/model"
    end, average, model = (load_file(tmp_path/f"e/{file}.safetensors") for file in files)
    assert all(torch.equal(end[k], average[k]) for k in end) and any(not torch.equal(end[k], model[k]) for k in end)
    assert all(torch.equal(end[k], played[0][k]) for k in end)

def test_with_stockfish_and_a_teacher(tmp_path):
    cfg, _ = parse([
        *TINY, "--reward.judge", "engine", "--reward.depth", "1", "--sampler.teacher_forcing", "0.5",
        "--sampler.teacher_depth", "1", "--positions.window_cp", "300", "--trainer.steps", "2", "--match.games", "4",
        "--match.max_plies", "10", "--match.depth", "1", "--out", str(tmp_path), "--name", "e"])
    result = run(cfg, quiet=True)
    assert len(result.rows) == 2 and all(r["ratio_error"] < 1e-5 and r["plies"] < 4*4*2 for r in result.rows)
    assert {len(m.games) for m in result.matches.values()} == {4} and "Stockfish" in result.text

# Several processes

def torchrun(*args):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launch, "-m", "grpo_chess.train", *map(str, args)], env=ENV, capture_output=True, text=True,
                          timeout=300)

def test_two_processes_that_cannot_start_say_so_and_end(tmp_path):
    (tmp_path/"taken").mkdir()
    taken = torchrun(*TINY, "--name", "taken", "--out", tmp_path)
    odd = ranks(2, *TINY, "--sampler.boards", "3", "--out", tmp_path, folder=tmp_path)
    assert taken.returncode == 1 and odd.returncode == [2, 2]
    for said, says in ((taken.stderr, "exists"), (odd.stderr, "cannot be shared by 2 processes")):
        assert "error: " in said and says in said and "grpo_chess/train.py" not in said, said

def test_the_second_process_does_not_wait_for_the_matches(tmp_path):
    "The first one plays alone, and the run ends well."
    out = ranks(2, *TINY, *MATCH, "--out", tmp_path, "--name", "two", folder=tmp_path)
    assert out.returncode == [0, 0], out.stderr
    assert out.stdout.count("## New against old") == 1 and len(read_metrics(tmp_path/"two/metrics.jsonl")) == 4

# Resuming

def test_killed_and_resumed_equals_never_stopped(finished, tmp_path):
    "SIGKILL after the first checkpoint; --resume repeats what was lost and ends at the same weights."
    process = start(*TINY, "--out", tmp_path, "--name", "k")
    log = tmp_path/"k/metrics.jsonl"
    while not (tmp_path/"k/checkpoint/000002").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.01)
    process.kill()
    process.wait()
    with open(log, "a") as f: f.write('{"step": 3, "torn')                                    # as a crash may leave it
    assert main(["--resume", str(tmp_path/"k")]) == 0
    assert untimed(log) == untimed(finished[0]/"metrics.jsonl")
    resumed, whole = load_file(tmp_path/"k/model.safetensors"), load_file(finished[0]/"model.safetensors")
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)

def test_a_resumed_run_keeps_its_settings_and_its_beginning(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path/"r")
    for change in ("--seed", "--init", "--sampler.boards", "--loss.scale"):
        assert main(["--resume", str(tmp_path/"r"), change, "3"]) == 2 and "cannot change" in capsys.readouterr().err
    more = ["--trainer.steps", "6", "--trainer.keep", "5", "--match.games", "0"]
    assert main(["--resume", str(tmp_path/"r"), *more]) == 0
    assert len(read_metrics(tmp_path/"r/metrics.jsonl")) == 6
    assert yaml.safe_load((tmp_path/"r/config.yaml").read_text())["trainer"]["steps"] == 6
    assert (tmp_path/"r/start.safetensors").read_bytes() == (finished[0]/"start.safetensors").read_bytes()
    assert "6 of 6 steps" in (tmp_path/"r/report.md").read_text()

def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path/"d")
    again = ["--resume", str(tmp_path/"d"), "--match.games", "0"]
    state = tmp_path/"d/checkpoint/000004/state.pt"
    state.write_bytes(state.read_bytes()[:500])
    assert main(again) == 0 and "trying the one before" in capsys.readouterr().err
    assert untimed(tmp_path/"d/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")
    for p in (tmp_path/"d/checkpoint").glob("*/state.pt"): p.write_bytes(b"x")
    assert main(again) == 2 and "not as it was written" in capsys.readouterr().err

def test_a_flipped_bit_anywhere_changes_no_run(finished, tmp_path, capsys):
    "The newest checkpoint is set aside, a row is left out and said to be, the rest is refused in one line."
    def damaged(file):
        folder = tmp_path/file.replace("/", "-")
        shutil.copytree(finished[0], folder)
        data = bytearray((folder/file).read_bytes())
        data[len(data)//2] ^= 16
        (folder/file).write_bytes(data)
        status = main(["--resume", str(folder), "--match.games", "0"])
        return folder, status, capsys.readouterr().err.strip()
    for file in ("model.safetensors", "state.pt", "SHA256SUMS"):
        folder, status, err = damaged(f"checkpoint/000004/{file}")
        assert status == 0 and "trying the one before it" in err and (folder/"checkpoint/000004.damaged").exists()
        assert untimed(folder/"metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")
        assert (folder/"model.safetensors").read_bytes() == (finished[0]/"model.safetensors").read_bytes()
    folder, status, err = damaged("metrics.jsonl")
    assert status == 0 and "1 of 4 rows are damaged or missing" in err and (folder/"metrics.jsonl.damaged").exists()
    assert len(read_metrics(folder/"metrics.jsonl")) == 3 and "4 of 4 steps" in (folder/"report.md").read_text()
    for file in ("config.yaml", "run.json", "start.safetensors"):
        folder, status, err = damaged(file)
        assert status == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err

def test_a_run_without_a_checkpoint_begins_again(finished, tmp_path, capsys):
    "It was neither resumable nor new. One whose checkpoints were deleted is another matter."
    for name, rows in (("killed", 1), ("deleted", 4)):
        shutil.copytree(finished[0], tmp_path/name)
        shutil.rmtree(tmp_path/name/"checkpoint")
        log = tmp_path/name/"metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(True)[:rows]))
    assert main(["--resume", str(tmp_path/"killed"), "--match.games", "0"]) == 0
    assert untimed(tmp_path/"killed/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")
    assert main(["--resume", str(tmp_path/"deleted")]) == 2
    assert "no checkpoint to resume from, and 4 steps in its log" in capsys.readouterr().err
    assert len(read_metrics(tmp_path/"deleted/metrics.jsonl")) == 4

def test_memory_is_released_with_every_checkpoint(tmp_path, monkeypatch):
    "What is free between blocks would creep up over hours: 113 MiB an hour, once."
    released = []
    monkeypatch.setattr(train, "release_memory", lambda: released.append(len(read_metrics(tmp_path/"m/metrics.jsonl"))))
    args = [*TINY, "--trainer.steps", "5", "--trainer.checkpoint_every", "2", "--out", str(tmp_path), "--name", "m"]
    run(parse(args)[0], quiet=True)
    assert released == [2, 4, 5]

def test_a_long_run_keeps_its_rows_on_the_disk(tmp_path, monkeypatch):
    "The report reads every so-manyth of them, with the plies and the seconds of those between."
    monkeypatch.setattr(train, "LONG", 5)
    held, left = [], train.steps_left
    monkeypatch.setattr(train, "steps_left", lambda ends, limit: (held.append(len(ends)), left(ends, limit))[1])
    result = run(parse([*TINY, "--trainer.steps", "15", "--out", str(tmp_path), "--name", "l"])[0], quiet=True)
    every = read_metrics(tmp_path/"l/metrics.jsonl")
    assert len(every) == 15 and [r["step"] for r in result.rows] == [0, 3, 6, 9, 12]
    assert len(held) >= 15 and max(held) == 11                  # times of steps: not one more for every step
    assert sum(r["plies"] for r in result.rows) == sum(r["plies"] for r in every)
    monkeypatch.setattr(train, "FEW", 4)
    log = train.Log(tmp_path/"l", preset(), 12)
    assert [r["step"] for r in log.rows] == [0, 4, 8, 11]

def test_nothing_that_a_run_leaves_names_its_user(tmp_path, monkeypatch):
    "No home, no user, no machine, no secret of the environment; paths below the home begin with ~."
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123456789")
    assert main([*TINY, *MATCH, "--out", f"{tmp_path}/runs", "--name", "n"]) == 0
    words = [str(tmp_path).encode(), b"secret-0123456789", os.uname().nodename.encode()]
    words = [w for w in words if len(w) > 3]                                # two letters stand in any picture
    for path in (tmp_path/"runs").rglob("*"):
        if path.is_file(): assert not [w for w in words if w in path.read_bytes()], path
    assert "out: ~/runs" in (tmp_path/"runs/n/config.yaml").read_text()
    assert main(["--resume", str(tmp_path/"runs/n"), "--match.games", "0"]) == 0

def test_a_report_names_no_home(tmp_path, monkeypatch):
    "Weights and engines that lie there are told of in reports, games and results; they are found again by those names."
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"engine").symlink_to(find_engine("stockfish"))
    assert main([*TINY, "--out", f"{tmp_path}/runs", "--name", "a"]) == 0
    start, engine = f"{tmp_path}/runs/a/model.safetensors", f"engine:path={tmp_path}/engine,depth=1"
    args = [*TINY, *MATCH, "--match.games", "4", "--init", start, "--match.others", f"{engine} random"]
    assert main([*args, "--out", f"{tmp_path}/runs", "--name", "b"]) == 0
    said = (tmp_path/"runs/b/report.md").read_text()
    assert "Old is what ~/runs/a/model.safetensors held" in said and "(`engine:path=~/engine,depth=1`) |" in said
    assert arena.main(["--a", start, "--b", engine, "--games", "16", "--floor", "false", "--judge.on", "false",
                       "--max_plies", "10", "--pgn", f"{tmp_path}/runs/x.pgn", "--json", f"{tmp_path}/runs/x"]) == 0
    assert "~/engine" in (tmp_path/"runs/x.pgn").read_text()
    for path in (tmp_path/"runs").rglob("*"):
        if path.is_file(): assert str(tmp_path).encode() not in path.read_bytes(), path
    assert main(["--resume", f"{tmp_path}/runs/b", "--trainer.steps", "5"]) == 0            # by ~

def test_a_run_asks_no_network(tmp_path, monkeypatch):
    import socket
    def refused(*args, **kw): raise AssertionError("a run opened a connection")
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, refused)
    assert main([*TINY, *MATCH, "--out", str(tmp_path), "--name", "n"]) == 0

def test_settings_that_were_cut_short_are_refused(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path/"c")
    config = tmp_path/"c/config.yaml"
    config.write_text(config.read_text()[:200])
    assert main(["--resume", str(tmp_path/"c")]) == 2 and "not as its run wrote it" in capsys.readouterr().err
    assert config.stat().st_size == 200

def judged(folder, *args):
    "A run of two steps that asks Stockfish."
    return [*TINY, "--reward.judge", "engine", "--reward.depth", "1", "--trainer.steps", "2", "--out",
            str(folder.parent), "--name", folder.name, *args]

def test_a_resumed_run_has_the_engine_that_it_began_with(tmp_path, capsys):
    "The same engine elsewhere will do; another one, and other answers of the same one, will not."
    from grpo_chess.engine import find_engine
    folder, more = tmp_path/"e", ["--trainer.steps", "3", "--match.games", "0"]
    assert main(judged(folder)) == 0
    assert json.loads((folder/"run.json").read_text())["engine"].startswith("Stockfish")
    fake = tmp_path/"other"
    fake.write_text(f"#!/bin/sh\nexec {find_engine()} | sed -u 's/^id name .*/id name Otherfish 3/'\n")
    fake.chmod(0o755)
    before = (folder/"config.yaml").read_text()
    capsys.readouterr()
    for change, says in ((["--engine.path", str(fake)], "Otherfish 3"), (["--reward.depth=2"], "cannot change"),
                         (["--engine.deterministic=false"], "cannot change")):
        assert main(["--resume", str(folder), *more, *change]) == 2
        err = capsys.readouterr().err.strip()
        assert says in err and len(err.splitlines()) == 1, err
    assert (folder/"config.yaml").read_text() == before and len(read_metrics(folder/"metrics.jsonl")) == 2
    same = ["--engine.path", str(find_engine()), "--engine.processes", "1", "--engine.timeout", "50"]
    assert main(["--resume", str(folder), *more, *same]) == 0 and len(read_metrics(folder/"metrics.jsonl")) == 3

def test_a_resumed_run_has_the_precision_that_it_began_with(tmp_path, monkeypatch):
    "What auto means may differ between two machines; the run's own precision goes on."
    seen, make_fabric = [], train.make_fabric
    def spy(precision, accelerator):
        seen.append(precision)
        return make_fabric("bf16-mixed" if precision == "auto" else precision, accelerator)
    monkeypatch.setattr(train, "make_fabric", spy)
    assert main([*TINY, "--out", str(tmp_path), "--name", "p"]) == 0
    assert json.loads((tmp_path/"p/run.json").read_text())["precision"] == "bf16-mixed"
    assert main(["--resume", str(tmp_path/"p"), "--trainer.steps", "5"]) == 0 and seen == ["auto", "bf16-mixed"]
    (tmp_path/"p/run.json").write_text('{"engine": "", "precision": ')
    assert main(["--resume", str(tmp_path/"p")]) == 2

def clock(monkeypatch, step=1.):
    "A clock that goes on by so many seconds with each step of training, whoever looks at it."
    now, train_step = [1000.], Trainer.step
    def stepped(self):
        now[0] += step
        return train_step(self)
    monkeypatch.setattr(Trainer, "step", stepped)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    return now

def ending_after(monkeypatch, n, number=signal.SIGINT):
    "A signal in step `n`."
    class Interrupted(Trainer):
        def step(self):
            if self.done == n: signal.raise_signal(number)
            row = super().step()
            return row | dict(seconds=1.)                       # as the clock has it
    monkeypatch.setattr(train, "Trainer", Interrupted)

def test_a_run_that_its_time_limit_ends_has_finished_its_schedules(tmp_path, monkeypatch):
    clock(monkeypatch)
    args = [*long(steps=1000), "--trainer.warmup", "0", "--trainer.checkpoint_every", "5"]
    assert main([*args, "--out", str(tmp_path), "--name", "t", "--minutes", ".25"]) == 0
    rows = read_metrics(tmp_path/"t/metrics.jsonl")
    assert 10 < len(rows) < 20 and rows[-1]["lr"] < .2*rows[0]["lr"]
    kept = sorted(int(p.name) for p in (tmp_path/"t/checkpoint").iterdir())
    assert kept == [5*((len(rows) - 1)//5), len(rows)]                          # one on its turn, one at the end

def test_a_resumed_run_that_is_short_of_time_keeps_its_schedule(tmp_path, monkeypatch):
    "The time that was spent counts, and the schedule goes on from its place: as if it had never been stopped."
    args = [*long(steps=1000), "--trainer.warmup", "0", "--minutes", ".5", "--out", str(tmp_path), "--name"]
    rows = {}
    for name, stop in (("whole", -1), ("parts", 12)):
        clock(monkeypatch)
        ending_after(monkeypatch, stop)
        assert main([*args, name]) == (0 if stop < 0 else 130)
        clock(monkeypatch)
        ending_after(monkeypatch, -1)
        if stop > 0: assert main(["--resume", str(tmp_path/name)]) == 0
        rows[name] = read_metrics(tmp_path/name/"metrics.jsonl")
    whole, parts = ([r["lr"] for r in rows[name]] for name in ("whole", "parts"))
    assert abs(len(whole) - len(parts)) <= 2 and len(whole) < 40
    assert parts[:13] == whole[:13] and all(a > b for a, b in zip(parts, parts[1:]))        # it never goes back up
    assert parts[13] == pytest.approx(whole[13], rel=.1) and parts[-1] < .1*parts[0]

def test_a_run_without_time_left_says_so_and_can_have_more(tmp_path, monkeypatch, capsys):
    clock(monkeypatch)
    args = [*long(steps=1000), "--minutes", ".25", "--out", str(tmp_path), "--name", "t"]
    assert main(args) == 0
    made = len(read_metrics(tmp_path/"t/metrics.jsonl"))
    capsys.readouterr()
    assert main(["--resume", str(tmp_path/"t")]) == 0 and "time limit of 0.25 minutes" in capsys.readouterr().out
    assert len(read_metrics(tmp_path/"t/metrics.jsonl")) == made
    assert main(["--resume", str(tmp_path/"t"), "--minutes", ".5"]) == 0
    assert made + 8 < len(read_metrics(tmp_path/"t/metrics.jsonl")) < made + 25

def test_the_time_of_day_may_jump(tmp_path, monkeypatch):
    hours = iter(range(10**9, 10**10, 3600))
    monkeypatch.setattr(train.time, "time", lambda: next(hours))
    assert main([*TINY, "--minutes", "30", "--out", str(tmp_path), "--name", "t"]) == 0
    assert len(read_metrics(tmp_path/"t/metrics.jsonl")) == 4

def test_steps_left_is_what_there_is_time_for():
    assert train.steps_left([0, 1, 2], 100) == math.inf                           # too early to say
    assert train.steps_left([0, 9, 10, 11, 12], 20) == 8                          # the slow first step does not count
    assert train.steps_left([0, 9, 10, 11, 12], 20.5) == 9                        # and the last one passes the limit
    assert train.steps_left([0, 1, 2, 3], 2) == 1 and train.steps_left([0, 1, 2, 3], math.inf) == math.inf
    assert train.ends_before(100., [dict(seconds=s) for s in (9, 1, 2, 3)]) == [85., 94., 95., 97., 100.]
    assert train.ends_before(100., []) == []

# One process a folder

def test_a_folder_belongs_to_one_process(tmp_path, capsys):
    folder = tmp_path/"one"
    process = start(*long(), "--out", tmp_path, "--name", "one")
    wait_for(process, lambda: (folder/"checkpoint").exists())
    for args in (["--resume", str(folder)], [*TINY, "--out", str(tmp_path), "--name", "one"]):
        assert main(args) == 2
        err = capsys.readouterr().err.strip()
        assert len(err.splitlines()) == 1 and ("another process is working" in err or "exists" in err), err
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert main(["--resume", str(folder), "--trainer.steps", "1"]) == 0             # the lock went with its process

def test_two_runs_that_begin_in_one_folder_are_one(tmp_path):
    "Both found nothing there; the second one to make it is refused."
    cfg, known = preset("scratch"), dict(engine="")
    net = ChessTransformer(MODELS["tiny"])
    train.open_run(tmp_path/"x", cfg, net, known, True)
    with pytest.raises(train.RunError, match="another process has just begun"):
        train.open_run(tmp_path/"x", cfg, net, known, True)

# Stopping

def wait_for(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(.02)

def check_stopped(folder, out, err):
    "A run that a signal stopped between two steps."
    assert "Stopped by a signal" in out and "--resume" in out, out + err
    assert err.strip().splitlines()[-1].startswith("stopped: Stopped by a signal") and "Traceback" not in err
    rows = read_metrics(folder/"metrics.jsonl")
    assert (folder/f"checkpoint/{len(rows):06d}").exists() and (folder/"report.png").exists()
    assert (folder/"model.safetensors").exists()
    report = (folder/"report.md").read_text()
    assert "New against old" not in report and "not played" not in report and not [*(folder/"games").iterdir()]

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_and_reports_and_plays_nothing(name, tmp_path, monkeypatch, capsys):
    ending_after(monkeypatch, 2, getattr(signal, name))
    assert main([*long(), *MATCH, "--out", str(tmp_path), "--name", "c"]) == 130
    assert len(read_metrics(tmp_path/"c/metrics.jsonl")) == 3
    check_stopped(tmp_path/"c", *capsys.readouterr())

def test_a_signal_from_outside_does_the_same(tmp_path):
    process, log = start(*long(), *MATCH, "--out", tmp_path, "--name", "c"), tmp_path/"c/metrics.jsonl"
    wait_for(process, lambda: log.exists() and log.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    check_stopped(tmp_path/"c", out, err)

@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_between_two_matches_keeps_the_first(name, tmp_path, monkeypatch, capsys):
    matches_of = train.matches_of
    def interrupted(*args):
        yield next(matches_of(*args))
        signal.raise_signal(getattr(signal, name))
    monkeypatch.setattr(train, "matches_of", interrupted)
    assert main([*TINY, *MATCH, "--match.games", "16", "--out", str(tmp_path), "--name", "m"]) == 130
    report = (tmp_path/"m/report.md").read_text()
    assert "The matches were stopped by a signal." in report and report.count("new - old: 16 games") == 1
    assert "stopped: All 4 steps were done. The matches were stopped" in capsys.readouterr().err

def test_a_signal_during_a_match_costs_the_matches_only(tmp_path):
    process = start(*TINY, *MATCH, "--match.games", "20000", "--out", tmp_path, "--name", "m")
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    wait_for(process, lambda: any("playing new against old" in line for line in lines))
    folder = tmp_path/"m"
    assert (folder/"model.safetensors").exists() and "not played yet" in (folder/"report.md").read_text()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    reader.join(timeout=10)
    report, err = (folder/"report.md").read_text(), process.stderr.read()
    assert process.returncode == 130 and "The matches were stopped by a signal." in report, err
    assert "All 4 steps were done." in report and "not played yet" not in report and "Traceback" not in err
    assert load_file(folder/"model.safetensors")

@pytest.mark.parametrize("error, status", [(EngineError("the engine died"), 2), (OSError(28, "No space left"), 2)])
def test_an_error_during_the_matches_costs_the_matches_only(error, status, finished, tmp_path, monkeypatch, capsys):
    matches_of = train.matches_of
    def fails(*args):
        yield next(matches_of(*args))
        raise error
    monkeypatch.setattr(train, "matches_of", fails)
    assert main([*TINY, *MATCH, "--match.games", "16", "--out", str(tmp_path), "--name", "m"]) == status
    report = (tmp_path/"m/report.md").read_text()
    assert "The matches failed: " in report and report.count("new - old: 16 games") == 1        # the first was finished
    assert "Traceback" not in capsys.readouterr().err
    end, whole = load_file(tmp_path/"m/model.safetensors"), load_file(finished[0]/"model.safetensors")
    assert all(torch.equal(end[k], whole[k]) for k in end) and (tmp_path/"m/report.png").exists()

def test_time_limit_stops_and_says_so(tmp_path, capsys):
    assert main([*long(), "--out", str(tmp_path), "--name", "t", "--minutes", "0.02"]) == 0
    assert "time limit" in capsys.readouterr().out

@pytest.mark.draws
def test_a_run_that_its_guard_aborts_reports_and_says_why(tmp_path, capsys):
    guard = ["--guard.entropy_floor", "5", "--guard.floor_action", "abort", "--guard.floor_patience", "3"]
    match = [*MATCH, "--match.games", "2", "--match.max_plies", "4"]
    assert main([*TINY, *guard, *match, "--out", str(tmp_path), "--name", "g"]) == 3
    out, err = capsys.readouterr()
    says = err.strip().splitlines()[-1]
    assert says.startswith("stopped: Aborted by its guard after 3 of 4 steps: entropy ") and "Traceback" not in err
    assert "guard.entropy_floor = 5" in says and "Aborted" in out
    report = (tmp_path/"g/report.md").read_text()
    assert "Aborted by its guard after 3 of 4 steps" in report and "Guards: step 2, abort" in report
    assert "## New against old" in report and len(read_metrics(tmp_path/"g/metrics.jsonl")) == 3
    assert (tmp_path/"g/checkpoint/000003").exists() and (tmp_path/"g/model.safetensors").exists()
    assert main(["--resume", str(tmp_path/"g"), "--match.games", "0"]) == 0     # with the guard's patience anew
    assert len(read_metrics(tmp_path/"g/metrics.jsonl")) == 4

@pytest.mark.draws
def test_the_report_tells_what_the_guards_did(tmp_path):
    guard = ["--loss.entropy_coef", "0.1", "--guard.entropy_floor", "5", "--guard.floor_patience", "1",
             "--guard.stop_kl", "1e-9", "--trainer.epochs", "2"]
    result = run(parse([*TINY, *guard, "--out", str(tmp_path), "--name", "g"])[0], quiet=True)
    line = next(s for s in (result.folder/"report.md").read_text().splitlines() if s.startswith("Guards:"))
    assert "step 0, boost: entropy_coef 0.1 -> 0.15" in line and re.search(r"ended early in \d steps", line)

# Failing

def failing(monkeypatch, error, at=2):
    "A trainer whose step number `at` fails."
    class Failing(Trainer):
        def step(self):
            if self.done == at: raise error
            return super().step()
    monkeypatch.setattr(train, "Trainer", Failing)

FAILURES = [NotFinite("step 2: loss nan"), EngineError("no engine\nanswers"), OSError(28, "No space left")]

@pytest.mark.parametrize("error", FAILURES)
def test_a_run_that_fails_reports_how_far_it_came(error, finished, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert main([*TINY, *MATCH, "--out", str(tmp_path), "--name", "f"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("error: ")
    report = (tmp_path/"f/report.md").read_text()
    assert "Failed after 2 of 4 steps: " in report and "2 of 4 steps, B=4" in report and "## What changed" in report
    files = tmp_path/"f/model.safetensors", finished[0]/"checkpoint/000002/model.safetensors"
    kept, then = map(load_file, files)
    assert all(torch.equal(kept[k], then[k]) for k in kept)                  # what it had after two steps
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path/"f"), "--match.games", "0"]) == 0
    assert untimed(tmp_path/"f/metrics.jsonl") == untimed(finished[0]/"metrics.jsonl")

@pytest.mark.draws
def test_a_bug_of_ours_reports_too_and_keeps_its_traceback(tmp_path, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("oops"), at=1)
    with pytest.raises(ZeroDivisionError): main([*TINY, "--out", str(tmp_path), "--name", "f"])
    assert "Failed after 1 of 4 steps: oops" in (tmp_path/"f/report.md").read_text()

@pytest.mark.draws
def test_weights_that_play_no_numbers_are_kept_nowhere(tmp_path, monkeypatch, capsys):
    "Neither as the newest checkpoint nor as what the run ends with; the last good checkpoint stands."
    class Broken(Trainer):
        def step(self):
            if self.done == 3:
                for p in self.model.parameters(): p.data.fill_(math.nan)
            return super().step()
    monkeypatch.setattr(train, "Trainer", Broken)
    assert main([*TINY, "--out", str(tmp_path), "--name", "n"]) == 2
    assert "Failed after 3 of 4 steps" in (tmp_path/"n/report.md").read_text()
    assert [p.name for p in (tmp_path/"n/checkpoint").iterdir()] == ["000002"]
    assert not (tmp_path/"n/model.safetensors").exists()

# Tracking

def test_wandb_works_offline_without_a_login_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    import wandb
    began, init = [], wandb.init
    def spy(**settings):
        began.append((settings["id"], settings["resume"]))
        return init(**settings)
    monkeypatch.setattr(wandb, "init", spy)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main([*TINY, "--trainer.steps", "1", "--track", "wandb", "--out", str(tmp_path), "--name", "w"]) == 0
    assert [*(tmp_path/"w").rglob("*.wandb")]
    assert main(["--resume", str(tmp_path/"w"), "--trainer.steps", "2"]) == 0
    number = json.loads((tmp_path/"w/run.json").read_text())["wandb"]
    assert began == [(number, "allow")]*2

# From Python

def test_run_needs_settings_or_a_run():
    with pytest.raises(ConfigError, match="preset"): run()

@pytest.mark.draws
def test_a_run_shows_its_report_and_can_be_resumed_from_python(tmp_path):
    cfg, _ = parse([*TINY, "--trainer.steps", "2", "--out", str(tmp_path), "--name", "p"])
    first = run(cfg, quiet=True)
    shown = first._repr_markdown_()
    assert first.status == 0 and shown.startswith("# p") and "2 of 2 steps" in shown
    assert first.policy(.5).temperature == .5 and first.folder == tmp_path/"p"
    with tempfile.TemporaryDirectory() as elsewhere:                                 # what is resumed stays where it is
        os.chdir(elsewhere)
        assert len(run(resume=tmp_path/"p", quiet=True).rows) == 2
        os.chdir(tmp_path)
