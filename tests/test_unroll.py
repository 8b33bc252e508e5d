"""A schedule unrolled: what each call still runs, what it takes from earlier calls, and nothing that leads nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_reference import chain, long_skip, schedules, two_streams
from torch.fx import Node

from dcc.errors import ScheduleError
from dcc.exports.unroll import Kept, Operation, Scalar, step_stages, unroll
from dcc.ir.graph import outputs_of
from dcc.ir.program import Scope
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    REUSE,
    SKIP,
    Action,
    Schedule,
    Stores,
    Unit,
    branch_units,
    delta_units,
    forecast,
    from_steps,
    full_schedule,
)

PROGRAMS = {"chain": chain(), "long skip": long_skip(), "two streams": two_streams()}
CHAIN = PROGRAMS["chain"]
NAMES = CHAIN.components
CALLS = CHAIN.calls


def stages_of(call: Sequence[Operation]) -> list[str]:
    return [operation.stage or operation.kind for operation in call]


def test_the_components_are_as_written() -> None:
    assert NAMES == ("body.0", "body.1", "body.2")
    kinds = [stage.kind for stage in step_stages(CHAIN)]
    assert kinds == ["glue", "component", "residual", "component", "residual", "component", "residual", "glue"]
    assert PROGRAMS["long skip"].components == ("body.0", "body.1", "body.2")
    assert PROGRAMS["two streams"].components == ("text", "joint", "last")


@pytest.mark.parametrize("name", PROGRAMS)
def test_everything_computed_is_every_stage_in_order(name: str) -> None:
    program = PROGRAMS[name]
    plain = [stage.name for stage in step_stages(program)]
    for units in (branch_units, delta_units):
        made = units(program.components)
        schedule = Schedule(program.components, made, ((COMPUTE,) * len(made),) * CALLS)
        calls = unroll(program, schedule)
        assert [stages_of(call) for call in calls] == [plain] * CALLS
        for call in calls:
            assert [item.inputs for item in call] == [stage.inputs for stage in step_stages(program)]


def test_a_reused_branch_is_read_where_it_was_kept() -> None:
    schedule = from_steps(NAMES, branch_units(NAMES), [[call % 3 == 0] * 3 for call in range(CALLS)])
    calls = unroll(CHAIN, schedule)
    for number, call in enumerate(calls):
        computed = number % 3 == 0
        ran = [name for name in stages_of(call) if name in NAMES]
        assert ran == (list(NAMES) if computed else [])
        kept = {value for item in call for value in item.outputs if isinstance(value, Kept)}
        read = {value for item in call for value in item.inputs if isinstance(value, Kept)}
        assert {value.call for value in kept} == ({number} if computed else set())
        newest = number // 3 * 3
        assert {(value.unit, value.call) for value in read} == (
            set() if computed else {(0, newest), (1, newest), (2, newest)}
        )
        assert "combine" not in stages_of(call)
        assert stages_of(call).count("keep") == (3 if computed else 0)


def test_a_forecast_branch_is_a_combination_newest_first() -> None:
    rows = [[True] * 3, [True] * 3, [False, True, True], *[[True] * 3] * (CALLS - 3)]
    calls = unroll(CHAIN, from_steps(NAMES, branch_units(NAMES), rows, 1))
    (combine,) = [item for item in calls[2] if item.kind == "combine"]
    *values, first, second = combine.inputs
    assert [(value.unit, value.call) for value in values if isinstance(value, Kept)] == [(0, 1), (0, 0)]
    assert [value.value for value in (first, second) if isinstance(value, Scalar)] == [2.0, -1.0]
    assert not combine.based
    component = next(stage for stage in step_stages(CHAIN) if stage.name == "body.0")
    assert combine.outputs == component.outputs


def test_a_reused_delta_is_added_to_the_stream() -> None:
    schedule = from_steps(NAMES, delta_units(NAMES), [[call == 0] for call in range(CALLS)])
    calls = unroll(CHAIN, schedule)
    embed = step_stages(CHAIN)[0].outputs[0]
    last = step_stages(CHAIN)[-2].outputs[0]
    (delta,) = [item for item in calls[0] if item.kind == "delta"]
    assert delta.inputs == (last, embed)
    for call in calls[1:]:
        assert stages_of(call) == ["embed", "combine", "head"]
        assert call[1].based
        assert call[1].inputs == (embed, *delta.outputs)
        assert call[1].outputs == (last,)


def test_a_delta_is_taken_in_every_call_that_computes_its_unit_or_in_none() -> None:
    units = delta_units(NAMES, (0, 1))
    rows = [(COMPUTE, COMPUTE), (REUSE, COMPUTE), *[(COMPUTE, COMPUTE)] * (CALLS - 2)]
    calls = unroll(CHAIN, Schedule(NAMES, units, tuple(rows)))
    taken = [[item.outputs[0].unit for item in call if item.kind == "delta"] for call in calls]  # type: ignore[union-attr]
    assert taken == [[0], [], *[[0]] * (CALLS - 2)]


def test_a_value_that_no_later_call_reads_is_not_kept() -> None:
    rows = [(COMPUTE,) * 3, (COMPUTE, REUSE, COMPUTE), *[(COMPUTE,) * 3] * (CALLS - 2)]
    calls = unroll(CHAIN, Schedule(NAMES, branch_units(NAMES), tuple(rows)))
    kept = [[item.outputs[0] for item in call if item.kind == "keep"] for call in calls]
    assert [[(value.unit, value.call) for value in call if isinstance(value, Kept)] for call in kept] == [
        [(1, 0)], *[[]] * (CALLS - 1),
    ]  # fmt: skip


def test_a_skipped_component_leaves_the_stream_as_it_was() -> None:
    rows = ((COMPUTE,) * 3, *[(COMPUTE, SKIP, COMPUTE)] * (CALLS - 1))
    for units in (branch_units(NAMES), delta_units(NAMES, (0, 1, 2))):
        calls = unroll(CHAIN, Schedule(NAMES, units, rows))
        assert stages_of(calls[1]) == ["embed", "body.0", "residual", "body.2", "residual.2", "head"]
        body = calls[1][3]
        assert calls[1][2].outputs[0] in body.inputs


def test_a_component_that_only_feeds_a_reused_one_is_dead() -> None:
    """The second stream ends in the joint component. Where that is reused, nothing reads what the text computes."""
    program = PROGRAMS["two streams"]
    rows = ((COMPUTE,) * 3, *[(COMPUTE, REUSE, COMPUTE)] * (CALLS - 1))
    calls = unroll(program, Schedule(program.components, branch_units(program.components), rows))
    assert "text" in stages_of(calls[0])
    for call in calls[1:]:
        assert "text" not in stages_of(call)
        assert "joint" not in stages_of(call)
        assert "last" in stages_of(call)


def test_what_a_later_call_reads_is_computed_although_its_own_call_has_no_use_for_it() -> None:
    """As above, but the text of the second call is read in the third, where the joint component runs."""
    program = PROGRAMS["two streams"]
    rows = [(COMPUTE, COMPUTE, COMPUTE), (COMPUTE, REUSE, COMPUTE), (REUSE, COMPUTE, COMPUTE)]
    rows += [(COMPUTE,) * 3] * (CALLS - 3)
    calls = unroll(program, Schedule(program.components, branch_units(program.components), tuple(rows)))
    assert "text" in stages_of(calls[1])
    residual = next(stage.name for stage in step_stages(program) if stage.kind == "residual")
    assert residual not in stages_of(calls[1])
    assert [item.outputs[0].call for item in calls[1] if item.kind == "keep"] == [1]  # type: ignore[union-attr]


def test_a_run_that_is_kept_whole_makes_everything_before_it_dead() -> None:
    """Inside it the stream is made anew, so there is no delta; where it is reused, the first component is idle."""
    program = PROGRAMS["long skip"]
    names = program.components
    units = (Unit("a", 0, 0, Stores.BRANCH), Unit("b", 1, 2))
    calls = unroll(program, Schedule(names, units, ((COMPUTE, COMPUTE), *[(COMPUTE, REUSE)] * (CALLS - 1))))
    assert [stages_of(call) for call in calls[1:]] == [["head"]] * (CALLS - 1)
    assert not any(item.kind == "delta" for item in calls[0])


@pytest.mark.parametrize("first", [COMPUTE, SKIP])
def test_skip_is_refused_where_nothing_is_left(first: Action) -> None:
    """The run makes its stream anew: without it the head has nothing to read."""
    program = PROGRAMS["long skip"]
    units = (Unit("a", 0, 0, Stores.BRANCH), Unit("b", 1, 2))
    schedule = Schedule(program.components, units, ((COMPUTE, COMPUTE), *[(first, SKIP)] * (CALLS - 1)))
    with pytest.raises(ScheduleError) as refused:
        unroll(program, schedule)
    assert refused.value.what == "a component cannot be skipped: something other than its residual add reads it"
    assert refused.value.details["at"] == "call 1, head"
    assert refused.value.details["next"] == "reuse it instead"


def test_skip_is_refused_where_a_later_unit_stands_on_it() -> None:
    """The last component is skipped or reused on top of a stream that is not there."""
    program = long_skip(joined=1)
    names = program.components
    units = (Unit("a", 0, 1), Unit("b", 2, 2))
    for action in (SKIP, REUSE, COMPUTE):
        with pytest.raises(ScheduleError) as refused:
            unroll(program, Schedule(names, units, ((COMPUTE, COMPUTE), *[(SKIP, action)] * (CALLS - 1))))
        assert refused.value.what == "a component cannot be skipped: something other than its residual add reads it"


def test_other_components_are_refused() -> None:
    with pytest.raises(ScheduleError) as refused:
        unroll(CHAIN, full_schedule(("body.0", "another"), CALLS))
    assert refused.value.what == "the schedule is for other components"
    assert refused.value.details["got"] == "2: body.0, another"
    assert refused.value.details["want"] == "3: body.0, body.1, body.2"


def test_the_output_is_neither_kept_nor_left_out() -> None:
    """Where the stream is the output, the last component can be reused only by its branch."""
    program = chain(2, head=False)
    names = program.components
    final = outputs_of(program.graph)[0]
    branch = from_steps(names, branch_units(names), [[call % 2 == 0] * 2 for call in range(CALLS)])
    assert all(final in call[-1].outputs for call in unroll(program, branch))
    for units, row, what in (
        (delta_units(names), (REUSE,), "kept"),
        (delta_units(names, (0, 1)), (COMPUTE, forecast((1.0,))), "kept"),
        (branch_units(names), (COMPUTE, SKIP), "left out"),
        (delta_units(names, (0, 1)), (SKIP, SKIP), "left out"),
    ):
        schedule = Schedule(names, units, ((COMPUTE,) * len(units), *[row] * (CALLS - 1)))
        with pytest.raises(ScheduleError) as refused:
            unroll(program, schedule)
        assert refused.value.what == f"the denoiser's output cannot be {what}"
        assert str(refused.value.details["at"]).endswith(final.name)


def test_halves_look_back_to_their_own() -> None:
    """A call with both halves passes over values of the conditional half."""
    rows = ((COMPUTE,) * 3, (COMPUTE,) * 3, (REUSE,) * 3, (REUSE,) * 3, (COMPUTE,) * 3, (COMPUTE,) * 3)
    modes = (BOTH, CONDITIONAL, BOTH, CONDITIONAL, BOTH, BOTH)
    calls = unroll(CHAIN, Schedule(NAMES, branch_units(NAMES), rows, modes))
    read = [{value.call for item in call for value in item.inputs if isinstance(value, Kept)} for call in calls]
    assert read == [set(), set(), {0}, {1}, set(), set()]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PROGRAMS)), st.data())
def test_every_operation_has_its_inputs_and_a_reader(name: str, data: st.DataObject) -> None:
    """Marked from the output of each call and from nothing else, by brute force over all calls at once."""
    program = PROGRAMS[name]
    schedule = data.draw(schedules(program.components, CALLS))
    try:
        calls = unroll(program, schedule)
    except ScheduleError:
        assert any(action.kind == "skip" for row in schedule.actions for action in row)
        return
    final = outputs_of(program.graph)[0]
    kept: set[object] = set()
    makers: dict[object, tuple[int, int]] = {}
    for number, call in enumerate(calls):
        known: set[object] = set()
        for index, operation in enumerate(call):
            for value in operation.inputs:
                early = isinstance(value, Node) and (
                    value.op == "placeholder" or program.scopes.get(value, Scope.STEP) is not Scope.STEP
                )
                assert early or isinstance(value, Scalar) or value in known or value in kept
                assert not isinstance(value, Kept) or value.call < number
            for value in operation.outputs:
                makers[number, value] = (number, index)
            known.update(value for value in operation.outputs if isinstance(value, Node))
            kept.update(value for value in operation.outputs if isinstance(value, Kept))
        assert final in known
        assert [item.stage for item in call if item.stage] == [
            stage.name for stage in step_stages(program) if stage.name in stages_of(call)
        ]
    needed: set[tuple[int, int]] = set()
    pending = [makers[number, final] for number in range(CALLS)]
    while pending:
        at = pending.pop()
        if at in needed:
            continue
        needed.add(at)
        for value in calls[at[0]][at[1]].inputs:
            source = (value.call if isinstance(value, Kept) else at[0], value)
            if source in makers:
                pending.append(makers[source])
    for number, call in enumerate(calls):
        for index, operation in enumerate(call):
            assert (number, index) in needed or operation.kind in ("delta", "copy")
