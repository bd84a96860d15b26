"""What the tests share: the scripts run as a user runs them, but in this process, a spy looking on."""

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


import twins.datasets as datasets  # noqa: E402
import twins.run as run_module  # noqa: E402
from twins.errors import close_bars  # noqa: E402

datasets.shapes = functools.cache(datasets.shapes)  # made once for all tests

SCRIPTS = ("dino.py", "barlow.py", "hybrid_a.py", "hybrid_b.py")
MEASURES = ("eval_linear.py", "attn_viz.py", "seg_transfer.py", "bench.py")
TINY = dict(dataset="shapes", device="cpu", dim=16, depth=2, heads=2, batch_size=16, n_local=1, max_steps=3, knn_bank=100)
TINY |= dict(knn_queries=50, log_every=1)
TINY_HEAD = dict(out_dim=32, hidden_dim=32, bottleneck_dim=16)


def tiny(script, **keys):
    """The arguments of a run that takes a second."""
    keys = TINY | (dict(proj_dim=16) if script == "barlow.py" else TINY_HEAD) | keys
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, spy=None, pictures=False, **keys) runs a script and returns its globals.

    The spy is called with the script's globals in every step, when the loss is there and backward() is not done yet.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    excepthook, stdout, stderr = sys.excepthook, sys.stdout, sys.stderr

    def run(script, spy=None, pictures=False, **keys):
        keys = {"out_dir": tmp_path / f"run{len(list(tmp_path.iterdir()))}"} | keys
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *tiny(script, **keys)])
        with monkeypatch.context() as patch:
            backward = torch.Tensor.backward

            def spied(loss, *args, **kwargs):
                if spy:
                    spy(sys._getframe(1).f_globals)
                return backward(loss, *args, **kwargs)

            patch.setattr(torch.Tensor, "backward", spied)
            if not pictures:  # they take longer than the steps
                patch.setattr(run_module, "crops_picture", lambda *args: b"")
                patch.setattr(run_module, "curves_picture", lambda *args: b"")
            return runpy.run_path(str(ROOT / script), run_name="__main__")

    yield run
    sys.excepthook, sys.stdout, sys.stderr = excepthook, stdout, stderr
    torch.set_default_dtype(torch.float32)
    close_bars()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launch(words, cwd):
    """Python with these arguments in a process of its own, a fork of this one where that can be: torch is imported, then."""
    if sys.platform != "linux" or torch.cuda.is_available():  # CUDA cannot be forked
        return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def run():
            sys.stdout, sys.stderr, sys.argv, sys.excepthook = out, err, words, sys.__excepthook__
            os.chdir(cwd)
            torch.set_num_threads(1)  # OpenMP's threads are not forked
            try:
                runpy.run_path(words[0], run_name="__main__")
            except Exception:
                sys.excepthook(*sys.exc_info())
                sys.exit(1)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(120)
        assert process.exitcode is not None, f"{words} takes more than two minutes"
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
        return subprocess.CompletedProcess(words, process.exitcode, *said)


@pytest.fixture
def command(tmp_path):
    """command(script, **keys) runs a script on the CPU in a process of its own, tiny if it trains: exit code, stdout and stderr."""

    def run(script, *args, **keys):
        if script in MEASURES:
            keys = {"device": "cpu"} | keys
        keys = tiny(script, **keys) if script in SCRIPTS else [f"--{key}={value}" for key, value in keys.items()]
        return launch([str(ROOT / script), *keys, *args], tmp_path)

    return run


@pytest.fixture(scope="session")
def functions():
    """functions[script] has the functions and classes of a script, which are not run."""
    return {script: runpy.run_path(str(ROOT / script), run_name="imported") for script in SCRIPTS}


@pytest.fixture(scope="session")
def real_images():
    """The folder of real images. `python ../shared/data/unpack.py data` fills it."""
    if not (ROOT / "data" / "cifar10-jpeg").is_dir():
        pytest.skip("no real images in data/: python ../shared/data/unpack.py data puts them there")
    return ROOT / "data"
