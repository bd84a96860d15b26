"""Linear probes and k-NN of a frozen backbone, selected on held-out training images, tested once.

Protocols: `linear` on the last block's [CLS]; `linear4` on the last four blocks' (DINO, 2104.14294, ViT-S);
`linear_avg` on [CLS] and the mean patch token; `knn`, weighted, T = 0.07 (Wu et al., 1805.01978). A probe is
softmax regression on whitened features, fitted by L-BFGS to convergence (twins/probes.py).

A tenth of the training images, stratified by class, selects `strength` and k. The selected probe is
then trained on all training images and evaluated once on the test set. Images are not augmented: features
are computed once. `--finetune=True` adds `finetune`, which also trains the backbone (twins/finetune.py).

    python eval_linear.py --ckpt=out/hybrid_a-shapes             a run, an export/ folder, official weights
    python eval_linear.py --ckpt=random --dataset=shapes         random weights: the floor

Letters in shapes:  b n images  s image side  d width of a feature
"""

import sys
from pathlib import Path

import torch

from data import Crop, draw, resized_crop
from twins.backbones import configure_evaluation, load_backbone, output_folder, trained_on
from twins.datasets import from_bytes, load, normalise
from twins.errors import UserError
from twins.files import git_state, sha256, write_results
from twins.finetune import Settings, fine_tune
from twins.probes import balanced, evaluate_probes
from twins.processes import map_shards, rank, setup, to_float32
from vit import ViT, check_size

ckpt = ""  # to evaluate: a run's folder or ckpt.pt, an export folder, a file of weights, or random
weights = ""  # a network of the checkpoint, such as student; empty: the one that its run evaluates
dataset = ""  # shapes, cifar10, cifar100, imagenet32, stl10 or folder; empty: what the run was trained on
data_dir = ""  # where its files are; empty: where the run found them
skip_bad_images = False  # in a folder, skip files that cannot be read, up to 1 %
out_dir = ""  # for eval_linear.json; empty: next to the checkpoint, out/random-<dataset> for random weights
image_size = 0  # pixels; 0: as in training [0..]
patch_size = 4  # pixels, for --ckpt=random [1..]
dim = 192  # width, for --ckpt=random [1..]
depth = 12  # blocks, for --ckpt=random [1..]
heads = 0  # attention heads, for --ckpt=random (0: 3) and for weights that do not say (0: guessed) [0..]
finetune = False  # also train the backbone, four times: in one process, much slower than the probes
finetune_epochs = 20  # epochs of each of these trainings [1..]
label_fraction = 1.0  # fraction of the training labels to use, stratified by class [0..1]
seed = 0  # for the random weights and the split [0..18446744073709551615]
device = "auto"  # cuda, mps or cpu; auto: the first available
dtype = "auto"  # of the backbone; auto: bfloat16 where it is faster [float32|bfloat16|float64]

# for --ckpt=random, as in the training scripts
PRESETS = {"shapes": {"dim": 64, "depth": 3, "heads": 2}, "stl10": {"image_size": 96, "patch_size": 8}}


def extract(backbone, images, device, autocast, what):
    """Images uint8 [n 3 s s] -> {protocol: features [n d]}. Raises UserError if they are not finite."""

    def cls_and_mean_patch(batch):
        layers = backbone.layers(normalise(from_bytes(batch.to(device))), last=4)
        layers = [to_float32(layer) for layer in layers]
        mean_patch = layers[-1][:, backbone.num_prefix_tokens :].mean(1)
        return torch.stack([*(layer[:, 0] for layer in layers), mean_patch], dim=1)

    x = map_shards(cls_and_mean_patch, images, autocast, f"features of {what}")  # [n 5 d]
    if not x.isfinite().all():
        raise UserError("the features are not finite: the run has diverged")
    return {"linear": x[:, -2], "linear4": x[:, :-1].flatten(1), "linear_avg": x[:, -2:].flatten(1)}


