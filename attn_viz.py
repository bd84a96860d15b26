"""Attention maps of one or more backbones: pictures, figures, and a test whether they differ by more than seeds do.

A map is [CLS]'s attention to the patches in one block, of one head or the mean of all, scaled to sum 1. A mask keeps the
largest patches that hold 60 % of it (DINO, 2104.14294, figure 4). Two maps p, q of an image differ by the Jensen-Shannon
divergence, 0 to 1 bit:

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2        d[r, s] = mean over images, of the mean maps of runs r and s

    effect = mean d between groups - mean over groups of d within        p = share of all ways to deal the runs out with as large an effect

Runs are dealt out, all images of a run together, for a run is what a seed makes anew: exchanging images alone would take two
seeds of one script for two scripts. Runs of one seed start from the same weights and see the same views, so two of them are never
compared, and if every group has the same seeds, runs are dealt out within a seed (a paired test). The interval is a bootstrap
over images, for these runs. Groups whose seeds spread differently are found different, too.

    python attn_viz.py --ckpt=out/dino-shapes/ckpt.pt,out/barlow-shapes/ckpt.pt                 pictures and figures
    python attn_viz.py --ckpt=dino=a/ckpt.pt:b/ckpt.pt,barlow=c/ckpt.pt:d/ckpt.pt               groups: the test too

Letters in shapes:  n images  h heads  y x patch grid  k patches  r runs  s image side
"""

import json
import math
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import load
from twins.attention import attend, divergence, entropy, jaccard, keep_mass
from twins.backbones import configure_evaluation, load_backbone, output_folder, random_like, trained_on
from twins.datasets import Split, decode, image_files
from twins.errors import UserError
from twins.files import git_state, write_file
from twins.masks import has_masks, load_masks
from twins.pictures import attention_picture, divergence_picture
from twins.processes import rank, setup
from vit import ViT, check_size

ckpt = ""  # what to look at: A,B,... or name=A:B,name=C:D; each a ckpt.pt, an export folder, an official DINO .pth, or random
weights = ""  # a network of the checkpoints, such as student; empty: the one that a run evaluates
dataset = ""  # shapes, cifar10, cifar100, folder, voc2012, pet or imagenet_s; empty: what the first run was trained on
data_dir = ""  # where its files are; empty: where the first run found them
images = ""  # a folder of your own images instead
out_dir = ""  # where pictures and attention.json go; empty: next to the first checkpoint
image_size = 0  # pixels; 0: what the first backbone was trained with
skip_bad_images = False  # of a folder: leave out what cannot be read, up to 1 %
n_images = 500  # at most so many images of the test set for the figures
rows = 4  # images in attention.png
blocks = "last"  # or all: attention.png shows the mean map of every block
patch_size = 4  # pixels, of --ckpt=random
dim = 192  # width, of --ckpt=random
depth = 12  # blocks, of --ckpt=random
heads = 0  # attention heads, of --ckpt=random (0: 3) and of weights that do not say (0: width / 64)
permutations = 10000  # random ways to deal the runs out
seed = 0  # of the choice of images, the permutations and the bootstrap
device = "auto"  # cuda, mps or cpu; auto: the first of them that is here
dtype = "float32"  # or bfloat16 for the backbone; auto: bfloat16 on a GPU that has it

PRESETS = {"shapes": dict(dim=64, depth=3, heads=2)}  # as the training scripts have it, for --ckpt=random

COLUMNS = 13  # of attention.png, at most, before it goes on below

def read_groups(text):
    """'A,B' or 'name=A:B,name=C:D' -> {name: [checkpoint, ...]}; a checkpoint without a name is called after its folder."""
    groups = {}
    for item in text.split(","):
        named = None if Path(item).exists() else re.match(r"([^/=]+)=(.+)$", item)
        folder = Path(item).absolute()
        name = named[1] if named else item if item == "random" else folder.name if folder.is_dir() else folder.parent.name
        if name in groups:
            raise UserError(f"--ckpt has two groups called {name}: name them, --ckpt=a=A/ckpt.pt,b=B/ckpt.pt")
        groups[name] = named[2].split(":") if named else [item]
        if not all(groups[name]) or (name == "random") != (set(groups[name]) == {"random"}):
            raise UserError(f"--ckpt={text}: '{item}' is no checkpoint, nor name=A:B; the name random is for random weights alone")
    return groups


