import io
import math
import os

import chess
import chess.pgn
import pytest
from games import FOOL, SCHOLARS, SHUFFLE, Judge, fake_engine, match, moves, scripted, white_is

from grpo_chess.engine import EngineConfig, EngineError, EnginePool
from grpo_chess.matches import JudgeConfig, MatchResult, play_ladder, play_match, play_sprt
from grpo_chess.players import (
    ArenaError, Overlapped, engine_player, policy_player, random_openings, random_player, weak_engine_player)
from grpo_chess.stats import SprtConfig

def dice_match(**kw):
    "Two random games from the initial position."
    return play_match(random_player(), random_player(), [chess.Board()], **kw)

def test_colours_and_points():
    "Anna mates as White, then is mated as White; then she plays Black and mates, and is mated."
    lines = [SCHOLARS, SCHOLARS, FOOL, FOOL]
    r = play_match(scripted(*lines), scripted(*lines), [chess.Board()]*2, names=("anna", "ben"))
    assert [(g.pair, g.a_white, g.score) for g in r.games] == [(0, True, 1), (0, False, 0), (1, True, 0), (1, False, 1)]
    assert {g.reason for g in r.games} == {"checkmate"} and (r.wins, r.draws, r.losses) == (2, 0, 2)
    assert r.pairs.tolist() == [.5, .5] and r.pentanomial == [0, 0, 2, 0, 0]

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
    player = scripted(["g6f7"], ["g6f7"], SHUFFLE, SHUFFLE)
    r = play_match(player, player, [stale, start])
    assert [g.reason for g in r.games] == ["stalemate"]*2 + ["repetition"]*2 and r.score == .5
    assert [len(g.board.move_stack) for g in r.games] == [1, 1, 8, 8]
    fifty, bare = chess.Board("8/8/4k3/8/8/4K3/8/Q7 w - - 99 80"), chess.Board("8/8/2k5/4q3/3K4/8/8/8 w - - 0 1")
    lines = [["a1a2"], ["a1a2"], ["d4e5"], ["d4e5"]]
    r = play_match(scripted(*lines), scripted(*lines), [fifty, bare])
    assert [g.reason for g in r.games] == ["fifty"]*2 + ["insufficient"]*2

def test_max_plies_without_a_judge_is_a_draw():
    r = dice_match(max_plies=5)
    assert [g.reason for g in r.games] == ["max_plies"]*2 and r.score == .5
    assert [len(g.board.move_stack) for g in r.games] == [5, 5]

@pytest.mark.parametrize("plies", [4, 5])
@pytest.mark.parametrize("cp, points", [(700, [1, 0]), (-700, [0, 1]), (600, [.5, .5]), (-31_999, [0, 1])])
def test_judge_at_the_last_ply(cp, points, plies):
    judge = Judge(white_is(cp))
    assert dice_match(max_plies=plies, judge=judge, rule=JudgeConfig(win_plies=99)).scores.tolist() == points

def test_the_judge_searches_as_deep_as_it_is_told():
    deep = JudgeConfig(depth=7)
    for kw, depth in ((dict(), 4), (dict(rule=deep), 7), (dict(rule=deep, judge_depth=2), 2)):
        judge = Judge(white_is(0))
        dice_match(max_plies=8, judge=judge, **kw)
        assert judge.depths == {depth}

@pytest.mark.parametrize("every", [1, 2, 3])
def test_judge_ends_games_after_enough_checks(every):
    judge = Judge(white_is(-900))
    r = dice_match(judge=judge, rule=JudgeConfig(win_plies=6, every=every))
    assert r.scores.tolist() == [0, 1] and r.reasons == {"adjudicated": 2}
    assert [len(g.board.move_stack) for g in r.games] == [6, 6] and len(judge.asked) == 2*6//every

