import dataclasses
import io
import json
import math
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import chess
import chess.pgn
import numpy as np
import pytest
import torch

from grpo_chess.arena import (MIN_GAMES, PRESETS, RATINGS, Arena, ArenaConfig, ArenaError, Game, JudgeConfig, MatchResult, SprtConfig, draws, elo, engine_player, engine_units, evidence,
                              expected_score, file_openings, fit_ladder, for_json, game_text, load_player_model, main, normalized_elo, parse, play_ladder, play_match, play_sprt,
                              policy_player, random_openings, random_player, read_labels, read_name, read_openings, read_puzzles, regret, run, score_interval, skill_pick, solve, sprt, weak_engine_player)
from grpo_chess.board import PositionError, position_key, terminal
from grpo_chess.engine import MATE, EngineConfig, EngineError, EnginePool
from grpo_chess.model import MODELS, ChessTransformer, ModelConfig, Policy, WeightsError, pretrained, save_model
from grpo_chess.settings import known_keys

TOP = Path(__file__).resolve().parent.parent
POSITIONS = TOP/"nbs/data/positions.jsonl"
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

SCHOLARS = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7".split()         # White mates
SHUFFLE = "g1f3 g8f6 f3g1 f6g8".split()*30
FOOL = "f2f3 e7e5 g2g4 d8h4".split()                        # Black mates


def test_colours_and_points():
    "Anna mates as White, then is mated as White; then she plays Black and mates, and is mated."
    lines = [SCHOLARS, SCHOLARS, FOOL, FOOL]
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
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=plies, judge=Judge(white_is(cp)), rule=JudgeConfig(win_plies=99))
    assert r.scores.tolist() == points

@pytest.mark.parametrize("every", [1, 2, 3])
def test_judge_ends_games_after_enough_checks(every):
    judge = Judge(white_is(-900))
    r = play_match(random_player(), random_player(), [chess.Board()], judge=judge, rule=JudgeConfig(win_plies=6, every=every))
    assert r.scores.tolist() == [0, 1] and r.reasons == {"adjudicated": 2}
    assert [len(g.board.move_stack) for g in r.games] == [6, 6] and len(judge.asked) == 2*6//every

def test_judge_wants_consecutive_checks_of_one_side():
    "White is winning in three of four checks, Black never long enough: nobody wins before the end."
    class Counting(Judge):
        calls = 0
        def evaluate(self, fens, depth=None):
            self.calls += 1
            return [white_is({0: 100, 1: 900, 2: 900, 3: -900}[self.calls % 4])(chess.Board(f)) for f in fens]
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=40, judge=Counting(None), rule=JudgeConfig(win_plies=3, every=1))
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
                   max_plies=60, judge=Judge(white_is(900)), rule=JudgeConfig(win_plies=30), names=("net", "dice"))
    text = io.StringIO(r.pgn())
    games = []
    while (g := chess.pgn.read_game(text)) is not None: games.append(g)
    assert len(games) == 10 and not any(g.errors for g in games)
    for g, played in zip(games, r.games):
        assert g.end().board().fen() == played.board.fen() and list(g.mainline_moves()) == played.board.move_stack
        assert (g.headers["White"], g.headers["Black"]) == (("net", "dice") if played.a_white else ("dice", "net"))
        white = {"1-0": 1, "0-1": 0, "1/2-1/2": .5}[g.headers["Result"]]
        assert white == (played.score if played.a_white else 1 - played.score) and g.headers["Reason"] == played.reason
        assert g.headers["Termination"] == ("adjudication" if played.reason in ("adjudicated", "max_plies") else "normal") and int(g.headers["PlyCount"]) == len(played.board.move_stack)
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

# Draws: by the rules, by claim, by the judge

LEVEL = lambda cp: JudgeConfig(draw_cp=cp, draw_from=10, draw_plies=6)

@pytest.mark.parametrize("cp, plies", [(0, 15), (10, 15), (-10, 15), (11, 40)])
def test_the_judge_ends_level_games_late(cp, plies):
    "Asked at plies 12 and 15, both level: over at 15."
    r = play_match(random_player(), random_player(), [chess.Board()], max_plies=40, judge=Judge(white_is(cp)), rule=LEVEL(10))
    assert [len(g.board.move_stack) for g in r.games] == [plies]*2 and r.score == .5
    assert set(r.reasons) == ({"adjudicated"} if plies == 15 else {"max_plies"})

def test_level_checks_must_follow_each_other_and_can_be_switched_off():
    class Waves(Judge):
        calls = 0
        def evaluate(self, fens, depth=None):
            self.calls += 1
            return [0 if self.calls % 2 else 200]*len(fens)
    for judge, cp in ((Waves(None), 10), (Judge(white_is(0)), 0)):
        r = play_match(random_player(), random_player(), [chess.Board()], max_plies=40, judge=judge, rule=LEVEL(cp))
        assert set(r.reasons) == {"max_plies"}

@pytest.mark.parametrize("kw", [dict(depth=0), dict(every=0), dict(win_cp=0), dict(draw_cp=-1), dict(draw_cp=600), dict(draw_plies=0)])
def test_bad_judges(kw):
    with pytest.raises(ValueError, match="judge."): JudgeConfig(**kw)

