"""optimal-steps: for each number of computed calls the best ones, as a shortest path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from subjects import applied, check_settles, sketch, subject, table, without_measurements

from dcc.errors import UsageError
from dcc.ir.measurements import Declined, Subject
from dcc.passes.optimal_steps import RIDGE, OptimalSteps, StepErrors, best_calls

CALLS = 7


def random_subject(seed: int) -> tuple[Subject, np.ndarray]:
    """Measurements of outputs that are random, and the outputs themselves."""
    random = np.random.default_rng(seed)
    outputs = np.cumsum(random.standard_normal((CALLS, 40)), axis=0) + random.standard_normal(40)
    one = subject(calls=CALLS)
    assert one.measurements is not None
    measured = replace(
        one.measurements, output_products=outputs @ outputs.T / outputs.shape[1], sensitivity=random.random(CALLS) + 0.1
    )
    return replace(one, measurements=measured), outputs


def cost(outputs: np.ndarray, sensitivity: np.ndarray, chosen: Sequence[int], order: int) -> float:
    """What the pass minimises, from the outputs themselves: errors add up in a gap, gaps are independent."""
    total = 0.0
    for place, (current, end) in enumerate(pairwise([*chosen, CALLS])):
        history = [current, chosen[place - 1]] if order and place else [current]
        known = outputs[history].T
        ridge = RIDGE * 1e-3 * float((known**2).sum()) / len(history) * np.eye(len(history))
        gap = 0.0
        for call in range(current + 1, end):
            weights = np.linalg.solve(known.T @ known + ridge, known.T @ outputs[call])
            gap += math.sqrt(float(np.mean((outputs[call] - known @ weights) ** 2))) * sensitivity[call]
        total += gap**2
    return total


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(OptimalSteps(computed=4).propose(subject())))


def test_fires_in_groups(golden: Callable[[str], None]) -> None:
    golden(table(OptimalSteps(computed=5, order=2, groups=3).propose(subject())))


def test_settles() -> None:
    report = check_settles(OptimalSteps(computed=4))
    assert report.figures["options"] == {"computed": 4, "order": 1, "groups": 1, "trust": 1.0}


def test_trust_is_the_exponent_of_the_sensitivities() -> None:
    one, outputs = random_subject(3)
    assert one.measurements is not None
    sensitivity = one.measurements.sensitivity
    squared = replace(one, measurements=replace(one.measurements, sensitivity=sensitivity**2))
    assert best_calls(squared, 1, 0.5) == best_calls(one, 1)
    extreme = np.ones(CALLS)
    extreme[5] = 1e6
    told, flat = (replace(one, measurements=replace(one.measurements, sensitivity=value)) for value in
                  (extreme, np.ones(CALLS)))  # fmt: skip
    assert best_calls(told, 1, 0.0) == best_calls(flat, 1) != best_calls(told, 1)
    errors = StepErrors.of(outputs @ outputs.T / outputs.shape[1], sensitivity, 1)
    for chosen in errors.best():
        assert errors.of_calls(chosen) == pytest.approx(cost(outputs, sensitivity, chosen, 1))
    with pytest.raises(UsageError, match="trust"):
        OptimalSteps(trust=1.5)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_trying_everything_finds(seed: int, order: int) -> None:
    one, outputs = random_subject(seed)
    assert one.measurements is not None
    sensitivity = one.measurements.sensitivity
    found = best_calls(one, order)
    assert len(found) == CALLS
    for count, chosen in enumerate(found, 1):
        every = [(0, *rest) for rest in combinations(range(1, CALLS), count - 1)]
        best = min(every, key=lambda calls: cost(outputs, sensitivity, calls, order))
        assert chosen == best


def test_more_calls_cost_less() -> None:
    one, outputs = random_subject(9)
    assert one.measurements is not None
    sensitivity = one.measurements.sensitivity
    costs = [cost(outputs, sensitivity, chosen, 1) for chosen in best_calls(one, 1)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_a_sensitive_call_is_computed() -> None:
    one = subject()
    assert one.measurements is not None
    for call in (3, 6):
        sensitivity = np.ones(one.calls)
        sensitivity[call] = 1e6
        changed = replace(one, measurements=replace(one.measurements, sensitivity=sensitivity))
        assert call in best_calls(changed, 1)[2]


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_keeps_the_contract(groups: int) -> None:
    one = subject()
    schedule = OptimalSteps(computed=4, groups=groups).propose(one)
    assert len(schedule.units) == min(groups, len(one.components))
    for row in schedule.actions:
        assert len({action.kind for action in row}) == 1
    assert sum(row[0].computes for row in schedule.actions) == 4
    assert tuple(call for call, row in enumerate(schedule.actions) if row[0].computes) == best_calls(one, 1)[3]
    assert schedule.computed_share(one.flops) == pytest.approx(0.4)


def test_a_sweep_pays_more_and_more() -> None:
    one = subject()
    shares = [option.propose(one).computed_share(one.flops) for option in OptimalSteps().options(one)]
    assert shares == sorted(shares)
    assert len(shares) == 8 and shares[-1] < 1


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="no measurements"):
        OptimalSteps(computed=4).propose(without_measurements())
    with pytest.raises(Declined, match="of 10 calls, not of 8"):
        OptimalSteps(computed=4).propose(replace(subject(calls=8), measurements=subject().measurements))
    with pytest.raises(Declined, match="of other components"):
        OptimalSteps(computed=4).propose(replace(subject(), measurements=subject(blocks=3).measurements))
    with pytest.raises(Declined, match="10 calls to compute, and there are 10"):
        OptimalSteps(computed=10).propose(subject())
    with pytest.raises(Declined, match="1 call: nothing was computed before it"):
        OptimalSteps(computed=1).propose(subject(calls=1))


def test_the_report_of_a_declined_pass_leaves_the_program() -> None:
    program = sketch(measured=False)
    report = applied(OptimalSteps(), program)
    assert report.status == "declined" and "no measurements" in report.why
    assert program.schedule is None


@pytest.mark.parametrize("options", [{"computed": 0}, {"order": 3}, {"order": -1}, {"groups": 0}])
def test_an_option_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OptimalSteps(**options)
