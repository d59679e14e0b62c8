"Rewards: lines worked by hand, the rules at the end of games, and a judge that never loses or invents an answer."
import csv
import importlib.util
import itertools
import json
import math
import random
from concurrent.futures import Future
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
from torch import nn

from grpo_chess.board import Terminal, encode, move_to_action, position_key
from grpo_chess.engine import MATE, EngineConfig, EngineError, EnginePool, engine_name, score_code
from grpo_chess.loss import group_advantage
from grpo_chess.model import Policy
from grpo_chess.reward import (
    SCALES, Judge, RewardConfig, arrange, best_value, material, move_values, node_values, normalize_cp, step_rewards,
    win_probability,
)
from grpo_chess.sampler import SamplerConfig, rollout

NBS = Path(__file__).resolve().parent.parent/"nbs"
SHUFFLE = "g1f3 g8f6 f3g1 f6g8"

class Line(nn.Module):
    "Plays a fixed line: by position, the move that is wanted."
    def __init__(self, book):
        super().__init__()
        self.book = book
    def forward(self, tokens, legal):
        out = torch.full(legal.shape, -1e4).masked_fill(legal < 0, -math.inf)
        for i, (t, row) in enumerate(zip(tokens, legal)): out[i][row == self.book[bytes(t.numpy())]] = 0.
        return out

def play(start, *moves, plies=None):
    "A rollout of exactly this line, twice."
    book, b = {}, start.copy()
    for m in moves:
        book[bytes(encode([b])[0][0])] = move_to_action(chess.Move.from_uci(m), b.turn)
        b.push_uci(m)
    return rollout(Policy(Line(book)), [start], SamplerConfig(group=2, plies=plies or len(moves)))

class Uniform(nn.Module):
    def forward(self, tokens, legal): return torch.zeros(legal.shape).masked_fill(legal < 0, -math.inf)

STARTS = (chess.STARTING_FEN, "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 98 80", "4k3/8/8/8/8/8/3p4/4K3 w - - 0 1")

def games(seed=0, plies=12, group=8, on_new=None, starts=STARTS):
    boards = [chess.Board(f) for f in starts]
    return rollout(Policy(Uniform()), boards, SamplerConfig(group=group, plies=plies), seed, on_new=on_new)

def sigmoid(cp): return 1/(1 + math.exp(-.00368208*cp))
def judge(scale="win", **kw): return Judge(RewardConfig(judge="material", scale=scale, **kw))

class FakePool:
    "Answers with a function of the position; may fail, answer late, or answer too little."
    def __init__(self, fail=(), late=False):
        self.asked, self.jobs, self.fail, self.late, self.short = [], [], set(fail), late, False
    @staticmethod
    def score(fen): return sum(map(ord, fen)) % 1600 - 800
    def submit(self, fens, depth=None, nodes=None, trusted=False):
        assert fens and len(set(fens)) == len(fens)
        self.asked += fens
        self.limit = depth, nodes
        job = Future()
        self.jobs.append((job, list(fens)))
        if not self.late: self.finish()
        return job
    def finish(self):
        for job, fens in self.jobs:
            if job.done(): continue
            if self.fail & set(fens): job.set_exception(EngineError("it died"))
            else: job.set_result(np.array([self.score(f) for f in fens[:-1 if self.short else None]], np.int32))

def key(n): return f"{n}"                                                  # a fake pool takes any text
def answers(fens): return win_probability([FakePool.score(f) for f in fens]).tolist()

# ---------------------------------------------------------------- scales

def test_win_probability():
    cp = [-900, -100, -1, 0, 1, 35, 100, 250, 900]
    assert win_probability(cp).tolist() == pytest.approx([sigmoid(c) for c in cp], rel=1e-6)
    assert win_probability([0])[0] == .5 and win_probability([100])[0] == pytest.approx(.591, abs=5e-4)
    for n in (1, 2, 100):
        assert win_probability([score_code("mate", str(n)), score_code("mate", str(-n))]).tolist() == [1, 0]
    assert win_probability([score_code("mate", "0")])[0] == 0              # mated already
    assert (np.diff(win_probability(np.arange(-3000, 3001, 50))) > 0).all()
    assert win_probability(np.int32([31_000, -31_000])).tolist() == [1, pytest.approx(0, abs=1e-12)]
    assert win_probability(np.array([5], np.int32)).dtype == np.float32

