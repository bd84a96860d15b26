"""Views: each operation is torchvision's at equal parameters, every image has its own, a step's are a
function of (seed, step).
"""

import time

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as tv

import data
from data import Crop, batch_indices, load, multi_crop
from twins import datasets, processes

CROPS = [
    Crop(32, (0.4, 1.0), blur=1.0),
    Crop(32, (0.4, 1.0), blur=0.1, solarize=0.2),
    *[Crop(16, (0.1, 0.4), blur=0.5)] * 6,
]


@pytest.fixture(scope="module")
def images():
    return load("shapes", "", 32).images[:64]


@pytest.fixture(scope="module")
def x(images):
    """Photograph-like float images: the shapes with colours that are as strong as they get."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return (0.3 * images.float() / 255 + 0.7 * noise).clamp(0, 1)


def agrees(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-5


JITTERS = [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]


@pytest.mark.parametrize("name, low, high", JITTERS)
def test_jitter_is_torchvisions(x, name, low, high):
    factors = torch.linspace(low, high, len(x))
    theirs = [
        getattr(tv, f"adjust_{name}")(image, factor.item()) for image, factor in zip(x, factors, strict=True)
    ]
    agrees(getattr(data, name)(x, factors), torch.stack(theirs))


def test_grey_and_solarize_are_torchvisions(x):
    agrees(data.grey(x), tv.rgb_to_grayscale(x, 3))
    agrees(data.solarize(x), tv.solarize(x, 0.5))


def test_blur_is_torchvisions(x):
    sigmas = torch.linspace(0.1, 2.0, len(x))
    theirs = [tv.gaussian_blur(image, 13, sigma.item()) for image, sigma in zip(x, sigmas, strict=True)]
    agrees(data.blur(x, sigmas), torch.stack(theirs))


@pytest.mark.parametrize("size", [16, 32, 48])
def test_crop_and_flip_are_torchvisions(x, size):
    p = data.draw(len(x), 32, Crop(size, (0.1, 1.0)), np.random.default_rng(0))
    ours = data.resized_crop(x, p["left"], p["top"], p["width"], p["height"], p["flip"], size)
    for i, image in enumerate(x):
        box = [int(p[k][i]) for k in ("top", "left", "height", "width")]
        theirs = tv.resized_crop(image, *box, [size, size], T.InterpolationMode.BICUBIC, antialias=True)
        agrees(ours[i], tv.horizontal_flip(theirs) if p["flip"][i] else theirs)


def test_normalise_is_torchvisions(x):
    agrees(data.normalise(x), tv.normalize(x, datasets.MEAN, datasets.STD))


def test_drawn_parameters_have_byols_probabilities():
    n = 20_000
    p = data.draw(n, 32, Crop(32, (0.4, 1.0), blur=0.1, solarize=0.2), np.random.default_rng(0))
    share = {k: v.float().mean().item() for k, v in p.items() if v.dtype == torch.bool}
    assert share == pytest.approx({"flip": 0.5, "grey": 0.2, "solarize": 0.2}, abs=0.015)
    assert (p["blur"] > 0).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (p["hue"] != 0).float().mean().item() == pytest.approx(0.8, abs=0.015)
    area = p["width"] * p["height"] / 32**2
    assert area.min() > 0.37 and area.max() <= 1
    assert ((p["left"] + p["width"]).max(), (p["top"] + p["height"]).max()) == (32, 32) and p[
        "left"
    ].min() == 0


def test_identical_images_give_different_views(images):
    same = images[:1].expand(8, -1, -1, -1)
    for views in multi_crop(same, CROPS, 0, 0):
        assert all((views[i] - views[j]).abs().max() > 0.01 for i in range(8) for j in range(i))


def test_views_depend_on_seed_and_step_alone(images):
    def views(seed, step):
        torch.rand(1)  # torch's own generator has no part in it
        return torch.cat([v.flatten() for v in multi_crop(images, CROPS, seed, step)])

    first = views(3, 5)
    assert torch.equal(first, views(3, 5))
    for other in ((4, 5), (3, 6)):
        assert (first - views(*other)).abs().mean() > 0.1


def test_the_views_of_processes_together_are_those_of_one(images, monkeypatch):
    whole = multi_crop(images, CROPS, 3, 5)
    monkeypatch.setattr(data, "world", lambda: 4)
    monkeypatch.setattr(processes, "world", lambda: 4)
    parts = []
    for i in range(4):
        monkeypatch.setattr(processes, "rank", lambda i=i: i)
        parts.append(multi_crop(images.chunk(4)[i], CROPS, 3, 5))
    for v, view in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[v] for part in parts]), view)


def test_an_epoch_shows_every_image_once():
    seen = torch.cat([batch_indices(103, 10, 0, step) for step in range(10)])
    assert len(seen.unique()) == 100
    assert not torch.equal(seen, torch.cat([batch_indices(103, 10, 0, step) for step in range(10, 20)]))


def test_views_are_8_times_faster_than_torchvisions():
    """Both with the processor's two cores: ours as one batch, torchvision's image by image (fewer of them,
    scaled up).
    """
    images = load("shapes", "", 32).images[:256]

    def transform(crop):
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        blur = T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], crop.blur)
        parts = [
            T.RandomResizedCrop(crop.size, crop.scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            jitter,
            T.RandomGrayscale(0.2),
            blur,
        ]
        more = [T.RandomSolarize(0.5, crop.solarize), T.Normalize(datasets.MEAN, datasets.STD)]
        return T.Compose([T.ToDtype(torch.float32, scale=True), *parts, *more])

    transforms = [transform(crop) for crop in CROPS]

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ours = min(seconds(lambda: multi_crop(images, CROPS, 0, 0)) for _ in range(6))
    theirs = (
        min(seconds(lambda: [t(image) for image in images[:32] for t in transforms]) for _ in range(3)) * 8
    )
    print(
        f"2 + 6 views of 256 images: {256 / ours:.0f} images/s, torchvision {256 / theirs:.0f}, "
        f"{theirs / ours:.0f} times"
    )
    assert theirs > 8 * ours
