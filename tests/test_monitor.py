"""The k-NN monitor, the collapse meters and their warning."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import SCRIPTS
from data import load, training_split
from dino import cosine
from twins.datasets import Split
from twins.monitor import collapse, correlation_meters, evaluate, features, knn
from vit import ViT


def test_knn_is_the_weighted_vote_done_by_hand():
    g = torch.Generator().manual_seed(0)
    bank, labels, queries = (
        torch.randn(60, 4, generator=g),
        torch.randint(5, (60,), generator=g),
        torch.randn(30, 4, generator=g),
    )
    for k in (1, 7, 100):
        by_hand = []
        for q in queries:
            cosines = sorted(
                (
                    (F.cosine_similarity(q, x, dim=0).item(), y.item())
                    for x, y in zip(bank, labels, strict=True)
                ),
                reverse=True,
            )
            votes = [0.0] * 5
            for c, y in cosines[:k]:
                votes[y] += math.exp(c / 0.07)
            by_hand.append(votes.index(max(votes)))
        assert knn(bank, labels, queries, k).argmax(1).tolist() == by_hand


def test_features_do_not_depend_on_the_chunk_and_leave_the_model_in_training():
    model = ViT(32, 4, 16, 2, 2, drop_path=0.5).train()
    images = load("shapes", "", 32).images[:7]
    autocast = torch.autocast("cpu", enabled=False)
    a, b = (features(model, images, torch.arange(7), torch.device("cpu"), autocast, n) for n in (3, 100))
    torch.testing.assert_close(a, b)
    assert a.shape == (7, 16) and not a.requires_grad and model.training


def test_held_out_images_are_no_training_images():
    data = load("shapes", "", 32)
    kept, bank, queries = training_split(data, 500, 100_000, 256)
    train, held = set(kept.tolist()), set(queries.tolist())
    assert len(train) == 10_800 and len(held) == 1_200 and not train & held
    assert len(bank) == 500 and set(bank.tolist()) <= train


def test_images_without_a_label_are_trained_on_and_never_asked_about():
    data = load("shapes", "", 32)
    labels = data.labels.where(torch.arange(12_000) < 1000, -1)
    kept, bank, queries = training_split(data._replace(labels=labels), 5000, 5000, 256)
    assert len(kept) == 11_900 and len(bank) == 900 and len(queries) == 100
    assert (
        (labels[bank] >= 0).all()
        and (labels[queries] >= 0).all()
        and not set(queries.tolist()) & {*kept.tolist(), *bank.tolist()}
    )


def test_feature_meters_know_a_collapse():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return self.z[: len(x)]

    model, images = Fixed(), torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    data, rows = Split(images, None, []), torch.arange(400)
    autocast = torch.autocast("cpu", enabled=False)

    def meters(z):
        model.z = z
        return {
            k: v.item()
            for k, v in evaluate(model, data, rows, rows[:0], torch.device("cpu"), autocast).items()
        }

    g = torch.Generator().manual_seed(0)
    healthy, point = meters(torch.randn(400, 16, generator=g)), meters(torch.ones(400, 16))
    line = meters(torch.randn(400, 1, generator=g) * torch.ones(16))
    assert (
        healthy["feature_std"] == pytest.approx(1, abs=0.05) and healthy["rank"] > 15 and "knn" not in healthy
    )
    assert point["feature_std"] < 1e-6 and point["rank"] < 1.1 and line["rank"] < 1.1


def test_correlation_meters():
    z = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    assert correlation_meters(z, z)["c_diag"].item() == pytest.approx(1, abs=1e-3)
    assert correlation_meters(z, z)["c_off"].item() < 0.05
    same = correlation_meters(z[:, :1].expand(-1, 8), z[:, :1].expand(-1, 8))
    assert same["c_off"].item() == pytest.approx(1, abs=1e-3)


def test_cosine_with_warmup():
    assert [cosine(1, 0, s, 4) for s in range(5)] == pytest.approx([1, 0.8536, 0.5, 0.1464, 0], abs=1e-4)
    assert [cosine(6, 0, s, 8, 4) for s in range(5)] == pytest.approx(
        [0, 2, 4, 6, 6]
    )  # np.linspace, as official


LN_K = math.log(1024)


@pytest.mark.parametrize(
    "row, words",
    [
        (dict(teacher_entropy=0.995 * LN_K), "uniform"),
        (dict(teacher_entropy=0.001), "one prototype"),
        (dict(teacher_entropy=5.0, ce=1.001 * LN_K), "stuck"),
        (dict(teacher_entropy=5.0, kl=0.5, teacher_information=0.002), "same for all images"),
        (dict(teacher_entropy=5.0, kl=0.002, teacher_information=1.0), ""),
        (dict(feature_std=0.001), "same features"),
        (dict(teacher_entropy=5.0, ce=1.001 * LN_K, epoch=0.5), ""),
        (dict(teacher_entropy=5.0, ce=6.0, kl=1.0, feature_std=0.5), ""),
        (dict(), ""),
    ],
)
def test_collapse_is_told_in_a_sentence(row, words):
    config = dict(out_dim=1024, log_every=10, warmup_epochs=1.0)
    rows = [dict(loss=1.0, epoch=0.9, teacher_entropy=3.0, ce=4.0), *[dict(loss=1.0, epoch=2.0) | row] * 4]
    assert words in collapse(rows, 1000, config) and bool(words) == bool(collapse(rows, 1000, config))
    assert (
        collapse([dict(loss=1.0, feature_std=0.5), dict(loss=1.0) | row][:1], 1000, config) == ""
    )  # one row is no trend


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_evaluation_row_has_its_meters(train, script):
    g = train(script, eval_every=2)
    rows = [json.loads(line) for line in (Path(g["out_dir"]) / "log.jsonl").read_text().splitlines()]
    meters = {"knn", "knn_init", "feature_std", "rank"}
    learned = {"step", "epoch", "loss", "lr", "images_per_s", "c_diag", "c_off"}
    learned |= {"cc"} if script != "dino.py" else set()
    learned |= {"ce", "teacher_entropy", "kl", "teacher_information"} if script != "barlow.py" else set()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert meters <= rows[0].keys() and rows[0]["knn"] == rows[0]["knn_init"]
    assert all(meters | learned <= rows[i].keys() for i in (2, 3)) and learned <= rows[1].keys()
