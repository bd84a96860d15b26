"""Attention maps: every figure against a naive loop; the test of a difference keeps its level and finds what is planted."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import attn_viz
from attn_viz import describe, divergences, permutation_test, read_groups, sentence
from test_run import refused
from twins.attention import attend, divergence, jaccard, keep_mass
from twins.datasets import normalise
from twins.errors import UserError
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
    kept, masks = torch.rand(6, 3, 4, 4, generator=g) > 0.5, torch.randint(-1, 3, (6, 8, 8), generator=g).short()
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
    figures = describe(maps, torch.tensor([1.0, 2.0]), masks)
    assert figures["entropy_bits"] == [0, 2] and figures["entropy_uniform"] == 2
    assert figures["mass_in_mask"] == pytest.approx([0.5, 1 / 3]) and figures["area_of_mask"] == pytest.approx(1 / 3)
    assert figures["head_diversity_bits"] == pytest.approx(divergence(maps[0, 0].flatten(), maps[0, 1].flatten()).item())
    assert figures["jaccard_60"]["best_head"] == pytest.approx(1 / 3)  # the patch of 4 pixels, 2 of the mask's 4: 2 / 6


def planted(runs, images, shift, seed, shared=0.0):
    """Maps of `runs` runs that differ by seed, the second half of them also by `shift`: a list of [n 4 4].

    `shared`: the part of what a seed does that run i of the first half has in common with run i of the second.
    """
    g = torch.Generator().manual_seed(seed)
    image, run = torch.randn(1, images, 16, generator=g), torch.randn(runs, 1, 16, generator=g)
    common = torch.randn(runs // 2, 1, 16, generator=g).repeat(2, 1, 1)
    run = shared**0.5 * common + (1 - shared) ** 0.5 * run
    other = torch.zeros(runs, 1, 16)
    other[runs // 2 :, :, :8] = shift
    logits = image + run + other + 0.3 * torch.randn(runs, images, 16, generator=g)
    return list(logits.softmax(-1).view(runs, images, 4, 4))


HALVES = {n: torch.arange(2 * n) // n for n in (3, 5, 7)}


def rejects(maps, seeds):
    return permutation_test(divergences(maps), HALVES[len(maps) // 2], seeds, 300, seed=0)["p"] <= 0.05


def test_the_test_rejects_five_percent_of_splits_of_the_same_script():
    rng = np.random.default_rng(0)
    rejected = sum(rejects([m[i] for i in rng.permutation(10)], torch.arange(10)) for m in (planted(10, 20, 0.0, i) for i in range(300)))
    assert 0.02 <= rejected / 300 <= 0.08  # 6 of 126 ways are 4.8 %; two standard deviations are 2.5 %


def test_paired_by_seed_it_rejects_five_percent_too():
    seeds = torch.arange(14) % 7
    rejected = sum(rejects(planted(14, 20, 0.0, i, shared=0.9), seeds) for i in range(300))
    assert 0.02 <= rejected / 300 <= 0.08  # 3 of 64 ways are 4.7 %


def test_a_group_counts_once_however_many_runs_it_has():
    d, groups = torch.zeros(5, 5), torch.tensor([0, 0, 0, 1, 1])
    d[:3, :3], d[3:, 3:], d[:3, 3:] = 0.2, 0.4, 0.5  # 3 pairs, 1 pair, 6 pairs
    between, within = attn_viz.between_within(d, groups, torch.arange(5))
    assert between.item() == pytest.approx(0.5) and within.item() == pytest.approx(0.3)


def test_the_test_finds_a_planted_difference():
    assert sum(rejects(planted(10, 20, 3.0, i), torch.arange(10)) for i in range(20)) == 20
    assert sum(rejects(planted(14, 20, 3.0, i, shared=0.9), torch.arange(14) % 7) for i in range(20)) == 20


@pytest.mark.parametrize("seeds, smallest", [(range(6), 0.1), ((0, 1, 2, 0, 1, 2), 0.25), ((0, 1, 2, 0, 1, 3), 0.1)])
def test_effect_interval_and_smallest_p(seeds, smallest):
    maps, groups, seeds = planted(6, 200, 2.0, seed=0), HALVES[3], torch.tensor(seeds)
    d = divergences(maps)
    test = permutation_test(d, groups, seeds, 2000, seed=0)
    pairs = [(a, b) for a, b in itertools.combinations(range(6), 2) if seeds[a] != seeds[b]]
    within = np.mean([d[:, a, b].mean() for a, b in pairs if groups[a] == groups[b]])
    between = np.mean([d[:, a, b].mean() for a, b in pairs if groups[a] != groups[b]])
    assert test["between"] == pytest.approx(between, rel=1e-4) and test["within"] == pytest.approx(within, rel=1e-4)
    assert test["effect"] == pytest.approx(between - within, rel=1e-3)
    each = [d[i, 0, 4] - d[i, 0, 1] for i in range(200)]  # of about the spread of one image's effect, which is smaller
    low, high = test["interval95"]
    assert low < test["effect"] < high and high - low < 4 * np.std(each) / 200**0.5
    assert test["smallest_p"] == pytest.approx(smallest)  # 6! / (3! 3!) / 2 ways; paired 2^3 / 2
    assert test["p"] == pytest.approx(smallest, abs=0.04) and test["paired"] == (smallest == 0.25)
    assert "No difference" in sentence(test, ["a", "b"]) and "train more seeds" in sentence(test, ["a", "b"])
    assert "differ by more than seeds do" in sentence(test | {"p": 0.01}, ["a", "b"])


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_one_run_each_is_a_divergence_and_no_answer(seeds):
    d = divergences(planted(2, 20, 2.0, seed=0))
    alone = permutation_test(d, torch.tensor([0, 1]), torch.tensor(seeds), 100, seed=0)
    assert alone == {"between": pytest.approx(d[:, 0, 1].mean().item())} and "cannot be said" in sentence(alone, ["a", "b"])


def test_maps_on_other_grids_are_compared_on_the_coarsest():
    fine = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse = fine.view(3, 4, 2, 4, 2).sum((2, 4))
    torch.testing.assert_close(divergences([fine / fine.sum((1, 2), keepdim=True), coarse]), torch.zeros(3, 2, 2), atol=1e-6, rtol=0)


def test_groups_of_checkpoints(tmp_path):
    assert read_groups("dino=a/ckpt.pt:b/ckpt.pt,barlow=c/ckpt.pt") == {"dino": ["a/ckpt.pt", "b/ckpt.pt"], "barlow": ["c/ckpt.pt"]}
    assert read_groups("out/dino-shapes/ckpt.pt,random") == {"dino-shapes": ["out/dino-shapes/ckpt.pt"], "random": ["random"]}
    (tmp_path / "lr=3").mkdir()
    (tmp_path / "lr=3" / "ckpt.pt").touch()
    assert read_groups(f"{tmp_path}/lr=3/ckpt.pt") == {"lr=3": [f"{tmp_path}/lr=3/ckpt.pt"]}
    with pytest.raises(UserError, match="two groups called x"):
        read_groups("x/ckpt.pt,x/ckpt.pt")
    for wrong in (",", "a=b/ckpt.pt:", "random=b/ckpt.pt"):
        with pytest.raises(UserError, match="is no checkpoint, nor name=A:B"):
            read_groups(wrong)


def test_the_command_compares_runs_of_other_widths_and_patches(train, command, tmp_path):
    for name, keys in {"a": dict(seed=0), "b": dict(seed=1), "c": dict(patch_size=8, dim=24, depth=1)}.items():
        train("barlow.py", out_dir=tmp_path / name, max_steps=1, **keys)
    done = command("attn_viz.py", ckpt="one=a/ckpt.pt:b/export,two=c/ckpt.pt", n_images=20, rows=2, out_dir="out", blocks="all")
    assert done.returncode == 0, done.stderr
    assert "between scripts" in done.stdout and "| random | 3 |" in done.stdout
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert report["group_of_run"] == [0, 0, 1, 2, 2, 2] and np.shape(report["divergence_bits"]) == (6, 6)
    assert report["runs"][2]["entropy_uniform"] == 4 and report["tests"][0]["smallest_p"] == pytest.approx(1 / 3)
    for picture in ("attention.png", "divergence.png"):
        assert min(Image.open(tmp_path / "out" / picture).size) > 300


def test_ones_own_images_less_a_broken_one(command, tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "mine" / f"{i}.png")
    (tmp_path / "mine" / "2.jpg").write_bytes(b"no image")
    keys = dict(ckpt="random", images="mine", dim=12, depth=1, heads=2, out_dir="out")
    done = command("attn_viz.py", **keys)
    assert done.returncode == 0, done.stderr
    assert "2.jpg cannot be read" in done.stdout and "1 of 3 images left out" in done.stdout
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["images"] == 2
    refused(command("attn_viz.py", **keys | {"image_size": 34}), 1, "34", "32 or 36")
    refused(command("attn_viz.py", **keys | {"images": "nowhere"}), 1, "nowhere is no folder")
    refused(command("attn_viz.py", **keys | {"blocks": "some"}), 1, "last or all")
    refused(command("attn_viz.py", **keys | {"ckpt": "absent.pt"}), 1, "absent.pt does not exist")
