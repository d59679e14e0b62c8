"grpo_chess.reward: lines worked by hand, the rules at the end of games, and a judge that never loses or invents an answer."
import csv
import importlib.util
import itertools
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
from grpo_chess.reward import SCALES, Judge, RewardConfig, material, node_values, normalize_cp, step_rewards, win_probability
from grpo_chess.sampler import SamplerConfig, rollout

NBS = Path(__file__).resolve().parent.parent/"nbs"
SHUFFLE = "g1f3 g8f6 f3g1 f6g8"

class Line(nn.Module):
    "Plays a fixed line: by position, the move that is wanted."
    def __init__(self, book): super().__init__(); self.book = book
    def forward(self, tokens, legal):
        out = torch.full(legal.shape, -1e4).masked_fill(legal < 0, -math.inf)
        for i, (t, l) in enumerate(zip(tokens, legal)): out[i][l == self.book[bytes(t.numpy())]] = 0.
        return out

def play(start, *moves, plies=None):
    "A rollout of exactly this line, twice."
    book, b = {}, start.copy()
    for m in moves: book[bytes(encode([b])[0][0])] = move_to_action(chess.Move.from_uci(m), b.turn); b.push_uci(m)
    return rollout(Policy(Line(book)), [start], SamplerConfig(group=2, plies=plies or len(moves)))

class Uniform(nn.Module):
    def forward(self, tokens, legal): return torch.zeros(legal.shape).masked_fill(legal < 0, -math.inf)

def games(seed=0, plies=12, group=8, on_new=None, starts=(chess.STARTING_FEN, "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 98 80", "4k3/8/8/8/8/8/3p4/4K3 w - - 0 1")):
    return rollout(Policy(Uniform()), [chess.Board(f) for f in starts], SamplerConfig(group=group, plies=plies), seed, on_new=on_new)

def sigmoid(cp): return 1/(1 + math.exp(-.00368208*cp))
def judge(scale="win", **kw): return Judge(RewardConfig(judge="material", scale=scale, **kw))

class FakePool:
    "Answers with a function of the position; may fail, answer late, or answer too little."
    def __init__(self, fail=(), late=False): self.asked, self.jobs, self.fail, self.late, self.short = [], [], set(fail), late, False
    @staticmethod
    def score(fen): return sum(map(ord, fen)) % 1600 - 800
    def submit(self, fens, depth=None, nodes=None, trusted=False):
        assert fens and len(set(fens)) == len(fens)
        self.asked += fens; self.limit = depth, nodes
        job = Future(); self.jobs.append((job, list(fens)))
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
    for n in (1, 2, 100): assert win_probability([score_code("mate", str(n)), score_code("mate", str(-n))]).tolist() == [1, 0]
    assert win_probability([score_code("mate", "0")])[0] == 0              # mated already
    assert (np.diff(win_probability(np.arange(-3000, 3001, 50))) > 0).all() and win_probability(np.int32([31_000, -31_000])).tolist() == [1, pytest.approx(0, abs=1e-12)]
    assert win_probability(np.array([5], np.int32)).dtype == np.float32

def test_centipawn_scale():
    assert normalize_cp([0, 35, -250, 1999, 2000, 2001, -31_000]).tolist() == pytest.approx([0, .035, -.25, 1.999, 2, 2, -2])
    assert normalize_cp([score_code("mate", "3"), score_code("mate", "-1"), score_code("mate", "0")]).tolist() == [2, -2, -2]

@pytest.mark.parametrize("scale", SCALES)
def test_both_sides_of_a_value(scale):
    "V(mine) + V(yours) is the scale's total; mated and mating are its ends; a draw is the value of 0 centipawns and its own other side."
    s, cp = SCALES[scale], np.arange(-5000, 5001, 37)
    np.testing.assert_allclose(s.value(cp) + s.value(-cp), s.total, atol=1e-6)
    for n in (0, 1, 60): assert s.lost == s.value([-(MATE-n)])[0] <= s.value(cp).min() and s.total - s.lost == s.value([MATE-max(n, 1)])[0] >= s.value(cp).max()
    assert s.draw == s.value([0])[0] == s.total - s.draw

