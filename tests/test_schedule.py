"""The schedule: it survives JSON, merging keeps what it does, and whatever breaks a rule is one ScheduleError."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.errors import ScheduleError
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    HISTORY_LIMIT,
    REUSE,
    REUSE_DIFFERENCE,
    SKIP,
    WEIGHT_LIMIT,
    Action,
    GuidanceMode,
    Schedule,
    Stores,
    Unit,
    branch_units,
    delta_units,
    extrapolation,
    forecast,
    from_steps,
    full_schedule,
)

NAMES = ("block.0.attn", "block.0.mlp", "block.1.attn", "block.1.mlp", "block.2.attn")
WEIGHTS = st.floats(-WEIGHT_LIMIT, WEIGHT_LIMIT)


def weights(available: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(WEIGHTS, min_size=1, max_size=min(available, HISTORY_LIMIT)).map(tuple)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any valid schedule of up to five components and six calls."""
    components = NAMES[: draw(st.integers(1, len(NAMES)))]
    starts = [0, *(index for index in range(1, len(components)) if draw(st.booleans()))]
    units = [
        replace(unit, stores=draw(st.sampled_from([Stores.BRANCH, Stores.DELTA]))) if unit.first == unit.last else unit
        for unit in delta_units(components, starts)
    ]
    calls = draw(st.integers(1, 6))
    modes: list[GuidanceMode] = []
    for _ in range(calls):
        both = sum(mode.kind == "both" for mode in modes)
        kinds = [st.just(BOTH), st.just(CONDITIONAL)]
        kinds += [weights(both).map(lambda values: GuidanceMode("reuse", values))] if both else []
        modes.append(draw(st.one_of(kinds)))
    columns = []
    for _ in units:
        column: list[Action] = []
        never = draw(st.booleans()) and draw(st.booleans())
        for call in range(calls):
            valid = valid_values(column, modes, call)
            kinds = [st.just(SKIP)] if never or call else []
            kinds += [] if never else [st.just(COMPUTE)]
            kinds += [st.just(REUSE), weights(valid).map(forecast)] if valid and not never else []
            column.append(draw(st.one_of(kinds)))
        columns.append(column)
    rows = tuple(zip(*columns, strict=True))
    name, program = draw(st.text(max_size=8).filter(str.isprintable)), draw(st.sampled_from(["", "ab12"]))
    return Schedule(components, tuple(units), rows, tuple(modes), program=program, name=name)


def valid_values(column: list[Action], modes: list[GuidanceMode], call: int) -> int:
    return sum(
        action.computes and (mode.kind == "both" or modes[call].kind != "both")
        for action, mode in zip(column, modes[:call], strict=True)
    )


def two_calls(*rows: tuple[Action, ...], modes: tuple[GuidanceMode, ...] = ()) -> Schedule:
    components = NAMES[: len(rows[0])]
    return Schedule(components, branch_units(components), rows, modes)


@given(schedules())
@settings(max_examples=40)
def test_survives_json(schedule: Schedule) -> None:
    text = json.dumps(schedule.to_json(), allow_nan=False)
    again = Schedule.from_json(json.loads(text))
    assert again == schedule
    assert again.digest() == schedule.digest()
    assert json.dumps(again.to_json()) == text


@given(schedules())
@settings(max_examples=40)
def test_merging_keeps_actions_and_digest(schedule: Schedule) -> None:
    merged = schedule.merged()
    assert merged.component_actions() == schedule.component_actions()
    assert merged.digest() == schedule.digest()
    assert merged.merged() == merged
    assert merged.guidance == schedule.guidance
    for index, (left, right) in enumerate(pairwise(merged.units)):
        deltas = left.stores is right.stores is Stores.DELTA
        assert not (deltas and merged.column(index) == merged.column(index + 1))


@given(schedules())
@settings(max_examples=40)
def test_history_is_what_each_half_can_use(schedule: Schedule) -> None:
    for unit in range(len(schedule.units)):
        for call in range(schedule.calls):
            history = schedule.history(call, unit)
            assert list(history) == sorted(history, reverse=True)
            assert len(history) == valid_values(list(schedule.column(unit)[:call]), list(schedule.guidance), call)
            assert all(earlier < call and schedule.actions[earlier][unit].computes for earlier in history)
            assert len(schedule.actions[call][unit].weights) <= len(history)


