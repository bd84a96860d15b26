"""What the scripts share and what changes nothing that is learned: keys, device, checkpoints, logs, the k-NN monitor."""

import argparse
import ctypes
import difflib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import einops
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
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
    (2, math.inf): "batch_size",  # one image has no batch statistics
    (1, math.inf): """epochs dim depth heads patch_size log_every eval_every save_every out_dim hidden_dim bottleneck_dim
        proj_dim knn_bank knn_queries""",
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
    script.update(config)
    return config


def configure_evaluation(script):
    """Reads --key=value into an evaluation script's globals. Returns every key with its value; --ckpt must be given.

    PRESETS[dataset] holds for --ckpt=random alone: a checkpoint knows its own architecture.
    """
    keys, given = read_keys(script)
    if not given.get("ckpt"):
        raise UserError("--ckpt is missing: give a run's ckpt.pt, its export/, an official DINO .pth, or random")
    preset = script["PRESETS"].get(given.get("dataset"), {}) if given["ckpt"] == "random" else {}
    config = keys | preset | given
    check(config)
    script.update(config)
    return config


def check(config):
    """Raises UserError for the first value that cannot be."""
    from vit import check_size

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.get("batch_size", 0) % processes:
        raise UserError(f"--batch_size={config['batch_size']} is for all processes together and cannot be shared by {processes}")
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


def explain(kind, error, trace):
    close_bars()
    if issubclass(kind, UserError):
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # the first process says it for all, and torchrun ends it when another has ended
        else:
            print(f"error: {error}", file=sys.stderr)
    elif world() > 1 and issubclass(kind, RuntimeError) and re.search("peer|[Cc]onnection|NCCL|[Tt]imed out", str(error)):
        lost = f"another process of this run ended or hangs ({first_line(error)})"
        print(f"error: process {rank()} stops, {lost}; ckpt.pt is as it was last saved, go on with --resume=True", file=sys.stderr)
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
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # torchrun
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    batch_rand.rows = batch_size // world()
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: keep freed memory instead of asking the kernel anew, a step takes a fifth less
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


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


# ------------------------------------------------------------------------------------------------------------------ run


