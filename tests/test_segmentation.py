"""Segmentation: scores against naive loops, what masks mean, a head that learns what is there and no more."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import seg_transfer
from test_run import refused
from twins.errors import UserError
from twins.evaluation_pictures import segmentation_picture
from twins.masks import load_masks
from twins.segmentation import Head, best_of_grid, score

CPU, FLOAT32 = torch.device("cpu"), torch.autocast("cpu", enabled=False)


def random_masks(*shape, low=-1, high=4, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).short()


def test_scores_are_a_naive_loop_over_pixels():
    truth, guess = random_masks(3, 8, 8), random_masks(3, 8, 8, low=0, seed=1)
    truth[truth == 2] = 0
    guess[guess == 2] = 1  # class 2 is in neither
    both, either, right, counted = [0] * 5, [0] * 5, 0, 0
    for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t < 0:
            continue
        right, counted = right + (t == g), counted + 1
        for c in range(5):
            both[c] += t == c and g == c
            either[c] += t == c or g == c
    iou = [b / e if e else None for b, e in zip(both, either, strict=True)]
    found = score(guess, truth, 5)
    assert found["iou"] == pytest.approx(iou) and iou[2] is None and iou[4] is None
    assert found["miou"] == pytest.approx(np.mean([i for i in iou if i is not None]))
    assert found["pixel_accuracy"] == pytest.approx(right / counted)


def test_perfect_and_wholly_wrong_predictions():
    truth = random_masks(2, 4, 4, high=3)
    perfect = score(truth.clamp(min=0), truth, 7)
    assert (perfect["miou"], perfect["pixel_accuracy"]) == (1, 1) and perfect["iou"][3:] == [None] * 4
    wrong = score((truth.clamp(min=0) + 1) % 3, truth, 3)
    assert wrong["miou"] == wrong["pixel_accuracy"] == 0
    with pytest.raises(UserError, match="every pixel as ignored"):
        score(truth, torch.full_like(truth, -1), 3)


def test_the_ceiling_is_a_naive_loop():
    masks = random_masks(2, 8, 8, high=3)
    made = best_of_grid(masks, 4, 3)
    for i, y, x in itertools.product(range(2), range(8), range(8)):
        scores = [0.0] * 3
        for c, a, b in itertools.product(range(3), range(2), range(2)):
            share = (masks[i, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] == c).float().mean().item()
            weight = 1.0
            for centre, cell in ((y, a), (x, b)):  # bilinear, borders clamped
                at = min(max((centre + 0.5) / 4 - 0.5, 0), 1)
                weight *= at if cell else 1 - at
            scores[c] += weight * share
        assert made[i, y, x] == max(range(3), key=scores.__getitem__)
    whole = random_masks(2, 2, 2, low=0, high=3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert score(best_of_grid(whole, 8, 3)[:, 4:-4:7, 4:-4:7], whole[:, 4:-4:7, 4:-4:7], 3)["miou"] == 1


@pytest.fixture
def planted():
    """Patch features [n 6 4 4] that hold the class of each patch in noise, and masks [n 8 8]."""
    cells = random_masks(60, 4, 4, low=0, high=3)
    features = torch.nn.functional.one_hot(cells.long(), 6).permute(0, 3, 1, 2) + 0.1 * torch.randn(
        60, 6, 4, 4, generator=torch.Generator().manual_seed(1)
    )
    return features, cells.repeat_interleave(2, 1).repeat_interleave(2, 2)


def measure(features, masks, test_masks, monkeypatch):
    monkeypatch.setattr(seg_transfer, "max_steps", 60)
    task = seg_transfer.Task(lambda: Head(6, 3, 8), seg_transfer.LEARNING_RATES, features[:40], features[40:])
    return seg_transfer.select_and_measure(task, masks, test_masks, 3, CPU, FLOAT32, "planted")


def test_a_head_learns_what_is_planted_and_nothing_from_permuted_masks(planted, monkeypatch):
    features, masks = planted
    found, _ = measure(features, masks[:40], masks[40:], monkeypatch)
    ceiling = score(best_of_grid(masks[40:], 2, 3), masks[40:], 3)
    assert found["miou"] > 0.95 * ceiling["miou"] > 0.6
    monkeypatch.setattr(seg_transfer, "LEARNING_RATES", (0.1,))
    shuffled = [masks.roll(shift, 0) for shift in range(3, 48, 3)]  # of other images; one may fit by chance
    found = [measure(features, wrong[:40], masks[40:], monkeypatch)[0]["miou"] for wrong in shuffled]
    assert sum(found) / len(found) < 0.45


def test_the_test_masks_select_nothing(planted, monkeypatch):
    features, masks = planted
    a, _ = measure(features, masks[:40], masks[40:], monkeypatch)
    b, _ = measure(features, masks[:40], masks[40:].flip(0), monkeypatch)
    assert a["grid"] == b["grid"] and a["selected"] == b["selected"] and a["miou"] != b["miou"]


def test_pixels_that_do_not_count_teach_nothing(planted, monkeypatch):
    features, masks = planted
    wrong = masks.clone()
    wrong[:, :, 4:] = -1
    a, guess = measure(features, wrong[:40], masks[40:], monkeypatch)
    assert a["miou"] > 0.6 and guess.min() >= 0


# -------------------------------------------------------------------------------------------------- data sets


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def photographs(tmp_path):
    """photographs(layout) makes a data set, masks with a class, void and background; returns its folder."""
    rng = np.random.default_rng(0)

    def image(name):
        save(tmp_path / name, rng.integers(0, 255, (40, 60, 3)))

    def mask(name, background, object_, void):
        pixels = np.full((40, 60), background)
        pixels[10:30, 20:40], pixels[:5] = object_, void
        if name.startswith("train-semi") or name.startswith("validation"):
            pixels = np.stack([pixels % 256, pixels // 256, 0 * pixels], -1)
        save(tmp_path / name, pixels)

    def make(layout, n=2):
        for i in range(n):
            if layout == "folder":
                for part in ("train", "val"):
                    image(f"{part}/images/{i}.jpg"), mask(f"{part}/masks/{i}.png", 0, 1, 255)
            elif layout == "voc2012":
                voc = "VOCdevkit/VOC2012"
                image(f"{voc}/JPEGImages/{i}.jpg"), mask(f"{voc}/SegmentationClass/{i}.png", 0, 15, 255)
            elif layout == "pet":
                home = "oxford-iiit-pet"
                image(f"{home}/images/cat_{i}.jpg"), mask(f"{home}/annotations/trimaps/cat_{i}.png", 2, 1, 3)
            elif layout == "imagenet_s":
                for part in ("train-semi", "validation"):
                    image(f"{part}/n01/{i}.JPEG"), mask(f"{part}-segmentation/n01/{i}.png", 0, 300, 1000)
        if layout == "voc2012":
            lists = tmp_path / voc / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True)
            (lists / "train.txt").write_text("0\n"), (lists / "val.txt").write_text("1\n")
        if layout == "pet":
            for part in ("trainval", "test"):
                (tmp_path / home / "annotations" / f"{part}.txt").write_text("cat_0 1 1 1\ncat_1 1 1 1\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "layout, object_, classes",
    [("folder", 1, 2), ("voc2012", 15, 21), ("pet", 1, 2), ("imagenet_s", 300, 301)],
)
def test_masks_mean_what_each_data_set_says(layout, object_, classes, photographs):
    root = photographs(layout)
    for split in ("train", "test"):
        data = load_masks(layout, root, 40, split)
        expected = torch.zeros(40, 40, dtype=torch.int16)  # the middle of 60 x 40
        expected[10:30, 10:30], expected[:5] = object_, -1
        assert data.images.shape[1:] == (3, 40, 40) and len(data.masks) == len(data.images)
        assert data.masks.dtype == torch.int16 and all(torch.equal(mask, expected) for mask in data.masks)
        assert len(data.classes) == classes
    assert load_masks("voc2012", root, 40).classes[15] == "person" if layout == "voc2012" else True


def test_black_and_white_masks_among_class_numbers_are_reported(photographs, capsys):
    root = photographs("folder", n=4)
    load_masks("folder", root, 40)
    assert "warning" not in capsys.readouterr().out
    white = np.zeros((40, 60))
    white[10:30, 20:40] = 255
    save(root / "train" / "masks" / "2.png", white)
    (root / "train" / "masks" / "3.png").unlink()
    save(root / "train" / "masks" / "3.jpg", white)
    data = load_masks("folder", root, 40)
    said = capsys.readouterr().out
    assert "warning: 2 masks of" in said and "2.png; others have class numbers, so 255 is ignored" in said
    assert (data.masks == 1).any((1, 2)).tolist() == [True, True, False, False]


def test_masks_that_cannot_be_are_named(photographs):
    root = photographs("folder")
    with pytest.raises(UserError, match="imagenet9 has no masks: choose one of shapes"):
        load_masks("imagenet9", root, 32)
    with pytest.raises(UserError, match=r"train-semi-segmentation/.*ImageNetS50"):
        load_masks("imagenet_s", root, 32)
    save(root / "train" / "masks" / "0.png", np.arange(7200).reshape(40, 60, 3) % 7)
    with pytest.raises(UserError, match=r"0.png cannot be read as a mask .*colours"):
        load_masks("folder", root, 32)
    (root / "train" / "masks" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0.png cannot be read as a mask"):
        load_masks("folder", root, 32)
    save(root / "train" / "masks" / "0.png", np.zeros((30, 70)))
    with pytest.raises(UserError, match=r"0.png is 70 x 30 pixels, but its image 60 x 40"):
        load_masks("folder", root, 32)
    Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(root / "train" / "masks" / "0.png")
    with pytest.raises(UserError, match=r"0.png cannot be read as a mask .*class 40000, 1000 is the largest"):
        load_masks("folder", root, 32)
    for i in range(2):
        save(root / "train" / "masks" / f"{i}.png", np.zeros((40, 60)))
    with pytest.raises(UserError, match=r"hold no object, only background"):
        load_masks("folder", root, 32)
    (root / "train" / "masks" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0.jpg has no mask: .*0.png is missing"):
        load_masks("folder", root, 32)


def test_the_command_on_a_folder(photographs, command, tmp_path):
    root = photographs("folder", n=12)
    keys = dict(
        ckpt="random", dataset="folder", data_dir=root, dim=12, depth=1, heads=2, max_steps=3, out_dir="out"
    )
    done = command("seg_transfer.py", **keys)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "seg_transfer.json").read_text())
    assert report["results"].keys() == {"this checkpoint", "colour alone", "ceiling of the patch grid"}
    assert 0 <= report["results"]["this checkpoint"]["miou"] <= 1
    assert report["attention"]["mass_over_area"] == pytest.approx([1, 1], abs=0.01)  # random weights: uniform
    assert report["attention"]["jaccard_60"] is None and "mass / area: 1.00" in done.stdout
    assert "Jaccard" not in done.stdout
    assert min(Image.open(tmp_path / "out" / "segmentation.png").size) > 300
    tuned = command("seg_transfer.py", finetune=True, **keys | {"out_dir": "tuned"})
    assert tuned.returncode == 0 and "| fine-tuned |" in tuned.stdout, tuned.stderr
    refused(command("seg_transfer.py", **keys | {"image_size": 30}), 1, "30", "28 or 32")
    refused(command("seg_transfer.py", **keys | {"data_dir": "nowhere"}), 1, "nowhere cannot be opened")
    for part in ("train", "val"):
        for path in (root / part / "masks").iterdir():
            save(path, np.full((40, 60), 255))
    refused(command("seg_transfer.py", **keys), 1, "hold no object")


def test_finetuning_trains_the_backbone_and_leaves_the_original(monkeypatch):
    from vit import ViT

    monkeypatch.setattr(seg_transfer, "max_steps", 2)
    vit, images = ViT(8, 4, 12, 1, 2).eval(), torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    bar = seg_transfer.tqdm(disable=True)
    make = lambda: seg_transfer.Finetuned(vit, lambda: Head(12, 2, 8))
    model = seg_transfer.train_model(make, images, random_masks(6, 8, 8, high=2), 0.01, CPU, FLOAT32, bar)
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    changed = [k for k, v in model.backbone.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) > len(before) - 3


def test_the_picture_has_a_column_for_each_mask_and_white_for_what_does_not_count():
    images, masks = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), random_masks(2, 8, 8, high=2)
    columns, attention = {"truth": masks, "prediction": masks}, torch.full((2, 4, 4), 1 / 16)
    picture = segmentation_picture(images, columns, attention, ["background", "cat"])
    assert picture[:4] == b"\x89PNG"


def test_real_photographs_with_masks(real_images):
    data = load_masks("folder", real_images / "ecssd", 64, "test")
    assert data.images.shape == (300, 3, 64, 64) and data.masks.unique().tolist() == [0, 1]
    assert 0.1 < data.masks.float().mean() < 0.4
