"""The step of a plan: engines, and for every sampler call the straight line of calls with the places they use.

Values that later sampler calls read get history places, assigned by liveness over the whole loop: writing a new
value copies nothing, and a place is free again after its last reader. Values inside one call get buffers, which
share memory by liveness over all step programs. Equal calls share a step program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.fx import Node

from dcc.errors import ScheduleError
from dcc.exports.compose import StoredWeights, compose
from dcc.exports.segments import Segment, divide, like
from dcc.exports.templates import OnnxTemplate
from dcc.exports.unroll import EARLY, Kept, Operation, Scalar, Value, step_stages, unroll
from dcc.ir.graph import dtype_of, elements, outputs_of, shape_of
from dcc.ir.program import Program, Scope, Stage
from dcc.ir.schedule import Schedule
from dcc.runtime.plan import BufferSpec, Call, CallGuidance, Ref, TensorSpec


@dataclass(frozen=True)
class StepEngine:
    """A composed engine of the step; `operations` are as the first call that uses it sees them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: bytes
    weights: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass
class StepPlan:
    """`calls[i]` names engines by key; `programs` and `order` are what a Plan holds.

    `scalars` are the weights of linear combinations, constants of the plan by name.
    """

    programs: tuple[tuple[Call, ...], ...] = ()
    order: tuple[int, ...] = ()
    guidance: tuple[CallGuidance, ...] = ()
    buffers: tuple[BufferSpec, ...] = ()
    histories: tuple[TensorSpec, ...] = ()
    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    engines: dict[str, StepEngine] = field(default_factory=dict)


class StepPlanner:
    """Plans schedules of one Program. Engines are composed once, however many schedules use them."""

    def __init__(self, program: Program, templates: Mapping[str, OnnxTemplate], stored: StoredWeights) -> None:
        self.program = program
        self._templates, self._stored = templates, stored
        self._stages = {stage.name: stage for stage in step_stages(program)}
        self._final = outputs_of(program.graph)[0]
        self._engines: dict[str, StepEngine] = {}

    def plan(self, schedule: Schedule | None, finest: bool = False) -> StepPlan:
        """The step under a schedule, or one that computes everything (its `order` is empty).

        `finest` gives each component an engine that is the same in every schedule. Raises ScheduleError where the
        program cannot do what the schedule says.
        """
        operations = [_everything(self._stages.values())] if schedule is None else unroll(self.program, schedule)
        segments = divide(operations, self._stages, self._final, finest)
        places, histories = _assign_histories(operations)
        result = StepPlan(histories=histories)
        programs: dict[tuple[Call, ...], int] = {}
        order = []
        for listed, parts in zip(operations, segments, strict=True):
            kept = {item.inputs[0]: item.outputs[0] for item in listed if item.kind == "keep"}
            calls = tuple(self._call(part, kept, places, result) for part in parts)
            order.append(programs.setdefault(calls, len(programs)))
        result.programs, result.order = tuple(programs), tuple(order) if schedule is not None else ()
        result.buffers = assign_slots(_lives(result.programs), self._buffer_values(segments))
        if schedule is not None and any(mode.kind != "both" for mode in schedule.guidance):
            result.guidance = tuple(CallGuidance(mode.kind, mode.weights) for mode in schedule.guidance)
        return result

    def _call(self, part: Segment, kept: Mapping[Value, Value], places: Mapping[Kept, str], result: StepPlan) -> Call:
        engine = self._engine(part)
        result.engines[part.key] = engine
        for value in part.inputs:
            if isinstance(value, Scalar):
                dtype = str(np.dtype(dtype_of(value.like)))
                result.scalars[scalar_name(value.value, dtype)] = np.full(1, value.value, dtype)
        return Call(
            part.key,
            tuple(self._reference(value, kept, places) for value in part.inputs),
            tuple(self._reference(value, kept, places) for value in part.outputs),
        )

    def _engine(self, part: Segment) -> StepEngine:
        if part.key not in self._engines:
            inputs = {value: _port(value, "in", number) for number, value in enumerate(part.inputs)}
            outputs = {value: _port(value, "out", number) for number, value in enumerate(part.outputs)}
            model, weights = compose(
                "step", part.operations, self._stages, self._templates, inputs, outputs, self._stored
            )
            specs = tuple(inputs.values()), tuple(outputs.values())
            self._engines[part.key] = StepEngine(*specs, model, weights, part.operations)
        return self._engines[part.key]

    def _reference(self, value: Value, kept: Mapping[Value, Value], places: Mapping[Kept, str]) -> Ref:
        if isinstance(value, Scalar):
            return Ref("constant", scalar_name(value.value, dtype_of(value.like)))
        if isinstance(value, Kept):
            return Ref("history", places[value]) if value in places else Ref("buffer", _unread(value))
        stored = kept.get(value)
        if value is self._final:
            if stored is not None:
                raise ScheduleError(
                    "the denoiser's output cannot be kept", at=value.name, next="end the unit before the last component"
                )
            return Ref("output", "output")
        if isinstance(stored, Kept):
            return Ref("history", places[stored])
        if value.op == "placeholder":
            return Ref("input", value.name)
        scope = self.program.scopes.get(value, Scope.STEP)
        return Ref(str(scope) if scope in EARLY else "buffer", value.name)

    def _buffer_values(self, segments: Iterable[Sequence[Segment]]) -> dict[str, Node]:
        """Every value that may lie in a buffer, by the buffer's name."""
        found: dict[str, Node] = {}
        for parts in segments:
            for part in parts:
                for value in part.outputs:
                    name = value.name if isinstance(value, Node) else _unread(value)
                    found[name] = like(value)
        return found


