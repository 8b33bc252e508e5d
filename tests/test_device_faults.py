"""Faults planted in the executor, each found by the simulated device or the witness, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from schedule_reference import subject, write
from simulated import Watched, simulated_device
from test_schedule_lowering import SCHEDULES

from dcc.errors import ExecutionError
from dcc.frontend.samplers import sampler_table
from dcc.runtime.device import Place
from dcc.runtime.device_request import DeviceRequests
from dcc.runtime.device_steps import Copy, Steps
from dcc.runtime.device_workspace import DeviceWorkspace
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.simulated_device import SimulatedContext, SimulatedStream

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedArtifact:
    """Noise in every call, histories, and calls that run one half or reuse differences."""
    dit = subject("dit")
    dit = replace(dit, program=replace(dit.program, sampler=sampler_table("euler-a", steps=6)))
    schedule = SCHEDULES["modes"](dit.program.components, dit.program.calls)
    return write(dit, schedule, tmp_path_factory.mktemp("faults") / "a.dcc", "component")


@pytest.fixture
def watched(loaded: LoadedArtifact) -> Iterator[Watched]:
    yield Watched(loaded)


def two_requests(watched: Watched) -> None:
    for _ in range(2):
        watched.sample(**subject("dit").rows(2), seed=3)


def test_without_a_fault_nothing_is_found(watched: Watched) -> None:
    watched.check(**subject("dit").rows(2), seed=3)
    assert watched.witness.launches > 50


def around(patch: Patch, kind: type, name: str, change: Callable[..., Any]) -> None:
    """`change(method, self, *arguments)` stands in for the method."""
    method = getattr(kind, name)
    patch.setattr(kind, name, lambda self, *a, **k: change(method, self, *a, **k))


def places(patch: Patch, change: Callable[[DeviceWorkspace, str, dict[str, Place]], dict[str, Place]]) -> None:
    """Every binding goes through `change(space, engine, places)`."""

    def bind(method: Any, self: Any, key: Any, engine: str, given: dict[str, Place], *more: Any) -> Any:
        return method(self, key, engine, change(self, engine, dict(given)), *more)

    around(patch, DeviceWorkspace, "bind", bind)


def altered(patch: Patch, watched: Watched, port: str, change: Callable[[Place], Place]) -> None:
    places(patch, lambda space, engine, given: {n: change(p) if n == port else p for n, p in given.items()})


def wrong_shape(patch: Patch, watched: Watched) -> None:
    altered(patch, watched, "conditional", lambda place: replace(place, shape=place.shape[::-1]))


def wrong_dtype(patch: Patch, watched: Watched) -> None:
    altered(patch, watched, "conditional", lambda place: replace(place, dtype="int32"))


def wrong_batch(patch: Patch, watched: Watched) -> None:
    altered(patch, watched, "conditional", lambda place: replace(place, shape=(1, *place.shape[1:])))


def missing_port(patch: Patch, watched: Watched) -> None:
    places(patch, lambda space, engine, given: {name: place for name, place in given.items() if name != "noise"})


def too_small(patch: Patch, watched: Watched) -> None:
    altered(patch, watched, "noise", lambda place: replace(place, region=replace(place.region, nbytes=64)))


def not_aligned(patch: Patch, watched: Watched) -> None:
    altered(
        patch,
        watched,
        "noise",
        lambda place: replace(place, region=replace(place.region, address=place.region.address + 4)),
    )


def freed_buffer(patch: Patch, watched: Watched) -> None:
    def requested(method: Any, self: Any, *arguments: Any) -> Any:
        self.space.model.device.free(self.space.region("slot 0"))
        return method(self, *arguments)

    around(patch, DeviceRequests, "sample", requested)


def swapped_binding(patch: Patch, watched: Watched) -> None:
    """Two table ports of equal shape change places in the step engine that reads both."""

    def swap(space: DeviceWorkspace, engine: str, given: dict[str, Place]) -> dict[str, Place]:
        spec = space.model.specs.get(engine)
        blocks = [] if spec is None or spec.kind != "step" else [
            port for port in spec.inputs if given[port.name].region.label == "call block"
        ]  # fmt: skip
        for one in blocks:
            for other in blocks:
                if one.name < other.name and given[one.name].shape == given[other.name].shape:
                    given[one.name], given[other.name] = given[other.name], given[one.name]
                    return given
        return given

    places(patch, swap)


def swapped_halves(patch: Patch, watched: Watched) -> None:
    def swap(space: DeviceWorkspace, engine: str, given: dict[str, Place]) -> dict[str, Place]:
        if "null" in given:
            given["null"], given["conditional"] = given["conditional"], given["null"]
        return given

    places(patch, swap)


def stale_history(patch: Patch, watched: Watched) -> None:
    """The second value of a history never arrives: what was there stays there."""
    runs: dict[SimulatedContext, int] = {}

    def run(method: Any, self: Any) -> None:
        names = [n for n, port in self.engine.ports.items() if port.output]
        regions = [self._regions[n] for n in names if self._regions[n].label.startswith("history")]
        memory = self.engine.device.memory_map
        kept = [(region, memory.view(region, "").copy(), memory.runs(region, "")) for region in regions]
        method(self)
        runs[self] = runs.get(self, 0) + 1
        for region, data, makers in kept if runs[self] == 2 else ():
            memory.view(region, "")[:] = data
            memory.mark(region, makers, "")

    around(patch, SimulatedContext, "_run", run)


def differences_in_place(patch: Patch, watched: Watched) -> None:
    """The older difference is not moved back before the newer one is written over it."""

    def update(method: Any, self: Any, *arguments: Any) -> Any:
        work = method(self, *arguments)
        return [item for item in work if not (isinstance(item, Copy) and item.source.label.startswith("difference"))]

    around(patch, Steps, "_update", update)


def stale_latent(patch: Patch, watched: Watched) -> None:
    """New registers never come to where they are read."""

    def update(method: Any, self: Any, *arguments: Any) -> Any:
        return [
            item
            for item in method(self, *arguments)
            if not isinstance(item, Copy) or "register" not in item.target.label
        ]

    around(patch, Steps, "_update", update)


def missing_half(patch: Patch, watched: Watched) -> None:
    def denoiser(method: Any, self: Any, *arguments: Any) -> Any:
        return [item for item in method(self, *arguments) if not isinstance(item, Copy)]

    around(patch, Steps, "_denoiser", denoiser)


def one_slot(patch: Patch, watched: Watched) -> None:
    """All buffers share memory."""

    def place(method: Any, self: Any, label: str, *arguments: Any) -> Any:
        largest = max((r for r in self._regions if r.startswith("slot")), key=lambda r: self._regions[r].nbytes)
        return method(self, largest if label.startswith("slot") else label, *arguments)

    around(patch, DeviceWorkspace, "place", place)


def wrong_row(patch: Patch, watched: Watched) -> None:
    """Every sampler call is given the first call's block."""

    def copy(method: Any, self: Any, target: Any, source: Any) -> None:
        if target.label == "call block":
            source = replace(source, address=self.first)
        method(self, target, source)

    def sample(method: Any, self: Any, *arguments: Any) -> Any:
        SimulatedStream.first = self.space.region("call blocks").address  # type: ignore[attr-defined]
        return method(self, *arguments)

    around(patch, SimulatedStream, "copy", copy)
    around(patch, DeviceRequests, "sample", sample)


