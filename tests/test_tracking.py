"A run at W&B, offline, and histories read back from wherever they lie. The real package, no login, no network."

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from grpo_chess import histories, tracking
from grpo_chess.config import parse
from grpo_chess.panel import METRICS, names_of, read_metrics
from grpo_chess.settings import flatten
from grpo_chess.train import main
from grpo_chess.tracking import (
    DASHBOARD, History, HistoryError, Tracker, for_dashboards, grid_commands, group_games, group_picture,
    parsed_records, read_history, run_files)
from runs import MATCH, TINY
from small import make

pytestmark = pytest.mark.usefixtures("quick_pictures")

wandb = pytest.importorskip("wandb", reason="W&B's package is not installed")
SWEEPS = sorted((Path(__file__).resolve().parent.parent / "research_docs/sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    "Nobody has logged in, and whatever wants the network fails."
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    yield
    os.environ.pop("WANDB_DATA_DIR", None)


def records(folder, kind):
    return [getattr(r, kind) for p in run_files(folder) for r in parsed_records(p) if r.HasField(kind)]


def media(folder):
    return {p.name.rsplit("_", 2)[0] for p in folder.rglob("files/media/**/*") if p.is_file()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    "A run of four steps with a guard that acts, stopped after two and resumed, tracked offline."
    out = tmp_path_factory.mktemp("tracked")
    guard = ["--guard.entropy_floor", "5", "--guard.floor_patience", "3"]
    first = [*TINY, *MATCH, *guard, "--track", "wandb", "--out", str(out), "--name", "w", "--trainer.steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(out / "no-netrc"))
        assert main(first) == 0 and main(["--resume", str(out / "w"), "--trainer.steps", "4"]) == 0
    os.environ.pop("WANDB_DATA_DIR", None)
    return out / "w"


def test_a_run_is_logged_under_its_own_names_and_those_of_dashboards(tracked):
    rows, read = read_metrics(tracked / "metrics.jsonl"), read_history(tracked / "wandb")
    assert [r["_step"] for r in read.rows] == [0, 1, 2, 3] and read.name == "w"
    for kept, logged in zip(rows, read.rows):
        for name in METRICS:
            if isinstance(kept[name], (int, float)):
                assert logged[name] == kept[name], name
        for alias, column in DASHBOARD.items():
            assert (alias in logged) == (kept[column] is not None) and logged.get(alias) == kept[column], alias
    settings = flatten(yaml.safe_load((tracked / "config.yaml").read_text()))
    assert {k: read.config[k] for k in settings} == settings


def test_the_doctor_reads_what_every_process_logged(tracked):
    "Of a run that was resumed the last file alone would be judged."
    for folder in (tracked / "wandb", *sorted((tracked / "wandb").glob("offline-run-*"))[-1:]):
        read = histories.read_history(folder)
        assert len(read.values("entropy")) == (4 if folder.name == "wandb" else 2) and not read.others


def test_dashboards_names_mean_what_the_table_of_aliases_says(tracked):
    for name, column in DASHBOARD.items():
        gap = (name, column) == ("sampling/sampling_logp_difference/max", "ratio_error")
        assert name in names_of("logp_gap_max" if gap else column), name


def test_the_same_run_goes_on(tracked):
    number = json.loads((tracked / "run.json").read_text())["wandb"]
    folders = sorted((tracked / "wandb").glob("offline-run-*"))
    assert [f.name.rsplit("-", 1)[1] for f in folders] == [number] * 2
    assert [len(read_history(f).rows) for f in folders] == [2, 2]


def test_guards_raise_alerts(tracked):
    acted = [r["guard"] for r in read_metrics(tracked / "metrics.jsonl") if r["guard"]]
    alerts = records(tracked / "wandb", "alert")
    assert acted and [a.text.partition(": ")[2] for a in alerts] == acted and {a.level for a in alerts} == {"WARN"}


def test_games_panel_checkpoints_and_results_are_there(tracked):
    assert media(tracked / "wandb") >= {"games/group".split("/")[1], "panel"}
    kept = {a.name.split("-")[1] for a in records(tracked / "wandb", "artifact")}
    assert kept == {"checkpoint", "games", "result"}
    files = {e.path for a in records(tracked / "wandb", "artifact") for e in a.manifest.contents}
    assert {"model.safetensors", "state.pt", "report.md", "sampling.pgn"} <= files
    aliases = [a for r in records(tracked / "wandb", "artifact") for a in r.aliases]
    assert {"step-000002", "step-000004", "latest"} <= set(aliases)
    assert any(p.is_file() for p in (tracked / "wandb/artifacts").rglob("*"))       # they wait beside the run
    keys = {i.key or ".".join(i.nested_key) for s in records(tracked / "wandb", "summary") for i in s.update}
    assert any(k.startswith("match/sampling at T=1/score") for k in keys)


def test_a_group_is_pgn_and_a_picture(tmp_path):
    t = make()
    t.step()
    games = group_games(t.games)
    assert len(games) == t.scfg.group and all(g.headers["FEN"] == games[0].headers["FEN"] for g in games)
    assert [list(g.mainline_moves()) for g in games] == [t.games.moves(0, g) for g in range(len(games))]
    shown = group_picture(games)
    assert shown.count("<svg") == 1 and 'class="arrow"' in shown and "rollout" in shown


def test_tracking_may_begin_in_the_middle(tmp_path):
    assert main([*TINY, "--trainer.steps", "2", "--out", str(tmp_path), "--name", "m"]) == 0
    assert not (tmp_path / "m/wandb").exists()
    assert main(["--resume", str(tmp_path / "m"), "--trainer.steps", "3", "--track", "wandb"]) == 0
    assert [r["_step"] for r in read_history(tmp_path / "m/wandb").rows] == [0, 1, 2]


def test_what_fails_there_takes_nothing_from_the_run(tmp_path, monkeypatch, capsys):
    def broken(*args, **kw):
        raise RuntimeError("no\nspace")
    monkeypatch.setattr(tracking, "for_dashboards", broken)
    assert main([*TINY, "--out", str(tmp_path), "--name", "b", "--track", "wandb"]) == 0
    assert capsys.readouterr().err.count("W&B: no space; the run goes on without it") == 1
    assert len(read_metrics(tmp_path / "b/metrics.jsonl")) == 4


def test_where_the_service_cannot_be_reached_the_run_is_kept_offline(tmp_path, monkeypatch, capsys):
    modes, init = [], wandb.init

    def unreachable(mode=None, **kw):
        modes.append(mode)
        if mode != "offline":
            raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")
        return init(mode=mode, **kw)
    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tracker = Tracker(tmp_path, {}, "x1", [])
    tracker.close()
    said = capsys.readouterr()
    assert modes == [None, "offline"] and "is kept offline" in said.err and "wandb sync" in said.out


def test_without_a_login_nothing_is_sent(tmp_path, monkeypatch):
    modes, init = [], wandb.init

    def spy(mode=None, **kw):
        modes.append(mode)
        return init(mode="offline", **kw)
    monkeypatch.setattr(wandb, "init", spy)
    for key, netrc in (("", ""), ("k" * 40, ""), ("", "machine api.wandb.ai login user password " + "k" * 40)):
        monkeypatch.setenv("WANDB_API_KEY", key)
        (tmp_path / "netrc").write_text(netrc)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        folder = tmp_path / f"r{len(modes)}"
        folder.mkdir()
        Tracker(folder, {}, f"n{len(modes)}", []).close()
    assert modes == ["offline", None, None] and os.environ["WANDB_ERROR_REPORTING"] == "false"


# Reading back

def test_a_run_folder_is_read_with_its_settings(tracked):
    read = read_history(tracked)
    assert read.rows == read_metrics(tracked / "metrics.jsonl") == read_history(tracked / "metrics.jsonl").rows
    assert read.name == "w" and read.config["guard.entropy_floor"] == 5


@pytest.mark.parametrize("name", ["file", "folder", "wandb", "run"])
def test_offline_runs_are_found_by_file_and_by_folder(tracked, tmp_path, name):
    folder = sorted((tracked / "wandb").glob("offline-run-*"))[0]
    file, = folder.glob("*.wandb")
    copy = tmp_path / "copy/wandb/x"
    copy.mkdir(parents=True)
    (copy / file.name).write_bytes(file.read_bytes())
    source = dict(file=copy / file.name, folder=copy, wandb=copy.parent, run=copy.parent.parent)[name]
    assert [r["step"] for r in read_history(source).rows] == [0, 1]


def test_every_cut_of_a_file_is_read_as_far_as_it_goes(tracked, tmp_path):
    file = run_files(tracked / "wandb")[0]
    whole, path = file.read_bytes(), tmp_path / "run-c.wandb"
    seen = set()
    for cut in [*range(7, len(whole), max(1, len(whole) // 60)), len(whole)]:
        path.write_bytes(whole[:cut])
        seen.add(len(read_history(path).rows))
    assert seen == {0, 1, 2}


def test_every_flipped_bit_is_found_or_harmless(tracked, tmp_path):
    file = run_files(tracked / "wandb")[0]
    whole, path, errors = file.read_bytes(), tmp_path / "run-f.wandb", 0
    rows = read_history(file).rows
    for place in range(4, len(whole), max(1, len(whole) // 80)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        try:
            read = read_history(path).rows
        except HistoryError as e:
            errors += "\n" not in str(e)
        else:
            assert read == rows[:len(read)]
    assert errors > 60


def test_several_runs_are_not_mixed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"wandb/offline-run-1-{name}").mkdir(parents=True)
        (tmp_path / f"wandb/offline-run-1-{name}/run-{name}.wandb").write_bytes(b":W&B\xe1\xbe\0")
    with pytest.raises(HistoryError, match="holds 2 runs, a, b: name"):
        read_history(tmp_path)


@pytest.mark.parametrize("content, said", [
    (None, "there is no"), ("folder", "is not a folder of W&B"), (b"", "not a run's file"),
    (b":W&X", "not a run's file"),
    (b":W&B\xe1\xbe\0" + b"\1" * 40, "damaged at byte")])
def test_what_is_no_history_gets_one_line(tmp_path, content, said, capsys):
    path = tmp_path / "run-x.wandb"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content + b"\1" * 300 if b"\xe1" in content else content)
    with pytest.raises(HistoryError, match=said) as error:
        read_history(path)
    assert "\n" not in str(error.value)


def test_a_broken_log_gets_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n{}\n")
    with pytest.raises(HistoryError):
        read_history(tmp_path)


class Service:
    "What stands for wandb.Api here: nothing in these tests may use the network."
    asked: list = []

    def __init__(self, timeout):
        pass

    def run(self, path):
        self.asked.append(path)
        if path.endswith("gone"):
            raise wandb.errors.CommError("could not find run\n(404)")
        return self

    name, config = "theirs", {"lr": 0.1, "a": {"b": 1}}

    def scan_history(self):
        return [{"_step": 0, "reward": 1.0, "picture": {"_type": "image-file"}}, {"_step": 1, "reward": None}]


@pytest.mark.parametrize("source", ["wandb:me/p/r1", "https://wandb.ai/me/p/runs/r1?nw=x", "https://wandb.ai/me/p/r1/logs"])
def test_a_run_at_the_service_is_read(source, monkeypatch):
    monkeypatch.setattr(wandb, "Api", Service)
    with pytest.raises(HistoryError, match="wandb login"):
        read_history(source)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert read_history(source) == History("theirs", [{"_step": 0, "reward": 1.0}, {"_step": 1, "reward": None}],
                                           {"lr": 0.1, "a.b": 1})
    assert Service.asked[-1] == "me/p/r1"
    with pytest.raises(HistoryError, match=r"does not give me/p/gone: could not find run \(404\)"):
        read_history("wandb:me/p/gone")


# Sweeps

@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_point_of_a_sweep_is_a_valid_run(path):
    lines = list(grid_commands(path))
    runs = [parse(line.split()[3:])[0] for line in lines]
    assert len({str(r) for r in runs}) == len(lines) > 1 and all(r.track == "wandb" for r in runs)
    assert not {"${env}", "${interpreter}"} & set(lines[0].split())
    words = yaml.safe_load(path.read_text())["command"]
    assert words[:4] == ["${env}", "${interpreter}", "-m", "grpo_chess.train"] and words[-1] == "${args}"


def test_the_record_asked_for_nine_points(capsys):
    assert tracking.main([str(p) for p in SWEEPS if p.stem == "lr_entropy"]) == 0
    assert capsys.readouterr().out.count("python -m grpo_chess.train") == 9


@pytest.mark.parametrize("text", ["", "a: [", "method: random\nparameters: {x: {values: [1]}}", "3"])
def test_what_is_no_grid_gets_one_line(tmp_path, text, capsys):
    (tmp_path / "s.yaml").write_text(text)
    assert tracking.main([str(tmp_path / "s.yaml")]) == 2 and tracking.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("parameters, says", [
    ("[1, 2]", "parameters"), ("{a: 3}", "a needs 'values: [1, 2]'"), ("{a: {values: 3}}", "a needs"),
    ("{a: {values: []}}", "a needs"), ("{a: {min: 0, max: 1}}", "a needs"), ("{a: {values: [[1]]}}", "a needs"),
    ("{a: {value: 1}}\ncommand: 5", "command"), ("{a: {value: 1}}\ncommand: []", "command"),
    ("{a: {value: 1}}\ncommand: [{}]", "command"), ("[" * 5000, "nested too deeply"),
    ("{x: &a [1], y: *a}", "aliases"), (json.dumps({f"x{i}": {"values": [*range(10)]} for i in range(12)}), "100,000")])
def test_a_malformed_sweep_gets_one_line(tmp_path, parameters, says, capsys):
    text = f"method: grid\nparameters: {parameters}" + "\ncommand: [-m, x]" * ("command" not in parameters)
    (tmp_path / "s.yaml").write_text(text)
    assert tracking.main([str(tmp_path / "s.yaml")]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_a_sweep_without_a_command_gets_one_line(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("method: grid\nparameters: {a: {value: 1}}")
    assert tracking.main([str(tmp_path / "s.yaml")]) == 2 and "command" in capsys.readouterr().err


def test_a_value_is_one_word_for_the_shell(tmp_path):
    sweep = dict(method="grid", parameters={"name": {"values": ["a b", "c; exit 3"]}, "n": {"value": 1}}, command=["x"])
    (tmp_path / "s.yaml").write_text(json.dumps(sweep))
    assert [shlex.split(line) for line in grid_commands(tmp_path / "s.yaml")] == [
        ["python", "x", f"--name={name}", "--n=1"] for name in ("a b", "c; exit 3")]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_no_error(word, capsys):
    assert tracking.main([word]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: python -m grpo_chess.tracking") and not told.err


def test_settings_that_stand_for_billions_are_left_out(tmp_path):
    lines = ["a0: &a0 {x: 1, y: 2}", *(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 16))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    history = read_history(tmp_path)
    assert len(history.rows) == 1 and not history.config


def test_numbers_that_were_not_measured_are_left_out():
    row = for_dashboards({"step": 3, "entropy": float("nan"), "lr": 0.1, "kl_ratio": None, "guard": ""})
    assert row == {"step": 3, "lr": 0.1, "learning_rate": 0.1, "actor/lr": 0.1}
