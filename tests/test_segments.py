"""Engines: neighbours that run together are one, weights have one owner, and light engines are shared by content."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_reference import chain, long_skip, schedules, two_streams
from torch.fx import Node

from dcc.errors import ScheduleError
from dcc.exports.segments import Segment, divide
from dcc.exports.unroll import Kept, Operation, Scalar, step_stages, unroll
from dcc.ir.graph import outputs_of
from dcc.ir.program import Program, Scope
from dcc.ir.schedule import (
    COMPUTE,
    REUSE,
    Schedule,
    branch_units,
    delta_units,
    forecast,
    from_steps,
    full_schedule,
)

PROGRAMS = {"chain": chain(4), "long skip": long_skip(), "two streams": two_streams()}
CHAIN = PROGRAMS["chain"]
NAMES = CHAIN.components
CALLS = CHAIN.calls


def divided(program: Program, schedule: Schedule, finest: bool = False) -> list[list[Segment]]:
    stages = {stage.name: stage for stage in step_stages(program)}
    return divide(unroll(program, schedule), stages, outputs_of(program.graph)[0], finest)


def names_of(part: Segment) -> list[str]:
    return [operation.stage or operation.kind for operation in part.operations]


def weights_of(program: Program, part: Segment) -> set[str]:
    stages = {stage.name: stage for stage in step_stages(program)}
    return {weight for item in part.operations if item.stage for weight in stages[item.stage].weights}


def engines(calls: list[list[Segment]]) -> dict[str, Segment]:
    return {part.key: part for call in calls for part in call}


def test_everything_computed_is_one_engine() -> None:
    calls = divided(CHAIN, full_schedule(NAMES, CALLS))
    assert [len(call) for call in calls] == [1] * CALLS
    assert len(engines(calls)) == 1
    assert names_of(calls[0][0]) == [stage.name for stage in step_stages(CHAIN)]


def test_a_stack_that_is_computed_and_reused_together_is_one_engine() -> None:
    """FORA: the stack once, what is around it once, and one light engine in its place."""
    schedule = from_steps(NAMES, branch_units(NAMES), [[call % 3 == 0] * 4 for call in range(CALLS)])
    calls = divided(CHAIN, schedule)
    stack = [stage.name for stage in step_stages(CHAIN)][1:-1]
    computing, reusing = calls[0], calls[1]
    assert [names_of(part) for part in computing] == [["embed"], stack, ["head"]]
    residuals = [name for name in stack if name.startswith("residual")]
    assert [names_of(part) for part in reusing] == [["embed"], residuals, ["head"]]
    assert len(engines(calls)) == 4
    for number, call in enumerate(calls):
        assert [part.key for part in call] == [part.key for part in (computing if number % 3 == 0 else reusing)]


def test_a_span_is_one_engine_with_its_delta() -> None:
    calls = divided(CHAIN, from_steps(NAMES, delta_units(NAMES), [[call % 2 == 0] for call in range(CALLS)], 1))
    stack = [stage.name for stage in step_stages(CHAIN)][1:-1]
    assert [names_of(part) for part in calls[0]] == [["embed"], [*stack, "delta"], ["head"]]
    assert [names_of(part) for part in calls[1]] == [["embed"], ["combine"], ["head"]]
    # The second reuse has two values to combine, and the same engine serves all later ones with other weights.
    assert calls[1][1].key != calls[3][1].key
    assert calls[3][1].key == calls[5][1].key
    values = [[v.value for v in calls[number][1].inputs if isinstance(v, Scalar)] for number in (3, 5)]
    assert values == [[1.5, -0.5]] * 2


def test_equal_columns_merge_and_unequal_ones_do_not() -> None:
    rows = [(COMPUTE,) * 4, *[(COMPUTE, COMPUTE, REUSE, REUSE)] * (CALLS - 1)]
    calls = divided(CHAIN, Schedule(NAMES, branch_units(NAMES), tuple(rows)))
    heavy = [names_of(part) for part in calls[0] if weights_of(CHAIN, part)]
    assert heavy == [
        ["embed", "body.0", "residual", "body.1", "residual.1"],
        ["body.2", "residual.2", "body.3", "residual.3"],
        ["head"],
    ]


def test_light_engines_are_shared_wherever_they_do_the_same() -> None:
    """Each of four components is replaced on its own in some call: one engine adds and gates for all of them."""
    rows = [(COMPUTE,) * 4, *[tuple(REUSE if unit == call else COMPUTE for unit in range(4)) for call in range(4)]]
    rows += [(COMPUTE,) * 4] * (CALLS - len(rows))
    calls = divided(CHAIN, Schedule(NAMES, branch_units(NAMES), tuple(rows)))
    replaced = [part.key for call in calls for part in call if any(isinstance(value, Kept) for value in part.inputs)]
    assert len(replaced) == 4
    assert len(set(replaced)) == 1


def test_weights_of_a_combination_are_inputs() -> None:
    """Calls that differ in nothing but the weights use the same engines."""
    rows = [(COMPUTE,), (COMPUTE,), *[(forecast((1.0 + call / 8, -call / 8)),) for call in range(2, CALLS)]]
    calls = divided(CHAIN, Schedule(NAMES, delta_units(NAMES), tuple(rows)))
    assert len({tuple(part.key for part in call) for call in calls[2:]}) == 1


@pytest.mark.parametrize("finest", [False, True], ids=["merged", "finest"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(PROGRAMS)), data=st.data())
def test_any_schedule_is_divided_soundly(finest: bool, name: str, data: st.DataObject) -> None:
    program = PROGRAMS[name]
    schedule = data.draw(schedules(program.components, CALLS))
    try:
        operations = unroll(program, schedule)
    except ScheduleError:
        return
    calls = divided(program, schedule, finest)
    final = outputs_of(program.graph)[0]
    owners: dict[str, set[str]] = {}
    for listed, parts in zip(operations, calls, strict=True):
        work = [item for item in listed if item.kind != "keep"]
        assert [item for part in parts for item in part.operations] == work
        made: set[object] = set()
        for part in parts:
            for value in part.inputs:
                assert _outside(program, value) or value in made
            assert set(part.outputs) <= {value for item in part.operations for value in item.outputs}
            made |= set(part.outputs)
            for weight in weights_of(program, part):
                owners.setdefault(weight, set()).add(part.key)
        assert final in made
        assert {item.inputs[0] for item in listed if item.kind == "keep"} <= made
        assert {value for item in work for value in item.outputs if isinstance(value, Kept)} <= made
    if not finest and not skips(schedule):
        assert all(len(keys) == 1 for keys in owners.values()), owners
    for parts in calls:
        for part in parts:
            heavy = [item for item in part.operations if _is_heavy(program, item)]
            assert not finest or len(heavy) <= 1
            if not heavy:
                assert not weights_of(program, part)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(name=st.sampled_from(["chain", "long skip"]), data=st.data())
def test_the_finest_heavy_engines_are_those_of_the_exact_plan(name: str, data: st.DataObject) -> None:
    """A search makes no engine with weights, whatever schedules it tries.

    Exceptions: where a skip makes two inputs of an engine one; and a component whose residual add is dead, because
    its stream ends in a component that is replaced, while its result is kept.
    """
    program = PROGRAMS[name]
    schedule = data.draw(schedules(program.components, CALLS))
    if skips(schedule) and name != "chain":
        return
    known = {part.key for part in exact_parts(program)}
    for call in divided(program, schedule, finest=True):
        for part in call:
            assert part.key in known or not weights_of(program, part), names_of(part)


def test_every_finest_engine_has_one_component() -> None:
    for program in PROGRAMS.values():
        parts = [names_of(part) for part in exact_parts(program)]
        heavy = [[name for name in part if name in program.components] for part in parts]
        assert [name for part in heavy for name in part] == list(program.components)
        assert max(map(len, heavy)) == 1


def exact_parts(program: Program) -> list[Segment]:
    stages = {stage.name: stage for stage in step_stages(program)}
    everything = [Operation("stage", stage.inputs, stage.outputs, name) for name, stage in stages.items()]
    return divide([everything], stages, outputs_of(program.graph)[0], finest=True)[0]


def skips(schedule: Schedule) -> bool:
    return any(action.kind == "skip" for row in schedule.actions for action in row)


def _outside(program: Program, value: object) -> bool:
    early = isinstance(value, Node) and (
        value.op == "placeholder" or program.scopes.get(value, Scope.STEP) is not Scope.STEP
    )
    return early or isinstance(value, Kept | Scalar)


def _is_heavy(program: Program, operation: Operation) -> bool:
    stage = next((stage for stage in step_stages(program) if stage.name == operation.stage), None)
    return stage is not None and (stage.kind == "component" or bool(stage.weights))
