"""ONNX attention over unsplit heads: `[B, T, H * D]` in and out, and no transpositions around it.

The exporter writes attention as it is in PyTorch: split the heads, transpose, attend, transpose back, join. ONNX's
Attention (opset 23) takes and gives `[B, T, H * D]` with the number of heads as an attribute, and ONNX Runtime then
reads the heads in place. Applied where query, key and value come straight from `Transpose(Reshape(x))` and the result
goes straight to `Reshape(Transpose(y))`; rotary embeddings and norms per head are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

HEADS_FIRST = [0, 2, 1, 3]
Sizes = Mapping[str, list[int | str]]


def known_sizes(values: Sequence[ValueInfoProto]) -> dict[str, list[int | str]]:
    """Sizes of the values whose type the exporter wrote down; symbols by name."""
    return {
        value.name: [
            size.dim_value if size.HasField("dim_value") else size.dim_param
            for size in value.type.tensor_type.shape.dim
        ]
        for value in values
    }


def attend_unsplit(
    nodes: Sequence[NodeProto], outputs: Sequence[str], constants: Mapping[str, TensorProto], sizes: Sizes
) -> list[NodeProto]:
    """The nodes with every attention that allows it on unsplit heads; what nobody reads any more is gone."""
    result = list(nodes)
    for attention in [node for node in nodes if node.op_type == "Attention"]:
        result = _unsplit(result, attention, set(outputs), constants, sizes)
    return result


def _unsplit(
    nodes: list[NodeProto],
    attention: NodeProto,
    outputs: set[str],
    constants: Mapping[str, TensorProto],
    sizes: Sizes,
) -> list[NodeProto]:
    producers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sources = [_joined_source(name, producers, constants, sizes) for name in attention.input[:3]]
    result = _joined_result(attention.output[0], readers, sizes)
    if len(attention.output) != 1 or len(attention.input) > 4 or result is None:
        return nodes
    found = [source for source in sources if source is not None]
    transposed, joined = result
    if len(found) != 3 or found[1][1] != found[2][1] or {attention.output[0], transposed.output[0]} & outputs:
        return nodes
    new = helper.make_node(
        "Attention",
        [*(name for name, _ in found), *attention.input[3:]],
        [joined.output[0]],
        name=attention.name,
        q_num_heads=found[0][1],
        kv_num_heads=found[1][1],
    )
    new.attribute.extend(item for item in attention.attribute if item.name not in ("q_num_heads", "kv_num_heads"))
    kept = [node for node in nodes if node is not transposed and node is not joined]
    kept[next(index for index, node in enumerate(kept) if node is attention)] = new
    return _without_unread(kept, outputs)


def _joined_source(
    name: str, producers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto], sizes: Sizes
) -> tuple[str, int] | None:
    """`[B, T, H * D]` from which this `[B, H, T, D]` is split, and H."""
    transpose = producers.get(name)
    if transpose is None or transpose.op_type != "Transpose" or _permutation(transpose) != HEADS_FIRST:
        return None
    reshape = producers.get(transpose.input[0])
    if reshape is None or reshape.op_type != "Reshape" or reshape.input[1] not in constants:
        return None
    target = [int(size) for size in numpy_helper.to_array(constants[reshape.input[1]])]
    source = sizes.get(reshape.input[0])
    if len(target) != 4 or source is None or len(source) != 3:
        return None
    if target[1] != source[1] or target[2] * target[3] != source[2]:
        return None
    return reshape.input[0], target[2]


def _joined_result(
    name: str, readers: Mapping[str, list[NodeProto]], sizes: Sizes
) -> tuple[NodeProto, NodeProto] | None:
    """The transposition and the reshape that join the heads again, if nothing else reads in between."""
    users = readers.get(name, [])
    if len(users) != 1 or users[0].op_type != "Transpose" or _permutation(users[0]) != HEADS_FIRST:
        return None
    after = readers.get(users[0].output[0], [])
    split, joined = sizes.get(users[0].output[0]), sizes.get(after[0].output[0]) if len(after) == 1 else None
    if len(after) != 1 or after[0].op_type != "Reshape" or split is None or joined is None or len(joined) != 3:
        return None
    heads, width = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(width, int) or joined[1:] != [split[1], heads * width]:
        return None
    return users[0], after[0]


def _permutation(node: NodeProto) -> list[int]:
    return next((list(item.ints) for item in node.attribute if item.name == "perm"), [])


def _without_unread(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    while True:
        read = {name for node in nodes for name in node.input} | outputs
        kept = [node for node in nodes if any(name in read for name in node.output)]
        if len(kept) == len(nodes):
            return kept
        nodes = kept
