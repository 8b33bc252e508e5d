"""Weights of a schedule's combinations, fitted so that the trajectory comes back to the exact one.

A walk over the sampler's calls with the schedule itself. Before each call that combines, the weights are moved so that
the latent after it is as near as possible to the exact latent (least squares, linearised by finite differences): what
earlier calls got wrong is corrected as far as the kept values allow. Errors of features are not looked at, because a
fit of those is not a fit of the samples.

Numerics   a ridge keeps the weights near where they started; the number of parameters is that of the weights of one
           call, against as many equations as the latents have values.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from dcc.exports.step_plan import scalar_name
from dcc.exports.unroll import Scalar
from dcc.ir.schedule import Action, Schedule
from dcc.runtime.request import Request
from dcc.search.laboratory import Laboratory, Requests

Array = np.ndarray[Any, np.dtype[Any]]
STEP = 0.05  # of a finite difference; outputs are nearly linear in the weights
RIDGE = 1e-3
ROUNDS = 2


def fit_weights(laboratory: Laboratory, schedule: Schedule, requests: Requests, ridge: float = RIDGE, rounds: int = ROUNDS, partial=True) -> Schedule:
    """The schedule with fitted weights: the same calls compute, so it costs the same."""
    told_apart, places = _told_apart(schedule)
    if not places:
        return schedule
    exact = laboratory.exact_trajectory(requests)
    loaded = laboratory.load(told_apart)
    constants = loaded._constants
    assert constants is not None
    fitted: dict[tuple[int, int], list[float]] = {}
    with loaded.request(**laboratory.request_values(loaded, requests)) as request:
        for call in range(request.calls):
            free = [place for place in places if place[0] == call]
            if free and (partial or not any(a.computes for a in schedule.actions[call])):
                arrays = [_constant(constants, told_apart, place) for place in free]
                _fit_call(request, call, arrays, exact[call], ridge, rounds)
                for place, array in zip(free, arrays, strict=True):
                    fitted.setdefault(place[:2], []).append(float(array[0]))
            request.advance(call, request.output(call))
    rows = [list(row) for row in schedule.actions]
    for (call, unit), weights in fitted.items():
        rows[call][unit] = Action("combine", tuple(weights))
    return replace(schedule, actions=tuple(map(tuple, rows)))


def _fit_call(request: Request, call: int, arrays: list[Array], wanted: Array, ridge: float, rounds: int) -> None:
    start = np.array([array[0] for array in arrays])
    for _ in range(rounds):
        before = np.array([array[0] for array in arrays])
        reached = _peek(request, call)
        scale = float(np.abs(wanted).mean())
        columns = []
        for array in arrays:
            value = array[0]
            array[0] = value + STEP
            columns.append((_peek(request, call) - reached).ravel() / STEP)
            array[0] = value
        matrix = np.stack(columns, axis=1)
        error = (wanted - reached).astype(np.float64).ravel()
        gram = matrix.T @ matrix
        strength = ridge * max(float(np.trace(gram)) / len(arrays), (1e-6 * scale) ** 2)
        move = np.linalg.solve(
            gram + strength * np.eye(len(arrays)), matrix.T @ error + strength * (start - before)
        )
        for array, value in zip(arrays, before + move, strict=True):
            array[0] = np.float32(value)


def _peek(request: Request, call: int) -> Array:
    """The latent that the call would lead to; nothing is advanced."""
    known = request.halves._known
    output = request.output(call).copy()
    request.halves._known = known
    sampler = copy.deepcopy(request.sampler)
    drawn: list[Array] = []
    state = copy.deepcopy(request._source)
    return sampler.advance(call, output, lambda dtype: state.draw(request.sampler.shape[1:], dtype)).astype(np.float64)


def _told_apart(schedule: Schedule) -> tuple[Schedule, list[tuple[int, int, int]]]:
    """The schedule with a weight of its own in every place, so that each can be changed alone; and the places."""
    places: list[tuple[int, int, int]] = []
    rows = [list(row) for row in schedule.actions]
    for call, row in enumerate(schedule.actions):
        for unit, action in enumerate(row):
            if action.kind != "combine":
                continue
            weights = []
            for index, weight in enumerate(action.weights):
                places.append((call, unit, index))
                weights.append(weight + 1e-9 * len(places))
            rows[call][unit] = Action("combine", tuple(weights))
    return replace(schedule, actions=tuple(map(tuple, rows))), places


def _constant(constants: Any, schedule: Schedule, place: tuple[int, int, int]) -> Array:
    call, unit, index = place
    value = schedule.actions[call][unit].weights[index]
    return constants[f"weight.{value!r}.float32"]
