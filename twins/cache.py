"""The cache of a folder of photographs: its images, decoded once into a memory-mapped array on disk.

Letters in shapes:  n images
"""

import contextlib
import glob
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from twins import decoding
from twins.errors import UserError


def cached(root, paths, size, name, skip_bad_images=False, resample=decoding.BICUBIC, retry=True):
    """Images at `paths` as memory-mapped uint8 [n 3 size size], decoded if necessary, and their paths.

    The file is `name`-size-hash.npy in cache_folder(root); the hash is of all files' names, sizes and dates.
    Raises UserError for images that cannot be read; with skip_bad_images it leaves out up to 1 %.
    """
    lines = [decoding.VERSION, *(f"{below(root, path)} {state_of(path)}" for path in paths)]
    folder = cache_folder(root)
    file = folder / f"{name}-{size}-{hashed(chr(10).join(lines))}.npy"
    title = f"decoding into {folder}"
    try:
        with tqdm(total=len(paths), desc=title, unit=" images", disable=file.exists()) as bar:
            flags = decoding.decode_all(paths, size, file, lambda n: bar.update(n - bar.n), resample)
        remove_old(folder, f"{name}-{size}", file.stem)
        images = torch.from_numpy(np.load(file, mmap_mode="c"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the cache {file} cannot be made or read: {error}") from None
    rows = decoding.rows_of(flags)
    broken = [path for path, flag in zip(paths, flags, strict=True) if flag == decoding.BROKEN]
    if broken:
        try:
            decoding.decode(broken[0], size)
            if retry:  # it can be read now
                file.unlink()
                return cached(root, paths, size, name, skip_bad_images, resample, retry=False)
            problem = f"{broken[0]} could not be read when {file} was made"
        except ValueError as error:
            problem = str(error)
        if len(broken) > 1:
            problem += f", nor can {len(broken) - 1} more, e.g. {', '.join(broken[1:4])}"
        count = f"{len(broken)} of {len(paths)} images"
        if len(broken) > 0.01 * len(paths):
            raise UserError(f"{problem}: {count} are too many to leave out, fix or remove them")
        if not skip_bad_images:
            raise UserError(f"{problem}: fix or remove it, or leave it out with --skip_bad_images=True")
        print(f"left out {count}: {problem}", flush=True)
    return images[: len(rows)], [paths[i] for i in rows]


def below(root, path):
    """A path relative to `root`, which it starts with; pathlib takes ten times as long."""
    return path[len(str(root)) + 1 :]


def cache_folder(root):
    """The first writable of .cache beside `root`, .cache/dino-twins in the home and in /tmp."""
    homes = [home for home in (os.path.expanduser("~"), tempfile.gettempdir()) if os.path.isabs(home)]
    unique = hashed(str(root.absolute()))
    for folder in (root.parent / ".cache", *(Path(home, ".cache", "dino-twins", unique) for home in homes)):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise UserError(f"the images of {root} cannot be decoded: no folder such as {folder} can be written")


def state_of(path):
    """A file's size and date, which reveal a change; for a broken link, the error."""
    try:
        stat = os.stat(path)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError as error:
        return error.strerror


def hashed(text):
    """A hash of 16 hexadecimal digits; file names need not be UTF-8."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def remove_old(folder, name, new):
    """Removes outdated caches, <name>-<hash>, except `new` and those in use."""
    for lock in folder.glob(f"{glob.escape(name)}-{16 * '[0-9a-f]'}.lock"):
        if lock.stem != new:
            with contextlib.suppress(OSError), decoding.locked(lock, wait=False):
                for suffix in (".npy", ".npy.part", ".flags", ".paths"):
                    lock.with_suffix(suffix).unlink(missing_ok=True)
