"""Measuring engines in real loops; and what loops cost is connected to what is measured."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
from compiled import copy_program, traced_program

from dcc.calibrate import (
    Calibration,
    calibrate,
    check,
    combination_model,
    engine_contents,
    host_work,
    loop_work,
    new_table,
    planned_loop,
    sum_model,
    table_rows,
    undisturbed,
)
from dcc.cost_model.roofline import Roofline, predict
from dcc.cost_model.work import EngineWork
from dcc.errors import UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import StoredWeights
from dcc.exports.lower import lower
from dcc.exports.step_plan import StepPlanner
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.frontend.samplers import sampler_table
from dcc.ir.program import Guidance, Program
from dcc.ir.schedule import BOTH, CONDITIONAL, delta_units, from_steps
from dcc.passes import run_passes
from dcc.preparation import manifest_of, pipeline
from dcc.runtime import load
from dcc.runtime.plan import WeightSpec

ROWS = (2, 3)


class Made(NamedTuple):
    """One Program cut at every component and as a step of one engine."""

    path: Path
    program: Program
    step: Path
    templates: Mapping[str, OnnxTemplate]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("calibrate")
    program = traced_program("dit")
    program.sampler = sampler_table("ddim", steps=4)
    program.guidance = Guidance("cfg", 3.0)
    run_passes(program, pipeline(1))
    templates = export_templates(program.templates)
    for name in ("component", "step"):
        with ArtifactWriter(folder / f"{name}.dcc") as writer:
            plan = lower(program, writer, name, templates=templates)
            writer.finish(manifest_of(program, plan, program.hash(), "cpu", {}))
    return Made(folder / "component.dcc", program, folder / "step.dcc", templates)


@pytest.fixture(scope="module")
def contents(made: Made) -> dict[str, EngineWork]:
    return engine_contents(load(made.path).artifact, made.program)


@pytest.fixture(scope="module")
def found(made: Made, contents: dict[str, EngineWork]) -> Calibration:
    # Pools stay apart: a shared one would bind every later session of the test process.
    return calibrate(made.path, contents, ROWS, repeats=2, calls=3, threads=1, own_process=False)


def test_the_contents_of_engines_hold_every_stage_once(made: Made, contents: dict[str, EngineWork]) -> None:
    parts = [part.key for engine in contents.values() for part in engine.parts]
    assert sorted(parts) == sorted(f"stage:{stage.template}" for stage in made.program.stages)


def test_an_artifact_of_another_program_is_refused(made: Made) -> None:
    other = copy_program(made.program)
    with pytest.raises(UsageError, match="not made from this Program"):
        engine_contents(load(made.path).artifact, other)


def test_every_distinct_engine_is_measured_at_every_number_of_rows(
    found: Calibration, contents: dict[str, EngineWork]
) -> None:
    measured = {(item.key, item.rows) for item in found.measurements if item.kind == "engine"}
    step = {engine.key for name, engine in contents.items() if name.startswith("step")}
    assert {(key, rows) for key in step for rows in ROWS} <= measured
    assert all(item.seconds > 0 and item.samples > 0 for item in found.measurements)
    assert {item.kind for item in found.measurements} == {"engine", "call", "request"}
    assert any(item.key.startswith("combine:") for item in found.measurements)


def test_rounds_say_what_ran_in_each_sampler_call(made: Made, found: Calibration) -> None:
    plan = load(made.path).plan
    for item in found.rounds:
        assert len(item.calls) == 3
        names = [call.engine for call in plan.step_programs[0]]
        assert [[event.engine for event in call] for call in item.calls] == [names] * 3
        assert {event.rows for call in item.calls for event in call} == {item.rows}
        assert item.images == (item.rows // 2 if item.rows % 2 == 0 else item.rows)


def test_a_calibrated_table_predicts_the_loops_it_saw(
    made: Made, contents: dict[str, EngineWork], found: Calibration
) -> None:
    table = new_table("cpu", 1).merged(found.measurements)
    artifact = load(made.path, threads=1)
    for item in check(artifact, contents, found, table, threads=1):
        # Tiny engines on a busy machine: the order of magnitude, not the accuracy that benchmarks/cost_model.py shows.
        assert 0.2 < item.predicted_seconds / item.measured_seconds < 5.0
    loop = loop_work(artifact, contents, 1)
    assert predict(loop, table).measured_share == pytest.approx(1.0)


def test_a_planned_loop_costs_what_its_artifact_does(made: Made, contents: dict[str, EngineWork]) -> None:
    sheet = Roofline.of("cpu", processors=1)
    artifact = load(made.path)
    lowered = predict(loop_work(artifact, contents, 2), sheet)
    planned = planned_loop(made.program, _planner(made).plan(None, finest=True), 2)
    assert predict(planned, sheet).seconds == pytest.approx(lowered.seconds)
    assert predict(planned, sheet).call_seconds == pytest.approx(lowered.call_seconds)
    assert host_work(artifact).call(True) == planned.hosts[0]


def _planner(made: Made) -> StepPlanner:
    program = made.program
    specs = {
        (name, transposed): WeightSpec(name, "float32", tuple(program.weights[name].shape), "weights.bin", 0, 4)
        for stage in program.stages
        for name in stage.weights
        for transposed in (False, True)
    }
    return StepPlanner(program, made.templates, StoredWeights(specs, 0))


def test_rows_outside_the_profile_are_refused(made: Made, contents: dict[str, EngineWork]) -> None:
    with pytest.raises(UsageError, match="outside the profile"):
        calibrate(made.path, contents, (1000,), own_process=False)


def test_a_step_of_one_engine_cannot_be_calibrated(made: Made) -> None:
    with pytest.raises(UsageError, match="a step that is cut"):
        calibrate(made.step, {}, (2,), own_process=False)


def test_schedules_are_priced_by_what_they_run(made: Made) -> None:
    program, sheet = made.program, Roofline.of("cpu", processors=1)
    planner = _planner(made)
    components = program.components
    every = [[call % every == 0] * len(components) for every in (1, 2, 4) for call in range(4)]
    seconds = []
    for index in range(3):
        schedule = from_steps(components, delta_units(components), [row[:1] for row in every[4 * index :][:4]], order=1)
        loop = planned_loop(program, planner.plan(schedule), 2)
        seconds.append(predict(loop, sheet).seconds)
        light = [part.key for engine in loop.engines.values() for part in engine.parts if "stage:" not in part.key]
        assert bool(light) == (index > 0)
    assert seconds[0] > seconds[1] > seconds[2]
    half = from_steps(
        components, delta_units(components), [[True]] * 4, guidance=[BOTH, CONDITIONAL, BOTH, CONDITIONAL]
    )
    loop = planned_loop(program, planner.plan(half), 2)
    assert [{rows for _, rows in call} for call in loop.calls] == [{4}, {2}, {4}, {2}]
    assert loop.hosts[0] != loop.hosts[1]


def test_weightless_models_compute_what_they_cost() -> None:
    a, b = (np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32) for seed in (0, 1))

    def run(model: bytes, **values: np.ndarray) -> np.ndarray:
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, values)[0]

    np.testing.assert_array_equal(run(sum_model(5), a=a, b=b), a + b)
    weight = np.full(1, 0.25, np.float32)
    found = run(combination_model(2, 5, based=True), base=a, h0=a, h1=b, w0=weight, w1=weight * 2)
    np.testing.assert_allclose(found, a + 0.25 * a + 0.5 * b, rtol=1e-6)
    np.testing.assert_allclose(run(combination_model(1, 5), h0=a, w0=weight), 0.25 * a)


def test_samples_that_were_preempted_count_only_where_there_is_nothing_better() -> None:
    quiet = [(1, 1.0, False), (1, 50.0, True), (2, 1.1, False), (2, 60.0, True)]
    assert undisturbed(quiet) == {1: [1.0], 2: [1.1]}
    generator = random.Random(0)
    busy = [(index % 5, 1.0 + generator.random(), True) for index in range(100)]
    kept = [value for values in undisturbed(busy).values() for value in values]
    assert sorted(kept) == sorted(value for _, value, _ in busy)[:6]


def test_tables_run_in_bounded_batches() -> None:
    assert table_rows(32, 20) == [640]
    assert table_rows(512, 20) == [4096, 4096, 2048]
    assert table_rows(9000, 2) == [9000, 9000]
