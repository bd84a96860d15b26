"""Weights in all common forms: exports, official DINO and DINOv2 files, timm's, however they are wrapped."""

import contextlib
import importlib
import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from twins.errors import ROOT, UserError, first_line
from twins.files import is_checkpoint, load_checkpoint, load_pickle, read_json, sha256, write_file
from twins.keys import holds_run

AVERAGED = re.compile(r"(^|[._])(teacher|ema|momentum)([._]|$)")  # a network that averages another's weights
CLASSIFIERS = ("head", "head_dist", "fc", "fc_norm", "mask_token")  # not part of the features


def read_backbone(path, network, heads, vit):
    """A run, an export folder or a file -> (state dict, class, its arguments, metadata).

    network, heads: as in read_weights(). vit: the class, unless a run names another one in a file beside the
    scripts. Raises UserError for anything else, and for heads that contradict the file.
    """
    saved, file = read_saved(path)
    if is_checkpoint(saved):
        state, vit, args, metadata = backbone_of(saved, file, network, vit)
    else:
        state, args, metadata = read_weights(path, network, heads, saved)
    if heads and args.get("heads", heads) != heads:
        raise UserError(f"--heads={heads}: {path} says that it has {args['heads']}, leave --heads out")
    return state, vit, args, metadata


def read_saved(path):
    """The content of a run's folder or a file that torch.save wrote, {} for others; its path."""
    if path.is_dir():
        if not holds_run(path):
            return {}, path
        saved, path, problem = load_checkpoint(path)
        if problem:
            print(f"warning: {problem}; using the checkpoint before it")
        return saved, path
    return load_pickle(path) if path.is_file() and path.suffix != ".safetensors" else {}, path


def backbone_of(saved, path, network, vit):
    """A run's backbone: its state dict, class and arguments; metadata {script, step, dataset ...}."""
    backbone = saved["backbone"]
    evaluated, _, inner = backbone["name"].partition(".")
    network = network or evaluated
    cls_token = f"{inner}.cls_token".lstrip(".")
    networks = [name for name, value in saved.items() if isinstance(value, dict) and cls_token in value]
    if network not in networks:
        raise UserError(f"--weights={network}: {path} holds {' and '.join(networks)}")
    if not all(isinstance(name, str) for name in saved[network]):
        raise UserError(f"{path}: {network} is not a state dict, some of its keys are not names")
    args = backbone.get("args")
    if not isinstance(args, dict) or type(args.get("image_size")) is not int:
        problem = "does not say how to build its backbone"
        raise UserError(f"{path} {problem}: give it `args` with image_size and the rest, as vit.ViT has")
    prefix = f"{inner}." if inner else ""
    state = {name.removeprefix(prefix): x for name, x in saved[network].items() if name.startswith(prefix)}
    metadata = {"script": saved["script"], "step": saved["step"], "network": network}
    metadata.update({name: saved["config"].get(name, "") for name in ("dataset", "data_dir", "seed")})
    module = saved["script"] if backbone["module"] == "__main__" else backbone["module"]
    if (module, backbone["class"]) != ("vit", "ViT"):  # a fork's, which may compute something else
        vit = getattr(import_own(module), backbone["class"], None)
        if not (isinstance(vit, type) and issubclass(vit, torch.nn.Module)):
            remedy = "put it beside the scripts, in a package (__init__.py) if it is in a folder"
            raise UserError(f"{path} needs the class {backbone['class']} of {module}: {remedy}")
    return state, vit, args, metadata


def import_own(module):
    """A module beside the scripts or of a package there, else None: a run's script.py is data, not code."""
    *packages, name = module.split(".")
    folder, files = ROOT, []
    for package in packages:
        folder = folder / package
        files.append(folder / "__init__.py")
    files.append(folder / f"{name}.py")
    if module.replace(".", "").isidentifier() and all(file.is_file() for file in files):
        return importlib.import_module(module)
    return None


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


def write_export(folder, backbone, about):
    """A backbone as safetensors with timm's names; config.json with `about`, checksum, timm's arguments."""
    state = backbone.state_dict()
    content = to_safetensors({name: value.detach().cpu().contiguous() for name, value in state.items()})
    if hasattr(backbone, "timm_args"):
        about["model_args"] = backbone.timm_args()
    about["sha256"] = sha256(content)
    write_file(folder / "model.safetensors", content)
    write_file(folder / "config.json", json.dumps(about, indent=1))


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


def build(vit, state, args, path):
    """vit(**args) with these weights. Raises UserError naming those that do not fit or are not finite."""
    needed = {}
    with contextlib.suppress(Exception), torch.device("meta"):  # in a fork's class this may be impossible
        needed = vit(**args).state_dict()
    for name in [name for name in needed if name in state]:  # before a wrong size takes gigabytes
        pair = state[name], needed[name]
        if len({(x.shape, x.is_floating_point(), x.is_complex()) for x in pair}) > 1:
            given, wanted = (f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in pair)
            raise UserError(f"{path}: {name} is {given}, the network has {wanted}")
    try:
        backbone = vit(**args)
        backbone.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:500]}") from None
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or inf")
    return backbone


def start_from(script, config, vit):
    """Sets the architecture in a training script's globals and config to that of --init; returns its weights.

    Positions are interpolated to image_size. Raises UserError for options that contradict the file, and for
    register tokens, which the scripts lack.
    """
    path, given = Path(script["init"]), script["__given__"]
    state, _, args, metadata = read_backbone(path, "", given.get("heads", 0), vit)
    if args.get("registers"):
        raise UserError(f"--init={path} has register tokens (reg_token): the training scripts have none")
    backbone = build(vit, state, args, path)
    for name in ("patch_size", "dim", "depth", "heads"):
        if given.get(name, args[name]) != args[name]:
            raise UserError(f"--{name}={given[name]}: --init={path} has {args[name]}, leave --{name} out")
        script[name] = config[name] = args[name]
    side = max(script["image_size"] // args["patch_size"], 1)  # the script checks both sizes next
    state["pos_embed"] = backbone.positions(side, side).detach()
    print(f"--init: {metadata['network']} of {path}, {args}")
    if args["image_size"] != script["image_size"]:
        print(f"--init: positions are interpolated to --image_size={script['image_size']}")
    return state
