"""The engine: what it says, what it plays, and what it answers to nonsense."""

import inspect
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import chess
import chess.engine
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_chess import load
from grpo_chess.board import parse_fen
from grpo_chess.model import WEIGHTS, ChessTransformer, ModelConfig, load_model, save_model
from grpo_chess.play import OPTIONS, Engine, PlayConfig, main
from grpo_chess.settings import ConfigError, known_keys

TOP = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "grpo_chess.play"]
ENV = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")     # which is strict
LICHESS_BOT = {"Move Overhead": 100, "Threads": 4, "Hash": 512, "SyzygyPath": "./syzygy/", "UCI_ShowWDL": True}
MATED = "7k/6Q1/6K1/8/8/8/8/8 b - - 0 1"


def hear(*lines, cfg=None):
    "What an engine says to some lines, in this process."
    said = []
    engine = Engine(cfg or PlayConfig(), said.append)
    for line in lines:
        engine.handle(line)
    return said


def bestmoves(said):
    return [line.split()[1] for line in said if line.startswith("bestmove ")]


def errors(said):
    return [line for line in said if line.startswith("info string error: ")]


def run(text, *args, seconds=60):
    "The command as a program, with its whole input at once."
    return subprocess.run([*COMMAND, *args], input=text, capture_output=True, timeout=seconds, env=ENV)


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "my net.safetensors"
    save_model(ChessTransformer(ModelConfig(width=16, layers=1, heads=2)), path)
    return str(path)


@pytest.fixture
def damaged(net, tmp_path):
    "Weights with one NaN in one tensor."
    state, path = load_file(net), tmp_path / "nan.safetensors"
    next(iter(state.values())).view(-1)[3] = float("nan")
    with safe_open(net, "pt") as file:
        about = {k: v for k, v in file.metadata().items() if not k.startswith("sha256")}       # else it is damaged
        save_file(state, path, metadata=about)
    return str(path)


# What it says


def test_introduces_itself_before_torch_is_loaded():
    "By the command itself: what reads its options has loaded torch before now, where the engine alone did not."
    command = [sys.executable, "-X", "importtime", "-m", "grpo_chess.play"]
    done = subprocess.run(command, input="uci\nquit\n", capture_output=True, text=True, env=ENV, check=True)
    lines = done.stdout.splitlines()
    assert "grpo_chess.settings" in done.stderr and "torch" not in done.stderr
    assert lines[0].startswith("id name ") and lines[1].startswith("id author ") and lines[-1] == "uciok"
    assert all(line.startswith("option name ") for line in lines[2:-1]) and len(lines) - 3 == len(OPTIONS)


def test_says_uciok_soon():
    "Of a processor: other programs may keep it waiting."

    def seconds():
        before = os.times()
        assert b"uciok" in run(b"uci\nquit\n").stdout
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])       # of children, in their own code and in the system's

    assert min(seconds() for _ in range(2)) < 2           # .25 where nothing else runs; beside much else it counts more


def test_moves_take_less_than_fifty_milliseconds():
    "Of one processor, from `go` to `bestmove`, with all moves of the game read again each time."
    rng, board, took, said = random.Random(0), chess.Board(), [], []
    engine = Engine(PlayConfig(), said.append)
    engine.handle("isready")
    while len(took) < 60 and not board.is_game_over():
        board.push(rng.choice(list(board.legal_moves)))
        started = time.process_time()
        engine.handle(f"position startpos moves {' '.join(m.uci() for m in board.move_stack)}")
        engine.handle("go wtime 1000 btime 1000")
        took.append(time.process_time() - started)
    assert torch.get_num_threads() == 1 and statistics.median(took) < 0.05


def test_no_score_is_invented():
    said = hear("setoption name MultiPV value 5", "position startpos moves d2d4", "go depth 20")
    infos = [line.split() for line in said if line.startswith("info depth")]
    assert [words[words.index("multipv") + 1] for words in infos] == list("12345")
    assert not any({"score", "cp", "wdl", "hashfull", "tbhits"} & {*words} for words in infos)
    board = chess.Board()
    board.push_uci("d2d4")
    expected = list(load().probabilities(board).items())[:5]
    assert [words[words.index("pv") + 1] for words in infos] == [move.uci() for move, _ in expected]
    shares = next(line for line in said if line.startswith("info string policy ")).split()[3:]
    assert shares == [word for move, p in expected for word in (move.uci(), f"{p:.1%}")]


