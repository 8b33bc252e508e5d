"""One spelling for every operation, so that equal blocks look equal and ports may be contiguous.

`view` becomes `reshape` (ports are contiguous after a cut, traced values need not be), `clone`, no-op casts and
multiplications by one go, `*_like` and `type_as` lose their false dependence, sizes are read from an input or, where a
reshape can infer them, become -1, and assertions on metadata go.

Numerics  bitwise equal.
Source    rules measured on seven families, docs/design.md section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dcc.ir.graph import BATCH, argument, op_name, outputs_of, shape_of, source_of
from dcc.ir.program import PassReport, Program
from dcc.ir.rewrite import erase_dead, insert_before, replace

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize:
    """See the module's text; runs until nothing changes."""

    name: str = "canonicalize"

    def apply(self, program: Program) -> PassReport:
        total = 0
        while changed := self._sweep(program):
            total += changed
        if not total:
            return PassReport(self.name, "declined", "every operation is in canonical form already")
        return PassReport(self.name, "applied", f"{total} operations rewritten or removed", {"nodes": total})

    def _sweep(self, program: Program) -> int:
        changed = 0
        for node in list(program.graph.nodes):
            rule = RULES.get(op_name(node)) if node.op == "call_function" else None
            if rule is not None and rule(node):
                changed += 1
        return changed + erase_dead(program.graph)


def _drop(node: Node) -> bool:
    replace(node, source_of(node))
    return True


def _drop_unless_training(node: Node) -> bool:
    """Dropout that is written with `training=True` draws in inference as well."""
    draws = bool(argument(node, 2)) and argument(node, 1) != 0
    return not draws and _drop(node)


def _drop_assertion(node: Node) -> bool:
    node.graph.erase_node(node)
    return True


def _drop_unless_cast(node: Node) -> bool:
    source = node.args[0]
    assert isinstance(source, Node)
    if source.meta["val"].dtype != node.meta["val"].dtype or outputs_of(node.graph)[0] is node:
        return False
    return _drop(node)


def _view_to_reshape(node: Node) -> bool:
    new = insert_before(node, aten.reshape.default, *node.args)
    new.meta["val"] = node.meta["val"]
    replace(node, new)
    return True


def _size_of_an_input(node: Node) -> bool:
    """The batch is read from an input: a value is never computed for the sake of its size."""
    source, axis = node.args
    assert isinstance(source, Node) and isinstance(axis, int)
    if source.op == "placeholder" or shape_of(source)[axis] != BATCH:
        return False
    for candidate in node.graph.nodes:
        if candidate.op == "placeholder" and BATCH in shape_of(candidate):
            node.args = (candidate, shape_of(candidate).index(BATCH))
            return True
    return False


def _infer_size(node: Node) -> bool:
    """`reshape(x, [B, 64, 3])` to `reshape(x, [-1, 64, 3])`: no size needs to be computed."""
    source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, Node)
    if shape_of(source) == shape_of(node):
        return _drop(node)
    inner = source
    if op_name(inner) == "reshape" and len(inner.users) == 1:
        node.update_arg(0, inner.args[0])
        return True
    symbolic = [index for index, size in enumerate(sizes) if isinstance(size, Node)]
    if len(symbolic) != 1 or -1 in sizes:
        return False
    sizes[symbolic[0]] = -1
    node.update_arg(1, sizes)
    return True


def _drop_if_one(node: Node) -> bool:
    if node.args[1] != 1 or isinstance(node.args[1], bool) or node.kwargs:
        return False
    source = node.args[0]
    if not isinstance(source, Node) or source.meta["val"].dtype != node.meta["val"].dtype:
        return False
    return _drop(node)


def _drop_same_shape(node: Node) -> bool:
    source = node.args[0]
    return isinstance(source, Node) and shape_of(source) == shape_of(node) and _drop(node)


