"""Weights of a schedule's combinations, fitted so that the trajectory comes back to the exact one.

A walk over the sampler's calls with the schedule itself. Before each call that combines, the weights are moved so that
the latent after it is as near as possible to the exact latent (least squares, linearised by finite differences): what
earlier calls got wrong is corrected as far as the kept values allow. Errors of features are not looked at, because a
fit of those is not a fit of the samples. Weights of reused guidance differences are fitted in the same way.

Numerics   a ridge keeps the weights near where they started; there are as many equations as the latents have values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcc.exports.step_plan import scalar_name
from dcc.ir.schedule import Action, GuidanceMode, Schedule
from dcc.runtime.plan import CallGuidance
from dcc.runtime.request import Request
from dcc.search.laboratory import Laboratory, Requests

Array = np.ndarray[Any, np.dtype[Any]]
STEP = 0.05  # of a finite difference: the output is nearly linear in the weights
RIDGE = 1e-2
ROUNDS = 2
GUIDANCE = -1
TOLD_APART = 1e-9  # far below what matters, far above the spacing of float64


@dataclass(frozen=True)
class _Weight:
    """One weight of a call: the unit's index or GUIDANCE, and how many values back."""

    unit: int
    back: int
    read: Callable[[], float]
    write: Callable[[float], None]


def fit_weights(laboratory: Laboratory, schedule: Schedule, requests: Requests, ridge: float = RIDGE) -> Schedule:
    """The schedule with fitted weights: the same calls compute the same units, so it costs the same."""
    told_apart = _told_apart(schedule)
    loaded = laboratory.load(told_apart)
    exact = laboratory.exact_trajectory(requests)
    actions = [list(row) for row in schedule.actions]
    modes = list(schedule.guidance)
    with loaded.request(**laboratory.request_values(loaded, requests)) as request:
        for call in range(request.calls):
            weights = _weights_of(request, told_apart, call, loaded.constants)
            if weights:
                _fit_call(request, call, weights, exact[call], ridge)
                found: dict[int, list[float]] = {}
                for weight in weights:
                    found.setdefault(weight.unit, []).append(weight.read())
                for unit, values in found.items():
                    if unit == GUIDANCE:
                        modes[call] = GuidanceMode("reuse", tuple(values))
                    else:
                        actions[call][unit] = Action("combine", tuple(values))
            request.advance(call, request.output(call))
    return replace(schedule, actions=tuple(map(tuple, actions)), guidance=tuple(modes))


def _fit_call(request: Request, call: int, weights: list[_Weight], wanted: Array, ridge: float) -> None:
    start = np.array([weight.read() for weight in weights])
    for _ in range(ROUNDS):
        before = np.array([weight.read() for weight in weights])
        reached = request.peek(call).astype(np.float64)
        columns = []
        for weight, value in zip(weights, before, strict=True):
            weight.write(value + STEP)
            columns.append((request.peek(call) - reached).ravel() / STEP)
            weight.write(value)
        matrix = np.stack(columns, axis=1)
        gram = matrix.T @ matrix
        strength = ridge * float(np.trace(gram)) / len(weights)
        if strength == 0.0:
            return
        right = matrix.T @ (wanted - reached).ravel() + strength * (start - before)
        after = before + np.linalg.solve(gram + strength * np.eye(len(weights)), right)
        for weight, value in zip(weights, after, strict=True):
            weight.write(float(value))


def _weights_of(request: Request, schedule: Schedule, call: int, constants: Mapping[str, Array]) -> list[_Weight]:
    found = []
    for unit, action in enumerate(schedule.actions[call]):
        for back, value in enumerate(action.weights):
            found.append(_in_array(unit, back, constants[scalar_name(value, "float32")]))
    if request.halves.guided and schedule.guidance[call].kind == "reuse":
        found += [_in_mode(request, call, back) for back in range(len(schedule.guidance[call].weights))]
    return found


def _in_array(unit: int, back: int, array: Array) -> _Weight:
    return _Weight(unit, back, lambda: float(array[0]), lambda value: array.fill(value))


def _in_mode(request: Request, call: int, back: int) -> _Weight:
    modes = request.halves.modes

    def write(value: float) -> None:
        weights = list(modes[call].weights)
        weights[back] = value
        modes[call] = CallGuidance("reuse", tuple(weights))

    return _Weight(GUIDANCE, back, lambda: modes[call].weights[back], write)


def _told_apart(schedule: Schedule) -> Schedule:
    """The schedule with a constant of its own for every weight, so that each can be changed alone."""
    count = 0
    rows = []
    for row in schedule.actions:
        actions = []
        for action in row:
            weights = []
            for weight in action.weights:
                count += 1
                weights.append(weight + TOLD_APART * count)
            actions.append(replace(action, weights=tuple(weights)))
        rows.append(tuple(actions))
    return replace(schedule, actions=tuple(rows))
