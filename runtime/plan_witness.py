"""Watches a simulated device run a plan, and says where an engine reads something else than the plan means.

What every port of every launch must read is worked out from the plan, the updates and the request alone: which launch
made each byte, or which values the host sent. The executor's places, copies and graphs are not looked at, so a swapped
binding of equal shapes, a stale history or a row of another sampler call is found where it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dcc.runtime.artifact import Artifact
from dcc.runtime.device import Array, byte_count
from dcc.runtime.device_layout import Size
from dcc.runtime.loop_spec import LoopSpec, UpdateKind, update_ports, with_scale
from dcc.runtime.plan import Call, Plan, Ref, TensorSpec
from dcc.runtime.request_rules import Forward, Generation
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.simulated_device import Launch
from dcc.runtime.simulated_memory import Run, fault
from dcc.runtime.workspace import concrete


@dataclass(frozen=True)
class Made:
    """Bytes that a launch of the expectation wrote: `nbytes` of its port, from `offset` on."""

    launch: int
    port: str
    offset: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> Made:
        return Made(self.launch, self.port, self.offset + start, nbytes)


@dataclass(frozen=True)
class Sent:
    """Values that the host sent, or zeros."""

    values: Array


Origin = tuple[Made, ...] | Sent


@dataclass
class Expected:
    """A launch that must come; `what` says what each port reads, in the plan's words."""

    engine: str
    at: str
    origins: dict[str, Origin] = field(default_factory=dict)
    what: dict[str, str] = field(default_factory=dict)


class Witness:
    """An observer of a `SimulatedDevice`: `expect_sample` or `expect_denoise` before a request, `finish` after it."""

    def __init__(self, artifact: Artifact, loop: LoopSpec | None, sampler: SamplerTable | None) -> None:
        self._artifact, self._plan, self._loop, self._sampler = artifact, artifact.plan, loop, sampler
        self._expected: list[Expected] = []
        self._seen: dict[int, int] = {}  # the device's number of a launch, and the expectation's
        self.launches = 0

    def expect_sample(self, asked: Generation) -> None:
        """The next launches are those of this request; its noise stays where it is."""
        self.finish()
        if self._loop is None or self._sampler is None:
            fault("samples are expected of a plan without a sampler", "the witness")
        self._expected = _SampleExpectation(self._artifact, self._loop, self._sampler, asked).launches

    def expect_denoise(self, asked: Forward) -> None:
        """The next launches are those of this forward."""
        self.finish()
        self._expected = _DenoiseExpectation(self._artifact, asked).launches

    def finish(self) -> None:
        """Raises SimulatedFault where launches are missing."""
        if len(self._seen) < len(self._expected):
            missing = self._expected[len(self._seen)]
            fault("an engine did not run", missing.at, f"{len(self._seen)} launches", f"{len(self._expected)}")
        self._expected, self._seen = [], {}

    def __call__(self, launch: Launch) -> None:
        """Raises SimulatedFault if this is not the launch that the plan means, or reads something else."""
        index = len(self._seen)
        if index >= len(self._expected):
            fault("an engine runs that the plan does not run", f"engine {launch.engine}, after the last call")
        expected = self._expected[index]
        if launch.engine != expected.engine:
            fault("another engine runs than the plan says", expected.at, launch.engine, expected.engine)
        self._seen[launch.number] = index
        self.launches += 1
        for port, origin in expected.origins.items():
            self._compare(launch, expected, port, origin)

    def _compare(self, launch: Launch, expected: Expected, port: str, origin: Origin) -> None:
        at = f"{expected.at}, port {port}, which reads {expected.what[port]}"
        runs = launch.inputs[port]
        if isinstance(origin, Sent):
            made = next((run for run in runs if run.writer is not None and run.writer.launch >= 0), None)
            if made is not None:
                fault("an engine reads what another one made", at, self._text(made), "values that the host sent")
            got = launch.values(port)
            wanted = np.ascontiguousarray(origin.values).reshape(-1).view(np.uint8)
            if not np.array_equal(got.reshape(-1).view(np.uint8), wanted):
                names = ", ".join(sorted({str(run.writer) for run in runs}))
                fault("an engine reads other values than the host should have sent", at, names, expected.what[port])
            return
        wanted_runs = _joined(origin)
        same = len(runs) == len(wanted_runs) and all(
            run.writer is not None
            and self._seen.get(run.writer.launch) == made.launch
            and (run.writer.port, run.offset, run.stop - run.start) == (made.port, made.offset, made.nbytes)
            for run, made in zip(runs, wanted_runs, strict=True)
        )
        if not same:
            got_text = "; ".join(self._text(run) for run in runs[:3])
            want = "; ".join(self._wanted_text(made) for made in wanted_runs[:3])
            fault("an engine reads what another one made", at, got_text, want)

    def _text(self, run: Run) -> str:
        if run.writer is None:
            return "nobody's bytes"
        if run.writer.launch < 0:
            return str(run.writer)
        known = self._seen.get(run.writer.launch)
        by = "an earlier request" if known is None else self._expected[known].at
        return f"{run.stop - run.start} bytes from {run.offset} of {run.writer.port}, made by {by}"

    def _wanted_text(self, made: Made) -> str:
        return f"{made.nbytes} bytes from {made.offset} of {made.port}, made by {self._expected[made.launch].at}"


