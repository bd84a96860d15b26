"""Linear probes and k-NN: the batched grid is each probe alone, sklearn's optimum, theory's accuracy; nothing leaks."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

import eval_linear
from data import batch_indices, load
from eval_linear import SETTINGS, accuracy, balanced, evaluate, train_probes
from test_run import refused
from twins.monitor import features
from vit import ViT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes():
    """Standardised features of random weights: training x, y, test x, y."""
    torch.manual_seed(0)
    vit, out = ViT(32, 4, 48, 2, 2), []
    for split, n in (("train", 3000), ("test", 2000)):
        data = load("shapes", "", 32, split)
        out += [features(vit, data.images, torch.arange(n), CPU, torch.autocast("cpu", enabled=False)), data.labels[:n]]
    mean, std = out[0].mean(0), out[0].std(0)
    return (out[0] - mean) / std, out[1], (out[2] - mean) / std, out[3]


def fit(x, y, settings, steps=60, size=200):
    def batches(step):
        some = batch_indices(len(x), size, 0, step)
        return {"linear": x[some]}, y[some]

    return train_probes(batches, steps, {"linear": x.shape[1]}, 10, settings, CPU)["linear"]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_batched_grid_is_each_probe_alone(shapes, float64):
    """In float64: of float32's rounding the largest learning rate makes differences of a hundredth."""
    x, y, test, test_y = (t.double() if t.is_floating_point() else t for t in shapes)
    w, bias = fit(x, y, SETTINGS)
    together = accuracy(test, test_y, (w, bias))
    for i, setting in enumerate(SETTINGS):
        alone = fit(x, y, [setting])
        torch.testing.assert_close(alone[0][:, 0], w[:, i])
        assert accuracy(test, test_y, alone)[0] == pytest.approx(together[i], abs=1e-3)
    assert len(set(together)) > 4


def test_the_gradient_by_hand_is_autograds(shapes):
    x, y, *_ = shapes
    w, bias = fit(x[:100], y[:100], [(0.5, 0.01)], steps=2, size=100)
    layer = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD([{"params": layer.weight, "weight_decay": 0.01}, {"params": layer.bias}], lr=0.5, momentum=0.9)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[:100]), y[:100]).backward()
        optimizer.step()
    torch.testing.assert_close(w[:, 0].T, layer.weight.data)
    torch.testing.assert_close(bias[0], layer.bias.data)


@pytest.mark.parametrize("wd", [1e-3, 1e-2])
def test_sklearn_finds_the_same(shapes, wd):
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed (.ci/run installs it)")
    x, y, test, test_y = shapes
    theirs = sklearn.LogisticRegression(C=1 / (len(x) * wd), max_iter=5000).fit(x.numpy(), y.numpy())
    ours = fit(x, y, [(1.0, wd)], steps=3000, size=1000)  # until it has converged
    assert accuracy(test, test_y, ours)[0] == pytest.approx(theirs.score(test.numpy(), test_y.numpy()), abs=0.005)


def planted(n, seed, distance=1.0):
    """Two classes of unit noise in 6 dimensions, means +- distance along one: Phi(distance) is the best accuracy there is."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    x = torch.randn(n, 6, generator=g)
    x[:, 2] += distance * (2 * y - 1)
    return {"linear": x}, y


def test_planted_features_give_theorys_accuracy():
    (train, y), (test, test_y) = planted(8000, 0), planted(20_000, 1)
    result = evaluate(train, y, test, test_y, 2, CPU)
    theory = 0.5 * (1 + math.erf(1 / 2**0.5))
    assert result["linear"]["top1"] == pytest.approx(theory, abs=0.01)
    assert theory - 0.02 < result["knn"]["top1"] < theory + 0.01  # 200 neighbours are not quite Bayes
    assert result["linear"]["interval95"] == pytest.approx(1.96 * (theory * (1 - theory) / 20_000) ** 0.5, rel=0.05)
    assert result["linear"]["top5"] == 1


def test_permuted_labels_give_chance():
    (train, _), (test, _) = planted(4000, 0), planted(5000, 1)
    g = torch.Generator().manual_seed(2)
    result = evaluate(train, torch.randint(10, (4000,), generator=g), test, torch.randint(10, (5000,), generator=g), 10, CPU)
    for r in result.values():
        assert r["top1"] == pytest.approx(0.1, abs=0.015) and r["top5"] == pytest.approx(0.5, abs=0.03)


def test_test_labels_select_nothing():
    (train, y), (test, test_y) = planted(1000, 0), planted(1000, 1)
    one, other = (evaluate(train, y, test, labels, 2, CPU) for labels in (test_y, 1 - test_y))
    for name in ("linear", "knn"):
        assert (one[name]["selected"], one[name]["grid"]) == (other[name]["selected"], other[name]["grid"])
    assert one["linear"]["top1"] == pytest.approx(1 - other["linear"]["top1"], abs=1e-6)


def test_shares_are_class_balanced_and_seeded():
    labels = torch.arange(10).repeat(300)
    some, rest = balanced(labels, 0.01, 0)
    assert labels[some].bincount().tolist() == [3] * 10 and len(some) + len(rest) == 3000
    assert len(torch.cat([some, rest]).unique()) == 3000
    assert torch.equal(some, balanced(labels, 0.01, 0)[0]) and not torch.equal(some, balanced(labels, 0.01, 1)[0])
    assert balanced(labels, 1e-6, 0)[0].shape == (10,)  # one of each at least


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny run of hybrid_a.py."""
    import subprocess
    import sys

    from conftest import ROOT, tiny

    out = tmp_path_factory.mktemp("run") / "a"
    keys = tiny("hybrid_a.py", out_dir=out, base_lr=0.1, warmup_epochs=0)  # so fast that teacher and student differ
    subprocess.run([sys.executable, str(ROOT / "hybrid_a.py"), *keys], check=True, capture_output=True)
    return out


