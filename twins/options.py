"""A script's options: the lower-case names at its top, read from its source, and values that fit them.

depth = 12  # blocks [1..]                                the default gives the type, the comment the meaning,
head = "shared"  # one Z for both losses [shared|two]     brackets at its end the limits or choices
"""

import ast
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from twins.errors import UserError

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
KINDS[tuple] = "numbers like 0.4,1.0"
LARGEST = 10**9  # whole number, if a comment sets no limit


class Option(NamedTuple):
    default: bool | int | float | str | tuple
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()


def read_options(path):
    """{name: Option} of a script: its top-level assignments of a constant to a lower-case name."""
    source = Path(path).read_text(encoding="utf-8-sig")
    options = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        if name[0] == "_" or not name.islower() or name == "help":
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:  # it is computed
            continue
        nested = type(default) is tuple and any(isinstance(value, tuple) for value in default)
        if type(default) in KINDS and not nested:
            line = source.splitlines()[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            options[name] = read_comment(default, line.partition("#")[2].strip())
    return options


def read_comment(default, comment):
    """An Option from its default and the comment after it, which may end with [low..high] or [this|that]."""
    number = r"(?:-?\d*\.?\d+(?:e[+-]?\d+)?)?"
    pattern = r"[^\[\]]*\|[^\[\]]*" if isinstance(default, str) else rf"{number}\.\.{number}"
    limits = re.search(rf"\s*\[({pattern})\]$", comment)
    if not limits:
        return Option(default, comment)
    meaning = comment[: limits.start()]
    if isinstance(default, str):
        return Option(default, meaning, choices=(default, *limits[1].split("|")))
    low, high = limits[1].split("..")
    return Option(default, meaning, limit(low or "-inf"), limit(high or "inf"))


def limit(text):
    return int(text) if text.isdigit() else float(text)  # a float cannot hold 2**64 - 1


def convert(name, option, value):
    """A value from the command line or a file, in its option's type. Raises UserError if it does not fit."""
    kind = type(option.default)
    text = f"--{name}={str(value)[:80]}"
    if type(value) is kind and value == option.default:
        return value
    to_type = from_text if isinstance(value, str) else from_json
    try:
        converted = to_type(value, option.default)
    except (ValueError, OverflowError):
        raise UserError(f"{text}: it must be {KINDS[kind]}") from None
    if option.choices and converted not in option.choices:
        choices = dict.fromkeys(choice for choice in option.choices if choice)
        raise UserError(f"{text} is unknown: choose {' or '.join(choices)}")
    values = converted if kind is tuple else (converted,)
    numbers = kind is not bool and not any(isinstance(value, str) for value in values)
    high = LARGEST if kind is int and option.high == math.inf else option.high
    if numbers and not all(abs(value) < math.inf for value in values):
        raise UserError(f"{text}: it must be finite")
    if numbers and not all(option.low <= value <= high for value in values):
        raise UserError(f"{text}: it must be from {plain(option.low)} to {plain(high)}")
    if kind is tuple:
        ordered = numbers and list(option.default) == sorted(option.default)
        if len(values) != len(option.default) or (ordered and list(values) != sorted(values)):
            what = "numbers in ascending order" if ordered else "values"
            raise UserError(f"{text}: it must be {len(option.default)} {what}")
    return converted


def plain(limit):
    return limit if isinstance(limit, int) else f"{limit:g}"


def from_text(text, default):
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if kind is str:  # ~ is the home folder at the start of each path, also in lists like --ckpt=a=A:B,C
        return re.sub(r"(?<![^,:=])~[^/,:]*", lambda home: os.path.expanduser(home[0]), text)
    if kind is tuple:
        return tuple(from_text(part.strip(), element(default)) for part in text.strip("()[] ").split(","))
    return kind(text)


def from_json(value, default):
    kind = type(default)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(from_json(part, element(default)) for part in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError
    return value


def element(default):
    """An element of a tuple that has the type of all: a float if there is one."""
    return next((value for value in default if isinstance(value, float)), (*default, 0.0)[0])
