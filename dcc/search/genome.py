"""The genome of a schedule: small integers by call and component, the guidance mode of each call, what units keep.

A gene of `actions` is 0 (compute) or 1 + the order of the extrapolation that stands in. A gene of `guidance` is 0
(both halves), 1 + the order in which the difference of the halves is extrapolated, or CONDITIONAL. `branch` says
which components keep their branch and not their delta; neighbouring deltas with equal columns are one span, so a
coarse schedule is a genome with equal columns and refining it changes nothing.

Every array of genes has a schedule: `canonical` repairs it, and genomes that do the same are equal after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import ScheduleError
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    WEIGHT_LIMIT,
    Action,
    GuidanceMode,
    Schedule,
    Stores,
    Unit,
    extrapolation,
    forecast,
)

Array = np.ndarray[Any, np.dtype[Any]]

COMPUTES = 0
HIGHEST_ORDER = 2
DROPS_GUIDANCE = 3  # after both (0), reuse (1) and order 1 (2)
FINEST_POOL = 8  # groups that `features` tells apart


@dataclass(frozen=True)
class Space:
    """What the genomes of one search have in common.

    `orders` are the orders that a search may use. `kinds` says which components are alike (attention, MLP), so that
    moves can act on all of a kind. `starts` are the levels from coarse to fine, each the first components of its
    groups; by default 1, 2, 4, ... groups of equal size and at last every component. `drops_guidance` allows calls
    without guidance.
    """

    components: tuple[str, ...]
    calls: int
    guided: bool = False
    orders: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()
    drops_guidance: bool = True

    def __post_init__(self) -> None:
        count = len(self.components)
        levels = self.starts or default_levels(count)
        valid = all(
            level and level[0] == 0 and list(level) == sorted(set(level)) and level[-1] < count for level in levels
        )
        if not count or self.calls < 1 or not valid or (self.kinds and len(self.kinds) != count):
            got = f"{count} components, {self.calls} calls, {len(self.kinds)} kinds, levels {levels}"
            raise ScheduleError("there is nothing to search", got=got, want="components, calls, groups that begin at 0")
        if not self.orders or not set(self.orders) <= set(range(HIGHEST_ORDER + 1)):
            raise ScheduleError("unknown forecast orders", got=self.orders, want=f"some of 0 to {HIGHEST_ORDER}")
        object.__setattr__(self, "starts", tuple(tuple(level) for level in levels))

    @property
    def size(self) -> int:
        """Genes of one genome."""
        return self.calls * len(self.components) + self.calls + len(self.components)

    def groups(self, level: int) -> list[Array]:
        """The components of each group of a level, as indices."""
        ends = [*self.starts[level][1:], len(self.components)]
        return [np.arange(first, end) for first, end in zip(self.starts[level], ends, strict=True)]

    def alike(self) -> list[Array]:
        """The components of each kind, where there is more than one kind."""
        names = sorted(set(self.kinds))
        return [np.flatnonzero(np.array(self.kinds) == name) for name in names] if len(names) > 1 else []


def default_levels(components: int) -> tuple[tuple[int, ...], ...]:
    """1, 2, 4, 8 groups of nearly equal size as far as there are more components, then each component alone."""
    counts = [count for count in (1, 2, 4, 8) if count < components]
    return tuple(tuple(index * components // count for index in range(count)) for count in [*counts, components])


@dataclass(frozen=True, eq=False)
class Genome:
    """Genes: `actions` int8 [..., calls, components], `guidance` int8 [..., calls], `branch` bool [..., components].

    Leading dimensions make it a stack of genomes.
    """

    actions: Array
    guidance: Array
    branch: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("actions", "guidance", "branch")
        )

    def __hash__(self) -> int:
        return hash(self.vector().tobytes())

    def vector(self) -> Array:
        """All genes in a row, int64 [..., size]: what pymoo's operators exchange."""
        cells = self.actions.reshape(*self.actions.shape[:-2], -1)
        return np.concatenate([cells, self.guidance, self.branch], axis=-1).astype(np.int64)

    @staticmethod
    def of_vector(space: Space, vector: Array) -> Genome:
        cells = space.calls * len(space.components)
        actions = vector[..., :cells].reshape(*vector.shape[:-1], space.calls, len(space.components))
        return Genome(
            actions.astype(np.int8),
            vector[..., cells : cells + space.calls].astype(np.int8),
            vector[..., cells + space.calls :].astype(bool),
        )


