"""Files of weights in all common forms: exports, official DINO and DINOv2, timm, however they are wrapped."""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors

from twins.errors import UserError, first_line
from twins.files import read_json, sha256

AVERAGED = re.compile(r"(^|[._])(teacher|ema|momentum)([._]|$)")  # a network that averages another's weights
CLASSIFIERS = ("head", "head_dist", "fc", "fc_norm", "mask_token")  # not part of the features


def read_weights(path, network, heads, saved):
    """A file or export folder -> (state dict with timm's names, arguments of vit.ViT, metadata).

    network: which one, if there are several; '': the teacher. heads: attention heads, if the file does not
    say; 0: guess_heads(). saved: the file's content if torch.save wrote it. LayerScale is folded into the
    preceding layer. Raises UserError for anything but one ViT with only known tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    tensors, metadata = read_tensors(path, saved)
    state, metadata["network"], dropped = choose_network(tensors, path, network)
    dropped += sorted({part for name in tensors for part in name.split(".") if part in CLASSIFIERS})
    if dropped:
        print(f"{path}: {metadata['network']} is used, without {', '.join(dropped)}")
    state = {name: value for name, value in state.items() if name.split(".")[0] not in CLASSIFIERS}
    check_tensors(state, path)
    state = {name: value if value.dtype == torch.float64 else value.float() for name, value in state.items()}
    fold_layer_scale(state)
    heads = metadata.pop("heads", 0) or heads
    if not heads:
        heads = guess_heads(state["cls_token"].shape[-1], metadata["network"])
        print(f"{path} does not say its number of heads: guessed {heads}; --heads sets it")
    return state, architecture(state, heads, path), metadata


def check_tensors(state, path):
    """Raises UserError for tensors that are not plain numbers, and for a ViT with odd shapes."""
    for name, value in state.items():
        kind = value.dtype if value.layout == torch.strided else value.layout
        if value.is_meta or not value.is_floating_point() or value.layout != torch.strided:
            raise UserError(f"{path}: {name} is {'meta' if value.is_meta else kind}, not plain numbers")
    shapes = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "norm.weight": 1}
    for name, ndim in shapes.items():
        if name not in state or state[name].ndim != ndim:
            problem = f"is {list(state[name].shape)}" if name in state else "is missing"
            raise UserError(f"{path} is not a ViT with timm's key names: {name} {problem}")


def guess_heads(dim, network):
    """Width / 64, as most official ViTs have; 16 for a ViT-H (MAE, timm), 12 for MoCo v3's ViT-S."""
    if dim == 384 and network.endswith(("momentum_encoder", "base_encoder")):
        return 12
    return 16 if dim == 1280 else max(dim // 64, 1)


def read_tensors(path, saved):
    """{dotted name: tensor} of all tensors in a file, however nested, and metadata."""
    metadata = {}
    file = path
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} is neither a run nor an export (no config.json): give one of its files")
        file = path / "model.safetensors"
        if not file.exists():
            missing = "holds no ckpt.pt and no model.safetensors: its run has saved nothing yet"
            raise UserError(f"{path} {missing}")
        config = read_json(path / "config.json")
        model_args = config.get("model_args")
        if isinstance(model_args, dict) and type(model_args.get("num_heads")) is int:
            metadata["heads"] = model_args["num_heads"]
        names = ("script", "step", "dataset", "data_dir", "seed", "sha256")
        metadata.update({name: config[name] for name in names if name in config})
    if not file.is_file():  # a FIFO would block
        raise UserError(f"{file} is not a file")
    if file.suffix == ".safetensors":
        content = file.read_bytes()
        checksum = metadata.pop("sha256", None)
        if checksum and checksum != sha256(content):
            problem = "is damaged, or from another save than config.json: its checksum differs"
            raise UserError(f"{file} {problem}; give the run's folder if you have it")
        try:
            return from_safetensors(content), metadata
        except Exception as error:  # safetensors raises its own type
            raise UserError(f"{file} is damaged ({first_line(error)})") from None
    try:
        return flatten(saved, file), metadata
    except RecursionError:
        raise UserError(f"{file} holds a dict that contains itself") from None


