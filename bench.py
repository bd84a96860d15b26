"""Speed: images/s of the training scripts on this machine, the share spent on views, memory, and the limit.

Each row is a script on `shapes` with the defaults for larger data sets, ViT-Ti/4, and equally many local
views: 2 x 32 + 6 x 16 pixels (hybrid B 3 x 32), in its own process: `warmup`, then `steps` measured steps.

    TFLOP/s = floating-point operations of a step's matrix products, including attention / seconds of a step
    of the limit = that / TFLOP/s of a large matrix product in the same precision, the best of twenty

    python bench.py                                                          on a GPU
    python bench.py --batch_size=32 --warmup=2 --steps=3 --compile=False     on a CPU
    python bench.py --scripts=hybrid_a --trace=True                          also what takes a step's time
    python bench.py --against=torchvision     only views, compared with a DataLoader of per-image transforms
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import Crop, load, multi_crop
from twins.datasets import MEAN, STD
from twins.errors import ROOT
from twins.files import git_state, make_folder, read_json, write_file
from twins.keys import parse
from twins.processes import precision, product_speed, setup
from twins.settings import read_script

scripts = "dino,barlow,hybrid_a,hybrid_b"  # training scripts to measure
against = ""  # only compare the speed of views with another library's [|torchvision]
out_dir = "out/bench"  # where bench.json and traces go
device = "auto"  # cuda or cpu; auto: cuda if available
dtype = "auto"  # of the networks; auto: bfloat16 where it is faster [float32|bfloat16]
compile = True  # also measure each script with torch.compile
batch_size = 1024  # images per step [2..]
n_local = 6  # local views per image [0..]
dim = 192  # width of the ViT [1..]
depth = 12  # blocks [1..]
heads = 3  # attention heads [1..]
warmup = 10  # steps before the measured ones [2..]
steps = 30  # measured steps [1..]
trace = False  # profile three more steps: the most expensive operations, and files for ui.perfetto.dev

COLUMNS = ("images/s", "ms a step", "in views", "peak GiB", "TFLOP/s", "of the limit", "first step after, s")


def run_stopwatch(script, options, trace_file):
    """Runs a script in its own process; returns a Stopwatch's result, None if the script failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [ROOT / "twins" / "stopwatch.py", result, warmup, steps, trace_file, script, *words]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        code = subprocess.run([sys.executable, *map(str, command)], env=environment).returncode
        if code < 0:
            print(f"error: killed by signal {-code}: lower --batch_size if memory is short", file=sys.stderr)
        return read_json(result) if result.exists() else None


def table_row(row):
    """A row's cells in the table: a string for each of COLUMNS."""
    memory = f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""
    rate = row["flop"] / row["seconds"]
    times = [f"{batch_size / row['seconds']:.0f}", f"{1000 * row['seconds']:.1f}"]
    rates = [f"{rate / 1e12:.3g}", f"{100 * rate / row['limit']:.0f} %"]
    return [*times, f"{100 * row['views']:.1f} %", memory, *rates, f"{row['first']:.0f}"]


def time_scripts(report, device, options_of):
    """Measures scripts {path: options}, prints a table, writes bench.json; returns those that failed."""
    rows, failed = [], []
    side = 8192 if device.type == "cuda" else 2048
    limit = product_speed(device, getattr(torch, report["dtype"]), side)
    print(f"| script | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}", flush=True)
    for compiled in (False, True) if compile else (False,):
        for script, defaults in options_of.items():
            title = f"{script.stem} compiled" if compiled else script.stem
            options = {**defaults, "dataset": "shapes", "device": device, "dtype": report["dtype"]}
            options.update(compile=compiled, batch_size=batch_size, n_local=n_local)
            options.update(dim=dim, depth=depth, heads=heads, max_steps=10**6, eval_every=10**6)
            options.update(save_every=10**6, knn_bank=100, knn_queries=100)
            trace_file = Path(out_dir) / f"{title.replace(' ', '-')}.json.gz" if trace else ""
            result = run_stopwatch(script, options, trace_file)
            if result is None:
                failed.append(title)
                continue
            if compiled:  # cannot be counted: as many as without torch.compile
                result["flop"] = next((row["flop"] for row in rows if row["script"] == script.stem), 0)
            rows.append({"script": script.stem, "compiled": compiled, "limit": limit, **result})
            print(f"| {title} | {' | '.join(table_row(rows[-1]))} |", flush=True)
            write_file(Path(out_dir) / "bench.json", json.dumps({**report, "rows": rows}, indent=1))
    for row in rows if trace else []:
        title = f"{row['script']} compiled" if row["compiled"] else row["script"]
        operations = [f"{name} {100 * share:.1f} %" for name, share in list(row["operations"].items())[:8]]
        print(f"\n{title}: {', '.join(operations)}")
    if rows:
        print(f"\nwrote {out_dir}/bench.json")
    return failed