def _everything(stages: Iterable[Stage]) -> list[Operation]:
    return [Operation("stage", stage.inputs, stage.outputs, stage.name) for stage in stages]


def _port(value: Value, side: str, number: int) -> TensorSpec:
    if isinstance(value, Scalar):
        return TensorSpec(f"weight{number}", dtype_of(value.like), (1,))
    node = like(value)
    name = node.name if isinstance(value, Node) else f"kept_{side}{number}"
    return TensorSpec(name, dtype_of(node), shape_of(node))


def scalar_name(value: float, dtype: str) -> str:
    """The constant that holds a weight of a combination."""
    return f"weight.{value!r}.{dtype}"


def _unread(value: Value) -> str:
    """The buffer of a kept value that an engine gives in a call after which nobody reads it."""
    assert isinstance(value, Kept)
    return f"unread.{value.unit}.{value.index}"


def _assign_histories(calls: Sequence[Sequence[Operation]]) -> tuple[dict[Kept, str], tuple[TensorSpec, ...]]:
    """A place for every kept value that is read; places of one dtype and shape are used again when free."""
    last_read: dict[Kept, int] = {}
    for number, operations in enumerate(calls):
        for operation in operations:
            last_read |= {value: number for value in operation.inputs if isinstance(value, Kept)}
    places: dict[Kept, str] = {}
    specs: list[TensorSpec] = []
    busy: list[int] = []
    for number, operations in enumerate(calls):
        for operation in operations:
            for value in operation.outputs:
                if not isinstance(value, Kept) or value not in last_read:
                    continue
                kind = dtype_of(value.like), shape_of(value.like)
                free = (
                    index for index, spec in enumerate(specs)
                    if busy[index] < number and (spec.dtype, spec.shape) == kind
                )  # fmt: skip
                index = next(free, None)
                if index is None:
                    index = len(specs)
                    specs.append(TensorSpec(f"history.{index}", *kind))
                    busy.append(0)
                busy[index] = last_read[value]
                places[value] = specs[index].name
    return places, tuple(specs)


Lives = Mapping[str, Mapping[int, tuple[int, int]]]


def _lives(programs: Sequence[Sequence[Call]]) -> Lives:
    """For each buffer and step program the call that writes it and the last one that reads it."""
    lives: dict[str, dict[int, tuple[int, int]]] = {}
    for number, calls in enumerate(programs):
        for index, call in enumerate(calls):
            for ref in (*call.outputs, *call.inputs):
                if ref.kind == "buffer":
                    spans = lives.setdefault(ref.name, {})
                    spans[number] = (spans.get(number, (index, index))[0], index)
    return lives


def assign_slots(lives: Lives, nodes: Mapping[str, Node]) -> tuple[BufferSpec, ...]:
    """Buffers in slots so that two in one slot are live at the same engine of no program; best fit at two rows."""
    slots: list[tuple[int, list[str]]] = []  # bytes at two rows, and who lives there
    specs = []
    for name, spans in sorted(lives.items(), key=lambda item: min((number, *span) for number, span in item[1].items())):
        node = nodes[name]
        size = elements(shape_of(node), 2) * int(node.meta["val"].element_size())
        free = [
            index for index, (_, tenants) in enumerate(slots)
            if not any(_overlap(spans, lives[tenant]) for tenant in tenants)
        ]  # fmt: skip
        chosen = min(free, key=lambda index: abs(slots[index][0] - size), default=None)
        if chosen is None:
            slots.append((size, [name]))
            chosen = len(slots) - 1
        else:
            slots[chosen] = (max(size, slots[chosen][0]), [*slots[chosen][1], name])
        specs.append(BufferSpec(name, dtype_of(node), shape_of(node), chosen))
    return tuple(specs)


def _overlap(one: Mapping[int, tuple[int, int]], other: Mapping[int, tuple[int, int]]) -> bool:
    return any(
        number in other and first <= other[number][1] and other[number][0] <= last
        for number, (first, last) in one.items()
    )
