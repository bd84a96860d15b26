"""Attention maps of one or more backbones: pictures, numbers, and a test of whether groups of runs differ.

A map is [CLS]'s attention to the patches in the last block, of one head or averaged over heads, summing to 1.
Pictures show log2 of its ratio to uniform attention, and patch tokens as colours (PCA, as in DINOv2). With
masks: the share of attention on the object, over the object's share of the image (mass / area: 1 is uniform),
and DINO's Jaccard index of the top patches that hold 60 or 80 % of the attention (2104.14294, figure 4); "-"
where a map is so flat that noise determines these patches.

Two maps p, q of an image differ by the Jensen-Shannon divergence, 0 to 1 bit; two runs by its mean over
images, on maps averaged over heads; a permutation test over runs compares groups (twins/permutation.py):

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2

    python attn_viz.py --ckpt=out/dino-shapes,out/barlow-shapes           pictures and figures
    python attn_viz.py --ckpt=dino=a:b:c,barlow=d:e:f                     groups of runs: also the test
    python attn_viz.py --ckpt=out/dino-cifar10 --images=photograph.jpg    your own images

Letters in shapes:  n images  h heads  y x patch grid  r runs  s image side
"""

import os
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import load
from twins.attention import attend, attention_figures, divergences, keep_mass, near_uniform
from twins.backbones import configure_evaluation, load_backbone, output_folder, random_like, trained_on
from twins.datasets import Split
from twins.decoding import decode
from twins.errors import UserError
from twins.evaluation_pictures import attention_picture, divergence_picture, pca_colours
from twins.files import git_state, write_file, write_results
from twins.folders import image_files
from twins.masks import has_masks, load_masks
from twins.permutation import permutation_test, sentence
from twins.pictures import NAMES, printed
from twins.processes import rank, setup
from twins.segmentation import patch_tokens
from vit import ViT, check_size

ckpt = ""  # A,B,... or name=A:B,name=C:D; each a run's folder, an export folder, a file of weights, or random
weights = ""  # a network of the checkpoints, such as student; empty: the one that a run evaluates
dataset = ""  # shapes, cifar10, folder, voc2012 ...; empty: what the first run was trained on
data_dir = ""  # where its files are; empty: where the first run found them
images = ""  # your own images instead: a folder or a file
out_dir = ""  # where pictures and attention.json go; empty: next to the first checkpoint
image_size = 0  # pixels; 0: what the first backbone was trained with [0..]
skip_bad_images = False  # in a folder, skip files that cannot be read, up to 1 %
n_images = 500  # maximum number of test images [1..]
rows = 4  # images in attention.png [1..]
blocks = "last"  # attention.png shows the heads of the last block, or the mean map of all blocks [last|all]
patch_size = 4  # pixels, for --ckpt=random [1..]
dim = 192  # width, for --ckpt=random [1..]
depth = 12  # blocks, for --ckpt=random [1..]
heads = 0  # attention heads, for --ckpt=random (0: 3) and for weights that do not say (0: guessed) [0..]
permutations = 20000  # regroupings of the runs: all, or a random sample of this size [1..]
seed = 0  # of the choice of images, the permutations and the bootstrap [0..]
device = "auto"  # cuda, mps or cpu; auto: the first available
dtype = "float32"  # of the backbone; auto: bfloat16 where it is faster [auto|bfloat16|float64]

PRESETS = {"shapes": {"dim": 64, "depth": 3, "heads": 2}, "stl10": {"image_size": 96, "patch_size": 8}}
COLUMNS = {"mass_over_area": "mass / area", "entropy_bits": "entropy, bits"}
COLUMNS.update(distance_pixels="distance, pixels", head_diversity_bits="head diversity, bits")


