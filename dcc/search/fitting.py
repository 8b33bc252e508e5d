"""Weights of a schedule's combinations, fitted so that the trajectory comes back to the exact one.

A walk over the sampler's calls with the schedule itself. Before each call that combines, the weights are moved so that
the latent after it is as near as possible to the exact latent (least squares, linearised by finite differences): what
earlier calls got wrong is corrected as far as the kept values allow. Errors of features are not looked at, because a
fit of those is not a fit of the samples. Weights of reused guidance differences are fitted in the same way.

Units that combine the same calls in the same way share their weights: neighbours with equal columns stay one unit
when lowered, and each weight costs one more run of the call. Where the call computes some units, one parameter is
fitted for all the others: how far their weights go from reuse.

Numerics   a ridge keeps the weights near where they started; there are as many equations as the latents have values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
TOLD_APART = 1e-9  # far below what matters, far above the spacing of float64
DIGITS = 5  # to which weights are equal although they were told apart


@dataclass(frozen=True)
class _Parameter:
    """What is fitted for a call: one weight of alike units, or how far all weights of the call go from reuse."""

    read: Callable[[], float]
    write: Callable[[float], None]


@dataclass(frozen=True)
class Fit:
    """A schedule with fitted weights, and the samples of its requests under it."""

    schedule: Schedule
    samples: Array


def fit_weights(laboratory: Laboratory, schedule: Schedule, requests: Requests, ridge: float = RIDGE) -> Fit:
    """The schedule with fitted weights: the same calls compute the same units, so it costs the same."""
    told_apart = _told_apart(schedule)
    loaded = laboratory.load(told_apart)
    exact = laboratory.exact_trajectory(requests)
    actions = [list(row) for row in schedule.actions]
    modes = list(schedule.guidance)
    with loaded.request(**laboratory.request_values(loaded, requests)) as request:
        for call in range(request.calls):
            named = {
                unit: [scalar_name(value, "float32") for value in action.weights]
                for unit, action in enumerate(told_apart.actions[call])
                if action.weights
            }
            # A combination that nothing reads is not lowered: its weights do not matter.
            arrays = {
                unit: [loaded.constants[name] for name in names]
                for unit, names in named.items()
                if all(name in loaded.constants for name in names)
            }
            parameters = _parameters_of(request, told_apart, call, arrays)
            if parameters:
                _fit_call(request, call, parameters, exact[call], ridge)
                for unit, values in arrays.items():
                    actions[call][unit] = Action("combine", tuple(float(value[0]) for value in values))
                if request.halves.guided and schedule.guidance[call].kind == "reuse":
                    modes[call] = GuidanceMode("reuse", request.halves.modes[call].weights)
            request.advance(call, request.output(call))
        samples = request.sampler.latent.astype(np.float32)
    return Fit(replace(schedule, actions=tuple(map(tuple, actions)), guidance=tuple(modes)), samples)


def _fit_call(request: Request, call: int, parameters: list[_Parameter], wanted: Array, ridge: float) -> None:
    before = np.array([parameter.read() for parameter in parameters])
    reached = request.peek(call).astype(np.float64)
    columns = []
    for parameter, value in zip(parameters, before, strict=True):
        parameter.write(value + STEP)
        columns.append((request.peek(call) - reached).ravel() / STEP)
        parameter.write(value)
    matrix = np.stack(columns, axis=1)
    gram = matrix.T @ matrix
    strength = ridge * float(np.trace(gram)) / len(parameters)
    if strength == 0.0:
        return
    move = np.linalg.solve(gram + strength * np.eye(len(parameters)), matrix.T @ (wanted - reached).ravel())
    for parameter, value in zip(parameters, before + move, strict=True):
        parameter.write(float(value))


def _parameters_of(
    request: Request, schedule: Schedule, call: int, arrays: Mapping[int, list[Array]]
) -> list[_Parameter]:
    """Every weight where the call computes nothing, so that trying one is cheap; else one parameter for all."""
    found: list[_Parameter] = []
    if any(action.computes for action in schedule.actions[call]):
        if any(len(values) > 1 for values in arrays.values()):
            found.append(_reach(list(arrays.values())))
    else:
        alike: dict[tuple[tuple[int, ...], tuple[float, ...]], list[int]] = {}
        for unit in arrays:
            weights = schedule.actions[call][unit].weights
            key = schedule.history(call, unit, len(weights)), tuple(round(weight, DIGITS) for weight in weights)
            alike.setdefault(key, []).append(unit)
        for units in alike.values():
            found += [_in_arrays(shared) for shared in zip(*(arrays[unit] for unit in units), strict=True)]
    if request.halves.guided and schedule.guidance[call].kind == "reuse":
        found += [_in_mode(request, call, back) for back in range(len(schedule.guidance[call].weights))]
    return found


def _in_arrays(arrays: Sequence[Array]) -> _Parameter:
    def write(value: float) -> None:
        for array in arrays:
            array.fill(value)

    return _Parameter(lambda: float(arrays[0][0]), write)


def _reach(units: list[list[Array]]) -> _Parameter:
    """0 is reuse of the newest value, 1 the weights as they are."""
    starts = [[float(array[0]) for array in arrays] for arrays in units]
    state = [1.0]

    def write(value: float) -> None:
        state[0] = value
        for arrays, start in zip(units, starts, strict=True):
            for index, (array, weight) in enumerate(zip(arrays, start, strict=True)):
                plain = 1.0 if index == 0 else 0.0
                array.fill(plain + value * (weight - plain))

    return _Parameter(lambda: state[0], write)


def _in_mode(request: Request, call: int, back: int) -> _Parameter:
    modes = request.halves.modes

    def write(value: float) -> None:
        weights = list(modes[call].weights)
        weights[back] = value
        modes[call] = CallGuidance("reuse", tuple(weights))

    return _Parameter(lambda: modes[call].weights[back], write)


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