def never_sent(patch: Patch, watched: Watched) -> None:
    def send(method: Any, self: Any, label: str, values: Any) -> None:
        if label != "input y":
            method(self, label, values)

    around(patch, DeviceRequests, "_send", send)


def other_noise(patch: Patch, watched: Watched) -> None:
    around(patch, DeviceRequests, "_send_noise", lambda method, self, noise: method(self, noise[::-1]))


def no_wait(patch: Patch, watched: Watched) -> None:
    patch.setattr(SimulatedStream, "synchronise", lambda self: None)


def buffer_in_flight(patch: Patch, watched: Watched) -> None:
    def send(method: Any, self: Any, noise: Any) -> None:
        self._noise_sent = 0
        method(self, noise)

    around(patch, DeviceRequests, "_send_noise", send)


def in_capture(patch: Patch, act: Callable[[Steps], None]) -> None:
    def enqueue(method: Any, self: Any, work: Any) -> None:
        if self._space.stream.recording:
            act(self)
        method(self, work)

    around(patch, Steps, "_enqueue", enqueue)


def allocation_in_capture(patch: Patch, watched: Watched) -> None:
    in_capture(patch, lambda steps: watched.device.allocate(256, "more") and None)


def wait_in_capture(patch: Patch, watched: Watched) -> None:
    in_capture(patch, lambda steps: steps._space.stream.synchronise())


def pageable_in_capture(patch: Patch, watched: Watched) -> None:
    values: Any = np.zeros(64, np.float32)
    in_capture(patch, lambda steps: steps._space.stream.upload(steps._space.region("noise").part(0, 256), values))


def cold_capture(patch: Patch, watched: Watched) -> None:
    def run(method: Any, self: Any, key: Any) -> None:
        self._space.stream.launch(self._captured(self._step(key)))

    around(patch, Steps, "run", run)


