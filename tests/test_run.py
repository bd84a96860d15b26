"""A run as its user has it: files, resuming, signals, broken disks, a clear sentence for every mistake."""

import json
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
from safetensors.torch import load_file

import data
from conftest import ROOT, SCRIPTS, tiny
from twins import datasets, decoding, files
from twins.checkpoints import read_checkpoint
from twins.decoding import decode
from twins.errors import UserError
from twins.files import write_file
from twins.log import read_log
from vit import ViT


def rows_of(g):
    return [json.loads(line) for line in (Path(g["out_dir"]) / "log.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in rows]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_what_it_promises(train, script, capsys):
    g = train(script, pictures=True)
    out, bare = Path(g["out_dir"]), script.removesuffix(".py")
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "ckpt.pt",
        "crops.png",
        "curves.png",
        "export",
        "script.py",
    }
    config = json.loads((out / "config.json").read_text())
    assert (
        config["script"] == bare
        and config["dim"] == 16
        and config["base_lr"] == 2e-3
        and config["versions"]["torch"]
    )
    for name, columns in (("crops.png", 4), ("curves.png", 6)):
        assert Image.open(out / name).width > 100 * columns
    exported = json.loads((out / "export" / "config.json").read_text())["model_args"]
    vit = ViT(
        exported["img_size"],
        exported["patch_size"],
        exported["embed_dim"],
        exported["depth"],
        exported["num_heads"],
    )
    vit.load_state_dict(load_file(out / "export" / "model.safetensors"))
    backbone = g["eval_backbone"].eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.eval()(x), backbone(x))
    said = capsys.readouterr().out
    assert (
        "defaults for this preset: " in said
        and f"| {bare} on shapes |" in said
        and "| knn |" in said
        and "| seed | 0 |" in said
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_is_uninterrupted(train, script, tmp_path, monkeypatch):
    """Stopped after 3 of 6 steps, at an epoch's end, and resumed: the same rows, the same weights, to the
    bit.
    """
    few = datasets.shapes("train")
    few = few._replace(images=few.images[:60], labels=few.labels[:60], masks=None)
    monkeypatch.setattr(datasets, "shapes", lambda split: few)
    keys = dict(max_steps=6, drop_path=0.5)
    whole = train(script, **keys)

    def stop(g):
        if g["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        train(script, stop, out_dir=tmp_path / "halves", **keys)
    assert end.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "halves" / "ckpt.pt")["step"] == 3
    with open(tmp_path / "halves" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')  # what a kill -9 leaves behind
    halves = train(script, out_dir=tmp_path / "halves", resume=True, **keys)
    assert without_time(rows_of(halves)) == without_time(rows_of(whole))
    for name in whole["state"]:
        one, other = (g["state"][name] for g in (whole, halves))
        if not isinstance(one, torch.nn.Module | torch.Tensor):
            continue  # the optimizer is compared by what it did; the data's fingerprint is a text
        one, other = ([x] if isinstance(x, torch.Tensor) else list(x.parameters()) for x in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resuming_a_finished_run_changes_nothing(train, tmp_path, capsys):
    first = train("dino.py", out_dir=tmp_path / "done")
    again = train("dino.py", out_dir=tmp_path / "done", resume=True)
    assert rows_of(again) == rows_of(first) and "| knn |" in capsys.readouterr().out.split("resumed")[1]
    longer = train("dino.py", out_dir=tmp_path / "done", resume=True, max_steps=5)
    assert [row["step"] for row in rows_of(longer)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "run"
    words = [sys.executable, str(ROOT / "hybrid_a.py"), *tiny("hybrid_a.py", max_steps=100_000, out_dir=out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while not (out / "log.jsonl").exists() or '"step": 5' not in (out / "log.jsonl").read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    step = read_checkpoint(out / "ckpt.pt")["step"]
    assert f"stopped at step {step} and saved; continue with: python" in said and "--resume=True" in said
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] <= step


def test_a_nan_stops_the_run_and_saves_nothing(train, tmp_path):
    def poison(g):
        if g["step"] == 2:
            g["student"].backbone.cls_token.data.fill_(float("nan"))

    with pytest.raises(
        UserError,
        match=r"student.backbone.cls_token is not finite at step 2, learning rate .*, ckpt.pt is sound",
    ):
        train("hybrid_a.py", poison, max_steps=9, save_every=2, out_dir=tmp_path / "nan")
    saved = read_checkpoint(tmp_path / "nan" / "ckpt.pt")
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["student"].values())


def test_a_full_disk_leaves_the_old_checkpoint_whole(train, tmp_path, monkeypatch, capsys):
    def fill(g):
        if g["step"] == 2:
            monkeypatch.setattr(files.os, "fsync", full)

    def full(fd):
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"ended at step 9 but its last save failed: .*No space left on device"
    ):
        train("barlow.py", fill, max_steps=9, save_every=2, out_dir=tmp_path / "full")
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning at step") == 4  # at every save
    assert not list((tmp_path / "full").rglob("*.part"))
    assert read_checkpoint(tmp_path / "full" / "ckpt.pt")["step"] == 2


# one process each: exit code, one sentence, no traceback, nothing written


def refused(result, code, *words):
    assert result.returncode == code, result
    said = result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr and "error: " in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "key, code, words",
    [
        ("--alhpa=3", 2, ["--alhpa=3", "did you mean --alpha?"]),
        ("--zzz", 2, ["--zzz", "--help lists the options"]),
        ("--batch_size=many", 1, ["--batch_size=many", "a whole number"]),
        ("--centering=perhaps", 1, ["centering", "True or False"]),
        ("--global_scale=1", 1, ["global_scale", "2 numbers in ascending order"]),
        ("--global_scale=0.9,0.4", 1, ["global_scale", "2 numbers in ascending order"]),
        ("--depth=0", 1, ["--depth=0", "from 1 to"]),
        ("--batch_size=1", 1, ["--batch_size=1", "from 2"]),
        ("--base_lr=nan", 1, ["--base_lr=nan", "finite"]),
        ("--seed=-1", 1, ["--seed=-1", "from 0"]),
        ("--tau_t=0", 1, ["--tau_t=0", "from 1e-06"]),
        ("--image_size=30", 1, ["30", "patch_size=4", "28 or 32"]),
        ("--local_size=14", 1, ["14", "patch_size=4", "12 or 16"]),
        ("--heads=3", 1, ["dim=16", "heads=3"]),
        ("--batch_size=20000", 1, ["--batch_size=20000", "10800 images"]),
        ("--dataset=cifar11", 1, ["cifar11", "shapes, cifar10, cifar100, imagenet32, stl10, folder"]),
        ("--device=tpu", 1, ["--device=tpu", "--device=cpu"]),
        ("--dtype=float8", 1, ["--dtype=float8", "bfloat16"]),
        ("--logger=paper", 1, ["--logger=paper", "tensorboard or wandb or trackio"]),
        ("--head=three", 1, ["--head=three", "shared or two"]),
        ("--resume=True", 1, ["holds no run to resume"]),
    ],
)
def test_a_wrong_key_is_one_sentence(command, tmp_path, key, code, words):
    refused(command("hybrid_a.py", key), code, *words)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_help_has_the_docstring_and_every_key(command):
    said = command("hybrid_b.py", "--help").stdout
    assert "Hybrid B: Barlow Twins" in said
    assert "--tau_s=0.1" in said and "momentum of the teacher at the start" in said and "from 0 to 1" in said
    said = command("hybrid_b.py", "--help", dataset="shapes").stdout
    assert "--ema=0.8 " in said and "--max_steps=300 " in said  # in force for this data set


def folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts/train/a").mkdir(parents=True)
    (tmp_path / "texts/train/a/readme.txt").write_text("no image")
    for name in ("cut", "few"):
        for c in "ab":
            (tmp_path / name / "train" / c).mkdir(parents=True)
            for i in range(4):
                noise = np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / name / "train" / c / f"{i}.jpg")
    whole = tmp_path / "cut/train/b/2.jpg"
    whole.write_bytes(whole.read_bytes()[:700])


@pytest.mark.parametrize(
    "folder, words",
    [
        ("absent", ["absent", "not a folder"]),
        ("empty", ["empty holds nothing"]),
        ("texts", ["no file with an image's suffix"]),
        ("cut", ["b/2.jpg cannot be read"]),
        ("few", ["--batch_size=16", "8 images"]),
    ],
)
def test_a_wrong_folder_is_one_sentence(command, tmp_path, folder, words):
    folders(tmp_path)
    refused(command("dino.py", dataset="folder", data_dir=tmp_path / folder), 1, *words)
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out").exists()


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    folders(tmp_path)
    first = data.load("folder", tmp_path / "few", 16)
    assert (
        first.images.shape == (8, 3, 16, 16)
        and first.labels.tolist() == [0] * 4 + [1] * 4
        and first.classes == ["a", "b"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(decoding.subprocess, "Popen", None)
        assert torch.equal(data.load("folder", tmp_path / "few", 16).images, first.images)
    (tmp_path / "few/train/a/0.jpg").unlink()
    assert len(data.load("folder", tmp_path / "few", 16).images) == 7
    flat = data.load("folder", tmp_path / "few/train/a", 16)
    assert flat.labels is None and len(flat.images) == 3


def test_a_broken_cache_is_made_anew_and_classes_are_the_trained_ones(tmp_path):
    folders(tmp_path)
    few = tmp_path / "few"
    first = data.load("folder", few, 16).images.clone()
    cache = next((few / ".cache").glob("*.npy"))
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(data.load("folder", few, 16).images, first)
    (few / "train" / "0-empty").mkdir()  # a folder without images is no class, in neither split
    (few / "test").mkdir()
    (few / "test" / "b").symlink_to(few / "train" / "b")
    train, test = (data.load("folder", few, 16, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["a", "b"] and test.labels.tolist() == [1] * 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert abs(int(decode(tmp_path / "ramp.png", 16).mean()) - 127) < 2


def test_a_flat_folder_trains_without_labels(train, tmp_path):
    folders(tmp_path)
    g = train(
        "hybrid_a.py", dataset="folder", data_dir=tmp_path / "few/train/a", batch_size=2, warmup_epochs=0.0
    )
    assert "knn" not in rows_of(g)[-1] and rows_of(g)[-1]["rank"] > 0


def test_no_network_says_where_to_put_the_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no route to host")))
    with pytest.raises(
        UserError, match=r"cifar-10-batches-py .*no route to host.*cifar-10-python.tar.gz.*--dataset=shapes"
    ):
        data.load("cifar10", tmp_path, 32)


def test_a_run_is_never_overwritten(command, train, tmp_path):
    out = Path(train("dino.py")["out_dir"])
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    refused(command("dino.py", out_dir=out), 1, "already holds a run", "--resume=True", "--out_dir")
    refused(command("barlow.py", out_dir=out, resume=True), 1, "dino.py", "not of barlow.py")
    refused(
        command("dino.py", out_dir=out, resume=True, dim=32),
        1,
        "does not fit: its run had other values of dim",
    )
    refused(command("dino.py", out_dir=out, resume=True, seed=7), 1, "is a run with --seed=0")
    checkpoint = out / "ckpt.pt"
    whole, weights = checkpoint.read_bytes(), read_checkpoint(checkpoint)["student"]["head.last.weight"]
    for broken in (b"no checkpoint", b"", whole[:5000]):
        checkpoint.write_bytes(broken)
        refused(command("dino.py", out_dir=out, resume=True), 1, "not a complete checkpoint")
    (out / "ckpt-previous.pt").write_bytes(b"")
    both = ("ckpt.pt is not a complete", "ckpt-previous.pt is not a complete", "export may be sound")
    refused(command("dino.py", out_dir=out, resume=True), 1, *both)
    (out / "ckpt-previous.pt").unlink()
    flipped = bytearray(whole)
    flipped[whole.find(weights.numpy().tobytes()) + 5] ^= 1
    checkpoint.write_bytes(flipped)
    refused(command("dino.py", out_dir=out, resume=True), 1, "damaged")
    checkpoint.write_bytes(whole)
    torch.save({"state_dict": {}}, checkpoint)
    refused(command("dino.py", out_dir=out, resume=True), 1, "not a checkpoint of a training script")
    checkpoint.write_bytes(whole)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_folder_that_another_run_or_program_filled_meanwhile_is_refused(start_run, tmp_path):
    layer, out = torch.nn.Linear(2, 2), tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["ViTModel"]}')  # of Hugging Face
    with pytest.raises(UserError, match=r"config.json is not a run's, and would be overwritten"):
        start_run({"student": layer}, layer, out_dir=str(out))
    (out / "config.json").unlink()
    (out / "log.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"log.jsonl is not a run's"):
        start_run({"student": layer}, layer, out_dir=str(out))
    (out / "config.json").write_text('{"script": "dino", "step": 3, "sha256": "0"}')  # of an export
    with pytest.raises(UserError, match=r"config.json is not a run's"):
        start_run({"student": layer}, layer, out_dir=str(out))
    (out / "config.json").write_text('{"script": "dino", "versions": {}}')  # of a run that failed at once
    start_run({"student": layer}, layer, out_dir=str(out))
    (out / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match="already holds a run"):
        start_run({"student": layer}, layer, out_dir=str(out))


def test_two_runs_do_not_share_a_folder(command, tmp_path):
    from twins.decoding import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        refused(
            command("barlow.py", out_dir=tmp_path / "run"), 1, "another process is writing into", "--out_dir"
        )


def test_a_moved_folder_is_made_again_and_one_in_its_place_is_not_written_to(start_run, tmp_path, capsys):
    layer = torch.nn.Linear(1, 1)
    run = start_run({"student": layer}, layer)
    out, before = tmp_path / "run", tmp_path / "before"
    run.log(0, {"loss": 1.0})
    out.rename(before)
    run.log(1, {"loss": 2.0})
    assert "run was moved or deleted while this run wrote there" in capsys.readouterr().out
    assert [row["step"] for row in read_log(out / "log.jsonl")] == [0, 1]
    run.save(1)
    assert not run.unsaved and {p.name for p in before.iterdir()} == {"config.json", "script.py", "log.jsonl"}
    out.rename(tmp_path / "again")
    with files.only_writer(out):  # another run is there
        run.log(2, {"loss": 3.0})
        run.save(2)
        assert "another process is writing into" in run.unsaved and not list(out.iterdir())
    write_file(out / "ckpt.pt", "another run's")  # and has ended
    run.save(3)
    assert "already holds a run" in run.unsaved and [p.name for p in out.iterdir()] == ["ckpt.pt"]
    (out / "ckpt.pt").unlink()
    run.log(4, {"loss": 4.0})
    run.save(4)
    assert not run.unsaved and [row["step"] for row in read_log(out / "log.jsonl")] == [0, 1, 2, 4]
    (out / "log.jsonl").unlink()
    run.log(5, {"loss": 5.0})
    assert [row["step"] for row in read_log(out / "log.jsonl")] == [0, 1, 2, 4, 5]


def test_real_cifar100_is_read_as_published(real_images):
    test = data.load("cifar100", real_images, 32, "test")
    assert (
        test.images.shape == (10_000, 3, 32, 32)
        and len(test.classes) == 100
        and test.labels.bincount().eq(100).all()
    )


def test_real_photographs_train(train, real_images):
    g = train(
        "hybrid_a.py", dataset="folder", data_dir=real_images / "imagenette128", image_size=64, patch_size=8
    )
    assert g["views"][0].shape == (16, 3, 64, 64) and rows_of(g)[-1]["knn"] > 0


def test_a_checkout_is_edited_where_its_code_is(tmp_path, monkeypatch):
    """Rows that a study writes into results/ are no edit of the code."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    for name in ("code.py", "results/rows.jsonl"):
        write_file(tmp_path / name, "1")

    def git(*words):
        about = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *about, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert len(files.git_state()["git_commit"]) == 40 and not files.git_state()["git_edited"]
    write_file(tmp_path / "results/rows.jsonl", "2")
    write_file(tmp_path / "new.py", "untracked")
    assert not files.git_state()["git_edited"]
    write_file(tmp_path / "code.py", "2")
    assert files.git_state()["git_edited"]


def test_an_unknown_preset_is_refused(train):
    with pytest.raises(UserError, match="--preset=smal is unknown: choose stl10 or shapes or small"):
        train("dino.py", preset="smal")