def test_claimed_draws_are_those_of_python_chess():
    "Every ply of shuffling and of random games: our rule against python-chess's own question."
    games = play_match(scripted(SHUFFLE, SHUFFLE), scripted(SHUFFLE, SHUFFLE), [chess.Board()], claims=True).games
    assert [(g.reason, len(g.board.move_stack)) for g in games] == [("claimed", 7)]*2
    assert play_match(scripted(SHUFFLE, SHUFFLE), scripted(SHUFFLE, SHUFFLE), [chess.Board()]).games[0].reason == "repetition"
    kings = [chess.Board("7k/8/8/8/8/8/R7/K7 w - - 90 80"), chess.Board("k7/8/8/8/8/8/8/K1RR4 w - - 0 1")]
    for game in play_match(random_player(1), random_player(2), kings, max_plies=120, claims=True).games:
        board = game.board.copy()
        if game.reason in ("claimed", "fifty", "repetition"): assert board.is_game_over(claim_draw=True)
        while len(board.move_stack) > game.opening_plies:
            board.pop()
            assert not board.is_game_over(claim_draw=True)


# Engines

def test_game_text_is_the_game():
    "Position and moves lead to the same board with the same repetitions, from random games."
    for r in play_match(random_player(3), random_player(4), random_openings(6, plies=9), max_plies=60).games:
        board = r.board.copy()
        while board.move_stack:
            fen, _, moves = game_text(board).partition(" moves ")
            back = chess.Board(fen)
            for uci in moves.split(): back.push_uci(uci)
            assert back.epd() == board.epd() and back.halfmove_clock == board.halfmove_clock
            assert [back.is_repetition(n) for n in (2, 3)] == [board.is_repetition(n) for n in (2, 3)]
            board.pop()

def test_an_engine_that_is_winning_does_not_repeat(pool):
    "Its best move would bring a position for the third time: without the game it plays it, with the game another one."
    back = lambda m: chess.Move(m.to_square, m.from_square)
    now = chess.Board("8/8/3k4/8/8/1R6/1Q6/K7 w - - 0 1")
    best = engine_player(pool, depth=4)([now], [0], 0)[0]
    after = now.copy(stack=False); after.push(best)
    for reply in after.legal_moves:
        game = chess.Board(after.fen())
        for move in [reply, back(best), back(reply), best, reply, back(best), back(reply)]:
            if not game.is_legal(move): break
            game.push(move)
        else: break
    assert game.epd() == now.epd() and game.is_repetition(2) and not game.is_repetition(3)
    assert game_text(game).count("moves") == 1 and engine_player(pool, depth=4)([game], [0], 0)[0] != best
    assert weak_engine_player(pool, 3)([game], [0], 0)[0] != best

@pytest.mark.parametrize("limits", [dict(depth=0), dict(depth=2, nodes=5), dict(ms=0), dict(nodes=-1)])
def test_engine_limits(pool, limits):
    with pytest.raises(ArenaError, match="one limit"): engine_player(pool, **limits)

def test_engine_levels(pool):
    for make in (lambda: engine_player(pool, skill=21), lambda: weak_engine_player(pool, 20), lambda: weak_engine_player(pool, -1)):
        with pytest.raises(ArenaError, match="must be 0 to"): make()

def test_engine_plays_for_milliseconds(pool):
    boards = random_openings(3, plies=8)
    assert all(m in b.legal_moves for m, b in zip(engine_player(pool, ms=5, skill=2)(boards, [0, 1, 2], 0), boards))

def test_engine_units():
    assert [engine_units(c) for c in (0, 1, -1, 100, -100, MATE - 1, MATE - 2, 1 - MATE, -MATE)] == [0, 5, -5, 362, -362, MATE - 1, MATE - 3, 2 - MATE, -MATE]

def rule_of_skill(scores, level, r):
    "The published rule in whole numbers; r: four whole random numbers below the weakness. The last of equals wins."
    weakness, top = 120 - 2*level, scores[0]
    delta, best, played = min(top - scores[-1], 126), -10**9, None
    for i, s in enumerate(scores):
        push = (weakness*(top - s) + delta*r[i])//128
        if s + push >= best: best, played = s + push, i
    return played

def test_skill_pick_follows_the_rule():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        level, n = int(rng.integers(0, 20)), int(rng.integers(1, 7))
        codes = sorted((int(c) for c in rng.choice([*range(-400, 400, 20), MATE - 1, MATE - 2, 3 - MATE], n)), reverse=True)
        u = rng.random(4)
        names = [f"move{k}" for k in range(n)]
        want = rule_of_skill([engine_units(c) for c in codes[:4]], level, [int(x*(120 - 2*level)) for x in u])
        assert skill_pick(dict(zip(names, codes)), level, u) == names[want]

def test_seeded_skill_is_the_engines_own(pool):
    "Frequencies over many positions against Stockfish's own skill 2: chi-square within six standard deviations."
    boards, n = random_openings(40, seed=3, plies=14), 40
    own, ours = (p([b for b in boards for _ in range(n)], list(range(n*len(boards))), 0) for p in (engine_player(pool, skill=2), weak_engine_player(pool, 2)))
    chi2 = dof = 0
    for k in range(len(boards)):
        a, b = Counter(own[n*k:n*k + n]), Counter(ours[n*k:n*k + n])
        chi2 += sum((a[m] - b[m])**2/(a[m] + b[m]) for m in a | b)
        dof += len(a | b) - 1
    assert chi2 < dof + 6*math.sqrt(2*dof)

