"""The schedule: for every sampler call and every unit of components, whether it runs or what stands in for it.

A *unit* is a run of neighbouring components. What is kept of it on a call that computes it depends on `stores`:

    branch   the component's own result, before its gate: a later call applies its own gate to it
             (one component; what FORA, TaylorSeer, ECAD and learned routers keep)
    delta    `x_out - x_in` over the run, after the gates (spans: Delta-DiT, first-block caching, MagCache)
    output   the denoiser's whole output; the unit is all components, and a call that does not compute it runs nothing

On a call that does not compute the unit, a linear combination of its last computed values stands in:
`sum_j weights[j] * history[j]`, newest first. Reuse is `[1]`, an order-1 forecast `[1 + k/d, -k/d]`.

Units partition the components, so a span over several units is the same action in each of them: the deltas of
neighbouring units with equal columns add up to the delta of the whole run, and lowering merges them.

Values computed on a call that ran the conditional half only are valid for that half; a call with both halves
combines values of calls with both halves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any, NoReturn

from dcc.errors import ScheduleError

FORMAT = 1
KIND = "dcc schedule"
HISTORY_LIMIT = 8
WEIGHT_LIMIT = 1e6
TEXT_LIMIT = 512
LIST_LIMIT = 20_000
FIELDS = ("kind", "format", "name", "program", "sampler", "components", "units", "steps")


class Stores(StrEnum):
    """What a unit keeps of a call that computes it; see the module's text."""

    BRANCH = "branch"
    DELTA = "delta"
    OUTPUT = "output"


@dataclass(frozen=True)
class Unit:
    """Components `first` to `last`, both inclusive, as indices into `Schedule.components`."""

    name: str
    first: int
    last: int
    stores: Stores = Stores.DELTA

    @property
    def members(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Action:
    """What a unit does in one call: `compute`, `combine` (reuse and forecast) or `skip` (contributes nothing)."""

    kind: str
    weights: tuple[float, ...] = ()

    @property
    def computes(self) -> bool:
        return self.kind == "compute"

    def __post_init__(self) -> None:
        # Equal schedules hash equal, whether a weight was spelt 2 or 2.0.
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))


COMPUTE = Action("compute")
SKIP = Action("skip")
REUSE = Action("combine", (1.0,))


def forecast(weights: Sequence[float]) -> Action:
    """The combination of the last computed values with these weights, newest first."""
    return Action("combine", tuple(float(value) for value in weights))


@dataclass(frozen=True)
class GuidanceMode:
    """How one call is guided.

    `both` runs both halves. `conditional` runs the conditional half and leaves guidance out. `reuse` runs the
    conditional half and takes the difference of the halves from earlier calls: `sum_j weights[j] * difference[j]`.
    """

    kind: str
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))


BOTH = GuidanceMode("both")
CONDITIONAL = GuidanceMode("conditional")
REUSE_DIFFERENCE = GuidanceMode("reuse", (1.0,))


def extrapolation(history: Sequence[int], call: int, order: int) -> tuple[float, ...]:
    """Weights of the polynomial of at most `order` through the last values, taken at `call`.

    `history` are the calls of those values, newest first. Order 0 is reuse; order 1 equals TaylorSeer's. Of the
    histories only as many as `order + 1` are used. Source: Lagrange's formula.
    """
    points = list(history[: order + 1])
    return tuple(math.prod((call - other) / (point - other) for other in points if other != point) for point in points)


