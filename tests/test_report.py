"What a run says of itself: intervals that know that steps are alike, matches that are what they are called."
import math
import re

import numpy as np
import pytest

from grpo_chess import report
from grpo_chess.config import Config, MatchConfig
from grpo_chess.engine import EngineError
from grpo_chess.matches import MatchResult
from grpo_chess.model import MODELS, ChessTransformer
from grpo_chess.players import ArenaError, random_openings, random_player
from grpo_chess.report import change, guard_actions, matches_of, report_text, write_report
from grpo_chess.stats import PairedScore, series_mean

def alike(n, rng, phi=.9):
    "A series whose neighbours correlate."
    x = np.zeros(n)
    for i in range(1, n): x[i] = phi*x[i-1] + rng.normal()
    return x

def cells(line): return [c.strip() for c in line.split("|")[2:5]]

def test_change_is_last_minus_first():
    line = change([dict(x=float(i)) for i in range(20)], "x")
    assert cells(line) == ["0.5", "18.5", "18"]               # two steps at each end: nothing to be said about ±

def test_plus_and_minus_are_those_of_batch_means():
    "Each column by itself, and the difference by both; to the digit that is printed."
    y = alike(600, np.random.default_rng(1))
    (a, sa), (b, sb) = series_mean(y[:60]), series_mean(y[-60:])
    expected = [f"{a:.3g} ± {sa:.1g}", f"{b:.3g} ± {sb:.1g}", f"{b - a:.3g} ± {math.hypot(sa, sb):.1g}"]
    assert cells(change([dict(x=v) for v in y], "x")) == expected

def test_the_interval_holds_the_truth_where_neighbours_are_alike():
    "95 % of them should; those of independent steps hold it in about a third."
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        first, _, half = cells(change([dict(x=v) for v in alike(300, rng)], "x", share=1.))[0].partition(" ± ")
        held += abs(float(first)) < float(half)
    assert held > .85*200

def test_what_was_not_measured_at_first_is_said_to_be_so():
    rows = [dict(a=math.nan if k < 30 else 1.) for k in range(100)]
    assert change(rows, "a") == "| `a` | not measured | 1 ± 0 | not measured |"

def test_a_column_without_values_is_left_out():
    rows = [dict(x=None, ratio_error=0., plies=1, seconds=1., entropy=1., step=i) for i in range(30)]
    text = report_text("r", Config(), rows)
    assert "`entropy`" in text and "`expected_regret`" not in text and "batch means" in text

# Matches

def spied(monkeypatch, cfg, seed=0, pool=None, floor=None):
    "What `matches_of` asks for."
    asked = []
    def spy(a, b, openings, max_plies, judge=None, depth=None, names=()):
        asked.append(dict(a=a, b=b, openings=openings, max_plies=max_plies, judge=judge, depth=depth, names=names))
    def player(policy, greedy, seed=0, repeats=True):
        return policy.model, ("most likely" if greedy else policy.temperature) if repeats else "repeats nothing", seed
    monkeypatch.setattr(report, "policy_player", player)
    monkeypatch.setattr(report, "play_match", spy)
    titles = [title for title, _ in matches_of("new", "old", cfg, pool, seed, floor)]
    return titles, asked

def test_the_matches_are_what_their_names_say(monkeypatch):
    titles, asked = spied(monkeypatch, MatchConfig(games=2), seed=3, floor="untrained net")
    met = {title: (x["a"][:2], x["b"][:2], x["names"]) for title, x in zip(titles, asked)}
    assert met == {
        "most likely move that repeats nothing, by the rules":
            (("new", "repeats nothing"), ("old", "repeats nothing"), ("new", "old")),
        "sampling at T=1": (("new", 1.), ("old", 1.), ("new", "old")),
        "against the old one's most likely move, sampling at T=1":
            (("new", 1.), ("old", "most likely"), ("new", "old")),
        "floor, sampling at T=1": (("untrained net", 1.), ("old", 1.), ("untrained", "old"))}
    assert {(x["a"][2], x["b"][2]) for x in asked} == {(6, 7)}               # both sides draw their own numbers
    assert titles[0] == report.GREEDY and len(spied(monkeypatch, MatchConfig(games=2))[0]) == 2

