"""Segmentation from frozen patch tokens: what do the features know of where things are?

A linear head, BatchNorm and a 1 x 1 convolution (as DINOv2's, 2304.07193), turns each patch token into class scores, upsampled
(bilinear) to the mask. Floors: the same head on random weights of the same architecture, and on each patch's mean colour.
Ceiling: each patch's scores are the shares of the classes in it. Without labels: the patches that hold 60 % of [CLS]'s attention.

    IoU_c = pixels of class c in truth and prediction / pixels of c in either, over the whole test set        mIoU = mean over c

A tenth of the training images selects the learning rate, the head is then trained on all of them, and the test set is looked at
once. `--finetune=True` trains the backbone too.

    python seg_transfer.py --ckpt=out/hybrid_a-shapes/ckpt.pt
    python seg_transfer.py --ckpt=out/hybrid_a-cifar10/ckpt.pt --dataset=folder --data_dir=data/ecssd --image_size=64

Letters in shapes:  b n images  s image side  y x patch grid  d width  c classes
"""

import copy
import json
import math
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data import batch_indices, from_bytes, normalise
from twins.attention import attend, jaccard, keep_mass
from twins.backbones import configure_evaluation, load_backbone, output_folder, random_like, trained_on
from twins.errors import UserError
from twins.files import git_state, write_file
from twins.masks import has_masks, load_masks
from twins.pictures import segmentation_picture
from twins.processes import gather, rank, seed_step, setup, shard
from vit import ViT, check_size

ckpt = ""  # what to evaluate: ckpt.pt, an export folder, an official DINO .pth, or random
weights = ""  # a network of the checkpoint, such as student; empty: the one that its run evaluates
dataset = ""  # shapes, folder, voc2012, pet or imagenet_s; empty: what the run was trained on
data_dir = ""  # where its files are; empty: where the run found them
out_dir = ""  # where segmentation.png and seg_transfer.json go; empty: next to the checkpoint
skip_bad_images = False  # of a folder: leave out what cannot be read, up to 1 %
image_size = 0  # pixels; 0: what the backbone was trained with
finetune = False  # train the backbone too
patch_size = 4  # pixels, of --ckpt=random
dim = 192  # width, of --ckpt=random
depth = 12  # blocks, of --ckpt=random
heads = 0  # attention heads, of --ckpt=random (0: 3) and of weights that do not say (0: width / 64)
max_steps = 300  # optimizer steps of each head
batch_size = 32  # images a step
seed = 0  # of the held-out images, the heads and the order
device = "auto"  # cuda, mps or cpu; auto: the first of them that is here
dtype = "auto"  # float32 or bfloat16 for the backbone; auto: bfloat16 on a GPU that has it

PRESETS = {"shapes": dict(dim=64, depth=3, heads=2)}  # as the training scripts have it, for --ckpt=random

LEARNING_RATES, FINETUNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (1e-4, 3e-4, 1e-3, 3e-3)  # of AdamW
PIXELS = 2**25  # scores computed at a time when nothing is learned


class Head(nn.Module):
    """Patch features [b d y x] -> class scores [b c s s]."""

    def __init__(self, dim, classes, size):
        super().__init__()
        self.norm, self.conv, self.size = nn.BatchNorm2d(dim), nn.Conv2d(dim, classes, 1), size

    def forward(self, x):
        return F.interpolate(self.conv(self.norm(x.float())), size=(self.size, self.size), mode="bilinear")


