"What a run says of itself: intervals that know that steps are alike, matches that are what they are called."
import math

import numpy as np
import pytest

from grpo_chess import report
from grpo_chess.config import Config, MatchConfig
from grpo_chess.matches import MatchResult
from grpo_chess.model import MODELS, ChessTransformer
from grpo_chess.players import random_openings, random_player
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

def test_a_column_without_values_is_left_out():
    rows = [dict(x=None, ratio_error=0., plies=1, seconds=1., entropy=1., step=i) for i in range(30)]
    text = report_text("r", Config(), rows)
    assert "`entropy`" in text and "`expected_regret`" not in text and "batch means" in text

# Matches

def spied(monkeypatch, cfg, seed=0, pool=None, floor=None):
    "What `matches_of` asks for."
    asked = []
    def spy(a, b, openings, max_plies, judge, depth, names):
        asked.append(dict(a=a, b=b, openings=openings, max_plies=max_plies, judge=judge, depth=depth, names=names))
    def player(policy, greedy, seed, repeats=True):
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

# The text

def test_a_long_list_of_actions_is_cut():
    rows = [dict(step=i, guard="stop: 1 of 2 updates; boost: x") for i in range(12)]
    rows += [dict(step=12, guard=""), dict(step=13)]
    text = guard_actions(rows)
    assert text.count("boost") == 10 and "and 2 more" in text and "early in 12 steps" in text
    assert guard_actions(rows[12:]) == ""

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
