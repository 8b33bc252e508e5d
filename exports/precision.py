"""A float32 engine becomes a strongly typed one: the precision of each node is chosen and written into the graph.

TensorRT 11 has no precision flags: a node computes in the type of its inputs, and types change in Casts alone. A table
of rules (`precision_rules.RULES`) gives every node one of four choices:

| choice | the node computes in |
|---|---|
| `float32` | float32: norms, softmax, angles, sums and products outside of contractions, and what no rule knows |
| `reduced` | float16 or bfloat16: contractions, and the bias that a kernel adds before it stores their result |
| `between` | the reduced type where all it reads and all its readers have it, which saves two Casts; else float32 |
| `carried` | no arithmetic, so the type with the fewer bytes and Casts around it; the numbers are the same in both |

A value is cast at most once to each type, before its first reader. Weights are not cast: each is stored in the type
that its readers want, in both where they differ. Inputs and outputs of the engine keep their names and types.

float64, which the exporter writes for rotary positions, becomes float32: TensorRT reads it as that.
Attention has an attribute for the precision of its softmax, but TensorRT's parser refuses every model that sets it, so
it is not set; the softmax of a fused kernel is TensorRT's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dcc.errors import ExportError
from dcc.exports.precision_rules import ARRAY_TYPES, Facts, Weights, is_external

REDUCED: dict[str, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", **{number: name for name, number in REDUCED.items()}}
# Weights that the model only declares: their values are asked for by name.
DECLARED = "dcc-the-weights-are-given-by-name"
PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class PrecisionRecord:
    """What was chosen for one engine, as JSON takes it (`dataclasses.asdict`).

    `nodes` counts nodes by type, Casts apart; `float32` names the nodes that each rule kept in float32, `reduced`
    counts those that it did not; `overflows` are weights that float16 cannot hold.
    """

    dtype: str
    nodes: dict[str, int]
    float32: dict[str, list[str]]
    reduced: dict[str, int]
    casts: list[str]
    overflows: list[str]
    weight_bytes_before: int
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Typed:
    """A strongly typed engine: `model` declares its large weights, `weight(name)` is one of them in that type.

    `origins` says which weight of the engine that was given a declared one is, and its type now.
    """

    model: ModelProto
    record: PrecisionRecord
    weight: Callable[[str], np.ndarray]
    origins: Mapping[str, tuple[str, int]]

    def declared(self) -> list[str]:
        """Names of the weights that the model does not contain."""
        return [tensor.name for tensor in self.model.graph.initializer if is_external(tensor)]

    def embedded(self) -> ModelProto:
        """A copy of the model that contains its weights. Raises ExportError where protobuf cannot hold them."""
        if self.record.weight_bytes > PROTOBUF_LIMIT:
            raise ExportError(
                "an engine's weights do not fit into one protobuf", got=f"{self.record.weight_bytes} bytes",
                want=f"at most {PROTOBUF_LIMIT}", next="give the weights by name, or cut the step into several engines",
            )  # fmt: skip
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if is_external(tensor):
                _embed(tensor, self.weight(tensor.name))
        return model


def strongly_typed(model: ModelProto, dtype: str, weights: Callable[[str], np.ndarray]) -> Typed:
    """The engine in float32 and `dtype`, every precision chosen by `RULES`; the model that is given is left alone.

    `weights(name)` is an external initializer by its name in the graph; it is asked for again whenever a weight is
    needed, so that one at a time is in memory (float16 looks at each once to find overflows). bfloat16 may come as
    uint16. Raises ExportError for another dtype, and for graphs with nested graphs, functions or float64 ports.
    """
    if dtype not in REDUCED:
        raise ExportError("unknown reduced precision", got=dtype, want=", ".join(REDUCED))
    _refuse_what_cannot_be_typed(model)
    floating = _floating_values(model)
    graph = _without_float_casts(model.graph, floating)
    versions = {item.domain: item.version for item in model.opset_import}
    facts = Facts(graph, floating, Weights(graph, weights, dtype), versions)
    typed = _Writer(facts, REDUCED[dtype], _precisions(facts)).write()
    result = ModelProto()
    result.CopyFrom(_shell(model))
    result.graph.CopyFrom(typed.graph)
    return Typed(result, typed.record(dtype), typed.weight, typed.origins)


def _precisions(facts: Facts) -> dict[str, bool]:
    """Whether each node with floating point computes in the reduced type."""
    reduced = {key: rule.choice in ("reduced", "between") for key, rule in facts.rules.items()}
    ends = {name: type_ in REDUCED.values() for name, type_ in (facts.ports | facts.results).items()}

    def is_reduced(place: str) -> bool:
        return ends[place] if place in ends and place not in reduced else reduced[place]

    between = {key: [*facts.sources(key), *facts.users(key)] for key in reduced if facts.rules[key].choice == "between"}
    settled = False
    while not settled:
        changes = [key for key, around in between.items() if reduced[key] and not all(map(is_reduced, around))]
        reduced |= dict.fromkeys(changes, False)
        settled = not changes
    for key in [key for key in reduced if facts.rules[key].choice == "carried"]:
        read = [name for name in facts.floats(facts.nodes[key].input) if name not in facts.weights]
        comes_reduced = bool(read) and all(is_reduced(facts.producers.get(name, name)) for name in read)
        users = [is_reduced(place) for place in facts.users(key)]
        # The fewer bytes move the better, but parts that all go to float32 are cast once, before they are parted.
        reduced[key] = bool(users) and (all(users) or (comes_reduced and (any(users) or len(users) == 1)))
    return reduced


class _Writer:
    """Writes the typed graph: nodes in their order, each Cast before the first node that reads it."""

    def __init__(self, facts: Facts, to: int, reduced: dict[str, bool]) -> None:
        self._facts, self._to, self._reduced = facts, to, reduced
        self.graph = GraphProto(name=facts.graph.name)
        self._made = dict(facts.ports)
        self._spelt: dict[tuple[str, int], str] = {}
        self._wanted: dict[str, set[int]] = {}
        self._casts: list[str] = []
        self.origins: dict[str, tuple[str, int]] = {}

    def write(self) -> _Writer:
        self.graph.input.extend(self._facts.graph.input)
        self.graph.output.extend(self._facts.graph.output)
        for key, node in self._facts.nodes.items():
            for name in self._facts.floats(node.input):
                if name in self._facts.weights:
                    self._wanted.setdefault(name, set()).add(self._type(key))
        for key, node in self._facts.nodes.items():
            self._node(key, node)
        for tensor in self._facts.graph.initializer:
            self._weight(tensor)
        return self

    def weight(self, name: str) -> np.ndarray:
        return self._facts.weights.converted(*self.origins[name])

    def record(self, dtype: str) -> PrecisionRecord:
        kept: dict[str, list[str]] = {}
        given: Counter[str] = Counter()
        for key, rule in self._facts.rules.items():
            if self._reduced[key]:
                given[rule.name] += 1
            else:
                kept.setdefault(rule.name, []).append(self._facts.nodes[key].name or key)
        counts = {
            "float32": sum(map(len, kept.values())), dtype: given.total(),
            "integer": len(self._facts.nodes) - len(self._facts.rules),
        }  # fmt: skip
        before, after = (sum(map(_nbytes, graph.initializer)) for graph in (self._facts.graph, self.graph))
        overflows = self._facts.weights.overflowing()
        return PrecisionRecord(dtype, counts, kept, dict(given), self._casts, overflows, before, after)

    def _type(self, key: str) -> int:
        return self._to if self._reduced[key] else TensorProto.FLOAT

    def _node(self, key: str, node: NodeProto) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        if key not in self._reduced:
            self.graph.node.append(copy)
            return
        wanted = self._type(key)
        _retype_attributes(copy, wanted)
        copy.input[:] = [self._read(name, wanted) if name in self._facts.floating else name for name in node.input]
        self.graph.node.append(copy)
        for index, name in enumerate(node.output):
            if name not in self._facts.floating:
                continue
            self._made[name] = wanted
            declared = self._facts.results.get(name, wanted)
            if declared != wanted:
                copy_name = f"{name}/{NAMES[wanted]}"
                self.graph.node[-1].output[index] = self._spelt[name, wanted] = copy_name
        for name in node.output:
            if name in self._facts.results and name in self._facts.floating:
                self._read(name, self._facts.results[name])

    def _read(self, name: str, wanted: int) -> str:
        """The name under which the value has this type; a Cast is added where it has not yet."""
        if name in self._facts.weights:
            return name if len(self._wanted[name]) == 1 or wanted == TensorProto.FLOAT else f"{name}/{NAMES[wanted]}"
        made = self._made[name]
        source = self._spelt.setdefault((name, made), name)
        if (name, wanted) not in self._spelt:
            is_result = self._facts.results.get(name) == wanted and name not in self._facts.ports
            spelt = self._spelt[name, wanted] = name if is_result else f"{name}/{NAMES[wanted]}"
            self.graph.node.append(
                helper.make_node("Cast", [source], [spelt], name=f"{name}/to_{NAMES[wanted]}", to=wanted)
            )
            self._casts.append(f"{name} to {NAMES[wanted]}")
        return self._spelt[name, wanted]

    def _weight(self, tensor: TensorProto) -> None:
        wanted = sorted(self._wanted.get(tensor.name, ())) or [tensor.data_type]
        for to in wanted:
            name = self._read(tensor.name, to) if len(wanted) > 1 else tensor.name
            self.origins[name] = tensor.name, to
            copy = self.graph.initializer.add(name=name, data_type=to, dims=tensor.dims)
            if is_external(tensor):
                copy.data_location = TensorProto.EXTERNAL
                copy.external_data.add(key="location", value=DECLARED)
            else:
                _embed(copy, self.weight(name))


def _refuse_what_cannot_be_typed(model: ModelProto) -> None:
    nested = [
        node.name or node.op_type for node in model.graph.node
        if any(item.HasField("g") or item.graphs for item in node.attribute)
    ]  # fmt: skip
    if nested or model.functions or model.graph.sparse_initializer:
        raise ExportError(
            "an engine has more than one plain graph", got=nested[:5] or "functions or sparse weights",
            want="nodes and dense weights only",
        )  # fmt: skip
    doubles = [
        value.name for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE
    ]  # fmt: skip
    if doubles:
        raise ExportError("an engine has float64 ports", got=doubles[:5], want="float32: TensorRT has no float64")


def _floating_values(model: ModelProto) -> set[str]:
    """Names of all values in floating point. What shape inference does not know counts: no integer is left unknown."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer} | {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    made = [name for node in inferred.node for name in node.output if name]
    return {name for name in {*types, *made} if types.get(name, TensorProto.FLOAT) in ARRAY_TYPES}


