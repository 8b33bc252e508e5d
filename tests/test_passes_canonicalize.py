"""canonicalize: one spelling for every operation, bit for bit the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from hypothesis import given
from random_graphs import FEW, Recipe, Sketch, apply, aten, random_inputs, recipes
from torch import nn
from torch.fx import Node

from dcc.frontend.trace import trace
from dcc.ir.interpret import run_graph
from dcc.ir.text import graph_text
from dcc.ir.verify import NOT_CANONICAL
from dcc.passes import Canonicalize

ROLES = {"x": "latent", "t": "timestep"}


def full_of_noise() -> Sketch:
    """Every rule fires at least once."""
    s = Sketch()
    x, t = s.latent(6, 4), s.timestep()
    rows = s.op(aten.sym_size.int, x, 0)
    flat = s.op(aten.view.default, x, [rows, 24])
    square = s.op(aten._unsafe_view.default, s.op(aten.clone.default, flat), [rows, 6, 4])
    scaled = s.op(aten.div.Tensor, s.mul(square, 1), 1.0)
    cast = s.op(aten._to_copy.default, scaled, dtype=torch.float32)
    halves = [s.op(aten.slice.Tensor, cast, 1, 0, 2), s.op(aten.slice.Tensor, cast, 1, 2, 2**63 - 1)]
    joined = s.op(aten.cat.default, halves, 1)
    whole = s.op(aten.slice.Tensor, joined, 2, 0, 2**63 - 1)
    same = s.op(aten.expand.default, whole, [-1, 6, 4])
    s.op(aten._assert_tensor_metadata.default, same, None, None, torch.float32)
    like = [s.op(target.default, same) for target in (aten.zeros_like, aten.ones_like, aten.empty_like)]
    like.append(s.op(aten.full_like.default, same, 0.5))
    for value in like:
        same = s.add(same, value)
    copied = s.op(aten.copy.default, s.op(aten.empty_like.default, x), same)
    double = s.op(aten._to_copy.default, t, dtype=torch.float64)
    features = s.op(aten.type_as.default, double, x)
    bare = s.op(aten.type_as.default, features, x)
    s.graph_result = s.add(copied, s.op(aten.reshape.default, bare, [rows, 1, 1]))
    return s


def test_fires_on_every_rule(golden: Callable[[str], None]) -> None:
    s = full_of_noise()
    program = s.program(s.graph_result)
    before = graph_text(program)
    report = apply(Canonicalize(), program)
    assert (report.status, report.why) == ("applied", f"{report.figures['nodes']} operations rewritten or removed")
    golden(f"{before}\n{graph_text(program)}")


class Messy(nn.Module):
    """What models write: views of permuted tensors, dropout, casts, chunks that are joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = x.view(batch, tokens, 2, 4).permute(0, 2, 1, 3).contiguous().view(batch, 2, tokens * 4)
        back = heads.view(batch, 2, tokens, 4).transpose(1, 2).reshape(batch, tokens, width)
        left, right = back[:, :3], back[:, 3:]
        mixed = self.drop(self.project(torch.cat([left, right], dim=1)))
        return mixed.to(x.dtype) + t.type_as(x).view(batch, 1, 1) * torch.ones_like(x)


def test_fires_on_a_traced_module(golden: Callable[[str], None]) -> None:
    torch.manual_seed(0)
    module = Messy().eval()
    inputs = {"x": zoo.normal(2, 6, 8), "t": zoo.timesteps()}
    program = trace(module, inputs, ROLES)
    before = graph_text(program)
    wanted = run_graph(program, inputs)
    apply(Canonicalize(), program)
    golden(f"{before}\n{graph_text(program)}")
    assert torch.equal(run_graph(program, inputs), wanted)
    assert torch.equal(module(**inputs), wanted)


def test_declines_a_canonical_graph() -> None:
    s = Sketch()
    x = s.latent()
    program = s.program(s.add(x, s.linear(x, "l", 4)))
    before = graph_text(program)
    report = apply(Canonicalize(), program)
    assert (report.status, report.why) == ("declined", "every operation is in canonical form already")
    assert graph_text(program) == before


