"""Memory of a simulated device: every byte knows who made it, and every use is checked.

Addresses are made up; allocations lie far apart, so that no use of one can reach another unseen. What is freed is
remembered, so that a later use can be named.
"""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from dcc.runtime.device import Array, DeviceError, Region

ALIGNMENT = 256
GAP = 4096
POISON = 0xFF  # read as floats it is NaN, as integers -1


class SimulatedFault(DeviceError):
    """A use of the simulated device that a real one would not forgive, or would not notice."""


@dataclass(frozen=True)
class Writer:
    """Who made bytes: `launch` counts engine launches; for uploads and fills it is -1 and `port` says which."""

    launch: int
    engine: str
    port: str

    def __str__(self) -> str:
        return f"{self.engine}.{self.port} (launch {self.launch})" if self.launch >= 0 else f"{self.engine} {self.port}"


@dataclass(frozen=True)
class Run:
    """Bytes `start` to `stop` were made by `writer`, as its bytes from `offset` on; None: by nobody."""

    start: int
    stop: int
    writer: Writer | None
    offset: int

    def __str__(self) -> str:
        made = f"{self.writer}, from byte {self.offset}" if self.writer is not None else "nobody"
        return f"bytes {self.start} to {self.stop} by {made}"


class Allocation:
    """One allocation, its bytes and who made them."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.freed = False
        self.data: Array = np.full(region.nbytes, POISON, np.uint8)
        self._runs = [Run(0, region.nbytes, None, 0)] if region.nbytes else []

    def runs(self, start: int, stop: int) -> list[Run]:
        """Who made these bytes; positions count from `start`, neighbours of one origin are one run."""
        first = max(bisect.bisect_right(self._runs, start, key=lambda run: run.start) - 1, 0)
        found: list[Run] = []
        for run in self._runs[first:]:
            if run.start >= stop:
                break
            low, high = max(run.start, start), min(run.stop, stop)
            part = Run(low - start, high - start, run.writer, run.offset + low - run.start)
            last = found[-1] if found else None
            if last is not None and last.writer == part.writer and _continues(last, part):
                found[-1] = Run(last.start, part.stop, last.writer, last.offset)
            elif low < high:
                found.append(part)
        return found

    def mark(self, start: int, runs: list[Run]) -> None:
        """The bytes from `start` on now have these runs, whose positions count from there."""
        if not runs:
            return
        stop = start + runs[-1].stop
        moved = [Run(start + run.start, start + run.stop, run.writer, run.offset) for run in runs]
        kept: list[Run] = []
        for run in self._runs:
            if run.start < start:
                kept.append(Run(run.start, min(run.stop, start), run.writer, run.offset))
        kept += moved
        for run in self._runs:
            if run.stop > stop:
                low = max(run.start, stop)
                kept.append(Run(low, run.stop, run.writer, run.offset + low - run.start))
        self._runs = kept


def _continues(last: Run, part: Run) -> bool:
    return last.writer is None or last.offset + last.stop - last.start == part.offset


class SimulatedMemory:
    """All allocations of a device, of `total` bytes."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._next = 2**32
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []

    def allocate(self, nbytes: int, label: str) -> Region:
        with self._lock:
            region = Region(label, self._next, nbytes)
            self._next += nbytes + GAP
            self._next += -self._next % ALIGNMENT
            self._allocations.append(Allocation(region))
            # Last: who looks for an address meanwhile finds the allocation that belongs to it.
            self._starts.append(region.address)
            self.used += nbytes
        return region

    def free(self, region: Region) -> None:
        """The bytes are poisoned. Raises SimulatedFault where the region is no allocation, or freed already."""
        allocation = self.find(region, "free")
        if allocation.region != region:
            fault("memory is freed that is only a part of an allocation", region.label)
        with self._lock:
            allocation.freed = True
            allocation.data = np.empty(0, np.uint8)
            self.used -= region.nbytes

    def find(self, region: Region, at: str) -> Allocation:
        """The live allocation that the region lies inside. Raises SimulatedFault that names it otherwise."""
        index = bisect.bisect_right(self._starts, region.address) - 1
        if index < 0:
            fault("an address belongs to no allocation", f"{at}, {region.label}", f"{region.address:#x}")
        allocation = self._allocations[index]
        start = region.address - allocation.region.address
        if start + region.nbytes > allocation.region.nbytes:
            fault(
                "a use reaches beyond its allocation", f"{at}, {region.label}",
                f"bytes {start} to {start + region.nbytes}",
                f"inside {allocation.region.nbytes} bytes of {allocation.region.label}",
            )  # fmt: skip
        if allocation.freed:
            fault("memory is used after it was freed", f"{at}, {allocation.region.label}")
        return allocation

    def view(self, region: Region, at: str) -> Array:
        """The bytes themselves."""
        allocation = self.find(region, at)
        start = region.address - allocation.region.address
        return allocation.data[start : start + region.nbytes]

    def runs(self, region: Region, at: str) -> list[Run]:
        """Who made the bytes of the region."""
        allocation = self.find(region, at)
        start = region.address - allocation.region.address
        return allocation.runs(start, start + region.nbytes)

    def mark(self, region: Region, runs: list[Run], at: str) -> None:
        """The bytes of the region now have these makers."""
        allocation = self.find(region, at)
        allocation.mark(region.address - allocation.region.address, runs)

    def written(self, region: Region, writer: Writer, at: str) -> None:
        """The whole region was made by the writer."""
        self.mark(region, [Run(0, region.nbytes, writer, 0)], at)

    def require_written(self, region: Region, at: str) -> None:
        """Raises SimulatedFault where a byte of the region was made by nobody."""
        for run in self.runs(region, at):
            if run.writer is None:
                fault(
                    "memory is read that nobody has written", f"{at}, {region.label}",
                    f"bytes {run.start} to {run.stop} of {region.nbytes}", "written before",
                )  # fmt: skip


