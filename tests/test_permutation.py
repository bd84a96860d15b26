"""The permutation test over runs: it keeps its level, finds what is planted, and says what it cannot show."""

import itertools

import numpy as np
import pytest
import torch

from twins.attention import divergences
from twins.permutation import assignments, between_within, effect_of, permutation_test, sentence


def planted(runs, images, shift, seed, shared=0.0, spread=1.0):
    """Maps of runs that differ by seed, the second half also by `shift`: a list of [n 4 4].

    shared: the part of a seed's effect that run i of the first half has in common with run i of the second.
    spread: the size of a seed's effect in the second half, 1 in the first.
    """
    g = torch.Generator().manual_seed(seed)
    image, run = torch.randn(1, images, 16, generator=g), torch.randn(runs, 1, 16, generator=g)
    common = torch.randn(runs // 2, 1, 16, generator=g).repeat(2, 1, 1)
    run = shared**0.5 * common + (1 - shared) ** 0.5 * run
    run[runs // 2 :] *= spread
    run[runs // 2 :, :, :8] += shift
    logits = image + run + 0.3 * torch.randn(runs, images, 16, generator=g)
    return list(logits.softmax(-1).view(runs, images, 4, 4))


HALVES = {n: torch.arange(2 * n) // n for n in (3, 5, 7)}
SOME_SHARED = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 6, 7])


def rejects(maps, seeds):
    test = permutation_test(divergences(maps), HALVES[len(maps) // 2], seeds, 300, seed=0)
    assert test["exact"]
    return test["p"] <= 0.05


@pytest.mark.parametrize(
    "runs, seeds, shared",
    [
        (10, torch.arange(10), 0.0),  # 12 of 252 ways are 4.8 %
        (14, torch.arange(14) % 7, 0.9),  # 6 of 128 ways are 4.7 %
        (10, SOME_SHARED, 0.0),  # 4 of 80 ways are 5 %
    ],
)
def test_the_test_rejects_five_percent_where_nothing_differs(runs, seeds, shared):
    rejected = sum(rejects(planted(runs, 10, 0.0, i, shared), seeds) for i in range(200))
    assert 0.02 <= rejected / 200 <= 0.08  # two standard deviations are 3 %


def test_the_test_finds_a_planted_difference():
    assert sum(rejects(planted(10, 20, 3.0, i), torch.arange(10)) for i in range(20)) == 20
    assert sum(rejects(planted(14, 20, 3.0, i, shared=0.9), torch.arange(14) % 7) for i in range(20)) == 20


def test_a_group_counts_once_however_many_runs_it_has():
    d, groups = torch.zeros(5, 5), torch.tensor([0, 0, 0, 1, 1])
    d[:3, :3], d[3:, 3:], d[:3, 3:], d[3:, :3] = 0.2, 0.4, 0.5, 0.5  # 3 pairs, 1 pair, 6 pairs
    between, within = between_within(d, groups, torch.arange(5))
    assert between.item() == pytest.approx(0.5) and within.tolist() == pytest.approx([0.2, 0.4])
    assert effect_of(d, groups, torch.arange(5)).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "seeds, pairing, ways",
    [(range(6), "none", 20), ((0, 1, 2) * 2, "all", 8), ((0, 1, 2, 0, 1, 3), "some", 8)],
)
def test_p_is_the_share_of_all_assignments_that_keep_the_seeds(seeds, pairing, ways):
    """Against every permutation of the six runs that takes runs of one seed to runs of one seed."""
    maps, groups, seeds = planted(6, 50, 1.0, seed=0), HALVES[3], torch.tensor(seeds)
    d = divergences(maps)
    same = seeds[:, None] == seeds
    valid = set()
    for order in map(list, itertools.permutations(range(6))):
        if torch.equal(same[order][:, order], same):
            valid.add(tuple(groups[order].tolist()))
    assert len(valid) == ways
    assigned, exact = assignments(groups, seeds, 20, np.random.default_rng(0))
    assert exact and {tuple(row) for row in assigned.tolist()} == valid and len(assigned) == ways
    effects = [effect_of(d.double().mean(0), torch.tensor(row), seeds).item() for row in valid]
    test = permutation_test(d, groups, seeds, 20, seed=0)
    assert test["p"] == sum(effect >= test["effect"] - 1e-9 for effect in effects) / ways
    assert test["exact"] and test["paired"] == pairing and test["smallest_p"] == 2 / ways <= test["p"]
    drawn, exact = assignments(groups, seeds, ways - 1, np.random.default_rng(0))
    assert not exact and {tuple(row) for row in drawn.tolist()} <= valid
    many = permutation_test(d, groups, seeds, ways - 1, seed=0)
    assert not many["exact"] and many["smallest_p"] == 1 / ways


def test_random_assignments_are_uniform():
    groups, seeds = torch.arange(8) // 4, torch.tensor([0, 1, 2, 3, 0, 1, 4, 5])
    drawn, exact = assignments(groups, seeds, 20, np.random.default_rng(0))
    assert not exact and len(drawn) == 20  # of 2 * 2 * 6 ways
    drawn = torch.cat([assignments(groups, seeds, 23, np.random.default_rng(i))[0] for i in range(200)])
    counts = drawn.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 130 and counts.max() < 260  # 192 +- 14


@pytest.mark.parametrize("seeds", [range(6), (0, 1, 2, 0, 1, 2), (0, 1, 2, 0, 1, 3)])
def test_effect_interval_and_the_answer_in_words(seeds):
    maps, groups, seeds = planted(6, 200, 2.0, seed=0), HALVES[3], torch.tensor(seeds)
    d = divergences(maps)
    test = permutation_test(d, groups, seeds, 2000, seed=0)
    pairs = [(a, b) for a, b in itertools.combinations(range(6), 2) if seeds[a] != seeds[b]]
    within = np.mean([d[:, a, b].mean() for a, b in pairs if groups[a] == groups[b]])
    between = np.mean([d[:, a, b].mean() for a, b in pairs if groups[a] != groups[b]])
    assert test["between"] == pytest.approx(between, rel=1e-4) and test["within"] == pytest.approx(
        within, rel=1e-4
    )
    assert test["effect"] == pytest.approx(between - within, rel=1e-3)
    each = [d[i, 0, 4] - d[i, 0, 1] for i in range(200)]  # spreads about as one image's effect, or more
    low, high = test["interval95"]
    assert low < test["effect"] < high and high - low < 4 * np.std(each) / 200**0.5
    answer = sentence(test, ["a", "b"])
    assert "No difference" in answer and "train more seeds" in answer and "exact p = " in answer
    assert ("paired where groups share a seed" in answer) == (test["paired"] == "some")
    assert "differ by more than seeds do" in sentence({**test, "p": 0.01}, ["a", "b"])


def test_a_difference_in_spread_is_said_beside_p():
    for spread, expected in ((1.0, False), (0.4, True)):
        tests = []
        for i in range(10):
            d = divergences(planted(10, 10, 0.0, i, spread=spread))
            tests.append(permutation_test(d, HALVES[5], torch.arange(10), 300, seed=0))
        assert sum(test["spread_differs"] == expected for test in tests) >= 9
    assert "spread differently" in sentence(tests[0], ["a", "b"]) and "alone could" in sentence(
        tests[0], ["a", "b"]
    )
    assert tests[0]["within_groups"][0] > 1.5 * tests[0]["within_groups"][1]


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_one_run_each_is_a_divergence_and_no_answer(seeds):
    d = divergences(planted(2, 20, 2.0, seed=0))
    alone = permutation_test(d, torch.tensor([0, 1]), torch.tensor(seeds), 100, seed=0)
    assert alone == {"between": pytest.approx(d[:, 0, 1].mean().item())}
    assert "cannot be said" in sentence(alone, ["a", "b"])
