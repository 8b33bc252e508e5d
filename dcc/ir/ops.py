"""The op table: what an operation costs and how passes may treat it.

A row holds the floating-point operations of a node (multiply and add count as two). ATen operations without a row
cost one operation per output element, which is right for the pointwise ones and harmless for moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from dcc.ir.graph import BATCH, elements, is_tensor, op_name, shape_of

aten = torch.ops.aten

VIEWS = frozenset(
    {
        "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "slice",
        "select", "split", "split_with_sizes", "chunk", "unbind", "getitem", "alias", "detach", "narrow",
    }
)  # fmt: skip
GENERATORS = frozenset({"arange", "full", "zeros", "ones", "empty", "scalar_tensor", "eye", "linspace"})
POINTWISE_BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum", "pow"})


def _linear(node: Node, batch: int) -> int:
    weight = shape_of(node.args[1])  # type: ignore[arg-type]
    return 2 * elements(shape_of(node), batch) * int(weight[1])


def _matmul(node: Node, batch: int) -> int:
    left = shape_of(node.args[1 if op_name(node) in ("addmm", "baddbmm") else 0])  # type: ignore[arg-type]
    return 2 * elements(shape_of(node), batch) * elements(left[-1:], batch)


def _attention(node: Node, batch: int) -> int:
    query, key, value = (shape_of(source) for source in node.args[:3])  # type: ignore[arg-type]
    scores = elements(query[:-1], batch) * elements(key[-2:-1], batch)
    return 2 * scores * (elements(query[-1:], batch) + elements(value[-1:], batch))


def _convolution(node: Node, batch: int) -> int:
    weight = shape_of(node.args[1])  # type: ignore[arg-type]
    return 2 * elements(shape_of(node), batch) * math.prod(int(size) for size in weight[1:])


CONTRACTIONS: dict[str, Callable[[Node, int], int]] = {
    "linear": _linear,
    "mm": _matmul,
    "bmm": _matmul,
    "matmul": _matmul,
    "addmm": _matmul,
    "baddbmm": _matmul,
    "scaled_dot_product_attention": _attention,
    "convolution": _convolution,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "einsum": lambda node, batch: 2 * elements(shape_of(node), batch),
}
PER_ELEMENT = {"layer_norm": 8, "rms_norm": 5, "gelu": 8, "silu": 4, "softmax": 5, "sin": 4, "cos": 4, "exp": 4}


def is_contraction(node: Node) -> bool:
    return op_name(node) in CONTRACTIONS


def is_view(node: Node) -> bool:
    return op_name(node) in VIEWS


def flops_of(node: Node, batch: int) -> int:
    """Floating-point operations of one evaluation with `batch` rows."""
    name = op_name(node)
    if node.op != "call_function" or name in VIEWS or not is_tensor(node):
        return 0
    if name in CONTRACTIONS:
        return CONTRACTIONS[name](node, batch)
    return PER_ELEMENT.get(name, 1) * elements(shape_of(node), batch)


__all__ = ["BATCH", "CONTRACTIONS", "GENERATORS", "POINTWISE_BINARY", "VIEWS", "flops_of", "is_contraction", "is_view"]
