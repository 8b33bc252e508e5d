"""What the executor needs of a device: memory, streams, engines, graphs. Nothing here knows which device it is.

Work on a stream is asynchronous: it is done in order, at the latest when `Stream.synchronise` returns. Two devices
implement this: `cuda_device.py`, and `simulated_device.py`, which runs anywhere and checks every use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dcc.errors import ExecutionError
from dcc.runtime.plan import DTYPES, Shape

Array = np.ndarray[Any, np.dtype[Any]]


class DeviceError(ExecutionError):
    """A device, its driver or one of its libraries cannot do what was asked."""


class EngineRefused(DeviceError):
    """The device does not take an engine, for `reason`: it was not made for this device, driver or library."""

    def __init__(self, what: str, reason: str, **details: object) -> None:
        super().__init__(what, got=reason, **details)
        self.reason = reason


class DeviceMemoryError(DeviceError):
    """The device has no room: `wanted` bytes did not fit into `free` ones; 0 where nobody says how many."""

    def __init__(self, what: str, wanted: int, free: int, **details: object) -> None:
        super().__init__(what, **details)
        self.wanted, self.free = wanted, free


@dataclass(frozen=True)
class Region:
    """Bytes of device memory; `label` names them in errors."""

    label: str
    address: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> Region:
        """Bytes `start` to `start + nbytes` of the region. Raises DeviceError where they are not inside."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise DeviceError(
                "a part lies outside its region", at=self.label, got=f"bytes {start} to {start + nbytes}",
                want=f"inside {self.nbytes} bytes",
            )  # fmt: skip
        return self if nbytes == self.nbytes else Region(self.label, self.address + start, nbytes)


@dataclass(frozen=True)
class Place:
    """A tensor in device memory: C order, from the region's first byte."""

    region: Region
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What the tensor needs, which may be less than the region has."""
        return byte_count(self.shape, self.dtype)


@dataclass(frozen=True)
class Port:
    """An input or output of an engine, as the engine itself says it is; names stand for open dimensions."""

    name: str
    dtype: str
    shape: Shape
    output: bool


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of the device."""

    free: int
    total: int


class HostBuffer(Protocol):
    """Pinned host memory: copies from and to it run while the host goes on."""

    nbytes: int

    def write(self, values: Array, start: int = 0) -> None:
        """The bytes of `values` lie in the buffer from `start` on; no copy from there may be under way."""

    def read(self, dtype: str, shape: tuple[int, ...], start: int = 0) -> Array:
        """A copy of what lies in the buffer; no copy to there may be under way."""


class Graph(Protocol):
    """Captured work, to be launched again and again on the same addresses."""

    def close(self) -> None:
        """What the graph held is free."""


class Stream(Protocol):
    """A queue of work on the device."""

    def upload(self, target: Region, source: HostBuffer, start: int = 0) -> None:
        """The region takes as many bytes of the buffer, from `start` on."""

    def download(self, target: HostBuffer, source: Region, start: int = 0) -> None:
        """The buffer takes the bytes of the region, from `start` on."""

    def copy(self, target: Region, source: Region) -> None:
        """The target takes the bytes of the source; both are equally long."""

    def copy_rows(self, target: Region, pitch: int, source: Region, rows: int) -> None:
        """Equal parts of the source go to `rows` places in the target, `pitch` bytes apart."""

    def fill(self, target: Region) -> None:
        """Every byte of the region is 0."""

    def begin_capture(self) -> None:
        """What follows is recorded, not run, until `end_capture`."""

    def end_capture(self) -> Graph:
        """What was recorded, ready to be launched. None of it has run."""

    def launch(self, graph: Graph) -> None:
        """The work of the graph, as if it were asked for again."""

    def synchronise(self) -> None:
        """Everything asked for so far is done."""

    def close(self) -> None:
        """The stream is gone; its work is done."""


class Context(Protocol):
    """An engine with its places: `enqueue` may be captured once it has run."""

    def enqueue(self, stream: Stream) -> None:
        """The outputs take the engine's results for what the inputs hold then."""

    def close(self) -> None:
        """What the context held is free."""


class Engine(Protocol):
    """A program for the device."""

    name: str
    ports: Mapping[str, Port]
    scratch_bytes: int

    def bind(self, places: Mapping[str, Place], scratch: Region) -> Context:
        """The engine reading and writing these places. Contexts that share `scratch` must never run at once."""


class Device(Protocol):
    """One device. `alignment` is what addresses of ports must be a multiple of.

    `dlpack` is its kind and index in DLPack; `threads` is how many threads it can hold at once.
    """

    name: str
    capability: int
    alignment: int
    dlpack: tuple[int, int]
    threads: int

    def allocate(self, nbytes: int, label: str) -> Region:
        """Uninitialised memory. Raises DeviceMemoryError where there is no room."""

    def free(self, region: Region) -> None:
        """The memory is the device's again; nothing that uses it may be under way."""

    def pinned(self, nbytes: int, label: str) -> HostBuffer:
        """Pinned host memory."""

    def free_pinned(self, buffer: HostBuffer) -> None:
        """The memory is the host's again."""

    def stream(self) -> Stream:
        """A new queue."""

    def load(self, name: str, data: bytes) -> Engine:
        """The engine, ready to be bound.

        Raises EngineRefused where it was not made for this device, DeviceMemoryError where there is no room for it.
        """

    def memory(self) -> MemoryInfo:
        """What is free now."""

    def pointer(self, region: Region) -> int:
        """Where others in the process find the region's bytes."""

    def activate(self) -> None:
        """The calling thread uses this device from now on."""


def byte_count(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype]


def check_places(engine: str, ports: Mapping[str, Port], places: Mapping[str, Place], alignment: int) -> None:
    """Every port has a place of its dtype and shape that is large enough and aligned, and there are no others.

    Raises DeviceError that names engine, port and place.
    """
    unknown, missing = sorted(places.keys() - ports.keys()), sorted(ports.keys() - places.keys())
    if unknown or missing:
        raise DeviceError(
            "an engine's ports are not all bound", at=f"engine {engine}",
            got=f"nothing for {', '.join(missing)}" if missing else f"places for unknown ports {', '.join(unknown)}",
            want=f"exactly {', '.join(sorted(ports))}", next="compile the model again",
        )  # fmt: skip
    sizes: dict[str, int] = {}
    for name, port in ports.items():
        place = places[name]
        at = f"engine {engine}, port {name}, {place.region.label}"
        if place.dtype != port.dtype:
            raise DeviceError("a port is bound to another dtype", at=at, got=place.dtype, want=port.dtype)
        fits = len(place.shape) == len(port.shape) and all(
            size == (sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension)
            for size, dimension in zip(place.shape, port.shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{key} = {value}" for key, value in sizes.items())
            want = f"{list(port.shape)}" + (f", with {known}" if known else "")
            raise DeviceError("a port is bound to another shape", at=at, got=list(place.shape), want=want)
        if place.nbytes > place.region.nbytes:
            got, want = f"{place.region.nbytes} bytes", f"{place.nbytes} bytes"
            raise DeviceError("a port is bound to a place that is too small", at=at, got=got, want=want)
        if place.region.address % alignment:
            got, want = f"address {place.region.address:#x}", f"a multiple of {alignment}"
            raise DeviceError("a port is bound to an address that is not aligned", at=at, got=got, want=want)
