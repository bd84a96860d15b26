"""Segmentation from frozen patch tokens: how much do the features tell about where objects are?

A linear head, BatchNorm and a 1 x 1 convolution (as in DINOv2, 2304.07193), turns each patch token into class
scores, upsampled (bilinear) to the mask. Floors: the same head on random weights of the same architecture,
and on each patch's mean colour. Ceiling: a patch's scores are the shares of the classes in it. Without
labels: the share of [CLS]'s attention on objects over their share of the image (mass / area: 1 is uniform).

    IoU_c = pixels of class c in truth and prediction / pixels of c in either, over the whole test set
    mIoU = mean of IoU_c over classes c

A tenth of the training images selects the learning rate; the head is then trained on all training images and
evaluated once on the test set. `--finetune=True` also trains the backbone.

    python seg_transfer.py --ckpt=out/hybrid_a-shapes
    python seg_transfer.py --ckpt=out/hybrid_a-cifar10 --dataset=folder --data_dir=data/ecssd --image_size=64

Letters in shapes:  b n images  s image side  y x patch grid  d width  c classes
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import batch_indices
from twins.attention import attend, figures_on_masks
from twins.backbones import configure_evaluation, load_backbone, output_folder, random_like, trained_on
from twins.datasets import from_bytes
from twins.errors import UserError
from twins.evaluation_pictures import segmentation_picture
from twins.files import git_state, write_file, write_results
from twins.masks import load_masks
from twins.pictures import printed
from twins.processes import map_shards, rank, seed_step, setup, to_float32
from twins.segmentation import PIXELS, Finetuned, Head, best_of_grid, patch_tokens, score
from vit import ViT, check_size

ckpt = ""  # to evaluate: a run's folder, an export folder, a file of weights, or random
weights = ""  # a network of the checkpoint, such as student; empty: the one that its run evaluates
dataset = ""  # shapes, folder, voc2012, pet or imagenet_s; empty: what the run was trained on
data_dir = ""  # where its files are; empty: where the run found them
out_dir = ""  # where segmentation.png and seg_transfer.json go; empty: next to the checkpoint
skip_bad_images = False  # in a folder, skip files that cannot be read, up to 1 %
image_size = 0  # pixels; 0: as in training [0..]
finetune = False  # also train the backbone
patch_size = 4  # pixels, for --ckpt=random [1..]
dim = 192  # width, for --ckpt=random [1..]
depth = 12  # blocks, for --ckpt=random [1..]
heads = 0  # attention heads, for --ckpt=random (0: 3) and for weights that do not say (0: guessed) [0..]
max_steps = 300  # optimizer steps of each head [1..]
batch_size = 32  # images per step [2..]
seed = 0  # for the held-out images, the heads and the order of images [0..]
device = "auto"  # cuda, mps or cpu; auto: the first available
dtype = "auto"  # of the backbone; auto: bfloat16 where it is faster [float32|bfloat16|float64]

PRESETS = {"shapes": {"dim": 64, "depth": 3, "heads": 2}}  # for --ckpt=random, as in the training scripts

LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of AdamW
FINETUNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


class Task(NamedTuple):
    build: Callable  # () -> a new model
    rates: tuple  # learning rates to select from
    train: torch.Tensor  # the model's inputs [n ...], of the training images
    test: torch.Tensor  # and of the test images


def cached_tokens(backbone, images, device, autocast, what):
    """patch_tokens() of images uint8 [n 3 s s], float32 [n d y x] on the CPU; processes share the work."""
    tokens = lambda batch: patch_tokens(backbone, batch.to(device)).cpu()
    return map_shards(tokens, images, autocast, f"features of {what}", batch_size=250)


def train_model(build, inputs, masks, lr, device, autocast, progress):
    """The model of build(), trained on inputs [n ...] and masks int16 [n s s]: AdamW, cosine schedule."""
    seed_step(seed, 0)
    model = build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    size = min(batch_size, len(inputs))
    for step in range(max_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / max_steps)) / 2
        batch = batch_indices(len(inputs), size, seed, step)
        with autocast:
            scores = model(inputs[batch].to(device))
        truth = masks[batch].to(device).long()
        loss = F.cross_entropy(to_float32(scores), truth, ignore_index=-1, reduction="sum")
        loss = loss / (truth >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update()
    return model.eval()


@torch.no_grad()
def predict_classes(model, inputs, masks, classes, device, autocast):
    """Predicted class of each pixel, int16 [n s s] of the size of `masks`, from inputs [n ...]."""
    chunks = []
    for chunk in inputs.split(max(PIXELS // (classes * masks[0].numel()), 1)):
        with autocast:
            chunks.append(model(chunk.to(device)).argmax(1).short().cpu())
    return torch.cat(chunks)


def select_and_measure(task, masks, truth, classes, device, autocast, what):
    """Selects a learning rate on a tenth of the training images, trains on all: (result, test prediction)."""
    order = torch.from_numpy(np.random.default_rng((seed, 7)).permutation(len(task.train)))
    held_out, rest = order.tensor_split([max(len(order) // 10, 1)])
    grid = []
    with tqdm(total=max_steps * (len(task.rates) + 1), desc=what, unit="step") as progress:
        for lr in task.rates:
            model = train_model(task.build, task.train[rest], masks[rest], lr, device, autocast, progress)
            prediction = predict_classes(model, task.train[held_out], masks, classes, device, autocast)
            grid.append({"lr": lr, "held_out": score(prediction, masks[held_out], classes)["miou"]})
        selected = max(grid, key=lambda row: row["held_out"])
        model = train_model(task.build, task.train, masks, selected["lr"], device, autocast, progress)
    prediction = predict_classes(model, task.test, truth, classes, device, autocast)
    return {"selected": selected, "grid": grid, **score(prediction, truth, classes)}, prediction


def print_table(results, classes):
    """One row per head, in %; with each class's IoU if there are few. classes: their names."""
    classes = classes if len(classes) <= 6 else []
    columns = ["lr", "mIoU", "pixel accuracy", *classes]
    print(f"| {'fine-tuned' if finetune else 'linear head'} | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name, result in results.items():
        lr = f"{result['selected']['lr']:g}" if "selected" in result else ""
        shares = [result["miou"], result["pixel_accuracy"], *result["iou"][: len(classes)]]
        cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        print(f"| {name} | {lr} | {' | '.join(cells)} |")


if __name__ == "__main__":
    config = configure_evaluation(globals())
    device, autocast = setup(device, dtype, seed)
    backbone, about = load_backbone(config, device, ViT)
    dataset, data_dir = trained_on(config, about)
    image_size = image_size or about["image_size"]
    check_size(image_size, backbone.patch_size)
    train_set = load_masks(dataset, data_dir, image_size, "train", skip_bad_images)
    test_set = load_masks(dataset, data_dir, image_size, "test", skip_bad_images)
    folder = output_folder(config, ckpt, dataset)
    classes = len(train_set.classes)
    truth = test_set.masks
    if len(train_set.images) < 2:
        raise UserError(f"{data_dir} has one training image: at least two are needed, one to select with")
    if truth.max() >= classes:
        raise UserError(
            f"the test masks have class {truth.max()}, the training masks only 0 to {classes - 1}"
        )

    networks = {"this checkpoint": backbone}
    if ckpt != "random":
        networks["random weights"] = random_like(backbone, device)
    head = partial(Head, backbone.dim, classes, image_size)
    images = (train_set.images, test_set.images)
    tasks = {}
    for name, network in networks.items():
        if finetune:
            tasks[name] = Task(partial(Finetuned, network, head), FINETUNING_RATES, *images)
        else:
            tokens = [cached_tokens(network, x, device, autocast, name) for x in images]
            tasks[name] = Task(head, LEARNING_RATES, *tokens)
    colours = [F.avg_pool2d(from_bytes(x), backbone.patch_size) for x in images]
    tasks["colour alone"] = Task(partial(Head, 3, classes, image_size), LEARNING_RATES, *colours)
    maps, _ = attend(backbone, test_set.images, device, autocast)
    if rank():
        sys.exit()  # rank 0 trains the heads
    results, predictions = {}, {}
    for name, task in tasks.items():
        result, prediction = select_and_measure(task, train_set.masks, truth, classes, device, autocast, name)
        results[name], predictions[name] = result, prediction
    ceiling = best_of_grid(truth, backbone.patch_size, classes)
    results["ceiling of the patch grid"] = score(ceiling, truth, classes)
    attention = figures_on_masks(maps, truth)

    report = {**config, "dataset": dataset, "data_dir": str(data_dir), "image_size": image_size}
    report.update(checkpoint=about, results=results, classes=train_set.classes, attention=attention)
    report.update(torch=torch.__version__, **git_state())

    sizes = f"{len(train_set.images)} training, {len(test_set.images)} test images"
    print(f"\n{ckpt} ({about.get('network', 'random')}) on {dataset}, {image_size} pixels: {sizes}\n")
    print_table(results, train_set.classes)
    mass_over_area = np.mean(attention["mass_over_area"])
    print(f"\nattention on the objects, mass / area: {mass_over_area:.2f} (1 is uniform)")
    if attention["jaccard_60"]:
        best_head, mean_map = (100 * attention["jaccard_60"][name] for name in ("best_head", "mean_map"))
        print(f"Jaccard of its top 60 % with the objects: {best_head:.1f} best head, {mean_map:.1f} mean map")

    rows = torch.from_numpy(np.random.default_rng((seed, 8)).permutation(len(truth))[:8])
    columns = {"truth": truth[rows]}
    for name in networks:
        title = printed(about.get("script", name)) if name == "this checkpoint" else name
        columns[title] = predictions[name][rows]
    picture = segmentation_picture(test_set.images[rows], columns, maps[rows].mean(1), train_set.classes)
    write_results(folder / "seg_transfer.json", report)  # last: the disk may be full
    write_file(folder / "segmentation.png", picture)
    print(f"\nwrote {folder}/segmentation.png seg_transfer.json")
