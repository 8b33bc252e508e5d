"""Engines of a plan as torch graphs, for whoever makes networks of ATen operations instead of ONNX ones.

A graph has the engine's ports and holds the Program's weights. In a reduced type its contractions compute in that type
and all else in float32, as the rules of `precision_rules.py` have it:

| rule | here |
|---|---|
| contraction, bias | reduced: operands are cast before, the result to float32 behind; a weight is stored in the type |
| angle | the nearest contraction before a sine or cosine stays in float32 |
| overflow | so does one with a weight that is infinite in float16; a mask is cut off instead |
| all others | float32: no activation is reduced between two contractions, and what only moves numbers moves float32 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from dcc.errors import ExportError
from dcc.exports.compose import EngineBody
from dcc.exports.precision_rules import FLOAT16_LARGEST, FLOAT16_OVERFLOW
from dcc.exports.segments import like
from dcc.exports.unroll import Operation, Scalar, Value
from dcc.ir.graph import BATCH, DTYPES, op_name, outputs_of, shape_of
from dcc.ir.ops import is_contraction
from dcc.ir.program import Program

aten = torch.ops.aten

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[[Mapping[str, Array]], dict[str, Array]]

REDUCED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = "scaled_dot_product_attention"
# Arguments that are sizes of the result; one of them may be -1, which hides from TensorRT that it is fixed.
SIZED = frozenset(("reshape", "view", "_unsafe_view"))
EXAMPLE_ROWS = 3


def torch_engine(program: Program, body: EngineBody, dtype: str = "float32") -> ExportedProgram:
    """The engine as torch exports it, in float32 or reduced to `dtype`; its arguments are the ports in their order.

    Raises ExportError where torch refuses the graph.
    """
    module = torch_graph(program, body)
    if dtype != "float32":
        reduce_contractions(module, REDUCED[dtype])
    batch = torch.export.Dim("B", min=1, max=65536)
    examples, symbols = [], []
    for spec in body.inputs.values():
        sizes = [EXAMPLE_ROWS if size == BATCH else int(size) for size in spec.shape]
        examples.append(torch.zeros(sizes, dtype=DTYPES[spec.dtype]))
        symbols.append({axis: batch for axis, size in enumerate(spec.shape) if size == BATCH} or None)
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(examples), dynamic_shapes=tuple(symbols))
    except Exception as error:  # torch raises many types; every one means that there is no such graph
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            "torch does not export an engine", at=", ".join(body.stages())[:200], got=(lines or [""])[0][:300],
            next="--lowering onnx",
        ) from error  # fmt: skip


def as_function(exported: ExportedProgram, body: EngineBody) -> Function:
    """The exported engine on arrays, run by torch on this machine's processor."""
    module = exported.module()

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            # A copy: torch warns of arrays that it may not write to.
            results = module(*(torch.from_numpy(inputs[port.name].copy()) for port in body.inputs.values()))
        return {port.name: made.numpy() for port, made in zip(body.outputs.values(), results, strict=True)}

    return run


def torch_graph(program: Program, body: EngineBody) -> GraphModule:
    """The engine's operations in float32, every weight once."""
    return _Builder(program, body).build()


class _Builder:
    """Copies the bodies of stages one behind the other, and writes the operations of schedules."""

    def __init__(self, program: Program, body: EngineBody) -> None:
        self._program, self._body = program, body
        self._graph, self._root = Graph(), torch.nn.Module()
        self._values: dict[Value, Node] = {}
        self._weights: dict[str, Node] = {}
        self._stages = {stage.name: stage for stage in program.stages}

    def build(self) -> GraphModule:
        for index, value in enumerate(self._body.inputs):
            self._values[value] = self._graph.placeholder(f"input{index}")
            if not isinstance(value, Scalar):
                self._values[value].meta["val"] = like(value).meta["val"]
        for operation in self._body.operations:
            if operation.kind == "stage":
                self._stage(operation)
            else:
                result = self._arithmetic(operation)
                result.meta["val"] = like(operation.outputs[0]).meta["val"]
                self._values[operation.outputs[0]] = result
        self._graph.output(tuple(self._values[value] for value in self._body.outputs))
        self._graph.eliminate_dead_code()
        return GraphModule(self._root, self._graph)

    def _stage(self, operation: Operation) -> None:
        stage = self._stages[operation.stage]
        template = self._program.templates[stage.template].graph
        ports, names = iter(operation.inputs), iter(stage.weights)
        copies: dict[Node, Node] = {}
        for node in template.nodes:
            if node.op == "placeholder":
                # Templates call their ports p0, p1 ... and their weights w0, w1 ...
                copies[node] = self._values[next(ports)] if node.name.startswith("p") else self._weight(next(names))
            elif node.op == "call_function":
                copies[node] = self._graph.node_copy(node, copies.__getitem__)
                # torch carries this through its export, so whoever refuses a node can say whose it is.
                copies[node].meta["custom"] = {"stage": stage.name}
                _with_known_sizes(copies[node])
        made = zip(operation.outputs, outputs_of(template), strict=True)
        self._values |= {value: copies[result] for value, result in made}

    def _weight(self, name: str) -> Node:
        if name not in self._weights:
            attribute = f"weight{len(self._weights)}"
            self._root.register_buffer(attribute, self._program.weights[name].detach())
            self._weights[name] = self._graph.get_attr(attribute)
            self._weights[name].meta["val"] = self._program.weights[name]
        return self._weights[name]

    def _arithmetic(self, operation: Operation) -> Node:
        """The last node of a combination, a delta or a copy."""
        values = [self._values[value] for value in operation.inputs]
        if operation.kind == "copy":
            # An engine cannot give one value under two names.
            return self._call(aten.clone.default, values[0])
        if operation.kind == "delta":
            return self._call(aten.sub.Tensor, *values)
        count = sum(isinstance(value, Scalar) for value in operation.inputs)
        terms, weights = values[: len(values) - count], values[len(values) - count :]
        first = 1 if operation.based else 0
        for index, weight in enumerate(weights):
            terms[first + index] = self._call(aten.mul.Tensor, terms[first + index], weight)
        total = terms[0]
        for term in terms[1:]:
            total = self._call(aten.add.Tensor, total, term)
        return total

    def _call(self, target: Any, *arguments: Node) -> Node:
        return self._graph.call_function(target, arguments)