@given(schedules(), st.data())
@settings(max_examples=40)
def test_digest_tells_what_is_done_and_nothing_else(schedule: Schedule, data: st.DataObject) -> None:
    renamed = replace(
        schedule, name="other", units=tuple(replace(unit, name=f"u{unit.first}") for unit in schedule.units)
    )
    assert renamed.digest() == schedule.digest()
    assert replace(schedule, program="other").digest() != schedule.digest()
    assert replace(schedule, sampler="other").digest() != schedule.digest()
    call = data.draw(st.integers(0, schedule.calls - 1))
    unit = data.draw(st.integers(0, len(schedule.units) - 1))
    rows = [list(row) for row in schedule.actions]
    if rows[call][unit] not in (COMPUTE, SKIP):
        rows[call][unit] = forecast([rows[call][unit].weights[0] / 2 + 1, *rows[call][unit].weights[1:]])
        changed = replace(schedule, actions=tuple(map(tuple, rows)))
        assert (changed.digest() == schedule.digest()) == (changed.actions == schedule.actions)


@given(schedules(), st.data())
@settings(max_examples=40)
def test_splitting_a_span_changes_nothing(schedule: Schedule, data: st.DataObject) -> None:
    """A delta over a run and equal deltas of its parts are one schedule."""
    long = [index for index, unit in enumerate(schedule.units) if len(unit.members) > 1]
    if not long:
        return
    at = data.draw(st.sampled_from(long))
    unit = schedule.units[at]
    parts = [Unit(str(member), member, member) for member in unit.members]
    split = replace(
        schedule,
        units=(*schedule.units[:at], *parts, *schedule.units[at + 1 :]),
        actions=tuple((*row[:at], *[row[at]] * len(parts), *row[at + 1 :]) for row in schedule.actions),
    )
    assert split.digest() == schedule.digest()
    assert split.component_actions() == schedule.component_actions()


@given(schedules(), st.lists(st.floats(0.1, 10), min_size=5, max_size=5), st.floats(0, 10))
@settings(max_examples=40)
def test_computed_share_counts_each_call(schedule: Schedule, costs: list[float], glue: float) -> None:
    flops = costs[: len(schedule.components)]
    spent = 0.0
    for row, mode in zip(schedule.component_actions(), schedule.guidance, strict=True):
        halves = 2 if mode.kind == "both" else 1
        spent += halves * (glue + sum(cost for cost, action in zip(flops, row, strict=True) if action.computes))
    assert schedule.computed_share(flops, glue) == pytest.approx(spent / (2 * schedule.calls * (sum(flops) + glue)))


def test_exact_computes_all() -> None:
    schedule = full_schedule(NAMES, 3)
    assert all(action is COMPUTE for row in schedule.actions for action in row)
    assert schedule.computed_share([1.0] * 5, 2.0) == 1.0
    assert [unit.stores for unit in schedule.units] == [Stores.BRANCH] * 5
    assert schedule.merged() == schedule


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True).map(lambda calls: sorted(calls, reverse=True)),
    st.integers(1, 20),
    st.integers(0, 4),
    st.integers(0, 2**32 - 1),
)
def test_extrapolation_is_the_polynomial(history: list[int], ahead: int, order: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(len(history))
    call = history[0] + ahead
    got = extrapolation(history, call, order)
    used = len(got)
    assert used == min(order + 1, len(history))
    # Around the call, or polyfit loses digits.
    fit = np.polyfit(np.array(history[:used], float) - call, values[:used], used - 1)
    want = np.polyval(fit, 0.0)
    size = np.abs(got) @ np.abs(values[:used])
    assert abs(np.dot(got, values[:used]) - want) <= 1e-9 * max(size, 1.0)
    assert sum(got) == pytest.approx(1.0, abs=1e-9 * max(np.abs(got).sum(), 1.0))


def test_extrapolation_of_order_one_is_taylorseer_s() -> None:
    """F0 + k (F0 - F1) / d, arXiv 2503.06923: k calls after the newest value, d calls between the two."""
    for gap in (1, 2, 5):
        for ahead in (1, 2, 3):
            got = extrapolation([gap, 0], gap + ahead, 1)
            assert got == pytest.approx((1 + ahead / gap, -ahead / gap))
    assert extrapolation([7, 3], 9, 0) == (1.0,)
    assert extrapolation([7], 9, 2) == (1.0,)
    assert extrapolation([], 9, 2) == ()


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from([BOTH, CONDITIONAL]), st.integers(0, 15)), min_size=1, max_size=8),
    st.integers(0, 2),
)
@settings(max_examples=40)
def test_from_steps_extrapolates_where_it_may(units: int, rows: list[tuple[GuidanceMode, int]], order: int) -> None:
    components = NAMES[:units]
    wanted = [[bool(bits >> unit & 1) for unit in range(units)] for _, bits in rows]
    modes = [mode for mode, _ in rows]
    schedule = from_steps(components, branch_units(components), wanted, order, modes)
    for call, row in enumerate(schedule.actions):
        for unit, action in enumerate(row):
            history = schedule.history(call, unit)
            assert action.computes == (wanted[call][unit] or not history)
            if not action.computes:
                assert action.weights == extrapolation(history, call, order)
    assert all(action.computes for action in schedule.actions[0])


