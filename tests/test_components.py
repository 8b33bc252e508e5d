"""Components by the residual rule: how many, of how many kinds, and exactly which tensors they give."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from random_graphs import Sketch, aten, values_of
from torch import Tensor

from dcc.ir.components import find_components, reads
from dcc.ir.graph import is_weight
from dcc.ir.program import Program, Stage
from dcc.passes import run_passes
from dcc.preparation import pipeline

# Model: components, kinds of components.
COUNTS = {
    "dit": (6, 2),  # attention and MLP in 3 blocks
    "diffusers_dit": (4, 2),
    "pixart": (9, 3),  # self-attention, cross-attention, MLP in 3 blocks
    "sd3": (8, 5),  # joint attention, image MLP, text MLP; the last block has no text MLP
    "sd35": (10, 6),  # and a second attention in the first two blocks
    "flux": (8, 5),  # two double blocks of 3, two single blocks
    "wan": (6, 3),
    "uvit": (10, 2),  # 5 blocks
}
# Modules whose outputs are the branches; their modules run in the order of the components.
BRANCHES = {
    "dit": r"blocks\.\d+\.(attn|mlp)",
    "diffusers_dit": r"transformer\.transformer_blocks\.\d+\.(attn1|ff)",
    "pixart": r"transformer\.transformer_blocks\.\d+\.(attn1|attn2|ff)",
    "sd3": r"transformer\.transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)",
    "sd35": r"transformer\.transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)",
    "flux": r"transformer\.(transformer_blocks\.\d+\.(attn|ff|ff_context)|single_transformer_blocks\.\d+\.proj_out)",
    "wan": r"transformer\.blocks\.\d+\.(attn1|attn2|ffn)",
    "uvit": r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(attn|mlp)",
}


def components_of(program: Program) -> list[Stage]:
    return [stage for stage in program.stages if stage.kind == "component"]


@pytest.fixture
def cut(traced: Callable) -> Callable[[str], Program]:
    def run(name: str) -> Program:
        program = traced(name)
        run_passes(program, pipeline(1))
        return program

    return run


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_kinds(name: str, cut: Callable[[str], Program]) -> None:
    components = components_of(cut(name))
    assert (len(components), len({stage.template for stage in components})) == COUNTS[name]


def same(branch: Tensor, value: Tensor) -> bool:
    return branch.numel() == value.numel() and torch.equal(branch.reshape(value.shape), value)


@pytest.mark.parametrize("name", BRANCHES)
def test_results_are_the_branches_before_their_gates(name: str, cut: Callable, model: Callable) -> None:
    """Every output of a component is the output of a branch's module, each branch once, and nothing else."""
    module, inputs, _ = model(name)
    branches: list[tuple[str, Tensor]] = []
    handles = []
    for path, part in module.named_modules():
        if re.fullmatch(BRANCHES[name], path):
            def record(_module: object, _inputs: object, output: object, path: str = path) -> None:
                parts = output if isinstance(output, tuple) else (output,)
                branches.extend((path, value) for value in parts if isinstance(value, Tensor))

            handles.append(part.register_forward_hook(record))
    with torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()
    program = cut(name)
    values = values_of(program, inputs)
    unmatched = list(branches)
    for stage in components_of(program):
        for node in stage.outputs:
            match = next((index for index, (_, branch) in enumerate(unmatched) if same(branch, values[node])), None)
            assert match is not None, f"{stage.name} gives {node.name}, which is no branch"
            del unmatched[match]
    # The last joint block of SD3 returns attention for the text as well, which nobody reads.
    unread = ["transformer.transformer_blocks.2.attn"] if name in ("sd3", "sd35") else []
    assert [path for path, _ in unmatched] == unread


def test_joint_attention_is_one_component_with_two_results(cut: Callable[[str], Program]) -> None:
    components = components_of(cut("sd3"))
    assert sorted(len(stage.outputs) for stage in components) == [1] * 6 + [2] * 2


def test_parallel_attention_keeps_its_shared_norm_outside(cut: Callable[[str], Program]) -> None:
    """SD3.5: both attentions read one norm; as a result of the first it would go stale when that is reused."""
    components = components_of(cut("sd35"))
    assert sum(".attn2" in stage.name for stage in components) == 2
    outputs = [node for stage in components for node in stage.outputs]
    assert {node.target for node in outputs} == {aten.linear.default}
    assert not any(node.target is aten.layer_norm.default for node in outputs)


