"""share-common: equal computations happen once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from hypothesis import given
from random_graphs import FEW, Recipe, Sketch, apply, aten, random_inputs, recipes

from dcc.ir.graph import op_name
from dcc.ir.interpret import run_graph
from dcc.ir.ops import flops_of
from dcc.ir.program import Program
from dcc.ir.text import graph_text
from dcc.passes import ShareCommon


def twice() -> Program:
    """The same branch written twice, with two reads of one weight."""
    s = Sketch()
    x = s.latent()
    branches = [s.op(aten.silu.default, s.linear(x, "l", 4, bias=True)) for _ in range(2)]
    return s.program(s.add(s.add(x, branches[0]), branches[1]))


def test_fires_through_whole_branches(golden: Callable[[str], None]) -> None:
    program = twice()
    before = graph_text(program)
    report = apply(ShareCommon(), program)
    assert report.why == "4 repeated operations computed once"
    assert report.figures == {"nodes": 4}
    golden(f"{before}\n{graph_text(program)}")


def test_declines_when_nothing_repeats() -> None:
    s = Sketch()
    x = s.latent()
    program = s.program(s.add(x, s.linear(x, "l", 4)))
    before = graph_text(program)
    report = apply(ShareCommon(), program)
    assert (report.status, report.why) == ("declined", "no two operations compute the same")
    assert graph_text(program) == before


DIFFERENT = {
    "an int and a float": (lambda s, x: s.mul(x, 2), lambda s, x: s.mul(x, 2.0)),
    "True and nothing": (
        lambda s, x: s.op(aten.sum.dim_IntList, x, [1], True),
        lambda s, x: s.op(aten.sum.dim_IntList, x, [1]),
    ),
    "operands in another order": (
        lambda s, x: s.op(aten.sub.Tensor, x, s.weight("w", 4)),
        lambda s, x: s.op(aten.sub.Tensor, s.weight("w", 4), x),
    ),
    "another option": (
        lambda s, x: s.op(aten.gelu.default, x),
        lambda s, x: s.op(aten.gelu.default, x, approximate="tanh"),
    ),
    "two random draws": (lambda s, x: s.op(aten.bernoulli.p, x, 0.5), lambda s, x: s.op(aten.bernoulli.p, x, 0.5)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_keeps_apart_what_differs(case: str) -> None:
    s = Sketch()
    x = s.latent()
    first, second = (make(s, x) for make in DIFFERENT[case])
    program = s.program(s.add(first, second))
    apply(ShareCommon(), program)
    assert sum(op_name(node) == op_name(first) for node in program.graph.nodes) == 2


@FEW
@given(recipes())
def test_keeps_meaning_of_random_graphs(recipe: Recipe) -> None:
    program = recipe.sketch()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    apply(ShareCommon(), program)
    assert torch.equal(run_graph(program, inputs), wanted)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_keeps_meaning_of_models(name: str, traced: Callable, model: Callable) -> None:
    program = traced(name)
    with torch.no_grad():
        wanted = model(name).module(**model(name).example_inputs)
    apply(ShareCommon(), program)
    assert torch.equal(run_graph(program, model(name).example_inputs), wanted)


def test_settles(traced: Callable) -> None:
    program = traced("diffusers_dit")
    assert apply(ShareCommon(), program).status == "applied"
    before = graph_text(program)
    assert apply(ShareCommon(), program).status == "declined"
    assert graph_text(program) == before


def test_pays_the_operations_it_removes() -> None:
    program = twice()
    before = sum(flops_of(node, 2) for node in program.graph.nodes)
    apply(ShareCommon(), program)
    # One linear of two rows, 4 to 4, is 2 * 2 * 4 * 4 operations; one silu is 4 for each of 8 elements.
    assert before - sum(flops_of(node, 2) for node in program.graph.nodes) == 64 + 32


def test_pays_one_rotary_table_for_all_blocks(traced: Callable) -> None:
    """FLUX makes the rotary table anew in every block (57 times in the real model)."""
    program = traced("flux")
    names = [op_name(node) for node in program.graph.nodes]
    apply(ShareCommon(), program)
    after = [op_name(node) for node in program.graph.nodes]
    assert after.count("unsqueeze") < names.count("unsqueeze")
