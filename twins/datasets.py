"""Data sets as one tensor: CIFAR, ImageNet-32, STL-10, folders of photographs, and shapes made in memory.

Letters in shapes:  n images  s image side
"""

import functools
import os
import socket
import zipfile
from math import pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from twins.decoding import locked
from twins.errors import UserError
from twins.files import make_folder
from twins.folders import folder

DATASETS = ("shapes", "cifar10", "cifar100", "imagenet32", "stl10", "folder")
CONVERT = """python -c "import glob, numpy, pickle
for name in glob.glob('*_data*'):
    batch = pickle.load(open(name, 'rb'))
    numpy.savez(name, data=batch['data'], labels=batch['labels'])\""""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for all data sets


class Split(NamedTuple):
    images: torch.Tensor  # uint8 [n 3 s s]
    labels: torch.Tensor | None  # int64 [n], -1 where there is none; None: a flat folder
    classes: list[str]
    masks: torch.Tensor | None = None  # [n s s]: uint8 from load(), `shapes` only; int16 from load_masks()
    image_size: int = 0  # pixels in evaluation; 0: s


def load(dataset, data_dir, image_size, split="train", skip_bad_images=False, cache_size=None):
    """One split, 'train' or 'test', of a data set, with square images of `image_size` pixels.

    Photographs of a `folder` to crop views from have side `cache_size` instead, 0: about 1.6 x image_size.
    Raises UserError for an unknown data set, missing or broken files, and a failed download.
    """
    if dataset == "folder":
        images, labels, classes = folder(data_dir, image_size, split, skip_bad_images, cache_size)
        return Split(images, labels, classes, image_size=image_size)
    if dataset not in DATASETS:
        raise UserError(f"--dataset={dataset} is unknown: choose one of {', '.join(DATASETS)}")
    if dataset == "shapes":
        data = shapes(split)
    elif dataset == "imagenet32":
        data = imagenet32(Path(data_dir), split)
    else:
        data = torchvision_set(dataset, data_dir, split)
    if data.images.shape[-1] == image_size:
        return data
    masks = None if data.masks is None else resize(data.masks[:, None], image_size, "nearest")[:, 0]
    return data._replace(images=resize(data.images, image_size, "bilinear"), masks=masks)


def resize(images, size, mode):
    """Images uint8 [n c s s] -> [n c size size]; antialiased, except with mode 'nearest'."""
    options = {"size": (size, size), "mode": mode, "antialias": mode != "nearest"}
    return torch.cat([F.interpolate(chunk, **options) for chunk in images.split(1024)])


def to_device(x, device):
    """A CPU tensor on the device; to a GPU it is copied asynchronously from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@functools.cache
def constant(values, device, dtype):
    """A tuple of numbers as a tensor, copied to the device once: each copy would wait for the GPU."""
    return torch.tensor(values, device=device, dtype=dtype)


def from_bytes(images):
    """uint8 [...] -> floats from 0 to 1."""
    return images.to(torch.get_default_dtype()) / 255


def normalise(x):
    """Float images [b 3 s s] in [0, 1] -> the input of a ViT."""
    mean, std = (constant(t, x.device, x.dtype)[:, None, None] for t in (MEAN, STD))
    return (x - mean) / std


def shapes(split):
    """12,000 training or 2,000 test images made in seconds: a textured object on a smooth background.

    The class is the texture, which survives crops and colour jitter: stripes (three orientations, two
    widths), checks (two widths), rings, plain. Outline (disk, square, diamond), position, size, colours and
    phase are random. A small ViT would learn strong tints instead of textures, so colours are greys with a
    tint of at most 0.15.
    """
    n, seed = {"train": (12_000, 0), "test": (2_000, 1)}[split]
    g = torch.Generator().manual_seed(seed)
    batches = [paint_shapes(500, g) for _ in range(n // 500)]  # small enough for a core's cache
    images, labels, masks = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    orientations = ("vertical", "horizontal", "diagonal")
    names = [f"{width} {orientation} stripes" for width in ("fine", "coarse") for orientation in orientations]
    return Split(images, labels, [*names, "fine checks", "coarse checks", "rings", "plain"], masks)


def paint_shapes(n, g):
    """`n` images uint8 [n 3 s s] of shapes(), labels [n] and masks [n s s], from the random generator `g`."""
    size = 32

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=g)

    labels = torch.randperm(n, generator=g) % 10
    label = labels[:, None, None]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = y - uniform(11, 21), x - uniform(11, 21)  # [n s s], from the object's centre
    radius = (y**2 + x**2).sqrt()
    outlines = torch.stack([radius, torch.maximum(y.abs(), x.abs()) * 1.1, (y.abs() + x.abs()) * 0.8])
    outline = torch.randint(3, (n,), generator=g)
    masks = outlines[outline, torch.arange(n)] < uniform(10, 15)

    sign = uniform(-1, 1).sign()  # a mirrored diagonal is the same class
    along = torch.stack([x, y, (x + sign * y) * 0.5**0.5])[labels % 3, torch.arange(n)]
    fine = torch.where(label < 6, label < 3, label == 6)
    turn = 2 * pi / torch.where(fine, 4.0, 8.0) / uniform(0.9, 1.1)
    phase, phase_y = uniform(0, 2 * pi), uniform(0, 2 * pi)
    stripes = (turn * along + phase).sin()
    checks = 2 * (turn * x + phase).sin() * (turn * y + phase_y).sin()
    rings = (2 * pi / 5 * radius + phase).sin()
    rings_or_plain = torch.where(label == 8, rings, 1.0)
    wave = torch.where(label < 6, stripes, torch.where(label < 8, checks, rings_or_plain))

    shade = (wave.clamp(-1, 1)[:, None] + 1) / 2  # [n 1 s s]
    dark = uniform(0.1, 0.3, 1) + uniform(-0.15, 0.15, 3)
    light = uniform(0.7, 0.9, 1) + uniform(-0.15, 0.15, 3)
    texture = dark + (light - dark) * shade
    corner, slope = uniform(0.4, 0.6, 1) + uniform(-0.15, 0.15, 3), uniform(-0.3, 0.3, 1, 2)
    ground = corner + slope[:, :, 0] * y[:, None] / size + slope[:, :, 1] * x[:, None] / size
    images = torch.where(masks[:, None], texture, ground)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks.to(torch.uint8)


def torchvision_set(name, data_dir, split):
    """CIFAR-10, CIFAR-100 or STL-10; the latter's training split has 100,000 images without a label (-1)."""
    from torchvision.datasets import CIFAR10, CIFAR100, STL10  # imported here because it takes a second

    if name == "stl10":
        data = fetch(STL10, data_dir, split="train+unlabeled" if split == "train" else "test")
        return Split(torch.from_numpy(data.data), torch.from_numpy(data.labels).long(), data.classes)
    data = fetch({"cifar10": CIFAR10, "cifar100": CIFAR100}[name], data_dir, train=split == "train")
    images = rearrange(torch.from_numpy(data.data), "n h w c -> n c h w").contiguous()
    return Split(images, torch.tensor(data.targets), data.classes)