def test_engines_think_while_the_network_computes(pool):
    order = []
    engine = engine_player(pool, depth=2)
    def begin(boards, games, ply):
        order.append("asked"); wait = engine.begin(boards, games, ply)
        def answer(): order.append("answered"); return wait()
        return answer
    def slow(boards, games, ply): return engine(boards, games, ply)
    slow.begin = begin
    def net(boards, games, ply): order.append("computed"); return random_player()(boards, games, ply)
    play_match(net, slow, [chess.Board()], max_plies=2)
    assert order == ["asked", "computed", "answered"]*2

def test_a_killed_engine_changes_nothing(pool):
    openings = random_openings(4, seed=5)
    weak = weak_engine_player(pool, 1)
    def murderous(boards, games, ply):
        if ply in (3, 8):
            for pid in pool.pids(): os.kill(pid, 9)
        return random_player(2)(boards, games, ply)
    before = pool.restarts
    killed = play_match(murderous, weak, openings, max_plies=20)
    assert pool.restarts > before and moves(killed) == moves(play_match(random_player(2), weak, openings, max_plies=20))

def fake_engine(path, answer):
    "A UCI engine that says hello and then does `answer` for each search."
    options = "".join(f"echo option name {o} type spin; " for o in ("Threads", "Hash", "MultiPV", '"Skill Level"'))
    path.write_text(f"#!/bin/sh\nwhile read line; do case $line in uci) {options} echo uciok;; isready) echo readyok;; go*) {answer};; quit) exit;; esac; done\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)

@pytest.mark.parametrize("answer", ["exit 1", "true", "echo bestmove e2e4; echo bestmove e2e4", "echo nonsense; echo bestmove xx"])
@pytest.mark.parametrize("make", [engine_player, weak_engine_player])
def test_a_dying_engine_is_no_result(tmp_path, answer, make):
    with EnginePool(EngineConfig(path=fake_engine(tmp_path/"fake", answer), processes=1, retries=1, timeout=.5)) as bad:
        with pytest.raises(EngineError, match="failed 2 times"): play_match(make(bad), random_player(), [chess.Board()], max_plies=4)

def test_an_engine_that_cheats_is_no_result(tmp_path):
    with EnginePool(EngineConfig(path=fake_engine(tmp_path/"fake", "echo bestmove e2e5"), processes=1)) as bad:
        with pytest.raises(ArenaError, match="not legal"): play_match(engine_player(bad), random_player(), [chess.Board()], max_plies=4)


# Openings from files

BOOK = {"a.txt": "# a comment\n1. e4 e5 2. Nf3\n\ne2e4 c7c5 g1f3 d7d6 f1b5 b8d7 e1g1 1-0\n1.d4 d5\n1.O-O\n".replace("1.O-O\n", ""),
        "a.pgn": '[Event "x"]\n\n1. e4 e5 2. Nf3 *\n\n[Event "y"]\n\n1. e4 c5 2. Nf3 d6 3. Bb5+ Nd7 4. O-O *\n\n1. d4 d5 *\n'}

@pytest.mark.parametrize("name", BOOK)
def test_books_of_lines(tmp_path, name):
    (tmp_path/name).write_text(BOOK[name])
    boards = read_openings(tmp_path/name)
    assert [[m.uci() for m in b.move_stack] for b in boards] == ["e2e4 e7e5 g1f3".split(), "e2e4 c7c5 g1f3 d7d6 f1b5 b8d7 e1g1".split(), "d2d4 d7d5".split()]

def test_books_of_positions(tmp_path):
    fens = [b.fen() for b in random_openings(5)]
    (tmp_path/"a.fen").write_text("\n".join([*fens, fens[0]]))
    assert [position_key(b) for b in read_openings(tmp_path/"a.fen")] == [position_key(chess.Board(f)) for f in fens]
    (tmp_path/"a.epd").write_text("\n".join(" ".join(f.split()[:4]) + ' id "x";' for f in fens))
    assert len(read_openings(tmp_path/"a.epd")) == 5

@pytest.mark.parametrize("name, text, says", [
    ("a.txt", "e2e4\ne2e4 e2e4\n", "a.txt, line 2: 'e2e4' cannot be played"), ("a.txt", "1. e4 Qh9\n", "a.txt, line 1: 'Qh9'"), ("a.fen", "8/8\n", "a.fen, line 1"),
    ("a.pgn", "1. e4 e5 2. Ke3 *\n", "a.pgn, line 1"), ("a.txt", "f3 e5 g4 Qh4#\n", "opening 1 is a finished game"), ("a.doc", "e4", "must end in"), ("none.txt", None, "there is no file")])
def test_bad_books(tmp_path, name, text, says):
    if text is not None: (tmp_path/name).write_text(text)
    with pytest.raises(PositionError) as e: read_openings(tmp_path/name)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_openings_of_a_file_in_a_seeds_order(tmp_path):
    (tmp_path/"a.txt").write_text("\n".join(" ".join(m.uci() for m in b.move_stack) for b in random_openings(12)))
    pick = lambda n, seed: [position_key(b) for b in file_openings(tmp_path/"a.txt", n, seed)]
    assert pick(5, 1) == pick(12, 1)[:5] != pick(5, 2) and len(set(pick(12, 3))) == 12
    with pytest.raises(ArenaError, match="holds 12 different openings, and 13 are needed"): pick(13, 0)


# Normalized Elo and SPRT

def test_normalized_elo_by_its_definition():
    count = np.array([39, 8843, 26675, 9240, 44])                       # pairs with 0 to 2 points, as an engine test of 89,682 games has them
    x = np.repeat(np.arange(5)/4, count)
    value, lo, hi = normalized_elo(x)
    sd = math.sqrt(2*x.var())                                            # of a game
    assert value == pytest.approx((x.mean() - .5)/sd*800/math.log(10))
    assert hi - lo == pytest.approx(2*1.96*800/math.log(10)/math.sqrt(2*len(x)), rel=.01)    # small differences: the noise of 2n games
    mirrored = normalized_elo(1 - x)
    assert mirrored[0] == pytest.approx(-value) and mirrored[1] == pytest.approx(-hi)

def test_normalized_elo_without_spread():
    assert normalized_elo(np.ones(8)) == (math.inf, -math.inf, math.inf) and normalized_elo(np.full(8, .5))[0] == 0 and normalized_elo(np.zeros(3))[0] == -math.inf

@pytest.mark.parametrize("p", [[.05, .2, .5, .2, .05], [.1, .1, .3, .2, .3], [.5, .3, .1, .05, .05]])
def test_normalized_elo_covers(p):
    rng, value = np.random.default_rng(3), np.arange(5)/4
    sd = math.sqrt(np.dot(p, value**2) - np.dot(p, value)**2)
    truth = (np.dot(p, value) - .5)/sd*800/math.log(10)/math.sqrt(2)
    held = np.mean([lo <= truth <= hi for _, lo, hi in (normalized_elo(value[rng.choice(5, 150, p=p)]) for _ in range(800))])
    assert .92 < held < .975

def test_llr_is_the_ratio_of_best_likelihoods():
    "Against a search over distributions on the five results with the wanted mean, by exponential tilting of the data."
    count, cfg = np.array([12, 30, 50, 40, 18]), SprtConfig(elo0=0, elo1=30)
    value, p = np.arange(5)/4, count/count.sum()
    def best(mu):       # likelihood's maximum under the mean mu: p/(1 + lambda (x - mu))
        lam = np.linspace(-1/(1 - mu) + 1e-6, 1/mu - 1e-6, 400_001)
        q = p[:, None]/(1 + lam*(value[:, None] - mu))
        k = np.abs(q.sum(0) - 1 + 0*lam).argmin() if abs((p*value).sum() - mu) < 1e-12 else np.abs((q*(value[:, None] - mu)).sum(0)).argmin()
        return (count*np.log(q[:, k])).sum()
    want = best(expected_score(30)) - best(.5)
    assert sprt(np.repeat(value, count), cfg).llr == pytest.approx(want, abs=1e-3)

def test_sprt_bounds_and_words():
    low, high = math.log(.05/.95), math.log(.95/.05)
    assert (sprt([], SprtConfig()).low, sprt([], SprtConfig()).high) == (pytest.approx(low), pytest.approx(high)) and sprt([], SprtConfig()).accepted is None
    won, lost = sprt(np.ones(200), SprtConfig()), sprt(np.zeros(200), SprtConfig())
    assert won.accepted == 20 and lost.accepted == 0 and won.games == 400
    assert "Elo +20 accepted after 400 games" in str(won) and "undecided after 0 games" in str(sprt([], SprtConfig()))
    narrow = sprt([], SprtConfig(alpha=.01, beta=.2))
    assert narrow.high == pytest.approx(math.log(.8/.01)) and narrow.low == pytest.approx(math.log(.2/.99))

@pytest.mark.parametrize("kw", [dict(elo0=5, elo1=5), dict(alpha=0), dict(beta=.6), dict(batch=3), dict(batch=0)])
def test_bad_sprt(kw):
    with pytest.raises(ValueError, match="sprt."): SprtConfig(**kw)

def test_sprt_match_is_the_beginning_of_the_long_match():
    openings = random_openings(40, seed=6)
    a = lambda boards, games, ply: [max(b.legal_moves, key=lambda m: (b.gives_check(m), b.is_capture(m), m.uci())) for b in boards]
    kw = dict(max_plies=60, judge=Judge(lambda b: sum((1 if p.color == b.turn else -1)*(100, 300, 300, 500, 900, 0)[p.piece_type - 1] for p in b.piece_map().values())), rule=JudgeConfig(win_cp=150))
    result, state = play_sprt(a, random_player(), openings, SprtConfig(elo0=0, elo1=100, batch=16), **kw)
    assert state.accepted == 100 and len(result.games) == state.games < 80 and len(result.games) % 16 == 0
    whole = play_match(a, random_player(), openings, **kw)
    assert moves(result) == moves(whole)[:len(result.games)] and [g.number for g in result.games] == list(range(len(result.games)))

def test_sprt_that_stays_undecided_plays_all():
    result, state = play_sprt(random_player(), random_player(1), random_openings(8), SprtConfig(batch=6), max_plies=6)
    assert state.accepted is None and len(result.games) == state.games == 16


# Ladder

def made_up(rng, p, pairs): return match(*(float(x) for x in (rng.random(2*pairs) < p)))

def test_ladder_recovers_a_rating():
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        ladder = fit_ladder({l: made_up(rng, expected_score(1500 - RATINGS[l]), 60) for l in (0, 1, 3)})
        found.append((ladder.elo, ladder.interval[0] <= 1500 <= ladder.interval[1], ladder.misfit))
    elos, held, misfit = map(np.array, zip(*found))
    assert abs(elos.mean() - 1500) < 25 and held.mean() >= .85 and .8 < misfit.mean() < 4

def test_ladder_with_one_level_is_the_match():
    r = match(*np.random.default_rng(1).choice([0, .5, 1], 80))
    ladder = fit_ladder({2: r})
    assert abs(ladder.elo - (RATINGS[2] + elo(r.score))) <= 5 and ladder.misfit < .1
    assert np.allclose(ladder.interval, [RATINGS[2] + e for e in r.elo_interval], atol=11)

def test_ladder_at_its_ends():
    lost, won = fit_ladder({0: match(*[0]*40), 1: match(*[0]*40)}), fit_ladder({4: match(*[1]*40)})
    assert lost.elo == -math.inf == lost.interval[0] and lost.interval[1] < 1200 and "below" in str(lost)
    assert won.elo == math.inf == won.interval[1] and won.interval[0] > 2000 and "above" in str(won)
    fits, odd = fit_ladder({0: match(*[1]*16), 5: match(*[0]*16)}), fit_ladder({0: match(*[0]*16), 5: match(*[1]*16)})
    assert fits.misfit < 3 < 20 < odd.misfit and "no one rating fits" in str(odd) and "no one rating fits" not in str(fits)

def test_levels_that_do_not_exist(pool):
    for levels in ([], [0, 6], [-1]):
        with pytest.raises(ArenaError, match="a ladder has levels"): play_ladder(random_player(), pool, levels, random_openings(2))

def test_the_ladder_has_rungs(pool, monkeypatch):
    "Each level is played at its own level, from the same openings, and filed under it."
    met = []
    monkeypatch.setattr("grpo_chess.arena.weak_engine_player", lambda pool, level, seed: met.append((level, seed)) or random_player(seed))
    ladder = play_ladder(random_player(), pool, [0, 2, 1], random_openings(4), seed=7, max_plies=9, name="dice")
    assert met == [(0, 7), (2, 9), (1, 8)] and {l: m.names for l, m in ladder.matches.items()} == {l: ("dice", f"level {l}") for l in (0, 2, 1)}
    assert len({tuple(g.board.root().fen() + str(g.board.move_stack[:6]) for g in m.games) for m in ladder.matches.values()}) == 1

def test_dice_stay_below_the_ladder(pool):
    ladder = play_ladder(random_player(), pool, [0, 1], random_openings(4), judge=pool, judge_depth=2, max_plies=60)
    assert ladder.interval[1] < 1400


# Regret

def test_regret_by_hand(tmp_path):
    board = chess.Board("6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1")
    scores = {m.uci(): (MATE - 1 if m.uci() == "a1a8" else 0) for m in board.legal_moves}
    (tmp_path/"x.jsonl").write_text(json.dumps({"engine": "made up"}) + "\n" + json.dumps(dict(fen=board.fen(), moves=scores)) + "\n\n")
    label, = read_labels(tmp_path/"x.jsonl")
    assert label.loss["a1a8"] == 0 and label.loss["g1f1"] == pytest.approx(.5)
    assert regret(None, [label]).mean == pytest.approx(.5*(len(scores) - 1)/len(scores)) and regret(None, [label]).best == pytest.approx(1/len(scores))
    assert regret(scripted(["a1a8"]), [label]).mean == 0 and regret(scripted(["g1f1"]), [label]).best == 0

def test_regret_of_a_policy_is_a_sum_over_its_moves(policy):
    labels = read_labels(POSITIONS)[:12]
    policy.model.eval()
    exact = regret(policy, labels)
    n = 400
    drawn = [regret(policy_player(policy, seed=s), labels).each for s in range(n)]
    assert abs(np.mean(drawn) - exact.mean) < 4*np.std(np.mean(drawn, 1))/math.sqrt(n) + 1e-9
    assert np.allclose(regret(policy, labels, greedy=True).each, regret(policy_player(policy, greedy=True), labels).each)
    warm = regret(policy.at(1e4), labels)
    assert warm.mean == pytest.approx(regret(None, labels).mean, abs=1e-3)

def test_regret_leaves_the_model_as_it_was(policy):
    policy.model.train(); first = regret(policy, read_labels(POSITIONS)[:5]).mean
    assert policy.model.training and regret(policy, read_labels(POSITIONS)[:5]).mean == first
    policy.model.eval()

def test_regret_ranks(pool):
    labels = read_labels(POSITIONS)
    trained, floor = regret(Policy(pretrained("tiny")), labels, greedy=True), regret(None, labels)
    assert regret(engine_player(pool, depth=6), labels).mean < .7*trained.mean < .3*floor.mean         # depth 6 made the labels
    assert all(r.interval[0] < r.mean < r.interval[1] for r in (trained, floor))

@pytest.mark.parametrize("line, says", [("x", "line 2: it is not JSON"), ("{}", "line 2: there is no 'fen'"), ('{"fen": "8/8", "moves": {}}', "is not a position"), ("[]", "line 2"),
    ('{"fen": "7k/8/8/8/8/8/8/K7 w - - 0 1", "moves": {"a1a2": 0}}', "each of the 3 legal moves; different: a1b1, a1b2"), ('{"fen": "7k/8/8/8/8/8/8/K7 w - - 0 1", "moves": {"a1a2": "x", "a1b1": 0, "a1b2": 0}}', "line 2")])
def test_bad_labels(tmp_path, line, says):
    (tmp_path/"x.jsonl").write_text('{"engine": "made up"}\n' + line)
    with pytest.raises(ArenaError) as e: read_labels(tmp_path/"x.jsonl")
    assert says in str(e.value) and "x.jsonl" in str(e.value) and "\n" not in str(e.value)

def test_label_files_that_are_none(tmp_path):
    (tmp_path/"empty.jsonl").write_text('{"engine": "made up"}\n')
    for name, says in (("empty.jsonl", "no labelled position"), ("none.jsonl", "cannot read")):
        with pytest.raises(ArenaError, match=says): read_labels(tmp_path/name)


# Puzzles

HEAD = "PuzzleId,FEN,Moves,Rating,RatingDeviation,Popularity,NbPlays,Themes,GameUrl,OpeningTags\n"
MATE1 = "m1,6k1/5ppp/8/3p4/8/8/R7/1R2K3 b - - 0 1,d5d4 a2a8,600,75,90,10,mateIn1,,\n"
MATE2 = "m2,8/8/8/8/7K/8/1PQ5/3k4 b - - 0 1,d1e1 h4g3 e1f1 c2f2,900,75,90,10,mateIn2,,\n"

def puzzles_in(tmp_path, text): (tmp_path/"p.csv").write_text(text); return read_puzzles(tmp_path/"p.csv")

def test_puzzles_are_read_and_start_after_the_opponents_move(tmp_path):
    one, two = puzzles_in(tmp_path, HEAD + MATE1 + MATE2)
    assert one.board.piece_at(chess.D4) and one.board.turn == chess.WHITE and [m.uci() for m in two.moves] == ["h4g3", "e1f1", "c2f2"] and two.rating == 900
    assert [p.name for p in puzzles_in(tmp_path, MATE1 + MATE2)] == ["m1", "m2"]         # older files have no first line
    assert len(read_puzzles(tmp_path/"p.csv", 1)) == 1

@pytest.mark.parametrize("lines, solved", [((["a2a8"], ["h4g3", "", "c2f2"]), [1, 1]), ((["b1b8"], ["h4g3", "", "c2d1"]), [1, 1]), ((["a2a7"], ["h4g3", "", "c2c1"]), [0, 0]), ((["b1b8"], ["b2b3"]), [1, 0])])
def test_any_mate_solves(tmp_path, lines, solved):
    assert solve(scripted(*lines), puzzles_in(tmp_path, HEAD + MATE1 + MATE2)).solved.tolist() == solved

def test_puzzles_in_one_batch(tmp_path, pool):
    puzzles, calls = puzzles_in(tmp_path, HEAD + MATE1*3 + MATE2*2), []
    engine = engine_player(pool, depth=6)
    def spy(boards, games, ply): calls.append(len(boards)); return engine(boards, games, ply)
    r = solve(spy, puzzles)
    assert calls == [5, 2] and r.accuracy == 1 and r.by_rating() == {"500-999": (5, 1.)} and r.interval[1] == 1
    assert all(len(p.board.move_stack) == 1 for p in puzzles)

@pytest.mark.parametrize("row, says", [
    ("x,8/8,a1a2 a2a3,5,,,,,,\n", "is not a position"), (MATE1.replace("a2a8", "a2c8"), "a2c8 is not legal"), (MATE1.replace(" a2a8", ""), "1 moves"), (MATE2.replace(" c2f2", ""), "3 moves"), (MATE1.replace("600", "hard"), "Rating 'hard'"),
    ("x,y\n", "Moves is missing"), (MATE1.replace("d5d4", "d5"), "line 3")])
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


# Names and settings

def test_names():
    assert read_name("tiny") == ("tiny", {}) and read_name("stockfish:skill=2,ms=50") == ("stockfish", dict(skill=2, ms=50))
    assert read_name("a:b/model.safetensors:temperature=.5,seed=3") == ("a:b/model.safetensors", dict(temperature=.5, seed=3))
    for bad in ("stockfish:temperature=1", "weak:level=x", "tiny:preset=huge", "random:=", "tiny:warm=1"):
        with pytest.raises(ArenaError, match="player"): read_name(bad)

def test_models_by_name(tmp_path):
    torch.manual_seed(0); net = ChessTransformer(ModelConfig(width=16, layers=1, heads=2))
    (tmp_path/"run").mkdir(); save_model(net, tmp_path/"run/model.safetensors")
    for name in (tmp_path/"run", tmp_path/"run/model.safetensors"): assert load_player_model(str(name)).cfg == net.cfg
    with pytest.raises(WeightsError, match="another shape"): load_player_model(f"{tmp_path}/run:preset=tiny")
    with pytest.raises(WeightsError, match="no weights at"): load_player_model(f"{tmp_path}/none.safetensors")
    with pytest.raises(ArenaError, match="no player 'tinny'"): load_player_model("tinny")
    assert load_player_model("untrained", net).cfg == net.cfg and load_player_model("untrained:preset=record").cfg == MODELS["record"] and load_player_model("random") is None
    same, other = (load_player_model(f"untrained:seed={s}", net).head.source.weight for s in (1, 2))
    assert torch.equal(same, load_player_model("untrained:seed=1", net).head.source.weight) and not torch.equal(same, other)

def test_presets_are_the_records_protocol():
    for name, b in (("record", "stockfish:skill=2,ms=50"), ("standin", "weak:level=2")):
        cfg = parse(["--preset", name])
        assert (cfg.b, cfg.games, cfg.opening_plies, cfg.max_plies, cfg.temperature, cfg.claims, cfg.judge.on, cfg.floor) == (b, 64, 6, 400, 0, True, False, True)
    assert parse(["--preset=standin", "--games", "128"]).games == 128 and set(PRESETS) == {"record", "standin"}

def test_settings_from_a_file(tmp_path):
    (tmp_path/"x.yaml").write_text("games: 32\njudge: {depth: 2}\nsprt: {'on': true}\n")
    cfg = parse(["--config", str(tmp_path/"x.yaml"), "--judge.every", "1"])
    assert (cfg.games, cfg.judge.depth, cfg.judge.every, cfg.sprt.on) == (32, 2, 1, True)

@pytest.mark.parametrize("argv, says", [
    (["--gmaes", "64"], "did you mean 'games'"), (["--games", "14"], f"at least {MIN_GAMES}"), (["--games", "33"], "even"), (["--preset", "recrd"], "there is no preset"), (["--temperature", "-1"], "temperature"),
    (["--ladder", "9"], "ladder = 9"), (["--accelerator", "tpu"], "accelerator"), (["--sprt.elo0", "50"], "sprt.elo0"), (["--judge.depth", "0"], "judge.depth"), (["--games", "0", "--pgn", "x.pgn"], "pgn needs games"),
    (["--config", "none.yaml"], "none.yaml"), (["--games"], "games")])
def test_bad_settings(argv, says):
    with pytest.raises(ArenaError) as e: parse(argv)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit): parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in known_keys(ArenaConfig): assert f"--{key}" in text, key
    for cls in (ArenaConfig, JudgeConfig, SprtConfig):
        for f in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(f.default_factory): assert f"\n        {f.name}: " in cls.__doc__, f.name


