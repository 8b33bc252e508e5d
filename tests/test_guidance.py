"""Guidance per call: which rows run, how halves are mixed, and which earlier differences stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from example_artifact import WIDTH, example_plan, stored_nowhere
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.runtime.guidance import Halves
from dcc.runtime.plan import CallGuidance

PLAN = example_plan(stored_nowhere())
COUNT = 3
random = np.random.default_rng(11)


class Space:
    """A workspace whose denoiser returns what the test drew, and records what it was asked for."""

    def __init__(self, guidance: Sequence[CallGuidance], outputs: np.ndarray, rows: int) -> None:
        self.plan = replace(PLAN, guidance=tuple(guidance), order=tuple(range(len(outputs))))
        self.rows = rows
        self.inputs = {item.name: np.zeros((rows, WIDTH), np.float32) for item in PLAN.inputs}
        self.output = np.zeros((rows, WIDTH), np.float32)
        self.asked: list[tuple[int, int, int | None]] = []
        self.latents: list[np.ndarray] = []
        self._outputs = outputs

    def step(self, call: int, program: int, rows: int | None = None, told: Any = None) -> np.ndarray:
        self.asked.append((call, program, rows))
        self.latents.append(self.inputs["x"].copy())
        count = self.rows if rows is None else rows
        self.output[:count] = self._outputs[call, :count]
        self.output[count:] = np.nan
        return self.output[:count]


def drawn(calls: int) -> np.ndarray:
    return random.standard_normal((calls, 2 * COUNT, WIDTH)).astype(np.float32)


def halves(space: Space, scale: float, channels: int | None = None) -> Halves:
    return Halves(space, COUNT, scale, channels)  # type: ignore[arg-type]


def run(space: Space, scale: float, channels: int | None = None) -> list[np.ndarray]:
    guide = halves(space, scale, channels)
    return [guide.run(call).copy() for call in range(len(space.plan.order))]


def mode(kind: str, *weights: float) -> CallGuidance:
    return CallGuidance(kind, weights)


def plain(outputs: np.ndarray, modes: Sequence[CallGuidance], scale: float, channels: int | None) -> list[np.ndarray]:
    """The formulas of the text in float64."""
    differences: list[np.ndarray] = []
    found = []
    for output, entry in zip(outputs.astype(np.float64), modes, strict=True):
        wanted, null = output[:COUNT], output[COUNT:]
        mixed = wanted.copy()
        if entry.mode == "both":
            differences.insert(0, (wanted - null)[:, :channels])
            mixed[:, :channels] = null[:, :channels] + scale * differences[0]
        for weight, difference in zip(entry.weights, differences, strict=False):
            mixed[:, :channels] += (scale - 1) * weight * difference
        found.append(mixed)
    return found


def test_without_modes_every_call_runs_both_halves() -> None:
    outputs = drawn(3)
    space = Space((), outputs, 2 * COUNT)
    got = run(space, 2.5)
    assert space.asked == [(0, 0, None), (1, 1, None), (2, 2, None)]
    for one, wanted in zip(got, plain(outputs, [mode("both")] * 3, 2.5, None), strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5)


def test_a_conditional_call_runs_the_first_rows_alone() -> None:
    outputs = drawn(3)
    space = Space([mode("both"), mode("conditional"), mode("both")], outputs, 2 * COUNT)
    got = run(space, 3.0)
    assert [rows for _, _, rows in space.asked] == [None, COUNT, None]
    assert np.array_equal(got[1], outputs[1, :COUNT])


def test_the_second_half_has_the_latents_of_the_first() -> None:
    outputs = drawn(2)
    space = Space([mode("both"), mode("conditional")], outputs, 2 * COUNT)
    guide = halves(space, 2.0)
    for call in range(2):
        space.inputs["x"][:COUNT] = call + 1
        guide.run(call)
    assert np.all(space.latents[0] == 1)
    assert np.all(space.latents[1][:COUNT] == 2)


def test_a_reused_difference_of_one_call_is_that_call_s() -> None:
    """With equal outputs in both calls, a reused difference gives what both halves gave."""
    outputs = np.repeat(drawn(1), 2, axis=0)
    got = run(Space([mode("both"), mode("reuse", 1.0)], outputs, 2 * COUNT), 4.0)
    np.testing.assert_allclose(got[1], got[0], atol=2e-5)


def test_an_unguided_request_runs_every_call_once_whatever_the_modes() -> None:
    modes = [mode("both"), mode("conditional"), mode("reuse", 1.0)]
    outputs = drawn(3)
    space = Space(modes, outputs, COUNT)
    got = run(space, 1.0)
    assert space.asked == [(0, 0, None), (1, 1, None), (2, 2, None)]
    assert np.array_equal(np.stack(got), outputs[:, :COUNT])


def test_each_request_starts_without_differences() -> None:
    outputs = drawn(4)
    space = Space([mode("both"), mode("both"), mode("reuse", 1.5, -0.5), mode("both")], outputs, 2 * COUNT)
    assert np.array_equal(np.stack(run(space, 2.0)), np.stack(run(space, 2.0)))


@st.composite
def modes(draw: st.DrawFn) -> list[CallGuidance]:
    found: list[CallGuidance] = []
    for _ in range(draw(st.integers(1, 9))):
        known = sum(entry.mode == "both" for entry in found)
        kind = draw(st.sampled_from(["both", "conditional", *(["reuse"] if known else [])]))
        count = draw(st.integers(1, min(known, 4))) if kind == "reuse" else 0
        found.append(mode(kind, *(draw(st.integers(-8, 8)) / 4 for _ in range(count))))
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(modes(), st.sampled_from([0.0, 1.5, 7.5, -2.0]), st.sampled_from([None, 1, 5, WIDTH]), st.integers(0, 2**32 - 1))
def test_any_modes_are_mixed_as_written(
    entries: list[CallGuidance], scale: float, channels: int | None, seed: int
) -> None:
    outputs = np.random.default_rng(seed).standard_normal((len(entries), 2 * COUNT, WIDTH)).astype(np.float32)
    got = run(Space(entries, outputs, 2 * COUNT), scale, channels)
    for call, (one, wanted) in enumerate(zip(got, plain(outputs, entries, scale, channels), strict=True)):
        np.testing.assert_allclose(one, wanted, atol=2e-4, err_msg=f"call {call}")


@pytest.mark.parametrize("channels", [None, 3])
def test_other_channels_are_the_conditional_half_s(channels: int | None) -> None:
    """A learned variance is not guided."""
    outputs = drawn(2)
    got = run(Space([mode("both"), mode("reuse", 1.0)], outputs, 2 * COUNT), 5.0, channels)
    for call in range(2):
        same = got[call] == outputs[call, :COUNT]
        assert np.all(same[:, channels:] if channels else ~same[:, :1])
