"""The four scripts are one family: what is the same in them is the same to the letter, and nothing drifts.

Between `# --- method` and `# --- end method` a script is on its own. Elsewhere the loops are equal, keys of
one name have one default and one meaning, functions and classes of one name have one source. Exceptions are
listed here, with a reason.
"""

import ast
import difflib
import re

import pytest

from conftest import ROOT, SCRIPTS

OWN = {
    ("barlow.py", "n_local"): "off by default: Barlow Twins has two views",
    ("barlow.py", "Network"): "a projector, no head",
    ("dino.py", "Network"): "a head, no projector",
    ("barlow.py", "proj_dim"): "its only Z, wider than a hybrid's second one",
}
SHARED = [
    "dataset",
    "data_dir",
    "out_dir",
    "preset",
    "skip_bad_images",
    "memory_gib",
    "resume",
    "init",
    "seed",
    "device",
    "dtype",
    "compile",
    "epochs",
    "max_steps",
    "batch_size",
    "base_lr",
    "min_lr",
    "warmup_epochs",
    "wd",
    "wd_end",
    "grad_clip",
    "image_size",
    "cache_size",
    "local_size",
    "n_local",
    "global_scale",
    "local_scale",
    "blur",
    "patch_size",
    "dim",
    "depth",
    "heads",
    "drop_path",
    "knn_bank",
    "knn_queries",
    "eval_every",
    "save_every",
    "log_every",
    "logger",
]
OWN_PRESETS = ("n_local",)  # Barlow Twins has two views


def parts(source):
    """The loop outside its method regions; keys {name: line}; functions and classes {name: source}; presets
    {key: source}.
    """
    tree = ast.parse(source)
    top, main = source.split('if __name__ == "__main__":\n')
    loop = re.sub(r" *# --- method\n.*?# --- end method\n", "", main, flags=re.S)
    keys = dict(re.findall(r"^((\w+) = .*)$", top, re.M))
    keys = {name: line for line, name in keys.items() if name.islower()}
    named = {
        n.name: ast.get_source_segment(source, n)
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    }
    assigned = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PRESETS")
    presets = {
        f"{name}.{key}": value
        for name, preset in ast.literal_eval(assigned.value).items()
        for key, value in preset.items()
        if key not in OWN_PRESETS
    }
    return loop, keys, named, presets


def drift(sources):
    """Every place where two scripts differ and should not, as a list of sentences; sources {script: text}."""
    found, all_parts = [], {script: parts(source) for script, source in sources.items()}
    dino = all_parts["dino.py"]
    for script, (loop, keys, _, _) in all_parts.items():
        if loop != dino[0]:
            changed = [
                line for line in difflib.ndiff(dino[0].splitlines(), loop.splitlines()) if line[0] in "+-"
            ]
            found.append(f"{script}'s loop is not dino.py's: {changed}")
        shared = [key for key in keys if key in SHARED]
        if shared != SHARED:
            found.append(
                f"{script} has not the keys all four share, in their order: "
                f"{set(SHARED) ^ set(shared) or shared}"
            )
    for kind, what in ((1, "key"), (2, "function or class"), (3, "preset")):
        first = {}
        for script, p in all_parts.items():
            for name, text in p[kind].items():
                if (script, name) in OWN:
                    continue
                where, original = first.setdefault(name, (script, text))
                if text != original:
                    found.append(f"{what} {name} of {script} is not {where}'s: {text!r}, {original!r}")
    return found


@pytest.fixture
def sources():
    return {script: (ROOT / script).read_text() for script in SCRIPTS}


def test_nothing_drifts(sources):
    assert drift(sources) == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "what, old, new",
    [
        ("an edited line in a loop", "loss.backward()", "(2 * loss).backward()"),
        (
            "a line more in a loop",
            "        done = step + 1\n",
            "        done = step + 1\n        step += 0\n",
        ),
        ("a renamed key", "grad_clip", "clip_grad"),
        ("a changed default", "wd_end = 0.4", "wd_end = 0.3"),
        ("a changed preset", '"base_lr": 2e-3', '"base_lr": 3e-3'),
        ("an edited copy of a function", "max(warmup - 1, 1)", "max(warmup, 1)"),
        ("an edited copy of a comment", "per parameter tensor", "of all tensors"),
    ],
)
def test_drift_is_found(sources, script, what, old, new):
    assert old in sources[script]
    assert drift(sources | {script: sources[script].replace(old, new)}) != []


def test_shared_losses_drift_is_found(sources):
    for script in ("barlow.py", "hybrid_a.py", "hybrid_b.py"):
        assert (
            drift(sources | {script: sources[script].replace("lambd * off_diagonal", "off_diagonal")}) != []
        )


@pytest.mark.parametrize("hybrid", ["hybrid_a.py", "hybrid_b.py"])
def test_the_science_is_at_most_60_lines(sources, hybrid):
    """As `diff dino.py hybrid_a.py | grep -c '^[<>]'` counts."""
    changed = [
        d
        for d in difflib.ndiff(sources["dino.py"].splitlines(), sources[hybrid].splitlines())
        if d[0] in "+-"
    ]
    print(f"dino.py -> {hybrid}: {len(changed)} lines")
    assert len(changed) <= 60


def test_every_key_is_documented(sources):
    for script, source in sources.items():
        for name, line in parts(source)[1].items():
            assert re.search(r"  # \w", line), f"{script}: {name} has no comment behind it"
