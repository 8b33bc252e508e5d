"""fold-constants: what depends on no input is computed at compile time."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import zoo
from hypothesis import given
from random_graphs import FEW, Recipe, Sketch, apply, aten, random_inputs, recipes

from dcc.ir.graph import is_weight, op_name
from dcc.ir.interpret import run_graph
from dcc.ir.program import Program
from dcc.ir.text import graph_text
from dcc.passes import ALWAYS, FoldConstants, run_passes

CPU = torch.device("cpu")


def scaled_weight() -> Program:
    """`x @ (2 * w).T + pieces of a table`: two values to fold."""
    s = Sketch()
    x = s.latent()
    doubled = s.mul(s.weight("w", 4, 4), 2.0)
    pieces = s.op(aten.split_with_sizes.default, s.weight("table", 8), [4, 4], 0)
    shift = s.op(operator.getitem, pieces, 1)
    return s.program(s.add(s.op(aten.linear.default, x, doubled), shift))


def test_fires(golden: Callable[[str], None]) -> None:
    program = scaled_weight()
    before = graph_text(program)
    report = apply(FoldConstants(), program)
    assert (report.status, report.why) == ("applied", "2 values folded")
    assert report.figures == {"values": 2, "bytes": (4 * 4 + 4) * 4}
    golden(f"{before}\n{graph_text(program)}")
    torch.testing.assert_close(program.weights["folded.mul"], 2 * program.weights["w"], atol=0, rtol=0)


def test_declines_without_constants() -> None:
    s = Sketch()
    x = s.latent()
    program = s.program(s.linear(x, "l", 4))
    before = graph_text(program)
    report = apply(FoldConstants(), program)
    assert (report.status, report.why) == ("declined", "nothing to fold (0 values too large to store)")
    assert graph_text(program) == before


def test_declining_leaves_even_dead_operations_alone() -> None:
    s = Sketch()
    x = s.latent()
    s.linear(x, "dead", 4)
    program = s.program(s.linear(x, "l", 4))
    before = graph_text(program)
    assert apply(FoldConstants(), program).status == "declined"
    assert graph_text(program) == before


def test_refuses_a_generator_that_is_larger_than_the_limit() -> None:
    s = Sketch()
    x = s.latent(64, 4)
    positions = s.op(aten.arange.default, 64, dtype=torch.float32, device=CPU)
    table = s.op(aten.expand.default, s.op(aten.unsqueeze.default, positions, 1), [64, 4])
    program = s.program(s.add(x, table))
    before = graph_text(program)
    report = apply(FoldConstants(limit_bytes=64 * 4 * 4 - 1), program)
    assert (report.status, report.why) == ("declined", "nothing to fold (1 values too large to store)")
    assert graph_text(program) == before
    assert apply(FoldConstants(limit_bytes=64 * 4 * 4), program).status == "applied"


def test_folds_a_value_of_any_size_that_is_no_larger_than_its_weights() -> None:
    program = scaled_weight()
    report = apply(FoldConstants(limit_bytes=0), program)
    assert report.figures == {"values": 2, "bytes": (4 * 4 + 4) * 4}


def test_refuses_sizes_of_the_batch_and_random_draws() -> None:
    s = Sketch()
    x = s.latent()
    rows = s.op(aten.sym_size.int, x, 0)
    ones = s.op(aten.full.default, [rows, 4], 1.0, dtype=torch.float32, device=CPU)
    noise = s.op(aten.bernoulli.p, s.weight("w", 4), 0.5)
    program = s.program(s.add(s.add(x, ones), noise))
    before = graph_text(program)
    assert apply(FoldConstants(), program).status == "declined"
    assert graph_text(program) == before


def test_two_folded_values_never_share_a_name() -> None:
    program = scaled_weight()
    program.weights["folded.mul"] = torch.zeros(3)
    apply(FoldConstants(), program)
    assert torch.equal(program.weights["folded.mul"], torch.zeros(3))
    assert torch.equal(program.weights["folded.mul.1"], 2 * program.weights["w"])


@FEW
@given(recipes())
def test_keeps_meaning_of_random_graphs(recipe: Recipe) -> None:
    program = recipe.sketch()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    apply(FoldConstants(), program)
    assert torch.equal(run_graph(program, inputs), wanted)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_keeps_meaning_of_models_and_settles(name: str, traced: Callable, model: Callable) -> None:
    program = traced(name)
    with torch.no_grad():
        wanted = model(name).module(**model(name).example_inputs)
    run_passes(program, ALWAYS)
    assert apply(FoldConstants(), program).status == "applied"
    assert torch.equal(run_graph(program, model(name).example_inputs), wanted)
    before = graph_text(program)
    assert apply(FoldConstants(), program).status == "declined"
    assert graph_text(program) == before


def test_pays_operations_of_every_forward(traced: Callable) -> None:
    """The frequencies of the timestep embedding are computed once, not at each of 50 steps."""
    program = traced("dit")
    run_passes(program, ALWAYS)
    assert any(op_name(node) == "arange" for node in program.graph.nodes)
    apply(FoldConstants(), program)
    assert not any(op_name(node) == "arange" for node in program.graph.nodes)
    assert any(is_weight(node) and str(node.target).startswith("folded.") for node in program.graph.nodes)
