"""Measure what engines take on this machine, inside real sampling loops, for the cost model.

An artifact that is cut at every component is sampled with a clock around each engine call: the engines then find
caches, threads and memory as they will in use. What is left of a sampler call is the runtime's own work. Small
engines without weights (sums and combinations of histories) are measured beside them.

Rounds alternate between numbers of rows, so that a disturbance of the machine meets all of them. Samples in which the
operating system took a processor away are known (involuntary context switches) and count only where there is nothing
better; figures are medians over rounds of the medians of the others. Where one thread does everything, and for the
runtime's own work, which one thread always does, the thread's processor time is taken, which nothing else disturbs.
"""

from __future__ import annotations

import itertools
import math
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch.fx import Node

from dcc.conditions import negatives_for, rows_for, with_classes
from dcc.cost_model.roofline import LoopWork, call_part, predict, request_part
from dcc.cost_model.table import CALL, ENGINE, REQUEST, CalibrationTable, Measurement, machine_of_this_process
from dcc.cost_model.work import EngineWork, Part, combination_part, stage_part, sum_part
from dcc.errors import Cancelled, UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.lower import lower
from dcc.exports.step_plan import StepPlan
from dcc.exports.unroll import Operation, Scalar
from dcc.ir.graph import bytes_of, elements, shape_of
from dcc.ir.program import Program, Scope, Stage
from dcc.preparation import Source, manifest_of, prepare
from dcc.runtime.artifact import Artifact
from dcc.runtime.loaded import LoadedArtifact, Progress
from dcc.runtime.onnxruntime_backend import Array, Binding, OnnxRuntimeBackend
from dcc.runtime.plan import BufferSpec, InputSpec, PortSpec, TensorSpec
from dcc.runtime.workspace import TABLE_ROWS, aligned_empty

OPSET, IR_VERSION = 23, 10
CALLS = 8  # sampler calls of a round: each engine runs so often, and a round stays short
REPEATS = 7
ROWS = (2, 8, 32)
HISTORIES = (1, 2, 3)
TURNS = 4
Told = Callable[[str], None]


class Event(NamedTuple):
    """One engine call: seconds by the clock and of the calling thread's processor time.

    `preempted` says that another process got a processor of ours meanwhile.
    """

    engine: str
    rows: int
    seconds: float
    processor_seconds: float
    preempted: bool


@dataclass
class _Clock:
    """Engine calls in order, while it is on."""

    on: bool = False
    events: list[Event] = field(default_factory=list)


