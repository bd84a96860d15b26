"""What may import what, and how large a file may be. The import graph is read from the source, nothing is
run.
"""

import ast
import graphlib
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS

MEASURING = ("eval_linear", "attn_viz", "seg_transfer")
TRAINING = tuple(script.removesuffix(".py") for script in SCRIPTS)
TOP = {*TRAINING, *MEASURING, "vit", "data", "ablate", "bench"}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("twins/*.py")])


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(source):
    """The modules that a source imports, anywhere in it; `from twins import x` is twins.x."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "twins":
            found |= {f"twins.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.add(node.module)
    return found


@pytest.fixture(scope="module")
def graph():
    """{module: modules of ours that it imports}."""
    modules = {module_of(file): imported(file.read_text()) for file in FILES}
    return {name: found & modules.keys() for name, found in modules.items()}


def test_imports_make_no_circle(graph):
    for name, found in graph.items():
        print(f"{name}: {' '.join(sorted(found))}")
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("twins.errors") < order.index("twins.run") < order.index("dino")


def test_twins_imports_nothing_above_it(graph):
    above = {name: found & TOP for name, found in graph.items() if name.startswith("twins") and found & TOP}
    assert above == {}


def test_scripts_do_not_import_scripts(graph):
    scripts = TOP - {"vit", "data"}
    assert {name: found & scripts for name, found in graph.items() if found & scripts} == {}


def test_the_top_is_the_table_of_contents():
    assert {file.stem for file in ROOT.glob("*.py")} == TOP


def test_no_file_has_the_name_of_a_standard_module():
    """A script in twins/, run as a process, would find it in place of Python's, and so would torch."""
    assert {file.stem for file in FILES} & sys.stdlib_module_names == set()


def test_the_vit_needs_torch_and_einops_alone(tmp_path):
    roots = {name.partition(".")[0] for name in imported((ROOT / "vit.py").read_text())}
    assert roots == {"torch", "einops"}
    shutil.copy(ROOT / "vit.py", tmp_path)
    code = "import torch; from vit import ViT; print(*ViT(32, 8, 16, 1, 2)(torch.zeros(2, 3, 32, 32)).shape)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "16"], done.stderr


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_lines_are_short(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 300
    assert [f"{file.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 110] == []
