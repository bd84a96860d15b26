"""Attention maps: every figure against a naive loop; the command on runs and on one's own images."""

import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from attn_viz import own_images, print_table, read_groups, warn_of_mixed_groups
from conftest import ROOT
from test_run import refused
from twins.attention import attend, attention_figures, divergence, divergences, jaccard, keep_mass
from twins.datasets import normalise
from twins.errors import UserError
from twins.options import Option, convert
from vit import ViT

CPU, FLOAT32 = torch.device("cpu"), torch.autocast("cpu", enabled=False)


@pytest.fixture
def random_maps():
    maps = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) ** 4
    return maps / maps.sum((2, 3), keepdim=True)


def test_maps_and_distance_are_the_attention_of_cls_and_of_patches():
    torch.manual_seed(0)
    vit, images = ViT(16, 4, 12, 2, 3).eval(), torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight *= 20  # far from uniform
        a = vit.attention(normalise(images.float() / 255), 0)
    maps, distance = attend(vit, images, CPU, FLOAT32, block=0)
    for i, h in itertools.product(range(2), range(3)):
        torch.testing.assert_close(maps[i, h].flatten(), a[i, h, 0, 1:] / a[i, h, 0, 1:].sum())
    far = 0.0
    for i, q in itertools.product(range(2), range(16)):
        weight = a[i, 1, 1 + q, 1:] / a[i, 1, 1 + q, 1:].sum()
        far += sum(weight[k].item() * 4 * math.dist(divmod(q, 4), divmod(k, 4)) for k in range(16)) / 32
    assert distance[1].item() == pytest.approx(far, rel=1e-4)
    assert maps.std() > 0.01


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_mask_keeps_the_fewest_patches_that_hold_the_mass(random_maps, share):
    kept = keep_mass(random_maps, share)
    for map_, mask in zip(random_maps.reshape(-1, 16).tolist(), kept.reshape(-1, 16).tolist(), strict=True):
        held, expected = 0.0, [False] * 16
        for k in sorted(range(16), key=lambda k: -map_[k]):
            if held >= share:
                break
            held, expected[k] = held + map_[k], True
        assert mask == expected


def test_divergence_is_its_definition_and_between_0_and_1_bit(random_maps):
    def kl(p, q):
        return sum(a * math.log2(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a)

    p, q = random_maps[0, 0].flatten(), random_maps[1, 0].flatten()
    naive = (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    assert divergence(p, q).item() == pytest.approx(naive, rel=1e-4)
    assert divergence(p, p) == 0
    assert divergence(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])) == 1