# The command as a user meets it

def command(*args, **env):
    return subprocess.run([sys.executable, "-m", "grpo_chess.arena", *map(str, args)], env=os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1") | env, capture_output=True, text=True, timeout=300)

@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0); save_model(ChessTransformer(ModelConfig(width=16, layers=1, heads=2)), tmp_path/"net.safetensors")
    return str(tmp_path/"net.safetensors")

def test_the_whole_command(tmp_path, net):
    (tmp_path/"p.csv").write_text(HEAD + MATE1 + MATE2)
    (tmp_path/"labels.jsonl").write_text("".join(POSITIONS.open().readlines()[:9]))
    done = command("--a", net, "--b", "weak:level=0", "--games", 16, "--max_plies", 30, "--judge.depth", 1, "--ladder", 0, "--puzzles", tmp_path/"p.csv", "--regret", tmp_path/"labels.jsonl",
                   "--pgn", tmp_path/"out.pgn", "--json", tmp_path/"out.json")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path/"out.json").read_text())
    assert out.keys() == {"config", "engine", "protocol", "match", "floor", "ladder", "regret", "puzzles"} and out["config"]["games"] == 16 and "Stockfish" in out["engine"]
    assert out["match"]["games"] == 16 and sum(out["match"]["pentanomial"]) == 8 and [f["a"] for f in out["floor"]] == ["random mover", "untrained"] and all(f["games"] == 16 for f in out["floor"])
    with (tmp_path/"out.pgn").open() as f: games = list(iter(lambda: chess.pgn.read_game(f), None))
    assert len(games) == 16 and not any(g.errors for g in games) and games[0].headers["Black"] == "weak:level=0"
    for words in ("score", "floor under the same protocol", "random mover", "untrained", "on the ladder", "regret", "puzzles", "normalized Elo"): assert words in done.stdout, words
    assert not list(tmp_path.glob("*.tmp"))

