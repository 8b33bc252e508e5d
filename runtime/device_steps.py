"""One sampler call on a device: its engines, then its update, as work on a stream that is captured once.

Calls with the same step program, kind of update and halves do the same work on the same addresses: what differs lies
in the call block. The first such call runs as it is asked for, which engines need before they can be captured; then
it is captured, and the later ones are one launch.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from dcc.runtime.device import Context, Graph, Place, Region, Stream, byte_count
from dcc.runtime.device_workspace import DeviceWorkspace
from dcc.runtime.loop_spec import START, LoopSpec, UpdateKind, coefficient_names, update_ports
from dcc.runtime.plan import Call
from dcc.runtime.workspace import concrete


@dataclass(frozen=True)
class StepKey:
    """What makes sampler calls equal work: the program, the kind of update, and whether both halves run."""

    program: int
    kind: int
    both: bool


@dataclass(frozen=True)
class Copy:
    """A copy inside a step."""

    target: Region
    source: Region


Work = list[Context | Copy]


class _NoCollection:
    """Inside, Python collects no cycles: one that holds device memory would free it, which ends a capture."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._enabled = 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._enabled:
                gc.enable()


_no_collection = _NoCollection()


class Steps:
    """The steps of one workspace."""

    def __init__(self, space: DeviceWorkspace, loop: LoopSpec) -> None:
        self._space, self._loop = space, loop
        self._work: dict[StepKey, Work] = {}
        self._graphs: dict[StepKey, Graph] = {}
        latent = next(item for item in space.plan.inputs if item.role == "latent")
        self._latent = space.input(latent.name).region
        self._half = self._latent.part(0, space.layout.image_bytes("input") * space.size.images)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def bind(self, keys: Iterable[StepKey]) -> None:
        """The engines of these steps, and of the start, have their places."""
        self._start()
        for key in keys:
            self._step(key)

    def run(self, key: StepKey) -> None:
        """The step is asked for: launched if it has been captured, otherwise run and captured."""
        stream = self._space.stream
        if key in self._graphs:
            stream.launch(self._graphs[key])
            return
        work = self._step(key)
        self._enqueue(work)
        self._graphs[key] = self._captured(work)

    def start(self) -> None:
        """The latent and the first input are asked for, from the noise that lies in its place."""
        self._start().enqueue(self._space.stream)

    def close(self) -> None:
        """The graphs are gone."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _start(self) -> Context:
        kind = self._loop.kinds[self._loop.start]
        return self._space.bind(("update", self._loop.start), kind.name, self._update_places(kind))

    def _captured(self, work: Work) -> Graph:
        stream: Stream = self._space.stream
        with _no_collection:
            stream.begin_capture()
            try:
                self._enqueue(work)
            except BaseException:
                # The stream must be left as it was; what went wrong is what the caller hears of.
                with contextlib.suppress(Exception):
                    stream.end_capture().close()
                raise
            return stream.end_capture()

    def _enqueue(self, work: Work) -> None:
        stream = self._space.stream
        for item in work:
            if isinstance(item, Copy):
                stream.copy(item.target, item.source)
            else:
                item.enqueue(stream)

    def _step(self, key: StepKey) -> Work:
        if key not in self._work:
            self._work[key] = [*self._denoiser(key), *self._update(key)]
        return self._work[key]

    def _denoiser(self, key: StepKey) -> Work:
        space, size = self._space, self._space.size
        work: Work = []
        if key.both:
            work.append(Copy(self._latent.part(self._half.nbytes, self._half.nbytes), self._half))
        rows = size.rows if key.both else size.images
        calls: tuple[Call, ...] = space.plan.step_programs[key.program]
        return [*work, *(space.step_call(call, rows) for call in calls)]

    def _update(self, key: StepKey) -> Work:
        space, kind = self._space, self._loop.kinds[key.kind]
        work: Work = []
        if kind.keeps:
            # The newest difference comes first; the others move back by one.
            for index in reversed(range(self._loop.depth - 1)):
                work.append(Copy(space.region(f"difference {index + 1}"), space.region(f"difference {index}")))
        if kind.mode == "both" and not space.layout.splits:
            # The second half of the output starts where no port may: its bytes are moved to a place of their own.
            null = space.region("null half")
            output = space.region(f"output {space.plan.output.name}")
            work.append(Copy(null, output.part(null.nbytes, null.nbytes)))
        work.append(space.bind(("update", key.kind), kind.name, self._update_places(kind)))
        # No engine may write where it reads, so new registers come from a second set.
        for index, sources in enumerate(kind.terms):
            if sources is not None:
                work.append(Copy(space.region(f"register {index}"), space.region(f"new register {index}")))
        return work

    def _update_places(self, kind: UpdateKind) -> dict[str, Place]:
        places = {}
        for ports in update_ports(kind):
            for port in ports:
                shape = concrete(port.shape, self._space.size.images)
                region = self._update_region(port.name, kind)
                places[port.name] = Place(region.part(0, byte_count(shape, port.dtype)), port.dtype, shape)
        return places

    def _update_region(self, port: str, kind: UpdateKind) -> Region:
        space = self._space
        output = space.region(f"output {space.plan.output.name}")
        half = space.size.images * space.layout.image_bytes("output")
        name = port.rstrip("0123456789")
        number = port[len(name) :]
        if name == "coefficients":
            start = kind.mode == START
            return space.region("start values") if start else space.coefficients(len(coefficient_names(kind))).region
        if name == "conditional":
            return output.part(0, half)
        if name == "null":
            return output.part(half, half) if space.layout.splits else space.region("null half")
        if name == "next_input":
            return self._half
        if name == "new_register":
            # At the start nothing is read from registers: the latent goes straight to its place.
            return space.region(f"register {number}" if kind.mode == START else f"new register {number}")
        return space.region({"new_difference": "difference 0", "noise": "noise"}.get(name, f"{name} {number}"))
