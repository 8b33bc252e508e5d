"""Places of a step: as few as are live at once, never shared by two live values, and nothing new in a later step."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_reference import Subject, chain, schedules, subject, write

from dcc.exports.compose import StoredWeights
from dcc.exports.step_plan import StepPlan, StepPlanner
from dcc.exports.templates import OnnxTemplate
from dcc.exports.unroll import Kept, Operation, unroll
from dcc.ir.graph import dtype_of, shape_of
from dcc.ir.program import Program
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    REUSE,
    GuidanceMode,
    Schedule,
    branch_units,
    delta_units,
    from_steps,
    full_schedule,
)
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.plan import Call, Plan, Ref, WeightSpec

MODES = (BOTH, CONDITIONAL, GuidanceMode("reuse", (1.0,)), BOTH, BOTH, GuidanceMode("reuse", (1.5, -0.5)))


PROGRAM = chain(4)


def planner_of(program: Program) -> StepPlanner:
    """A planner with empty engines, whose weights lie nowhere: what is planned does not depend on either."""
    specs = {
        (name, False): WeightSpec(name, "float32", tuple(tensor.shape), "weights.bin", 0, tensor.nbytes)
        for name, tensor in program.weights.items()
    }
    templates = {
        stage.template: OnnxTemplate(
            (), (),
            tuple(f"p{index}" for index, _ in enumerate(stage.inputs)),
            tuple(f"w{index}" for index, _ in enumerate(stage.weights)),
            tuple(f"o{index}" for index, _ in enumerate(stage.outputs)),
            frozenset(),
        )
        for stage in program.stages
    }  # fmt: skip
    return StepPlanner(program, templates, StoredWeights(specs, 0))


PLANNER = planner_of(PROGRAM)
NAMES, CALLS = PROGRAM.components, PROGRAM.calls


def out_of_phase(names: tuple[str, ...], calls: int, order: int = 1) -> Schedule:
    computes = [[(call + 2 * unit) % 3 == 0 for unit in range(len(names))] for call in range(calls)]
    return from_steps(names, branch_units(names), computes, order, MODES[:calls])


def most_live(calls: list[list[Operation]]) -> Counter[object]:
    """Kept values of each dtype and shape that exist at once, by counting in every call."""
    written: dict[Kept, int] = {}
    read: dict[Kept, int] = {}
    for number, call in enumerate(calls):
        for operation in call:
            written |= {value: number for value in operation.outputs if isinstance(value, Kept)}
            read |= {value: number for value in operation.inputs if isinstance(value, Kept)}
    most: Counter[object] = Counter()
    for number in range(len(calls)):
        live = Counter(
            (dtype_of(value.like), shape_of(value.like)) for value in read if written[value] <= number <= read[value]
        )
        most |= live
    return most


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_histories_are_as_many_as_values_live_at_once(data: st.DataObject) -> None:
    schedule = data.draw(schedules(NAMES, CALLS))
    for finest in (False, True):
        step = PLANNER.plan(schedule, finest)
        places = Counter((place.dtype, place.shape) for place in step.histories)
        assert places == most_live(unroll(PROGRAM, schedule))


def test_a_place_is_used_again() -> None:
    """Reuse needs one value a component, an order-1 forecast two, however many calls there are."""
    for order, values in ((0, 1), (1, 2)):
        for units in (branch_units(NAMES), delta_units(NAMES)):
            computes = [[call % 2 == 0] * len(units) for call in range(CALLS)]
            step = PLANNER.plan(from_steps(NAMES, units, computes, order))
            assert len(step.histories) == values * len(units)
    assert PLANNER.plan(full_schedule(NAMES, CALLS)).histories == ()


def test_equal_calls_share_a_program() -> None:
    computes = [[call % 3 == 0] * len(NAMES) for call in range(CALLS)]
    step = PLANNER.plan(from_steps(NAMES, branch_units(NAMES), computes))
    assert step.order == (0, 1, 1, 0, 1, 1)
    assert len(step.programs) == 2
    assert PLANNER.plan(full_schedule(NAMES, CALLS)).order == (0,) * CALLS
    assert PLANNER.plan(None).order == ()


def test_weights_of_combinations_are_constants() -> None:
    computes = [[call % 2 == 0] for call in range(CALLS)]
    step = PLANNER.plan(from_steps(NAMES, delta_units(NAMES), computes, 1))
    assert {name: value.tolist() for name, value in step.scalars.items()} == {
        "weight.1.5.float32": [1.5], "weight.-0.5.float32": [-0.5],
    }  # fmt: skip
    read = {ref.name for program in step.programs for call in program for ref in call.inputs if ref.kind == "constant"}
    assert read == set(step.scalars)


def test_guidance_is_told_where_it_is_not_always_both() -> None:
    assert PLANNER.plan(full_schedule(NAMES, CALLS)).guidance == ()
    told = PLANNER.plan(out_of_phase(NAMES, CALLS)).guidance
    assert [(entry.mode, entry.weights) for entry in told] == [(mode.kind, mode.weights) for mode in MODES]


def test_the_finest_engines_do_not_depend_on_the_schedule() -> None:
    plans = [
        PLANNER.plan(schedule, finest=True)
        for schedule in (
            None,
            full_schedule(NAMES, CALLS),
            out_of_phase(NAMES, CALLS, 0),
            from_steps(NAMES, delta_units(NAMES, (0, 2)), [[call % 2 == 0, call % 3 == 0] for call in range(CALLS)], 1),
        )
    ]
    with_weights = [{key for key, engine in plan.engines.items() if engine.weights} for plan in plans]
    assert with_weights[0] == with_weights[1] == with_weights[2] == with_weights[3]
    assert len(with_weights[0]) == len(NAMES) + 2
    assert all(plans[0].engines[key] is plans[2].engines[key] for key in with_weights[0])


def test_memory_between_engines_does_not_grow_with_depth() -> None:
    """The finest plan of a chain needs the stream and a few values beside it."""
    slots = []
    for depth in (3, 7):
        step = planner_of(chain(depth)).plan(None, finest=True)
        slots.append(len({buffer.slot for buffer in step.buffers}))
        assert len(step.buffers) > 2 * depth
    assert slots[0] == slots[1] <= 4


class Poison:
    """Fills every place with NaN as soon as nothing reads it any more, and halves that no call has written."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.plan, self.count = plan, count
        self.slots = {buffer.name: buffer.slot for buffer in plan.buffers}
        events = [call for program in plan.order for call in plan.step_programs[program]]
        self.live: list[set[object]] = []
        live: set[object] = set()
        for call in reversed(events):
            self.live.append(set(live))
            live -= {self._memory(ref) for ref in call.outputs}
            live |= {self._memory(ref) for ref in call.inputs}
        self.live.reverse()
        assert not {memory for memory in live if memory is not None}, "a value is read that was never written"
        self.event = 0

    def _memory(self, ref: Ref) -> object:
        if ref.kind == "buffer":
            return self.slots[ref.name]
        return ref if ref.kind == "history" else None

    def after(self, array: Callable[[Ref], np.ndarray], call: Call, both: bool) -> None:
        live = self.live[self.event]
        self.event += 1
        for ref in call.outputs:
            if not both and ref.kind == "history":
                array(ref)[self.count :] = np.nan
        for buffer in self.plan.buffers:
            if buffer.slot not in live:
                array(Ref("buffer", buffer.name)).fill(np.nan)
        for history in self.plan.histories:
            ref = Ref("history", history.name)
            if ref not in live:
                array(ref).fill(np.nan)


