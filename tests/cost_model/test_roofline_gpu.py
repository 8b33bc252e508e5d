"""The roofline of GPUs: operations are fused, elements have the dtype's size. Generations on targets not at hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from compiled import traced_program
from random_graphs import Sketch, aten

from dcc.calibrate import planned_loop
from dcc.cost_model.roofline import LoopWork, Roofline, predict
from dcc.cost_model.targets import list_targets, target_named
from dcc.cost_model.work import EngineWork, Part, RowWork, Work, combination_part, fused_work, nodes_work, stage_work
from dcc.errors import UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import StoredWeights
from dcc.exports.lower import lower
from dcc.exports.step_plan import StepPlan, StepPlanner
from dcc.exports.templates import export_templates
from dcc.frontend.samplers import sampler_table
from dcc.ir.program import Guidance, Program
from dcc.passes import run_passes
from dcc.preparation import manifest_of, pipeline
from dcc.runtime import load
from dcc.runtime.plan import WeightSpec
from dcc.search.choose import predicted_generation

WIDTH, TOKENS, HEADS = 128, 64, 4


def calls(s: Sketch) -> list:
    return [node for node in s.graph.nodes if node.op == "call_function"]


def block(s: Sketch) -> None:
    """A block as in a DiT: norm and modulation, attention, gate and residual, then the same with an MLP."""
    x, shift = s.latent(TOKENS, WIDTH), s.condition(1, WIDTH)
    heads = [-1, TOKENS, HEADS, WIDTH // HEADS]
    y = s.op(aten.add.Tensor, s.op(aten.mul.Tensor, s.op(aten.layer_norm.default, x, [WIDTH]), shift), shift)
    parts = [s.linear(y, name, WIDTH, bias=True) for name in "qkv"]
    split = [s.op(aten.transpose.int, s.op(aten.reshape.default, part, heads), 1, 2) for part in parts]
    attended = s.op(aten.transpose.int, s.op(aten.scaled_dot_product_attention.default, *split), 1, 2)
    y = s.linear(s.op(aten.reshape.default, attended, [-1, TOKENS, WIDTH]), "out", WIDTH, bias=True)
    x = s.op(aten.add.Tensor, x, s.op(aten.mul.Tensor, y, shift))
    y = s.linear(s.op(aten.layer_norm.default, x, [WIDTH]), "up", 4 * WIDTH, bias=True)
    y = s.linear(s.op(aten.gelu.default, y), "down", WIDTH, bias=True)
    s.op(aten.add.Tensor, x, s.op(aten.mul.Tensor, y, shift))


def block_work(rows: int, fused: bool) -> Work:
    s = Sketch()
    block(s)
    return (fused_work if fused else nodes_work)(calls(s), rows)


def dit_engine(blocks: int = 28, width: float = 1152.0, tokens: float = 256.0) -> EngineWork:
    """The sizes of DiT-XL/2: what a block's products do, and what it must at least move."""
    weights, moved = 18 * width * width * 4, 30 * tokens * width
    per_row = Work(flops=2 * 12 * tokens * width * width, read_bytes=moved, written_bytes=moved)
    part = Part("block", RowWork(Work(weight_bytes=weights, operations=12.0), per_row))
    return EngineWork((part,) * blocks)


def test_a_chain_behind_a_product_is_one_operation() -> None:
    s = Sketch()
    x = s.op(aten.gelu.default, s.linear(s.latent(6, 4), "up", 8, bias=True))
    s.op(aten.mul.Tensor, x, x)
    found, apart = fused_work(calls(s), 3), nodes_work(calls(s), 3)
    assert (found.read_bytes, found.written_bytes, found.operations) == (3 * 6 * 4 * 4, 3 * 6 * 8 * 4, 1)
    assert (found.flops, found.pointwise_flops, found.weight_bytes) == (
        apart.flops, apart.pointwise_flops, apart.weight_bytes,
    )  # fmt: skip


def test_a_value_that_is_read_elsewhere_is_written_once() -> None:
    s = Sketch()
    first = s.linear(s.latent(6, 4), "a", 4)
    s.op(aten.add.Tensor, first, s.linear(first, "b", 4))
    size = 3 * 6 * 4 * 4
    # The sum runs with the second product, which has read the first one's result already.
    assert fused_work(calls(s), 3) == Work(*work_flops(s), 2 * size, 2 * size, 32 * 4, 2)


def work_flops(s: Sketch) -> tuple[float, float]:
    found = nodes_work(calls(s), 3)
    return found.flops, found.pointwise_flops


