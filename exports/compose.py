"""An engine is a run of operations composed into one ONNX model.

Templates are inlined with their names prefixed, weights become external initializers that point into the artifact
itself (file and offset; the file's name is filled in at load time), and values that only the engine's own stages
exchange stay inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, helper
from torch.fx import Node

from dcc.exports.templates import OPSET, OnnxTemplate
from dcc.exports.unroll import Operation, Scalar, Value
from dcc.ir.graph import dtype_of, shape_of
from dcc.ir.program import Stage
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER
from dcc.runtime.plan import TensorSpec, WeightSpec

IR_VERSION = 10
ONNX_TYPES = {
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32,
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "bool": TensorProto.BOOL,
}  # fmt: skip


@dataclass(frozen=True)
class StoredWeights:
    """Where weights lie: by (name, stored transposed), and the file offset that they count from."""

    specs: Mapping[tuple[str, bool], WeightSpec]
    base: int


@dataclass(frozen=True)
class EngineBody:
    """What an engine computes: operations, what they read from outside, and what leaves; with the ports' names."""

    operations: tuple[Operation, ...]
    inputs: Mapping[Value, TensorSpec]
    outputs: Mapping[Value, TensorSpec]

    def stages(self) -> list[str]:
        """Names of the stages among the operations."""
        return [operation.stage for operation in self.operations if operation.stage]


def port_name(node: Node) -> str:
    return node.name


def port_spec(node: Node) -> TensorSpec:
    return TensorSpec(port_name(node), dtype_of(node), shape_of(node))


def compose(
    name: str,
    operations: Sequence[Operation],
    stages: Mapping[str, Stage],
    templates: Mapping[str, OnnxTemplate],
    inputs: Mapping[Value, TensorSpec],
    outputs: Mapping[Value, TensorSpec],
    stored: StoredWeights,
) -> tuple[bytes, tuple[str, ...]]:
    """The serialized model and the names of the plan weights that it reads; ports have the names given here."""
    graph = GraphProto(name=name)
    used: dict[str, WeightSpec] = {}
    ports: dict[Value, str] = {value: spec.name for value, spec in (*inputs.items(), *outputs.items())}
    for number, operation in enumerate(operations):
        prefix = f"s{number}/"
        for index, value in enumerate(operation.outputs):
            ports.setdefault(value, f"{prefix}out{index}")
        if operation.kind != "stage":
            graph.node.extend(_arithmetic(operation, prefix, ports))
            continue
        stage = stages[operation.stage]
        template = templates[stage.template]
        names = dict(zip(template.ports, (ports[value] for value in operation.inputs), strict=True))
        names |= dict(zip(template.outputs, (ports[value] for value in operation.outputs), strict=True))
        for index, (weight, local) in enumerate(zip(stage.weights, template.weights, strict=True)):
            spec = stored.specs[weight, index in template.transposed]
            names[local] = _weight_name(spec)
            used[spec.name] = spec
        for tensor in template.initializers:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            names[tensor.name] = copy.name = prefix + tensor.name
        graph.node.extend(_renamed(node, prefix, names, stage.name) for node in template.nodes)
    graph.initializer.extend(_external(spec, stored.base) for spec in used.values())
    for specs, target in ((inputs, graph.input), (outputs, graph.output)):
        target.extend(
            helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], list(spec.shape))
            for spec in specs.values()
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "dcc"
    return model.SerializeToString(deterministic=True), tuple(used)


def _arithmetic(operation: Operation, prefix: str, ports: Mapping[Value, str]) -> list[NodeProto]:
    """Nodes of a combination or a delta."""
    names = [ports[value] for value in operation.inputs]
    result = ports[operation.outputs[0]]
    if operation.kind == "copy":
        return [helper.make_node("Identity", names, [result], name=f"{prefix}copy")]
    if operation.kind == "delta":
        return [helper.make_node("Sub", names, [result], name=f"{prefix}delta")]
    weights = [name for value, name in zip(operation.inputs, names, strict=True) if isinstance(value, Scalar)]
    terms = names[: len(names) - len(weights)]
    first = 1 if operation.based else 0
    nodes = []
    for index, weight in enumerate(weights):
        product = f"{prefix}product{index}"
        nodes.append(helper.make_node("Mul", [terms[first + index], weight], [product], name=product))
        terms[first + index] = product
    total = terms[0]
    for index, term in enumerate(terms[1:], start=1):
        total, before = f"{prefix}sum{index}", total
        nodes.append(helper.make_node("Add", [before, term], [total], name=total))
    nodes[-1].output[0] = result
    return nodes


def _renamed(node: NodeProto, prefix: str, names: Mapping[str, str], stage: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{stage}/{prefix}{node.name or node.output[0]}"
    copy.input[:] = [name and names.get(name, prefix + name) for name in node.input]
    copy.output[:] = [name and names.get(name, prefix + name) for name in node.output]
    del copy.metadata_props[:]
    copy.doc_string = ""
    return copy


def _weight_name(spec: WeightSpec) -> str:
    """No port and no inner value has this name: a parameter at the root of a module may be called like an input."""
    return f"w/{spec.name}"


def _external(spec: WeightSpec, base: int) -> TensorProto:
    tensor = TensorProto(name=_weight_name(spec), data_type=ONNX_TYPES[spec.dtype], dims=spec.shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {
        "location": EXTERNAL_LOCATION_PLACEHOLDER,
        "offset": str(base + spec.offset),
        "length": str(spec.nbytes),
    }
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