def augment(images, rng):
    """uint8 [b 3 s s] -> normalised random crops, half of them mirrored [b 3 s s]."""
    side = images.shape[-1]
    crops = draw(len(images), side, Crop(side, (0.35, 1.0)), rng)
    box = [crops[name].to(images.device) for name in ("left", "top", "width", "height", "flip")]
    return normalise(resized_crop(from_bytes(images), *box, side).clamp_(0, 1))


def load_labelled(dataset, data_dir, image_size):
    """The training split, reduced to --label_fraction, and the test split. Raises UserError."""
    train, test = (load(dataset, data_dir, image_size, split, skip_bad_images) for split in ("train", "test"))
    for name, data in (("training", train), ("test", test)):
        if data.labels is None:
            raise UserError(f"the {name} images of {data_dir} are not in class folders: a probe needs labels")
    classes = len(train.classes)
    test_classes = int(test.labels.max()) + 1
    if test_classes > classes:
        raise UserError(f"the test set of {data_dir} has {test_classes} classes, the training set {classes}")
    rows = (train.labels >= 0).nonzero()[:, 0]
    if label_fraction < 1:
        rows = rows[balanced(train.labels[rows], label_fraction, seed)[0]]
    if len(rows) < len(train.labels):
        train = train._replace(images=train.images[rows], labels=train.labels[rows])
    return train, test


def table(results):
    """The results as lines of a Markdown table, accuracies in %."""
    lines = ["| protocol | selected | held out | top-1 [95 % interval] | top-5 |", "|---|---|---:|---:|---:|"]
    for name, result in results.items():
        selected = result["selected"]
        option = next(option for option in ("strength", "k", "lr") if option in selected)
        shares = (selected["held_out"], result["top1"], *result["interval95"], result["top5"])
        held_out, top1, low, high, top5 = (f"{100 * share:.1f}" for share in shares)
        value = selected[option]
        lines.append(f"| {name} | {option} {value:g} | {held_out} | {top1} [{low}, {high}] | {top5} |")
    return lines


if __name__ == "__main__":
    config = configure_evaluation(globals())
    device, autocast = setup(device, dtype, seed)
    backbone, about = load_backbone(config, device, ViT)
    digest = sha256(Path(ckpt).read_bytes()) if Path(ckpt).is_file() else ""  # now: a run may save meanwhile
    dataset, data_dir = trained_on(config, about)
    image_size = image_size or about["image_size"]
    check_size(image_size, backbone.patch_size)
    file = output_folder(config, ckpt, dataset) / "eval_linear.json"
    train, test = load_labelled(dataset, data_dir, image_size)
    features = extract(backbone, train.images, device, autocast, "training images")
    test_features = extract(backbone, test.images, device, autocast, "test images")
    if rank():
        sys.exit()  # rank 0 alone trains the probes
    labels, test_labels = train.labels.to(device), test.labels.to(device)
    classes = len(train.classes)
    results = evaluate_probes(features, labels, test_features, test_labels, classes, seed)
    if finetune:
        settings = Settings(augment, results["linear"]["selected"]["strength"], classes, finetune_epochs)
        results["finetune"] = fine_tune(
            backbone, train.images, labels, test.images, test_labels, seed, autocast, settings
        )

    report = {**config, "dataset": dataset, "data_dir": str(data_dir), "image_size": image_size}
    report.update(training_images=len(labels), test_images=len(test_labels))
    report.update(checkpoint=about, results=results)
    report.update(torch=torch.__version__, device=str(device), **git_state())
    if digest:
        report["sha256"] = digest
    network = about.get("network", "random weights")
    print(f"\n{ckpt} ({network}) on {dataset}: {len(labels)} training, {len(test_labels)} test images\n")
    print("\n".join(table(results)))
    if classes == 1:
        print("\nwarning: there is a single class, so every prediction is correct")
    elif len(test_labels) < 100:
        print(f"\nwarning: {len(test_labels)} test images are too few to compare networks: see the intervals")
    write_results(file, report)  # written last, so a full disk cannot lose the table
    print(f"\nwrote {file}")
