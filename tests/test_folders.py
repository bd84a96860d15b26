"""Folders as people have them: names of splits, masks, odd files, pixel types, sizes of caches."""

import os
import pickle
import shlex
import struct
import tracemalloc
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attn_viz
import data
import twins.monitor as monitor
from twins import cache, datasets, decoding, masks, options
from twins.errors import UserError
from twins.masks import has_masks, load_masks


class Worker:
    """A worker of decode_all() in this process."""

    returncode = 0

    def __init__(self, words, stderr):
        decoding.work(*words[2:4], *map(int, words[4:]))

    def poll(self):
        return 0

    kill = wait = poll


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    monkeypatch.setattr(decoding.subprocess, "Popen", Worker)


def photo(path, side=12, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(path)


def tree(root, *names):
    for name in names:
        photo(root / name)
    return root


def test_pictures_that_a_run_writes_are_no_photographs(tmp_path, capsys):
    """--out_dir inside --data_dir, and attn_viz.py --out_dir equal to --images."""
    tree(tmp_path, "cat/a.png", "cat/curves.png", "dog/b.png", "out/r1/crops.png", "out/r1/curves.png")
    (tmp_path / "out/r1/config.json").write_text("{}")
    split = load(tmp_path)
    assert split.classes == ["cat", "dog"] and len(split.images) == 3  # a photograph may have any name
    assert "2 written by a run" in capsys.readouterr().out
    tree(tmp_path / "mine", "c.png", "attention.png", "divergence.png")
    (tmp_path / "mine/attention.json").write_text("{}")
    assert len(attn_viz.own_images(tmp_path / "mine", 8).images) == 1


def load(root, split="train", size=8, **more):
    return datasets.load("folder", root, size, split, **more)


# ------------------------------------------------------------------------------------------------- 1: splits

LABELLED = ("a/0.png", "a/1.png", "b/0.png")


@pytest.mark.parametrize(
    "train, test",
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("train", "valid"),
        ("TRAINING", "testing"),
        ("train", "Val"),
    ],
)
def test_known_names_in_any_case_are_splits(train, test, tmp_path, capsys):
    tree(tmp_path, *(f"{train}/{name}" for name in LABELLED), f"{test}/b/9.png")
    found, held = load(tmp_path), load(tmp_path, "test")
    assert found.classes == held.classes == ["a", "b"]
    assert found.labels.tolist() == [0, 0, 1] and held.labels.tolist() == [1]
    assert f"{train}: 3 images in 2 classes: a 2, b 1" in capsys.readouterr().out


