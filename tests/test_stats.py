import math

import numpy as np
import pytest

from grpo_chess.stats import (
    PairedScore, SprtConfig, elo, evidence, expected_score, fit_rating, normalized_elo, score_interval, series_mean,
    sprt)

RATINGS = {0: 1320, 1: 1468, 2: 1608, 3: 1742, 4: 1923, 5: 2204}


def wandering(rng, reps, n, alike):
    "AR(1) series with mean 0, variance 1 and lag-1 correlation `alike`: [reps, n]."
    x = np.empty((reps, n))
    x[:, 0] = rng.normal(size=reps)
    for t in range(1, n): x[:, t] = alike*x[:, t - 1] + math.sqrt(1 - alike**2)*rng.normal(size=reps)
    return x

@pytest.mark.parametrize("n, alike, least", [
    (300, 0, .93), (300, .72, .93), (300, .87, .92), (100, .72, .91), (100, .87, .87)])
def test_the_mean_of_a_series_lies_in_its_interval(n, alike, least):
    "Coverage on AR(1) noise like that of training curves, whose neighbouring steps correlate by 0.72 to 0.87."
    found = [series_mean(x) for x in wandering(np.random.default_rng(0), 2000, n, alike)]
    assert least < np.mean([abs(mean) <= half for mean, half in found]) < .97
    textbook = [1.96*x.std(ddof=1)/math.sqrt(n) for x in wandering(np.random.default_rng(0), 2000, n, alike)]
    if alike: assert np.mean([abs(mean) <= half for (mean, _), half in zip(found, textbook)]) < .7

def test_series_mean_by_hand():
    "Five pieces with means 1 to 5: standard error sqrt(2.5/5), times Student's 2.776."
    mean, half = series_mean(np.repeat([1., 2, 3, 4, 5], 4))
    assert mean == 3 and half == pytest.approx(2.776*math.sqrt(2.5/5))
    assert series_mean([2.]*40) == (2., 0.)
    mixed = series_mean([1, 2, 3, 4, 5]*4)              # the same values, in an order that has no trend
    assert mixed[0] == 3 and mixed[1] < .5*half

@pytest.mark.parametrize("alike", (0, .5, .9))
@pytest.mark.parametrize("n", (10, 20, 33, 66))
def test_where_neighbours_are_alike_too_long_there_is_no_interval(n, alike):
    "Two series of one process must not often differ by more than their intervals say; without `strict` they do."
    series = [(a, b) for a, b in zip(*(wandering(np.random.default_rng(k), 400, n, alike) for k in (1, 2)))]
    def apart(**how):
        pairs = [(series_mean(a, **how), series_mean(b, **how)) for a, b in series]
        return np.mean([abs(a - b) > math.hypot(s, t) for (a, s), (b, t) in pairs])
    assert apart(strict=True) < .07
    if alike == .9 and n < 60: assert apart() > .15

def test_short_series_have_a_mean_and_no_interval():
    for values in ([], [1.], [1., 2.]*4):
        mean, half = series_mean(values)
        assert math.isnan(half) and math.isnan(mean) == (not values)
    assert math.isfinite(series_mean([1., 2.]*5)[1])


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
    "About 95 of 100 intervals hold the true score, near the floor too, where the textbook's do in as few as 60."
    rng, value = np.random.default_rng(1), np.arange(5)/4
    truth, hits = float(np.dot(p, value)), 0
    for _ in range(400):
        x = value[rng.choice(5, pairs, p=p)]
        limit = -2*math.log(.05) if x.min() == x.max() else 3.8415
        hits += evidence(x, truth) <= limit
    assert hits/400 > .92
    lo, hi = score_interval(x)                                          # and the interval is that very set
    assert (lo <= truth <= hi) == (evidence(x, truth) <= limit)

def test_elo():
    assert elo(.5) == 0 and elo(.75) == pytest.approx(190.85, abs=.01) and elo(.25) == pytest.approx(-elo(.75))
    assert elo(10/11) == pytest.approx(400) and elo(0) == -math.inf and elo(1) == math.inf

def test_normalized_elo_by_its_definition():
    count = np.array([39, 8843, 26675, 9240, 44])                       # pairs with 0 to 2 points in 89,682 games
    x = np.repeat(np.arange(5)/4, count)
    value, lo, hi = normalized_elo(x)
    sd = math.sqrt(2*x.var())                                            # of a game
    assert value == pytest.approx((x.mean() - .5)/sd*800/math.log(10))
    small = 2*1.96*800/math.log(10)/math.sqrt(2*len(x))                  # small differences: the noise of 2n games
    assert hi - lo == pytest.approx(small, rel=.01)
    mirrored = normalized_elo(1 - x)
    assert mirrored[0] == pytest.approx(-value) and mirrored[1] == pytest.approx(-hi)

def test_normalized_elo_without_spread():
    assert normalized_elo(np.ones(8)) == (math.inf, -math.inf, math.inf)
    assert normalized_elo(np.full(8, .5))[0] == 0 and normalized_elo(np.zeros(3))[0] == -math.inf

@pytest.mark.parametrize("p", [[.05, .2, .5, .2, .05], [.1, .1, .3, .2, .3], [.5, .3, .1, .05, .05]])
def test_normalized_elo_covers(p):
    rng, value = np.random.default_rng(3), np.arange(5)/4
    sd = math.sqrt(np.dot(p, value**2) - np.dot(p, value)**2)
    truth = (np.dot(p, value) - .5)/sd*800/math.log(10)/math.sqrt(2)
    spans = [normalized_elo(value[rng.choice(5, 150, p=p)]) for _ in range(800)]
    assert .92 < np.mean([lo <= truth <= hi for _, lo, hi in spans]) < .975