def test_more_lines_than_moves():
    said = hear("setoption name MultiPV value 218", "position fen 7k/8/8/8/8/8/1r6/K7 w - - 0 1", "go")
    assert sum(line.startswith("info depth") for line in said) == 1 and bestmoves(said) == ["a1b2"]


# What it plays


def test_plays_the_policys_move_in_every_position():
    rng, policy, said = random.Random(1), load(), []
    engine = Engine(PlayConfig(), said.append)
    for _ in range(4):
        board = chess.Board()
        while not board.is_game_over() and board.ply() < 60:
            engine.handle(f"position fen {board.fen()}")
            engine.handle("go movetime 1")
            assert bestmoves(said)[-1] == policy.move(board).uci()
            board.push(rng.choice(list(board.legal_moves)))
    assert not errors(said)


def test_draws_with_its_seed():
    "As `load` does; with -1 two starts differ, and the seed that a start took repeats it."
    board, warm = chess.Board(), load("tiny", 1.0)
    for seed in range(8):
        assert bestmoves(hear("go", cfg=PlayConfig(temperature=1.0, seed=seed))) == [warm.move(board, seed).uci()]
    moves, said = set(), []
    for _ in range(12):
        said = hear("go", cfg=PlayConfig(temperature=1.0))
        moves |= {*bestmoves(said)}
    assert len(moves) > 1
    seed = int(said[0].split()[-1])
    assert bestmoves(hear("go", cfg=PlayConfig(temperature=1.0, seed=seed))) == bestmoves(said)


def test_games_of_one_seed_differ_and_repeat():
    lines = [line for _ in range(6) for line in ("ucinewgame", "position startpos", "go")]
    first, again = (bestmoves(hear(*lines, cfg=PlayConfig(temperature=2.0, seed=4))) for _ in range(2))
    assert first == again and len(set(first)) > 1


def test_draws_as_often_as_it_says():
    said = hear(*["go", "ucinewgame"] * 400, cfg=PlayConfig(temperature=1.0, seed=0))
    p = load("tiny", 1.0).probabilities(chess.Board())[chess.Move.from_uci("e2e4")]
    often = bestmoves(said).count("e2e4") / 400
    assert abs(often - p) < 4 * (p * (1 - p) / 400) ** 0.5


SEEN = "d2d4 d7d5 g1f3 g8f6 f3g1 f6g8"          # the policy's g1f3 brings back what was there after three plies


def test_it_repeats_no_position_of_the_game():
    "The moves of `position` are the game; a position without them has none, and with `Repeats` it is not looked at."
    game, policy = f"position startpos moves {SEEN}", load()
    after = chess.Board()
    for word in SEEN.split():
        after.push_uci(word)
    likeliest, second = (move.uci() for move in [*policy.probabilities(after)][:2])
    assert likeliest == "g1f3"
    told = hear(game, "go")
    assert bestmoves(told) == [second] and "info string left out, because they repeat a position: g1f3" in told
    assert "repeats no position" in told[0]
    assert bestmoves(hear(f"position fen {after.fen()}", "go")) == ["g1f3"]
    repeats = "setoption name Repeats value true"
    for plain in (hear(repeats, game, "go"), hear(game, "go", cfg=PlayConfig(repeats=True))):
        assert bestmoves(plain) == ["g1f3"] and not any("repeat" in line for line in plain)
    assert bestmoves(hear(game, "go", repeats, "go")) == [second, "g1f3"]


def test_no_drawn_move_repeats_and_the_others_share_its_probability():
    game = f"position startpos moves {SEEN}"
    said = hear(game, *["go", "ucinewgame", game] * 100, cfg=PlayConfig(temperature=1.0, seed=3))
    moves = bestmoves(said)
    assert len(moves) == 100 and "g1f3" not in moves and len({*moves}) > 5
    listed = next(line for line in said if line.startswith("info string policy ")).split()[3:]
    policy = load("tiny", 1.0)
    board = chess.Board()
    for word in SEEN.split():
        board.push_uci(word)
    plain = policy.probabilities(board)
    best = chess.Move.from_uci(listed[0])
    assert listed[1] == f"{plain[best] / (1 - plain[chess.Move.from_uci('g1f3')]):.1%}"


def test_the_only_move_is_played_though_it_repeats():
    said = hear(f"position startpos moves {SEEN}", "go searchmoves g1f3")
    assert bestmoves(said) == ["g1f3"] and not errors(said) and not any("left out" in line for line in said)


