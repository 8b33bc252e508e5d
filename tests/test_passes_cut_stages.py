"""cut-stages: early scopes and components become stages, equal stages one template."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from random_graphs import Sketch, apply, aten, random_inputs

from dcc.frontend.families import PixArtAdapter
from dcc.frontend.trace import trace
from dcc.ir.graph import is_static, outputs_of, shape_of
from dcc.ir.interpret import run_graph, run_stages
from dcc.ir.program import Program
from dcc.ir.text import program_text
from dcc.passes import ALWAYS, CUT, EXACT, CutStages, HoistScopes, run_passes
from dcc.preparation import pipeline


def residual(depth: int = 2, gated: bool = True) -> Sketch:
    """`x + gate(t) * body(x)`, `depth` times."""
    s = Sketch()
    x, t = s.linear(s.latent(6, 3), "embed", 4), s.timestep()
    time = s.op(aten.unsqueeze.default, s.embed(t), 1)
    for index in range(depth):
        branch = s.op(aten.silu.default, s.linear(x, f"blocks.{index}.body", 4))
        x = s.add(x, s.mul(branch, s.linear(time, f"blocks.{index}.gate", 4)) if gated else branch)
    s.graph_result = x
    return s


def test_fires(golden: Callable[[str], None]) -> None:
    s = residual()
    program = s.program(s.graph_result)
    run_passes(program, (HoistScopes(), CUT))
    report = program.reports[-1]
    assert (report.status, report.why) == ("applied", "2 components of 1 kinds, 4 templates in all")
    golden(program_text(program, costs=True))


def test_fires_on_dit(golden: Callable[[str], None], traced: Callable) -> None:
    program = traced("dit")
    run_passes(program, pipeline(1))
    golden(program_text(program, costs=True))


def test_declines_without_scopes() -> None:
    s = residual()
    program = s.program(s.graph_result)
    before = program_text(program)
    report = apply(CutStages(), program)
    assert (report.status, report.why) == ("declined", "scopes are not known yet: run hoist-scopes first")
    assert program_text(program) == before


def test_declines_without_a_residual_branch_but_leaves_an_executable_chain() -> None:
    s = Sketch()
    program = s.program(s.op(aten.silu.default, s.linear(s.latent(), "l", 4)))
    apply(HoistScopes(), program)
    report = apply(CutStages(), program)
    assert (report.status, report.why) == ("declined", "no residual branch found: the step is one stage")
    assert [stage.kind for stage in program.stages] == ["glue"]
    inputs = random_inputs(program)
    assert torch.equal(run_stages(program, inputs), run_graph(program, inputs))


def test_declines_when_a_port_would_have_a_size_of_its_own() -> None:
    """A stream of `[B * tokens, C]` rows: ports know the batch alone."""
    s = Sketch()
    x = s.linear(s.op(aten.reshape.default, s.latent(6, 3), [-1, 3]), "embed", 4)
    for index in range(2):
        x = s.add(x, s.op(aten.silu.default, s.linear(x, f"blocks.{index}", 4)))
    program = s.program(s.op(aten.reshape.default, x, [-1, 6, 4]))
    inputs = random_inputs(program)
    apply(HoistScopes(), program)
    report = apply(CutStages(), program)
    size = shape_of(x)[0]
    assert (report.status, report.why) == (
        "declined", f"f32[{size},4] between components cannot be a port: the step is one stage"
    )  # fmt: skip
    assert [stage.kind for stage in program.stages] == ["glue"]
    assert torch.equal(run_stages(program, inputs), run_graph(program, inputs))


def test_a_component_ends_before_its_gate() -> None:
    for gated in (True, False):
        s = residual(gated=gated)
        program = s.program(s.graph_result)
        run_passes(program, (*ALWAYS, *EXACT, CUT))
        components = [stage for stage in program.stages if stage.kind == "component"]
        assert [[node.target for node in stage.outputs] for stage in components] == [[aten.silu.default]] * 2


def test_a_sum_with_the_latent_itself_is_no_branch() -> None:
    """The outermost skip of a preconditioned model (`c_skip * x + F(x)`) must not swallow all its blocks."""
    s = residual()
    latent = next(node for node in s.graph.nodes if node.op == "placeholder")
    program = s.program(s.add(latent, s.linear(s.graph_result, "final", 3)))
    run_passes(program, (HoistScopes(), CUT))
    assert program.reports[-1].figures["components"] == 2


@pytest.mark.parametrize("name", ["dit", "pixart", "sd35", "uvit"])
def test_keeps_meaning_bit_for_bit(name: str, traced: Callable, model: Callable) -> None:
    module, inputs, _ = model(name)
    program = traced(name)
    run_passes(program, pipeline(1))
    with torch.no_grad():
        assert torch.equal(run_stages(program, inputs), module(**inputs))


def test_keeps_meaning_without_hoisting(traced: Callable, model: Callable) -> None:
    module, inputs, _ = model("dit")
    program = traced("dit")
    run_passes(program, pipeline(0))
    assert {stage.kind for stage in program.stages} == {"glue", "component", "residual"}
    with torch.no_grad():
        assert torch.equal(run_stages(program, inputs), module(**inputs))


def test_settles(traced: Callable) -> None:
    program = traced("sd3")
    run_passes(program, pipeline(1))
    before, templates = program_text(program), sorted(program.templates)
    apply(CUT, program)
    assert program_text(program) == before
    assert sorted(program.templates) == templates


def test_text_and_hash_are_equal_for_equal_programs(traced: Callable) -> None:
    programs = [traced("dit") for _ in range(2)]
    for program in programs:
        run_passes(program, pipeline(1))
    assert program_text(programs[0]) == program_text(programs[1])
    assert programs[0].hash() == programs[1].hash()
    programs[1].weights = dict(programs[1].weights)
    name = next(iter(programs[1].weights))
    programs[1].weights[name] = programs[1].weights[name] + 1
    assert programs[0].hash() != programs[1].hash()


def test_pays_flops_of_components_counted_by_hand() -> None:
    s = residual(depth=3)
    program = s.program(s.graph_result)
    run_passes(program, (HoistScopes(), CUT))
    # Two rows of six tokens: a linear 4 to 4, and silu at 4 an element.
    assert program.reports[-1].figures["component flops"] == 3 * (2 * 12 * 4 * 4 + 4 * 12 * 4)


@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_ports_are_tensors_with_the_batch_alone(name: str, traced: Callable) -> None:
    """Symbolic sizes never cross a cut; every part of the step is in one stage."""
    program: Program = traced(name)
    run_passes(program, pipeline(1))
    for stage in program.stages:
        for node in (*stage.inputs, *stage.outputs):
            shape = shape_of(node)
            assert is_static(shape) or (shape[0] == "B" and is_static(shape[1:])), (stage.name, node, shape)
    assert outputs_of(program.graph)[0] in program.stages[-1].outputs
    assert len({stage.name for stage in program.stages}) == len(program.stages)


def test_a_batch_limit_of_one_guided_image_is_cut_as_well() -> None:
    """Two rows at most and a mask: in so narrow a range the exporter would write shapes in another way."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 6, 12), "encoder_attention_mask": torch.ones(2, 6),
    }  # fmt: skip
    roles = dict.fromkeys(inputs, "condition") | {"hidden_states": "latent", "timestep": "timestep"}
    program = trace(PixArtAdapter(transformer), inputs, roles, name="pixart", rows=2)
    run_passes(program, pipeline(1))
    assert program.rows == (1, 2) and len(program.components) == 6
