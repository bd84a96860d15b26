"""Several jobs in parallel, each a sequence of commands; a failed job does not affect the others."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import torch

from twins.errors import UserError
from twins.files import make_folder
from twins.signals import handle_signals

SLOTS = torch.cuda.device_count() or os.cpu_count()  # default number of parallel jobs


def run_jobs(jobs, slots):
    """Runs (name, log, commands) jobs, `slots` at once; returns {name: why it failed}, whether stopped.

    commands: a generator that yields arguments for Python and is sent each exit code; an exception fails
    the job. Output is appended to `log`. After Ctrl-C or SIGTERM all processes get SIGTERM and are awaited.
    """
    failures = {}
    running = {}  # process: its slot and job
    waiting = list(jobs)
    free_slots = list(range(slots))
    signals = []

    def advance(slot, job, code=None):
        name, log, commands = job
        try:
            running[start(commands.send(code), log, slot, slots)] = slot, job
            return
        except StopIteration:
            pass
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failures[name] = f"{kind}{error}"
            print(f"{name} failed: {failures[name]}", flush=True)
        free_slots.append(slot)

    with contextlib.ExitStack() as held:
        handle_signals(lambda number, frame: signals.append(number), held)
        told = False
        while running or (waiting and not signals):
            while waiting and free_slots and not signals:
                advance(free_slots.pop(0), waiting.pop(0))
            for process in [process for process in running if process.poll() is not None]:
                slot, job = running.pop(process)
                if not signals:
                    advance(slot, job, process.returncode)
            if signals and not told:
                told = True
                print("stopping: each run saves after its current step", flush=True)
                for process in running:
                    process.terminate()
            time.sleep(0.1)
    return failures, bool(signals)


def start(command, log, slot, slots):
    """Starts Python with these arguments on its share of the machine; the process dies with this one."""
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // slots, 1)))
    count = torch.cuda.device_count()
    if count > 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % count]
    make_folder(log.parent)
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it only through run_jobs(), once
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_line(file):
    """The last line of a log, which says why a command failed."""
    return (file.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]


def check_exit(code, log):
    """Raises UserError for a command that failed."""
    if code:
        raise UserError(f"exit code {code}: {last_line(log)}")