def test_centipawn_scale():
    want = [0, .035, -.25, 1.999, 2, 2, -2]
    assert normalize_cp([0, 35, -250, 1999, 2000, 2001, -31_000]).tolist() == pytest.approx(want)
    assert normalize_cp([score_code("mate", n) for n in ("3", "-1", "0")]).tolist() == [2, -2, -2]

@pytest.mark.parametrize("scale", SCALES)
def test_both_sides_of_a_value(scale):
    "V(mine) + V(yours) is the scale's total; mated and mating are its ends; a draw is worth 0 centipawns."
    s, cp = SCALES[scale], np.arange(-5000, 5001, 37)
    np.testing.assert_allclose(s.value(cp) + s.value(-cp), s.total, atol=1e-6)
    for n in (0, 1, 60):
        assert s.lost == s.value([-(MATE-n)])[0] <= s.value(cp).min()
        assert s.total - s.lost == s.value([MATE-max(n, 1)])[0] >= s.value(cp).max()
    assert s.draw == s.value([0])[0] == s.total - s.draw

def test_material():
    fens = {"4k3/8/8/8/8/8/8/4K3": 0, "4k3/8/8/8/8/8/8/4KQ2": 900, "qk6/8/8/8/8/8/8/K7": -900,
            chess.STARTING_FEN.split()[0]: 0, "rnb1kbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBN1": 400,
            "4k3/pp6/8/8/8/8/8/NB2K2R": 900}
    for placement, cp in fens.items():
        assert material([f"{placement} w - - 0 1", f"{placement} b - - 0 1"]).tolist() == [cp, -cp]
    worth = ((1, 100), (2, 300), (3, 300), (4, 500), (5, 900))
    r, b = random.Random(0), chess.Board()
    for _ in range(60):
        b.push(r.choice(list(b.legal_moves)))
        slow = sum(v*(len(b.pieces(p, b.turn)) - len(b.pieces(p, not b.turn))) for p, v in worth)
        assert material([position_key(b)])[0] == slow

# ---------------------------------------------------------------- lines by hand

START = chess.Board("4k3/8/8/2n5/3p4/1R6/8/4K3 w - - 0 1")         # white: a rook (500); black: knight and pawn (400)

def test_a_line_by_hand_on_the_centipawn_scale():
    "White takes nothing, black forks, white moves the king, black takes the rook; then white takes the pawn d4."
    ro = play(START, "b3b4", "c5d3", "e1e2", "d3b4", "e2d2")
    #           white +100     black −100      white +100     black −100      after the rook: white −400
    assert step_rewards(ro, judge("cp"))[0, 0].tolist() == pytest.approx([0, 0, 0, .5, 0])
    assert node_values(ro, judge("cp"))[0, 0].tolist() == pytest.approx([.1, -.1, .1, -.1, -.4, .4])

def test_a_line_by_hand_in_win_probability():
    ro = play(START, "b3b4", "c5d3", "e1e2", "d3b4", "e2d2")
    gains, values = [0, 0, 0, sigmoid(400) - sigmoid(-100), 0], [sigmoid(c) for c in (100, -100, 100, -100, -400, 400)]
    assert step_rewards(ro, judge("win"))[0, 0].tolist() == pytest.approx(gains, abs=1e-6)
    assert node_values(ro, judge("win"))[0, 0].tolist() == pytest.approx(values, abs=1e-6)

def test_the_mover_gains_whoever_it_is():
    "1. e4 d5 2. exd5 Qxd5: each capture is a gain of the side that captures; colours exchanged, the same rewards."
    def rewards(board, *line, scale="cp"): return step_rewards(play(board, *line), judge(scale))[0, 0].tolist()
    want = [0, 0, .1, .1]
    assert rewards(chess.Board(), "e2e4", "d7d5", "e4d5", "d8d5") == pytest.approx(want)
    assert rewards(chess.Board().mirror(), "e7e5", "d2d4", "e5d4", "d1d4") == pytest.approx(want)
    want = [0, 0, sigmoid(100) - sigmoid(0), sigmoid(0) - sigmoid(-100)]
    assert rewards(chess.Board(), "e2e4", "d7d5", "e4d5", "d8d5", scale="win") == pytest.approx(want, abs=1e-6)

def test_a_promotion_is_worth_eight_pawns():
    ro = play(chess.Board("8/P1k5/K7/8/8/8/8/8 w - - 0 1"), "a7a8q")
    assert step_rewards(ro, judge("cp"))[0, 0].tolist() == pytest.approx([.8])

