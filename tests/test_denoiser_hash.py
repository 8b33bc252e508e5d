"""The hash of a denoiser: equal for whatever does not change what it computes, and taken of each weight once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dcc.frontend.samplers import sampler_table
from dcc.ir.program import Guidance, Program, Role
from dcc.passes import run_passes
from dcc.preparation import pipeline

aten = torch.ops.aten


@pytest.fixture
def program(traced: Callable[[str], Program]) -> Program:
    made = traced("dit")
    made.hashed = {}  # traces share it
    run_passes(made, pipeline(1))
    return made


def test_the_loop_around_the_denoiser_is_not_in_it(traced: Callable[[str], Program], program: Program) -> None:
    other = replace(
        traced("dit"), name="renamed", rows=(1, 64), guidance=Guidance("cfg", 7.0), hashed={},
        sampler=sampler_table("euler", steps=7),
    )  # fmt: skip
    run_passes(other, pipeline(1))
    assert other.denoiser_hash() == program.denoiser_hash()
    assert other.hash() != program.hash()


def test_neither_order_nor_scopes_nor_stages_are_in_it(program: Program) -> None:
    before = program.denoiser_hash()
    program.scopes, program.stages, program.templates = {}, [], {}
    assert program.denoiser_hash() == before


@pytest.mark.parametrize("what", ["another tensor", "written to", "shape"])
def test_weights_are_in_it(program: Program, what: str) -> None:
    before = program.denoiser_hash(), program.hash()
    name = next(name for name, tensor in program.weights.items() if tensor.dim() > 1)
    tensor = program.weights[name]
    if what == "written to":
        program.weights[name] = tensor.clone()
        assert (program.denoiser_hash(), program.hash()) == before
        program.weights[name].mul_(2)
    else:
        program.weights[name] = tensor + 1 if what == "another tensor" else tensor.reshape(-1)
    after = program.denoiser_hash(), program.hash()
    assert after[0] != before[0] and after[1] != before[1]


def test_operations_are_in_it(program: Program) -> None:
    before = program.denoiser_hash()
    node = next(node for node in program.graph.nodes if node.target is aten.silu.default)
    node.target = aten.tanh.default
    assert program.denoiser_hash() != before


def test_numbers_in_operations_are_in_it(program: Program) -> None:
    before = program.denoiser_hash()
    node = next(node for node in program.graph.nodes if node.target is aten.layer_norm.default)
    node.args = (*node.args[:4], 0.5)
    assert program.denoiser_hash() != before


def test_inputs_and_their_roles_are_in_it(program: Program) -> None:
    before = program.denoiser_hash()
    item = program.input(Role.CONDITION)[0]
    for changes in ({"role": Role.TIMESTEP}, {"null": 9.0}, {"dtype": "int32"}):
        changed = tuple(replace(other, **changes) if other is item else other for other in program.inputs)  # type: ignore[arg-type]
        assert replace(program, inputs=changed).denoiser_hash() != before


def test_each_weight_is_read_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self, *rest: read.append(self.numel()) or original(self, *rest))
    program.hash()
    assert len(read) == len(program.weights)
    program.denoiser_hash()
    replace(program, sampler=None).hash()  # as with other steps
    assert len(read) == len(program.weights)
    name = next(iter(program.weights))
    program.weights[name] = program.weights[name].clone()
    program.denoiser_hash()
    assert len(read) == len(program.weights) + 1
