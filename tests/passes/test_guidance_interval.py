"""guidance-interval: both halves between two noise levels, the conditional one elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from subjects import applied, check_settles, sketch, subject, table

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.passes.fora import Fora
from dcc.passes.guidance_interval import GuidanceInterval
from dcc.passes.guidance_reuse import GuidanceReuse


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(GuidanceInterval().propose(subject()).merged()))


def test_fires_on_a_cached_schedule(golden: Callable[[str], None]) -> None:
    """The unconditional half comes back at call 4: what FORA kept of it does not exist, so it is computed."""
    program = sketch()
    applied(Fora(3), program)
    report = applied(GuidanceInterval(0.4, 0.8, "fraction"), program)
    assert report.status == "applied"
    assert program.schedule is not None
    golden(f"{report.why}\n{table(program.schedule)}")


def test_the_order_of_the_passes_does_not_matter() -> None:
    one, other = sketch(), sketch()
    for step in (Fora(3), GuidanceInterval(0.4, 0.8, "fraction")):
        applied(step, one)
    for step in (GuidanceInterval(0.4, 0.8, "fraction"), Fora(3)):
        applied(step, other)
    assert one.schedule is not None
    assert other.schedule is not None
    assert one.schedule.digest() == other.schedule.digest()


def test_settles() -> None:
    check_settles(GuidanceInterval())


def test_keeps_the_contract() -> None:
    one = subject()
    assert one.sigmas is not None
    schedule = GuidanceInterval(0.2, 2.0).propose(one)
    assert [mode.kind == "both" for mode in schedule.guidance] == [0.2 < sigma <= 2.0 for sigma in one.sigmas]


def test_a_reused_difference_stays_inside_the_interval() -> None:
    one = subject()
    reused = GuidanceReuse(interval=3, start=0.0, order=1).propose(one)
    schedule = GuidanceInterval(0.1, 0.8, "fraction").propose(replace(one, schedule=reused))
    kinds = [mode.kind for mode in schedule.guidance]
    # Call 0 gave the first difference; without it call 1 must run both halves.
    assert kinds == ["conditional", "both", "reuse", "both", *["reuse"] * 2, "both", "reuse", *["conditional"] * 2]
    assert schedule.guidance[5].weights == pytest.approx((2.0, -1.0))


def test_pays_half_of_each_call_outside() -> None:
    one = subject()
    schedule = GuidanceInterval(0.3, 0.7, "fraction").propose(one)
    assert schedule.computed_share(one.flops, one.glue_flops) == pytest.approx(0.4 + 0.6 / 2)
    assert all(option.propose(one).computed_share(one.flops) < 1 for option in GuidanceInterval().options(one))


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="samples without guidance"):
        GuidanceInterval().propose(subject(guided=False))
    with pytest.raises(Declined, match="does not give its noise levels"):
        GuidanceInterval().propose(replace(subject(), sigmas=None))
    with pytest.raises(Declined, match="all 10 calls lie in the interval"):
        GuidanceInterval(0.0, 1e9).propose(subject())


@pytest.mark.parametrize("options", [{"low": -1.0}, {"high": 0.1}, {"unit": "timestep"}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        GuidanceInterval(**options)
