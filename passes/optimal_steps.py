"""The best calls to compute for a given number of them: the stack is one span, forecast in the calls between.

Every linear forecast of a call's output by outputs of earlier calls has an error that follows from the outputs' inner
products on exact trajectories. How much of it reaches the sample was measured call by call. So the cost of computing
call `a`, before it `b`, and next call `n` is a number, and the best set of calls is a shortest path, found by dynamic
programming; no sample is made.

Numerics  errors between two computed calls add up, those of different gaps are independent; weights are those of the
          polynomial through the computed values until they are fitted on trajectories.
Refuses   a Program without measurements of its own components and calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcc.ir.measurements import Declined, Subject, apply_schedule, check_option, finished, name_of
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, delta_units, from_steps

Array = np.ndarray[Any, np.dtype[Any]]
RIDGE = 1e-4


@dataclass(frozen=True)
class OptimalSteps:
    """See the module's text. `computed` calls of all; `order` 0 to 2 of the forecast, `groups` of units.

    `trust` is the exponent of the measured sensitivities: fitted weights take back part of what early calls get wrong,
    whose sensitivity is highest, so that less than 1 is often nearer to the truth.
    """

    computed: int = 10
    order: int = 1
    groups: int = 1
    trust: float = 1.0
    name: str = "optimal-steps"

    def __post_init__(self) -> None:
        check_option("computed", self.computed, 1)
        check_option("order", self.order, 0, 2)
        check_option("groups", self.groups, 1)
        check_option("trust", self.trust, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        chosen = best_calls(subject, self.order, self.trust)
        if self.computed >= subject.calls:
            raise Declined(f"{self.computed} calls to compute, and there are {subject.calls}")
        calls = set(chosen[self.computed - 1])
        count = len(subject.components)
        groups = min(self.groups, count)
        units = delta_units(subject.components, sorted({index * count // groups for index in range(groups)}))
        computes = [[call in calls] * len(units) for call in range(subject.calls)]
        name = name_of(self, f"{self.name} {self.computed} of {subject.calls}, order {self.order}", "groups", "trust")
        schedule = from_steps(subject.components, units, computes, self.order, name=name)
        return finished(schedule, subject, "every call is computed")

    def options(self, subject: Subject) -> Sequence[OptimalSteps]:
        """Every number of computed calls."""
        return [replace(self, computed=count) for count in range(max(2, subject.calls // 6), subject.calls)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)


def best_calls(subject: Subject, order: int, trust: float = 1.0) -> list[tuple[int, ...]]:
    """For each number of computed calls, from 1 to all, the calls to compute. Raises Declined."""
    measured = subject.measured()
    return StepErrors.of(measured.output_products, measured.sensitivity, order, trust).best()


@dataclass(frozen=True)
class StepErrors:
    """What to expect of each set of computed calls; `costs[b + 1, a, n]` as `_costs` has it."""

    costs: Array

    @staticmethod
    def of(products: Array, sensitivity: Array, order: int, trust: float = 1.0) -> StepErrors:
        """From the mean products of outputs of two calls and the sample's error for one of a call's output."""
        return StepErrors(_costs(products, sensitivity**trust, min(order, 1)))

    def of_calls(self, chosen: Sequence[int]) -> float:
        """The expected error of computing these calls, in order, the first among them."""
        places = [-1, *chosen, len(self.costs) - 1]
        return sum(float(self.costs[b + 1, a, n]) for b, a, n in zip(places, places[1:], places[2:], strict=False))

    def best(self) -> list[tuple[int, ...]]:
        """For each number of computed calls, from 1 to all, those of the least expected error."""
        return _shortest_paths(self.costs)


def _shortest_paths(costs: Array) -> list[tuple[int, ...]]:
    calls = len(costs) - 1
    # best[b + 1, a]: the least cost of the calls up to a, the last two computed ones being b and a; b = -1: only a.
    best = np.full((calls + 1, calls), math.inf)
    best[0, 0] = 0.0
    back: list[Array] = []
    found = []
    for count in range(1, calls + 1):
        total = best + costs[:, :, calls]
        found.append(_walk_back(back, *np.unravel_index(int(total.argmin()), total.shape)))
        if count == calls:
            break
        through = best[:, :, None] + costs[:, :, :calls]
        back.append(through.argmin(axis=0))
        best = np.full_like(best, math.inf)
        best[1:] = through.min(axis=0)
    return found


def _walk_back(back: Sequence[Array], before: Any, last: Any) -> tuple[int, ...]:
    chosen = [int(last)]
    previous, current = int(before) - 1, int(last)
    for table in reversed(back):
        chosen.append(previous)
        previous, current = int(table[previous, current]) - 1, previous
    return tuple(reversed(chosen))


def _costs(products: Array, sensitivities: Array, order: int) -> Array:
    """`[b + 1, a, n]`: the cost of the calls between a and n when b and a are what was computed last."""
    calls = len(products)
    costs = np.full((calls + 1, calls, calls + 1), math.inf)
    for a in range(calls):
        for b in range(-1, a):
            if (b == -1) != (a == 0):
                continue
            history = [a] if b == -1 or order == 0 else [a, b]
            later = np.arange(a + 1, calls)
            errors = np.sqrt(_errors(products, history, later)) * sensitivities[later]
            costs[b + 1, a, a + 1 :] = np.concatenate([[0.0], np.cumsum(errors)]) ** 2
    return costs


def _errors(products: Array, history: Sequence[int], later: Array) -> Array:
    """Mean squared errors of the best forecasts of calls `later` from those in `history`."""
    if not len(later):
        return np.zeros(0)
    rows = np.array(history)
    gram = products[np.ix_(rows, rows)]
    gram = gram + RIDGE * 1e-3 * np.trace(gram) / len(history) * np.eye(len(history))
    right = products[np.ix_(rows, later)]
    weights = np.linalg.solve(gram, right)
    explained = 2 * (weights * right).sum(axis=0) - (weights * (products[np.ix_(rows, rows)] @ weights)).sum(
        axis=0
    )
    return np.maximum(products[later, later] - explained, 0.0)
