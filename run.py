"""A run: its folder, checkpoints, log and end."""

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from pathlib import Path

import einops
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

from common import UserError, first_line, git_commit, numbers, rank, world, write_file
from decoding import locked
from monitor import collapse, curves_picture


class Run:
    """A run's folder: config.json, log.jsonl, ckpt.pt, curves.png, export/; its progress bar, its end.

    `state` names what a checkpoint holds: modules, the optimizer, tensors. `start` is the first step to do, 0 or where the
    resumed run stopped. A signal (Ctrl-C, TERM) sets `stop`; the loop ends after its step.
    """

    def __init__(self, config, steps, state, device):
        self.config, self.steps, self.state, self.dir = config, steps, state, Path(config["out_dir"])
        self.script, self.start, self.stop, self.seconds, self.rows = Path(sys.argv[0]).stem, 0, 0, 0.0, []
        self.device, self.device_name = device, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.parent = os.getppid()
        if rank() == 0:
            self.lock = self.take_folder()
        if config["resume"]:
            self.restore(device)
        about = {"script": self.script, "git_commit": git_commit(), "device_name": self.device_name}
        about["versions"] = {m.__name__: m.__version__ for m in (torch, np, einops)} | {"python": sys.version.split()[0]}
        self.write("config.json", json.dumps(config | about, indent=1))
        self.write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.bar = tqdm(total=steps, initial=self.start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15)
        self.shown, self.clock, self.clock_step, self.warned = {}, time.time(), self.start, False
        self.report = other_logger(config) if rank() == 0 else None
        self.signals = dist.new_group(backend="gloo") if world() > 1 else None  # of the CPU: no step waits for it
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            signal.signal(number, self.on_signal)

    def take_folder(self):
        """Keeps other runs out of the folder for as long as this process lives."""
        lock = locked(self.dir, wait=False)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            lock.__enter__()
        except BlockingIOError:
            raise UserError(f"another process is writing into {self.dir}: give another --out_dir") from None
        except OSError as error:
            raise UserError(f"{self.dir} cannot be written ({error.strerror})") from None
        if (self.dir / "config.json").exists() and not self.config["resume"]:
            raise UserError(f"{self.dir} already holds a run: go on with --resume=True, or give another --out_dir")
        return lock

    def on_signal(self, number, frame):
        self.stop = number
        signal.signal(number, signal.SIG_DFL)  # the second one ends it at once

    def update(self):
        """Moves the bar; what one process was told by a signal, all know after the same step."""
        self.bar.update()
        if world() > 1:
            if os.getppid() != self.parent:  # torchrun was killed
                self.stop = signal.SIGTERM
            stop = torch.tensor(self.stop)
            dist.all_reduce(stop, dist.ReduceOp.MAX, self.signals)
            self.stop = stop.item()

    def write(self, name, content):
        if rank() == 0:
            write_file(self.dir / name, content)

    def row(self, step, **values):
        """What a log row starts with: finite numbers, images/s since the last row, a GPU's peak memory. Raises UserError for a NaN."""
        row = numbers(values)
        bad = next((k for k, v in row.items() if not math.isfinite(v)), None)
        if bad:
            sound = f"{self.dir}/ckpt.pt holds the last sound step" if (self.dir / "ckpt.pt").exists() else "nothing was saved yet"
            raise UserError(f"{bad} is {row[bad]} at step {step}; {sound}. A lower --base_lr or --dtype=float32 may help")
        now = time.time()
        self.seconds += now - self.clock
        row["images_per_s"] = (step - self.clock_step) * self.config["batch_size"] / (now - self.clock)
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.clock, self.clock_step = now, step
        return row

    def log(self, step, row):
        """Adds a row to log.jsonl, with `knn_init` and a new curves.png if it is an evaluation."""
        row = {"step": step} | numbers(row)
        if "rank" in row:
            first = next((r["knn_init"] for r in self.rows if "knn_init" in r), row.get("knn"))
            row |= {} if first is None else {"knn_init": first}
        self.rows.append(row)
        if rank():
            return
        try:
            with open(self.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.dir}/log.jsonl cannot be written ({error.strerror}): what was saved before is whole") from None
        if "rank" in row and step:
            self.write("curves.png", curves_picture(self.rows))
        self.report(row)
        warning = "" if self.warned else collapse(self.rows, self.steps, self.config)
        if warning:
            self.warned = True
            self.bar.write(f"warning at step {step}: {warning}")
        self.shown |= {k: f"{row[k]:.3g}" for k in ("loss", "images_per_s", "knn") if k in row}
        self.bar.set_postfix(self.shown, refresh=False)
        self.clock, self.clock_step = time.time(), step  # evaluations do not count

    def save(self, step, backbone):
        """ckpt.pt, and export/ with the backbone under timm's names. Raises UserError rather than save a NaN."""
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in self.state.items()}
        tensors = [(name, t) for name, value in self.state.items() if isinstance(value, torch.nn.Module) for t in value.parameters()]
        bad = next((name for name, t in tensors if not t.isfinite().all()), None)
        if bad:
            raise UserError(f"the {bad}'s weights are not finite at step {step}: not saved; {self.dir}/ckpt.pt, if there, is sound")
        if rank():
            return
        buffer = io.BytesIO()
        torch.save({"script": self.script, "step": step, "seconds": self.seconds, "config": self.config, **state}, buffer)
        self.write("ckpt.pt", buffer.getvalue())
        c = self.config
        args = {"img_size": c["image_size"], "patch_size": c["patch_size"], "embed_dim": c["dim"], "depth": c["depth"]}
        args |= {"num_heads": c["heads"], "num_classes": 0}
        tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
        self.write("export/model.safetensors", to_safetensors(tensors))
        about = {"script": self.script, "step": step} | {k: c[k] for k in ("dataset", "data_dir", "seed")}
        self.write("export/config.json", json.dumps(about | {"model_args": args}, indent=1))
        self.clock = time.time()

    def restore(self, device):
        """Loads ckpt.pt into `state`, strictly, and drops the log's rows after it."""
        path = self.dir / "ckpt.pt"
        if not path.exists():
            print(f"{path} is not there yet: starting from step 0")
            return
        saved = load_checkpoint(path, device)
        if saved["script"] != self.script:
            raise UserError(f"{path} was written by {saved['script']}.py, not by {self.script}.py")
        try:
            for name, value in self.state.items():
                value.copy_(saved[name]) if isinstance(value, torch.Tensor) else value.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            changed = [k for k, v in saved["config"].items() if self.config.get(k) != v and k != "resume"]
            raise UserError(f"{path} does not fit; keys that differ from its run: {changed} ({first_line(error)})") from None
        self.start, self.seconds = saved["step"], saved["seconds"]
        lines = (self.dir / "log.jsonl").read_text(errors="replace").splitlines() if (self.dir / "log.jsonl").exists() else []
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                self.rows += [row] if row["step"] <= self.start else []
            except (ValueError, KeyError, TypeError):
                if i < len(lines) - 1:  # the last may be cut off
                    raise UserError(f"line {i + 1} of {self.dir}/log.jsonl is broken: mend or remove it") from None
                break
        print(f"resumed {path} at step {self.start}")

    def finish(self):
        """Closes the bar; prints the results, or how to resume; ends the process when a signal asked for it."""
        step = self.bar.n
        self.bar.close()
        if rank() == 0:
            self.lock.__exit__()
        if self.stop and step < self.steps:
            out_dir = shlex.quote(str(self.dir))
            print(f"stopped at step {step} and saved; go on with: python {sys.argv[0]} --out_dir={out_dir} --resume=True")
            sys.exit(128 + self.stop)
        print(f"\n| {self.script} on {self.config['dataset']} | |\n|---|---|")
        result = self.rows[-1] | {"minutes of training": self.seconds / 60, "seed": self.config["seed"]}
        for key, value in result.items():
            print(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
        print(f"| device | {self.device_name} |\n\nin {self.dir}: log.jsonl curves.png crops.png ckpt.pt export/")


def other_logger(config):
    """What takes a row of log.jsonl to where `logger` says. Raises UserError for one that is not installed."""
    name, out_dir = config["logger"], config["out_dir"]
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
            return lambda row: [writer.add_scalar(key, value, row["step"]) for key, value in row.items()]
        if name == "wandb":
            import wandb

            wandb.init(project="dino-twins", name=Path(out_dir).name, dir=out_dir, config=config)
            return lambda row: wandb.log(row, step=row["step"])
    except ImportError:
        raise UserError(f"--logger={name} needs a package that is not here: pip install {name}") from None
    return lambda row: None


def load_checkpoint(path, device="cpu"):
    """A run's ckpt.pt as a dict, every byte checked. Raises UserError for anything else."""
    saved = load_pickle(path, device)
    if not {"script", "step", "config"} <= saved.keys():
        raise UserError(f"{path} is no checkpoint of these scripts")
    return saved


def load_pickle(path, device="cpu"):
    """A dict that torch.save wrote, every byte checked, no code run. Raises UserError for anything else."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path} is damaged (bad checksum in {broken})")
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's official checkpoints have their arguments in one
            saved = torch.load(path, map_location=device, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds
        raise UserError(f"{path} is no whole checkpoint ({first_line(error)})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(saved).__name__}")
    return saved
