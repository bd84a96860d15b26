"""A fork is a copy: other networks, losses, options and tokens work with the checkpoint and all evaluation
scripts.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, copy_of_the_code, launch, tiny
from twins import pictures, weights
from twins.backbones import load_backbone
from twins.checkpoints import read_checkpoint
from twins.errors import UserError
from vit import ViT


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code, and checkout.run(script, **options) -> standard output."""
    copy_of_the_code(tmp_path)
    for split, count in (("train", 40), ("test", 10)):
        for i in range(count):  # two classes, and images with masks beside them
            pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
            mask = np.zeros((32, 32), np.uint8)
            mask[8:20, 8:24] = 1
            for name, content in (
                (f"labelled/{split}/{i % 2}", pixels),
                (f"masked/{split}/images", pixels),
                (f"masked/{split}/masks", mask),
            ):
                (tmp_path / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(tmp_path / name / f"{i}.png")

    class Checkout:
        folder = tmp_path

        def edit(self, source, script, changes):
            text = (tmp_path / source).read_text()
            for old, new in changes.items():
                text, count = re.subn(old, new, text)
                assert count, f"{source} has no {old}"
            (tmp_path / script).write_text(text)

        def run(self, script, **options):
            words = [str(tmp_path / script), *(f"--{name}={value}" for name, value in options.items())]
            done = launch(words, tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        def evaluate(self, out):
            """All that is done with a trained network; returns what the scripts wrote."""
            said = self.run("eval_linear.py", ckpt=out, device="cpu")
            self.run("attn_viz.py", ckpt=out, device="cpu", rows=2)
            self.run(
                "seg_transfer.py",
                ckpt=out,
                device="cpu",
                max_steps=2,
                dataset="folder",
                data_dir=tmp_path / "masked",
            )
            assert "linear_avg" in said and (out / "attention.png").read_bytes()[1:4] == b"PNG"
            return {
                name: json.loads((out / f"{name}.json").read_text())
                for name in ("eval_linear", "attention", "seg_transfer")
            }

    return Checkout()


def options_of(checkout, original, **options):
    options = {"dataset": "folder", "data_dir": checkout.folder / "labelled", "batch_size": 8} | options
    return dict(word.removeprefix("--").split("=") for word in tiny(original, **options))


def train_twice(checkout, original, out, **options):
    """mine.py, a fork of `original`: three steps, and two more after a resume; the rows of the log."""
    words = options_of(checkout, original, **options)
    checkout.run("mine.py", **words, out_dir=out)
    checkout.run("mine.py", **{**words, "max_steps": 5}, out_dir=out, resume=True)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_networks_losses_and_options_of_any_name(checkout, monkeypatch):
    checkout.edit(
        "dino.py",
        "mine.py",
        {
            r"\bstudent\b": "f",
            r"\bteacher\b": "g",
            r"self\.backbone\b": "self.trunk",
            r"\b([fg])\.backbone\b": r"\1.trunk",
            r"loss, parts = ce, .*": "mse = (z_s[0] - z_t[1]).square().mean()\n"
            '        loss, parts = mse, {"mse": mse}',
            r"# --- method\nout_dim": '# --- method\nhead = "mlp"  # what stands on the backbone [mlp|linear]'
            "\nout_dim",
        },
    )
    out = checkout.folder / "out"
    rows = train_twice(checkout, "dino.py", out, dim=24, head="linear")
    assert rows[-1]["step"] == 5 and rows[-1]["mse"] == pytest.approx(rows[-1]["loss"])
    assert read_checkpoint(out / "ckpt.pt")["config"]["head"] == "linear"
    monkeypatch.setattr(pictures, "png", lambda figure: figure)
    assert "mse" in {line.get_label() for axis in pictures.curves_picture(rows).axes for line in axis.lines}
    results = checkout.evaluate(out)
    assert (
        results["eval_linear"]["checkpoint"]["network"] == "g"
        and results["eval_linear"]["checkpoint"]["script"] == "mine"
    )
    with pytest.raises(AssertionError, match="head=huge"):
        checkout.run("mine.py", head="huge")


def test_a_vit_with_registers_needs_no_other_edit(checkout):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    checkout.edit("vit.py", "my_vit.py", {"registers=0": "registers=4"})
    checkout.edit("barlow.py", "mine.py", {"from vit import": "from my_vit import"})
    out = checkout.folder / "out"
    train_twice(checkout, "barlow.py", out)
    assert checkout.evaluate(out)["eval_linear"]["checkpoint"]["network"] == "network"

    about = json.loads((out / "export" / "config.json").read_text())
    assert about["model_args"]["reg_tokens"] == 4
    theirs = timm.models.vision_transformer.VisionTransformer(**about["model_args"]).eval()
    theirs.load_state_dict(load_file(out / "export" / "model.safetensors"))
    saved = read_checkpoint(out / "ckpt.pt")
    ours = ViT(**saved["backbone"]["args"]).eval()
    ours.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in saved["network"].items() if k.startswith("backbone.")}
    )
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def test_a_vit_in_the_script_itself(checkout):
    checkout.edit(
        "barlow.py",
        "mine.py",
        {"def projector": "class Wider(ViT):\n    pass\n\n\ndef projector", r"= ViT\(": "= Wider("},
    )
    out = checkout.folder / "out"
    checkout.run("mine.py", **options_of(checkout, "barlow.py"), out_dir=out)
    assert read_checkpoint(out / "ckpt.pt")["backbone"]["class"] == "Wider"
    checkout.run("attn_viz.py", ckpt=out, device="cpu", rows=2)


