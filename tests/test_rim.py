"""A run in an unfriendly place: odd environments, closed terminals, ignored signals, too little memory, slips
of the keyboard.
"""

import concurrent.futures
import contextlib
import errno
import faulthandler
import functools
import io
import json
import linecache
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from conftest import ROOT, tiny
from twins import errors, keys, monitor, options, output, pictures, processes
from twins.errors import UserError
from twins.log import read_log
from twins.loggers import start_logger

ENVIRONMENT = {  # a notebook's server, an ascii terminal, a cluster's job
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONIOENCODING": "ascii",
    **{"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": ""},
    **{
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NUM_NODES": "2",
    },
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run's exit code and folder: started with SIGHUP and SIGINT ignored, both sent to it, standard output
    full, error closed.
    """
    out = tmp_path_factory.mktemp("hostile") / "run"
    words = [
        sys.executable,
        str(ROOT / "dino.py"),
        *tiny("dino.py", depth=1, max_steps=60, eval_every=60, out_dir=out),
    ]
    command = f"trap '' HUP INT; exec {shlex.join(words)} >/dev/full 2>&-"
    process = subprocess.Popen(["sh", "-c", command], env=os.environ | ENVIRONMENT)
    while process.poll() is None and not (
        (out / "log.jsonl").exists() and '"step": 2' in (out / "log.jsonl").read_text()
    ):
        time.sleep(0.02)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    return process.wait(120), out


def test_a_notebooks_backend_and_a_clusters_variables_do_not_matter(hostile):
    code, out = hostile
    assert (
        code == 0 and Image.open(out / "curves.png").width > 600 and Image.open(out / "crops.png").width > 300
    )


def test_full_and_closed_output_and_ignored_signals_do_not_end_a_run(hostile):
    code, out = hostile
    assert code == 0 and read_log(out / "log.jsonl")[-1]["step"] == 60 and (out / "ckpt.pt").exists()


def test_a_backend_that_is_not_installed_is_not_imported(monkeypatch):
    """The evaluation scripts' pictures come from the same function."""
    monkeypatch.setenv("MPLBACKEND", ENVIRONMENT["MPLBACKEND"])
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    pictures.load_matplotlib.cache_clear()
    figure = pictures.load_matplotlib().figure.Figure()
    assert pictures.png(figure) and os.environ["MPLBACKEND"] == ENVIRONMENT["MPLBACKEND"]
    pictures.load_matplotlib.cache_clear()


def test_printing_to_ascii_closed_and_full_streams_goes_on():
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("naïve", file=output.Stream(ascii), flush=True)
    assert ascii.buffer.getvalue() == b"na?ve\n"
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full" if os.path.exists("/dev/full") else os.devnull, os.O_WRONLY)
    streams = [os.fdopen(number, "w") for number in (os.dup(writer), writer, full)]
    streams[0].close()
    for stream in [*streams, None]:
        print("lost" * 10_000, file=output.Stream(stream), flush=True)
    for stream in streams:
        with contextlib.suppress(OSError):  # here it would be told
            stream.close()


def test_a_bus_error_is_not_silent(monkeypatch):
    """A mapped file that is cut off under a running training ends the process: faulthandler says where."""
    for name in ("stdout", "stderr", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    faulthandler.disable()
    output.protect_output()
    assert faulthandler.is_enabled()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "1"},
        {"RANK": ""},
        {"TORCHELASTIC_RUN_ID": "none", "RANK": ""},
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0"},  # left behind in a shell
        {"SLURM_PROCID": "3"},
    ],
)
def test_only_torchrun_is_torchrun(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not processes.under_torchrun()
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for size in ("0", "many", ""):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert not processes.under_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.under_torchrun()


# handlers, locks, divergence


@pytest.fixture
def network(start_run):
    """network(...) starts the Run of a small network."""

    def start(device="cpu", **changes):
        layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        return start_run({"student": layers}, layers, device=device, **changes)

    return start


@pytest.mark.parametrize("disable", [False, True])  # TQDM_DISABLE
@pytest.mark.parametrize(
    "seconds, steps, hours, after",
    [(40, 1001, 11.1, 1), (1, 9006, 2.5, 6), (1, 3000, None, None), (40, 51, None, None)],
)
def test_a_run_of_hours_says_so_after_five_seconds(
    network, monkeypatch, capsys, seconds, steps, hours, after, disable
):
    """seconds: of a step; after: this many steps."""
    now, heard = [1000.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=disable))
    r = network(steps=steps, preset="")
    monkeypatch.setattr(r.bar, "write", lambda text: heard.update({r.done: text}))
    for step in r.loop():
        now[0] += seconds
        if step == 9:
            r.signals.on_signal(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        r.finish()
    assert "stopped at step 10 and saved" in capsys.readouterr().out
    said = f"this run will take about {hours} hours on this CPU; --preset=small is quicker"
    assert heard == ({after: said} if hours else {})


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def fail(r, how):
    weight = r.backbone[1].weight
    if how == "loss":
        r.check(4, 0.25, ce=torch.ones(()), cc=torch.tensor(float("nan")), loss=torch.tensor(float("nan")))
    r.check(4, 0.25, loss=torch.ones(()))
    r.done = 4
    weight.grad = torch.ones_like(weight)
    if how == "gradient":
        weight.grad[0, 1] = float("inf")
    if how == "weight":
        weight.data[0, 1] = float("nan")
    r.update()
    weight.grad = None
    r.backbone[0].bias.data[1] = float("inf")
    r.save(5)


@pytest.mark.parametrize(
    "how, words",
    [
        ("loss", "cc is nan at step 4, learning rate 0.25, nothing was saved yet: try a lower --base_lr"),
        (
            "gradient",
            "the norm of the gradient of student.1.weight is not finite at step 4, learning rate 0.25",
        ),
        ("weight", "the norm of student.1.weight is not finite at step 4, learning rate 0.25"),
        ("neither", "the student is not finite at step 5, learning rate 0.25"),
    ],
)
def test_a_divergence_names_step_rate_and_part_and_gives_back_what_the_run_took(
    network, tmp_path, how, words
):
    before = [signal.getsignal(number) for number in SIGNALS]
    r = network()
    assert all(signal.getsignal(number) == r.signals.on_signal for number in SIGNALS)
    with pytest.raises(UserError, match=re.escape(words)):
        fail(r, how)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not (tmp_path / "run" / "ckpt.pt").exists()
    again = network()  # the lock is free
    again.save(1)
    again.finish()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_learning_rate_of_0_is_not_to_blame_for_a_divergence(network):
    with pytest.raises(UserError, match=r"loss is inf at step 0, learning rate 0, nothing was saved yet$"):
        network().check(0, 0.0, loss=torch.tensor(math.inf))


def test_the_next_run_takes_over_from_one_whose_script_failed(network):
    before = [signal.getsignal(number) for number in SIGNALS]
    network()  # and then an error in the loop
    network().finish()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ignored_signals_stay_ignored(network):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        r = network()
        assert (
            signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            and signal.getsignal(signal.SIGTERM) == r.signals.on_signal
        )
        r.finish()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_is_one(network, monkeypatch):
    """torchrun passes on what a service manager has sent to all processes. The next one ends the run."""
    now, r = [5.0], network(steps=9)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ended = []
    r.signals.handlers = {number: lambda number, frame: ended.append(number) for number in SIGNALS}
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert r.signals.stop == signal.SIGTERM and not ended
    now[0] += 2
    signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGINT]


