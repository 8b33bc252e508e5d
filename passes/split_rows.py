"""Token rows that do not need the latent leave the loop, although one `cat` mixes them with rows that do.

Where rows of an earlier scope (condition tokens) are concatenated with latent rows, the concatenation sinks through
every operation that treats rows independently, and attention splits by query rows. A constant mask decides which
keys each part sees: parts that it isolates (EasyControl's condition rows, causal prefixes) then depend on no latent,
and hoisting computes their keys and values once per generation. Rows that nobody reads disappear on the way.

Shapes    the row axis is any axis but the batch and the last; its parts have static sizes.
Numerics  equal up to the order of attention's sums over keys that the mask removes exactly.
Refuses   models in which splitting leaves no fewer operations in the step (joint attention without isolation).
Source    EasyControl, arXiv:2503.07027; the identity is checked numerically in tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dcc.ir.dependence import label_scopes, step_flops
from dcc.ir.graph import BATCH, argument, is_tensor, is_weight, op_name, shape_of, source_of, tensor_inputs
from dcc.ir.ops import POINTWISE_BINARY
from dcc.ir.program import PassReport, Program, Scope
from dcc.ir.rewrite import erase_dead, insert_before

aten = torch.ops.aten
UNARY = frozenset(
    {"gelu", "silu", "relu", "sigmoid", "tanh", "neg", "exp", "sin", "cos", "rsqrt", "sqrt", "_to_copy", "to"}
)
BATCH_PRIME = 1_000_003  # stands for the batch in products of sizes; no real size is a multiple of it


@dataclass(frozen=True)
class Rows:
    """A value as parts along `axis`, each a tensor node (or a node with several results)."""

    axis: int
    parts: tuple[Node, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SplitRows:
    """See the module's text."""

    name: str = "split-rows"

    def apply(self, program: Program) -> PassReport:
        before = step_flops(program, label_scopes(program))
        original = program.graph
        program.graph = _copy(original)
        count = _Splitter(program).run()
        after = step_flops(program, label_scopes(program))
        if not count or after >= before:
            program.graph = original
            why = (
                "no rows of an earlier scope are concatenated with latent rows"
                if not count
                else ("no token rows are isolated from the latent: splitting would save nothing")
            )
            return PassReport(self.name, "declined", why)
        saved = 1 - after / before
        return PassReport(
            self.name, "applied", f"isolated rows leave the step: {saved:.1%} of its FLOPs",
            {"attentions": count, "flops": before - after},
        )  # fmt: skip


def _copy(graph: Graph) -> Graph:
    copy = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    return copy


