"""Signals that end a run or a study: Ctrl-C, SIGTERM, SIGHUP."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from twins.processes import world


def handle_signals(handler, held):
    """Installs a handler of these signals; the ExitStack `held` restores those before, {number: handler}.

    What was ignored at the start stays ignored, as SIGHUP under nohup.
    """
    before = {}
    if threading.current_thread() is not threading.main_thread():
        return before  # Python handles signals in the main thread only
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
            held.callback(signal.signal, number, before[number])
    return before


class StopSignals:
    """`stop` is the number of a signal that was received, 0 before; a second signal ends the process at once.

    The ExitStack `held` restores the handlers. With several processes `stop` changes in synchronise() only.
    """

    def __init__(self, held):
        self.stop = 0
        self.received = 0
        self.received_at = 0.0
        self.parent = os.getppid()
        self.group = dist.new_group(backend="gloo") if world() > 1 else None  # no step waits for it
        self.handlers = handle_signals(self.on_signal, held)

    def on_signal(self, number, frame):
        if self.received and time.monotonic() - self.received_at > 1:  # sooner, torchrun passes on the first
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)
        elif not self.received:
            self.received = number
            self.received_at = time.monotonic()
            if world() == 1:
                self.stop = number

    def synchronise(self):
        """Makes `stop` equal on all processes, so that all of them stop after the same step."""
        if world() > 1:
            if os.getppid() != self.parent:  # torchrun was killed
                self.received = signal.SIGTERM
            stop = torch.tensor(self.received)
            dist.all_reduce(stop, dist.ReduceOp.MAX, self.group)
            self.stop = stop.item()
