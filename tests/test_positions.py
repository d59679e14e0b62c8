import os
import random
import subprocess
import sys
import zlib

import chess
import chess.pgn
import numpy as np
import pytest

from grpo_chess.board import PositionError, position_key, terminal
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.positions import (
    MOST_ODDS, PHASES, PositionsConfig, at_odds, phase_of, points, random_position, read_positions, start_positions,
    within_window)


class Says:
    "A pool whose evaluation is a fixed function of the FEN; counts what it is asked."
    def __init__(self, score): self.score, self.asked, self.depths = score, 0, set()
    def evaluate(self, fens, depth=None):
        self.asked += len(fens)
        self.depths.add(depth)
        return np.array([self.score(f) for f in fens], np.int32)

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=2)) as pool: yield pool

def keys(boards): return [position_key(b) for b in boards]
def rough(fen): return random.Random(fen).randint(-500, 500)      # an evaluation, for tests that need no engine


@pytest.mark.parametrize("fen, phase", [
    (chess.STARTING_FEN, "opening"),
    ("r4rk1/1bqnbppp/p2ppn2/1p6/3NP3/1BN1B3/PPPQ1PPP/2KR3R w - - 0 12", "middlegame"),
    ("3q1rk1/5ppp/8/8/8/8/5PPP/3Q1RK1 w - - 0 40", "middlegame"),
    ("6k1/1p3ppp/1r2b3/p7/8/P3B3/1P3PPP/1R4K1 b - - 0 40", "endgame"),
    ("6k1/1p3ppp/1r2b3/p7/8/P3B3/PP3PPP/1R4K1 w - - 0 40", "middlegame"),
    ("rnbqkbnr/pppppppp/8/8/8/8/8/4K3 w kq - 0 1", "middlegame")])     # one bare king does not make an endgame
def test_phase(fen, phase):
    board = chess.Board(fen)
    assert phase_of(board) == phase_of(board.mirror()) == phase

@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("greed", [0., .9])
def test_random_positions_are_in_their_phase_and_reached_by_legal_moves(phase, greed):
    for i in range(30):
        board = random_position(random.Random(i), phase, greed)
        assert phase_of(board) == phase and not terminal(board) and board.is_valid()
        assert abs(points(board, True) - points(board, False)) <= 1
        again = chess.Board()
        for move in board.move_stack:
            assert again.is_legal(move)
            again.push(move)
        assert again.fen() == board.fen()
    first, second = (random_position(random.Random(3), phase, greed) for _ in range(2))
    assert keys([first]) == keys([second])

def test_endgames_really_are_endgames():
    for i in range(40):
        board = random_position(random.Random(f"e{i}"), "endgame")
        for side in chess.COLORS:
            men = {p: len(board.pieces(p, side)) for p in chess.PIECE_TYPES}
            assert men[1] + 3*(men[2] + men[3]) + 5*men[4] + 9*men[5] <= 13

def test_greed_reaches_endgames_sooner():
    plies = {g: np.median([random_position(random.Random(i), "endgame", g, 39).ply() for i in range(30)])
             for g in (0., .9)}
    assert plies[.9] < .6*plies[0.]


def test_window_uses_the_size_and_both_signs():
    boards = [random_position(random.Random(i), "opening") for i in range(6)]
    scores = dict(zip(keys(boards), (-201, -200, 0, 200, 201, -31_999)))
    pool = Says(scores.__getitem__)
    assert within_window(boards, pool, 200, 3) == [False, True, True, True, False, False]
    assert pool.depths == {3}

def test_a_missing_answer_is_an_error():
    pool = Says(rough)
    pool.evaluate = lambda fens, depth=None: np.zeros(len(fens) - 1, np.int32)
    with pytest.raises(ValueError, match="1 of 2"): within_window([chess.Board()]*2, pool, 200, 1)

