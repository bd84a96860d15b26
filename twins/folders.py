"""Folders of photographs: which files are images, of which split and class.

Letters in shapes:  n images  s image side
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import torch

from twins import decoding
from twins.cache import below, cached
from twins.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif"}
SUFFIXES |= {".tiff", ".jp2", ".j2k", ".pbm", ".pgm", ".ppm", ".pnm"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
IMAGES = ("images", "jpegimages")
JUNK = {"@eadir", "#recycle", "$recycle.bin", "__macosx"}  # of Synology, QNAP, Windows, macOS
PICTURES = {"crops.png", "curves.png", "attention.png", "divergence.png", "segmentation.png"}  # of a run,
RUN_FILES = {"config.json", "log.jsonl", "attention.json", "seg_transfer.json"}  # if beside one of these
MASKS = ("masks", "labels", "annotations", "segmentationclass", "segmentationobject")
nfc = functools.partial(unicodedata.normalize, "NFC")  # macOS and archives encode é in two ways


def folder(data_dir, image_size, split, skip_bad_images=False, cache_size=None):
    """Photographs in data_dir/train/<class>/*, data_dir/{test,val}/<class>/*, or flat without labels.

    Returns images uint8 [n 3 s s], labels int64 [n] or None, and the classes. Images are decoded once, short
    side resized to s, centre cropped, and cached as a memory-mapped array until a file's name, size or date
    changes. s is `image_size`, or `cache_size` if given, 0 for 1.6 x image_size. Raises UserError if the
    layout is ambiguous.
    """
    if not os.path.isdir(data_dir):
        raise UserError(f"--data_dir={data_dir} is not a folder: give the one that holds train/<class>/*.jpg")
    top = without_masks(Path(data_dir))
    folder_of = splits(top)
    root = split_folder(top, folder_of, split)
    paths = image_files(root)
    parts_of_paths = split_paths(root, paths)
    flat = all(len(parts) == 1 for parts in parts_of_paths)
    if flat and split == "train":
        refuse_others(top, root, folder_of)
    home, home_parts = root, parts_of_paths  # those that define the classes
    if split == "test" and "train" in folder_of:  # numbered as in training
        home = without_masks(folder_of["train"])
        home_parts = split_paths(home, walk(home)[0])
        warn_of_training_images(root, folder_of["train"])
    classes = [] if flat else sorted({parts[0] for parts in home_parts if len(parts) > 1})
    refuse_wrapping(home, classes, home_parts)
    if classes and split == "train":
        warn_of_new_classes(root, folder_of, classes)
    if not flat:
        refuse_strays(root, home, classes, parts_of_paths)

    size = side_to_decode(paths, image_size, cache_size)
    name, resample = root.name, decoding.BICUBIC
    if size > image_size:
        name, resample = f"{name}-crops", decoding.LANCZOS
    images, paths = cached(root, paths, size, name, skip_bad_images, resample)
    if flat:
        print(f"{root}: {len(paths)} images, no class folders", flush=True)
        return images, None, classes
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[parts[0]] for parts in split_paths(root, paths)])
    counts = [f"{name} {n}" for name, n in zip(classes, labels.bincount(minlength=len(classes)), strict=True)]
    text = ", ".join(counts if len(counts) <= 10 else [*counts[:10], "..."])
    print(f"{root}: {len(paths)} images in {len(classes)} classes: {text}", flush=True)
    return images, labels, classes


def split_paths(root, paths):
    """The parts of each path below `root`: [class, ..., file]; [file] without a class folder."""
    return [nfc(below(root, path)).split(os.sep) for path in paths]


def refuse_strays(root, home, classes, parts_of_paths):
    """Raises UserError for an image in `root` that is in none of the classes, which `home` defines."""
    stray = next((parts for parts in parts_of_paths if parts[0] not in classes), None)
    if not stray:
        return
    if home != root and not classes:
        raise UserError(f"{home} has no class folders, but {root} has: both need them, or neither")
    if home != root and len(stray) > 1:
        new = stray[0]
        raise UserError(f"{home} has no class {new}, but {root} has: add it there, or remove it here")
    file = f"{root.joinpath(*stray)} is in none of the {len(classes)} class folders"
    raise UserError(f"{file}: move it into one, or use no class folders at all")


def side_to_decode(paths, image_size, cache_size):
    """The side in pixels of decoded images: image_size, or more if views are cut from them.

    cache_size: the side; None: image_size; 0: 1.6 x image_size, so that a crop of 40 % of the area has as
    many pixels, but no more than a sample of the files has. Raises UserError if it is below image_size.
    """
    sample = [decoding.side_and_depth(path) for path in paths[:: len(paths) // 100 + 1]]
    if any(deep for _, deep in sample):
        print("images of more than 8 bits per pixel are scaled to 8, see docs/options.md", flush=True)
    if cache_size is None:
        return image_size
    size = cache_size or max(image_size, min(round(1.6 * image_size), max(side for side, _ in sample)))
    if size < image_size:
        raise UserError(f"--cache_size={size} is less than --image_size={image_size}: views would be blurred")
    return size


def split_folder(top, folder_of, split):
    """The folder of a split's images; folder_of: splits(top). Raises UserError if there is none."""
    wanted = ("train",) if split == "train" else ("test", "val")
    roots = [without_masks(folder_of[kind]) for kind in wanted if kind in folder_of]
    if not roots and (folder_of or split == "test"):
        others = ", ".join(f"{path.name}/" for path in folder_of.values())
        hint = f", only {others}: rename it, or give it as --data_dir" if others else ""
        raise UserError(f"{top} has no {'/ or '.join(wanted)}/ folder{hint}")
    if len(roots) > 1 and subfolders(roots[1]) and not subfolders(roots[0]):
        print(f"{roots[0]} has no class folders: {roots[1]}, which has them, is used instead", flush=True)
        return roots[1]
    return roots[0] if roots else top


def refuse_wrapping(root, classes, parts_of_paths):
    """Raises UserError if a class folder holds splits (photos/train/, cat/test/) or is one (train/train/)."""
    inner = sorted({parts[0] for parts in parts_of_paths if len(parts) > 2 and parts[1].lower() in SPLITS})
    if inner:
        where = root / inner[0]
        hint = f"give --data_dir={where}" if len(classes) == 1 else "move them to train/<class>/ ..."
        raise UserError(f"{where} holds {', '.join(splits(where))}: {hint}")
    if len(classes) == 1 and classes[0].lower() in SPLITS:
        where = root / classes[0]
        raise UserError(f"{where} is the name of a split, not of a class: move what it holds to {root}")


def refuse_others(top, root, folder_of):
    """Raises UserError for images beside `root`, a flat train/: it may be one of several classes."""
    others = [top / name for name in subfolders(top) if top / name not in [root, *folder_of.values()]]
    names = [f"{path.name}/" for path in others if walk(path)[0]]
    if names:
        hint = f"give --data_dir={root} for it alone, or put all classes into train/"
        raise UserError(f"{root} holds images without class folders beside {' '.join(names[:5])}: {hint}")


def warn_of_new_classes(root, folder_of, classes):
    """Prints a warning for a class of the test images that `root`, the training images, lacks."""
    others = [path for kind, path in folder_of.items() if kind != "train"]
    for other in others:
        names = [nfc(name) for name in subfolders(other) if name.lower() not in (*IMAGES, *MASKS)]
        if new := [name for name in names if name not in classes]:
            print(f"warning: {root} has no class {new[0]}, but {other} has: evaluation will refuse it")


def warn_of_training_images(root, train):
    """Prints a warning if the test images in `root` are a link to those of the folder `train`."""
    if train.resolve() in (root.resolve(), *root.resolve().parents):
        print(f"warning: {root} is {train}, so these are training images", flush=True)


def unreadable(error):
    raise UserError(f"{error.filename} cannot be opened ({error.strerror}): fix or move it") from None


def is_hidden(name):
    return name.startswith(".") or name.lower() in JUNK


def subfolders(root):
    """The sorted names of the folders in `root`, without hidden ones."""
    try:
        return sorted(f.name for f in os.scandir(root) if f.is_dir() and not is_hidden(f.name))
    except OSError as error:
        unreadable(error)


def splits(root):
    """{train, test, val: its folder in `root`}, for those that exist. Raises UserError if one exists twice.

    Also for two folders whose names contain the word, such as training_set/ and test_set/.
    """
    folder_of, alike = {}, {}
    for name in subfolders(root):
        kind = SPLITS.get(name.lower())
        for word in re.split("[^a-z]+", name.lower()):
            alike.setdefault(SPLITS.get(word), name)
        if kind in folder_of:
            both = f"{folder_of[kind].name}/ and {name}/"
            raise UserError(f"{root} holds {both}, which are the same split: rename or move one")
        if kind:
            folder_of[kind] = root / name
    alike.pop(None, "")
    if not folder_of and len(alike) > 1:
        names = " and ".join(f"{name}/" for name in alike.values())
        raise UserError(f"{root} holds {names}: if they are splits, rename them to {'/ and '.join(alike)}/")
    return folder_of


def without_masks(root):
    """`root`, or its folder of images if there is one of masks beside it."""
    names = subfolders(root)
    images = [name for name in names if name.lower() in IMAGES]
    masks = [name for name in names if name.lower() in MASKS]
    if not (images and masks):
        return root
    print(f"{root}: {images[0]}/ alone is used, left out: {'/ '.join(masks)}/", flush=True)
    return root / images[0]


def walk(root):
    """The sorted images below `root`, and {what is left out: how often}; no folder is read twice."""
    paths, left, seen = [], Counter(), set()
    for parent, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            left["linked folder that was read already"] += 1
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = [name for name in folders if not is_hidden(name)]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        written = PICTURES if RUN_FILES & set(files) else ()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name in written:
                left["written by a run"] += 1
            elif name.startswith(".") or suffix not in SUFFIXES:
                left["hidden" if name.startswith(".") else suffix or "without a suffix"] += 1
            else:
                paths.append(os.path.join(parent, name))
    return paths, left


def image_files(root):
    """The sorted images below `root`; prints what is left out. Raises UserError if there are none."""
    paths, left = walk(root)
    if not paths:
        suffixes = " ".join(sorted(SUFFIXES))
        content = "nothing"
        if left:
            content = f"no file with an image's suffix ({suffixes}); other files: {left.total()}"
        raise UserError(f"{root} holds {content}: put images there, or into <class>/ there")
    if left:
        kinds = ", ".join(f"{n} {what}" for what, n in left.most_common(8))
        print(f"{root}: left out {left.total()} that do not look like images: {kinds}", flush=True)
    return paths