def _with_known_sizes(node: Node) -> None:
    """Sizes that are fixed are said: -1 is left to the rows alone.

    A size that follows from a division by the rows is no fixed one for TensorRT.
    """
    if node.op != "call_function" or op_name(node) not in SIZED:
        return
    shape = shape_of(node)
    open_axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(open_axes) <= 1:
        node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in shape])


def reduce_contractions(module: GraphModule, to: torch.dtype) -> None:
    """Contractions compute in the reduced type where the rules allow it; what reads them has float32 again."""
    graph = module.graph
    angles = _angles(graph)
    narrow: dict[Node, Node] = {}
    wide: dict[Node, Node] = {}  # float32 again, and the reduced value that it came from

    def reduced(value: Node) -> Node:
        known = value.meta.get("val")
        if not isinstance(known, Tensor) or known.dtype != torch.float32:
            return value
        if value in wide:
            return wide[value]
        if value not in narrow:
            if value.op == "get_attr":
                narrow[value] = _reduced_weight(module, value, to)
            else:
                narrow[value] = graph.call_function(aten._to_copy.default, (value,), {"dtype": to})
        return narrow[value]

    for node in list(graph.nodes):
        known = node.meta.get("val")
        floating = isinstance(known, Tensor) and known.dtype == torch.float32
        if not (floating and is_contraction(node)) or node in angles or _overflows(module, node, to):
            continue
        with graph.inserting_before(node):
            node.args = torch.fx.map_arg(node.args, reduced)
            node.kwargs = torch.fx.map_arg(node.kwargs, reduced)
        with graph.inserting_after(node):
            result = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
        result.meta["val"] = known
        node.replace_all_uses_with(result, lambda user, result=result: user is not result)
        wide[result] = node
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in read]:
        delattr(module, name)
    module.recompile()


def _reduced_weight(module: GraphModule, node: Node, to: torch.dtype) -> Node:
    """The weight in the reduced type beside the one in float32; what would become infinite is cut off."""
    weight = module.get_buffer(str(node.target))
    if to == torch.float16:
        weight = weight.clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST)
    name = f"{node.target}_reduced"
    module.register_buffer(name, weight.to(to))
    return module.graph.get_attr(name)


def _overflows(module: GraphModule, node: Node, to: torch.dtype) -> bool:
    """Whether the contraction has a weight that float16 cannot hold. A mask may be such: it means the same then."""
    if to != torch.float16 or op_name(node) == ATTENTION:
        return False
    weights = [module.get_buffer(str(item.target)) for item in node.all_input_nodes if item.op == "get_attr"]
    return any(_largest(weight) >= FLOAT16_OVERFLOW for weight in weights if weight.is_floating_point())


def _largest(weight: Tensor) -> float:
    finite = weight.nan_to_num(0.0, 0.0, 0.0)
    return max(float(finite.amax()), -float(finite.amin())) if weight.numel() else 0.0


def _angles(graph: Graph) -> set[Node]:
    """What sines and cosines are computed from, back to the nearest contraction and with it."""
    stack: list[Node] = [node for node in graph.nodes if op_name(node) in ("sin", "cos")]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if not is_contraction(node):
            stack += _tensors(node.all_input_nodes)
    return found


def _tensors(nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