class PerImage(torch.utils.data.Dataset):
    """Views the usual way: PIL and torchvision, one image at a time. item -> a list of [3 v v]."""

    def __init__(self, images, crops):
        from torchvision.transforms import v2

        self.images = images
        self.views = []
        for crop in crops:
            bicubic = v2.InterpolationMode.BICUBIC
            steps = [v2.RandomResizedCrop(crop.size, crop.scale, interpolation=bicubic)]
            steps += [v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)]
            steps += [v2.RandomGrayscale(0.2), v2.RandomSolarize(128, crop.solarize)]
            steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
            self.views.append(v2.Compose(steps))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from torchvision.transforms.functional import to_pil_image

        image = to_pil_image(self.images[i])
        return [view(image) for view in self.views]


def time_views(report, device):
    """Prints images/s of our views and of torchvision's in a DataLoader on all cores; writes views.json."""
    crops = [Crop(32, (0.4, 1.0)), Crop(32, (0.4, 1.0), solarize=0.2)] + [Crop(16, (0.1, 0.4))] * n_local
    images = load("shapes", "", 32).images
    images = images.repeat(-(-(warmup + steps) * batch_size // len(images)), 1, 1, 1)
    on_device = images.to(device)

    def ours():
        for step in range(warmup + steps):
            yield multi_crop(on_device[step * batch_size : (step + 1) * batch_size], crops, 0, step)

    def theirs():
        on_gpu = device.type == "cuda"
        options = {"num_workers": os.cpu_count(), "drop_last": True, "pin_memory": on_gpu}
        for views in torch.utils.data.DataLoader(PerImage(images, crops), batch_size, **options):
            yield [view.to(device, non_blocking=True) for view in views]

    speeds = {}
    for name, batches in (("ours", ours()), ("torchvision", theirs())):
        for _ in range(warmup):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            views = next(batches)
        views[0].sum().item()  # waits for the device
        speeds[name] = steps * batch_size / (time.perf_counter() - start)
        batches.close()
    print(f"| views | images/s |\n|---|---:|\n| ours, on {device} | {speeds['ours']:.0f} |")
    print(f"| torchvision, DataLoader, {os.cpu_count()} workers | {speeds['torchvision']:.0f} |")
    write_file(Path(out_dir) / "views.json", json.dumps({**report, "images_per_s": speeds}, indent=1))


if __name__ == "__main__":
    _, _, given = parse(globals())
    globals().update(given)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the child, too
    files = [ROOT / f"{name}.py" for name in scripts.split(",")]
    options_of = {file: read_script(file, ()) for file in files}  # without the shapes preset
    device, _ = setup(device, dtype, 0)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"cpu, {torch.get_num_threads()} threads"
    report = {"device": name, "dtype": precision(dtype, device), "batch_size": batch_size}
    report.update(torch=torch.__version__, **git_state())
    make_folder(out_dir)  # fails before anything is measured
    print(f"{name}, {report['dtype']}, batch {batch_size}, torch {torch.__version__}\n")
    if against:
        time_views(report, device)
        sys.exit()
    failed = time_scripts(report, device, options_of)
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")