def test_llr_is_the_ratio_of_best_likelihoods():
    "Against a search over distributions on the five results with the wanted mean, by exponential tilting of the data."
    count, cfg = np.array([12, 30, 50, 40, 18]), SprtConfig(elo0=0, elo1=30)
    value, p = np.arange(5)/4, count/count.sum()
    def best(mu):       # likelihood's maximum under the mean mu: p/(1 + lambda (x - mu))
        lam = np.linspace(-1/(1 - mu) + 1e-6, 1/mu - 1e-6, 400_001)
        q = p[:, None]/(1 + lam*(value[:, None] - mu))
        off = np.abs((q*(value[:, None] - mu)).sum(0))
        return (count*np.log(q[:, off.argmin()])).sum()
    want = best(expected_score(30)) - best(.5)
    assert sprt(np.repeat(value, count), cfg).llr == pytest.approx(want, abs=1e-3)

def test_sprt_bounds_and_words():
    empty = sprt(np.empty(0), SprtConfig())
    assert empty.lower == pytest.approx(math.log(.05/.95)) and empty.upper == pytest.approx(math.log(.95/.05))
    assert empty.accepted is None and "undecided after 0 games" in str(empty)
    won, lost = sprt(np.ones(200), SprtConfig()), sprt(np.zeros(200), SprtConfig())
    assert won.accepted == 20 and lost.accepted == 0 and won.games == 400
    assert "Elo +20 accepted after 400 games" in str(won)
    uneven = sprt(np.empty(0), SprtConfig(alpha=.01, beta=.2))
    assert uneven.upper == pytest.approx(math.log(.8/.01)) and uneven.lower == pytest.approx(math.log(.2/.99))

@pytest.mark.parametrize("kw", [dict(elo0=5, elo1=5), dict(alpha=0), dict(beta=.6), dict(batch=3), dict(batch=0)])
def test_bad_sprt(kw):
    with pytest.raises(ValueError, match="sprt."): SprtConfig(**kw)

def unfair(rng, pairs):
    "Results of equal players from openings that favour one colour: [pairs, 2]."
    luck = rng.normal(0, 3., (pairs, 1))*np.array([1, -1])
    return np.digitize(luck + rng.normal(0, 1, (pairs, 2)), [-.5, .5])/2

def test_the_unit_is_the_pair():
    rng = np.random.default_rng(0)
    x = unfair(rng, 100)
    r = PairedScore(x)
    assert r.interval == score_interval(x.mean(1)) and r.stderr == pytest.approx(x.mean(1).std(ddof=1)/10)
    single = score_interval(x.ravel())
    assert r.interval[1] - r.interval[0] < .7*(single[1] - single[0])
    alike = PairedScore(np.repeat(rng.choice([0, .5, 1], 100), 2))      # the other way: both games of a pair end alike
    single = score_interval(alike.scores)
    assert alike.interval[1] - alike.interval[0] > 1.3*(single[1] - single[0])

def test_coverage_of_match_results():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(60):
        lo, hi = PairedScore(unfair(rng, 64)).interval
        hits += lo <= .5 <= hi
    assert 53 <= hits

def test_one_line():
    r = PairedScore([1, .5, 1, 0, .5, .5, 1, 1])
    assert r.score == 5.5/8 and r.pentanomial == [0, 0, 2, 1, 1] and (r.wins, r.draws, r.losses) == (4, 3, 1)
    assert str(r).startswith("8 games +4 =3 -1, score 0.688 [") and ", Elo +137 [" in str(r) and "\n" not in str(r)
    assert r.elo_interval == (elo(r.interval[0]), elo(r.interval[1])) and r.nelo == normalized_elo(r.pairs)
    assert str(PairedScore([0]*64)) == "64 games +0 =0 -64, score 0.000 [0.000, 0.089], Elo below -403"
    assert str(PairedScore([1]*64)) == "64 games +64 =0 -0, score 1.000 [0.911, 1.000], Elo above +403"
    assert str(PairedScore([])) == "no games" and math.isnan(PairedScore([]).score)

def test_a_rating_is_recovered():
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        won = {level: rng.random(120) < expected_score(1500 - RATINGS[level]) for level in (0, 1, 3)}
        fit = fit_rating({level: x.reshape(60, 2).mean(1) for level, x in won.items()}, RATINGS)
        found.append((fit.elo, fit.interval[0] <= 1500 <= fit.interval[1], fit.misfit))
    elos, held, misfit = map(np.array, zip(*found))
    assert abs(elos.mean() - 1500) < 25 and held.mean() >= .85 and .8 < misfit.mean() < 4

def test_a_rating_from_one_opponent_is_the_match():
    r = PairedScore(np.random.default_rng(1).choice([0, .5, 1], 80))
    fit = fit_rating({2: r.pairs}, RATINGS)
    assert abs(fit.elo - (RATINGS[2] + elo(r.score))) <= 5 and fit.misfit < .1
    assert np.allclose(fit.interval, [RATINGS[2] + e for e in r.elo_interval], atol=11)

def test_ratings_at_the_ends():
    lost, won = fit_rating({0: np.zeros(20), 1: np.zeros(20)}, RATINGS), fit_rating({4: np.ones(20)}, RATINGS)
    assert lost.elo == -math.inf == lost.interval[0] and lost.interval[1] < 1200 and "below" in str(lost)
    assert won.elo == math.inf == won.interval[1] and won.interval[0] > 2000 and "above" in str(won)
    fits, odd = (fit_rating({0: np.full(8, a), 5: np.full(8, 1. - a)}, RATINGS) for a in (1., 0.))
    assert fits.misfit < 3 < 20 < odd.misfit
    assert "no one rating fits" in str(odd) and "no one rating fits" not in str(fits)
