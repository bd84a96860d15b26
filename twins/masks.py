"""Data sets with a class for every pixel, for seg_transfer.py and attn_viz.py.

`masks` is int16 [n s s]: 0 background, 1 and up the classes, -1 what does not count. Images and masks are cropped to the
middle square and resized to `image_size`, images antialiased, masks by the nearest pixel.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from twins.datasets import Split, fetch, load
from twins.errors import UserError
from twins.folders import cached, image_files

DATASETS = ("shapes", "folder", "voc2012", "pet", "imagenet_s")
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant
    sheep sofa train tvmonitor"""


def has_masks(dataset, data_dir):
    """Whether load_masks() is for this data set: a `folder` may be one of images alone."""
    return dataset in DATASETS and (dataset != "folder" or any((Path(data_dir) / part / "masks").is_dir() for part in ("val", "test")))


def load_masks(dataset, data_dir, image_size, split="train", skip_bad_images=False):
    """One split, 'train' or 'test', with masks: Split. Raises UserError for an unknown data set and absent, broken or foreign files."""
    if dataset == "shapes":
        data = load("shapes", data_dir, image_size, split)
        return data._replace(labels=None, classes=["background", "object"], masks=data.masks.short())
    if dataset not in DATASETS:
        raise UserError(f"--dataset={dataset} has no masks: choose one of {', '.join(DATASETS)}")
    names = {"folder": mask_folder, "voc2012": voc2012, "pet": pet, "imagenet_s": imagenet_s}
    root, images, paths, classes, ids = names[dataset](Path(data_dir), split)
    for image, mask in zip(images, paths, strict=True):
        if not os.path.exists(mask):
            raise UserError(f"{image} has no mask: {mask} is not there")
    mask_of = dict(zip(images, paths, strict=True))
    pixels, images = cached(root, images, image_size, f"{dataset}-{split}", skip_bad_images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        masks = list(pool.map(functools.partial(decode_mask, size=image_size, ids=ids), [mask_of[image] for image in images], images))
    masks = torch.from_numpy(np.stack(masks))
    if masks.max() < 0:
        raise UserError(f"the masks of {root} hold nothing that counts: every pixel is marked as one to ignore")
    if masks.max() == 0:
        void = ": 255 is what does not count, divide masks of 0 and 255 by 255" if dataset == "folder" and masks.min() < 0 else ""
        raise UserError(f"the masks of {root} hold no object, only background{void}")
    classes = classes or [f"class {i}" if i else "background" for i in range(int(masks.max()) + 1)]
    return Split(pixels, None, classes, masks)


def mask_folder(root, split):
    """{train,val}/images/* and {train,val}/masks/*.png of the same names; 255 does not count."""
    names = ["train"] if split == "train" else ["test", "val"]
    root = next((root / name for name in names if (root / name / "images").is_dir()), None)
    if root is None or not (root / "masks").is_dir():
        raise UserError(f"--data_dir has no {names[-1]}/images/ with {names[-1]}/masks/ beside it")
    images, _ = image_files(root / "images")
    if not images:
        raise UserError(f"{root}/images holds no images")
    return root, images, [str(root / "masks" / Path(path).with_suffix(".png").name) for path in images], None, ignoring(255)


def voc2012(root, split):
    """PASCAL VOC 2012 as torchvision keeps it; the void of 255 does not count."""
    from torchvision.datasets import VOCSegmentation

    data = fetch(VOCSegmentation, root, image_set="train" if split == "train" else "val")
    return Path(data.images[0]).parent, data.images, data.masks, VOC.split(), ignoring(255)


def pet(root, split):
    """Oxford-IIIT Pet as torchvision keeps it: a pet is 1, background 2, the border of 3 does not count."""
    from torchvision.datasets import OxfordIIITPet

    fetch(OxfordIIITPet, root, split="trainval" if split == "train" else "test", target_types="segmentation")
    root = root / "oxford-iiit-pet"
    names = [line.split()[0] for line in (root / "annotations" / ("trainval.txt" if split == "train" else "test.txt")).open()]
    masks = [str(root / "annotations" / "trimaps" / f"{name}.png") for name in names]
    ids = np.array([-1, 1, 0, -1])
    return root / "images", [str(root / "images" / f"{name}.jpg") for name in names], masks, ["background", "pet"], ids.take


def imagenet_s(root, split):
    """ImageNet-S (2106.03149) as its scripts lay it out: id = R + 256 G, 0 is `other`, 1000 does not count."""
    name = "train-semi" if split == "train" else "validation"
    if not (root / f"{name}-segmentation").is_dir():
        raise UserError(f"{root} has no {name}-segmentation/: give a folder such as ImageNetS50, of github.com/LUSSeg/ImageNet-S")
    images, _ = image_files(root / name)
    masks = [str(root / f"{name}-segmentation" / Path(path).relative_to(root / name).with_suffix(".png")) for path in images]

    def ids(pixels):
        return ignoring(1000)(pixels[..., 0] + 256 * pixels[..., 1])

    return root / name, images, masks, None, ids


def ignoring(void):
    return lambda pixels: np.where(pixels == void, -1, pixels)


def decode_mask(path, image, size, ids):
    """The mask file of an image -> int16 [size size]; `ids` turns its pixels into classes. Raises UserError, naming the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as mask:
            pixels = ids(np.asarray(mask).astype(np.int32)).astype(np.int32)
        if pixels.ndim != 2:
            raise ValueError("it has colours, a mask has a number for each pixel")
        if pixels.max() > 32767:
            raise ValueError(f"it has a class {pixels.max()}, 32767 is the largest")
        with Image.open(image) as photograph:
            sides = photograph.size if photograph.getexif().get(0x0112, 1) < 5 else photograph.size[::-1]  # EXIF: on its side
    except Exception as error:  # Pillow raises many kinds for broken files
        raise UserError(f"{path} cannot be read as a mask ({error}): mend or remove it") from None
    if pixels.shape != sides[::-1]:
        raise UserError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its image {sides[0]} x {sides[1]}")
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.NEAREST)).astype(np.int16)