def evaluated(command, ckpt, **keys):
    result = command("eval_linear.py", ckpt=ckpt, **keys)
    assert result.returncode == 0, result
    return result.stdout


def test_a_checkpoint_and_its_export_give_one_result(command, run_folder):
    said = evaluated(command, run_folder / "ckpt.pt", epochs=2, label_fraction=0.1)
    evaluated(command, run_folder / "export", epochs=2, label_fraction=0.1)
    evaluated(command, run_folder / "ckpt.pt", epochs=2, label_fraction=0.1, weights="student", out_dir=run_folder / "student")
    run, export, student = (json.loads((run_folder / f / "eval_linear.json").read_text()) for f in (".", "export", "student"))
    assert run["results"] == export["results"] != student["results"]
    assert run["results"].keys() == {"linear", "linear4", "linear_avg", "knn"} and all(f"| {name} |" in said for name in run["results"])
    assert run["dataset"] == "shapes" and run["checkpoint"]["step"] == 3 and len(run["sha256"]) == 64 and "1200 training, 2000 test" in said


def test_augmented_features_train_a_probe(command, run_folder, tmp_path):
    keys = dict(epochs=1, label_fraction=0.05, batch_size=64, augment=True, out_dir=tmp_path)
    assert "| linear augmented |" in evaluated(command, run_folder / "ckpt.pt", **keys)


def test_an_official_dino_checkpoint_loads(tmp_path):
    """As facebookresearch/dino writes them: the backbone alone, or student, teacher and a Namespace of arguments."""
    torch.manual_seed(0)
    vit = ViT(32, 8, 128, 2, 2)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    teacher = {f"backbone.{k}": v for k, v in vit.state_dict().items()} | {"head.mlp.0.weight": torch.zeros(2, 2)}
    student = {f"module.{k}": torch.zeros_like(v) for k, v in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit"), "epoch": 3}, tmp_path / "full.pth")
    x = torch.randn(2, 3, 32, 32)
    for name in ("backbone.pth", "full.pth"):
        loaded, about = eval_linear.load_backbone({"ckpt": str(tmp_path / name), "weights": "", "heads": 0}, CPU, ViT)
        assert torch.equal(loaded(x), vit.eval()(x)) and about["image_size"] == 32
    loaded, _ = eval_linear.load_backbone({"ckpt": str(tmp_path / "full.pth"), "weights": "student", "heads": 0}, CPU, ViT)
    assert loaded.cls_token.abs().max() == 0


def test_wrong_input_is_one_sentence(command, run_folder, tmp_path):
    def run(**keys):
        return command("eval_linear.py", **keys)

    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "photos/train/a").mkdir(parents=True)
    refused(run(), 1, "--ckpt is missing")
    refused(run(ckpt="absent.pt"), 1, "absent.pt does not exist")
    refused(run(ckpt=tmp_path / "foreign.pt"), 1, "foreign.pt holds no ViT")
    refused(run(ckpt=tmp_path / "text.pt"), 1, "text.pt is not a complete checkpoint")
    refused(run(ckpt=Path(tmp_path)), 1, "config.json cannot be read")
    refused(run(ckpt="random"), 1, "give --dataset")
    refused(run(ckpt=run_folder / "ckpt.pt", weights="both"), 1, "teacher or student")
    refused(run(ckpt=run_folder / "ckpt.pt", image_size=30), 1, "30", "28 or 32")
    refused(run(ckpt=run_folder / "ckpt.pt", label_fraction=2), 1, "--label_fraction=2.0", "from 0 to 1")
    refused(run(ckpt=run_folder / "ckpt.pt", datset="shapes"), 2, "did you mean --dataset?")