def read_groups(text):
    """'A,B' or 'name=A:B,name=C:D' -> {name: [checkpoint, ...]}; the default name is the folder's."""
    groups = {}
    for item in text.split(","):
        path = Path(item)
        match = None if os.path.exists(item) else re.match(r"([^/=]+)=(.*)$", item)
        if match:
            name, checkpoints = match[1], match[2].split(":")
        elif item == "random":
            name, checkpoints = "random", [item]
        else:
            folder = path.absolute() if os.path.isdir(item) else path.absolute().parent
            name, checkpoints = folder.name, [item]
        if name in groups:
            raise UserError(f"--ckpt has two groups called {name}: give them names, --ckpt=a=A,b=B")
        if not all(checkpoints) or (name == "random") != (set(checkpoints) == {"random"}):
            raise UserError(f"--ckpt: '{item}' is neither a checkpoint nor name=A:B; random is reserved")
        groups[name] = checkpoints
    return groups


def warn_of_mixed_groups(runs):
    """Prints a warning for a group with runs of several methods, or of another method than its name."""
    for group in dict.fromkeys(run["group"] for run in runs):
        scripts = {run["checkpoint"].get("script") for run in runs if run["group"] == group} - {None}
        methods = {*scripts, group} if group in NAMES else scripts
        if len(methods) > 1:
            print(f"warning: the group {group} holds runs of {' and '.join(sorted(scripts))}")


def own_images(path, size):
    """One image file, or those of a folder without unreadable ones, which it prints: Split."""
    paths = [path] if os.path.isfile(path) else image_files(path)
    decoded = []
    for file in paths:
        try:
            decoded.append(torch.from_numpy(decode(file, size).copy()))
        except ValueError as error:
            print(f"left out: {error}")
    if not decoded:
        raise UserError(f"--images={path} holds no image that can be read")
    if len(decoded) < len(paths):
        print(f"{len(paths) - len(decoded)} of {len(paths)} images left out")
    return Split(torch.stack(decoded), None, [])


def choose_images(dataset, data_dir, size, n, seed, skip_bad_images):
    """At most `n` random images of a test set, with masks if it has any: Split."""
    loader = load_masks if has_masks(dataset, data_dir) else load
    data = loader(dataset, data_dir, size, "test", skip_bad_images)
    indices = torch.from_numpy(np.random.default_rng((seed, 6)).permutation(len(data.images))[:n])
    masks = None if data.masks is None else data.masks[indices]
    return data._replace(images=data.images[indices], labels=None, masks=masks)


def panel(backbone, maps, pixels, device, autocast):
    """The columns of attention.png for one run and the first `rows` images: see attention_picture()."""
    columns = {}
    if blocks == "all":
        for i in range(len(backbone.blocks)):
            columns[f"block {i + 1}"] = attend(backbone, pixels[:rows], device, autocast, i)[0].mean(1)
        return columns
    first = maps[:rows]
    columns["mean of heads"] = first.mean(1)
    for i in range(first.shape[1]):
        columns[f"head {i + 1}"] = first[:, i]
    if not near_uniform(maps.mean(1)):
        columns["60 % of mass"] = keep_mass(first.mean(1), 0.6)
    with autocast, torch.no_grad():
        tokens = patch_tokens(backbone, pixels[: max(rows, 64)].to(device))
    columns["patch tokens, PCA"] = pca_colours(tokens.cpu())[:rows]
    return columns


def compare_groups(d, names, groups, seeds):
    """Tests all groups but random weights, then each pair: d [n r r], group and seed of runs int64 [r]."""
    trained = [i for i, name in enumerate(names) if name != "random"]
    pairs = list(combinations(trained, 2))
    tests = []
    for compared in [trained, *pairs] if len(pairs) > 1 else pairs:
        runs = torch.isin(groups, torch.tensor(compared))
        test = permutation_test(d[:, runs][:, :, runs], groups[runs], seeds[runs], permutations, seed)
        tests.append({"groups": [names[i] for i in compared], **test})
    return tests