def test_temperature_is_set_in_the_middle_of_a_game():
    said = hear("setoption name Seed value 7", "go", "setoption name temperature value 1.0", "go",
                "setoption name Temperature value 0", "go")
    greedy, warm = load().move(chess.Board()).uci(), load("tiny", 1.0).move(chess.Board(), 7).uci()
    assert bestmoves(said) == [greedy, warm, greedy] and greedy != warm


def test_searchmoves():
    said = hear("go searchmoves a2a3 h2h4 nodes 1", "go searchmoves e2e5 a2a4 infinite", "stop", "go searchmoves e2e5",
                "go searchmoves")
    assert bestmoves(said)[0] in ("a2a3", "h2h4") and bestmoves(said)[1] == "a2a4" and len(errors(said)) == 2
    assert bestmoves(said)[2:] == [load().move(chess.Board()).uci()] * 2


def test_weights_are_chosen(net):
    said = hear(f"setoption name Weights value {net}", "isready", "go", "setoption name Weights value <empty>", "go",
                "setoption name Weights value untrained:seed=1", "go")
    assert bestmoves(said) == [load(x).move(chess.Board()).uci() for x in (net, "tiny", "untrained:seed=1")]
    assert not errors(said)


def test_a_run_folder_is_played(net, tmp_path):
    shutil.copy(net, tmp_path / "model.safetensors")
    assert bestmoves(hear("go", cfg=PlayConfig(str(tmp_path)))) == [load(net).move(chess.Board()).uci()]


@pytest.mark.parametrize("colour", [chess.WHITE, chess.BLACK])
def test_whole_games_through_python_chess(colour):
    "With clocks, pondering, several lines and claims of draws; every answer is legal, or python-chess raises."
    rng = random.Random(int(colour))
    args = ["--temperature=1", f"--seed={int(colour)}"]
    with chess.engine.SimpleEngine.popen_uci([*COMMAND, *args], timeout=120, env=ENV) as engine:
        engine.configure(LICHESS_BOT)
        for game in range(3):
            board = chess.Board()
            while not board.is_game_over(claim_draw=True) and board.ply() < 200:
                if board.turn != colour:
                    board.push(rng.choice(list(board.legal_moves)))
                    continue
                limit = chess.engine.Limit(white_clock=5, black_clock=5, white_inc=0.1)
                said = engine.play(board, limit, game=game, ponder=True, info=chess.engine.INFO_ALL)
                assert "score" not in said.info and said.info["string"].startswith("policy ") and not said.ponder
                board.push(said.move)
            engine.ping()


def test_analysis_through_python_chess():
    with chess.engine.SimpleEngine.popen_uci(COMMAND, timeout=120, env=ENV) as engine:
        lines = engine.analyse(chess.Board(), chess.engine.Limit(time=0.1), multipv=3)
        assert [line["pv"][0].uci() for line in lines] == [m.uci() for m in [*load().probabilities(chess.Board())][:3]]
        with engine.analysis(chess.Board()) as going_on:
            assert next(going_on)
            going_on.stop()
            assert going_on.wait().move == lines[0]["pv"][0]
        only = engine.play(chess.Board(), chess.engine.Limit(depth=1), root_moves=[chess.Move.from_uci("h2h3")])
        assert only.move.uci() == "h2h3"
        with pytest.raises(chess.engine.EngineError):       # it knows standard chess only, and does not say otherwise
            engine.play(chess.Board.from_chess960_pos(3), chess.engine.Limit(depth=1))
        with pytest.raises(chess.engine.EngineError):
            engine.configure({"Contempt": 1})


def test_the_suite_for_uci_engines(tmp_path, monkeypatch):
    suite = pytest.importorskip("uci_test_suite.tests", reason="no uci-test-suite: `pip install uci-test-suite`")
    script = tmp_path / "engine.sh"
    script.write_text(f"#!/bin/sh\nexec {' '.join(COMMAND)}\n")
    script.chmod(0o755)
    patient = partial(chess.engine.SimpleEngine.popen_uci, timeout=120, env=ENV)
    monkeypatch.setattr(chess.engine.SimpleEngine, "popen_uci", patient)
    results = suite.UCITester(str(script)).run_all_tests()
    assert len(results) == 12 and all(r.passed for r in results), "\n".join(map(str, results))


# Odd input


def test_a_kept_move_waits():
    said = hear("go infinite", "isready")
    assert said[-1] == "readyok" and not bestmoves(said)
    assert len(bestmoves(hear("go infinite", "stop", "stop"))) == 1
    assert not bestmoves(hear("go ponder wtime 100", "isready")) and bestmoves(hear("go ponder", "ponderhit", "stop"))
    assert not bestmoves(hear("go ponder infinite", "ponderhit"))
    assert len(bestmoves(hear("go infinite", "go infinite", "go depth 1"))) == 3
    assert not bestmoves(hear("stop", "ponderhit", "isready"))


