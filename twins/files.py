"""Files written completely or not at all; checkpoints read without running code; the git commit."""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path, PurePosixPath

import torch

from twins.decoding import locked
from twins.errors import ROOT, UserError, first_line

CHECKPOINT = {"script": str, "step": int, "seconds": float, "config": dict, "backbone": dict}
BACKBONE = ("name", "module", "class")
PATHS = [(PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]  # Python 3.13


def write_file(path, content, previous=None):
    """Writes bytes or str atomically, else UserError; `previous`, the old file, is deleted on a full disk."""
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode(errors="replace"))
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # it would fill the disk
        full = (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        if error.errno in full and previous and previous.exists() and path.exists():
            previous.unlink()
            return write_file(path, content, previous)
        raise UserError(f"{path} cannot be written ({error.strerror}); earlier files are unchanged") from None


def make_folder(path):
    """Makes a folder if it does not exist; returns its Path. Raises UserError if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "it is read-only")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    return path


@contextlib.contextmanager
def only_writer(folder, hint="give another --out_dir"):
    """Makes a folder and keeps other runs and studies from writing there. Raises UserError if one does.

    Yields a function to call before writing, claim(check): if the folder was moved or deleted, it makes and
    locks another one, unless check(folder) raises, because there is a new run in its place.
    """
    identity = None

    def claim(check=lambda folder: None):
        nonlocal identity
        with contextlib.suppress(OSError):
            if identity and os.path.samestat(os.stat(folder), identity):
                return
        with contextlib.ExitStack() as new:
            try:
                new.enter_context(locked(make_folder(folder), wait=False))
            except BlockingIOError:
                raise UserError(f"another process is writing into {folder}: {hint}") from None
            check(folder)
            if identity:
                print(f"warning: {folder} was moved or deleted while this run wrote there: it is made again")
            identity = os.stat(folder)
            held.enter_context(new.pop_all())

    with contextlib.ExitStack() as held:
        claim()
        yield claim


def read_json(path):
    """A JSON file that holds an object, as a dict. Raises UserError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = "it holds no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", "") or first_line(error)
    raise UserError(f"{path} cannot be read ({problem})")


def read_json_lines(path, is_sound, cut_off=False):
    """A file's rows of JSON, [] without it. UserError unless is_sound(row); `cut_off`: except the last."""
    rows = []
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, allow_nan=False)  # ValueError for NaN
            sound = is_sound(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if sound:
            rows.append(row)
        elif not cut_off or i < len(lines):
            raise UserError(f"line {i} of {path} is broken, or of another version: fix or remove it")
    return rows


def read_log(path):
    """A log's rows, dicts with `step`; the last may be cut off. Raises UserError for another broken line."""
    return read_json_lines(path, lambda row: type(row["step"]) is int, cut_off=True)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_state():
    """{git_commit: of this checkout, '' without git, git_edited: tracked files changed, not in results/}."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except OSError:  # git is not installed
        commit, changes = "", ""
    return {"git_commit": commit, "git_edited": bool(changes)}


def load_pickle(path, device="cpu"):
    """A dict written by torch.save; checksums are verified, no code is run. Raises UserError otherwise."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *PATHS]):  # DINO's arguments
            saved = torch.load(path, map_location=device, weights_only=True)
        broken = zipfile.is_zipfile(path) and damaged_entry(zipfile.ZipFile(path))
    except Exception as error:  # torch and zipfile raise many types
        code = re.search(r"GLOBAL (\S+) was not", str(error))
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
