import io
import math

import chess
import chess.pgn
import numpy as np
import pytest
import torch

from grpo_chess.arena import (ArenaError, Game, MatchResult, draws, elo, engine_player, evidence, play_match, policy_player,
                              random_openings, random_player, score_interval, weak_engine_player)
from grpo_chess.board import position_key, terminal
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.model import ChessTransformer, ModelConfig, Policy

torch.set_num_threads(1)

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=2)) as pool: yield pool

@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return Policy(ChessTransformer(ModelConfig(width=16, layers=1, heads=2, dropout=.3)), temperature=1.3)

class Judge:
    "Evaluates by a function of the board; remembers what it was asked."
    def __init__(self, cp): self.cp, self.asked = cp, []
    def evaluate(self, fens, depth=None):
        self.asked += fens
        return [self.cp(chess.Board(f)) for f in fens]

def white_is(cp): return lambda board: cp if board.turn else -cp      # side to move's view

def scripted(*lines):
    return lambda boards, games, ply: [chess.Move.from_uci(lines[g][ply]) for g in games]

def match(*games, names=("a", "b")):
    "A result from scores: one pair (as White, as Black) after the other."
    return MatchResult([Game(i//2, i % 2 == 0, chess.Board(), 0, s, "test") for i, s in enumerate(games)], names)

def moves(result): return [[m.uci() for m in g.board.move_stack] for g in result.games]

MATE = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7".split()         # White mates
SHUFFLE = "g1f3 g8f6 f3g1 f6g8".split()*30
FOOL = "f2f3 e7e5 g2g4 d8h4".split()                        # Black mates


def test_colours_and_points():
    "Anna mates as White, then is mated as White; then she plays Black and mates, and is mated."
    lines = [MATE, MATE, FOOL, FOOL]
    r = play_match(scripted(*lines), scripted(*lines), [chess.Board()]*2, names=("anna", "ben"))
    assert [(g.pair, g.a_white, g.score, g.reason) for g in r.games] == [
        (0, True, 1., "checkmate"), (0, False, 0., "checkmate"), (1, True, 0., "checkmate"), (1, False, 1., "checkmate")]
    assert (r.wins, r.draws, r.losses) == (2, 0, 2) and r.pairs.tolist() == [.5, .5] and r.pentanomial == [0, 0, 2, 0, 0]

def test_each_player_moves_only_in_its_own_positions():
    seen = {"a": [], "b": []}
    def spy(name):
        inner = random_player(3)
        def play(boards, games, ply):
            seen[name] += [(g, ply, b.turn) for b, g in zip(boards, games)]
            return inner(boards, games, ply)
        return play
    play_match(spy("a"), spy("b"), random_openings(3, plies=3), max_plies=10)      # Black to move after the opening
    for g, ply, turn in seen["a"]: assert turn == (g % 2 == 0)
    for g, ply, turn in seen["b"]: assert turn == (g % 2 == 1)
    assert len(seen["a"]) == len(seen["b"]) == 30

def test_rules_end_games():
    stale, start = chess.Board("7k/8/5KQ1/8/8/8/8/8 w - - 0 1"), chess.Board()
    r = play_match(scripted(["g6f7"], ["g6f7"], SHUFFLE, SHUFFLE), scripted(["g6f7"], ["g6f7"], SHUFFLE, SHUFFLE), [stale, start])
    assert [g.reason for g in r.games] == ["stalemate"]*2 + ["repetition"]*2 and r.score == .5
    assert [len(g.board.move_stack) for g in r.games] == [1, 1, 8, 8]
    fifty, bare = chess.Board("8/8/4k3/8/8/4K3/8/Q7 w - - 99 80"), chess.Board("8/8/2k5/4q3/3K4/8/8/8 w - - 0 1")
    lines = [["a1a2"], ["a1a2"], ["d4e5"], ["d4e5"]]
    r = play_match(scripted(*lines), scripted(*lines), [fifty, bare])
    assert [g.reason for g in r.games] == ["fifty"]*2 + ["insufficient"]*2

def test_max_plies_without_a_judge_is_a_draw():
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=5)
    assert [g.reason for g in r.games] == ["max_plies"]*2 and r.score == .5
    assert [len(g.board.move_stack) for g in r.games] == [5, 5]

@pytest.mark.parametrize("plies", [4, 5])
@pytest.mark.parametrize("cp, points", [(700, [1, 0]), (-700, [0, 1]), (600, [.5, .5]), (-31_999, [0, 1])])
def test_judge_at_the_last_ply(cp, points, plies):
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=plies, judge=Judge(white_is(cp)), win_plies=99)
    assert r.scores.tolist() == points

@pytest.mark.parametrize("every", [1, 2, 3])
def test_judge_ends_games_after_enough_checks(every):
    judge = Judge(white_is(-900))
    r = play_match(random_player(), random_player(), [chess.Board()], judge=judge, win_plies=6, check_every=every)
    assert r.scores.tolist() == [0, 1] and r.reasons == {"adjudicated": 2}
    assert [len(g.board.move_stack) for g in r.games] == [6, 6] and len(judge.asked) == 2*6//every

def test_judge_wants_consecutive_checks_of_one_side():
    "White is winning in three of four checks, Black never long enough: nobody wins before the end."
    class Counting(Judge):
        calls = 0
        def evaluate(self, fens, depth=None):
            self.calls += 1
            return [white_is({0: 100, 1: 900, 2: 900, 3: -900}[self.calls % 4])(chess.Board(f)) for f in fens]
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=40, judge=Counting(None), win_plies=3, check_every=1)
    assert all(len(g.board.move_stack) == 40 for g in r.games)

