"""The engine in a chess program that people use: xboard with polyglot, on a virtual screen.

With PICTURES=folder the picture of the game that is played by clicking is kept there."""

import os
import shutil
import time

import chess
import chess.pgn
import pytest
from screen import ENGINE, Screen, Xboard, missing, wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no {', '.join(missing())}: `.ci/setup gui` installs them")


@pytest.fixture
def screen(tmp_path):
    with Screen(tmp_path) as screen:
        yield screen


def a_person_sits_down(screen):
    "xboard with the engine as Black, its window, and what the engine says beside it."
    xboard = Xboard(screen, "-tc", 5, "-engineOutputUp", "true", "-showThinking", "true")
    window, output = screen.window("^xboard: grpo_chess"), screen.window("Engine Output")
    screen.xdotool("windowmove", output, 430, 0, "windowsize", output, 566, 490)
    return xboard, window


def test_a_game_by_clicking(screen, tmp_path):
    "A person plays White with a mouse; the engine answers each move with a legal one."
    board, (xboard, window) = chess.Board(), a_person_sits_down(screen)
    for number, move in enumerate(("e2e4", "g1f3", "f1b5"), 1):
        xboard.play(window, move)
        board.push_uci(move)
        wait_for(lambda n=number: len(xboard.heard(r"bestmove \w+\n")) == n, 20, f"an answer to {move}")
        board.push_uci(xboard.heard(r"bestmove (\w+)\n")[-1])
        asked = " ".join(m.uci() for m in board.move_stack[:-1])
        assert xboard.heard(f"position startpos moves {asked}\n"), "the engine was asked for another position"
    wait_for(lambda: screen.xdotool("search", "--name", "vs. grpo_chess"), 5, "the title of a game")
    picture = tmp_path / "play_xboard.png"
    screen.picture(picture)
    assert 5_000 < picture.stat().st_size < 100_000
    if os.environ.get("PICTURES"):
        shutil.copy(picture, os.environ["PICTURES"])


def test_its_options_in_the_dialog_of_xboard(screen):
    "A person ticks Repeats and writes a temperature in the engine's settings; the engine hears both and plays on."
    xboard, window = a_person_sits_down(screen)
    xboard.play(window, "d2d4")
    wait_for(lambda: xboard.heard(r"bestmove \w+\n"), 20, "an answer")
    for place in ((272, 14), (340, 118)):                           # the menu Engine, and Engine #1 Settings in it
        screen.xdotool("mousemove", *place, "click", 1)
        time.sleep(1)
    screen.xdotool("mousemove", 13, 67, "click", 1)                 # Repeats
    screen.xdotool("mousemove", 250, 42, "click", "--repeat", 3, 1, "type", "0.7")
    screen.xdotool("mousemove", 650, 353, "click", 1)               # OK
    heard = ("setoption name Repeats value true", "setoption name Temperature value 0.7")
    wait_for(lambda: all(map(xboard.heard, heard)), 10, "the options of the dialog")
    xboard.play(window, "c2c4")
    wait_for(lambda: len(xboard.heard(r"bestmove \w+\n")) == 2, 20, "an answer after the dialog")


def test_a_match_in_xboard(screen, tmp_path):
    "Two games to the end, both colours; xboard accepts every move, and no engine outlives it."
    path = tmp_path / "match.pgn"
    xboard = Xboard(screen, "-mg", 2, "-tc", 1, "-inc", 0, "-sgf", path, second=f"{ENGINE} --temperature 1 --seed 3")
    wait_for(lambda: path.exists() and path.read_text().count("[Result ") == 2, 120, "the end of two games")
    with path.open() as file:
        games = list(iter(lambda: chess.pgn.read_game(file), None))
    for game in games:
        assert not game.errors and game.headers["Result"] in ("1-0", "0-1", "1/2-1/2")
        end = game.end()
        assert end.board().is_game_over(claim_draw=True), end.comment
        assert not {"forfeit", "illegal", "time"} & {*end.comment.lower().split()}
    assert len(games) == 2 and games[0].headers["White"].startswith("grpo_chess")
    screen.xdotool("windowfocus", "--sync", screen.window("Exiting"), "key", "Return")
    wait_for(lambda: xboard.process.poll() is not None, 20, "the end of xboard")
    wait_for(lambda: xboard.heard("quit"), 10, "the end of the engine")