def test_judge_wants_consecutive_checks_of_one_side():
    "White is winning in three of four checks, Black never long enough: nobody wins before the end."
    class Counting(Judge):
        calls = 0
        def evaluate(self, fens, depth=None):
            self.calls += 1
            return [white_is({0: 100, 1: 900, 2: 900, 3: -900}[self.calls % 4])(chess.Board(f)) for f in fens]
    r = dice_match(max_plies=40, judge=Counting(None), rule=JudgeConfig(win_plies=3, every=1))
    assert all(len(g.board.move_stack) == 40 for g in r.games)

@pytest.mark.parametrize("answer", [lambda n: [0]*(n - 1), lambda n: [None]*n, lambda n: [math.nan]*n, lambda n: []])
def test_a_missing_evaluation_is_no_result(answer):
    judge = Judge(None)
    judge.evaluate = lambda fens, depth=None: answer(len(fens))
    with pytest.raises(ArenaError, match="without an answer"): dice_match(judge=judge)

@pytest.mark.parametrize("bad", [["e2e5"], ["e7e5"], ["0000"]])
def test_illegal_moves_stop_the_match(bad):
    with pytest.raises(ArenaError, match="anna played .* not legal in rnbqkbnr/"):
        play_match(scripted(bad, bad), random_player(), [chess.Board()], names=("anna", "ben"))

def test_missing_moves_stop_the_match():
    with pytest.raises(ArenaError, match="anna returned 0 moves for 1"):
        play_match(lambda boards, games, ply: [], random_player(), [chess.Board()], names=("anna", "ben"))

def test_unplayable_openings():
    for fen in ("7k/6Q1/6K1/8/8/8/8/8 b - - 0 1", "8/8/8/8/8/8/8/K7 w - - 0 1"):
        with pytest.raises(ArenaError, match="opening 1 cannot be played"):
            play_match(random_player(), random_player(), [chess.Board(), chess.Board(fen)])

def test_openings_are_not_changed_by_the_match():
    some = random_openings(2)
    before = [b.fen() for b in some]
    play_match(random_player(), random_player(), some, max_plies=4)
    assert [b.fen() for b in some] == before

@pytest.mark.parametrize("make", [lambda p, s: random_player(s), lambda p, s: policy_player(p, seed=s)])
def test_the_same_games_in_any_batch(policy, make):
    openings = random_openings(8, seed=1)
    def play(openings, first=0, seed=0):
        return play_match(make(policy, seed), random_player(9), openings, max_plies=30, first=first)
    whole, half = play(openings), play(openings[4:], first=4)
    assert moves(whole)[8:] == moves(half) and moves(play(openings[:4]) + half) == moves(whole)
    assert moves(play(openings)) == moves(whole) != moves(play(openings, seed=1))
    assert moves(play(openings[4:], first=0)) != moves(half)

def test_joining_results():
    even, won = match(1, 0), match(1, 1)
    with pytest.raises(ArenaError, match="share opening numbers"): even + won
    for g in won.games: g.pair += 1
    assert (even + won).pairs.tolist() == [.5, 1] and len(even.games) == 2
    with pytest.raises(ArenaError, match="not the same players"): even + MatchResult(won.games, ("a", "c"))
    assert str(match(1, 0, names=("new", "old"))).startswith("new - old: 2 games +1 =0 -1, score 0.500")
    assert "no games" in str(MatchResult([]))

def test_pgn_comes_back(policy):
    openings = random_openings(4, plies=5) + [chess.Board("8/8/4k3/8/8/4K3/8/Q7 b - - 0 1")]
    r = play_match(policy_player(policy), random_player(1), openings, max_plies=60, judge=Judge(white_is(900)),
                   rule=JudgeConfig(win_plies=30), names=("net", "dice"))
    text = io.StringIO(r.pgn())
    games = []
    while (g := chess.pgn.read_game(text)) is not None: games.append(g)
    assert len(games) == 10 and not any(g.errors for g in games)
    for g, played in zip(games, r.games):
        assert g.end().board().fen() == played.board.fen() and list(g.mainline_moves()) == played.board.move_stack
        assert (g.headers["White"], g.headers["Black"]) == (("net", "dice") if played.a_white else ("dice", "net"))
        white = {"1-0": 1, "0-1": 0, "1/2-1/2": .5}[g.headers["Result"]]
        assert white == (played.score if played.a_white else 1 - played.score) and g.headers["Reason"] == played.reason
        ruled = played.reason in ("adjudicated", "max_plies")
        assert g.headers["Termination"] == ("adjudication" if ruled else "normal")
        assert int(g.headers["PlyCount"]) == len(played.board.move_stack)
    assert games[0].headers["Round"] == "1.1" and games[9].headers["FEN"].startswith("8/8/4k3")