def test_a_conditional_call_gives_nothing_to_a_guided_one() -> None:
    """Its values are of one half; a call with both halves goes back to the last call with both."""
    rows = ((COMPUTE,), (COMPUTE,), (REUSE,), (REUSE,))
    schedule = two_calls(*rows, modes=(BOTH, CONDITIONAL, BOTH, CONDITIONAL))
    assert [schedule.history(call, 0) for call in range(4)] == [(), (0,), (0,), (1, 0)]
    assert schedule.difference_history(3) == (2, 0)
    with pytest.raises(ScheduleError):
        two_calls((COMPUTE,), (REUSE,), modes=(CONDITIONAL, BOTH))
    computed = from_steps(NAMES[:1], branch_units(NAMES[:1]), [[True], [False]], guidance=(CONDITIONAL, BOTH))
    assert computed.actions[1][0] is COMPUTE


def test_delta_units_are_runs() -> None:
    units = delta_units(NAMES, (0, 2, 3))
    assert [(unit.first, unit.last) for unit in units] == [(0, 1), (2, 2), (3, 4)]
    assert [unit.name for unit in units] == [f"{NAMES[0]}..{NAMES[1]}", NAMES[2], f"{NAMES[3]}..{NAMES[4]}"]
    assert [list(unit.members) for unit in units] == [[0, 1], [2], [3, 4]]
    assert all(unit.stores is Stores.DELTA for unit in units)


def units_of(*runs: tuple[int, int], stores: Stores = Stores.DELTA) -> tuple[Unit, ...]:
    return tuple(Unit(f"u{first}", first, last, stores) for first, last in runs)


def full(units: tuple[Unit, ...], calls: int = 2, **others: Any) -> Schedule:
    return Schedule(others.pop("components", NAMES), units, ((COMPUTE,) * len(units),) * calls, **others)


