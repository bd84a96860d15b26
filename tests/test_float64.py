"""--dtype=float64 is float64 from the views to the checkpoint, in every script."""

import json

import pytest
import torch

from conftest import SCRIPTS
from twins.checkpoints import load_pickle


def operations(node):
    """The names of all operations that a loss comes from."""
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [earlier for earlier, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_in_float64_never_leaves_it(train, tmp_path, script):
    def spy(g):
        assert g["loss"].dtype == torch.float64 and g["loss"].isfinite()
        assert {view.dtype for view in g["views"]} == {torch.float64}
        assert "ToCopyBackward0" not in operations(g["loss"].grad_fn)  # a cast, to float32 and back
        steps.append(g["step"])

    steps = []
    g = train(script, spy, dtype="float64", max_steps=2, out_dir=tmp_path / "run")
    assert steps == [0, 1]
    weights = load_pickle(tmp_path / "run" / "ckpt.pt")[g["run"].backbone_name.partition(".")[0]]
    assert {weight.dtype for weight in weights.values()} == {torch.float64}
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and all(0 <= rows[i]["knn"] <= 1 for i in (0, -1))


@pytest.mark.parametrize("script", ["eval_linear", "attn_viz", "seg_transfer"])
def test_evaluations_run_in_float64(script, command):
    network = {"ckpt": "random", "dataset": "shapes", "dim": 12, "depth": 1, "heads": 2}
    few = {
        "eval_linear": {"label_fraction": 0.02},
        "attn_viz": {"n_images": 5},
        "seg_transfer": {"max_steps": 2},
    }
    done = command(f"{script}.py", **network, **few[script], dtype="float64")
    assert done.returncode == 0 and "device cpu, float64" in done.stdout, done.stderr
