"""magcache: the rule on magnitude ratios, folded into a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from subjects import check_settles, subject, table, without_measurements

from dcc.errors import UsageError
from dcc.ir.measurements import Declined, Subject
from dcc.passes.magcache import MagCache


def with_ratios(*ratios: float) -> Subject:
    one = subject(calls=len(ratios))
    assert one.measurements is not None
    return replace(one, measurements=replace(one.measurements, magnitude_ratio=np.array(ratios)))


def computed(step: MagCache, one: Subject) -> list[int]:
    return [call for call, row in enumerate(step.propose(one).actions) if row[0].computes]


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(MagCache(order=1).propose(subject())))


def test_the_rule_by_hand() -> None:
    # |1 - product| adds up to 0.04, 0.04 + 0.0784: call 2 computes. Then 0.03, + 0.03097, + 0.05624: call 5 does.
    one = with_ratios(1.0, 0.96, 0.96, 0.97, 0.999, 1.09, 1.0, 1.0)
    assert computed(MagCache(threshold=0.1, longest=9, retention=0.0), one) == [0, 2, 5]
    assert computed(MagCache(threshold=0.1, longest=1, retention=0.0), one) == [0, 2, 4, 6]
    assert computed(MagCache(threshold=0.1, longest=9, retention=0.5), one) == [0, 1, 2, 3, 6]


def test_the_first_calls_are_retained() -> None:
    one = with_ratios(*[1.0] * 10)
    assert computed(MagCache(threshold=1.0, longest=2, retention=0.25), one) == [0, 1, 2, 5, 8]


def test_settles() -> None:
    check_settles(MagCache(threshold=0.2))


@pytest.mark.parametrize("target", [0.6, 0.5, 0.4, 0.3])
def test_pays_the_target_share(target: float) -> None:
    one = subject(calls=20)
    step = MagCache(longest=8, retention=0.1, target_share=target)
    assert step.propose(one).computed_share(one.flops, one.glue_flops) == pytest.approx(target, abs=0.06)


def test_a_sweep_pays_less_than_everything() -> None:
    one = subject()
    assert all(option.propose(one).computed_share(one.flops) < 1 for option in MagCache().options(one))


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="no measurements"):
        MagCache().propose(without_measurements())
    with pytest.raises(Declined, match="no accumulated error is at most 0"):
        MagCache(threshold=0.0).propose(with_ratios(1.0, 0.9, 0.9))
    with pytest.raises(Declined, match="no threshold computes 20%"):
        MagCache(target_share=0.2).propose(subject())


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"longest": 0}, {"retention": 2.0}, {"order": 3}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        MagCache(**options)