def test_a_run_in_a_thread_has_no_signals(network):
    """Python gives signals to the main thread alone."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert list(pool.submit(network, steps=2).result().loop()) == [0, 1]


def test_numbers_that_are_not_finite_are_not_logged(network, tmp_path):
    r = network()
    r.log(1, {"rank": torch.tensor(float("nan")), "kl": float("inf"), "knn": 0.5})
    assert read_log(tmp_path / "run" / "log.jsonl") == [{"step": 1, "knn": 0.5, "knn_init": 0.5}]
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_features_that_are_zero_have_rank_one_and_others_that_are_not_finite_are_refused(monkeypatch):
    off = torch.autocast("cpu", enabled=False)
    images = torch.zeros(30, 3, 4, 4, dtype=torch.uint8)
    split = monitor.__dict__.get(
        "Split", type("Split", (), {"images": images, "labels": torch.arange(30) % 2, "image_size": 4})
    )
    bank, queries = torch.arange(20), torch.arange(20, 30)
    for value, refused in ((0.0, False), (1e30, False), (float("nan"), True), (float("inf"), True)):
        monkeypatch.setattr(
            monitor, "features", lambda *args, value=value, **_: torch.full((len(args[2]), 8), value)
        )
        if refused:
            with pytest.raises(UserError, match="the features are not finite"):
                monitor.evaluate(None, split, bank, queries, torch.device("cpu"), off)
        else:
            row = monitor.evaluate(None, split, bank, queries, torch.device("cpu"), off)
            assert all(value.isfinite() for value in row.values()) and abs(row["rank"] - 1) < 1e-3


def test_a_network_of_width_one_logs_no_nan(train, tmp_path):
    train("dino.py", out_dir=tmp_path / "run", dim=1, heads=1, depth=1)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text.splitlines()[-1])["step"] == 3


# too much


@pytest.fixture
def little_memory():
    """A GiB more than there is in use."""
    resource = pytest.importorskip("resource")
    limits, pages = (
        resource.getrlimit(resource.RLIMIT_AS),
        int(Path("/proc/self/statm").read_text().split()[0]),
    )
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("key", ["dim=20000", "dim=100000000", "image_size=400000", "hidden_dim=1000000000"])
def test_too_little_memory_is_one_sentence(train, little_memory, key, capsys):
    name, value = key.split("=")
    with pytest.raises((RuntimeError, MemoryError)) as error:
        train("dino.py", **{"heads": 1, name: int(value)})
    output.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and said.endswith("a smaller --batch_size needs less memory")


def test_memory_errors_of_python_and_numpy_are_known():
    assert output.memory_is_full(MemoryError()) and not output.memory_is_full(RuntimeError("shapes differ"))
    with pytest.raises(MemoryError) as error:
        __import__("numpy").zeros(10**14)
    assert output.memory_is_full(error.value)


@pytest.mark.parametrize("device", ["meta", "hpu", "mps:9", "", "opencl", "no device"])
def test_a_device_that_holds_no_numbers_is_refused(device):
    with pytest.raises(UserError, match=f"--device={device} does not work here .*: try --device=cpu"):
        processes.setup(device, "float32", 0)


@pytest.fixture
def configure(functions, tmp_path):
    return lambda *words: keys.configure(
        dict(functions["hybrid_a.py"]), [f"--out_dir={tmp_path / 'run'}", *words]
    )


def test_seeds_end_at_two_to_the_64(configure):
    assert configure(f"--seed={2**64 - 1}")["seed"] == 2**64 - 1
    with pytest.raises(UserError, match=f"--seed={2**64}: it must be from 0 to {2**64 - 1}$"):
        configure(f"--seed={2**64}")
    torch.manual_seed(2**64 - 1)
    processes.seed_step(2**64 - 1, 0)


@pytest.mark.parametrize(
    "word",
    [
        "--knn_bank=1",
        "--dim=0",
        f"--max_steps={10**400}",
        f"--dim={10**12}",
        "--wd=1e400",
        f"--epochs={'9' * 5000}",
    ],
)
def test_numbers_beyond_the_limits_are_refused(configure, word):
    with pytest.raises(UserError, match=r"it must be (from|finite|a whole number)"):
        configure(word)


@pytest.mark.parametrize(
    "default, comment, low, high, choices",
    [
        (0.5, "weight of C [d d]", -math.inf, math.inf, ()),  # a shape
        (0.5, "as in the paper [1]", -math.inf, math.inf, ()),  # a citation
        (0.5, "rate [0..0.99]", 0, 0.99, ()),
        (1, "steps [1..]", 1, math.inf, ()),
        (1, "steps [1..1e6]", 1, 1e6, ()),
        (1, "steps [..e]", -math.inf, math.inf, ()),
        ("a", "head [a|b]", -math.inf, math.inf, ("a", "a", "b")),
        ("a", "a text [b d]", -math.inf, math.inf, ()),
    ],
)
def test_brackets_that_are_no_limits_are_text(default, comment, low, high, choices):
    option = options.read_comment(default, comment)
    assert (option.low, option.high, option.choices) == (low, high, choices)
    assert (option.meaning == comment) == (low == -math.inf and not choices)


@pytest.mark.parametrize(
    "default, given, expected",
    [
        ((0.485, 0.456, 0.406), "0.1,0.3,0.2", (0.1, 0.3, 0.2)),  # no range, so in any order
        ((16, 32), "8,64", (8, 64)),
        (("a", "b"), "c, d", ("c", "d")),
        (5 * 10**9, "7", 7),
    ],
)
def test_a_forks_own_constants_are_options(default, given, expected):
    option = options.Option(default, "")
    for value in (default, given, list(expected) if isinstance(expected, tuple) else expected):
        converted = options.convert("mine", option, value)
        assert converted == (default if value is default else expected)
        assert [*map(type, converted)] == [*map(type, default)] if isinstance(default, tuple) else True
    if isinstance(default, tuple):
        with pytest.raises(UserError, match=r"it must be . (values|numbers)"):
            options.convert("mine", option, "1")


def test_a_nested_tuple_is_no_option(tmp_path):
    (tmp_path / "mine.py").write_text("pairs = ((1, 2), (3, 4))\nscale = (1, 2)\n")
    assert list(options.read_options(tmp_path / "mine.py")) == ["scale"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EISDIR])
def test_a_path_that_cannot_be_used_is_a_sentence(capsys, number):
    error = OSError(number, os.strerror(number), "/secret/x")
    output.excepthook(type(error), error, None)
    assert capsys.readouterr().err == f"error: /secret/x cannot be used ({os.strerror(number)})\n"


def test_weights_too_large_to_compute_with_are_a_sentence(capsys):
    error = torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
    output.excepthook(type(error), error, None)
    said = capsys.readouterr().err
    assert said.startswith("error: the features or weights are too large") and said.count("\n") == 1


def test_a_bug_of_a_fork_is_a_traceback(tmp_path, monkeypatch):
    def sentence(line):
        file = tmp_path / "mine.py"
        file.write_text(line)
        linecache.checkcache(str(file))
        try:
            exec(compile(line, str(file), "exec"), {})
        except ValueError as error:
            return errors.is_sentence(error, error.__traceback__)

    monkeypatch.setattr(errors, "ROOT", tmp_path)
    assert sentence("raise ValueError('dim=3 cannot be split')") and not sentence("a, b, c = 1, 2")


def test_a_loggers_failure_does_not_end_a_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **_: 1 / 0))
    start_logger({"logger": "trackio", "out_dir": "out"})({"step": 0})
    assert (
        "--logger=trackio fails, training continues without it (division by zero)" in capsys.readouterr().out
    )


def test_a_million_blocks_are_refused_at_once(train):
    with pytest.raises(ValueError, match="depth=1000000 must be from 1 to 1000"):
        train("dino.py", depth=10**6)


# what is said


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lr=1e-3"], "error: unknown option --lr=1e-3: did you mean --base_lr?"),
        (["--batchsize=8"], "error: unknown option --batchsize=8: did you mean --batch_size?"),
        (["--depth"], "error: argument --depth: expected one argument"),
        (["shapes"], "error: unknown option shapes: --help lists the options"),
        (["--=3"], "error: unknown option --=3: --help lists the options"),
    ],
)
def test_a_usage_error_is_the_line_that_matters(configure, capsys, words, sentence):
    with pytest.raises(SystemExit) as end:
        configure(*words)
    assert end.value.code == 2 and capsys.readouterr().err == sentence + "\n"


def test_help_without_docstrings(functions, capsys):
    """As python -OO, or PYTHONOPTIMIZE=2, runs a script."""
    with pytest.raises(SystemExit):
        keys.configure(functions["hybrid_a.py"] | {"__doc__": None}, ["--help"])
    assert "None" not in capsys.readouterr().out


def test_help_states_limits_once_and_whole(configure, capsys):
    with pytest.raises(SystemExit) as end:
        configure("--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "from 0 from 0" not in said and "e+" not in said
    assert (
        "of learning-rate warm-up from 0 (from 0 to 1000000)\n" in said
        and f"views (from 0 to {2**64 - 1})\n" in said
    )
    assert "momentum of that running mean" in said or "of that running mean (from 0 to 1)\n" in said


def test_a_bar_in_a_file_is_a_line_now_and_then(tmp_path):
    """2,000 updates of ten a second made a log file of 2,000 lines."""
    program = "import time; from tqdm import tqdm; from twins.output import protect_output\nprotect_output()"
    program += "\nfor i in tqdm(range(50)): time.sleep(0.02)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("it/s") <= 3, done.stderr
