"""split-rows: token rows that a mask isolates from the latent leave the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_graphs import Sketch, apply, aten, random_inputs
from torch.fx import Node

from dcc.ir.dependence import label_scopes, step_flops
from dcc.ir.interpret import run_graph, run_stages
from dcc.ir.program import Program, Scope
from dcc.ir.text import graph_text
from dcc.passes import ALWAYS, CUT, EXACT, HoistScopes, SplitRows, run_passes
from dcc.tolerances import TOLERANCE

IMAGE, CONDITION, WIDTH = 3, 2, 4


def isolating_mask() -> torch.Tensor:
    """Condition queries see condition keys; image queries see everything."""
    mask = torch.ones(IMAGE + CONDITION, IMAGE + CONDITION, dtype=torch.bool)
    mask[IMAGE:, :IMAGE] = False
    return mask


def joint_attention(mask: torch.Tensor | None, reads: str = "image") -> Program:
    """One joint attention over [image; condition] rows of one head, and what is read of its result."""
    s = Sketch()
    x, c = s.latent(IMAGE, WIDTH), s.condition(CONDITION, WIDTH)
    rows = s.op(aten.cat.default, [x, c], 1)
    heads: list[Node] = []
    for name in ("q", "k", "v"):
        linear = s.linear(rows, name, WIDTH, bias=True)
        heads.append(s.op(aten.unsqueeze.default, linear, 1))
    extra: list[Node] = []
    if mask is not None:
        s.weights["mask"] = mask
        extra.append(s.weight("mask", *mask.shape))
    mixed = s.op(aten.scaled_dot_product_attention.default, *heads, *extra)
    result = s.linear(s.op(aten.select.int, mixed, 1, 0) if reads == "select" else joined(s, mixed), "out", WIDTH)
    picked = {
        "image": lambda: s.op(aten.slice.Tensor, result, 1, 0, IMAGE),
        "unaligned": lambda: s.op(aten.slice.Tensor, result, 1, 1, IMAGE + 1),
        "select": lambda: s.op(aten.slice.Tensor, result, 1, 0, IMAGE),
    }[reads]()
    return s.program(s.add(x, picked))


def joined(s: Sketch, mixed: Node) -> Node:
    return s.op(aten.reshape.default, s.op(aten.transpose.int, mixed, 1, 2), [-1, IMAGE + CONDITION, WIDTH])


def test_fires_where_a_mask_isolates_rows(golden: Callable[[str], None]) -> None:
    program = joint_attention(isolating_mask())
    before = step_flops(program, label_scopes(program))
    report = apply(SplitRows(), program)
    assert report.status == "applied"
    after = step_flops(program, label_scopes(program))
    assert report.figures == {"attentions": 1, "flops": before - after}
    apply(HoistScopes(), program)
    golden(graph_text(program))


def test_keys_of_isolated_rows_are_computed_once() -> None:
    program = joint_attention(isolating_mask())
    apply(SplitRows(), program)
    scopes = label_scopes(program)
    linears = [scope for node, scope in scopes.items() if "linear" in node.name]
    # q, k, v of the image rows and the output; k and v of the condition rows; nobody reads their queries.
    assert (linears.count(Scope.STEP), linears.count(Scope.REQUEST)) == (4, 2)


NOTHING = "no rows of an earlier scope are concatenated with latent rows"
NOT_ISOLATED = "no token rows are isolated from the latent: splitting would save nothing"


def without_condition_rows() -> Program:
    s = Sketch()
    x = s.latent(IMAGE, WIDTH)
    return s.program(s.linear(s.op(aten.cat.default, [x, x], 1), "l", WIDTH))


def an_attention_that_reads_two_latents() -> Program:
    """The mask is all ones and every row is read, so every row depends on the latent."""
    s = Sketch()
    x, c = s.latent(IMAGE, WIDTH), s.condition(CONDITION, WIDTH)
    rows = s.op(aten.unsqueeze.default, s.op(aten.cat.default, [x, c], 1), 1)
    return s.program(s.op(aten.scaled_dot_product_attention.default, rows, rows, rows))


REFUSALS: dict[str, tuple[Callable[[], Program], str]] = {
    "nothing is concatenated": (without_condition_rows, NOTHING),
    "everything is visible": (an_attention_that_reads_two_latents, NOT_ISOLATED),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_with_the_reason(case: str) -> None:
    make, reason = REFUSALS[case]
    program = make()
    before = graph_text(program)
    report = apply(SplitRows(), program)
    assert (report.status, report.why) == ("declined", reason)
    assert graph_text(program) == before


def banded_mask() -> torch.Tensor:
    """Neither all nor nothing: the mask itself must be cut."""
    mask = isolating_mask()
    mask[0, 1] = mask[2, 3] = mask[3, 4] = False
    return mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


MASKS = {
    "isolating": isolating_mask(),
    "banded": banded_mask(),
    "additive": additive(isolating_mask()),
    "additive with a bias": additive(isolating_mask()) + torch.arange(5.0),
    "broadcast over queries": torch.tensor([[True, True, False, True, True]]),
    "none": None,
}


@pytest.mark.parametrize("reads", ["image", "unaligned", "select"])
@pytest.mark.parametrize("name", MASKS)
def test_keeps_meaning(name: str, reads: str) -> None:
    program = joint_attention(MASKS[name], reads)
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    apply(SplitRows(), program)
    got = run_graph(program, inputs)
    assert (got - wanted).abs().max() <= TOLERANCE["float32"].forward * (wanted.max() - wanted.min())


@pytest.mark.parametrize("name", ["easycontrol", "sd3", "flux", "pixart", "uvit"])
def test_keeps_meaning_of_families(name: str, traced: Callable[[str], Program]) -> None:
    program = traced(name)
    inputs = random_inputs_of(program)
    wanted = run_graph(program, inputs)
    run_passes(program, (*ALWAYS, *EXACT, CUT))
    got = run_stages(program, inputs)
    assert (got - wanted).abs().max() <= TOLERANCE["float32"].forward * (wanted.max() - wanted.min())
    status = next(report.status for report in program.reports if report.name == "split-rows")
    assert status == ("applied" if name == "easycontrol" else "declined")


def random_inputs_of(program: Program) -> dict[str, torch.Tensor]:
    inputs = random_inputs(program)
    return {key: value.abs() if value.dtype == torch.int64 else value for key, value in inputs.items()}


def test_settles() -> None:
    program = joint_attention(isolating_mask())
    apply(SplitRows(), program)
    before = graph_text(program)
    assert apply(SplitRows(), program).status == "declined"
    assert graph_text(program) == before


def test_pays_half_of_easycontrol(traced: Callable[[str], Program]) -> None:
    """As many condition as image tokens: all their work but their part of attention's keys leaves the step."""
    program = traced("easycontrol")
    run_passes(program, (*ALWAYS, *EXACT))
    report = next(report for report in program.reports if report.name == "split-rows")
    tokens, width, blocks, rows = 16, 32, 3, 2
    linear = 2 * rows * tokens * width * width
    attention = 2 * rows * (tokens * (2 * tokens) * 2 * width)
    # Condition rows: q, k, v, out and the MLP in all blocks but the last, where only keys and values are read and
    # the traced graph had dropped the MLP already; their attention saw all keys under the mask.
    contractions = (blocks - 1) * (12 * linear + attention) + (4 * linear + attention)
    assert contractions <= report.figures["flops"] <= 1.1 * contractions