def copy_beyond(patch: Patch, watched: Watched) -> None:
    def copy(method: Any, self: Any, target: Any, source: Any) -> None:
        if target.label == "register 0":
            target, source = (replace(region, nbytes=2 * region.nbytes) for region in (target, source))
        method(self, target, source)

    around(patch, SimulatedStream, "copy", copy)


def overlapping(patch: Patch, watched: Watched) -> None:
    def overlap(space: DeviceWorkspace, engine: str, given: dict[str, Place]) -> dict[str, Place]:
        return given | {"next_input": given["conditional"]} if "conditional" in given else given

    places(patch, overlap)


def in_scratch(patch: Patch, watched: Watched) -> None:
    """Something that must last lies in the memory that every engine scribbles on."""

    def bind(method: Any, self: Any, key: Any, engine: str, given: Any, scratch: Any = None) -> Any:
        return method(self, key, engine, given, self.region("call blocks"))

    around(patch, DeviceWorkspace, "bind", bind)


def graph_after_reallocation(patch: Patch, watched: Watched) -> None:
    def sample(method: Any, self: Any, *arguments: Any) -> Any:
        if self.steps.captured:
            device, old = watched.device, self.space.region("new register 0")
            device.free(old)
            self.space._regions["new register 0"] = device.allocate(old.nbytes, old.label)
        return method(self, *arguments)

    around(patch, DeviceRequests, "sample", sample)


def engine_left_out(patch: Patch, watched: Watched) -> None:
    around(patch, DeviceRequests, "_run_request_calls", lambda method, self: None)


def wrong_program(patch: Patch, watched: Watched) -> None:
    around(patch, Steps, "run", lambda method, self, key: method(self, replace(key, program=0)))


@dataclass(frozen=True)
class Found:
    what: str
    at: str


FAULTS: dict[Callable[[Patch, Watched], None], Found] = {
    wrong_shape: Found("a port is bound to another shape", "port conditional"),
    wrong_dtype: Found("a port is bound to another dtype", "port conditional"),
    wrong_batch: Found("a port is bound to another shape", "engine update_both"),
    missing_port: Found("an engine's ports are not all bound", "engine update_"),
    too_small: Found("a port is bound to a place that is too small", "port noise, noise"),
    not_aligned: Found("a port is bound to an address that is not aligned", "port noise, noise"),
    freed_buffer: Found("memory is used after it was freed", "slot 0"),
    swapped_binding: Found("an engine reads what another one made", "which reads table"),
    swapped_halves: Found("an engine reads what another one made", "the conditional half"),
    stale_history: Found("an engine reads what another one made", "which reads history"),
    differences_in_place: Found("memory is read that nobody has written", "difference 1"),
    stale_latent: Found("an engine reads what another one made", "which reads register 0"),
    missing_half: Found("memory is read that nobody has written", "input x"),
    one_slot: Found("an output overlaps another port", "engine step"),
    wrong_row: Found("an engine reads", "sampler call 1"),
    never_sent: Found("memory is read that nobody has written", "input y"),
    other_noise: Found("an engine reads other values than the host should have sent", "the first noise"),
    no_wait: Found("pinned memory is", "host"),
    buffer_in_flight: Found("pinned memory is written while a copy from it is under way", "host noise"),
    allocation_in_capture: Found("memory is allocated (more) while a stream is captured", "stream"),
    wait_in_capture: Found("the host waits while a stream is captured", "stream"),
    pageable_in_capture: Found("memory that is not pinned is copied while a stream is captured", "noise"),
    cold_capture: Found("an engine is captured that has not run before", "engine"),
    copy_beyond: Found("a use reaches beyond its allocation", "register 0"),
    overlapping: Found("an output overlaps another port", "port next_input"),
    in_scratch: Found("memory is read that nobody has written", "call block"),
    graph_after_reallocation: Found("memory is used after it was freed", "graph of stream"),
    engine_left_out: Found("memory is read that nobody has written", "request port"),
    wrong_program: Found("another engine runs than the plan says", "sampler call"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[..., None], loaded: LoadedArtifact, monkeypatch: Patch) -> None:
    watched = Watched(loaded, simulated_device(loaded))
    with monkeypatch.context() as patch:
        plant(patch, watched)
        with pytest.raises(ExecutionError) as caught:
            two_requests(watched)
    found = FAULTS[plant]
    # What the clean-up after a fault stumbles over does not hide it.
    error: BaseException | None = caught.value
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__context__
    errors = [error for error in chain if isinstance(error, ExecutionError)]
    named = [found.what in error.what and found.at in error.details["at"] for error in errors]
    assert any(named), "\n".join(map(str, chain))
