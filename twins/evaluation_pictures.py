"""The pictures that evaluations write, as PNG bytes: attention, divergence, segmentation.

Letters in shapes:  n images  s side in pixels  y x patch grid  r runs  g groups
"""

import textwrap
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from twins.pictures import load_matplotlib, png, printed

BITS = 4  # attention from 1/16 to 16 times uniform, the same scale in every figure
TILE, GAP, HEADING, BAR, NAME = 1.2, 0.06, 0.3, 1.0, 0.35  # inches: side, distance, space for the rest


def attention_scale():
    """Colours of attention: log2 of its ratio to uniform attention, white where it is uniform."""
    matplotlib = load_matplotlib()
    return matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-BITS, BITS), "RdBu_r")


def attention_tile(attention):
    """One map [y x] of sum 1 -> RGB [y x 3] on the scale of attention_scale()."""
    ratio = attention * attention.numel()
    return attention_scale().to_rgba(ratio.clamp(min=2.0**-BITS).log2().numpy())[..., :3]


def pca_colours(tokens):
    """Patch tokens [n d y x] -> RGB from 0 to 1 [n y x 3]: first three principal components, as in DINOv2.

    PCA is over all tokens together, so equal colours mean equal features across images.
    """
    flat = rearrange(tokens.double(), "n d y x -> (n y x) d")
    flat = flat - flat.mean(0)
    scores = flat @ torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    scores = F.pad(scores, (0, 3 - scores.shape[1]))  # a ViT of width 1 or 2
    low, high = scores.quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return rearrange(colours, "(n y x) c -> n y x c", n=len(tokens), y=tokens.shape[2])


def highlighted_tile(image, keep):
    """An image [s s 3] from 0 to 1, darkened outside the patches `keep`, bool [y x] -> [s s 3]."""
    keep = F.interpolate(keep[None, None].float(), size=image.shape[:2], mode="nearest")[0, 0, :, :, None]
    return image * (0.2 + 0.8 * keep.numpy())