BAD_SPLITS = {  # files, split, what is said
    "val alone": (
        ["val/a/0.png"],
        "train",
        r"has no train/ folder, only val/: rename it, or give it as --data_dir",
    ),
    "Test and Val alone": (["Test/a/0.png", "Val/a/0.png"], "train", "no train/ folder, only Test/, Val/"),
    "train alone": (["train/a/0.png"], "test", "no test/ or val/ folder, only train/"),
    "train twice": (
        ["train/a/0.png", "Train/a/0.png"],
        "train",
        "holds Train/ and train/, which are the same split",
    ),
    "val and valid": (["train/a/0.png", "val/a/0.png", "valid/a/0.png"], "test", "holds val/ and valid/"),
    "Kaggle's names": (
        ["training_set/a/0.png", "test_set/a/0.png"],
        "train",
        "holds test_set/ and training_set/: if they are splits, rename them to test/ and train/",
    ),
    "COCO's names": (["train2017/a/0.png", "val2017/a/0.png"], "test", "holds train2017/ and val2017/"),
    "splits in each class": (
        ["cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png"],
        "train",
        "cat holds test, train: move them to train/<class>/",
    ),
    "splits in a class of train/": (
        ["train/cat/train/0.png", "train/dog/1.png", "test/cat/0.png", "test/dog/1.png"],
        "test",
        "train/cat holds train: move them",
    ),
    "a class that train/ has not": (
        ["train/a/0.png", "train/b/1.png", "test/a/2.png", "test/c/3.png"],
        "test",
        "train has no class c, but .*test has: add it there, or remove it here",
    ),
    "a class train": (
        ["train/0.png", "bus/0.png"],
        "train",
        "train holds images without class folders beside bus/",
    ),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_ambiguous_splits_are_refused(case, tmp_path):
    names, split, words = BAD_SPLITS[case]
    with pytest.raises(UserError, match=words):
        load(tree(tmp_path, *names), split)


def test_a_split_alone_can_be_trained_on_and_classes_may_be_called_like_splits_inside(tmp_path):
    tree(tmp_path, "val/a/0.png", "val/b/0.png")
    assert load(tmp_path / "val").classes == ["a", "b"] and len(load(tmp_path, "test").labels) == 2


@pytest.mark.parametrize("inner", ["photos/train", "photos/Val", "train/train"])
def test_a_folder_around_the_splits_is_no_class(inner, tmp_path):
    tree(tmp_path, *(f"{inner}/{name}" for name in LABELLED))
    with pytest.raises(UserError, match=r"give --data_dir=.*photos$|name of a split, not of a class"):
        load(tmp_path)


def test_a_class_may_have_a_splits_word_in_its_name(tmp_path):
    names = ["bullet_train/a/0.png", "freight_train/0.png", "bus/0.png"]
    assert load(tree(tmp_path, *names)).classes == ["bullet_train", "bus", "freight_train"]


def test_one_class_of_nested_folders_is_one_class(tmp_path):
    assert load(tree(tmp_path, "train/all/2019/0.png", "train/all/2020/0.png")).classes == ["all"]


def test_a_flat_train_beside_a_labelled_val_is_said(tmp_path):
    tree(tmp_path, "train/0.png", *(f"val/{name}" for name in LABELLED))
    with pytest.raises(UserError, match=r"train has no class folders, but .*val has"):
        load(tmp_path, "test")


def test_folders_that_systems_make_are_no_classes(tmp_path):
    names = ("@eaDir/a/0.png", "a/@eaDir/0.png", "#recycle/0.png", "__MACOSX/0.png", "$RECYCLE.BIN/0.png")
    data = load(tree(tmp_path, *(f"train/{name}" for name in LABELLED + names)))
    assert data.classes == ["a", "b"] and len(data.images) == 3


def test_a_class_of_the_test_images_alone_is_said_before_training(tmp_path, capsys):
    tree(tmp_path, *(f"train/{name}" for name in LABELLED), "test/a/2.png")
    load(tmp_path)
    assert "warning" not in capsys.readouterr().out
    tree(tmp_path, "test/c/3.png")
    load(tmp_path)
    assert f"train has no class c, but {tmp_path}/test has" in capsys.readouterr().out


def test_images_of_a_folder_that_cannot_be_written_are_cached_elsewhere(tmp_path, monkeypatch):
    """A container may run with a user without a home, and HOME unset: expanduser("~") is then "~"."""
    root, read_only, allowed = tree(tmp_path / "data", *LABELLED), [], os.access
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in read_only and allowed(path, mode))
    for home in (tmp_path / "home", "~"):
        monkeypatch.setattr(os.path, "expanduser", lambda path, home=home: str(home))
        monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
        read_only.append(tmp_path / ".cache")
        place = tmp_path / ("tmp" if home == "~" else "home") / ".cache/dino-twins"
        assert cache.cache_folder(root).parent == place
    read_only += [cache.cache_folder(root)]
    with pytest.raises(UserError, match=r"no folder such as .*tmp/.cache/.* can be written"):
        load(root)
    assert not (tmp_path / "~").exists()


def test_a_class_spelled_in_two_ways_is_one(tmp_path, capsys):
    """é is one character or two: the same name in a file manager."""
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    tree(tmp_path, f"train/{two}/0.png", "train/b/1.png", f"test/{one}/2.png", "test/b/3.png")
    assert load(tmp_path).classes == load(tmp_path, "test").classes == ["b", one]
    assert load(tmp_path, "test").labels.tolist() == [0, 1] and "warning" not in capsys.readouterr().out


