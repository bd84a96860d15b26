"""Linear probes and k-NN: scikit-learn's optimum, theory's accuracy; nothing leaks from the test set."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, launch, tiny
from eval_linear import extract
from test_run import refused
from twins.backbones import load_backbone
from twins.datasets import load
from twins.probes import balanced, evaluate_probes, fit, linear_probe, logits, nearest_neighbours, whitening
from twins.stats import wilson_interval
from vit import ViT

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def random_features():
    """Features of random weights and labels: training x {protocol: [n d]}, y, test x, y."""
    torch.manual_seed(0)
    vit, sets = ViT(32, 4, 48, 2, 2).eval(), []
    for split, n in (("train", 3000), ("test", 2000)):
        data = load("shapes", "", 32, split)
        sets += [extract(vit, data.images[:n], CPU, FLOAT32, split), data.labels[:n]]
    return sets


@pytest.mark.parametrize("protocol", ["linear", "linear_avg"])
def test_a_probe_is_no_worse_than_the_best_logistic_regression(random_features, protocol):
    """Random weights are the hardest: on their features 30 epochs of SGD ended far from the optimum."""
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, y, test, test_y = random_features
    train, test = train[protocol], test[protocol]
    held_out, rest = balanced(y, 0.1, 0)
    ours = linear_probe(train, y, held_out, rest, test, test_y, 10)["top1"]
    mean, std = train.mean(0), train.std(0)
    x, test_x = ((features - mean) / std for features in (train, test))
    theirs = []
    for c in (0.1, 1, 10, 100, 1000, 10_000):
        regression = sklearn.LogisticRegression(C=c, max_iter=150).fit(x.numpy(), y.numpy())
        theirs.append(regression.score(test_x.numpy(), test_y.numpy()))
    assert ours > max(theirs) - 0.005


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_optimum_is_scikit_learns(random_features, strength):
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, y, test, _ = random_features
    mean, matrix, scale = whitening(train["linear"])
    x, test_x = ((features["linear"] - mean) @ matrix for features in (train, test))
    ours = logits(test_x, fit(x, y, strength * scale, (torch.zeros(48, 10), torch.zeros(10)))).softmax(1)
    theirs = sklearn.LogisticRegression(C=1 / (len(x) * strength), tol=1e-6, max_iter=1000)
    x, test_x = (features / scale.T.sqrt() for features in (x, test_x))  # half-way whitened
    theirs = theirs.fit(x.numpy(), y.numpy()).predict_proba(test_x.numpy())
    assert (ours - torch.from_numpy(theirs)).abs().mean() < 2e-3


def test_whitened_features_have_unit_covariance():
    x = torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    mean, matrix, _ = whitening(x)
    white = (x - mean) @ matrix
    assert white.mean(0).abs().max() < 1e-3
    assert torch.linalg.eigvalsh(white.T @ white / 5000).max() <= 1 + 1e-3
    constant = torch.ones(100, 3)
    mean, matrix, scale = whitening(constant)
    assert ((constant - mean) @ matrix).isfinite().all() and scale.isfinite().all()


@pytest.mark.parametrize("hits, n", [(0, 10), (7, 10), (916, 1000), (50, 50)])
def test_the_interval_is_wilsons(hits, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits, n) == pytest.approx([theirs.low, theirs.high], abs=1e-4)


def planted(n, seed, distance=1.0):
    """Two classes of unit noise in 6 dimensions, means +- distance along one.

    The best accuracy there is: Phi(distance).
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    x = torch.randn(n, 6, generator=g)
    x[:, 2] += distance * (2 * y - 1)
    return {"linear": x}, y


def test_planted_features_give_theorys_accuracy():
    (train, y), (test, test_y) = planted(8000, 0), planted(20_000, 1)
    result = evaluate_probes(train, y, test, test_y, 2)
    theory = 0.5 * (1 + math.erf(1 / 2**0.5))
    assert result["linear"]["top1"] == pytest.approx(theory, abs=0.01)
    assert theory - 0.02 < result["knn"]["top1"] < theory + 0.01  # 200 neighbours are not quite Bayes
    low, high = result["linear"]["interval95"]
    assert low < result["linear"]["top1"] < high and high - low == pytest.approx(0.0101, abs=5e-4)
    assert result["linear"]["top5"] == 1