class Run:
    """A run's folder: config.json, log.jsonl, ckpt.pt, curves.png, export/; its progress bar, its end.

    `state` names what a checkpoint holds: modules, the optimizer, tensors. `start` is the first step to do, 0 or where the
    resumed run stopped. A signal (Ctrl-C, TERM) sets `stop`; the loop ends after its step.
    """

    def __init__(self, config, steps, state, device):
        self.config, self.steps, self.state, self.dir = config, steps, state, Path(config["out_dir"])
        self.script, self.start, self.stop, self.seconds, self.rows = Path(sys.argv[0]).stem, 0, 0, 0.0, []
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        if config["resume"]:
            self.restore(device)
        about = {"script": self.script, "git_commit": git_commit(), "device_name": self.device}
        about["versions"] = {m.__name__: m.__version__ for m in (torch, np, einops)} | {"python": sys.version.split()[0]}
        self.write("config.json", json.dumps(config | about, indent=1))
        self.write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.bar = tqdm(total=steps, initial=self.start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15)
        self.shown, self.clock, self.clock_step, self.warned = {}, time.time(), self.start, False
        self.report = other_logger(config) if rank() == 0 else None
        self.signals = dist.new_group(backend="gloo") if world() > 1 else None  # of the CPU: no step waits for it
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.stop = number
        signal.signal(number, signal.SIG_DFL)  # the second one ends it at once

    def update(self):
        """Moves the bar; what one process was told by a signal, all know after the same step."""
        self.bar.update()
        if world() > 1:
            stop = torch.tensor(self.stop)
            dist.all_reduce(stop, dist.ReduceOp.MAX, self.signals)
            self.stop = stop.item()

    def write(self, name, content):
        if rank() == 0:
            write_file(self.dir / name, content)

    def row(self, step, **values):
        """What a log row starts with: finite numbers, and the images/s since the last row. Raises UserError for a NaN."""
        row = numbers(values)
        bad = next((k for k, v in row.items() if not math.isfinite(v)), None)
        if bad:
            sound = f"{self.dir}/ckpt.pt holds the last sound step" if (self.dir / "ckpt.pt").exists() else "nothing was saved yet"
            raise UserError(f"{bad} is {row[bad]} at step {step}; {sound}. A lower --base_lr or --dtype=float32 may help")
        now = time.time()
        self.seconds += now - self.clock
        row["images_per_s"] = (step - self.clock_step) * self.config["batch_size"] / (now - self.clock)
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
        if self.stop and step < self.steps:
            out_dir = shlex.quote(str(self.dir))
            print(f"stopped at step {step} and saved; go on with: python {sys.argv[0]} --out_dir={out_dir} --resume=True")
            sys.exit(128 + self.stop)
        print(f"\n| {self.script} on {self.config['dataset']} | |\n|---|---|")
        result = self.rows[-1] | {"minutes of training": self.seconds / 60, "seed": self.config["seed"]}
        for key, value in result.items():
            print(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
        print(f"| device | {self.device} |\n\nin {self.dir}: log.jsonl curves.png crops.png ckpt.pt export/")


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


def load_backbone(config, device):
    """The ViT that --ckpt names, in evaluation mode, and what is known of it: {script, step, dataset, data_dir, image_size ...}.

    A run's ckpt.pt, an export folder, an official DINO .pth, or 'random'. Raises UserError for anything else.
    """
    from vit import ViT

    path, about, heads = Path(config["ckpt"]), {"ckpt": config["ckpt"], "weights": config["weights"]}, config["heads"]
    if config["ckpt"] == "random":
        about |= {"image_size": config["image_size"] or 32, "data_dir": "data"}
        return ViT(about["image_size"], config["patch_size"], config["dim"], config["depth"], heads).to(device).eval(), about
    if path.is_dir():
        saved = read_json(path / "config.json")
        if "model_args" not in saved or not (path / "model.safetensors").exists():
            raise UserError(f"--ckpt={path} is no export folder: give a run's ckpt.pt or its export/")
        try:
            state, heads = from_safetensors((path / "model.safetensors").read_bytes()), saved["model_args"]["num_heads"]
        except Exception as error:
            raise UserError(f"{path}/model.safetensors is damaged ({first_line(error)})") from None
        about |= {k: saved[k] for k in ("script", "step", "dataset", "data_dir", "seed") if k in saved}
    elif path.exists():
        saved = load_pickle(path, device)
        state = saved.get(config["weights"], saved.get("student", saved))
        state = {k.split("backbone.")[-1]: v for k, v in state.items() if "backbone." in k} or state
        if "script" in saved:
            heads = saved["config"]["heads"]
            about |= {k: saved[k] for k in ("script", "step")} | {k: saved["config"][k] for k in ("dataset", "data_dir", "seed")}
        elif "cls_token" in state:
            heads = max(state["cls_token"].shape[-1] // 64, 1)  # of every official DINO ViT
    else:
        raise UserError(f"--ckpt={path} is not there: give a run's ckpt.pt, its export/, an official DINO .pth, or random")
    try:
        patch, depth = state["patch_embed.proj.weight"].shape[-1], len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        about["image_size"] = int((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
        backbone = ViT(about["image_size"], patch, state["cls_token"].shape[-1], depth, heads)
        backbone.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"--ckpt={path} holds no ViT of timm's key names ({first_line(error)})") from None
    return backbone.to(device).eval(), about


# ------------------------------------------------------------------------------------------------- k-NN monitor, meters


@torch.no_grad()
def features(backbone, images, rows, device, autocast, batch_size=500):
    """[CLS] features float32 [m d] of some rows int64 [m] of uint8 images [n 3 s s]."""
    from data import from_bytes, normalise

    was, out = backbone.training, []
    backbone.eval()
    for some in rows.tensor_split(world())[rank()].split(batch_size):
        with autocast:
            z = backbone(normalise(from_bytes(images[some].to(device))))
        out.append(float32(z))
    backbone.train(was)
    return gather(torch.cat(out))


def knn(bank, bank_labels, queries, k=20, temperature=0.07):
    """Weighted k-NN (Wu et al., 1805.01978): features [n d], labels int64 [n], queries [m d] -> votes [m classes].

    A query's k nearest bank images by cosine vote with weight exp(cosine / temperature); the answer is the argmax.
    """
    bank, votes = F.normalize(bank, dim=1), []
    for chunk in F.normalize(queries, dim=1).split(1000):
        similar, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        empty = torch.zeros(len(chunk), int(bank_labels.max()) + 1, device=bank.device)
        votes.append(empty.scatter_add_(1, bank_labels[nearest], (similar / temperature).exp()))
    return torch.cat(votes)


def evaluate(backbone, data, bank, queries, device, autocast):
    """One evaluation row: knn (share of the queries that are right, absent without labels), feature_std, rank.

    data: Split; bank, queries: rows of it, int64 [m]. feature_std is the mean column's std of L2-normalised features times sqrt(d),
    1 when they fill the sphere and 0 when they collapse (SimSiam, 2011.10566); rank is RankMe (2210.02885), exp of the entropy of
    the singular values.
    """
    z, row = features(backbone, data.images, bank, device, autocast), {}
    if len(queries):
        votes = knn(z, data.labels[bank].to(device), features(backbone, data.images, queries, device, autocast))
        row["knn"] = (votes.argmax(1) == data.labels[queries].to(device)).float().mean()
    z = F.normalize(z[:4096], dim=1)
    p = torch.linalg.svdvals(z)
    p = p / p.sum() + 1e-7
    return row | {"feature_std": z.std(0).mean() * z.shape[1] ** 0.5, "rank": (-(p * p.log()).sum()).exp()}


def entropy(p):
    """Mean entropy in nats of distributions p [... k]; ln k when uniform, 0 when each is one prototype."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1).mean()


def collapse(rows, steps, config):
    """One sentence when the last rows, 4 % of the run and two at least, all show features that collapse, else an empty one."""
    window = [r for r in rows if "loss" in r][-max(2, steps // (25 * config["log_every"])) :]

    def always(key, low, high):
        return len(window) > 1 and all(low <= row.get(key, math.inf) <= high for row in window)

    uniform = math.log(config.get("out_dim", 2))
    if always("teacher_entropy", 0.99 * uniform, uniform + 1):
        return f"the teacher is uniform over the prototypes (teacher_entropy is ln out_dim = {uniform:.3f}): sharpen it, tau_t < tau_s"
    if always("teacher_entropy", 0, 0.01 * uniform):
        return "the teacher puts every image on one prototype (teacher_entropy is 0): is centering on?"
    if always("kl", -1, 0.01):
        return f"every image has the same output (kl between teacher and student is {rows[-1]['kl']:.2g}): sharpen or center"
    warm = rows[-1].get("epoch", 0) < config["warmup_epochs"]  # at a learning rate near 0 nothing moves yet
    if not warm and always("ce", 0.99 * uniform, 1.01 * uniform):
        return f"ce is stuck at ln out_dim = {uniform:.3f}, the loss of a student that knows nothing"
    if rows[-1].get("feature_std", 1) < 0.01:
        return f"all images have the same features (feature_std is {rows[-1]['feature_std']:.2g})"
    return ""


@torch.no_grad()
def correlation_meters(z1, z2):
    """c_diag, c_off: mean of the diagonal, mean size off it, of the cross-correlation of two projections [b d]."""
    z1, z2 = (z - global_mean(z.mean(0)) for z in (z1, z2))
    z1, z2 = (z / (global_mean(z.square().mean(0)) + 1e-5).sqrt() for z in (z1, z2))
    c, d = global_mean(z1.T @ z2 / len(z1)), z1.shape[1]
    return {"c_diag": c.diagonal().mean(), "c_off": (c.abs().sum() - c.diagonal().abs().sum()) / max(d * d - d, 1)}


# ------------------------------------------------------------------------------------------------------------- pictures


def curves_picture(rows):
    """curves.png: every column of the log against the step, what belongs together in one panel. Returns the file's bytes."""
    from matplotlib.figure import Figure  # here, for the import takes a second

    panels = {"loss": ["loss", "ce", "cc"], "k-NN accuracy": ["knn", "knn_init"], "teacher entropy, KL": ["teacher_entropy", "kl"]}
    panels |= {"feature std, C": ["feature_std", "c_diag", "c_off"], "RankMe": ["rank"], "learning rate": ["lr"]}
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def crops_picture(images, views, names):
    """crops.png: images uint8 [b 3 s s] and their views, a list of [b 3 v v], a column each. Returns the file's bytes."""
    from PIL import Image, ImageDraw  # not matplotlib: a run starts half a second sooner

    from data import MEAN, STD, from_bytes

    columns = [from_bytes(images.cpu())]
    columns += [v.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None] for v in views]
    zoom = max(128 // images.shape[-1], 1)
    cell = zoom * images.shape[-1] + 8
    sheet = Image.new("RGB", (cell * len(columns), cell * len(images) + 20), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (column, name) in enumerate(zip(columns, ["image", *names], strict=True)):
        pen.text((i * cell + 4, 4), name, "black")
        for j, pixels in enumerate((column.clamp(0, 1) * 255).byte()):
            tile = Image.fromarray(einops.rearrange(pixels, "c h w -> h w c").numpy())
            tile = tile.resize((zoom * tile.width, zoom * tile.height), Image.Resampling.NEAREST)
            sheet.paste(tile, (i * cell + 4, j * cell + 20))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()
