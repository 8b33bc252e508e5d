"""Strongly typed engines with their weights where somebody can read them.

| form | the weights | for |
|---|---|---|
| `linked` | those of the portable engine, in the artifact, cast in the graph | the artifact: kilobytes an engine |
| `with_weights_in_file` | in their own type in a file of their own | builders, which then need not hold both types |
| `rounded` | as they were; values are float32, rounded to the type's mantissa | checks where there are no kernels |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dcc.exports.precision import NAMES, REDUCED, Typed
from dcc.exports.precision_rules import is_external

MANTISSA_BITS = {"float16": 11, "bfloat16": 8}
HALF = TensorProto.FLOAT16


def linked(typed: Typed, source: ModelProto) -> ModelProto:
    """A copy of the typed model that reads the weights of `source`, the engine that it was made from.

    A weight of another type is cast in the graph, which a builder does once. One that the type cannot hold is embedded,
    cut off.
    """
    stored = {tensor.name: tensor for tensor in source.graph.initializer}
    model = ModelProto()
    model.CopyFrom(typed.model)
    del model.graph.initializer[:], model.graph.node[:]
    links: dict[str, TensorProto] = {}
    for tensor in typed.model.graph.initializer:
        if not is_external(tensor):
            model.graph.initializer.add().CopyFrom(tensor)
            continue
        name, kind = typed.origins[tensor.name]
        if kind != stored[name].data_type and name in typed.record.overflows:
            model.graph.initializer.add().CopyFrom(numpy_helper.from_array(typed.weight(tensor.name), tensor.name))
            continue
        spelt = tensor.name if kind == stored[name].data_type else f"{name}/stored"
        links[spelt] = stored[name]
        if spelt != tensor.name:
            label = f"{tensor.name}/to_{NAMES[kind]}"
            model.graph.node.append(helper.make_node("Cast", [spelt], [tensor.name], name=label, to=kind))
    for spelt, tensor in links.items():
        link = model.graph.initializer.add()
        link.CopyFrom(tensor)
        link.name = spelt
    model.graph.node.extend(typed.model.graph.node)
    return model


def with_weights_in_file(typed: Typed, path: Path) -> ModelProto:
    """A copy of the model whose large weights lie in the file, one in memory at a time."""
    model = ModelProto()
    model.CopyFrom(typed.model)
    declared = set(typed.declared())
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name in declared:
                data = np.ascontiguousarray(typed.weight(tensor.name)).reshape(-1).view(np.uint8).data
                del tensor.external_data[:]
                place = {"location": path.name, "offset": file.tell(), "length": data.nbytes}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                file.write(data)
    return model


def rounded(model: ModelProto, dtype: str) -> ModelProto:
    """The typed model in float32 alone, its values of the reduced type rounded to that type's mantissa.

    ONNX Runtime's CPU provider would compute runs of float16 nodes in float32 without the roundings between them, and
    has no bfloat16 kernels. What float16 cannot hold becomes infinite. What happens inside one node (the scores of a
    fused attention) is not rounded: kernels keep float32 there.
    """
    types, reduced = types_of(model), REDUCED[dtype]
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for tensor in result.graph.initializer:
        if tensor.data_type == reduced and not is_external(tensor):
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    # Veltkamp's splitting: adding x * 2 ** n and taking it off again leaves x without its last n bits, rounded.
    splitter = np.array(2 ** (24 - MANTISSA_BITS[dtype]) + 1, np.float32)
    result.graph.initializer.append(numpy_helper.from_array(splitter, "splitter"))
    if dtype == "float16":
        # Times 2 ** 112, what is 2 ** 16 or more leaves float32, and does not come back.
        for name, exponent in (("to_the_edge", 112), ("from_the_edge", -112)):
            result.graph.initializer.append(numpy_helper.from_array(np.array(2.0**exponent, np.float32), name))
    for node in model.graph.node:
        result.graph.node.extend(_rounded_node(node, types, reduced))
    return result


def types_of(model: ModelProto) -> dict[str, int]:
    """The type of every value, by strict inference."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }


def _rounded_node(node: NodeProto, types: dict[str, int], reduced: int) -> list[NodeProto]:
    copy = NodeProto()
    copy.CopyFrom(node)
    if node.op_type == "Cast" and types.get(node.input[0]) in NAMES and types.get(node.output[0]) in NAMES:
        copy.CopyFrom(helper.make_node("Identity", node.input, node.output))
    nodes = [copy]
    for index, name in enumerate(node.output):
        if types.get(name) == reduced:
            exact, product, surplus = (f"{name}/{part}" for part in ("exact", "product", "surplus"))
            copy.output[index] = exact
            nodes += [
                helper.make_node("Mul", [exact, "splitter"], [product]),
                helper.make_node("Sub", [product, exact], [surplus]),
                helper.make_node("Sub", [product, surplus], [f"{name}/near" if reduced == HALF else name]),
            ]
            if reduced == HALF:
                nodes += [
                    helper.make_node("Mul", [f"{name}/near", "to_the_edge"], [f"{name}/far"]),
                    helper.make_node("Mul", [f"{name}/far", "from_the_edge"], [name]),
                ]
    return nodes
