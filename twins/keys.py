"""The command line: a script's options set by --name=value, by its presets, by the run that is resumed."""

import argparse
import difflib
import json
import math
import os
import sys
from pathlib import Path

from twins.checkpoints import holds_run, load_checkpoint
from twins.errors import UserError
from twins.files import read_json
from twins.options import convert, plain, read_options
from twins.output import excepthook, protect_output
from twins.processes import under_torchrun


class Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(script, argv=None, presets=()):
    """The options of a script (its globals) in three dicts: Options, the preset's changes, values given.

    presets: the options whose values select from PRESETS; later ones win. If argv is None, it reads the
    command line and installs the one-sentence excepthook. Exits with 2 for an unknown option.
    """
    if argv is None:
        sys.excepthook = excepthook
        protect_output()
    options = read_options(script["__file__"])
    parser = Parser(description=script["__doc__"] or "", allow_abbrev=False, add_help=False)
    for name in options:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    parser.add_argument("--help", "-h", action="store_true", default=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    wants_help = given.pop("help", False)
    for word in unknown:
        parser.error(f"unknown option {word}: {suggest(word, options)}")
    script_presets = script.get("PRESETS", {})
    allowed = dict(options)
    if "preset" in presets:  # not in `options`: a resumed run may have one that no longer exists
        allowed["preset"] = options["preset"]._replace(choices=("", *script_presets))
    given = {name: convert(name, allowed[name], value) for name, value in given.items()}
    preset = {}
    for name in presets:
        preset.update(script_presets.get(given.get(name, options[name].default), {}))
    if wants_help:
        in_force = {name: preset.get(name, option.default) for name, option in options.items()}
        print_help(parser, options, in_force)
    return options, preset, given


def suggest(word, options):
    name = word.lstrip("-").split("=")[0]
    near = [option for option in options if name and name in option.split("_")]
    near += difflib.get_close_matches(name, options, 1)
    return f"did you mean --{near[0]}?" if near else "--help lists the options"


def print_help(parser, options, in_force):
    print(f"{parser.description}\n\noptions, with their defaults:\n")
    for name, option in options.items():
        choices = " or ".join(dict.fromkeys(choice for choice in option.choices if choice))
        low = f"from {plain(option.low)}" if option.low > -math.inf else ""
        high = f"to {plain(option.high)}" if option.high < math.inf else ""
        limits = choices or f"{low} {high}".strip()
        print(f"  {f'--{name}={in_force[name]}':<32} {option.meaning}{f' ({limits})' if limits else ''}")
    sys.exit(0)


def configure(script, argv=None):
    """Sets a training script's options, its globals, from `argv` or the command line; returns {name: value}.

    An option that is not given has the resumed run's value, else that of PRESETS[preset], PRESETS[dataset] or
    the default. Raises UserError for impossible values, and if out_dir holds a run that is not resumed.
    """
    options, preset, given = parse(script, argv, presets=[n for n in ("dataset", "preset") if n in script])
    name = Path(script["__file__"]).stem
    config = {key: option.default for key, option in options.items()}
    config.update(preset)
    out_dir = Path(given.get("out_dir") or f"out/{name}-{given.get('dataset', config['dataset'])}")
    if given.get("resume"):
        config.update(saved_options(out_dir, name, options))
        tell_changes(out_dir, config, given)
    else:
        refuse_run(out_dir)
        if preset:
            changed = " ".join(f"--{key}={value}" for key, value in preset.items() if key not in given)
            print(f"defaults for this preset: {changed}", flush=True)
    config.update(given)
    config["out_dir"] = str(out_dir)
    config["data_dir"] = str(Path(config["data_dir"]).absolute())  # resuming works from any folder
    config = {key: convert(key, options[key], value) for key, value in config.items()}
    processes = int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1
    if config["batch_size"] % processes:
        given_size = f"--batch_size={config['batch_size']}"
        raise UserError(f"{given_size} is over all processes: give a multiple of {processes}")
    script.update(config, __given__=given)
    return config


def refuse_run(out_dir):
    """Raises UserError for a folder with a run, or with other files that a run would overwrite."""
    hint = "give another --out_dir"
    if holds_run(out_dir):
        raise UserError(f"{out_dir} already holds a run: continue it with --resume=True, or {hint}")
    for name in ("export", "curves.png"):  # they are written after a checkpoint
        if os.path.exists(out_dir / name):
            raise UserError(f"{out_dir} holds a run's {name}, but no ckpt.pt to continue: {hint}")
    file = out_dir / "config.json"
    failed_early = file.exists() and "versions" in read_json(file)  # a run, before it saved
    for name in ("config.json", "script.py", "log.jsonl", "crops.png"):
        if not failed_early and os.path.exists(out_dir / name):
            raise UserError(f"{out_dir / name} is not a run's, and would be overwritten: {hint}")


def saved_options(out_dir, script_name, options):
    """The options of the run to resume, from its checkpoint."""
    if not holds_run(out_dir):
        hint = "leave --resume out, or give the run's --out_dir"
        raise UserError(f"{out_dir} holds no run to resume (no ckpt.pt): {hint}")
    saved, _, _ = load_checkpoint(out_dir)
    if saved["script"] != script_name:
        what = f"a run of {saved['script']}.py, not of {script_name}.py"
        raise UserError(f"{out_dir} holds {what}: give another --out_dir")
    config = {key: convert(key, options[key], x) for key, x in saved["config"].items() if key in options}
    try:
        file_config = read_json(out_dir / "config.json")
    except UserError as error:
        print(f"warning: {error}: using ckpt.pt")
        return config
    for key, value in config.items():
        text = f"--{key}={file_config[key]}" if key in file_config else f"nothing about --{key}"
        if file_config.get(key) != json.loads(json.dumps(value)) and key != "resume":
            print(f"warning: config.json says {text}, ckpt.pt {value}: using ckpt.pt")
    return config


def tell_changes(out_dir, config, given):
    """Prints the options that change on resuming. Raises UserError for one that must not."""
    free = ("resume", "out_dir", "data_dir")
    changed = [key for key, value in given.items() if key not in free and value != config[key]]
    for key in changed:
        if key in ("dataset", "preset", "init", "seed"):
            hint = f"leave --{key} out, or use another --out_dir"
            raise UserError(f"{out_dir} is a run with --{key}={config[key]}: {hint}")
    if {"max_steps", "epochs", "batch_size"} & set(changed):
        print(
            "note: the schedules now span the new number of steps, so the learning rate jumps; for an "
            "unbroken schedule, start a new run with the new number in another --out_dir"
        )
    if changed:
        text = " ".join(f"--{key}={given[key]} (was {config[key]})" for key in changed)
        print(f"changed on resuming: {text}", flush=True)
