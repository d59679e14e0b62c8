"Other people's data: each form as it is published, and what is wrong with a row."
import random

import chess
import chess.pgn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from grpo_chess.board import ACTIONS, tokens
from grpo_chess.convert import ConvertConfig, convert, what_is_wrong
from grpo_chess.engine import MATE
from grpo_chess.labels import UNKNOWN, LabelError, read_manifest, read_shard
from grpo_chess.reward import MOVE_NAMES
from grpo_chess.targets import to_batch
from made_up import played, same

PGN = '[Event "?"]\n[WhiteElo "2000"]\n[BlackElo "1000"]\n[Result "0-1"]\n\n1. f3 e5 2. g4 Qh4# 0-1\n\n'
def converted(tmp_path, name="out", **kw):
    convert(ConvertConfig(**(dict(out=str(tmp_path/name)) | kw)), quiet=True)
    return [read_shard(tmp_path/name/s["name"], s["rows"]) for s in read_manifest(tmp_path/name)["shards"]]
def moves_of(labels, i=0):
    "What is known of the moves of position i: probabilities where there are any, scores otherwise."
    span, known = slice(*labels.offset[i:i + 2]), labels.scores if labels.probs is None else labels.probs
    return {ACTIONS[a]: x for a, x in zip(labels.actions[span], known[span].tolist())}

