"""The pictures that a run writes, as PNG bytes, and what all pictures share.

Letters in shapes:  b images  s v side in pixels
"""

import functools
import io
import os

import torch
from einops import rearrange

from twins.datasets import MEAN, STD, from_bytes

DPI = 160
NAMES = {  # as a paper prints them
    "dino": "DINO",
    "barlow": "Barlow Twins",
    "hybrid_a": "Hybrid A",
    "hybrid_b": "Hybrid B",
    "random": "random weights",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "TV monitor",
}
BY_TIME = "k-NN accuracy by time"
PANELS = {  # of curves.png: {title: prefixes of log columns}; the first match counts
    "k-NN accuracy": ("knn",),
    BY_TIME: (),  # filled from "knn"
    "teacher's output (nats)": ("teacher_", "kl"),
    "feature std, C": ("feature_std", "c_diag", "c_off"),
    "effective rank (RankMe)": ("rank",),
    "learning rate": ("lr",),
    "images per second": ("images_per_s",),
    "GPU memory (GiB)": ("peak_gib",),
    "": ("step", "epoch", "seconds"),  # not drawn
    "loss and its parts": ("",),
}


def printed(name):
    """A name as a paper prints it; in a folder's name, ? replaces what is not UTF-8."""
    return NAMES.get(name, name).encode(errors="replace").decode()


@functools.cache
def load_matplotlib():
    """The module, imported late because it takes a second.

    A notebook's MPLBACKEND may name a package that is not installed here, so the import would fail.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def png(figure):
    for text in figure.findobj(load_matplotlib().text.Text):
        text.set_parse_math(False)  # a folder's name may hold dollar signs
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def curves_picture(rows):
    """curves.png: the numbers of a log's rows against the step, in panels; k-NN also against minutes."""
    curves = {title: {} for title in ("loss and its parts", *PANELS)}
    for row in rows:
        for name, value in row.items():
            title = next(t for t, starts in PANELS.items() if name.startswith(starts))
            if isinstance(value, int | float):
                curves[title].setdefault(name, []).append((row["step"], value))
                if name == "knn":
                    curves[BY_TIME].setdefault(name, []).append((row.get("seconds", 0) / 60, value))
    panels = {title: columns for title, columns in curves.items() if title and columns}
    lines = -(-len(panels) // 3)
    figure = load_matplotlib().figure.Figure(figsize=(12, max(3.2 * lines, 1)), layout="constrained")
    for i, (title, columns) in enumerate(panels.items()):
        axis = figure.add_subplot(lines, 3, i + 1)
        for name, points in columns.items():
            width = 4 if name == "loss" else 1.5  # wider, as it may coincide with its only part
            marker = "." if len(points) < 30 else None
            axis.plot(*zip(*points, strict=True), label=name, linewidth=width, marker=marker)
        axis.set(title=title, xlabel="minutes of training" if title == BY_TIME else "step")
        axis.legend(fontsize=8)
    return png(figure)


def crops_picture(images, views, names):
    """crops.png: images uint8 [b 3 s s] and their normalised views, a list of [b 3 v v], one column each."""
    from PIL import Image, ImageDraw  # not matplotlib, which delays a run's start by half a second

    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    columns = [from_bytes(images.cpu())] + [view.cpu() * std + mean for view in views]
    zoom = max(160 // images.shape[-1], 1)
    cell = zoom * images.shape[-1] + 8
    heading = 24
    sheet = Image.new("RGB", (cell * len(columns), cell * len(images) + heading), "gainsboro")
    pen = ImageDraw.Draw(sheet)
    for i, (column, name) in enumerate(zip(columns, ["image", *names], strict=True)):
        pen.text((i * cell + 4, 6), name, "black", font_size=13)
        for j, pixels in enumerate((column.clamp(0, 1) * 255).round().byte()):
            tile = Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())
            tile = tile.resize((zoom * tile.width, zoom * tile.height), Image.Resampling.NEAREST)
            sheet.paste(tile, (i * cell + 4, j * cell + heading))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()