def _like_to_generator(value: float | None) -> Callable[[Node], bool]:
    def rule(node: Node) -> bool:
        source = node.args[0]
        assert isinstance(source, Node)
        fill = node.args[1] if value is None else value
        sizes: list[Any] = []
        for index, size in enumerate(shape_of(source)):
            sizes.append(size if isinstance(size, int) else insert_before(node, aten.sym_size.int, source, index))
        new_value = node.meta["val"]
        with node.graph.inserting_before(node):
            new = node.graph.call_function(
                aten.full.default, (sizes, fill), {"dtype": new_value.dtype, "device": torch.device("cpu")}
            )
        new.meta = {"val": new_value, "stack_trace": node.meta.get("stack_trace")}
        replace(node, new)
        return True

    return rule


def _type_as_to_cast(node: Node) -> bool:
    source = node.args[0]
    assert isinstance(source, Node)
    if source.meta["val"].dtype == node.meta["val"].dtype:
        return _drop(node)
    replace(node, insert_before(node, aten._to_copy.default, source, dtype=node.meta["val"].dtype))
    return True


def _consecutive_slices(node: Node) -> bool:
    """`cat` of all consecutive slices of x is x (the text and image halves that single blocks split and rejoin)."""
    parts, axis = node.args[0], argument(node, 1, node.kwargs.get("dim", 0))
    if not isinstance(parts, list | tuple):
        return False
    pieces = [part for part in parts if isinstance(part, Node) and op_name(part) == "slice"]
    if len(pieces) != len(parts) or len({source_of(piece) for piece in pieces}) != 1:
        return False
    source, rank, position = source_of(pieces[0]), len(shape_of(node)), 0
    size = shape_of(source)[axis]
    if not isinstance(size, int):
        return False
    for piece in pieces:
        dim, start, end, step = _slice_bounds(piece)
        if dim % rank != axis % rank or step != 1 or start != position or not isinstance(end, int | None):
            return False
        position = size if end is None else min(end, size)
    if position != size:
        return False
    replace(node, source)
    return True


def _slice_bounds(node: Node) -> tuple[Any, Any, Any, Any]:
    return argument(node, 1) or 0, argument(node, 2) or 0, argument(node, 3), argument(node, 4) or 1


def _slice_of_everything(node: Node) -> bool:
    _, start, end, step = _slice_bounds(node)
    if shape_of(source_of(node)) != shape_of(node) or start != 0 or step != 1:
        return False
    return _drop(node) if end is None or isinstance(end, int) else False


def _overwritten(node: Node) -> bool:
    """`copy(destination, source)` of equal types is `source`."""
    destination, source = node.args[:2]
    if not isinstance(destination, Node) or not isinstance(source, Node):
        return False
    if shape_of(destination) != shape_of(source) or destination.meta["val"].dtype != source.meta["val"].dtype:
        return False
    replace(node, source)
    return True


RULES: dict[str, Callable[[Node], bool]] = {
    "clone": _drop, "alias": _drop, "detach": _drop, "contiguous": _drop, "lift_fresh_copy": _drop,
    "dropout": _drop_unless_training,
    "_assert_tensor_metadata": _drop_assertion, "_assert_scalar": _drop_assertion,
    "sym_constrain_range_for_size": _drop_assertion,
    "_to_copy": _drop_unless_cast, "to": _drop_unless_cast,
    "view": _view_to_reshape, "_unsafe_view": _view_to_reshape, "reshape": _infer_size,
    "div": _drop_if_one, "mul": _drop_if_one, "expand": _drop_same_shape, "squeeze": _drop_same_shape,
    "sym_size": _size_of_an_input,
    "zeros_like": _like_to_generator(0), "ones_like": _like_to_generator(1), "empty_like": _like_to_generator(0),
    "full_like": _like_to_generator(None), "type_as": _type_as_to_cast,
    "cat": _consecutive_slices, "slice": _slice_of_everything, "copy": _overwritten,
}  # fmt: skip

__all__ = ["RULES", "Canonicalize"]
