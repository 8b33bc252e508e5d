"""The laboratory: schedules run on the finest engines as they run when shipped, and are held against exact samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compiled import relative_difference
from schedule_reference import LIMIT, Subject, subject, trajectory, write

from dcc.errors import UsageError
from dcc.ir.schedule import (
    BOTH,
    CONDITIONAL,
    GuidanceMode,
    Schedule,
    branch_units,
    delta_units,
    from_steps,
    full_schedule,
)
from dcc.search.laboratory import Laboratory, Requests

MODES = (BOTH, CONDITIONAL, GuidanceMode("reuse", (1.0,)), BOTH, BOTH, GuidanceMode("reuse", (1.5, -0.5)))


@pytest.fixture(scope="module")
def dit() -> Subject:
    return subject("dit")


@pytest.fixture(scope="module")
def laboratory(dit: Subject, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    folder = tmp_path_factory.mktemp("laboratory")
    return Laboratory(dit.program, folder, images=2, held_out_images=3, threads=1, templates=dit.templates)


def out_of_phase(dit: Subject) -> Schedule:
    names, calls = dit.program.components, dit.program.calls
    computes = [[(call + 2 * unit) % 3 == 0 for unit in range(len(names))] for call in range(calls)]
    return from_steps(names, branch_units(names), computes, 1, MODES)


def spans(dit: Subject) -> Schedule:
    names, calls = dit.program.components, dit.program.calls
    return from_steps(names, delta_units(names, (0, 3)), [[call % 2 == 0, call % 3 == 0] for call in range(calls)], 1)


def given(dit: Subject, requests: Requests) -> tuple[Subject, dict[str, object]]:
    """The subject with the laboratory's conditions."""
    return replace(dit, conditions={name: np.asarray(value) for name, value in requests.conditions.items()}), {
        "images": requests.images, "seed": list(requests.seeds),
    }  # fmt: skip


@pytest.mark.parametrize("make", [out_of_phase, spans])
def test_a_trial_is_the_reference_s_sample(dit: Subject, laboratory: Laboratory, make: object) -> None:
    schedule = make(dit)  # type: ignore[operator]
    requests = laboratory.held_out
    model, arguments = given(dit, requests)
    wanted = trajectory(model, schedule, **arguments)[-1]  # type: ignore[arg-type]
    for finest in (True, False):
        trial = laboratory.run(schedule, requests, finest)
        assert trial.samples.shape == wanted.shape
        assert relative_difference(trial.samples, wanted) <= LIMIT
        assert trial.seconds > 0


def test_what_is_tried_out_is_what_is_shipped(dit: Subject, laboratory: Laboratory, tmp_path: Path) -> None:
    schedule = out_of_phase(dit)
    shipped = write(dit, schedule, tmp_path / "a.dcc")
    values = laboratory.request_values(shipped, laboratory.search)
    trial = laboratory.run(schedule, laboratory.search)
    assert relative_difference(trial.samples, shipped.sample(**values)) <= LIMIT / 10


def test_the_exact_trajectory_is_the_plain_loop_s(dit: Subject, laboratory: Laboratory) -> None:
    model, arguments = given(dit, laboratory.search)
    plain = trajectory(model, full_schedule(dit.program.components, dit.program.calls), **arguments)  # type: ignore[arg-type]
    exact = laboratory.exact_trajectory(laboratory.search)
    assert len(exact) == dit.program.calls
    for got, wanted in zip(exact, plain, strict=True):
        assert relative_difference(got, wanted) <= LIMIT


def test_requests_are_apart(laboratory: Laboratory) -> None:
    assert laboratory.search.images == 2
    assert laboratory.held_out.images == 3
    assert not set(laboratory.search.seeds) & set(laboratory.held_out.seeds)


def test_a_schedule_that_computes_everything_loses_nothing(dit: Subject, laboratory: Laboratory) -> None:
    requests = laboratory.search
    exact = laboratory.run(full_schedule(dit.program.components, dit.program.calls), requests)
    assert np.array_equal(exact.samples, laboratory.run(None, requests).samples)
    error, psnr, _ = laboratory.quality(exact.samples, requests)
    assert error == 0.0
    assert psnr == np.inf
    worse = laboratory.quality(laboratory.run(spans(dit), requests).samples, requests)
    assert worse[0] > 0
    assert worse[1] < 100


def test_a_candidate_costs_no_engine_with_weights(dit: Subject, laboratory: Laboratory) -> None:
    exact = laboratory.plan_of(None)
    weighted = {key for key, engine in exact.engines.items() if engine.weights}
    for schedule in (out_of_phase(dit), spans(dit), full_schedule(dit.program.components, dit.program.calls)):
        step = laboratory.plan_of(schedule)
        assert {key for key, engine in step.engines.items() if engine.weights} <= weighted
        for key in weighted & set(step.engines):
            assert step.engines[key] is exact.engines[key]


def test_features_are_what_each_call_computed(dit: Subject, laboratory: Laboratory) -> None:
    features = [*laboratory.features(laboratory.search)]
    names, calls = dit.program.components, dit.program.calls
    assert [item.call for item in features] == list(range(calls))
    exact = laboratory.exact_trajectory(laboratory.search)
    for item in features:
        assert len(item.branches) == len(names)
        assert len(item.streams) == len(names) + 1
        rows = 2 * laboratory.search.images
        assert {value.shape[0] for value in (*item.branches, *item.streams, item.output)} == {rows}
        assert item.images == laboratory.search.images
    for before, item in zip(exact, features[1:], strict=False):
        assert np.array_equal(item.latent, before)
    # The stream after a component is the stream before it and its gated branch: it changes where the branch does.
    first, last = features[0], features[-1]
    for index in range(len(names)):
        assert not np.array_equal(first.streams[index], first.streams[index + 1])
        assert not np.array_equal(first.branches[index], last.branches[index])


def test_a_program_without_sampler_or_components_is_refused(dit: Subject, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a sampler"):
        Laboratory(replace(dit.program, sampler=None), tmp_path, templates=dit.templates)
    glued = [replace(stage, kind="glue") for stage in dit.program.stages]
    with pytest.raises(UsageError, match="nothing to schedule"):
        Laboratory(replace(dit.program, stages=glued), tmp_path, templates=dit.templates)


def test_unguided_requests_run_one_half(dit: Subject, tmp_path: Path) -> None:
    lab = Laboratory(
        dit.program, tmp_path, images=2, held_out_images=1, guidance_scale=1.0, threads=1, templates=dit.templates
    )
    assert not lab.guided
    schedule = out_of_phase(dit)
    model, arguments = given(dit, lab.search)
    wanted = trajectory(model, schedule, scale=1.0, **arguments)[-1]  # type: ignore[arg-type]
    assert relative_difference(lab.run(schedule, lab.search).samples, wanted) <= LIMIT