def test_engine_player_beats_dice_and_the_judge_sees_it(pool):
    openings = random_openings(8)
    r = play_match(random_player(), engine_player(pool, depth=2), openings, judge=pool)
    assert r.score == 0 and set(r.reasons) <= {"adjudicated", "checkmate"} and ", Elo below -" in str(r)
    won = play_match(engine_player(pool, nodes=200), random_player(), openings[:4], judge=pool, judge_depth=2)
    assert won.score == 1

def test_weak_engine_repeats_itself_and_gets_stronger(pool):
    openings = random_openings(12, seed=4)
    def play(seed, n, plies):
        players = weak_engine_player(pool, 5, seed), weak_engine_player(pool, 0, seed)
        return play_match(*players, openings[:n], max_plies=plies, judge=pool, judge_depth=2)
    assert moves(play(0, 4, 12)) == moves(play(0, 4, 12)) != moves(play(1, 4, 12))
    assert play(0, 12, 80).interval[0] > .5

def level_within(cp): return JudgeConfig(draw_cp=cp, draw_from=10, draw_plies=6)

@pytest.mark.parametrize("cp, plies", [(0, 15), (10, 15), (-10, 15), (11, 40)])
def test_the_judge_ends_level_games_late(cp, plies):
    "Asked at plies 12 and 15, both level: over at 15."
    r = dice_match(max_plies=40, judge=Judge(white_is(cp)), rule=level_within(10))
    assert [len(g.board.move_stack) for g in r.games] == [plies]*2 and r.score == .5
    assert set(r.reasons) == ({"adjudicated"} if plies == 15 else {"max_plies"})

def test_level_checks_must_follow_each_other_and_can_be_switched_off():
    class Waves(Judge):
        calls = 0
        def evaluate(self, fens, depth=None):
            self.calls += 1
            return [0 if self.calls % 2 else 200]*len(fens)
    for judge, cp in ((Waves(None), 10), (Judge(white_is(0)), 0)):
        r = dice_match(max_plies=40, judge=judge, rule=level_within(cp))
        assert set(r.reasons) == {"max_plies"}

@pytest.mark.parametrize("kw", [
    dict(depth=0), dict(every=0), dict(win_cp=0), dict(draw_cp=-1), dict(draw_cp=600), dict(draw_plies=0)])
def test_bad_judges(kw):
    with pytest.raises(ValueError, match="judge."): JudgeConfig(**kw)

def test_claimed_draws_are_those_of_python_chess():
    "Every ply of shuffling and of random games: our rule against python-chess's own question."
    shuffler = scripted(SHUFFLE, SHUFFLE)
    games = play_match(shuffler, shuffler, [chess.Board()], claims=True).games
    assert [(g.reason, len(g.board.move_stack)) for g in games] == [("claimed", 7)]*2
    assert play_match(shuffler, shuffler, [chess.Board()]).games[0].reason == "repetition"
    kings = [chess.Board("7k/8/8/8/8/8/R7/K7 w - - 90 80"), chess.Board("k7/8/8/8/8/8/8/K1RR4 w - - 0 1")]
    for game in play_match(random_player(1), random_player(2), kings, max_plies=120, claims=True).games:
        board = game.board.copy()
        if game.reason in ("claimed", "fifty", "repetition"): assert board.is_game_over(claim_draw=True)
        while len(board.move_stack) > game.opening_plies:
            board.pop()
            assert not board.is_game_over(claim_draw=True)

