"""Studies: which settings learn, which method learns best, which mechanisms can go. Runs the real scripts.

    python ablate.py --study=search   --dataset=cifar10 --trials=16   random settings, the same number for all
    python ablate.py --study=models   --dataset=cifar10 --seeds=6     the best setting of each on fresh seeds
    python ablate.py --study=removal  --dataset=cifar10 --seeds=6     each mechanism off alone, and all of them
    python ablate.py --study=... --dry_run=True                       what it would run, and how long that takes
    python ablate.py --study=... --report=True                        tables and figures from the rows alone

All runs of a study have the same floating-point operations: steps = pflop / those of a step, counted. A search
sees held-out training images alone. Its best setting is the one of highest k-NN accuracy among the trials that
did not collapse: RankMe a quarter of the untrained network's or more, k-NN accuracy not below it. Finished runs
are skipped, stopped ones resumed; Ctrl-C saves all. Seeds and trials go round by round, so any prefix is a table.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench import in_a_process
from twins.errors import ROOT, UserError
from twins.files import git_state, write_file
from twins.keys import parse, read_options
from twins.studies import read_rows, report_study, winner

study = "search"  # which question [search|models|removal]
dataset = "cifar10"  # any data set of the training scripts
data_dir = "data"  # where its files are
name = ""  # of the results' folder; empty: <study>-<dataset>
scripts = "dino,barlow,hybrid_a,hybrid_b"  # which ones
preset = "small"  # of the scripts; for dataset=shapes its own is used
trials = 16  # random settings of a search [1..]
seeds = 6  # runs of each setting of the other studies [1..]
pflop = 0.016  # of each run, forward and backward, student and teacher [0..]
jobs = 0  # runs at once; 0: one per CPU core, or one per GPU [0..]
runs_dir = "out/studies"  # where the runs are, with their checkpoints
device = "auto"  # of the runs
dry_run = False  # only say what would run, and for how long
report = False  # only make the tables and figures again

SPACE = {  # of a search; a list: one of these; a pair: log-uniform between them
    "base_lr": (5e-4, 8e-3),
    "wd": [0.0, 0.04, 0.1],
    "grad_clip": [0.0, 3.0],
    "batch_size": [64, 128, 256],
    "n_local": [0, 2, 4],
    "ema": [0.8, 0.9, 0.95, 0.97, 0.99, 0.996],
    "tau_t": [0.03, 0.04, 0.055, 0.07, 0.09],
    "center_momentum": [0.9, 0.99],
    "out_dim": [128, 512, 1024],
    "bottleneck_dim": [64, 128, 256],
    "head_bn": [False, True],
    "norm_last_layer": [False, True],
    "freeze_last_layer_epochs": [0.0, 0.2, 1.0],
    "alpha": (1.0, 200.0),
    "lambd": (1e-3, 5e-2),
    "head": ["shared", "two"],
    "proj_dim": [256, 512, 1024],
    "cc_local": [False, True],
}
FIXED = {"hidden_dim": 512, "tau_t_warmup_epochs": 0.0, "warmup_epochs": 0.5}  # of every trial
MECHANISMS = {  # what is switched off: the option, its value without the mechanism, its value with it
    "centering": ("centering", False, True),
    "sharpening": ("tau_t", 0.1, 0.04),
    "teacher-temperature warm-up": ("tau_t_warmup_epochs", 0.0, 2.0),
    "EMA schedule": ("ema_end", "ema", 1.0),
    "EMA": ("ema", 0.0, 0.97),
    "weight-normed last layer": ("norm_last_layer", False, True),
    "frozen last layer": ("freeze_last_layer_epochs", 0.0, 1.0),
    "L2 bottleneck": ("l2_bottleneck", False, True),
    "BatchNorm in the head": ("head_bn", False, True),
    "learning-rate warm-up": ("warmup_epochs", 0.0, 0.5),
    "weight-decay schedule": ("wd_end", "wd", 0.4),
    "gradient clipping": ("grad_clip", 0.0, 3.0),
    "multi-crop": ("n_local", 0, 2),
}
MONITOR = {"knn_bank": 5000, "knn_queries": 5000}
PROBE_STEPS = 3  # timed after two to warm up

running, lock = set(), threading.Lock()


def draw_setting(script, trial):
    """The setting of a trial: the options of SPACE that the script has. One trial's shared options are equal in all scripts."""
    options, setting = read_options(ROOT / f"{script}.py"), {}
    for i, (option, values) in enumerate(SPACE.items()):
        rng = np.random.default_rng((trial, i))
        if isinstance(values, tuple):
            value = float(f"{math.exp(rng.uniform(*map(math.log, values))):.3g}")
        else:
            value = values[rng.integers(len(values))]
        if option in options:
            setting[option] = value
    setting.update({option: value for option, value in FIXED.items() if option in options})
    return setting