REFUSED: dict[str, Callable[[], Schedule]] = {
    "no calls": lambda: full(units_of((0, 4)), calls=0),
    "no components": lambda: Schedule((), (), ((),)),
    "a component twice": lambda: full(units_of((0, 1)), components=("a", "a")),
    "a gap": lambda: full(units_of((0, 1), (3, 4))),
    "an overlap": lambda: full(units_of((0, 2), (2, 4))),
    "out of order": lambda: full(units_of((2, 4), (0, 1))),
    "backwards": lambda: full(units_of((0, -1), (0, 4))),
    "beyond the end": lambda: full(units_of((0, 5))),
    "short of the end": lambda: full(units_of((0, 3))),
    "no units": lambda: full(()),
    "a branch of several": lambda: full(units_of((0, 4), stores=Stores.BRANCH)),
    "guidance of another length": lambda: full(units_of((0, 4)), guidance=(BOTH,)),
    "a short row": lambda: Schedule(NAMES[:2], branch_units(NAMES[:2]), ((COMPUTE,),)),
    "a long row": lambda: Schedule(NAMES[:1], branch_units(NAMES[:1]), ((COMPUTE, COMPUTE),)),
    "an unknown action": lambda: two_calls((Action("guess"),)),
    "an unknown guidance": lambda: two_calls((COMPUTE,), modes=(GuidanceMode("none"),)),
    "compute with weights": lambda: two_calls((Action("compute", (1.0,)),)),
    "combine without": lambda: two_calls((COMPUTE,), (Action("combine"),)),
    "guidance with weights": lambda: two_calls((COMPUTE,), (COMPUTE,), modes=(BOTH, GuidanceMode("both", (1.0,)))),
    "reuse before a value": lambda: two_calls((REUSE,), (COMPUTE,)),
    "more weights than values": lambda: two_calls((COMPUTE,), (forecast((2, -1)),)),
    "more weights than kept": lambda: two_calls(*[(COMPUTE,)] * 10, (forecast((0.1,) * 9),)),
    "a skipped value": lambda: two_calls((COMPUTE,), (SKIP,), (forecast((2, -1)),)),
    "skip at first": lambda: two_calls((SKIP,), (COMPUTE,)),
    "not a number": lambda: two_calls((COMPUTE,), (forecast((float("nan"),)),)),
    "infinite": lambda: two_calls((COMPUTE,), (forecast((float("inf"),)),)),
    "a large weight": lambda: two_calls((COMPUTE,), (forecast((1.01 * WEIGHT_LIMIT,)),)),
    "a difference before there is one": lambda: two_calls((COMPUTE,), modes=(REUSE_DIFFERENCE,)),
    "a difference of one half": lambda: two_calls((COMPUTE,), (COMPUTE,), modes=(CONDITIONAL, REUSE_DIFFERENCE)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    with pytest.raises(ScheduleError):
        REFUSED[what]()


def test_a_unit_may_be_skipped_throughout() -> None:
    schedule = two_calls((COMPUTE, SKIP), (REUSE, SKIP))
    assert schedule.column(1) == (SKIP, SKIP)
    assert schedule.computed_share([1.0, 3.0]) == pytest.approx(1 / 8)


EXAMPLE = Schedule(
    NAMES[:3],
    (Unit("a", 0, 0, Stores.BRANCH), Unit("b", 1, 2)),
    ((COMPUTE, COMPUTE), (COMPUTE, SKIP), (forecast((1.5, -0.5)), REUSE), (REUSE, COMPUTE)),
    (BOTH, BOTH, REUSE_DIFFERENCE, CONDITIONAL),
    program="p",
    sampler="s",
    name="example",
).to_json()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in places(item, (*at, key)))]


def put(path: tuple[Any, ...], value: Any) -> Any:
    """The example with the value at the path changed."""
    if not path:
        return value
    root = copy.deepcopy(EXAMPLE)
    place: Any = root
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return root


PLACES = places(EXAMPLE)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(
        ["compute", "reuse", "skip", "both", "branch", -1, 0, 1, 2, 10**300]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["forecast", "reuse", "name", "first", "actions", "x"]), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def read_or_refused(value: Any) -> bool:
    try:
        schedule = Schedule.from_json(value)
    except ScheduleError as error:
        assert len(str(error)) < 2000
        return False
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    return True


@given(ANYTHING)
def test_any_json_is_refused(value: Any) -> None:
    assert not read_or_refused(value)


@given(st.sampled_from(PLACES), ANYTHING)
@settings(max_examples=250)
def test_anything_in_any_place_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    read_or_refused(put(path, value))


@pytest.mark.parametrize("wrong", [None, {}, [], "maybe", 1e9, float("nan"), {"x": 1}, [[]]], ids=repr)
def test_no_place_takes_a_value_of_the_wrong_kind(wrong: Any) -> None:
    free = {("program",), ("sampler",), ("name",), ("units", 0, "name"), ("units", 1, "name")}
    for path in PLACES:
        names = path in free or (path[:1] == ("components",) and len(path) == 2)
        if not (names and isinstance(wrong, str)):
            assert not read_or_refused(put(path, wrong)), path


def test_every_key_is_needed_and_no_other_is_taken() -> None:
    for path in PLACES:
        root = copy.deepcopy(EXAMPLE)
        place: Any = root
        for key in path:
            place = place[key]
        if isinstance(place, dict):
            place["more"] = 1
            assert not read_or_refused(root), path
            del place["more"]
            del place[next(iter(place))]
            assert not read_or_refused(root), path


def test_errors_say_where() -> None:
    with pytest.raises(ScheduleError) as refused:
        Schedule.from_json(put(("steps", 2, "actions", 1), "maybe"))
    assert refused.value.details["at"] == "steps[2].actions[1]"
    with pytest.raises(ScheduleError) as refused:
        Schedule.from_json(put(("steps", 2, "actions", 0), {"forecast": [1.0, 2.0, 3.0]}))
    assert refused.value.details["at"] == "call 2, unit 'a'"
    with pytest.raises(ScheduleError, match="can be read"):
        Schedule.from_json(put(("format",), 2))
