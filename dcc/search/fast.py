"""A good schedule in a minute: the fastest that keeps a requirement, found without randomness.

The number of computed calls is found by bisection, each time with the calls that dynamic programming and an even
distribution propose; then calls move by one while that helps. Weights are fitted on the trajectories throughout. A
schedule must keep the requirement on two sets of requests, so that weights fitted to one are not trusted blindly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcc.ir.measurements import Subject, subject_of
from dcc.ir.schedule import Schedule, delta_units, from_steps
from dcc.passes.optimal_steps import best_calls
from dcc.search.evaluator import forms
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory, Requests
from dcc.search.requirement import Requirement

Array = np.ndarray[Any, np.dtype[Any]]
ORDER = 1
MOVES = 6  # evaluations of the local search


@dataclass(frozen=True)
class Tried:
    """A schedule with fitted weights, and the worse of the metric's values on the two sets of requests."""

    calls: tuple[int, ...]
    schedule: Schedule
    value: float


class FastSearch:
    """See the module's text; `told` hears each evaluation."""

    def __init__(
        self, laboratory: Laboratory, requirement: Requirement, check: Requests, told: Callable[[str], None]
    ) -> None:
        self._laboratory, self._requirement, self._check, self._told = laboratory, requirement, check, told
        program = laboratory.program
        if program.measurements is None:
            told("measuring exact trajectories")
            program.measurements = laboratory.measurements()
        self._subject: Subject = subject_of(program)
        self._tried: dict[tuple[int, ...], Tried] = {}

    def candidates(self) -> Iterator[Schedule]:
        """The schedule, then slower ones for whoever finds that it misses the requirement elsewhere."""
        best = self._fastest()
        calls = self._subject.calls
        proposals = best_calls(self._subject, ORDER)
        while best is not None:
            yield replace(best.schedule, name=f"{len(best.calls)} of {calls} calls")
            count = len(best.calls) + 1
            if count >= calls:
                return
            near = [item for item in self._tried.values() if len(item.calls) == count]
            near += [self._try(chosen) for chosen in {proposals[count - 1], _evenly(count, calls)}]
            best = max(near, key=self._rank)

    def _fastest(self) -> Tried | None:
        """The fewest computed calls that keep the requirement; None where only the exact loop does."""
        calls = self._subject.calls
        proposals = best_calls(self._subject, ORDER)
        low, high = 1, calls - 1  # computed calls; `high` keeps the requirement or is the last hope
        best: Tried | None = None
        while low <= high:
            # Good schedules compute less than half: the first guess is nearer to where they are, and cheaper.
            middle = low + (high - low) * 2 // 5
            found = self._first_that_holds((proposals[middle - 1], _evenly(middle, calls)))
            if self._requirement.holds(found.value):
                best, high = found, middle - 1
            else:
                low = middle + 1
        return self._improve(best)

    def _first_that_holds(self, proposals: Sequence[tuple[int, ...]]) -> Tried:
        """The first proposal that keeps the requirement, else the best of them."""
        tried = []
        for calls in dict.fromkeys(proposals):
            tried.append(self._try(calls))
            if self._requirement.holds(tried[-1].value):
                return tried[-1]
        return max(tried, key=self._rank)

    def _rank(self, item: Tried) -> float:
        return item.value if self._requirement.at_least else -item.value

    def _improve(self, best: Tried | None) -> Tried | None:
        """With one computed call fewer, moves of single calls until one keeps the requirement."""
        count = (len(best.calls) if best else self._subject.calls) - 1
        left = MOVES
        while left > 0:
            near = [item for item in self._tried.values() if len(item.calls) == count]
            if not near:
                return best
            start = max(near, key=self._rank)
            moves = _moves(start.calls, self._subject.calls)
            moved = next((calls for calls in moves if calls not in self._tried), None)
            if moved is None:
                return best
            left -= 1
            found = self._try(moved)
            if self._requirement.holds(found.value):
                best, count = found, count - 1
        return best

    def _try(self, calls: tuple[int, ...]) -> Tried:
        if calls not in self._tried:
            subject = self._subject
            computes = [[call in calls] for call in range(subject.calls)]
            plain = from_steps(subject.components, delta_units(subject.components), computes, ORDER)
            best: Tried | None = None
            for form in forms(plain):
                # The form that keeps the output comes second; it is faster, and seldom nearer to the exact samples.
                if best is not None and not self._requirement.holds(best.value):
                    break
                item = self._fitted(calls, form)
                if best is None or self._requirement.holds(item.value):
                    best = item
            assert best is not None
            self._tried[calls] = best
            worst = best.value
            self._told(f"{len(calls)} of {subject.calls} calls: {self._requirement.metric} {worst:.2f}")
        return self._tried[calls]

    def _fitted(self, calls: tuple[int, ...], schedule: Schedule) -> Tried:
        """Fitted to the search's requests and, if it holds there, worth no more than on the others."""
        laboratory = self._laboratory
        fit = fit_weights(laboratory, schedule, laboratory.search)
        value = self._value(fit.samples, laboratory.search)
        if self._requirement.holds(value):
            other = self._value(laboratory.run(fit.schedule, self._check).samples, self._check)
            value = min(value, other) if self._requirement.at_least else max(value, other)
        return Tried(calls, fit.schedule, value)

    def _value(self, samples: Array, requests: Requests) -> float:
        exact = self._laboratory.exact_trajectory(requests)[-1].astype(np.float32)
        return self._requirement.measure(samples, exact, self._laboratory.data_range)


def _evenly(count: int, calls: int) -> tuple[int, ...]:
    return tuple(sorted({round(index * calls / count) for index in range(count)}))


def _moves(chosen: Sequence[int], calls: int) -> list[tuple[int, ...]]:
    """Each computed call but the first, one call later or earlier; calls in the middle first."""
    found = []
    for call in sorted(chosen[1:], key=lambda call: abs(call - calls // 2)):
        for other in (call + 1, call - 1):
            if 0 < other < calls and other not in chosen:
                found.append(tuple(sorted({*chosen, other} - {call})))
    return found