def flatten(content, path, prefix=""):
    """Nested dicts -> {dotted name: tensor} without the prefixes that DDP and torch.compile add."""
    tensors = {}
    for key, value in content.items():
        name = ".".join(part for part in f"{prefix}{key}".split(".") if part not in ("module", "_orig_mod"))
        if isinstance(value, dict):
            new = flatten(value, path, f"{name}." if name else "")
        else:
            new = {name: value} if isinstance(value, torch.Tensor) else {}
        for duplicate in tensors.keys() & new.keys():
            raise UserError(f"{path} holds two tensors named {duplicate}: which one is meant is unclear")
        tensors.update(new)
    return tensors


def choose_network(tensors, path, network):
    """One ViT, by its cls_token: its state dict, its name, the names of the others. Raises UserError."""
    prefixes = [name.removesuffix("cls_token") for name in tensors if name.split(".")[-1] == "cls_token"]
    if not prefixes:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(f"{path} holds no ViT of timm's key names (no cls_token; its tensors: {first} ...)")
    if network:
        matches = [prefix for prefix in prefixes if network in prefix.split(".")]
    else:
        matches = [prefix for prefix in prefixes if len(prefixes) == 1 or AVERAGED.search(prefix)]
    if len(matches) != 1:
        names = ", ".join(prefix.rstrip(".") or "one without a name" for prefix in prefixes)
        wanted = network or "a teacher or another average"
        raise UserError(f"{path} holds the networks {names}: exactly one must be {wanted}")
    prefix = matches[0]
    state = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    names = [part for part in prefix.split(".")[:-1] if part not in ("state_dict", "model", "backbone")]
    name = network or ".".join(names) or "its only network"
    return state, name, [other.rstrip(".") for other in prefixes if other != prefix]


def fold_layer_scale(state):
    """gamma (W x + b) = (gamma W) x + gamma b: folds DINOv2's LayerScale into the preceding layer."""
    for name in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block = name.rsplit(".", 2)[0]
        layer = f"{block}.attn.proj" if ".ls1." in name else f"{block}.mlp.fc2"
        gamma, weight, bias = (state.get(key) for key in (name, f"{layer}.weight", f"{layer}.bias"))
        if weight is None or bias is None or not gamma.shape == weight.shape[:1] == bias.shape:
            continue  # build() reports it
        state[f"{layer}.weight"], state[f"{layer}.bias"] = gamma[:, None] * weight, gamma * bias
        del state[name]


def architecture(state, heads, path):
    """The arguments of vit.ViT for a state dict with timm's names; registers and positions become timm's.

    DINOv2 has no positions for its registers, timm's no_embed_class none for [CLS] either: they become 0.
    """
    if "register_tokens" in state and "reg_token" not in state:
        state["reg_token"] = state.pop("register_tokens")
    patch_size, dim = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    registers = state["reg_token"].shape[1] if getattr(state.get("reg_token"), "ndim", 0) == 3 else 0
    positions, grid = state["pos_embed"], state["pos_embed"].shape[1]
    sides = {n: math.isqrt(max(grid - n, 0)) for n in (1 + registers, 1, 0)}
    prefix = next((n for n, side in sides.items() if side and side**2 + n == grid), None)
    if prefix is None:
        raise UserError(f"{path}: pos_embed {list(positions.shape)} is not a square grid beside [CLS]")
    absent = positions.new_zeros(1, 1 + registers - prefix, positions.shape[2])
    state["pos_embed"] = torch.cat([positions[:, :prefix], absent, positions[:, prefix:]], dim=1)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    args = {"image_size": sides[prefix] * patch_size, "patch_size": patch_size, "dim": dim, "depth": depth}
    return {**args, "heads": heads, "registers": registers}
