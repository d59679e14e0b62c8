"Games of weak players, and weights against opponents that had no part in training: the experiments of the imitator."

import importlib.util
import io
import sys
from pathlib import Path

import chess.pgn
import pyarrow.parquet
import pytest

from grpo_chess.pretrain import main as pretrain

FOLDER = Path(__file__).resolve().parent.parent / "nbs/experiments"


def experiment(name):
    "A script of nbs/experiments as a module."
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(monkeypatch, tmp_path):
    "Make some games of one opening a pairing, in `tmp_path`."
    population = experiment("population")
    monkeypatch.setattr(population, "PAIRS", 1)

    def make(games):
        monkeypatch.setattr(sys, "argv", ["population.py", str(tmp_path), "--games", str(games), "--other", ""])
        population.main()
        return {p.name: p.read_text() for p in sorted(tmp_path.iterdir())}

    return make


def read(text):
    stream, games = io.StringIO(text), []
    while game := chess.pgn.read_game(stream):
        games.append(game)
    return games


def test_a_population_plays_whole_games_and_goes_on_where_it_ended(make, tmp_path):
    first = make(2)
    games = [g for text in first.values() for g in read(text)]
    assert list(first) == ["0000.pgn"] and len(games) == 2
    ends = [(not g.errors, g.end().board()) for g in games]
    assert all(sound and (b.is_game_over(claim_draw=True) or len(b.move_stack) >= 240) for sound, b in ends)
    assert all("random" in g.headers["White"] and "random" in g.headers["Black"] for g in games)
    assert games[0].headers["White"] == games[1].headers["Black"]
    (tmp_path / "0000.pgn").write_text(first["0000.pgn"] + "\n")  # made already: it is not made again
    more = make(4)
    assert list(more) == ["0000.pgn", "0001.pgn"] and more["0000.pgn"] == first["0000.pgn"] + "\n"


def test_the_games_become_labels_of_the_moves_that_were_played(make, tmp_path):
    plies = sum(g.end().board().ply() - g.board().ply() for text in make(2).values() for g in read(text))
    out = tmp_path / "moves"
    assert pretrain(["convert", "--files", str(tmp_path / "*.pgn"), "--out", str(out)]) == 0
    rows = sum(pyarrow.parquet.read_table(p).num_rows for p in out.glob("*.parquet"))
    assert rows == plies > 0, "a label for each move that was played"


def test_those_whom_imitator_imitated_are_the_players_of_the_population():
    opponents, population = experiment("opponents"), experiment("population")
    known = [(f"weak:level={k}", errs) for k in population.LEVELS for errs in population.ERRS]
    known += [("engine:path=glaurung,depth=1", errs) for errs in population.ERRS]
    assert [*opponents.IMITATED.values()] == [f"{spec},errs={errs:g},seed=3" for spec, errs in known]
    assert len(opponents.IMITATED) == 18


def test_what_is_stored_of_weights_has_no_folder_of_a_machine_and_the_start_is_compared_with_itself(monkeypatch):
    opponents = experiment("opponents")
    assert opponents.short("/a/b/model.safetensors") == "b" and opponents.short("/a/net.safetensors") == "net"
    assert opponents.short("tiny") == "tiny"
    labels = opponents.read_labels(opponents.HELD_OUT)[:60]
    monkeypatch.setattr(opponents, "read_labels", lambda _: labels)
    start, better = opponents.regrets(["imitator", "tiny"], None)
    assert (start["change"], start["half"], start["positions"]) == (0, 0, 60)
    assert better["change"] == pytest.approx(better["greedy"] - start["greedy"], abs=2e-5) and better["half"] > 0
    assert better["sampled"] < start["sampled"] and all(r["greedy"] < r["sampled"] for r in (start, better))
