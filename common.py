"""What all scripts share and what changes nothing that is learned: keys, errors, device, processes, files."""

import argparse
import atexit
import ctypes
import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import einops
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if int(os.environ.get("RANK", 0)):  # of the processes of torchrun the first one speaks
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that one sentence explains: a script that was configured prints the sentence and ends with exit code 1."""


# ----------------------------------------------------------------------------------------------------------------- keys


CHOICES = {"dtype": ("auto", "float32", "bfloat16", "float64"), "logger": ("", "tensorboard", "wandb")}
CHOICES |= {"head": ("shared", "two"), "weights": ("teacher", "student")}
RANGES = {  # lowest and highest value of a script's keys
    (2, math.inf): "batch_size warmup",  # one image has no batch statistics
    (1, math.inf): """epochs dim depth heads patch_size log_every eval_every save_every out_dim hidden_dim bottleneck_dim
        proj_dim knn_bank knn_queries rows n_images permutations steps""",
    (0, math.inf): """seed memory_gib max_steps n_local base_lr min_lr warmup_epochs wd wd_end grad_clip alpha lambd
        freeze_last_layer_epochs tau_t_warmup_epochs""",
    (0, 1): "ema ema_end center_momentum label_fraction",
    (0, 0.99): "drop_path",
    (1e-6, math.inf): "tau_s tau_t tau_t_start",
}


def read_keys(script):
    """The keys of a script with their defaults, and those given on the command line.

    A key is a lower-case global of type bool, int, float, str or tuple; its default gives the type, the comment behind it
    the meaning. Exits with 2 for an unknown key, naming the nearest, and for a wrong type.
    """
    sys.excepthook = explain
    keys = {k: v for k, v in script.items() if k[0] != "_" and k.islower() and isinstance(v, bool | int | float | str | tuple)}
    meaning = dict(re.findall(r"^ *(\w+) = [^#\n]+# (.+)$", Path(script["__file__"]).read_text(encoding="utf-8"), re.M))
    parser = argparse.ArgumentParser(
        description=script["__doc__"], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, value in keys.items():
        kind = {bool: true_or_false, tuple: low_high}.get(type(value), type(value))
        text = f"{meaning.get(key, '')} (default: {value!r})".replace("%", "%%")
        parser.add_argument(f"--{key}", type=kind, metavar=kind.__name__.upper(), default=argparse.SUPPRESS, help=text)
    given, unknown = parser.parse_known_args()
    for word in unknown:
        near = difflib.get_close_matches(word.lstrip("-").split("=")[0], keys, 1)
        parser.error(f"unknown key {word}: " + (f"did you mean --{near[0]}?" if near else "--help lists the keys"))
    return keys, vars(given)


def configure(script):
    """Reads --key=value into a training script's globals. Returns every key with its value.

    A key not given takes the value of the run that is resumed, else of PRESETS[dataset], else its default. Raises UserError
    for an out_dir that holds a run, unless it is resumed, and for values that cannot be.
    """
    keys, given = read_keys(script)
    name, dataset = Path(script["__file__"]).stem, given.get("dataset", keys["dataset"])
    preset = script["PRESETS"].get(dataset, {})
    out = Path(given.get("out_dir") or f"out/{name}-{dataset}").expanduser()
    config = {**keys, **preset, "out_dir": str(out)}
    if (out / "config.json").exists() or (out / "ckpt.pt").exists():
        if not given.get("resume"):
            raise UserError(f"{out} already holds a run: go on with --resume=True, or give another --out_dir")
        saved = read_json(out / "config.json")
        if saved.get("script") != name:
            raise UserError(f"{out} holds a run of {saved.get('script')}.py, not of {name}.py: give another --out_dir")
        config |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in keys}
        changed = [k for k, v in given.items() if k not in ("resume", "out_dir", "data_dir") and v != config[k]]
        for key in {"dataset", "seed"} & set(changed):
            raise UserError(f"{out} is a run with --{key}={config[key]}: leave --{key} out, or start anew in another --out_dir")
        if changed:
            print("changed on resuming: " + " ".join(f"--{k}={given[k]} (was {config[k]})" for k in changed), flush=True)
    elif given.get("resume"):
        raise UserError(f"{out} holds no run to resume (no config.json): leave --resume out, or give its --out_dir")
    elif preset:
        words = " ".join(f"--{k}={v}" for k, v in preset.items() if k not in given)
        print(f"defaults for {dataset}: {words}", flush=True)
    config |= given | {"out_dir": str(out)}
    config["data_dir"] = str(Path(config["data_dir"]).expanduser().absolute())  # so that resuming works from any folder
    check(config)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config["batch_size"] % processes:
        raise UserError(f"--batch_size={config['batch_size']} is for all processes together and cannot be shared by {processes}")
    script.update(config)
    return config


def check(config):
    """Raises UserError for the first value that cannot be."""
    for (low, high), keys in RANGES.items():
        for key in keys.split():
            value = config.get(key, low)
            if not (low <= value <= high and math.isfinite(value)):
                raise UserError(f"--{key}={value}: it must be a number from {low} to {high}")
    for key, values in CHOICES.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"--{key}={config[key]} is unknown: choose {' or '.join(value for value in values if value)}")
    for key, used in (("image_size", "n_local" in config), ("local_size", config.get("n_local"))):
        if used:
            check_size(config[key], config["patch_size"])
    for key in ("global_scale", "local_scale"):
        low, high = config.get(key, (1, 1))
        if not 0 < low <= high <= 1:
            raise UserError(f"--{key}={low},{high}: it must be two shares of the image's area, 0 < low <= high <= 1")


def check_size(size, patch_size):
    """Raises UserError, naming the nearest sizes that work, unless patch_size divides size."""
    if size % patch_size or size < patch_size:
        below = size // patch_size * patch_size
        near = " or ".join(str(s) for s in (below, below + patch_size) if s)
        raise UserError(f"an image size of {size} is not a multiple of patch_size={patch_size}: try {near}")


def explain(kind, error, trace):
    close_bars()
    atexit.unregister(part)  # it might wait for the other processes
    if issubclass(kind, UserError):
        if int(os.environ.get("RANK", 0)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # if the first process says it for all, torchrun ends this one meanwhile
        who = f" of process {os.environ['RANK']}" if int(os.environ.get("RANK", 0)) else ""
        print(f"error{who}: {error}", file=sys.stderr)
    elif world() > 1 and issubclass(kind, RuntimeError) and re.search("peer|[Cc]onnection|NCCL|[Tt]imed out", str(error)):
        lost = f"another process of this run ended or hangs ({first_line(error)})"
        print(f"error: process {rank()} stops, {lost}; ckpt.pt is as it was last saved, go on with --resume=True", file=sys.stderr)
    elif issubclass(kind, torch.OutOfMemoryError):
        print(f"error: {first_line(error)}\nckpt.pt is as it was last saved; a smaller --batch_size takes less memory", file=sys.stderr)
    elif kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        print(f"error: torch.compile fails here ({first_line(error)}): go on with --compile=False", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped before the first step: nothing to save", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def close_bars():
    """Closes the progress bars of what was broken off: left open, they write behind the last sentence."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def low_high(text):
    low, high = (float(part) for part in text.strip("()[] ").split(","))
    return low, high


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error = "it holds no keys"
    except (OSError, ValueError) as broken:
        error = broken
    raise UserError(f"{path} cannot be read ({error}): the run is not to be had without it")