def test_jaccard_is_a_naive_loop_over_images_classes_heads_and_pixels():
    g = torch.Generator().manual_seed(1)
    kept, masks = (
        torch.rand(6, 3, 4, 4, generator=g) > 0.5,
        torch.randint(-1, 3, (6, 8, 8), generator=g).short(),
    )
    masks[0] = 0  # no object: does not count
    masks[1][masks[1] == 2] = 0
    best, images = 0.0, 0
    for i in range(1, 6):
        ious = []
        for c in {1, 2} & set(masks[i].flatten().tolist()):
            heads = []
            for h in range(3):
                both = either = 0
                for y, x in itertools.product(range(8), range(8)):
                    truth, guess = masks[i, y, x].item() == c, kept[i, h, y // 2, x // 2].item()
                    if masks[i, y, x] >= 0:
                        both, either = both + (truth and guess), either + (truth or guess)
                heads.append(both / either)
            ious.append(max(heads))
        best, images = best + sum(ious) / len(ious), images + 1
    assert jaccard(kept, masks)[0] == pytest.approx(best / images)


def test_jaccard_of_perfect_and_empty_masks():
    truth = torch.zeros(2, 8, 8, dtype=torch.int16)
    truth[:, :4, 4:] = 1
    kept = (truth > 0)[:, None, ::2, ::2]
    assert jaccard(kept, truth) == (1, [1])
    assert jaccard(torch.zeros_like(kept), truth) == (0, [0])
    assert jaccard(torch.cat([torch.zeros_like(kept), kept], 1), truth) == (1, [0, 1])
    with pytest.raises(UserError, match="no mask has an object"):
        jaccard(kept, torch.zeros_like(truth))


def test_figures_of_a_map_made_by_hand():
    maps, masks = torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int16)
    maps[0, 0] = torch.tensor([[1.0, 0], [0, 0]])
    maps[0, 1] = 0.25
    masks[0, :, :1] = 1  # the left half of the left patches
    masks[0, 2:, 2:] = -1  # one patch does not count
    figures = attention_figures(maps, torch.tensor([1.0, 2.0]), masks)
    assert figures["entropy_bits"] == [0, 2] and figures["entropy_uniform"] == 2
    assert figures["mass_in_mask"] == pytest.approx([0.5, 1 / 3])
    assert figures["area_of_mask"] == pytest.approx(1 / 3)
    assert figures["mass_over_area"] == pytest.approx([1.5, 1])  # uniform attention: 1
    assert figures["entropy_mean_map"] == pytest.approx(-0.625 * math.log2(0.625) - 0.375 * math.log2(0.125))
    diversity = divergence(maps[0, 0].flatten(), maps[0, 1].flatten()).item()
    assert figures["head_diversity_bits"] == pytest.approx(diversity)
    assert figures["jaccard_60"]["best_head"] == pytest.approx(2 / 6)  # patch of 4, mask of 4, 2 shared


