"""Batches and held-out images of a data set, and multi-crop views made for a whole batch at once.

A data set is `images` uint8 [n 3 s s] and `labels` int64 [n]. A view is a random crop, flip, colour jitter,
grey, blur and solarize (BYOL's augmentation, 2006.07733 appendix B, as DINO uses it), every image with its
own parameters; only the order of the colour jitters is shared. A step's views depend on (seed, step) alone:
numpy draws their parameters on the CPU, so they are the same on every device, however many processes share
the batch, and resuming needs no state.

Letters in shapes:  b images  n data set  s image side  v side of a view  i rows or columns of a view, j of an
image
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from twins.datasets import constant, from_bytes, normalise, to_device
from twins.datasets import load as load  # for the scripts
from twins.errors import UserError
from twins.processes import batch_rand, shard, world


def training_split(data, knn_bank, knn_queries, batch_size):
    """Which images to train on, and the k-NN monitor's bank and queries, with labels: three int64 [m].

    Queries come from the 10 % of the labelled images held out of training, the same for every run and
    seed. Without labels there are no queries and nothing is held out. Raises UserError when a batch is larger
    than what is left.
    """
    n = len(data.images)
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    labelled = order if data.labels is None else order[data.labels[order] >= 0]
    held = labelled[: len(labelled) // 10]
    if data.labels is None:
        print("no class folders, so no labels: training on all images, the k-NN monitor is off", flush=True)
        held = order[:0]
    train_indices = order[~torch.isin(order, held)]
    if batch_size > len(train_indices):
        images = f"the {len(train_indices)} images to train on ({n} less what is held out)"
        raise UserError(f"--batch_size={batch_size} is larger than {images}")
    return train_indices, labelled[len(held) :][:knn_bank], held[:knn_queries]


def fingerprint(data):
    """A hash of a Split's size, labels and half a row of every image: a resumed run notices other data."""
    side = data.images.shape[-1]
    middle = data.images[:, 0, side // 2, side // 4 : side - side // 4]
    content = [str(tuple(data.images.shape)).encode(), middle.numpy().tobytes()]
    content += [] if data.labels is None else [data.labels.numpy().tobytes()]
    return hashlib.sha256(b"".join(content)).hexdigest()


class Batches:
    """Batches(...)(step): the images of a step, uint8 [b 3 s s] on `device`; each process has its part.

    Data sets up to `memory_gib` are held on the device; batches of larger ones are read two steps ahead, in
    the background: from its cache file for a `folder`, from memory for the other data sets.
    """

    def __init__(self, images, train_indices, batch_size, seed, device, memory_gib):
        gib = images[0].numel() * len(images) / 2**30
        self.pool = None if gib <= memory_gib else ThreadPoolExecutor(1)
        if self.pool:
            more = f"{gib:.3g} GiB of images, more than --memory_gib={memory_gib:g}"
            print(f"{more}: batches are read ahead", flush=True)
        self.images = images if self.pool else images.to(device)
        self.train_indices = train_indices
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.reading = {}  # step: a Future of its images

    def read(self, step):
        order = batch_indices(len(self.train_indices), self.batch_size, self.seed, step)
        indices = self.train_indices[shard(order)]
        if self.pool is None:
            return self.images[to_device(indices, self.device)]
        return self.images[indices].pin_memory() if self.device.type == "cuda" else self.images[indices]

    def __call__(self, step):
        if self.pool is None:
            return self.read(step)
        for ahead in range(step, step + 3):
            if ahead not in self.reading:
                self.reading[ahead] = self.pool.submit(self.read, ahead)
        return to_device(self.reading.pop(step).result(), self.device)


class Crop(NamedTuple):
    """A view's side in pixels, its share of the image's area, its probability of blur and of solarize."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0


@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng((seed, 0, epoch)).permutation(n))


def batch_indices(n, batch_size, seed, step):
    """Which images step `step` sees, [b]: a new order every epoch; a last, partial batch is dropped."""
    epoch, i = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[i * batch_size : (i + 1) * batch_size]


def view_features(backbone, views):
    """A ViT's [CLS] features [n d] of views, a list of [b 3 s s], one view after the other.

    Views of one size go through the ViT together. Drop path gets the random numbers that one process would
    draw for the whole batch.
    """
    features = []
    for _, same_size in groupby(views, key=lambda view: view.shape[-1]):
        x = torch.cat(list(same_size))
        noise = None
        if backbone.training and backbone.drop_path:
            noise = batch_rand(2 * len(backbone.blocks), len(x), len(views[0]), x.device)
        features.append(backbone(x, noise))
    return torch.cat(features)


@torch.no_grad()
def multi_crop(images, crops, seed, step):
    """Random views of a batch: images uint8 [b 3 s s] -> for each Crop a float tensor [b 3 v v], normalised.

    With several processes, `images` is this one's shard of the batch; random numbers drawn for the other
    shards are discarded. Crops of one size are made together.
    """
    rng = np.random.default_rng((seed, 1, step, 0))
    params = []  # of each crop: {name: [b]}
    for crop in crops:
        whole_batch = draw(len(images) * world(), images.shape[-1], crop, rng)
        params.append({name: shard(values) for name, values in whole_batch.items()})
    views = [None] * len(crops)
    for size in dict.fromkeys(crop.size for crop in crops):
        same_size = [v for v, crop in enumerate(crops) if crop.size == size]
        joined = {name: torch.cat([params[v][name] for v in same_size]) for name in params[0]}
        order = rng.permutation(4)  # of the four jitters, one for all views of this size
        image_of_view = torch.arange(len(images)).repeat(len(same_size))
        # on a CPU in pieces that stay in a core's cache
        piece_size = 64 if images.device.type == "cpu" else len(image_of_view)
        pieces = []
        for rows in torch.arange(len(image_of_view)).split(piece_size):
            p = {name: values[rows] for name, values in joined.items()}
            source = images[to_device(image_of_view[rows], images.device)]
            pieces.append(augment(source, p, order, size))
        for v, view in zip(same_size, torch.cat(pieces).chunk(len(same_size)), strict=True):
            views[v] = view
    return views


def draw(b, side, crop, rng):
    """The parameters of `b` views, each [b]; those of an operation that is not drawn change nothing."""

    def uniform(low, high, *shape):
        return torch.from_numpy(rng.uniform(low, high, (b, *shape))).to(torch.get_default_dtype())

    def happens(probability):
        return uniform(0, 1) < probability

    # as torchvision's RandomResizedCrop: ten tries to fit a box of random area and shape, else all of it
    area, ratio = side**2 * uniform(*crop.scale, 10), uniform(np.log(3 / 4), np.log(4 / 3), 10).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = (torch.arange(b), fits.int().argmax(1))
    width, height = (torch.where(fits.any(1), length[first], float(side)) for length in (width, height))
    jitter = happens(0.8)
    return {
        "left": (uniform(0, 1) * (side - width + 1)).floor().clamp(max=side - width),
        "top": (uniform(0, 1) * (side - height + 1)).floor().clamp(max=side - height),
        "width": width,
        "height": height,
        "flip": happens(0.5),
        "brightness": torch.where(jitter, uniform(0.6, 1.4), 1),
        "contrast": torch.where(jitter, uniform(0.6, 1.4), 1),
        "saturation": torch.where(jitter, uniform(0.8, 1.2), 1),
        "hue": torch.where(jitter, uniform(-0.1, 0.1), 0),
        "grey": happens(0.2),
        "blur": torch.where(happens(crop.blur), uniform(0.1, 2.0), 0),
        "solarize": happens(crop.solarize),
    }


def augment(images, p, order, size):
    """Images uint8 [b 3 s s] and the parameters `p` of draw() -> normalised views [b 3 size size]."""
    on_device = {name: to_device(values, images.device) for name, values in p.items()}
    box = [on_device[name] for name in ("left", "top", "width", "height", "flip")]
    x = resized_crop(from_bytes(images), *box, size).clamp_(0, 1)  # bicubic weights overshoot
    jitters = [("brightness", brightness), ("contrast", contrast), ("saturation", saturation), ("hue", hue)]
    for name, jitter in [jitters[i] for i in order]:
        x = jitter(x, on_device[name])
    change_where(p["grey"], x, grey)
    change_where(p["blur"] > 0, x, blur, on_device["blur"])
    change_where(p["solarize"], x, solarize)
    return normalise(x)


def change_where(flags, x, operation, *params):
    """x[i] = operation(x[i], params[i]) where flags [b], which is on the CPU, so no device is waited for."""
    if flags.any():
        rows = to_device(flags.nonzero()[:, 0], x.device)
        x[rows] = operation(x[rows], *(values[rows] for values in params))


def resized_crop(x, left, top, width, height, flip, size):
    """Boxes of images, floats [b 3 s s], resized to [b 3 size size]; mirrored where `flip`.

    Two products with matrices of interpolation weights; equal to torchvision's resized_crop(BICUBIC,
    antialias=True).
    """
    columns = interpolation(left, width, size, x.shape[-1])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows = interpolation(top, height, size, x.shape[-2])
    x = torch.einsum("b c h w, b x w -> b c h x", x, columns)
    return torch.einsum("b y h, b c h x -> b c y x", rows, x)


def interpolation(start, length, size, side):
    """[b size side]: the weight of input pixel j in output pixel i, when a piece of a row is resized.

    The piece is [start, start + length), its new length `size`. Keys' cubic kernel with a = -1/2, as wide as
    an output pixel where that is larger than an input pixel.
    """
    pixel = torch.arange(side, device=start.device) - start[:, None]  # [b j], from the piece's start
    scale = (length / size)[:, None, None]
    centre = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale  # [b i 1]
    x = (pixel[:, None] + 0.5 - centre).abs() / scale.clamp(min=1)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = weight * ((pixel >= 0) & (pixel < length[:, None]))[:, None]
    return weight / weight.sum(-1, keepdim=True)


def luma(x):
    """[b 3 s s] -> [b 1 s s], ITU-R 601."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def blend(x, other, factor):
    return other.lerp(x, factor[:, None, None, None]).clamp_(0, 1)


