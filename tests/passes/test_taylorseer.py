"""taylorseer: forecasts by the paper's finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from subjects import check_settles, subject, table

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.ir.schedule import extrapolation
from dcc.passes.taylorseer import TaylorSeer, taylor_weights


def paper_forecast(calls: list[int], values: list[float], call: int, order: int) -> float:
    """As the paper's code runs: factors are updated at each computed call from the factors of the one before."""
    factors: list[float] = []
    previous = 0
    for at, value in zip(calls, values, strict=True):
        new = [value]
        for degree in range(order):
            if degree >= len(factors):
                break
            new.append((new[degree] - factors[degree]) / (at - previous))
        factors, previous = new, at
    return sum(factor * (call - previous) ** degree / math.factorial(degree) for degree, factor in enumerate(factors))


@given(
    gaps=st.lists(st.integers(1, 6), min_size=0, max_size=6), ahead=st.integers(1, 6), order=st.integers(0, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_equal_the_papers_recurrence(gaps: list[int], ahead: int, order: int, seed: int) -> None:
    calls = [0, *np.cumsum(gaps).tolist()]
    values = np.random.default_rng(seed).standard_normal(len(calls)).tolist()
    weights = taylor_weights(calls[::-1], calls[-1] + ahead, order)
    got = sum(weight * value for weight, value in zip(weights, values[::-1], strict=False))
    assert got == pytest.approx(paper_forecast(calls, values, calls[-1] + ahead, order), rel=1e-9, abs=1e-9)


def test_order_one_is_the_line_through_the_last_two_values() -> None:
    assert taylor_weights([7, 4, 0], 9, 1) == pytest.approx(extrapolation([7, 4, 0], 9, 1))
    assert taylor_weights([7, 4, 0], 9, 0) == (1.0,)
    assert taylor_weights([0], 3, 2) == (1.0,)


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(TaylorSeer(interval=3, order=2, first_enhance=2).propose(subject())))


def test_fires_on_the_whole_stack(golden: Callable[[str], None]) -> None:
    golden(table(TaylorSeer(stores="delta").propose(subject())))


def test_settles() -> None:
    check_settles(TaylorSeer())
    check_settles(TaylorSeer(order=2, stores="delta"))


def test_keeps_the_contract() -> None:
    schedule = TaylorSeer(interval=4, order=2, first_enhance=3).propose(subject(calls=12))
    computed = [call for call, row in enumerate(schedule.actions) if row[0].computes]
    assert computed == [0, 1, 2, 6, 10]
    assert schedule.actions[5][0].weights == pytest.approx(taylor_weights([2, 1, 0], 5, 2))


def test_pays() -> None:
    one = subject()
    assert TaylorSeer(interval=4, first_enhance=2).propose(one).computed_share(one.flops) == pytest.approx(0.4)
    shares = [option.propose(one).computed_share(one.flops) for option in TaylorSeer().options(one)]
    assert shares
    assert max(shares) < 1


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="the first 10 calls are all there is"):
        TaylorSeer(first_enhance=10).propose(subject())
    with pytest.raises(Declined, match="no sampler"):
        TaylorSeer().propose(replace(subject(), timesteps=()))


@pytest.mark.parametrize("options", [{"interval": 1}, {"order": 3}, {"first_enhance": 0}, {"stores": "output"}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        TaylorSeer(**options)
