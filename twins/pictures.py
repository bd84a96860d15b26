"""The pictures that runs and evaluations write, as bytes of PNG files."""

import io
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from twins.datasets import MEAN, STD, from_bytes

COLUMNS = 13  # of attention.png, at most, before it goes on below


def curves_picture(rows):
    """curves.png: every column of the log against the step, what belongs together in one panel. Returns the file's bytes."""
    from matplotlib.figure import Figure  # here, for the import takes a second

    panels = {"loss": ["loss", "ce", "cc"], "k-NN accuracy": ["knn", "knn_init"], "teacher entropy, KL": ["teacher_entropy", "kl"]}
    panels |= {"feature std, C": ["feature_std", "c_diag", "c_off"], "RankMe": ["rank"], "learning rate": ["lr"]}
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def crops_picture(images, views, names):
    """crops.png: images uint8 [b 3 s s] and their views, a list of [b 3 v v], a column each. Returns the file's bytes."""
    from PIL import Image, ImageDraw  # not matplotlib: a run starts half a second sooner

    columns = [from_bytes(images.cpu())]
    columns += [v.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None] for v in views]
    zoom = max(128 // images.shape[-1], 1)
    cell = zoom * images.shape[-1] + 8
    sheet = Image.new("RGB", (cell * len(columns), cell * len(images) + 20), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (column, name) in enumerate(zip(columns, ["image", *names], strict=True)):
        pen.text((i * cell + 4, 4), name, "black")
        for j, pixels in enumerate((column.clamp(0, 1) * 255).byte()):
            tile = Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())
            tile = tile.resize((zoom * tile.width, zoom * tile.height), Image.Resampling.NEAREST)
            sheet.paste(tile, (i * cell + 4, j * cell + 20))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def attention_picture(images, panels, masks=None):
    """attention.png: images uint8 [n 3 s s]; panels {name: {title: maps [n y x] or bool masks [n y x]}}; masks [n s s] or None.

    Maps are in units of uniform attention, one colour scale for all; a mask leaves the image bright where it is true.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    lines, wide = [{}], 1
    for name, columns in panels.items():
        if wide + len(columns) > COLUMNS and lines[-1]:
            lines.append({})
        lines[-1][name] = columns
        wide = 1 + sum(map(len, lines[-1].values()))
    wide = max(1 + sum(map(len, line.values())) for line in lines)
    shown = [m * m[0].numel() for columns in panels.values() for m in columns.values() if m.dtype != torch.bool]
    scale = ScalarMappable(PowerNorm(0.5, 0, max(m.flatten().quantile(0.99).item() for m in shown)), "inferno")
    size, rows = images.shape[-1], len(images)
    figure = Figure(figsize=(1.15 * wide + 1, len(lines) * (1.15 * rows + 0.6)), layout="constrained")
    body, bar = figure.subfigures(1, 2, width_ratios=(1.15 * wide, 1))
    pixels = rearrange(images, "n c h w -> n h w c").numpy() / 255
    grey = pixels.mean(-1, keepdims=True)
    for strip, line in zip(body.subfigures(len(lines), 1, squeeze=False)[:, 0], lines, strict=True):
        everything = {"": {"image": None}} | line
        widths = [len(columns) for columns in everything.values()]
        spare = [wide - sum(widths)] * (wide > sum(widths))
        parts = strip.subfigures(1, len(widths) + len(spare), width_ratios=widths + spare, squeeze=False)[0]
        for part, (name, columns) in zip(parts, everything.items(), strict=False):
            part.suptitle(name or " ", fontsize=10, weight="bold")
            grid = part.subplots(rows, len(columns), squeeze=False)
            for (j, (title, maps)), i in product(enumerate(columns.items()), range(rows)):
                axis = grid[i, j]
                axis.set_title(title if i == 0 else "", fontsize=8)
                axis.axis("off")
                if maps is None:
                    over = pixels[i]
                elif maps.dtype == torch.bool:
                    kept = F.interpolate(maps[i][None, None].float(), size=(size, size), mode="nearest")[0, 0, :, :, None].numpy()
                    over = pixels[i] * (0.2 + 0.8 * kept)
                else:
                    smooth = F.interpolate(maps[i][None, None] * maps[i].numel(), size=(size, size), mode="bilinear")[0, 0]
                    over = 0.35 * grey[i] + 0.65 * scale.to_rgba(smooth.numpy())[..., :3]
                axis.imshow(over, interpolation="nearest")
                if maps is None and masks is not None:
                    axis.contour(masks[i] > 0, levels=[0.5], colors="cyan", linewidths=1)
    bar.colorbar(scale, cax=bar.add_axes((0.1, 0.1, 0.25, 0.8)), label="attention, times uniform", extend="max")
    return png(figure)


def divergence_picture(mean, names, groups, seeds):
    """divergence.png: d [r r] in bits of runs, and means of groups called `names`; the group and seed of each run int64 [r]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    k = len(names)
    image = left.imshow(mean, cmap="viridis", vmin=0)
    starts = [int((groups < g).sum()) for g in range(k + 1)]
    for edge in starts[1:-1]:
        left.axhline(edge - 0.5, color="white")
        left.axvline(edge - 0.5, color="white")
    middles = [(a + b - 1) / 2 for a, b in pairwise(starts)]
    table, other = np.full((k, k), np.nan), seeds[:, None] != seeds
    for a, b in product(range(k), range(k)):
        pairs = mean[(groups[:, None] == a) & (groups == b) & (other | (a != b) * ~other[groups == a][:, groups == b].any())]
        table[a, b] = pairs.mean() if len(pairs) else np.nan
    right.imshow(table, cmap="viridis", vmin=0, vmax=float(mean.max()))
    for a, b in np.argwhere(~np.isnan(table)):
        right.text(b, a, f"{table[a, b]:.3f}", ha="center", va="center", color="white" if table[a, b] < 0.6 * mean.max() else "black")
    titles = "each run against each", "means of groups, of different seeds where there are"
    for axis, title, ticks in zip((left, right), titles, (middles, range(k)), strict=True):
        axis.set(title=title, xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names)
        axis.tick_params(axis="x", labelrotation=90 if max(map(len, names)) > 10 else 30)
    figure.colorbar(image, ax=(left, right), label="Jensen-Shannon divergence of mean attention maps, bits")
    return png(figure)


def segmentation_picture(images, columns, classes):
    """segmentation.png: images uint8 [n 3 s s], columns {title: masks int16 [n s s]}; colours of classes, white: not counted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = torch.tensor(colormaps["tab20"].colors)[[*range(0, 20, 2), *range(1, 20, 2)]]  # the bright ones first
    colours = palette[torch.arange(len(classes) + 1) % 20].float()
    colours[0], colours[-1] = 0.15, 1.0
    figure = Figure(figsize=(1.6 * (1 + len(columns)), 1.6 * len(images) + 0.7), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for i, image in enumerate(images):
        pixels = rearrange(image, "c h w -> h w c").numpy() / 255
        grid[i, 0].imshow(pixels)
        for axis, masks in zip(grid[i, 1:], columns.values(), strict=True):
            axis.imshow(0.25 * pixels + 0.75 * colours[masks[i].long()].numpy(), interpolation="nearest")
    for axis, title in zip(grid[0], ["image", *columns], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in grid.flat:
        axis.axis("off")
    present = sorted({c for masks in columns.values() for c in masks[: len(images)].unique().tolist()})[:12]
    names = {c: classes[c] if c >= 0 else "not counted" for c in present}
    patches = [Patch(facecolor=colours[c].tolist(), edgecolor="black", label=name) for c, name in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    return png(figure)


