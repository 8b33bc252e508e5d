"""What is written where: results on stdout, progress and notices on stderr, one JSON object with `--json`.

rich honours NO_COLOR. Where stderr is not a terminal, progress is plain lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 140
LINE_EVERY_S = 5.0


def console(stream: TextIO) -> Console:
    """A console on `stream`; a pipe or a file has room for long lines."""
    return Console(
        file=stream, markup=False, highlight=False, soft_wrap=False,
        width=None if stream.isatty() else PLAIN_WIDTH,
    )  # fmt: skip


def say(text: str) -> None:
    """A result, on stdout; control characters that came out of a file do not reach the terminal."""
    print("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text))


def notice(text: str) -> None:
    """Something worth knowing that is not a result, on stderr."""
    print(f"dcc: {text}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The one object of `--json`; numbers that JSON lacks must have been replaced."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: str = "") -> None:
    """A table on stdout; `right` names the columns of numbers."""
    numbers = right.split()
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        name = column.split(",")[0].replace(" ", "-")
        table.add_column(column, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        # Text, not markup: names and reasons may hold square brackets.
        table.add_row(*(Text(str(cell)) for cell in row))
    console(sys.stdout).print(table)


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def flops(count: float) -> str:
    for unit in ("F", "KF", "MF", "GF"):
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TF"


@contextmanager
def stdout_reserved() -> Iterator[None]:
    """What libraries print meanwhile goes to stderr: stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield


class Stages:
    """Announces each stage as it starts: a spinner on a terminal, else a line; seconds when it is over.

    `live` False never spins: drawing takes time from what is being measured.
    """

    def __init__(self, verbose: bool = False, live: bool = True) -> None:
        self._console = console(sys.stderr)
        self.live = live and self._console.is_terminal
        self._verbose = verbose
        self._status: Any = None
        self._name = ""
        self._start = 0.0

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        if self._status is not None:
            self._status.stop()

    def __call__(self, name: str) -> None:
        self._end()
        self._name, self._start = name, time.perf_counter()
        if not self.live:
            notice(name)
        elif self._status is None:
            self._status = self._console.status(name)
            self._status.start()
        else:
            self._status.update(name)

    def _end(self) -> None:
        if self._name and (self._verbose or self.live):
            self._console.print(f"dcc: {self._name}: {time.perf_counter() - self._start:.1f} s")
        self._name = ""


class CountedProgress:
    """Progress over a known number of things: a bar on a terminal, else a line every few seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._spoken = time.perf_counter()
        screen = console(sys.stderr)
        self._bar: Progress | None = None
        if screen.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=screen, transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> CountedProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif time.perf_counter() - self._spoken > LINE_EVERY_S:
            self._spoken = time.perf_counter()
            notice(f"{self._what}: {self._done} of {self._total}")
