"""The verifier: every named rule refuses what it names, and says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_graphs import Sketch, aten

from dcc.errors import VerifyError
from dcc.ir.graph import output_node
from dcc.ir.program import Program, Scope, Stage
from dcc.ir.verify import RULES, verify
from dcc.passes import CUT, HoistScopes, run_passes


def sound() -> Program:
    """`h + silu(linear(h)) * gate(t)` with `h = embed(x)`, cut."""
    s = Sketch()
    h, t = s.linear(s.latent(3), "embed", 4), s.timestep()
    branch = s.op(aten.silu.default, s.linear(h, "body", 4))
    program = s.program(s.add(h, s.mul(branch, s.embed(t))))
    run_passes(program, (HoistScopes(), CUT))
    return program


def node(program: Program, name: str):
    return next(item for item in program.graph.nodes if item.name == name)


def no_type(program: Program) -> None:
    del node(program, "silu").meta["val"]


def used_too_early(program: Program) -> None:
    node(program, "linear").prepend(node(program, "silu"))


def another_input(program: Program) -> None:
    program.inputs = program.inputs[:1]


def no_weight(program: Program) -> None:
    del program.weights["body.weight"]


def weight_of_another_shape(program: Program) -> None:
    program.weights["body.weight"] = torch.zeros(4, 5)


def written_in_place(program: Program) -> None:
    node(program, "silu").target = aten.silu_.default


def no_output(program: Program) -> None:
    output_node(program.graph).args = ((),)


def read_from_a_later_scope(program: Program) -> None:
    program.scopes[node(program, "silu")] = Scope.TABLE


def node_in_no_stage(program: Program) -> None:
    stage = next(stage for stage in program.stages if stage.kind == "component")
    stage.nodes = stage.nodes[:-1]


def node_in_two_stages(program: Program) -> None:
    program.stages[-1].nodes += program.stages[-2].nodes


def stages_in_reverse(program: Program) -> None:
    program.stages.reverse()


def no_template(program: Program) -> None:
    del program.templates[program.stages[-1].template]


def template_of_other_ports(program: Program) -> None:
    program.stages[-1].inputs = program.stages[-1].inputs[:-1]


def template_of_other_results(program: Program) -> None:
    stage: Stage = program.stages[-1]
    stage.outputs = (*stage.outputs, *program.stages[-2].outputs)


BROKEN: dict[Callable[[Program], None], str] = {
    no_type: "types-known",
    used_too_early: "defined-before-use",
    another_input: "inputs-match",
    no_weight: "weights-resolve",
    weight_of_another_shape: "weights-resolve",
    written_in_place: "functional",
    no_output: "outputs-defined",
    read_from_a_later_scope: "scopes-ordered",
    node_in_no_stage: "stages-cover-step",
    node_in_two_stages: "stages-cover-step",
    stages_in_reverse: "stages-ordered",
    no_template: "templates-match",
    template_of_other_ports: "templates-match",
    template_of_other_results: "templates-match",
}


def test_a_sound_program_passes() -> None:
    verify(sound(), canonical=True)


def test_every_rule_is_tested() -> None:
    assert set(BROKEN.values()) == set(RULES)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_refuses(damage: Callable[[Program], None]) -> None:
    program = sound()
    damage(program)
    with pytest.raises(VerifyError) as caught:
        verify(program, after="some-pass")
    assert caught.value.what == f"rule {BROKEN[damage]} broken after 'some-pass'"
    assert set(caught.value.details) == {"at", "got", "want"}


@pytest.mark.parametrize("target", [aten.clone.default, aten.zeros_like.default], ids=["clone", "zeros_like"])
def test_canonical_form_is_demanded_after_canonicalize(target: object) -> None:
    s = Sketch()
    x = s.latent()
    program = s.program(s.add(x, s.op(target, x)))
    verify(program)
    with pytest.raises(VerifyError, match="rule canonical-form broken after 'trace'"):
        verify(program, canonical=True)


def test_the_whole_message() -> None:
    program = sound()
    no_weight(program)
    with pytest.raises(VerifyError) as caught:
        verify(program, after="drop-dead")
    at = node(program, "body_weight").format_node()
    assert str(caught.value) == (
        "verify: rule weights-resolve broken after 'drop-dead'\n"
        f"  at    {at}\n"
        "  got   no weight 'body.weight'\n"
        "  want  an entry of Program.weights"
    )


def test_passes_are_verified_around() -> None:
    class Vandal:
        name = "vandal"

        def apply(self, program: Program):
            no_weight(program)

    program = sound()
    no_weight(program)
    with pytest.raises(VerifyError, match="after 'trace'"):
        run_passes(program, (HoistScopes(),))
