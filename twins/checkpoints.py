"""Checkpoints: read without running code, verified, restored strictly; the one before is a spare."""

import argparse
import os
import re
import zipfile
from pathlib import Path, PurePosixPath

import torch
from torch.utils._pytree import tree_leaves

from twins.errors import UserError, first_line

CHECKPOINT = {"script": str, "step": int, "seconds": float, "config": dict, "backbone": dict}
BACKBONE = ("name", "module", "class")
PATHS = [(PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]  # Python 3.13


def holds_run(folder):
    """Whether a folder holds a run that --resume=True can continue."""
    return any(os.path.exists(folder / name) for name in ("ckpt.pt", "ckpt-previous.pt"))


def load_pickle(path, device="cpu"):
    """A dict written by torch.save; checksums are verified, no code is run. Raises UserError otherwise."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *PATHS]):  # DINO's arguments
            saved = torch.load(path, map_location=device, weights_only=True)
        broken = zipfile.is_zipfile(path) and damaged_entry(zipfile.ZipFile(path))
    except Exception as error:  # torch and zipfile raise many types
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path} is not loaded: it needs {code[1]}, and files may not run code") from None
        reason = "torch.save did not write it" if "Weights only" in str(error) else first_line(error)[:80]
        raise UserError(f"{path} is not a complete checkpoint ({reason})") from None
    if broken:
        raise UserError(f"{path} is damaged (in {broken})")
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(saved).__name__}")
    return saved


def damaged_entry(archive):
    """The name of a ZipFile's first damaged entry, None if all are sound. torch verifies no checksum."""
    folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 16]
    return folders[0] if folders else archive.testzip()  # torch skips entries marked as folders


def load_checkpoint(folder, device="cpu"):
    """A run's newest sound checkpoint: (its dict, its path, the problem of a newer one or '')."""
    newest, previous = Path(folder) / "ckpt.pt", Path(folder) / "ckpt-previous.pt"
    try:
        return read_checkpoint(newest, device), newest, ""
    except UserError as error:
        if not previous.exists():
            raise
        problem = str(error)
    try:
        return read_checkpoint(previous, device), previous, problem
    except UserError as error:
        raise UserError(f"{problem}; {error}; {folder}/export may be sound") from None


def read_checkpoint(path, device="cpu"):
    """A training script's checkpoint as a dict. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    saved = load_pickle(path, device)
    if not is_checkpoint(saved):
        raise UserError(f"{path} is not a checkpoint of a training script")
    return saved


def is_checkpoint(saved):
    """Whether a dict is what a training script saves."""
    rows = saved.get("first_row", [])
    n_rows = saved.get("n_rows", 0)
    sound = type(n_rows) is int and isinstance(rows, list) and len(rows) >= (n_rows > 0)
    sound = sound and all(isinstance(r, dict) and type(r.get("step")) is int for r in rows)
    sound = sound and all(type(saved.get(name)) is kind for name, kind in CHECKPOINT.items())
    return sound and saved["step"] >= 0 and all(type(saved["backbone"].get(n)) is str for n in BACKBONE)


def check_state(state):
    """Raises UserError for anything that a script's checkpoint cannot hold or restore."""
    for name, value in state.items():
        if name in CHECKPOINT or name in ("first_row", "n_rows"):
            raise UserError(f"state['{name}']: the name is reserved, choose another one")
        if not isinstance(value, torch.Tensor | str) and not hasattr(value, "load_state_dict"):
            kind = type(value).__name__
            raise UserError(
                f"state['{name}'] is a {kind}: it must be a tensor, a string or have a state_dict"
            )


def state_dicts(state):
    """What a checkpoint holds of a run's state: state dicts of modules and optimizers, else the value."""
    return {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}


def entry_not_finite(dicts):
    """The name of the first of state_dicts() that holds NaN or inf; '' if none does."""
    for name, content in dicts.items():
        tensors = [x for x in tree_leaves(content) if isinstance(x, torch.Tensor)]
        if not all(x.isfinite().all() for x in tensors):
            return name
    return ""


def describe_backbone(backbone, name):
    """How to build the module that is evaluated, and its name in the state, such as teacher.backbone."""
    kind, args = type(backbone), getattr(backbone, "args", None)
    return {"name": name, "module": kind.__module__, "class": kind.__name__, "args": args}


@torch.no_grad()
def restore_state(state, saved, path, config):
    """Loads a checkpoint into a run's state, strictly. Raises UserError naming options that differ."""
    try:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.copy_(saved[name].view_as(value))
            elif not isinstance(value, str):
                value.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        changed = {k for k, v in saved["config"].items() if config.get(k) != v}
        changed = sorted(changed - {"resume", "out_dir"})
        other = f": its run had other values of {', '.join(changed)}" if changed else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit{other} ({reason})") from None
    for name, value in state.items():
        if isinstance(value, str) and saved.get(name) != value:
            print(f"warning: the {name} changed since this run began: held-out images may be trained on")
