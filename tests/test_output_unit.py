"""Schedules that keep the denoiser's output: a call that is left out runs no part of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from compiled import relative_difference, write_artifact

from dcc.errors import ScheduleError
from dcc.exports.unroll import unroll
from dcc.ir.schedule import BOTH, SKIP, GuidanceMode, Schedule, Stores, Unit, delta_units, from_steps, output_unit
from dcc.preparation import pipeline
from dcc.runtime import load
from dcc.search.evaluator import forms
from dcc.tolerances import TOLERANCE

COMPUTES = [[True], [False], [True], [False]]
REQUEST = {"conditions": {"y": [1, 2, 3]}, "guidance_scale": 3.0, "seed": 5}


def scheduled(traced: Callable, path: Path, order: int, granularity: str) -> Path:
    program = traced("dit")
    from dcc.passes import run_passes

    run_passes(program, pipeline(1))
    names = program.components
    program = traced("dit")
    program.schedule = from_steps(names, output_unit(names), COMPUTES, order)
    write_artifact(program, path, granularity)
    return path


@pytest.mark.parametrize("granularity", ["step", "component"])
@pytest.mark.parametrize("order", [0, 1])
def test_equals_a_loop_that_keeps_outputs(
    order: int, granularity: str, artifact: Callable, traced: Callable, tmp_path: Path
) -> None:
    got = load(scheduled(traced, tmp_path / "s.dcc", order, granularity)).sample(**REQUEST)
    schedule = from_steps(("a",), output_unit(("a",)), COMPUTES, order)
    outputs: dict[int, np.ndarray] = {}
    with load(artifact("dit")).request(**REQUEST) as request:
        for call in range(request.calls):
            weights = schedule.actions[call][0].weights
            if weights:
                history = schedule.history(call, 0, len(weights))
                output = sum(weight * outputs[before] for weight, before in zip(weights, history, strict=True))
            else:
                outputs[call] = output = request.output(call).copy()
            request.advance(call, np.asarray(output, np.float32))
        wanted = request.sampler.latent.copy()
    assert relative_difference(got, wanted) <= TOLERANCE["float32"].loop


def test_a_call_that_is_left_out_is_one_small_engine(traced: Callable, tmp_path: Path) -> None:
    plan = load(scheduled(traced, tmp_path / "s.dcc", 1, "step")).plan
    engines = {engine.name: engine for engine in plan.engines}
    for call, (computes,) in enumerate(COMPUTES):
        weights = [len(engines[item.engine].weights) for item in plan.step_programs[plan.order[call]]]
        assert bool(sum(weights)) == computes
        assert len(weights) == 1


def test_refuses_to_skip_the_denoiser(traced: Callable) -> None:
    from dcc.passes import run_passes

    program = traced("dit")
    run_passes(program, pipeline(1))
    names = program.components
    schedule = Schedule(names, output_unit(names), ((SKIP,),) * 2)
    with pytest.raises(ScheduleError, match="cannot be skipped"):
        unroll(program, schedule)


def test_refuses_other_units_beside_it() -> None:
    names = ("a", "b")
    units = (Unit("a", 0, 0, Stores.OUTPUT), Unit("b", 1, 1))
    with pytest.raises(ScheduleError) as raised:
        from_steps(names, units, [[True, True]])
    assert raised.value.details["got"] == "the output beside other units"


def test_forms_of_a_span() -> None:
    names = ("a", "b", "c")
    span = from_steps(names, delta_units(names, (0, 2)), [[True] * 2, [False] * 2], 1)
    assert [form.units[0].stores for form in forms(span)] == ["delta", "output"]
    assert forms(span)[1].actions == span.merged().actions
    apart = from_steps(names, delta_units(names, (0, 2)), [[True, True], [False, True]], 1)
    assert forms(apart) == [apart]
    exact = from_steps(names, delta_units(names), [[True], [True]], 1, [BOTH, GuidanceMode("reuse", (1.0,))])
    assert forms(exact) == [exact]
