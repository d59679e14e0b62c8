"The one parser of all command lines: files, wrong settings, signals, lost readers, exit statuses."
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from grpo_chess.files import FileError
from grpo_chess.settings import (
    ConfigError, EndedEarly, Stopped, StopRequest, choose, flatten, handled, interrupt, known_keys, make_parser,
    parse_settings, read_yaml, run_command, take, words_of)

TOP = Path(__file__).resolve().parent.parent

@dataclass
class Inner:
    """Inner.

    Args:
        depth: how deep
    """
    depth: int = 4

@dataclass
class Outer:
    """Outer.

    Args:
        seed: a seed
        minutes: a time
        name: a name
        on: a switch
        inner: more
    """
    seed: int = 0
    minutes: float = 0.
    name: str = ""
    on: bool = True
    inner: Inner = field(default_factory=Inner)

KNOWN = known_keys(Outer)

def parse(*argv, **base): return parse_settings(Outer, [str(a) for a in argv], "outer", base)

def refused(call, *args):
    "The error's text, which is one line."
    with pytest.raises(ConfigError) as e: call(*args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)

# Files

BOMB = "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}']*9)}]\n" for x, y in zip("abcdefgh", "bcdefghi"))

@pytest.mark.parametrize("text, says", [
    (BOMB, "aliases"), ("seed: &x [*x]", "aliases"), ("&x\nseed: *x", "aliases"),
    ("["*5000, "nested too deeply"), ("{a: "*5000, "nested too deeply"),
    ("seed: [", "is not YAML"), ("- 1", "found list"), ("7", "found int"),
    ("seed:", "seed has no value"), ("inner: {dept: 2}", "did you mean 'inner.depth'"),
    ("seed: !!python/object/apply:os.getcwd []", "is not YAML"), ("seed: \x00", "is not YAML")])
def test_a_bad_file_is_one_line_at_once(tmp_path, text, says):
    file = tmp_path/"x.yaml"
    file.write_text(text)
    start = time.perf_counter()
    for call, args in ((read_yaml, (file, KNOWN)), (parse, ("--config", file))): assert says in refused(call, *args)
    assert time.perf_counter() - start < 5

def test_a_file_that_is_no_text_or_no_file(tmp_path):
    (tmp_path/"x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refused(read_yaml, tmp_path/"x.yaml", KNOWN)
    assert "cannot read" in refused(read_yaml, tmp_path, KNOWN)
    assert "No such file" in refused(read_yaml, tmp_path/"none", KNOWN)

@pytest.mark.parametrize("value", ["!!int ''", "!!bool x", "!!timestamp x", "!!float ''", "2001-13-41"])
def test_a_tag_that_does_not_fit_its_value(tmp_path, value):
    (tmp_path/"x.yaml").write_text(f"seed: {value}")
    assert "is not YAML" in refused(read_yaml, tmp_path/"x.yaml", KNOWN)

def test_a_file_without_an_end_is_left():
    "Some bytes more than settings have are read, and no more."
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30,)*2)\n"
    code = f"{limit}from grpo_chess.settings import read_yaml\nread_yaml('/dev/zero', [])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: /dev/zero is larger than 1 MB" in ended.stderr

def test_later_settings_win_wherever_they_stand(tmp_path):
    (tmp_path/"a.yaml").write_text("seed: 1\nminutes: 1\nname: a")
    (tmp_path/"b.yaml").write_text("seed: 2\nminutes: 2")
    files = "--config", tmp_path/"a.yaml", f"--config={tmp_path/'b.yaml'}"
    got = parse("--seed", 3, *files, **{"inner.depth": 9, "name": "base"})
    assert got == Outer(3, 2., "a", True, Inner(9))

# The command line

@pytest.mark.parametrize("argv, says", [
    (["--sead", "1"], "did you mean 'seed'"), (["--dept=1"], "inner.depth"), (["--seed"], "seed"), (["seven"], "seven"),
    (["--inner", "{depth: 1}"], "unknown setting 'inner'"), (["--seed", "1.5"], "seed"),
    (["--config"], "--config needs a value"), (["--config", "--seed"], "--config needs a value"),
    (["--minutes", ".nan"], "not a finite number"), (["--minutes", ".inf"], "not a finite number"),
    (["--minutes", "1e999"], "not a finite number"), (["--inner.depth", "2000000000"], "is too large: at most 245"),
    (["--minutes=-1e300"], "too large"),
    (["--seed", "9"*26], "too large"), (["--seed", "9"*400], "too large"), (["--on", "perhaps"], "on")])
def test_a_bad_command_line_is_one_line(argv, says):
    assert says in refused(parse, *argv)

def test_a_home_is_found_behind_an_equals_sign(monkeypatch):
    "The shell expands `--name ~/x` and not `--name=~/x`."
    monkeypatch.setenv("HOME", "/home/of/me")
    assert parse("--name=~/x").name == "/home/of/me/x" and parse("--name", "a~b").name == "a~b"

def test_take_and_choose():
    assert take(["--a", "1", "--b=2", "--a=3", "x"], ("a",)) == (dict(a=["1", "3"]), ["--b=2", "x"])
    assert "there are p, q" in refused(choose, "r", dict(p={}, q={}))
    assert flatten(dict(a=1, b=dict(c=2, d=dict(e=3)))) == {"a": 1, "b.c": 2, "b.d.e": 3}

def test_help_shows_the_preset_and_the_commands_own_options(capsys):
    with pytest.raises(SystemExit) as e:
        parse_settings(Outer, ["--help"], "python -m outer", dict(minutes=15), dict(preset="a name"))
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "default: 15" in text and "--preset PRESET" in text
    assert all(f"--{k} " in text for k in KNOWN)
    assert all(action.help for action in make_parser(Outer, "x")._actions)

