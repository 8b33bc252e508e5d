"""Measurements of exact runs against numpy, the subjects of schedule passes, and noise levels of samplers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import Sketch, aten
from subjects import components, ddim, features, sketch

from dcc.errors import ScheduleError
from dcc.frontend.samplers import sampler_table
from dcc.ir.measurements import Features, Measurements, measure, noise_levels, subject_of
from dcc.ir.program import Guidance, Stage
from dcc.passes import ALWAYS, CUT, HoistScopes, run_passes

NAMES = components()


def relative(later: np.ndarray, earlier: np.ndarray) -> float:
    return float(np.abs(later - earlier).mean() / np.abs(earlier).mean())


def test_every_change_equals_its_formula() -> None:
    run = list(features())
    got = measure(iter(run), NAMES, window=3, first_block=2, name="analytic")
    assert (got.name, got.components, got.calls, got.window, got.runs) == ("analytic", NAMES, 10, 3, 1)
    assert got.guidance is not None
    for later in range(10):
        for earlier in range(later):
            a, b = run[earlier], run[later]
            assert got.first_block[earlier, later] == pytest.approx(
                relative(b.streams[2] - b.streams[0], a.streams[2] - a.streams[0])
            )
            assert got.stack[earlier, later] == pytest.approx(
                relative(b.streams[-1] - b.streams[0], a.streams[-1] - a.streams[0])
            )
            assert got.output[earlier, later] == pytest.approx(relative(b.output, a.output))
            assert got.latent[earlier, later] == pytest.approx(relative(b.latent, a.latent))
            assert got.guidance[earlier, later] == pytest.approx(
                relative(b.output[:2] - b.output[2:], a.output[:2] - a.output[2:])
            )
            if later - earlier <= 3:
                wanted = [relative(b.branches[index], a.branches[index]) for index in range(8)]
                assert got.branch[later - earlier - 1, later] == pytest.approx(wanted)
    assert np.tril(got.stack).max() == 0
    assert got.branch[2, :3].max() == 0
    assert got.output_size == pytest.approx([np.abs(item.output).mean() for item in run])
    assert got.latent_size == pytest.approx([np.abs(item.latent).mean() for item in run])


def test_the_magnitude_ratio_is_magcaches() -> None:
    run = list(features())
    residuals = [item.streams[-1] - item.streams[0] for item in run]
    norms = [np.linalg.norm(residual, axis=-1) for residual in residuals]
    wanted = [1.0, *[float((new / old).mean()) for old, new in pairwise(norms)]]
    assert measure(run, NAMES).magnitude_ratio == pytest.approx(wanted)


def test_runs_are_averaged() -> None:
    first, second = (measure(features(seed=seed), NAMES) for seed in (0, 1))
    both = measure((item for seed in (0, 1) for item in features(seed=seed)), NAMES)
    assert both.runs == 2
    assert both.branch == pytest.approx((first.branch + second.branch) / 2)
    assert both.stack == pytest.approx((first.stack + second.stack) / 2)


def test_a_runner_may_reuse_its_buffers() -> None:
    def in_place() -> Iterator[Features]:
        buffers: list[np.ndarray] = []
        for item in features():
            values = [item.latent, item.output, *item.branches, *item.streams]
            buffers = buffers or [np.empty_like(value) for value in values]
            for buffer, value in zip(buffers, values, strict=True):
                buffer[:] = value
            yield Features(item.call, buffers[0], buffers[1], 2, tuple(buffers[2:10]), tuple(buffers[10:]))

    assert measure(in_place(), NAMES).to_json() == measure(features(), NAMES).to_json()


def test_a_run_without_guidance() -> None:
    got = measure(features(guided=False), NAMES)
    assert got.guidance is None
    assert Measurements.from_json(got.to_json()).guidance is None


def test_several_streams_count_as_one() -> None:
    def split(item: Features) -> Features:
        parts = tuple((value[:, :2].copy(), value[:, 2:].copy()) for value in item.branches)
        return replace(item, branches=parts, streams=tuple((value[:, :2], value[:, 2:]) for value in item.streams))

    got, wanted = measure(map(split, features()), NAMES), measure(features(), NAMES)
    assert got.branch == pytest.approx(wanted.branch)
    assert got.stack == pytest.approx(wanted.stack)
    assert got.magnitude_ratio == pytest.approx(wanted.magnitude_ratio)


def test_a_branch_that_is_zero_gives_finite_numbers() -> None:
    silent = (replace(item, branches=(item.branches[0] * 0, *item.branches[1:])) for item in features())
    got = measure(silent, NAMES)
    assert got.branch[:, :, 0].max() == 0
    begins = (replace(item, branches=(item.branches[0] * item.call, *item.branches[1:])) for item in features())
    assert np.isfinite(measure(begins, NAMES).branch).all()


def test_json_round_trip() -> None:
    got = measure(features(), NAMES, first_block=2, name="analytic")
    text = json.dumps(got.to_json())
    assert Measurements.from_json(json.loads(text)).to_json() == got.to_json()
    assert Measurements.from_json(json.loads(text)).components == NAMES


WRONG = [
    (lambda value: None, "an object of"),
    (lambda value: {**value, "kind": "dcc schedule"}, "kind"),
    (lambda value: {**value, "format": 2}, "format"),
    (lambda value: {**value, "stack": None}, "stack"),
    (lambda value: {**value, "stack": [[1.0]]}, "stack"),
    (lambda value: {**value, "stack": [[1.0], [1.0, 2.0]]}, "stack"),
    (lambda value: {**value, "output_size": "long"}, "output_size"),
    (lambda value: {**value, "output_size": {}}, "output_size"),
    (lambda value: {**value, "output_size": [math.nan] * 10}, "output_size"),
    (lambda value: {**value, "output_size": []}, "finite numbers"),
    (lambda value: {**value, "branch": 3.0}, "branch"),
    (lambda value: {**value, "first_block_components": 9}, "first_block_components"),
    (lambda value: {**value, "runs": "1"}, "runs"),
    (lambda value: {**value, "name": 1}, "name"),
    (lambda value: {**value, "components": "abc"}, "components"),
    (lambda value: {**value, "components": ["a"]}, "branch"),
    (lambda value: {**value, "extra": 1}, "an object of"),
]


@pytest.mark.parametrize(("damage", "at"), WRONG)
def test_wrong_json_is_one_error(damage: Callable, at: str) -> None:
    value = measure(features(), NAMES).to_json()
    with pytest.raises(ScheduleError) as raised:
        Measurements.from_json(damage(value))
    assert at in str(raised.value)


@given(st.recursive(st.none() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_no_value_of_a_field_is_another_error(value: object) -> None:
    plain = measure(features(calls=2), NAMES).to_json()
    for key in ("branch", "stack", "output_size"):
        with pytest.raises(ScheduleError):
            Measurements.from_json({**plain, key: value})


@pytest.mark.parametrize(
    "run",
    [
        [],
        list(features())[1:],
        [*list(features())[:3], *list(features())[4:]],
        [*features(), *features(calls=5)],
        [replace(next(features()), branches=())],
        [next(features()), replace(list(features())[1], latent=np.zeros((3, 3, 4)))],
    ],
)
def test_features_that_do_not_fit_are_refused(run: list[Features]) -> None:
    with pytest.raises(ScheduleError):
        measure(run, NAMES)


# Stages as letter (attention or MLP) and template; the sizes of the blocks; the kinds of the first and last one.
# In the first and last joint block other parts depend on the text alone, so their templates differ.
FAMILIES = {
    "dit": ("A0 M1 A0 M1 A0 M1", [2, 2, 2], ["attention", "mlp"], ["attention", "mlp"]),
    "pixart": ("A0 A1 M2 A0 A1 M2", [3, 3], ["attention", "attention 2", "mlp"], ["attention", "attention 2", "mlp"]),
    "sd3": ("A0 M1 M2 A3 M1 M2 A4 M1", [3, 3, 2], ["attention", "mlp", "mlp 2"], ["attention", "mlp"]),
    "sd35": (
        "A0 A1 M2 M3 A4 A1 M2 M3 A5 M2", [4, 4, 2], ["attention", "attention 2", "mlp", "mlp 2"], ["attention", "mlp"],
    ),
    "flux": ("A0 M1 M2 A3 M1 M2 A4 A4 A4", [3, 3, 1, 1, 1], ["attention", "mlp", "mlp 2"], ["block"]),
    "an MLP": ("M0 M0 M0", [1, 1, 1], ["block"], ["block"]),
}  # fmt: skip


def stages_of(text: str) -> list[Stage]:
    s = Sketch()
    heads = s.latent(2, 6, 4)
    attends, not_attends = s.op(aten.scaled_dot_product_attention.default, heads, heads, heads), s.linear(heads, "l", 4)
    return [
        Stage(f"{index}", "component", (attends if word[0] == "A" else not_attends,), template=word[1:])
        for index, word in enumerate(text.split())
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_and_kinds_of_the_families(name: str) -> None:
    text, sizes, first, last = FAMILIES[name]
    program = sketch(2, measured=False)
    program.stages = stages_of(text)
    subject = subject_of(program)
    assert [len(block) for block in subject.blocks] == sizes
    assert [index for block in subject.blocks for index in block] == list(range(len(subject.components)))
    assert [subject.kinds[index] for index in subject.blocks[0]] == first
    assert [subject.kinds[index] for index in subject.blocks[-1]] == last


def test_the_subject_of_a_traced_model(traced: Callable) -> None:
    program = traced("dit")
    run_passes(program, (*ALWAYS, HoistScopes(), CUT))
    subject = subject_of(program)
    assert subject.components[:2] == ("blocks.0.attn", "blocks.0.mlp")
    assert subject.blocks == ((0, 1), (2, 3), (4, 5))
    assert subject.kinds == ("attention", "mlp") * 3
    assert len(set(subject.flops)) == 2
    assert (subject.timesteps, subject.sigmas, subject.guided) == ((), None, False)


def test_the_subject_of_a_program() -> None:
    program = sketch(calls=6)
    subject = subject_of(program)
    assert subject.components == ("blocks.0.body", "blocks.1.body")
    assert subject.blocks == ((0,), (1,))
    assert subject.kinds == ("block", "block")
    assert (subject.calls, subject.guided) == (6, True)
    assert subject.timesteps == tuple(float(call.timestep) for call in program.sampler.calls)
    # Two rows of six tokens: a linear of 4 to 4 and silu; the rest: embed 3 to 4, final 4 to 3, gates and adds.
    assert subject.flops == (2 * 6 * 4 * (2 * 4 + 4),) * 2
    assert subject.glue_flops == 2 * 6 * (4 * 2 * 3 + 3 * 2 * 4 + 2 * 2 * 4)
    assert subject.measurements is program.measurements
    program.guidance = Guidance("cfg", 1.0)
    assert not subject_of(program).guided


def cosine(calls: int) -> list[float]:
    return [math.tan(math.pi / 2 * (1 - (call + 0.05) / calls)) for call in range(calls)]


@pytest.mark.parametrize("converts", [False, True])
def test_noise_levels_of_a_known_sampler(converts: bool) -> None:
    assert noise_levels(ddim(8, converts)) == pytest.approx(cosine(8), rel=1e-6)


@pytest.mark.parametrize("name", ["dpmpp", "euler", "heun", "pndm"])
def test_noise_levels_are_those_of_the_timesteps(name: str) -> None:
    """Diffusers' default betas: scaled between 1e-4 and 0.02, and fractional timesteps in between."""
    table = sampler_table(name, steps=8)
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ratios = np.sqrt((1 - signal) / signal)
    wanted = np.interp([float(call.timestep) for call in table.calls], np.arange(1000), ratios)
    got = noise_levels(table)
    assert got is not None
    finite = [index for index, value in enumerate(got) if index < len(got) - 1 and math.isfinite(value)]
    assert np.array(got)[finite] == pytest.approx(wanted[finite], rel=0.05)


def test_noise_levels_of_a_flow() -> None:
    table = sampler_table("flow-euler", steps=5)
    got = noise_levels(table)
    assert got is not None
    times = np.array([call.timestep / 1000 for call in table.calls])
    assert got[0] == math.inf
    assert got[1:] == pytest.approx(times[1:] / (1 - times[1:]), rel=1e-5)


def test_noise_levels_that_a_table_hides() -> None:
    table = ddim(4)
    noisy = tuple(replace(call, matrix=((*call.matrix[0][:-1], 0.1),), draws=1) for call in table.calls)
    assert noise_levels(replace(table, calls=noisy)) is None
    assert noise_levels(replace(table, prediction="sample")) is None
