"""unpack-projections: a packed query-key-value projection is three linears."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from random_graphs import Sketch, apply, aten, random_inputs
from torch.fx import Node

from dcc.ir.interpret import run_graph
from dcc.ir.program import Program
from dcc.ir.text import graph_text
from dcc.passes import UnpackProjections
from dcc.tolerances import TOLERANCE

TOKENS, HEADS, SIZE = 3, 2, 2
WIDTH = HEADS * SIZE


def packed(bias: bool = True, order: tuple[int, ...] = (2, 0, 3, 1, 4), read_inside: bool = False) -> Program:
    """Attention as DiT writes it; `order` other than DiT's means something else."""
    s = Sketch()
    x = s.latent(TOKENS, WIDTH)
    qkv = s.linear(x, "qkv", 3 * WIDTH, bias=bias)
    split = s.op(aten.reshape.default, qkv, [-1, TOKENS, 3, HEADS, SIZE])
    pieces = s.op(aten.unbind.int, s.op(aten.permute.default, split, list(order)))
    heads = [s.op(operator.getitem, pieces, index) for index in range(3)]
    mixed = s.op(aten.scaled_dot_product_attention.default, *heads)
    joined = s.op(aten.reshape.default, s.op(aten.transpose.int, mixed, 1, 2), [-1, TOKENS, WIDTH])
    result = s.add(x, joined)
    if read_inside:
        result = s.add(result, s.op(aten.slice.Tensor, qkv, 2, 0, WIDTH))
    return s.program(result)


def test_fires_on_a_packed_projection(golden: Callable[[str], None]) -> None:
    program = packed()
    report = apply(UnpackProjections(), program)
    assert (report.status, report.why) == ("applied", "1 packed projections are three linears")
    golden(graph_text(program))
    assert sorted(program.weights) == [f"qkv.{part}.{kind}" for part in "kqv" for kind in ("bias", "weight")]


REFUSED = {
    "read inside": lambda: packed(read_inside=True),
    "no projection": lambda: _plain(),
}


def _plain() -> Program:
    s = Sketch()
    x = s.latent(TOKENS, WIDTH)
    return s.program(s.linear(x, "l", WIDTH))


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_reason(case: str) -> None:
    program = REFUSED[case]()
    before = graph_text(program)
    report = apply(UnpackProjections(), program)
    assert (report.status, report.why) == ("declined", "no packed query-key-value projection")
    assert graph_text(program) == before


@pytest.mark.parametrize("bias", [True, False])
def test_keeps_meaning(bias: bool) -> None:
    program = packed(bias)
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    apply(UnpackProjections(), program)
    got = run_graph(program, inputs)
    assert (got - wanted).abs().max() <= TOLERANCE["float32"].forward * (wanted.max() - wanted.min())


def test_settles_and_stores_nothing_twice() -> None:
    program = packed()
    parameters = program.parameters()
    apply(UnpackProjections(), program)
    assert program.parameters() == parameters
    assert apply(UnpackProjections(), program).status == "declined"


def test_shares_the_rows_of_a_weight_that_is_used_twice() -> None:
    s = Sketch()
    x = s.latent(TOKENS, WIDTH)

    def attention(source: Node) -> Node:
        split = s.op(aten.reshape.default, s.linear(source, "qkv", 3 * WIDTH), [-1, TOKENS, 3, HEADS, SIZE])
        pieces = s.op(aten.unbind.int, s.op(aten.permute.default, split, [2, 0, 3, 1, 4]))
        mixed = s.op(
            aten.scaled_dot_product_attention.default, *(s.op(operator.getitem, pieces, index) for index in range(3))
        )
        return s.op(aten.reshape.default, s.op(aten.transpose.int, mixed, 1, 2), [-1, TOKENS, WIDTH])

    program = s.program(attention(s.add(x, attention(x))))
    parameters = program.parameters()
    assert apply(UnpackProjections(), program).figures == {"count": 2}
    assert program.parameters() == parameters
