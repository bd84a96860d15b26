"""Linear probes and k-NN of a frozen backbone, selected on held-out training images, measured on the test set once.

Protocols: `linear` on the last block's [CLS]; `linear4` on the last four blocks' (DINO, 2104.14294, ViT-S); `linear_avg` on
[CLS] and the mean patch token; `knn`, weighted, T = 0.07 (Wu et al., 1805.01978). Features are standardised, column by
column, by the training set's mean and standard deviation (as MAE's probe, 2111.06377). All learning rates and weight decays
train at once, as one product with a wide matrix:

    logits [b s c] = x [b d] W [d s c] + bias [s c]      loss = cross-entropy + wd / 2 |W|^2      SGD, momentum .9, cosine

A tenth of the training images, the same share of each class, selects lr, wd and k. The selected probe is then trained on all
of them, and the test set is looked at once.

    python eval_linear.py --ckpt=out/hybrid_a-shapes/ckpt.pt     a run's ckpt.pt, its export/ folder, an official DINO .pth
    python eval_linear.py --ckpt=random --dataset=shapes         or random weights: the floor

Letters in shapes:  b images  d width of a feature  s settings  c classes  n data set
"""

import hashlib
import json
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Crop, batch_indices, draw, from_bytes, load, normalise, resized_crop
from twins.backbones import configure_evaluation, load_backbone, output_folder, trained_on
from twins.errors import UserError
from twins.files import git_state, write_file
from twins.monitor import knn
from twins.processes import gather, rank, setup, shard
from vit import ViT, check_size

ckpt = ""  # what to evaluate: ckpt.pt, an export folder, an official DINO .pth, or random
weights = ""  # a network of the checkpoint, such as student; empty: the one that its run evaluates
dataset = ""  # shapes, cifar10, cifar100, imagenet32, stl10 or folder; empty: what the run was trained on
data_dir = ""  # where its files are; empty: where the run found them
skip_bad_images = False  # of a folder: leave out what cannot be read, up to 1 %
out_dir = ""  # where eval_linear.json goes; empty: next to the checkpoint, out/random-<dataset> for random weights
image_size = 0  # pixels; 0: what the backbone was trained with
patch_size = 4  # pixels, of --ckpt=random
dim = 192  # width, of --ckpt=random
depth = 12  # blocks, of --ckpt=random
heads = 0  # attention heads, of --ckpt=random (0: 3) and of weights that do not say (0: width / 64)
epochs = 30  # passes over the training features
batch_size = 512  # features a step
augment = False  # DINO's protocol: random crop and flip of the images in every step, features computed anew
label_fraction = 1.0  # of the training labels, the same share of each class
seed = 0  # of the split, the order and the crops
device = "auto"  # cuda, mps or cpu; auto: the first of them that is here
dtype = "auto"  # float32 or bfloat16 for the backbone; auto: bfloat16 on a GPU that has it

# as the training scripts have it, for --ckpt=random
PRESETS = {"shapes": dict(dim=64, depth=3, heads=2), "stl10": dict(image_size=96, patch_size=8)}

SETTINGS = list(product((0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 1e-4, 1e-3)))  # learning rate, weight decay
NEIGHBOURS = (10, 20, 100, 200)


@torch.no_grad()
def extract(backbone, x, autocast):
    """Normalised images [b 3 s s] -> a feature [b d] for each linear protocol, float32."""
    with autocast:
        layers = [layer.float() for layer in backbone.layers(x, last=4)]
    cls = [layer[:, 0] for layer in layers]
    return {"linear": cls[-1], "linear4": torch.cat(cls, 1), "linear_avg": torch.cat([cls[-1], layers[-1][:, backbone.num_prefix_tokens :].mean(1)], 1)}


def extract_all(backbone, images, device, autocast, what):
    """Images uint8 [n 3 s s] -> a feature [n d] for each linear protocol; of several processes each does its part."""
    images, chunks = shard(images), []
    for chunk in tqdm(images.split(500), f"features of {what}", unit_scale=500, unit=" images", disable=len(images) < 1000):
        chunks.append(extract(backbone, normalise(from_bytes(chunk.to(device))), autocast))
    return {name: gather(torch.cat([chunk[name] for chunk in chunks])) for name in chunks[0]}