@pytest.mark.parametrize("phase", PHASES)
def test_engine_filter_filters(pool, phase):
    free = start_positions(48, PositionsConfig(phase=phase, window_cp=0), 0, 0)
    kept = start_positions(48, PositionsConfig(phase=phase, window_cp=150, depth=2), 0, 0, pool)
    far = [abs(s) for s in pool.evaluate(keys(free), depth=2)]
    near = [abs(s) for s in pool.evaluate(keys(kept), depth=2)]
    assert max(near) <= 150 < max(far) and sum(s > 150 for s in far) >= 10
    assert {phase_of(b) for b in kept} == {phase} and not any(map(terminal, kept))

def test_sixty_four_starts_are_cheap(pool):
    asked = pool.asked
    start_positions(64, PositionsConfig(), 3, 5, pool)
    assert pool.asked - asked < 400


@pytest.mark.parametrize("cfg", [PositionsConfig(), PositionsConfig(window_cp=0),
                                 PositionsConfig(phase="endgame", window_cp=100)])
def test_start_number_i_of_step_s(cfg):
    pool = Says(rough)
    whole = keys(start_positions(24, cfg, 7, 2, pool))
    assert keys(start_positions(24, cfg, 7, 2, pool)) == whole
    assert keys(start_positions(12, cfg, 7, 2, pool)) + keys(start_positions(12, cfg, 7, 2, pool, first=12)) == whole
    assert keys(start_positions(1, cfg, 7, 2, pool, first=17)) == whole[17:18]
    assert not set(whole) & set(keys(start_positions(24, cfg, 7, 3, pool)))
    assert not set(whole) & set(keys(start_positions(24, cfg, 8, 2, pool)))
    assert len(set(whole)) == 24

def test_starts_are_the_same_in_another_process():
    "No hidden state: not the hash seed, not the global generators."
    code = ("from grpo_chess.positions import *; from grpo_chess.board import position_key\n"
            "print([position_key(b) for b in start_positions(6, PositionsConfig(window_cp=0), 1, 2)])")
    def said(seed):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    out = [said("1"), said("2")]
    assert out[0] == out[1] == f"{keys(start_positions(6, PositionsConfig(window_cp=0), 1, 2))}\n"

def test_mixed_takes_all_phases_in_turn():
    boards = start_positions(9, PositionsConfig(window_cp=0), 0, 1)
    assert [phase_of(b) for b in boards] == [PHASES[(1 + i) % 3] for i in range(9)]

def test_impossible_window_stops(monkeypatch):
    monkeypatch.setattr("grpo_chess.positions.TRIES", 6)
    with pytest.raises(PositionError, match="within 200 cp in 6 tries"):
        start_positions(2, PositionsConfig(phase="opening"), 0, 0, Says(lambda fen: -900))

def test_window_without_engine_is_an_error():
    with pytest.raises(ValueError, match="window_cp = 200 needs an engine"): start_positions(1, PositionsConfig(), 0, 0)

@pytest.mark.parametrize("wrong, message", [
    (dict(phase="late"), "positions.phase = 'late' must be one of mixed, opening"),
                                            (dict(window_cp=-5), "positions.window_cp = -5"),
    (dict(depth=0), "positions.depth = 0"), (dict(greed=1.5), "positions.greed = 1.5"),
                                            (dict(file="a.txt"), "positions.file = 'a.txt'")])
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message) as error: PositionsConfig(**wrong)
    assert "\n" not in str(error.value)


PGN = ('[Event "a"]\n\n1. e4 {comment} e5 2. Nf3 (2. f4 exf4) 2... Nc6 1/2-1/2\n\n'
       '[Event "b"]\n[FEN "8/8/4k3/8/8/4K3/8/Q7 w - - 0 1"]\n[SetUp "1"]\n\n1. Qa6+ *\n')

def write(folder, name, text):
    (folder/name).write_text(text)
    return folder/name