def test_jaccard_is_not_told_where_attention_is_nearly_uniform(capsys):
    masks = torch.zeros(2, 8, 8, dtype=torch.int16)
    masks[:, :4] = 1
    flat, peaked = torch.full((2, 1, 4, 4), 1 / 16), torch.full((2, 1, 4, 4), 0.01)
    flat[:, :, 0, 0] += 0.001
    peaked[:, :, 0, 0] += 0.84
    report = []
    for name, maps in (("f", flat), ("p", peaked)):
        report.append({"group": name, **attention_figures(maps, torch.zeros(1), masks)})
    assert report[0]["jaccard_60"] is None and report[1]["jaccard_60"]["mean_map"] > 0
    print_table(report, ["f", "p"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| group | runs | mass / area |")
    assert rows[2].endswith("| - | - | - | - |") and "-" not in rows[3]


def test_maps_on_other_grids_are_compared_on_the_coarsest():
    fine = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse = fine.view(3, 4, 2, 4, 2).sum((2, 4))
    torch.testing.assert_close(
        divergences([fine / fine.sum((1, 2), keepdim=True), coarse]), torch.zeros(3, 2, 2), atol=1e-6, rtol=0
    )


def test_groups_of_checkpoints(tmp_path):
    assert read_groups("dino=a/ckpt.pt:b/ckpt.pt,barlow=c/ckpt.pt") == {
        "dino": ["a/ckpt.pt", "b/ckpt.pt"],
        "barlow": ["c/ckpt.pt"],
    }
    assert read_groups("out/dino-shapes/ckpt.pt,random") == {
        "dino-shapes": ["out/dino-shapes/ckpt.pt"],
        "random": ["random"],
    }
    (tmp_path / "lr=3").mkdir()
    (tmp_path / "lr=3" / "ckpt.pt").touch()
    assert read_groups(f"{tmp_path}/lr=3/ckpt.pt") == {"lr=3": [f"{tmp_path}/lr=3/ckpt.pt"]}
    many = [f"runs/dino-shapes-{i}/ckpt.pt" for i in range(99)]  # longer than a file's name can be
    assert read_groups(f"dino={':'.join(many)}") == {"dino": many}
    with pytest.raises(UserError, match="two groups called x"):
        read_groups("x/ckpt.pt,x/ckpt.pt")
    for wrong in (",", "a=b/ckpt.pt:", "random=b/ckpt.pt"):
        with pytest.raises(UserError, match="is neither a checkpoint nor name=A:B"):
            read_groups(wrong)


@pytest.mark.parametrize(
    "group, scripts, warned",
    [
        ("dino", ["dino", "dino"], False),
        ("dino", ["barlow"], True),
        ("mine", ["dino", "barlow"], True),
        ("mine", ["dino"], False),
        ("dino", [None], False),  # a file of weights does not say
    ],
)
def test_a_group_of_another_methods_runs_is_said(group, scripts, warned, capsys):
    known = [{"script": script} if script else {} for script in scripts]
    warn_of_mixed_groups([{"group": group, "checkpoint": about} for about in known])
    assert (f"the group {group} holds runs of" in capsys.readouterr().out) == warned


def test_the_command_compares_runs_of_other_widths_and_patches(train, command, tmp_path):
    for name, keys in {
        "a": dict(seed=0),
        "b": dict(seed=1),
        "c": dict(patch_size=8, dim=24, depth=1),
    }.items():
        train("barlow.py", out_dir=tmp_path / name, max_steps=1, **keys)
    done = command(
        "attn_viz.py",
        ckpt="one=a/ckpt.pt:b/export,two=c/ckpt.pt",
        n_images=20,
        rows=2,
        out_dir="out",
        blocks="all",
    )
    assert done.returncode == 0, done.stderr
    assert "between scripts" in done.stdout and "| random weights | 3 |" in done.stdout
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert report["group_of_run"] == [0, 0, 1, 2, 2, 2] and np.shape(report["divergence_bits"]) == (6, 6)
    assert report["runs"][2]["entropy_uniform"] == 4 and report["tests"][0]["smallest_p"] == 0.5
    assert "mass_over_area" in report["runs"][0]
    for picture in ("attention.png", "divergence.png"):
        assert min(Image.open(tmp_path / "out" / picture).size) > 300


def test_ones_own_images_less_a_broken_one(command, tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(2):
        photograph(tmp_path / "mine" / f"{i}.png", i)
    (tmp_path / "mine" / "2.jpg").write_bytes(b"no image")
    keys = dict(ckpt="random", images="mine", dim=12, depth=1, heads=2, out_dir="out")
    done = command("attn_viz.py", **keys)
    assert done.returncode == 0, done.stderr
    assert "2.jpg cannot be read" in done.stdout and "1 of 3 images left out" in done.stdout
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["images"] == 2
    refused(command("attn_viz.py", **keys | {"image_size": 34}), 1, "34", "32 or 36")
    refused(command("attn_viz.py", **keys | {"images": "nowhere"}), 1, "nowhere cannot be opened")
    refused(command("attn_viz.py", **keys | {"blocks": "some"}), 1, "last or all")
    refused(command("attn_viz.py", **keys | {"ckpt": "absent.pt"}), 1, "absent.pt does not exist")


def photograph(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)


def test_one_image_file(tmp_path):
    photograph(tmp_path / "a.png", 0)
    photograph(tmp_path / "b.png", 1)
    data = own_images(tmp_path / "a.png", 16)
    assert data.images.shape == (1, 3, 16, 16)
    assert torch.equal(data.images[0], own_images(tmp_path, 16).images[0])


def test_home_folders_ascii_terminals_and_notebooks(tmp_path):
    """`~` in every path, a terminal without ±, and a notebook's MPLBACKEND whose package is absent."""
    photograph(tmp_path / "mine.png", 0)
    words = ["--ckpt=random", "--images=~/mine.png", "--out_dir=~/out", "--dim=12", "--depth=1", "--heads=2"]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    words = [sys.executable, str(ROOT / "attn_viz.py"), *words, "--device=cpu"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "attention.json",
        "attention.png",
        "divergence.png",
    }
    assert not (tmp_path / "~").exists()


def test_a_home_folder_in_ckpt(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=3").mkdir()
    given = convert("ckpt", Option("", ""), "~/lr=3")
    assert read_groups(given) == {"lr=3": [str(tmp_path / "lr=3")]}