@pytest.mark.parametrize("answer", [lambda n: [0]*(n - 1), lambda n: [None]*n, lambda n: [math.nan]*n, lambda n: []])
def test_a_missing_evaluation_is_no_result(answer):
    judge = Judge(None); judge.evaluate = lambda fens, depth=None: answer(len(fens))
    with pytest.raises(ArenaError, match="without an answer"): play_match(random_player(), random_player(), [chess.Board()], judge=judge)

@pytest.mark.parametrize("bad", [["e2e5"], ["e7e5"], ["0000"]])
def test_illegal_moves_stop_the_match(bad):
    with pytest.raises(ArenaError, match="anna played .* not legal in rnbqkbnr/"):
        play_match(scripted(bad, bad), random_player(), [chess.Board()], names=("anna", "ben"))

def test_missing_moves_stop_the_match():
    with pytest.raises(ArenaError, match="anna returned 0 moves for 1"):
        play_match(lambda boards, games, ply: [], random_player(), [chess.Board()], names=("anna", "ben"))

def test_unplayable_openings():
    for fen in ("7k/6Q1/6K1/8/8/8/8/8 b - - 0 1", "8/8/8/8/8/8/8/K7 w - - 0 1"):
        with pytest.raises(ArenaError, match="opening 1 cannot be played"): play_match(random_player(), random_player(), [chess.Board(), chess.Board(fen)])


def test_openings():
    some = random_openings(40, seed=2, plies=6)
    assert len({position_key(b) for b in some}) == 40 and not any(map(terminal, some))
    assert {len(b.move_stack) for b in some} == {6} and all(b.root() == chess.Board() for b in some)
    assert [b.fen() for b in random_openings(15, seed=2, plies=6)] == [b.fen() for b in some[:15]]
    assert not {b.fen() for b in random_openings(40, seed=3, plies=6)} & {b.fen() for b in some}
    assert len(random_openings(20, plies=1)) == 20
    with pytest.raises(ValueError, match="fewer than 21 openings"): random_openings(21, plies=1)

def test_openings_are_not_changed_by_the_match():
    some = random_openings(2)
    before = [b.fen() for b in some]
    play_match(random_player(), random_player(), some, max_plies=4)
    assert [b.fen() for b in some] == before

@pytest.mark.parametrize("make", [lambda p, s: random_player(s), lambda p, s: policy_player(p, seed=s)])
def test_the_same_games_in_any_batch(policy, make):
    openings = random_openings(8, seed=1)
    play = lambda o, first=0, seed=0: play_match(make(policy, seed), random_player(9), o, max_plies=30, first=first)
    whole, half = play(openings), play(openings[4:], first=4)
    assert moves(whole)[8:] == moves(half) and moves(play(openings[:4]) + half) == moves(whole)
    assert moves(play(openings)) == moves(whole) != moves(play(openings, seed=1))
    assert [g.board.move_stack for g in play(openings[4:], first=0).games] != [g.board.move_stack for g in half.games]

def test_policy_player_is_the_policy(policy):
    "Frequencies of the first move against exact probabilities, at the policy's temperature and without its dropout."
    from grpo_chess.board import encode, move_to_action
    policy.model.train()
    board, n = chess.Board(), 4000
    played = policy_player(policy, seed=5)([board]*n, list(range(n)), 0)
    assert policy.model.training
    policy.model.eval()
    tokens, legal = map(torch.as_tensor, encode([board]))
    probs = policy.dist(tokens, legal).probs[0].detach().numpy()
    freq = np.array([sum(move_to_action(m, True) == a for m in played) for a in legal[0].tolist()])/n
    assert np.abs(freq - probs).max() < 4*math.sqrt(.25*probs.max()*4/n)
    best = policy_player(policy, greedy=True)([board, board], [0, 1], 0)
    assert best[0] == best[1] and move_to_action(best[0], True) == legal[0, probs.argmax()]

