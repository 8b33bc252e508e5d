"""What TensorRT's builder calls while it works: a logger that keeps errors, and a monitor that tells progress.

Made by functions, because the base classes are those of whichever library is used. No exception may leave a callback:
it would cross C++ frames.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Told the engine's name and how much of it is built, from 0 to 1. What it raises ends the build.
Told = Callable[[str, float], None]


def make_logger(trt: Any) -> Any:
    """An ILogger: `errors` are the messages of errors, `warnings` is their number; nothing is printed."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings = 0

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings += 1

    return Logger()


def make_monitor(trt: Any, name: str, told: Told) -> Any:
    """An IProgressMonitor that tells the share of the work that is done.

    `raised` is what `told` raised, after which the builder stops as soon as it can.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.raised: BaseException | None = None
            self._open: list[tuple[str, int, int]] = []  # phase, steps, steps done; each is inside the one before
            self._share = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._open.append((phase, max(steps, 1), 0))

        def phase_finish(self, phase: str) -> None:
            self._open = [entry for entry in self._open if entry[0] != phase]

        def step_complete(self, phase: str, step: int) -> bool:
            self._open = [(item, steps, step + 1 if item == phase else done) for item, steps, done in self._open]
            share = 0.0
            for _, steps, done in reversed(self._open):
                share = min((done + share) / steps, 1.0)
            self._share = max(self._share, share)
            if not self.stopped:
                try:
                    told(name, self._share)
                except BaseException as error:  # noqa: BLE001 - raised again when the builder has returned
                    self.raised, self.stopped = error, True
            return not self.stopped

    return Monitor()


@contextmanager
def stopped_by_interrupt(monitor: Any) -> Iterator[None]:
    """A Ctrl-C inside stops the builder and is delivered when it has returned, to whoever handles it outside."""
    before = signal.getsignal(signal.SIGINT)
    # None is a handler that could not be put back. Workers ignore the signal: whoever started them ends them.
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    came = False

    def stop(*_: object) -> None:
        nonlocal came
        came = monitor.stopped = True

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