def canonical(space: Space, genome: Genome) -> Genome:
    """The genome, or stack, with every gene as it takes effect: genomes of equal schedules become equal.

    The first call computes and runs both halves; an order that the history cannot serve is lowered; a component
    that always computes keeps nothing.
    """
    actions = np.clip(genome.actions, COMPUTES, HIGHEST_ORDER + 1).astype(np.int8)
    guidance = np.clip(genome.guidance, 0, DROPS_GUIDANCE).astype(np.int8)
    if not space.guided:
        guidance[...] = 0
    elif not space.drops_guidance:
        guidance[guidance == DROPS_GUIDANCE] = 1
    actions[..., 0, :], guidance[..., 0] = COMPUTES, 0
    both = guidance == 0
    differences = np.minimum(_before(both, -1), HIGHEST_ORDER).astype(np.int8)
    guidance = np.where(guidance < DROPS_GUIDANCE, np.minimum(guidance, differences), guidance)
    guidance[both] = 0
    computed = actions == COMPUTES
    known = np.where(both[..., None], _before(computed & both[..., None], -2), _before(computed, -2))
    # An order k needs k + 1 values, and its gene is k + 1. The first call computed, so that there is one.
    actions = np.minimum(actions, np.minimum(np.maximum(known, 1), HIGHEST_ORDER + 1)).astype(np.int8)
    return Genome(actions, guidance, genome.branch & (actions != COMPUTES).any(axis=-2))


def to_schedule(space: Space, genome: Genome, name: str = "") -> Schedule:
    """The schedule of any genome, repaired as `canonical` does; spans are merged. Equal genomes give equal digests."""
    genome = canonical(space, genome)
    modes = _modes(genome.guidance)
    columns: dict[bytes, tuple[Action, ...]] = {}
    units: list[Unit] = []
    rows: list[tuple[Action, ...]] = []
    for index, component in enumerate(space.components):
        column = genome.actions[:, index]
        actions = columns.setdefault(column.tobytes(), ()) or _column(column, genome.guidance)
        columns[column.tobytes()] = actions
        stores = Stores.BRANCH if genome.branch[index] else Stores.DELTA
        if units and units[-1].stores is stores is Stores.DELTA and rows[-1] == actions:
            first = units[-1].first
            units[-1] = Unit(f"{space.components[first]}..{component}", first, index)
        else:
            units.append(Unit(component, index, index, stores))
            rows.append(actions)
    return Schedule(space.components, tuple(units), tuple(zip(*rows, strict=True)), modes, name=name)


def from_schedule(space: Space, schedule: Schedule) -> Genome:
    """The nearest genome: each combination becomes the order whose weights differ least from it, skip becomes reuse.

    Raises ScheduleError when components or calls differ.
    """
    if schedule.components != space.components or schedule.calls != space.calls:
        got = f"{len(schedule.components)} components, {schedule.calls} calls"
        want = f"the search's {len(space.components)} components and {space.calls} calls"
        raise ScheduleError("the schedule is for another program", at=schedule.name or None, got=got, want=want)
    actions = np.zeros((space.calls, len(space.components)), dtype=np.int8)
    branch = np.zeros(len(space.components), dtype=bool)
    for index, unit in enumerate(schedule.units):
        members = list(unit.members)
        branch[members] = unit.stores is Stores.BRANCH
        for call, row in enumerate(schedule.actions):
            if not row[index].computes:
                order = _nearest_order(row[index].weights, schedule.history(call, index), call, HIGHEST_ORDER)
                actions[call, members] = 1 + order
    guidance = np.zeros(space.calls, dtype=np.int8)
    for call, mode in enumerate(schedule.guidance):
        if mode.kind == "conditional":
            guidance[call] = DROPS_GUIDANCE
        elif mode.kind == "reuse":
            guidance[call] = 1 + _nearest_order(mode.weights, schedule.difference_history(call), call, 1)
    return canonical(space, Genome(actions, guidance, branch))


def coarsen(space: Space, genome: Genome, level: int) -> Genome:
    """Every group of the level acts as one span: as most of its components do, and it keeps its delta."""
    actions = genome.actions.copy()
    for group in space.groups(level):
        codes = np.arange(HIGHEST_ORDER + 2)
        votes = (genome.actions[:, group, None] == codes).sum(axis=1)
        actions[:, group] = votes.argmax(axis=1)[:, None]
    return canonical(space, Genome(actions, genome.guidance, np.zeros_like(genome.branch)))


def staleness(genome: Genome) -> tuple[Array, Array]:
    """Calls since the newest value in use: [..., calls, components] (0 where computed), and guidance's [..., calls].

    The genome, or stack, is canonical. A call without guidance counts as long as the whole history.
    """
    calls = np.arange(genome.guidance.shape[-1])
    both = genome.guidance == 0
    computed = genome.actions == COMPUTES
    newest = np.where(
        both[..., None],
        _latest(computed & both[..., None], calls[:, None], -2),
        _latest(computed, calls[:, None], -2),
    )
    guided = calls - np.where(genome.guidance == DROPS_GUIDANCE, 0, _latest(both, calls, -1))
    return calls[:, None] - newest, guided