def preemptions() -> int:
    """How often the operating system took a processor away from a thread of this process that could have gone on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _timed(run: Callable[[], object], engine: str, rows: int) -> Event:
    before = preemptions()
    processor = time.thread_time()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Event(engine, rows, seconds, time.thread_time() - processor, preemptions() != before)


class TimedBackend(OnnxRuntimeBackend):
    """The backend with a clock around every engine call; `clock.events` has what was run while the clock was on."""

    def __init__(self, artifact: Artifact, threads: int | None = None, own_process: bool = True) -> None:
        super().__init__(artifact, threads, False, own_process)
        self.clock = _Clock()

    def bind(self, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Binding:
        rows = next(array.shape[0] for array in outputs.values())
        return _TimedBinding(self.session(engine), engine, inputs, outputs, self.clock, rows)


class _TimedBinding(Binding):
    def __init__(
        self, session: Any, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], clock: _Clock,
        rows: int,
    ) -> None:  # fmt: skip
        super().__init__(session, engine, inputs, outputs)
        self._clock, self._rows = clock, rows

    def run(self) -> None:
        event = _timed(super().run, self._engine, self._rows)
        if self._clock.on:
            self._clock.events.append(event)


@dataclass(frozen=True)
class Round:
    """One loop: engine calls before it and in each sampler call; seconds by the clock and of processor time."""

    rows: int
    images: int
    early: tuple[Event, ...]
    calls: tuple[tuple[Event, ...], ...]
    call_seconds: tuple[float, ...]
    call_processor_seconds: tuple[float, ...]
    preempted: tuple[bool, ...]
    seconds: float
    processor_seconds: float

    @property
    def host_seconds(self) -> list[float]:
        """What the runtime itself took in each sampler call but the first, which the tables come before."""
        pairs = list(zip(self.call_processor_seconds, self.calls, strict=True))[1:]
        return [max(seconds - sum(event.processor_seconds for event in call), 1e-9) for seconds, call in pairs]

    @property
    def request_seconds(self) -> float:
        """What the runtime itself took around the loop."""
        events = (*self.early, *(event for call in self.calls for event in call))
        host = statistics.median(self.host_seconds) if self.host_seconds else 0.0
        engines = sum(event.processor_seconds for event in events)
        return max(self.processor_seconds - engines - host * len(self.calls), 1e-9)


class TimedLoop:
    """An artifact that is sampled with a clock around every engine call. Sessions are shared by all row numbers."""

    def __init__(self, path: str | Path, threads: int | None = None, own_process: bool = True) -> None:
        self.artifact = Artifact.open(path)
        self.backend = TimedBackend(self.artifact, threads, own_process)
        # One each: the runtime keeps workspaces for two numbers of rows only.
        self._loaded: dict[int, LoadedArtifact] = {}
        self.first = LoadedArtifact(self.artifact, self.backend)
        if self.first.sampler is None:
            raise UsageError("calibration needs a sampling loop", got="an artifact without a sampler")

    def images(self, rows: int) -> int:
        """Images that make this many rows: half of them under guidance, where that is possible."""
        return rows // 2 if self.guided(rows) else rows

    def guided(self, rows: int) -> bool:
        return self.first.guidance["mode"] == "cfg" and rows % 2 == 0

    def run(self, rows: int, calls: int | None = None) -> Round:
        """One loop with `rows` rows, ended after `calls` sampler calls."""
        loaded = self._loaded.setdefault(rows, LoadedArtifact(self.artifact, self.backend))
        images, clock = self.images(rows), self.backend.clock
        total = len(loaded.plan.order)
        last = min(calls or total, total)
        conditions = rows_for(loaded, self._conditions(loaded), images)
        marks: list[tuple[float, float, int, int]] = []

        def told(progress: Progress) -> bool:
            marks.append((time.perf_counter(), time.thread_time(), len(clock.events), preemptions()))
            return progress.call + 1 < last or last == total

        arguments: dict[str, Any] = {"seed": list(range(images)), "callback": told}
        if self.first.guidance["mode"] == "cfg":
            scale = float(self.first.guidance["scale"])
            arguments["guidance_scale"] = (scale if scale != 1.0 else 2.0) if self.guided(rows) else 1.0
            arguments["negative_conditions"] = negatives_for(loaded, images) if self.guided(rows) else None
        clock.events, clock.on = [], True
        before = (time.perf_counter(), time.thread_time(), 0, preemptions())
        try:
            loaded.sample(conditions, images=images, **arguments)
        except Cancelled:
            pass
        finally:
            clock.on = False
        seconds, processor = time.perf_counter() - before[0], time.thread_time() - before[1]
        step = {engine.name for engine in loaded.plan.engines if engine.kind == "step"}
        first = next((index for index, event in enumerate(clock.events) if event.engine in step), len(clock.events))
        pairs = list(itertools.pairwise([(before[0], before[1], first, before[3]), *marks]))
        return Round(
            rows, images, tuple(clock.events[:first]), tuple(tuple(clock.events[a[2] : b[2]]) for a, b in pairs),
            tuple(b[0] - a[0] for a, b in pairs), tuple(b[1] - a[1] for a, b in pairs),
            tuple(a[3] != b[3] for a, b in pairs), seconds, processor,
        )  # fmt: skip

    @staticmethod
    def _conditions(loaded: LoadedArtifact) -> dict[str, Any]:
        """Values for all conditions: every class in turn, zeros for what is not a class."""
        others = {}
        for item in loaded.conditions:
            if item.minimum is None:
                sizes = tuple(1 if isinstance(size, str) else size for size in item.shape)
                others[item.name] = np.zeros(sizes, item.dtype)
        return with_classes(loaded, others, ())


def engine_contents(artifact: Artifact, program: Program) -> dict[str, EngineWork]:
    """Each engine of the artifact by its content, read from the names that its operations carry.

    Raises UsageError where the artifact was not made from the Program.
    """
    stages = {stage.name: stage for stage in program.stages}
    contents = {}
    for engine in artifact.plan.engines:
        sizes = {port.name: _elements(port) for port in (*engine.inputs, *engine.outputs) if len(port.shape) > 1}
        parts = []
        for name, nodes in _operations(artifact, engine.name).items():
            if name in stages:
                parts.append(stage_part(stages[name]))
            elif re.fullmatch(r"s\d+", name):
                parts.append(_arithmetic_part(nodes, sizes))
            else:
                raise UsageError("the artifact was not made from this Program", at=engine.name, got=name)
        contents[engine.name] = EngineWork(tuple(parts))
    return contents


def engine_titles(artifact: Artifact) -> dict[str, str]:
    """The stages of each engine, as people call them."""
    return {engine.name: " + ".join(_operations(artifact, engine.name)) for engine in artifact.plan.engines}


def _operations(artifact: Artifact, engine: str) -> dict[str, list[Any]]:
    """The engine's ONNX operations by the stage, or the number of the arithmetic, that they belong to."""
    groups: dict[str, list[Any]] = {}
    for node in onnx.load_model_from_string(artifact.engine_model(engine)).graph.node:
        groups.setdefault(node.name.split("/", 1)[0], []).append(node)
    return groups