def shuffled(moves):
    b = chess.Board()
    for m in moves.split(): b.push_uci(m)
    return b

ROOK = 500
ENDS = {                # start, last move, the mover's material before it
    Terminal.CHECKMATE: (chess.Board("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1"), "a1a8", ROOK),
    Terminal.STALEMATE: (chess.Board("7k/8/6K1/5Q2/8/8/8/8 w - - 0 1"), "f5f7", 900),
    Terminal.INSUFFICIENT: (chess.Board("4k3/8/8/8/8/8/3p4/4K3 w - - 0 1"), "e1d2", -100),
    Terminal.FIFTY: (chess.Board("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 99 80"), "a1b1", ROOK),
    Terminal.REPETITION: (shuffled(f"e2e4 d7d5 e4d5 d8d6 {SHUFFLE} g1f3 g8f6 f3g1"), "f6g8", -100)}

@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize("kind", ENDS)
def test_every_end_on_both_scales(kind, black, scale):
    "By the rules, never by the judge: a mate gives the mover all that was to be gained, a draw half of it."
    start, move, cp = ENDS[kind]
    if black:
        def flip(m): return chess.Move(m.from_square ^ 56, m.to_square ^ 56)
        history, start = start.move_stack, start.root().mirror()
        for m in history: start.push(flip(m))
        move = flip(chess.Move.from_uci(move)).uci()
    ro, j = play(start, move, plies=3), judge(scale)
    assert (ro.ended[0, :, 1] == kind).all()
    before, best, draw = (sigmoid(cp), 1., .5) if scale == "win" else (cp/1000, 2., 0.)
    want = (best if kind == Terminal.CHECKMATE else draw) - before
    for row in step_rewards(ro, j)[0].tolist(): assert row == pytest.approx([want, 0, 0], abs=1e-6)
    last = SCALES[scale].lost if kind == Terminal.CHECKMATE else draw
    for row in node_values(ro, j)[0].tolist(): assert row == pytest.approx([before, last, 0, 0], abs=1e-6)
    assert ro.fens[ro.node[0, 0, 1]] not in j.known and j.asked == 1       # the end itself is not asked

def test_an_end_by_history_is_open_in_another_game():
    old, move, _ = ENDS[Terminal.REPETITION]
    new = chess.Board(old.fen())
    b = new.copy()
    book = {}
    for m in (move, "g1f3"):
        book[bytes(encode([b])[0][0])] = move_to_action(chess.Move.from_uci(m), b.turn)
        b.push_uci(m)
    ro = rollout(Policy(Line(book)), [old, new], SamplerConfig(group=2, plies=2))
    assert step_rewards(ro, judge("cp"))[:, 0].tolist() == [pytest.approx([.1, 0]), pytest.approx([0, 0], abs=1e-7)]
    assert node_values(ro, judge("cp"))[:, 0].tolist() == [pytest.approx([-.1, 0, 0]), pytest.approx([-.1, .1, -.1])]

# ---------------------------------------------------------------- telescoping, padding

@pytest.mark.parametrize("scale", SCALES)
def test_rewards_telescope_over_ragged_games(scale):
    "Seen by the starter, a game's rewards add up to its last value minus its first, whatever ended it."
    ro = games(plies=16, group=12)
    j = judge(scale)
    r, v = step_rewards(ro, j), node_values(ro, j)
    s = SCALES[scale]
    assert {1, 3, 4} < {int(x) for x in ro.ended.unique()} and not ro.played.all()
    for b, g in itertools.product(range(len(r)), range(r.shape[1])):
        n = int(ro.played[b, g].sum())
        last = v[b, g, n].item()
        seen = last if n % 2 == 0 else s.total - last
        total = sum((-1)**t*x for t, x in enumerate(r[b, g].tolist()))
        assert total == pytest.approx(seen - v[b, g, 0].item(), abs=1e-5)
        assert (r[b, g, n:] == 0).all() and (v[b, g, n+1:] == 0).all()

def slow_value(board):
    "Value for the side to move, by the rules of chess as python-chess has them and by material."
    if board.is_checkmate(): return 0.
    if board.is_stalemate() or board.is_insufficient_material() or board.halfmove_clock >= 100: return .5
    if board.is_repetition(3): return .5
    return sigmoid(int(material([board.fen()])[0]))

