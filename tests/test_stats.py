import math

import numpy as np
import pytest

from grpo_chess.stats import series_mean


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

def test_short_series_have_a_mean_and_no_interval():
    for values in ([], [1.], [1., 2.]*4):
        mean, half = series_mean(values)
        assert math.isnan(half) and math.isnan(mean) == (not values)
    assert math.isfinite(series_mean([1., 2.]*5)[1])