def remove(setting, mechanism, options):
    """The setting with one mechanism toggled, and 'off' or, where the setting does without it, 'on'."""
    option, without, with_it = MECHANISMS[mechanism]
    now = setting.get(option, options[option].default)
    without = setting.get(without, options[without].default) if isinstance(without, str) else without
    state = "on" if now == without else "off"
    return {**setting, option: with_it if state == "on" else without}, state


def cells():
    """The runs of the study in order, each {script, label, seed, setting}."""
    made = []
    names = [script.strip() for script in scripts.split(",")]
    for script in names:
        if not (ROOT / f"{script}.py").exists():
            raise UserError(f"--scripts={scripts}: there is no {script}.py")
    if study == "search":
        for trial in range(trials):
            for script in names:
                made.append({"script": script, "label": "trial", "seed": trial, "setting": draw_setting(script, trial)})
        return made
    found = read_rows(folder().with_name(folder().name.replace(study, "search", 1)))
    settings = {script: winner(found, script) for script in names}
    for seed in range(1000, 1000 + seeds):  # a search has the seeds below
        for script in names:
            options, setting = read_options(ROOT / f"{script}.py"), settings[script]
            made.append({"script": script, "label": "full", "seed": seed, "setting": setting})
            if study == "removal" and "ema" in options:
                everything = setting
                for mechanism in MECHANISMS:
                    changed, state = remove(setting, mechanism, options)
                    made.append({"script": script, "label": f"{mechanism} {state}", "seed": seed, "setting": changed})
                    if state == "off":
                        everything, _ = remove(everything, mechanism, options)
                made.append({"script": script, "label": "all off", "seed": seed, "setting": everything})
    return made


def folder():
    return ROOT / "results" / (name or f"{study}-{dataset}")


def cell_name(cell):
    return f"{cell['script']}-{cell['label']}-{cell['seed']}".replace(" ", "_")


def settings_of(cell):
    """All options that a run of this cell is given, less its length and folder."""
    options = {"dataset": dataset, "data_dir": data_dir, "seed": cell["seed"], "device": device, **MONITOR}
    if dataset != "shapes":
        options["preset"] = preset
    return {**options, **cell["setting"]}


def measure(cell):
    """{flop: of a step, seconds: of a step}, from five steps in a process of their own. None if they fail."""
    few = {"knn_bank": 50, "knn_queries": 20, "max_steps": 10**6, "eval_every": 10**6, "compile": False}
    with tempfile.TemporaryDirectory() as out:
        options = {**settings_of(cell), **few}
        return in_a_process(str(ROOT / f"{cell['script']}.py"), options, out, 2, PROBE_STEPS, "")