def test_material():
    fens = {"4k3/8/8/8/8/8/8/4K3": 0, "4k3/8/8/8/8/8/8/4KQ2": 900, "qk6/8/8/8/8/8/8/K7": -900, chess.STARTING_FEN.split()[0]: 0,
            "rnb1kbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBN1": 400, "4k3/pp6/8/8/8/8/8/NB2K2R": 900}
    for placement, cp in fens.items(): assert material([f"{placement} w - - 0 1", f"{placement} b - - 0 1"]).tolist() == [cp, -cp]
    r, b = random.Random(0), chess.Board()
    for _ in range(60):
        b.push(r.choice(list(b.legal_moves)))
        slow = sum(v*(len(b.pieces(p, b.turn)) - len(b.pieces(p, not b.turn))) for p, v in ((1, 100), (2, 300), (3, 300), (4, 500), (5, 900)))
        assert material([position_key(b)])[0] == slow

# ---------------------------------------------------------------- lines by hand

START = chess.Board("4k3/8/8/2n5/3p4/1R6/8/4K3 w - - 0 1")                 # white: a rook (500); black: knight and pawn (400)

def test_a_line_by_hand_on_the_centipawn_scale():
    "White takes nothing, black forks, white moves the king, black takes the rook; then white takes the pawn d4."
    ro = play(START, "b3b4", "c5d3", "e1e2", "d3b4", "e2d2")
    #           white +100     black −100      white +100     black −100      after the rook: white −400
    assert step_rewards(ro, judge("cp"))[0, 0].tolist() == pytest.approx([0, 0, 0, .5, 0])
    assert node_values(ro, judge("cp"))[0, 0].tolist() == pytest.approx([.1, -.1, .1, -.1, -.4, .4])

def test_a_line_by_hand_in_win_probability():
    ro = play(START, "b3b4", "c5d3", "e1e2", "d3b4", "e2d2")
    assert step_rewards(ro, judge("win"))[0, 0].tolist() == pytest.approx([0, 0, 0, sigmoid(400) - sigmoid(-100), 0], abs=1e-6)
    assert node_values(ro, judge("win"))[0, 0].tolist() == pytest.approx([sigmoid(c) for c in (100, -100, 100, -100, -400, 400)], abs=1e-6)

def test_the_mover_gains_whoever_it_is():
    "1. e4 d5 2. exd5 Qxd5: each capture is a gain of the side that captures; colours exchanged, the same rewards."
    want = [0, 0, .1, .1]
    assert step_rewards(play(chess.Board(), "e2e4", "d7d5", "e4d5", "d8d5"), judge("cp"))[0, 0].tolist() == pytest.approx(want)
    assert step_rewards(play(chess.Board().mirror(), "e7e5", "d2d4", "e5d4", "d1d4"), judge("cp"))[0, 0].tolist() == pytest.approx(want)
    gain = lambda a, b: sigmoid(b) - sigmoid(a)
    assert step_rewards(play(chess.Board(), "e2e4", "d7d5", "e4d5", "d8d5"), judge("win"))[0, 0].tolist() == pytest.approx([0, 0, gain(0, 100), gain(-100, 0)], abs=1e-6)

def test_a_promotion_is_worth_eight_pawns():
    assert step_rewards(play(chess.Board("8/P1k5/K7/8/8/8/8/8 w - - 0 1"), "a7a8q"), judge("cp"))[0, 0].tolist() == pytest.approx([.8])

def shuffled(moves):
    b = chess.Board()
    for m in moves.split(): b.push_uci(m)
    return b