def _arithmetic_part(nodes: Sequence[Any], sizes: Mapping[str, int]) -> Part:
    """A combination or a delta from its ONNX operations; an inner value is as large as the largest port."""
    products = sum(node.op_type == "Mul" for node in nodes)
    sums = len(nodes) - products
    seen = [sizes[name] for node in nodes for name in (*node.input, *node.output) if name in sizes]
    size = max(seen or sizes.values())
    if products:
        return combination_part(products, size, based=sums == products)
    return combination_part(sums, size, based=True, weighted=False)


def operation_part(operation: Operation, stages: Mapping[str, Stage]) -> Part | None:
    """What an operation of an unrolled schedule costs; None for `keep`, which costs nothing."""
    if operation.kind == "keep":
        return None
    if operation.kind == "stage":
        return stage_part(stages[operation.stage])
    node = next(value for value in operation.outputs)
    like = node if isinstance(node, Node) else node.like
    size = elements(shape_of(like)[1:], 1)
    if operation.kind in ("delta", "copy"):
        return sum_part(size)
    weights = sum(isinstance(value, Scalar) for value in operation.inputs)
    histories = len(operation.inputs) - weights - operation.based
    return combination_part(histories, size, operation.based, weights > 0)


def planned_loop(program: Program, step: StepPlan, images: int, guided: bool = True) -> LoopWork:
    """The generation that a planned step makes, as the cost model sees it, for so many images.

    `guided` says that the request has a guidance scale other than 1. Nothing is lowered for it.
    """
    stages = {stage.name: stage for stage in program.stages}
    engines = {}
    for key, engine in step.engines.items():
        parts = (operation_part(operation, stages) for operation in engine.operations)
        engines[key] = EngineWork(tuple(part for part in parts if part is not None))
    early = {
        kind: [stage.name for stage in program.stages if stage.kind == kind] for kind in (Scope.REQUEST, Scope.TABLE)
    }
    engines |= {name: EngineWork((stage_part(stages[name]),)) for names in early.values() for name in names}
    count = program.calls
    modes = [item.mode for item in step.guidance] or ["both"] * count
    order = step.order or (0,) * count
    shape = tuple(int(size) for size in program.latent.shape[1:])
    kinds = (Scope.TIMESTEP, Scope.TABLE)
    table = sum(bytes_of(node, 1) for stage in program.stages if stage.kind in kinds for node in stage.outputs)
    host = HostWork(math.prod(shape), table, program.sampler.name, np.dtype(program.sampler.dtype).itemsize)
    calls = [[call.engine for call in step.programs[index]] for index in order]
    return _loop(engines, calls, modes, images, guided, early[Scope.REQUEST], early[Scope.TABLE], host)