class _Expectation:
    """Launches in order, and who made the value of each place so far."""

    def __init__(self, artifact: Artifact, rows: int) -> None:
        self.artifact = artifact
        self.plan: Plan = artifact.plan
        self.rows = rows
        self.launches: list[Expected] = []
        self.places: dict[Ref, Origin] = {}
        self._engines = {engine.name: engine for engine in self.plan.engines}
        for constant in self.plan.constants:
            if not constant.per_call:
                values = artifact.map_weight(constant.weight)
                values = np.broadcast_to(values, (rows, *values.shape[1:])) if constant.rows else values
                self.places[Ref("constant", constant.name)] = Sent(values)

    def call(self, call: Call, at: str, rows: int, places: Mapping[Ref, Origin]) -> None:
        """A launch of the plan; what it writes is in `self.places`."""
        engine = self._engines[call.engine]
        expected = Expected(call.engine, f"{at}, engine {call.engine}")
        for port, ref in zip(engine.inputs, call.inputs, strict=True):
            nbytes = byte_count(concrete(port.shape, rows), port.dtype)
            expected.origins[port.name] = _first(places[ref], nbytes)
            expected.what[port.name] = f"{ref.kind} {ref.name}"
        self._write(expected, dict(zip(call.outputs, engine.outputs, strict=True)), rows)

    def _write(self, expected: Expected, outputs: Mapping[Ref, TensorSpec], rows: int) -> None:
        number = len(self.launches)
        self.launches.append(expected)
        for ref, port in outputs.items():
            nbytes = byte_count(concrete(port.shape, rows), port.dtype)
            self.places[ref] = (Made(number, port.name, 0, nbytes),)


class _DenoiseExpectation(_Expectation):
    def __init__(self, artifact: Artifact, asked: Forward) -> None:
        super().__init__(artifact, asked.rows)
        self.places |= {Ref("input", name): Sent(values) for name, values in asked.inputs.items()}
        plan = self.plan
        program = plan.step_programs[plan.order[0] if plan.order else 0]
        for name, calls in (
            ("request", plan.request), ("timestep", plan.timestep), ("table", plan.table), ("step", program),
        ):  # fmt: skip
            for index, call in enumerate(calls):
                self.call(call, f"{name} call {index}", self.rows, self.places)