@pytest.mark.parametrize("depth", [1, 4, 7])
def test_the_judge_of_the_matches_has_the_depth_and_the_length_of_the_settings(monkeypatch, depth):
    cfg = MatchConfig(games=2, depth=depth, max_plies=30 + depth)
    _, asked = spied(monkeypatch, cfg, pool="pool")
    assert {(x["judge"], x["depth"], x["max_plies"]) for x in asked[1:]} == {("pool", depth, 30 + depth)}
    assert (asked[0]["judge"], asked[0]["max_plies"]) == (None, cfg.rules_plies)       # no engine calls these games
    _, asked = spied(monkeypatch, MatchConfig(games=2, adjudicate=False), pool="pool")
    assert {x["judge"] for x in asked} == {None}

def test_the_depth_reaches_the_engine():
    "A pool that notes at which depth it is asked."
    asked = set()
    class Pool:
        def evaluate(self, fens, depth):
            asked.add(depth)
            return [0]*len(fens)
    net = ChessTransformer(MODELS["tiny"]).eval()
    cfg = MatchConfig(games=2, depth=6, max_plies=4, rules_plies=4)
    assert [*matches_of(net, net, cfg, Pool())] and asked == {6}

@pytest.mark.parametrize("seed", [0, 5])
def test_openings_belong_to_the_seed_and_not_to_training(monkeypatch, seed):
    def fens(boards): return [b.fen() for b in boards]
    _, asked = spied(monkeypatch, MatchConfig(games=12), seed=seed)
    assert all(fens(x["openings"]) == fens(random_openings(6, seed + report.OPENING_SEED)) for x in asked)
    others = [random_openings(6, other + report.OPENING_SEED) for other in (0, 5) if other != seed]
    assert all(fens(asked[0]["openings"]) != fens(o) for o in (*others, random_openings(6, seed)))

# Others

class Named:
    "A weak player that is Stockfish in name only."
    asked = []
    def __init__(self, text, pool, engines, seed): self.asked.append((text, pool, seed))
    def __call__(self, boards, games, ply): return random_player(5)(boards, games, ply)

def test_old_and_new_meet_the_same_others_from_the_same_openings(monkeypatch):
    "Last, so that an engine that fails costs no other match; by the rules, and without repeating."
    monkeypatch.setattr(report, "other_player", Named)
    cfg = MatchConfig(games=12, others="weak:level=0,errs=0.15 random", rules_plies=77)
    titles, asked = spied(monkeypatch, cfg, seed=4, pool="pool")
    names = [f"{who} against {name}" for name in cfg.others.split() for who in ("old", "new")]
    assert titles == [report.GREEDY, report.SAMPLED, *names]
    met = dict(zip(titles, asked))
    for name in names:
        x, who = met[name], name.split()[0]
        assert x["a"][:2] == (who, "repeats nothing") and x["names"] == (who, name.split()[-1])
        assert (x["judge"], x["max_plies"], len(x["openings"])) == (None, 77, 3)        # half as many games
        assert [b.fen() for b in x["openings"]] == [b.fen() for b in random_openings(3, 4 + report.OPENING_SEED)]
    assert Named.asked[-2:] == [(name, "pool", 4) for name in cfg.others.split()]

def test_their_engines_end_with_the_matches(monkeypatch):
    ended = []
    class Engine:
        def close(self): ended.append(self)
    def other(text, pool, engines, seed):
        engines.append(Engine())
        if text == "bad": raise ArenaError("bad")
    monkeypatch.setattr(report, "other_player", other)
    with report.named_players(["a", "b"], None): assert not ended
    assert len(ended) == 2
    with pytest.raises(ArenaError), report.named_players(["a", "bad"], None): pass
    assert len(ended) == 4

def test_an_engine_that_dies_costs_its_own_matches_alone(monkeypatch):
    "The others after it are met, all engines are closed, and what failed is told at the end, by name."
    closed = []
    class Dying(Named):
        def __init__(self, text, pool, engines, seed):
            super().__init__(text, pool, engines, seed)
            engines.append(self)
        def close(self): closed.append(self)
        def __call__(self, boards, games, ply):
            if "level=2" in self.asked[-1][0]: raise EngineError("it died")
            return super().__call__(boards, games, ply)
    monkeypatch.setattr(report, "other_player", Dying)
    monkeypatch.setattr(report, "policy_player", lambda *args, **kw: random_player(1))
    cfg = MatchConfig(games=4, others="weak:level=1 weak:level=2 weak:level=1 'engine:path=/my engines/x,depth=1'")
    met = []
    with pytest.raises(EngineError, match="^against weak:level=2: it died$"):
        for title, match in report.others_of(None, None, cfg, None): met.append((title, len(match.games)))
    names = "weak:level=1", "engine:path=/my engines/x,depth=1"
    assert met == [(f"{who} against {name}", 2) for name in names for who in ("old", "new")] and len(closed) == 3