def test_draws_are_uniform_and_unrelated():
    u = np.stack([draws(s, range(500), p) for s in (0, 1) for p in range(8)])
    assert abs(u.mean() - .5) < .01 and abs(u.std() - 12**-.5) < .01 and u.min() >= 0 and u.max() < 1
    c = np.corrcoef(u) - np.eye(16)
    assert np.abs(c).max() < .2 and len(np.unique(u)) == u.size
    assert draws(-1, [3], 2) != draws(1, [3], 2)


def test_interval_agrees_with_the_textbook_far_from_the_ends():
    x = np.random.default_rng(0).choice([0, .25, .5, .75, 1], 800, p=[.1, .2, .3, .25, .15])
    half = 1.96*x.std()/math.sqrt(len(x))
    assert np.allclose(score_interval(x), (x.mean() - half, x.mean() + half), atol=2e-3)
    wide, narrow = score_interval(x, .99), score_interval(x, .8)
    assert wide[0] < narrow[0] < x.mean() < narrow[1] < wide[1]

@pytest.mark.parametrize("n", [4, 32, 500])
def test_bounds_when_all_results_are_equal(n):
    bound = 1 - .05**(1/n)                       # chance per pair that still leaves n equal ones with 5 %
    assert score_interval(np.zeros(n)) == (0., pytest.approx(bound, abs=1e-6))
    assert score_interval(np.ones(n)) == (pytest.approx(1 - bound, abs=1e-6), 1.)
    lo, hi = score_interval(np.full(n, .5))
    assert lo < .5 < hi and hi - .5 == pytest.approx(bound/2, abs=1e-6)
    assert score_interval([]) == (0., 1.)

def test_interval_is_symmetric_and_is_where_the_evidence_says():
    x = np.repeat([0, .25, .5, 1], [20, 7, 3, 2])
    lo, hi = score_interval(x)
    assert score_interval(1 - x) == (pytest.approx(1 - hi), pytest.approx(1 - lo))
    assert evidence(x, lo) == pytest.approx(3.8415, abs=1e-3) and evidence(x, hi) == pytest.approx(3.8415, abs=1e-3)
    assert evidence(x, x.mean()) == pytest.approx(0, abs=1e-9)

def test_evidence_by_brute_force():
    "Best distribution on the five results with mean mu, by a search over many."
    count, value, mu = np.array([5, 0, 3, 0, 1]), np.arange(5)/4, .45
    p = np.random.default_rng(0).dirichlet([3, .02, 3, .02, 2], 600_000)
    p = p[np.abs(p @ value - mu) < 1e-3]
    with np.errstate(divide="ignore"): best = np.where(count > 0, count*np.log(p), 0).sum(1).max()
    free = sum(c*math.log(c/9) for c in count if c)
    assert evidence(np.repeat(value, count), mu) == pytest.approx(2*(free - best), abs=.03)

@pytest.mark.parametrize("pairs, p", [
    (32, [.94, .05, .01, 0, 0]), (32, [.88, .11, .01, 0, 0]), (32, [.97, 0, .03, 0, 0]), (32, [.05, .2, .5, .2, .05]),
    (64, [.2, .2, .2, .2, .2]), (32, [0, 0, .97, .03, 0]), (128, [.9, 0, .05, 0, .05]), (256, [.05, .2, .4, .25, .1])])
def test_coverage(pairs, p):
    "At least about 95 of 100 intervals hold the true score, near the floor too, where the textbook's hold it in as few as 60."
    rng, value = np.random.default_rng(1), np.arange(5)/4
    truth, hits = float(np.dot(p, value)), 0
    for _ in range(400):
        x = value[rng.choice(5, pairs, p=p)]
        limit = -2*math.log(.05) if x.min() == x.max() else 3.8415
        hits += evidence(x, truth) <= limit
    assert hits/400 > .92
    lo, hi = score_interval(x)                                          # and the interval is that very set
    assert (lo <= truth <= hi) == (evidence(x, truth) <= limit)

def unfair(rng, pairs):
    "Results of equal players from openings that favour one colour: [pairs, 2]."
    luck = rng.normal(0, 3., (pairs, 1))*np.array([1, -1])
    return np.digitize(luck + rng.normal(0, 1, (pairs, 2)), [-.5, .5])/2

def test_the_unit_is_the_pair():
    rng = np.random.default_rng(0)
    x = unfair(rng, 100)
    r = match(*x.ravel())
    assert r.interval == score_interval(x.mean(1)) and r.stderr == pytest.approx(x.mean(1).std(ddof=1)/10)
    single = score_interval(x.ravel())
    assert r.interval[1] - r.interval[0] < .7*(single[1] - single[0])
    alike = match(*np.repeat(rng.choice([0, .5, 1], 100), 2))           # the other way: both games of a pair end alike
    single = score_interval(alike.scores)
    assert alike.interval[1] - alike.interval[0] > 1.3*(single[1] - single[0])