def test_permuted_labels_give_chance():
    (train, _), (test, _) = planted(4000, 0), planted(5000, 1)
    g = torch.Generator().manual_seed(2)
    y, test_y = (torch.randint(10, (n,), generator=g) for n in (4000, 5000))
    for result in evaluate_probes(train, y, test, test_y, 10).values():
        assert result["top1"] == pytest.approx(0.1, abs=0.015)
        assert result["top5"] == pytest.approx(0.5, abs=0.03)


def test_test_labels_select_nothing():
    (train, y), (test, test_y) = planted(1000, 0), planted(1000, 1)
    one, other = (evaluate_probes(train, y, test, labels, 2) for labels in (test_y, 1 - test_y))
    for name in ("linear", "knn"):
        assert one[name]["selected"] == other[name]["selected"]
        assert one[name]["grid"] == other[name]["grid"]
    assert one["linear"]["top1"] == pytest.approx(1 - other["linear"]["top1"], abs=1e-6)


def test_a_class_without_votes_is_no_hit():
    """300 neighbours of class 0 on one side, all other classes on the other side."""
    labels = torch.cat([torch.zeros(300, dtype=torch.long), torch.arange(1, 6).repeat(20)])
    x = torch.randn(400, 4) * 0.01 + torch.where(labels[:, None] == 0, 1.0, -1.0)
    held_out, rest = balanced(labels, 0.1, 0)
    queries = torch.ones(6, 4)
    result = nearest_neighbours(x, labels, held_out, rest, queries, torch.arange(6))
    assert result["top1"] == result["top5"] == pytest.approx(1 / 6)


def test_shares_are_class_balanced_and_seeded():
    labels = torch.arange(10).repeat(300)
    some, rest = balanced(labels, 0.01, 0)
    assert labels[some].bincount().tolist() == [3] * 10 and len(some) + len(rest) == 3000
    assert len(torch.cat([some, rest]).unique()) == 3000
    assert torch.equal(some, balanced(labels, 0.01, 0)[0])
    assert not torch.equal(some, balanced(labels, 0.01, 1)[0])
    assert balanced(labels, 1e-6, 0)[0].shape == (10,)  # one of each at least


class Registers(torch.nn.Module):
    """A backbone with [CLS] = 1, two registers = 100, four patches = 5."""

    num_prefix_tokens = 3

    def layers(self, x, last):
        tokens = torch.tensor([1.0, 100, 100, 5, 5, 5, 5])[None, :, None].expand(len(x), 7, 2)
        return [tokens] * last