@dataclass
class _Splitter:
    program: Program
    rows: dict[Node, Rows] = field(default_factory=dict)
    attentions: int = 0

    def run(self) -> int:
        """Returns how many attentions were split."""
        self.scopes = label_scopes(self.program)
        for node in list(self.program.graph.nodes):
            if node.op != "call_function":
                continue
            # Labels are those of the graph so far: rows split off above no longer depend on the latent below.
            self.scopes.pop(node, None)
            rows = self._rows_of(node)
            if rows is not None:
                self.rows[node] = rows
                if len(rows.parts) == 1 and is_tensor(node):
                    node.replace_all_uses_with(rows.parts[0])
        erase_dead(self.program.graph)
        return self.attentions

    def _rows_of(self, node: Node) -> Rows | None:
        name = op_name(node)
        if name == "cat":
            return self._concatenated(node)
        if not any(source in self.rows for source in node.all_input_nodes):
            return None
        rule = RULES.get(name)
        if rule is None and name in UNARY:
            rule = _Splitter._each
        if rule is None and name in POINTWISE_BINARY:
            rule = _Splitter._pointwise
        return rule(self, node) if rule is not None else None

    def _concatenated(self, node: Node) -> Rows | None:
        parts, axis = node.args[0], argument(node, 1, node.kwargs.get("dim", 0))
        rank = len(shape_of(node))
        if not isinstance(parts, list | tuple) or not isinstance(axis, int) or not 0 < axis % rank < rank - 1:
            return None
        flat: list[Node] = []
        for part in parts:
            assert isinstance(part, Node)
            inner = self.rows.get(part)
            flat += inner.parts if inner is not None and inner.axis == axis % rank else [part]
        sizes = [shape_of(part)[axis % rank] for part in flat]
        if not all(isinstance(size, int) for size in sizes):
            return None
        nested = any(part in self.rows for part in parts)
        if not nested and len({self._scope(part) is Scope.STEP for part in flat}) == 1:
            return None
        return Rows(axis % rank, tuple(flat), tuple(sizes))  # type: ignore[arg-type]

    def _scope(self, node: Node) -> Scope:
        """The latest scope among what the node reads: enough to tell the step from everything before it."""
        if node not in self.scopes:
            sources = [self._scope(source) for source in tensor_inputs(node)]
            self.scopes[node] = max(sources, key=list(Scope).index, default=Scope.CONSTANT)
        return self.scopes[node]

    def _emit(self, node: Node, *args: Any) -> Node:
        return insert_before(node, node.target, *args, **node.kwargs)

    def _each(self, node: Node) -> Rows:
        rows = self.rows[source_of(node)]
        parts = tuple(self._emit(node, part, *node.args[1:]) for part in rows.parts)
        return Rows(rows.axis, parts, rows.sizes)

    def _linear(self, node: Node) -> Rows | None:
        rows = self.rows.get(source_of(node))
        return self._each(node) if rows is not None and rows.axis < len(shape_of(node)) - 1 else None

    def _norm(self, node: Node) -> Rows | None:
        rows = self.rows.get(source_of(node))
        rank = len(shape_of(node))
        return self._each(node) if rows is not None and rows.axis < rank - len(argument(node, 1)) else None

    def _pointwise(self, node: Node) -> Rows | None:
        sides = list(node.args[:2])
        known = [self.rows[side] for side in sides if isinstance(side, Node) and side in self.rows]
        axis, sizes = known[0].axis, known[0].sizes
        rank = len(shape_of(node))
        pieces: list[list[Any]] = []
        for side in sides:
            if not isinstance(side, Node):
                pieces.append([side] * len(sizes))
                continue
            rows = self.rows.get(side)
            if rows is not None and (rows.axis, rows.sizes) != (axis, sizes):
                return None
            if rows is not None and len(shape_of(side)) != rank:
                return None
            pieces.append(list(rows.parts) if rows is not None else self._sliced(node, side, axis - rank, sizes))
        parts = tuple(self._emit(node, *pair, *node.args[2:]) for pair in zip(*pieces, strict=True))
        return Rows(axis, parts, sizes)

    def _sliced(self, anchor: Node, source: Node, from_end: int, sizes: tuple[int, ...]) -> list[Node]:
        """The source for each part: itself where it is broadcast over rows, slices of it where it has them all."""
        shape = shape_of(source)
        if len(shape) < -from_end or shape[from_end] == 1:
            return [source] * len(sizes)
        bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        return [
            insert_before(anchor, aten.slice.Tensor, source, len(shape) + from_end, low, high)
            for low, high in pairwise(bounds)
        ]

    def _reshape(self, node: Node) -> Rows | None:
        rows = self.rows[source_of(node)]
        old, new = shape_of(source_of(node)), shape_of(node)
        before = _product(old[: rows.axis])
        places = [index for index, size in enumerate(new) if size == old[rows.axis] and _product(new[:index]) == before]
        if not places:
            return None
        sizes = list(argument(node, 1))
        parts = []
        for part, size in zip(rows.parts, rows.sizes, strict=True):
            target = [size if index == places[0] else value for index, value in enumerate(sizes)]
            parts.append(self._emit(node, part, target))
        return Rows(places[0], tuple(parts), rows.sizes)

    def _permute(self, node: Node) -> Rows | None:
        order = [axis % len(shape_of(node)) for axis in argument(node, 1)]
        rows = self._each(node)
        return Rows(order.index(rows.axis), rows.parts, rows.sizes)

    def _transpose(self, node: Node) -> Rows | None:
        rank = len(shape_of(node))
        first, second = argument(node, 1) % rank, argument(node, 2) % rank
        rows = self._each(node)
        swap = {first: second, second: first}
        return Rows(swap.get(rows.axis, rows.axis), rows.parts, rows.sizes)

    def _unsqueeze(self, node: Node) -> Rows | None:
        at = argument(node, 1) % len(shape_of(node))
        rows = self._each(node)
        return Rows(rows.axis + (at <= rows.axis), rows.parts, rows.sizes)

    def _pieces(self, node: Node) -> Rows | None:
        """`split`, `chunk` and `unbind`: along another axis each part is cut; along the rows see `_getitem`."""
        rows = self.rows[source_of(node)]
        rank = len(shape_of(source_of(node)))
        if _axis_of_pieces(node) % rank == rows.axis:
            return rows
        return self._each(node)

    def _getitem(self, node: Node) -> Rows | None:
        pieces, index = source_of(node), argument(node, 1)
        rows = self.rows[pieces]
        axis = _axis_of_pieces(pieces) % len(shape_of(source_of(pieces)))
        if axis != rows.axis:
            shift = 1 if op_name(pieces) == "unbind" and axis < rows.axis else 0
            parts = tuple(self._emit(node, part, index) for part in rows.parts)
            return Rows(rows.axis - shift, parts, rows.sizes)
        if op_name(pieces) == "unbind":
            return None
        lengths = [int(value.shape[rows.axis]) for value in pieces.meta["val"]]
        return _aligned(rows, sum(lengths[:index]), sum(lengths[: index + 1]))

    def _slice(self, node: Node) -> Rows | None:
        rows = self.rows[source_of(node)]
        axis, low = argument(node, 1) or 0, argument(node, 2) or 0
        high, step = argument(node, 3), argument(node, 4) or 1
        if axis % len(shape_of(node)) != rows.axis:
            return self._each(node)
        total = sum(rows.sizes)
        if step != 1 or not isinstance(low, int) or not isinstance(high, int | None):
            return None
        low = low + total if low < 0 else low
        high = total if high is None else (high + total if high < 0 else min(high, total))
        return _aligned(rows, low, high)

    def _attention(self, node: Node) -> Rows | None:
        rank = len(shape_of(node))
        rows, keys, values = (self.rows.get(argument(node, index)) for index in range(3))
        if rows is None or rows.axis != rank - 2:
            return None
        if keys is None or values is None or keys.axis != rank - 2 or keys.sizes != values.sizes:
            return None
        if values.axis != keys.axis:
            return None
        mask = argument(node, 3, node.kwargs.get("attn_mask"))
        if argument(node, 4) or argument(node, 5) or node.kwargs.get("is_causal") or node.kwargs.get("dropout_p"):
            return None
        allowed = self._allowed(mask, rows.sizes, keys.sizes)
        groups = self._query_groups(rows, allowed)
        outputs: list[Node] = []
        sizes: list[int] = []
        for first, last in groups:
            outputs.append(self._attend(node, rows, keys, values, mask, allowed, first, last))
            sizes.append(sum(rows.sizes[first:last]))
        self.attentions += 1
        return Rows(rows.axis, tuple(outputs), tuple(sizes))

    def _allowed(self, mask: Any, queries: tuple[int, ...], keys: tuple[int, ...]) -> list[list[str]]:
        """For each pair of parts: `all`, `none` or `some` of the keys are visible."""
        if mask is None:
            return [["all"] * len(keys) for _ in queries]
        if not is_weight(mask):
            return [["some"] * len(keys) for _ in queries]
        tensor = self.program.weights[str(mask.target)]
        visible: Tensor = tensor if tensor.dtype == torch.bool else ~torch.isneginf(tensor)
        neutral: Tensor = tensor if tensor.dtype == torch.bool else tensor == 0
        visible = visible.expand(*visible.shape[:-2], sum(queries), sum(keys))
        neutral = neutral.expand_as(visible)
        table = []
        for q, size in enumerate(queries):
            top = sum(queries[:q])
            row = []
            for k, width in enumerate(keys):
                left = sum(keys[:k])
                area = (..., slice(top, top + size), slice(left, left + width))
                row.append("none" if not visible[area].any() else "all" if neutral[area].all() else "some")
            table.append(row)
        return table

    def _query_groups(self, rows: Rows, allowed: list[list[str]]) -> list[tuple[int, int]]:
        """Neighbouring parts of the step that see the same keys stay one attention."""
        groups: list[tuple[int, int]] = []
        for index in range(len(rows.parts)):
            both = groups and all(self._scope(part) is Scope.STEP for part in rows.parts[index - 1 : index + 1])
            if both and allowed[index] == allowed[index - 1]:
                groups[-1] = (groups[-1][0], index + 1)
            else:
                groups.append((index, index + 1))
        return groups

    def _attend(
        self, node: Node, rows: Rows, keys: Rows, values: Rows, mask: Any,
        allowed: list[list[str]], first: int, last: int,
    ) -> Node:  # fmt: skip
        seen = [index for index, state in enumerate(allowed[first]) if state != "none"]
        picked = [self._joined(node, rows.axis, [side.parts[index] for index in seen]) for side in (keys, values)]
        query = self._joined(node, rows.axis, list(rows.parts[first:last]))
        part = None
        if mask is not None and any(allowed[first][index] != "all" for index in seen):
            part = self._cut_mask(node, mask, -2, rows.sizes, range(first, last))
            part = self._cut_mask(node, part, -1, keys.sizes, seen)
        options = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
        return insert_before(node, node.target, query, *picked, part, **options)

    def _cut_mask(self, anchor: Node, mask: Node, from_end: int, sizes: tuple[int, ...], kept: Iterable[int]) -> Node:
        """The mask for these parts of the queries or keys; a broadcast mask is good for all of them."""
        if shape_of(mask)[from_end] == 1:
            return mask
        pieces = self._sliced(anchor, mask, from_end, sizes)
        return self._joined(anchor, len(shape_of(mask)) + from_end, [pieces[index] for index in kept])

    def _joined(self, anchor: Node, axis: int, parts: list[Node]) -> Node:
        return parts[0] if len(parts) == 1 else insert_before(anchor, aten.cat.default, list(parts), axis)