def pairs(*scores): return np.array(scores, float)

def test_a_gain_against_others_is_that_of_elo():
    "By hand: from 1/4 to 1/2 is 191 Elo, from 1/2 to 1/2 none; who gains in every opening has an interval above 0."
    old = dict(a=pairs(*[.25]*50), b=pairs(*[.25, .75]*25))
    new = dict(a=pairs(*[.5]*50), b=pairs(*[.25, .75]*25))
    gain, low, high = report.elo_gain(new, old)
    assert abs(gain - 400*math.log10(3)/2) < 1e-9 and abs(low - gain) < 1e-9 and abs(high - gain) < 1e-9
    assert report.elo_gain(old, old) == (0, 0, 0)               # drawn together: no noise of the openings is left
    back = report.elo_gain(old, new)
    assert back[0] == -gain

def test_a_score_of_nothing_is_half_a_point():
    gain, *_ = report.elo_gain(dict(a=pairs(*[.5]*100)), dict(a=pairs(*[0]*100)))
    assert abs(gain - 400*math.log10(199.5/.5)) < 1e-9

def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says():
    "Pairs of games with a known mean, a hundred times; intervals that hold it because they are too wide fail too."
    rng, p, q, held, widths = np.random.default_rng(1), .3, .5, 0, []
    truth = -400*math.log10(p/(1 - p))
    for k in range(100):
        ours, start = ({"a": rng.binomial(2, x, 100)/2} for x in (q, p))
        gain, low, high = report.elo_gain(ours, start, 200, seed=k)
        held += low <= truth <= high
        widths.append(high - low)
    assert held >= 87, f"{held} of 100 intervals of 95 % hold the truth"
    deviation = 400/math.log(10)*sum(1/(200*x*(1 - x)) for x in (p, q))**.5         # of 200 games a side, in Elo
    assert np.mean(widths) == pytest.approx(2*1.96*deviation, rel=.15), "and are not wider than they need be"

def points(n, of=100): return PairedScore([[1, 1]]*n + [[0, 0]]*(of - n))

def others(**shares): return {f"{who} against {name}": points(n) for name, ns in shares.items()
                              for who, n in zip(("old", "new"), ns)}

def first_lines(text): return [line for line in text.splitlines() if line.startswith("**")]

def test_a_report_begins_with_the_gain_against_others():
    level = PairedScore([[1, 0], [0, 1]]*50)
    text = report_text("r", Config(), [], {report.GREEDY: level} | others(weak=(25, 50), random=(50, 50)))
    said, lines = first_lines(text), text.splitlines()
    assert said[0].startswith("**Against others:** +95 [") and "the mean of 2 of those" in said[0]
    assert said[1].startswith("**Not shown") and "200 games each" in text
    rows = [line for line in lines if re.match(r"\| .*`", line)]
    assert rows[0].startswith("| Stockfish at level 0 of its rule for weak play (`weak`) | 0.250 [0.172, 0.34")
    assert "| 0.500 [0.40" in rows[0] and "| +191 [" in rows[0]
    assert rows[1].startswith("| random moves (`random`) | 0.500 [") and "| +0 [+0, +0] |" in rows[1]
    new_old = lines[lines.index("## New against old"):]
    assert not any("weak" in line for line in new_old) and f"- {report.GREEDY}: {level}" in new_old

def test_whoever_is_too_far_away_is_left_out_of_the_mean():
    "Always beaten, or never: the gain against the rest is not made smaller by them."
    near, far = others(weak=(25, 50)), others(strong=(0, 0), feeble=(100, 100))
    alone, beside = (report_text("r", Config(), [], x) for x in (near, near | far))
    assert first_lines(alone) == first_lines(beside) and "mean of 1 of" in beside
    assert beside.count("too far apart") == 2 and "| `strong` | 0.000" in beside
    nobody = first_lines(report_text("r", Config(), [], far))[0]
    assert "near enough" in nobody and "Elo" not in nobody

def test_a_gain_by_few_games_is_none():
    few = {f"{who} against weak": points(n, 4) for who, n in (("old", 1), ("new", 3))}
    text = report_text("r", Config(), [], few)
    assert first_lines(text)[0].startswith("**Against others:** too few games,") and "| too few games |" in text

def test_a_match_that_only_one_of_both_has_played_is_told_as_it_is():
    "The matches were stopped by a signal."
    match = PairedScore([[1, 0]]*4)
    text = report_text("r", Config(), [], {"old against weak": match})
    assert "Against others" not in text and f"- old against weak: {match}" in text