ROOK = 500
ENDS = {                                                                   # start, last move, the mover's material before it
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
        flip = lambda m: chess.Move(m.from_square ^ 56, m.to_square ^ 56)
        history, start = start.move_stack, start.root().mirror()
        for m in history: start.push(flip(m))
        move = flip(chess.Move.from_uci(move)).uci()
    ro, j = play(start, move, plies=3), judge(scale)
    assert (ro.ended[0, :, 1] == kind).all()
    before, best, draw = (sigmoid(cp), 1., .5) if scale == "win" else (cp/1000, 2., 0.)
    want = (best if kind == Terminal.CHECKMATE else draw) - before
    for row in step_rewards(ro, j)[0].tolist(): assert row == pytest.approx([want, 0, 0], abs=1e-6)
    for row in node_values(ro, j)[0].tolist(): assert row == pytest.approx([before, SCALES[scale].lost if kind == Terminal.CHECKMATE else draw, 0, 0], abs=1e-6)
    assert ro.fens[ro.node[0, 0, 1]] not in j.known and j.asked == 1       # the end itself is not asked

def test_an_end_by_history_is_open_in_another_game():
    old, move, _ = ENDS[Terminal.REPETITION]; new = chess.Board(old.fen())
    b = new.copy(); book = {}
    for m in (move, "g1f3"): book[bytes(encode([b])[0][0])] = move_to_action(chess.Move.from_uci(m), b.turn); b.push_uci(m)
    ro = rollout(Policy(Line(book)), [old, new], SamplerConfig(group=2, plies=2))
    assert step_rewards(ro, judge("cp"))[:, 0].tolist() == [pytest.approx([.1, 0]), pytest.approx([0, 0], abs=1e-7)]
    assert node_values(ro, judge("cp"))[:, 0].tolist() == [pytest.approx([-.1, 0, 0]), pytest.approx([-.1, .1, -.1])]

# ---------------------------------------------------------------- telescoping, padding

@pytest.mark.parametrize("scale", SCALES)
def test_rewards_telescope_over_ragged_games(scale):
    "Seen by the starter, a game's rewards add up to its last value minus its first, whatever ended it."
    ro = games(plies=16, group=12); j = judge(scale); r, v = step_rewards(ro, j), node_values(ro, j); s = SCALES[scale]
    assert {1, 3, 4} < {int(x) for x in ro.ended.unique()} and not ro.played.all()
    for b, g in itertools.product(range(len(r)), range(r.shape[1])):
        n = int(ro.played[b, g].sum()); last = v[b, g, n].item()
        seen = last if n % 2 == 0 else s.total - last
        assert sum((-1)**t*x for t, x in enumerate(r[b, g].tolist())) == pytest.approx(seen - v[b, g, 0].item(), abs=1e-5)
        assert (r[b, g, n:] == 0).all() and (v[b, g, n+1:] == 0).all()

def test_rewards_against_a_loop():
    ro = games(seed=3); j = judge("win"); r = step_rewards(ro, j)
    for b, g in itertools.product(range(len(r)), range(r.shape[1])):
        board = chess.Board(ro.fens[ro.node[b, g, 0]])
        for t, move in enumerate(ro.moves(b, g)):
            value = lambda: sigmoid(int(material([board.fen()])[0]))
            before = value(); board.push(move)
            if board.is_checkmate(): after = 0.
            elif not any(board.legal_moves) or board.is_insufficient_material() or board.halfmove_clock >= 100 or board.is_repetition(3): after = .5
            else: after = value()
            assert r[b, g, t].item() == pytest.approx(1 - after - before, abs=1e-6)

def test_padding_is_judged_by_nobody():
    pool = FakePool(); j = Judge(RewardConfig(), pool); ro = games(plies=16)
    r = step_rewards(ro, j)
    open_ = {ro.fens[i] for i in ro.node[(ro.ended == 0) & (ro.node >= 0)].tolist()}
    assert sorted(pool.asked) == sorted(open_) and r.isfinite().all() and (r[~ro.played] == 0).all() and pool.limit == (4, None)
    assert torch.equal(r, step_rewards(ro, j)) and len(pool.asked) == len(open_)         # nothing is asked twice

# ---------------------------------------------------------------- the judge's memory

def test_known_and_pending_positions_are_not_asked_again():
    pool = FakePool(late=True); j = Judge(RewardConfig(), pool)
    j.submit(["a", "b", "a"]); j.submit(["b", "c"]); j.submit([])
    assert pool.asked == ["a", "b", "c"] and j.asked == 3 and j.hits == 2 and len(pool.jobs) == 2
    pool.finish()
    assert j.values(["c", "a", "c", "b"]).tolist() == pytest.approx(answers("cacb")) and not j.pending
    j.submit(["a", "c", "d"])
    assert pool.asked == ["a", "b", "c", "d"] and j.asked == 4 and j.hits == 4
    pool.finish(); assert j.values(["d"]).tolist() == pytest.approx(answers("d"))
    assert j.values([]).shape == (0,) and j.values(["a"]).dtype == np.float32

def test_values_waits_only_for_what_it_needs():
    pool = FakePool(late=True); j = Judge(RewardConfig(), pool)
    j.submit(["a"]); pool.finish(); j.submit(["b"])                        # b is never answered
    assert j.values(["a"]).tolist() == pytest.approx(answers("a")) and set(j.pending) == {"b"}

@pytest.mark.parametrize("cache", [1, 2, 5, 40])
def test_eviction_never_loses_an_answer_that_is_being_asked_for(cache):
    pool, r = FakePool(late=True), random.Random(cache); j = Judge(RewardConfig(cache=cache), pool)
    for _ in range(60):
        if r.random() < .5: j.submit([key(r.randrange(30)) for _ in range(r.randrange(12))])
        if r.random() < .7: pool.finish()
        want = [key(r.randrange(30)) for _ in range(r.randrange(1, 12))]
        j.submit(want); pool.finish()
        assert j.values(want).tolist() == pytest.approx(answers(want))
        assert len(j.known) <= cache
    assert len(pool.asked) > 30 or cache == 40

def test_eviction_between_asking_and_reading():
    "Submitted while it was known, forgotten through another question, asked for after that."
    for cfg, pool in ((RewardConfig(cache=2), FakePool()), (RewardConfig(cache=2, judge="material"), None)):
        fens = [f"4k3/{'p'*n}{8-n}/8/8/8/8/8/4K3 w - - 0 1" for n in range(1, 7)]; j = Judge(cfg, pool)
        want = (np.array([FakePool.score(f) for f in fens]) if pool else material(fens)); want = win_probability(want).tolist()
        j.submit(fens[:2]); j.submit(fens[:4]); assert j.values(fens[2:]).tolist() == want[2:]
        assert j.values(fens).tolist() == want and j.values(fens[:3] + fens[:1]).tolist() == want[:3] + want[:1]

def test_the_oldest_is_forgotten_first():
    pool = FakePool(); j = Judge(RewardConfig(cache=3), pool)
    for f in "abcd": j.values([f])
    assert list(j.known) == ["b", "c", "d"]
    j.values(["a"]); assert list(j.known) == ["c", "d", "a"] and pool.asked == list("abcda")

def test_the_material_judge_forgets_too_and_stays_right():
    j = judge(cache=4); ro = games(plies=8); want = step_rewards(ro, judge())
    assert torch.equal(step_rewards(ro, j), want) and len(j.known) <= 4
    j.submit(ro.fens[:1]); assert torch.equal(step_rewards(ro, j), want)

# ---------------------------------------------------------------- law 3

def test_a_failing_job_raises_and_may_be_asked_again():
    pool = FakePool(fail={"b"}, late=True); j = Judge(RewardConfig(), pool)
    j.submit(["a", "b"]); j.submit(["c"]); pool.finish()
    with pytest.raises(EngineError, match="it died"): j.values(["c", "a"])
    assert not {"a", "b"} & (j.known.keys() | j.pending.keys())           # nothing was made up, nothing hangs
    pool.fail, pool.late = set(), False
    assert j.values(["a", "b", "c"]).tolist() == pytest.approx(answers("abc")) and pool.asked.count("a") == 2 and pool.asked.count("c") == 1

def test_a_failing_engine_stops_the_rewards():
    ro = games(plies=4); pool = FakePool(fail={ro.fens[ro.node[0, 0, 2]]}); j = Judge(RewardConfig(), pool)
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
    pool = FakePool(); pool.short = True; j = Judge(RewardConfig(), pool)
    with pytest.raises(Exception): j.values(["a", "b"])
    with pytest.raises(Exception): j.values(["b"])

def test_an_interrupted_wait_can_be_repeated():
    class Stop(Future):
        def result(self, timeout=None): raise KeyboardInterrupt
    pool = FakePool(); j = Judge(RewardConfig(), pool)
    real = pool.submit; pool.submit = lambda *a, **kw: Stop()
    with pytest.raises(KeyboardInterrupt): j.values(["a"])
    pool.submit = real
    assert j.values(["a"]).tolist() == pytest.approx(answers("a"))

@pytest.mark.parametrize("kw", [dict(judge="stockfish"), dict(scale="elo"), dict(depth=0), dict(nodes=-1), dict(cache=0)], ids=str)
def test_config_refuses(kw):
    with pytest.raises(ValueError, match=f"reward.{next(iter(kw))}"): RewardConfig(**kw)

def test_an_engine_judge_needs_an_engine():
    with pytest.raises(ValueError, match="EnginePool"): Judge(RewardConfig())

# ---------------------------------------------------------------- Stockfish itself

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=1)) as p: yield p