def test_rewards_against_a_loop():
    ro = games(seed=3)
    r = step_rewards(ro, judge("win"))
    for b, g in itertools.product(range(len(r)), range(r.shape[1])):
        board = chess.Board(ro.fens[ro.node[b, g, 0]])
        for t, move in enumerate(ro.moves(b, g)):
            before = slow_value(board)
            board.push(move)
            assert r[b, g, t].item() == pytest.approx(1 - slow_value(board) - before, abs=1e-6)

def test_padding_is_judged_by_nobody():
    pool = FakePool()
    j = Judge(RewardConfig(), pool)
    ro = games(plies=16)
    r = step_rewards(ro, j)
    open_ = {ro.fens[i] for i in ro.node[(ro.ended == 0) & (ro.node >= 0)].tolist()}
    assert sorted(pool.asked) == sorted(open_) and pool.limit == (4, None)
    assert r.isfinite().all() and (r[~ro.played] == 0).all()
    assert torch.equal(r, step_rewards(ro, j)) and len(pool.asked) == len(open_)         # nothing is asked twice

# ---------------------------------------------------------------- the judge's memory

def test_known_and_pending_positions_are_not_asked_again():
    pool = FakePool(late=True)
    j = Judge(RewardConfig(), pool)
    j.submit(["a", "b", "a"])
    j.submit(["b", "c"])
    j.submit([])
    assert pool.asked == ["a", "b", "c"] and j.asked == 3 and j.hits == 2 and len(pool.jobs) == 2
    pool.finish()
    assert j.values(["c", "a", "c", "b"]).tolist() == pytest.approx(answers("cacb")) and not j.pending
    j.submit(["a", "c", "d"])
    assert pool.asked == ["a", "b", "c", "d"] and j.asked == 4 and j.hits == 4
    pool.finish()
    assert j.values(["d"]).tolist() == pytest.approx(answers("d"))
    assert j.values([]).shape == (0,) and j.values(["a"]).dtype == np.float32

def test_values_waits_only_for_what_it_needs():
    pool = FakePool(late=True)
    j = Judge(RewardConfig(), pool)
    j.submit(["a"])
    pool.finish()
    j.submit(["b"])                        # b is never answered
    assert j.values(["a"]).tolist() == pytest.approx(answers("a")) and set(j.pending) == {"b"}

@pytest.mark.parametrize("room", [1, 2, 5, 40])
def test_eviction_never_loses_an_answer_that_is_being_asked_for(room, monkeypatch):
    monkeypatch.setattr("grpo_chess.reward.REMEMBERED", room)
    pool, r = FakePool(late=True), random.Random(room)
    j = Judge(RewardConfig(), pool)
    for _ in range(60):
        if r.random() < .5: j.submit([key(r.randrange(30)) for _ in range(r.randrange(12))])
        if r.random() < .7: pool.finish()
        want = [key(r.randrange(30)) for _ in range(r.randrange(1, 12))]
        j.submit(want)
        pool.finish()
        assert j.values(want).tolist() == pytest.approx(answers(want))
        assert len(j.known) <= room
    assert len(pool.asked) > 30 or room == 40

def test_eviction_between_asking_and_reading(monkeypatch):
    "Submitted while it was known, forgotten through another question, asked for after that."
    monkeypatch.setattr("grpo_chess.reward.REMEMBERED", 2)
    for cfg, pool in ((RewardConfig(), FakePool()), (RewardConfig(judge="material"), None)):
        fens = [f"4k3/{'p'*n}{8-n}/8/8/8/8/8/4K3 w - - 0 1" for n in range(1, 7)]
        j = Judge(cfg, pool)
        want = (np.array([FakePool.score(f) for f in fens]) if pool else material(fens))
        want = win_probability(want).tolist()
        j.submit(fens[:2])
        j.submit(fens[:4])
        assert j.values(fens[2:]).tolist() == want[2:]
        assert j.values(fens).tolist() == want and j.values(fens[:3] + fens[:1]).tolist() == want[:3] + want[:1]

def test_the_oldest_is_forgotten_first(monkeypatch):
    monkeypatch.setattr("grpo_chess.reward.REMEMBERED", 3)
    pool = FakePool()
    j = Judge(RewardConfig(), pool)
    for f in "abcd": j.values([f])
    assert list(j.known) == ["b", "c", "d"]
    j.values(["a"])
    assert list(j.known) == ["c", "d", "a"] and pool.asked == list("abcda")