@dataclass(frozen=True)
class HostWork:
    """What the runtime's own work depends on: elements of a latent, bytes of a row of tables, the sampler."""

    latent_elements: int
    table_bytes: int
    sampler: str
    element_bytes: int

    def call(self, guided: bool) -> Part:
        """In one sampler call; `guided` where both halves run."""
        return call_part(self.latent_elements, self.table_bytes, guided, self.sampler, self.element_bytes)

    def request(self, calls: int, guided: bool) -> Part:
        """Around the loop."""
        return request_part(self.latent_elements, self.table_bytes, calls, guided, self.sampler)


def host_work(loaded: LoadedArtifact) -> HostWork:
    plan = loaded.plan
    assert loaded.sampler is not None
    table = sum(_elements(port) * np.dtype(port.dtype).itemsize for port in (*plan.timestep_ports, *plan.table_ports))
    size = np.dtype(loaded.sampler.dtype).itemsize
    return HostWork(_elements(loaded.latent), table, loaded.sampler.name, size)


def loop_work(loaded: LoadedArtifact, contents: Mapping[str, EngineWork], images: int, guided: bool = True) -> LoopWork:
    """The generation that an artifact makes, as the cost model sees it, for so many images."""
    plan = loaded.plan
    modes = [item.mode for item in plan.guidance] or ["both"] * len(plan.order)
    calls = [[call.engine for call in plan.step_programs[index]] for index in plan.order]
    request, table = ([call.engine for call in listed] for listed in (plan.request, plan.table))
    return _loop(contents, calls, modes, images, guided, request, table, host_work(loaded))


def _loop(
    engines: Mapping[str, EngineWork], calls: Sequence[Sequence[str]], modes: Sequence[str], images: int, guided: bool,
    request: Sequence[str], table: Sequence[str], host: HostWork,
) -> LoopWork:  # fmt: skip
    rows = images * (2 if guided else 1)
    both = [guided and mode == "both" for mode in modes]
    early = [(name, rows) for name in request]
    early += [(name, size) for size in table_rows(rows, len(calls)) for name in table]
    step = tuple(
        tuple((name, images * (2 if doubled else 1)) for name in call)
        for call, doubled in zip(calls, both, strict=True)
    )
    hosts = tuple(host.call(doubled) for doubled in both)
    return LoopWork(dict(engines), step, images, tuple(early), hosts, host.request(len(calls), guided))


def table_rows(rows: int, calls: int) -> list[int]:
    """The rows of each run of the table engines in a request."""
    chunk = max(1, TABLE_ROWS // rows)
    return [rows * min(chunk, calls - start) for start in range(0, calls, chunk)]


def _elements(spec: TensorSpec | InputSpec | PortSpec | BufferSpec) -> int:
    """Elements of one row."""
    return math.prod(int(size) for size in spec.shape[1:])


def compile_for_calibration(source: Source, path: Path) -> Program:
    """The Program of the source after the exact passes; at `path` its artifact, cut at every component, unchecked.

    Raises UsageError where the source has no sampler.
    """
    program = prepare(source).program
    if program.sampler is None:
        raise UsageError("calibration needs a sampling loop", next="name a sampler with --sampler")
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, "component")
        writer.finish(manifest_of(program, plan, program.hash(), "cpu", {}))
    return program


@dataclass(frozen=True)
class Calibration:
    """What was measured, and every loop that was run after the warm-up."""

    measurements: tuple[Measurement, ...]
    rounds: tuple[Round, ...]


