"""Backbones with weights: of runs, of exports and files; what --ckpt and --init name; the export."""

import contextlib
import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors

from twins.checkpoints import holds_run, is_checkpoint, load_checkpoint, load_pickle
from twins.errors import ROOT, UserError
from twins.files import sha256, write_file
from twins.weight_files import read_weights

SIZES = ("image_size", "patch_size", "dim", "depth", "heads", "registers")  # of a ViT; a fork may lack some


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
    if not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in saved[network].items()):
        raise UserError(f"{path}: {network} is not a state dict, which holds names and tensors")
    args = backbone.get("args")
    sizes = [args.get(name, 1) for name in SIZES] if isinstance(args, dict) and "image_size" in args else [""]
    if not all(type(size) is int for size in sizes):
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


def write_export(folder, backbone, about):
    """A backbone as safetensors with timm's names; config.json with `about`, checksum, timm's arguments."""
    state = backbone.state_dict()
    content = to_safetensors({name: value.detach().cpu().contiguous() for name, value in state.items()})
    if hasattr(backbone, "timm_args"):
        about["model_args"] = backbone.timm_args()
    about["sha256"] = sha256(content)
    write_file(folder / "model.safetensors", content)
    write_file(folder / "config.json", json.dumps(about, indent=1))


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
    state, kind, args, metadata = read_backbone(path, "", given.get("heads", 0), vit)
    if kind is not vit:
        print(f"warning: --init={path} holds a {kind.__name__}, read as {vit.__name__}: features may differ")
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
