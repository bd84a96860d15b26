"""What the evaluation scripts share: their options, and the backbone that --ckpt names."""

import importlib
from pathlib import Path

from safetensors.torch import load as from_safetensors

from twins.errors import ROOT, UserError, first_line
from twins.files import load_checkpoint, load_pickle, read_checkpoint, read_json, sha256
from twins.keys import convert, parse

ACCEPTED = "give a run's folder or ckpt.pt, an export folder, an official DINO .pth, or random"


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
    for name in ("data_dir", "out_dir"):
        if config[name]:
            config[name] = str(Path(config[name]).expanduser())
    config = {name: convert(name, options[name], value) for name, value in config.items()}
    script.update(config)
    return config


def load_backbone(config, device, vit):
    """The backbone that --ckpt names, in evaluation mode, and {script, step, dataset, network ...} of it.

    vit: the class to build, unless the checkpoint names one of its own in a file beside the scripts. Raises
    UserError for anything but a run's folder or ckpt.pt, an export folder, an official DINO .pth, or
    'random'.
    """
    path, about = Path(config["ckpt"]).expanduser(), {"ckpt": config["ckpt"]}
    if config["ckpt"] == "random":
        args = {name: config[name] for name in ("patch_size", "dim", "depth", "heads")}
        about.update(image_size=config["image_size"] or 32, data_dir="data")
        return vit(about["image_size"], **args).to(device).eval(), about
    if not path.exists():
        raise UserError(f"--ckpt={path} does not exist: {ACCEPTED}")
    if path.is_dir() and (path / "model.safetensors").exists():
        state, args = read_export(path, about)
    elif path.is_dir() or is_run(path):
        state, args, vit = read_run(path, config["weights"], about, device, vit)
    else:
        state, args = read_foreign(path, config, about, device)
    try:
        backbone = vit(**args)
        backbone.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"--ckpt={path} holds no ViT of timm's key names ({first_line(error)})") from None
    about["image_size"] = args["image_size"]
    return backbone.to(device).eval(), about


def is_run(path):
    try:
        read_checkpoint(path)
        return True
    except UserError:
        return False


def read_run(path, weights, about, device, vit):
    """A training script's checkpoint: its backbone's state dict, the arguments of its class, the class."""
    saved, path, problem = (
        load_checkpoint(path, device) if path.is_dir() else (read_checkpoint(path, device), path, "")
    )
    if problem:
        print(f"warning: {problem}; using the checkpoint before it")
    known = saved["backbone"]
    network, _, inner = known["name"].partition(".")
    network = weights or network
    if network not in saved:
        networks = [
            name
            for name, value in saved.items()
            if isinstance(value, dict) and name not in ("config", "backbone", "optimizer")
        ]
        raise UserError(f"--weights={network}: {path} holds {' and '.join(networks)}")
    prefix = f"{inner}." if inner else ""
    state = {
        name.removeprefix(prefix): value for name, value in saved[network].items() if name.startswith(prefix)
    }
    about.update(script=saved["script"], step=saved["step"], network=network)
    about.update({name: saved["config"][name] for name in ("dataset", "data_dir", "seed")})
    if known["args"] is None:
        raise UserError(
            f"{path} does not say how to build its backbone: give it an attribute `args`, as vit.ViT has"
        )
    if (ROOT / f"{known['module']}.py").exists():
        vit = getattr(importlib.import_module(known["module"]), known["class"])
    return state, known["args"], vit


def read_export(path, about):
    """An export folder: the state dict of the backbone and the arguments of its class."""
    saved = read_json(path / "config.json")
    try:
        state = from_safetensors((path / "model.safetensors").read_bytes())
    except Exception as error:  # safetensors raises its own kind
        raise UserError(f"{path}/model.safetensors is damaged ({first_line(error)})") from None
    if saved.get("sha256", sha256(path / "model.safetensors")) != sha256(path / "model.safetensors"):
        raise UserError(f"{path}/model.safetensors is damaged: its checksum is not that of config.json")
    known = ("script", "step", "dataset", "data_dir", "seed")
    about.update({name: saved[name] for name in known if name in saved})
    if "backbone" in saved:
        about["network"] = saved["backbone"].partition(".")[0]
    if "model_args" not in saved:
        raise UserError(f"{path}/config.json has no model_args: give the run's ckpt.pt")
    return state, architecture(state, saved["model_args"]["num_heads"])


def read_foreign(path, config, about, device):
    """A state dict of timm's names, alone or as official DINO saves it, and the arguments of its class."""
    saved = load_pickle(path, device)
    state = saved.get(config["weights"] or "teacher", saved.get("student", saved))
    state = {
        name.split("backbone.")[-1]: value for name, value in state.items() if "backbone." in name
    } or state
    if "cls_token" not in state:
        raise UserError(f"--ckpt={path} holds no ViT of timm's key names")
    about["network"] = config["weights"] or "teacher"
    return state, architecture(
        state, max(state["cls_token"].shape[-1] // 64, 1)
    )  # heads of every official DINO ViT


def architecture(state, heads):
    """The arguments of vit.ViT for a state dict of timm's key names."""
    try:
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        side = int((state["pos_embed"].shape[1] - 1 - registers) ** 0.5)
        args = {
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "dim": state["cls_token"].shape[-1],
            "depth": depth,
        }
        args.update(heads=heads, registers=registers, layer_scale="blocks.0.ls1.gamma" in state)
    except (KeyError, AttributeError) as error:
        raise UserError(f"no ViT of timm's key names ({first_line(error)})") from None
    return args


def random_like(backbone, device):
    """A backbone of the same architecture with random weights: the floor of every comparison."""
    return type(backbone)(**backbone.args).to(device).eval()


def trained_on(config, about):
    """The data set to evaluate on and its folder: those given, else those the run was trained on, else ''."""
    return config["dataset"] or about.get("dataset", ""), config["data_dir"] or about.get("data_dir", "data")


def output_folder(config, ckpt, dataset):
    """Where results go: --out_dir, else next to the checkpoint."""
    path = Path(ckpt).expanduser()
    beside = f"out/random-{dataset}" if ckpt == "random" else path if path.is_dir() else path.parent
    return Path(config["out_dir"] or beside)
