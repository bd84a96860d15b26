"""Folders of photographs: which files are images, and the cache that they are decoded into once.

Letters in shapes:  n images  s image side
"""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from twins import decoding
from twins.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}


def folder(data_dir, image_size, split, skip_bad_images=False):
    """Photographs of any size in data_dir/train/<class>/*, data_dir/{test,val}/<class>/*, or flat without labels.

    Decoded once, short side resized to `image_size`, centre cropped; kept in data_dir/.cache (in ~/.cache/dino-twins if
    data_dir is read-only) as one memory-mapped array, made anew when a file's name, size or date changes.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir={data_dir} is no folder: give the one that holds train/<class>/*.jpg")
    names = ["train"] if split == "train" else ["test", "val"]
    root = next((root / name for name in names if (root / name).is_dir()), root)
    if split == "test" and root == Path(data_dir):
        raise UserError(f"{data_dir} has no test/ or val/ folder")
    paths, others = image_files(root)
    if not paths:
        found = f"{others} files, none with an image's name ({' '.join(sorted(SUFFIXES))})" if others else "nothing"
        raise UserError(f"{root} holds {found}: put images into {root}/<class>/")

    first = [below(root, path).split(os.sep) for path in paths]
    flat = all(len(parts) == 1 for parts in first)
    known = first
    if split == "test" and (Path(data_dir) / "train").is_dir():  # numbered as in training
        trained = Path(data_dir) / "train"
        known = [below(trained, path).split(os.sep) for path in image_files(trained)[0]]
    classes = [] if flat else sorted({parts[0] for parts in known if len(parts) > 1})
    stray = next((p for p, parts in zip(paths, first, strict=True) if not flat and parts[0] not in classes), None)
    if stray:
        raise UserError(f"{stray} is in none of the {len(classes)} class folders: move it into one, or make all of them flat")
    images, paths = cached(root, paths, image_size, root.name, skip_bad_images)
    number = {name: i for i, name in enumerate(classes)}
    labels = None if flat else torch.tensor([number[below(root, path).split(os.sep)[0]] for path in paths])
    return images, labels, classes


def below(root, path):
    """`path`, which begins with `root`, without it; pathlib takes ten times as long, a second for 100,000 files."""
    return path[len(str(root)) + 1 :]


def image_files(root):
    """The images below `root` in order, by name, and how many other files there are."""
    paths, others = [], 0
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        images = [name for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in images]
        others += len(files) - len(images)
    return paths, others


def cached(root, paths, size, name, skip_bad_images=False):
    """Images at `paths` as a uint8 tensor [n 3 size size] on a memory-mapped file, decoded if it is not there yet, and their paths.

    The file is `name`-size-hash.npy beside `root`, in ~/.cache/dino-twins if that is read-only; the hash is of all files' names,
    sizes and dates. Raises UserError for images that cannot be read, or leaves them out, up to 1 %.
    """
    try:
        stats = [(below(root, path), os.stat(path)) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend or remove it") from None
    stamp = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    folder = root.parent / ".cache"
    if not os.access(root.parent, os.W_OK):
        folder = Path.home() / ".cache" / "dino-twins" / hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    file = folder / f"{name}-{size}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npy"
    try:
        with tqdm(total=len(paths), desc=f"decoding into {folder}", unit=" images", disable=file.exists()) as bar:
            flags = decoding.decode_all(paths, size, file, lambda n: bar.update(n - bar.n))
        remove_old(folder, rf"{re.escape(name)}-{size}-[0-9a-f]{{16}}", file.stem)
        images = torch.from_numpy(np.load(file, mmap_mode="c"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the cache {file} cannot be made or read: {error}") from None
    broken = [path for path, flag in zip(paths, flags, strict=True) if flag == decoding.BROKEN]
    if broken:
        try:
            decode(broken[0], size)
            sentence = f"{broken[0]} could not be read when {file} was made"
        except UserError as error:
            sentence = str(error)
        sentence += f", nor {len(broken) - 1} more, such as {', '.join(broken[1:4])}" if broken[1:] else ""
        if len(broken) > 0.01 * len(paths):
            raise UserError(f"{sentence}: {len(broken)} of {len(paths)} images are too many to leave out, mend or remove them")
        if not skip_bad_images:
            raise UserError(f"{sentence}: mend or remove, or leave out with --skip_bad_images=True")
        print(f"left out {len(broken)} of {len(paths)} images: {sentence}", flush=True)
    return images, [paths[i] for i in decoding.rows_of(flags)]


def remove_old(folder, names, new):
    """Removes caches called like `names`, of a folder as it was before, but `new` and what another process is making."""
    for lock in folder.glob("*.lock"):
        if re.fullmatch(names, lock.stem) and lock.stem != new:
            try:
                with decoding.locked(lock, wait=False):
                    for suffix in (".npy", ".npy.part", ".flags", ".paths"):
                        lock.with_suffix(suffix).unlink(missing_ok=True)
            except OSError:  # another's
                pass


def decode(path, size):
    """One image file -> uint8 [3 size size]. Raises UserError, naming the file."""
    try:
        return decoding.decode(path, size)
    except ValueError as error:
        raise UserError(error) from None
