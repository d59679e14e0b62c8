"Files: whole or absent, checked by their checksums, in a folder of one process."
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_chess.files import (
    FileError, append_row, can_write, check_folder, each_row, locked, open_json, read_rows, row_text, sealed_json,
    trim_log, without_home, write_folder, write_whole)

ROWS = [dict(step=k, loss=1/(k + 1), guard="") for k in range(6)]

def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path/"x.json"
    write_whole(file, "old")
    def fails(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError) as e: write_whole(file, "new")
    assert e.value.filename == str(file)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]

@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_what_goes_to_an_open_file_comes_after_what_is_there(path, tmp_path):
    code = f"from grpo_chess.files import *; print('first'); write_whole({path!r}, 'second\\n'); print('last')"
    with (tmp_path/"out").open("w") as out: subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path/"out").read_text() == "first\nsecond\nlast\n"

def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path/"link").symlink_to("file")
    write_whole(tmp_path/"link", "text")
    assert (tmp_path/"link").is_symlink() and (tmp_path/"file").read_text() == "text"
    os.mkfifo(tmp_path/"pipe")
    reader = os.open(tmp_path/"pipe", os.O_RDONLY|os.O_NONBLOCK)
    write_whole(tmp_path/"pipe", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path/"pipe").is_fifo()
    os.close(reader)

def test_what_cannot_be_written_is_known_before(tmp_path):
    can_write(tmp_path/"new")
    can_write("/dev/null")
    assert not (tmp_path/"new").exists() and Path("/dev/null").is_char_device()
    (tmp_path/"old").write_text("old")
    can_write(tmp_path/"old")
    assert (tmp_path/"old").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    for path, says in ((tmp_path, "is a folder"), (tmp_path/"no/file", "no folder"), ("/proc/none", "cannot")):
        with pytest.raises(FileError, match=says): can_write(path)

def test_a_full_disk_is_known_before(tmp_path):
    "A limit on the size of files stands for a disk without room: the file is not there, and the old one is whole."
    code = ("import resource, signal, sys; from pathlib import Path; from grpo_chess.files import *\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
            "row, _ = dict(a='z'*50), Path('z').touch()\n"
            "for f, *a in ((can_write, 'x'), (write_whole, 'y', 'y'*200), *[(append_row, Path('z'), row)]*2):\n"
            "    try: f(*a)\n"
            "    except (OSError, FileError) as e: print(e)\n")
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.count("too large") + done.stdout.count("No space") == 3, done
    assert [p.name for p in tmp_path.iterdir()] == ["z"] and len(read_rows(tmp_path/"z")[0]) == 1

@pytest.mark.parametrize("name", ["a", "b", "SHA256SUMS"])
def test_every_bit_of_a_folder_counts(tmp_path, name):
    write_folder(tmp_path/"000001", dict(a=b"some data", b=b"more"))
    file = tmp_path/"000001"/name
    good = file.read_bytes()
    for place in range(8*len(good)):
        bad = bytearray(good)
        bad[place//8] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(FileError): check_folder(tmp_path/"000001")
    for bad in (b"", good[:-1], good + b"x", good*2):
        file.write_bytes(bad)
        with pytest.raises(FileError): check_folder(tmp_path/"000001")
    file.write_bytes(good)
    check_folder(tmp_path/"000001")
    (tmp_path/"000001/c").touch()
    with pytest.raises(FileError, match="does not hold"): check_folder(tmp_path/"000001")

def test_every_bit_of_a_json_file_counts():
    text = sealed_json(dict(engine="Stockfish", own=[], rows=12)).encode()
    for place in range(8*len(text)):
        bad = bytearray(text)
        bad[place//8] ^= 1 << place % 8
        try: read = open_json(bytes(bad))
        except ValueError: continue
        assert read == open_json(text) and chr(text[place//8]).isspace()       # white space is not part of the data
    assert open_json(json.dumps(dict(rows=12))) == dict(rows=12)

def test_every_bit_of_a_log_counts(tmp_path):
    log = tmp_path/"metrics.jsonl"
    good = "".join(map(row_text, ROWS)).encode()
    for place in range(8*len(good)):
        bad = bytearray(good)
        bad[place//8] ^= 1 << place % 8
        log.write_bytes(bad)
        rows, damaged = read_rows(log)
        assert damaged and all(row in ROWS for row in rows)

def test_a_log_goes_on_after_damage(tmp_path):
    log = tmp_path/"metrics.jsonl"
    def steps(): return [row["step"] for row, _ in each_row(log) if row]
    log.touch()
    for row in ROWS: append_row(log, row)
    whole = log.read_bytes()
    assert trim_log(log, 6, 6) == 0 and log.read_bytes() == whole
    assert trim_log(log, 4, 4) == 0 and steps() == [0, 1, 2, 3]
    log.write_bytes(whole + b'{"step": 6, "lo')                     # half a row, as a crash leaves it
    assert trim_log(log, 6, 6) == 0 and log.read_bytes() == whole
    bad = bytearray(whole)
    bad[len(whole)//2] ^= 1
    log.write_bytes(bad)
    assert trim_log(log, 5, 5) == 1 and len(steps()) == 4
    assert (tmp_path/"metrics.jsonl.damaged").read_bytes() == bad
    log.unlink()
    assert trim_log(log, 3, 3) == 3 and steps() == []
    log.write_text("".join(json.dumps(row) + "\n" for row in ROWS))      # of a version without checksums
    assert trim_log(log, 5, 5) == 0 and steps() == [0, 1, 2, 3, 4] and '"crc"' in log.read_text()
    log.write_text('[1]\n{"step": "two"}\n' + "[" * 5000 + "\n")
    assert trim_log(log, 5, 5) == 5 and steps() == []

def test_the_lock_ends_with_its_process(tmp_path):
    code = f"from grpo_chess.files import *\nwith locked({str(tmp_path)!r}): print('locked', flush=True); input()"
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    process.stdout.readline()
    for shared in (True, False):
        with pytest.raises(FileError, match="another process is working"), locked(tmp_path, shared): pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path): pass

def test_few_file_handles_are_an_error_of_one_line(tmp_path):
    "Nothing that was there is lost, and what opened a handle gives it back."
    write_whole(tmp_path/"x", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError): write_whole(tmp_path/"x", "new")
        with pytest.raises(FileError), locked(tmp_path): pass
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path/"x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

def test_nobody_s_home_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = dict(out="/home/me/runs", more=["/home/me", 3, None, "/home/meadow"], inner=dict(a="/x/home/me"))
    assert without_home(given) == dict(out="~/runs", more=["~", 3, None, "/home/meadow"], inner=dict(a="/x/home/me"))
    told = "Old is what /home/me/w held: `engine:path=/home/me/e,depth=1` and (/home/me), not /home/me-2 or ~/home/me."
    assert without_home(told) == "Old is what ~/w held: `engine:path=~/e,depth=1` and (~), not /home/me-2 or ~/home/me."
