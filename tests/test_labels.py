"Labels and their files: what the notebook shows on one case, on many; and every way in which a file can be wrong."
import dataclasses
import os
import signal
import subprocess
import sys
import time

import chess
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_chess.board import legal_actions, position_key, tokens
from grpo_chess.engine import EngineConfig, EngineError, EnginePool
from grpo_chess.files import FileError
from grpo_chess.labels import (
    STALE, UNKNOWN, LabelConfig, LabelError, SelfPlay, check_shards, join, label, locked_part, make_folder,
    make_shard, openings_only, read_manifest, read_shard, write_shard)
from grpo_chess.reward import MOVE_NAMES, arrange
from made_up import ENV, cli, made_up, same

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=1)) as p: yield p

def test_every_legal_move_has_the_value_that_the_engine_gives_it(pool):
    shard = make_shard(pool, LabelConfig(rows=300, games=32, seed=3), 0)
    # the games with which the shard begins
    half = SelfPlay(LabelConfig(rows=300, games=32, seed=3), np.random.Generator(np.random.PCG64([3, 0])))
    boards = {tokens([b])[0].tobytes(): b for b, _, _ in half.games}
    found = [(i, boards[t.tobytes()]) for i, t in enumerate(shard.tokens) if t.tobytes() in boards]
    assert len(found) >= 16
    for i, b in found:
        answer = pool.evaluate_moves([position_key(b)], depth=1)[0]
        at = slice(shard.offset[i], shard.offset[i + 1])
        assert shard.actions[at].tolist() == legal_actions(b)
        assert shard.scores[at].tolist() == [answer[MOVE_NAMES[b.turn][a]] for a in shard.actions[at]]

def test_a_shard_depends_on_seed_and_number_alone(pool):
    cfg = LabelConfig(rows=150, games=32, seed=1)
    a, b = make_shard(pool, cfg, 1), make_shard(pool, cfg, 2)
    assert same(make_shard(pool, dataclasses.replace(cfg, positions=9, part="1/7", out="elsewhere"), 1), a)
    assert not same(a, b) and not same(a, make_shard(pool, dataclasses.replace(cfg, seed=2), 1))
    with EnginePool(EngineConfig(processes=3)) as other: assert same(make_shard(other, cfg, 1), a)

