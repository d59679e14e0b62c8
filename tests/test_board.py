"grpo_chess.board against python-chess, the published perft counts and plain Python."
import random
from collections import Counter

import chess
import numpy as np
import pytest

from grpo_chess import board as B
from grpo_chess import reward
from grpo_chess.board import (ACTION_FROM, ACTION_PROMO, ACTION_TO, ACTIONS, PositionError, Terminal, action_to_move,
                              encode, legal_actions, move_to_action, parse_fen, position_key, terminal, tokens)
from grpo_chess.uci import score_code

# FEN, depth, leaves: the six positions of the chess programming wiki, then the usual collection of single rules
PERFT = {
    "start": (chess.STARTING_FEN, 4, 197_281),
    "kiwipete": ("r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq - 0 1", 4, 4_085_603),
    "position 3": ("8/2p5/3p4/KP5r/1R3p1k/8/4P1P1/8 w - - 0 1", 5, 674_624),
    "position 4": ("r3k2r/Pppp1ppp/1b3nbN/nP6/BBP1P3/q4N2/Pp1P2PP/R2Q1RK1 w kq - 0 1", 4, 422_333),
    "position 5": ("rnbq1k1r/pp1Pbppp/2p5/8/2B5/8/PPP1NnPP/RNBQK2R w KQ - 1 8", 4, 2_103_487),
    "position 6": ("r4rk1/1pp1qppp/p1np1n2/2b1p1B1/2B1P1b1/P1NP1N2/1PP1QPPP/R4RK1 w - - 0 10", 4, 3_894_594),
    "en passant: king and rook on the rank": ("3k4/3p4/8/K1P4r/8/8/8/8 b - - 0 1", 6, 1_134_888),
    "en passant: bishop behind": ("8/8/4k3/8/2p5/8/B2P2K1/8 w - - 0 1", 6, 1_015_133),
    "en passant: answers a check": ("8/8/1k6/2b5/2pP4/8/5K2/8 b - d3 0 1", 6, 1_440_467),
    "en passant: pinned": ("8/5bk1/8/2Pp4/8/1K6/8/8 w - d6 0 1", 6, 824_064),
    "castling short": ("5k2/8/8/8/8/8/8/4K2R w K - 0 1", 6, 661_072),
    "castling long": ("3k4/8/8/8/8/8/8/R3K3 w Q - 0 1", 6, 803_711),
    "castling rights lost": ("r3k2r/1b4bq/8/8/8/8/7B/R3K2R w KQkq - 0 1", 4, 1_274_206),
    "castling prevented": ("r3k2r/8/3Q4/8/8/5q2/8/R3K2R b KQkq - 0 1", 4, 1_720_476),
    "promotion out of check": ("2K2r2/4P3/8/8/8/8/8/3k4 w - - 0 1", 6, 3_821_001),
    "under-promotion": ("8/P1k5/K7/8/8/8/8/8 w - - 0 1", 6, 92_683),
    "discovered check": ("8/8/1P2K3/8/2n5/1q6/8/5k2 b - - 0 1", 5, 1_004_658),
    "double check": ("8/8/2k5/5q2/5n2/8/5K2/8 b - - 0 1", 4, 23_527),
}
MOST = "R6R/3Q4/1Q4Q1/4Q3/2Q4Q/Q4Q2/pp1Q4/kBNN1KB1 w - - 0 1"  # 218 legal moves, the most there are


def perft(board, depth):
    "Leaves of the game tree, walked with actions only."
    actions = legal_actions(board)
    if depth == 1: return len(actions)
    leaves = 0
    for a in actions:
        board.push(action_to_move(a, board.turn))
        leaves += perft(board, depth - 1)
        board.pop()
    return leaves


def play(n, seed, starts=(chess.STARTING_FEN,), plies=120, back=0.):
    "n boards with their stacks, met by random play; moves are taken back with probability `back`, to repeat positions."
    rng, out = random.Random(seed), []
    while len(out) < n:
        board = chess.Board(rng.choice(starts))
        for _ in range(plies):
            moves = list(board.legal_moves)
            if not moves or len(out) >= n: break
            last = board.move_stack[-2:][0] if len(board.move_stack) > 1 else chess.Move.null()
            undo = chess.Move(last.to_square, last.from_square)
            board.push(undo if undo in moves and rng.random() < back else rng.choice(moves))
            out.append(board.copy())
    return out