def setup(device, dtype, seed, batch_size=0):
    """Device and autocast context of a run, and its processes joined. Raises UserError for what this machine does not have."""
    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device} does not work here ({first_line(error)}): try --device=cpu") from None
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # slower than float32 if emulated
        dtype = "bfloat16" if fast else "float32"
    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(part)
    batch_rand.rows = batch_size // world()
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: keep freed memory instead of asking the kernel anew, a step takes a fifth less
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def part():
    """Ends what joins the processes. Gloo's threads may hold tensors yet; torch 2.10 and 2.11 abort a Python that ends meanwhile."""
    time.sleep(0.1)
    dist.destroy_process_group()


def seed_step(seed, step):
    """Makes torch's random numbers (drop path) a function of seed and step alone, so that a resumed run is the same run."""
    torch.manual_seed(int(np.random.SeedSequence((seed, 2, step)).generate_state(1, np.uint64)[0]))


def cosine(start, end, step, steps, warmup=0):
    """Value at `step` of `steps`: linear from 0 to `start` during `warmup` steps, then half a cosine down or up to `end`."""
    if step < warmup:
        return start * step / warmup
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


# ------------------------------------------------------------------------------------------------------------ processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


class MeanOfProcesses(torch.autograd.Function):
    """all_reduce has no gradient. With the mean of the processes' gradients here, DistributedDataParallel's mean is the true one."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x / world()

    @staticmethod
    def backward(ctx, gradient):
        return MeanOfProcesses.apply(gradient)


def global_mean(x):
    """A mean over this process's part of the batch -> the mean over the batch, with its gradient."""
    return MeanOfProcesses.apply(x) if world() > 1 else x


class BatchNorm1d(torch.nn.BatchNorm1d):
    """BatchNorm with the statistics of the whole batch, of all processes, in training and evaluation. x [n d]."""

    def __init__(self, dim):
        super().__init__(dim, track_running_stats=False)

    def forward(self, x):
        if world() == 1:
            return super().forward(x)
        z = float32(x)
        z = z - global_mean(z.mean(0))
        z = z * (global_mean(z.square().mean(0)) + self.eps).rsqrt()
        return (z * self.weight + self.bias).to(x.dtype)


def batch_rand(n, device):
    """`n` uniform random numbers for rows "(v b)" of this process's images: those that one process would draw for these."""
    numbers = torch.rand(n * world(), device=device)
    if world() == 1:
        return numbers
    return einops.rearrange(numbers, "(v w b) -> w (v b)", w=world(), b=batch_rand.rows)[rank()]


def my_part(x):
    """This process's rows of x [n ...]; gather() puts the parts together again."""
    return x.tensor_split(world())[rank()]


def gather(x):
    """Rows [n ...] of each process, their numbers may differ -> all rows, in order."""
    if world() == 1:
        return x
    parts = [None] * world()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


def distributed(module):
    """The module, with gradients that are the mean over all processes."""
    if world() == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def float32(x):
    """What autocast made bfloat16, in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def numbers(row):
    """A row's tensors as numbers, the mean over all processes."""
    names = [k for k, v in row.items() if isinstance(v, torch.Tensor)]
    if not names:
        return row
    with torch.no_grad():
        values = global_mean(torch.stack([row[k].detach().double() for k in names]))
    return row | dict(zip(names, values.tolist(), strict=True))


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def git_commit():
    """The commit of this code, empty where there is none."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return git.stdout.strip()


def write_file(path, content):
    """Writes a file whole or not at all. Raises UserError when the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): what was saved before is whole") from None
