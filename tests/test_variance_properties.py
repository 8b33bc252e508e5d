"""Properties of the dependence analysis and of the plan's memory, on random graphs and random lifetimes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_graphs import Recipe, lifetimes, random_inputs, recipes, values_of
from torch.fx import Graph, Node

from dcc.exports.step_plan import assign_slots
from dcc.ir.dependence import label_scopes
from dcc.ir.interpret import run_graph, run_stages
from dcc.ir.program import Program, Scope
from dcc.passes import ALWAYS, CUT, EXACT, HoistScopes, run_passes
from dcc.preparation import pipeline
from dcc.runtime import load
from dcc.runtime.loaded import LoadedArtifact

# Which inputs a value of each scope may depend on.
SEES = {
    Scope.CONSTANT: set(),
    Scope.TIMESTEP: {"t"},
    Scope.REQUEST: {"c"},
    Scope.TABLE: {"t", "c"},
    Scope.STEP: {"x", "t", "c"},
}


def influences(program: Program) -> dict[Node, set[str]]:
    """For every node, the inputs whose perturbation changes it: what it certainly depends on."""
    inputs = random_inputs(program)
    base = values_of(program, inputs)
    found: dict[Node, set[str]] = {node: set() for node in base}
    for item in program.inputs:
        other = values_of(program, {**inputs, item.name: inputs[item.name] * 1.5 + 0.25})
        for node, value in base.items():
            pairs = zip(*(e if isinstance(e, list | tuple) else [e] for e in (value, other[node])), strict=True)
            if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
                found[node].add(item.name)
    return found


@settings(max_examples=40)
@given(recipes())
def test_no_scope_claims_an_independence_that_a_perturbation_refutes(recipe: Recipe) -> None:
    program = recipe.sketch()
    run_passes(program, ALWAYS)
    scopes, influence = label_scopes(program), influences(program)
    for node, scope in scopes.items():
        assert influence[node] <= SEES[scope], f"{node.name} is in {scope} but depends on {influence[node]}"


@settings(max_examples=40)
@given(recipes(), st.sampled_from([0, 64, 256, 1 << 20]), st.sampled_from([0, 64, 1 << 20]))
@example(Recipe((("halves", 1, 0), ("sized", 4, 2))), 0, 0)
def test_splitting_keeps_the_result_exactly(recipe: Recipe, table: int, request: int) -> None:
    program = recipe.sketch()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    limited = HoistScopes(table_limit_bytes=table, request_limit_bytes=request)
    exact = tuple(limited if item.name == "hoist-scopes" else item for item in EXACT)
    run_passes(program, (*ALWAYS, *exact, CUT))
    for rows in (3, 1):
        part = {name: value[:rows] for name, value in inputs.items()}
        split = run_stages(program, part)
        assert torch.equal(split, run_graph(program, part))
    torch.testing.assert_close(run_stages(program, inputs), wanted, atol=1e-5, rtol=1e-5)


def buffers(widths: list[int]) -> list[Node]:
    graph = Graph()
    nodes = [graph.placeholder(f"b{index}") for index in range(len(widths))]
    for node, width in zip(nodes, widths, strict=True):
        node.meta["val"] = torch.empty(2, width, device="meta")
    return nodes


@settings(max_examples=200)
@given(lifetimes())
def test_no_slot_holds_two_live_buffers(entries: list[tuple[int, int, int]]) -> None:
    nodes = buffers([width for _, _, width in entries])
    written = {node: entry[0] for node, entry in zip(nodes, entries, strict=True)}
    last_read = {node: entry[1] for node, entry in zip(nodes, entries, strict=True)}
    lives = {node.name: {0: (written[node], last_read[node])} for node in nodes}
    specs = {spec.name: spec for spec in assign_slots(lives, {node.name: node for node in nodes})}
    assert sorted(specs) == sorted(node.name for node in nodes)
    for index, first in enumerate(nodes):
        for second in nodes[index + 1 :]:
            # A buffer is live from the engine that writes it to the last that reads it, both inclusive.
            overlap = written[first] <= last_read[second] and written[second] <= last_read[first]
            assert not (overlap and specs[first.name].slot == specs[second.name].slot)


@given(lifetimes())
def test_slots_are_as_few_as_buffers_that_are_live_at_once(entries: list[tuple[int, int, int]]) -> None:
    nodes = buffers([width for _, _, width in entries])
    lives = {node.name: {0: entry[:2]} for node, entry in zip(nodes, entries, strict=True)}
    specs = assign_slots(lives, {node.name: node for node in nodes})
    most = max((sum(a <= moment <= b for a, b, _ in entries) for moment in range(27)), default=0)
    assert len({spec.slot for spec in specs}) == most


def poison(loaded: LoadedArtifact, rows: int) -> list[int]:
    """Before each engine of a step, whatever is not live is NaN; returns a list with the bytes poisoned."""
    space = loaded._workspace(rows)
    poisoned = [0]
    for number, calls in enumerate(loaded.plan.step_programs):
        program = space.bind_program(number, rows)
        for index, binding in enumerate(program):
            live = {ref.name for call in calls[index:] for ref in call.inputs if ref.kind == "buffer"}
            written = {ref.name for call in calls[:index] for ref in call.outputs if ref.kind == "buffer"}
            slots = {spec.name: spec.slot for spec in loaded.plan.buffers}
            kept = {slots[name] for name in live & written}

            def run(binding=binding, kept=kept, first=index == 0) -> None:
                for spec in loaded.plan.buffers:
                    if spec.slot not in kept and spec.dtype.startswith("float"):
                        space._buffers[spec.name].fill(np.nan)
                        poisoned[0] += space._buffers[spec.name].nbytes
                if first:
                    space.output.fill(np.nan)
                binding.run()

            program[index] = type("Poisoned", (), {"run": staticmethod(run)})()
    return poisoned


@pytest.mark.parametrize("name", ["dit", "flux", "uvit"])
def test_a_plan_reads_nothing_that_it_did_not_write(name: str, artifact: Callable, model: Callable) -> None:
    path = artifact(name)
    inputs = {key: value.numpy() for key, value in model(name).example_inputs.items()}
    wanted = load(path).denoise(**inputs)
    loaded = load(path)
    poisoned = poison(loaded, rows=2)
    assert np.array_equal(loaded.denoise(**inputs), wanted)
    assert poisoned[0] > 0


@pytest.mark.parametrize("name", ["dit", "flux", "uvit"])
def test_buffers_of_real_plans_are_never_shared_while_live(name: str, artifact: Callable) -> None:
    plan = load(artifact(name)).plan
    (calls,) = plan.step_programs
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, call in enumerate(calls):
        first |= {ref.name: index for ref in call.outputs if ref.kind == "buffer"}
        last |= {ref.name: index for ref in call.inputs if ref.kind == "buffer"}
    assert set(last) <= set(first) == {spec.name for spec in plan.buffers}
    last = first | last
    for index, a in enumerate(plan.buffers):
        for b in plan.buffers[index + 1 :]:
            if a.slot == b.slot:
                assert last[a.name] < first[b.name] or last[b.name] < first[a.name], (a, b)


@pytest.mark.parametrize("level", [0, 1])
def test_the_pipeline_keeps_a_hand_made_graph_at_every_level(level: int) -> None:
    program = Recipe((("halves", 1, 0), ("mul", 0, 4), ("linear", 5, 0), ("add", 0, 6), ("sized", 0, 2))).sketch()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    run_passes(program, pipeline(level))
    assert torch.equal(run_stages(program, inputs), wanted)
