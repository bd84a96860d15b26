"""Data sets: files as published, a cache that survives a kill, a sentence for every bad input, batches read
ahead.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from data import Batches, batch_indices, fingerprint, load
from twins import decoding
from twins.datasets import Split
from twins.decoding import decode
from twins.errors import UserError

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photographs(root, n=4, classes=("a", "b"), part="train"):
    for c in classes:
        (root / part / c).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(noise(40 + i, 50, 3, seed=i)).save(root / part / c / f"{i}.jpg")
    return root


def imagenet(root, n=10, width=3072, low=1, high=200, batches=(1,), dtype=np.uint8, **more):
    root.mkdir(exist_ok=True)
    for seed, name in enumerate((*(f"train_data_batch_{i}" for i in batches), "val_data")):
        labels = np.linspace(low, high, n).astype(np.int64)
        np.savez(
            root / f"{name}.npz",
            **{"data": noise(n, width, seed=seed).astype(dtype), "labels": labels} | more,
        )
    return root


# bad inputs


def broken(path, content=b"no image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def unreadable(root):
    photographs(root)
    (root / "train" / "a" / "0.jpg").unlink()
    (root / "train" / "a" / "0.jpg").symlink_to("nowhere.jpg")


def one_in_two_hundred(root, n):
    photographs(root, n=100)
    for i in range(n):
        broken(root / "train" / "a" / f"{i}.jpg")


FLAT = "is in none of the 2 class folders"
NPZ = dict(dataset="imagenet32")
BAD = {  # what is made in a folder, what is loaded, what is said
    "unknown data set": (lambda r: None, dict(dataset="cifar11"), "cifar11 is unknown: choose one of shapes"),
    "no folder": (lambda r: r.rmdir(), {}, "is not a folder: give the one that holds"),
    "a file for a folder": (lambda r: (r.rmdir(), broken(r)), {}, "is not a folder"),
    "nothing in it": (lambda r: None, {}, "holds nothing: put images there"),
    "no images": (lambda r: broken(r / "train/a/notes.txt"), {}, "no file with an image's suffix"),
    "only hidden images": (lambda r: broken(r / "train/a/.0.jpg"), {}, "no file with an image's suffix"),
    "text called jpg": (
        lambda r: broken(photographs(r) / "train/a/9.jpg"),
        {},
        r"a/9.jpg cannot be read as an image",
    ),
    "empty file": (
        lambda r: broken(photographs(r) / "train/a/9.png", b""),
        {},
        r"a/9.png cannot be read as an image",
    ),
    "cut off jpg": (
        lambda r: cut(photographs(r) / "train/b/2.jpg"),
        {},
        r"b/2.jpg cannot be read .*truncated",
    ),
    "link to nowhere": (unreadable, {}, r"a/0.jpg cannot be read as an image \(it is not a file"),
    "image beside class folders": (lambda r: broken(photographs(r) / "train/9.jpg"), {}, FLAT),
    "test class never trained": (
        lambda r: photographs(photographs(r), classes=("c",), part="test"),
        dict(split="test"),
        "train has no class c, but .*test has: add it there",
    ),
    "no test folder": (photographs, dict(split="test"), "has no test/ or val/ folder"),
    "one bad image": (
        lambda r: one_in_two_hundred(r, 1),
        {},
        r"a/0.jpg .*: fix or remove it, or .* --skip_bad_images=True",
    ),
    "two bad images": (
        lambda r: one_in_two_hundred(r, 2),
        {},
        r"a/0.jpg cannot .*nor can 1 more, e.g. .*a/1.jpg",
    ),
    "too many bad images": (
        lambda r: one_in_two_hundred(r, 3),
        dict(skip_bad_images=True),
        "3 of 200 images are too many",
    ),
    "no npz": (lambda r: None, NPZ, "no train_data_batch_1.npz: get the npz files .*image-net.org"),
    "no val npz": (
        lambda r: (imagenet(r) / "val_data.npz").unlink(),
        NPZ | dict(split="test"),
        "no val_data.npz",
    ),
    "cut off npz": (
        lambda r: cut(imagenet(r) / "train_data_batch_1.npz"),
        NPZ,
        "batch_1.npz is not a complete batch",
    ),
    "labels from 0": (
        lambda r: imagenet(r, low=0),
        NPZ,
        "batch_1.npz .*labels from 0 to 200, not from 1",
    ),
    "wrong width": (lambda r: imagenet(r, width=768), NPZ, r"uint8 \[10, 768\], not uint8 \[n 3072\]"),
    "not bytes": (lambda r: imagenet(r, dtype=np.float32), NPZ, r"data float32 \[10, 3072\]"),
    "label missing": (
        lambda r: imagenet(r, labels=np.ones(9, int)),
        NPZ,
        r"labels int64 \[9\], .*for each image",
    ),
    "labels are text": (
        lambda r: imagenet(r, labels=np.array(["cat"] * 10)),
        NPZ,
        r"labels <U3 .*not a number",
    ),
    "pickled labels": (lambda r: imagenet(r, labels=np.array([None] * 10)), NPZ, "allow_pickle=False"),
    "other keys": (
        lambda r: np.savez(r / "train_data_batch_1.npz", x=1),
        NPZ,
        "not a complete batch",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence_that_names_it(case, tmp_path):
    make, keys, words = BAD[case]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=words):
        load(**{"dataset": "folder", "data_dir": root, "image_size": 32} | keys)


#
# data sets


def test_imagenet32_is_read_as_published(tmp_path):
    root = imagenet(tmp_path, batches=(1, 2, 10))
    train, test = (load("imagenet32", root, 32, split) for split in ("train", "test"))
    assert train.images.shape == (30, 3, 32, 32) and len(train.classes) == 200 and len(test.images) == 10
    assert train.labels[:10].tolist() == (np.linspace(1, 200, 10).astype(int) - 1).tolist()
    pixels = np.load(root / "train_data_batch_10.npz")["data"]
    assert train.images[20, 1, 2, 3] == pixels[0, 1024 + 2 * 32 + 3]  # batch 10 comes after batch 2


def test_the_real_layout_of_imagenet32_trains_and_is_probed(real_images, train, command):
    g = train("barlow.py", dataset="imagenet32", data_dir=real_images / "imagenet32-standin")
    assert len(g["data"].images) == 5000 and len(g["data"].classes) == 200
    done = command("eval_linear.py", ckpt=f"{g['out_dir']}/ckpt.pt")
    assert done.returncode == 0 and "5000 training, 500 test images" in done.stdout, done.stderr


def test_stl10_trains_on_what_has_no_label(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    root = tmp_path / "stl10_binary"
    root.mkdir()
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for part, n in {"train": 20, "test": 8, "unlabeled": 30}.items():
        noise(n, 3, 96, 96).tofile(root / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join("abcdefghij"))
    train, test = (load("stl10", tmp_path, 96, split) for split in ("train", "test"))
    assert (
        train.images.shape == (50, 3, 96, 96)
        and train.labels.tolist() == [i % 10 for i in range(20)] + [-1] * 30
    )
    assert test.labels.tolist() == list(range(8)) and load("stl10", tmp_path, 48).images.shape[-1] == 48


def test_a_mirror_is_asked_instead(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    asked = []
    monkeypatch.setenv("DINO_TWINS_MIRROR", "https://mirror.example/sets/")
    monkeypatch.setattr(CIFAR10, "download", lambda self: asked.append(self.url))
    with pytest.raises(UserError, match=r"https://mirror.example/sets/cifar-10-python.tar.gz"):
        load("cifar10", tmp_path, 32)
    assert asked == ["https://mirror.example/sets/cifar-10-python.tar.gz"]


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (4000, 3), (33, 32)])
def test_images_of_any_shape(size, tmp_path):
    Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(tmp_path / "a.png")
    assert (
        decode(tmp_path / "a.png", 32).shape == (3, 32, 32) and (decode(tmp_path / "a.png", 32) == 200).all()
    )


def test_images_of_any_kind(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[:, :30, 0] = 255  # red on the left
    for mode, name in {
        "RGBA": "a.png",
        "CMYK": "b.jpg",
        "P": "c.gif",
        "RGB": "d.webp",
        "L": "e.png",
        "1": "f.png",
        "LA": "g.png",
    }.items():
        Image.fromarray(red).convert(mode).save(tmp_path / name)
        pixels = decode(tmp_path / name, 16).astype(int)
        assert pixels[0, :, :6].mean() > pixels[0, :, 10:].mean() + 50, mode
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: what was left is on top
    Image.fromarray(red).save(tmp_path / "h.jpg", exif=exif)
    turned = decode(tmp_path / "h.jpg", 16).astype(int)
    assert turned[0, :6].mean() > turned[0, 10:].mean() + 50


def test_a_huge_image_is_read_small(tmp_path):
    Image.fromarray(np.zeros((6000, 9000), np.uint8)).save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg", 32).shape == (3, 32, 32)


#
# cache


def test_broken_images_are_left_out_and_labels_stay_right(tmp_path, capsys):
    root = photographs(tmp_path, n=100)
    for c in "ab":  # every image of a class in its own brightness
        for i in range(100):
            Image.fromarray(np.full((40, 40, 3), 50 if c == "a" else 200, np.uint8)).save(
                root / f"train/{c}/{i}.jpg"
            )
    broken(root / "train" / "a" / "3.jpg"), broken(root / "train" / "b" / "17.jpg")
    for _ in range(2):  # decoded, then from the cache
        found = load("folder", root, 16, skip_bad_images=True)
        assert len(found.images) == len(found.labels) == 198 and found.labels.bincount().tolist() == [99, 99]
        assert torch.equal(
            found.images.float().mean((1, 2, 3)).round(), torch.where(found.labels == 0, 50.0, 200.0)
        )
        assert "left out 2 of 200 images" in capsys.readouterr().out


def many(root, n, seed=0):
    (root / "train").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((8, 8, 3), i % 251, np.uint8)).save(root / "train" / f"{i:05}.png")
    return root


def test_a_killed_cache_goes_on_where_it_was(tmp_path):
    root = many(tmp_path, 3000)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; data.load('folder', {str(root)!r}, 64)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    flags = []
    while not any(np.fromfile(f, np.uint8).any() for f in flags):
        assert process.poll() is None, "done before it was killed"
        time.sleep(0.002)
        flags = list((root / ".cache").glob("*.flags"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the workers see it, and end
    done = np.fromfile(flags[0], np.uint8) == decoding.DECODED
    part = next((root / ".cache").glob("*.part"))
    assert 0 < done.sum() < 3000
    row = int(np.flatnonzero(done)[0])
    with open(part, "r+b") as file:  # a mark on what is there shows that it is not made again
        file.seek(np.load(part, mmap_mode="r").offset + row * 3 * 64 * 64)
        file.write(b"\x07" * 3)
    images = load("folder", root, 64).images
    expected = torch.arange(3000) % 251
    assert images[row].flatten()[:3].tolist() == [7, 7, 7] and torch.equal(
        images[:, 2, 63, 63].long(), expected
    )
    assert not list((root / ".cache").glob("*.part"))


@pytest.mark.parametrize("rubbish", [b"", bytes(200), None])
def test_a_damaged_beginning_of_a_cache_is_made_anew(tmp_path, rubbish):
    root = many(tmp_path, 5)
    expected = load("folder", root, 8).images.clone()
    (file,) = (root / ".cache").glob("*.npy")
    part = Path(f"{file}.part")
    if rubbish is None:
        np.save(part.with_suffix(""), np.zeros((5, 3, 4, 4), np.uint8))  # of another size
    file.rename(part) if rubbish is None else part.write_bytes(rubbish)
    file.unlink(missing_ok=True)
    file.with_suffix(".flags").write_bytes(bytes(5))
    assert torch.equal(load("folder", root, 8).images, expected) and not part.exists()


@pytest.mark.parametrize("flag", [0, 2, 3, 254])
def test_a_changed_flag_of_a_cache_loses_no_image(tmp_path, flag, capsys):
    root = many(tmp_path, 5)
    expected = load("folder", root, 8).images.clone()
    (file,) = (root / ".cache").glob("*.flags")
    flags = bytearray(file.read_bytes())
    flags[3] = flag
    file.write_bytes(flags)
    assert torch.equal(load("folder", root, 8).images, expected)
    assert "is damaged: decoding again" in capsys.readouterr().out


def test_two_runs_make_one_cache(tmp_path):
    root = many(tmp_path, 600)
    images = f"data.load('folder', {str(root)!r}, 16).images"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; print({images}.sum().item())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    sums = {process.communicate()[0].splitlines()[-1] for process in both}
    assert len(sums) == 1 and [process.returncode for process in both] == [0, 0]
    assert len(list((root / ".cache").glob("*.npy"))) == 1


def test_a_folder_that_changes_is_decoded_anew_and_the_old_cache_goes(tmp_path):
    root = photographs(tmp_path)
    before = load("folder", root, 16).images.clone()
    first = list((root / ".cache").glob("*.npy"))
    os.utime(root / "train" / "a" / "0.jpg", (1, 1))
    assert torch.equal(load("folder", root, 16).images, before)
    second = list((root / ".cache").glob("*.npy"))
    assert len(first) == len(second) == 1 and first != second
    load("folder", root, 8)
    assert len(list((root / ".cache").glob("*.npy"))) == 2  # another size is another cache


def test_a_cache_is_of_the_folder_however_it_is_called_and_of_no_other(tmp_path, monkeypatch):
    root = photographs(tmp_path / "set")
    photographs(tmp_path / "set", part="train-16-small")
    load("folder", root, 16)
    for flat in ("train-16-small", "train"):
        load("folder", root / flat / "a", 16)
    first = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    monkeypatch.chdir(tmp_path)
    load("folder", "set", 16)
    monkeypatch.setattr(decoding.subprocess, "Popen", None)
    load("folder", root, 16)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")} == first and len(first) == 3


def test_a_kill_while_holes_are_closed_does_no_harm(tmp_path, monkeypatch):
    root = photographs(tmp_path, n=100)
    broken(root / "train" / "a" / "3.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(decoding.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(UserError, match="killed"):
            load("folder", root, 16, skip_bad_images=True)
    found = load("folder", root, 16, skip_bad_images=True)
    sums = [
        int(decode(path, 16).sum()) for path in (root / "train").rglob("*.jpg") if path.stat().st_size > 100
    ]
    assert len(found.images) == 199 and sorted(found.images.sum((1, 2, 3)).tolist()) == sorted(sums)


def test_many_warnings_of_a_worker_do_not_stop_it(tmp_path, monkeypatch):
    root = photographs(tmp_path)
    loud = "import runpy, sys; sys.stderr.write('warning\\n' * 50_000); del sys.argv[0]; "
    loud += "runpy.run_path(sys.argv[0], run_name='__main__')"
    popen = subprocess.Popen
    monkeypatch.setattr(
        decoding.subprocess,
        "Popen",
        lambda words, **keys: popen([sys.executable, "-c", loud, *words[1:]], **keys),
    )
    assert len(load("folder", root, 16).images) == 8


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    root = photographs(tmp_path)
    for flags in (
        ("-c", "import sys; sys.exit('No space left on device')"),
        ("-c", "import os; os.kill(os.getpid(), 9)"),
    ):
        with monkeypatch.context() as patch:
            worker = functools.partial(subprocess.Popen, [sys.executable, *flags])
            patch.setattr(decoding.subprocess, "Popen", lambda words, worker=worker, **keys: worker(**keys))
            with pytest.raises(
                UserError, match=r"cache .*train-16-.* cannot be made or read: (No space left|exit code -9)"
            ):
                load("folder", root, 16)
    assert len(load("folder", root, 16).images) == 8


#
# batches


def test_batches_read_ahead_are_the_batches_in_memory(capsys):
    images, kept = torch.from_numpy(noise(100, 3, 8, 8)), torch.randperm(100)[:90]
    held = Batches(images, kept, 16, 0, CPU, memory_gib=1.0)
    ahead = Batches(images, kept, 16, 0, CPU, memory_gib=1e-6)
    assert "read ahead" in capsys.readouterr().out and held.pool is None and ahead.pool
    for step in (0, 1, 2, 3, 4, 5, 6, 40, 41, 7):  # an epoch is 5 steps
        expected = images[kept[batch_indices(90, 16, 0, step)]]
        assert torch.equal(held(step), expected) and torch.equal(ahead(step), expected)


def test_a_set_larger_than_the_allowed_memory_trains_the_same(train, tmp_path):
    root = photographs(tmp_path / "set", n=30)
    keys = dict(dataset="folder", data_dir=root, max_steps=4, batch_size=8)
    held, ahead = (train("hybrid_b.py", memory_gib=m, **keys) for m in (1.0, 1e-6))
    assert held["batches"].pool is None and ahead["batches"].pool
    assert held["loss"].item() == ahead["loss"].item()


def test_larger_images_train_with_views_between_96_and_224(train, tmp_path):
    root = photographs(tmp_path / "set", n=8)
    keys = dict(image_size=224, local_size=96, patch_size=16, batch_size=4, max_steps=1, blur=True)
    g = train("dino.py", dataset="folder", data_dir=root, **keys)
    assert [v.shape[-1] for v in g["views"]] == [224, 224, 96]


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(tmp_path):
    photographs(tmp_path)
    with pytest.raises(UserError, match=r"cannot be made or read: it takes .* GiB, the disk has"):
        load("folder", tmp_path, 10**6, "train")
    assert not list(tmp_path.glob(".cache/*.part"))


def test_other_images_of_equal_borders_have_another_fingerprint():
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    others = images.clone()
    others[2, :, 8:24, 8:24] = 200
    assert fingerprint(Split(images, None, [])) != fingerprint(Split(others, None, []))
