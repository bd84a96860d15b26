"""Weights as people have them: timm's features come out, whatever the file is wrapped in; --init and
fine-tuning.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import twins.finetune as finetuning
from conftest import SCRIPTS
from eval_linear import augment
from test_eval_linear import photographs
from twins import weights as weights_module
from twins.backbones import load_backbone
from twins.errors import UserError
from twins.probes import fit, logits, whitening
from twins.weight_files import guess_heads
from twins.weights import build
from vit import ViT

timm = pytest.importorskip("timm", reason="timm is not installed (.ci/run installs it)")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

FLOAT32 = torch.autocast("cpu", enabled=False)


def drawn(model, std):
    """The model with all weights drawn, so large that none is without effect."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=std)
    return model.eval()


def timm_vit(size=32, patch=8, dim=128, depth=2, heads=2, **options):
    """timm's ViT with its classifier."""
    options = {"num_classes": 10, "weight_init": "skip", **options}
    return drawn(VisionTransformer(size, patch, embed_dim=dim, depth=depth, num_heads=heads, **options), 0.1)


def features(model, x):
    return model.forward_features(x)[:, 0]


def loaded(path, weights="", heads=0):
    return load_backbone({"ckpt": str(path), "weights": weights, "heads": heads}, "cpu", ViT)


@pytest.fixture(scope="module")
def model():
    return timm_vit()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "as it is": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model module": lambda s: {"model": prefixed("module.", s)},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.module.", s)},
    "a compiled block": lambda s: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in s.items()
    },
    "DINO": lambda s: {
        "student": prefixed("module.backbone.", zeros(s)),
        "teacher": prefixed("backbone.", s),
    },
    "nested": lambda s: {"state_dict": {"model": WRAPPED["DINO"](s)}},
    "DINOv2": lambda s: {
        "model": {**prefixed("student.backbone.", zeros(s)), **prefixed("teacher.backbone.", s)}
    },
}


def zeros(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_timms_features_come_out_of_any_wrapping(model, images, tmp_path, capsys, wrapping):
    torch.save(WRAPPED[wrapping](model.state_dict()), tmp_path / "weights.pth")
    backbone, about = loaded(tmp_path / "weights.pth")
    assert torch.allclose(backbone(images), features(model, images), atol=1e-5)
    said = capsys.readouterr().out
    named = "teacher" if wrapping in ("DINO", "nested", "DINOv2") else "its only network"
    assert about["network"] == named and f"{named} is used, without " in said and "head" in said
    assert "guessed 2" in said and ("student" in said) == (named == "teacher")


@pytest.mark.parametrize("weights, other", [("student", "teacher"), ("teacher", "student")])
def test_weights_chooses_the_network(model, images, tmp_path, weights, other):
    state = prefixed("backbone.", model.state_dict())
    torch.save({other: zeros(state), weights: prefixed("module.", state)}, tmp_path / "both.pth")
    backbone, about = loaded(tmp_path / "both.pth", weights)
    assert about["network"] == weights and torch.allclose(
        backbone(images), features(model, images), atol=1e-5
    )
    with pytest.raises(UserError, match=f"{other}.backbone, {weights}.backbone: exactly one must be ema"):
        loaded(tmp_path / "both.pth", "ema")


def test_networks_without_a_teacher_are_named_as_the_file_has_them(model, tmp_path):
    state = model.state_dict()
    torch.save({"state_dict": state, "state_dict_ema": zeros(state)}, tmp_path / "timm.pth")
    for weights in ("", "state_dict_ema"):
        backbone, about = loaded(tmp_path / "timm.pth", weights)
        assert about["network"] == "state_dict_ema" and not backbone.cls_token.any()
    networks = {**prefixed("base_encoder.", zeros(state)), **prefixed("momentum_encoder.", state)}
    torch.save({"state_dict": prefixed("module.", networks)}, tmp_path / "moco.pth")
    backbone, about = loaded(tmp_path / "moco.pth")
    assert about["network"] == "momentum_encoder" and backbone.cls_token.any()
    torch.save({"net_a": state, "schema": state}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="networks net_a, schema: exactly one must be a teacher or"):
        loaded(tmp_path / "two.pth")
    torch.save({"student": state}, tmp_path / "student.pth")
    assert loaded(tmp_path / "student.pth")[1]["network"] == "student"


def test_heads_are_given_or_in_the_file_or_guessed(images, tmp_path, capsys):
    model = timm_vit(heads=4, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    assert torch.allclose(
        loaded(tmp_path / "four.pth", heads=4)[0](images), features(model, images), atol=1e-5
    )
    assert "guessed" not in capsys.readouterr().out
    assert loaded(tmp_path / "four.pth")[0].args["heads"] == 2
    assert "guessed 2; --heads sets it" in capsys.readouterr().out
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 4}}))
    assert torch.allclose(loaded(tmp_path)[0](images), features(model, images), atol=1e-5)
    with pytest.raises(UserError, match=r"--heads=2.* has 4, leave --heads out"):
        loaded(tmp_path, heads=2)