def test_a_vit_of_another_file_is_never_taken_for_ours(train, tmp_path, monkeypatch):
    saved = read_checkpoint(Path(train("barlow.py", max_steps=1)["config"]["out_dir"]) / "ckpt.pt")
    saved["backbone"].update(module="mylib.vit2", **{"class": "Other"})
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    (tmp_path / "mylib").mkdir()
    (tmp_path / "mylib" / "vit2.py").write_text("from vit import ViT\n\n\nclass Other(ViT):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("mylib.vit2", "mylib/vit2", "..mylib.vit2", "vit3"):  # mylib is no package yet
        saved["backbone"]["module"] = module
        with pytest.raises(UserError, match=r"needs the class Other of .*vit.: put it beside the scripts"):
            weights.backbone_of(saved, "ckpt.pt", "", ViT)
    assert "mylib.vit2" not in sys.modules  # a file of a run's folder is never run
    (tmp_path / "mylib" / "__init__.py").touch()
    saved["backbone"]["module"] = "mylib.vit2"
    assert weights.backbone_of(saved, "ckpt.pt", "", ViT)[1].__name__ == "Other"
    saved["backbone"]["args"]["heads"] = 2.0
    with pytest.raises(UserError, match="give it `args` with image_size"):
        weights.backbone_of(saved, "ckpt.pt", "", ViT)
    saved["backbone"]["args"].update(heads=2)
    saved["backbone"]["args"].pop("image_size")
    with pytest.raises(UserError, match="give it `args` with image_size"):
        weights.backbone_of(saved, "ckpt.pt", "", ViT)
    network = saved["backbone"]["name"].split(".")[0]
    saved[network] = dict.fromkeys(saved[network], 5)
    with pytest.raises(UserError, match=f"{network} is not a state dict"):
        weights.backbone_of(saved, "ckpt.pt", "", ViT)


def test_a_network_that_does_not_fit_its_run_is_refused_before_it_takes_memory(train, tmp_path):
    saved = read_checkpoint(Path(train("barlow.py", max_steps=1)["config"]["out_dir"]) / "ckpt.pt")
    weights_of, args = saved["network"], saved["backbone"]["args"]
    cls_token = weights_of["backbone.cls_token"]

    def refused(words, **changes):
        broken = {**saved, **changes}
        torch.save(broken, tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match=words):
            load_backbone({"ckpt": str(tmp_path / "ckpt.pt"), "weights": ""}, "cpu", ViT)

    refused("network is not a state dict", network={**weights_of, 3: cls_token})
    for kind in ("int8", "complex64"):
        other = {**weights_of, "backbone.cls_token": cls_token.to(getattr(torch, kind))}
        refused(rf"cls_token is {kind} \[1, 1, \d+\], the network has float32", network=other)
    large = {**saved["backbone"], "args": {**args, "image_size": 400_000}}  # 640 GB of positions
    refused(r"pos_embed is float32 .*, the network has float32 \[1, 10000000001, ", backbone=large)


@pytest.mark.parametrize(
    "state, words",
    [({"step": 1}, "the name is reserved"), ({"ema_loss": 0.5}, "is a float: it must be a tensor")],
)
def test_a_state_that_could_not_be_restored_is_refused(start_run, state, words):
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=words):
        start_run({"student": layer, **state}, layer)


def test_importing_a_script_has_no_side_effects(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, random, signal, sys
import torch
interrupt = lambda: signal.getsignal(signal.SIGINT)
hooks = lambda: (sys.excepthook, sys.stdout, sys.stderr, interrupt(), torch.get_default_dtype(), sys.argv[:])
before, state = hooks(), torch.get_rng_state()
os.environ["RANK"] = "1"
import hybrid_a, dino, barlow, hybrid_b, eval_linear, attn_viz, seg_transfer, ablate, bench
assert hooks() == before and torch.equal(torch.get_rng_state(), state)
assert os.listdir() == ["program.py"], os.listdir()
assert hybrid_a.batch_size == 256
print("spoken")
"""
    )
    sys.path.insert(0, str(ROOT))
    done = launch([str(program)], tmp_path)
    assert done.returncode == 0 and done.stdout == "spoken\n" and not done.stderr, done.stderr


def test_the_notebook_of_docs(train, tmp_path, monkeypatch):
    """Its lines run as they stand there."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(), re.S)[1]
    code = re.sub(r".*IPython.*\n|^Image\(.*", "", code, flags=re.M)  # which shows the picture
    train("hybrid_a.py", out_dir=tmp_path / "out" / "hybrid_a-shapes")
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.new("RGB", (40, 30), (25 * i, 0, 99)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["features"].shape == (10, 16) and names["maps"].shape == (10, 2, 8, 8)
    assert names["picture"][1:4] == b"PNG"