@dataclass(frozen=True)
class Schedule:
    """Actions `[calls][units]` and guidance modes `[calls]`; checked when it is made. Raises ScheduleError.

    What it was made for, "" where it fits any: `program` is `Program.denoiser_hash()`, `sampler` the sampler's name and
    the hash of its table with ":" between.
    """

    components: tuple[str, ...]
    units: tuple[Unit, ...]
    actions: tuple[tuple[Action, ...], ...]
    guidance: tuple[GuidanceMode, ...] = ()
    program: str = ""
    sampler: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.guidance:
            object.__setattr__(self, "guidance", (BOTH,) * len(self.actions))
        _check(self)

    @property
    def calls(self) -> int:
        return len(self.actions)

    def history(self, call: int, unit: int, most: int | None = None) -> tuple[int, ...]:
        """The calls whose values of the unit are valid at `call`, newest first: all of them, or the newest `most`."""
        both = self.guidance[call].kind == "both"
        valid = (
            earlier
            for earlier in range(call - 1, -1, -1)
            if self.actions[earlier][unit].computes and (not both or self.guidance[earlier].kind == "both")
        )
        return tuple(islice(valid, most))

    def difference_history(self, call: int) -> tuple[int, ...]:
        """The earlier calls that ran both halves, newest first."""
        return tuple(earlier for earlier in range(call - 1, -1, -1) if self.guidance[earlier].kind == "both")

    def column(self, unit: int) -> tuple[Action, ...]:
        return tuple(row[unit] for row in self.actions)

    def component_actions(self) -> tuple[tuple[Action, ...], ...]:
        """Actions by `[calls][components]`."""
        owner = [index for index, unit in enumerate(self.units) for _ in unit.members]
        return tuple(tuple(row[unit] for unit in owner) for row in self.actions)

    def computed_share(self, flops: Sequence[float], glue_flops: float = 0.0) -> float:
        """FLOPs of this schedule over those of computing everything in both halves.

        `flops` counts one call of each component and `glue_flops` the rest of the call, which always runs.
        """
        total = (sum(flops) + glue_flops) * self.calls
        spent = 0.0
        for row, mode in zip(self.component_actions(), self.guidance, strict=True):
            call = glue_flops + sum(cost for cost, action in zip(flops, row, strict=True) if action.computes)
            spent += call if mode.kind == "both" else call / 2
        return spent / total

    def merged(self) -> Schedule:
        """The same schedule with neighbouring delta units of equal columns as one unit."""
        units: list[Unit] = []
        kept: list[int] = []
        for index, unit in enumerate(self.units):
            joins = units and units[-1].stores is unit.stores is Stores.DELTA
            if joins and self.column(kept[-1]) == self.column(index):
                previous = units[-1]
                name = _span_name(self.components, previous.first, unit.last)
                units[-1] = Unit(name, previous.first, unit.last)
            else:
                units.append(unit)
                kept.append(index)
        actions = tuple(tuple(row[index] for index in kept) for row in self.actions)
        return replace(self, units=tuple(units), actions=actions)

    def digest(self) -> str:
        """Content hash: schedules that do the same hash equal, whatever they are called."""
        value = replace(self.merged(), name="").to_json()
        for unit in value["units"]:
            unit["name"] = ""
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "name": self.name,
            "program": self.program,
            "sampler": self.sampler,
            "components": list(self.components),
            "units": [
                {"name": unit.name, "first": unit.first, "last": unit.last, "stores": str(unit.stores)}
                for unit in self.units
            ],
            "steps": [
                {"guidance": _mode_to_json(mode), "actions": [_action_to_json(action) for action in row]}
                for mode, row in zip(self.guidance, self.actions, strict=True)
            ],
        }

    @staticmethod
    def from_json(value: object) -> Schedule:
        """The schedule that `to_json` gave. Raises ScheduleError, and nothing else, whatever `value` is."""
        fields = _object(value, FIELDS, "schedule")
        kind, version = fields["kind"], fields["format"]
        if kind != KIND or type(version) is not int or version != FORMAT:
            got = "something else" if not isinstance(kind, str) else f"{kind[:40]!r}, or another format"
            raise ScheduleError("this is not a schedule that can be read", got=got, want=f"{KIND!r}, format {FORMAT}")
        units = []
        for index, item in enumerate(_list(fields["units"], "units")):
            entry = _object(item, ("name", "first", "last", "stores"), f"units[{index}]")
            if not isinstance(entry["stores"], str) or entry["stores"] not in tuple(Stores):
                _refuse(f"units[{index}].stores", _brief(entry["stores"]), ", ".join(Stores))
            first, last = (_integer(entry[key], f"units[{index}].{key}") for key in ("first", "last"))
            units.append(Unit(_text(entry["name"], f"units[{index}].name"), first, last, Stores(entry["stores"])))
        steps = [
            _object(item, ("guidance", "actions"), f"steps[{index}]")
            for index, item in enumerate(_list(fields["steps"], "steps"))
        ]
        return Schedule(
            components=tuple(
                _text(name, f"components[{index}]")
                for index, name in enumerate(_list(fields["components"], "components"))
            ),
            units=tuple(units),
            actions=tuple(
                tuple(
                    _action(action, f"steps[{call}].actions[{index}]")
                    for index, action in enumerate(_list(step["actions"], f"steps[{call}].actions"))
                )
                for call, step in enumerate(steps)
            ),
            guidance=tuple(_mode(step["guidance"], f"steps[{call}].guidance") for call, step in enumerate(steps)),
            program=_text(fields["program"], "program"),
            sampler=_text(fields["sampler"], "sampler"),
            name=_text(fields["name"], "name"),
        )