def test_engines_think_while_the_network_computes(pool):
    order = []
    engine = engine_player(pool, depth=2)
    def begin(boards, games, ply):
        order.append("asked")
        wait = engine.begin(boards, games, ply)
        def answer():
            order.append("answered")
            return wait()
        return answer
    def net(boards, games, ply):
        order.append("computed")
        return random_player()(boards, games, ply)
    play_match(net, Overlapped(begin), [chess.Board()], max_plies=2)
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
    assert pool.restarts > before
    assert moves(killed) == moves(play_match(random_player(2), weak, openings, max_plies=20))

@pytest.mark.parametrize("answer", [
    "exit 1", "true", "echo bestmove e2e4; echo bestmove e2e4", "echo nonsense; echo bestmove xx"])
@pytest.mark.parametrize("make", [engine_player, weak_engine_player])
def test_a_dying_engine_is_no_result(tmp_path, answer, make):
    path = fake_engine(tmp_path/"fake", answer)
    with EnginePool(EngineConfig(path=path, processes=1, retries=1, timeout=.5)) as bad:
        with pytest.raises(EngineError, match="failed 2 times"):
            play_match(make(bad), random_player(), [chess.Board()], max_plies=4)

def test_an_engine_that_cheats_is_no_result(tmp_path):
    with EnginePool(EngineConfig(path=fake_engine(tmp_path/"fake", "echo bestmove e2e5"), processes=1)) as bad:
        with pytest.raises(ArenaError, match="not legal"):
            play_match(engine_player(bad), random_player(), [chess.Board()], max_plies=4)

def test_sprt_match_is_the_beginning_of_the_long_match():
    openings = random_openings(40, seed=6)
    def greedy(boards, games, ply):
        return [max(b.legal_moves, key=lambda m: (b.gives_check(m), b.is_capture(m), m.uci())) for b in boards]
    def material(board):
        worth = (0, 100, 300, 300, 500, 900, 0)
        return sum(worth[p.piece_type]*(1 if p.color == board.turn else -1) for p in board.piece_map().values())
    kw = dict(max_plies=60, judge=Judge(material), rule=JudgeConfig(win_cp=150))
    result, state = play_sprt(greedy, random_player(), openings, SprtConfig(elo0=0, elo1=100, batch=16), **kw)
    assert state.accepted == 100 and len(result.games) == state.games < 80 and len(result.games) % 16 == 0
    whole = play_match(greedy, random_player(), openings, **kw)
    assert moves(result) == moves(whole)[:len(result.games)]
    assert [g.number for g in result.games] == list(range(len(result.games)))

def test_sprt_that_stays_undecided_plays_all():
    result, state = play_sprt(random_player(), random_player(1), random_openings(8), SprtConfig(batch=6), max_plies=6)
    assert state.accepted is None and len(result.games) == state.games == 16

def test_levels_that_do_not_exist(pool):
    for levels in ([], [0, 6], [-1]):
        with pytest.raises(ArenaError, match="a ladder has levels"):
            play_ladder(random_player(), pool, levels, random_openings(2))

def test_the_ladder_has_rungs(pool, monkeypatch):
    "Each level is played at its own level, from the same openings, and filed under it."
    met = []
    def weak(pool, level, seed):
        met.append((level, seed))
        return random_player(seed)
    monkeypatch.setattr("grpo_chess.matches.weak_engine_player", weak)
    ladder = play_ladder(random_player(), pool, [0, 2, 1], random_openings(4), seed=7, max_plies=9, name="dice")
    assert met == [(0, 7), (2, 9), (1, 8)]
    assert {k: m.names for k, m in ladder.matches.items()} == {k: ("dice", f"level {k}") for k in (0, 2, 1)}
    starts = {str([(g.board.root().fen(), g.board.move_stack[:6]) for g in m.games]) for m in ladder.matches.values()}
    assert len(starts) == 1 and str(ladder) == str(ladder.rating) and ladder.rating.opponents == 3

def test_dice_stay_below_the_ladder(pool):
    ladder = play_ladder(random_player(), pool, [0, 1], random_openings(4), judge=pool, judge_depth=2, max_plies=60)
    assert ladder.rating.interval[1] < 1400
