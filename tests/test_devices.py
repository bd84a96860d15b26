"""Every device, precision and torch.compile teach what the CPU teaches in float32, and no step waits for its
device.

Tests that need a GPU are marked `gpu`: `pytest -m gpu` runs them alone, elsewhere they are skipped.
Float32 agrees to 1e-4, bfloat16
to 2e-2, relative to the size of what is compared.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import data
import twins.run as run_module
from conftest import ROOT, SCRIPTS, tiny
from data import Crop, multi_crop
from twins import monitor, output, processes
from twins.checkpoints import read_checkpoint

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; with one: pytest -m gpu"),
]
gpu = [pytest.param("cuda", marks=NEEDS_GPU)]
CROPS = [
    Crop(32, (0.4, 1.0), blur=1.0),
    Crop(32, (0.4, 1.0), blur=0.1, solarize=0.2),
    *[Crop(16, (0.1, 0.4), blur=0.5)] * 6,
]


@pytest.fixture
def teach(train, monkeypatch):
    """teach(script, **keys): the losses of three steps [3] and the first gradient of all the student's
    parameters [p].

    Compiled without a graph break, on the CPU as far as the traced graph, which C++ would take a minute
    to compile.
    """

    def run(script, **keys):
        losses, gradients = [], {}

        def keep(name, p):
            gradients.setdefault(name, p.grad.double().cpu().flatten())

        def spy(g):
            losses.append(g["loss"].item())
            trained = [(name, p) for name, p in g["student"].named_parameters() if p.requires_grad]
            for name, p in trained if len(losses) == 1 else ():
                p.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p))

        backend = "inductor" if keys.get("device") == "cuda" else "aot_eager"
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda block, dynamic, options: compile(block, fullgraph=True, dynamic=dynamic, backend=backend),
        )
        keys |= {"drop_path": 0.0}  # its random numbers are others on every device
        train(script, spy, dim=48, heads=3, depth=1, batch_size=64, **keys)
        return torch.tensor(losses), torch.cat([gradients[name] for name in sorted(gradients)])

    compile = torch.nn.Module.compile
    yield run
    torch._dynamo.reset()


def distance(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


CASES = [(script, "cpu", "bfloat16", False) for script in SCRIPTS]
CASES += [(script, "cpu", "float32", True) for script in ("barlow.py", "hybrid_a.py")]  # compiling is slow
CASES += [
    pytest.param(script, "cuda", dtype, compiled, marks=NEEDS_GPU)
    for script in SCRIPTS
    for dtype in ("float32", "bfloat16")
    for compiled in (False, True)
]


@pytest.mark.parametrize("script, device, dtype, compiled", CASES)
def test_losses_and_gradients_are_those_of_the_cpu_in_float32(teach, script, device, dtype, compiled):
    losses, gradient = teach(script, device="cpu", dtype="float32")
    other_losses, other_gradient = teach(script, device=device, dtype=dtype, compile=compiled)
    assert len(losses) == 3 and (other_losses - losses).abs().div(losses).max() < (
        1e-4 if dtype == "float32" else 2e-2
    )
    if dtype == "float32":
        assert distance(other_gradient, gradient) < 1e-4
    # 0.1 to 0.3 away in models this small, at their start, whose features hardly differ yet; 0.02 in ViT-Ti
    else:
        assert torch.cosine_similarity(other_gradient, gradient, dim=0) > 0.9


@pytest.mark.parametrize("device", ["cpu", *gpu])
def test_compiled_or_not_drop_path_draws_the_same(train, monkeypatch, device):
    """The graph is traced in full, random numbers with it; on the CPU without C++, which takes a minute."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, dynamic, options: compile(block, dynamic=dynamic, backend=backend),
    )
    runs = [
        train("barlow.py", device=device, drop_path=0.5, max_steps=1, compile=compiled)["run"]
        for compiled in (False, True)
    ]
    assert runs[1].history.rows[1]["loss"] == pytest.approx(runs[0].history.rows[1]["loss"], rel=1e-5)
    torch._dynamo.reset()