def test_long_skips_stay_in_the_glue(cut: Callable[[str], Program]) -> None:
    program = cut("uvit")
    skips = [weight for stage in components_of(program) for weight in stage.weights if "skip_linear" in weight]
    assert skips == []
    assert any("skip_linear" in weight for stage in program.stages for weight in stage.weights)


def test_depth_adds_components_but_no_templates(cut: Callable[[str], Program]) -> None:
    shallow, deep = cut("dit"), cut("dit8")
    assert len(components_of(deep)) == 16
    assert {stage.template for stage in components_of(deep)} == {stage.template for stage in components_of(shallow)}
    # Early scopes grow with depth (each is one stage); every glue and component is shared.
    step = [{stage.template for stage in program.stages if stage.kind in ("glue", "component")}
            for program in (shallow, deep)]
    assert step[0] == step[1]


@pytest.mark.parametrize("name", ["dit", "sd35", "flux"])
def test_components_are_disjoint_and_convex(name: str, cut: Callable[[str], Program]) -> None:
    components = components_of(cut(name))
    nodes = [node for stage in components for node in stage.nodes]
    assert len(nodes) == len(set(nodes))
    for stage in components:
        inside, seen = set(stage.nodes), set()
        stack = [user for node in stage.nodes for user in node.users if user not in inside]
        while stack:
            node = stack.pop()
            assert node not in inside, f"{stage.name} is left and entered again"
            if node not in seen:
                seen.add(node)
                stack += list(node.users)


def branch_of(s: Sketch, x, width: int = 4):
    return s.op(aten.silu.default, s.linear(x, "body", width))


def found(s: Sketch, result) -> list:
    s.program(result)
    return find_components([node for node in s.graph.nodes if node.op == "call_function"], set())


def test_operands_may_stand_in_either_order() -> None:
    for swapped in (False, True):
        s = Sketch()
        x = s.linear(s.latent(), "embed", 4)
        branch = branch_of(s, x)
        components = found(s, s.add(branch, x) if swapped else s.add(x, branch))
        assert [component.results for component in components] == [(branch,)]
        assert [node for node in reads(components[0]) if not is_weight(node)] == [x]


def test_a_sum_of_other_shapes_or_without_a_contraction_is_no_residual() -> None:
    s = Sketch()
    x = s.linear(s.latent(), "embed", 4)
    scaled = s.op(aten.silu.default, x)
    assert found(s, s.add(x, scaled)) == []
    s = Sketch()
    x = s.linear(s.latent(6, 3), "embed", 4)
    pooled = s.linear(s.op(aten.mean.dim, x, [1], True), "body", 4)
    assert found(s, s.add(x, pooled)) == []


def test_a_gate_that_depends_on_the_latent_belongs_to_the_branch() -> None:
    s = Sketch()
    x = s.linear(s.latent(), "embed", 4)
    gated = s.mul(branch_of(s, x), s.op(aten.sigmoid.default, s.linear(x, "gate", 4)))
    (component,) = found(s, s.add(x, gated))
    assert component.results == (gated,)


def test_casts_around_the_sum_are_looked_through() -> None:
    """Wan adds in float32 and casts back."""
    s = Sketch()
    x = s.linear(s.latent(), "embed", 4)
    branch = branch_of(s, x)
    wide = [s.op(aten._to_copy.default, value, dtype=torch.float64) for value in (x, branch)]
    narrow = s.op(aten._to_copy.default, s.add(*wide), dtype=torch.float32)
    second = s.linear(narrow, "second", 4)
    components = found(s, s.add(narrow, second))
    assert [component.results for component in components][1] == (second,)
    assert len(components) == 2


def test_a_member_that_is_read_elsewhere_is_no_result() -> None:
    s = Sketch()
    x = s.linear(s.latent(), "embed", 4)
    norm = s.op(aten.layer_norm.default, x, [4])
    branch = s.linear(norm, "body", 4)
    y = s.add(x, branch)
    (component,) = found(s, s.add(y, s.op(aten.tanh.default, norm)))
    assert component.results == (branch,)
    assert norm not in component.nodes