def test_attention_keeps_its_scores_and_a_norm_begins_anew() -> None:
    s = Sketch()
    query, key, value = (s.latent(2, 5, 8, name=name) for name in "qkv")
    s.op(aten.layer_norm.default, s.op(aten.scaled_dot_product_attention.default, query, key, value), [8])
    size = 3 * 2 * 5 * 8 * 4
    found = fused_work(calls(s), 3)
    assert (found.read_bytes, found.written_bytes, found.operations) == (4 * size, 2 * size, 2)


def test_a_slice_is_read_as_far_as_it_goes() -> None:
    s = Sketch()
    x, both = s.latent(6, 4), s.condition(6, 8)
    half = s.op(aten.slice.Tensor, both, 2, 0, 4)
    s.op(aten.mul.Tensor, x, half)
    found = fused_work(calls(s), 3)
    assert (found.read_bytes, found.written_bytes, found.operations) == (2 * 3 * 24 * 4, 3 * 24 * 4, 1)


def test_a_block_moves_a_fraction_of_what_it_does_apart() -> None:
    apart, found = block_work(4, False), block_work(4, True)
    assert found.flops == apart.flops and found.weight_bytes == apart.weight_bytes
    # Norm, q, k, v, attention, out, norm, up, down; apart also biases, modulation, gelu, gates and residual adds.
    assert (found.operations, apart.operations) == (9, 22)
    value = 4 * TOKENS * WIDTH * 4
    assert found.written_bytes == (1 + 3 + 1 + 1 + 1 + 4 + 1) * value
    assert found.moved_bytes < 0.6 * apart.moved_bytes


def test_fused_work_is_affine_in_the_rows() -> None:
    s = Sketch()
    block(s)
    work = stage_work(calls(s), fused=True)
    for rows in (1, 2, 7):
        assert work.at(rows).to_json() == pytest.approx(fused_work(calls(s), rows).to_json())


def test_a_combination_is_fused_into_one_operation() -> None:
    work = combination_part(3, 10, based=True).fused.at(2)
    assert (work.read_bytes, work.written_bytes, work.operations) == (2 * 40 * 4, 2 * 40, 1)
    assert combination_part(3, 10).fused.at(1).read_bytes == 40 * 3


def test_elements_of_two_bytes_halve_what_moves() -> None:
    work = Work(1.0, 2.0, 8.0, 16.0, 4.0, 3.0)
    assert work.with_elements_of(2) == Work(1.0, 2.0, 4.0, 8.0, 2.0, 3.0)
    assert work.with_elements_of(4) == work


def test_one_engine_by_hand() -> None:
    sheet = Roofline.of("a100", "float16")
    # 80 % of 312 TFLOP/s and 90 % of 2039 GB/s; 2 us an operation, 3 us a call; elements of two bytes.
    heavy = EngineWork((Part("heavy", RowWork(Work(operations=5.0), Work(flops=1e12, pointwise_flops=1e10))),))
    products, others = 4 * 0.99e12 / (0.8 * 312e12), 4 * 1e10 / 19.5e12
    assert sheet.engine_seconds(heavy, 4) == pytest.approx(3e-6 + 5 * 2e-6 + products + others)
    moving = EngineWork((Part("moving", RowWork(Work(weight_bytes=8e9), Work(read_bytes=4e9, written_bytes=4e9))),))
    assert sheet.engine_seconds(moving, 1) == pytest.approx(3e-6 + 8e9 / (0.9 * 2039e9))
    # The runtime's own work keeps its dtype.
    assert sheet.host_seconds(moving.parts[0], 1) == pytest.approx(16e9 / (0.9 * 2039e9))


def test_dtypes_change_rates_and_sizes() -> None:
    single, half, brain = (Roofline.of("a100", dtype) for dtype in ("float32", "fp16", "bf16"))
    assert (single.element_bytes, half.element_bytes, brain.element_bytes) == (4, 2, 2)
    assert half == brain and Roofline.of("a100") == half
    assert single.flops_per_second == pytest.approx(0.8 * 19.5e12)
    assert single.bytes_per_second == half.bytes_per_second
    assert half.fused and not Roofline.of("cpu").fused
    assert Roofline.of("cpu").element_bytes == 4
    with pytest.raises(UsageError, match="has no bf16"):
        Roofline.of("t4", "bf16")


def test_processors_of_the_host_do_not_make_a_gpu_faster() -> None:
    assert Roofline.of("t4", processors=1) == Roofline.of("t4", processors=64)


def test_what_a_sheet_rests_on_is_told() -> None:
    figures = {item.name: item for item in Roofline.of("l4", "fp8").figures}
    assert {"float8_flops", "bandwidth", "operation_overhead", "call_overhead", "matrix_efficiency"} <= set(figures)
    assert "half of it is dense" in figures["float8_flops"].source
    assert json.dumps(Roofline.of("l4").to_json(), allow_nan=False)