def poisoned(loaded: LoadedArtifact, model: Subject, images: int) -> np.ndarray:
    poison = Poison(loaded.plan, images)
    with loaded.request(**model.rows(images), seed=2) as request:
        modes = loaded.plan.guidance
        for call in range(request.calls):
            both = not modes or modes[call].mode == "both"
            output = request.output(call, lambda entry, both=both: poison.after(request.space.array, entry, both))
            request.advance(call, output)
        return request.sampler.latent.astype(np.float32)


SCHEDULES: dict[str, Callable[[tuple[str, ...], int], Schedule]] = {
    "reuse": lambda names, calls: out_of_phase(names, calls, 0),
    "forecast": lambda names, calls: out_of_phase(names, calls, 2),
    "spans": lambda names, calls: from_steps(
        names, delta_units(names, (0, 2, 3)), [[(call + u) % 3 == 0 for u in range(3)] for call in range(calls)], 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("granularity", ["step", "component"])
@pytest.mark.parametrize("what", SCHEDULES)
def test_nothing_dead_is_read(what: str, granularity: str, tmp_path: Path) -> None:
    dit = subject("dit")
    schedule = SCHEDULES[what](dit.program.components, dit.program.calls)
    loaded = write(dit, schedule, tmp_path / "a.dcc", granularity)
    wanted = loaded.sample(**dit.rows(2), seed=2)
    assert np.isfinite(wanted).all()
    assert np.array_equal(poisoned(loaded, dit, 2), wanted)


def test_the_poison_is_deadly(tmp_path: Path) -> None:
    """Where one value too many is poisoned, the samples show it."""
    dit = subject("dit")
    loaded = write(dit, SCHEDULES["reuse"](dit.program.components, dit.program.calls), tmp_path / "a.dcc")
    poison = Poison(loaded.plan, 2)
    with loaded.request(**dit.rows(2), seed=2) as request:
        request.advance(0, request.output(0))
        for history in loaded.plan.histories:
            request.space.array(Ref("history", history.name)).fill(np.nan)
        outputs = [request.output(call).copy() for call in range(1, 2)]
    assert poison.live
    assert np.isnan(outputs[0]).any()


def test_a_call_can_be_run_again(tmp_path: Path) -> None:
    """No call overwrites what it reads, so running it twice changes nothing."""
    dit = subject("dit")
    loaded = write(dit, SCHEDULES["forecast"](dit.program.components, dit.program.calls), tmp_path / "a.dcc")
    with loaded.request(**dit.rows(2), seed=2) as request:
        for call in range(request.calls):
            known = request.halves.known
            first = request.output(call).copy()
            request.halves.known = known
            second = request.output(call)
            assert np.array_equal(first, second)
            request.advance(call, second)


@pytest.mark.parametrize("granularity", ["step", "component"])
def test_no_step_allocates(granularity: str, tmp_path: Path) -> None:
    """After the first request of its size: no array, and no more than the small objects of a few Python calls."""
    dit = subject("dit")
    schedule = out_of_phase(dit.program.components, dit.program.calls)
    loaded = write(dit, schedule, tmp_path / "a.dcc", granularity)
    loaded.sample(**dit.rows(8), seed=1)
    most = []
    with loaded.request(**dit.rows(8), seed=1) as request:
        tracemalloc.start()
        try:
            for call in range(request.calls):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                request.advance(call, request.output(call))
                most.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
    latent = int(np.prod(request.sampler.shape)) * 4
    assert latent >= 6144
    assert max(most) < latent, most


def test_step_plan_of_unread_deltas() -> None:
    """The engine of a span gives its delta in every call; where nobody reads it, it goes to a buffer."""
    rows = ((COMPUTE,), (REUSE,), *[(COMPUTE,)] * (CALLS - 2))
    step: StepPlan = PLANNER.plan(Schedule(NAMES, delta_units(NAMES), rows))
    assert len(step.histories) == 1
    kinds = [{ref.kind for call in program for ref in call.outputs} for program in step.programs]
    assert [("history" in kind) for kind in kinds] == [True, False, False]
    assert any(buffer.name.startswith("unread.") for buffer in step.buffers)