@pytest.mark.parametrize("line, says", [
    ("xboard", "no command"), ("\0\1\2 \x7f", "no command"), ("e2e4", "no command"), ("x" * 10_000, "no command"),
    ("setoption", "no option"), ("setoption name", "no option"), ("setoption name Hash value many", "Hash"),
    ("setoption name Hashh value 3", "did you mean 'Hash'"), ("setoption name Hash", "Hash"),
    ("setoption name MultiPV value 0", "from 1 to"),
    ("setoption name Ponder value maybe", "true or false"), ("setoption name Temperature value nan", "Temperature"),
    ("setoption name Temperature value -1", "Temperature"), ("setoption name Temperature value 1e39", "Temperature"),
    ("setoption name UCI_Chess960 value true", "no option"), ("setoption name Seed value 99999999999999", "Seed"),
    ("position", "needs 'startpos'"), ("position e2e4", "startpos"), ("position startpos e2e4", "startpos"),
    ("position fen", "not a position"), ("position fen 8/8/8/8 w", "not a position"),
    ("position fen rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQ1BNR w - - 0 1", "king"),
    ("position fen 4k3/8/8/8/8/8/4R3/4K3 w - - 0 1", "not a position"),
    ("position fen 4k3/8/8/8/8/8/4r3/4K3 w - - 0 99999999999999999999", "move number"),
    ("position fen 4k3/8/8/8/8/8/4r3/4K3 w - - 99999999999999999999 1", "half-moves"),
    ("position startpos moves e2e5", "no legal move"), ("position startpos moves 0000", "no legal move"),
    ("position startpos moves e2e4 e7e5 e1g1", "no legal move"), ("position startpos moves e2", "no legal move"),
    ("position startpos moves e7e8q", "no legal move")])
def test_nonsense_gets_one_line(line, says):
    said = hear(line)
    assert len(said) == 1 and errors(said) and says in said[0] and "\n" not in said[0] and len(said[0]) < 300
    after = hear(line, "isready", "ucinewgame", "position startpos", "go")
    assert after[-1].startswith("bestmove ") and len(errors(after)) == 1


@pytest.mark.parametrize("line", ["", "   ", "debug on", "register later", "ucinewgame", "stop", "ponderhit",
                                  "position startpos moves", "\t"])
def test_what_asks_for_nothing_gets_nothing(line):
    assert not hear(line)


def test_unknown_words_are_skipped():
    said = hear("joho position startpos moves e2e4", "please go depth", "go wtime", "go foo bar depth x", "go perft 3")
    assert len(bestmoves(said)) == 4 and len({*bestmoves(said)}) == 1 and not errors(said)


def test_every_go_has_its_bestmove_when_there_is_no_move():
    for position in ("position startpos moves e2e5", f"position fen {MATED}",
                     "position fen 7k/5Q2/6K1/8/8/8/8/8 b - - 0 1"):
        said = hear(position, "go", "go infinite", "stop", "position startpos", "go")
        assert bestmoves(said)[:2] == ["(none)"] * 2 and bestmoves(said)[2] != "(none)" and len(bestmoves(said)) == 3


def test_drawn_games_go_on():
    "Whether a draw is claimed is for the program to say: there are moves, and one of them is played."
    again = " ".join(["g1f3 g8f6 f3g1 f6g8"] * 4)
    bare, fifty = "fen 8/8/4k3/8/8/3K4/8/8 w - - 0 1", "fen 8/8/4k3/8/R7/3K4/8/8 w - - 120 90"
    for position in (f"startpos moves {again}", bare, fifty):
        assert not errors(said := hear(f"position {position}", "go")) and bestmoves(said) != ["(none)"]


def test_castling_promotion_and_en_passant_are_read():
    said = hear("position startpos moves e2e4 e7e5 g1f3 g8f6 f1c4 f8c5 e1g1 e8h8 e4e5", "position startpos moves E2E4",
                "position fen 7k/P7/8/8/8/8/8/K7 w - - 0 1 moves a7a8q", "go",
                "position startpos moves e2e4 a7a6 e4e5 d7d5 e5d6", "go")
    assert len(bestmoves(said)) == 2 and len(errors(said)) == 1       # e4e5: a piece stands there


