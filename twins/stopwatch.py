"""The cost of a training script's step: seconds, floating-point operations, memory.

    python twins/stopwatch.py result.json 2 3 "" dino.py --dataset=shapes

runs dino.py in a temporary folder, 2 warm-up steps and 3 measured ones, and writes result.json: {first:
seconds until the first step was done, seconds: of a step, views: share of it spent in data.multi_crop,
n_views: per image, flop: of a step, absent if compiled, peak_gib: on a GPU}. A file name instead of "" is for
a trace of three more steps; result.json then also holds {operations: {name: share of a step's time}}. A run
that fails prints its own error and writes nothing.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from twins.files import write_file
from twins.run import Run

TRACED = 3
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION = {  # on a CPU, which FlopCounterMode omits
    FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


class Measured(Exception):
    """Raised when all steps are done."""


class Stopwatch:
    """Replaces Run.update() and `crop`, which makes views, until the last step raises Measured."""

    def __init__(self, warmup, steps, trace, crop):
        self.warmup, self.steps, self.trace = warmup, steps, trace
        self.update, self.crop = Run.update, crop
        self.begun = time.perf_counter()
        self.done = 0  # steps
        self.spans = []  # (start, end) of each call of `crop`
        self.result = {}
        self.counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        self.profiler = torch.profiler.profile()
        self.cuda = torch.cuda.is_available()

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self):
        """A timestamp on the device, which runs asynchronously."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def views(self, *args):
        start = self.mark()
        with torch.profiler.record_function("views"):
            views = self.crop(*args)
        self.spans.append((start, self.mark()))
        self.result["n_views"] = len(views)
        return views

    def step(self, run):
        self.update(run)
        self.done += 1
        count_flop = not run.config["compile"]
        if self.done == 1:
            self.cuda = run.device.type == "cuda"
            self.result["first"] = self.now() - self.begun
            if count_flop:
                self.counter.__enter__()
        if self.done == 2 and count_flop:
            self.counter.__exit__(None, None, None)
            self.result["flop"] = self.counter.get_total_flops()
        if self.done == self.warmup:
            self.spans.clear()
            self.start = self.now()
        if self.done == self.warmup + self.steps:
            self.finish_timing()
            if not self.trace:
                raise Measured
            self.profiler.__enter__()
        if self.done == self.warmup + self.steps + TRACED:
            self.now()
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(self.trace)
            self.result["operations"] = self.operations()
            raise Measured

    def finish_timing(self):
        seconds = self.now() - self.start
        views = 0.0
        for start, end in self.spans:
            views += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.result.update(seconds=seconds / self.steps, views=views / seconds)
        if self.cuda:
            self.result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30

    def operations(self):
        cpu = torch.autograd.DeviceType.CPU
        rows = [row for row in self.profiler.key_averages() if row.device_type == cpu]
        of_device = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        times = {row.key: getattr(row, of_device) for row in rows}
        total = sum(times.values()) or 1  # a GPU that forbids profiling reports no times
        longest = sorted(times.items(), key=lambda item: -item[1])[:20]
        return {name: spent / total for name, spent in longest}


def measure(warmup, steps, trace, script):
    """Runs a training script, whose options are in sys.argv, until it is measured; returns the result."""
    data = importlib.import_module("data")  # by name: twins/ imports nothing from above
    watch = Stopwatch(warmup, steps, trace, data.multi_crop)
    data.multi_crop = watch.views
    Run.update = lambda run: watch.step(run)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(Measured):
        runpy.run_path(script, run_name="__main__")
    return watch.result


if __name__ == "__main__":
    file, warmup_steps, measured_steps, trace_file, training_script, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [training_script, *options, f"--out_dir={folder}"]
        result = measure(int(warmup_steps), int(measured_steps), trace_file, training_script)
    write_file(Path(file), json.dumps(result))
