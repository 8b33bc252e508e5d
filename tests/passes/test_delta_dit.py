"""delta-dit: first the rear blocks are replaced by their delta, then the front blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from subjects import check_settles, subject, table

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.ir.schedule import REUSE, Stores
from dcc.passes.delta_dit import DeltaDit


def test_fires_where_the_ranges_overlap(golden: Callable[[str], None]) -> None:
    golden(table(DeltaDit().propose(subject())))


def test_fires_where_they_do_not(golden: Callable[[str], None]) -> None:
    golden(table(DeltaDit(interval=3, fraction=0.25).propose(subject())))


def test_the_whole_stack_is_one_unit() -> None:
    schedule = DeltaDit(fraction=1.0).propose(subject())
    assert [unit.members for unit in schedule.units] == [range(8)]
    assert [row[0].computes for row in schedule.actions] == [True, False] * 5


def test_settles() -> None:
    check_settles(DeltaDit(fraction=0.5))


def test_keeps_the_contract() -> None:
    schedule = DeltaDit(interval=2, boundary=0.5, fraction=0.5).propose(subject())
    assert all(unit.stores is Stores.DELTA for unit in schedule.units)
    for call, (front, rear) in enumerate(schedule.actions):
        assert front == REUSE if call % 2 and call >= 5 else front.computes
        assert rear == REUSE if call % 2 and call < 5 else rear.computes


def test_pays_what_the_fraction_says() -> None:
    one = subject()
    # Every other call replaces three of four blocks: the paper's 1.6x.
    assert DeltaDit().propose(one).computed_share(one.flops) == pytest.approx(1 / 1.6)
    shares = [option.propose(one).computed_share(one.flops) for option in DeltaDit().options(one)]
    assert max(shares) < 1


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="1 block: there is no front and no rear"):
        DeltaDit().propose(subject(blocks=1))
    with pytest.raises(Declined, match="no components"):
        DeltaDit().propose(replace(subject(), components=()))


@pytest.mark.parametrize("options", [{"interval": 1}, {"boundary": 1.5}, {"fraction": -0.1}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        DeltaDit(**options)