def test_anything_in_any_order():
    "Random lines: nothing raises, and no `go` is left without its one `bestmove`."
    rng = random.Random(0)
    words = ["uci", "isready", "go", "stop", "position", "startpos", "fen", "moves", "e2e4", "e7e5", "infinite",
             "ponder", "ponderhit", "searchmoves", "setoption", "name", "value", "MultiPV", "3", "Temperature", "1",
             "ucinewgame", MATED, "8/8/8/8/8/8/8/8 w - - 0 1", "debug", "on", "wtime", "-5", "\x00", "é",
             "0000", "(none)", "Seed"]
    said, asked = [], 0
    engine = Engine(PlayConfig(), said.append)
    for _ in range(3000):
        line = " ".join(rng.choices(words, k=rng.randrange(1, 7)))
        known = [w for w in line.split() if w in ("uci", "isready", "go", "stop", "position", "setoption", "ponderhit",
                                                  "ucinewgame", "debug")]
        asked += known[:1] == ["go"]
        assert engine.handle(line)
    engine.handle("stop")
    assert len(bestmoves(said)) == asked > 100 and not any("\n" in line for line in said)


# Its ends


def test_quit_in_the_middle_of_a_search():
    done = run(b"uci\ngo infinite\nquit\nisready\n")
    assert done.returncode == 0 and not done.stderr and b"bestmove" not in done.stdout and b"readyok" not in done.stdout


@pytest.mark.parametrize("text", [
    b"", b"go infinite\n", b"isready\ngo depth 1", b"\xff\xfe\x80go\r\n\n\r\nisready\r\n"])
def test_the_end_of_the_input_is_the_end(text):
    done = run(text)
    assert done.returncode == 0 and not done.stderr
    assert (b"readyok" in done.stdout) == (b"isready" in text) and (b"bestmove" in done.stdout) == (b"depth" in text)


def test_a_program_that_has_gone():
    "It closes its end of the pipes: the engine ends without a traceback."
    engine = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    engine.stdin.write(b"uci\n")
    engine.stdin.flush()
    engine.stdout.readline()
    engine.stdout.close()
    engine.stdin.write(b"isready\ngo\n" * 20)
    engine.stdin.close()
    assert engine.wait(60) == 0 and engine.stderr.read() == b""


def test_a_signal_ends_it():
    engine = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    engine.stdin.write(b"isready\n")
    engine.stdin.flush()
    while engine.stdout.readline() != b"readyok\n":
        pass
    engine.terminate()
    assert engine.wait(30) == 130 and engine.stderr.read().count(b"\n") == 1


# Weights that cannot be played


def test_damaged_weights_end_it_in_one_line(damaged, capsys, monkeypatch):
    done = run(b"uci\nisready\ngo\n", f"--weights={damaged}")
    assert done.returncode == 2 and b"NaN" in done.stderr and done.stderr.count(b"\n") == 1
    assert b"uciok" in done.stdout and b"bestmove" not in done.stdout and b"info string error: " in done.stdout


@pytest.mark.parametrize("argv, says", [
    (["--temperature", "-1"], "Temperature"), (["--multipv=0"], "MultiPV"), (["--seed", "x"], "seed"),
    (["--weight=x"], "weights"), (["--temperature", ".nan"], "finite"), (["--threads"], "threads")])
def test_a_wrong_command_line(argv, says, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_wrong_weights_in_an_option_leave_the_others(net, damaged, tmp_path):
    "In words, each time, and what played before plays on."
    (tmp_path / "empty").mkdir()
    good = load(net).move(chess.Board()).uci()
    for wrong in (damaged, "lost.safetensors", "nobody", "weak:level=0", str(tmp_path / "empty")):
        said = hear(f"setoption name Weights value {wrong}", "go", "go", cfg=PlayConfig(net))
        assert len(errors(said)) == 1 and errors(said)[0].endswith("plays instead") and bestmoves(said) == [good, good]


def test_scores_that_overflow_are_not_played(tmp_path):
    "Finite weights whose scores are not."
    model = load_model(WEIGHTS / "tiny.safetensors")
    with torch.no_grad():
        for p in model.head.parameters():
            p.fill_(1e30)
    save_model(model, tmp_path / "large.safetensors")
    with pytest.raises(ConfigError, match="not finite"):
        hear("go", cfg=PlayConfig(str(tmp_path / "large.safetensors")))


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    told = inspect.cleandoc(PlayConfig.__doc__)          # Python 3.13 stores it without the indentation
    assert all(f"--{key}" in text and f"\n    {key}: " in told for key in known_keys(PlayConfig))


def test_boards_of_the_tests_are_what_they_claim():
    assert parse_fen(MATED).is_checkmate()
