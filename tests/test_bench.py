"""bench.py: its figures are those of the run it looks at."""

import json

import pytest

from test_run import refused


def test_a_row_is_what_its_step_costs(command, tmp_path):
    keys = dict(scripts="barlow", device="cpu", compile=False, batch_size=8, n_local=2, dim=64, depth=2, heads=2, warmup=2, steps=3)
    done = command("bench.py", out_dir=tmp_path, trace=True, **keys)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert f"| barlow | {8 / row['seconds']:.0f} | {1000 * row['seconds']:.1f} |" in done.stdout
    assert 0 < row["views"] < 1 and 0 < row["seconds"] < row["first"]
    tokens, rows = 8 * (2 * 65 + 2 * 17), 8 * 4
    multiply_adds = tokens * (2 * 12 * 64**2 + 48 * 64) + rows * (64 * 1024 + 2 * 1024**2) + 6 * 8 * 1024**2  # ViT, projector, C
    assert row["flop"] == pytest.approx(3 * 2 * multiply_adds, rel=0.05)  # the backward pass costs twice the forward one
    assert sum(row["operations"].values()) < 1.001 and "aten::mm" in list(row["operations"])[:5]
    assert (tmp_path / "barlow.json.gz").stat().st_size > 1000


def test_wrong_keys_of_the_bench(command):
    refused(command("bench.py", scripts="hybrid_c"), 1, "hybrid_c", "there is no")
    refused(command("bench.py", warmup=1), 1, "--warmup=1", "from 2")