def test_read_all_kinds(tmp_path):
    fen = read_positions(write(tmp_path, "a.fen",
                               f"\ufeff# book\n\n{chess.STARTING_FEN}\n8/8/4k3/8/8/4K3/8/Q7 b - - 3 60\n"))
    assert [b.fen() for b in fen] == [chess.STARTING_FEN, "8/8/4k3/8/8/4K3/8/Q7 b - - 3 60"]
    epd = read_positions(write(tmp_path, "a.epd",
                               '8/8/4k3/8/8/4K3/8/Q7 w - - hmvc 7; bm Qd4; id "x y";\n' + chess.STARTING_FEN + "\n"))
    assert [b.halfmove_clock for b in epd] == [7, 0] and epd[1].fen() == chess.STARTING_FEN
    pgn = read_positions(write(tmp_path, "a.pgn", PGN))
    assert [len(b.move_stack) for b in pgn] == [0, 1, 2, 3, 4, 0, 1]
    assert [m.uci() for m in pgn[4].move_stack] == ["e2e4", "e7e5", "g1f3", "b8c6"]
    assert pgn[6].fen().startswith("8/8/Q3k3")

@pytest.mark.parametrize("name, text, line, says", [
    ("b.fen", f"{chess.STARTING_FEN}\n\n4k3/8/8/8/8/8/8/8 w - - 0 1\n", 3,
     "4k3/8/8/8/8/8/8/8 w - - 0 1' is not a position: white has no king"),
    ("b.fen", "hello\n", 1, "'hello'"),
    ("b.epd", "8/8/4k3/8/8/4K3/8/Q7 w - - bm Qd4;\n8/8/4k3/8/8/4K3/8/Q6 w - -\n", 2, "8/8/4k3/8/8/4K3/8/Q6"),
    ("b.epd", "8/8/8/8/8/4K3/8/Q7 w - -\n", 1, "black has no king"),
    ("b.pgn", '[Event "a"]\n\n1. e4 e5\n2. Ke3 *\n', 4,
     "illegal san: 'Ke3' in rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR"),
    ("b.pgn", '[Event "a"]\n\n1. e4 *\n\n[FEN "8/8/8/8/8/4K3/8/Q7 w - - 0 1"]\n\n1. Qa2 *\n', 5,
     "8/8/8/8/8/4K3/8/Q7 w - - 0 1"),
    ("b.pgn", '[FEN "nonsense"]\n\n1. Qa2 *\n', 1, "nonsense"),
    ("b.pgn", '[Event "a"]\n[Variant "Atomic"]\n\n1. e4 *\n', 5, "only standard chess, not Atomic")])
def test_bad_line_names_file_line_and_text(tmp_path, name, text, line, says):
    path = write(tmp_path, name, text)
    with pytest.raises(PositionError) as error: read_positions(path)
    message = str(error.value)
    assert message.startswith(f"{path}, ") and f"line {line}:" in message and says in message and "\n" not in message

def test_missing_file_and_unknown_kind(tmp_path):
    with pytest.raises(PositionError, match="there is no file"): read_positions(tmp_path/"no.fen")
    with pytest.raises(PositionError, match="must end in .fen, .epd, .pgn"):
        read_positions(write(tmp_path, "a.txt", ""))

def book(folder, n=150):
    boards = [random_position(random.Random(i), PHASES[i % 3]) for i in range(n)]
    # the last one is stalemate
    return boards, write(folder, "book.fen",
                         "".join(f"{b.fen()}\n" for b in boards) + "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1\n")