def test_the_material_judge_forgets_too_and_stays_right(monkeypatch):
    ro = games(plies=8)
    want = step_rewards(ro, judge())
    monkeypatch.setattr("grpo_chess.reward.REMEMBERED", 4)
    j = judge()
    assert torch.equal(step_rewards(ro, j), want) and len(j.known) <= 4
    j.submit(ro.fens[:1])
    assert torch.equal(step_rewards(ro, j), want)

# ---------------------------------------------------------------- law 3

def test_a_failing_job_raises_and_may_be_asked_again():
    pool = FakePool(fail={"b"}, late=True)
    j = Judge(RewardConfig(), pool)
    j.submit(["a", "b"])
    j.submit(["c"])
    pool.finish()
    with pytest.raises(EngineError, match="it died"): j.values(["c", "a"])
    assert not {"a", "b"} & (j.known.keys() | j.pending.keys())           # nothing was made up, nothing hangs
    pool.fail, pool.late = set(), False
    assert j.values(["a", "b", "c"]).tolist() == pytest.approx(answers("abc"))
    assert pool.asked.count("a") == 2 and pool.asked.count("c") == 1

def test_a_failing_engine_stops_the_rewards():
    ro = games(plies=4)
    pool = FakePool(fail={ro.fens[ro.node[0, 0, 2]]})
    j = Judge(RewardConfig(), pool)
    for _ in range(2):
        with pytest.raises(EngineError, match="it died"): step_rewards(ro, j)
    pool.fail = set()
    assert torch.equal(step_rewards(ro, j), step_rewards(ro, Judge(RewardConfig(), FakePool())))

def test_a_pool_that_cannot_be_asked_leaves_nothing_behind():
    class Closed(FakePool):
        def submit(self, *a, **kw): raise EngineError("closed")
    j = Judge(RewardConfig(), Closed())
    with pytest.raises(EngineError, match="closed"): j.values(["a"])
    assert not j.known and not j.pending

def test_too_few_answers_are_an_error():
    pool = FakePool()
    pool.short = True
    j = Judge(RewardConfig(), pool)
    with pytest.raises(Exception): j.values(["a", "b"])
    with pytest.raises(Exception): j.values(["b"])

def test_an_interrupted_wait_can_be_repeated():
    class Stop(Future):
        def result(self, timeout=None): raise KeyboardInterrupt
    pool = FakePool()
    j = Judge(RewardConfig(), pool)
    real = pool.submit
    pool.submit = lambda *a, **kw: Stop()
    with pytest.raises(KeyboardInterrupt): j.values(["a"])
    pool.submit = real
    assert j.values(["a"]).tolist() == pytest.approx(answers("a"))

@pytest.mark.parametrize("kw", [dict(judge="stockfish"), dict(scale="elo"), dict(depth=0), dict(nodes=-1)], ids=str)
def test_config_refuses(kw):
    with pytest.raises(ValueError, match=f"reward.{next(iter(kw))}"): RewardConfig(**kw)

def test_an_engine_judge_needs_an_engine():
    with pytest.raises(ValueError, match="EnginePool"): Judge(RewardConfig())

# ---------------------------------------------------------------- Stockfish itself

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=1)) as p: yield p

@pytest.mark.parametrize("scale, kw, limit", [
    ("win", dict(depth=3), dict(depth=3)), ("cp", dict(depth=3), dict(depth=3)),
    ("win", dict(nodes=300), dict(nodes=300)), ("cp", {}, dict(depth=4))], ids=str)
def test_the_engine_judge_is_the_pool(pool, scale, kw, limit):
    ro = games(seed=1, group=4)
    j = Judge(RewardConfig(scale=scale, **kw), pool)
    v = node_values(ro, j)
    open_ = (ro.ended == 0) & (ro.node >= 0)
    rows = ro.node[open_].tolist()
    direct = SCALES[scale].value(pool.evaluate([ro.fens[i] for i in rows], **limit))
    assert v[open_].tolist() == direct.tolist() and j.asked == len(set(rows))

def test_the_order_of_questions_does_not_matter(pool, monkeypatch):
    "Law 2: backwards, one by one, while the games are played, with room for one answer: the same rewards, bit for bit."
    ro = games(seed=2, group=6)
    want = step_rewards(ro, Judge(RewardConfig(depth=4), pool))
    fens = [ro.fens[i] for i in ro.node[(ro.ended == 0) & (ro.node >= 0)].unique().tolist()]
    back = Judge(RewardConfig(depth=4), pool)
    back.values(fens[::-1])
    single = Judge(RewardConfig(depth=4), pool)
    [single.values([f]) for f in random.Random(0).sample(fens, len(fens))]
    early = Judge(RewardConfig(depth=4), pool)
    again = games(seed=2, group=6, on_new=early.submit)
    for j, r in ((back, ro), (single, ro), (early, again)): assert torch.equal(step_rewards(r, j), want)
    monkeypatch.setattr("grpo_chess.reward.REMEMBERED", 1)
    assert torch.equal(step_rewards(ro, Judge(RewardConfig(depth=4), pool)), want)
    assert want[ro.played].abs().max() > .2