def calibrate(
    path: str | Path,
    contents: Mapping[str, EngineWork],
    rows: Sequence[int] = ROWS,
    repeats: int = REPEATS,
    calls: int = CALLS,
    threads: int | None = None,
    own_process: bool = True,
    told: Told = lambda _: None,
) -> Calibration:
    """Medians for every distinct engine of the artifact, for weightless engines and for the runtime's own work.

    `contents` has what each engine does, by its name. With `own_process` engines share one thread pool, as they do in
    `dcc run`; the process cannot make sessions with pools of their own afterwards. Raises UsageError for rows outside
    the artifact's profile.
    """
    loop = TimedLoop(path, threads, own_process)
    low, high = loop.artifact.plan.symbols["B"]
    for count in rows:
        if not low <= count <= high:
            raise UsageError("rows outside the profile that was compiled", got=count, want=f"{low} to {high}")
    small = Weightless(_carried_elements(loop.artifact), rows, loop.backend)
    samples, host = _Samples(), host_work(loop.first)
    rounds: list[Round] = []
    for repeat in range(repeats + 1):
        told(f"round {repeat} of {repeats}" if repeat else "warming up")
        shift = repeat % len(rows)
        for count in (*rows[shift:], *rows[:shift]):
            made = loop.run(count, calls)
            little = small.run(count)
            if not repeat:
                continue
            rounds.append(made)
            for event in (*made.early, *(event for call in made.calls for event in call)):
                samples.add(ENGINE, contents[event.engine], event.rows, repeat, *_seconds(event, threads))
            for engine, event in little:
                samples.add(ENGINE, engine, count, repeat, *_seconds(event, threads))
            guided = loop.guided(count)
            call, request = host.call(guided), host.request(len(loop.first.plan.order), guided)
            for seconds in made.host_seconds:
                samples.add(CALL, EngineWork((call,)), made.images, repeat, seconds, False)
            samples.add(REQUEST, EngineWork((request,)), made.images, repeat, made.request_seconds, False)
    return Calibration(tuple(samples.measurements()), tuple(rounds))


def _seconds(event: Event, threads: int | None) -> tuple[float, bool]:
    return (event.processor_seconds, False) if threads == 1 else (event.seconds, event.preempted)


@dataclass(frozen=True)
class Check:
    """Seconds of a sampler call with `rows` rows: measured in the loops of a calibration, and predicted."""

    rows: int
    measured_seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1.0


def check(
    loaded: LoadedArtifact, contents: Mapping[str, EngineWork], found: Calibration, table: CalibrationTable,
    threads: int | None = None,
) -> tuple[Check, ...]:  # fmt: skip
    """How far the table is from whole sampler calls: sums of medians need not be medians of sums."""
    checks = []
    for rows in sorted({item.rows for item in found.rounds}):
        rounds = [item for item in found.rounds if item.rows == rows]
        samples = []
        for number, item in enumerate(rounds):
            spans = item.call_processor_seconds if threads == 1 else item.call_seconds
            quiet = (False,) * len(spans) if threads == 1 else item.preempted
            samples += [(number, *pair) for pair in list(zip(spans, quiet, strict=True))[1:]]
        measured = statistics.median(statistics.median(seconds) for seconds in undisturbed(samples).values())
        images = rounds[0].images
        predicted = predict(loop_work(loaded, contents, images, images != rows), table).call_seconds
        checks.append(Check(rows, measured, statistics.median(predicted)))
    return tuple(checks)


def new_table(target: str = "cpu", threads: int | None = None, own_process: bool = True) -> CalibrationTable:
    """An empty table of this machine."""
    return CalibrationTable(target, machine_of_this_process(threads), (), own_process)


class Weightless:
    """Sums and combinations of histories as engines of their own, for tensors of the given elements a row."""

    def __init__(self, elements: Iterable[int], rows: Sequence[int], backend: OnnxRuntimeBackend) -> None:
        """Sessions are as `backend` makes those of a step's engines."""
        self._bindings: dict[int, list[tuple[EngineWork, Any, Any]]] = {count: [] for count in rows}
        self._arrays: list[Array] = []
        for size in elements:
            models = [(sum_part(size), sum_model(size))]
            models += [
                (combination_part(count, size, based), combination_model(count, size, based))
                for count in HISTORIES
                for based in (False, True)
            ]
            for part, model in models:
                backend.provide(part.key, model)
                session = backend.session(part.key)
                for count in rows:
                    self._bindings[count].append((EngineWork((part,)), session, self._bound(session, count, size)))

    def _bound(self, session: Any, rows: int, size: int) -> Any:
        import onnxruntime

        binding = session.io_binding()
        for index, item in enumerate((*session.get_inputs(), *session.get_outputs())):
            array = aligned_empty((1,) if item.name.startswith("w") else (rows, size), "float32")
            array.fill(0.5)
            self._arrays.append(array)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            if index < len(session.get_inputs()):
                binding.bind_ortvalue_input(item.name, value)
            else:
                binding.bind_ortvalue_output(item.name, value)
        return binding

    def run(self, rows: int) -> list[tuple[EngineWork, Event]]:
        """Every engine a few times in turn; the first turn finds cold caches and is left out."""
        found = []
        for turn in range(1 + TURNS):
            for engine, session, binding in self._bindings[rows]:
                event = _timed(partial(session.run_with_iobinding, binding), engine.key, rows)
                if turn:
                    found.append((engine, event))
        return found


