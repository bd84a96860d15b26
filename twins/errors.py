"""User mistakes, reported in one sentence, and bugs, reported by a traceback."""

import traceback
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


class UserError(ValueError):
    """A mistake that one sentence explains: a configured script prints the sentence and exits with code 1."""


def first_line(error):
    """The first line of an exception's message, or its type's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def close_bars():
    """Closes all progress bars: left open, they would print after the last sentence."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def is_sentence(error, trace):
    """True for a UserError, and for a ValueError that a file beside the scripts raises, such as vit.py."""
    if type(error) is ValueError and trace:
        last = traceback.extract_tb(trace)[-1]
        return last.line.startswith("raise ") and Path(last.filename).resolve().parent == ROOT  # else a bug
    return isinstance(error, UserError)
