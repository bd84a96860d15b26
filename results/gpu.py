"""What to run on a machine with one GPU, in two or three calls of less than ten minutes each; no network is needed.

    python results/gpu.py check OUT               tests marked gpu; speed, memory and traces of the four scripts (bench.py)
    python results/gpu.py train OUT STEPS KEYS    the four scripts side by side, then k-NN, probes and attention maps

STEPS is for all four: images/s that `check` found, / 4, x 60 x minutes / 256, less a tenth. KEYS name the data set, such as
--dataset=folder --data_dir=data/cifar10-jpeg. OUT receives logs, tables and pictures in few files: run.tgz, and each backbone, float16.
The table's minutes are of all four at once: a quarter of them are GPU minutes. What fails is said, the rest goes on, the exit code is 1.
"""

import contextlib
import importlib.util
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("dino", "barlow", "hybrid_a", "hybrid_b")
SHARED = ["--compile=True", "--base_lr=1e-3", "--warmup_epochs=2", "--log_every=50", "--eval_every=500"]
TEACHER = ["--tau_t=0.04", "--tau_t_warmup_epochs=0", "--ema=0.99"]
TRAINING = 450  # seconds

failures = []


def run(jobs, seconds, cwd=None):
    """Runs Python on each of {log file: words} side by side. What is late is told to save and end; says what did not end well."""
    late, processes = time.time() + seconds, {}
    try:
        for log, words in jobs.items():
            with open(log, "w") as file:
                processes[log] = subprocess.Popen([sys.executable, *map(str, words)], stdout=file, stderr=subprocess.STDOUT, cwd=cwd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes.values():
                process.wait(max(late - time.time(), 0))
    finally:
        for log, process in processes.items():
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.wait():
                last = (log.read_text(errors="replace").splitlines() or ["nothing"])[-1]
                failures.append(f"{log} ended with {process.returncode}, its last line: {last}")
                print(failures[-1], file=sys.stderr)


def check(out):
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here")
    start, many = time.time(), ["-n", "4"] if importlib.util.find_spec("xdist") else []
    run({out / "tests.txt": ["-m", "pytest", "-m", "gpu", "--durations=10", *many, ROOT / "tests"]}, 240)
    print("\n".join((out / "tests.txt").read_text().split("\n")[-20:]))
    run({out / "bench.txt": [ROOT / "bench.py", "--trace=True", f"--out_dir={out}"]}, start + 560 - time.time())
    print((out / "bench.txt").read_text())


def train(out, steps, *keys):
    def words(script):
        own = [] if script == "barlow" else TEACHER
        return [ROOT / f"{script}.py", f"--max_steps={steps}", *SHARED, *own, *keys, f"--out_dir={out / script}"]

    run({out / f"{script}.txt": words(script) for script in SCRIPTS}, TRAINING)
    checkpoints = {script: out / script / "ckpt.pt" for script in SCRIPTS if (out / script / "ckpt.pt").exists()}
    if not checkpoints:
        sys.exit("error: nothing was trained")
    run({out / f"{script}-probes.txt": [ROOT / "eval_linear.py", f"--ckpt={path}"] for script, path in checkpoints.items()}, 300)
    run({out / "attention.txt": [ROOT / "attn_viz.py", f"--ckpt={','.join(map(str, checkpoints.values()))}", f"--out_dir={out}"]}, 120)
    run({out / "table.txt": [ROOT / "results" / "table.py", *checkpoints]}, 20, cwd=out)
    print((out / "table.txt").read_text())
    with tarfile.open(out / "run.tgz", "w:gz") as tar:
        for path in sorted(out.rglob("*.*")):
            if path.suffix not in (".pt", ".safetensors", ".tgz"):
                tar.add(path, path.relative_to(out))
    for script in checkpoints:
        weights = load_file(out / script / "export" / "model.safetensors")
        save_file({name: w.half() for name, w in weights.items()}, out / f"{script}.safetensors")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", folder] | ["train", folder, _, *_]:
            out = Path(folder).resolve()
        case _:
            sys.exit(__doc__)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"error: {out} is not empty")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    {"check": check, "train": train}[sys.argv[1]](out, *sys.argv[3:])
    sys.exit(bool(failures))