class Waiting(TorchFunctionMode):
    """Lists the calls that would make a program wait for a GPU, seen on `meta`, a device whose tensors hold
    no numbers.

    Such are copies from the CPU that do not go through to_device(). Reading a number is an error of
    `meta` itself.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copied = function is torch.tensor or any(x.device.type == "cpu" and x.ndim for x in inputs)
        if copied and isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.found.append(function.__name__)
        return out


@pytest.fixture
def step_on_meta(train, monkeypatch):
    """step_on_meta(script, **keys): two steps on `meta`; returns what the second one would wait for."""

    def run(script, **keys):
        def spy(g):
            if g.get("step") == 0:
                waiting.__enter__()
            elif g.get("step") == 1:  # else it is called by the mode, of which backward() is one call
                waiting.__exit__(None, None, None)
                raise InterruptedError

        waiting = Waiting()
        with pytest.raises(InterruptedError):
            train(script, spy, device="meta", log_every=100, **keys)
        return waiting.found

    adamw, from_tensor = torch.optim.AdamW, data.to_device

    def to_device(x, device):
        with torch._C.DisableTorchFunction():
            return from_tensor(x, device)

    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, fused, **keys: adamw(*args, **keys)
    )  # there is no fused one
    monkeypatch.setattr(processes, "setup", lambda *args: (torch.device("meta"), contextlib.nullcontext()))
    monkeypatch.setattr(monitor, "evaluate", lambda *args: {})
    monkeypatch.setattr(data, "to_device", to_device)
    monkeypatch.setattr(
        run_module.Run, "check", lambda *args, **losses: None
    )  # it reads numbers, every log_every steps
    monkeypatch.setattr(data, "fingerprint", lambda data: "")
    return run


@pytest.mark.parametrize(
    "script, keys", [*((script, {}) for script in SCRIPTS), ("hybrid_a.py", {"blur": True, "head": "two"})]
)
def test_a_step_waits_for_its_device_nowhere(step_on_meta, script, keys):
    assert step_on_meta(script, n_local=2, **keys) == []


def test_waiting_is_found(step_on_meta, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            data, "constant", lambda values, device, dtype: torch.tensor(values, device=device, dtype=dtype)
        )
        assert set(step_on_meta("dino.py")) == {"tensor"}
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "read", lambda self, step: self.images[self.train_indices[:16]])
        assert step_on_meta("dino.py") == ["__getitem__"]
    with monkeypatch.context() as patch:
        patch.setattr(data, "normalise", lambda x: x * x.mean().item())
        with pytest.raises(RuntimeError, match="meta"):
            step_on_meta("dino.py")


def test_the_gpus_memory_is_full(train, monkeypatch, capsys):
    def full(g):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(torch.OutOfMemoryError) as error:
        train("dino.py", full)
    output.excepthook(error.type, error.value, None)
    assert capsys.readouterr().err.endswith("a smaller --batch_size needs less memory\n")


# ----------------------------------------------------------------------------------------------------------
# with a GPU


@pytest.mark.parametrize("device", gpu)
@pytest.mark.parametrize("blur", [False, True])
def test_views_are_those_of_the_cpu(device, blur):
    """Equal at every pixel, so equally distributed too: the random numbers are the CPU's."""
    images = torch.randint(
        256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    crops = [crop._replace(blur=crop.blur * blur) for crop in CROPS]
    for here, there in zip(
        multi_crop(images, crops, 3, 5), multi_crop(images.to(device), crops, 3, 5), strict=True
    ):
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", gpu)
def test_a_gpu_is_never_waited_for(train, monkeypatch, device):
    """As on `meta`, by CUDA's own word, in two whole steps between rows of the log."""
    update = run_module.Run.update

    def watched(self):
        torch.cuda.set_sync_debug_mode("error" if self.done < 2 else "default")
        return update(self)

    monkeypatch.setattr(run_module.Run, "update", watched)
    try:
        assert (
            train("hybrid_a.py", device=device, n_local=2, blur=True, max_steps=4, log_every=100)["done"] == 4
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", gpu)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_there_and_elsewhere(train, tmp_path, device, script):
    """Stopped after two of four steps: resumed on the GPU it goes on as if it had not been, and on the CPU,
    too.
    """

    def stop(g):
        if g["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    keys = {"drop_path": 0.0, "dtype": "float32", "max_steps": 4}
    whole = train(script, device=device, **keys)["run"].history.rows
    for i, where in enumerate((device, "cpu")):
        out = tmp_path / f"halves{i}"
        with pytest.raises(SystemExit):
            train(script, stop, device=device, out_dir=out, **keys)
        rows = train(script, device=where, out_dir=out, resume=True, **keys)["run"].history.rows
        assert rows[-1]["loss"] == pytest.approx(
            whole[-1]["loss"], rel=1e-3
        )  # sums in another order, two optimizer steps on
        assert ("peak_gib" in rows[-1]) == (where == "cuda")


@pytest.mark.parametrize("device", gpu)
def test_batches_read_ahead_are_those_held(device):
    images = torch.arange(50 * 12).view(50, 3, 2, 2).to(torch.uint8)
    held, ahead = (
        data.Batches(images, torch.arange(50), 8, 0, torch.device(device), gib) for gib in (1.0, 0.0)
    )
    assert all(torch.equal(held(step), ahead(step)) and ahead(step + 1).is_cuda for step in range(0, 20, 2))


@pytest.mark.parametrize("device", gpu)
def test_the_monitor_sees_what_the_cpu_sees(train, device):
    rows = [
        train("barlow.py", device=where, dtype="float32", max_steps=1, depth=3)["run"].history.rows[0]
        for where in ("cpu", device)
    ]
    assert rows[1] == pytest.approx(
        rows[0], rel=1e-3, abs=1 / 50 + 1e-6
    )  # of 50 queries one may be on the edge


@pytest.mark.parametrize("device", gpu)
@pytest.mark.parametrize("script", ["eval_linear.py", "attn_viz.py", "seg_transfer.py"])
def test_an_evaluation_finds_what_the_cpu_finds(train, command, tmp_path, device, script):
    """The top-1 of linear probes and k-NN, the attention's entropy, the linear head's mIoU, in float32, and
    in bfloat16 nearly.
    """
    checkpoint = Path(train("barlow.py")["out_dir"]) / "ckpt.pt"
    more = {
        "eval_linear.py": {"label_fraction": 0.1},
        "attn_viz.py": {"n_images": 100},
        "seg_transfer.py": {"max_steps": 10},
    }

    def figures(device, dtype):
        out = tmp_path / f"{device}-{dtype}"
        done = command(script, ckpt=checkpoint, out_dir=out, device=device, dtype=dtype, **more[script])
        assert done.returncode == 0, done.stderr
        report = json.loads(next(out.glob("*.json")).read_text())
        if script == "attn_viz.py":
            return report["runs"][0]["entropy_bits"]
        return [r["top1"] if script == "eval_linear.py" else r["miou"] for r in report["results"].values()]

    cpu = figures("cpu", "float32")
    assert figures(device, "float32") == pytest.approx(cpu, abs=0.01)
    assert figures(device, "bfloat16") == pytest.approx(cpu, abs=0.05)


@pytest.mark.parametrize("has_it, ratio, expected", [(1, 0.4, True), (1, 1.9, False), (0, 0.4, False)])
def test_bfloat16_is_the_default_only_where_a_cpu_is_faster_in_it(monkeypatch, has_it, ratio, expected):
    """An Intel Xeon with avx512_bf16 but without AMX takes 1.9 times as long as in float32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: bool(has_it), raising=False)
    speeds = {torch.bfloat16: 1 / ratio, torch.float32: 1.0}
    monkeypatch.setattr(processes, "product_speed", lambda device, dtype, n: speeds[dtype])
    with processes.setup("cpu", "auto", 0)[1]:
        assert torch.is_autocast_enabled("cpu") == expected


def test_a_product_is_timed_once():
    first, second = (processes.product_speed(torch.device("cpu"), torch.float32, 64) for _ in range(2))
    assert 0 < first == second


@pytest.mark.parametrize("device", gpu)
def test_bfloat16_is_the_default_only_where_the_gpu_has_it(monkeypatch, device):
    """A GPU without it emulates it, slower than float32."""
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, n=native: n or including_emulation,
        )
        with processes.setup(device, "auto", 0)[1]:
            assert torch.is_autocast_enabled(device) == native


@pytest.mark.parametrize("device", gpu)
def test_nccl_has_a_gradient(tmp_path, device):
    """With one process, which is all that one GPU takes."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(5, device=device, requires_grad=True)
        processes.MeanOverProcesses.apply(x).square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", gpu)
def test_torchrun_starts_and_ends(tmp_path, device):
    keys = tiny("hybrid_b.py", device=device, out_dir=tmp_path / "run")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=1",
        str(ROOT / "hybrid_b.py"),
        *keys,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3