def sum_model(size: int) -> bytes:
    """`a + b` of `[B, size]` each."""
    return _model([helper.make_node("Add", ["a", "b"], ["output"])], ["a", "b"], [], size)


def combination_model(histories: int, size: int, based: bool = False) -> bytes:
    """`base + sum_j w_j h_j` of `[B, size]` each, with weights `[1]`: the operations of a lowered combination."""
    names = [f"h{index}" for index in range(histories)]
    weights = [f"w{index}" for index in range(histories)]
    nodes = [helper.make_node("Mul", [name, weight], [f"p{name}"]) for name, weight in zip(names, weights, strict=True)]
    terms = ["base"] * based + [f"p{name}" for name in names]
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        nodes.append(helper.make_node("Add", [total, term], [f"t{index}"]))
        total = f"t{index}"
    nodes[-1].output[0] = "output"
    return _model(nodes, ["base"] * based + names, weights, size)


def _model(nodes: list[Any], inputs: Sequence[str], weights: Sequence[str], size: int) -> bytes:
    shapes: dict[str, list[Any]] = {name: ["B", size] for name in inputs} | {name: [1] for name in weights}
    graph = helper.make_graph(
        nodes, "weightless",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", size])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(deterministic=True)


class _Samples:
    """Seconds by kind, engine and rows: (round, seconds, preempted)."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str, int], EngineWork] = {}
        self._samples: dict[tuple[str, str, int], list[tuple[int, float, bool]]] = {}

    def add(self, kind: str, engine: EngineWork, rows: int, repeat: int, seconds: float, preempted: bool) -> None:
        key = (kind, engine.key, rows)
        self._engines[key] = engine
        self._samples.setdefault(key, []).append((repeat, seconds, preempted))

    def measurements(self) -> Iterable[Measurement]:
        for key, samples in sorted(self._samples.items()):
            kind, name, rows = key
            kept = undisturbed(samples)
            median = statistics.median(statistics.median(seconds) for seconds in kept.values())
            everything = [value for seconds in kept.values() for value in seconds]
            low, high = np.percentile(everything, (25, 75))
            parts = tuple((part.key, part.work.at(rows)) for part in self._engines[key].parts)
            yield Measurement(name, rows, median, float((high - low) / 2 / median), len(everything), parts, kind)


def undisturbed(samples: Sequence[tuple[int, float, bool]]) -> dict[int, list[float]]:
    """The seconds of each round without those that were preempted; where nearly all were, the shortest twentieth."""
    quiet = [(repeat, seconds) for repeat, seconds, preempted in samples if not preempted]
    if len(quiet) * 20 < len(samples) or not quiet:
        shortest = sorted((seconds, repeat) for repeat, seconds, _ in samples)
        quiet = [(repeat, seconds) for seconds, repeat in shortest[: 1 + len(samples) // 20]]
    kept: dict[int, list[float]] = {}
    for repeat, seconds in quiet:
        kept.setdefault(repeat, []).append(seconds)
    return kept


def _carried_elements(artifact: Artifact) -> list[int]:
    """Elements a row of what flows between step engines: the largest, which is the residual stream, and a fourth.

    Raises UsageError where the step is not cut.
    """
    found = [port for port in artifact.plan.buffers if port.shape[:1] == ("B",) and port.dtype == "float32"]
    if not found:
        raise UsageError("calibration needs a step that is cut", want="--granularity component")
    most = max(map(_elements, found))
    return sorted({most, max(1, most // 4)})
