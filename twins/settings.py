"""Settings of a study's runs: drawn at random from a space, or with one mechanism switched."""

import functools
import math
import runpy
from ast import literal_eval
from pathlib import Path

import numpy as np

from twins.errors import UserError
from twins.options import read_options

ONLY_OF = {"trials": ["search"], "changes": ["search"], "space_seed": ["search"], "masks_dir": ["models"]}
ONLY_OF.update(seeds=["models", "removal"], mechanisms=["removal"])
MECHANISMS = {  # {name: ({option: value without it}, {option: value with it})}, see toggle()
    "centering": ({"centering": False}, {"centering": True}),
    "sharpening": ({"tau_t": lambda now: now["tau_s"]}, {"tau_t": 0.04}),
    "tau_t warm-up": (
        {"tau_t_warmup_epochs": 0.0},
        {"tau_t_warmup_epochs": 2.0, "tau_t_start": lambda now: now["tau_t"] / 2},
    ),
    "EMA": ({"ema": 0.0}, {"ema": 0.97}),
    "EMA schedule": ({"ema_end": lambda now: now["ema"]}, {"ema_end": 1.0}),
    "weight-normed last layer": ({"norm_last_layer": False}, {"norm_last_layer": True}),
    "frozen last layer": ({"freeze_last_layer_epochs": 0.0}, {"freeze_last_layer_epochs": 0.2}),
    "L2 bottleneck": ({"l2_bottleneck": False}, {"l2_bottleneck": True}),
    "BatchNorm in the head": ({"head_bn": False}, {"head_bn": True}),
    "learning-rate warm-up": ({"warmup_epochs": 0.0}, {"warmup_epochs": 0.2}),
    "weight-decay schedule": ({"wd_end": lambda now: now["wd"]}, {"wd_end": 0.4}),
    "gradient clipping": ({"grad_clip": 0.0}, {"grad_clip": 3.0}),
    "multi-crop": ({"n_local": 0}, {"n_local": 2}),
}


@functools.cache
def read_script(path, presets):
    """{option: value under these presets} of a training script. Raises UserError if it is not one."""
    options = read_options(path) if Path(path).exists() else {}
    if not {"max_steps", "save_every"} <= options.keys():
        raise UserError(f"there is no training script {path}")
    options = {name: option.default for name, option in options.items()}
    script_presets = runpy.run_path(str(path), run_name="study").get("PRESETS", {})
    for name in presets:
        options.update(script_presets.get(name, {}))
    return options


def draw_setting(space, seed, trial, options):
    """{option: value}, a random setting for those of `options` that the space has.

    space: {option: list of values, or (low, high) to draw log-uniformly between}. A value depends on (seed,
    trial, option) alone, so within a trial, scripts get equal values for the options they share.
    """
    setting = {}
    for option, values in space.items():
        rng = np.random.default_rng((seed, trial, *option.encode()))
        if isinstance(values, tuple):
            value = float(f"{math.exp(rng.uniform(*np.log(values))):.3g}")
        else:
            value = values[rng.integers(len(values))]
        if option in options:
            setting[option] = value
    return setting


def refuse_options(study, given):
    """Raises UserError for an option that this study does not use."""
    for name, studies in ONLY_OF.items():
        if name in given and study not in studies:
            raise UserError(f"--{name} is for --study={' or '.join(studies)}, not for {study}")
    if given.get("changes") and not given.get("search_dir"):
        raise UserError("--changes needs --search_dir, whose best settings it changes")


def with_changes(best, changes, options):
    """{change: the setting `best` with it} for changes "wd=0.1;wd=0.1 n_local=0". Raises UserError."""
    settings = {}
    for words in filter(None, changes.split(";")):
        pairs = dict(word.partition("=")[::2] for word in words.split())
        try:
            changed = {name: literal_eval(text) for name, text in pairs.items()}
        except (ValueError, SyntaxError, TypeError):
            changed = {}
        if not changed or changed.keys() - options.keys():
            raise UserError(f"--changes={changes}: write options like n_local=0;n_local=0 ema_end=0.97")
        settings[words.strip()] = {**best, **changed}
    return settings


def toggle(mechanism, setting, options):
    """(the setting with a mechanism off, "off"), or (with it on, "on") if the setting does without it.

    mechanism: ({option: value without it}, {option: value with it}); a value may be a function of all values.
    """
    now = {**options, **setting}
    off, on = ({name: v(now) if callable(v) else v for name, v in changes.items()} for changes in mechanism)
    if any(now[name] != value for name, value in off.items()):
        return {**setting, **off}, "off"
    return {**setting, **on}, "on"


def removals(mechanisms, setting, options, only=""):
    """{label: setting}: the full one, each of {name: mechanism} toggled alone, all that are on switched off.

    only: names separated by commas, "all" for the last; "": each. Raises UserError for an unknown name.
    """
    toggled = {}
    all_off = setting
    for name, mechanism in mechanisms.items():
        if not all(changes.keys() <= options.keys() for changes in mechanism):  # a fork may lack it
            continue
        toggled[name] = toggle(mechanism, setting, options)
        if toggled[name][1] == "off":
            all_off, _ = toggle(mechanism, all_off, options)
    toggled["all"] = all_off, "off"
    names = only.split(",") if only else toggled
    if unknown := [name for name in names if name not in toggled]:
        raise UserError(f"{unknown[0]} is not a mechanism: choose from {', '.join(toggled)}")
    changed = {f"{name} {state}": new for name, (new, state) in toggled.items() if name in names}
    return {"full": setting, **changed}
