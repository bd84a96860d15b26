"""Monitoring of a run: features and their k-NN accuracy, signs of collapse."""

import math

import torch
import torch.nn.functional as F

from twins.datasets import from_bytes, normalise, resize
from twins.errors import UserError
from twins.processes import global_mean, map_shards

COLLAPSED_RANK = 0.25  # a run collapsed if its RankMe is below this share of random weights'
NO_INFORMATION = 0.01  # nats: below it, the teacher's output is the same for all images


def features(backbone, images, indices, device, autocast, batch_size=500, size=0):
    """[CLS] features float32 [m d] of the images uint8 [n 3 s s] at indices int64 [m], resized to `size`."""

    def cls_features(batch):
        pixels = images[batch]
        if size and size != pixels.shape[-1]:
            pixels = resize(pixels, size, "bicubic")
        return backbone(normalise(from_bytes(pixels.to(device))))

    was_training = backbone.training
    backbone.eval()
    z = map_shards(cls_features, indices, autocast, "k-NN features", batch_size, leave=False)
    backbone.train(was_training)
    return z


def knn(bank, bank_labels, queries, k=20, temperature=0.07):
    """Weighted k-NN (Wu et al., 1805.01978): features [n d], labels [n], queries [m d] -> votes [m classes].

    A query's k nearest bank images by cosine vote with weight exp(cosine / temperature); the prediction is
    the argmax. Only a class without a vote has 0.
    """
    bank = F.normalize(bank, dim=1)
    votes = []
    for chunk in F.normalize(queries, dim=1).split(1000):
        similar, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        empty = similar.new_zeros(len(chunk), int(bank_labels.max()) + 1)
        votes.append(empty.scatter_add_(1, bank_labels[nearest], (similar / temperature).exp()))
    return torch.cat(votes)


def evaluate(backbone, data, bank, queries, device, autocast):
    """One evaluation row: knn (accuracy on the queries, absent without labels), feature_std, rank.

    data: Split; bank, queries: rows of it, int64 [m]. feature_std is the std of L2-normalised features, mean
    over columns, times sqrt(d): 1 when they fill the sphere, 0 when they collapse (SimSiam, 2011.10566).
    rank is RankMe (2210.02885) of these features: exp of the entropy of their singular values.
    """
    row = {}
    z = features(backbone, data.images, bank, device, autocast, size=data.image_size)
    if len(queries):
        z_queries = features(backbone, data.images, queries, device, autocast, size=data.image_size)
        votes = knn(z, data.labels[bank].to(device), z_queries)
        row["knn"] = (votes.argmax(1) == data.labels[queries].to(device)).float().mean()
    if not z.isfinite().all():
        raise UserError("the features are not finite: try a lower --base_lr")
    z = F.normalize(z[:4096], dim=1)
    p = torch.linalg.svdvals(z)
    p = p / p.sum().clamp(min=1e-12) + 1e-7  # all features may be 0
    row["feature_std"] = z.std(0).mean() * z.shape[1] ** 0.5
    row["rank"] = (-(p * p.log()).sum()).exp()
    return row


def not_finite(modules):
    """The first weight or gradient of {name: module} whose norm is not finite; '' if there is none."""
    tensors = {}
    for name, module in modules.items():
        for inner, p in module.named_parameters():
            if p.grad is not None:
                tensors.update({f"the gradient of {name}.{inner}": p.grad, f"{name}.{inner}": p.detach()})
    norms = torch.stack(torch._foreach_norm(list(tensors.values()))).tolist() if tensors else []
    return next((name for name, norm in zip(tensors, norms, strict=True) if not math.isfinite(norm)), "")


def entropy(p):
    """Mean entropy in nats of distributions p [... k]; ln k when uniform, 0 when each is one prototype."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1).mean()


@torch.no_grad()
def teacher_meters(p_t, ce):
    """teacher_entropy, kl, teacher_information in nats, of the teacher's P_t [u b k] and ce = H(P_t) + KL.

    The last is the mutual information of image and prototype, H(mean of P_t) - mean of H(P_t): 0 if the
    output is the same for all images, sharp or uniform, so that CE teaches nothing; at most ln(u b).
    """
    h = entropy(p_t)
    information = entropy(global_mean(p_t.mean((0, 1)))) - h
    return {"teacher_entropy": h, "kl": ce - h, "teacher_information": information}


def collapse(rows, steps, config):
    """One sentence if a run's log shows signs of collapse, else ''. config: the run's options.

    Signs in evaluations, after the learning-rate warm-up: RankMe below a quarter of its first value, or k-NN
    below that of random weights twice in a row. Signs in the last rows, 4 % of the run but at least two: a
    teacher that is uniform, or whose output is the same for all images.
    """
    if not rows:
        return ""
    warming_up = rows[-1].get("epoch", 0) < config.get("warmup_epochs", 0)
    evaluations = [row for row in rows if "rank" in row] if "rank" in rows[-1] else []
    if len(evaluations) > 1 and not warming_up:
        first, last = evaluations[0], evaluations[-1]
        if last["rank"] < COLLAPSED_RANK * first["rank"]:
            return f"the features collapse: RankMe fell from {first['rank']:.1f} to {last['rank']:.1f}"
        low = [row for row in evaluations[1:] if row.get("knn", 1) < row.get("knn_init", 0)]
        if low[-2:] == evaluations[-2:]:
            return f"k-NN accuracy {last['knn']:.3f} stays below random weights' {last['knn_init']:.3f}"
    window = rows[-max(2, steps // (25 * config["log_every"])) :]

    def always(name, low, high):
        return len(window) > 1 and all(low <= row.get(name, math.inf) <= high for row in window)

    uniform = math.log(config.get("out_dim", 2))
    if always("teacher_entropy", 0.99 * uniform, uniform + 1):
        return f"the teacher is uniform over the prototypes (teacher_entropy is {uniform:.3f}): sharpen it"
    if always("teacher_entropy", 0, 0.01 * uniform):
        return "the teacher puts every image on one prototype (teacher_entropy is 0): is centering on?"
    if not warming_up and always("teacher_information", -1, NO_INFORMATION):
        return "the teacher's output is the same for all images (teacher_information 0): CE teaches nothing"
    if not warming_up and always("ce", 0.99 * uniform, 1.01 * uniform):
        return f"ce is stuck at ln out_dim = {uniform:.3f}, the loss of a student that knows nothing"
    if rows[-1].get("feature_std", 1) < 0.01:
        return f"all images have the same features (feature_std is {rows[-1]['feature_std']:.2g})"
    return ""


@torch.no_grad()
def correlation_meters(z1, z2):
    """c_diag, c_off: mean diagonal and mean absolute off-diagonal element of C, of two projections [b d]."""
    z1, z2 = (z - global_mean(z.mean(0)) for z in (z1, z2))
    z1, z2 = (z / (global_mean(z.square().mean(0)) + 1e-6).sqrt() for z in (z1, z2))
    c = global_mean(z1.T @ z2 / len(z1))
    d = z1.shape[1]
    off = c.abs().sum() - c.diagonal().abs().sum()
    return {"c_diag": c.diagonal().mean(), "c_off": off / max(d * d - d, 1)}