def test_same_command_same_result(tmp_path, net):
    outs = []
    for k in range(2):
        run(ArenaConfig(a=net, b="weak:level=1", games=16, max_plies=20, temperature=1., floor=False, judge=JudgeConfig(depth=1), json=str(tmp_path/f"{k}.json"), pgn=str(tmp_path/f"{k}.pgn")), say=lambda *a, **k: None)
        outs.append((tmp_path/f"{k}.pgn").read_text())
    assert outs[0] == outs[1]

def test_a_network_against_itself_is_half(net):
    cfg = ArenaConfig(a=net, b=net, games=16, max_plies=30, floor=False, judge=JudgeConfig(on=False))
    r = run(cfg, say=lambda *a, **k: None)["match"]
    assert r.score == .5 and set(r.pairs) == {.5}       # both play their most likely move: the colours cancel
    warm = run(dataclasses.replace(cfg, temperature=1.), say=lambda *a, **k: None)["match"]
    assert any(x.board.move_stack != y.board.move_stack for x, y in zip(warm.games[::2], warm.games[1::2]))

def test_players_of_a_command_have_seeds_of_their_own(net):
    "At temperature 1: both sides differ, another seed differs, and a seed in the name is that seed."
    def first_moves(side, **kw):
        arena = Arena(ArenaConfig(a=net + kw.pop("named", ""), b=net, games=16, temperature=1., judge=JudgeConfig(on=False), **kw))
        return getattr(arena, side)([chess.Board()]*60, list(range(60)), 0)
    a = first_moves("a")
    assert a == first_moves("a") == policy_player(Policy(load_player_model(net)), seed=0)([chess.Board()]*60, list(range(60)), 0)
    assert a != first_moves("b") and a != first_moves("a", seed=1) and first_moves("a", named=":seed=9") == first_moves("a", named=":seed=9", seed=1)
    assert len(set(first_moves("a", named=":temperature=0"))) == 1 < len(set(a))

