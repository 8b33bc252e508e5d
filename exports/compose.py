"""An engine is a run of stages composed into one ONNX model.

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


def port_name(node: Node) -> str:
    return node.name


def port_spec(node: Node) -> TensorSpec:
    return TensorSpec(port_name(node), dtype_of(node), shape_of(node))


def compose(
    name: str,
    stages: Sequence[Stage],
    templates: Mapping[str, OnnxTemplate],
    inputs: Sequence[Node],
    outputs: Sequence[Node],
    stored: StoredWeights,
) -> tuple[bytes, tuple[str, ...]]:
    """The serialized model and the names of the plan weights that it reads."""
    graph = GraphProto(name=name)
    used: dict[str, WeightSpec] = {}
    for number, stage in enumerate(stages):
        template = templates[stage.template]
        names = dict(zip(template.ports, map(port_name, stage.inputs), strict=True))
        names |= dict(zip(template.outputs, map(port_name, stage.outputs), strict=True))
        for index, (weight, local) in enumerate(zip(stage.weights, template.weights, strict=True)):
            spec = stored.specs[weight, index in template.transposed]
            names[local] = _weight_name(spec)
            used[spec.name] = spec
        prefix = f"s{number}/"
        for tensor in template.initializers:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            names[tensor.name] = copy.name = prefix + tensor.name
        graph.node.extend(_renamed(node, prefix, names, stage.name) for node in template.nodes)
    graph.initializer.extend(_external(spec, stored.base) for spec in used.values())
    for nodes, target in ((inputs, graph.input), (outputs, graph.output)):
        target.extend(
            helper.make_tensor_value_info(port_name(node), ONNX_TYPES[dtype_of(node)], list(shape_of(node)))
            for node in nodes
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "dcc"
    return model.SerializeToString(deterministic=True), tuple(used)


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
