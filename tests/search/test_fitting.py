"""Fitted weights: what is computed stays, the trajectory comes nearer to the exact one, and nothing is random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import studies

from dcc.ir.schedule import (
    BOTH,
    CONDITIONAL,
    REUSE_DIFFERENCE,
    GuidanceMode,
    Schedule,
    branch_units,
    from_steps,
    full_schedule,
    output_unit,
)
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory, first_of


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return studies.laboratory(tmp_path_factory.mktemp("fitting"))


def loss(laboratory: Laboratory, schedule: Schedule) -> float:
    return laboratory.quality(laboratory.run(schedule, laboratory.search).samples, laboratory.search)[0]


def fitted(laboratory: Laboratory, schedule: Schedule) -> Schedule:
    return fit_weights(laboratory, schedule, laboratory.search).schedule


def forecasts(laboratory: Laboratory) -> Schedule:
    return studies.spans(laboratory.program.components, (0, 1, 3))


def shape(schedule: Schedule) -> list[list[tuple[str, int]]]:
    """What a schedule costs: kinds of actions and numbers of weights."""
    rows = [[(action.kind, len(action.weights)) for action in row] for row in schedule.actions]
    return [*rows, [(mode.kind, len(mode.weights)) for mode in schedule.guidance]]


def test_the_same_calls_compute_the_same_units(laboratory: Laboratory) -> None:
    schedule = forecasts(laboratory)
    found = fitted(laboratory, schedule)
    assert shape(found) == shape(schedule)
    assert found != schedule
    assert (found.units, found.name) == (schedule.units, schedule.name)


def test_the_fit_ends_at_the_samples_of_its_schedule(laboratory: Laboratory) -> None:
    fit = fit_weights(laboratory, forecasts(laboratory), laboratory.search)
    samples = laboratory.run(fit.schedule, laboratory.search).samples
    np.testing.assert_allclose(fit.samples, samples, atol=1e-5 * laboratory.data_range)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("calls", [(0, 1, 3), (0, 2), (0, 1, 2)])
def test_the_samples_are_nearer_to_the_exact_ones(laboratory: Laboratory, calls: tuple[int, ...], order: int) -> None:
    schedule = studies.spans(laboratory.program.components, calls, order)
    assert loss(laboratory, fitted(laboratory, schedule)) <= loss(laboratory, schedule)


def test_alike_units_share_their_weights(laboratory: Laboratory) -> None:
    """So that neighbours stay one unit when lowered; what combines other calls has weights of its own."""
    components = laboratory.program.components
    computes = [[call in (0, 1)] * 3 + [call in (0, 3)] for call in range(5)]
    schedule = from_steps(components, branch_units(components), computes)
    found = fitted(laboratory, schedule)
    assert shape(found) == shape(schedule)
    first, second, third, last = (action.weights for action in found.actions[4])
    assert first == second == third != last
    assert first != (1.0,)
    assert loss(laboratory, found) <= loss(laboratory, schedule)


def test_one_number_is_fitted_where_a_call_computes_some_units(laboratory: Laboratory) -> None:
    """It moves all weights on the line from reuse to the forecast."""
    components = laboratory.program.components
    computes = [[call in (0, 1)] * 2 + [True] * 2 for call in range(5)]
    schedule = from_steps(components, branch_units(components), computes, 1)
    found = fitted(laboratory, schedule)
    for call in (2, 3, 4):
        (before, _, *_), (after, other, *_) = schedule.actions[call], found.actions[call]
        assert after.weights == other.weights != before.weights
        assert sum(after.weights) == pytest.approx(1, abs=1e-5)
    reused = from_steps(components, branch_units(components), computes, 0)
    assert fitted(laboratory, reused) == reused


def test_a_kept_output_is_fitted(laboratory: Laboratory) -> None:
    components = laboratory.program.components
    schedule = from_steps(components, output_unit(components), [[call in (0, 1, 3)] for call in range(5)], 1)
    found = fitted(laboratory, schedule)
    assert shape(found) == shape(schedule)
    assert loss(laboratory, found) <= loss(laboratory, schedule)


def test_reused_guidance_is_fitted(laboratory: Laboratory) -> None:
    components = laboratory.program.components
    modes = (BOTH, REUSE_DIFFERENCE, BOTH, GuidanceMode("reuse", (1.5, -0.5)), BOTH)
    schedule = replace(full_schedule(components, 5), guidance=modes)
    found = fitted(laboratory, schedule)
    assert shape(found) == shape(schedule)
    assert found.actions == schedule.actions
    assert all(one.weights != other.weights for one, other in zip(found.guidance, modes, strict=True) if other.weights)
    assert loss(laboratory, found) < loss(laboratory, schedule)


@pytest.mark.parametrize("modes", [(BOTH,) * 5, (BOTH, CONDITIONAL, BOTH, CONDITIONAL, BOTH)])
def test_without_combinations_nothing_changes(laboratory: Laboratory, modes: tuple[GuidanceMode, ...]) -> None:
    schedule = replace(full_schedule(laboratory.program.components, 5), guidance=modes)
    assert fitted(laboratory, schedule) == schedule


def test_the_fit_repeats_itself(laboratory: Laboratory) -> None:
    schedule = forecasts(laboratory)
    assert fitted(laboratory, schedule) == fitted(laboratory, schedule)


def test_a_fit_leaves_other_runs_alone(laboratory: Laboratory) -> None:
    """Weights are moved in the arrays that the engines read: those of no other loaded schedule."""
    schedule = forecasts(laboratory)
    loaded = laboratory.load(schedule)
    values = laboratory.request_values(loaded, laboratory.search)
    before = loaded.sample(**values)
    fitted(laboratory, schedule)
    np.testing.assert_array_equal(loaded.sample(**values), before)
    np.testing.assert_array_equal(laboratory.run(schedule, laboratory.search).samples, before)
    np.testing.assert_array_equal(
        laboratory.run(None, laboratory.search).samples, laboratory.exact_trajectory(laboratory.search)[-1]
    )


def test_a_large_ridge_holds_the_weights(laboratory: Laboratory) -> None:
    schedule = forecasts(laboratory)

    def moved(ridge: float) -> float:
        found = fit_weights(laboratory, schedule, laboratory.search, ridge).schedule
        pairs = zip(found.actions, schedule.actions, strict=True)
        changes = [
            abs(new - old)
            for after, before in pairs
            for one, other in zip(after, before, strict=True)
            for new, old in zip(one.weights, other.weights, strict=True)
        ]
        return max(changes)

    assert moved(1e6) < 1e-3 < moved(1e-2)


def test_a_fit_follows_its_requests(laboratory: Laboratory) -> None:
    schedule = forecasts(laboratory)
    one = fit_weights(laboratory, schedule, first_of(laboratory.search, 1)).schedule
    assert shape(one) == shape(schedule)
    assert one != fitted(laboratory, schedule)