def test_coverage_of_match_results():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(60):
        lo, hi = match(*unfair(rng, 64).ravel()).interval
        hits += lo <= .5 <= hi
    assert 53 <= hits


def test_elo():
    assert elo(.5) == 0 and elo(.75) == pytest.approx(190.85, abs=.01) and elo(.25) == pytest.approx(-elo(.75))
    assert elo(10/11) == pytest.approx(400) and elo(0) == -math.inf and elo(1) == math.inf

def test_one_line():
    r = match(1, .5, 1, 0, .5, .5, 1, 1, names=("new", "old"))
    assert r.score == 5.5/8 and r.pentanomial == [0, 0, 2, 1, 1] and (r.wins, r.draws, r.losses) == (4, 3, 1)
    assert str(r).startswith("new - old: 8 games +4 =3 -1, score 0.688 [") and ", Elo +137 [" in str(r) and "\n" not in str(r)
    assert r.elo_interval == (elo(r.interval[0]), elo(r.interval[1]))
    lost, won = match(*[0]*64), match(*[1]*64)
    assert str(lost) == "a - b: 64 games +0 =0 -64, score 0.000 [0.000, 0.089], Elo below -403"
    assert str(won) == "a - b: 64 games +64 =0 -0, score 1.000 [0.911, 1.000], Elo above +403"
    assert "no games" in str(MatchResult([]))

def test_joining_results():
    one, two = match(1, 0), match(1, 1)
    with pytest.raises(ArenaError, match="share opening numbers"): one + two
    for g in two.games: g.pair += 1
    assert (one + two).pairs.tolist() == [.5, 1] and len(one.games) == 2
    with pytest.raises(ArenaError, match="not the same players"): one + MatchResult(two.games, ("a", "c"))

def test_pgn_comes_back(policy):
    r = play_match(policy_player(policy), random_player(1), random_openings(4, plies=5) + [chess.Board("8/8/4k3/8/8/4K3/8/Q7 b - - 0 1")],
                   max_plies=60, judge=Judge(white_is(900)), win_plies=30, names=("net", "dice"))
    text = io.StringIO(r.pgn())
    games = []
    while (g := chess.pgn.read_game(text)) is not None: games.append(g)
    assert len(games) == 10 and not any(g.errors for g in games)
    for g, played in zip(games, r.games):
        assert g.end().board().fen() == played.board.fen() and list(g.mainline_moves()) == played.board.move_stack
        assert (g.headers["White"], g.headers["Black"]) == (("net", "dice") if played.a_white else ("dice", "net"))
        white = {"1-0": 1, "0-1": 0, "1/2-1/2": .5}[g.headers["Result"]]
        assert white == (played.score if played.a_white else 1 - played.score) and g.headers["Termination"] == played.reason
    assert games[0].headers["Round"] == "1.1" and games[9].headers["FEN"].startswith("8/8/4k3")


def test_engine_player_beats_dice_and_the_judge_sees_it(pool):
    openings = random_openings(8)
    r = play_match(random_player(), engine_player(pool, depth=2), openings, judge=pool)
    assert r.score == 0 and set(r.reasons) <= {"adjudicated", "checkmate"} and str(r).split("Elo ")[1].startswith("below -")
    assert play_match(engine_player(pool, nodes=200), random_player(), openings[:4], judge=pool, judge_depth=2).score == 1

def test_engine_player_errs_with_skill(pool):
    boards = random_openings(60, plies=10)
    best = engine_player(pool, depth=1)(boards, list(range(60)), 0)
    weak = engine_player(pool, depth=1, skill=0)(boards, list(range(60)), 0)
    assert all(m in b.legal_moves for m, b in zip(best + weak, boards*2)) and sum(a != b for a, b in zip(best, weak)) > 10

def test_weak_engine_repeats_itself_and_gets_stronger(pool):
    openings = random_openings(12, seed=4)
    play = lambda seed, n, plies: play_match(weak_engine_player(pool, 5, seed), weak_engine_player(pool, 0, seed), openings[:n],
                                             max_plies=plies, judge=pool, judge_depth=2)
    assert moves(play(0, 4, 12)) == moves(play(0, 4, 12)) != moves(play(1, 4, 12))
    assert play(0, 12, 80).interval[0] > .5

def test_a_dead_engine_stops_the_match(pool):
    class Dies:
        def best_moves(self, *a, **k): raise RuntimeError("engine gone")
    with pytest.raises(RuntimeError, match="engine gone"): play_match(engine_player(Dies()), random_player(), [chess.Board()])
