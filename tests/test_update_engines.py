"""Update engines against the formulas in float64, and handed to TensorRT-RTX."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from example_artifact import example_plan, stored_nowhere
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.exports.update_engines import update_engines, update_model
from dcc.runtime.loop_spec import UpdateKind, coefficient_names, loop_spec, update_ports, with_scale
from dcc.runtime.onnxruntime_backend import CpuModel
from dcc.runtime.plan import CallGuidance, InputSpec, Plan, TensorSpec
from dcc.runtime.sampler import Sampler, SamplerCall, SamplerTable

IMAGES, CHANNELS, SIDE = 3, 2, 4
Array = np.ndarray[Any, Any]


def plan_of(calls: int, output: int, modes: tuple[CallGuidance, ...]) -> Plan:
    plan = example_plan(stored_nowhere())
    latent = InputSpec("x", "latent", "float32", ("B", CHANNELS, SIDE))
    return replace(
        plan, inputs=(latent,), output=TensorSpec("out", "float32", ("B", output, SIDE)), order=(0,) * calls,
        guidance=modes,
    )  # fmt: skip


@st.composite
def loops(draw: st.DrawFn) -> tuple[Plan, SamplerTable, dict[str, Any]]:
    registers, calls = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    learned = draw(st.sampled_from([None, "range", "direct"]))
    clip = draw(st.sampled_from([None, 0.7]))
    number = st.integers(-8, 8).map(lambda value: value / 8)
    entries, modes, known = [], [], 0
    for _ in range(calls):
        draws, clipped = draw(st.integers(0, 1)), clip is not None and draw(st.booleans())
        rows = []
        for _ in range(registers):
            row = [draw(number) for _ in range(registers + 1)]
            rows.append((*row, draw(number) if clipped else 0.0, draw(number) if draws else 0.0))
        entries.append(
            SamplerCall(
                1, draw(number) + 2, (0.5, -0.25) if clipped else None, tuple(rows),
                (2.0, 0.25) if draws and learned else None, draws, draw(st.sampled_from(["float32", "float64"])), 0,
            )
        )  # fmt: skip
        kind = draw(st.sampled_from(["both", "conditional", *(["reuse"] if known else [])]))
        weights = tuple(draw(number) for _ in range(draw(st.integers(1, min(known, 3))))) if kind == "reuse" else ()
        modes.append(CallGuidance(kind, weights))
        known += kind == "both"
    dtype = draw(st.sampled_from(["float32", "float64"]))
    table = SamplerTable("t", "T", "epsilon", 1, dtype, registers, 1.5, clip, learned, tuple(entries))
    channels = draw(st.sampled_from([None, 1, CHANNELS]))
    output = CHANNELS * (2 if learned else draw(st.sampled_from([1, 2])))
    return plan_of(calls, output, tuple(modes)), table, {"mode": "cfg", "scale": 3.0, "channels": channels}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(loops(), st.sampled_from([3.0, 1.0, -0.5]), st.integers(0, 2**32 - 1))
def test_a_loop_of_updates_is_guidance_and_sampler(loop: Any, scale: float, seed: int) -> None:
    """Each call's engine on the results of the calls before, beside the sampler of the processor in float64."""
    plan, table, guidance = loop
    random = np.random.default_rng(seed)
    spec, models = update_engines(plan, table, guidance)
    guided = scale != 1.0
    engines = {kind.name: CpuModel(kind.name, models[kind.name]) for kind in spec.kinds}
    shape = (IMAGES, CHANNELS, SIDE)
    sampler = Sampler(replace(table, dtype="float64"), shape)
    start = random.standard_normal(shape).astype(np.float32)
    sampler.start(start)
    first = spec.kinds[spec.start]
    made = engines[first.name].run({"noise": start, "coefficients": np.float32(spec.start_values)})
    registers = [made["new_register0"]] + [np.zeros(shape, np.float32) for _ in range(1, spec.registers)]
    kept: list[Array] = []
    differences: list[Array] = []
    for index, update in enumerate(spec.calls(guided)):
        np.testing.assert_allclose(made["next_input"], sampler.model_input(index), rtol=2e-5, atol=2e-5)
        kind = spec.kinds[update.kind]
        c, u, noise = (random.standard_normal((IMAGES, *kind.output)).astype(np.float32) for _ in range(3))
        c[:, CHANNELS:], noise = np.abs(c[:, CHANNELS:]), noise[:, :CHANNELS]
        u[:, CHANNELS:] = c[:, CHANNELS:]  # a variance that stays above zero however it is mixed
        mode, channels = plan.guidance[index] if guided else CallGuidance("conditional", ()), guidance["channels"]
        mixed = c.astype(np.float64)
        if mode.mode == "both":
            difference = (mixed - u)[:, :channels]
            mixed[:, :channels] += (scale - 1) * difference
            differences.insert(0, difference)
        for weight, difference in zip(mode.weights, differences, strict=False):
            mixed[:, :channels] += (scale - 1) * weight * difference
        values: dict[str, Array] = {"conditional": c, "null": u, "noise": noise}
        values |= {f"register{n}": value for n, value in enumerate(registers)}
        values |= {f"difference{n}": value for n, value in enumerate(kept)}
        values["coefficients"] = np.float32(with_scale(kind, update.values, scale))
        made = engines[kind.name].run({port.name: values[port.name] for port in update_ports(kind)[0]})
        if kind.keeps:
            kept.insert(0, made["new_difference"])
        registers = [made.get(f"new_register{n}", value) for n, value in enumerate(registers)]
        if kind.variance == "direct" and (np.asarray(mixed[:, CHANNELS:]) * 0.25 + 2.0).min() < 0:
            return
        sampler.advance(index, mixed, lambda dtype, noise=noise: noise.astype(dtype))
        for got, wanted in zip(registers, sampler._registers, strict=True):
            scale_of = 1 + np.abs(wanted).max()
            np.testing.assert_allclose(got / scale_of, wanted / scale_of, atol=3e-6)


