"""Several jobs at once, each a sequence of commands; a failed job does not affect the others."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch

from twins.errors import UserError
from twins.files import make_folder


def default_slots():
    """Jobs at once: one per GPU, else one per CPU core."""
    return torch.cuda.device_count() or os.cpu_count()


def run_jobs(jobs, slots):
    """Runs (name, log, commands) jobs, `slots` at once; returns ({name: why it failed}, was it stopped).

    commands: a generator that yields Python's arguments and is sent each exit code; an exception in it is
    that job's failure. Output of the commands is appended to the file `log`. After Ctrl-C or SIGTERM all
    processes get SIGTERM and are waited for.
    """
    stopped, failures, running = [], {}, {}
    waiting, free = list(jobs), list(range(slots))
    handlers = {}
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) == signal.SIG_IGN:  # nohup
            continue
        handlers[number] = signal.signal(number, lambda number, frame: stopped.append(number))

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
        free.append(slot)

    while running or (waiting and not stopped):
        while waiting and free and not stopped:
            advance(free.pop(0), waiting.pop(0))
        for process in [process for process in running if process.poll() is not None]:
            slot, job = running.pop(process)
            if not stopped:
                advance(slot, job, process.returncode)
        if stopped and 0 not in stopped:
            stopped.append(0)
            print("stopping: each run saves after its current step", flush=True)
            for process in running:
                process.terminate()
        time.sleep(0.1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return failures, bool(stopped)


def start(command, log, slot, slots):
    """Python with these arguments, in a process that dies with this one, on its share of the machine."""
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
            start_new_session=True,  # Ctrl-C reaches it through run_jobs alone, once
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_line(file):
    """The last line of a log, which says why a command failed."""
    return (file.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