# How a command ends

def status_of(error=None):
    def work(argv):
        if error: raise error
    return run_command(work, [], (KeyError,), "nothing is lost")

def test_exit_statuses(capsys):
    full = OSError(28, "No space left on device", "x.json")
    cases = [(None, 0, ""), (ConfigError("a\nb"), 2, "error: a b"), (KeyError("k"), 2, "error: 'k'"),
             (EndedEarly("enough"), 3, "stopped: enough"), (Stopped("told to"), 130, "stopped: told to"),
             (KeyboardInterrupt(), 130, "stopped; nothing is lost"),
             (FileError("x is in use"), 2, "error: x is in use"),
             (MemoryError(), 2, "error: there is not enough memory"),
             (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: there is not enough"),
             (full, 2, "error: x.json: No space left on device")]
    for error, status, says in cases:
        assert status_of(error) == status and (err := capsys.readouterr().err.strip()).startswith(says), err
        assert len(err.splitlines()) == bool(says)
    with pytest.raises(ZeroDivisionError): status_of(ZeroDivisionError())          # a bug of ours keeps its traceback

def script(body, *tail, **env):
    code = ("import sys, time, signal, os\nfrom grpo_chess.settings import *\n"
            f"def work(argv):\n    {body}\nsys.exit(run_command(work, [], (), 'nothing is lost'))")
    return [sys.executable, "-c", code, *tail], os.environ | dict(PYTHONPATH=str(TOP)) | env

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_work_through_its_finally_blocks(name, tmp_path):
    done = str(tmp_path/"closed")
    command, env = script(f"try: print('begun', flush=True); time.sleep(60)\n    finally: open({done!r}, 'w')")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.strip() == "stopped; nothing is lost" and (tmp_path/"closed").exists()

def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(interrupt): signal.raise_signal(signal.SIGHUP)
        with StopRequest() as stop: signal.raise_signal(signal.SIGHUP)
        assert not stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)

def test_a_closed_terminal_asks_twice_and_does_not_interrupt():
    with StopRequest() as stop:
        for _ in range(2): signal.raise_signal(signal.SIGHUP)
        assert stop
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize("where", ["| head -1", "> /dev/full", "2>&1 | head -1", "> /dev/full 2>&1"])
def test_work_goes_on_when_nobody_reads(where, tmp_path):
    prints = "for i in range(3000): print('line', i, flush=i % 2 == 0); print('bar', file=sys.stderr)"
    command, env = script(f"{prints}\n    open({str(tmp_path/'done')!r}, 'w')")
    shell = f'"$0" "$@" {where}; echo ${{PIPESTATUS[0]}} > {tmp_path/"status"}'
    done = subprocess.run(["bash", "-c", shell, *command], env=env, capture_output=True, text=True, timeout=60)
    assert (tmp_path/"done").exists() and "Error" not in done.stderr, done.stderr[-500:]
    assert (tmp_path/"status").read_text().strip() == "0"

@pytest.mark.parametrize("where, status, says", [
    ("> /dev/full", "2", "error: the result cannot be printed: No space left on device\n"), ("| head -1", "0", ""),
    (">&-", "0", "")])
def test_a_result_that_a_full_disk_takes_is_an_error(where, status, says):
    command, env = script("print_result('line\\n'*300_000)")
    shell = f'"$0" "$@" {where}; echo ${{PIPESTATUS[0]}} >&2'
    done = subprocess.run(["bash", "-c", shell, *command], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == f"{says}{status}\n"

@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_closed_streams_are_nobody_s_file(closed, tmp_path):
    "The next file that is opened would get their numbers, and what is printed would be written into it."
    body = f"f = open({str(tmp_path/'kept')!r}, 'w'); print('lost'); os.system('echo lost too'); f.write('mine')"
    command, env = script(body)
    shell = f'"$0" "$@" {closed}; echo $? > {tmp_path/"status"}'
    subprocess.run(["bash", "-c", shell, *command], env=env, timeout=60)
    assert (tmp_path/"kept").read_text() == "mine" and (tmp_path/"status").read_text().strip() == "0"

def test_a_terminal_of_ascii_loses_letters_only():
    command, env = script("print('4×2 ± 1')", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "4?2 ? 1", done.stderr

# Words

def test_a_switch_without_a_value_is_on_and_words_may_stand_anywhere():
    assert parse("--on").on and not parse("--on", "false").on and parse("--on", "--seed", "3").seed == 3
    assert words_of(KNOWN, ["run", "--seed", "3", "other", "--name=x"]) == (["run", "other"], ["--seed=3", "--name=x"])
    assert words_of([*KNOWN], ["--on", "run"], {"on"}) == (["run"], ["--on=true"])
    assert words_of(KNOWN, ["--on", "no", "run"], {"on"}) == (["run"], ["--on=no"])
    assert words_of(KNOWN, ["--help", "run", "-h"]) == (["run"], ["--help", "-h"])
    assert words_of(["fail_on"], ["--fail-on", "note"]) == ([], ["--fail_on=note"])
    assert words_of(["floor"], ["--floor", "-1", "--", "--x"]) == (["--x"], ["--floor=-1"])

def test_a_setting_without_its_value_and_a_word_too_many_are_refused():
    assert "--seed needs a value" in refused(parse, "--seed") and "--seed needs" in refused(parse, "--seed", "--on")
    assert "'stray'" in refused(parse, "stray") and "'stray'" in refused(parse, "--on", "stray")
