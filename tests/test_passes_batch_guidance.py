"""batch-guidance: both halves of classifier-free guidance in one batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_graphs import Sketch, apply, random_inputs

from dcc.ir.interpret import run_graph
from dcc.ir.program import Guidance, Program
from dcc.ir.text import graph_text, program_text
from dcc.passes import BatchGuidance


def guided(rows: tuple[int, int] = (1, 16), condition: bool = True) -> Program:
    s = Sketch()
    x = s.latent()
    y = s.condition() if condition else s.weight("bias", 1, 4)
    program = s.program(s.add(s.linear(x, "l", 4), y), rows)
    program.guidance = Guidance("cfg", 3.0)
    program.inputs = tuple(replace(item, null=0.0) if item.name == "c" else item for item in program.inputs)
    return program


def test_fires() -> None:
    program = guided()
    before = graph_text(program)
    report = apply(BatchGuidance(), program)
    assert (report.status, report.why) == ("applied", "two halves in one batch, up to 8 images a request")
    assert report.figures == {"null conditions": {"c": 0.0}}
    assert graph_text(program) == before
    assert program_text(program).splitlines()[0] == "program sketch  sampler=none  guidance=cfg  B in 1..16"


def unguided() -> Program:
    program = guided()
    program.guidance = Guidance()
    return program


REFUSED = {
    "the Program samples without guidance": unguided,
    "no condition to leave out": lambda: guided(condition=False),
    "the batch is fixed at 1: two halves do not fit": lambda: guided(rows=(1, 1)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason: str) -> None:
    program = REFUSED[reason]()
    before = program_text(program)
    report = apply(BatchGuidance(), program)
    assert (report.status, report.why) == ("declined", reason)
    assert program_text(program) == before


def test_keeps_meaning_rows_are_independent() -> None:
    """What the pass relies on: one forward of 2n rows is two forwards of n rows."""
    program = guided()
    apply(BatchGuidance(), program)
    inputs = random_inputs(program, rows=6)
    halves = [run_graph(program, {name: value[part] for name, value in inputs.items()})
              for part in (slice(0, 3), slice(3, 6))]  # fmt: skip
    torch.testing.assert_close(run_graph(program, inputs), torch.cat(halves), atol=1e-6, rtol=0)


def test_settles() -> None:
    program = guided()
    first = apply(BatchGuidance(), program)
    before = program_text(program)
    assert apply(BatchGuidance(), program) == first
    assert program_text(program) == before
