"""Genomes: any array of genes has a valid schedule, equal schedules have equal genomes, seeds survive the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.errors import ScheduleError
from dcc.ir.schedule import (
    BOTH,
    CONDITIONAL,
    REUSE_DIFFERENCE,
    SKIP,
    Action,
    GuidanceMode,
    Schedule,
    branch_units,
    delta_units,
    from_steps,
    full_schedule,
)
from dcc.search.genome import (
    DROPS_GUIDANCE,
    Genome,
    Space,
    canonical,
    coarsen,
    default_levels,
    features,
    from_schedule,
    staleness,
    to_schedule,
    work,
)
from dcc.search.moves import MOVES, cross, drawn, mutate

MANY = settings(max_examples=60)


def space_of(components: int = 5, calls: int = 7, guided: bool = True, **options: object) -> Space:
    return Space(tuple(f"c{index}" for index in range(components)), calls, guided, **options)  # type: ignore[arg-type]


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    return space_of(
        draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.booleans()), drops_guidance=draw(st.booleans())
    )


def random_genome(space: Space, seed: int, computes: float = 0.3) -> Genome:
    random = np.random.default_rng(seed)
    actions = random.integers(1, 4, size=(space.calls, len(space.components)))
    actions[random.random(actions.shape) < computes] = 0
    guidance = random.integers(0, 4, size=space.calls)
    return Genome(actions.astype(np.int8), guidance.astype(np.int8), random.random(len(space.components)) < 0.4)


@MANY
@given(spaces(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_every_genome_has_a_valid_schedule(space: Space, seed: int, computes: float) -> None:
    genome = random_genome(space, seed, computes)
    schedule = to_schedule(space, genome)  # Schedule checks itself when it is made
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert all(action.computes for action in schedule.actions[0]) and schedule.guidance[0] == BOTH
    assert schedule.merged().units == schedule.units
    repaired = canonical(space, genome)
    assert canonical(space, repaired) == repaired
    # What the genome says is what the schedule does.
    components = schedule.component_actions()
    for call in range(space.calls):
        for index, action in enumerate(components[call]):
            assert action.computes == (repaired.actions[call, index] == 0)
            assert len(action.weights) == repaired.actions[call, index]


@MANY
@given(spaces(), st.integers(0, 2**32 - 1))
def test_a_schedule_finds_its_genome_again(space: Space, seed: int) -> None:
    genome = canonical(space, random_genome(space, seed))
    again = from_schedule(space, to_schedule(space, genome))
    assert to_schedule(space, again).digest() == to_schedule(space, genome).digest()


@MANY
@given(spaces(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_equal_schedules_have_equal_genomes(space: Space, first: int, second: int) -> None:
    genomes = [canonical(space, random_genome(space, seed, 0.8)) for seed in (first, second)]
    schedules = [to_schedule(space, genome) for genome in genomes]
    assert (genomes[0] == genomes[1]) == (schedules[0].digest() == schedules[1].digest())


@MANY
@given(spaces(), st.integers(0, 2**32 - 1))
def test_a_stack_is_its_genomes(space: Space, seed: int) -> None:
    genomes = [random_genome(space, seed + index) for index in range(3)]
    stack = canonical(space, Genome.of_vector(space, np.stack([genome.vector() for genome in genomes])))
    for index, genome in enumerate(genomes):
        alone = canonical(space, genome)
        assert np.array_equal(stack.vector()[index], alone.vector())
        assert np.allclose(features(space, stack)[index], features(space, alone))
        assert np.allclose(work(space, stack)[index], work(space, alone))


@MANY
@given(spaces(), st.integers(0, 2**32 - 1))
def test_staleness_is_the_age_of_the_newest_value(space: Space, seed: int) -> None:
    genome = canonical(space, random_genome(space, seed))
    schedule = to_schedule(space, genome)
    ages, guided = staleness(genome)
    owner = [index for index, unit in enumerate(schedule.units) for _ in unit.members]
    for call in range(space.calls):
        for component, unit in enumerate(owner):
            computed = schedule.actions[call][unit].computes
            assert ages[call, component] == (0 if computed else call - schedule.history(call, unit)[0])
        if schedule.guidance[call].kind == "reuse":
            assert guided[call] == call - schedule.difference_history(call)[0]


@MANY
@given(spaces(), st.integers(0, 2**32 - 1))
def test_moves_move_and_stay_valid(space: Space, seed: int) -> None:
    random = np.random.default_rng(seed)
    genome = canonical(space, random_genome(space, seed))
    for move, _ in MOVES:
        copy = Genome(genome.actions.copy(), genome.guidance.copy(), genome.branch.copy())
        target = random.choice(len(space.components), size=1 + len(space.components) // 2, replace=False)
        to_schedule(space, move(space, copy, target, random))
    left, right = cross(space, genome, canonical(space, random_genome(space, seed + 1)), random)
    to_schedule(space, left), to_schedule(space, right)


def test_a_move_seldom_leaves_a_schedule_as_it_was() -> None:
    # ECAD's mutation touched about one bit in one of twenty children.
    space = space_of(16, 20)
    random = np.random.default_rng(0)
    parent = from_schedule(space, every(space, 3, order=1))
    digest = to_schedule(space, parent).digest()
    children = [mutate(space, parent, np.arange(16), random) for _ in range(200)]
    assert sum(to_schedule(space, child).digest() != digest for child in children) > 180


def test_a_swap_keeps_the_cost() -> None:
    space = space_of(16, 20, guided=False)
    random = np.random.default_rng(0)
    genome = from_schedule(space, every(space, 3, order=1))
    for group in space.groups(2):
        moved = MOVES[0][0](space, genome, group, random)
        assert np.array_equal((moved.actions == 0).sum(axis=0), (genome.actions == 0).sum(axis=0))


def every(space: Space, interval: int, order: int = 0, spans: bool = False, **options: object) -> Schedule:
    units = delta_units(space.components) if spans else branch_units(space.components)
    steps = [[call % interval == 0] * len(units) for call in range(space.calls)]
    return from_steps(space.components, units, steps, order, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_classic_schedules_are_represented_exactly(spans: bool, order: int) -> None:
    space = space_of(6, 12)
    modes = [BOTH] * 5 + [REUSE_DIFFERENCE, BOTH, GuidanceMode("reuse", (1.5, -0.5)), CONDITIONAL] + [BOTH] * 3
    schedule = every(space, 3, order, spans, guidance=modes)
    assert to_schedule(space, from_schedule(space, schedule)).digest() == schedule.digest()


def test_the_nearest_order_stands_for_other_weights() -> None:
    space = space_of(2, 4, guided=False)
    units = delta_units(space.components)
    compute = full_schedule(space.components, 1).actions[0][0]
    rows = [[compute], [compute], [Action("combine", (1.9, -0.8))], [SKIP]]
    genome = from_schedule(space, Schedule(space.components, units, tuple(tuple(row) for row in rows)))
    assert genome.actions[:, 0].tolist() == [0, 0, 2, 1]


def test_a_schedule_of_another_program_is_refused() -> None:
    space = space_of(4, 6)
    for other in (full_schedule(("x", "y"), 6), full_schedule(space.components, 5)):
        with pytest.raises(ScheduleError, match="another program"):
            from_schedule(space, other)


def test_forecast_weights_are_those_of_the_history_that_is_there() -> None:
    space = space_of(1, 6)
    actions = np.array([[0], [0], [3], [0], [3], [3]], dtype=np.int8)
    genome = Genome(actions, np.array([0, 1, 0, 0, 0, 1], dtype=np.int8), np.zeros(1, dtype=bool))
    schedule = to_schedule(space, genome)
    # Call 1 ran one half: call 2 has one value of both, call 5 has all three.
    assert [len(row[0].weights) for row in schedule.actions] == [0, 0, 1, 0, 2, 3]
    assert schedule.actions[4][0].weights == pytest.approx((4 / 3, -1 / 3))


def test_guidance_is_left_alone_where_there_is_none() -> None:
    space = space_of(3, 5, guided=False)
    assert set(to_schedule(space, random_genome(space, 1)).guidance) == {BOTH}
    space = space_of(3, 5, drops_guidance=False)
    genome = Genome(
        np.zeros((5, 3), dtype=np.int8), np.full(5, DROPS_GUIDANCE, dtype=np.int8), np.zeros(3, dtype=bool)
    )
    assert [mode.kind for mode in to_schedule(space, genome).guidance] == ["both"] + ["reuse"] * 4


def test_coarsening_gives_spans() -> None:
    space = space_of(8, 9)
    genome = canonical(space, random_genome(space, 3))
    for level, starts in enumerate(space.starts):
        assert len(to_schedule(space, coarsen(space, genome, level)).units) <= len(starts)
    assert default_levels(5) == ((0,), (0, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4))


@pytest.mark.parametrize(
    "options",
    [{"starts": ((1, 2),)}, {"starts": ((0, 9),)}, {"kinds": ("attention",)}, {"orders": (3,)}, {"calls": 0}],
)
def test_a_space_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ScheduleError):
        Space(**{"components": ("a", "b", "c"), "calls": 4, **options})  # type: ignore[arg-type]


@MANY
@given(spaces(), st.data())
def test_drawn_genomes_compute_as_often_as_asked(space: Space, data: st.DataObject) -> None:
    computed = data.draw(st.integers(1, space.calls))
    genome = drawn(space, computed, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert canonical(space, genome) == genome
    rows = genome.actions == 0
    assert (rows.all(axis=1) == rows.any(axis=1)).all(), "the whole stack does the same in every call"
    calls = np.flatnonzero(rows[:, 0])
    assert calls[0] == 0 and len(calls) <= computed
    # Two neighbouring runs may draw the same call, never more.
    assert len(calls) >= 1 + (computed - 1) // 2
