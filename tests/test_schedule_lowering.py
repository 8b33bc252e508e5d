"""Compiled schedules sample what the plain reading of the schedule samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_reference import LIMIT, check, schedules, subject, without_guidance, write

from dcc.errors import ScheduleError
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    REUSE,
    REUSE_DIFFERENCE,
    SKIP,
    Action,
    GuidanceMode,
    Schedule,
    Stores,
    Unit,
    branch_units,
    delta_units,
    from_steps,
    full_schedule,
    output_unit,
)

FAMILIES = ("dit", "diffusers_dit", "pixart", "sd3", "sd35", "flux", "uvit", "wan")
Names = tuple[str, ...]


def every(period: int, names: Sequence[Any], calls: int, phase: int = 0) -> list[list[bool]]:
    """All of `names` in every call of the period; the phase is added for each of them."""
    return [[(call + phase * index) % period == 0 for index, _ in enumerate(names)] for call in range(calls)]


def spans(names: Names, count: int) -> tuple[Unit, ...]:
    """So many runs of about equal length."""
    return delta_units(names, sorted({len(names) * index // count for index in range(count)}))


def mixed_units(names: Names) -> tuple[Unit, ...]:
    """The first component stores its branch, the next two a delta each, the rest is one span."""
    starts = [start for start in (0, 1, 2, 3) if start < len(names)]
    first, *others = delta_units(names, starts)
    return (Unit(first.name, 0, 0, Stores.BRANCH), *others)


def skipping(names: Names, calls: int) -> Schedule:
    """The second component contributes nothing in every third call, the last in no call; others forecast."""
    rows: list[tuple[Action, ...]] = []
    for call in range(calls):
        row = [COMPUTE if call % 2 == 0 else REUSE for _ in names]
        row[1] = SKIP if call % 3 == 2 else COMPUTE
        row[-1] = SKIP
        rows.append(tuple(row))
    return Schedule(names, branch_units(names), tuple(rows))


def skipped_spans(names: Names, calls: int) -> Schedule:
    units = spans(names, 3)
    choices = (COMPUTE, SKIP, REUSE)
    rows = [
        tuple(choices[(call + index) % 3] if call else COMPUTE for index, _ in enumerate(units))
        for call in range(calls)
    ]
    return Schedule(names, units, tuple(rows))


MODES = (BOTH, BOTH, GuidanceMode("reuse", (1.5, -0.5)), CONDITIONAL, BOTH, REUSE_DIFFERENCE)


def with_modes(names: Names, calls: int) -> Schedule:
    """Values of the conditional half alone are computed, kept and read beside those of both."""
    units = mixed_units(names)
    return from_steps(names, units, every(2, units, calls, 1), 1, MODES[:calls])


SCHEDULES: dict[str, Callable[[Names, int], Schedule]] = {
    "exact": full_schedule,
    "fora": lambda names, calls: from_steps(names, branch_units(names), every(3, names, calls)),
    "order 1": lambda names, calls: from_steps(names, branch_units(names), every(2, names, calls), 1),
    "order 2": lambda names, calls: from_steps(
        names, branch_units(names), [[call < 3 or call == 4] * len(names) for call in range(calls)], 2
    ),
    "whole stack": lambda names, calls: from_steps(names, delta_units(names), every(2, "x", calls), 1),
    "spans out of phase": lambda names, calls: from_steps(
        names, spans(names, 4), every(3, spans(names, 4), calls, 1), 1
    ),
    "components out of phase": lambda names, calls: from_steps(
        names, branch_units(names), every(3, names, calls, 2), 1
    ),
    "mixed": lambda names, calls: from_steps(names, mixed_units(names), every(2, mixed_units(names), calls, 1), 1),
    "output": lambda names, calls: from_steps(names, output_unit(names), every(2, "x", calls), 1, MODES[:calls]),
    "skip": skipping,
    "skipped spans": skipped_spans,
    "modes": with_modes,
    "modes of the whole stack": lambda names, calls: from_steps(
        names, delta_units(names), [[call in (0, 3)] for call in range(calls)], 0, MODES[:calls]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SCHEDULES)
def test_equals_the_reference(what: str, tmp_path: Path) -> None:
    """Both granularities, several batch sizes in turn on one artifact, guided and not."""
    dit = subject("dit")
    schedule = SCHEDULES[what](dit.program.components, dit.program.calls)
    check(dit, schedule, tmp_path, images=(2, 1), scales=(None, 1.0))


@pytest.mark.parametrize("what", ["components out of phase", "mixed", "modes"])
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_families_equal_the_reference(name: str, what: str, tmp_path: Path) -> None:
    model = subject(name)
    check(model, SCHEDULES[what](model.program.components, model.program.calls), tmp_path)


def test_a_schedule_that_computes_everything_changes_no_bit(tmp_path: Path) -> None:
    dit = subject("dit")
    names, calls = dit.program.components, dit.program.calls
    for granularity in ("step", "component"):
        plain = write(dit, None, tmp_path / "plain.dcc", granularity)
        full = write(dit, full_schedule(names, calls), tmp_path / "full.dcc", granularity)
        spanned = write(dit, from_steps(names, spans(names, 2), every(1, "ab", calls)), tmp_path / "d.dcc", granularity)
        samples = [item.sample(**dit.rows(2), seed=1) for item in (plain, full, spanned)]
        assert np.array_equal(samples[0], samples[1])
        assert np.array_equal(samples[0], samples[2])
        engines = [[engine for engine in item.plan.engines if engine.kind == "step"] for item in (plain, full, spanned)]
        assert [item.plan.histories for item in (full, spanned)] == [(), ()]
        assert len(engines[0]) == len(engines[1]) == len(engines[2])


def test_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """Two requests in a row, other requests between them, and a walk that was broken off."""
    dit = subject("dit")
    loaded = write(dit, with_modes(dit.program.components, dit.program.calls), tmp_path / "a.dcc")
    first = loaded.sample(**dit.rows(2), seed=3)
    assert np.array_equal(first, loaded.sample(**dit.rows(2), seed=3))
    others = [loaded.sample(**dit.rows(count), seed=3) for count in (1, 3, 5)]
    with loaded.request(**dit.rows(2), seed=8) as request:
        request.advance(0, request.output(0))
        request.advance(1, request.output(1))
    assert np.array_equal(first, loaded.sample(**dit.rows(2), seed=3))
    for count, got in zip((1, 3, 5), others, strict=True):
        assert np.array_equal(got, loaded.sample(**dit.rows(count), seed=3))
    denoised = loaded.denoise(x=first, t=np.array([500.0, 20.0]), y=np.array([1, 2]))
    plain = write(dit, None, tmp_path / "plain.dcc").denoise(x=first, t=np.array([500.0, 20.0]), y=np.array([1, 2]))
    assert relative_difference(denoised, plain) <= LIMIT


def test_what_no_call_computes_is_not_in_the_artifact(tmp_path: Path) -> None:
    dit = subject("dit")
    names, calls = dit.program.components, dit.program.calls
    row = tuple(SKIP if name.startswith("blocks.1.") else COMPUTE for name in names)
    schedule = Schedule(names, branch_units(names), (row,) * calls)
    plain = write(dit, None, tmp_path / "plain.dcc")
    pruned = [stage for stage in dit.program.stages if stage.name.startswith("blocks.1.")]
    gone = {weight for stage in pruned for weight in stage.weights}
    assert gone
    for granularity, loaded in check(dit, schedule, tmp_path).items():
        kept = {weight.name.removesuffix("^T") for weight in loaded.plan.weights}
        before = {weight.name.removesuffix("^T") for weight in plain.plan.weights}
        assert before - kept == gone, granularity
        saved = sum(dit.program.weights[name].numel() * 4 for name in gone)
        assert Path(loaded.artifact.path).stat().st_size < (tmp_path / "plain.dcc").stat().st_size - saved // 2


def test_a_model_without_guidance_ignores_the_modes(tmp_path: Path) -> None:
    flux = without_guidance(subject("flux"))
    check(flux, with_modes(flux.program.components, flux.program.calls), tmp_path, images=(1, 2))


REFUSED: dict[str, tuple[Callable[[Names, int], Schedule], list[str]]] = {
    "other components": (
        lambda names, calls: full_schedule((*names[:-1], "another"), calls), ["other components", "another"],
    ),
    "fewer components": (lambda names, calls: full_schedule(names[1:], calls), ["other components", "5: "]),
    "fewer calls": (lambda names, calls: full_schedule(names, calls - 1), ["another sampler", "5 sampler calls", "6"]),
    "more calls": (lambda names, calls: full_schedule(names, 2 * calls), ["another sampler", "12 sampler calls", "6"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str, tmp_path: Path) -> None:
    dit = subject("dit")
    make, said = REFUSED[what]
    with pytest.raises(ScheduleError) as refused:
        write(dit, make(dit.program.components, dit.program.calls), tmp_path / "a.dcc")
    assert all(text in str(refused.value) for text in said), str(refused.value)
    assert not [*tmp_path.iterdir()]


EXAMPLES = {"dit": 12, "pixart": 7, "sd3": 7, "flux": 5}
# What all examples of a family together must hold, or they show less than they claim.
EVERY_KIND = {
    "branch", "delta", "span", "compute", "skip", "order 0", "order 1", "both", "conditional", "reuse",
}  # fmt: skip


def kinds_of(schedule: Schedule) -> set[str]:
    """What units keep, what stands in for them, and the modes of guidance."""
    units = {"span" if unit.first != unit.last else str(unit.stores) for unit in schedule.units}
    actions = [action for row in schedule.actions for action in row]
    acts = {f"order {len(action.weights) - 1}" if action.weights else action.kind for action in actions}
    return units | acts | {mode.kind for mode in schedule.guidance}


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_schedule_equals_the_reference(name: str, tmp_path: Path) -> None:
    """Merged as shipped, cut at every component, and the plain loop; traced and exported once for all examples."""
    model = subject(name)
    seen: set[str] = set()
    names = model.program.components
    join = next((index for index, item in enumerate(names) if "single" in item), 0)

    @settings(max_examples=EXAMPLES[name])
    @given(schedules(names, model.program.calls, join), st.sampled_from([None, 1.0]))
    def equals(schedule: Schedule, scale: float | None) -> None:
        seen.update(kinds_of(schedule))
        check(model, schedule, tmp_path, scales=(scale,))

    equals()
    assert seen >= EVERY_KIND