@pytest.mark.parametrize("window", [0, 250])
def test_starts_from_a_file(tmp_path, window):
    boards, path = book(tmp_path)
    pool = Says(rough)
    cfg = PositionsConfig(file=str(path), window_cp=window, phase="endgame")
    whole = keys(start_positions(20, cfg, 0, 4, pool))
    assert len(set(whole)) == 20 and set(whole) <= {position_key(b) for b in boards if phase_of(b) == "endgame"}
    assert not window or max(abs(rough(f)) for f in whole) <= window
    parts = [start_positions(10, cfg, 0, 4, pool, first, boards=20) for first in (0, 10)]      # of two processes
    assert [*keys(parts[0]), *keys(parts[1])] == whole
    assert keys(start_positions(20, cfg, 0, 5, pool)) != whole and keys(start_positions(20, cfg, 1, 4, pool)) != whole
    ends = {position_key(b) for b in boards if phase_of(b) == "endgame"}
    passing = {k for k in ends if not window or abs(rough(k)) <= window}
    assert set(keys(start_positions(200, cfg, 0, 4, pool))) == passing            # more than there are
    start_positions(1, cfg, 0, 4, pool)[0].push(chess.Move.null())                # own copies
    assert keys(start_positions(20, cfg, 0, 4, pool)) == whole

@pytest.mark.parametrize("seed", [0, 3])
def test_a_file_is_met_whole_before_it_begins_again(tmp_path, seed):
    "Each step was a new draw: after as many starts as positions a third of them had not come, and others three times."
    boards, path = book(tmp_path)
    cfg, epochs = PositionsConfig(file=str(path), window_cp=0), []
    for epoch in range(3):
        steps = [keys(start_positions(15, cfg, seed, step)) for step in range(10*epoch, 10*epoch + 10)]
        epochs.append(sum(steps, []))
        assert sorted(epochs[-1]) == sorted(map(position_key, boards))
    assert epochs[0] != epochs[1] != epochs[2]

def test_a_step_with_a_window_leaves_the_next_one_its_own_candidates(tmp_path):
    "Half of a file passes: for as long as a quarter of it would do, no start comes twice."
    _, path = book(tmp_path)
    def half(fen): return 0 if zlib.crc32(fen.encode()) % 2 else 900
    cfg = PositionsConfig(file=str(path))
    seen = sum((keys(start_positions(5, cfg, 0, step, Says(half))) for step in range(7)), [])      # 140 of 150 tried
    assert len(seen) == len(set(seen)) == 35

def test_finished_positions_are_no_starts(tmp_path):
    path = write(tmp_path, "m.fen",
                 "7k/6Q1/6K1/8/8/8/8/8 b - - 0 1\n8/8/4k3/8/8/4K3/8/Q7 w - - 0 1\n8/8/4k3/8/8/4K3/8/8 w - - 0 1\n")
    assert set(keys(start_positions(5, PositionsConfig(file=str(path), window_cp=0), 0,
                                    0))) == {"8/8/4k3/8/8/4K3/8/Q7 w - - 0 1"}
    with pytest.raises(PositionError, match="no opening position"):
        start_positions(1, PositionsConfig(file=str(path), window_cp=0, phase="opening"), 0, 0)

def test_file_without_balanced_positions(tmp_path):
    _, path = book(tmp_path, 12)
    with pytest.raises(PositionError, match="within 200 cp"):
        start_positions(3, PositionsConfig(file=str(path)), 0, 0, Says(lambda fen: -900))

def test_a_long_game_does_not_carry_all_its_moves(tmp_path):
    "Every position had its whole move stack: 20 kB of PGN took 41 MB, and 12,000 plies 20 seconds."
    board, rng = chess.Board(), random.Random(4)
    while board.ply() < 300 and not terminal(board): board.push(rng.choice(list(board.legal_moves)))
    path = write(tmp_path, "long.pgn", str(chess.pgn.Game.from_board(board)))
    short, whole = read_positions(path, stack=False), read_positions(path)
    assert len(short) == board.ply() + 1 > 100 and [b.fen() for b in short] == [b.fen() for b in whole]
    assert sum(len(b.move_stack) for b in short) < .1*sum(len(b.move_stack) for b in whole)
    assert [terminal(b) for b in short] == [terminal(b) for b in whole]
    starts = start_positions(20, PositionsConfig(file=str(path), window_cp=0), 0, 0)
    assert all(len(b.move_stack) <= b.halfmove_clock for b in starts)