def run_cell(cell):
    """Runs one cell to its end and returns its row, or {failed: why}."""
    out = Path(runs_dir).expanduser() / folder().name / cell_name(cell)
    out.parent.mkdir(parents=True, exist_ok=True)
    probe = measure(cell)
    if probe is None:
        return {"failed": "its first steps failed"}
    steps = max(round(pflop * 1e15 / probe["flop"]), 10)
    command = [str(ROOT / f"{cell['script']}.py")]
    if (out / "ckpt.pt").exists():
        command += [f"--out_dir={out}", "--resume=True"]
    else:
        options = {**settings_of(cell), "max_steps": steps, "eval_every": max(steps // 2, 1)}
        options.update(save_every=max(steps // 4, 1), log_every=max(steps // 50, 1), out_dir=out)
        command += [f"--{option}={value}" for option, value in options.items()]
    code = call(command, out.with_suffix(".txt"))
    if code:
        return {"failed": f"exit code {code}: {last_line(out.with_suffix('.txt'))}"}
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    row = {**cell, "command": " ".join(["python", Path(command[0]).name, *command[1:]]), **git_state()}
    row.update(steps=last["step"], pflop=last["step"] * probe["flop"] / 1e15, seconds=last["seconds"])
    row.update(device=json.loads((out / "config.json").read_text())["device_name"], torch=torch.__version__)
    row.update(knn=last["knn"], knn_init=first["knn"], rank=last["rank"], rank_init=first["rank"])
    row["collapsed"] = last["rank"] < first["rank"] / 4 or last["knn"] < first["knn"]
    row["curve"] = [[r["step"] * probe["flop"] / 1e15, r["knn"]] for r in rows if "knn" in r]
    if study == "models":
        row["test"] = probes(out)
    return row


def probes(out):
    """{protocol: top-1 on the test set} of a finished run."""
    code = call([str(ROOT / "eval_linear.py"), f"--ckpt={out}"], out.with_suffix(".probes.txt"))
    if code:
        raise UserError(f"eval_linear.py failed: {last_line(out.with_suffix('.probes.txt'))}")
    results = json.loads((out / "eval_linear.json").read_text())["results"]
    return {protocol: result["top1"] for protocol, result in results.items()}


def call(command, log):
    """The exit code of Python with this command, its output appended to a file."""
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    with lock:
        running.add(process)
    code = process.wait()
    with lock:
        running.discard(process)
    return code


def last_line(file):
    return (file.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]


def work(cell, failures):
    """Runs a cell and appends its row to rows.jsonl; a failure costs this cell alone."""
    start = time.time()
    try:
        row = run_cell(cell)
    except (OSError, ValueError, KeyError) as error:
        row = {"failed": f"{type(error).__name__}: {error}"}
    with lock:
        if "failed" in row:
            failures.append(f"{cell_name(cell)}: {row['failed']}")
            print(f"failed: {failures[-1]}", flush=True)
            return
        folder().mkdir(parents=True, exist_ok=True)
        with open(folder() / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            os.fsync(file.fileno())
        text = f"k-NN {row['knn']:.3f} (untrained {row['knn_init']:.3f}), RankMe {row['rank']:.1f}"
        print(f"{cell_name(cell)}: {text}{', collapsed' * row['collapsed']}, {time.time() - start:.0f} s", flush=True)


def say_plan(todo, slots):
    """What would run, and how long it takes, from five steps of the first run of each script."""
    seconds = {}
    for cell in todo:
        print(f"{cell_name(cell)}: {' '.join(f'--{k}={v}' for k, v in cell['setting'].items())}")
        if cell["script"] not in seconds:
            probe = measure(cell)
            seconds[cell["script"]] = pflop * 1e15 / probe["flop"] * probe["seconds"] if probe else math.nan
    total = sum(seconds[cell["script"]] for cell in todo)
    print(f"{len(todo)} runs of {pflop:g} PFLOP, {slots} at once: about {total / slots / 3600:.1f} hours")


if __name__ == "__main__":
    _, _, given = parse(globals())
    globals().update(given)
    data_dir = str(Path(data_dir).expanduser().absolute())
    if report:
        print(report_study(folder(), study))
        sys.exit()
    slots = jobs or max(torch.cuda.device_count(), 1 if torch.cuda.is_available() else os.cpu_count())
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // slots, 1)))
    finished = {cell_name(row) for row in read_rows(folder())}
    todo = [cell for cell in cells() if cell_name(cell) not in finished]
    print(f"{folder()}: {len(finished)} runs finished, {len(todo)} to do", flush=True)
    if dry_run:
        say_plan(todo, slots)
        sys.exit()
    failures, stopped = [], False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = ThreadPoolExecutor(slots)
    futures = [pool.submit(work, cell, failures) for cell in todo]
    try:
        for future in futures:
            future.result()
    except KeyboardInterrupt:
        stopped = True
        for future in futures:
            future.cancel()
        with lock:
            for process in running:
                process.terminate()  # it saves, and goes on with the next start
    pool.shutdown()
    if read_rows(folder()):
        write_file(folder() / "README.md", report_study(folder(), study))
    if stopped:
        sys.exit("stopped; the same command goes on")
    if failures:
        sys.exit("failed:\n" + "\n".join(failures))