class SimulatedHostBuffer:
    """Pinned memory that knows which copies from and to it are under way."""

    def __init__(self, nbytes: int, label: str) -> None:
        self.nbytes, self.label = nbytes, label
        self.data: Array = np.full(nbytes, POISON, np.uint8)
        self.freed = False
        # Copies under way, as bytes and whether they write into the buffer.
        self.pending: list[tuple[int, int, bool]] = []

    def write(self, values: Array, start: int = 0) -> None:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._touch(start, start + flat.size, "written", True)
        self.data[start : start + flat.size] = flat

    def read(self, dtype: str, shape: tuple[int, ...], start: int = 0) -> Array:
        values: Array = np.empty(shape, dtype)
        self._touch(start, start + values.nbytes, "read", False)
        values.reshape(-1).view(np.uint8)[:] = self.data[start : start + values.nbytes]
        return values

    def require_inside(self, start: int, stop: int, at: str) -> None:
        if self.freed:
            fault("pinned memory is used after it was freed", f"{at}, host {self.label}")
        if start < 0 or stop > self.nbytes:
            got, want = f"bytes {start} to {stop}", f"inside {self.nbytes} bytes"
            fault("a use reaches beyond its allocation", f"{at}, host {self.label}", got, want)

    def _touch(self, start: int, stop: int, what: str, writing: bool) -> None:
        self.require_inside(start, stop, f"host {what}")
        for low, high, writes in self.pending:
            if low < stop and start < high and (writes or writing):
                way = "to" if writes else "from"
                fault(
                    f"pinned memory is {what} while a copy {way} it is under way", f"host {self.label}",
                    f"bytes {max(low, start)} to {min(high, stop)}", "the stream synchronised before",
                )  # fmt: skip


def fault(what: str, at: str, got: Any = None, want: Any = None) -> NoReturn:
    raise SimulatedFault(what, at=at, got=got, want=want)