def brightness(x, factor):
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def contrast(x, factor):
    return blend(x, luma(x).mean((2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, turn):
    """Turns the hue of [b 3 s s] by `turn` [b] circles.

    In HSV: f(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + 6H) mod 6.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    sixth = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixth = torch.where(value == red, green - blue, sixth)
    sixth = sixth / chroma.clamp(min=1e-12) + 6 * turn[:, None, None]
    k = sixth[:, None] + constant((5.0, 3.0, 1.0), x.device, x.dtype)[:, None, None]
    k = k.remainder_(6)
    return torch.addcmul(value[:, None], chroma[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def grey(x):
    return luma(x).expand_as(x)


def solarize(x):
    return torch.where(x >= 0.5, 1 - x, x)


def blur(x, sigma):
    """Gaussian blur of [b 3 v v] with `sigma` [b] pixels, 13 taps, borders reflected: two matrix products."""
    size = x.shape[-1]
    reach = min(6, size - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)
    taps = (-0.5 * (offset / sigma[:, None]) ** 2).softmax(-1)  # [b t]
    source = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # [i t]
    source = torch.where(source < size, source, 2 * (size - 1) - source)
    matrix = torch.einsum("b t, i t j -> b i j", taps, F.one_hot(source, size).to(x.dtype))
    x = torch.einsum("b c h w, b x w -> b c h x", x, matrix)
    return torch.einsum("b y h, b c h x -> b c y x", matrix, x)
