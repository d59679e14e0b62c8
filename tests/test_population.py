"Games of weak players, and weights against opponents that had no part in training: the experiments of the imitator."

import importlib.util
import io
import json
import sys
from pathlib import Path

import chess.pgn
import numpy as np
import pyarrow.parquet
import pytest
from made_up import folder_of

from grpo_chess.board import tokens
from grpo_chess.labels import read_manifest, read_shard
from grpo_chess.pretrain import main as pretrain
from grpo_chess.train import main as train

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
    (start, better), each = opponents.regrets(["imitator", "tiny"], None)
    assert [*each] == ["imitator", "tiny"] and each["tiny"].mean() == pytest.approx(better["greedy"], abs=1e-5)
    assert (start["change"], start["half"], start["positions"]) == (0, 0, 60)
    assert better["change"] == pytest.approx(better["greedy"] - start["greedy"], abs=2e-5) and better["half"] > 0
    assert better["sampled"] < start["sampled"] and all(r["greedy"] < r["sampled"] for r in (start, better))


def test_the_regret_of_each_position_stands_beside_its_value():
    opponents = experiment("opponents")
    held = [json.loads(line) for line in opponents.HELD_OUT.read_text().splitlines()]
    held = [row for row in held if "fen" in row]
    found = dict(one=np.arange(len(held)) / 7, two=np.zeros(len(held)))
    rows = opponents.positions(found)
    assert len(rows) == len(held) and rows[5]["best"] == max(held[5]["moves"].values())
    assert rows[5] == dict(best=rows[5]["best"], one=round(5 / 7, 5), two=0)
    with pytest.raises(ValueError, match="shorter"):
        opponents.positions(dict(one=found["one"][:9]))


def test_what_a_run_and_labels_held(tmp_path, monkeypatch):
    "The lead in the positions of a run's memory and of labels; the shard that is held out does not count."
    seen = experiment("seen")
    fens = (chess.STARTING_FEN, "4k3/8/8/8/8/8/8/Q3K3 b - - 0 1", "4k3/pp6/8/8/8/8/8/4K3 b - - 0 1")
    assert [seen.lead(row) for row in tokens([*map(chess.Board, fens)])] == [0, 9, 2]
    folder = folder_of(tmp_path / "labels", 3)
    shards = [shard["name"] for shard in read_manifest(folder)["shards"]]
    held = seen.parts(folder)
    assert len(held) == 2 and np.array_equal(held[0], read_shard(folder / shards[1]).tokens)
    small = ["--trainer.collect", "0", "--sampler.boards", "2", "--sampler.plies", "4", "--trainer.steps", "3"]
    other = ["--match.games", "0", "--reward.judge", "material", "--positions.window_cp", "0", "--accelerator", "cpu"]
    assert not train([*small, *other, "--out", str(tmp_path), "--name", "run"])
    memory = seen.parts(tmp_path / "run")
    assert [part.shape[1:] for part in memory] == [(65,)] * 3 and 0 < len(memory[0]) <= 8
    monkeypatch.setattr(sys, "argv", ["seen.py", str(folder), str(tmp_path / "run"), "--out", str(tmp_path / "x.csv")])
    seen.main()
    rows = [line.split(",") for line in (tmp_path / "x.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["labels"] * 4 + ["run"] * 4
    assert all(sum(float(row[3]) for row in part) == pytest.approx(1, abs=1e-3) for part in (rows[:4], rows[4:]))
