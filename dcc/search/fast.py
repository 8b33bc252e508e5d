"""A good schedule in a minute: the fastest that keeps a requirement, found without randomness.

The number of computed calls is found by bisection, each time with the calls that dynamic programming, under two
readings of what it minimises, and an even distribution propose. Calls then move by one while that helps: first with one
call fewer, to be faster, then with as many, to be better at the same speed; moves of which the dynamic programming
expects the least error come first. Weights are fitted on the trajectories throughout. A schedule must keep the
requirement on two sets of requests, so that weights fitted to one are not trusted blindly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcc.ir.measurements import Subject, subject_of
from dcc.ir.schedule import Schedule, delta_units, from_steps, output_unit
from dcc.passes.optimal_steps import StepErrors
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory, Requests
from dcc.search.requirement import Requirement

Array = np.ndarray[Any, np.dtype[Any]]
ORDER = 1
TRUSTS = (0.5, 1.0)  # in the sensitivities that were measured; the first also says which moves come first
MOVES = 6  # evaluations with one call fewer
POLISH = 6  # evaluations with as many calls
# Decibels that are worth what the denoiser's output saves over the stack's delta, some 5 % of the time: fronts lose
# about 15 for each doubling of the speed.
FASTER_BY_OUTPUT = 1.0


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
        self._subject: Subject = subject_of(laboratory.program)
        told("measuring exact trajectories")
        outputs = np.stack([output.ravel() for output in laboratory.exact_outputs(laboratory.search)], dtype=np.float64)
        products = outputs @ outputs.T / outputs.shape[1]
        sensitivity = laboratory.sensitivity()
        errors = [StepErrors.of(products, sensitivity, ORDER, trust) for trust in TRUSTS]
        self._expected, self._best = errors[0].of_calls, [item.best() for item in errors]
        self._tried: dict[tuple[int, ...], Tried] = {}
        self._yielded: Tried | None = None

    def candidates(self) -> Iterator[Schedule]:
        """The schedule, then slower ones for whoever finds that it misses the requirement elsewhere."""
        best = self._fastest()
        calls = self._subject.calls
        while best is not None:
            self._yielded = best
            yield self._named(best)
            count = len(best.calls) + 1
            if count >= calls:
                return
            near = [item for item in self._tried.values() if len(item.calls) == count]
            near += [self._try(chosen) for chosen in self._proposals(count)]
            best = max(near, key=self._rank)

    def polished(self) -> Schedule:
        """The candidate that came last with as many computed calls, moved while that helps, and in its best form."""
        best = self._yielded
        assert best is not None
        for _ in range(POLISH):
            moved = self._next_move(best)
            if moved is None:
                break
            best = max(best, self._try(moved), key=self._rank)
        return self._named(self._form_of(best))

    def _named(self, item: Tried) -> Schedule:
        return replace(item.schedule, name=f"{len(item.calls)} of {self._subject.calls} calls")

    def _fastest(self) -> Tried | None:
        """The fewest computed calls that keep the requirement; None where only the exact loop does."""
        calls = self._subject.calls
        low, high = 1, calls - 1  # computed calls; `high` keeps the requirement or is the last hope
        best: Tried | None = None
        while low <= high:
            # Good schedules compute less than half: the first guess is nearer to where they are, and cheaper.
            middle = low + (high - low) * 2 // 5
            found = self._first_that_holds(self._proposals(middle))
            if self._requirement.holds(found.value):
                best, high = found, middle - 1
            else:
                low = middle + 1
        return self._improve(best)

    def _proposals(self, count: int) -> tuple[tuple[int, ...], ...]:
        """So many calls: those of the least expected error, by each reading of it, and evenly spaced ones."""
        best = [chosen[count - 1] for chosen in self._best]
        return tuple(dict.fromkeys((*best, _evenly(count, self._subject.calls))))

    def _first_that_holds(self, proposals: Sequence[tuple[int, ...]]) -> Tried:
        """The first proposal that keeps the requirement, else the best of them."""
        tried = []
        for calls in proposals:
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
            moved = self._next_move(max(near, key=self._rank))
            if moved is None:
                return best
            left -= 1
            found = self._try(moved)
            if self._requirement.holds(found.value):
                best, count = found, count - 1
        return best

    def _next_move(self, start: Tried) -> tuple[int, ...] | None:
        """The move of a single call that was not tried, and of which the least error is expected."""
        moves = [calls for calls in _moves(start.calls, self._subject.calls) if calls not in self._tried]
        return min(moves, key=self._expected, default=None)

    def _try(self, calls: tuple[int, ...]) -> Tried:
        if calls not in self._tried:
            subject = self._subject
            computes = [[call in calls] for call in range(subject.calls)]
            plain = from_steps(subject.components, delta_units(subject.components), computes, ORDER)
            self._tried[calls] = found = self._fitted(calls, plain)
            self._told(f"{len(calls)} of {subject.calls} calls: {self._requirement.metric} {found.value:.2f}")
        return self._tried[calls]

    def _form_of(self, best: Tried) -> Tried:
        """With the denoiser's output kept in place of the stack's delta, where that costs nothing to speak of."""
        kept = replace(best.schedule.merged(), units=output_unit(best.schedule.components))
        found = self._fitted(best.calls, kept)
        allowed = FASTER_BY_OUTPUT if self._requirement.metric == "psnr" else 0.0
        better = self._rank(found) >= self._rank(best) - allowed
        return found if better and self._requirement.holds(found.value) else best

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
    """Each computed call but the first, one call later or earlier."""
    found = []
    for call in chosen[1:]:
        for other in (call + 1, call - 1):
            if 0 < other < calls and other not in chosen:
                found.append(tuple(sorted({*chosen, other} - {call})))
    return found
