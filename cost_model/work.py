"""What an engine does: floating-point operations, bytes moved and operations run, at any number of rows.

Counted as ONNX Runtime runs a graph on a CPU: every operation reads its inputs from memory and writes its result
there, a linear with a bias is two operations, attention writes its scores out. Reshapes move nothing. `Part.fused` is
counted as compilers for GPUs run it: pointwise operations within the operation before them, attention within itself.
Bytes are those of the traced dtype, float32; `Work.with_elements_of` has them in another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

from torch.fx import Node

from dcc.ir.graph import bytes_of, elements, is_scalar, is_tensor, is_weight, op_name, shape_of, tensor_inputs
from dcc.ir.ops import GENERATORS, PER_ELEMENT, VIEWS, flops_of, is_contraction
from dcc.ir.program import Stage

FREE = frozenset(
    {"reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "getitem", "alias", "detach", "expand", "placeholder"}
)
ATTENTION = "scaled_dot_product_attention"
LAYOUT = frozenset({"permute", "transpose", "t"})
# Operations that the runtime runs as several: how often each result is written, and read again for the next.
WITH_BIAS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
SEVERAL = {"silu": 2}
# What a compiler that fuses does not run: the readers find their elements where they are.
ON_THE_WAY = FREE | VIEWS
# These read whole rows before the first element is known.
NORMALIZE = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "softmax", "_softmax"})
TRACED_BYTES = 4
EXAMPLE_ROWS = 5  # a size that tells the batch from other dimensions


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

    def with_elements_of(self, size_bytes: int) -> Work:
        """The same work where an element has this many bytes instead of float32's four.

        Indices shrink as well: they are a few bytes of a row.
        """
        factor = size_bytes / TRACED_BYTES
        return replace(
            self, read_bytes=self.read_bytes * factor, written_bytes=self.written_bytes * factor,
            weight_bytes=self.weight_bytes * factor,
        )  # fmt: skip

    def to_json(self) -> dict[str, float]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


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
    count_fused: Callable[[], RowWork] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def fused(self) -> RowWork:
        """The work where operations are fused; counted when it is first asked for, as a search on a CPU never does."""
        return self.work if self.count_fused is None else self.count_fused()


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
    return Part(f"stage:{stage.template}", stage_work(stage.nodes), partial(stage_work, stage.nodes, fused=True))


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
    fused = RowWork(Work(operations=1.0), Work(flops, flops, size * (histories + based), size))
    return Part(key, RowWork(Work(operations=float(products + sums)), per_row), partial(_same, fused))


def sum_part(elements_per_row: int, element_bytes: int = 4) -> Part:
    """A sum or difference of two tensors of equal shape: a residual add, or a delta `x_out - x_in`."""
    size = float(elements_per_row * element_bytes)
    flops = float(elements_per_row)
    per_row = Work(flops, flops, read_bytes=2 * size, written_bytes=size)
    return Part(f"sum:{elements_per_row}x{element_bytes}", RowWork(Work(operations=1.0), per_row))


def stage_work(nodes: Iterable[Node], fused: bool = False) -> RowWork:
    """The work of these nodes, each weight counted once however often it is read."""
    listed = list(nodes)
    count = fused_work if fused else nodes_work
    one, three = count(listed, 1), count(listed, 3)
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


def fused_work(nodes: Sequence[Node], rows: int) -> Work:
    """The work of these nodes with `rows` rows where pointwise operations run within the one whose result they change.

    What runs as one reads each value from outside once and writes what is read outside. Attention keeps its scores to
    itself, and layouts change on the way.
    """
    groups: dict[Node, int] = {}
    reads: dict[tuple[int, Node], float] = {}
    for node in nodes:
        if node.op != "call_function" or is_scalar(node) or op_name(node) in GENERATORS | ON_THE_WAY:
            continue
        inputs = [(source, _origin(source)) for source in tensor_inputs(node)]
        inputs = [(source, origin) for source, origin in inputs if not is_weight(origin)]
        changed = [groups[origin] for _, origin in inputs if origin in groups and _changes(node, origin)]
        group = groups[node] = max(changed, default=len(groups))
        for source, origin in inputs:
            if groups.get(origin) != group:
                size = reads.get((group, origin), 0.0) + _result_bytes(source, rows)
                reads[group, origin] = min(size, _result_bytes(origin, rows))
    # A value that nothing computes with is asked for as it is.
    left = [
        node for node, group in groups.items()
        if any(groups.get(reader) != group for reader in _readers(node)) or not _readers(node)
    ]  # fmt: skip
    return replace(
        nodes_work(nodes, rows), read_bytes=sum(reads.values()), operations=float(len(set(groups.values()))),
        written_bytes=float(sum(_result_bytes(node, rows) for node in left)),
    )  # fmt: skip


def _changes(node: Node, origin: Node) -> bool:
    """Whether the operation only changes the elements of the value one by one."""
    if is_contraction(node) or op_name(node) in NORMALIZE or not (is_tensor(node) and is_tensor(origin)):
        return False
    return elements(shape_of(node), EXAMPLE_ROWS) == elements(shape_of(origin), EXAMPLE_ROWS)


def _origin(node: Node) -> Node:
    """The value that the node is a view of."""
    while node.op == "call_function" and op_name(node) in ON_THE_WAY and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _readers(node: Node) -> list[Node]:
    """What computes with the value or a view of it; sizes are no part of it."""
    found: list[Node] = []
    for user in node.users:
        if user.op == "call_function" and op_name(user) in ON_THE_WAY:
            found += _readers(user)
        elif not is_scalar(user):
            found.append(user)
    return found


def _result_bytes(node: Node, rows: int) -> float:
    results = [node] if is_tensor(node) else [user for user in node.users if op_name(user) == "getitem"]
    return float(sum(bytes_of(result, rows) for result in results))


def _same(work: RowWork) -> RowWork:
    return work


def _node_work(node: Node, rows: int) -> Work:
    name = op_name(node)
    if name in FREE or (name in LAYOUT and _attends(node)):
        return Work()
    written = _result_bytes(node, rows)
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
