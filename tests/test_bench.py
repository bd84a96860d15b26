"""bench.py: its figures are those of the run it looks at."""

import json
import os
import signal

import pytest

import bench
from test_run import refused


def test_a_row_is_what_its_step_costs(command, tmp_path):
    keys = dict(scripts="barlow", device="cpu", compile=False, batch_size=8, n_local=2, dim=64, depth=2, heads=2, warmup=2, steps=3)
    done = command("bench.py", out_dir=tmp_path, trace=True, **keys)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert f"| barlow | {8 / row['seconds']:.0f} | {1000 * row['seconds']:.1f} |" in done.stdout
    assert 0 < row["views"] < 1 and 0 < row["seconds"] < row["first"]
    tokens, rows = 8 * (2 * 65 + 2 * 17), 8 * 4
    multiply_adds = tokens * (2 * 12 * 64**2 + 48 * 64) + rows * (64 * 1024 + 2 * 1024**2) + 5 * 8 * 1024**2  # ViT, projector, C
    attention = 2 * 8 * 2 * (65**2 + 17**2) * 2 * 64  # depth, images, views of a size, tokens, two products, width
    # the backward pass costs twice the forward one, and attention makes one of its products anew
    assert row["flop"] == pytest.approx(2 * (3 * multiply_adds + 3.5 * attention), rel=0.01)
    assert sum(row["operations"].values()) < 1.001 and "aten::mm" in list(row["operations"])[:5]
    assert (tmp_path / "barlow.json.gz").stat().st_size > 1000


def test_wrong_keys_of_the_bench(command):
    refused(command("bench.py", scripts="dino,data"), 1, "dino,data", "no training script")
    refused(command("bench.py", scripts="dino", out_dir="/proc/x"), 1, "/proc/x", "cannot be written")
    refused(command("bench.py", warmup=1), 1, "--warmup=1", "from 2")


def test_what_fails_is_said(command, tmp_path, capfd):
    refused(command("bench.py", scripts="barlow", compile=False, out_dir=tmp_path, batch_size=20000), 1, "not measured: barlow")
    assert "20000" in capfd.readouterr().err


def test_a_script_that_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(bench, "measure", kill)
    assert bench.in_a_process() is None
    assert "killed by signal 9" in capfd.readouterr().err


def kill(pipe):
    os.kill(os.getpid(), signal.SIGKILL)