def test_pgn_plain_and_compressed(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*3)
    with pa.CompressedOutputStream(str(tmp_path/"z.pgn.zst"), "zstd") as f: f.write((PGN*3).encode())
    a, = converted(tmp_path, "a", files=str(tmp_path/"g.pgn"))
    b, = converted(tmp_path, "b", files=str(tmp_path/"z.pgn.zst"))
    assert same(a, b) and (a.probs == b.probs).all() and len(a) == 12
    board = chess.Board()
    board.push_uci("f2f3")
    # e7e5, from Black's side
    assert (a.tokens[1] == tokens([board])[0]).all() and {m for m, p in moves_of(a, 1).items() if p} == {"e2e4"}
    white, = converted(tmp_path, "c", files=str(tmp_path/"g.pgn"), min_elo=1500)
    assert len(white) == 6
    late, = converted(tmp_path, "d", files=str(tmp_path/"g.pgn"), skip_plies=3)
    assert len(late) == 3
    shards = converted(tmp_path, "e", files=str(tmp_path/"*g.pgn"), rows=5, positions=11)
    assert [len(s) for s in shards] == [5, 5, 1]
    data = (tmp_path/"z.pgn.zst").read_bytes()
    (tmp_path/"z.pgn.zst").write_bytes(data[:len(data)//2])
    with pytest.raises(LabelError, match="z.pgn.zst"): converted(tmp_path, "f", files=str(tmp_path/"z.pgn.zst"))
    assert not (tmp_path/"f"/"manifest.json").exists()

@pytest.mark.parametrize("text, match", [(PGN + PGN.replace("Qh4", "Qh5"), "line 14: illegal san"),
                                         (PGN + PGN.replace(" 0-1\n", "\n"), "cut short"),
                                         (PGN + '[Variant "Atomic"]\n\n1. e4 e5 1-0\n', "Atomic"),
                                         (PGN + '[FEN "8/8/8/8/8/8/8/K7 w - - 0 1"]\n\n1. Ka2 1-0\n',
                                          "no legal position")])
def test_bad_games_are_named_or_counted(tmp_path, text, match):
    (tmp_path/"g.pgn").write_text(text)
    with pytest.raises(LabelError, match=match) as e: converted(tmp_path, files=str(tmp_path/"g.pgn"))
    assert "g.pgn, game that ends on line" in str(e.value)
    ok, = converted(tmp_path, files=str(tmp_path/"g.pgn"), tolerate=.5)
    assert len(ok) == 4

def test_lichess_games(tmp_path):
    table = dict(Event=["x"]*3, Site=["y"]*3, Result=["0-1"]*3, WhiteElo=pa.array([1800, None, 1200], pa.int16()),
                 BlackElo=pa.array([1500, 2500, 1300], pa.int16()), UTCDate=["2024.01.01"]*3,
                 movetext=["1. e4 { [%eval 0.18] [%clk 0:03:00] } 1... e5 { [%eval 0.2] } 0-1",
                           "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. O-O 1/2-1/2", "1. d4 0-1"])
    pq.write_table(pa.table(table), tmp_path/"train-00000.parquet")
    a, = converted(tmp_path, "a", files=str(tmp_path/"*.parquet"))
    assert len(a) == 10
    assert {m for m, p in moves_of(a, 8).items() if p} == {"e1g1"}
    b, = converted(tmp_path, "b", files=str(tmp_path/"*.parquet"), min_elo=1700)
    assert len(b) == 1 + 3
    pq.write_table(pa.table(table | dict(movetext=["1. e4 0-1", "1. e5 0-1", None])), tmp_path/"bad.parquet")
    with pytest.raises(LabelError, match="bad.parquet, row 1: illegal san"):
        converted(tmp_path, "c", files=str(tmp_path/"bad.parquet"))
    pq.write_table(pa.table({k: v for k, v in table.items() if k != "BlackElo"}), tmp_path/"less.parquet")
    with pytest.raises(LabelError, match="less.parquet has no column BlackElo"):
        converted(tmp_path, "d", files=str(tmp_path/"less.parquet"))
    data = (tmp_path/"train-00000.parquet").read_bytes()
    (tmp_path/"cut.parquet").write_bytes(data[:-20])
    with pytest.raises(LabelError, match="cut.parquet"):
        converted(tmp_path, "e", files=str(tmp_path/"cut.parquet"), form="games")

EVALS = [("r3k2r/8/8/8/8/8/8/4K3 b kq -", "e8h8 e1e2", 40, 900, -700, None),
         ("r3k2r/8/8/8/8/8/8/4K3 b kq -", "e8c8", 40, 900, None, -7), ("r3k2r/8/8/8/8/8/8/4K3 b kq -", "a8a1", 22,
                                                                       90000, 0, None),
         ("4k3/8/8/8/8/8/4P3/4K3 w - -", "e2e4 e8e7", 30, 100, 250, None),
         ("4k3/8/8/8/8/8/4P3/4K3 w - -", "e1d2", 30, 100, None, 12)]
def evals_table(rows):
    return pa.table(dict(zip(("fen", "line", "depth", "knodes", "cp", "mate"), (list(c) for c in zip(*rows)))))

def test_lichess_evaluations(tmp_path):
    pq.write_table(evals_table(EVALS), tmp_path/"data_0000.parquet")
    a, = converted(tmp_path, files=str(tmp_path/"*.parquet"))
    assert len(a) == 2 and a.probs is None
    # from White's view to the mover's; the shallow analysis is left out
    assert {m: s for m, s in moves_of(a, 0).items() if s != UNKNOWN} == {"e1g1": 700, "e1c1": MATE - 7}
    assert {m: s for m, s in moves_of(a, 1).items() if s != UNKNOWN} == {"e2e4": 250, "e1d2": MATE - 12}
    batch = to_batch(a, np.arange(2))
    assert torch.allclose(batch.target.sum(-1), torch.ones(2)) and (batch.target[batch.win.isnan()] == 0).all()
    b, = converted(tmp_path, "b", files=str(tmp_path/"*.parquet"), min_depth=35)
    assert len(b) == 1

@pytest.mark.parametrize("row, match", [((EVALS[0][0], "e8e5", 40, 900, 1, None), "row 3: e8e5 is no legal move"),
                                        ((EVALS[0][0], "e8c8", 40, 900, 1, 2), "exactly one"),
                                        (("what", "e8c8", 40, 900, 1, None), "row 3: 'what 0 1' is not a position"),
                                        ((EVALS[0][0], "", 40, 900, 1, None), "row 3"),
                                        ((EVALS[0][0], None, 40, 900, 1, None), "row 3: a value is missing"),
                                        ((EVALS[0][0], "e8c8", 40, 900, None, 0), "exactly one")])
def test_bad_evaluations_are_named(tmp_path, row, match):
    pq.write_table(evals_table([*EVALS[3:], EVALS[3], row]), tmp_path/"x.parquet")
    with pytest.raises(LabelError, match=match) as e: converted(tmp_path, files=str(tmp_path/"x.parquet"))
    assert "x.parquet, row 3" in str(e.value)

def soft_table(boards, moves, probs):
    names = sorted(ACTIONS)
    def array(b):
        return [0 if (p := b.piece_at(s)) is None else p.piece_type + 6*(not p.color) for s in range(64)]
    def castling(b): return sum(bit for bit, letter in zip((8, 4, 2, 1), "KQkq") if letter in b.castling_xfen())
    def pad(x, v):
        return x + [v]*(8 - len(x))
    schema = pa.schema([("board_array", pa.list_(pa.int8(), 64)), ("turn", pa.int8()), ("castling", pa.int8()),
                        ("ep_square", pa.int8()), ("move_idx", pa.int64()), ("cp", pa.int32()), ("mate", pa.int32()),
                        ("soft_indices", pa.list_(pa.int64(), 8)), ("soft_probs", pa.list_(pa.float32(), 8)),
                        ("label_depth", pa.int16()), ("phase", pa.int8()), ("source", pa.int8()),
                        ("cache_name", pa.string())])
    return pa.table([[array(b) for b in boards], [int(not b.turn) for b in boards], [castling(b) for b in boards],
                     [b.ep_square if b.ep_square is not None else -1 for b in boards],
                     [names.index(m[0]) for m in moves],
                     [0]*len(boards), [0]*len(boards), [pad([names.index(u) for u in m], -1) for m in moves],
                     [pad(p, 0.) for p in probs], [30]*len(boards), [1]*len(boards), [1]*len(boards),
                     ["c"]*len(boards)], schema=schema)

def test_soft_labels(tmp_path):
    boards = played(200, seed=9, plies=60)
    castles = chess.Board("r3k2r/pppppppp/8/8/8/8/PPPPPPPP/R3K2R b KQkq - 0 1")
    for b in boards: b.halfmove_clock = 0                                       # this form does not know it
    for b in boards: b.ep_square = b.ep_square if b.has_legal_en_passant() else None
    rng = random.Random(0)
    moves = [[m.uci() for m in rng.sample(list(b.legal_moves), min(3, b.legal_moves.count()))]
             for b in boards] + [["e8h8", "e8g8", "e8a8"]]
    probs = [[1.], [.6, .4], [.5, .3, .2]]
    probs = [probs[len(m) - 1] for m in moves]
    pq.write_table(soft_table([*boards, castles], moves, probs), tmp_path/"data-00000.parquet")
    a, = converted(tmp_path, files=str(tmp_path/"*.parquet"))
    assert (a.tokens == tokens([*boards, castles])).all() and (a.scores == UNKNOWN).all()
    for i, (b, ms, ps) in enumerate(zip(boards, moves, probs)):
        real = {ACTIONS[MOVE_NAMES[b.turn].index(u)]: p for u, p in zip(ms, ps)}
        assert {m: round(p, 5) for m, p in moves_of(a, i).items() if p} == {m: round(p, 5) for m, p in real.items()}
    # castling in both spellings
    assert {m: round(p, 5) for m, p in moves_of(a, len(boards)).items() if p} == {"e1g1": .8, "e1c1": .2}
    names = sorted(ACTIONS)
    for column, value, match in (("soft_probs", [[.5] + [0.]*7], "add up"),
                                 ("soft_indices", [[names.index("a1a8")] + [-1]*7], "no legal move"),
                                 ("soft_indices", [[1968] + [-1]*7], "move number 1968"),
                                 ("board_array", [[0]*64], "no pieces"),
                                 ("soft_probs", [None], "row 0")):
        t = soft_table([chess.Board()], [["e2e4"]], [[1.]])
        k = t.schema.get_field_index(column)
        pq.write_table(t.set_column(k, t.schema.field(k), pa.array(value, t.schema.field(k).type)),
                       tmp_path/"bad.parquet")
        with pytest.raises(LabelError, match=match) as e: converted(tmp_path, "bad", files=str(tmp_path/"bad.parquet"))
        assert "bad.parquet, row 0" in str(e.value)


def test_convert_takes_the_whole_or_nothing(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*3)
    (tmp_path/"e.parquet").write_bytes(b"PAR1")
    converted(tmp_path, files=str(tmp_path/"g.pgn"))
    with pytest.raises(LabelError, match="already holds labels"): converted(tmp_path, files=str(tmp_path/"g.pgn"))
    with pytest.raises(LabelError, match="neither PGN nor"): converted(tmp_path, "b", files=str(tmp_path/"e.parquet"))
    with pytest.raises(LabelError, match="there is no file"): converted(tmp_path, "b", files=str(tmp_path/"no*.pgn"))
    with pytest.raises(LabelError, match="passes the filters"):
        converted(tmp_path, "b", files=str(tmp_path/"g.pgn"), min_elo=3000)
    pq.write_table(evals_table(EVALS), tmp_path/"f.parquet")
    (tmp_path/"e.parquet").unlink()
    pq.write_table(soft_table([chess.Board()], [["e2e4"]], [[1.]]), tmp_path/"e.parquet")
    with pytest.raises(LabelError, match="several forms"): converted(tmp_path, "b", files=str(tmp_path/"*.parquet"))


@pytest.mark.parametrize("moves", ["1. e4 (1. d4)) e5 1-0", "1. e4 ((1. d4) e5 1-0", "1. e4 )( e5 1-0",
                                   "1. e4 (1. d4 (1. c4 ) e5 1-0",
                                   "(1. e4) 1. e4 e5 1-0"])
def test_side_lines_that_cross_are_no_crash(tmp_path, moves):
    "An IndexError of python-chess came through; side lines are passed over."
    (tmp_path/"g.pgn").write_text(moves + "\n\n" + PGN)
    try: whole, = converted(tmp_path, files=str(tmp_path/"g.pgn"))
    except LabelError as e: assert "g.pgn, game that ends on line" in str(e)
    else: assert len(whole) == 2 + 4

def test_side_lines_are_not_what_was_played(tmp_path):
    (tmp_path/"g.pgn").write_text("1. e4 (1. d4 d5 (1... f5)) 1... e5 2. Nf3 (2. Qh8) 1-0\n")
    a, = converted(tmp_path, files=str(tmp_path/"g.pgn"))
    assert [next(m for m, p in moves_of(a, i).items() if p) for i in range(3)] == ["e2e4", "e2e4", "g1f3"]

def test_null_moves_are_bad_rows(tmp_path):
    (tmp_path/"n.pgn").write_text(PGN.replace("e5 2. g4 Qh4#", "-- 2. g4 e5"))
    with pytest.raises(LabelError, match="null move"): converted(tmp_path, files=str(tmp_path/"n.pgn"))
    evals = dict(fen=["8/8/4k3/8/8/4K3/8/Q7 w - -"], line=["0000"], depth=[9], knodes=[1], cp=[3], mate=[None])
    pq.write_table(pa.table(evals | dict(mate=pa.array([None], pa.int32()))), tmp_path/"n.parquet")
    with pytest.raises(LabelError, match="0000 is no legal move"): converted(tmp_path, files=str(tmp_path/"n.parquet"))


def test_a_game_whose_counters_are_beyond_all_games_is_told_of():
    game = chess.pgn.Game.from_board(chess.Board("4k3/8/8/8/8/8/4P3/4K3 w - - 0 " + "9"*30))
    assert "refused" in what_is_wrong(game)