def test_floor_knows_the_shape_and_the_protocol(net):
    arena = Arena(ArenaConfig(a="random", b=net, games=16, judge=JudgeConfig(on=False)))
    assert arena.model.cfg.width == 16 and arena.pool is None and arena.policy("untrained").model.cfg.width == 16 and arena.protocol["claims"] is False
    for on in (True, False):
        arena = Arena(ArenaConfig(a=net, b="weak:level=0", games=16, judge=JudgeConfig(on=on)))
        assert arena.pool and (arena.protocol["judge"] is arena.pool) == on and (arena.protocol["judge"] is None) != on

def test_sprt_by_command(net, capsys):
    found = run(ArenaConfig(a=net, b="weak:level=3", games=200, max_plies=60, judge=JudgeConfig(depth=1), floor=False, sprt=SprtConfig(on=True, elo0=-100, elo1=0, batch=16)))
    assert found["sprt"].accepted == -100 and len(found["match"].games) < 200 and "Elo -100 accepted" in capsys.readouterr().out
    assert for_json(found)["sprt"]["accepted"] == -100

@pytest.mark.parametrize("args, says", [
    (["--a", "none.safetensors"], "no weights at none.safetensors"), (["--a", "tinny"], "there is no player 'tinny'"), (["--games", "8"], "at least 16"), (["--a", "NET:preset=tiny"], "another shape"),
    (["--openings", "book.txt"], "book.txt, line 2: 'e4e5' cannot be played"), (["--openings", "short.txt"], "holds 1 different openings"), (["--puzzles", "bad.csv"], "bad.csv, line 2"), (["--regret", "bad.csv"], "bad.csv, line 2: it is not JSON"),
    (["--games", "0"], "nothing to measure"), (["--json", "no/folder/x.json"], "there is no folder no/folder"), (["--pgn", "."], "it is a folder"),
    (["--a", "tiny:preset=record"], "another shape"), (["--a", "tiny:temperature=-1"], "a temperature is a number from 0"), (["--opening_plies", "0"], "fewer than 8 openings"), (["--b", "stockfish:depth=0"], "one limit")])