def test_test_images_that_are_the_training_images_are_said(tmp_path, capsys):
    tree(tmp_path, *(f"train/{name}" for name in LABELLED))
    (tmp_path / "test").symlink_to("train")
    assert len(load(tmp_path, "test").images) == 3
    said = f"warning: {tmp_path}/test is {tmp_path}/train, so these are training images"
    assert said in capsys.readouterr().out


def test_masks_beside_images_in_classes_are_no_class_of_the_test_images(tmp_path, capsys):
    tree(tmp_path, "train/images/a/0.png", "train/images/b/1.png", "train/masks/0.png")
    tree(tmp_path, "val/images/a/2.png", "val/masks/2.png")
    assert load(tmp_path).classes == ["a", "b"]
    assert "warning" not in capsys.readouterr().out


def test_a_labelled_val_goes_before_a_flat_test(tmp_path, capsys):
    tree(tmp_path, "train/a/0.png", "test/0.png", "test/1.png", "val/a/5.png")
    assert load(tmp_path, "test").labels.tolist() == [0]
    assert "test has no class folders" in capsys.readouterr().out
    photo(tmp_path / "test/a/1.png"), photo(tmp_path / "test/a/2.png")
    os.remove(tmp_path / "test/0.png"), os.remove(tmp_path / "test/1.png")
    assert len(load(tmp_path, "test").labels) == 2


# -------------------------------------------------------------------------------------------- 2: masks
# layouts


@pytest.mark.parametrize("layout", ["train/images train/masks", "images masks", "images/train masks/train"])
def test_masks_are_no_class(layout, tmp_path, capsys):
    images, masks = layout.split()
    tree(tmp_path, f"{images}/0.png", f"{images}/1.png", f"{masks}/0.png")
    found = load(tmp_path)
    assert len(found.images) == 2 and found.labels is None
    assert "images/ alone is used, left out: masks/" in capsys.readouterr().out


def test_voc_is_trained_on_by_its_images(tmp_path):
    tree(tmp_path, "JPEGImages/0.jpg", "SegmentationClass/0.png", "SegmentationObject/0.png")
    assert len(load(tmp_path).images) == 1


# ----------------------------------------------------------------------------------------- 3: names and links


def test_names_that_are_not_utf_8(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    tree(tmp_path, "train/a/0.png", f"train/a/{name}")
    assert len(load(tmp_path).images) == 2
    (tmp_path / "train/a" / name).write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read as an image"):
        load(tmp_path)


def test_a_file_that_was_mended_is_read_again(tmp_path):
    """As after a chmod, which changes neither size nor date."""
    file = tree(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(60))) / "a" / "0.png"
    whole, date = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(bytes(len(whole)))
    os.utime(file, ns=date)
    assert len(datasets.load("folder", tmp_path, 8, "train", True).labels) == 119
    file.write_bytes(whole)
    os.utime(file, ns=date)
    assert len(load(tmp_path).labels) == 120


def test_a_broken_link_is_left_out_like_any_broken_file(tmp_path):
    tree(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(60)))
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone.png cannot be read .*--skip_bad_images=True"):
        load(tmp_path)
    assert len(datasets.load("folder", tmp_path, 8, "train", True).labels) == 120


def test_links_to_a_parent_end_and_count_once(tmp_path, capsys):
    tree(tmp_path, "train/a/0.png", "train/b/0.png")
    (tmp_path / "train/a/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/b/up").symlink_to("..")
    (tmp_path / "train/0").symlink_to("b")
    found = load(tmp_path)
    assert len(found.images) == 2 and found.classes == ["a", "b"]
    assert (
        "left out 3 " in (said := capsys.readouterr().out) and "3 linked folder that was read already" in said
    )


def test_a_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch):
    tree(tmp_path, *(f"train/{name}" for name in LABELLED))
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"train/b cannot be opened \(Permission denied\)"):
        load(tmp_path)


def test_suffixes_that_pillow_reads_are_read_and_others_counted(tmp_path, capsys):
    formats = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "pgm": "PPM", "pnm": "PPM"}
    for suffix, kind in formats.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        image = Image.fromarray(np.full((9, 9, 3), 200, np.uint8))
        (image.convert("L") if suffix == "pgm" else image).save(tmp_path / f"a/0.{suffix}", kind)
    for name in ("1.psd", "2.psd", "LICENSE", ".DS_Store"):
        (tmp_path / "a" / name).touch()
    assert abs(load(tmp_path).images.float() - 200).max() < 4 and len(load(tmp_path).images) == 6
    said = capsys.readouterr().out
    assert "left out 4 " in said and "2 .psd" in said and "1 without a suffix" in said and "1 hidden" in said