def test_a_game_is_judged_while_it_is_played(pool):
    "All that the rewards need was asked by `on_new`; nothing is left to ask afterwards."
    j = Judge(RewardConfig(depth=2), pool)
    ro = games(seed=4, on_new=j.submit)
    asked = j.asked
    step_rewards(ro, j)
    assert j.asked == asked and not j.pending

def test_the_stored_evaluations_are_the_engines():
    "nbs/data/reward_noise.csv: the script's positions, clean scores of a sample, all of both warm orders at depth 1."
    text = (NBS/"data/reward_noise.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in text if line[0] != "#"))
    spec = importlib.util.spec_from_file_location("reward_noise", NBS/"experiments/reward_noise.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = script.positions()
    assert [(int(r["position"]), r["move"]) for r in rows] == [(k, move) for k, move, _ in asked]
    if not text[0].startswith(f"# {engine_name()},"): return              # another engine: other numbers
    def column(name): return [int(r[name]) for r in rows]
    fens = [fen for *_, fen in asked]
    for d in (2, 4): assert script.scores(fens[::7], d) == column(f"c{d}")[::7]
    for name, seed in (("a1", 1), ("b1", 2)):
        order = random.Random(seed).sample(range(len(fens)), len(fens))
        assert script.scores(fens, 1, order) == column(name)

def test_a_constant_in_the_judge_is_no_advantage():
    "A judge that flatters whoever is to move shifts every step reward by twice that, and no advantage in a position."
    class Flattering(Judge):
        def values(self, fens): return super().values(fens) + np.float32(.03)
    ro = games(plies=1, starts=(chess.STARTING_FEN,))
    cfg = RewardConfig(judge="material")
    fair, flattered = step_rewards(ro, Judge(cfg)), step_rewards(ro, Flattering(cfg))
    assert torch.allclose(flattered, fair - .06, atol=1e-6)
    assert torch.allclose(group_advantage(flattered, ro.train), group_advantage(fair, ro.train), atol=1e-6)

def test_mates_that_the_engine_announces(pool):
    fens = ["6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1", "7k/R7/1R6/8/8/8/8/K7 b - - 0 1"]
    assert Judge(RewardConfig(depth=5), pool).values(fens).tolist() == [1, 0]
    assert Judge(RewardConfig(depth=5, scale="cp"), pool).values(fens).tolist() == [2, -2]

# ---------------------------------------------------------------- every legal move: what the default run trains on

SPECIAL = ["r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 0 1", "r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1",      # castling, both ways
           "8/P6k/8/8/8/8/p6K/8 w - - 0 1", "8/P6k/8/8/8/8/p6K/8 b - - 0 1",                    # promotions, four each
           "rnbqkbnr/ppp1pppp/8/8/3pP3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 3",                      # en passant
           "6k1/5ppp/8/8/8/8/r4PPP/R5K1 w - - 0 1", "4r1k1/5ppp/8/8/8/8/5PPP/4R1K1 b - - 0 1"]    # mates in one
JUDGED = SPECIAL + [json.loads(line)["fen"] for line in (NBS/"data/positions.jsonl").read_text().splitlines()[1:256:8]]

def legal_table(fens): return torch.as_tensor(encode([chess.Board(f) for f in fens])[1])

def slots(fens, legal):
    "(row, column, move) of every legal move, found through python-chess and not through the code that is tested."
    for row, fen in enumerate(fens):
        board = chess.Board(fen)
        for move in board.legal_moves: yield row, legal[row].tolist().index(move_to_action(move, board.turn)), move

@pytest.mark.parametrize("scale", SCALES)
def test_each_move_has_the_value_that_the_engine_gave_it(pool, scale):
    "Move by move and by name; a value in the place of another move, or of another position, is seen."
    legal, said = legal_table(JUDGED), pool.evaluate_moves(JUDGED, depth=2)
    value = Judge(RewardConfig(scale=scale, depth=2), pool).of_moves(JUDGED, legal)
    seen = torch.zeros_like(legal, dtype=torch.bool)
    for row, column, move in slots(JUDGED, legal):
        assert value[row, column].item() == SCALES[scale].value([said[row][move.uci()]])[0], (JUDGED[row], move)
        seen[row, column] = True
    assert (seen == (legal >= 0)).all() and (value[~seen] == 0).all()

def within(x, legal):
    "Values less their mean over the legal moves of the position; [n, L]."
    mask = legal >= 0
    return torch.where(mask, x - (x*mask).sum(-1, keepdim=True)/mask.sum(-1, keepdim=True), 0.)

def test_each_move_is_worth_what_the_position_after_it_is_worth(pool):
    "The mover's view: `evaluate` of every child, on its own, agrees; with a position's moves exchanged it does not."
    legal, child, after = legal_table(JUDGED), [], []
    value = Judge(RewardConfig(depth=5), pool).of_moves(JUDGED, legal)
    for row, column, move in slots(JUDGED, legal):
        board = chess.Board(JUDGED[row])
        board.push(move)
        if any(board.legal_moves): after.append(((row, column), board.fen()))
        elif board.is_checkmate(): assert value[row, column] == 1
        else: assert value[row, column] == .5
    for (place, _), score in zip(after, pool.evaluate([fen for _, fen in after], depth=4)): child.append((place, score))
    other = value.clone()
    for (row, column), score in child: other[row, column] = 1 - float(win_probability([score])[0])
    truth = within(other, legal).flatten()
    def agreement(a): return torch.cosine_similarity(within(a, legal).flatten(), truth, 0).item()
    turned = value.clone()
    for row in range(len(legal)):
        n = int((legal[row] >= 0).sum())
        turned[row, :n] = value[row, :n].roll(1)
    assert agreement(value) > .9 and abs(value - other)[legal >= 0].mean() < .05
    assert agreement(turned) < .5

def test_move_values_belong_to_the_position_they_were_asked_for(pool):
    ro = games(seed=6, plies=6, group=4)
    value = move_values(ro, Judge(RewardConfig(depth=1), pool))
    rows = sorted(set(ro.node[..., :-1][ro.train].tolist()))
    fens = [ro.fens[r] for r in rows]
    said = [pool.evaluate_moves([fen], depth=1)[0] for fen in fens]         # one by one: no order to get wrong
    for row, column, move in slots(fens, ro.legal[rows]):
        assert value[rows[row], column].item() == win_probability([said[row][move.uci()]])[0]
    left = sorted(set(range(len(ro.legal))) - set(rows))
    assert len(rows) > 20 and (value[left] == 0).all()
    best = best_value(value, ro.legal)[rows]
    assert (best >= value[rows]).all() and torch.isclose(best, value[rows]).any(-1).all()

@pytest.mark.parametrize("learn", ["both", "starter"])
def test_moves_are_valued_while_a_game_is_played(pool, learn):
    "All that the values need was asked by `on_turn`, and nothing else; they are those of a judge that is asked later."
    j, asked = Judge(RewardConfig(depth=1), pool), pool.asked
    cfg = SamplerConfig(group=6, plies=7, learn=learn)
    ro = rollout(Policy(Uniform()), [chess.Board(f) for f in STARTS], cfg, 3, on_turn=j.submit_moves)
    told = pool.asked - asked
    value = move_values(ro, j)
    assert pool.asked == asked + told and not j.pending_moves
    assert told == len(ro.node[..., :-1][ro.train].unique()) == j.asked > 30
    assert torch.equal(value, move_values(ro, Judge(RewardConfig(depth=1), pool)))

def test_a_failing_engine_leaves_no_move_pending():
    class Breaks(FakePool):
        wait = staticmethod(Future.result)
        def submit_moves(self, fens, **kw): return self.submit(fens)
    fens, legal, pool = [STARTS[1], STARTS[2]], legal_table([STARTS[1], STARTS[2]]), Breaks(fail={STARTS[2]})
    j = Judge(RewardConfig(), pool)
    j.submit_moves(fens[:1])
    j.submit_moves(fens)
    assert pool.asked == fens
    for _ in range(2):
        with pytest.raises(EngineError, match="it died"): j.of_moves(fens[::-1], legal.flip(0))
        assert not j.pending_moves

def test_arrange_refuses_other_moves_than_the_legal_ones():
    legal = [a for a in legal_table([chess.STARTING_FEN])[0].tolist() if a >= 0]
    moves = {m.uci(): k for k, m in enumerate(chess.Board().legal_moves)}
    for where in (chess.STARTING_FEN, chess.Board()): assert sorted(arrange(moves, legal, where)) == list(range(20))
    for wrong in ({**moves, "e2e5": 1}, {k: v for k, v in moves.items() if k != "e2e4"},
                  {("e2e5" if k == "e2e4" else k): v for k, v in moves.items()}):
        with pytest.raises(EngineError, match="e2e"): arrange(wrong, legal, chess.STARTING_FEN)

# ---------------------------------------------------------------- a function of one's own

def counted(boards, scale="win"): return SCALES[scale].value(material([b.fen() for b in boards]))

@pytest.mark.parametrize("scale", SCALES)
def test_material_as_a_function_of_boards(scale):
    own, built_in = Judge(RewardConfig(scale=scale), value=lambda boards: counted(boards, scale)), judge(scale)
    ro = games(seed=7)
    assert torch.equal(step_rewards(ro, own), step_rewards(ro, built_in)) and own.asked == built_in.asked
    assert torch.allclose(move_values(ro, own), move_values(ro, built_in), atol=1e-6) and own.cfg.judge == "own"

def test_moves_by_a_function_against_a_loop():
    legal, calls = legal_table(JUDGED), []
    def value(boards):
        calls.append(boards)
        return torch.tensor(answers([position_key(b) for b in boards]))      # a tensor will do
    found = Judge(value=value).of_moves(JUDGED, legal)
    assert len(calls) == 1                                                  # a network wants one batch
    for row, column, move in slots(JUDGED, legal):
        board = chess.Board(JUDGED[row])
        board.push(move)
        if board.is_checkmate(): want = 1
        elif not any(board.legal_moves) or board.is_insufficient_material(): want = .5
        else: want = 1 - answers([position_key(board)])[0]
        assert found[row, column].item() == pytest.approx(want, abs=1e-6), (JUDGED[row], move)
    assert (found == 1).any() and (found[legal < 0] == 0).all()

def test_material_of_moves_is_the_engine_s_arithmetic():
    "Centipawns of the child, turned round, and then the scale: what an engine's answer goes through."
    legal = legal_table(JUDGED)
    for scale in SCALES:
        found = judge(scale).of_moves(JUDGED, legal)
        for row, column, move in slots(JUDGED, legal):
            board = chess.Board(JUDGED[row])
            board.push(move)
            if board.is_checkmate(): cp = MATE - 1
            elif not any(board.legal_moves) or board.is_insufficient_material(): cp = 0
            else: cp = -int(material([board.fen()])[0])
            assert found[row, column].item() == SCALES[scale].value([cp])[0], (JUDGED[row], move)

@pytest.mark.parametrize("bad, why", [
    (lambda boards: [0.], r"\[1\] values for 2 positions"), (lambda boards: .5, r"\[\] values for 2 positions"),
    (lambda boards: [[1.]]*len(boards), r"\[2, 1\] values"), (lambda boards: [0., float("nan")], "gave nan for"),
    (lambda boards: [float("inf"), 0.], "gave inf for"), (lambda boards: [0, -.01], "not 0 to 1"),
    (lambda boards: [0, 1.5], "not 0 to 1"), (lambda boards: ["a", "b"], "could not convert")])
def test_a_function_that_talks_nonsense_is_stopped(bad, why):
    j = Judge(value=bad)
    with pytest.raises(ValueError, match=why): j.values([chess.STARTING_FEN, SPECIAL[0]])
    assert not j.known
    wide = Judge(RewardConfig(scale="cp"), value=lambda boards: [3.])
    with pytest.raises(ValueError, match="-2 to 2"): wide.values([STARTS[0]])

def test_own_needs_its_function():
    with pytest.raises(ValueError, match="pass a function"): Judge(RewardConfig(judge="own"))
    assert Judge(RewardConfig(depth=7), value=counted).cfg == RewardConfig(judge="own", depth=7)

def test_a_pool_does_not_answer_for_other_judges():
    "A run may have an engine for its start positions and another judge."
    pool = FakePool()
    for j in (Judge(RewardConfig(judge="material"), pool), Judge(RewardConfig(), pool, counted)):
        assert j.values([STARTS[1]]).tolist() == win_probability(material([STARTS[1]])).tolist()
        assert j.of_moves([STARTS[1]], legal_table([STARTS[1]])).isfinite().all() and not pool.asked
