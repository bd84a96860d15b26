"""What the tests share: the scripts run as a user runs them, but in this process, a spy looking on."""

import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


import twins.datasets as datasets  # noqa: E402
import twins.run as run_module  # noqa: E402
from twins.errors import close_bars  # noqa: E402

datasets.shapes = functools.cache(datasets.shapes)  # made once for all tests

for number in (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
):  # a shell's background jobs ignore some; tests send them
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

OURS = ("twins", "data", "vit")
SCRIPTS = ("dino.py", "barlow.py", "hybrid_a.py", "hybrid_b.py")
MEASURES = ("eval_linear.py", "attn_viz.py", "seg_transfer.py", "bench.py")
TINY = dict(
    dataset="shapes",
    device="cpu",
    dim=16,
    depth=2,
    heads=2,
    batch_size=16,
    n_local=1,
    max_steps=3,
    knn_bank=100,
)
TINY |= dict(knn_queries=50, log_every=1)
TINY_HEAD = dict(out_dim=32, hidden_dim=32, bottleneck_dim=16)


def tiny(script, **keys):
    """The arguments of a run that takes a second."""
    keys = TINY | (dict(proj_dim=16) if script == "barlow.py" else TINY_HEAD) | keys
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, spy=None, pictures=False, **keys) runs a script and returns its globals.

    The spy is called with the script's globals in every step, when the loss is there and backward() is
    not done yet.
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


def launch(words, cwd, processes=0):
    """Python with these arguments in a process of its own, or in as many as torchrun would start: one
    CompletedProcess.

    They are forks of this process where that can be, for then torch is imported.
    """
    if sys.platform != "linux" or torch.cuda.is_available():  # CUDA cannot be forked
        torchrun = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            if processes
            else []
        )
        return subprocess.run(
            [sys.executable, *torchrun, *words], cwd=cwd, capture_output=True, text=True, timeout=180
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    joined = dict(
        WORLD_SIZE=processes,
        LOCAL_WORLD_SIZE=processes,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        TORCHELASTIC_RUN_ID=0,
    )
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def run(rank):
            sys.stdout, sys.stderr, sys.argv, sys.excepthook = out, err, words, sys.__excepthook__
            if processes:
                os.environ.update(
                    {name: str(value) for name, value in {**joined, "RANK": rank, "LOCAL_RANK": rank}.items()}
                )
            os.chdir(cwd)
            sys.path.insert(0, os.path.dirname(words[0]))
            own = (
                []
                if Path(words[0]).parent == ROOT
                else [name for name in sys.modules if name.split(".")[0] in OURS]
            )
            for name in own:  # a copy of the script has its own
                del sys.modules[name]
            torch.set_num_threads(1)  # OpenMP's threads are not forked
            try:
                runpy.run_path(words[0], run_name="__main__")
            except Exception:
                sys.excepthook(*sys.exc_info())
                sys.exit(1)

        children = [
            multiprocessing.get_context("fork").Process(target=run, args=[i]) for i in range(processes or 1)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        assert all(child.exitcode is not None for child in children), f"{words} takes more than two minutes"
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
        return subprocess.CompletedProcess(
            words, next((c.exitcode for c in children if c.exitcode), 0), *said
        )


@pytest.fixture
def start_run(tmp_path, monkeypatch):
    """start_run(state, backbone, steps=9, device="cpu", **config): the Run of small networks.

    It draws no curves, and all that it takes is given back.
    """
    monkeypatch.setattr(run_module, "git_state", dict)
    monkeypatch.setattr(run_module, "curves_picture", lambda rows: b"")
    defaults = dict(
        resume=False, compile=False, logger="", save_every=99, batch_size=2, log_every=1, eval_every=1, seed=0
    )
    defaults.update(dataset="shapes", data_dir="data", out_dir=str(tmp_path / "run"))

    def start(state, backbone, steps=9, device="cpu", script=ROOT / "dino.py", **config):
        config = defaults | config
        return run_module.Run(script, config, steps, state, backbone, torch.device(device))

    yield start
    run_module.Run.held.close()
    close_bars()


def copy_of_the_code(folder):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("twins/*.py")]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())


@pytest.fixture
def command(tmp_path):
    """command(script, **keys) runs a script on the CPU in a process of its own, tiny if it trains: exit code,
    stdout and stderr.
    """

    def run(script, *args, **keys):
        if script in MEASURES:
            keys = {"device": "cpu"} | keys
        keys = (
            tiny(script, **keys) if script in SCRIPTS else [f"--{key}={value}" for key, value in keys.items()]
        )
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