def branch_units(components: Sequence[str]) -> tuple[Unit, ...]:
    """Each component a unit of its own that stores its branch."""
    return tuple(Unit(name, index, index, Stores.BRANCH) for index, name in enumerate(components))


def delta_units(components: Sequence[str], starts: Sequence[int] = (0,)) -> tuple[Unit, ...]:
    """Runs of components that begin at `starts` (the first is 0), each storing its delta."""
    ends = [*[start - 1 for start in starts[1:]], len(components) - 1]
    return tuple(
        Unit(_span_name(components, first, last), first, last) for first, last in zip(starts, ends, strict=True)
    )


def _span_name(components: Sequence[str], first: int, last: int) -> str:
    name = components[first] if first == last else f"{components[first]}..{components[last]}"
    return name[:TEXT_LIMIT]


def output_unit(components: Sequence[str]) -> tuple[Unit, ...]:
    """All components as one unit that stores the denoiser's output."""
    return (Unit(_span_name(components, 0, len(components) - 1), 0, len(components) - 1, Stores.OUTPUT),)


def full_schedule(components: Sequence[str], calls: int) -> Schedule:
    """Everything is computed in every call."""
    units = branch_units(components)
    return Schedule(tuple(components), units, ((COMPUTE,) * len(units),) * calls, name="exact")


def from_steps(
    components: Sequence[str],
    units: Sequence[Unit],
    computes: Sequence[Sequence[bool]],
    order: int = 0,
    guidance: Sequence[GuidanceMode] = (),
    name: str = "",
) -> Schedule:
    """The schedule that computes where `computes[call][unit]` says so and extrapolates with `order` elsewhere.

    A unit without a valid value to extrapolate from is computed, so the first call always is.
    """
    modes = tuple(guidance) or (BOTH,) * len(computes)
    rows: list[tuple[Action, ...]] = []
    seen: list[list[int]] = [[] for _ in units]
    for call, row in enumerate(computes):
        if len(row) != len(units) or len(modes) != len(computes):
            got, want = f"{len(row)} units, {len(modes)} modes", f"{len(units)} units, {len(computes)} modes"
            _refuse(f"call {call}", got, want)
        actions = []
        for index, wanted in enumerate(row):
            both = modes[call].kind == "both"
            valid = (earlier for earlier in reversed(seen[index]) if not both or modes[earlier].kind == "both")
            known = tuple(islice(valid, order + 1))
            if wanted or not known:
                seen[index].append(call)
                actions.append(COMPUTE)
            else:
                actions.append(forecast(extrapolation(known, call, order)))
        rows.append(tuple(actions))
    return Schedule(tuple(components), tuple(units), tuple(rows), modes, name=name)


def _check(schedule: Schedule) -> None:
    if not schedule.actions or not schedule.components:
        raise ScheduleError("a schedule needs at least one call and one component")
    _check_units(schedule)
    if len(schedule.guidance) != schedule.calls:
        _refuse("guidance", f"{len(schedule.guidance)} modes", f"{schedule.calls}, one per call")
    known = [[0, 0] for _ in schedule.units]  # values so far: of any call, of calls with both halves
    differences = 0
    for call, (mode, row) in enumerate(zip(schedule.guidance, schedule.actions, strict=True)):
        if len(row) != len(schedule.units):
            _refuse(f"call {call}", f"{len(row)} actions", f"{len(schedule.units)}, one per unit")
        _check_mode(call, mode, differences)
        both = mode.kind == "both"
        for index, action in enumerate(row):
            _check_action(schedule, call, index, action, known[index][both])
            if action.computes:
                known[index][0] += 1
                known[index][1] += both
        differences += both


def _check_units(schedule: Schedule) -> None:
    for text in (schedule.name, *schedule.components, *(unit.name for unit in schedule.units)):
        _text(text, "names")
    if len(set(schedule.components)) != len(schedule.components):
        _refuse("components", "a name twice", "each name once")
    expected = 0
    for index, unit in enumerate(schedule.units):
        at = f"unit {index} '{unit.name:.60}'"
        if unit.first != expected or not unit.first <= unit.last < len(schedule.components):
            _refuse(at, f"components {unit.first} to {unit.last}", f"a run that begins at {expected}")
        if unit.stores is Stores.BRANCH and unit.first != unit.last:
            _refuse(at, "a branch of several components", "one component, or a delta")
        if unit.stores is Stores.OUTPUT and len(schedule.units) > 1:
            _refuse(at, "the output beside other units", "one unit of all components")
        expected = unit.last + 1
    if expected != len(schedule.components):
        _refuse("units", f"components up to {expected}", f"all {len(schedule.components)}")


