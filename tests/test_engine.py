"The engine pool: right answers, the same ones every time, none made up, and no process left behind."
import gc
import json
import multiprocessing
import os
import random
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError, Future

import chess
import chess.engine
import numpy as np
import pytest

import grpo_chess
from grpo_chess import uci
from grpo_chess.board import PositionError
from grpo_chess.engine import HASH_MB, EngineConfig, EnginePool, usable_cores
from grpo_chess.uci import (
    CP_MAX, MATE, EngineError, EngineFault, can_be_played, find_engine, is_mate, last_score, move_scores, score_code,
    score_text,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(grpo_chess.__file__)))
START = chess.STARTING_FEN
MATED, STALEMATE = "R5k1/5ppp/8/8/8/8/8/6K1 b - - 0 1", "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1"
NO_KING = "rnbq1bnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w - - 0 1"

def played(n, seed=0):
    rng, seen = random.Random(seed), {}
    while len(seen) < n:
        b = chess.Board()
        for _ in range(rng.randrange(2, 80)):
            if b.is_game_over(): break
            b.push(rng.choice(list(b.legal_moves)))
        if not b.is_game_over(): seen[b.fen()] = None
    return list(seen)

FENS = played(200)

def single(**kw): return EngineConfig(**{"processes": 1, **kw})
def running(pid):
    "Is this process there and not a zombie?"
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False
def children():
    "Processes started by this one, but for the one that counts them."
    command = ["ps", "-ww", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "ps -ww" not in line]
def until(condition, seconds=10.):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.02)
    return condition()

@pytest.fixture(autouse=True)
def no_process_left(request):
    before = {line.split()[0] for line in children()}        # of other tests: W&B's service ends with its process
    def left(): return [line for line in children() if line.split()[0] not in before]
    yield
    gc.collect()
    assert until(lambda: not left(), 5), left()

@pytest.fixture(scope="module")
def truth():
    "Clean depth-4 scores by an independent program: python-chess, one position at a time, a new game before each."
    out = []
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as eng:
        eng.configure({"Hash": 1, "Threads": 1})
        for fen in FENS:
            score = eng.analyse(chess.Board(fen), chess.engine.Limit(depth=4), game=object())["score"].relative
            mate = score.mate()
            out.append(score.score() if mate is None else MATE - mate if mate > 0 else -MATE - mate)
    assert len(set(out)) > 100
    return np.array(out, dtype=np.int32)

# --- scores --------------------------------------------------------------------------------------

def test_codes_are_ordered_as_chess_orders_them():
    said = ["mate 0", "mate -1", "mate -999", "cp -31000", "cp -300", "cp 0", "cp 12", "cp 31000", "mate 999", "mate 1"]
    codes = [score_code(*s.split()) for s in said]
    assert codes == sorted(codes) and len(set(codes)) == len(codes)
    assert codes[0] == -MATE and codes[1] == 1 - MATE and codes[-1] == MATE - 1 and codes[4:7] == [-300, 0, 12]
    assert is_mate(np.array(codes)).tolist() == [True]*3 + [False]*5 + [True]*2
    assert [score_text(c) for c in codes[:3]] == ["#-0", "#-1", "#-999"]
    assert score_text(-5) == "-0.05" and score_text(MATE - 7) == "#7"

@pytest.mark.parametrize("bad", ["wdl 3", "cp x", "mate 1.5", "mate 1000", "mate -40000", f"cp {CP_MAX + 1}",
                                 "cp -31001", "cp 99999999999999999999999"])
def test_codes_refuse_rubbish(bad):
    with pytest.raises(ValueError): score_code(*bad.split())

def test_last_exact_score_counts():
    a, b = b"info depth 3 score cp -7 nodes 10 pv e2e4\n", b"info depth 4 score cp 90 %s nodes 12 pv e2e4\n"
    assert last_score(a) == -7 and last_score(a + b % b"lowerbound") == -7 and last_score(a + b % b"upperbound") == -7
    assert last_score(a + b % b"wdl 1 2 3") == 90 and last_score(a + b"info depth 0 score mate 0") == -MATE
    for nothing in (b"", b"info depth 1 currmove e2e4", b % b"lowerbound"):
        with pytest.raises(EngineFault): last_score(nothing)

def test_move_scores_take_the_last_list():
    lists = "info depth 1 multipv 1 score cp 9 nodes 1 pv a2a3\n" \
            "info depth 1 multipv 2 score cp 5 nodes 1 pv b7b8q\n" \
            "info depth 2 multipv 1 score cp 7 {} nodes 1 pv b7b8q c7c6\n" \
            "info depth 2 multipv 2 score mate -4 nodes 1 pv a2a3 h7h6\n"
    assert move_scores(lists.format("").encode()) == {"b7b8q": 7, "a2a3": 4 - MATE}
    assert move_scores(lists.format("lowerbound").encode()) == {"b7b8q": 5, "a2a3": 4 - MATE}
    with pytest.raises(EngineFault): move_scores(b"info multipv 1 score cp 7 lowerbound nodes 1 pv e2e4\n")

