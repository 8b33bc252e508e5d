"""Templates as ONNX: every distinct stage body is exported once, all of them in one call of torch's exporter.

The exporter pays about a second for each call whatever the size, so the bodies are laid side by side in one graph
(each with a batch symbol of its own, so that nothing is shared by accident) and taken apart again by name.
Opset 23 keeps attention as one operation; 25 decomposes it and ran 1.1 to 2.8 times slower.

`Transpose` of a weight, which is how the exporter spells the layout of a linear, is taken out of the graph: the
weight is stored transposed instead, so loading a model moves no weights.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import NodeProto, TensorProto
from torch.fx import Graph, GraphModule, Node

from dcc.errors import ExportError
from dcc.exports.attention_layout import attend_unsplit, known_sizes
from dcc.ir.graph import BATCH, DTYPES, dtype_of, outputs_of, shape_of

OPSET = 23
aten = torch.ops.aten


@dataclass(frozen=True)
class OnnxTemplate:
    """ONNX nodes between named ports. `transposed` are the indices of weights that are stored transposed."""

    nodes: tuple[NodeProto, ...]
    initializers: tuple[TensorProto, ...]
    ports: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    transposed: frozenset[int]


def export_templates(templates: Mapping[str, GraphModule]) -> dict[str, OnnxTemplate]:
    """Every template by its hash. Raises ExportError naming the operation that has no ONNX form."""
    if not templates:
        return {}
    graph, inputs, dynamic, names = _side_by_side(templates)
    model = _export(GraphModule(torch.nn.Module(), graph), inputs, dynamic, names)
    if model.functions:
        raise ExportError("the exporter left functions in the graph", got=[item.name for item in model.functions][:5])
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    order = {id(node): index for index, node in enumerate(model.graph.node)}
    sizes = known_sizes([*model.graph.value_info, *model.graph.input, *model.graph.output])
    found = {}
    for number, (key, module) in enumerate(templates.items()):
        kinds = [node.name[0] for node in module.graph.nodes if node.op == "placeholder"]
        tensors = [f"t{number}_{node.name}" for node in module.graph.nodes if node.op == "placeholder"]
        outputs = [f"t{number}_o{index}" for index in range(len(outputs_of(module.graph)))]
        nodes = attend_unsplit(_slice(outputs, producers, order), outputs, constants, sizes)
        read = {name for node in nodes for name in node.input}
        initializers = [tensor for name, tensor in constants.items() if name in read]
        ports = tuple(name for name, kind in zip(tensors, kinds, strict=True) if kind == "p")
        weights = [name for name, kind in zip(tensors, kinds, strict=True) if kind == "w"]
        nodes, transposed = _store_transposed(nodes, weights, outputs)
        found[key] = OnnxTemplate(
            tuple(nodes), tuple(initializers), ports, tuple(weights), tuple(outputs), frozenset(transposed)
        )
    return found


def _side_by_side(
    templates: Mapping[str, GraphModule],
) -> tuple[Graph, list[torch.Tensor], list[dict[int, torch.export.Dim] | None], tuple[list[str], list[str]]]:
    graph = Graph()
    inputs: list[torch.Tensor] = []
    dynamic: list[dict[int, torch.export.Dim] | None] = []
    placed: list[dict[Node, Node]] = []
    for number, module in enumerate(templates.values()):
        batch = torch.export.Dim(f"B{number}", min=1, max=65536)
        copies: dict[Node, Node] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = graph.placeholder(f"t{number}_{node.name}")
                shape = shape_of(node)
                inputs.append(
                    torch.zeros([3 if size == BATCH else int(size) for size in shape], dtype=DTYPES[dtype_of(node)])
                )
                axes = {axis: batch for axis, size in enumerate(shape) if size == BATCH}
                dynamic.append(axes or None)
        placed.append(copies)
    results: list[Node] = []
    names: list[str] = []
    for number, (module, copies) in enumerate(zip(templates.values(), placed, strict=True)):
        for node in module.graph.nodes:
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                _widen_mask(node, copies[node], graph)
        for index, node in enumerate(outputs_of(module.graph)):
            results.append(copies[node])
            names.append(f"t{number}_o{index}")
    graph.output(tuple(results))
    return graph, inputs, dynamic, ([node.name for node in graph.nodes if node.op == "placeholder"], names)


def _widen_mask(node: Node, copy: Node, graph: Graph) -> None:
    """A mask that is the same for all queries is given to each: ONNX Runtime's attention does not broadcast it."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(mask, Node):
        return
    queries, shape = shape_of(node.all_input_nodes[0])[-2], shape_of(mask)
    if len(shape) < 2 or shape[-2] != 1 or queries == 1:
        return
    given = copy.kwargs.get("attn_mask", copy.args[3] if len(copy.args) > 3 else None)
    assert isinstance(given, Node)
    with graph.inserting_before(copy):
        sizes = [-1] * (len(shape) - 2) + [queries, -1]
        copy.replace_input_with(given, graph.call_function(aten.expand.default, (given, sizes)))


def _export(
    module: GraphModule,
    inputs: list[torch.Tensor],
    dynamic: list[dict[int, torch.export.Dim] | None],
    names: tuple[list[str], list[str]],
) -> onnx.ModelProto:
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(module, tuple(inputs), dynamic_shapes=tuple(dynamic))
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, verbose=False, input_names=names[0], output_names=names[1]
            )
    except Exception as error:  # the exporter raises many types; every one means "no ONNX form"
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise ExportError(
            "a stage has no ONNX form", at=type(cause).__name__, got=(lines or [""])[0][:300],
            next="replace the operation in the model, or report it with `dcc inspect --graph`",
        ) from error  # fmt: skip
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _slice(outputs: list[str], producers: Mapping[str, NodeProto], order: Mapping[int, int]) -> list[NodeProto]:
    """The nodes that the outputs depend on, in the model's order."""
    nodes: dict[int, NodeProto] = {}
    stack = list(outputs)
    while stack:
        node = producers.get(stack.pop())
        if node is not None and id(node) not in nodes:
            nodes[id(node)] = node
            stack += [source for source in node.input if source]
    return [nodes[key] for key in sorted(nodes, key=order.__getitem__)]


def _store_transposed(
    nodes: list[NodeProto], weights: list[str], outputs: list[str]
) -> tuple[list[NodeProto], set[int]]:
    """Weights that are only ever transposed are stored so: the transposition leaves the graph."""
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    renamed: dict[str, str] = {}
    transposed: set[int] = set()
    dropped: set[int] = set()
    for index, weight in enumerate(weights):
        users = readers.get(weight, [])
        if users and all(_is_matrix_transpose(node) and node.output[0] not in outputs for node in users):
            transposed.add(index)
            for node in users:
                renamed[node.output[0]] = weight
                dropped.add(id(node))
    kept = []
    for node in nodes:
        if id(node) in dropped:
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        kept.append(copy)
    return kept, transposed


def _is_matrix_transpose(node: NodeProto) -> bool:
    permutation = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
    return node.op_type == "Transpose" and permutation == [1, 0]