def test_a_value_is_not_computed_for_the_sake_of_its_size() -> None:
    s = Sketch()
    x, c = s.latent(), s.condition()
    unread = s.linear(c, "only_its_size", 4)
    rows = s.op(aten.sym_size.int, unread, 0)
    program = s.program(s.add(x, s.op(aten.full.default, [rows, 4], 1.0, dtype=torch.float32)))
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    assert apply(Canonicalize(), program).status == "applied"
    assert graph_text(program) == (
        "%0 = sym_size(%x, 0)\n%1 = full([%0, 4], 1.0, dtype=torch.float32) : f32[B,4]\n"
        "%2 = add(%x, %1) : f32[B,4]\nreturn %2\n"
    )
    assert torch.equal(run_graph(program, inputs), wanted)


def _slices(s: Sketch, *bounds: tuple[int, ...], axis: int = 1) -> Node:
    x = s.latent(6, 6)
    return s.op(aten.cat.default, [s.op(aten.slice.Tensor, x, axis, *bound) for bound in bounds], 1)


def _two_sources(s: Sketch) -> Node:
    x, y = s.latent(6, 6), s.condition(6, 6)
    return s.op(aten.cat.default, [s.op(aten.slice.Tensor, x, 1, 0, 3), s.op(aten.slice.Tensor, y, 1, 3, 6)], 1)


KEPT: dict[str, Callable[[Sketch], Node]] = {
    "a cast": lambda s: s.op(aten._to_copy.default, s.latent(), dtype=torch.float64),
    "times two": lambda s: s.mul(s.latent(), 2),
    "integers times 1.0": lambda s: s.mul(s.input("x", "latent", "B", 4, dtype=torch.int64), 1.0),
    "rounded division": lambda s: s.op(aten.div.Tensor_mode, s.latent(), 1, rounding_mode="floor"),
    "a real expand": lambda s: s.op(aten.expand.default, s.latent(1, 4), [-1, 3, 4]),
    "a real slice": lambda s: s.op(aten.slice.Tensor, s.latent(), 1, 1, 4),
    "a strided slice": lambda s: s.op(aten.slice.Tensor, s.latent(), 1, 0, 4, 2),
    "slices with a gap": lambda s: _slices(s, (0, 2), (3, 6)),
    "slices that overlap": lambda s: _slices(s, (0, 3), (2, 6)),
    "slices in the wrong order": lambda s: _slices(s, (3, 6), (0, 3)),
    "slices without the end": lambda s: _slices(s, (0, 2), (2, 5)),
    "slices of another axis": lambda s: _slices(s, (0, 3), (3, 6), axis=2),
    "slices with a step": lambda s: _slices(s, (0, 3, 1), (3, 6, 2)),
    "slices of two tensors": _two_sources,
    "a copy that broadcasts": lambda s: s.op(aten.copy.default, s.latent(), s.weight("w", 1, 4)),
    "a copy that casts": lambda s: s.op(
        aten.copy.default, s.latent(), s.input("c", "condition", "B", 4, dtype=torch.float64)
    ),
    "dropout that is always on": lambda s: s.op(aten.dropout.default, s.latent(), 0.5, True),
}


@pytest.mark.parametrize("case", KEPT)
def test_keeps_what_only_looks_redundant(case: str) -> None:
    s = Sketch()
    program = s.program(KEPT[case](s))
    before = graph_text(program)
    assert apply(Canonicalize(), program).status == "declined"
    assert graph_text(program) == before


@FEW
@given(recipes())
def test_keeps_meaning_of_random_graphs(recipe: Recipe) -> None:
    program = recipe.sketch()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    apply(Canonicalize(), program)
    assert torch.equal(run_graph(program, inputs), wanted)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_keeps_meaning_of_models(name: str, traced: Callable, model: Callable) -> None:
    program = traced(name)
    with torch.no_grad():
        wanted = model(name).module(**model(name).example_inputs)
    assert torch.equal(run_graph(program, model(name).example_inputs), wanted)
    report = apply(Canonicalize(), program)
    assert report.status == "applied"
    assert torch.equal(run_graph(program, model(name).example_inputs), wanted)


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_settles(name: str, traced: Callable) -> None:
    program = traced(name)
    apply(Canonicalize(), program)
    before = graph_text(program)
    assert apply(Canonicalize(), program).status == "declined"
    assert graph_text(program) == before


def test_pays_no_copies_and_no_false_dependences(traced: Callable) -> None:
    """Wan's rotary code fills `empty_like(latent)` in place; nothing of it is left."""
    program = traced("wan")
    before = [node for node in program.graph.nodes if node.op == "call_function"]
    report = apply(Canonicalize(), program)
    after = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not {str(node.target).split(".")[1] for node in after if "." in str(node.target)} & NOT_CANONICAL
    assert len(before) - len(after) <= report.figures["nodes"]
    assert len(after) < len(before)
