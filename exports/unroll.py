"""A schedule unrolled over the sampler's calls: for each call the operations that are left of the step.

Values of one call are nodes of the Program's graph; a `Kept` value outlives its call. Stages of a unit that is not
computed are replaced by linear combinations of kept values, skipped ones by their stream. What then leads to
neither the output nor a kept value that a later call reads is dropped, in particular a component that is computed
and overwritten before anything reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dcc.errors import ScheduleError
from dcc.ir.graph import outputs_of
from dcc.ir.program import Program, Scope, Stage
from dcc.ir.schedule import REUSE, Schedule, Stores, Unit

EARLY = (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE)


@dataclass(frozen=True)
class Kept:
    """Result `index` of a unit as sampler call `call` computed it; `like` is the node with its dtype and shape."""

    unit: int
    index: int
    call: int
    like: Node


@dataclass(frozen=True)
class Scalar:
    """A weight of a linear combination."""

    value: float
    like: Node


Value = Node | Kept | Scalar


@dataclass(frozen=True)
class Operation:
    """`kind` is one of

    stage    the stage's body, on `inputs` in the order of its ports
    combine  `base + sum_j w_j h_j`: inputs are the base if `based`, the kept values, their weights;
             without weights it is `base + h`
    delta    `inputs[0] - inputs[1]`
    copy     `inputs[0]`
    keep     `inputs[0]` is stored where `outputs[0]` lives; costs nothing
    """

    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    stage: str = ""
    based: bool = False

    def signature(self) -> tuple[object, ...]:
        """Equal for operations that do the same in different calls."""
        return (self.kind, self.stage, self.based, *map(_timeless, self.inputs), "->", *map(_timeless, self.outputs))


@dataclass(frozen=True)
class _Extent:
    """Stages `first` to `last` of the step, and their results that are read later with what they are added to."""

    first: int
    last: int
    results: tuple[tuple[Node, Node | None], ...]


def step_stages(program: Program) -> list[Stage]:
    return [stage for stage in program.stages if stage.kind not in EARLY]


def unroll(program: Program, schedule: Schedule) -> list[list[Operation]]:
    """Operations of each sampler call. Raises ScheduleError where the program cannot do what the schedule says."""
    if schedule.components != program.components:
        got, want = (f"{len(names)}: {', '.join(names)}"[:200] for names in (schedule.components, program.components))
        raise ScheduleError("the schedule is for other components", got=got, want=want, next="compile the same model")
    stages = step_stages(program)
    extents = _extents(program, schedule.units, stages)
    calls = [_Call(program, schedule, stages, extents, call).operations() for call in range(schedule.calls)]
    final = outputs_of(program.graph)[0]
    live = _live(calls, final)
    for number, operations in enumerate(live):
        kept = any(item.kind in ("keep", "delta") and final in item.inputs for item in operations)
        if kept or not any(final in item.outputs for item in operations):
            what = "kept" if kept else "left out"
            raise ScheduleError(
                f"the denoiser's output cannot be {what}", at=f"call {number}, {final.name}",
                next="give the last component a unit that stores its branch, and do not skip it",
            )  # fmt: skip
    return live


def _extents(program: Program, units: Sequence[Unit], stages: Sequence[Stage]) -> list[_Extent]:
    places = [index for index, stage in enumerate(stages) if stage.kind == "component"]
    readers: dict[Node, int] = dict.fromkeys(outputs_of(program.graph), len(stages))
    for index, stage in enumerate(stages):
        for node in stage.inputs:
            readers[node] = max(readers.get(node, 0), index)
    extents = []
    for unit in units:
        first = last = places[unit.first]
        if unit.stores is Stores.OUTPUT:
            final = outputs_of(program.graph)[0]
            extents.append(_Extent(0, len(stages) - 1, ((final, None),)))
            continue
        if unit.stores is Stores.DELTA:
            last = places[unit.last]
            after = places[unit.last + 1] if unit.last + 1 < len(places) else len(stages)
            last = next((index for index in range(last + 1, after) if stages[index].kind == "residual"), last)
        inside = stages[first : last + 1]
        made = [node for stage in inside for node in stage.outputs if readers.get(node, -1) > last]
        streams = {item.add: item.stream for stage in inside for item in stage.residuals}
        within = {node for stage in inside for node in stage.outputs}
        results = []
        for node in made:
            base: Node | None = node
            while base is not None and base in within:
                base = streams.get(base)
            results.append((node, base if unit.stores is Stores.DELTA else None))
        extents.append(_Extent(first, last, tuple(results)))
    return extents


class _Call:
    """Unrolls one sampler call."""

    def __init__(
        self, program: Program, schedule: Schedule, stages: Sequence[Stage], extents: Sequence[_Extent], call: int
    ) -> None:
        self._schedule, self._stages, self._extents, self._call = schedule, stages, extents, call
        self._alias: dict[Node, Value] = {}
        self._operations: list[Operation] = []
        self._unit_at = {extent.first: unit for unit, extent in enumerate(extents)}
        self._unit_ends = {extent.last: unit for unit, extent in enumerate(extents)}
        self._absent: set[Node] = set()

    def operations(self) -> list[Operation]:
        index = 0
        while index < len(self._stages):
            unit = self._unit_at.get(index)
            if unit is not None and not self._schedule.actions[self._call][unit].computes:
                self._replace(unit)
                index = self._extents[unit].last + 1
                continue
            self._run(self._stages[index])
            if index in self._unit_ends:
                self._keep(self._unit_ends[index])
            index += 1
        return self._operations

    def _resolve(self, value: Value, reader: str) -> Value:
        while isinstance(value, Node) and value in self._alias:
            value = self._alias[value]
        if value in self._absent:
            raise ScheduleError(
                "a component cannot be skipped: something other than its residual add reads it",
                at=f"call {self._call}, {reader}", next="reuse it instead",
            )  # fmt: skip
        return value

    def _run(self, stage: Stage) -> None:
        missing = [item for item in stage.residuals if item.branch in self._absent]
        if missing and len(missing) == len(stage.residuals):
            self._alias |= {item.add: item.stream for item in missing}
            return
        inputs = tuple(self._resolve(node, stage.name) for node in stage.inputs)
        self._operations.append(Operation("stage", inputs, stage.outputs, stage.name))

    def _keep(self, unit: int) -> None:
        name = self._schedule.units[unit].name
        for index, (node, base) in enumerate(self._extents[unit].results):
            kept = Kept(unit, index, self._call, node)
            if self._whole(unit):
                self._operations.append(Operation("copy", (node,), (kept,)))
            elif base is None:
                self._operations.append(Operation("keep", (node,), (kept,)))
            else:
                ends = self._resolve(node, name), self._resolve(base, name)
                self._operations.append(Operation("delta", ends, (kept,)))

    def _whole(self, unit: int) -> bool:
        """Whether the unit stores the denoiser's output, which has a place of its own in every call."""
        return self._schedule.units[unit].stores is Stores.OUTPUT

    def _replace(self, unit: int) -> None:
        action, name = self._schedule.actions[self._call][unit], self._schedule.units[unit].name
        history = self._schedule.history(self._call, unit, len(action.weights))
        for index, (node, base) in enumerate(self._extents[unit].results):
            if action.kind == "skip" and self._whole(unit):
                raise ScheduleError("the whole denoiser cannot be skipped", at=f"call {self._call}", next="reuse it")
            if action.kind == "skip":
                if base is None:
                    self._absent.add(node)
                else:
                    self._alias[node] = base
                continue
            kept = tuple(Kept(unit, index, call, node) for call in history)
            whole = self._whole(unit)
            if action == REUSE and base is None and not whole:
                self._alias[node] = kept[0]
                continue
            weights = () if action == REUSE and not whole else tuple(Scalar(weight, node) for weight in action.weights)
            bases = () if base is None else (self._resolve(base, name),)
            self._operations.append(Operation("combine", (*bases, *kept, *weights), (node,), based=base is not None))


