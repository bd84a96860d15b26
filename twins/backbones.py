"""What the evaluation scripts share: their options, and the backbone that --ckpt names."""

import importlib
from pathlib import Path

from twins.errors import ROOT, UserError
from twins.files import load_checkpoint, read_checkpoint
from twins.keys import convert, parse
from twins.weights import build, read_weights

ACCEPTED = "give a run's folder or ckpt.pt, an export folder, a file of weights, or random"


def configure_evaluation(script, argv=None):
    """Sets an evaluation script's options, its globals, from `argv` or the command line, as {name: value}.

    PRESETS[dataset] holds for --ckpt=random alone: a checkpoint knows its own architecture. Raises UserError
    without --ckpt.
    """
    options, preset, given = parse(script, argv, presets=["dataset"])
    if not given.get("ckpt"):
        raise UserError(f"--ckpt is missing: {ACCEPTED}")
    config = {name: option.default for name, option in options.items()}
    if given["ckpt"] == "random":
        config.update(preset)
    config.update(given)
    config = {name: convert(name, options[name], value) for name, value in config.items()}
    script.update(config)
    return config


def load_backbone(config, device, vit):
    """The backbone that --ckpt names, in evaluation mode, and {script, step, dataset, network ...} of it.

    vit: the class to build, unless a run's checkpoint names another one in a file beside the scripts. Raises
    UserError for what is neither a run, an export folder, a file of weights nor 'random'.
    """
    path, about = Path(config["ckpt"]), {"ckpt": config["ckpt"]}
    if config["ckpt"] == "random":
        args = {name: config[name] for name in ("patch_size", "dim", "depth")}
        args.update(heads=config["heads"] or 3, image_size=config["image_size"] or 32)
        return vit(**args).to(device).eval(), {**about, "image_size": args["image_size"], "data_dir": "data"}
    if not path.exists():
        raise UserError(f"--ckpt={path} does not exist: {ACCEPTED}")
    if is_run(path):
        state, args, vit, known = read_run(path, config["weights"], vit)
    else:
        state, args, known = read_weights(path, config["weights"], config["heads"])
    backbone = build(vit, state, args, path)
    return backbone.to(device).eval(), {**about, **known, "image_size": args["image_size"]}


def is_run(path):
    """True for a training script's folder or checkpoint, sound or not."""
    if path.is_dir():
        return (path / "ckpt.pt").exists() or (path / "ckpt-previous.pt").exists()
    try:
        read_checkpoint(path)
    except UserError:
        return path.name in ("ckpt.pt", "ckpt-previous.pt")
    return True


def read_run(path, network, vit):
    """A run's backbone: its state dict, arguments and class, and {script, step, dataset ...} of it."""
    if path.is_dir():
        saved, path, problem = load_checkpoint(path)
        if problem:
            print(f"warning: {problem}; using the checkpoint before it")
    else:
        saved = read_checkpoint(path)
    backbone = saved["backbone"]
    evaluated, _, inner = backbone["name"].partition(".")
    network = network or evaluated
    cls_token = f"{inner}.cls_token".lstrip(".")
    networks = [name for name, value in saved.items() if isinstance(value, dict) and cls_token in value]
    if network not in networks:
        raise UserError(f"--weights={network}: {path} holds {' and '.join(networks)}")
    if backbone["args"] is None:
        raise UserError(f"{path} does not say how to build its backbone: give it `args`, as vit.ViT has")
    prefix = f"{inner}." if inner else ""
    state = {name.removeprefix(prefix): x for name, x in saved[network].items() if name.startswith(prefix)}
    known = {"script": saved["script"], "step": saved["step"], "network": network}
    for name in ("dataset", "data_dir", "seed"):
        known[name] = saved["config"][name]
    if (ROOT / f"{backbone['module']}.py").exists():
        vit = getattr(importlib.import_module(backbone["module"]), backbone["class"])
    return state, backbone["args"], vit, known


def random_like(backbone, device):
    """A backbone of the same architecture with random weights: the floor of every comparison."""
    return type(backbone)(**backbone.args).to(device).eval()


def trained_on(config, about):
    """The data set to evaluate on and its folder: those given, else those the run was trained on, else ''."""
    return config["dataset"] or about.get("dataset", ""), config["data_dir"] or about.get("data_dir", "data")


def output_folder(config, ckpt, dataset):
    """Where results go: --out_dir, else next to the checkpoint."""
    path = Path(ckpt)
    beside = f"out/random-{dataset}" if ckpt == "random" else path if path.is_dir() else path.parent
    return Path(config["out_dir"] or beside)