def test_registers_are_no_patches():
    features = extract(Registers(), torch.zeros(3, 3, 8, 8, dtype=torch.uint8), CPU, FLOAT32, "")
    assert features["linear_avg"].tolist() == [[1, 1, 5, 5]] * 3
    assert features["linear4"].tolist() == [[1] * 8] * 3


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny run of hybrid_a.py, so fast that teacher and student differ."""
    out = tmp_path_factory.mktemp("run") / "a"
    options = tiny("hybrid_a.py", out_dir=out, base_lr=0.1, warmup_epochs=0)
    done = launch([str(ROOT / "hybrid_a.py"), *options], out.parent)
    assert done.returncode == 0, done.stderr
    return out


def report_of(command, ckpt, file, **options):
    """What eval_linear.py prints and its report."""
    done = command("eval_linear.py", ckpt=ckpt, label_fraction=0.1, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_a_run_and_its_export_give_one_result(command, run_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(run_folder.parent))
    said, run = report_of(command, "~/a/ckpt.pt", run_folder / "eval_linear.json")
    _, export = report_of(command, "~/a/export", run_folder / "export/eval_linear.json")
    student_file = run_folder.parent / "b/eval_linear.json"
    student_said, student = report_of(command, "~/a", student_file, weights="student", out_dir="~/b")
    again_said, again = report_of(command, "~/a", student_file, out_dir="~/b")
    before = student_file.with_name("eval_linear-previous.json")
    assert f"earlier results: {before}" in again_said and "earlier" not in student_said
    assert json.loads(before.read_text()) == student != again
    assert run["results"] == export["results"] != student["results"]
    assert list(run["results"]) == ["linear", "linear4", "linear_avg", "knn"]
    assert all(f"| {name} |" in said for name in run["results"])
    assert "(teacher) on shapes: 1200 training, 2000 test" in said and "(student)" in student_said
    assert run["dataset"] == "shapes" and run["checkpoint"]["step"] == 3 and len(run["sha256"]) == 64


def photographs(folder, classes):
    """A data set of tiny images: 20 training and 8 test images a class, and options that evaluate on it."""
    for name in classes:
        for i in range(28):
            file = folder / ("train" if i < 20 else "test") / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i, 9 * i, ord(name))).save(file)
    return dict(ckpt="random", dataset="folder", data_dir=folder, dim=8, depth=1, heads=1)


def test_ascii_output_loses_nothing(tmp_path):
    out = tmp_path / "café"
    options = [f"--{name}={value}" for name, value in photographs(tmp_path, "ab").items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval_linear.py"), *options, f"--out_dir={out}", "--device=cpu"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"(random weights) on folder: 40 training" in done.stdout and b"| knn |" in done.stdout
    assert json.loads((out / "eval_linear.json").read_text())["test_images"] == 16


@pytest.mark.parametrize("classes, warning", [("a", "a single class"), ("ab", "16 test images are too few")])
def test_tables_that_say_little_warn(command, tmp_path, classes, warning):
    done = command("eval_linear.py", **photographs(tmp_path, classes), out_dir=tmp_path)
    assert done.returncode == 0 and "warning: " in done.stdout and warning in done.stdout, done


def test_an_official_dino_checkpoint_loads(tmp_path):
    """As facebookresearch/dino writes them: the backbone, or both networks and a Namespace of arguments."""
    torch.manual_seed(0)
    vit = ViT(32, 8, 128, 2, 2)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    teacher = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    teacher["head.mlp.0.weight"] = torch.zeros(2, 2)
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    saved = {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit"), "epoch": 3}
    torch.save(saved, tmp_path / "full.pth")

    def loaded(name, network=""):
        config = {"ckpt": str(tmp_path / name), "weights": network, "heads": 0}
        return load_backbone(config, CPU, ViT)

    x = torch.randn(2, 3, 32, 32)
    for name in ("backbone.pth", "full.pth"):
        backbone, about = loaded(name)
        assert torch.equal(backbone(x), vit.eval()(x)) and about["image_size"] == 32
    assert loaded("full.pth", "student")[0].cls_token.abs().max() == 0


def test_wrong_input_is_one_sentence(command, run_folder, tmp_path):
    def run(**options):
        return command("eval_linear.py", **options)

    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused(run(), 1, "--ckpt is missing")
    refused(run(ckpt="absent.pt"), 1, "absent.pt does not exist")
    refused(run(ckpt=tmp_path / "foreign.pt"), 1, "foreign.pt holds no ViT")
    refused(run(ckpt=tmp_path / "text.pt"), 1, "text.pt is not a complete checkpoint")
    refused(run(ckpt=Path(tmp_path)), 1, str(tmp_path))
    refused(run(ckpt="random"), 1, "give --dataset")
    refused(run(ckpt=run_folder, weights="both"), 1, "student and teacher")
    refused(run(ckpt=run_folder, image_size=30), 1, "30", "28 or 32")
    refused(run(ckpt=run_folder, label_fraction=2), 1, "--label_fraction=2", "from 0 to 1")
    refused(run(ckpt=run_folder, datset="shapes"), 2, "did you mean --dataset?")
    refused(run(ckpt=run_folder, label_fraction=1e-9), 1, "10 labels of 10 classes are too few")