def test_bad_input_is_one_line(tmp_path, net, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("e2e4\ne2e4 e4e5\n"); Path("short.txt").write_text("e2e4\n"); Path("bad.csv").write_text("PuzzleId\nx,y\n")
    given = [a.replace("NET", net) for a in args]
    status = main([*([] if "--a" in args else ["--a", net]), "--games", "16", "--floor", "false", "--judge.on", "false", "--max_plies", "4", "--b", "random", *given])
    err = capsys.readouterr().err
    assert status == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1

def test_no_engine_no_result(tmp_path, net):
    for path in ("/no/such/stockfish", fake_engine(tmp_path/"fake", "exit 1")):
        done = command("--a", net, "--b", "weak:level=0", "--games", 16, "--max_plies", 6, "--engine.retries", 0, "--engine.timeout", 2, "--json", tmp_path/"x.json", "--pgn", tmp_path/"x.pgn", STOCKFISH_PATH=path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "score" not in done.stdout
        assert not (tmp_path/"x.json").exists() and not (tmp_path/"x.pgn").exists()

def test_results_without_end_become_null():
    out = for_json(dict(m=match(*[0]*16), l=fit_ladder({0: match(*[0]*16)})))
    assert out["m"]["elo"] is None and out["l"]["elo"] is None and json.dumps(out, allow_nan=False)
