"""Operations of every sampler call, divided into engines.

*Heavy* operations are components and whatever else has weights. An engine holds a run of heavy operations that are
present in the same calls, together with the light ones that always lie between and behind them; so every weight
belongs to one engine, whatever the schedule. What is left of a call between two such runs is light (residual adds,
combinations, deltas) and forms an engine without weights. Light engines that compute the same share one, because
ports have no identity.

The finest division, in which candidates of a search run, gives each heavy operation an engine of its own that does
not depend on the schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Node

from dcc.exports.unroll import Operation, Value
from dcc.ir.graph import dtype_of, shape_of
from dcc.ir.program import Stage

IsHeavy = Callable[[str], bool]


@dataclass(frozen=True)
class Segment:
    """An engine as one call uses it: operations, the values they read from outside and those that leave."""

    operations: tuple[Operation, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    key: str


def like(value: Value) -> Node:
    """The node with the value's dtype and shape."""
    return value if isinstance(value, Node) else value.like


def divide(
    calls: Sequence[Sequence[Operation]], stages: Mapping[str, Stage], final: Node, finest: bool = False
) -> list[list[Segment]]:
    """The engines of each call, in order. Operations of kind keep are in none: they only say where values live."""
    work = [[operation for operation in call if operation.kind != "keep"] for call in calls]
    heavy = {name for name, stage in stages.items() if stage.kind == "component" or stage.weights}
    runs = _finest_runs(work, stages, heavy.__contains__) if finest else _merged_runs(work, heavy.__contains__)
    leaving = [_leaving(call, parts, final) for call, parts in zip(calls, runs, strict=True)]
    # A heavy engine is the same in every call, so it gives whatever any of them needs.
    wanted: dict[tuple[str, ...], set[int]] = {}
    for parts, found in zip(runs, leaving, strict=True):
        for part, values in zip(parts, found, strict=True):
            places = wanted.setdefault(_body(part), set())
            if heavy.intersection(_body(part)):
                made = _made(part)
                places.update(index for index, value in enumerate(made) if finest or value in values)
    result = []
    for parts, found in zip(runs, leaving, strict=True):
        segments = []
        for part, values in zip(parts, found, strict=True):
            places = wanted[_body(part)]
            outputs = [value for index, value in enumerate(_made(part)) if value in values or index in places]
            segments.append(_segment(part, tuple(outputs), stages))
        result.append(segments)
    return result


def _body(part: Sequence[Operation]) -> tuple[str, ...]:
    return tuple(operation.stage or operation.kind for operation in part)


def _made(part: Sequence[Operation]) -> list[Value]:
    return [value for operation in part for value in operation.outputs]


def _leaving(call: Sequence[Operation], parts: Sequence[Sequence[Operation]], final: Node) -> list[set[Value]]:
    """Of each part the values that the call's output, another part or a later call needs."""
    kept = {value for operation in call if operation.kind == "keep" for value in operation.inputs}
    readers: dict[Value, set[int]] = {}
    for number, part in enumerate(parts):
        for operation in part:
            for value in operation.inputs:
                readers.setdefault(value, set()).add(number)
    found = []
    for number, part in enumerate(parts):
        made = {value for operation in part for value in operation.outputs}
        found.append({
            value for value in made
            if value is final or value in kept or not isinstance(value, Node) or readers.get(value, set()) - {number}
        })  # fmt: skip
    return found


def _merged_runs(work: Sequence[list[Operation]], is_heavy: IsHeavy) -> list[list[list[Operation]]]:
    """Neighbours that are present in the same calls, with everything light that is common to all those calls."""
    columns: dict[str, list[int]] = {}
    following: list[dict[str, str]] = []
    for number, call in enumerate(work):
        heavy = [operation.stage for operation in call if is_heavy(operation.stage)]
        following.append(dict(pairwise(heavy)))
        for stage in heavy:
            columns.setdefault(stage, []).append(number)
    between = [_light_after(call, is_heavy) for call in work]
    joined: dict[str, str] = {}  # a heavy operation, and the one before it in the same engine
    tails: dict[str, int] = {}
    for first, places in columns.items():
        lists = [[item.signature() for item in between[place][first]] for place in places]
        common = 0
        while all(len(row) > common for row in lists) and len({row[common] for row in lists}) == 1:
            common += 1
        kinds = [item.kind for item in between[places[0]][first]]
        tails[first] = min([common, *(index for index, kind in enumerate(kinds) if kind == "combine")])
        second = following[places[0]].get(first)
        if second is None or columns[second] != places or any(len(row) > tails[first] for row in lists):
            continue
        if all(following[place].get(first) == second for place in places):
            joined[second] = first
    lead = _common_lead(work, is_heavy)
    return [_parts(call, is_heavy, joined, tails, lead) for call in work]


