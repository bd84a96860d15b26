"""Printing that never ends a run, and failures reported in one sentence."""

import contextlib
import errno
import faulthandler
import functools
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from twins.errors import close_bars, first_line, is_sentence
from twins.processes import under_torchrun, world

NEW_BAR = tqdm.__init__
SECONDS_FOR_RANK_0 = 5
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)


class Stream:
    """Standard output or error that may be closed, full or not Unicode: printing never ends a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # full, closed
            encoding = self.stream.encoding or "utf-8"
            return self.stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    """Makes printing safe and progress bars rare in a file; under torchrun only rank 0 prints."""
    if sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # for SIGBUS: a mapped file was truncated
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    bars = {} if sys.stderr.isatty() else {"mininterval": 15}  # seconds; in a file each update is a line
    if under_torchrun() and os.environ["RANK"] != "0":
        sys.stdout, bars = Stream(None), {"disable": True}
    tqdm.__init__ = functools.partialmethod(NEW_BAR, **bars)


def excepthook(kind, error, trace):
    """Replaces sys.excepthook while a script runs."""
    close_bars()
    number = int(os.environ["RANK"]) if under_torchrun() else 0
    reason = first_line(error)
    message = ""
    if is_sentence(error, trace):
        if number:  # if rank 0 prints the same sentence, torchrun ends this process meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SECONDS_FOR_RANK_0)
        message = f"error on rank {number}: {error}" if number else f"error: {error}"
    elif rank_was_lost(error):
        message = f"error: rank {number} stops, another process of this run ended or hangs ({reason}); "
        message += "ckpt.pt is unchanged since the last save, continue with --resume=True"
    elif memory_is_full(error):
        message = f"error: {reason}; what was saved before is unchanged; "
        message += "a smaller network, smaller images or a smaller --batch_size needs less memory"
    elif kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        message = f"error: torch.compile fails here ({reason}): use --compile=False"
    elif isinstance(error, torch.linalg.LinAlgError):
        message = f"error: the features or weights are too large to compute with ({reason})"
    elif isinstance(error, OSError) and error.errno in PATH_ERRORS:
        message = f"error: {error.filename} cannot be used ({error.strerror})"
    elif issubclass(kind, KeyboardInterrupt):
        message = "stopped; what was saved before is unchanged"
    if message:
        print(message, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    if dist.is_initialized():  # gloo's threads would abort Python at exit, leaving the group would block
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def memory_is_full(error):
    words = "can't allocate memory|Storage size calculation overflowed"  # a CPU's RuntimeErrors
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(words, str(error))


def rank_was_lost(error):
    """Whether a collective operation raised this because another process is gone."""
    words = "peer|[Cc]onnection|NCCL|[Tt]imed out"
    return world() > 1 and isinstance(error, RuntimeError) and re.search(words, str(error))
