import json
import math
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
from games import HEAD, MATE1, MATE2, scripted

from grpo_chess.engine import MATE
from grpo_chess.measures import given_away, read_labels, read_puzzles, regret, solve
from grpo_chess.model import Policy, pretrained
from grpo_chess.players import ArenaError, engine_player, policy_player

TOP = Path(__file__).resolve().parent.parent
POSITIONS = TOP/"nbs/data/positions.jsonl"

def test_regret_by_hand(tmp_path):
    board = chess.Board("6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1")
    scores = {m.uci(): (MATE - 1 if m.uci() == "a1a8" else 0) for m in board.legal_moves}
    rows = {"engine": "made up"}, dict(fen=board.fen(), moves=scores)
    (tmp_path/"x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    label, = read_labels(tmp_path/"x.jsonl")
    assert label.loss["a1a8"] == 0 and label.loss["g1f1"] == pytest.approx(.5)
    dice, n = regret(None, [label]), len(scores)
    assert dice.mean == pytest.approx(.5*(n - 1)/n) and dice.best == pytest.approx(1/n)
    assert regret(scripted(["a1a8"]), [label]).mean == 0 and regret(scripted(["g1f1"]), [label]).best == 0

def test_what_a_move_gives_away():
    "Below the best known move; a move without a value stays unknown, and padding may be nan too."
    win = torch.tensor([[.7, .2, math.nan], [math.nan, .1, .4]])
    lost = given_away(win)
    assert torch.allclose(lost, torch.tensor([[0, .5, math.nan], [math.nan, .3, 0]]), equal_nan=True)

def test_regret_of_a_policy_is_a_sum_over_its_moves(policy):
    labels = read_labels(POSITIONS)[:12]
    policy.model.eval()
    exact = regret(policy, labels)
    n = 400
    drawn = [regret(policy_player(policy, seed=s), labels).each for s in range(n)]
    assert abs(np.mean(drawn) - exact.mean) < 4*np.std(np.mean(drawn, 1))/math.sqrt(n) + 1e-9
    played = regret(policy_player(policy, greedy=True), labels)
    assert np.allclose(regret(policy, labels, greedy=True).each, played.each)
    warm = regret(policy.at(1e4), labels)
    assert warm.mean == pytest.approx(regret(None, labels).mean, abs=1e-3)

def test_regret_leaves_the_model_as_it_was(policy):
    policy.model.train()
    first = regret(policy, read_labels(POSITIONS)[:5]).mean
    assert policy.model.training and regret(policy, read_labels(POSITIONS)[:5]).mean == first
    policy.model.eval()

def test_regret_ranks(pool):
    labels = read_labels(POSITIONS)
    trained, floor = regret(Policy(pretrained("tiny")), labels, greedy=True), regret(None, labels)
    engine = regret(engine_player(pool, depth=6), labels)           # depth 6 made the labels
    assert engine.mean < .7*trained.mean < .3*floor.mean
    assert all(r.interval[0] < r.mean < r.interval[1] for r in (trained, floor))

@pytest.mark.parametrize("line, says", [
    ("x", "line 2: it is not JSON"), ("{}", "line 2: there is no 'fen'"), ("[]", "line 2"),
    ('{"fen": "8/8", "moves": {}}', "is not a position"),
    ('{"fen": "7k/8/8/8/8/8/8/K7 w - - 0 1", "moves": {"a1a2": 0}}', "the 3 legal moves; different: a1b1, a1b2"),
    ('{"fen": "7k/8/8/8/8/8/8/K7 w - - 0 1", "moves": {"a1a2": "x", "a1b1": 0, "a1b2": 0}}', "line 2"),
    ('{"fen": "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1", "moves": {}}', "line 2: the game is over there")])
def test_bad_labels(tmp_path, line, says):
    (tmp_path/"x.jsonl").write_text('{"engine": "made up"}\n' + line)
    with pytest.raises(ArenaError) as e: read_labels(tmp_path/"x.jsonl")
    assert says in str(e.value) and "x.jsonl" in str(e.value) and "\n" not in str(e.value)

def test_label_files_that_are_none(tmp_path):
    (tmp_path/"empty.jsonl").write_text('{"engine": "made up"}\n')
    for name, says in (("empty.jsonl", "no labelled position"), ("none.jsonl", "cannot read")):
        with pytest.raises(ArenaError, match=says): read_labels(tmp_path/name)


# Puzzles

def puzzles_in(tmp_path, text):
    (tmp_path/"p.csv").write_text(text)
    return read_puzzles(tmp_path/"p.csv")

def test_puzzles_are_read_and_start_after_the_opponents_move(tmp_path):
    first, second = puzzles_in(tmp_path, HEAD + MATE1 + MATE2)
    assert first.board.piece_at(chess.D4) and first.board.turn == chess.WHITE
    assert [m.uci() for m in second.moves] == ["h4g3", "e1f1", "c2f2"] and second.rating == 900
    assert [p.name for p in puzzles_in(tmp_path, MATE1 + MATE2)] == ["m1", "m2"]      # older files lack the first line
    assert len(read_puzzles(tmp_path/"p.csv", 1)) == 1

@pytest.mark.parametrize("lines, solved", [
    ((["a2a8"], ["h4g3", "", "c2f2"]), [1, 1]), ((["b1b8"], ["h4g3", "", "c2d1"]), [1, 1]),
    ((["a2a7"], ["h4g3", "", "c2c1"]), [0, 0]), ((["b1b8"], ["b2b3"]), [1, 0])])
def test_any_mate_solves(tmp_path, lines, solved):
    assert solve(scripted(*lines), puzzles_in(tmp_path, HEAD + MATE1 + MATE2)).solved.tolist() == solved

def test_puzzles_in_one_batch(tmp_path, pool):
    puzzles, calls = puzzles_in(tmp_path, HEAD + MATE1*3 + MATE2*2), []
    engine = engine_player(pool, depth=6)
    def spy(boards, games, ply):
        calls.append(len(boards))
        return engine(boards, games, ply)
    r = solve(spy, puzzles)
    assert calls == [5, 2] and r.accuracy == 1 and r.by_rating() == {"500-999": (5, 1.)} and r.interval[1] == 1
    assert all(len(p.board.move_stack) == 1 for p in puzzles)

@pytest.mark.parametrize("row, says", [
    ("x,8/8,a1a2 a2a3,5,,,,,,\n", "is not a position"), (MATE1.replace("a2a8", "a2c8"), "a2c8 is not legal"),
    (MATE1.replace(" a2a8", ""), "1 moves"), (MATE2.replace(" c2f2", ""), "3 moves"),
    (MATE1.replace("600", "hard"), "Rating 'hard'"), ("x,y\n", "Moves is missing"),
    (MATE1.replace("d5d4", "d5"), "line 3")])
def test_broken_rows(tmp_path, row, says):
    with pytest.raises(ArenaError) as e: puzzles_in(tmp_path, HEAD + MATE1 + row)
    assert says in str(e.value) and "p.csv, line 3: " in str(e.value) and "\n" not in str(e.value)

def test_puzzle_files_that_are_none(tmp_path):
    for name, says in (("p.csv.zst", "unpack it first"), ("none.csv", "cannot read")):
        with pytest.raises(ArenaError, match=says): read_puzzles(tmp_path/name)
    with pytest.raises(ArenaError, match="no puzzle"): puzzles_in(tmp_path, HEAD)

def test_puzzle_players_that_cheat(tmp_path):
    puzzles = puzzles_in(tmp_path, HEAD + MATE1)
    with pytest.raises(ArenaError, match="0 moves for 1"): solve(lambda *a: [], puzzles)
    with pytest.raises(ArenaError, match="not legal"): solve(scripted(["a2c8"]), puzzles)