def features(space: Space, genome: Genome) -> Array:
    """What a model of the loss sees of a canonical genome, or stack, float64 [..., features].

    By call and order, how stale the components are (log2 of one more than the age), averaged over all components and
    over groups of them; the same for guidance; which groups keep branches.
    """
    ages, guided = staleness(genome)
    stale = np.log2(1 + ages)
    pools = _pools(len(space.components))
    lead = genome.guidance.shape[:-1]
    parts = [
        (np.where(genome.actions == 1 + order, stale, 0) @ pools).reshape(*lead, -1)
        for order in range(HIGHEST_ORDER + 1)
    ]
    parts.append(genome.branch @ pools)
    if space.guided:
        parts += [np.log2(1 + guided) * (genome.guidance == mode) for mode in range(1, DROPS_GUIDANCE + 1)]
    return np.concatenate(parts, axis=-1)


def trend(space: Space, genome: Genome) -> Array:
    """The few figures that say how much a canonical genome, or stack, leaves out, float64 [..., 6]."""
    ages, guided = staleness(genome)
    share = (genome.actions == COMPUTES).mean(axis=(-2, -1))
    logs = np.log2(1 + ages).mean(axis=-1).sum(axis=-1)
    powers = np.sqrt((ages.mean(axis=-1) ** 1.5).sum(axis=-1))
    guidance = np.log2(1 + guided).sum(axis=-1)
    columns = [np.ones_like(share), np.log(share + 0.02), share, np.log1p(logs), powers, guidance]
    return np.stack(columns, axis=-1)


def work(space: Space, genome: Genome) -> Array:
    """What a model of the latency sees of a canonical genome, or stack, float64 [..., components + 3].

    Rows computed of each component, rows run at all, extrapolations of each unit, and a constant; a row is half a
    call. Latency is affine in these where engines cost what they compute.
    """
    halves = np.where(genome.guidance == 0, 2.0, 1.0)
    computed = ((genome.actions == COMPUTES) * halves[..., None]).sum(axis=-2)
    own = np.ones(genome.branch.shape, dtype=bool)
    own[..., 1:] = genome.branch[..., 1:] | genome.branch[..., :-1]
    own[..., 1:] |= (genome.actions[..., 1:] != genome.actions[..., :-1]).any(axis=-2)
    terms = ((genome.actions * halves[..., None]).sum(axis=-2) * own).sum(axis=-1) / len(space.components)
    scale = 2.0 * space.calls
    rest = np.stack([halves.sum(axis=-1), terms, np.full(terms.shape, scale)], axis=-1)
    return np.concatenate([computed, rest], axis=-1) / scale


def _before(flags: Array, axis: int) -> Array:
    """How many flags are set before each place of the axis."""
    return np.cumsum(flags, axis=axis) - flags


def _latest(flags: Array, calls: Array, axis: int) -> Array:
    """The newest call up to each call where the flag is set, 0 where none is."""
    return np.maximum.accumulate(np.where(flags, calls, 0), axis=axis)


@functools.cache
def _pools(components: int) -> Array:
    """Columns that average over all components and over 4 and 8 groups of them, [components, columns]."""
    columns = []
    for count in sorted({1, min(4, components), min(FINEST_POOL, components)}):
        for group in np.array_split(np.arange(components), count):
            column = np.zeros(components)
            # Each size of group weighs as much in a distance as the average over all does.
            column[group] = 1 / (len(group) * np.sqrt(count))
            columns.append(column)
    return np.stack(columns, axis=1)


def _modes(genes: Array) -> tuple[GuidanceMode, ...]:
    modes: list[GuidanceMode] = []
    both: list[int] = []
    for call, gene in enumerate(genes):
        if gene == 0:
            modes.append(BOTH)
            both.insert(0, call)
        elif gene == DROPS_GUIDANCE:
            modes.append(CONDITIONAL)
        else:
            modes.append(GuidanceMode("reuse", tuple(float(value) for value in _weights(both, call, int(gene) - 1))))
    return tuple(modes)


def _column(genes: Array, guidance: Array) -> tuple[Action, ...]:
    actions: list[Action] = []
    computed: list[int] = []
    for call, gene in enumerate(genes):
        if gene == COMPUTES:
            actions.append(COMPUTE)
            computed.insert(0, call)
        else:
            known = computed if guidance[call] else [earlier for earlier in computed if guidance[earlier] == 0]
            actions.append(forecast(_weights(known, call, int(gene) - 1)))
    return tuple(actions)


def _weights(history: Sequence[int], call: int, order: int) -> tuple[float, ...]:
    """Weights of the highest order up to `order` whose weights a schedule may hold."""
    for lower in range(order, -1, -1):
        weights = extrapolation(history, call, lower)
        if all(abs(weight) <= WEIGHT_LIMIT for weight in weights):
            break
    return weights


def _nearest_order(weights: Sequence[float], history: Sequence[int], call: int, highest: int) -> int:
    def distance(order: int) -> float:
        other = extrapolation(history, call, order)
        width = max(len(other), len(weights))
        padded = [list(values) + [0.0] * (width - len(values)) for values in (weights, other)]
        return sum(abs(left - right) for left, right in zip(*padded, strict=True))

    return min(range(min(highest, max(len(history) - 1, 0)) + 1), key=distance) if weights else 0
