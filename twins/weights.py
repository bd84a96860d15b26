"""Weights as people have them: exports, official DINO and DINOv2 files, timm's, however they are wrapped."""

from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors

from twins.errors import UserError, first_line
from twins.files import load_pickle, read_json, sha256

CLASSIFIERS = ("head", "head_dist", "fc", "fc_norm", "mask_token")  # no part of the features


def read_weights(path, network="", heads=0):
    """A file or export folder -> (state dict of timm's names, arguments of vit.ViT, what is known of it).

    network: which one, where there are several; '': the teacher. heads: attention heads, where the file does
    not say; 0: width / 64, as in all official ViTs. LayerScale is folded into the layer before it. Raises
    UserError for anything but one ViT whose every tensor is known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    tensors, known = read_tensors(path)
    state, known["network"] = choose_network(tensors, path, network)
    dropped = sorted({name.split(".")[0] for name in state if name.split(".")[0] in CLASSIFIERS})
    if dropped:
        print(f"{path}: {', '.join(dropped)} left out, the backbone alone is used")
    state = {name: value for name, value in state.items() if name.split(".")[0] not in CLASSIFIERS}
    fold_layer_scale(state)
    heads = known.pop("heads", 0) or heads
    if not heads:
        heads = max(state["cls_token"].shape[-1] // 64, 1)
        print(f"{path} does not say its number of attention heads: guessed {heads}, width / 64")
    return state, architecture(state, heads, path), known


def read_tensors(path):
    """{dotted name: tensor} of all tensors in a file, however nested, and what is known of them."""
    known, file = {}, path
    if path.is_dir():
        file, about = path / "model.safetensors", read_json(path / "config.json")
        model_args = about.get("model_args")
        if isinstance(model_args, dict) and type(model_args.get("num_heads")) is int:
            known["heads"] = model_args["num_heads"]
        for name in ("script", "step", "dataset", "data_dir", "seed"):
            if name in about:
                known[name] = about[name]
        if not file.exists():
            raise UserError(f"{file} does not exist")
        known["sha256"] = about.get("sha256")
    if file.suffix == ".safetensors":
        content, expected = file.read_bytes(), known.pop("sha256", None)
        if expected and expected != sha256(content):
            raise UserError(f"{file} is damaged: its checksum is not that of config.json")
        try:
            return from_safetensors(content), known
        except Exception as error:  # safetensors raises its own kind
            raise UserError(f"{file} is damaged ({first_line(error)})") from None
    return flatten(load_pickle(file)), known


def flatten(content, prefix=""):
    """Nested dicts -> {dotted name: tensor}; what is no tensor is left out."""
    tensors = {}
    for name, value in content.items():
        if isinstance(value, dict):
            tensors.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value
    return tensors


def choose_network(tensors, path, network):
    """The state dict of one ViT, found by its cls_token, and its name. Raises UserError if ambiguous."""
    prefixes = [name.removesuffix("cls_token") for name in tensors if name.split(".")[-1] == "cls_token"]
    if not prefixes:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(f"{path} holds no ViT of timm's key names (no cls_token; its tensors: {first} ...)")
    chosen = prefixes
    if network or len(prefixes) > 1:
        chosen = [prefix for prefix in prefixes if (network or "teacher") in prefix.split(".")]
    if len(chosen) != 1:
        names = ", ".join(prefix.rstrip(".") or "the file itself" for prefix in prefixes)
        raise UserError(f"--weights={network or 'teacher'} is not one network of {path}, which holds {names}")
    prefix = chosen[0]
    state = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return state, prefix.split(".")[0] or "the file's"


def fold_layer_scale(state):
    """gamma (W x + b) = (gamma W) x + gamma b: DINOv2's LayerScale becomes part of the layer before it."""
    for name in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block = name.rsplit(".", 2)[0]
        layer = f"{block}.attn.proj" if ".ls1." in name else f"{block}.mlp.fc2"
        gamma = state.pop(name)
        for part, factor in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
            if part in state:
                state[part] = factor * state[part]


def architecture(state, heads, path):
    """The arguments of vit.ViT for a state dict of timm's names; DINOv2's registers as timm has them."""
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    try:
        patch_size, dim = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} holds no ViT of timm's key names ({first_line(error)} is missing)") from None
    if registers and int(grid.shape[1] ** 0.5) ** 2 == grid.shape[1]:  # positions without the registers
        state["pos_embed"] = torch.cat([cls, torch.zeros_like(state["reg_token"]), grid], dim=1)
    side = int((state["pos_embed"].shape[1] - 1 - registers) ** 0.5)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    args = {"image_size": side * patch_size, "patch_size": patch_size, "dim": dim, "depth": depth}
    return {**args, "heads": heads, "registers": registers}


def build(vit, state, args, path):
    """vit(**args) with these weights. Raises UserError naming the tensors that do not fit."""
    try:
        backbone = vit(**args)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    expected = backbone.state_dict()
    unknown = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    missing = [name for name in expected if name not in state]
    if unknown or missing:
        words = f"unknown: {', '.join(unknown[:4]) or 'none'}; missing: {', '.join(missing[:4]) or 'none'}"
        raise UserError(f"{path} is not a ViT as vit.py has it ({words})")
    backbone.load_state_dict(state)
    return backbone


def start_from(script, vit):
    """Sets a training script's architecture options, its globals, to those of --init; returns its weights.

    Positions are interpolated to image_size. Raises UserError for register tokens, which the scripts lack.
    """
    path = script["init"]
    state, args, _ = read_weights(path)
    if args.pop("registers"):
        raise UserError(f"--init={path} has register tokens (reg_token): the training scripts have none")
    backbone = build(vit, state, args, path)
    side = script["image_size"] // args["patch_size"]
    state["pos_embed"] = backbone.positions(side, side).detach()
    for name in ("patch_size", "dim", "depth", "heads"):
        script[name] = script["config"][name] = args[name]
    return state
