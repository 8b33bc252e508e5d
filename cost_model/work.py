"""What an engine does: floating-point operations, bytes moved and operations run, at any number of rows.

Counted as ONNX Runtime runs a graph on a CPU: every operation reads its inputs from memory and writes its result
there, a linear with a bias is two operations, attention writes its scores out. Reshapes move nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch.fx import Node

from dcc.ir.graph import bytes_of, elements, is_scalar, is_tensor, is_weight, op_name, shape_of, tensor_inputs
from dcc.ir.ops import GENERATORS, PER_ELEMENT, flops_of, is_contraction
from dcc.ir.program import Stage

FREE = frozenset(
    {"reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "getitem", "alias", "detach", "expand", "placeholder"}
)
ATTENTION = "scaled_dot_product_attention"
LAYOUT = frozenset({"permute", "transpose", "t"})
# Operations that the runtime runs as several: how often each result is written, and read again for the next.
WITH_BIAS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
SEVERAL = {"silu": 2}


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes of activations read and written, bytes of weights read, operations run.

    `pointwise_flops` are those of the floating-point operations that no matrix product does: they run slower.
    """

    flops: float = 0.0
    pointwise_flops: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    weight_bytes: float = 0.0
    operations: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """All bytes read and written, weights once."""
        return self.read_bytes + self.written_bytes + self.weight_bytes

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(value * factor for value in _values(self)))

    def to_json(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RowWork:
    """Work that grows linearly with the rows of the batch: `fixed + rows * per_row`."""

    fixed: Work = Work()
    per_row: Work = Work()

    def at(self, rows: int) -> Work:
        return self.fixed + self.per_row * rows

    def __add__(self, other: RowWork) -> RowWork:
        return RowWork(self.fixed + other.fixed, self.per_row + other.per_row)


@dataclass(frozen=True)
class Part:
    """One of the things that an engine does: a stage, a combination of histories, a delta.

    `key` says what it computes, so equal keys cost the same: a stage's template, or kind and size of the others.
    """

    key: str
    work: RowWork


@dataclass(frozen=True)
class EngineWork:
    """An engine by its content: its parts in order. `key` is equal for engines of equal parts."""

    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        if len(self.parts) == 1:
            return self.parts[0].key
        return "engine:" + hashlib.sha256("\n".join(part.key for part in self.parts).encode()).hexdigest()[:16]

    def at(self, rows: int) -> Work:
        """The work of one call with `rows` rows."""
        total = Work()
        for part in self.parts:
            total = total + part.work.at(rows)
        return total


def stage_part(stage: Stage) -> Part:
    """The stage as a part of an engine; stages of one template have one key."""
    return Part(f"stage:{stage.template}", stage_work(stage.nodes))


def combination_part(
    histories: int, elements_per_row: int, based: bool = False, weighted: bool = True, element_bytes: int = 4
) -> Part:
    """`base + sum_j weights[j] * history[j]`: a product for each history where `weighted`, then sums."""
    products = histories if weighted else 0
    sums = histories - 1 + based
    if not products and sums == 1:
        return sum_part(elements_per_row, element_bytes)
    size = float(elements_per_row * element_bytes)
    flops = float(elements_per_row * (products + sums))
    moved = size * (products + sums)
    per_row = Work(flops, flops, read_bytes=moved + size * sums, written_bytes=moved)
    key = f"combine:{histories}{'w' * weighted}{'+base' * based}x{elements_per_row}x{element_bytes}"
    return Part(key, RowWork(Work(operations=float(products + sums)), per_row))


def sum_part(elements_per_row: int, element_bytes: int = 4) -> Part:
    """A sum or difference of two tensors of equal shape: a residual add, or a delta `x_out - x_in`."""
    size = float(elements_per_row * element_bytes)
    flops = float(elements_per_row)
    per_row = Work(flops, flops, read_bytes=2 * size, written_bytes=size)
    return Part(f"sum:{elements_per_row}x{element_bytes}", RowWork(Work(operations=1.0), per_row))


def stage_work(nodes: Iterable[Node]) -> RowWork:
    """The work of these nodes, each weight counted once however often it is read."""
    listed = list(nodes)
    one, three = nodes_work(listed, 1), nodes_work(listed, 3)
    per_row = (three + one * -1.0) * 0.5
    return RowWork(one + per_row * -1.0, per_row)


def nodes_work(nodes: Sequence[Node], rows: int) -> Work:
    """The work of these nodes with `rows` rows."""
    total = Work()
    weights: set[Node] = set()
    for node in nodes:
        if node.op != "call_function" or is_scalar(node) or op_name(node) in GENERATORS:
            continue
        total = total + _node_work(node, rows)
        weights |= {source for source in tensor_inputs(node) if is_weight(source)}
    return total + Work(weight_bytes=float(sum(bytes_of(weight, rows) for weight in weights)))


def _node_work(node: Node, rows: int) -> Work:
    name = op_name(node)
    if name in FREE or (name in LAYOUT and _attends(node)):
        return Work()
    results = [node] if is_tensor(node) else [user for user in node.users if op_name(user) == "getitem"]
    written = float(sum(bytes_of(result, rows) for result in results))
    read = float(sum(bytes_of(source, rows) for source in tensor_inputs(node) if not is_weight(source)))
    if name in ("slice", "select", "narrow", "embedding", "index_select", "gather"):
        read = min(read, written)
    times = SEVERAL.get(name, 1)
    if name in WITH_BIAS and len(node.args) > 2 and node.args[2] is not None:
        # The bias is added in place of a fused epilogue: another pass over the result. Convolutions do fuse it.
        times = 2 if name == "linear" and len(shape_of(node)) > 2 else 1
    scores = _score_bytes(node, rows) if name == ATTENTION else 0.0
    softmax = PER_ELEMENT["softmax"] * scores / 4
    flops = float(flops_of(node, rows)) + softmax
    bias = written / 4 * (times - 1) if name == "linear" else 0.0
    return Work(
        flops=flops, pointwise_flops=softmax + bias if is_contraction(node) else flops,
        read_bytes=read + written * (times - 1) + 2 * scores, written_bytes=written * times + 2 * scores,
        operations=float(times),
    )  # fmt: skip


def _score_bytes(node: Node, rows: int) -> float:
    """Bytes of the attention matrix, which is written by the product and by the softmax and read by what follows."""
    query, key = (shape_of(source) for source in node.args[:2])  # type: ignore[arg-type]
    return 4.0 * elements(query[:-1], rows) * elements(key[-2:-1], rows)


def _attends(node: Node) -> bool:
    """Whether the change of layout only splits or joins attention heads: lowering takes it out."""
    readers = _behind_views(node)
    source: Any = node.args[0]
    while isinstance(source, Node) and op_name(source) in FREE and source.args:
        source = source.args[0]
    return (isinstance(source, Node) and op_name(source) == ATTENTION) or (
        bool(readers) and all(op_name(reader) == ATTENTION for reader in readers)
    )


def _behind_views(node: Node) -> list[Node]:
    found: list[Node] = []
    for user in node.users:
        found += _behind_views(user) if op_name(user) in FREE else [user]
    return found


def _values(work: Work) -> tuple[float, ...]:
    return work.flops, work.pointwise_flops, work.read_bytes, work.written_bytes, work.weight_bytes, work.operations