@pytest.mark.parametrize("scale, kw, limit", [("win", dict(depth=3), dict(depth=3)), ("cp", dict(depth=3), dict(depth=3)), ("win", dict(nodes=300), dict(nodes=300)), ("cp", {}, dict(depth=4))], ids=str)
def test_the_engine_judge_is_the_pool(pool, scale, kw, limit):
    ro = games(seed=1, group=4); j = Judge(RewardConfig(scale=scale, **kw), pool)
    v = node_values(ro, j); open_ = (ro.ended == 0) & (ro.node >= 0)
    rows = ro.node[open_].tolist()
    direct = SCALES[scale].value(pool.evaluate([ro.fens[i] for i in rows], **limit))
    assert v[open_].tolist() == direct.tolist() and j.asked == len(set(rows))

def test_the_order_of_questions_does_not_matter(pool):
    "Law 2: backwards, one by one, while the games are played, with a cache of one: the same rewards, bit for bit."
    ro = games(seed=2, group=6); want = step_rewards(ro, Judge(RewardConfig(depth=4), pool))
    fens = [ro.fens[i] for i in ro.node[(ro.ended == 0) & (ro.node >= 0)].unique().tolist()]
    back = Judge(RewardConfig(depth=4), pool); back.values(fens[::-1])
    single = Judge(RewardConfig(depth=4), pool); [single.values([f]) for f in random.Random(0).sample(fens, len(fens))]
    early = Judge(RewardConfig(depth=4), pool); again = games(seed=2, group=6, on_new=early.submit)
    for j, r in ((back, ro), (single, ro), (early, again), (Judge(RewardConfig(depth=4, cache=1), pool), ro)): assert torch.equal(step_rewards(r, j), want)
    assert want[ro.played].abs().max() > .2

