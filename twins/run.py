"""A run: its folder with options, log, checkpoints and pictures; its progress bar; how it stops."""

import contextlib
import io
import json
import math
import shlex
import sys
import time
from pathlib import Path

import einops
import numpy as np
import torch
from tqdm import tqdm

from twins import checkpoints
from twins.backbones import name_in
from twins.errors import UserError, first_line
from twins.files import git_state, only_writer, write_file
from twins.keys import refuse_run
from twins.log import Log, read_log, rows_until
from twins.loggers import start_logger
from twins.monitor import collapse, not_finite
from twins.pictures import crops_picture, curves_picture
from twins.processes import compile_blocks, launcher, precision, rank, seed_step, to_numbers
from twins.signals import StopSignals
from twins.weights import write_export


class Run:
    """A run's folder (config.json, script.py, log.jsonl, ckpt.pt, curves.png, export/), progress bar and end.

    script: the path of the training script. state: a dict of any names, what a checkpoint holds: modules,
    optimizers, and tensors that the script changes in place. backbone: the module in one of them that
    evaluations and export/ use. `start` is the first step to do: 0, or where the resumed run stopped. A
    signal (Ctrl-C, SIGTERM, SIGHUP) ends loop() after its step, which is saved.
    """

    held = contextlib.ExitStack()  # what the process's last run holds: bar, handlers of signals, lock

    def __init__(self, script, config, steps, state, backbone, device):
        checkpoints.check_state(state)
        self.script = Path(script)
        self.source = self.script.read_text(encoding="utf-8-sig")  # it may be edited while it runs
        self.config = config
        self.dir = Path(config["out_dir"])
        self.steps = steps
        self.state = state
        self.modules = {name: value for name, value in state.items() if isinstance(value, torch.nn.Module)}
        self.backbone = backbone
        self.backbone_name = name_in(self.modules, backbone)
        self.device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.device_name = f"{name}, {precision(config.get('dtype', 'float32'), device)}"
        self.start = 0
        self.seconds = 0.0  # of training, without evaluations
        self.lr = 0.0  # of this step
        self.history = Log(self.dir / "log.jsonl")
        self.said = set()  # warnings that are given once
        self.unsaved = ""  # why the last save failed
        self.previous = "ckpt-previous.pt"
        Run.held.close()  # of a run that failed in this process
        with contextlib.ExitStack() as held:
            self.begin(held)
            Run.held = held.pop_all()

    def begin(self, held):
        """Starts or resumes; resuming changes no file before its first row. `held` releases what it gets."""
        if rank() == 0:  # other runs keep out of the folder until this one ends
            hint = "give another --out_dir; to share a run, start its processes with torchrun"
            self.claim = held.enter_context(only_writer(self.dir, hint))
            if not self.config["resume"]:
                refuse_run(self.dir)  # again: another run may have ended there meanwhile
        if self.config["resume"]:
            self.restore()
        self.logger = start_logger(self.config) if rank() == 0 else None
        about = {"script": self.script.stem, "backbone": self.backbone_name, "device_name": self.device_name}
        versions = {module.__name__: module.__version__ for module in (torch, np, einops)}
        about.update(versions={**versions, "python": sys.version.split()[0]}, **git_state())
        self.about = json.dumps({**self.config, **about}, indent=1)
        if not self.config["resume"]:
            self.describe()
        self.bar = tqdm(total=self.steps, initial=self.start, unit="step")
        held.callback(self.bar.close)
        self.shown = {}  # beside the bar
        self.done = self.start
        self.clock = time.monotonic()  # at the last row, of step `clock_step`
        self.clock_step = self.start
        self.signals = StopSignals(held)

    def describe(self):
        self.write("config.json", self.about)
        self.write("script.py", self.source)

    def loop(self):
        """Yields the steps to do, each with its own random numbers; saves; a signal ends it after a step."""
        for module in self.modules.values() if self.config["compile"] else ():
            compile_blocks(module)
        self.bar.unpause()  # the evaluation before the first step does not count
        began = time.monotonic()
        for step in range(self.start, self.steps):
            seed_step(self.config["seed"], step)
            yield step
            self.update()
            self.estimate(time.monotonic() - began)
            if self.done % self.config["save_every"] == 0 or self.done == self.steps or self.signals.stop:
                self.save(self.done)
            if self.signals.stop:
                return

    def update(self):
        """Counts a step. Raises UserError for weights or gradients that are not finite."""
        if self.device.type == "cpu" and self.clock_step <= self.done:  # if row() did not; would sync a GPU
            self.check_weights()
        self.done += 1
        self.bar.update()
        self.signals.synchronise()

    def estimate(self, elapsed):
        """On a CPU, says after the first five seconds how long the run will take, if more than an hour."""
        compiles = self.config["compile"]  # then the first step is long
        if elapsed > 5 and self.device.type == "cpu" and not (compiles or "estimate" in self.said or rank()):
            self.said.add("estimate")
            hours = elapsed / (self.done - self.start) * (self.steps - self.done) / 3600
            if hours > 1:
                quicker = "; --preset=small is quicker" if self.config.get("preset") == "" else ""
                self.bar.write(f"this run will take about {hours:.1f} hours on this CPU{quicker}")

    def write(self, name, content, previous=None):
        if rank() == 0:
            self.claim(refuse_run)
            write_file(self.dir / name, content, previous and self.dir / previous)

    def check(self, step, lr, **losses):
        """Raises UserError for a loss that is not finite, before it reaches the weights."""
        self.lr = lr
        if self.device.type != "cpu" and step % self.config["log_every"]:
            return  # it would sync the GPU
        for name, value in to_numbers(losses).items():
            if not math.isfinite(value):
                self.diverge(f"{name} is {value}", step)

    def diverge(self, what, step):
        Run.held.close()
        saved = "ckpt.pt is sound" if (self.dir / "ckpt.pt").exists() else "nothing was saved yet"
        hint = ": try a lower --base_lr" if self.lr else ""  # at 0 it is not to blame
        raise UserError(f"{what} at step {step}, learning rate {self.lr:.3g}, {saved}{hint}")

    def check_weights(self):
        """Raises UserError, naming the tensor, for weights or gradients that are not finite."""
        if bad := not_finite(self.modules):
            self.diverge(f"the norm of {bad} is not finite", self.done)

    def row(self, step, **values):
        """Starts a log row: the values as numbers, images/s since the last row, a GPU's peak memory."""
        self.check_weights()  # before they are evaluated
        row = to_numbers(values)
        now = time.monotonic()
        self.seconds += now - self.clock
        row["images_per_s"] = (step - self.clock_step) * self.config["batch_size"] / (now - self.clock)
        row["seconds"] = self.seconds
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.clock = now
        self.clock_step = step
        return row

    def log(self, step, row):
        """Adds a row of any scalars to log.jsonl, the logger and the bar; an evaluation gets `knn_init`."""
        row = self.history.add({"step": step, **to_numbers(row)})
        if rank():
            return
        with self.attempt("log.jsonl"):
            self.claim(refuse_run)
            self.history.save()
        with self.attempt("the logger"):
            self.logger(row)
        with self.attempt("the warning of a collapse"):  # rows of a resumed run may be anything
            if "collapse" not in self.said and (
                warning := collapse(self.history.rows, self.steps, self.config)
            ):
                self.said.add("collapse")
                self.bar.write(f"warning at step {step}: {warning}")
        self.shown.update({n: f"{row[n]:.3g}" for n in ("loss", "images_per_s", "knn") if n in row})
        self.bar.set_postfix(self.shown, refresh=False)
        self.clock = time.monotonic()  # the time of evaluations does not count
        self.clock_step = step

    def draw_crops(self, images, views):
        """crops.png: images uint8 [b 3 s s] and their views, a list of [b 3 v v]."""
        names = [f"view {v + 1}, {view.shape[-1]} pixels" for v, view in enumerate(views)]
        with self.attempt("crops.png"):
            self.write("crops.png", crops_picture(images, views, names))

    @contextlib.contextmanager
    def attempt(self, what):
        """For what a run can do without: a failure is reported once, and training continues."""
        try:
            yield
        except Exception as error:
            if what not in self.said:
                self.said.add(what)
                reason = f"{type(error).__name__}: {first_line(error)}"
                self.bar.write(f"warning: {what} fails, training continues ({reason})")

    def save(self, step):
        """ckpt.pt, export/, curves.png. A full disk only gives a warning. Raises UserError for a NaN."""
        state = checkpoints.state_dicts(self.state)
        if bad := checkpoints.entry_not_finite(state):
            self.diverge(f"the {bad} is not finite", step)
        if rank():
            return
        saved = {"script": self.script.stem, "step": step, "seconds": self.seconds, "config": self.config}
        saved.update(first_row=self.history.rows[:1], n_rows=len(self.history.rows))
        saved.update(backbone=checkpoints.describe_backbone(self.backbone, self.backbone_name), **state)
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        try:
            self.write("ckpt.pt", buffer.getvalue(), self.previous)
            self.previous = "ckpt-previous.pt"
            self.describe()
            about = {"script": self.script.stem, "step": step, "backbone": self.backbone_name}
            about.update({name: self.config[name] for name in ("dataset", "data_dir", "seed")})
            write_export(self.dir / "export", self.backbone, about)
            self.unsaved = ""
        except UserError as error:
            self.unsaved = str(error)
            self.bar.write(f"warning at step {step}: {error}")
        if not self.unsaved:
            with self.attempt("curves.png"):
                self.write("curves.png", curves_picture(self.history.rows))
        self.clock = time.monotonic()

    def restore(self):
        """Loads the checkpoint into `state`, strictly, and drops the log's later rows."""
        saved, path, problem = checkpoints.load_checkpoint(self.dir, self.device)
        checkpoints.restore_state(self.state, saved, path, self.config)
        self.start, self.seconds = saved["step"], saved["seconds"]
        if self.start > self.steps:
            raise UserError(f"{path} is at step {self.start}, beyond the new end, step {self.steps}")
        self.history.rows = rows_until(saved, path, read_log(self.history.path))
        script = self.dir / "script.py"
        if script.is_file() and script.read_text(encoding="utf-8", errors="replace") != self.source:
            print(f"warning: {self.script.name} changed since this run began, see {script}")
        if problem:
            self.previous = ""  # keep the sound one
            print(f"warning: {problem}; using the checkpoint before it")
        print(f"resumed {path} at step {self.start}")

    def finish(self):
        """Closes the bar, prints the results or how to resume; exits after a signal. UserError if unsaved."""
        Run.held.close()
        if self.unsaved:
            raise UserError(f"the run ended at step {self.done} but its last save failed: {self.unsaved}")
        if self.signals.stop and self.done < self.steps:
            words = shlex.join([sys.argv[0], f"--out_dir={self.dir}", "--resume=True"])
            print(f"stopped at step {self.done} and saved; continue with: {launcher()} {words}")
            sys.exit(128 + self.signals.stop)
        print(f"\n| {self.script.stem} on {self.config['dataset']} | |\n|---|---|")
        result = {"minutes of training": self.seconds / 60, "seed": self.config["seed"]}
        for name, value in {**dict(*self.history.rows[-1:]), **result}.items():
            print(f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |")
        print(f"| device | {self.device_name} |\n")
        print(f"in {self.dir}: log.jsonl curves.png crops.png ckpt.pt export/")
