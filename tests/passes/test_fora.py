"""fora: everything every few calls, reused in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from subjects import applied, check_settles, sketch, subject, table

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.ir.schedule import REUSE
from dcc.passes.fora import Fora


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(Fora(interval=4).propose(subject())))


def test_fires_on_one_kind(golden: Callable[[str], None]) -> None:
    golden(table(Fora(interval=3, kinds=("mlp",)).propose(subject())))


def test_settles() -> None:
    report = check_settles(Fora())
    assert report.figures["options"] == {"interval": 3, "kinds": ()}


def test_keeps_the_contract() -> None:
    schedule = Fora(interval=3).propose(subject())
    for call, row in enumerate(schedule.actions):
        assert all(action.computes == (call % 3 == 0) for action in row)
        assert all(action == REUSE for action in row if not action.computes)


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_pays_one_call_in_the_interval(interval: int) -> None:
    one = subject()
    share = Fora(interval).propose(one).computed_share(one.flops)
    assert share == pytest.approx(len(range(0, 10, interval)) / 10)


def test_a_sweep_pays_more_and_more() -> None:
    one = subject()
    shares = [option.propose(one).computed_share(one.flops) for option in Fora().options(one)]
    assert len(shares) == 7
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"components": ()}, "the Program has no components: its step is one stage"),
        ({"timesteps": ()}, "the Program has no sampler: there is nothing to schedule"),
        ({"calls": 1}, "1 call: nothing was computed before it"),
    ],
)
def test_declines_with_the_reason(change: dict, reason: str) -> None:
    with pytest.raises(Declined) as raised:
        Fora().propose(replace(subject(), **change))
    assert raised.value.reason == reason


def test_declines_an_unknown_kind() -> None:
    with pytest.raises(Declined, match="no component of kind text; there are attention, mlp"):
        Fora(kinds=("text",)).propose(subject())


def test_the_report_of_a_declined_pass_leaves_the_program() -> None:
    program = sketch()
    program.sampler = None
    report = applied(Fora(), program)
    assert (report.status, report.why) == ("declined", "the Program has no sampler: there is nothing to schedule")
    assert program.schedule is None


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="out of range"):
        Fora(interval=1)
