"Engines that are not Stockfish, as opponents; .ci/setup opponents installs them."
import os
import shutil
import time

import chess
import pytest

from grpo_chess.arena import ArenaConfig, run
from grpo_chess.engine import EngineError
from grpo_chess.players import ArenaError, OtherEngine, erring_player, random_openings, random_player
from grpo_chess.uci import PLACES, find_engine

OPPONENTS = {"gnuchessu": dict(depth=1), "fairy-stockfish": dict(depth=1, skill=-20), "toga2": dict(depth=1)}


def there(name): return any(shutil.which(name, path=path) for path in (None, *PLACES))


@pytest.mark.parametrize("name", OPPONENTS)
def test_an_engine_of_the_system_plays_legal_moves_and_the_same_ones_again(name):
    if not there(name): pytest.skip(f"{name} is not installed: .ci/setup opponents")
    engine, boards = OtherEngine(name, **OPPONENTS[name]), random_openings(20, seed=4)
    moves = engine(boards, list(range(20)), 0)
    assert all(b.is_legal(m) for b, m in zip(boards, moves))
    if "skill" not in OPPONENTS[name]: assert engine(boards, list(range(20)), 0) == moves     # skill errs by the clock
    engine.close()


def test_a_command_is_found_where_debian_puts_games():
    assert find_engine("stockfish") == find_engine()
    with pytest.raises(EngineError, match="no engine at 'nosuch'"): find_engine("nosuch")


def test_another_engine_is_named_on_the_command_line():
    cfg = ArenaConfig(a="random", b="engine:path=stockfish,depth=1", games=16, floor=False, max_plies=60)
    match = run(cfg, say=lambda *_, **__: None)["match"]
    assert match.losses > 8


@pytest.mark.parametrize("name, says", [("engine:depth=1", "needs its path"), ("engine:path=stockfish", "one limit"),
                                        ("engine:path=stockfish,depth=0", "one limit"),
                                        ("engine:path=stockfish,depth=1,errs=2", "share")])
def test_what_cannot_be_is_refused(name, says):
    with pytest.raises(ArenaError, match=says): run(ArenaConfig(a="random", b=name, games=16, floor=False), say=print)


def test_errors_are_seeded_and_as_frequent_as_asked():
    def first(boards, games, ply): return [next(iter(b.legal_moves)) for b in boards]
    boards, games = [chess.Board()]*2000, list(range(2000))
    moves = erring_player(first, .3, seed=5)(boards, games, 3)
    other = erring_player(first, .3, seed=6)(boards, games, 3)
    assert moves == erring_player(first, .3, seed=5)(boards, games, 3) != other
    assert .24 < sum(m != first(boards[:1], [0], 3)[0] for m in moves)/2000 < .34
    assert erring_player(first, 1., 5)(boards, games, 3) == random_player(5)(boards, games, 3)


def test_an_engine_behind_a_script_ends_with_its_player(tmp_path):
    script, note = tmp_path/"engine", tmp_path/"pid"
    script.write_text(f"#!/bin/sh\n{find_engine()} & echo $! > {note}\nwait\n")
    script.chmod(0o755)
    with pytest.raises(EngineError): OtherEngine(str(script), depth=1)      # a job in the background has no input
    script.write_text(f"#!/bin/sh\n{find_engine()}\n")
    engine = OtherEngine(str(script), depth=1)
    assert engine([chess.Board()], [0], 0)[0] in chess.Board().legal_moves
    group = engine.engine.transport.get_pid()
    assert os.getpgid(group) == group
    engine.close()
    for _ in range(100):
        try: os.killpg(group, 0)
        except ProcessLookupError: return
        time.sleep(.05)
    raise AssertionError("something of the group still runs")


def test_looking_for_an_engine_leaves_nothing_behind(tmp_path):
    script, note = tmp_path/"engine", tmp_path/"pids"
    script.write_text(f"#!/bin/sh\necho $$ >> {note}\n{find_engine()}\n")
    script.chmod(0o755)
    find_engine(str(script))
    for pid in note.read_text().split():
        for _ in range(100):
            try: os.killpg(int(pid), 0)
            except ProcessLookupError: break
            time.sleep(.05)
        else: raise AssertionError("something of the group still runs")