def print_table(runs, names):
    """One row per group: means over heads and images, then over runs, ± their standard deviation."""
    columns = {name: title for name, title in COLUMNS.items() if name in runs[0]}
    jaccards = []
    if "jaccard_60" in runs[0]:
        jaccards = [(60, "best_head"), (60, "mean_map"), (80, "best_head"), (80, "mean_map")]
    titles = [*columns.values(), *(f"J{percent} {kind.replace('_', ' ')}" for percent, kind in jaccards)]
    print(f"| group | runs | {' | '.join(titles)} |\n|---|---:|{'---:|' * len(titles)}")
    for name in names:
        group = [run for run in runs if run["group"] == name]
        cells = [mean_and_spread([np.mean(run[column]) for run in group]) for column in columns]
        for percent, kind in jaccards:
            values = [run[f"jaccard_{percent}"] for run in group]  # None: nearly uniform
            cells.append(mean_and_spread([value[kind] for value in values]) if all(values) else "-")
        print(f"| {printed(name)} | {len(group)} | {' | '.join(cells)} |")


def mean_and_spread(values):
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    config = configure_evaluation(globals())
    device, autocast = setup(device, dtype, seed)
    groups = read_groups(ckpt)
    runs, backbones = [], []
    for name, paths in groups.items():
        for path in paths:
            backbone, about = load_backbone({**config, "ckpt": path}, device, ViT)
            runs.append({"group": name, "ckpt": path, "checkpoint": about})
            backbones.append(backbone)
    about = runs[0]["checkpoint"]
    image_size = image_size or about["image_size"]
    warn_of_mixed_groups(runs)
    if "random" not in groups:  # the floor: three networks
        for _ in range(3):
            runs.append({"group": "random", "ckpt": "random", "checkpoint": {"ckpt": "random"}})
            backbones.append(random_like(backbones[0], device))
    for backbone in backbones:
        check_size(image_size, backbone.patch_size)
    if images:
        data = own_images(images, image_size)
    else:
        dataset, data_dir = trained_on(config, about)
        data = choose_images(dataset, data_dir, image_size, n_images, seed, skip_bad_images)

    folder = output_folder(config, runs[0]["ckpt"], dataset or "images")
    mean_maps, panels = [], {}
    bar = tqdm(runs, "attention", unit="run", disable=len(data.images) < 100)
    for run, backbone in zip(bar, backbones, strict=True):
        maps, distance = attend(backbone, data.images, device, autocast)
        run.update(attention_figures(maps, distance, data.masks))
        mean_maps.append(maps.mean(1))
        if run["group"] not in panels:  # the picture shows the first run of a group
            panels[run["group"]] = panel(backbone, maps, data.images, device, autocast)

    if rank():
        sys.exit()  # rank 0 tests and reports
    names = list(panels)
    group_of_run = torch.tensor([names.index(run["group"]) for run in runs])
    seeds = [run["checkpoint"].get("seed", -1 - i) for i, run in enumerate(runs)]
    seed_of_run = torch.tensor([seeds.index(number) for number in seeds])  # only their equality matters
    d = divergences(mean_maps)
    tests = compare_groups(d, names, group_of_run, seed_of_run)

    result = {**config, "dataset": dataset, "image_size": image_size, "runs": runs, "names": names}
    result.update(group_of_run=group_of_run.tolist(), seed_of_run=seeds, tests=tests)
    result.update(divergence_bits=d.mean(0).tolist(), images=len(data.images))
    result.update(torch=torch.__version__, **git_state())

    print(f"\n{len(data.images)} images of {images or dataset}, {image_size} pixels, last block\n")
    print_table(runs, names)
    print(f"\nuniform attention: {runs[0]['entropy_uniform']:.2f} bits, mass / area 1 if there are masks")
    answers = [sentence(test, [printed(name) for name in test["groups"]]) for test in tests]
    if answers:
        print(f"\n{answers[0]}")
    pairwise = [answers[i] for i, test in enumerate(tests) if i > 0 and "p" in test]
    if pairwise:
        print("\nPairwise tests, not corrected for multiple comparisons:\n")
        print("\n".join(pairwise))

    # written last, so a full disk cannot lose the table
    write_results(folder / "attention.json", result)
    write_file(folder / "attention.png", attention_picture(data.images[:rows], panels, data.masks))
    write_file(folder / "divergence.png", divergence_picture(d.mean(0), names, group_of_run, seed_of_run))
    print(f"\nwrote {folder}/attention.png divergence.png attention.json")