def test_a_game_is_judged_while_it_is_played(pool):
    "All that the rewards need was asked by `on_new`; nothing is left to ask afterwards."
    j = Judge(RewardConfig(depth=2), pool); ro = games(seed=4, on_new=j.submit); asked = j.asked
    step_rewards(ro, j)
    assert j.asked == asked and not j.pending

def test_the_stored_evaluations_are_the_engines():
    "nbs/data/reward_noise.csv: the script's positions, the clean scores of a sample, and both warm orders at depth 1, every one."
    text = (NBS/"data/reward_noise.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in text if line[0] != "#"))
    spec = importlib.util.spec_from_file_location("reward_noise", NBS/"experiments/reward_noise.py")
    script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script)
    asked = script.positions()
    assert [(int(r["position"]), r["move"]) for r in rows] == [(k, move) for k, move, _ in asked]
    if not text[0].startswith(f"# {engine_name()},"): return              # another engine: other numbers
    fens, column = [fen for *_, fen in asked], lambda name: [int(r[name]) for r in rows]
    for d in (2, 4): assert script.scores(fens[::7], d) == column(f"c{d}")[::7]
    for name, seed in (("a1", 1), ("b1", 2)): assert script.scores(fens, 1, random.Random(seed).sample(range(len(fens)), len(fens))) == column(name)

def test_a_constant_in_the_judge_is_no_advantage():
    "A judge that flatters whoever is to move shifts every step reward by twice that, and no advantage within a position."
    class Flattering(Judge):
        def values(self, fens): return super().values(fens) + np.float32(.03)
    ro = games(plies=1, starts=(chess.STARTING_FEN,)); cfg = RewardConfig(judge="material")
    fair, flattered = step_rewards(ro, Judge(cfg)), step_rewards(ro, Flattering(cfg))
    assert torch.allclose(flattered, fair - .06, atol=1e-6)
    assert torch.allclose(group_advantage(flattered, ro.train), group_advantage(fair, ro.train), atol=1e-6)

def test_mates_that_the_engine_announces(pool):
    fens = ["6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1", "7k/R7/1R6/8/8/8/8/K7 b - - 0 1"]
    assert Judge(RewardConfig(depth=5), pool).values(fens).tolist() == [1, 0]
    assert Judge(RewardConfig(depth=5, scale="cp"), pool).values(fens).tolist() == [2, -2]
