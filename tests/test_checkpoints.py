"""A run's files when disks are full, bits flip, files are lost, and a resume fails: said in one sentence,
nothing lost.
"""

import errno
import json
import os
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

import data
from conftest import ROOT, launch, tiny
from twins import checkpoints, datasets, decoding, files, keys, log, run, weight_files, weights
from twins.backbones import load_backbone, output_folder, trained_on
from twins.checkpoints import load_checkpoint, load_pickle, read_checkpoint
from twins.errors import UserError
from twins.log import read_log
from vit import ViT


@pytest.fixture
def small(start_run):
    """small(resume=True, ...) is the Run of a linear layer, in milliseconds."""

    def start(text="one", steps=9, **config):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 1)
        state = {"network": network, "center": torch.zeros(2), "data": text}
        state["optimizer"] = torch.optim.AdamW(network.parameters())
        return start_run(state, network, steps, **{"base_lr": 0.1, **config})

    return start


def steps(r, *numbers, scale=1.0):
    """Trains and saves."""
    for step in numbers:
        r.check(step, 0.5, loss=torch.ones(()))
        r.state["optimizer"].zero_grad()
        (scale * r.backbone(torch.ones(1, 3)).sum()).backward()
        r.state["optimizer"].step()
        r.update()
        r.log(step + 1, r.row(step + 1, loss=torch.ones(())))
        r.save(step + 1)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(*names): no byte is written to files of these names; none: the disk has room again."""

    def fill(*names):
        def full(path, mode="r", **options):
            file = open(path, mode, **options)  # noqa: SIM115
            if "r" not in mode and any(str(path).removesuffix(".part").endswith(name) for name in names):
                file.write(b"half a row" if "b" in mode else "half a row")
                file.close()
                raise OSError(errno.ENOSPC, "No space left on device")
            return file

        monkeypatch.setattr(files, "open", full, raising=False)
        monkeypatch.setattr(log, "open", full, raising=False)

    return fill


@pytest.mark.parametrize("name", ["curves.png", "crops.png", "log.jsonl"])
def test_a_full_disk_for_what_a_run_can_do_without_is_said_once(small, full_disk, capsys, tmp_path, name):
    full_disk(name)
    r = small()
    r.draw_crops(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [torch.zeros(1, 3, 4, 4)])
    steps(r, 0, 1, 2)
    r.finish()
    said = "".join(capsys.readouterr())
    assert said.count(f"warning: {name} fails, training continues") == 1 and "No space left on device" in said
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3
    assert not list(tmp_path.rglob("*.part"))


def test_rows_that_a_full_disk_did_not_take_are_written_when_it_has_room(small, full_disk, tmp_path):
    r = small()
    steps(r, 0)
    full_disk("log.jsonl")
    steps(r, 1, 2)
    assert "half a row" in (tmp_path / "run" / "log.jsonl").read_text()
    full_disk()
    steps(r, 3)
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]


def test_a_failed_save_is_said_at_every_save_and_ends_the_run_in_one_sentence(
    small, full_disk, capsys, tmp_path
):
    r = small()
    steps(r, 0)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    full_disk("ckpt.pt")
    steps(r, 1, 2)
    with pytest.raises(
        UserError, match=r"ended at step 3 but its last save failed: .*No space left on device"
    ):
        r.finish()
    assert "".join(capsys.readouterr()).count("ckpt.pt cannot be written") == 2
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before and not list(tmp_path.rglob("*.part"))


def test_a_run_that_could_not_save_can_be_started_again(small, full_disk, tmp_path):
    folder = tmp_path / "run"
    full_disk("ckpt.pt")
    r = small()
    steps(r, 0)
    with pytest.raises(UserError, match="its last save failed"):
        r.finish()
    full_disk()
    steps(small(), 0)  # the same command
    for name, left in (("ckpt.pt", "export"), ("export", "curves.png")):
        shutil.rmtree(folder / name) if name == "export" else (folder / name).unlink()
        with pytest.raises(
            UserError, match=rf"holds a run's {left}, but no ckpt.pt to continue: give another"
        ):
            small()
        with pytest.raises(UserError, match=r"ckpt.pt does not exist"):
            small(resume=True)


def test_a_parameter_of_the_state_resumes_and_a_changed_script_is_reported(start_run, tmp_path, capsys):
    script = tmp_path / "mine.py"
    for change in ("", "# edited"):
        script.write_text(f"x = 1{change}\n")
        network, temperature = torch.nn.Linear(3, 1), torch.nn.Parameter(torch.zeros(()))
        state = {"network": network, "temperature": temperature}
        state["optimizer"] = torch.optim.AdamW([*network.parameters(), temperature])
        r = start_run(state, network, script=script, resume=bool(change))
        if not change:
            temperature.data.fill_(3.0)
            steps(r, 0)
    assert temperature.item() == 3.0 and temperature.requires_grad
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "mine.py changed since this run began" in said


def test_a_run_beyond_its_new_end_is_not_resumed(small):
    r = small()
    steps(r, 0, 1, 2)
    r.finish()
    with pytest.raises(UserError, match=r"ckpt.pt is at step 3, beyond the new end, step 2"):
        small(resume=True, steps=2)


def test_the_checkpoint_before_gives_way_on_a_disk_with_room_for_two(small, monkeypatch, tmp_path):
    """Two checkpoints and what is being written would be three."""
    folder = tmp_path / "run"

    def open_on_full_disk(path, mode="r", **options):
        if str(path).endswith("ckpt.pt.part") and (folder / "ckpt-previous.pt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode, **options)

    monkeypatch.setattr(files, "open", open_on_full_disk, raising=False)
    r = small()
    steps(r, 0, 1, 2, 3)
    r.finish()
    assert [read_checkpoint(folder / name)["step"] for name in ("ckpt.pt", "ckpt-previous.pt")] == [4, 3]


def test_the_checkpoint_is_written_first(small, monkeypatch):
    names, write = [], files.write_file
    for module in (run, weights):
        monkeypatch.setattr(
            module, "write_file", lambda path, *args: (names.append(path.name), write(path, *args))
        )
    r = small()
    names.clear()
    r.save(0)
    assert names[0] == "ckpt.pt" and names[-1] == "curves.png"


# what a real run leaves, damaged


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    done = launch(
        [str(ROOT / "hybrid_a.py"), *tiny("hybrid_a.py", depth=1, save_every=1, out_dir=out)], out.parent
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def configure(functions):
    """configure(folder, ...) is the options of the run that is resumed there."""
    return lambda folder, *words: keys.configure(
        dict(functions["hybrid_a.py"]), [f"--out_dir={folder}", "--resume=True", *words]
    )


def edit(file, change):
    """Changes a JSON file's or a checkpoint's dict."""
    if file.suffix == ".pt":
        saved = torch.load(file, weights_only=True)
        change(saved)
        torch.save(saved, file)
        return
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_checkpoint_decides_where_config_json_differs(configure, folder, capsys):
    file, expected = folder / "config.json", configure(folder)
    assert "config.json" not in capsys.readouterr().out
    whole = file.read_text()
    file.write_text(whole.replace('"alpha"', '"alphb"'))
    assert configure(folder) == expected
    assert (
        f"config.json says nothing about --alpha, ckpt.pt {expected['alpha']}: using ckpt.pt"
        in capsys.readouterr().out
    )
    file.write_text(whole.replace('"depth": 1', '"depth": 3'))
    assert (
        configure(folder) == expected
        and "config.json says --depth=3, ckpt.pt 1: using ckpt.pt" in capsys.readouterr().out
    )
    for broken in (whole.replace("{", "[", 1), "[" * 100_000, "[1]", ""):
        file.write_text(broken)
        assert configure(folder) == expected and "config.json cannot be read" in capsys.readouterr().out
    file.unlink()
    assert configure(folder) == expected and "config.json cannot be read" in capsys.readouterr().out


def test_without_a_checkpoint_there_is_nothing_to_resume(configure, folder):
    (folder / "ckpt.pt").unlink()
    assert configure(folder)["depth"] == 1  # killed between two renames
    (folder / "ckpt-previous.pt").unlink()
    with pytest.raises(UserError, match=r"holds no run to resume"):
        configure(folder)


def test_a_lost_log_ends_with_a_table(train, folder, capsys):
    """And a finished run that is resumed writes nothing."""
    (folder / "log.jsonl").unlink()
    before = content(folder)
    train("hybrid_a.py", out_dir=folder, resume=True, depth=1)
    assert "| minutes of training |" in capsys.readouterr().out and content(folder) == before


@pytest.mark.parametrize("kept", [0, 1])
def test_a_lost_log_does_not_lose_random_weights_accuracy(small, tmp_path, kept, capsys):
    """`knn_init` and the first RankMe, with which a collapse is noticed, are those of step 0."""
    r = small()
    r.log(0, {"knn": 0.25, "rank": 12.0})
    steps(r, 0, 1)
    r.finish()
    log = tmp_path / "run" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[3 - kept :]))
    r = small(resume=True)
    assert f"{log} has lost rows; the first is taken from" in capsys.readouterr().out
    r.log(3, {"knn": 0.5, "rank": 2.0})
    rows = read_log(log)
    assert rows[0] == {"step": 0, "knn": 0.25, "knn_init": 0.25, "rank": 12.0}
    assert rows[-1]["knn_init"] == 0.25 and len(rows) == 2 + kept
    assert "RankMe fell from 12.0 to 2.0" in "".join(capsys.readouterr())


def test_rows_lost_from_the_middle_of_a_log_are_noticed(small, tmp_path, capsys):
    r = small()
    steps(r, 0, 1, 2)
    r.finish()
    log = tmp_path / "run" / "log.jsonl"
    small(resume=True)
    assert "lost rows" not in capsys.readouterr().out
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1] + lines[2:]))
    small(resume=True)
    assert f"{log} has lost rows" in capsys.readouterr().out


def test_a_log_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log.jsonl cannot be read \(it is not a file\)"):
        read_log(tmp_path / "log.jsonl")


def test_the_saved_script_is_the_one_that_runs(start_run, tmp_path):
    """An editor changes it meanwhile, or moves it away."""
    network, script = torch.nn.Linear(3, 1), tmp_path / "mine.py"
    script.write_text("alpha = 1\n", encoding="utf-8-sig")  # as Windows' editors save it
    r = start_run({"network": network}, network, script=script)
    script.write_text("alpha = 999\n")
    saved = tmp_path / "run" / "script.py"
    r.save(1)
    assert saved.read_text() == "alpha = 1\n"
    script.unlink()
    r.save(2)
    assert saved.read_text() == "alpha = 1\n"


@pytest.mark.parametrize("word", ["--preset=small", "--init=random.pth", "--seed=1"])
def test_what_a_run_began_with_cannot_be_changed(configure, folder, word):
    with pytest.raises(UserError, match=rf"is a run with {word.split('=')[0]}=.*: leave .* out"):
        configure(folder, word)


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """A folder that is mounted read-only, as far as one can ask; the tests may run as root."""
    folder = tmp_path / "share"
    folder.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    return folder


def test_a_folder_that_is_read_only_is_refused_before_the_work(small, read_only, tmp_path):
    with pytest.raises(UserError, match=r"share cannot be written \(it is read-only\)"):
        small(out_dir=str(read_only))
    with pytest.raises(UserError, match=r"share cannot be written \(it is read-only\)"):
        output_folder({"out_dir": str(read_only)}, "random", "shapes")
    for path in (__file__, tmp_path / ("long" * 99)):  # a file, a name that no disk takes
        with pytest.raises(UserError, match=r"cannot be written"):
            output_folder({"out_dir": str(path)}, "random", "shapes")
    assert not checkpoints.holds_run(tmp_path / ("long" * 99))


@pytest.mark.parametrize(
    "script, table",
    [
        ("eval_linear.py", "| linear_avg |"),
        ("attn_viz.py", "| copy | 1 |"),
        ("seg_transfer.py", "| this checkpoint |"),
    ],
)
def test_a_full_disk_does_not_take_the_table(monkeypatch, full_disk, folder, capsys, script, table):
    few = {"attn_viz.py": ["--n_images=8"], "seg_transfer.py": ["--max_steps=1"]}
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), f"--ckpt={folder}", *few.get(script, [])])
    for name in ("excepthook", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    made = {split: datasets.shapes(split) for split in ("train", "test")}
    for split, x in made.items():
        made[split] = x._replace(images=x.images[:300], labels=x.labels[:300], masks=x.masks[:300])
    monkeypatch.setattr(datasets, "shapes", made.get)
    full_disk(".json", ".png")
    with pytest.raises(UserError, match=r"\.json cannot be written \(No space left on device\)"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert table in capsys.readouterr().out


def test_a_resume_that_diverges_changes_nothing(train, folder):
    before = content(folder)
    with pytest.raises(
        UserError, match=r"is not finite at step 3, learning rate 3.12e\+33, ckpt.pt is sound"
    ):
        train(
            "hybrid_a.py", out_dir=folder, resume=True, depth=1, max_steps=6, base_lr=1e35, warmup_epochs=0.0
        )
    assert content(folder) == before


def test_a_logger_that_is_not_installed_changes_nothing(small, monkeypatch, tmp_path):
    r = small()
    steps(r, 0)
    r.finish()
    before = content(tmp_path)
    monkeypatch.setitem(
        run.start_logger.__globals__, "importlib", types.SimpleNamespace(import_module=__import__)
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    for _ in range(2):  # the second finds the lock free
        with pytest.raises(UserError, match=r"--logger=wandb needs a package"):
            small(resume=True, logger="wandb")
    assert content(tmp_path) == before


def test_a_new_run_that_fails_leaves_no_run(train, tmp_path, functions):
    with pytest.raises(UserError, match=r"is not finite at step 0, .*nothing was saved yet"):
        train("hybrid_a.py", out_dir=tmp_path / "new", depth=1, base_lr=1e35, warmup_epochs=0.0)
    keys.configure(dict(functions["hybrid_a.py"]), [f"--out_dir={tmp_path / 'new'}"])


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_does_not_replace_it(
    small, capsys, tmp_path, full_disk
):
    r = small()
    steps(r, 0, 1)
    r.finish()
    newest, previous = (tmp_path / "run" / name for name in ("ckpt.pt", "ckpt-previous.pt"))
    damaged = bytearray(newest.read_bytes())
    damaged[damaged.find(r.backbone.weight.detach().numpy().tobytes()) + 1] ^= 4
    newest.write_bytes(damaged)
    r = small(resume=True)
    said = capsys.readouterr().out
    assert r.start == 1 and "ckpt.pt is damaged (in " in said and "using the checkpoint before it" in said
    sound = previous.read_bytes()
    full_disk("ckpt.pt")
    steps(r, 1)
    assert previous.read_bytes() == sound
    full_disk()
    steps(r, 2)
    assert previous.read_bytes() == sound and read_checkpoint(newest)["step"] == 3
    steps(r, 3)
    assert read_checkpoint(previous)["step"] == 3


def test_a_tensor_that_is_marked_as_a_folder_is_noticed(tmp_path):
    """Of it torch reads nothing, without an error: the tensor holds what was in memory before."""
    file = tmp_path / "weights.pt"
    torch.save({"weights": torch.randn(1000)}, file)
    content = file.read_bytes()
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", content)]
    assert load_pickle(file) and len(entries) > 3
    for entry in entries:
        flipped = bytearray(content)
        flipped[entry + 38] ^= 16  # the attribute of a folder
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"weights.pt is (damaged|not a complete checkpoint)"):
            load_pickle(file)


def test_a_flipped_bit_of_an_export_is_noticed(folder):
    file = folder / "export" / "model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-7] ^= 1
    file.write_bytes(flipped)
    assert load(bytes(flipped))  # to safetensors it is sound
    with pytest.raises(UserError, match=r"model.safetensors is damaged, or .* differs; give the run's"):
        weight_files.read_weights(folder / "export", "", 0, {})


def test_a_flipped_bit_of_the_folders_cache_is_noticed(tmp_path, capfd):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "train" / "a" / f"{i}.png")
    first = data.load("folder", tmp_path, 8).images.clone()
    cache = next((tmp_path / ".cache").glob("*.npy"))
    flipped = bytearray(cache.read_bytes())
    flipped[-5] ^= 8
    capfd.readouterr()
    assert (
        torch.equal(data.load("folder", tmp_path, 8).images, first)
        and "damaged" not in capfd.readouterr().out
    )
    cache.write_bytes(flipped)
    assert torch.equal(data.load("folder", tmp_path, 8).images, first)
    assert f"{cache} is damaged: decoding again" in capfd.readouterr().out


def test_a_large_cache_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(decoding, "CHECKED", 10)
    small, large, other = np.ones(10, np.uint8), np.ones(11, np.uint8), np.zeros(11, np.uint8)
    assert (
        decoding.checksum(large, b"12") == decoding.checksum(other, b"12") != decoding.checksum(small, b"12")
    )
    assert decoding.checksum(large, b"12") != decoding.checksum(large, b"11")


def test_other_data_are_said(small, capsys):
    r = small()
    steps(r, 0)
    r.finish()
    small(resume=True)
    assert "changed" not in capsys.readouterr().out
    small(resume=True, text="two")
    assert "warning: the data changed since this run began" in capsys.readouterr().out


def test_more_steps_are_a_jump_of_the_learning_rate(configure, folder, capsys):
    configure(folder, "--max_steps=3")
    assert "jumps" not in capsys.readouterr().out
    configure(folder, "--batch_size=32")  # of `epochs`, fewer steps
    assert "jumps" in capsys.readouterr().out
    assert configure(folder, "--max_steps=30")["max_steps"] == 30
    assert "jumps; for an unbroken schedule, start a new run" in capsys.readouterr().out


# values with the wrong type


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("centering", "False", None),
        ("max_steps", "7", None),
        ("centering", 0, "--centering=0: it must be True or False"),
        ("centering", "no", "--centering=no: it must be True or False"),
        ("max_steps", "9" * 999 + "x", f"--max_steps={'9' * 80}: it must be a whole number"),
        ("max_steps", [3], r"--max_steps=\[3\]: it must be a whole number"),
        ("depth", 10**400, "--depth=10000.*: it must be from 1 to 1000000000"),
        ("base_lr", 10**400, "--base_lr=1000.*: it must be a number"),
        ("base_lr", float("nan"), "--base_lr=nan: it must be finite"),
        ("global_scale", [[0.1], 1], "global_scale.*: it must be numbers like"),
        ("global_scale", [0.4, True], "global_scale.*: it must be numbers like"),
        ("head", {"a": 1}, "--head=.*: it must be text"),
        ("head", "three", "--head=three is unknown"),
    ],
)
def test_options_of_a_checkpoint_are_those_of_a_command_line(configure, folder, name, value, words):
    (folder / "ckpt-previous.pt").unlink()
    edit(folder / "ckpt.pt", lambda saved: saved["config"].update({name: value}))
    if words is None:
        expected = {"False": False, "7": 7}[value]
        assert configure(folder)[name] is expected or configure(folder)[name] == expected
        return
    with pytest.raises(UserError, match=words):
        configure(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "7"},
        {"step": -1},
        {"step": True},
        {"seconds": "long"},
        {"config": [1]},
        {"backbone": 3},
        {"script": ["dino"]},
    ],
)
def test_a_checkpoint_of_other_types_is_none(folder, changes):
    (folder / "ckpt-previous.pt").unlink()
    edit(folder / "ckpt.pt", lambda saved: saved.update(changes))
    with pytest.raises(UserError, match=r"is not a checkpoint of a training script"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name, value",
    [("network", 3), ("network", [1]), ("optimizer", {"state": 1}), ("optimizer", "x"), ("center", "x")],
)
def test_a_state_that_does_not_fit_is_one_sentence(small, tmp_path, name, value):
    r = small()
    r.save(1)
    r.finish()
    edit(tmp_path / "run" / "ckpt.pt", lambda saved: saved.update({name: value}))
    with pytest.raises(UserError, match=r"ckpt.pt does not fit"):
        small(resume=True)


@pytest.mark.parametrize(
    "args",
    [{"depth": 10**6}, {"depth": "3"}, {"heads": 0}, {"dim": -4}, {"dim": [8]}, {"dim": 10**9, "heads": 1}],
)
def test_a_backbone_that_cannot_be_built_is_one_sentence(folder, args):
    (folder / "ckpt-previous.pt").unlink()
    edit(folder / "ckpt.pt", lambda saved: saved["backbone"]["args"].update(args))
    with pytest.raises(UserError):
        load_backbone({"ckpt": str(folder), "weights": ""}, "cpu", ViT)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": [1]},
        {"model_args": {"num_heads": "2"}},
        {"model_args": {"num_heads": -2}},
        {"dataset": ["shapes"]},
        {"data_dir": 7},
    ],
)
def test_an_export_of_other_types_is_one_sentence_or_none(folder, changes):
    edit(folder / "export" / "config.json", lambda content: content.update(changes))
    config = {"ckpt": str(folder / "export"), "weights": "", "heads": 2, "dataset": "", "data_dir": ""}
    if ("num_heads" in str(changes) and "-2" not in str(changes)) or changes == {"model_args": [1]}:
        load_backbone(config, "cpu", ViT)  # --heads decides
        return
    with pytest.raises(UserError):
        trained_on(config, load_backbone(config, "cpu", ViT)[1])


def test_deeply_nested_json_is_one_sentence(folder):
    deep = "[" * 100_000
    (folder / "export" / "config.json").write_text(deep)
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        weight_files.read_weights(folder / "export", "", 0, {})
    (folder / "log.jsonl").write_text(f'{deep}\n{{"step": 1}}\n')
    with pytest.raises(UserError, match=r"line 1 of .*log.jsonl is broken, or of another version: fix or"):
        read_log(folder / "log.jsonl")


def test_a_pipe_in_place_of_a_file_is_one_sentence(small, tmp_path):
    r = small()
    steps(r, 0)
    log = tmp_path / "run" / "log.jsonl"
    log.unlink()
    os.mkfifo(log)
    for read in (read_log, files.read_json):
        with pytest.raises(UserError, match=r"cannot be read .it is not a file"):
            read(log)
    steps(r, 1)  # replaces it
    assert [row["step"] for row in read_log(log)] == [1, 2]


@pytest.mark.parametrize(
    "line", ["7", "[1]", "null", '{"loss": 1}', '{"step": "7"}', '{"step": [1]}', '{"step": tr']
)
def test_a_row_of_another_type_is_one_sentence_but_for_the_last(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n' + line)
    assert read_log(log) == [{"step": 1}]
    log.write_text(line + '\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"line 1 of .* is broken"):
        read_log(log)


def test_values_of_a_log_may_be_anything(small, tmp_path, capsys):
    r = small()
    steps(r, 0, 1)
    r.finish()
    row = {"step": 2, "rank": "nine", "loss": [1], "knn": None, "teacher_entropy": {}}
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write(2 * (json.dumps(row) + "\n"))
    r = small(resume=True, steps=4)
    r.log(2, {"rank": torch.ones(())})
    steps(r, 2, 3)
    r.finish()
    assert "".join(capsys.readouterr()).count("warning: ") == 1
