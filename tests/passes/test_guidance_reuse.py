"""guidance-reuse: the difference of the halves is computed now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from subjects import applied, check_settles, sketch, subject, table

from dcc.errors import UsageError
from dcc.ir.measurements import Declined, with_guidance
from dcc.ir.schedule import BOTH, CONDITIONAL, branch_units, forecast, from_steps
from dcc.passes.fora import Fora
from dcc.passes.guidance_interval import GuidanceInterval
from dcc.passes.guidance_reuse import GuidanceReuse
from dcc.passes.taylorseer import TaylorSeer


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(GuidanceReuse(interval=3, order=1).propose(subject()).merged()))


def test_fires_on_a_cached_schedule(golden: Callable[[str], None]) -> None:
    program = sketch()
    applied(TaylorSeer(interval=3), program)
    report = applied(GuidanceReuse(interval=2, start=0.0), program)
    assert program.schedule is not None
    golden(f"{report.why}\n{table(program.schedule)}")


def test_equal_intervals_cost_nothing_extra() -> None:
    program = sketch()
    applied(Fora(3), program)
    applied(GuidanceReuse(interval=3, start=0.0), program)
    assert program.schedule is not None
    assert [row[0].computes for row in program.schedule.actions] == [call % 3 == 0 for call in range(10)]


@pytest.mark.parametrize("first", [None, Fora(3), TaylorSeer(4, 2), GuidanceInterval(0.2, 0.8, "fraction")])
def test_settles(first: object) -> None:
    program = sketch()
    if first is not None:
        applied(first, program)  # type: ignore[arg-type]
    report = applied(GuidanceReuse(interval=3, start=0.2), program)
    schedule = program.schedule
    assert applied(GuidanceReuse(interval=3, start=0.2), program) == report
    assert program.schedule == schedule
    assert check_settles(GuidanceReuse()).status == "applied"


def test_keeps_the_contract() -> None:
    schedule = GuidanceReuse(interval=4, order=1, start=0.2).propose(subject())
    assert [mode.kind == "both" for mode in schedule.guidance] == [call in (0, 1, 5, 9) for call in range(10)]
    assert schedule.guidance[3].weights == pytest.approx((3.0, -2.0))
    assert schedule.guidance[7].weights == pytest.approx((1.5, -0.5))


def test_calls_without_guidance_stay_so() -> None:
    one = subject()
    alone = GuidanceInterval(0.3, 1.0, "fraction").propose(one)
    schedule = GuidanceReuse(interval=3, start=0.0).propose(replace(one, schedule=alone))
    kinds = "".join(mode.kind[0] for mode in schedule.guidance)
    assert kinds == "cccbrrbrrb"


def test_pays_half_of_each_call_in_between() -> None:
    one = subject()
    share = GuidanceReuse(interval=2, start=0.0).propose(one).computed_share(one.flops, one.glue_flops)
    assert share == pytest.approx(0.75)
    assert all(option.propose(one).computed_share(one.flops) < 1 for option in GuidanceReuse().options(one))


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="samples without guidance"):
        GuidanceReuse().propose(subject(guided=False))
    with pytest.raises(Declined, match="no call lies between two of an interval of 5"):
        GuidanceReuse(start=1.0).propose(subject())


@pytest.mark.parametrize("options", [{"interval": 1}, {"order": 3}, {"start": 2.0}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        GuidanceReuse(**options)


def test_new_modes_recompute_only_what_they_must() -> None:
    computes = [[True], [True], [False], [True], [False], [False]]
    schedule = from_steps(("a",), branch_units(("a",)), computes, order=1)
    modes = [BOTH, CONDITIONAL, CONDITIONAL, BOTH, CONDITIONAL, BOTH]
    changed = with_guidance(schedule, modes)
    kinds = [row[0].kind for row in changed.actions]
    assert kinds == [row[0].kind for row in schedule.actions]
    assert changed.actions[2] == schedule.actions[2]  # the conditional half has both values
    assert changed.actions[4] == schedule.actions[4]
    assert changed.actions[5][0] == forecast((5 / 3, -2 / 3))  # through calls 3 and 0: call 1 lacks a half
    stale = with_guidance(schedule, [BOTH, CONDITIONAL, BOTH, BOTH, BOTH, BOTH])
    assert stale.actions[2][0].computes  # call 1 has no unconditional half, call 0 is older than what was meant
    assert with_guidance(stale, stale.guidance) == stale