def scatter(n, seed):
    "n valid positions of a few pieces anywhere, full of pins, checks and doubtful en passant captures."
    rng, out = random.Random(seed), []
    while len(out) < n:
        board = chess.Board(None)
        board.turn = rng.random() < 0.5
        mine, rank, file = board.turn, 4 if board.turn else 3, rng.randrange(7)
        board.set_piece_at(8 * rank + file, chess.Piece(chess.PAWN, mine))
        board.set_piece_at(8 * rank + file + 1, chess.Piece(chess.PAWN, not mine))
        if rng.random() < 0.5: board.ep_square = 8 * (5 if mine else 2) + file + 1
        free = [s for s in range(64) if not board.piece_at(s)]
        pieces = ["K", "k"] + rng.choices("QRBNqrbn", k=rng.randrange(3, 9))
        for square, piece in zip(rng.sample(free, len(pieces)), pieces):
            board.set_piece_at(square, chess.Piece.from_symbol(piece))
        if board.status() == chess.STATUS_VALID: out.append(board)
    return out


@pytest.fixture(scope="module")
def boards():
    return play(9_000, 0) + play(4_000, 1, [fen for fen, _, _ in PERFT.values()], 40) + scatter(2_000, 2)


def test_action_space():
    assert len(ACTIONS) == len(set(ACTIONS)) == 1968
    assert ACTION_FROM.dtype == ACTION_TO.dtype == np.int16 and ACTION_PROMO.dtype == np.int8
    assert ACTION_FROM.shape == ACTION_TO.shape == ACTION_PROMO.shape == (1968,)
    triples = list(zip(ACTION_FROM, ACTION_TO, ACTION_PROMO))
    assert triples == sorted(triples)
    rows = {(f, t) for f in range(64) for t in range(64) if f != t and (
        (df := abs(f % 8 - t % 8)) == (dr := abs(f // 8 - t // 8)) or 0 in (df, dr) or {df, dr} == {1, 2})}
    assert {(f, t) for f, t, p in triples if p == 0} == rows and len(rows) == 1792
    for a, text in enumerate(ACTIONS):
        squares = chess.SQUARE_NAMES[ACTION_FROM[a]] + chess.SQUARE_NAMES[ACTION_TO[a]]
        assert text == squares + " nbrq"[ACTION_PROMO[a]].strip()


def test_actions_and_moves_are_one_to_one():
    for turn in (chess.WHITE, chess.BLACK):
        moves = [action_to_move(a, turn) for a in range(1968)]
        assert len(set(moves)) == 1968
        assert [move_to_action(m, turn) for m in moves] == list(range(1968))
        assert [move_to_action(chess.Move(m.from_square, m.to_square, m.promotion), turn)
                for m in moves] == list(range(1968))
    assert [action_to_move(a, chess.WHITE).uci() for a in range(1968)] == ACTIONS
    for a in range(1968):
        white, black = action_to_move(a, True), action_to_move(a, False)
        assert (black.from_square, black.to_square, black.promotion) == (
            chess.square_mirror(white.from_square), chess.square_mirror(white.to_square), white.promotion)


@pytest.mark.parametrize("uci", ["0000", "a1b4", "a2a4q", "e7e8k", "e6e7q"])
def test_what_is_no_action_is_refused(uci):
    with pytest.raises(ValueError, match="actions"): move_to_action(chess.Move.from_uci(uci), chess.WHITE)


@pytest.mark.parametrize("action", [-1, 1968, -1968])
def test_padding_is_no_action(action):
    with pytest.raises(ValueError, match="not an action"): action_to_move(action, chess.WHITE)


@pytest.mark.parametrize("name", PERFT)
def test_perft(name):
    fen, depth, leaves = PERFT[name]
    assert perft(chess.Board(fen), depth) == leaves
    assert perft(chess.Board(fen).mirror(), depth - 1) == perft(chess.Board(fen), depth - 1)


def test_legal_actions_are_the_legal_moves(boards):
    kinds = Counter()
    for board in boards:
        actions, moves = legal_actions(board), list(board.legal_moves)
        assert all(type(a) is int for a in actions) and actions == sorted(set(actions))
        assert {action_to_move(a, board.turn) for a in actions} == set(moves), board.fen()
        assert actions == sorted(move_to_action(m, board.turn) for m in moves), board.fen()
        kinds["check"] += board.is_check()
        kinds["double check"] += board.checkers_mask().bit_count() > 1
        kinds["pin"] += any(board.is_pinned(board.turn, s) for s in chess.SquareSet(board.occupied_co[board.turn]))
        for m in moves:
            kinds["en passant"] += board.is_en_passant(m)
            kinds["castling"] += board.is_castling(m)
            kinds["under-promotion"] += m.promotion in (chess.KNIGHT, chess.BISHOP, chess.ROOK)
        kinds["en passant forbidden"] += board.has_pseudo_legal_en_passant() and not board.has_legal_en_passant()
    assert len(boards) >= 13_000 and min(kinds.values()) > 20 and len(kinds) == 7, kinds


def test_the_most_moves_a_position_can_have():
    assert len(legal_actions(chess.Board(MOST))) == 218
    assert legal_actions(chess.Board(MOST)) == legal_actions(chess.Board(MOST).mirror())


@pytest.mark.parametrize("fen, move", [
    ("8/8/8/K2pP2r/8/8/8/7k w - d6 0 2", "e5d6"),    # both pawns leave the rank and the rook sees the king
    ("7K/8/8/8/k2Pp2Q/8/8/8 b - d3 0 2", "e4d3"),    # the same for black
    ("4r2k/8/8/3pP3/8/8/8/4K3 w - d6 0 2", "e5d6"),  # pinned on the file
])
def test_en_passant_that_opens_a_line_is_forbidden(fen, move):
    board = chess.Board(fen)
    assert board.has_pseudo_legal_en_passant()
    assert move_to_action(chess.Move.from_uci(move), board.turn) not in legal_actions(board)
    assert 15 not in tokens([board])[0, :64] and position_key(board).split()[3] == "-"


@pytest.mark.parametrize("fen", ["8/8/8/8/8/8/8/4K3 w - - 0 1", "8/8/8/8/8/8/8/4K3 b - - 0 1",
                                 "8/8/8/8/8/8/8/8 w - - 0 1"])
def test_a_board_without_both_kings_is_refused(fen):
    with pytest.raises(ValueError, match="not standard chess"): legal_actions(chess.Board(fen))


def test_chess960_is_refused():
    with pytest.raises(ValueError, match="not standard chess"): legal_actions(chess.Board(chess960=True))


def slow_tokens(board):
    "The vocabulary spelled out square by square."
    mine, row = board.turn, []
    for square in range(64):
        real = square if mine else chess.square_mirror(square)
        piece = board.piece_at(real)
        if piece is None:
            ep = board.has_legal_en_passant() and board.ep_square == real
            row.append(15 if ep else 0)
            continue
        own, home = piece.color == mine, chess.E1 if piece.color else chess.E8
        castles = board.clean_castling_rights() >> real & 1
        assert not castles or board.king(piece.color) == home
        row.append((13 if own else 14) if castles else piece.piece_type + (0 if own else 6))
    return row + [min(board.halfmove_clock, 100)]


def test_tokens_are_the_vocabulary(boards):
    got = tokens(boards)
    assert got.dtype == np.uint8 and got.shape == (len(boards), 65)
    assert (got == np.array([slow_tokens(b) for b in boards])).all()
    assert set(range(16)) == set(np.unique(got[:, :64]))
    late = chess.Board("8/8/8/8/8/8/8/K1k4R w - - 140 90")
    assert tokens([late])[0, 64] == 100


def test_black_sees_what_white_sees(boards):
    some = boards[::10]
    turned = [b.mirror() for b in some]
    assert (tokens(some) == tokens(turned)).all()
    assert [legal_actions(b) for b in some] == [legal_actions(b) for b in turned]


def test_encode_pads_with_minus_one(boards):
    some = boards[:500] + [chess.Board(MOST), chess.Board("7k/5Q2/6K1/8/8/8/8/8 b - - 0 1")]  # the last is stalemate
    got, legal = encode(some)
    assert (got == tokens(some)).all() and legal.dtype == np.int16 and legal.shape == (502, 218)
    for row, board in zip(legal, some):
        n = board.legal_moves.count()
        assert row[:n].tolist() == legal_actions(board) and (row[n:] == -1).all()
    assert encode(some[-1:])[1].tolist() == [[-1]]
    empty = encode([])
    assert empty[0].shape == (0, 65) and empty[1].shape == (0, 1)


def test_boards_are_left_as_they_were(boards):
    for board in boards[::40]:
        before, stack = board.fen(), list(board.move_stack)
        legal_actions(board), tokens([board]), terminal(board), position_key(board)
        assert board.fen() == before and board.move_stack == stack


def slow_terminal(board):
    "The rules one by one, repetitions counted by replaying the game from its first position."
    if not any(board.legal_moves): return Terminal.CHECKMATE if board.is_check() else Terminal.STALEMATE
    if board.is_insufficient_material(): return Terminal.INSUFFICIENT
    if board.halfmove_clock >= 100: return Terminal.FIFTY
    replay, seen = board.root(), Counter()
    seen[replay.epd()] += 1
    for move in board.move_stack:
        replay.push(move)
        seen[replay.epd()] += 1
    return Terminal.REPETITION if seen[board.epd()] >= 3 else Terminal.NONE


def test_terminal_states_are_exact():
    shuffling = ["8/8/8/8/8/2k5/7R/K7 w - - 0 1", "8/8/8/8/8/1k6/7q/K7 b - - 70 80", "r3k3/8/8/8/8/8/8/4K2R w Kq - 0 1",
                 "8/8/4k3/8/8/3BK3/8/8 w - - 0 1", "4k3/8/8/8/1p6/8/P7/K7 w - - 0 1", "k7/8/1K6/8/8/8/8/1Q6 w - - 0 1"]
    kinds = Counter()
    for board in play(2_000, 2, shuffling, 140) + play(2_000, 3, shuffling, 60, 0.7) + play(1_000, 4):
        want = slow_terminal(board)
        assert terminal(board) is want, board.fen()
        assert terminal(board, board.legal_moves.count()) is want
        kinds[want] += 1
    assert set(kinds) == set(Terminal), kinds


def shuffle(board, ucis, times):
    for uci in ucis.split() * times: board.push_uci(uci)
    return board


def test_repetition_by_hand():
    to_and_fro = "g1f3 g8f6 f3g1 f6g8"
    assert terminal(shuffle(chess.Board(), to_and_fro, 1)) is Terminal.NONE
    assert terminal(shuffle(chess.Board(), to_and_fro, 2)) is Terminal.REPETITION
    assert terminal(shuffle(chess.Board(), to_and_fro, 2).copy(stack=False)) is Terminal.NONE
    # the king's first move loses the castling rights, so the first of these positions is another one
    home, walk = "r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1e2 e8e7 e2e1 e7e8"
    assert terminal(shuffle(chess.Board(home), walk, 2)) is Terminal.NONE
    assert terminal(shuffle(chess.Board(home), walk, 3)) is Terminal.REPETITION
    # after the double step en passant was possible, later it is not
    step, rooks = shuffle(chess.Board("r3k3/8/8/8/1p6/8/P7/4K2R w - - 0 1"), "a2a4", 1), "a8b8 h1g1 b8a8 g1h1"
    assert step.has_legal_en_passant()
    assert terminal(shuffle(step.copy(), rooks, 2)) is Terminal.NONE
    assert terminal(shuffle(step.copy(), rooks, 3)) is Terminal.REPETITION


@pytest.mark.parametrize("fen, want", [
    ("rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3", Terminal.CHECKMATE),
    ("R5k1/5ppp/8/8/8/8/8/K7 b - - 100 90", Terminal.CHECKMATE),  # the mating move was the hundredth
    ("7k/5Q2/6K1/8/8/8/8/8 b - - 100 90", Terminal.STALEMATE),
    ("8/8/8/8/8/8/8/K1k4R w - - 99 90", Terminal.NONE),
    ("8/8/8/8/8/8/8/K1k4R w - - 100 90", Terminal.FIFTY),
    ("8/8/8/8/8/8/1k6/3K4 w - - 0 1", Terminal.INSUFFICIENT),
    ("8/8/8/5n2/8/8/1k6/3K4 w - - 0 1", Terminal.INSUFFICIENT),
    ("8/8/8/5nn1/8/8/1k6/3K4 w - - 0 1", Terminal.NONE),
    ("8/8/8/5b2/8/8/1k1B4/3K4 w - - 0 1", Terminal.NONE),
    ("8/8/8/4b3/8/8/1k1B4/3K4 w - - 0 1", Terminal.INSUFFICIENT),
])
def test_terminal_by_hand(fen, want):
    assert terminal(chess.Board(fen)) is want


def test_position_key_is_the_fen_without_the_move_number(boards):
    for board in boards:
        key = position_key(board)
        assert key == " ".join(board.fen().split()[:5] + ["1"])
    for board in boards[::20]:
        again = chess.Board(position_key(board))
        assert set(again.legal_moves) == set(board.legal_moves) and position_key(again) == position_key(board)
        assert parse_fen(position_key(board)) == again


def test_position_key_of_rights_that_are_none():
    assert position_key(chess.Board("4k3/8/8/8/8/8/8/4K2R w KQkq - 0 1")) == "4k3/8/8/8/8/8/8/4K2R w K - 0 1"


@pytest.mark.parametrize("fen, words", [
    ("", "is not a position"), ("hello", "is not a position"), (None, "not a text"), (7, "not a text"),
    ("8/8/8/8/8/8/8 w - - 0 1", "8 rows"), ("8/8/8/8/8/8/8/7X w - - 0 1", "X"),
                                        ("4k3/8/8/8/8/8/8/4K3 x - - 0 1", "expected 'w' or 'b'"),
    ("8/8/8/8/8/8/8/8 w - - 0 1", "there are no pieces"), ("8/8/8/8/8/8/8/4k3 w - - 0 1", "white has no king"),
    ("8/8/8/8/8/8/8/4K3 w - - 0 1", "black has no king"), ("4k3/8/8/8/8/8/8/K1K5 w - - 0 1", "more than two kings"),
    ("4k3/P7/P7/P7/PP6/PP6/PP6/4K3 w - - 0 1", "white has more than 8 pawns"),
    ("4k3/p7/p7/p7/pp6/pp6/pp6/4K3 w - - 0 1", "black has more than 8 pawns"),
    ("4k2P/8/8/8/8/8/8/4K3 w - - 0 1", "first or last rank"),
    ("4k3/8/8/8/8/NNNNNNNN/NNNNNNNN/4K3 b - - 0 1", "white has more than 16 pieces"),
    ("4k3/nnnnnnnn/nnnnnnnn/8/8/8/8/4K3 w - - 0 1", "black has more than 16 pieces"),
    ("4k3/8/8/8/8/8/8/4K3 w K - 0 1", "castling rights"), ("4k3/8/8/8/8/8/8/4K3 w - e6 0 1", "en passant"),
    ("4k3/8/8/8/8/8/8/4RK2 w - - 0 1", "not to move is in check"),
    ("4k3/8/8/8/1b5b/8/8/r3K2r w - - 0 1", "more than two pieces give check"),
    ("k7/8/8/8/r3K2r/8/8/8 w - - 0 1", "no move can have led"),
    ("4k3/8/8/8/8/8/8/4K3 w - - 10001 1", "half-moves"), (f"4k3/8/8/8/8/8/8/4K3 w - - {9*10**18} 1", "half-moves"),
    ("4k3/8/8/8/8/8/8/4K3 w - - 0 10001", "move number"), (f"4k3/8/8/8/8/8/8/4K3 w - - 0 {10**20}", "move number"),
])
def test_parse_fen_says_what_is_wrong(fen, words):
    with pytest.raises(PositionError, match=words) as e: parse_fen(fen)
    assert repr(fen) in str(e.value) and "\n" not in str(e.value) and not str(e.value).rstrip().endswith(":")


def test_parse_fen_accepts_what_is_right(boards):
    for board in boards[::20]: assert parse_fen(board.fen()).fen() == board.fen()
    assert parse_fen("4k3/8/8/8/8/8/8/4K3 w - -").halfmove_clock == 0
    assert parse_fen("4k3/8/8/8/8/8/8/4K3 w - - 10000 10000").ply() == 19_998


def test_every_fault_of_python_chess_has_words():
    standard = {s for s in chess.Status if s.value and not s.name.startswith("RACE")}
    assert set(B._WRONG) == standard

# memory

def test_what_the_rules_remember_is_small_and_changes_no_answer():
    "Each cache is full after some dozens of default steps, and what it forgets is computed again."
    assert max(f.cache_info().maxsize for f in (B._squares, B._rank_text, score_code)) <= B.REMEMBERED == 1 << 13
    assert reward.REMEMBERED <= 1 << 14
    fan, fresh = B._Fan(27, chess.WHITE), B._Fan(27, chess.WHITE)
    near = [1 << to for start, to, _ in B._INDEX[chess.WHITE] if start == 27]
    reaches = [a | b for a in near for b in near if a < b]
    assert len(reaches) > 500
    for reach in reaches + reaches[:3]:
        fresh.clear()
        assert fan[reach] == fresh[reach] and len(fan) <= B.REACHES == 256
