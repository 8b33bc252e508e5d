"""The schedule of a compile: given, found fast (`-O2`) or searched for (`-O3`); and what it is worth, measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcc.calibrate import engine_contents, loop_work, planned_loop
from dcc.cost_model.roofline import CostModel, GenerationPrediction, Roofline, predict
from dcc.cost_model.table import CalibrationTable, table_of_this_machine
from dcc.cost_model.targets import Target, dtype_for, target_named
from dcc.errors import QualityError, UsageError
from dcc.exports.step_plan import StepPlan
from dcc.exports.templates import OnnxTemplate
from dcc.frontend.schedules import check_fits, moved_to, read_schedule
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule
from dcc.preparation import Clock, Prepared
from dcc.runtime.loaded import LoadedArtifact
from dcc.search.assess import PlainSteps, beside_exact, computed_share, quality_of
from dcc.search.fast import FastSearch
from dcc.search.front import Front
from dcc.search.front import pick as pick_point
from dcc.search.laboratory import CHECK_SEED, Laboratory, requests_of
from dcc.search.requirement import DEFAULT, Requirement

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Chosen:
    """`worth` is plain JSON data: quality on held-out requests, speed, and the run with fewer steps of equal time."""

    schedule: Schedule
    report: PassReport
    worth: dict[str, Any]
    templates: Mapping[str, OnnxTemplate]


def choose(
    prepared: Prepared,
    folder: Path,
    *,
    opt_level: int,
    require: str | None,
    schedule: Schedule | str | os.PathLike[str] | None,
    pick: str | None,
    transfer: str | None,
    budget: int,
    images: int,
    conditions: Mapping[str, Any] | None,
    target: str,
    own_process: bool,
    clock: Clock,
    told: Callable[[str], None],
) -> Chosen:
    """The schedule, checked against the requirement on requests that it was not chosen by.

    A given schedule of other calls, another sampler or other weights is transferred with the placement `transfer`.
    Raises QualityError where the requirement is missed, ScheduleError for a schedule of something else.
    """
    requirement = Requirement.parse(require or DEFAULT) if require or opt_level >= 2 else None
    program = prepared.program
    calibrated: CalibrationTable | None = None
    given = None if schedule is None else _given(prepared, schedule, pick, transfer, told)
    with clock("exporting stages"):
        laboratory = Laboratory(
            program, folder, images=images, held_out_images=min(2 * images, prepared.source.max_batch),
            conditions=conditions, own_process=own_process,
        )  # fmt: skip
    if given is not None:
        found, how = given, "given" if transfer is None else f"given and transferred ({transfer})"
    elif opt_level == 2:
        assert requirement is not None
        with clock("choosing a schedule"):
            check = requests_of(laboratory, range(CHECK_SEED, CHECK_SEED + images))
            fast = FastSearch(laboratory, requirement, check, told)
            found = _first_that_holds(laboratory, requirement, fast.candidates())
            # What is better on two sets of requests may still miss the requirement on the third.
            better = fast.polished()
            if requirement.holds(_held_out_value(laboratory, requirement, better)):
                found = better
            how = "found by bisection and moves"
    else:
        from dcc.search.study import TABLE, searched  # which imports this module, and pymoo

        assert requirement is not None
        with clock("searching for a schedule"):
            candidates = searched(laboratory, folder, budget, requirement, target, told)
            found = _first_that_holds(laboratory, requirement, candidates)
            how = f"searched for with {budget} evaluations"
        calibrated = CalibrationTable.load(folder / TABLE)
    found = replace(found, program=program.denoiser_hash(), sampler=sampler_digest(program.sampler))
    with clock("measuring quality and speed"):
        table = calibrated or table_of_this_machine(target, note=told)
        worth = assess(prepared, laboratory, found, requirement, folder, target, table)
    quality = worth["quality"]
    if requirement is not None and not worth["required"]["holds"]:
        value = worth["required"]["value"]
        reached = "not a finite number" if value is None else f"{value:.3f}"
        raise QualityError(
            "the schedule misses the requirement on held-out requests", at=found.name or found.digest()[:12],
            got=f"{requirement.metric} {reached}", want=str(requirement),
            next="lower --require, or compile with -O1",
        )  # fmt: skip
    share = worth["computed_share"]
    decibels = "exact" if quality["psnr"] is None else f"{quality['psnr']:.1f} dB"
    why = f"{how}: {share:.1%} of the FLOPs, {worth['speedup']:.2f}x as fast, {decibels}"
    return Chosen(found, PassReport("schedule", "applied", why, worth), worth, laboratory.templates)


def _first_that_holds(laboratory: Laboratory, requirement: Requirement, candidates: Iterator[Schedule]) -> Schedule:
    """The first schedule that keeps the requirement on the held-out requests. Raises QualityError for none."""
    best: float | None = None
    for schedule in candidates:
        value = _held_out_value(laboratory, requirement, schedule)
        if requirement.holds(value):
            return schedule
        better = best is None or (value > best) == requirement.at_least
        best = value if better else best
    raise QualityError(
        "no schedule keeps the requirement", want=str(requirement), next="lower --require, or compile with -O1",
        got="nothing but the exact loop" if best is None else f"{requirement.metric} {best:.3f} on held-out requests",
    )  # fmt: skip


def _held_out_value(laboratory: Laboratory, requirement: Requirement, schedule: Schedule) -> float:
    """The requirement's metric on the held-out requests."""
    exact = laboratory.exact_trajectory(laboratory.held_out)[-1].astype(np.float32)
    return requirement.measure(
        laboratory.run(schedule, laboratory.held_out).samples, exact, laboratory.data_range
    )