def _product(sizes: tuple[Any, ...]) -> int:
    return math.prod(BATCH_PRIME if size == BATCH else int(size) for size in sizes)


def _axis_of_pieces(node: Node) -> int:
    """The axis along which `unbind` (second argument) or `split` (third) cuts."""
    return int(argument(node, 1 if op_name(node) == "unbind" else 2, node.kwargs.get("dim", 0)))


def _aligned(rows: Rows, low: int, high: int) -> Rows | None:
    """Rows `low` to `high` where both are boundaries between parts."""
    bounds = [sum(rows.sizes[:index]) for index in range(len(rows.sizes) + 1)]
    if low not in bounds or high not in bounds or low >= high:
        return None
    first, last = bounds.index(low), bounds.index(high)
    return Rows(rows.axis, rows.parts[first:last], rows.sizes[first:last])


RULES: dict[str, Callable[[_Splitter, Node], Rows | None]] = {
    "linear": _Splitter._linear,
    "layer_norm": _Splitter._norm,
    "rms_norm": _Splitter._norm,
    "reshape": _Splitter._reshape,
    "permute": _Splitter._permute,
    "transpose": _Splitter._transpose,
    "unsqueeze": _Splitter._unsqueeze,
    "unbind": _Splitter._pieces,
    "split": _Splitter._pieces,
    "split_with_sizes": _Splitter._pieces,
    "chunk": _Splitter._pieces,
    "getitem": _Splitter._getitem,
    "slice": _Splitter._slice,
    "scaled_dot_product_attention": _Splitter._attention,
}