def _live(calls: list[list[Operation]], final: Node) -> list[list[Operation]]:
    """Only what leads to the output of its call or to a kept value that is read.

    A delta that some call reads is taken in every call that computes its unit: the engine is the same in all.
    """
    read: set[Kept] = set()
    kept: list[list[Operation]] = []
    for operations in reversed(calls):
        needed: set[Value] = {final}
        chosen = []
        for operation in reversed(operations):
            if any(value in needed or value in read for value in operation.outputs):
                chosen.append(operation)
                needed.update(operation.inputs)
        read.update(value for value in needed if isinstance(value, Kept))
        kept.append(chosen[::-1])
    kept.reverse()
    wanted = {(value.unit, value.index) for value in read}
    result = []
    for operations, chosen in zip(calls, kept, strict=True):
        present = set(chosen)
        made = {value for operation in chosen for value in operation.outputs}
        made |= {value for operation in chosen for value in operation.inputs}
        for operation in operations:
            if operation.kind in ("delta", "copy") and operation.inputs[0] in made:
                value = operation.outputs[0]
                assert isinstance(value, Kept)
                if (value.unit, value.index) in wanted:
                    present.add(operation)
        result.append([operation for operation in operations if operation in present])
    return result


def _timeless(value: Value) -> object:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, Kept):
        return (value.unit, value.index)
    return "weight"