def test_repetitions_are_still_counted(tmp_path):
    path = write(tmp_path, "dance.pgn", "1. e4 e5 2. Nf3 Nf6 3. Ng1 Ng8 4. Nf3 Nf6 5. Ng1 Ng8 *\n")
    assert [terminal(b) for b in read_positions(path, stack=False)] == [terminal(b) for b in read_positions(path)]
    assert terminal(read_positions(path, stack=False)[-1])

def test_side_lines_that_cross_are_no_crash(tmp_path):
    for moves in ("1. e4 (1. d4)) e5 *", "1. e4 ((1. d4) e5 *", "1. e4 )( e5 *"):
        assert read_positions(write(tmp_path, "x.pgn", moves + "\n"))[0] == chess.Board()

@pytest.mark.parametrize("null", ["--", "Z0"])
def test_a_null_move_is_no_move(tmp_path, null):
    "It was passed over, and the next move was pushed for the side that had just moved."
    (tmp_path/"n.pgn").write_text(f"1. e4 {null} 2. d4 *\n")
    with pytest.raises(PositionError, match="null move"): read_positions(tmp_path/"n.pgn")

# Odds

def lead(board): return abs(points(board, True) - points(board, False))

def test_a_share_of_the_starts_is_lopsided_and_all_of_them_can_be_played():
    level = start_positions(300, PositionsConfig(window_cp=0), 0, 3)
    assert max(map(lead, level)) <= 1
    for share in (.3, 1.):
        starts = start_positions(300, PositionsConfig(window_cp=0, odds=share), 0, 3)
        assert all(b.is_valid() and not terminal(b) and len(b.pieces(chess.KING, True)) == 1 for b in starts)
        changed = [(a, b) for a, b in zip(level, starts) if a.board_fen() != b.board_fen()]
        assert abs(len(changed)/300 - share) < .1, len(changed)
        for before, after in changed:           # one side lost some pieces, nothing else has moved, both sides get odds
            poorer = {sq: p for sq, p in before.piece_map().items() if after.piece_at(sq) != p}
            assert len({p.color for p in poorer.values()}) == 1
            assert chess.KING not in {p.piece_type for p in poorer.values()}
            assert after.piece_map() == {sq: p for sq, p in before.piece_map().items() if sq not in poorer}
            assert before.turn == after.turn and lead(after) <= MOST_ODDS + 1
        assert {points(b, True) > points(b, False) for _, b in changed} == {True, False}
        assert sum(lead(b) >= 5 for b in starts) > .4*len(changed)

def test_odds_belong_to_seed_step_and_index():
    cfg = PositionsConfig(window_cp=0, odds=.5)
    assert keys(start_positions(40, cfg, 1, 2)) == keys(start_positions(40, cfg, 1, 2))
    assert keys(start_positions(40, cfg, 1, 2))[30:] == keys(start_positions(10, cfg, 1, 2, first=30))
    assert keys(start_positions(40, cfg, 1, 2)) != keys(start_positions(40, cfg, 2, 2))

def test_odds_that_the_rules_forbid_are_not_given():
    board = chess.Board("k7/8/8/8/N7/8/8/R3K3 w - - 0 1")      # without the knight Black is in check, and White to move
    for seed in range(30): assert at_odds(random.Random(seed), board).is_valid()
    stuck = chess.Board("7k/p4Q2/8/8/8/8/8/6K1 b - - 0 1")           # without the pawn there is no move left
    assert all(at_odds(random.Random(seed), stuck).pieces(chess.PAWN, False) for seed in range(30))

@pytest.mark.parametrize("odds", [-.1, 1.1, float("nan")])
def test_odds_are_a_share(odds):
    with pytest.raises(ValueError, match=r"positions.odds = .* must be from 0 to 1"): PositionsConfig(odds=odds)
