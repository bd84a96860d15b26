"""Files written completely or not at all, folders with one writer, JSON read strictly; the git commit."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path

from twins.decoding import locked
from twins.errors import ROOT, UserError, first_line


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


def write_results(file, results):
    """Writes a JSON file; the results that it replaces, if any, stay in <name>-previous.json."""
    previous = file.with_name(f"{file.stem}-previous.json")
    if file.exists():
        print(f"\nearlier results: {previous}")
    write_file(file, json.dumps(results, indent=1), previous)


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


def read_text(path, errors="strict"):
    """A file's text in UTF-8. Raises OSError for what is not a file: opening a FIFO would block."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return path.read_text(encoding="utf-8", errors=errors)


def read_json(path):
    """A JSON file that holds an object, as a dict. Raises UserError for anything else."""
    try:
        content = json.loads(read_text(path))
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
        lines = read_text(path, errors="replace").splitlines() if path.exists() else []
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