# ----------------------------------------------------------------------------------------------------------------- maps


def describe(maps, distance, masks=None):
    """The figures of one run: maps [n h y x], distance [h], masks int16 [n s s] or None."""
    flat, mean = maps.flatten(2), maps.mean(1, keepdim=True)
    pairs = list(combinations(range(maps.shape[1]), 2))
    figures = {"entropy_bits": entropy(flat).mean(0).tolist(), "entropy_uniform": math.log2(flat.shape[-1])}
    figures |= {"distance_pixels": distance.tolist()}
    figures["head_diversity_bits"] = sum(divergence(flat[:, i], flat[:, j]).mean().item() for i, j in pairs) / max(len(pairs), 1)
    if masks is not None:
        share = F.adaptive_avg_pool2d(torch.stack([(masks > 0).float(), (masks >= 0).float()], 1), maps.shape[-2:])
        some = share[:, 0].sum((1, 2)) > 0  # images with an object
        inside = (maps * share[:, :1]).sum((2, 3)) / (maps * share[:, 1:]).sum((2, 3)).clamp(min=1e-9)
        area = share[:, 0].sum((1, 2)) / share[:, 1].sum((1, 2)).clamp(min=1e-9)
        figures |= {"mass_in_mask": inside[some].mean(0).tolist(), "area_of_mask": area[some].mean().item()}
        for percent in (60, 80):
            best, each = jaccard(keep_mass(maps, percent / 100), masks)
            whole, _ = jaccard(keep_mass(mean, percent / 100), masks)
            figures[f"jaccard_{percent}"] = {"best_head": best, "mean_map": whole, "heads": each}
    return figures


# ----------------------------------------------------------------------------------------------------------------- test


def divergences(maps):
    """Mean maps of r runs, each [n y x], grids may differ -> d [n r r] in bits, on the coarsest grid."""
    side = min(m.shape[-1] for m in maps)
    flat = [F.adaptive_avg_pool2d(m, side).flatten(1) for m in maps]
    p = torch.stack([m / m.sum(-1, keepdim=True) for m in flat], 1)
    return divergence(p[:, :, None], p[:, None])


def between_within(d, groups, seeds):
    """d [... r r], the group of each run [... r], its seed [r] -> mean d of two runs of two groups, and of one group, each [...].

    Two runs of the same seed are not compared; a group counts once, however many runs it has (as in the energy distance).
    """
    pair = (seeds[:, None] != seeds).float().triu(1)
    same = (groups[..., :, None] == groups[..., None, :]) * pair
    between = (d * (pair - same)).sum((-2, -1)) / (pair - same).sum((-2, -1))
    of_group = [same * (groups == g)[..., None] for g in groups.unique()]
    within = torch.stack([(d * some).sum((-2, -1)) / some.sum((-2, -1)) for some in of_group]).nanmean(0)  # nan: one run alone
    return between, within


def permutation_test(d, groups, seeds, permutations, seed):
    """Do groups of runs differ by more than runs of one group do? d [n r r], the group and the seed of each run int64 [r].

    Returns {between, within, effect, ratio, interval95, paired, p, smallest_p}; without two runs in some group there is no
    within, and only `between` is returned.
    """
    mean, rng = d.mean(0), np.random.default_rng((seed, 5))
    between, within = between_within(mean, groups, seeds)
    names, sizes = groups.unique(return_counts=True)
    if not (between.isfinite() and within.isfinite()):  # no two runs of one group, or of one seed only
        return {"between": between_within(mean, groups, torch.arange(len(seeds)))[0].item()}
    effect = between - within
    paired = all(torch.equal(seeds[groups == g].sort()[0], seeds[groups == names[0]].sort()[0]) for g in names)
    dealt, ways = np.tile(groups, (permutations, 1)), 1.0
    for block in seeds.unique() if paired else [None]:
        mine = (seeds == block).numpy() if paired else np.full(len(groups), True)
        dealt[:, mine] = rng.permuted(dealt[:, mine], axis=1)
        ways *= math.factorial(mine.sum()) / math.prod(math.factorial(n) for n in groups[mine].unique(return_counts=True)[1])
    ways /= math.prod(math.factorial(n) for n in sizes.unique(return_counts=True)[1])  # groups of one size can change names
    effects = torch.sub(*between_within(mean, torch.from_numpy(dealt), seeds))
    p = (1 + (effects >= effect - 1e-9).sum().item()) / (1 + permutations)
    each = torch.sub(*between_within(d, groups, seeds))  # [n]
    again = each[torch.from_numpy(rng.integers(len(each), size=(2000, len(each))))].mean(1)
    interval = again.quantile(torch.tensor([0.025, 0.975])).tolist()
    result = {"between": between.item(), "within": within.item(), "effect": effect.item(), "ratio": (between / within).item()}
    return result | {"interval95": interval, "paired": paired, "p": p, "smallest_p": 1 / ways}


