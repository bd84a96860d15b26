"""How fast: images/s of the training scripts on this machine, what views take of it, memory, and how near that is to the limit.

Each row is a script as its user runs it, on `shapes` with the defaults of larger data sets: ViT-Ti/4, 2 x 32 + 6 x 16 pixels. It
runs in a process of its own, `warmup` steps and then `steps` that count.

    TFLOP/s = floating-point operations of a step's matrix products, attention's too / seconds of a step
    of the limit = that / TFLOP/s of a large product in the same precision, on the same device, the best seen so far

    python bench.py                                                            on a GPU
    python bench.py --batch_size=32 --warmup=2 --steps=3 --compile=False       on a CPU
    python bench.py --scripts=hybrid_a --trace=True                            where the time of a step goes, too
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import data
from twins.errors import UserError
from twins.files import git_state, write_file
from twins.keys import parse
from twins.processes import setup
from twins.run import Run

scripts = "dino,barlow,hybrid_a,hybrid_b"  # which ones
out_dir = "out/bench"  # where bench.json and traces go
device = "auto"  # cuda or cpu; auto: cuda where it is here
dtype = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on a GPU that has it
compile = True  # each script with torch.compile, too
batch_size = 1024  # images a step
n_local = 6  # local views an image
dim = 192  # width of the ViT
depth = 12  # blocks
heads = 3  # attention heads
warmup = 10  # steps before those that count
steps = 30  # steps that count
trace = False  # profile three more steps: what they spend their time on, and files for ui.perfetto.dev

TRACED = 3
ATTENTION = {  # on a CPU, which FlopCounterMode leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
COLUMNS = ("images/s", "ms a step", "in views", "peak GiB", "TFLOP/s", "of the limit", "first step after, s")


class Measured(Exception):
    """All steps are done."""


class Stopwatch:
    """Stands in for Run.update() and data.multi_crop() while a script runs; raises Measured after its last step.

    `result` is {first: seconds until the first step was done, seconds: of a step, views: their share of it, flop: of a step, unless
    it is compiled, peak_gib: of a GPU, operations: {name: share of a step's time}, if `trace` names a file}.
    """

    def __init__(self, keys, warmup, steps, trace):
        self.cuda, self.compiled = keys["device"].startswith("cuda"), keys["compile"]
        self.warmup, self.steps, self.trace, self.begun = warmup, steps, trace, time.perf_counter()
        self.update, self.crop, self.done, self.spans, self.result = Run.update, data.multi_crop, 0, [], {}
        self.counter, self.profiler = FlopCounterMode(display=False, custom_mapping=ATTENTION), torch.profiler.profile()

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self):
        """A moment of the device, which works behind the program."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def views(self, *args):
        start = self.mark()
        with torch.profiler.record_function("views"):
            made = self.crop(*args)
        self.spans.append((start, self.mark()))
        return made

    def step(self, run):
        self.update(run)
        self.done += 1
        if self.done == 1:
            self.result["first"] = self.now() - self.begun
        if self.done == 1 and not self.compiled:
            self.counter.__enter__()
        if self.done == 2 and not self.compiled:
            self.counter.__exit__(None, None, None)
            self.result["flop"] = self.counter.get_total_flops()
        if self.done == self.warmup:
            self.spans, self.start = [], self.now()
        if self.done == self.warmup + self.steps:
            seconds = self.now() - self.start
            views = sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans)
            self.result |= {"seconds": seconds / self.steps, "views": views / seconds}
            self.result |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else {}
            if not self.trace:
                raise Measured
            self.profiler.__enter__()
        if self.done == self.warmup + self.steps + TRACED:
            self.now()
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(self.trace)
            self.result["operations"] = self.operations()
            raise Measured

    def operations(self):
        rows = [row for row in self.profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CPU]
        times = {row.key: row.self_device_time_total if self.cuda else row.self_cpu_time_total for row in rows}
        whole = sum(times.values()) or 1  # where a GPU may not be watched there are none
        return {k: t / whole for k, t in sorted(times.items(), key=lambda item: -item[1])[:20]}


def measure(pipe, script, keys, folder, warmup, steps, trace):
    """Runs a training script, a path, with `keys` in a folder, until it is measured, and sends a Stopwatch's result."""
    watch = Stopwatch(keys, warmup, steps, trace)
    data.multi_crop, Run.update = watch.views, lambda run: watch.step(run)
    sys.argv = [script, *(f"--{key}={value}" for key, value in keys.items()), f"--out_dir={folder}/run"]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(Measured):
            runpy.run_path(script, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # the script's own sentence
        sys.exit(1)
    pipe.send(watch.result)


def in_a_process(*args):
    """What measure() sends from a process of its own, which leaves nothing behind on the device; None if it failed and said why."""
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(there, *args))
    process.start()
    there.close()
    result = None
    try:
        with contextlib.suppress(EOFError):
            result = here.recv()
        process.join()
    finally:  # told to end by a signal, this process does not leave the other behind
        process.kill()
        process.join()
    if process.exitcode < 0:
        print(f"error: killed by signal {-process.exitcode}: is memory short? A smaller --batch_size takes less", file=sys.stderr)
    return result


def product_speed(device, kind):
    """FLOP/s of one large product of matrices of a dtype, the best of ten."""
    n, times = 8192 if device.type == "cuda" else 2048, []
    a, b = torch.randn(n, n, device=device, dtype=kind), torch.randn(n, n, device=device, dtype=kind)
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def cells(row):
    """What the table shows of a row: a string for each of COLUMNS."""
    memory = f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""
    rate = row["flop"] / row["seconds"]
    times = f"{batch_size / row['seconds']:.0f}", f"{1000 * row['seconds']:.1f}", f"{100 * row['views']:.1f} %"
    return *times, memory, f"{rate / 1e12:.3g}", f"{100 * rate / row['limit']:.0f} %", f"{row['first']:.0f}"


if __name__ == "__main__":
    _, _, given = parse(globals())
    globals().update(given)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}  # bars; semaphores of a process that was killed
    presets = {}
    for script in (name.strip() for name in scripts.split(",")):
        path = Path(__file__).with_name(f"{script}.py")
        its = runpy.run_path(str(path), run_name="bench") if path.exists() else {}
        if "PRESETS" not in its:
            raise UserError(f"--scripts={scripts}: there is no training script {path}")
        presets[path] = {key: its[key] for key in its["PRESETS"]["shapes"]}
    device, autocast = setup(device, dtype, 0)
    with autocast:
        kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.get_default_dtype()
    dtype, rows, failed = str(kind).removeprefix("torch."), [], []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    report = {"device": name, "dtype": dtype, "batch_size": batch_size, "torch": torch.__version__, **git_state()}
    write_file(Path(out_dir) / "bench.json", json.dumps(report))
    print(f"{name}, {dtype}, batch {batch_size}, torch {torch.__version__}\n")
    print(f"| script | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}", flush=True)
    for compiled, (path, preset) in product((False, True)[: 1 + compile], presets.items()):
        script = path.stem
        title = script + " compiled" * compiled
        keys = preset | {"dataset": "shapes", "device": str(device), "dtype": dtype, "compile": compiled, "batch_size": batch_size}
        keys |= {"n_local": n_local, "dim": dim, "depth": depth, "heads": heads}
        keys |= {"max_steps": 10**6, "eval_every": 10**6, "save_every": 10**6, "knn_bank": 100, "knn_queries": 100}
        file = Path(out_dir) / f"{title.replace(' ', '-')}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            result = in_a_process(str(path), keys, folder, warmup, steps, str(file) if trace else "")
        if result is None:
            failed.append(title)
            continue
        flop = next((row["flop"] for row in rows if row["script"] == script), 0)  # of a compiled script: what it was before
        limit = max(product_speed(device, kind), *(row["limit"] for row in rows), 0)
        rows.append({"script": script, "compiled": compiled, "flop": flop, "limit": limit} | result)
        print(f"| {title} | {' | '.join(cells(rows[-1]))} |", flush=True)
        write_file(Path(out_dir) / "bench.json", json.dumps(report | {"rows": rows}, indent=1))
    for row in rows if trace else []:
        costly = ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(row["operations"].items())[:8])
        print(f"\n{row['script']}{' compiled' * row['compiled']}: {costly}")
    print(f"\nwrote {out_dir}/bench.json")
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")