def test_faster_cards_are_predicted_faster() -> None:
    engine = dit_engine()
    loop = LoopWork({"step": engine}, ((("step", 8),),) * 20, 4)
    seconds = {item.name: predict(loop, Roofline.of(item, processors=2)).seconds for item in list_targets()}
    for slower, faster in pairwise(["cpu", "orin", "t4", "a10", "a100-40g", "h100", "b200"]):
        assert seconds[faster] < seconds[slower], (slower, faster)
    for slower, faster in (("rtx3090", "rtx4090"), ("rtx4090", "rtx5090"), ("t4", "l4"), ("l4", "l40s")):
        assert seconds[faster] < seconds[slower], (slower, faster)
    # 20 calls of 8 rows of DiT-XL/2 are 37 TFLOP: 0.15 s at 80 % of an A100's rate, then overheads.
    assert 0.1 < seconds["a100-80g"] < 0.4


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    program: Program = traced_program("dit")
    program.sampler = sampler_table("ddim", steps=4)
    program.guidance = Guidance("cfg", 3.0)
    run_passes(program, pipeline(1))
    specs = {
        (name, transposed): WeightSpec(name, "float32", tuple(program.weights[name].shape), "weights.bin", 0, 4)
        for stage in program.stages
        for name in stage.weights
        for transposed in (False, True)
    }
    templates = export_templates(program.templates)
    step: StepPlan = StepPlanner(program, templates, StoredWeights(specs, 0)).plan(None)
    return SimpleNamespace(program=program, step=step, templates=templates)


def test_a_generation_is_predicted_for_a_card_that_is_not_here(made: SimpleNamespace) -> None:
    found = predicted_generation(made.program, made.step, "a100", 4)
    assert (found.target, found.dtype, found.images) == ("a100-80g", "float16", 4)
    loop = planned_loop(made.program, made.step, 4, True)
    assert found.seconds == predict(loop, Roofline.of("a100", "float16")).seconds > 0
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["rests_on"] == "data sheet" and told["seconds"] == found.seconds
    assert told["sheet"]["bytes_per_second"] == pytest.approx(0.9 * 2039e9)
    assert all(item["source"] for item in told["sheet"]["figures"])


def test_cards_and_dtypes_differ_in_what_they_are_predicted(made: SimpleNamespace) -> None:
    seconds = {
        name: predicted_generation(made.program, made.step, name, 8).seconds for name in ("h100", "t4", "orin", "cpu")
    }
    assert seconds["h100"] < seconds["t4"] < seconds["orin"]
    whole, half = (predicted_generation(made.program, made.step, "t4", 8, dtype).seconds for dtype in ("fp32", "fp16"))
    assert half < whole
    both, one = (predicted_generation(made.program, made.step, "cpu", 8, guided=how).seconds for how in (True, False))
    assert one < both


def test_a_calibration_takes_the_place_of_the_sheet(made: SimpleNamespace) -> None:
    model = Roofline(1e9, 1e9, 0.0, 0.0)
    found = predicted_generation(made.program, made.step, "cpu", 2, model=model)
    assert found.seconds == predict(planned_loop(made.program, made.step, 2), model).seconds
    assert (found.to_json()["rests_on"], found.to_json()["sheet"]) == ("calibration", None)


def test_an_artifact_is_predicted_as_its_plan_is(made: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "step.dcc"
    program = made.program
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, templates=made.templates)
        writer.finish(manifest_of(program, plan, program.hash(), "cpu", {}))
    for target in (target_named("rtx4090"), "cpu"):
        from_plan, from_artifact = (
            predicted_generation(program, each, target, 2).seconds for each in (made.step, load(path))
        )
        assert from_artifact == pytest.approx(from_plan)


@pytest.mark.parametrize(
    ("target", "images", "dtype", "message"),
    [("a101", 1, None, "unknown target"), ("t4", 1, "bf16", "has no bf16"), ("t4", 0, None, "at least one image")],
)
def test_what_cannot_be_predicted_is_refused(
    made: SimpleNamespace, target: str, images: int, dtype: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        predicted_generation(made.program, made.step, target, images, dtype)


def test_a_part_without_operations_is_the_same_when_fused() -> None:
    part = Part("call:x", RowWork(Work(operations=2.0)))
    assert part.fused == part.work
    counted: list[int] = []

    def count() -> RowWork:
        counted.append(1)
        return RowWork()

    lazy = Part("k", RowWork(), count)
    assert lazy == Part("k", RowWork()) and not counted
    assert lazy.fused == lazy.fused == RowWork() and counted == [1]