def sentence(test, names, level=0.05):
    """The answer in words."""
    if "p" not in test:
        return (
            f"The attention maps of {' and '.join(names)} differ by {test['between']:.3f} bits. Whether that is more than another seed "
            "would make cannot be said: give two runs or more of a script, --ckpt=name=A/ckpt.pt:B/ckpt.pt,..."
        )
    (low, high), paired = test["interval95"], ", paired by seed" if test["paired"] else ""
    figures = (
        f"{test['between']:.3f} bits between scripts, {test['within']:.3f} between seeds of one ({test['ratio']:.2f} times; "
        f"effect {test['effect']:.3f} bits, {low:.3f} to {high:.3f} over images), p = {test['p']:.2g}{paired}"
    )
    if test["p"] <= level:
        return f"The attention maps of {', '.join(names)} differ by more than seeds do: {figures}."
    more = f"; so few runs cannot give a p below {test['smallest_p']:.2g}: train more seeds" if test["smallest_p"] > level else ""
    return f"No difference between the attention maps of {', '.join(names)} beyond that of seeds is shown: {figures}{more}."


# ------------------------------------------------------------------------------------------------------------- pictures


# --------------------------------------------------------------------------------------------------------------- images


def own_images(folder, size):
    """A folder's images uint8 [n 3 size size], and the names of files that cannot be read, each of which is printed."""
    if not Path(folder).is_dir():
        raise UserError(f"--images={folder} is no folder")
    made, broken = [], []
    for path in image_files(folder)[0]:
        try:
            made.append(torch.from_numpy(decode(path, size).copy()))
        except UserError as error:
            print(f"left out: {error}")
            broken.append(path)
    if not made:
        raise UserError(f"--images={folder} holds no image that can be read")
    if broken:
        print(f"{len(broken)} of {len(made) + len(broken)} images left out")
    return torch.stack(made), broken


def choose_images(dataset, data_dir, size, n, seed, skip_bad_images):
    """At most `n` random images of a test set, with masks where it has them: Split."""
    maker = load_masks if has_masks(dataset, data_dir) else load
    data = maker(dataset, data_dir, size, "test", skip_bad_images)
    some = torch.from_numpy(np.random.default_rng((seed, 6)).permutation(len(data.images))[:n])
    return data._replace(images=data.images[some], labels=None, masks=None if data.masks is None else data.masks[some])


