"""drop-dead: what the output does not depend on leaves the Program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from hypothesis import given
from random_graphs import FEW, Recipe, Sketch, apply, random_inputs, recipes
from torch import Tensor, nn

from dcc.frontend.trace import trace
from dcc.ir.interpret import run_graph
from dcc.ir.text import graph_text
from dcc.passes import DropDead


class TwoHeads(nn.Module):
    """A model trained with a projector on its features, as REPA does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.projector = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 16)
        self.unused = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        features = self.body(x) + t[:, None]
        self.projector(features)
        return self.head(features)


def dead_branch() -> Sketch:
    s = Sketch()
    x = s.latent()
    features = s.linear(x, "body", 4)
    s.linear(s.linear(features, "projector.0", 16), "projector.1", 2)
    s.graph_result = s.linear(features, "head", 4)
    s.weights["unused"] = torch.ones(7)
    return s


def test_fires(golden: Callable[[str], None]) -> None:
    s = dead_branch()
    program = s.program(s.graph_result)
    before = graph_text(program)
    report = apply(DropDead(), program)
    # Two linears and the two reads of their weights; the third weight was never read.
    assert report.why == "4 operations and 3 weights removed"
    assert report.figures == {"nodes": 4, "weights": 3, "parameters": 16 * 4 + 2 * 16 + 7}
    assert sorted(program.weights) == ["body.weight", "head.weight"]
    golden(f"{before}\n{graph_text(program)}")


def test_fires_on_a_traced_module() -> None:
    torch.manual_seed(0)
    module = TwoHeads().eval()
    inputs = {"x": zoo.normal(2, 4), "t": zoo.timesteps()}
    program = trace(module, inputs, {"x": "latent", "t": "timestep"})
    apply(DropDead(), program)
    assert sorted(program.weights) == ["body.bias", "body.weight", "head.bias", "head.weight"]
    assert torch.equal(run_graph(program, inputs), module(**inputs))


def test_declines_when_everything_is_read() -> None:
    s = Sketch()
    x = s.latent()
    s.condition()  # an input stays an input, read or not
    program = s.program(s.linear(x, "l", 4))
    before = graph_text(program)
    report = apply(DropDead(), program)
    assert (report.status, report.why) == ("declined", "every operation and weight reaches the output")
    assert graph_text(program) == before
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == ["x", "c"]


@FEW
@given(recipes())
def test_keeps_meaning_of_random_graphs(recipe: Recipe) -> None:
    program = recipe.sketch()
    program.weights["unused"] = torch.ones(3)
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    assert apply(DropDead(), program).status == "applied"
    assert torch.equal(run_graph(program, inputs), wanted)


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_keeps_meaning_of_models_and_settles(name: str, traced: Callable, model: Callable) -> None:
    program = traced(name)
    with torch.no_grad():
        wanted = model(name).module(**model(name).example_inputs)
    apply(DropDead(), program)
    assert torch.equal(run_graph(program, model(name).example_inputs), wanted)
    before = graph_text(program)
    assert apply(DropDead(), program).status == "declined"
    assert graph_text(program) == before