def test_killed_labelling_goes_on_to_the_same_bytes(tmp_path):
    args = ["label", "--positions", 500, "--rows", 100, "--games", 16, "--seed", 4, "--engine.processes", 1]
    assert cli(*args, "--out", tmp_path/"whole").returncode == 0
    broken = subprocess.Popen([sys.executable, "-m", "grpo_chess.pretrain", *map(str, args), "--out",
                               str(tmp_path/"broken")], env=ENV, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while time.time() < until and not list((tmp_path/"broken").glob("shard-*.parquet")): time.sleep(.02)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    (tmp_path/"broken"/"shard-00004.parquet.123.tmp").write_bytes(b"half of it")
    for left in (tmp_path/"broken").glob("*.tmp"): os.utime(left, (0, time.time() - 2*STALE))      # ten minutes later
    assert cli(*args, "--out", tmp_path/"broken").returncode == 0
    def files(name):
        return {p.name: p.read_bytes() for p in (tmp_path/name).iterdir()}
    assert files("whole") == files("broken") and len(files("whole")) == 6

def test_two_machines_share_the_work(tmp_path):
    cfg = LabelConfig(positions=400, rows=100, games=32, out=str(tmp_path/"one"), engine=EngineConfig(processes=1))
    label(cfg, quiet=True)
    for k in range(2): label(dataclasses.replace(cfg, out=str(tmp_path/f"m{k}"), part=f"{k}/2"), quiet=True)
    assert [s["name"] for s in read_manifest(tmp_path/"m1")["shards"]] == ["shard-00001.parquet", "shard-00003.parquet"]
    for p in (tmp_path/"m1").glob("*.parquet"): p.rename(tmp_path/"m0"/p.name)
    manifest = label(dataclasses.replace(cfg, out=str(tmp_path/"m0")), quiet=True)     # adopts them, and makes nothing
    assert manifest == read_manifest(tmp_path/"one") and manifest["rows_in_all"] == 400
    with pytest.raises(LabelError, match="seed = 0; here seed = 1"):
        label(dataclasses.replace(cfg, out=str(tmp_path/"m0"), seed=1), quiet=True)

def test_two_processes_in_one_folder_leave_each_other_s_files_alone(tmp_path):
    "Both wrote manifest.json.tmp, and each deleted the shard that the other was writing."
    args = ["label", "--positions", 1200, "--rows", 100, "--games", 16, "--engine.processes", 1, "--out",
            tmp_path/"both"]
    def start(part):
        command = [sys.executable, "-m", "grpo_chess.pretrain", *map(str, args), "--part", part]
        return subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    runs = [start("0/2"), start("1/2")]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len(list((tmp_path/"both").glob("*.parquet"))) == 12 and not list((tmp_path/"both").glob("*.tmp"))
    young, old = tmp_path/"both/shard-00099.parquet.77.tmp", tmp_path/"both/manifest.json.78.tmp"
    for path in (young, old): path.write_bytes(b"half of it")
    os.utime(old, (0, time.time() - 2*STALE))
    make_folder(tmp_path/"both")
    assert young.exists() and not old.exists()

def test_what_is_damaged_is_set_aside_and_made_again(tmp_path, capsys):
    "A bit in a shard's own header, which no page checksum covers, a shard cut short, a manifest."
    cfg = LabelConfig(positions=120, rows=40, games=16, out=str(tmp_path/"a"), engine=EngineConfig(processes=1))
    label(cfg, quiet=True)
    good = {p.name: p.read_bytes() for p in (tmp_path/"a").iterdir()}
    for name, place in (("shard-00001.parquet", -300), ("shard-00002.parquet", None), ("manifest.json", 100)):
        bad = bytearray(good[name])
        if place is None: del bad[500:]
        else: bad[place] ^= 2
        (tmp_path/"a"/name).write_bytes(bad)
        with pytest.raises(LabelError, match=name) as e:
            check_shards(tmp_path/"a")
        assert "\n" not in str(e.value)
        label(cfg, quiet=True)
        assert "set aside" in capsys.readouterr().err and (tmp_path/f"a/{name}.damaged").read_bytes() == bad
        assert {n: (tmp_path/"a"/n).read_bytes() for n in good} == good

def test_the_same_part_is_made_by_one_process(tmp_path):
    with locked_part(tmp_path, "0/2"), locked_part(tmp_path, "1/2"):
        for part in ("0/2", "0/1"):
            with pytest.raises(FileError, match="another process"), locked_part(tmp_path, part): pass
    with locked_part(tmp_path, "0/1"), pytest.raises(FileError), locked_part(tmp_path, "1/2"): pass

def test_a_manifest_names_files_beside_it(tmp_path):
    (tmp_path/"manifest.json").write_text('{"shards": [{"name": "../x.parquet", "rows": 3}]}')
    with pytest.raises(LabelError, match="lists no shards"): read_manifest(tmp_path)

def test_damaged_headers_and_manifests_are_one_line(tmp_path):
    table = pa.table({k: [] for k in ("tokens",)}).replace_schema_metadata({"grpo_chess": "{not json"})
    pq.write_table(table, tmp_path/"x.parquet")
    with pytest.raises(LabelError, match="x.parquet is damaged: its header"): read_shard(tmp_path/"x.parquet")
    for text, match in (("{", "cannot be read"), ("[]", "cannot be read"), ('{"shards": [3]}', "lists no shards"),
                        ('{"shards": [{"name": "a"}]}', "lists no shards")):
        (tmp_path/"manifest.json").write_text(text)
        with pytest.raises(LabelError, match=match) as e: read_manifest(tmp_path)
        assert "\n" not in str(e.value)

def test_a_missing_or_strange_answer_stops_the_labelling():
    board = chess.Board()
    legal = legal_actions(board)
    answer = {m.uci(): 0 for m in board.legal_moves}
    assert arrange(answer, legal, board) == [0]*20
    missing = {k: v for k, v in answer.items() if k != "e2e4"}
    for wrong in (missing, missing | dict(e2e5=0)):
        with pytest.raises(EngineError, match="e2e4"): arrange(wrong, legal, board)

# Shards

def test_shards_come_back_as_they_were(tmp_path):
    whole = made_up(50)
    soft = dataclasses.replace(whole, probs=np.concatenate([np.full(c, 1/c, np.float32)
                                                            for c in np.diff(whole.offset)]))
    for name, x in (("a", whole), ("b", soft), ("one", whole.take(np.array([7])))):
        write_shard(tmp_path/name, x, dict(seed=1))
        back = read_shard(tmp_path/name)
        assert same(x, back) and (x.probs is None) == (back.probs is None)
    assert same(join([whole.take(np.arange(20)), whole.take(np.arange(20, 50))]), whole)
    with pytest.raises(LabelError, match="with and without"): join([whole, soft])

@pytest.mark.parametrize("cut", [1, 8, 100, .5, .99])
def test_a_shard_cut_short_is_refused_by_name(tmp_path, cut):
    write_shard(tmp_path/"x.parquet", made_up(40), {})
    data = (tmp_path/"x.parquet").read_bytes()
    (tmp_path/"x.parquet").write_bytes(data[:-cut] if cut >= 1 else data[:int(len(data)*(1 - cut))])
    with pytest.raises(LabelError, match="x.parquet is no whole Parquet file"): read_shard(tmp_path/"x.parquet")

def test_other_damage_is_refused_with_its_row(tmp_path, monkeypatch):
    good = made_up(40)
    at = int(good.offset[17])
    def refused(match, **change):
        write_shard(tmp_path/"x.parquet", dataclasses.replace(good, **change), {})
        with pytest.raises(LabelError, match=match): read_shard(tmp_path/"x.parquet")
    def changed(name, i, v):
        x = getattr(good, name).copy()
        x[i] = v
        return {name: x}
    refused("row 17: a move", **changed("actions", at, 1968))
    refused("row 17: a move", **changed("actions", at, -1))
    refused("row 17: a score", **changed("scores", at, 32001))
    refused("row 17: a token", **changed("tokens", (17, 3), 16))
    refused("row 17: no move with a score", **changed("scores", slice(at, int(good.offset[18])), UNKNOWN))
    probs = np.concatenate([np.full(c, 1/c, np.float32) for c in np.diff(good.offset)])
    probs[at] += .1
    refused("row 17: probabilities", probs=probs)
    write_shard(tmp_path/"x.parquet", good, {})
    with pytest.raises(LabelError, match="has 40 rows; its manifest says 41"): read_shard(tmp_path/"x.parquet", 41)
    pq.write_table(pa.table(dict(a=[1])), tmp_path/"y.parquet")
    with pytest.raises(LabelError, match="y.parquet is not one of our"): read_shard(tmp_path/"y.parquet")
    monkeypatch.setattr("grpo_chess.labels.ACTION_SPACE", "another")
    with pytest.raises(LabelError, match="x.parquet is written in another action space"):
        read_shard(tmp_path/"x.parquet")
    (tmp_path/"manifest.json").write_text('{"shards": [], "action_space": "1"}')
    with pytest.raises(LabelError, match="manifest.json belongs to another"): read_manifest(tmp_path)

def test_bits_that_flip_do_not_pass(tmp_path):
    write_shard(tmp_path/"x.parquet", made_up(40), {})
    data = (tmp_path/"x.parquet").read_bytes()
    good = read_shard(tmp_path/"x.parquet")
    for at in range(100, len(data) - 900, len(data)//25):
        flipped = bytearray(data)
        flipped[at] ^= 4
        (tmp_path/"y.parquet").write_bytes(flipped)
        try: assert same(read_shard(tmp_path/"y.parquet"), good)
        except LabelError as e: assert "y.parquet" in str(e)


def test_a_shard_that_is_full_before_its_games_are_over_is_told():
    "Eight thousand positions of 256 games at once are their first thirty plies: openings, and no endgame."
    assert not openings_only(LabelConfig())
    note = openings_only(LabelConfig(rows=8000))
    assert "31 plies" in note and "--games 50 " in note
    assert not openings_only(LabelConfig(rows=8000, games=50))