if __name__ == "__main__":
    config = configure_evaluation(globals())
    if blocks not in ("last", "all"):
        raise UserError(f"--blocks={blocks} is unknown: choose last or all")
    device, autocast = setup(device, dtype, seed)
    groups = read_groups(ckpt)
    runs = [(name, path, *load_backbone(config | {"ckpt": path}, device, ViT)) for name, paths in groups.items() for path in paths]
    _, _, first, about = runs[0]
    image_size = image_size or about["image_size"]
    for _ in range(0 if "random" in groups else 3):  # the floor
        runs.append(("random", "random", random_like(first, device), {"ckpt": "random"}))
    for _, _, backbone, _ in runs:
        check_size(image_size, backbone.patch_size)
    skipped = []
    if images:
        pixels, skipped = own_images(images, image_size)
        data = Split(pixels, None, [])
    else:
        dataset, data_dir = trained_on(config, about)
        if not dataset:
            raise UserError(f"--ckpt={ckpt} does not say what it was trained on: give --dataset, or --images=FOLDER")
        data = choose_images(dataset, data_dir, image_size, n_images, seed, skip_bad_images)

    report, means, panels = [], [], {}
    for name, path, backbone, known in tqdm(runs, "attention", unit="run", disable=len(data.images) < 100):
        maps, distance = attend(backbone, data.images, device, autocast)
        report.append({"group": name, "ckpt": path, "checkpoint": known} | describe(maps, distance, data.masks))
        means.append(maps.mean(1))
        if name in panels:
            continue  # a picture shows the first run of a group
        if blocks == "all":
            layers = [attend(backbone, data.images[:rows], device, autocast, block)[0] for block in range(len(backbone.blocks))]
            panels[name] = {f"block {i + 1}": layer.mean(1) for i, layer in enumerate(layers)}
        else:
            some = maps[:rows]
            panels[name] = {"mean": some.mean(1)} | {f"head {i + 1}": some[:, i] for i in range(some.shape[1])}
            panels[name]["60 % kept"] = keep_mass(some.mean(1), 0.6)

    if rank():
        sys.exit()  # the answer is the first process's
    names = list(dict.fromkeys(name for name, *_ in runs))
    of = torch.tensor([names.index(name) for name, *_ in runs])
    seeds = torch.tensor([known.get("seed", -1 - i) for i, (*_, known) in enumerate(runs)])  # unknown: one of its own
    d = divergences(means)
    asked = torch.tensor([name in groups and name != "random" for name, *_ in runs])
    tested = [name for name in groups if name != "random"]
    tests = []
    for some in [tested, *(combinations(tested, 2) if len(tested) > 2 else [])]:
        if len(some) > 1:
            chosen = asked & torch.tensor([name in some for name, *_ in runs])
            test = permutation_test(d[:, chosen][:, :, chosen], of[chosen], seeds[chosen], permutations, seed)
            tests.append({"groups": list(some)} | test)

    masked = data.masks is not None
    print(f"\n{len(data.images)} images of {images or dataset}, {image_size} pixels, last block; means over heads, images, ± std of runs\n")
    columns = ["entropy, bits", "distance, pixels", "head diversity, bits"]
    columns += ["mass in mask", "J60 best head", "J60 mean map", "J80 best head", "J80 mean map"] * masked
    print(f"| group | runs | {' | '.join(columns)} |\n|---|---:|{'---:|' * len(columns)}")
    for name in names:
        mine = [row for row in report if row["group"] == name]
        cells = [[np.mean(row[key]) for row in mine] for key in ("entropy_bits", "distance_pixels", "head_diversity_bits")]
        if masked:
            cells.append([np.mean(row["mass_in_mask"]) for row in mine])
            cells += [[row[f"jaccard_{p}"][key] for row in mine] for p in (60, 80) for key in ("best_head", "mean_map")]
        spread = [f" ± {np.std(c, ddof=1):.3f}" if len(c) > 1 else "" for c in cells]
        print(f"| {name} | {len(mine)} | " + " | ".join(f"{np.mean(c):.3f}{s}" for c, s in zip(cells, spread, strict=True)) + " |")
    floor = f"uniform attention has an entropy of {report[0]['entropy_uniform']:.2f} bits"
    print(f"\n{floor}" + (f" and {report[0]['area_of_mask']:.3f} of its mass in the mask" if masked else ""))
    for i, test in enumerate(tests if "p" in (tests or [{}])[0] else tests[:1]):
        print("\n" * (i == 0) + "\nPairs, each on its own, not corrected for their number:\n" * (i == 1) + sentence(test, test["groups"]))

    folder = output_folder(config, runs[0][1], dataset or "images")
    about = {"names": names, "group_of_run": of.tolist(), "seed_of_run": seeds.tolist(), "divergence_bits": d.mean(0).tolist()}
    about |= {"tests": tests, "skipped": skipped}
    about |= {"images": len(data.images), "image_size": image_size, "torch": torch.__version__, **git_state()}
    write_file(folder / "attention.json", json.dumps(config | {"dataset": dataset, "runs": report} | about, indent=1))
    shown = None if data.masks is None else data.masks[:rows]
    write_file(folder / "attention.png", attention_picture(data.images[:rows], panels, shown))
    write_file(folder / "divergence.png", divergence_picture(d.mean(0), names, of, seeds))
    print(f"\nwrote {folder}/attention.png divergence.png attention.json")
