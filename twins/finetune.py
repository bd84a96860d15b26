"""Fine-tuning of a backbone with a linear classifier on [CLS], as in BEiT (2106.08254) and MAE (2111.06377).

    learning rate of layer i = lr * 0.65^(depth + 1 - i)    0: patches, tokens, positions; 1 to depth: blocks;
                                                            depth + 1: last norm and classifier

AdamW, warm-up, then a cosine to 0; random resized crop and flip; no drop path, whatever the backbone had. The
classifier starts as the linear probe (2202.10054): from 0 it needs many epochs and disturbs the features.

Letters in shapes:  b n images  s image side  c classes
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from twins.datasets import from_bytes, normalise
from twins.probes import accuracies, balanced, fit, hit_rate, whitening
from twins.processes import to_float32

LEARNING_RATES = (3e-5, 3e-4, 3e-3)
BATCH_SIZE, WARMUP = 128, 0.1  # images; share of the steps


class Settings(NamedTuple):
    augment: Callable  # (uint8 [b 3 s s], numpy's random generator) -> [b 3 s s]
    strength: float  # L2 penalty of the linear probe that the classifier starts from
    classes: int
    epochs: int


def parameter_groups(model, lr):
    """Per-parameter groups of [backbone, classifier]; weight decay 0.05, 0 for biases, tokens, positions."""
    depth = len(model[0].blocks)
    groups = []
    for name, p in model.named_parameters():
        network, part, *rest = name.split(".")
        last = depth + 1 if network == "1" or part == "norm" else 0
        layer = int(rest[0]) + 1 if part == "blocks" else last
        decays = p.ndim > 1 and not part.endswith(("_token", "pos_embed"))
        groups.append({"params": [p], "lr": lr * 0.65 ** (depth + 1 - layer), "weight_decay": 0.05 * decays})
    return groups


@torch.no_grad()
def predict_scores(model, images, device, autocast):
    """uint8 [n 3 s s] -> scores [n c]."""
    with autocast:
        chunks = [model(normalise(from_bytes(chunk.to(device)))) for chunk in images.split(500)]
    return to_float32(torch.cat(chunks))


def train_epochs(backbone, images, labels, lr, seed, autocast, settings):
    """Trains a copy of the backbone and a linear probe; yields the model after each epoch."""
    backbone = copy.deepcopy(backbone).eval()  # without drop path
    x = predict_scores(backbone, images, labels.device, autocast)
    mean, matrix, scale = whitening(x)
    zero = x.new_zeros(x.shape[1], settings.classes), x.new_zeros(settings.classes)
    weight, bias = fit((x - mean) @ matrix, labels, settings.strength * scale, zero)
    weight = matrix @ weight
    model = torch.nn.Sequential(backbone, torch.nn.Linear(*weight.shape, device=x.device))
    model[1].load_state_dict({"weight": weight.T, "bias": bias - mean @ weight})
    optimizer = torch.optim.AdamW(parameter_groups(model.requires_grad_(), lr))
    steps = settings.epochs * math.ceil(len(images) / BATCH_SIZE)
    rng = np.random.default_rng((seed, 4))
    factor = lambda i: min((i + 1) / (WARMUP * steps + 1), (1 + math.cos(math.pi * i / steps)) / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(1, settings.epochs + 1):
        batches = torch.from_numpy(rng.permutation(len(images))).split(BATCH_SIZE)
        for rows in tqdm(batches, f"fine-tuning, lr {lr:g}, epoch {epoch}", leave=False, delay=1):
            x = settings.augment(images[rows].to(labels.device), rng)
            with autocast:
                scores = model(x)
            optimizer.zero_grad()
            F.cross_entropy(to_float32(scores), labels[rows.to(labels.device)]).backward()
            optimizer.step()
            schedule.step()
        yield model


def fine_tune(backbone, images, labels, test_images, test_labels, seed, autocast, settings):
    """A result as in twins/probes.py: images uint8 [n 3 s s], labels int64 [n] on the device.

    Held-out training images select learning rate and last epoch; a new copy is then trained on all training
    images and evaluated once on the test set.
    """
    held_out, rest = (rows.to(labels.device) for rows in balanced(labels.cpu(), 0.1, seed))
    grid = []
    for lr in LEARNING_RATES:
        models = train_epochs(backbone, images[rest.cpu()], labels[rest], lr, seed, autocast, settings)
        for epoch, model in enumerate(models, 1):
            scores = predict_scores(model, images[held_out.cpu()], labels.device, autocast)
            grid.append({"lr": lr, "epoch": epoch, "held_out": hit_rate(scores, labels[held_out])})
    selected = max(grid, key=lambda row: (row["held_out"], row["epoch"]))
    models = train_epochs(backbone, images, labels, selected["lr"], seed, autocast, settings)
    for _ in range(selected["epoch"]):
        model = next(models)
    scores = predict_scores(model, test_images, labels.device, autocast)
    return {"selected": selected, "grid": grid, **accuracies(scores, test_labels)}