def _given(
    prepared: Prepared, schedule: Any, pick: str | None, placement: str | None, told: Callable[[str], None]
) -> Schedule:
    program = prepared.program
    if program.sampler is None or not program.components:
        raise UsageError("a schedule needs a sampler and components", at=program.name)
    identity = program.denoiser_hash(), sampler_digest(program.sampler)
    if isinstance(schedule, Schedule):
        if placement is not None:
            schedule = moved_to(schedule, program.calls, *identity, placement, told)
        check_fits(schedule, *identity, program.components, program.calls)
        return schedule
    return read_schedule(
        schedule, program.components, program.calls, program=identity[0], sampler=identity[1], placement=placement,
        note=told, pick=None if pick is None else lambda value: pick_point(Front.from_json(value), pick).schedule,
    )  # fmt: skip


def sampler_digest(table: Any) -> str:
    """The sampler's name and the content hash of its table, with ":" between."""
    digest = hashlib.sha256(json.dumps(table.to_json(), sort_keys=True).encode()).hexdigest()
    return f"{table.name}:{digest}"


def assess(
    prepared: Prepared, laboratory: Laboratory, schedule: Schedule, requirement: Requirement | None, folder: Path,
    target: str, table: CalibrationTable | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quality on held-out requests and speed beside the exact loop, both as they ship, and as the table predicts."""
    held_out = laboratory.held_out
    shipped, exact = laboratory.load(schedule, finest=False), laboratory.load(None, finest=False)
    samples = shipped.sample(**laboratory.request_values(shipped, held_out))
    quality = quality_of(laboratory, samples, held_out)
    ratios, exact_ms = beside_exact(laboratory, exact, {"schedule": shipped}, repeats=3)
    speedup, latency = 1 / ratios["schedule"], exact_ms * ratios["schedule"]
    plain = PlainSteps(prepared, laboratory, folder).of_equal_time(speedup, exact_ms)
    predicted = None if table is None else predicted_ms(laboratory, schedule, target, table)
    worth: dict[str, Any] = {
        "digest": schedule.digest(), "computed_share": computed_share(laboratory, schedule),
        "speedup": speedup, "latency_ms": latency, "exact_ms": exact_ms,
        "images": laboratory.search.images, "quality": quality.to_json(),
        "held_out_seeds": [held_out.seeds[0], held_out.seeds[-1]], "data_range": laboratory.data_range,
        "predicted_ms": predicted,
        "prediction_error": None if predicted is None else predicted / latency - 1.0,
        "fewer_steps": None if plain is None else plain.to_json(),
    }  # fmt: skip
    if requirement is not None:
        reference = laboratory.exact_trajectory(held_out)[-1].astype(np.float32)
        value = requirement.measure(samples, reference, laboratory.data_range)
        worth["required"] = {
            "text": str(requirement), "value": value if np.isfinite(value) else None, "holds": requirement.holds(value),
        }  # fmt: skip
    return worth


def predicted_ms(laboratory: Laboratory, schedule: Schedule | None, target: str, table: CalibrationTable) -> float:
    """Milliseconds of a generation of the search's images, as the table has it."""
    step = laboratory.plan_of(schedule, finest=False)
    images, guided = laboratory.search.images, laboratory.guided
    return predicted_generation(laboratory.program, step, target, images, guided=guided, model=table).seconds * 1e3


def predicted_generation(
    program: Program,
    plan: StepPlan | LoadedArtifact,
    target: str | Target,
    images: int,
    dtype: str | None = None,
    *,
    guided: bool | None = None,
    model: CostModel | None = None,
) -> GenerationPrediction:
    """Seconds of a generation of the plan on a target, which need not be here, and what they rest on.

    `plan` is the step as planned, or an artifact made from the Program. `dtype` is by default the target's own, `model`
    its data sheet. `guided` says that both halves of guidance run, by default as the Program would have it. Raises
    UsageError for an unknown target and for a dtype that it lacks.
    """
    if images < 1:
        raise UsageError("a generation has at least one image", got=images, want="1 or more")
    given = target_named(target) if isinstance(target, str) else target
    kind = dtype_for(given, dtype)
    sheet = Roofline.of(given, kind)
    both = program.guidance.mode == "cfg" and program.guidance.scale != 1.0 if guided is None else guided
    if isinstance(plan, StepPlan):
        loop = planned_loop(program, plan, images, both)
    else:
        loop = loop_work(plan, engine_contents(plan.artifact, program), images, both)
    found = predict(loop, sheet if model is None else model)
    return GenerationPrediction(given.name, given.chip, kind, images, found, sheet if model is None else None)