def _without_float_casts(graph: GraphProto, floating: set[str]) -> GraphProto:
    """The graph before any precision was chosen; a cast result of it keeps its name."""
    results = {value.name for value in graph.output}
    fixed = results | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    plain: dict[str, str] = {}
    renamed: dict[str, str] = {}
    result = GraphProto(name=graph.name)
    result.CopyFrom(graph)
    del result.node[:], result.value_info[:]
    for node in graph.node:
        if not (node.op_type == "Cast" and node.input[0] in floating and node.output[0] in floating):
            result.node.add().CopyFrom(node)
            continue
        source = plain.get(node.input[0], node.input[0])
        if node.output[0] not in results:
            plain[node.output[0]] = source
        elif source in fixed or source in renamed:
            result.node.add().CopyFrom(helper.make_node("Identity", [source], list(node.output), name=node.name))
        else:
            renamed[source] = node.output[0]
    for node in result.node:
        names = [plain.get(name, name) for name in node.input]
        node.input[:] = [renamed.get(name, name) for name in names]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    return result


def _shell(model: ModelProto) -> ModelProto:
    """All of the model but its graph."""
    shell = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    shell.opset_import.extend(model.opset_import)
    shell.metadata_props.extend(model.metadata_props)
    return shell


def _retype_attributes(node: NodeProto, wanted: int) -> None:
    """The types that a node names itself, where they are floating point: Cast, Constant, ConstantOfShape and such."""
    for item in node.attribute:
        if item.name in ("to", "dtype") and item.i in ARRAY_TYPES:
            item.i = wanted
        if item.HasField("t") and item.t.data_type in ARRAY_TYPES:
            array = numpy_helper.to_array(item.t).astype(ARRAY_TYPES[wanted])
            item.t.CopyFrom(numpy_helper.from_array(array, item.t.name))


def _embed(tensor: TensorProto, array: np.ndarray) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = np.ascontiguousarray(array).tobytes()


def _nbytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