def test_both_ways_of_reading_moves_agree(monkeypatch):
    lists = (b"info depth 1 multipv 1 score cp 9 nodes 1 nps 5 hashfull 0 tbhits 0 time 1 pv b7b8q c7c6\n"
             b"info depth 1 multipv 2 score mate -4 nodes 1 nps 5 tbhits 0 time 1 pv a2a3\n")
    broken = lists.replace(b" pv a2a3", b"").replace(b" pv b7b8q c7c6\n", b"\n") + b"info depth 1 pv a2a3\n"
    quick = move_scores(lists)
    with pytest.raises(ValueError): move_scores(broken)          # no move of one line is taken for another's
    monkeypatch.setattr("grpo_chess.uci._EXACT", re.compile("nothing like it"))
    assert quick == move_scores(lists) == {"b7b8q": 9, "a2a3": 4 - MATE}
    with pytest.raises(ValueError): move_scores(broken)

# --- right answers, always the same ones ---------------------------------------------------------

def test_scores_are_those_of_an_independent_program(truth):
    with EnginePool(single()) as pool: got = pool.evaluate(FENS)
    assert got.dtype == np.int32 and (got == truth).all()

@pytest.mark.parametrize("processes", [1, 2, 5])
def test_a_score_is_a_function_of_the_position(truth, processes):
    order = random.Random(processes).sample(range(len(FENS)), len(FENS))
    with EnginePool(EngineConfig(processes=processes)) as pool:
        pool.evaluate_moves(FENS[:5]), pool.best_moves(FENS[:5], skill=3), pool.evaluate(FENS[:7], depth=7)
        got = pool.evaluate([FENS[k] for k in order])
        assert (got == truth[order]).all()
        assert (pool.evaluate(FENS[::-1], trusted=True) == truth[::-1]).all()
        assert pool.asked == 17 + 2*len(FENS) and pool.restarts == 0

def test_history_by_name_is_another_number(truth):
    with EnginePool(single(deterministic=False)) as pool: warm = pool.evaluate(FENS)
    with EnginePool(single(deterministic=False)) as pool: back = pool.evaluate(FENS[::-1])[::-1]
    assert np.mean(warm != truth) > .2 and np.mean(warm != back) > .2
    assert np.mean(np.abs(warm - truth) < 300) > .8       # but the same kind of number

def test_history_counts_more_the_deeper_it_looks():
    "Law 2 at both ends: depth 1 and depth 8, two orders of asking, warm and clean."
    fens, order = FENS[:80], random.Random(5).sample(range(80), 80)
    changed = {}
    for deterministic in (False, True):
        for depth in (1, 8):
            cfg, shuffled = single(deterministic=deterministic), [fens[k] for k in order]
            with EnginePool(cfg) as pool: a = pool.evaluate(fens, depth=depth)
            with EnginePool(cfg) as pool: b = pool.evaluate(shuffled, depth=depth)
            changed[deterministic, depth] = np.mean(a[order] != b)
    assert changed[True, 1] == changed[True, 8] == 0
    assert changed[False, 1] < .5 < .8 < changed[False, 8]

def test_moves_against_an_independent_program():
    fens = FENS[:25]
    with EnginePool() as pool: got = pool.evaluate_moves(fens, depth=3)
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as eng:
        eng.configure({"Hash": 1})
        for fen, scores in zip(fens, got):
            lines = eng.analyse(chess.Board(fen), chess.engine.Limit(depth=3), multipv=256, game=object())
            want = {line["pv"][0].uci(): line["score"].relative.score(mate_score=MATE) for line in lines}
            assert scores == want and list(scores) == list(want)
            assert set(scores) == {m.uci() for m in chess.Board(fen).legal_moves}

def test_promotions_and_many_moves():
    many = "R6R/3Q4/1Q4Q1/4Q3/2Q4Q/Q4Q2/pp1Q4/kBNN1KB1 w - - 0 1"       # 218 legal moves
    with EnginePool(single()) as pool: a, b = pool.evaluate_moves([many, "8/P6k/8/8/8/8/8/K7 w - - 0 1"], depth=1)
    assert len(a) == 218 and {"a7a8q", "a7a8n", "a7a8r", "a7a8b"} <= set(b)

def test_best_moves_are_those_of_the_engine():
    with EnginePool() as pool: got = pool.best_moves(FENS[:60])
    with chess.engine.SimpleEngine.popen_uci(find_engine()) as eng:
        eng.configure({"Hash": 1})
        want = [eng.play(chess.Board(f), chess.engine.Limit(depth=4), game=object()).move.uci() for f in FENS[:60]]
    assert got == want