# ----------------------------------------------------------------------------------------------- 4: pixel
# types

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    "kind, pixels",
    {
        "float 0 to 1": RAMP.astype(np.float32),
        "float 0 to 255": (255 * RAMP).astype(np.float32),
        "float by its range": (3e5 * RAMP - 1e5).astype(np.float32),
        "int32 0 to 255": (255 * RAMP).astype(np.int32),
        "12 of 16 bits": (4095 * RAMP).astype(np.uint16),
        "16 bits": (65535 * RAMP).astype(np.uint16),
        "signed 16 bits": (2000 * RAMP - 1000).astype(np.int16),
        "large int32": (10**9 * RAMP).astype(np.int32),
    }.items(),
)
def test_every_pixel_type_is_scaled(kind, pixels, tmp_path):
    path = tmp_path / "a.tif"
    if pixels.dtype == np.int16:  # Pillow cannot write it
        tiff(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    decoded = decoding.decode(path, 16).astype(float)
    assert abs(decoded - 255 * RAMP).max() <= 2, kind


def tiff(path, pixels):
    """A little-endian TIFF of one strip, 16 bits a channel, grey or RGB, signed or not."""
    (height, width), n = pixels.shape[:2], pixels.size // pixels[..., 0].size if pixels.ndim == 3 else 1
    signed = pixels.dtype == np.int16
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 2 if n == 3 else 1, 273: 300, 277: n, 278: height}
    tags |= {279: pixels.nbytes, 339: 2 if signed else 1}
    entries = b""
    for tag, value in tags.items():
        if tag in (258, 339) and n == 3:  # a number for each channel, further down
            entries += struct.pack("<HHII", tag, 3, 3, 200 + tag % 7 * 10)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    head = bytearray((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(300, b"\0"))
    for tag in (258, 339):
        struct.pack_into("<HHH", head, 200 + tag % 7 * 10, *[tags[tag]] * 3)
    path.write_bytes(head + pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())


def png_of_16_bits(path, pixels):
    """An RGB PNG, which Pillow cannot write with 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)


def test_a_nan_and_dark_16_bit_colours_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a.tif cannot be read as an image .*not finite"):
        decoding.decode(tmp_path / "a.tif", 4)
    for suffix, write in {"png": png_of_16_bits, "tif": tiff}.items():
        path = tmp_path / f"b.{suffix}"
        write(path, np.full((4, 4, 3), 65000, np.uint16))
        assert decoding.decode(path, 4).min() > 250
        write(path, np.full((4, 4, 3), 4000, np.uint16))
        with pytest.raises(ValueError, match="colours have 16 bits but use 12"):
            decoding.decode(path, 4)


@pytest.mark.parametrize("value", [10**8, -5])
def test_a_deep_image_of_one_value_is_black(value):
    assert (decoding.to_bytes(np.full((2, 2), value, np.int32)) == 0).all()


def test_deep_pixels_are_said_once(tmp_path, capsys):
    for i in range(3):
        Image.fromarray((4095 * RAMP).astype(np.uint16)).save(tmp_path / f"{i}.png")
    load(tmp_path)
    assert capsys.readouterr().out.count("more than 8 bits per pixel are scaled") == 1


# ---------------------------------------------------------------------------------------------------- 5:
# masks


def masked(root, mask, suffix="png", mode=None, parts=("train", "val")):
    for part in parts:
        photo(root / part / "images/0.png", 40)
        image = Image.fromarray(mask)
        (root / part / "masks").mkdir(parents=True, exist_ok=True)
        (image.convert(mode) if mode else image).save(root / part / f"masks/0.{suffix}")
    return root


DISK = np.hypot(*np.mgrid[-20:20, -20:20]) < 12
SOFT = np.asarray(Image.fromarray(np.uint8(255 * DISK).repeat(4, 0).repeat(4, 1)).rotate(7).resize((40, 40)))
MASKS = {
    "0 and 255": (np.uint8(255 * DISK), "png", None),
    "soft edges": (SOFT, "png", None),
    "jpg": (np.uint8(255 * DISK), "jpg", None),
    "RGB": (np.uint8(255 * DISK), "png", "RGB"),
    "LA": (np.uint8(DISK), "png", "LA"),
    "RGB jpg with soft edges": (SOFT, "jpg", "RGB"),
    "0 and 1": (np.uint8(DISK), "png", None),
    "one bit": (DISK, "png", None),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_an_object_have_one_class(case, tmp_path):
    root = masked(tmp_path, *MASKS[case])
    assert has_masks("folder", root)
    found = load_masks("folder", root, 40)
    assert found.classes == ["background", "object"] and found.masks.unique().tolist() == [0, 1]
    assert (found.masks[0].numpy() != DISK).mean() < 0.03


def test_classes_and_what_does_not_count_stay_so(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:10], mask[10:20], mask[20:30] = 1, 182, 255
    assert load_masks("folder", masked(tmp_path, mask), 40).masks.unique().tolist() == [-1, 0, 1, 182]


def test_masks_have_the_paths_of_their_images(tmp_path):
    for video, value in (("a", 1), ("b", 2)):
        photo(tmp_path / f"train/images/{video}/0.jpg", 40)
        (tmp_path / f"train/masks/{video}").mkdir(parents=True)
        Image.fromarray(np.uint8(value * DISK)).save(tmp_path / f"train/masks/{video}/0.png")
    assert load_masks("folder", tmp_path, 8).masks.amax((1, 2)).tolist() == [1, 2]
    photo(tmp_path / "train/images/c/0.jpg")
    with pytest.raises(UserError, match=r"c/0.jpg has no mask: .*masks/c/0.png"):
        load_masks("folder", tmp_path, 8)


def test_a_test_folder_without_masks_does_not_hide_val(tmp_path):
    masked(tmp_path, np.uint8(DISK))
    photo(tmp_path / "test/images/0.jpg")
    assert len(load_masks("folder", tmp_path, 8, "test").images) == 1


def test_a_mask_is_turned_as_its_exif_says(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:9] = 1
    plain = load_masks("folder", masked(tmp_path, mask), 40).masks
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(mask).save(tmp_path / "train/masks/0.png", exif=exif)
    assert torch.equal(load_masks("folder", tmp_path, 40).masks, plain.flip(1, 2))


def test_a_palette_of_white_background_is_refused(tmp_path):
    masked(tmp_path, np.uint8(DISK))
    image = Image.fromarray(np.uint8(DISK)).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "train/masks/0.png")
    with pytest.raises(UserError, match="white for class 0 and black for class 1: save it in grey"):
        load_masks("folder", tmp_path, 8)


def test_test_masks_that_are_the_training_masks_are_said(tmp_path, capsys):
    masked(tmp_path, np.uint8(DISK), parts=("train",))
    (tmp_path / "val").symlink_to("train")
    assert len(load_masks("folder", tmp_path, 8, "test").images) == 1
    assert f"warning: {tmp_path}/val is {tmp_path}/train, so these" in capsys.readouterr().out


def test_masks_are_found_in_splits_of_other_names(tmp_path):
    masked(tmp_path, np.uint8(DISK), parts=("Training", "valid"))
    assert has_masks("folder", tmp_path) and len(load_masks("folder", tmp_path, 8, "test").images) == 1


@pytest.mark.parametrize("value", [30000, -7, 10**8])
def test_a_class_that_cannot_be_is_a_sentence(value, tmp_path):
    mask = np.full((40, 40), value, np.int32)
    with pytest.raises(UserError, match=f"it has class {value}, 1000 is the largest"):
        load_masks("folder", masked(tmp_path, mask, "tif"), 8)


def test_large_images_of_16_bits_and_masks_take_little_memory(tmp_path):
    """A file of 300 KB can hold 13,000 pixels a side. Copies in float64 or int32 took 4.7 GiB."""
    side = 3000
    Image.fromarray(np.full((side, side), 4095, np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(np.ones((side, side), np.uint8)).save(tmp_path / "mask.png")
    tracemalloc.start()
    try:
        assert decoding.decode(tmp_path / "16.png", 8).min() == 255
        mask = masks.decode_mask(tmp_path / "mask.png", tmp_path / "mask.png", 8, masks.one_channel)
        assert mask.min() == 1 and tracemalloc.get_traced_memory()[1] < 5 * side**2  # bytes; Pillow's are not
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [0.9, np.nan])
def test_a_mask_of_fractions_is_a_sentence(value, tmp_path):
    with pytest.raises(UserError, match="it holds fractions, but a mask has whole numbers"):
        load_masks("folder", masked(tmp_path, np.full((40, 40), value, np.float32), "tif"), 8)


@pytest.mark.parametrize("place", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_wherever_data_dir_points(place, tmp_path):
    home = tmp_path / "VOCdevkit/VOC2012"
    photo(home / "JPEGImages/0.jpg", 40)
    for path, content in {"SegmentationClass": None, "ImageSets/Segmentation": "0\n"}.items():
        (home / path).mkdir(parents=True)
        if content:
            (home / path / "train.txt").write_text(content)
    Image.fromarray(np.uint8(15 * DISK)).save(home / "SegmentationClass/0.png")
    assert load_masks("voc2012", tmp_path / place, 40).masks.max() == 15
    with pytest.raises(UserError, match=r"val.txt, the list of images, is missing or empty"):
        load_masks("voc2012", tmp_path / place, 40, "test")


# ---------------------------------------------------------------------------------------------------- 6:
# paths


def test_a_tilde_is_the_home_folder_in_every_option_of_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    option = options.Option("", "a path")
    for text, path in {
        "~/a": "/home/me/a",
        "~": "/home/me",
        "~/a,b=~/c:~/d": "/home/me/a,b=/home/me/c:/home/me/d",
        "a~b/c~": "a~b/c~",
    }.items():
        assert options.convert("ckpt", option, text) == path


def test_one_image_file_for_attention(tmp_path):
    photo(tmp_path / "a.jpg")
    found = attn_viz.own_images(str(tmp_path / "a.jpg"), 8)
    assert found.images.shape == (1, 3, 8, 8)


# -------------------------------------------------------------------------------------------- 7: ImageNet-32


def test_pickled_batches_are_converted_by_the_command_in_the_sentence(tmp_path, monkeypatch):
    for name in ("train_data_batch_1", "val_data"):
        batch = {"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), "labels": [1, 1000]}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    for split in ("train", "test"):
        with pytest.raises(UserError, match="holds pickled batches, which may run code") as error:
            datasets.load("imagenet32", tmp_path, 32, split)
    command = shlex.split(str(error.value).partition("\n")[2])
    assert command[:2] == ["python", "-c"] and len(command) == 3
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    for split in ("train", "test"):
        found = datasets.load("imagenet32", tmp_path, 32, split)
        assert found.labels.tolist() == [0, 999] and len(found.classes) == 1000


def test_a_label_of_100_million_is_a_sentence(tmp_path):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((1, 3072), np.uint8), labels=[10**8])
    with pytest.raises(UserError, match="labels from 100000000 to 100000000, not from 1 to 1000"):
        datasets.load("imagenet32", tmp_path, 32)


def test_an_empty_batch_is_a_sentence(tmp_path):
    np.savez(tmp_path / "val_data.npz", data=np.zeros((0, 3072), np.uint8), labels=[])
    with pytest.raises(UserError, match="not a complete batch"):
        datasets.load("imagenet32", tmp_path, 32, "test")


def test_an_npz_bomb_is_a_sentence(tmp_path, monkeypatch):
    np.savez_compressed(
        tmp_path / "train_data_batch_1.npz", data=np.zeros((10, 3072), np.uint8), labels=[1] * 10
    )
    info = zipfile.ZipFile.infolist

    def large(archive):
        for part in (parts := info(archive)):
            part.file_size = 2**33
        return parts

    monkeypatch.setattr(zipfile.ZipFile, "infolist", large)
    with pytest.raises(UserError, match=r"not a complete batch \(it unpacks to 16 GiB\)"):
        datasets.load("imagenet32", tmp_path, 32)


def test_a_fifo_is_a_sentence_and_no_hang(tmp_path):
    tree(tmp_path, "train/images/0.png", "train/masks/1.png")
    os.mkfifo(tmp_path / "train/images/1.png")
    with pytest.raises(UserError, match=r"1.png cannot be read as an image \(it is not a file\)"):
        load(tmp_path, cache_size=0)
    os.mkfifo(tmp_path / "train/masks/0.png")
    with pytest.raises(UserError, match=r"0.png has no mask"):
        load_masks("folder", tmp_path, 8)
    os.mkfifo(tmp_path / "train_data_batch_1.npz")
    with pytest.raises(UserError, match=r"holds no train_data_batch_1.npz"):
        datasets.load("imagenet32", tmp_path, 32)


# ------------------------------------------------------------------------------------------- 8: size of a
# cache


def test_a_folder_is_decoded_larger_for_crops_and_evaluated_at_image_size(tmp_path, monkeypatch):
    for i in range(3):
        photo(tmp_path / f"train/a/{i}.png", 40 - i)
    cropped, evaluated = load(tmp_path, size=20, cache_size=0), load(tmp_path, size=20)
    assert cropped.images.shape[-1] == 32 and evaluated.images.shape[-1] == 20
    assert cropped.image_size == evaluated.image_size == 20
    assert load(tmp_path, size=20, cache_size=26).images.shape[-1] == 26  # another size is another cache
    assert load(tmp_path, size=30, cache_size=0).images.shape[-1] == 40  # no more than they have
    assert load(tmp_path, size=60, cache_size=0).images.shape[-1] == 60
    assert not torch.equal(load(tmp_path, size=32).images, cropped.images)  # nor is it an evaluation's
    with pytest.raises(UserError, match="--cache_size=10 is less than --image_size=20"):
        load(tmp_path, size=20, cache_size=10)
    seen = []
    network = torch.nn.Module()
    network.forward = lambda x: seen.append(x) or x.flatten(1)[:, :9]
    autocast = torch.autocast("cpu", enabled=False)
    monitor.evaluate(network, cropped, torch.arange(3), torch.arange(0), torch.device("cpu"), autocast)
    expected = datasets.normalise(evaluated.images / 255)
    assert seen[0].shape == expected.shape and (seen[0] - expected).abs().mean() < 0.15


def energy(x):
    return ((x[..., 1:] - x[..., :-1]) ** 2).mean() + ((x[..., 1:, :] - x[..., :-1, :]) ** 2).mean()


@pytest.mark.parametrize("size", [96, 48, 32])
def test_views_are_as_sharp_as_torchvisions_from_the_originals(size, real_images, tmp_path):
    """Global views, bicubic and antialiased, of the same boxes: gradient energy within 5 %."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    originals = sorted((real_images / "imagenette128/val").glob("*/*.jpg"))[::10]
    if not originals:
        pytest.skip("no data/imagenette128")
    (tmp_path / "train").mkdir()
    for i, path in enumerate(originals):
        (tmp_path / f"train/{i:03}.jpg").symlink_to(path)
    images = load(tmp_path, size=size, cache_size=0).images
    side = images.shape[-1]
    p = data.draw(len(images), side, data.Crop(size, (0.4, 1.0)), np.random.default_rng(0))
    boxes = [p[name] for name in ("left", "top", "width", "height")]
    ours = data.resized_crop(images / 255, *boxes, torch.zeros(len(images), dtype=bool), size).clamp(0, 1)
    theirs = []
    for path, (left, top, width, height) in zip(originals, torch.stack(boxes, 1).tolist(), strict=True):
        x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255
        box = [round(n * x.shape[-1] / side) for n in (top, left, height, width)]
        view = resized_crop(x, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        theirs.append(view.clamp(0, 1))
    ratio = (energy(ours) / energy(torch.stack(theirs))).item()
    print(f"{size}: cached {side}, {ratio:.3f}")
    assert abs(ratio - 1) < 0.05
