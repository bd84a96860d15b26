"""Image files decoded once, by all cores, into one array on disk; it may be killed at any time.

Beside the array <name>.npy, uint8 [n 3 s s], is <name>.flags: one byte per file (not decoded yet, decoded or
broken), then a checksum. An unfinished array is called <name>.npy.part, and the next run continues it. A
worker is this file run as a script, without torch, so it starts fast:

    python decoding.py PATHS ARRAY OFFSET SIZE RESAMPLE WORKER WORKERS
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np

DECODED, BROKEN = 1, 2
CHECKED = 2**31  # bytes; a larger array has no checksum, which would take over a second at each start
BICUBIC, LANCZOS = 3, 1  # Pillow's codes; Lanczos is sharper, for views, which are resized twice
VERSION = "3"  # of decode(): arrays of another version are remade
BLOCK = 256  # images written and flagged together


def to_bytes(pixels):
    """Grey pixels [h w] of more than 8 bits -> uint8, which convert() would clip. ValueError for a NaN.

    White is 1 (floats only), 255, 4095 or 65535, the first that no pixel exceeds. If there is none or a pixel
    is negative, the smallest pixel is black and the largest is white.
    """
    whites = (1, 255, 4095, 65535) if pixels.dtype.kind == "f" else (255, 4095, 65535)
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(high - low):
        raise ValueError("its pixels are not finite")
    black, white = low, high
    if low >= 0 and high <= whites[-1]:
        black, white = 0, next(white for white in whites if high <= white)
    scale = 255 / max(white - black, 1e-9)
    out = np.empty(pixels.shape, np.uint8)
    for row, source in zip(out, pixels, strict=True):  # all rows at once would take gigabytes
        row[:] = ((source.astype(np.float64) - black) * scale).round()
    return out


def side_and_depth(path):
    """The short side of an image file and whether it has more than 8 bits per pixel; (0, False) if broken."""
    from PIL import Image

    with contextlib.suppress(Exception):  # decode() reports it
        if os.path.isfile(path):
            with Image.open(path) as image:
                return min(image.size), image.mode[0] in "IF"
    return 0, False


def decode(path, size, resample=BICUBIC):
    """One image file -> uint8 [3 size size]: short side resized, centre crop. ValueError names the file."""
    from PIL import Image, ImageOps

    try:
        if not os.path.isfile(path):
            raise ValueError("it is not a file")  # opening a FIFO would block
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            deep_colours = ";16" in str(image.tile) and not deep  # Pillow keeps the upper 8 bits
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decoded at half size or less if that is enough
            image = ImageOps.exif_transpose(image)
            if deep:
                image = Image.fromarray(to_bytes(np.asarray(image)))
            image = image.convert("RGB")
            if deep_colours and max(high for _, high in image.getextrema()) < 16:
                raise ValueError("its colours have 16 bits but use 12 or fewer: convert it to 8")
            image = ImageOps.fit(image, (size, size), resample)
    except Exception as error:  # Pillow raises many types for broken files
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return np.asarray(image).transpose(2, 0, 1)


def decode_all(paths, size, file, progress, resample=BICUBIC):
    """Decodes `paths` into `file`, uint8 [n 3 size size], unless it exists. Returns the flags, uint8 [n].

    progress: called with the number of images decoded so far. Raises OSError if the disk is full.
    """
    flags, part = file.with_suffix(".flags"), Path(f"{file}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):
        if is_whole(file, flags, len(paths)):
            return np.fromfile(flags, np.uint8, len(paths))
        if file.exists():
            print(f"warning: {file} is damaged: decoding again", flush=True)
        if not can_continue(part, flags, (len(paths), 3, size, size)):
            part.unlink(missing_ok=True)
            gib = len(paths) * 3 * size**2 / 2**30
            free = shutil.disk_usage(file.parent).free / 2**30
            if gib > free:
                raise OSError(f"it takes {gib:.3g} GiB, the disk has {free:.3g}")
            np.lib.format.open_memmap(part, "w+", np.uint8, (len(paths), 3, size, size))
            flags.write_bytes(bytes(len(paths)))
        names = file.with_suffix(".paths")
        names.write_bytes(b"\0".join(os.fsencode(path) for path in paths))
        offset = np.load(part, mmap_mode="r").offset
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        count = min(cores, -(-len(paths) // BLOCK))
        command = [sys.executable, __file__, names, part, offset, size, resample]
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below; not a pipe, which would fill up
        workers = []
        for i in range(count):
            workers.append(subprocess.Popen([str(word) for word in (*command, i, count)], stderr=errors))
        try:
            while any(worker.poll() is None for worker in workers):
                progress(int((np.fromfile(flags, np.uint8) > 0).sum()))
                time.sleep(0.1)
            code = next((worker.returncode for worker in workers if worker.returncode), 0)
            if code:
                errors.seek(0)
                raise OSError((errors.read().strip().splitlines() or [f"exit code {code}"])[-1])
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            errors.close()
        done = np.fromfile(flags, np.uint8)
        progress(int((done > 0).sum()))
        close_holes(part, done)
        flags.write_bytes(done.tobytes() + checksum(np.load(part, mmap_mode="r"), done.tobytes()))
        os.replace(part, file)
        names.unlink()
    return done


def checksum(images, flags):
    """Four bytes: of the flags and, unless the array is large, of the images."""
    crc = zlib.crc32(flags)
    return (zlib.crc32(images, crc) if images.nbytes <= CHECKED else crc).to_bytes(4, "little")


def can_continue(part, flags, shape):
    """Whether an interrupted run left an array and flags to continue; a power cut may leave garbage."""
    try:
        return np.load(part, mmap_mode="r").shape == shape and flags.stat().st_size == shape[0]
    except (OSError, ValueError, EOFError):
        return False


def is_whole(file, flags, n):
    try:
        marks, images = flags.read_bytes(), np.load(file, mmap_mode="r")
        return len(images) == n and marks[n:] == checksum(images, marks[:n])
    except (OSError, ValueError, EOFError):  # missing or cut off
        return False


def rows_of(flags):
    """The file of each sound row, [n - broken]: in order, with the last ones in place of broken ones."""
    n = int((flags == DECODED).sum())
    rows = np.arange(n)
    rows[flags[:n] == BROKEN] = n + np.flatnonzero(flags[n:] == DECODED)
    return rows


def close_holes(part, flags):
    """Moves rows to where rows_of() puts them. It deletes nothing, so it can run again after a kill."""
    images = np.load(part, mmap_mode="r+")
    for i, row in enumerate(rows_of(flags)):
        if row != i:
            images[i] = images[row]
    images.flush()


@contextlib.contextmanager
def locked(path, wait=True):
    """An exclusive lock on a file or folder; with wait=False BlockingIOError if another process has it."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except (ImportError, OSError):  # Windows, and disks without locks: do not start two runs at once
            pass
        yield