@pytest.mark.parametrize(
    "dim, network, heads",
    [
        (384, "its only network", 6),
        (384, "base_encoder", 12),
        (384, "momentum_encoder", 12),
        (768, "momentum_encoder", 12),
        (1280, "model", 16),
        (32, "model", 1),
    ],
)
def test_the_guess_is_right_for_official_vits(dim, network, heads):
    assert guess_heads(dim, network) == heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_scale_of_half_precision_is_folded_in_float32(dtype, tmp_path):
    model = timm_vit(56, 14, init_values=0.1).to(dtype)
    torch.save(model.state_dict(), tmp_path / "half.pth")
    x = torch.randn(2, 3, 56, 56)
    assert torch.allclose(loaded(tmp_path / "half.pth")[0](x), features(model.float(), x), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}]
)
def test_layer_scale_registers_and_positions_are_timms(tmp_path, options):
    model = timm_vit(56, 14, init_values=0.1, **options)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone, _ = loaded(tmp_path / "weights.pth")
    x = torch.randn(2, 3, 56, 56)
    assert torch.allclose(backbone(x), features(model, x), atol=1e-5)
    assert backbone.num_prefix_tokens == 1 + options.get("reg_tokens", 0)


def test_dinov2s_own_registers_have_no_positions(tmp_path):
    """facebookresearch/dinov2 adds register_tokens after the positions of [CLS] and patches."""
    model = timm_vit(56, 14, init_values=0.1, reg_tokens=4, no_embed_class=True)
    state, x = model.state_dict(), torch.randn(2, 3, 56, 56)
    expected = features(model, x)
    state["register_tokens"], cls = state.pop("reg_token"), torch.randn(1, 1, 128)
    state["pos_embed"] = torch.cat([cls, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - cls
    torch.save({**state, "mask_token": torch.zeros(1, 128)}, tmp_path / "weights.pth")
    assert torch.allclose(loaded(tmp_path / "weights.pth")[0](x), expected, atol=1e-5)


def test_keys_in_the_way_are_named(model, tmp_path):
    state, file = model.state_dict(), tmp_path / "weights.pth"

    def refused(state, words):
        torch.save(state, file)
        with pytest.raises(UserError) as error:
            loaded(file)
        assert words in str(error.value)

    refused(
        {**state, "blocks.1.mlp.w12.weight": torch.zeros(2)},
        'Unexpected key(s) in state_dict: "blocks.1.mlp.w12.weight"',
    )
    refused(
        {name: x for name, x in state.items() if name != "norm.bias"},
        'Missing key(s) in state_dict: "norm.bias"',
    )
    refused(
        timm_vit(mlp_ratio=2).state_dict(),
        "blocks.0.mlp.fc1.weight is float32 [256, 128], the network has float32 [512, 128]",
    )
    refused(
        {**state, "pos_embed": torch.zeros(1, 16 + 3, 128)}, "pos_embed [1, 19, 128] is not a square grid"
    )
    refused({"model": state, "model.cls_token": state["cls_token"]}, "two tensors named model.cls_token")
    refused({**state, "module.cls_token": state["cls_token"]}, "two tensors named cls_token")
    more = {f"decoder_blocks.{i}.weight": torch.zeros(2) for i in range(9)}
    refused({**state, **more}, "decoder_blocks.4.weight")
    name = "blocks.1.attn.proj.weight"
    odd = [(state[name].to_sparse(), "torch.sparse_coo"), (state[name].to("meta"), "meta")]
    odd += [(state[name].to(torch.int8), "torch.int8"), (state[name].to(torch.complex64), "torch.complex64")]
    for value, kind in odd:
        refused({**state, name: value}, f"{name} is {kind}, not plain numbers")
    refused({**state, name: state[name] * math.nan}, f"{name} holds NaN or inf")
    refused({**state, name: (state[name] * math.nan).to(torch.float8_e5m2)}, f"{name} holds NaN or inf")
    endless = {"cls_token": state["cls_token"]}
    endless["itself"] = endless
    refused(endless, "holds a dict that contains itself")
    with pytest.raises(UserError, match=r"weights.pth: .*(division|modulo)"):
        build(ViT, state, {"image_size": 32, "patch_size": 0, "dim": 128, "heads": 2}, file)
    refused({**state, "cls_token": torch.tensor(1.0)}, "key names: cls_token is []")
    refused({name: x for name, x in state.items() if name != "pos_embed"}, "pos_embed is missing")
    refused(timm_vit(global_pool="avg").state_dict(), "norm.weight is missing")  # its last norm is fc_norm
    for gamma in (torch.ones(64), torch.tensor(1.0)):
        refused({**state, "blocks.0.ls1.gamma": gamma}, "blocks.0.ls1.gamma")
    with pytest.raises(UserError, match=r"no config.json\): give one of its files"):
        loaded(tmp_path)


def test_a_run_that_has_saved_nothing_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no ckpt.pt and no model.safetensors: its run has saved nothing"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "ckpt.pt"])
def test_a_fifo_of_weights_is_a_sentence_and_no_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is not a file"):
        loaded(tmp_path / name)


def local_pathlib(monkeypatch):
    """A path as Python 3.13 pickles it."""
    module = types.ModuleType("pathlib._local")
    kind = type(
        "PosixPath",
        (),
        {"__module__": "pathlib._local", "__reduce__": lambda self: (type(self), ("/", "out"))},
    )
    module.PosixPath = kind
    monkeypatch.setitem(sys.modules, "pathlib._local", module)
    return kind()


def test_arguments_of_multi_node_training_load(model, tmp_path, monkeypatch):
    for path in (pathlib.PosixPath("/out/1"), local_pathlib(monkeypatch)):
        saved = {"teacher": model.state_dict(), "args": argparse.Namespace(output_dir=path, gpu=0)}
        torch.save(saved, tmp_path / "weights.pth")
        assert loaded(tmp_path / "weights.pth")[1]["network"] == "teacher"


def test_a_large_file_is_read_once(model, tmp_path, monkeypatch):
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    loaded(tmp_path / "mae.pth")
    assert len(loads) == 1


@pytest.mark.parametrize("function, name", [(exec, "exec"), (os.system, "posix.system")])
def test_no_code_of_a_file_is_run(model, tmp_path, function, name):
    class Evil:
        def __reduce__(self):
            code = f"open({str(tmp_path / 'executed')!r}, 'w')"
            return function, (code if function is exec else f"touch {tmp_path / 'executed'}",)

    torch.save({"model": model.state_dict(), "args": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"it needs {name}, and files may not run code"):
        loaded(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


def test_an_official_vit_s16_gives_timms_features(tmp_path):
    """DINO's .pth at its own size; at another one timm gets our positions, DINO's, for its own are
    antialiased.
    """
    model = drawn(timm.create_model("vit_small_patch16_224", pretrained=False, weight_init="skip"), 0.03)
    state = prefixed("module.backbone.", model.state_dict())
    torch.save({"teacher": state, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "dino.pth")
    backbone, about = loaded(tmp_path / "dino.pth")
    assert about["image_size"] == 224 and backbone.args["heads"] == 6
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(backbone(x), features(model, x), atol=1e-5)
        model.set_input_size(img_size=(96, 96))
        model.pos_embed.copy_(backbone.positions(6, 6))
        x = x[..., :96, :96]
        assert torch.allclose(backbone(x), features(model, x), atol=1e-5)


@pytest.fixture(scope="module")
def init_file(tmp_path_factory):
    """A teacher of the tests' tiny architecture, two heads of width 8, for images of 16 pixels."""
    file = tmp_path_factory.mktemp("init") / "weights.pth"
    model = timm_vit(16, 4, 16)
    torch.save({"student": zeros(model.state_dict()), "teacher": model.state_dict()}, file)
    return file


@pytest.mark.parametrize("script", SCRIPTS)
def test_student_and_teacher_start_from_init(train, init_file, capsys, script):
    backbone, _ = loaded(init_file, heads=2)
    expected = {**backbone.state_dict(), "pos_embed": backbone.positions(8, 8)}
    started = []

    def spy(script):
        for name in ("student", "teacher"):
            if name in script and not started[2:]:
                started.append(script[name].backbone.state_dict())
                assert all(torch.equal(started[-1][key], value) for key, value in expected.items())

    train(script, spy, init=init_file, image_size=32, local_size=16, max_steps=1)
    assert len(started) == (1 if script == "barlow.py" else 2)
    assert (
        f"teacher of {init_file}, {{'image_size': 16, 'patch_size': 4, 'dim': 16" in capsys.readouterr().out
    )


def test_init_from_a_class_of_a_fork_is_reported(monkeypatch, capsys):
    class Mean(ViT):
        pass

    args = dict(image_size=8, patch_size=4, dim=12, depth=1, heads=2)
    found = ViT(**args).state_dict(), Mean, args, {"network": "teacher"}
    monkeypatch.setattr(weights_module, "read_backbone", lambda *_: found)
    weights_module.start_from({"init": "run", "image_size": 8, "__given__": {}}, {}, ViT)
    assert "--init=run holds a Mean, read as ViT: features may differ" in capsys.readouterr().out


def test_init_contradicts_no_given_option_and_is_not_read_again(train, init_file, tmp_path):
    with pytest.raises(UserError, match=r"--depth=3: --init=.* has 2, leave --depth out"):
        train("dino.py", init=init_file, depth=3)
    with pytest.raises(ValueError, match="image size of 30 is not a multiple of patch_size=4"):
        train("dino.py", init=init_file, image_size=30)
    copy, out = tmp_path / "copy.pth", tmp_path / "out"
    copy.write_bytes(init_file.read_bytes())
    train("barlow.py", init=copy, max_steps=1, out_dir=out)
    copy.unlink()
    assert train("barlow.py", max_steps=2, out_dir=out, resume=True)["run"].start == 1
    started = []
    spy = lambda script: started.append(script["student"].backbone.blocks[1].mlp.fc2.weight.clone())
    train("barlow.py", spy, init=out, max_steps=1)  # a run, which knows its heads
    saved = torch.load(out / "ckpt.pt", weights_only=True)["network"]
    assert torch.equal(started[0], saved["backbone.blocks.1.mlp.fc2.weight"])
    with pytest.raises(UserError, match=r"--heads=4: .* has 2"):
        train("barlow.py", init=out, heads=4)


def test_learning_rates_decay_by_block():
    """As MAE's param_groups_lrd: embeddings are layer 0, block i is i + 1, norm and classifier are not
    decayed.
    """
    vit = ViT(16, 8, 16, 3, 2, registers=1)
    model = torch.nn.Sequential(vit, torch.nn.Linear(16, 5))
    groups = {id(group["params"][0]): group for group in finetuning.parameter_groups(model, 2.0)}
    assert len(groups) == len(list(model.parameters()))
    layers = [
        vit.cls_token,
        vit.blocks[0].attn.qkv.weight,
        vit.blocks[1].norm1.bias,
        vit.blocks[2].mlp.fc1.weight,
        vit.norm.weight,
    ]
    for i, p in enumerate(layers):
        assert groups[id(p)]["lr"] == pytest.approx(2 * 0.65 ** (4 - i))
    for p in (vit.pos_embed, vit.reg_token, vit.patch_embed.proj.weight):
        assert groups[id(p)]["lr"] == pytest.approx(2 * 0.65**4)
    assert groups[id(model[1].weight)]["lr"] == 2
    decayed = [vit.patch_embed.proj.weight, vit.blocks[0].attn.qkv.weight, model[1].weight]
    assert all(groups[id(p)]["weight_decay"] == 0.05 for p in decayed)
    assert not any(
        groups[id(p)]["weight_decay"] for p in (vit.cls_token, vit.pos_embed, vit.norm.weight, model[1].bias)
    )


def test_held_out_images_select_and_the_test_set_is_evaluated_once(monkeypatch):
    """A stand-in whose second epoch at a learning rate of 0.0003 is perfect on any image."""
    labels = torch.arange(200) % 2
    images, test_images = torch.arange(200)[:, None], torch.arange(1000, 1020)[:, None]
    trained, tested = [], []

    def train_epochs(backbone, images, labels, lr, *settings):
        trained.append((lr, set(images[:, 0].tolist())))
        for epoch in (1, 2, 3):
            yield lr, epoch

    def predict_scores(model, images, device, autocast):
        tested.append((model, set(images[:, 0].tolist())))
        perfect = torch.eye(2)[images[:, 0] % 2]
        return perfect if model == (3e-4, 2) else 1 - perfect

    monkeypatch.setattr(finetuning, "train_epochs", train_epochs)
    monkeypatch.setattr(finetuning, "predict_scores", predict_scores)
    result = finetuning.fine_tune(None, images, labels, test_images, labels[:20], 0, FLOAT32, None)
    assert result["selected"] == {"lr": 3e-4, "epoch": 2, "held_out": 1} and len(result["grid"]) == 9
    assert result["top1"] == 1 and result["interval95"][0] == pytest.approx(0.839, abs=1e-3)
    *selecting, (model, last) = tested
    held_out = selecting[0][1]
    assert len(held_out) == 20 and all(rows == held_out for _, rows in selecting)
    assert all(not rows & held_out and len(rows) == 180 for _, rows in trained[:3])
    assert model == (3e-4, 2) and last == set(range(1000, 1020)) and len(trained[3][1]) == 200


def test_the_backbone_learns_and_the_one_given_stays(monkeypatch):
    """Striped images and dark ones. Drop path is off, the first step starts at the linear probe."""
    monkeypatch.setattr(finetuning, "LEARNING_RATES", (3e-3,))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (300, 3, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.arange(300) % 2
    images[labels == 1, :, :, ::2] += 190  # stripes
    torch.manual_seed(0)
    backbone = ViT(8, 4, 16, 2, 2, drop_path=0.9).requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    settings = finetuning.Settings(augment, strength=1e-2, classes=2, epochs=3)
    result = finetuning.fine_tune(backbone, images, labels, images[:100], labels[:100], 0, FLOAT32, settings)
    assert result["top1"] > 0.95
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    settings = settings._replace(epochs=1)
    *_, model = finetuning.train_epochs(backbone, images, labels, 1e-3, 0, FLOAT32, settings)
    moved = [not torch.equal(value, before[name]) for name, value in model[0].state_dict().items()]
    assert all(moved) and not model[0].training
    *_, model = finetuning.train_epochs(backbone, images, labels, 0.0, 0, FLOAT32, settings)
    scores = finetuning.predict_scores(model, images, "cpu", FLOAT32)
    x = finetuning.predict_scores(backbone.eval(), images, "cpu", FLOAT32)
    mean, matrix, scale = whitening(x)
    x = (x - mean) @ matrix
    probe = fit(x, labels, 1e-2 * scale, (torch.zeros(16, 2), torch.zeros(2)))
    assert torch.allclose(scores, logits(x, probe), atol=1e-3)


def test_finetune_is_a_row_of_the_table(command, tmp_path):
    options = photographs(tmp_path, "ab")
    done = command("eval_linear.py", **options, out_dir=tmp_path, finetune=True, finetune_epochs=1)
    assert done.returncode == 0, done.stderr
    assert "| finetune | lr " in done.stdout
    result = json.loads((tmp_path / "eval_linear.json").read_text())["results"]["finetune"]
    assert {"selected", "grid", "top1", "top5", "interval95"} == result.keys() and len(result["grid"]) == 3
