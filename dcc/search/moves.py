"""Moves in the space of schedules: small changes that a search makes, most of them at equal cost.

A move acts on a *target*, a set of components (all, a group, a kind, one), and really changes something whenever
it can: a bit flip in a genome of a thousand genes seldom does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dcc.search.genome import COMPUTES, DROPS_GUIDANCE, Array, Genome, Space, canonical

ATTEMPTS = 8


def mutate(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """The genome after one random move on the target; other genes, unless eight tries failed. Not canonical."""
    names, weights = zip(*((move, weight) for move, weight in MOVES if _fits(space, move)), strict=True)
    chances = np.array(weights) / sum(weights)
    for _ in range(ATTEMPTS):
        move = names[random.choice(len(names), p=chances)]
        copy = Genome(genome.actions.copy(), genome.guidance.copy(), genome.branch.copy())
        changed = move(space, copy, target, random)
        if changed != genome:
            return changed
    return genome


def cross(space: Space, left: Genome, right: Genome, random: np.random.Generator) -> tuple[Genome, Genome]:
    """Two children that exchange a range of calls, with the guidance of those calls; what units keep stays."""
    first, end = sorted(random.choice(space.calls + 1, size=2, replace=False))
    children = []
    for inner, outer in ((left, right), (right, left)):
        actions, guidance = outer.actions.copy(), outer.guidance.copy()
        actions[first:end], guidance[first:end] = inner.actions[first:end], inner.guidance[first:end]
        children.append(Genome(actions, guidance, outer.branch.copy()))
    return children[0], children[1]


def drawn(space: Space, computed: int, random: np.random.Generator) -> Genome:
    """All components compute in `computed` calls, the first and one drawn from each of equal runs of calls.

    In the others they are extrapolated in an order that is drawn. What a search starts from that is told nothing.
    """
    edges = np.linspace(1, space.calls, computed)
    calls = [0, *(int(random.integers(math.floor(low), math.ceil(high))) for low, high in itertools.pairwise(edges))]
    actions = np.full((space.calls, len(space.components)), 1 + random.choice(space.orders), np.int8)
    actions[calls] = COMPUTES
    return canonical(space, Genome(actions, np.zeros(space.calls, np.int8), np.zeros(len(space.components), bool)))


def swap(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """A call exchanges what it does with a neighbour: a computed call moves, the cost stays."""
    computed = genome.actions[:, target] == COMPUTES
    gap = 1 + int(random.random() < 0.35)
    calls = 1 + np.flatnonzero((computed[1:-gap] != computed[1 + gap :]).any(axis=1))
    if len(calls):
        left = int(random.choice(calls))
        right = left + gap
        one, other = np.array([left, right]), np.array([right, left])
        genome.actions[np.ix_(one, target)] = genome.actions[np.ix_(other, target)]
    return genome


def add(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """One more call computes the target."""
    calls = np.flatnonzero((genome.actions[:, target] != COMPUTES).any(axis=1))
    if len(calls):
        genome.actions[random.choice(calls), target] = COMPUTES
    return genome


def remove(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """One call less computes the target; what stands in is of an order that the target uses."""
    calls = 1 + np.flatnonzero((genome.actions[1:, target] == COMPUTES).any(axis=1))
    if len(calls):
        genome.actions[random.choice(calls), target] = _order_in_use(space, genome, target, random)
    return genome


def relocate(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """A computed call moves anywhere."""
    return add(space, remove(space, genome, target, random), target, random)


def reorder(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """The target is extrapolated with another order: in one run between computed calls, or everywhere."""
    stale = (genome.actions[:, target] != COMPUTES).any(axis=1)
    calls = np.flatnonzero(stale)
    if not len(calls):
        return genome
    first = end = int(random.choice(calls))
    if random.random() < 0.3:
        first, end = 1, space.calls
    else:
        while stale[first - 1]:
            first -= 1
        while end < space.calls and stale[end]:
            end += 1
    block = np.ix_(np.arange(first, end), target)
    order = 1 + random.choice(space.orders)
    genome.actions[block] = np.where(genome.actions[block] == COMPUTES, COMPUTES, order)
    return genome


def guide(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """One call is guided in another way, or exchanges it with a neighbour."""
    modes = genome.guidance
    calls = 1 + np.flatnonzero((modes[1:-1] == 0) != (modes[2:] == 0))
    if len(calls) and random.random() < 0.5:
        call = int(random.choice(calls))
        modes[[call, call + 1]] = modes[[call + 1, call]]
    elif space.calls > 1:
        # Leaving guidance out is seldom right, and the front shows where.
        choices, chances = [0, 1, 2, DROPS_GUIDANCE], [0.4, 0.25, 0.25, 0.1]
        modes[random.integers(1, space.calls)] = random.choice(choices, p=chances)
    return genome


def guide_range(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """In a range of calls both halves run only in every first, second or third call that computes.

    One call at a time gains little: values of one half are of no use to a later call that runs both.
    """
    first, end = sorted(random.choice(space.calls + 1, size=2, replace=False))
    calls = np.arange(first, end)
    computed = calls[(genome.actions[first:end] == COMPUTES).any(axis=1)]
    genome.guidance[first:end] = 1 + int(random.random() < 0.5)
    genome.guidance[computed[:: random.integers(1, 4)]] = 0
    return genome


def keep(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """The target keeps branches in place of deltas, or the other way round."""
    return replace(genome, branch=_changed(genome.branch, target, not genome.branch[target].all()))


def align(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> Genome:
    """The target does in one call, or in all, what one component does, so that spans can form."""
    source = random.integers(genome.actions.shape[1])
    calls = np.arange(space.calls) if random.random() < 0.3 else random.integers(space.calls, size=1)
    genome.actions[np.ix_(calls, target)] = genome.actions[calls, source][:, None]
    return genome


Move = Callable[[Space, Genome, Array, np.random.Generator], Genome]
MOVES: tuple[tuple[Move, float], ...] = (
    (swap, 0.34), (add, 0.14), (remove, 0.14), (relocate, 0.10), (reorder, 0.10), (guide, 0.08), (guide_range, 0.06),
    (keep, 0.04), (align, 0.04),
)  # fmt: skip


def _fits(space: Space, move: Move) -> bool:
    return space.guided or move not in (guide, guide_range)


def _order_in_use(space: Space, genome: Genome, target: Array, random: np.random.Generator) -> int:
    cells = genome.actions[:, target]
    used = cells[(cells != COMPUTES) & np.isin(cells - 1, space.orders)]
    return int(random.choice(used)) if len(used) else 1 + int(random.choice(space.orders))


def _changed(flags: Array, target: Array, value: bool) -> Array:
    copy = flags.copy()
    copy[target] = value
    return copy