def draw_tiles(columns, names, block=1, foot=0.0):
    """A sheet of square tiles with the colour bar of attention; foot: inches left free at the bottom.

    columns: {title: tiles [h w 3] or None, one per row}; names: of the rows. A gap follows each `block` rows.
    Returns the figure and {(title, row): its axes}.
    """
    left = NAME if any(names) else GAP
    width = left + len(columns) * (TILE + GAP) + BAR
    blocks = -(-len(names) // block)
    tall = len(names) * (TILE + GAP) + (blocks - 1) * 2 * GAP  # all rows
    height = HEADING + tall + foot + GAP
    figure = load_matplotlib().figure.Figure(figsize=(width, height))
    axes = {}
    for i, name in enumerate(names):
        bottom = height - HEADING - (i + 1) * (TILE + GAP) - i // block * 2 * GAP
        middle = (0.5 * left / width, (bottom + 0.5 * TILE) / height)
        figure.text(*middle, textwrap.fill(name, 16), rotation=90, ha="center", va="center", size=8)
        for j, (title, tiles) in enumerate(columns.items()):
            if tiles[i] is not None:
                corner = (left + j * (TILE + GAP)) / width, bottom / height
                axis = axes[title, i] = figure.add_axes((*corner, TILE / width, TILE / height))
                axis.imshow(tiles[i], interpolation="nearest")
                axis.axis("off")
    for title in columns:
        first = next(axis for (name, _), axis in axes.items() if name == title)
        first.set_title(title, fontsize=8, pad=3)
    bar = min(tall, 4)
    box = ((width - BAR + 0.1) / width, (height - HEADING - bar) / height, 0.15 / width, bar / height)
    label = "log2(attention / uniform); white: uniform"
    figure.colorbar(attention_scale(), cax=figure.add_axes(box), label=label, extend="both")
    return figure, axes


def attention_picture(images, panels, masks=None):
    """attention.png, a row for each image and group: images uint8 [n 3 s s]; panels {group: {title: column}}.

    A column is maps [n y x] of sum 1, patches to keep, bool [n y x], or colours [n y x 3]. masks int16
    [n s s] or None: the objects' outlines, drawn on the images.
    """
    pixels = rearrange(images, "n c h w -> n h w c").numpy() / 255
    titles = dict.fromkeys(title for columns in panels.values() for title in columns)
    tiles = {title: [] for title in ("image", *titles)}
    for i, image in enumerate(pixels):
        tiles["image"] += [image] + [None] * (len(panels) - 1)
        for title in titles:
            tiles[title] += [column_tile(image, columns.get(title), i) for columns in panels.values()]
    names = [printed(name) for name in panels]
    figure, axes = draw_tiles(tiles, names * len(images), len(panels))
    for i in range(0 if masks is None else len(images)):
        objects = masks[i] > 0
        if objects.any():
            axes["image", i * len(panels)].contour(objects, levels=[0.5], colors="lime", linewidths=1)
    return png(figure)


def column_tile(image, column, i):
    """The tile of image i, [s s 3] from 0 to 1, in a column of attention_picture(); None without one."""
    if column is None:
        return None
    if column.dtype == torch.bool:
        return highlighted_tile(image, column[i])
    return column[i].numpy() if column.ndim == 4 else attention_tile(column[i])


def divergence_picture(mean, names, groups, seeds):
    """divergence.png: mean d [r r] in bits, group names [g], group and seed of each run int64 [r]."""
    k = len(names)
    side = max(3.5, 0.7 * k)
    figure = load_matplotlib().figure.Figure(figsize=(2 * side + 4, side + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(mean, cmap="viridis", vmin=0)
    starts = [int((groups < g).sum()) for g in range(k + 1)]
    for edge in starts[1:-1]:
        left.axhline(edge - 0.5, color="white")
        left.axvline(edge - 0.5, color="white")
    table = np.full((k, k), np.nan)
    for a, b in np.ndindex(k, k):
        pairs = (groups[:, None] == a) & (groups == b)
        other_seed = pairs & (seeds[:, None] != seeds)
        if a == b or other_seed.any():
            pairs = other_seed
        table[a, b] = mean[pairs].mean() if pairs.any() else np.nan
    right.imshow(table, cmap="viridis", vmin=0, vmax=float(mean.max()))
    for a, b in np.argwhere(~np.isnan(table)):
        colour = "white" if table[a, b] < 0.6 * mean.max() else "black"
        number = f"{table[a, b]:.3f}" if table[a, b] >= 0.001 else "< 0.001"
        right.text(b, a, number, ha="center", va="center", color=colour, fontsize=8)
    titles = ("runs", "groups: mean over runs,\nof different seeds where possible")
    middles = [(a + b - 1) / 2 for a, b in pairwise(starts)]
    labels = [textwrap.fill(printed(name), 16) for name in names]
    for axis, title, ticks in zip((left, right), titles, (middles, range(k)), strict=True):
        axis.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelrotation=90)
        axis.tick_params(labelsize=9)
    label = "Jensen-Shannon divergence\nof mean attention maps (bits)"
    figure.colorbar(image, ax=(left, right), label=label)
    return png(figure)


def segmentation_picture(images, columns, attention, classes):
    """segmentation.png: images uint8 [n 3 s s]; columns {title: masks int16 [n s s]}; attention [n y x].

    One colour per class, named in `classes`; pixels of class -1, which are ignored, are white.
    """
    matplotlib = load_matplotlib()
    palette = torch.tensor(matplotlib.colormaps["tab20"].colors)[[*range(0, 20, 2), *range(1, 20, 2)]]
    colours = palette[torch.arange(len(classes) + 1) % 20].float()  # bright ones first
    colours[0], colours[-1] = 0.15, 1.0
    pixels = list(rearrange(images, "n c h w -> n h w c").numpy() / 255)
    tiles = {"image": pixels}
    grey = [image.mean(2, keepdims=True) for image in pixels]  # so that colours are only classes
    for title, masks in columns.items():
        painted = colours[masks.long()].numpy()
        tiles[title] = [0.25 * image + 0.75 * paint for image, paint in zip(grey, painted, strict=True)]
    tiles["attention"] = [attention_tile(attention_map) for attention_map in attention]
    present = sorted({c for masks in columns.values() for c in masks.unique().tolist()})[:12]
    names = {c: printed(classes[c]) if c >= 0 else "not counted" for c in present}
    figure, _ = draw_tiles(tiles, [""] * len(images), foot=0.1 + 0.2 * -(-len(names) // 4))
    patches = []
    for c, name in names.items():
        patches.append(matplotlib.patches.Patch(facecolor=colours[c].tolist(), edgecolor="black", label=name))
    figure.legend(handles=patches, loc="lower center", ncols=4, fontsize=8, frameon=False)
    return png(figure)