def work(paths, array, offset, size, resample, worker, workers):
    """Decodes every `workers`-th block of files, except those flagged already; ends with its parent."""
    paths = Path(paths).read_bytes().split(b"\0")
    flags = Path(array).with_suffix("").with_suffix(".flags")
    done = np.fromfile(flags, np.uint8)
    parent = os.getppid()
    with open(array, "r+b") as images, open(flags, "r+b") as marks:
        for start in range(worker * BLOCK, len(paths), workers * BLOCK):
            block = range(start, min(start + BLOCK, len(paths)))
            todo = [i for i in block if done[i] not in (DECODED, BROKEN)]
            for i in todo:
                try:
                    pixels, done[i] = decode(os.fsdecode(paths[i]), size, resample), DECODED
                except ValueError:
                    done[i] = BROKEN
                    continue
                images.seek(offset + i * pixels.size)
                images.write(pixels.tobytes())
            images.flush()
            os.fsync(images.fileno())  # the pixels first, then the flags
            for i in todo:
                marks.seek(i)
                marks.write(done[i].tobytes())
            marks.flush()
            if os.getppid() != parent:
                return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    warnings.simplefilter("ignore")  # Pillow's, about files that can be read
    try:
        work(*sys.argv[1:3], *(int(word) for word in sys.argv[3:]))
    except OSError as error:
        sys.exit(error.strerror)