def test_games_that_are_over():
    with EnginePool(single()) as pool:
        assert pool.evaluate([MATED, STALEMATE, START, MATED])[[0, 1, 3]].tolist() == [-MATE, 0, -MATE]
        assert pool.evaluate_moves([STALEMATE, MATED]) == [{}, {}]
        for over in (MATED, STALEMATE):
            with pytest.raises(PositionError, match=over.split()[0]): pool.best_moves([START, over, START])
        assert pool.restarts == 0 and len(pool.best_moves([START])) == 1

def test_mates_and_sides():
    with EnginePool(single()) as pool:
        got = pool.evaluate(["6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1", "k7/8/1QK5/8/8/8/8/8 b - - 0 1",
                             "3qk3/8/8/8/8/8/8/4K3 b - - 0 1"], depth=6)
    assert got[0] == MATE - 1 and got[1] in (-MATE + 1, 0) and 500 < got[2]

def test_limits():
    with EnginePool(single()) as pool:
        usual = pool.evaluate(FENS[:20])
        assert (pool.evaluate(FENS[:20], depth=4) == usual).all()
        for other in (dict(depth=1), dict(nodes=2000)): assert (pool.evaluate(FENS[:20], **other) != usual).any()
        with pytest.raises(EngineError, match="3 of 20"): pool.evaluate_moves([START], nodes=30)
        assert len(pool.evaluate_moves([START], nodes=20000)[0]) == 20

def test_nothing_asked():
    with EnginePool(single()) as pool:
        assert pool.evaluate([]).shape == (0,) and pool.evaluate([]).dtype == np.int32
        assert pool.evaluate_moves([]) == [] == pool.best_moves([]) and pool.pids() == []

def test_skill_varies_and_leaves_no_trace(truth):
    with EnginePool(single()) as pool:
        assert len(set(pool.best_moves([START]*200, depth=1, skill=0))) > 2
        assert (pool.evaluate(FENS[:50]) == truth[:50]).all()
        assert len(set(pool.best_moves([START]*50))) == 1
        for bad in (-1, 21):
            with pytest.raises(ValueError): pool.best_moves([START], skill=bad)