class _SampleExpectation(_Expectation):
    def __init__(self, artifact: Artifact, loop: LoopSpec, sampler: SamplerTable, asked: Generation) -> None:
        super().__init__(artifact, asked.rows)
        self.loop, self.sampler, self.asked = loop, sampler, asked
        self._draws = copy.deepcopy(asked.source)
        self._registers: list[Origin] = []
        self._differences: list[Origin] = []
        self._input: Origin = ()
        self._tables: dict[str, list[tuple[range, Origin]]] = {port.name: [] for port in self.plan.table_ports}
        self.places |= {Ref("input", name): Sent(values) for name, values in asked.conditions.items()}
        for index, call in enumerate(self.plan.request):
            self.call(call, f"request call {index}", self.rows, self.places)
        for number, chunk in enumerate(Size(asked.images, asked.guided, len(sampler.calls)).chunks()):
            if self.plan.table:
                self._table_run(number, chunk)
        self._start()
        for index in range(len(sampler.calls)):
            self._sampler_call(index)

    def _table_run(self, number: int, chunk: range) -> None:
        places = dict(self.places)
        for port in self.plan.timestep_ports:
            places[Ref("timestep", port.name)] = self._timestep_rows(port.name, port.shape[1:], chunk)
        for port in self.plan.request_ports:
            if port.rows:
                places[Ref("request", port.name)] = _repeated(places[Ref("request", port.name)], len(chunk))
        for item in self.plan.inputs:
            ref = Ref("input", item.name)
            if item.role == "condition" and item.shape[:1] == ("B",):
                places[ref] = _repeated(places[ref], len(chunk))
            elif item.role == "timestep":
                places[ref] = self._times(item.dtype, item.shape, chunk)
        for index, call in enumerate(self.plan.table):
            self.call(call, f"table call {index} of run {number}", len(chunk) * self.rows, places)
            places |= {ref: self.places[ref] for ref in call.outputs}
        for name, entries in self._tables.items():
            entries.append((chunk, self.places[Ref("table", name)]))

    def _timestep_rows(self, name: str, shape: tuple[int | str, ...], calls: range) -> Origin:
        """Values of these calls, for all rows of each, behind one another."""
        constant = next(item for item in self.plan.constants if item.name == name)
        values = self.artifact.map_weight(constant.weight)[calls.start : calls.stop]
        if constant.rows:
            values = np.broadcast_to(values, (len(calls), self.rows, *concrete(shape, self.rows)))
        return Sent(values)

    def _times(self, dtype: str, shape: tuple[int | str, ...], calls: range) -> Origin:
        times = np.asarray([self.sampler.calls[call].timestep for call in calls], np.float64).astype(dtype)
        full = concrete(shape, self.rows)
        return Sent(np.broadcast_to(times.reshape(-1, *[1] * len(full)), (len(calls), *full)))

    def _start(self) -> None:
        kind, at = self.loop.kinds[self.loop.start], "the start"
        values = np.asarray(self.loop.start_values, np.float32)
        expected = Expected(kind.name, f"{at}, engine {kind.name}")
        expected.origins = {"noise": Sent(self.asked.start.astype(np.float32)), "coefficients": Sent(values)}
        expected.what = {"noise": "the first noise", "coefficients": "scales of the first latent"}
        made = self._update_outputs(expected, kind)
        shape = (self.asked.images, *kind.latent)
        self._registers = [made["new_register0"]]
        self._registers += [Sent(np.zeros(shape, np.float32)) for _ in range(1, self.loop.registers)]
        self._input = made["next_input"]

    def _sampler_call(self, index: int) -> None:
        modes = self.plan.guidance
        both = self.asked.guided and (not modes or modes[index].mode == "both")
        rows = self.rows if both or not self.asked.guided else self.asked.images
        latent = next(item for item in self.plan.inputs if item.role == "latent")
        places = self.places
        places[Ref("input", latent.name)] = _repeated(self._input, 2) if both else self._input
        for port in self.plan.timestep_ports:
            places[Ref("timestep", port.name)] = self._timestep_rows(port.name, port.shape[1:], range(index, index + 1))
        for item in self.plan.inputs:
            if item.role == "timestep":
                places[Ref("input", item.name)] = self._times(item.dtype, item.shape, range(index, index + 1))
        for spec in self.plan.table_ports:
            chunk, origin = next(entry for entry in self._tables[spec.name] if index in entry[0])
            size = byte_count(concrete(spec.shape, self.rows), spec.dtype)
            places[Ref("table", spec.name)] = (
                tuple(made.part((index - chunk.start) * size, size) for made in origin if isinstance(made, Made))
                if not isinstance(origin, Sent)
                else origin
            )
        program = self.plan.order[index]
        for number, call in enumerate(self.plan.step_programs[program]):
            self.call(call, f"sampler call {index}, step program {program}, call {number}", rows, places)
        self._update(index, both)

    def _update(self, index: int, both: bool) -> None:
        update = self.loop.calls(self.asked.guided)[index]
        kind, entry = self.loop.kinds[update.kind], self.sampler.calls[index]
        expected = Expected(kind.name, f"sampler call {index}, update, engine {kind.name}")
        output = self.places[Ref("output", self.plan.output.name)]
        half = self.asked.images * byte_count(kind.output, kind.output_dtype)
        values: dict[str, tuple[Origin, str]] = {"conditional": (_first(output, half), "the conditional half")}
        if both and not isinstance(output, Sent):
            values["null"] = ((output[0].part(half, half),), "the other half")
        values |= {f"register{n}": (origin, f"register {n}") for n, origin in enumerate(self._registers)}
        values |= {f"difference{n}": (origin, f"difference {n}") for n, origin in enumerate(self._differences)}
        if entry.draws:
            noise = self._draws.draw(self.asked.start.shape[1:], entry.draw_dtype).astype(np.float32)
            values["noise"] = (Sent(noise), "the call's noise")
        numbers = np.asarray(with_scale(kind, update.values, self.asked.scale), np.float32)
        values["coefficients"] = (Sent(numbers), "the call's coefficients")
        for port in update_ports(kind)[0]:
            expected.origins[port.name], expected.what[port.name] = values[port.name]
        made = self._update_outputs(expected, kind)
        for name, origin in made.items():
            if name.startswith("new_register"):
                self._registers[int(name.removeprefix("new_register"))] = origin
        if kind.keeps:
            self._differences = [made["new_difference"], *self._differences][: self.loop.depth]
        self._input = made["next_input"]

    def _update_outputs(self, expected: Expected, kind: UpdateKind) -> dict[str, Origin]:
        outputs = update_ports(kind)[1]
        self._write(expected, {Ref("update", port.name): port for port in outputs}, self.asked.images)
        return {port.name: self.places[Ref("update", port.name)] for port in outputs}


def _first(origin: Origin, nbytes: int) -> Origin:
    """The first bytes of a value: the rows of a call that runs one half."""
    if isinstance(origin, Sent):
        flat = np.ascontiguousarray(origin.values).reshape(-1).view(np.uint8)
        return origin if flat.size == nbytes else Sent(flat[:nbytes])
    found: list[Made] = []
    for made in origin:
        size = min(made.nbytes, nbytes)
        nbytes -= size
        found += [made.part(0, size)] if size else []
    return tuple(found)


def _repeated(origin: Origin, count: int) -> Origin:
    if isinstance(origin, Sent):
        return Sent(np.tile(origin.values, (count, *[1] * (origin.values.ndim - 1))))
    return origin * count


def _joined(origin: tuple[Made, ...]) -> list[Made]:
    """Neighbours that continue one another are one."""
    found: list[Made] = []
    for made in origin:
        last = found[-1] if found else None
        if last and (last.launch, last.port, last.offset + last.nbytes) == (made.launch, made.port, made.offset):
            found[-1] = Made(last.launch, last.port, last.offset, last.nbytes + made.nbytes)
        else:
            found.append(made)
    return found
