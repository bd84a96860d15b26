"""Data sets with a class for every pixel, for seg_transfer.py and attn_viz.py.

`masks` is int16 [n s s]: 0 background, 1 and up the classes, -1 ignored. Images and masks are centre cropped
to a square and resized to `image_size`, images antialiased, masks by the nearest pixel.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from twins.cache import below, cached
from twins.datasets import Split, fetch, load
from twins.errors import UserError
from twins.folders import image_files, splits, walk, warn_of_training_images

DATASETS = ("shapes", "folder", "voc2012", "pet", "imagenet_s")
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
    person pottedplant sheep sofa train tvmonitor"""
LARGEST = 1000  # largest class; ImageNet-S has 919


def has_masks(dataset, data_dir):
    """Whether this data set has masks: a `folder` may hold images only."""
    if dataset != "folder" or not Path(data_dir).is_dir():
        return dataset in DATASETS and dataset != "folder"
    return any((path / "masks").is_dir() for kind, path in splits(Path(data_dir)).items() if kind != "train")


def load_masks(dataset, data_dir, image_size, split="train", skip_bad_images=False):
    """One split, 'train' or 'test', with masks: Split. Raises UserError for absent or broken ones."""
    if dataset == "shapes":
        data = load("shapes", data_dir, image_size, split)
        return data._replace(labels=None, classes=["background", "object"], masks=data.masks.short())
    if dataset not in DATASETS:
        raise UserError(f"--dataset={dataset} has no masks: choose one of {', '.join(DATASETS)}")
    loaders = {"folder": mask_folder, "voc2012": voc2012, "pet": pet, "imagenet_s": imagenet_s}
    root, images, paths, classes, ids = loaders[dataset](Path(data_dir), split)
    for image, mask in zip(images, paths, strict=True):
        if not os.path.isfile(mask):
            raise UserError(f"{image} has no mask: {mask} is missing")
    mask_of = dict(zip(images, paths, strict=True))
    pixels, images = cached(root, images, image_size, f"{dataset}-{split}", skip_bad_images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = functools.partial(decode_mask, size=image_size, ids=ids)
        paths = [mask_of[image] for image in images]
        masks = list(pool.map(read, paths, images))
    if dataset == "folder":
        masks = without_soft_edges(masks, paths, root)
    masks = torch.from_numpy(np.stack(masks))
    if masks.max() <= 0:
        raise UserError(f"the masks of {root} hold no object, only background and ignored pixels")
    if not classes:
        names = ["object"] if masks.max() == 1 else [f"class {i + 1}" for i in range(int(masks.max()))]
        classes = ["background", *names]
    return Split(pixels, None, classes, masks)


def mask_folder(root, split):
    """{train,val}/images/* and {train,val}/masks/* of the same names, preferably .png; 255 is ignored."""
    names = ["train"] if split == "train" else ["test", "val"]
    folder_of = splits(root)
    roots = [folder_of[name] for name in names if name in folder_of]
    root = next((path for path in roots if (path / "images").is_dir() and (path / "masks").is_dir()), None)
    if root is None:
        raise UserError(f"--data_dir has no masks: no {names[-1]}/images/ with {names[-1]}/masks/ beside it")
    if split == "test" and "train" in folder_of:
        warn_of_training_images(root, folder_of["train"])
    images, (masks, _) = image_files(root / "images"), walk(root / "masks")
    masks.sort(key=lambda mask: mask.endswith(".png"))  # of two masks, the .png one
    masks = {stem(root / "masks", mask): mask for mask in masks}
    stems = [stem(root / "images", image) for image in images]
    masks = [masks.get(name, f"{root}/masks/{name}.png") for name in stems]
    return root, images, masks, None, one_channel


def stem(folder, path):
    """A file's path relative to a folder, without its suffix."""
    return os.path.splitext(below(folder, path))[0]


def one_channel(pixels):
    """Pixels [h w 2] or [h w 3 or 4] with equal colour channels -> grey [h w]; others are unchanged."""
    colours = 3 if pixels.shape[-1] > 2 else 1  # another channel is transparency
    same = pixels.ndim == 3 and (pixels[..., :colours] == pixels[..., :1]).all()
    return pixels[..., 0] if same else pixels


def without_soft_edges(masks, paths, root):
    """Masks of a folder, int16 arrays: 255 becomes -1, or 1 where all masks are 0, 255 and soft edges.

    Edges are soft if values of 128 to 254 occur, and 255 is more frequent than 1 to 254 together (than a
    quarter of that, if more than 20 of them occur): an ignored border is never so large.
    """
    count = sum(np.bincount(np.maximum(mask, 0).flat, minlength=LARGEST + 1) for mask in masks)
    between = count[1:255]
    share = between.sum() / (4 if (between > 0).sum() > 20 else 1)
    soft = between[127:].any() and count[255] > share and not count[256:].any()
    if soft or (count[0] and count[255] and not between.any()):
        print(f"the masks of {root} are 0 and 255: 128 and above is the object, class 1", flush=True)
        return [(mask >= 128).astype(np.int16) for mask in masks]
    empty = [i for i, mask in enumerate(masks) if mask.max() == 255 and np.isin(mask, (0, 255)).all()]
    if empty:
        which = f"{len(empty)} masks of {root} hold only 0 and 255, such as {paths[empty[0]]}"
        print(f"warning: {which}; others have class numbers, so 255 is ignored", flush=True)
    return [ignoring(255)(mask).astype(np.int16) for mask in masks]


def voc2012(root, split):
    """PASCAL VOC 2012: root holds VOCdevkit/VOC2012 or is one of the two; 255, void, is ignored."""
    places = [root / "VOCdevkit" / "VOC2012", root / "VOC2012", root]
    home = next((path for path in places if (path / "JPEGImages").is_dir()), None)
    if home is None:
        from torchvision.datasets import VOCSegmentation  # imported here because it takes a second

        fetch(VOCSegmentation, root, image_set="train")
        home = places[0]
    names = lines_of(home / "ImageSets" / "Segmentation" / ("train.txt" if split == "train" else "val.txt"))
    images = [str(home / "JPEGImages" / f"{name}.jpg") for name in names]
    masks = [str(home / "SegmentationClass" / f"{name}.png") for name in names]
    return home / "JPEGImages", images, masks, VOC.split(), ignoring(255)


def lines_of(path):
    """The first word of each line. Raises UserError if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise UserError(f"{path}, the list of images, is missing or empty: unpack the data set again")
    return [line.split()[0] for line in lines if line.strip()]


def pet(root, split):
    """Oxford-IIIT Pet as torchvision stores it: 1 is pet, 2 background, 3 the border, which is ignored."""
    from torchvision.datasets import OxfordIIITPet

    fetch(OxfordIIITPet, root, split="trainval" if split == "train" else "test", target_types="segmentation")
    root = root / "oxford-iiit-pet"
    names = lines_of(root / "annotations" / ("trainval.txt" if split == "train" else "test.txt"))
    images = [str(root / "images" / f"{name}.jpg") for name in names]
    masks = [str(root / "annotations" / "trimaps" / f"{name}.png") for name in names]
    return root / "images", images, masks, ["background", "pet"], np.array([-1, 1, 0, -1]).take


def imagenet_s(root, split):
    """ImageNet-S (2106.03149) as its scripts lay it out: id = R + 256 G, 0 is `other`, 1000 is void."""
    name = "train-semi" if split == "train" else "validation"
    folder = root / f"{name}-segmentation"
    if not folder.is_dir():
        hint = "give a folder such as ImageNetS50 from github.com/LUSSeg/ImageNet-S"
        raise UserError(f"{root} has no {folder.name}/: {hint}")
    images = image_files(root / name)
    masks = [str(folder / Path(path).relative_to(root / name).with_suffix(".png")) for path in images]

    def ids(pixels):
        return ignoring(1000)(pixels[..., 0] + 256 * pixels[..., 1])

    return root / name, images, masks, None, ids


def ignoring(void):
    return lambda pixels: np.where(pixels == void, -1, pixels)


def decode_mask(path, image, size, ids):
    """The mask file of an image -> int16 [size size]; `ids` turns pixels into classes. Raises UserError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as mask:
            if mask.mode == "P" and mask.getpalette()[:6] == [255, 255, 255, 0, 0, 0]:
                raise ValueError("its palette has white for class 0 and black for class 1: save it in grey")
            is_lossy = mask.format == "JPEG"  # so only black and white can be told apart
            mask = ImageOps.exif_transpose(mask)
            if is_lossy:
                mask = mask.convert("L").point(lambda value: 255 * (value > 127))
            width, height = mask.size
            pixels = np.asarray(ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST))
            if pixels.dtype.kind == "f" and (pixels != pixels.round()).any():  # also for NaN
                raise ValueError("it holds fractions, but a mask has whole numbers")
            pixels = ids(pixels.astype(np.int32))
        if pixels.ndim != 2:
            raise ValueError("it has colours, but a mask has one number per pixel")
        if pixels.max() > LARGEST or pixels.min() < -1:
            wrong = pixels.min() if pixels.min() < -1 else pixels.max()
            raise ValueError(f"it has class {wrong}, {LARGEST} is the largest")
        with Image.open(image) as photograph:
            on_its_side = photograph.getexif().get(0x0112, 1) >= 5
            sides = photograph.size[::-1] if on_its_side else photograph.size
    except Exception as error:  # Pillow raises many types for broken files
        raise UserError(f"{path} cannot be read as a mask ({error}): fix or remove it") from None
    if (width, height) != sides:
        raise UserError(f"{path} is {width} x {height} pixels, but its image {sides[0]} x {sides[1]}")
    return pixels.astype(np.int16)