def test_threads_share_a_pool(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        got, parts = {}, [(k, kind) for k in range(4) for kind in ("score", "best")]
        def ask(k, kind):
            for i in range(k, len(FENS), 20):
                got[i, kind] = pool.evaluate(FENS[i:i+2]) if kind == "score" else pool.best_moves(FENS[i:i+2])
        threads = [threading.Thread(target=ask, args=p) for p in parts]
        for t in threads: t.start()
        for t in threads: t.join()
        for (i, kind), answer in got.items():
            if kind == "score": assert (answer == truth[i:i+2]).all()
            else: assert all(chess.Move.from_uci(m) in chess.Board(f).legal_moves for m, f in zip(answer, FENS[i:i+2]))

def test_futures(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        futures = [pool.submit(FENS), pool.submit_moves(FENS[:3]), pool.submit_best(FENS[:3])]
        assert all(isinstance(f, Future) for f in futures)
        scores, moves, best = [f.result(30) for f in futures]
        assert (scores == truth).all() and [next(iter(m)) for m in moves] and len(best) == 3
        failed = pool.submit([START, NO_KING])
        assert isinstance(failed.exception(5), PositionError)
        slow, waiting = pool.submit(FENS, depth=9), pool.submit(FENS[:3], depth=2)
        assert waiting.cancel()
        with pytest.raises(CancelledError): waiting.result()
        assert len(slow.result(60)) == len(FENS)

# --- refused before it is sent -------------------------------------------------------------------

@pytest.mark.parametrize("bad", [NO_KING, "8/8/8/8 w - - 0 1", "", "4k3/8/8/8/8/8/8/4K2R w KQ - 0 1",
                                 "4k3/4R3/8/8/8/8/8/4K3 w - - 0 1"])
@pytest.mark.parametrize("ask", ["evaluate", "evaluate_moves", "best_moves"])
def test_illegal_positions_are_named_and_nothing_is_sent(ask, bad):
    with EnginePool(single()) as pool:
        with pytest.raises(PositionError) as e: getattr(pool, ask)([START, bad])
        assert repr(bad) in str(e.value) or bad.split()[0] in str(e.value)
        assert pool.pids() == [] and pool.asked == 0

def test_a_line_break_cannot_smuggle_commands():
    with EnginePool(single()) as pool:
        assert pool.evaluate([START.replace(" ", "\n")])[0] == pool.evaluate([START])[0]
        with pytest.raises(PositionError, match="line break"): pool.evaluate([START + "\nquit"], trusted=True)
        assert pool.restarts == 0

def test_misuse():
    with EnginePool(single()) as pool:
        with pytest.raises(TypeError): pool.evaluate(START)
        for limit in (dict(depth=0), dict(nodes=0), dict(depth=-3)):
            with pytest.raises(ValueError): pool.evaluate([START], **limit)
    for wrong in (dict(processes=-1), dict(processes=10**9), dict(timeout=0), dict(timeout=1e9),
                  dict(timeout=float("nan")), dict(retries=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))): EngineConfig(**wrong)

def test_an_illegal_position_that_is_trusted_ends_in_an_error_not_in_a_score():
    crash = "k7/8/8/8/8/8/8/7Q w - - 0 1"      # no white king: Stockfish 15.1 dies of it
    with EnginePool(single(timeout=5, retries=1)) as pool:
        with pytest.raises(EngineError, match="k7/8/8/8/8/8/8/7Q"): pool.evaluate([START, crash, START], trusted=True)
        assert pool.restarts == 1 and pool.evaluate([START]).shape == (1,)

# --- how many engines -----------------------------------------------------------------------------

def write(folder, **files):
    "Small files in a folder; a name's last `_` before `max`, ... stands for a dot."
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items(): (folder/name.replace("cpu_", "cpu.", 1)).write_text(text)

@pytest.mark.parametrize("quota, want", [
    ("150000 100000", 2), ("200000 100000", 2), ("50000 100000", 1), ("max 100000", 9), ("900000 50000", 9),
    ("rubbish", 9), ("", 9), ("1 2 3", 9), ("-1 100000", 9)])
def test_a_quota_limits_the_engines(tmp_path, monkeypatch, quota, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    (tmp_path/"member").write_text("0::/a/b\n")
    write(tmp_path/"root/a/b", cpu_max=quota)
    assert usable_cores(tmp_path/"root", tmp_path/"member") == want
    assert usable_cores(tmp_path/"root", tmp_path/"missing") == 9

def test_the_smallest_quota_on_the_way_up_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    (tmp_path/"member").write_text("0::/a/b\n")
    write(tmp_path/"root/a/b", cpu_max="500000 100000")
    write(tmp_path/"root/a", cpu_max="300000 100000")
    write(tmp_path, cpu_max="100000 100000")            # above the root of the groups: not a group
    assert usable_cores(tmp_path/"root", tmp_path/"member") == 3
    write(tmp_path/"root", cpu_max="200000 100000")     # what a container sees as its own
    assert usable_cores(tmp_path/"root", tmp_path/"member") == 2

def test_quotas_of_the_first_version(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    (tmp_path/"member").write_text("4:memory:/x\n3:cpuset:/x\n2:cpu,cpuacct:/x\n1:name=systemd:/x\n0::/\n")
    write(tmp_path/"root/cpu,cpuacct/x", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    assert usable_cores(tmp_path/"root", tmp_path/"member") == 9
    write(tmp_path/"root/cpu,cpuacct/x", cpu_cfs_quota_us="250000\n")
    write(tmp_path/"root/memory/x", cpu_cfs_quota_us="100000", cpu_cfs_period_us="100000")      # another kind of limit
    assert usable_cores(tmp_path/"root", tmp_path/"member") == 3

def test_the_pool_asks_for_the_quota(monkeypatch):
    monkeypatch.setattr("grpo_chess.engine.usable_cores", lambda: 3)
    with EnginePool() as pool: assert pool.processes == 3
    with EnginePool(single(processes=2)) as pool: assert pool.processes == 2

# --- engines that die, hang, lie -----------------------------------------------------------------

FAKE = '''#!{python} -IS
import json, os, sys, time
folder, n, fen = {folder!r}, 0, ""
legal = json.load(open({legal!r}))      # a legal move of every position that is asked here
born = len(os.listdir(folder))          # how many lived before
log = open(os.path.join(folder, str(born)), "w", buffering=1)
options = "Threads", "Hash", "MultiPV", "Skill Level"
def say(*lines): sys.stdout.write("".join(l + "\\n" for l in lines)); sys.stdout.flush()
def score(fen): return sum(map(ord, fen)) % 997
def answer(move=None): say(f"info depth 1 score cp {{score(fen)}} nodes 1 pv a1a1", f"bestmove {{move or legal[fen]}}")
while line := sys.stdin.readline():
    log.write(line)
    if line == "uci\\n": say(*(f"option name {{o}} type spin" for o in options), "uciok")
    elif line == "isready\\n": say("readyok")
    elif line.startswith("position"): fen = line[13:-1]
    elif line.startswith("go"):
{body}
        n += 1
'''

@pytest.fixture
def fake(tmp_path):
    "Make an engine that runs `body` on every `go`; .starts() and .log() tell what happened to it."
    class Fake(str):
        def starts(self): return len(os.listdir(self.folder))
        def log(self, k):
            with open(os.path.join(self.folder, str(k))) as f: said = f.read().splitlines()
            return [line for line in said if line != "isready"]
    def make(body):
        folder = tmp_path/f"log{len(os.listdir(tmp_path))}"
        folder.mkdir()
        path = Fake(folder.with_suffix(".engine"))
        legal = folder.with_suffix(".legal")
        legal.write_text(json.dumps({fen: next(iter(chess.Board(fen).legal_moves)).uci() for fen in [START, *FENS]}))
        body = textwrap.indent(body, " "*8)
        text = FAKE.format(python=sys.executable, folder=str(folder), legal=str(legal), body=body)
        with open(path, "w") as f: f.write(text)
        os.chmod(path, stat.S_IRWXU)
        uci._says_uciok.cache_clear()
        path.folder = str(folder)
        find_engine(path)       # its first start is the check
        return path
    return make

def fake_scores(fens): return [sum(map(ord, f)) % 997 for f in fens]

def test_what_is_sent(fake):
    path = fake("answer()")
    with EnginePool(single(path=path)) as pool:
        assert pool.evaluate(FENS).tolist() == fake_scores(FENS)
        pool.evaluate(FENS[:2], nodes=77, trusted=True)
        assert path.starts() == 2
        log = path.log(1)
    options = {"Threads": 1, "Hash": HASH_MB, "MultiPV": 1, "Skill Level": 20}
    assert HASH_MB == 1 and log[0] == "uci"
    assert set(log[1:5]) == {f"setoption name {k} value {v}" for k, v in options.items()}
    want = [line for f in FENS for line in ("ucinewgame", f"position fen {f}", "go depth 4")]
    assert log[5:] == want + [line for f in FENS[:2] for line in ("ucinewgame", f"position fen {f}", "go nodes 77")]

def test_what_is_sent_when_history_is_kept(fake):
    path = fake("answer()")
    with EnginePool(single(path=path, deterministic=False)) as pool:
        pool.evaluate(FENS[:10])
        pool.best_moves(FENS[:1], skill=4)
        log = path.log(1)
    assert "ucinewgame" not in log and "setoption name Skill Level value 4" in log

def test_dies_and_is_asked_again(fake):
    path = fake("if born == 1 and n == 13: os._exit(3)\nanswer()")
    with EnginePool(single(path=path)) as pool:
        assert pool.evaluate(FENS).tolist() == fake_scores(FENS)
        assert pool.restarts == 1 and path.starts() == 3
        pool.evaluate(FENS)
        assert pool.restarts == 1

def test_hangs_and_is_asked_again(fake):
    path = fake("if born == 1 and n == 13: time.sleep(1000)\nanswer()")
    with EnginePool(single(path=path, timeout=.5)) as pool:
        assert pool.evaluate(FENS).tolist() == fake_scores(FENS) and pool.restarts == 1

def test_two_die_in_turn(fake):
    path = fake("if n == 40: os._exit(1)\nanswer()")
    with EnginePool(EngineConfig(path=path, processes=2, retries=1)) as pool:
        assert pool.evaluate(FENS[:100]).tolist() == fake_scores(FENS[:100]) and pool.restarts >= 1

BROKEN = dict(
    dies="os._exit(7)",
    dies_at_one="if fen.startswith(%r): os._exit(7)\nanswer()" % FENS[5].split()[0],
    hangs="time.sleep(1000)",
    talks_forever="while True: say('info depth 1 score cp 5 nodes 1 pv a1a1'*1000)",
    no_score="say('bestmove ' + legal[fen])",
    only_a_bound="say('info depth 1 score cp 5 lowerbound nodes 1', 'bestmove ' + legal[fen])",
    no_number="say('info depth 1 score cp five nodes 1', 'bestmove ' + legal[fen])",
    unknown_score="say('info depth 1 score elo 5 nodes 1', 'bestmove ' + legal[fen])",
    mate_in_40000="say('info depth 1 score mate 40000 nodes 1', 'bestmove ' + legal[fen])",
    mated_in_1000="say('info depth 1 score mate -1000 nodes 1', 'bestmove ' + legal[fen])",
    more_than_any_position="say('info depth 1 score cp 99999999999999999999999 nodes 1', 'bestmove ' + legal[fen])",
    best_move_is_no_move="answer('hello')",
    best_move_off_the_board="answer('e9e4')",
    best_move_of_the_other_side="answer('e7e5' if ' w ' in fen else 'e2e4')",
    empty_move="say('info depth 1 score cp 5 nodes 1', 'bestmove  ')",
    invented_draw="say('info depth 0 score cp 0', 'bestmove (none)')",
    too_many="answer(); answer()",
    too_many_at_the_end="answer()\nif n == 3: answer()",
    closes_output="os.close(1); time.sleep(1000)",
    half_a_line="sys.stdout.write('info depth 1 score cp 5 nodes 1\\nbestmove e2'); sys.stdout.flush(); os._exit(0)",
)

@pytest.mark.parametrize("how", BROKEN)
def test_no_answer_is_an_error_never_a_score(fake, how):
    path = fake(BROKEN[how])
    with EnginePool(single(path=path, timeout=.4, retries=1)) as pool:
        start = time.monotonic()
        with pytest.raises(EngineError, match="failed 2 times") as e: pool.evaluate(FENS[:12])
        assert time.monotonic() - start < 10 and pool.restarts == 1 and path.starts() == 3
        assert any(repr(f) in str(e.value) for f in FENS[:12])
        if how == "dies_at_one": assert repr(FENS[5]) in str(e.value)
        if how == "dies": assert "exit code 7" in str(e.value)
        if how == "hangs": assert "no answer within 0.4 s" in str(e.value)

def test_illegal_best_move_and_missing_move_scores(fake):
    path = fake("say('info depth 1 multipv 1 score cp 5 nodes 1 pv a1a1', 'bestmove e2e5')")
    with EnginePool(single(path=path, retries=0)) as pool:
        with pytest.raises(EngineError, match="illegal"): pool.best_moves([START])
        with pytest.raises(EngineError, match="no score"): pool.evaluate_moves([START])

def test_what_may_be_played_is_asked_of_the_rules_where_positions_are_not_trusted(fake):
    "`e2e5`: a piece of the mover's, an empty square, and no legal move."
    said = "say('info depth 1 multipv 1 score cp 5 nodes 1 pv {}', 'bestmove {}')"
    with EnginePool(single(path=fake(said.format("e2e5", "e2e5")), retries=0)) as pool:
        for ask in (pool.evaluate, pool.evaluate_moves, pool.best_moves):
            with pytest.raises(EngineError, match="e2e5 is illegal"): ask([START])
        with pytest.raises(EngineError, match="e2e5 is illegal"): pool.best_moves([START], trusted=True)
        assert pool.evaluate([START], trusted=True).tolist() == [5]             # the cheap check alone
    with EnginePool(single(path=fake(said.format("e2e4", "e7e5")), retries=0)) as pool:
        with pytest.raises(EngineError, match="e7e5 is illegal"): pool.evaluate([START], trusted=True)
        with pytest.raises(EngineError, match="no score"): pool.evaluate_moves([START], trusted=True)
    with EnginePool(single(path=fake(said.format("e7e5", "e7e5")), retries=0)) as pool:
        with pytest.raises(EngineError, match="e7e5 is illegal"): pool.evaluate_moves([START], trusted=True)

def test_the_cheap_check_against_the_board():
    "It passes every legal move, and nothing that moves no piece of the mover's or takes one of them."
    squares = [f + r for f in "abcdefgh" for r in "12345678"]
    for fen in FENS[:30]:
        board = chess.Board(fen)
        assert all(can_be_played(m.uci(), fen) for m in board.legal_moves)
        own = {chess.square_name(s) for s in chess.SquareSet(board.occupied_co[board.turn])}
        for a in squares:
            for b in squares: assert can_be_played(a + b, fen) == (a in own and b not in own)
    castles = "r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 0 1"
    assert can_be_played("e8g8", castles) and can_be_played("a2a1q", "k7/8/8/8/8/8/p7/4K3 b - - 0 1")
    assert not any(can_be_played(m, START) for m in ("", "0000", "(none)", "e2", "e2e4x", "E2E4", "e2e4qq", "i2i4"))

def test_slow_is_not_hung(fake):
    path = fake("time.sleep(.4)\nanswer()")
    with EnginePool(single(path=path, timeout=1.2)) as pool:      # four of them make one chunk
        assert pool.evaluate(FENS[:4]).tolist() == fake_scores(FENS[:4]) and pool.restarts == 0

def test_talk_without_end_does_not_fill_the_memory(fake):
    with EnginePool(single(path=fake(BROKEN["talks_forever"]), timeout=60, retries=0)) as pool:
        with pytest.raises(EngineError, match="talks without answering"): pool.submit(FENS[:3]).result(30)

def test_a_failed_question_does_not_hurt_the_next(fake):
    path = fake(BROKEN["dies_at_one"])
    with EnginePool(EngineConfig(path=path, processes=2, retries=1)) as pool:
        bad, good = pool.submit(FENS[:12]), pool.submit(FENS[20:60])
        with pytest.raises(EngineError): bad.result(10)
        assert good.result(10).tolist() == fake_scores(FENS[20:60])
        assert pool.evaluate(FENS[20:60]).tolist() == fake_scores(FENS[20:60])

def test_an_engine_that_disappears(fake):
    path = fake("answer()")
    pool = EnginePool(single(path=path, retries=1))
    os.remove(path)
    with pool, pytest.raises(EngineError, match="failed 2 times"): pool.evaluate(FENS[:3])

def test_an_engine_without_the_options(tmp_path):
    path = tmp_path/"bare"
    path.write_text("#!/bin/sh\nread line; echo uciok; while read line; do :; done\n")
    path.chmod(0o755)
    with EnginePool(single(path=str(path))) as pool:
        for _ in range(2):
            with pytest.raises(EngineError, match="no UCI option"): pool.evaluate([START])
        assert len(pool.pids()) == 1        # the engine was kept, not leaked

def test_stockfish_killed_while_it_works(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        deep = pool.evaluate(FENS, depth=7)
        future = pool.submit(FENS, depth=7)
        time.sleep(.1)
        for pid in pool.pids(): os.kill(pid, signal.SIGKILL)
        assert (future.result(60) == deep).all() and pool.restarts == 2
        os.kill(pool.pids()[0], signal.SIGKILL)     # one that is idle
        assert (pool.evaluate(FENS) == truth).all() and pool.restarts in (2, 3)

def test_stockfish_stopped_while_it_works():
    with EnginePool(single(timeout=1)) as pool:
        want = pool.evaluate(FENS[:80], depth=6)
        os.kill(pool.pids()[0], signal.SIGSTOP)
        assert (pool.evaluate(FENS[:80], depth=6) == want).all() and pool.restarts == 1

# --- finding one ---------------------------------------------------------------------------------

def test_find_engine(tmp_path, monkeypatch):
    real = find_engine()
    assert os.path.isabs(real) and find_engine(real) == real
    monkeypatch.setenv("PATH", os.path.dirname(real) + os.pathsep + os.environ["PATH"])     # nobody falls back on it
    for bad in ("/no/such/engine", str(tmp_path), "/etc/passwd", "/bin/false"):
        with pytest.raises(EngineError, match=bad): find_engine(bad)
        monkeypatch.setenv("STOCKFISH_PATH", bad)
        with pytest.raises(EngineError, match=bad): find_engine()
    with pytest.raises(EngineError, match="/bin/cat is not a UCI engine: it gave no answer"):
        uci._says_uciok("/bin/cat", 0, timeout=.3)
    monkeypatch.setenv("STOCKFISH_PATH", real)
    assert find_engine() == real
    monkeypatch.delenv("STOCKFISH_PATH")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(uci, "PLACES", (os.path.dirname(real),))
    assert find_engine() == real
    monkeypatch.setattr(uci, "PLACES", (str(tmp_path),))
    with pytest.raises(EngineError, match="apt-get install stockfish"): find_engine()
    (tmp_path/"stockfish").symlink_to(real)
    assert find_engine() == str(tmp_path/"stockfish")

# --- the end -------------------------------------------------------------------------------------

def test_close():
    pool = EnginePool(EngineConfig(processes=2))
    future = pool.submit(FENS, depth=18)
    assert until(lambda: len(pool.pids()) == 2)
    pids, start = pool.pids(), time.monotonic()
    pool.close()
    assert time.monotonic() - start < 3 and not any(map(running, pids)) and pool.pids() == []
    with pytest.raises(EngineError, match="closed"): future.result(0)
    with pytest.raises(EngineError, match="closed"): pool.evaluate([START])
    pool.close()

def test_a_dropped_pool_closes_itself():
    pool = EnginePool(EngineConfig(processes=2))
    future = pool.submit(FENS)
    pids = pool.pids()
    del pool
    assert len(future.result(30)) == len(FENS)      # a pool with work to do lives on
    gc.collect()
    assert until(lambda: not any(map(running, pids)))

def test_an_interrupt_drops_the_rest(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        pool.evaluate(FENS[:10])
        old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, .5)
            with pytest.raises(KeyboardInterrupt): pool.evaluate(FENS*20, depth=9, trusted=True)
        finally: signal.signal(signal.SIGALRM, old)
        start = time.monotonic()
        assert (pool.evaluate(FENS[:50]) == truth[:50]).all() and time.monotonic() - start < 5

def script(body, *args, wait=True):
    "Run a program that uses the pool."
    text = "import os, sys, time, threading, signal\nfrom grpo_chess import uci\n" \
           "from grpo_chess.engine import EnginePool, EngineConfig\nSTART = '%s'\n" % START + textwrap.dedent(body)
    p = subprocess.Popen([sys.executable, "-c", text, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": ROOT})
    return p if not wait else (*p.communicate(timeout=30), p.returncode)

@pytest.mark.parametrize("at_work", [False, True])
def test_a_program_that_forgets_to_close_ends(at_work):
    start = time.monotonic()
    out, err, rc = script("""
        pool = EnginePool(EngineConfig(processes=2))
        pool.evaluate([START]*10)
        if sys.argv[1] == "True": future = pool.submit([START]*10, depth=40)
        time.sleep(.2)
        print(*pool.pids())
    """, str(at_work))
    assert rc == 0 and err == "" and time.monotonic() - start < 15
    assert len(out.split()) == 2 and until(lambda: not any(running(int(p)) for p in out.split()), 3)

LAUNCHES = dict(both="", only_end_of_input="uci.launch_command = lambda path: [path]")

@pytest.mark.parametrize("state", ["idle", "searching"])
@pytest.mark.parametrize("mechanism", ["both", "only_end_of_input"])
def test_engines_die_with_a_parent_that_is_killed(state, mechanism):
    p = script(LAUNCHES[mechanism] + """
pool = EnginePool(EngineConfig(processes=2))
pool.evaluate([START]*10)
if sys.argv[1] == "searching": future = pool.submit([START]*10, depth=60)
time.sleep(.2)
print(*pool.pids(), flush=True)
time.sleep(100)
""", state, wait=False)
    pids = [int(x) for x in p.stdout.readline().split()]
    assert len(pids) == 2 and all(map(running, pids))
    p.kill(), p.communicate()
    assert until(lambda: not any(map(running, pids)), 3)

@pytest.mark.parametrize("mechanism", ["both", "only_end_of_input"])
def test_engines_die_though_a_forked_child_lives_on(mechanism):
    p = script(LAUNCHES[mechanism] + """
pool = EnginePool(EngineConfig(processes=2))
pool.evaluate([START]*10)
future = pool.submit([START]*10, depth=60)
time.sleep(.2)
child = os.fork()
if child == 0: time.sleep(100)
print(child, *pool.pids(), flush=True)
time.sleep(100)
""", wait=False)
    child, *pids = [int(x) for x in p.stdout.readline().split()]
    assert len(pids) == 2 and all(map(running, pids))
    p.kill(), p.wait()
    try: assert until(lambda: not any(map(running, pids)), 3) and running(child)
    finally:
        os.kill(child, signal.SIGKILL)
        p.communicate()

@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_a_hung_engine_dies_with_its_parent(fake):
    path = fake("time.sleep(1000)")
    p = script("""
        pool = EnginePool(EngineConfig(path=sys.argv[1], processes=1))
        future = pool.submit([START])
        while not pool.pids(): time.sleep(.01)
        print(*pool.pids(), flush=True)
        time.sleep(100)
    """, path, wait=False)
    pid = int(p.stdout.readline())
    try: assert until(lambda: path.starts() == 3 and path.log(2)[-1:] == ["go depth 4"]) and running(pid)
    finally: p.kill(), p.communicate()
    assert until(lambda: not running(pid), 3)

# --- forks ---------------------------------------------------------------------------------------

def in_child(f):
    "Run `f` in a forked child; its return value, or the exception's text."
    ctx = multiprocessing.get_context("fork")
    ours, theirs = ctx.Pipe()
    def run():
        try: theirs.send(f())
        except BaseException as e: theirs.send(f"{type(e).__name__}: {e}")
    p = ctx.Process(target=run)
    p.start()
    assert ours.poll(30), "the child hangs"
    out = ours.recv()
    p.join(10)
    assert p.exitcode == 0
    return out

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_survives_a_fork(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        pool.evaluate(FENS[:20])
        before = pool.pids()
        def child():
            early = pool.pids()
            return early, pool.evaluate(FENS).tolist(), pool.pids(), pool.best_moves(FENS[:2])
        early, scores, pids, best = in_child(child)
        assert early == [] and scores == truth.tolist() and len(pids) == 2 and not set(pids) & set(before)
        assert until(lambda: not any(map(running, pids)), 3)       # the child's engines went with it
        assert (pool.evaluate(FENS) == truth).all() and pool.restarts == 0 and pool.pids() == before

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_at_work(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        want = pool.evaluate(FENS, depth=7)
        future = pool.submit(FENS, depth=7)
        time.sleep(.05)
        assert "asked before a fork" in in_child(lambda: future.result(20))
        assert in_child(lambda: pool.evaluate(FENS[:50]).tolist()) == truth[:50].tolist()
        assert in_child(lambda: pool.close()) is None       # the child's close is not ours
        assert (future.result(60) == want).all() and pool.restarts == 0

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forks_while_threads_ask_and_engines_start(truth):
    with EnginePool(EngineConfig(processes=2)) as pool:
        stop, wrong = threading.Event(), []
        def ask():
            while not stop.is_set():
                with EnginePool(single()) as other: wrong.extend(np.flatnonzero(other.evaluate(FENS[:5]) != truth[:5]))
                wrong.extend(np.flatnonzero(pool.evaluate(FENS[:30]) != truth[:30]))
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for t in threads: t.start()
        for _ in range(5): assert in_child(lambda: pool.evaluate(FENS[:10]).tolist()) == truth[:10].tolist()
        stop.set()
        for t in threads: t.join(30)
        assert wrong == [] and pool.restarts == 0


def test_engines_give_way_where_they_are_told_to_and_nowhere_else():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for yields in (False, True):
        with EnginePool(EngineConfig(processes=1), yields=yields) as pool:
            pool.evaluate([START])
            assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pool.pids()] == [min(19, own + 10*yields)]
            assert [os.getsid(pid) for pid in pool.pids()] == [os.getsid(0)]       # Linux weighs sessions alike
            os.kill(*pool.pids(), signal.SIGKILL)                                  # and so does the next one
            pool.evaluate([START])
            assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pool.pids()] == [min(19, own + 10*yields)]
