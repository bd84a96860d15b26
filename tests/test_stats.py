"""twins/stats.py against planted data, hand-worked examples and brute force."""

from itertools import combinations
from math import inf

import numpy as np
import pytest

from twins.stats import expected_best, holm, sign_flip_p, t_interval, verdict, wilson_interval


def test_sign_flip_is_calibrated_and_has_power():
    rng = np.random.default_rng(1)
    null = np.array([sign_flip_p(rng.normal(size=6)) for _ in range(2000)])
    assert 0.02 < (null <= 0.05).mean() < 0.045  # exact level of 6 pairs: 2 / 64 = .031
    assert (null <= 2 / 64).mean() == (null <= 0.05).mean() and null.min() == 2 / 64
    planted = [sign_flip_p(rng.normal(1.5, 1, size=8)) for _ in range(300)]
    assert np.mean(np.array(planted) <= 0.05) > 0.9


def test_sign_flip_by_hand():
    assert sign_flip_p([1, 2, 4]) == 2 / 8
    assert sign_flip_p([3, 2, -1]) == 4 / 8  # |sum| >= 4: +++ 4 flips of sums 6, 4 and their negatives
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p(np.ones(17)) < 0.001  # random flips above 16 pairs


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # p.adjust of R
    assert holm([0.6, 0.5]) == [1.0, 1.0]


def test_expected_best_is_the_mean_over_all_choices():
    values = [0.3, 0.1, 0.5, 0.2, 0.2]
    for n, best in enumerate(expected_best(values), 1):
        assert best == pytest.approx(np.mean([max(chosen) for chosen in combinations(values, n)]))


def test_t_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    for n in (2, 3, 6, 12, 20):
        intervals = [t_interval(rng.normal(1, 2, size=n)) for _ in range(4000)]
        covered = np.mean([low <= 1 <= high for low, high in intervals])
        assert abs(covered - 0.95) < 0.012, (n, covered)


def test_t_interval_by_hand():
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert t_interval([0.1]) == (-inf, inf) and verdict(t_interval([0.1]), 1) == "unclear"


def test_wilson_by_hand():
    assert wilson_interval(0, 16) == pytest.approx((0, 0.1936), abs=1e-3)
    assert wilson_interval(8, 16) == pytest.approx((0.280, 0.720), abs=1e-3)


def test_the_verdict_follows_its_rule():
    assert verdict((-0.019, 0.05), 0.05) == "can go"
    assert verdict((-0.09, -0.021), 0.05) == "cannot go"
    assert verdict((-0.03, 0.01), 0.05) == "unclear"
    assert verdict((-0.019, 0.05), 0.039) == "too little learned"  # all of it could be lost
