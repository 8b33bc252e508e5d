"""Facts about nodes of a traced `torch.fx` graph: shapes with the batch symbol, weights, ancestors, bytes.

Node metadata `val` holds a FakeTensor (or a list of them) from `torch.export`; shapes are read from it. A
dimension is an integer, the batch symbol written `B`, or `?expr` for anything that depends on the batch otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

BATCH = "B"

_DTYPE_NAMES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.int64: "int64", torch.int32: "int32", torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip
_SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

SYM_SIZE = torch.ops.aten.sym_size.int

Dimension = int | str
Shape = tuple[Dimension, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """The name used in plans and texts; KeyError for dtypes that dcc does not carry."""
    return _DTYPE_NAMES[dtype]


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_weight(node: Node) -> bool:
    return node.op == "get_attr"


def is_scalar(node: Node) -> bool:
    """A size or arithmetic on sizes: never a port, always recomputed where it is read."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def dimension(size: Any) -> Dimension:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    return BATCH if expression.is_Symbol else f"?{expression}"


def shape_of(node: Node) -> Shape:
    return tuple(dimension(size) for size in node.meta["val"].shape)


def dtype_of(node: Node) -> str:
    return dtype_name(node.meta["val"].dtype)


def type_text(dtype: str, shape: Sequence[Dimension]) -> str:
    """`f32[B,64,128]`: the one spelling of a tensor type in texts and reports."""
    return f"{_SHORT[dtype]}[{','.join(map(str, shape))}]"


def has_rows(shape: Sequence[Dimension]) -> bool:
    """The leading dimension is the batch and no other dimension depends on it."""
    return bool(shape) and shape[0] == BATCH and all(isinstance(size, int) for size in shape[1:])


def is_static(shape: Sequence[Dimension]) -> bool:
    return all(isinstance(size, int) for size in shape)


def elements(shape: Sequence[Dimension], batch: int) -> int:
    """Number of elements when the batch symbol is `batch`; unknown expressions count as `batch`."""
    return math.prod(size if isinstance(size, int) else batch for size in shape)


def bytes_of(node: Node, batch: int) -> int:
    return elements(shape_of(node), batch) * int(node.meta["val"].element_size())


def tensor_inputs(node: Node) -> list[Node]:
    """Tensors whose *values* the node reads. Sizes are not dependences."""
    if node.target is SYM_SIZE or is_scalar(node):
        return []
    return [source for source in node.all_input_nodes if not is_scalar(source)]


def ancestors(roots: Iterable[Node], within: set[Node] | None = None) -> set[Node]:
    """The roots and everything that their values depend on, inside `within` when it is given."""
    seen: set[Node] = set()
    stack = [root for root in roots if within is None or root in within]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [source for source in tensor_inputs(node) if within is None or source in within]
    return seen


def descendants(roots: Iterable[Node], within: set[Node]) -> set[Node]:
    """Everything in `within` that reads a root, directly or not, without the roots themselves."""
    seen: set[Node] = set()
    stack = [user for root in roots for user in root.users]
    while stack:
        node = stack.pop()
        if node in within and node not in seen and not is_scalar(node):
            seen.add(node)
            stack += list(node.users)
    return seen


def op_name(node: Node) -> str:
    """`linear`, `layer_norm`, `getitem` ...: the operation without namespace and overload."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))


def argument(node: Node, index: int, default: Any = None) -> Any:
    """The positional argument, or `default` where the call leaves it out."""
    return node.args[index] if index < len(node.args) else default


def source_of(node: Node) -> Node:
    """The node's first argument, which is a node."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def output_node(graph: Graph) -> Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def outputs_of(graph: Graph) -> list[Node]:
    """The graph's result tensors, in order."""
    values = output_node(graph).args[0]
    flat = values if isinstance(values, list | tuple) else [values]
    return [value for value in flat if isinstance(value, Node)]


def refresh_value(node: Node) -> None:
    """Recompute the metadata of a new node from its arguments' (shape and dtype propagation)."""
    args = torch.fx.map_arg(node.args, lambda source: source.meta["val"])
    kwargs = torch.fx.map_arg(node.kwargs, lambda source: source.meta["val"])
    fakes = [value for value in _flat([args, kwargs]) if isinstance(value, torch._subclasses.FakeTensor)]
    if not fakes:
        raise ValueError(f"cannot propagate shapes of {node}: no tensor among its arguments")
    with fakes[0].fake_mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]
