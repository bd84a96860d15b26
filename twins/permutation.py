"""A permutation test over runs: do groups of runs differ by more than runs of one group do?

    d[r, s] = distance between two runs
    effect = mean d between groups - mean over groups of the mean d within
    p = share of the assignments of runs to groups that have at least this effect

Whole runs are permuted: permuting images would mistake two seeds of one script for two scripts. Runs of one
seed start from the same weights and see the same views, so they are never compared, and runs are permuted
within their seed; seeds with equally many runs are also permuted as blocks. The test is paired if all groups
have the same seeds, unpaired if no two runs share a seed. Its null hypothesis is equal distributions, so it
also rejects groups that differ in spread alone.

Letters in shapes:  n images  r runs  g groups  w assignments of runs to groups
"""

import math
from collections import Counter
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

SPREAD = 1.5  # ratio of within-group divergences above which the spread alone could explain a small p


def between_within(d, groups, seeds):
    """Mean d [... r r] between groups [...] and within each [... g]; groups int64 [... r], seeds int64 [r].

    Pairs with the same seed do not count. NaN where there is no pair.
    """
    counts = (seeds[:, None] != seeds).double()
    member = F.one_hot(groups).double()
    d = d.double() * counts
    sums = (member * (d @ member)).sum(-2)
    pairs = (member * (counts @ member)).sum(-2)
    between = (d.sum((-2, -1)) - sums.sum(-1)) / (counts.sum() - pairs.sum(-1))
    return between, sums / pairs


def effect_of(d, groups, seeds):
    """between - within of between_within(), with equal weight for each group -> [...]."""
    between, within = between_within(d, groups, seeds)
    return between - within.nanmean(-1)


def arrangements(items):
    """All distinct orders of a list that may hold equal items."""
    if not items:
        yield ()
    for first in sorted(set(items)):
        rest = list(items)
        rest.remove(first)
        for tail in arrangements(rest):
            yield (first, *tail)


def arrangements_of_rows(rows):
    """All distinct orders of rows and of the items within each row."""
    for order in arrangements(rows):
        yield from product(*map(arrangements, order))


def count_arrangements(items):
    return math.factorial(len(items)) // math.prod(math.factorial(n) for n in Counter(items).values())


def assignments(groups, seeds, permutations, rng):
    """Groups of runs under the null hypothesis, int64 [w r], and whether they are all that there are.

    groups, seeds: int64 [r]. If there are more than `permutations`, that many are drawn at random.
    """
    runs_of_seed = [(seeds == seed).nonzero()[:, 0].numpy() for seed in seeds.unique()]
    sizes = sorted({len(runs) for runs in runs_of_seed})
    blocks = [np.stack([runs for runs in runs_of_seed if len(runs) == n]) for n in sizes]  # [seeds, n] each
    labels = [groups.numpy()[block] for block in blocks]
    rows = [sorted(tuple(sorted(row)) for row in block.tolist()) for block in labels]
    ways = math.prod(count_arrangements(r) * math.prod(map(count_arrangements, r)) for r in rows)
    exact = ways <= permutations
    assigned = np.empty((ways if exact else permutations, len(groups)), dtype=np.int64)
    if exact:
        for i, arrangement in enumerate(product(*map(arrangements_of_rows, rows))):
            for block, values in zip(blocks, arrangement, strict=True):
                assigned[i, block.ravel()] = np.ravel(values)
    else:
        for block, values in zip(blocks, labels, strict=True):
            orders = rng.random((permutations, len(block))).argsort(1)
            shuffled = rng.permuted(values[orders], axis=2)
            assigned[:, block.ravel()] = shuffled.reshape(permutations, -1)
    return torch.from_numpy(assigned), exact


def pairing(groups, seeds):
    """Whether the groups int64 [r] have the same seeds int64 [r]: "all", "some" or "none"."""
    sharing = {len(groups[seeds == seed].unique()) for seed in seeds.unique()}
    if sharing == {len(groups.unique())}:
        return "all"
    return "none" if sharing == {1} else "some"


def permutation_test(d, groups, seeds, permutations, seed):
    """The test on d [n r r] of n images, groups and seeds int64 [r], with a bootstrap interval over images.

    Returns {between, within, within_groups [g], effect, ratio, interval95, paired, p, exact, smallest_p,
    spread_differs}; smallest_p is the smallest that these runs could give. Only `between` is returned if no
    group has two runs with different seeds.
    """
    groups = groups.unique(return_inverse=True)[1]
    rng = np.random.default_rng((seed, 5))
    mean = d.double().mean(0)
    between, within_groups = between_within(mean, groups, seeds)
    within = within_groups.nanmean()
    if not (between.isfinite() and within.isfinite()):
        every_pair = torch.arange(len(seeds))
        return {"between": between_within(mean, groups, every_pair)[0].item()}
    assigned, exact = assignments(groups, seeds, permutations, rng)
    effect = between - within
    effects = effect_of(mean, assigned, seeds)
    as_large = (effects >= effect - 1e-9).sum().item()
    largest = (effects >= effects.max() - 1e-9).sum().item()
    by_image = effect_of(d, groups, seeds)  # [n]
    samples = by_image[torch.from_numpy(rng.integers(len(d), size=(2000, len(d))))].mean(1)
    spreads = within_groups[within_groups.isfinite()]
    return {
        "between": between.item(),
        "within": within.item(),
        "within_groups": [w.item() if w.isfinite() else None for w in within_groups],
        "effect": effect.item(),
        "ratio": (between / within).item(),
        "interval95": samples.quantile(torch.tensor([0.025, 0.975]).double()).tolist(),
        "paired": pairing(groups, seeds),
        "p": as_large / len(effects) if exact else (1 + as_large) / (1 + permutations),
        "exact": exact,
        "smallest_p": largest / len(effects) if exact else 1 / (1 + permutations),
        "spread_differs": (spreads.max() > SPREAD * spreads.min()).item(),
    }


def sentence(test, names, level=0.05):
    """The result of permutation_test() on attention maps, in words; names: of the groups, in order."""
    if "p" not in test:
        return (
            f"The attention maps of {', '.join(names)} differ by {test['between']:.3f} bits. Whether "
            "another seed would change them as much cannot be said: give each method two runs or more, of "
            "different seeds, --ckpt=name=RUN:RUN,..."
        )
    low, high = test["interval95"]
    paired = {"all": ", paired by seed", "some": ", paired where groups share a seed", "none": ""}
    figures = (
        f"{test['between']:.3f} bits between scripts, {test['within']:.3f} between seeds of one "
        f"({test['ratio']:.2f} times; effect {test['effect']:.3f} bits, {low:.3f} to {high:.3f} over images)"
        f", {'exact p' if test['exact'] else 'p'} = {test['p']:.2g}{paired[test['paired']]}"
    )
    maps = f"the attention maps of {', '.join(names)}"
    if test["p"] <= level:
        answer = f"T{maps[1:]} differ by more than seeds do: {figures}."
    else:
        answer = f"No difference between {maps} is shown beyond that between seeds: {figures}."
        if test["smallest_p"] > level:
            least = f"{test['smallest_p']:.2g}"
            answer += f" These runs cannot give a p below {least}: train more seeds, the same for all."
    if test["paired"] == "some":
        answer += " The scripts share only some of their seeds; the same seeds for all make a stronger test."
    if test["spread_differs"]:
        within = zip(names, test["within_groups"], strict=True)
        spreads = ", ".join(f"{name} {bits:.3f}" for name, bits in within if bits is not None)
        answer += f" Seeds spread differently ({spreads} bits), which alone could make p small."
    return answer