def balanced(labels, share, seed):
    """Indices of a random `share` of the images, the same share of each class, at least one, and of the rest: two int64 [m]."""
    rng, taken = np.random.default_rng((seed, 3)), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        taken[members[rng.permutation(len(members))[: max(round(share * len(members)), 1)]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


@torch.no_grad()
def train_probes(batches, steps, widths, classes, settings, device, progress=""):
    """Softmax regression by SGD for every (lr, wd) of `settings` at once.

    `batches(step)` gives features {protocol: [b d]} and labels int64 [b]; `widths` is {protocol: d}. Returns for each protocol
    W [d s c] and bias [s c]. Every setting sees the same batches and starts at zero, as if it were trained alone.
    """
    lr, wd = (torch.tensor(column, device=device)[:, None] for column in zip(*settings, strict=True))
    shape = (len(settings), classes)
    probes = {k: (torch.zeros(d, *shape, device=device), torch.zeros(shape, device=device)) for k, d in widths.items()}
    momenta = {k: tuple(torch.zeros_like(t) for t in probe) for k, probe in probes.items()}
    for step in tqdm(range(steps), progress, unit="step", disable=not progress):
        features, labels = batches(step)
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        for name, (w, bias) in probes.items():
            x = features[name]
            error = (predict(x, (w, bias)).softmax(-1) - F.one_hot(labels, classes)[:, None]) / len(x)  # [b s c]
            gradients = (x.T @ error.flatten(1)).view_as(w) + wd * w, error.sum(0)
            for value, momentum, gradient in zip((w, bias), momenta[name], gradients, strict=True):
                momentum.mul_(0.9).add_(gradient)
                value.sub_(rate * momentum)
    return probes


def predict(x, probe):
    """Features [b d] and a probe (W [d s c], bias [s c]) -> logits [b s c]."""
    w, bias = probe
    return (x @ w.flatten(1)).unflatten(1, bias.shape) + bias


def accuracy(x, labels, probe, top=1):
    """Share of the features [n d] whose label is among the `top` first, for each setting: a list."""
    hits, top = 0, min(top, probe[1].shape[1])
    for some, answers in zip(x.split(2000), labels.split(2000), strict=True):
        hits = hits + (predict(some, probe).topk(top, -1).indices == answers[:, None, None]).any(-1).sum(0)
    return (hits / len(x)).tolist()


def probe_all(train, labels, classes, settings, device, images=None, backbone=None, autocast=None, progress=""):
    """Standardises cached features {protocol: [n d]}, or features of augmented `images`, and trains all probes on them.

    Returns the probes and the function that standardises features {protocol: [m d]}.
    """
    moments = {k: (x.mean(0), x.std(0, correction=0).clamp(min=1e-6)) for k, x in train.items()}
    size, n = min(batch_size, len(labels)), len(labels)

    def standardise(features):
        return {k: (x - moments[k][0]) / moments[k][1] for k, x in features.items()}

    def cached(step):
        some = batch_indices(n, size, seed, step).to(device)
        return {k: x[some] for k, x in ready.items()}, labels[some]

    def augmented(step):
        some = batch_indices(n, size, seed, step)
        x = from_bytes(images[some].to(device))
        p = draw(size, x.shape[-1], Crop(x.shape[-1], (0.08, 1.0)), np.random.default_rng((seed, 4, step)))
        p = {k: p[k].to(device) for k in ("left", "top", "width", "height", "flip")}
        return standardise(extract(backbone, normalise(resized_crop(x, **p, size=x.shape[-1])), autocast)), labels[some.to(device)]

    ready = None if images is not None else standardise(train)
    batches = cached if images is None else augmented
    widths = {k: x.shape[1] for k, x in train.items()}
    return train_probes(batches, epochs * (n // size), widths, classes, settings, device, progress), standardise


def measure(top1, top5, n):
    """A result: accuracies and the half width of top-1's 95 % interval, from the number of test images."""
    return {"top1": top1, "top5": top5, "interval95": 1.96 * (top1 * (1 - top1) / n) ** 0.5}


def evaluate(train, labels, test, test_labels, classes, device, images=None, backbone=None, autocast=None):
    """Selects on a tenth of the training set, then measures on the test set: {protocol: result}.

    train, test: {protocol: features [n d]}; labels int64 [n]; `images` uint8 [n 3 s s] of `train` for augmentation.
    """
    held, kept = (index.to(device) for index in balanced(labels.cpu(), 0.1, seed))
    if len(kept) < classes:
        raise UserError(f"{len(labels)} labels of {classes} classes are too few to hold some out: give a larger --label_fraction")
    some = None if images is None else images[kept.cpu()]
    part = {k: x[kept] for k, x in train.items()}
    probes, standardise = probe_all(part, labels[kept], classes, SETTINGS, device, some, backbone, autocast, "selecting")
    ready, chosen, results = standardise({k: x[held] for k, x in train.items()}), {}, {}
    for name, x in ready.items():
        scores = accuracy(x, labels[held], probes[name])
        chosen[name] = max(range(len(SETTINGS)), key=lambda i, scores=scores: scores[i])
        grid = [{"lr": lr, "wd": wd, "held_out": score} for (lr, wd), score in zip(SETTINGS, scores, strict=True)]
        results[name] = {"selected": grid[chosen[name]], "grid": grid}
    picked = sorted(set(chosen.values()))
    settings = [SETTINGS[i] for i in picked]
    probes, standardise = probe_all(train, labels, classes, settings, device, images, backbone, autocast, "training the selected")
    for name, x in standardise(test).items():
        top1, top5 = (accuracy(x, test_labels, probes[name], top)[picked.index(chosen[name])] for top in (1, 5))
        results[name] |= measure(top1, top5, len(x))

    cls = train["linear"]
    scores = [(knn(cls[kept], labels[kept], cls[held], k).argmax(1) == labels[held]).float().mean().item() for k in NEIGHBOURS]
    grid = [{"k": k, "held_out": score} for k, score in zip(NEIGHBOURS, scores, strict=True)]
    best = max(grid, key=lambda row: row["held_out"])
    right = knn(cls, labels, test["linear"], best["k"]).topk(min(5, classes), 1).indices == test_labels[:, None]
    top1, top5 = right[:, 0].float().mean().item(), right.any(1).float().mean().item()
    results["knn"] = {"selected": best, "grid": grid} | measure(top1, top5, len(right))
    return results


if __name__ == "__main__":
    config = configure_evaluation(globals())
    device, autocast = setup(device, dtype, seed)
    backbone, about = load_backbone(config, device, ViT)
    dataset, data_dir = trained_on(config, about)
    if not dataset:
        raise UserError(f"--ckpt={ckpt} does not say what it was trained on: give --dataset")
    image_size = image_size or about["image_size"]
    check_size(image_size, backbone.patch_size)
    train, test = (load(dataset, data_dir, image_size, split, skip_bad_images) for split in ("train", "test"))
    if train.labels is None or test.labels is None:
        raise UserError(f"{data_dir} has no class folders: a probe needs labels")
    if test.labels.max() >= len(train.classes):
        raise UserError(f"the test set of {data_dir} has {int(test.labels.max()) + 1} classes, the training set {len(train.classes)}")
    some = (train.labels >= 0).nonzero()[:, 0]
    if label_fraction < 1:
        some = some[balanced(train.labels[some], label_fraction, seed)[0]]
    if len(some) < len(train.labels):
        train = train._replace(images=train.images[some], labels=train.labels[some])
    parts = {"training": train, "test": test}
    features = {what: extract_all(backbone, split.images, device, autocast, what) for what, split in parts.items()}
    if rank():
        sys.exit()  # the probes are the first process's
    labels, test_labels = train.labels.to(device), test.labels.to(device)
    again = {"images": train.images, "backbone": backbone, "autocast": autocast} if augment else {}
    results = evaluate(features["training"], labels, features["test"], test_labels, len(train.classes), device, **again)

    print(f"\n{ckpt} ({about.get('network', 'random')}) on {dataset}: {len(labels)} training, {len(test_labels)} test images\n")
    print("| protocol | selected | held out | top-1 | top-5 |\n|---|---|---:|---:|---:|")
    for name, r in results.items():
        selected = " ".join(f"{k} {v:g}" for k, v in r["selected"].items() if k != "held_out")
        numbers = f"{100 * r['selected']['held_out']:.1f} | {100 * r['top1']:.1f} ± {100 * r['interval95']:.1f} | {100 * r['top5']:.1f}"
        print(f"| {name}{' augmented' if augment and name != 'knn' else ''} | {selected} | {numbers} |")
    report = config | {"dataset": dataset, "data_dir": str(data_dir), "image_size": image_size, "checkpoint": about, "results": results}
    report |= {"torch": torch.__version__, "test_images": len(test_labels), "device": str(device), **git_state()}
    if Path(ckpt).is_file():
        report["sha256"] = hashlib.sha256(Path(ckpt).read_bytes()).hexdigest()
    folder = output_folder(config, ckpt, dataset)
    write_file(folder / "eval_linear.json", json.dumps(report, indent=1))
    print(f"\nwrote {folder}/eval_linear.json")
