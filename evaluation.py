"""What the evaluation scripts share: their keys, and the backbone that --ckpt names."""

from pathlib import Path

from safetensors.torch import load as from_safetensors

from common import UserError, check, first_line, read_json, read_keys
from run import load_pickle
from vit import ViT


def configure_evaluation(script):
    """Reads --key=value into an evaluation script's globals. Returns every key with its value; --ckpt must be given.

    PRESETS[dataset] holds for --ckpt=random alone: a checkpoint knows its own architecture.
    """
    keys, given = read_keys(script)
    if not given.get("ckpt"):
        raise UserError("--ckpt is missing: give a run's ckpt.pt, its export/, an official DINO .pth, or random")
    preset = script["PRESETS"].get(given.get("dataset"), {}) if given["ckpt"] == "random" else {}
    config = keys | preset | given
    config |= {key: str(Path(config[key]).expanduser()) for key in ("data_dir", "out_dir") if config[key]}
    check(config)
    script.update(config)
    return config


def load_backbone(config, device):
    """The ViT that --ckpt names, in evaluation mode, and what is known of it: {script, step, dataset, data_dir, image_size ...}.

    A run's ckpt.pt, an export folder, an official DINO .pth, or 'random'. Raises UserError for anything else.
    """
    path, about, heads = Path(config["ckpt"]), {"ckpt": config["ckpt"], "weights": config["weights"]}, config["heads"]
    if config["ckpt"] == "random":
        about |= {"image_size": config["image_size"] or 32, "data_dir": "data"}
        return ViT(about["image_size"], config["patch_size"], config["dim"], config["depth"], heads).to(device).eval(), about
    if path.is_dir():
        saved = read_json(path / "config.json")
        if "model_args" not in saved or not (path / "model.safetensors").exists():
            raise UserError(f"--ckpt={path} is no export folder: give a run's ckpt.pt or its export/")
        try:
            state, heads = from_safetensors((path / "model.safetensors").read_bytes()), saved["model_args"]["num_heads"]
        except Exception as error:
            raise UserError(f"{path}/model.safetensors is damaged ({first_line(error)})") from None
        about |= {k: saved[k] for k in ("script", "step", "dataset", "data_dir", "seed") if k in saved}
    elif path.exists():
        saved = load_pickle(path, device)
        state = saved.get(config["weights"], saved.get("student", saved))
        state = {k.split("backbone.")[-1]: v for k, v in state.items() if "backbone." in k} or state
        if "script" in saved:
            heads = saved["config"]["heads"]
            about |= {k: saved[k] for k in ("script", "step")} | {k: saved["config"][k] for k in ("dataset", "data_dir", "seed")}
        elif "cls_token" in state:
            heads = max(state["cls_token"].shape[-1] // 64, 1)  # of every official DINO ViT
    else:
        raise UserError(f"--ckpt={path} is not there: give a run's ckpt.pt, its export/, an official DINO .pth, or random")
    try:
        patch, depth = state["patch_embed.proj.weight"].shape[-1], len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        about["image_size"] = int((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
        backbone = ViT(about["image_size"], patch, state["cls_token"].shape[-1], depth, heads)
        backbone.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"--ckpt={path} holds no ViT of timm's key names ({first_line(error)})") from None
    return backbone.to(device).eval(), about


def random_like(backbone, config, image_size, device):
    """A backbone of the same shape with random weights, the floor, and what is known of it: as load_backbone()."""
    shape = {"patch_size": backbone.patch_size, "dim": backbone.dim, "depth": len(backbone.blocks)}
    shape |= {"heads": backbone.blocks[0].attn.heads, "image_size": image_size}
    return load_backbone(config | shape | {"ckpt": "random"}, device)


def trained_on(config, about):
    """The data set to evaluate on and its folder: those that were given, else those the run was trained on, else ''."""
    return config["dataset"] or about.get("dataset", ""), config["data_dir"] or about.get("data_dir", "data")


def output_folder(config, ckpt, dataset):
    """Where results go: --out_dir, else next to the checkpoint."""
    beside = f"out/random-{dataset}" if ckpt == "random" else ckpt if Path(ckpt).is_dir() else Path(ckpt).parent
    return Path(config["out_dir"] or beside)
