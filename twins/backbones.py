"""What the evaluation scripts share: their options, and the backbone that --ckpt names."""

import os
from pathlib import Path

from twins.errors import UserError
from twins.files import make_folder
from twins.keys import parse
from twins.weights import build, read_backbone

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
    if not os.path.exists(path):
        raise UserError(f"--ckpt={path} does not exist: {ACCEPTED}")
    state, vit, args, known = read_backbone(path, config["weights"], config.get("heads", 0), vit)
    backbone = build(vit, state, args, path)
    return backbone.to(device).eval(), {**about, **known, "image_size": args["image_size"]}


def name_in(modules, backbone):
    """The backbone's name in a run's {name: module}, such as teacher.backbone. Raises UserError."""
    for name, outer in modules.items():
        for inner, module in outer.named_modules():
            if module is backbone:
                return f"{name}.{inner}".rstrip(".")
    raise UserError("the backbone to evaluate is in none of the modules that the run's checkpoint holds")


def random_like(backbone, device):
    """A backbone of the same architecture with random weights: the floor of every comparison."""
    return type(backbone)(**backbone.args).to(device).eval()


def trained_on(config, about):
    """The data set to evaluate on and its folder: those given, else those the run was trained on."""
    dataset = config["dataset"] or about.get("dataset")
    data_dir = config["data_dir"] or about.get("data_dir", "data")
    if not (dataset and isinstance(dataset, str) and isinstance(data_dir, str)):
        raise UserError(f"--ckpt={config['ckpt']} does not say its data: give --dataset and --data_dir")
    return dataset, data_dir


def output_folder(config, ckpt, dataset):
    """Where results go, made if it is not there: --out_dir, else next to the checkpoint. Raises UserError."""
    path = Path(ckpt)
    beside = f"out/random-{dataset}" if ckpt == "random" else path if path.is_dir() else path.parent
    return make_folder(config["out_dir"] or beside)