def test_games_against_others_stand_in_files_of_their_own(tmp_path):
    "Whatever their names are: paths that differ in their case, and long ones."
    from grpo_chess.matches import play_match
    (tmp_path/"games").mkdir()
    ends = "A/sf", "B/sf", "y"*300
    names = [f"{who} against engine:path=/x/{end},depth=1" for end in ends for who in ("old", "new")]
    matches = {name: play_match(random_player(0), random_player(1), random_openings(1, 0), 4, names=(name, "x"))
               for name in (report.FLOOR, *names)}
    write_report(tmp_path, "text", [], matches)
    files = {p.name: p.read_text() for p in (tmp_path/"games").iterdir()}
    assert {*files} == {"floor.pgn", *(f"other-{k}-{who}.pgn" for k in (1, 2, 3) for who in ("old", "new"))}
    assert all(name in files[f"other-{k//2 + 1}-{name[:3]}.pgn"] for k, name in enumerate(names))

def test_the_page_shows_games_of_the_new_policy(tmp_path):
    from grpo_chess.matches import play_match
    from grpo_chess.page import sample_games
    titles = [report.GREEDY, "old against a", "new against a", "old against b", "new against b"]
    matches = {title: play_match(random_player(0), random_player(1), random_openings(5, 0), 4) for title in titles}
    assert [title for title, *_ in sample_games(matches)] == [report.GREEDY, "new against a", "new against b",
                                                              report.GREEDY]

# The text

def test_a_long_list_of_actions_is_cut():
    rows = [dict(step=i, guard="stop: 1 of 2 updates; boost: x") for i in range(12)]
    rows += [dict(step=12, guard=""), dict(step=13)]
    text = guard_actions(rows)
    assert text.count("boost") == 10 and "and 2 more" in text and "early in 12 steps" in text
    assert guard_actions(rows[12:]) == ""

def test_a_report_counts_the_steps_that_learned():
    rows = [dict(step=k, plies=512, seconds=1., updates=49*(k > 2), ratio_error=0.) for k in range(5)]
    assert "2,560 plies judged, 2 steps that learned, 0.1 minutes" in report_text("r", Config(), rows)
    assert "2,560 plies trained on, 0.1 minutes" in report_text("r", Config(), [r | dict(updates=4) for r in rows])
    assert "| | first step | last step |" in report_text("r", Config(), rows)
    assert "| | first 2 steps | last 2 steps |" in report_text("r", Config(), [*rows, *rows, *rows, *rows])

def test_a_report_of_nothing_can_be_written(tmp_path):
    "A run that failed before its first step."
    text = report_text("r", Config(), [], notes=("Failed after 0 of 600 steps: x",))
    write_report(tmp_path, text, [])
    assert (tmp_path/"report.md").read_text() == text and "Failed after 0" in text
    assert not (tmp_path/"report.png").exists()

@pytest.mark.parametrize("points, says", [
    ([[1, 1], [1, .5]]*30, "**It learned:** +338 ["), ([[0, 0], [0, .5]]*30, "**It got worse:** -338 ["),
    ([[1, 0], [0, 1]]*30, "**Not shown to have learned:** +0 ["), ([[1, 1]]*50, "**It learned:** above +"),
    ([[1, 1]]*49, "**Too few games")])
def test_a_report_begins_with_what_was_learned(points, says):
    result = PairedScore(points)
    text = report_text("r", Config(), [], {report.SAMPLED: "more", report.GREEDY: result})
    verdict = next(line for line in text.splitlines() if line.startswith("**"))
    assert verdict.startswith(says) and "by the rules of chess" in verdict
    assert text.index(verdict) < text.index("## New against old")
    assert "**It" not in report_text("r", Config(), [], {report.SAMPLED: result})         # sharpening is no gain

def test_matches_stand_in_the_report_and_their_games_in_files(tmp_path):
    (tmp_path/"games").mkdir()
    from grpo_chess.matches import play_match
    result = play_match(random_player(0), random_player(1), random_openings(2, 0), 4, names=("new", "old"))
    assert isinstance(result, MatchResult)
    text = report_text("r", Config(init="x.safetensors"), [], {"sampling at T=1": result})
    write_report(tmp_path, text, [], {"sampling at T=1": result})
    assert f"- sampling at T=1: {result}" in text and "Old is what x.safetensors held." in text
    assert (tmp_path/"games/sampling.pgn").read_text() == result.pgn()
