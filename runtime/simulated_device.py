"""A device made of numpy, for machines without one: ONNX models run on the CPU, and every use is checked.

Work on a stream is put off until somebody synchronises, so that a host which does not wait sees nothing. What a real
device would forgive, or would answer with wrong numbers, is a `SimulatedFault` that names engine, port and region:

- a port without a place, of another dtype or shape, too small, not aligned, freed; an output over another port
- a byte read that nobody has written; a copy beyond an allocation; pinned memory touched while a copy is under way
- memory taken or given back, waiting, loading, or memory that is not pinned, while a stream is captured
- an engine captured that never ran; a graph launched after memory that it uses was freed

`observers` are told of every engine when it runs, with who made each byte that it reads.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dcc.runtime.device import (
    Array,
    DeviceMemoryError,
    EngineRefused,
    Graph,
    HostBuffer,
    MemoryInfo,
    Place,
    Port,
    Region,
    Stream,
    check_places,
)
from dcc.runtime.dlpack import HOST
from dcc.runtime.onnxruntime_backend import CpuModel
from dcc.runtime.simulated_memory import (
    ALIGNMENT,
    POISON,
    Run,
    SimulatedHostBuffer,
    SimulatedMemory,
    Writer,
    fault,
)

SCRATCH_BYTES = 1024


@dataclass(frozen=True)
class Launch:
    """An engine that runs: `places` and, for what it reads, who made the bytes."""

    number: int
    engine: str
    places: Mapping[str, Place]
    inputs: Mapping[str, list[Run]]
    memory: SimulatedMemory

    def values(self, port: str) -> Array:
        """What an input holds."""
        place = self.places[port]
        return self.memory.view(place.region, port)[: place.nbytes].view(place.dtype).reshape(place.shape)


@dataclass(frozen=True)
class Work:
    """Something to be done later; `regions` and `name` say on what."""

    name: str
    regions: tuple[Region, ...]
    run: Callable[[], None]


class SimulatedDevice:
    """Implements `Device`. `folder` is where external data of models lies; a context takes `context_bytes`.

    `refuses(name, data)` says why an engine is refused, or None.
    """

    def __init__(
        self, total: int = 2**31, folder: str | None = None, capability: int = 0, context_bytes: int = 0,
        refuses: Callable[[str, bytes], str | None] = lambda name, data: None,
    ) -> None:  # fmt: skip
        self.name, self.capability, self.alignment = "simulated device", capability, ALIGNMENT
        # Its memory is the host's, where others can find it.
        self.dlpack, self.threads = (HOST, 0), 0
        self.context_bytes, self._refuses = context_bytes, refuses
        self.memory_map = SimulatedMemory(total)
        self.counts: Counter[str] = Counter()
        # What has been made and not closed; memory is counted by `memory_map.used`.
        self.live: Counter[str] = Counter()
        self.observers: list[Callable[[Launch], None]] = []
        # What a thread captures binds that thread alone.
        self._capture = threading.local()
        self.launches = itertools.count()
        self._folder = folder
        self._serial = itertools.count()

    @property
    def capturing(self) -> str:
        """The stream that the calling thread captures; empty if none."""
        return getattr(self._capture, "stream", "")

    @capturing.setter
    def capturing(self, stream: str) -> None:
        self._capture.stream = stream

    def refuse_in_capture(self, what: str) -> None:
        """Raises SimulatedFault if the calling thread captures a stream."""
        if self.capturing:
            fault(f"{what} while a stream is captured", self.capturing, want="work on the stream alone")

    def allocate(self, nbytes: int, label: str) -> Region:
        self.refuse_in_capture(f"memory is allocated ({label})")
        self.counts["allocate"] += 1
        free = self.memory().free
        if nbytes > free:
            raise DeviceMemoryError(
                "the device has no room", nbytes, free, at=label, got=f"{free} bytes free", want=f"{nbytes} bytes"
            )
        return self.memory_map.allocate(nbytes, label)

    def free(self, region: Region) -> None:
        self.refuse_in_capture(f"memory is freed ({region.label})")
        self.counts["free"] += 1
        self.memory_map.free(region)

    def pinned(self, nbytes: int, label: str) -> SimulatedHostBuffer:
        self.refuse_in_capture(f"pinned memory is allocated ({label})")
        self.counts["pinned"] += 1
        self.live["pinned"] += 1
        return SimulatedHostBuffer(nbytes, label)

    def free_pinned(self, buffer: HostBuffer) -> None:
        self.refuse_in_capture("pinned memory is freed")
        if isinstance(buffer, SimulatedHostBuffer):
            if buffer.pending:
                fault("pinned memory is freed while a copy is under way", f"host {buffer.label}")
            self.live["pinned"] -= not buffer.freed
            buffer.freed = True

    def stream(self) -> SimulatedStream:
        self.live["stream"] += 1
        return SimulatedStream(self, f"stream {next(self._serial)}")

    def load(self, name: str, data: bytes) -> SimulatedEngine:
        self.refuse_in_capture(f"an engine is loaded ({name})")
        self.counts["load"] += 1
        reason = self._refuses(name, data)
        if reason is not None:
            raise EngineRefused("an engine does not fit this device", reason, at=f"engine {name}")
        return SimulatedEngine(self, name, data, self._folder)

    def pointer(self, region: Region) -> int:
        """Of the host's memory; where the device is said to be CUDA's, what a real one would give."""
        view = self.memory_map.view(region, "pointer")
        return int(view.ctypes.data) if self.dlpack[0] == HOST else region.address

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.memory_map.total - self.memory_map.used, self.memory_map.total)

    def activate(self) -> None:
        """Every thread uses it."""


class SimulatedGraph:
    """Captured work."""

    def __init__(self, work: list[Work], label: str, device: SimulatedDevice) -> None:
        self.work, self.label, self.device = work, label, device
        self.closed = False

    def close(self) -> None:
        self.device.live["graph"] -= not self.closed
        self.closed = True


class SimulatedStream:
    """Implements `Stream`: what is asked for waits until `synchronise`."""

    def __init__(self, device: SimulatedDevice, label: str) -> None:
        self.device, self.label = device, label
        self._queue: list[Work] = []
        self._recorded: list[Work] | None = None
        self._settled: list[Callable[[], None]] = []
        self._closed = False

    @property
    def recording(self) -> bool:
        return self._recorded is not None

    def ask(self, work: Work, count: str) -> None:
        """The work is recorded, or waits for its turn; its memory must be there when it is asked for, too."""
        for region in work.regions:
            self.device.memory_map.find(region, work.name)
        self.device.counts[f"captured {count}" if self.recording else count] += 1
        (self._queue if self._recorded is None else self._recorded).append(work)

    def upload(self, target: Region, source: HostBuffer, start: int = 0) -> None:
        if not isinstance(source, SimulatedHostBuffer):
            if self.recording:
                fault("memory that is not pinned is copied while a stream is captured", f"upload, {target.label}")
            self.device.counts["pageable"] += 1
            buffer = SimulatedHostBuffer(np.asarray(source).nbytes, "pageable memory")
            buffer.write(np.asarray(source))
            source = buffer
        at, stop = f"upload, {target.label}", start + target.nbytes
        source.require_inside(start, stop, at)
        memory, buffer, pending = self.device.memory_map, source, (start, stop, False)

        def run() -> None:
            memory.view(target, at)[:] = buffer.data[start:stop]
            memory.written(target, Writer(-1, "upload of", buffer.label), at)

        self._pending(buffer, pending)
        self.ask(Work(at, (target,), run), "upload")

    def download(self, target: HostBuffer, source: Region, start: int = 0) -> None:
        at, stop = f"download, {source.label}", start + source.nbytes
        if not isinstance(target, SimulatedHostBuffer):
            fault("memory that is not pinned takes a copy", at)
        target.require_inside(start, stop, at)
        memory, buffer = self.device.memory_map, target

        def run() -> None:
            memory.require_written(source, at)
            buffer.data[start:stop] = memory.view(source, at)

        if not self.recording:
            buffer.data[start:stop] = POISON
        self._pending(buffer, (start, stop, True))
        self.ask(Work(at, (source,), run), "download")

    def copy(self, target: Region, source: Region) -> None:
        if target.nbytes != source.nbytes:
            fault("a copy has two lengths", f"{source.label} to {target.label}", source.nbytes, target.nbytes)
        self.copy_rows(target, target.nbytes, source, 1)

    def copy_rows(self, target: Region, pitch: int, source: Region, rows: int) -> None:
        at = f"copy, {source.label} to {target.label}"
        width = source.nbytes // max(rows, 1)
        if rows < 1 or width * rows != source.nbytes or width > pitch or (rows - 1) * pitch + width > target.nbytes:
            fault("rows of a copy do not fit", at, f"{rows} of {width} bytes, {pitch} apart", f"{target.nbytes} bytes")
        low, high = target.address, source.address
        if low < high + source.nbytes and high < low + target.nbytes:
            fault("a copy overlaps itself", at)
        memory = self.device.memory_map

        def run() -> None:
            data = memory.view(source, at)
            for row in range(rows):
                part = Region(target.label, target.address + row * pitch, width)
                memory.view(part, at)[:] = data[row * width : (row + 1) * width]
                origin = Region(source.label, source.address + row * width, width)
                memory.mark(part, memory.runs(origin, at), at)

        self.ask(Work(at, (target, source), run), "copy")

    def fill(self, target: Region) -> None:
        at, memory = f"fill, {target.label}", self.device.memory_map

        def run() -> None:
            memory.view(target, at)[:] = 0
            memory.written(target, Writer(-1, "zeros in", target.label), at)

        self.ask(Work(at, (target,), run), "fill")

    def begin_capture(self) -> None:
        self.device.refuse_in_capture("a capture begins")
        self.device.capturing = self.label
        self._recorded = []

    def end_capture(self) -> SimulatedGraph:
        if self._recorded is None:
            fault("a capture ends that has not begun", self.label)
        self.device.capturing = ""
        recorded, self._recorded = self._recorded, None
        self.device.counts["capture"] += 1
        self.device.live["graph"] += 1
        return SimulatedGraph(recorded, f"graph of {self.label}", self.device)

    def launch(self, graph: Graph) -> None:
        if not isinstance(graph, SimulatedGraph) or graph.closed:
            fault("a graph is launched after it was closed", self.label)
        for work in graph.work:
            for region in work.regions:
                self.device.memory_map.find(region, f"{graph.label}, {work.name}")
        self.device.counts["launch"] += 1
        self._queue += graph.work

    def synchronise(self) -> None:
        self.device.refuse_in_capture("the host waits")
        self.device.counts["synchronise"] += 1
        queue, self._queue = self._queue, []
        settled, self._settled = self._settled, []
        try:
            for work in queue:
                work.run()
        finally:
            for settle in settled:
                settle()

    def close(self) -> None:
        if not self._closed:
            self.synchronise()
            self._closed = True
            self.device.live["stream"] -= 1

    def _pending(self, buffer: SimulatedHostBuffer, entry: tuple[int, int, bool]) -> None:
        buffer.pending.append(entry)
        self._settled.append(lambda: buffer.pending.remove(entry))


class SimulatedEngine:
    """Implements `Engine` by an ONNX model."""

    def __init__(self, device: SimulatedDevice, name: str, data: bytes, folder: str | None) -> None:
        self.name, self.device = name, device
        self.model = CpuModel(name, data, folder)
        self.ports = {
            port: Port(port, dtype, shape, output)
            for group, output in ((self.model.inputs, False), (self.model.outputs, True))
            for port, (dtype, shape) in group.items()
        }
        self.scratch_bytes = SCRATCH_BYTES * len(self.ports)

    def bind(self, places: Mapping[str, Place], scratch: Region) -> SimulatedContext:
        self.device.refuse_in_capture(f"an engine is bound ({self.name})")
        check_places(self.name, self.ports, places, self.device.alignment)
        if scratch.nbytes < self.scratch_bytes:
            fault("an engine's scratch is too small", f"engine {self.name}", scratch.nbytes, self.scratch_bytes)
        own = self.device.allocate(self.device.context_bytes, f"context of {self.name}")
        context = SimulatedContext(self, dict(places), scratch, own)
        self.device.counts["bind"] += 1
        self.device.live["context"] += 1
        context.check_memory()
        return context


class SimulatedContext:
    """Implements `Context`."""

    def __init__(self, engine: SimulatedEngine, places: dict[str, Place], scratch: Region, own: Region) -> None:
        self.engine, self.places, self._scratch, self._own = engine, places, scratch, own
        self._regions = {name: place.region.part(0, place.nbytes) for name, place in places.items()}
        self._ran = self._closed = False

    def check_memory(self) -> None:
        """No output lies over another port, and nothing over the scratch memory."""
        written = [(name, self._regions[name]) for name, port in self.engine.ports.items() if port.output]
        written.append(("scratch", self._scratch))
        for name, region in written:
            for other, taken in (*self._regions.items(), ("scratch", self._scratch)):
                low, high = region.address, taken.address
                if name != other and low < high + taken.nbytes and high < low + region.nbytes:
                    at = f"engine {self.engine.name}, port {name}"
                    fault("an output overlaps another port", at, f"{region.label} over {taken.label} of port {other}")

    def enqueue(self, stream: Stream) -> None:
        at = f"engine {self.engine.name}"
        if self._closed or not isinstance(stream, SimulatedStream):
            fault("an engine is asked to run after its context was closed", at)
        if stream.recording and not self._ran:
            fault("an engine is captured that has not run before", at, want="one run outside of a capture")
        self._ran = True
        regions = (*self._regions.values(), self._scratch)
        for name, region in self._regions.items():
            self.engine.device.memory_map.find(region, f"{at}, port {name}")
        stream.ask(Work(at, regions, self._run), "engine")

    def _run(self) -> None:
        device, memory = self.engine.device, self.engine.device.memory_map
        at = f"engine {self.engine.name}"
        inputs = [name for name, port in self.engine.ports.items() if not port.output]
        for name in inputs:
            memory.require_written(self._regions[name], f"{at}, port {name}")
        origins = {name: memory.runs(self._regions[name], at) for name in inputs}
        launch = Launch(next(device.launches), self.engine.name, self.places, origins, memory)
        for observer in device.observers:
            observer(launch)
        values = self.engine.model.run({name: launch.values(name) for name in inputs})
        # Whoever keeps something in scratch memory loses it here.
        memory.view(self._scratch, at)[:] = POISON
        memory.mark(self._scratch, [Run(0, self._scratch.nbytes, None, 0)], at)
        for name, result in values.items():
            place, region = self.places[name], self._regions[name]
            if result.shape != place.shape or result.dtype != np.dtype(place.dtype):
                fault("an engine's result is not what its port says", f"{at}, port {name}", result.shape, place.shape)
            memory.view(region, at)[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)
            memory.written(region, Writer(launch.number, self.engine.name, name), at)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.engine.device.free(self._own)
            self.engine.device.live["context"] -= 1