def _check_mode(call: int, mode: GuidanceMode, available: int) -> None:
    at = f"guidance of call {call}"
    if mode.kind not in ("both", "conditional", "reuse"):
        _refuse(at, mode.kind, "both, conditional or reuse")
    if (mode.kind == "reuse") != bool(mode.weights):
        _refuse(at, f"{mode.kind} with {len(mode.weights)} weights", "weights for reuse, and for nothing else")
    _check_weights(mode.weights, available, at)


def _check_action(schedule: Schedule, call: int, index: int, action: Action, available: int) -> None:
    at = f"call {call}, unit '{schedule.units[index].name:.60}'"
    if action.kind not in ("compute", "combine", "skip"):
        _refuse(at, action.kind, "compute, combine or skip")
    if (action.kind == "combine") != bool(action.weights):
        _refuse(at, f"{action.kind} with {len(action.weights)} weights", "weights for combine, and for nothing else")
    if call == 0 and action.kind == "skip" and any(row[index].kind != "skip" for row in schedule.actions):
        _refuse(at, "skip", "the first call computes every unit that any call uses")
    if action.weights:
        _check_weights(action.weights, available, at)


def _check_weights(weights: Sequence[float], available: int, at: str) -> None:
    if len(weights) > HISTORY_LIMIT or len(weights) > available:
        _refuse(at, f"{len(weights)} weights", f"at most {min(available, HISTORY_LIMIT)}: the values computed before")
    if not all(abs(weight) <= WEIGHT_LIMIT for weight in weights):
        _refuse(at, f"weights {list(weights)}", f"numbers up to {WEIGHT_LIMIT:g}")


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise ScheduleError("the schedule is not valid", at=at, got=str(got)[:200], want=want)


def _action_to_json(action: Action) -> Any:
    if action == REUSE:
        return "reuse"
    return {"forecast": list(action.weights)} if action.kind == "combine" else action.kind


def _mode_to_json(mode: GuidanceMode) -> Any:
    return {"reuse": list(mode.weights)} if mode.kind == "reuse" else mode.kind


def _action(value: object, at: str) -> Action:
    if isinstance(value, str):
        known = {"compute": COMPUTE, "skip": SKIP, "reuse": REUSE}
        if value not in known:
            _refuse(at, _brief(value), "compute, reuse, skip or {forecast: [...]}")
        return known[value]
    return Action("combine", _numbers(_object(value, ("forecast",), at)["forecast"], at))


def _mode(value: object, at: str) -> GuidanceMode:
    if isinstance(value, str):
        if value not in ("both", "conditional"):
            _refuse(at, _brief(value), "both, conditional or {reuse: [...]}")
        return GuidanceMode(value)
    return GuidanceMode("reuse", _numbers(_object(value, ("reuse",), at)["reuse"], at))


def _object(value: object, keys: Sequence[str], at: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        got = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        _refuse(at, got, f"an object of {', '.join(keys)}")
    return value


def _list(value: object, at: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > LIST_LIMIT:
        _refuse(at, type(value).__name__, "a list")
    return value


def _integer(value: object, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(at, _brief(value), "an integer")
    if abs(value) > LIST_LIMIT:
        _refuse(at, "an integer out of range", f"at most {LIST_LIMIT}")
    return value


def _brief(value: object) -> str:
    """What is shown of a wrong value, which may be megabytes long."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or not value.isprintable():
        _refuse(at, type(value).__name__, f"a printable text of at most {TEXT_LIMIT} characters")
    return value


def _numbers(value: object, at: str) -> tuple[float, ...]:
    items = _list(value, at)
    numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
    # The comparison is false for NaN, and exact for integers that no float can hold.
    if not items or len(numbers) != len(items) or not all(abs(item) <= WEIGHT_LIMIT for item in numbers):
        _refuse(at, "something else", f"one number or more, up to {WEIGHT_LIMIT:g}")
    return tuple(float(item) for item in items)