def fetch(kind, data_dir, **which):
    """A torchvision data set: the local copy (checksums verified) if `data_dir` holds one, else a download.

    The environment variable DINO_TWINS_MIRROR is another place to download from: <mirror>/<file name>.
    """
    mirror = os.environ.get("DINO_TWINS_MIRROR")
    if mirror and hasattr(kind, "filename"):
        kind = type(kind.__name__, (kind,), {"url": f"{mirror.rstrip('/')}/{kind.filename}"})
    try:
        return kind(data_dir, **which)
    except RuntimeError:  # missing, or a checksum differs
        socket.setdefaulttimeout(20)
        try:
            with locked(make_folder(data_dir)):  # the processes of torchrun download it once
                return kind(data_dir, **which, download=True)
        except Exception as error:  # network and archive raise many types
            where = getattr(kind, "base_folder", "")
            url = getattr(kind, "url", "the address in torchvision's documentation")
            raise UserError(
                f"{data_dir}/{where} has no complete copy of {kind.__name__}, and its download failed "
                f"({error}). Put the unpacked files there (from {url}), or use --dataset=shapes, which needs "
                "no files."
            ) from None


def imagenet32(root, split):
    """Downsampled ImageNet (1707.08819) as published: npz of `data` uint8 [n 3072] and `labels` from 1."""
    names = sorted(root.glob("train_data_batch_*.npz"), key=lambda p: (len(p.name), p.name))
    files = names if split == "train" else [root / "val_data.npz"]
    if (root / "train_data_batch_1").exists() and not names:
        raise UserError(f"{root} holds pickled batches, which may run code: convert them there by\n{CONVERT}")
    if not files or not files[0].is_file():
        raise UserError(
            f"{root} holds no {files[0].name if files else 'train_data_batch_1.npz'}: get the npz files of "
            "the 32 x 32 images from https://image-net.org/download-images, after signing in, and unpack "
            "them there"
        )
    images, labels = [], []
    for file in tqdm(files, f"reading {root}", unit=" files", disable=len(files) < 2):
        try:
            with zipfile.ZipFile(file) as archive:
                gib = sum(part.file_size for part in archive.infolist()) / 2**30
            if gib > 4:
                raise ValueError(f"it unpacks to {gib:.3g} GiB")
            with np.load(file, allow_pickle=False) as content:
                pixels, classes = content["data"], content["labels"]
            if pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
                raise ValueError(f"data {pixels.dtype} {list(pixels.shape)}, not uint8 [n 3072]")
            if classes.shape != pixels.shape[:1] or classes.dtype.kind not in "iu":
                raise ValueError(f"labels {classes.dtype} {list(classes.shape)}, not a number for each image")
            if not 1 <= classes.min() <= classes.max() <= 1000:
                raise ValueError(f"labels from {classes.min()} to {classes.max()}, not from 1 to 1000")
        except Exception as error:  # numpy and zipfile raise many types for broken files
            raise UserError(f"{file} is not a complete batch ({error}): download it again") from None
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        labels.append(torch.from_numpy(classes.astype(np.int64) - 1))
    labels = torch.cat(labels)
    return Split(torch.cat(images), labels, [str(i + 1) for i in range(int(labels.max()) + 1)])
