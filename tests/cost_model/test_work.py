"""Work of operations and engines, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from random_graphs import Sketch, aten

from dcc.cost_model.work import (
    EngineWork,
    Work,
    combination_part,
    nodes_work,
    stage_part,
    stage_work,
    sum_part,
)
from dcc.passes import run_passes
from dcc.preparation import pipeline


def calls(s: Sketch) -> list:
    return [node for node in s.graph.nodes if node.op == "call_function"]


def test_a_linear_reads_its_weight_once_and_adds_its_bias_in_another_operation() -> None:
    s = Sketch()
    x = s.latent(6, 3)
    s.op(aten.linear.default, x, s.weight("w", 5, 3), s.weight("b", 5))
    work = nodes_work(calls(s), 4)
    read, written = 4 * 6 * 3 * 4, 4 * 6 * 5 * 4
    assert work.flops == 2 * 4 * 6 * 5 * 3
    assert work.pointwise_flops == 4 * 6 * 5
    assert (work.read_bytes, work.written_bytes) == (read + written, 2 * written)
    assert work.weight_bytes == (15 + 5) * 4
    assert work.operations == 2


def test_a_weight_that_two_operations_read_is_counted_once() -> None:
    s = Sketch()
    weight = s.weight("w", 4, 4)
    first = s.op(aten.linear.default, s.latent(6, 4), weight)
    s.op(aten.linear.default, first, weight)
    assert nodes_work(calls(s), 2).weight_bytes == 64


def test_reshapes_are_free_and_elementwise_chains_are_not_fused() -> None:
    s = Sketch()
    x = s.op(aten.reshape.default, s.latent(6, 4), [-1, 4, 6])
    s.op(aten.tanh.default, s.op(aten.neg.default, x))
    size = 3 * 24 * 4
    assert nodes_work(calls(s), 3) == Work(72 * 2, 72 * 2, 2 * size, 2 * size, 0, 2)


def test_attention_writes_its_scores() -> None:
    s = Sketch()
    query, key, value = (s.latent(2, 5, 8, name=name) for name in "qkv")
    s.op(aten.scaled_dot_product_attention.default, query, key, value)
    work = nodes_work(calls(s), 3)
    scores = 3 * 2 * 5 * 5
    assert work.flops == 2 * scores * 16 + 5 * scores
    assert work.pointwise_flops == 5 * scores
    assert work.written_bytes == 3 * 2 * 5 * 8 * 4 + 2 * scores * 4


def test_work_is_affine_in_the_rows() -> None:
    s = Sketch()
    s.linear(s.op(aten.silu.default, s.latent(6, 4)), "l", 4)
    work = stage_work(calls(s))
    for rows in (1, 2, 7, 64):
        assert work.at(rows) == nodes_work(calls(s), rows)
    assert work.fixed.weight_bytes > 0
    assert work.per_row.weight_bytes == 0


def test_a_combination_is_products_then_sums() -> None:
    work = combination_part(3, 10, based=True).work.at(2)
    assert work.flops == work.pointwise_flops == 2 * 10 * (3 + 3)
    assert work.operations == 6
    assert work.read_bytes == 2 * 40 * (3 + 2 * 3)
    assert work.written_bytes == 2 * 40 * 6


def test_an_unweighted_combination_on_a_base_is_a_sum() -> None:
    assert combination_part(1, 10, based=True, weighted=False) == sum_part(10)
    assert combination_part(1, 10).key != combination_part(1, 10, based=True).key


def test_an_engine_is_known_by_its_parts_in_order() -> None:
    one, two = sum_part(8), combination_part(2, 8)
    assert EngineWork((one,)).key == one.key
    assert EngineWork((one, two)).key == EngineWork((sum_part(8), combination_part(2, 8))).key
    assert EngineWork((one, two)).key != EngineWork((two, one)).key
    assert EngineWork((one, two)).at(3) == one.work.at(3) + two.work.at(3)


@pytest.mark.parametrize("name", ["dit", "sd35"])
def test_equal_stages_have_equal_parts(name: str, traced: Callable) -> None:
    program = traced(name)
    run_passes(program, pipeline(1))
    parts: dict[str, set] = {}
    for stage in program.stages:
        part = stage_part(stage)
        parts.setdefault(part.key, set()).add(part.work)
        assert part.work.at(2).flops >= 0
    assert all(len(found) == 1 for found in parts.values())
    components = [stage_part(stage) for stage in program.stages if stage.kind == "component"]
    assert all(part.work.fixed.weight_bytes > 0 for part in components)
