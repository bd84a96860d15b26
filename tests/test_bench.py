"""bench.py and twins/stopwatch.py: their figures are those of the run they look at."""

import json
import re

import pytest

import bench
from test_run import refused


def test_a_row_is_what_its_step_costs(command, tmp_path):
    options = dict(batch_size=8, n_local=2, dim=64, depth=2, heads=2, compile=False, warmup=2, steps=3)
    done = command("bench.py", scripts="barlow", trace=True, out_dir=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert f"| barlow | {8 / row['seconds']:.0f} | {1000 * row['seconds']:.1f} |" in done.stdout
    assert 0 < row["views"] < 1 and 0 < row["seconds"] < row["first"] and row["n_views"] == 4
    tokens, views = 8 * (2 * 65 + 2 * 17), 8 * 4
    block, last_block = 12 * 64**2 * tokens, 64**2 * (2 * tokens + 10 * views)  # its queries: [CLS] alone
    projector, correlations = views * (64 * 1024 + 2 * 1024**2), 5 * 8 * 1024**2
    backbone = block + last_block + 48 * 64 * tokens
    attention = 8 * 2 * 2 * 64 * (65**2 + 65 + 17**2 + 17)  # images, views of a size, products, width, pairs
    # the backward pass costs twice the forward one, and attention makes one of its products anew
    expected = 2 * (3 * (backbone + projector + correlations) + 3.5 * attention)
    assert row["flop"] == pytest.approx(expected, rel=0.01)
    assert sum(row["operations"].values()) < 1.001 and "aten::mm" in list(row["operations"])[:5]
    assert (tmp_path / "barlow.json.gz").stat().st_size > 1000


def test_views_against_torchvision(command, tmp_path):
    options = dict(against="torchvision", batch_size=32, n_local=1, warmup=2, steps=2, out_dir=tmp_path)
    done = command("bench.py", **options)
    assert done.returncode == 0, done.stderr
    speeds = json.loads((tmp_path / "views.json").read_text())["images_per_s"]
    printed = [int(number) for number in re.findall(r"\| (\d+) \|$", done.stdout, re.M)]
    assert printed == [round(speeds["ours"]), round(speeds["torchvision"])] and min(printed) > 0


def test_wrong_options_of_the_bench(command):
    for other in ("data", "eval_linear", "absent"):
        refused(command("bench.py", scripts=f"dino,{other}"), 1, "no training script", f"{other}.py")
    refused(command("bench.py", scripts="dino", out_dir="/proc/x"), 1, "/proc/x", "cannot be written")
    refused(command("bench.py", warmup=1), 1, "--warmup=1", "from 2")


def test_what_fails_is_said(command, tmp_path, capfd):
    options = dict(scripts="barlow", compile=False, out_dir=tmp_path, batch_size=20000)
    refused(command("bench.py", **options), 1, "not measured: barlow")
    assert "20000" in capfd.readouterr().err


def test_a_script_that_is_killed(tmp_path, capfd):
    script = tmp_path / "killed.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)")
    assert bench.run_stopwatch(script, {}, "") is None
    assert "killed by signal 9" in capfd.readouterr().err