class Finetuned(nn.Module):
    """A copy of a backbone, and a head that `head` makes. Images uint8 [b 3 s s] -> class scores [b c s s]."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), head()

    def forward(self, x):
        return self.head(patch_tokens(self.backbone, x))


def patch_tokens(backbone, images):
    """Images uint8 [b 3 s s] -> normalised patch tokens of the last block [b d y x]."""
    x = backbone.layers(normalise(from_bytes(images)))[-1][:, backbone.num_prefix_tokens :]
    return rearrange(x, "b (y x) d -> b d y x", y=images.shape[-1] // backbone.patch_size)


@torch.no_grad()
def cached_tokens(backbone, images, device, autocast, what):
    """patch_tokens of all images, in pieces, float32 on the CPU; of several processes each does its part."""
    images, chunks = shard(images), []
    for chunk in tqdm(images.split(250), f"features of {what}", unit_scale=250, unit=" images", disable=len(images) < 1000):
        with autocast:
            chunks.append(patch_tokens(backbone, chunk.to(device)).float().cpu())
    return gather(torch.cat(chunks))


def train(make, inputs, masks, lr, device, autocast, progress):
    """A model, made by make(), trained on inputs [n ...] and masks int16 [n s s] by AdamW with a cosine."""
    seed_step(seed, 0)
    model = make().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    size = min(batch_size, len(inputs))
    for step in range(max_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / max_steps)) / 2
        some = batch_indices(len(inputs), size, seed, step)
        with autocast:
            scores = model(inputs[some].to(device))
        counts = masks[some].to(device).long()
        loss = F.cross_entropy(scores.float(), counts, ignore_index=-1, reduction="sum") / (counts >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update()
    return model.eval()


@torch.no_grad()
def predict(model, inputs, masks, classes, device, autocast):
    """Class of every pixel, int16 [n s s], as large as `masks`."""
    chunks = []
    for chunk in inputs.split(max(PIXELS // (classes * masks[0].numel()), 1)):
        with autocast:
            chunks.append(model(chunk.to(device)).argmax(1).short().cpu())
    return torch.cat(chunks)


def score(prediction, masks, classes):
    """Prediction and truth, int16 [n s s] -> {miou, pixel_accuracy, iou [classes]}.

    A class in neither counts for nothing: its iou is None. Pixels of truth -1 do not count. Raises UserError when none do.
    """
    counts = masks >= 0
    if not counts.any():
        raise UserError("the masks hold nothing that counts: every pixel is marked as one to ignore")
    pairs = masks[counts].long() * classes + prediction[counts].long()
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes).double()  # truth, prediction
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    iou = [(b / e).item() if e else None for b, e in zip(both, either, strict=True)]
    return {"miou": (both[either > 0] / either[either > 0]).mean().item(), "pixel_accuracy": (both.sum() / counts.sum()).item(), "iou": iou}


def best_of_grid(masks, patch_size, classes):
    """What scores on the patch grid can do: the shares of the classes in each patch, upsampled as a head's scores are.

    masks int16 [n s s] -> classes int16 [n s s]. Scores made for the upsampling can do a little better (98 for 96 on `shapes`).
    """
    made = []
    for some in masks.split(max(PIXELS // (classes * masks[0].numel()), 1)):
        here = torch.stack([(some == c).float() for c in range(classes)], 1)
        shares = F.avg_pool2d(here, patch_size)
        made.append(F.interpolate(shares, size=some.shape[-2:], mode="bilinear").argmax(1).short())
    return torch.cat(made)


def select_and_measure(make, rates, inputs, tests, masks, truth, classes, device, autocast, what):
    """Selects the learning rate, one of `rates`, on a tenth of the training images, trains on all. Returns result and test predictions."""
    order = torch.from_numpy(np.random.default_rng((seed, 7)).permutation(len(inputs)))
    held, kept = order[: max(len(order) // 10, 1)], order[max(len(order) // 10, 1) :]
    grid, settings = [], (make, inputs[kept], masks[kept])
    with tqdm(total=max_steps * (len(rates) + 1), desc=what, unit="step") as progress:
        for lr in rates:
            model = train(*settings, lr, device, autocast, progress)
            guess = predict(model, inputs[held], masks, classes, device, autocast)
            grid.append({"lr": lr, "held_out": score(guess, masks[held], classes)["miou"]})
        best = max(grid, key=lambda row: row["held_out"])
        model = train(make, inputs, masks, best["lr"], device, autocast, progress)
    prediction = predict(model, tests, truth, classes, device, autocast)
    return {"selected": best, "grid": grid} | score(prediction, truth, classes), prediction


if __name__ == "__main__":
    config = configure_evaluation(globals())
    device, autocast = setup(device, dtype, seed)
    backbone, about = load_backbone(config, device, ViT)
    dataset, data_dir = trained_on(config, about)
    if not has_masks(dataset, data_dir):
        raise UserError(f"--dataset={dataset} in {data_dir} has no masks: give --dataset=shapes, folder, voc2012, pet or imagenet_s")
    image_size = image_size or about["image_size"]
    patch_size = backbone.patch_size
    check_size(image_size, patch_size)
    learn, test = (load_masks(dataset, data_dir, image_size, split, skip_bad_images) for split in ("train", "test"))
    if len(learn.images) < 2:
        raise UserError(f"{data_dir} has one training image: one to learn from and one to hold out are the least")
    if test.masks.max() >= len(learn.classes):
        raise UserError(f"the test masks have a class {test.masks.max()}, the training masks only 0 to {len(learn.classes) - 1}")
    classes = len(learn.classes)

    results, predictions, sources = {}, {}, {"this checkpoint": backbone}
    if ckpt != "random":
        sources["random weights"] = random_like(backbone, device)
    head, tasks = partial(Head, backbone.dim, classes, image_size), {}
    for name, network in sources.items():
        if finetune:
            tasks[name] = partial(Finetuned, network, head), FINETUNING_RATES, learn.images, test.images
        else:
            tasks[name] = head, LEARNING_RATES, *[cached_tokens(network, split.images, device, autocast, name) for split in (learn, test)]
    colours = [F.avg_pool2d(from_bytes(split.images), patch_size) for split in (learn, test)]
    tasks["colour alone"] = partial(Head, 3, classes, image_size), LEARNING_RATES, *colours
    maps, _ = attend(backbone, test.images, device, autocast)
    if rank():
        sys.exit()  # the heads are the first process's
    for name, task in tasks.items():
        results[name], predictions[name] = select_and_measure(*task, learn.masks, test.masks, classes, device, autocast, name)
    results["ceiling of the patch grid"] = score(best_of_grid(test.masks, patch_size, classes), test.masks, classes)

    kept = keep_mass(maps.mean(1, keepdim=True), 0.6)
    best_head, _ = jaccard(keep_mass(maps, 0.6), test.masks)
    mean_map, _ = jaccard(kept, test.masks)
    attention = {"best_head": best_head, "mean_map": mean_map}

    few = classes <= 6
    print(f"\n{ckpt} ({about.get('network', 'random')}) on {dataset}, {image_size} pixels: {len(learn.images)} training, {len(test.images)} test images\n")
    columns = ["lr", "mIoU", "pixel accuracy", *learn.classes * few]
    print(f"| {'fine-tuned' if finetune else 'linear head'} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, r in results.items():
        each = "".join(f" {100 * iou:.1f} |" if iou is not None else " |" for iou in r["iou"] * few)
        lr = f"{r['selected']['lr']:g}" if "selected" in r else ""
        print(f"| {name} | {lr} | {100 * r['miou']:.1f} | {100 * r['pixel_accuracy']:.1f} |{each}")
    print(f"\n60 % of the attention against the objects, Jaccard: {100 * best_head:.1f} best head, {100 * mean_map:.1f} mean map")

    report = config | {"dataset": dataset, "data_dir": str(data_dir), "image_size": image_size, "checkpoint": about, "results": results}
    report |= {"classes": learn.classes, "jaccard_60": attention, "torch": torch.__version__, **git_state()}
    folder = output_folder(config, ckpt, dataset)
    rows = torch.from_numpy(np.random.default_rng((seed, 8)).permutation(len(test.images))[:8])
    mask = F.interpolate(kept[rows].float(), size=(image_size, image_size), mode="nearest")[:, 0].short()
    columns = {"truth": test.masks[rows]} | {name: predictions[name][rows] for name in sources}
    columns |= {"60 % of attention": mask}
    write_file(folder / "seg_transfer.json", json.dumps(report, indent=1))
    write_file(folder / "segmentation.png", segmentation_picture(test.images[rows], columns, learn.classes))
    print(f"\nwrote {folder}/segmentation.png seg_transfer.json")