def _common_lead(work: Sequence[list[Operation]], is_heavy: IsHeavy) -> bool:
    """Whether every call begins with the same light operations and the same heavy one after them."""
    leads = set()
    for call in work:
        count = next((index for index, item in enumerate(call) if is_heavy(item.stage)), len(call))
        leads.add(tuple(item.signature() for item in call[: count + 1]))
    return len(leads) == 1 and not any(item[0] == "combine" for item in next(iter(leads)))


def _light_after(call: Sequence[Operation], is_heavy: IsHeavy) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for operation in call:
        if is_heavy(operation.stage):
            current = found[operation.stage] = []
        else:
            current.append(operation)
    return found


def _parts(
    call: Sequence[Operation], is_heavy: IsHeavy, joined: Mapping[str, str], tails: Mapping[str, int], lead: bool
) -> list[list[Operation]]:
    parts: list[list[Operation]] = []
    last = ""
    room = 0  # light operations that still belong to the heavy engine
    light = False
    for operation in call:
        if is_heavy(operation.stage):
            first = last == ""
            if (last and joined.get(operation.stage) == last) or (first and lead and parts):
                parts[-1].append(operation)
            else:
                parts.append([operation])
            last, room, light = operation.stage, tails[operation.stage], False
        elif room:
            parts[-1].append(operation)
            room -= 1
        elif light:
            parts[-1].append(operation)
        else:
            parts.append([operation])
            light = True
    return parts


def _finest_runs(
    work: Sequence[list[Operation]], stages: Mapping[str, Stage], is_heavy: IsHeavy
) -> list[list[list[Operation]]]:
    """Each heavy stage with the light stages that follow it in the program."""
    tails: dict[str, set[str]] = {}
    owner = ""
    for name in stages:
        if is_heavy(name):
            owner = name
        elif owner:
            tails.setdefault(owner, set()).add(name)
    runs = []
    for call in work:
        parts: list[list[Operation]] = []
        current = ""  # the heavy stage of the last part, while its tail lasts
        light = False
        for operation in call:
            if is_heavy(operation.stage):
                parts.append([operation])
                current, light = operation.stage, False
            elif (current and operation.stage in tails.get(current, ())) or light:
                parts[-1].append(operation)
            else:
                parts.append([operation])
                current, light = "", True
        runs.append(parts)
    return runs


def _segment(part: Sequence[Operation], outputs: tuple[Value, ...], stages: Mapping[str, Stage]) -> Segment:
    made = set(_made(part))
    inputs = tuple(dict.fromkeys(value for item in part for value in item.inputs if value not in made))
    numbers: dict[Value, int] = {value: index for index, value in enumerate(inputs)}
    lines = [f"{dtype_of(like(value))}{shape_of(like(value))}" for value in inputs]
    for operation in part:
        read = [numbers[value] for value in operation.inputs]
        for value in operation.outputs:
            numbers[value] = len(numbers)
        stage = stages.get(operation.stage)
        body = operation.kind if stage is None else (stage.template, *stage.weights)
        lines.append(f"{body} {operation.based} {read} {_kinds(operation)}")
    lines.append(str([numbers[value] for value in outputs]))
    key = hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()[:20]
    return Segment(tuple(part), inputs, outputs, key)


def _kinds(operation: Operation) -> str:
    return "".join(type(value).__name__[0] for value in operation.inputs) if operation.kind == "combine" else ""
