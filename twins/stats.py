"""Statistics of a few runs: paired differences, exact tests, intervals, the best of n random settings.

Pure functions of numpy arrays. Few runs say little: the smallest two-sided p of n pairs is 2 / 2^n.
"""

from itertools import product
from math import comb, inf, sqrt

import numpy as np

EXACT = 16  # pairs up to which all sign flips are enumerated
RESAMPLES = 10_000
# Student's 97.5 % quantiles for 1 to 14 degrees of freedom; about 1.96 + 2.4 / degrees from there on
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def t_interval(values):
    """(low, high), the 95 % interval of the mean of values [n], by Student's t; infinite for one value.

    It covers the mean in 95 % of cases if the values are normal, however few they are. The percentile
    bootstrap, which is common for many values, does so in 75 % for n = 3 and 87 % for n = 6.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return -inf, inf
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.4 / (n - 1)
    half = t * values.std(ddof=1) / sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip_p(differences):
    """Two-sided p of paired differences [n] with mean 0: the share of sign flips with as large a mean.

    Exact for n <= 16 (all 2^n flips), else 10,000 random ones. Its assumption is that each difference is as
    likely as its negative.
    """
    differences = np.asarray(differences, float)
    n = len(differences)
    if n <= EXACT:
        signs = np.array(list(product((1, -1), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice([1, -1], size=(RESAMPLES, n))
        signs[0] = 1  # the observed one counts, so p is never 0
    means = np.abs(signs @ differences)
    return float((means >= abs(differences.sum()) - 1e-12).mean())


def holm(ps):
    """p values [m] -> those corrected for m tests at once (Holm 1979), in the same order."""
    order, corrected, largest = np.argsort(ps), np.empty(len(ps)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected.tolist()


def expected_best(values):
    """[k] trials -> [k]: expected maximum of n of them drawn without replacement, n = 1 to k.

    Unbiased for the best of n new trials (the estimator of Tang et al., 2004.13705, for the curve of Dodge et
    al., 1909.03004).
    """
    values = np.sort(np.asarray(values, float))
    k = len(values)
    best = []
    for n in range(1, k + 1):
        weights = [comb(i, n - 1) / comb(k, n) for i in range(k)]  # value i is the largest of the n
        best.append(float(values @ weights))
    return best


def wilson_interval(count, n, z=1.96):
    """(low, high) of a share: `count` of n, 95 % (Wilson 1927)."""
    share, shrink = count / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / shrink
    half = z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / shrink
    return max(middle - half, 0.0), min(middle + half, 1.0)


def verdict(interval, learned, margin=-0.02):
    """Whether a mechanism can go, from the interval of the accuracy without it less that with it.

    learned: the accuracy with it less that of random weights. Below twice the margin there is little to lose.
    """
    low, high = interval
    if learned < -2 * margin:
        return "too little learned"
    if low > margin:
        return "can go"
    return "cannot go" if high < margin else "unclear"