def table_of(count: int, **changes: Any) -> SamplerTable:
    call = SamplerCall(1, 1.0, None, ((0.9, -0.3, 0.0, 0.0),), None, 0, "float32", 0)
    return replace(SamplerTable("t", "T", "e", 1, "float32", 1, 1.0, None, None, (call,) * count), **changes)


CFG = {"mode": "cfg", "scale": 3.0, "channels": None}


def test_equal_calls_share_an_engine_and_the_spec_is_plain_data() -> None:
    both, reuse = CallGuidance("both", ()), CallGuidance("reuse", (0.5,))
    spec = loop_spec(plan_of(4, CHANNELS, (both, both, reuse, reuse)), table_of(4), CFG)
    assert [kind.mode for kind in spec.kinds] == ["both", "reuse", "single", "start"]
    assert [call.kind for call in spec.guided] == [0, 0, 1, 1]
    assert json.loads(json.dumps(asdict(spec)))["depth"] == 1
    assert len({kind.name for kind in spec.kinds}) == 4


def test_the_scale_is_data() -> None:
    spec = loop_spec(plan_of(1, CHANNELS, ()), table_of(1), CFG)
    kind = spec.kinds[spec.guided[0].kind]
    names = coefficient_names(kind)
    assert with_scale(kind, spec.guided[0].values, 7.5)[names.index("scale")] == 7.5


def test_only_images_are_open_in_every_engine() -> None:
    spec, _ = update_engines(plan_of(1, 2 * CHANNELS, ()), table_of(1), CFG)
    for kind in spec.kinds:
        for port in (*update_model(kind).graph.input, *update_model(kind).graph.output):
            names = {dim.dim_param for dim in port.type.tensor_type.shape.dim} - {""}
            assert names <= {"B"}


def kinds_of_all_parts() -> list[UpdateKind]:
    call = SamplerCall(1, 0.5, (0.5, -0.25), ((0.9, -0.3, 0.1, 0.2),), (0.1, 0.2), 1, "float32", 0)
    table = table_of(3, clip=1.0, variance="range", calls=(call,) * 3)
    modes = (CallGuidance("both", ()), CallGuidance("both", ()), CallGuidance("reuse", (1.5, -0.5)))
    return list(loop_spec(plan_of(3, 2 * CHANNELS, modes), table, CFG | {"channels": CHANNELS}).kinds)


def test_tensorrt_builds_every_part() -> None:
    """Guidance, kept and reused differences, clipping, learned variance and noise, for compute capability 80."""
    pytest.importorskip("tensorrt_rtx")
    from dcc.exports.cached_build import build
    from dcc.runtime.network_record import check_network
    from dcc.runtime.plan import EngineSpec
    from dcc.runtime.tensorrt_builder import BuildRequest, TensorRt

    library = TensorRt.find("tensorrt-rtx")
    for kind in kinds_of_all_parts():
        model = update_model(kind).SerializeToString()
        built = build(BuildRequest(kind.name, model, (80,), (1, 2, 8)), library)
        check_network(built.record, EngineSpec(kind.name, "step", "", *update_ports(kind)))
        assert len(built.data) > 0
