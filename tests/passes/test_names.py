"""Names of proposed schedules: settings that make other schedules have other names, so that one can be picked."""

from __future__ import annotations

from typing import Any

import pytest
from subjects import subject

from dcc.passes import (
    DeltaDit,
    Fora,
    GuidanceInterval,
    GuidanceReuse,
    MagCache,
    OptimalSteps,
    ResidualThreshold,
    SmoothCache,
    TaylorSeer,
)
from dcc.search.study import classics, seeds


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (TaylorSeer(3), "taylorseer every 3, order 1"),
        (TaylorSeer(3, stores="delta"), "taylorseer every 3, order 1, stores delta"),
        (TaylorSeer(3, first_enhance=1), "taylorseer every 3, order 1, first enhance 1"),
        (TaylorSeer(3, 2, 1, "delta"), "taylorseer every 3, order 2, stores delta, first enhance 1"),
        (SmoothCache(0.25), "smoothcache below 0.25"),
        (SmoothCache(0.25, longest=2), "smoothcache below 0.25, longest 2"),
        (MagCache(order=1), "magcache up to 0.06, order 1"),
        (MagCache(longest=2, retention=0.1), "magcache up to 0.06, order 0, longest 2, retention 0.1"),
        (Fora(3), "fora every 3"),
        (Fora(3, ("attention", "mlp")), "fora every 3, kinds attention and mlp"),
        (DeltaDit(boundary=0.5), "delta-dit every 2, 3 of 4 blocks, boundary 0.5"),
        (ResidualThreshold(threshold=0.25), "first_block below 0.25, order 0"),
        (
            ResidualThreshold("stack", 0.25, 2, 3, 1, True),
            "stack below 0.25, order 1, warmup 2, max consecutive 3, compute last True",
        ),
        (OptimalSteps(4), "optimal-steps 4 of 10, order 1"),
        (OptimalSteps(4, groups=2), "optimal-steps 4 of 10, order 1, groups 2"),
        (GuidanceReuse(3), "guidance-reuse every 3, order 0"),
        (GuidanceReuse(3, 1, 0.0), "guidance-reuse every 3, order 1, start 0.0"),
        (GuidanceInterval(0.0, 0.6, "fraction"), "guidance-interval 0 to 0.6, fraction"),
    ],
)
def test_a_name_has_what_is_not_at_its_default(step: Any, name: str) -> None:
    assert step.propose(subject()).name == name


def test_what_a_search_starts_from_and_compares_with_has_names_of_its_own() -> None:
    one = subject()
    for found in ([item.schedule for item in classics(one)], seeds(one)):
        assert len(found) > 5
        assert len({schedule.name for schedule in found}) == len({schedule.digest() for schedule in found})
