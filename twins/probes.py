"""Probes of features: converged softmax regression, k-NN, selection on held-out training images.

    E = C + 1e-4 tr(C) / d I, scaled to mean 1 in the penalty      C = covariance of the training features
    x <- (x - mean) E^(-1/2)
    min over W, bias:  mean cross-entropy(x W + bias) + strength / 2 |E^(-1/4) W|^2

Whitening preconditions the problem, so L-BFGS needs tens of steps where SGD needs thousands. The penalty
is that of half-whitened features: one on W itself would trust directions of small variance too much.

Letters in shapes:  n m images  d width of a feature  c classes
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from twins.errors import UserError
from twins.monitor import knn
from twins.stats import wilson_interval

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of the L2 penalty; each fit starts from the previous one
NEIGHBOURS = (10, 20, 100, 200)


def balanced(labels, share, seed):
    """Indices of a random `share` of each class, at least one image, and of the rest: two int64 [m]."""
    rng = np.random.default_rng((seed, 3))
    in_share = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = max(round(share * len(members)), 1)
        in_share[members[rng.permutation(len(members))[:count]]] = True
    return in_share.nonzero()[:, 0], (~in_share).nonzero()[:, 0]


def whitening(x):
    """Mean [d] and matrix [d d] that whiten the features x [n d], (x - mean) @ matrix; E^(-1/2) [d 1]."""
    mean = x.mean(0)
    covariance = ((x - mean).T @ (x - mean) / len(x)).cpu().double()
    values, vectors = torch.linalg.eigh(covariance)
    e = values.clamp(min=0) + 1e-4 * values.mean() + 1e-12
    return mean, (vectors * e.rsqrt()).to(x), (e / e.mean()).rsqrt()[:, None].to(x)


def fit(x, labels, penalty, probe):
    """Softmax regression by L-BFGS: x [n d], labels int64 [n], L2 penalty, a float or [d 1] -> a probe.

    A probe is (weight [d c], bias [c]); L-BFGS starts from the one given. It stops when a step improves the
    loss by less than 1e-5 nats, or after 200 steps.
    """
    weight, bias = (parameter.clone().requires_grad_() for parameter in probe)
    options = {"max_iter": 200, "tolerance_grad": 1e-6, "tolerance_change": 1e-5, "history_size": 10}
    optimizer = torch.optim.LBFGS([weight, bias], **options, line_search_fn="strong_wolfe")

    def loss_and_gradient():
        optimizer.zero_grad()
        loss = (penalty * weight.square()).sum() / 2
        loss.backward()
        for rows, targets in zip(x.split(4096), labels.split(4096), strict=True):  # the logits stay small
            ce = F.cross_entropy(logits(rows, (weight, bias)), targets, reduction="sum") / len(x)
            ce.backward()
            loss = loss.detach() + ce.detach()
        return loss

    optimizer.step(loss_and_gradient)
    return weight.detach(), bias.detach()


def logits(x, probe):
    """Features [n d] and a probe -> logits [n c]."""
    weight, bias = probe
    return x @ weight + bias


def hit_rate(scores, labels, top=1):
    """Share of the rows of scores [n c] whose label is among the `top` largest; -inf is never among them."""
    first = scores.topk(min(top, scores.shape[1]), 1)
    hits = (first.indices == labels[:, None]) & (first.values > -torch.inf)
    return hits.any(1).float().mean().item()


def accuracies(scores, labels):
    """A test result from scores [n c] and labels [n]: {top1, top5, interval95}."""
    n = len(labels)
    top1 = hit_rate(scores, labels)
    return {"top1": top1, "top5": hit_rate(scores, labels, 5), "interval95": wilson_interval(top1 * n, n)}


def linear_probe(x, labels, held_out, rest, test, test_labels, classes, name=""):
    """Result of one linear protocol: features x [n d] and test [m d]; held_out, rest: rows of x, int64."""
    mean, matrix, scale = whitening(x)
    x, test = (x - mean) @ matrix, (test - mean) @ matrix
    probe = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
    rest_x, rest_labels, held_out_labels = x[rest], labels[rest], labels[held_out]
    grid, probes = [], []
    for strength in tqdm(STRENGTHS, f"selecting {name}", unit=" strengths", leave=False, delay=1):
        probe = fit(rest_x, rest_labels, strength * scale, probe)
        scores = logits(x[held_out], probe)
        accuracy = hit_rate(scores, held_out_labels)
        loss = F.cross_entropy(scores, held_out_labels).item()  # it selects: less noisy than the accuracy
        grid.append({"strength": strength, "held_out": accuracy, "held_out_loss": loss})
        probes.append(probe)
    selected = min(range(len(grid)), key=lambda i: grid[i]["held_out_loss"])
    probe = fit(x, labels, STRENGTHS[selected] * scale, probes[selected])
    return {"selected": grid[selected], "grid": grid, **accuracies(logits(test, probe), test_labels)}


def nearest_neighbours(x, labels, held_out, rest, test, test_labels):
    """Result of k-NN; arguments as in linear_probe(). A class without a vote scores log 0 = -inf."""
    grid = []
    for k in NEIGHBOURS:
        votes = knn(x[rest], labels[rest], x[held_out], k)
        grid.append({"k": k, "held_out": hit_rate(votes.log(), labels[held_out])})
    selected = max(grid, key=lambda row: row["held_out"])
    votes = knn(x, labels, test, selected["k"])
    return {"selected": selected, "grid": grid, **accuracies(votes.log(), test_labels)}


def evaluate_probes(train, labels, test, test_labels, classes, seed=0):
    """{protocol: result} from {protocol: features [n d]}, labels int64 [n]. UserError for too few labels."""
    held_out, rest = (rows.to(labels.device) for rows in balanced(labels.cpu(), 0.1, seed))
    if len(rest) < classes:
        few = f"{len(labels)} labels of {classes} classes are too few to hold some out"
        raise UserError(f"{few}: a probe needs at least two of each class")
    results = {}
    for name, x in train.items():
        results[name] = linear_probe(x, labels, held_out, rest, test[name], test_labels, classes, name)
    cls, test_cls = train["linear"], test["linear"]
    results["knn"] = nearest_neighbours(cls, labels, held_out, rest, test_cls, test_labels)
    return results
