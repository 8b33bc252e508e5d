"""The rules by which `exports/precision.py` chooses the precision of a node, and what a rule may ask about a graph.

The first row of `RULES` that matches decides. Every row says why, and the record of an engine names the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from dcc.errors import ExportError

FLOATING = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# numpy has no bfloat16 of its own; onnx knows where there is one.
ARRAY_TYPES: dict[int, np.dtype[Any]] = {type_: helper.tensor_dtype_to_np_dtype(type_) for type_ in FLOATING}
FLOAT16_LARGEST = 65504.0
# From here on a number rounds to infinity.
FLOAT16_OVERFLOW = 65520.0

CONTRACTIONS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"))
ACTIVATIONS = frozenset((
    "Gelu", "Sigmoid", "Tanh", "Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Swish", "Mish", "HardSwish", "HardSigmoid",
    "Softplus", "Erf",
))  # fmt: skip
NORMS = frozenset((
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "MeanVarianceNormalization", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "ReduceL1", "ReduceL2",
))  # fmt: skip
SOFTMAXES = frozenset(("Softmax", "LogSoftmax", "Exp", "Log", "ReduceMax", "ReduceLogSumExp"))
MOVEMENTS = frozenset((
    "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Concat", "Split", "Expand", "Gather", "GatherElements",
    "GatherND", "Identity", "ScatterND", "ScatterElements", "Flatten", "Tile", "Pad", "Where", "DepthToSpace",
    "SpaceToDepth",
))  # fmt: skip
SUMS = frozenset(("Add", "Sub", "Sum", "Mean"))
PRODUCTS = frozenset(("Mul", "Div", "Neg"))
ELEMENTWISE = frozenset((
    "Abs", "Sign", "Clip", "Max", "Min", "Floor", "Ceil", "Round", "Mod", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "IsNaN", "IsInf",
))  # fmt: skip
CONVERSIONS = frozenset(("Cast", "CastLike", "Constant", "ConstantOfShape", "Range"))
# These read no numbers: any type will do.
SIZES = frozenset(("Shape", "Size"))


@dataclass(frozen=True)
class Rule:
    """A row of the table: nodes that match compute as `choice` says, and why."""

    name: str
    choice: str
    matches: Callable[[NodeProto, Facts], bool]
    why: str


class Facts:
    """What rules may ask about a graph; nodes go by the name of their first output."""

    def __init__(self, graph: GraphProto, floating: set[str], weights: Weights, versions: dict[str, int]) -> None:
        self.graph, self.floating, self.weights, self.versions = graph, floating, weights, versions
        self.nodes = {key_of(node): node for node in graph.node}
        self.producers = {name: key for key, node in self.nodes.items() for name in node.output if name}
        self.readers: dict[str, list[str]] = {}
        for key, node in self.nodes.items():
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(key)
        self.ports = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.results = {value.name: value.type.tensor_type.elem_type for value in graph.output}
        self.rules: dict[str, Rule] = {}
        self.angles = self._angles()
        for key, node in self.nodes.items():
            if node.op_type not in SIZES and self.floats([*node.input, *node.output]):
                self.rules[key] = next(rule for rule in RULES if rule.matches(node, self))

    def floats(self, names: Iterable[str]) -> list[str]:
        """Those of the values that are floating point, weights among them."""
        return [name for name in names if name in self.floating]

    def choice(self, value: str) -> str | None:
        """What the rules chose for the node that makes this value; None for weights and ports."""
        rule = self.rules.get(self.producers.get(value, ""))
        return None if rule is None else rule.choice

    def sources(self, key: str) -> Iterator[str]:
        """Where the node's numbers come from, past nodes that only move them: keys of nodes, and ports."""
        yield from self._walk(key, lambda node: node.input, lambda name: [self.producers.get(name, "")], self.ports)

    def users(self, key: str) -> Iterator[str]:
        """Where they go to: keys of nodes, and results."""
        yield from self._walk(key, lambda node: node.output, lambda name: self.readers.get(name, []), self.results)

    def _walk(
        self,
        key: str,
        values: Callable[[NodeProto], Iterable[str]],
        beyond: Callable[[str], Iterable[str]],
        ends: dict[str, int],
    ) -> Iterator[str]:
        stack, seen = [key], {key}
        while stack:
            for name in self.floats(values(self.nodes[stack.pop()])):
                if name in ends:
                    yield name
                for other in beyond(name):
                    rule = self.rules.get(other)
                    if rule is None or other in seen:
                        continue
                    seen.add(other)
                    if rule.choice == "carried":
                        stack.append(other)
                    else:
                        yield other

    def _angles(self) -> set[str]:
        """Sines, cosines and what they are computed from, back to the nearest contraction and with it."""
        stack = [key for key, node in self.nodes.items() if node.op_type in ("Sin", "Cos")]
        found: set[str] = set()
        while stack:
            key = stack.pop()
            if key in found:
                continue
            found.add(key)
            if key in self.nodes and self.nodes[key].op_type not in CONTRACTIONS:
                made = (self.producers.get(name) for name in self.floats(self.nodes[key].input))
                stack += [source for source in made if source is not None]
        return found


class Weights:
    """The initializers of a graph, loaded when asked for."""

    def __init__(self, graph: GraphProto, load: Callable[[str], np.ndarray], dtype: str) -> None:
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.dtype = dtype
        self._load = load
        self._overflows: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def array(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if not is_external(tensor):
            return numpy_helper.to_array(tensor)
        array = self._load(name)
        if tensor.data_type == TensorProto.BFLOAT16 and array.dtype == np.uint16:
            array = array.view(ARRAY_TYPES[TensorProto.BFLOAT16])
        if array.shape != tuple(tensor.dims):
            raise ExportError("a weight has another shape", at=name, got=array.shape, want=tuple(tensor.dims))
        return array

    def converted(self, name: str, to: int) -> np.ndarray:
        """The weight in this type; where float16 overflows, it is cut off (a mask means the same with either)."""
        array = self.array(name)
        if to == self.tensors[name].data_type:
            return array
        if to == TensorProto.FLOAT16 and self.overflows(name):
            array = np.clip(array, -FLOAT16_LARGEST, FLOAT16_LARGEST)
        with np.errstate(over="ignore"):
            return array.astype(ARRAY_TYPES[to])

    def overflows(self, name: str) -> bool:
        """Whether a finite number of the weight is infinite in the reduced type."""
        if name not in self._overflows:
            self._overflows[name] = self.dtype == "float16" and _exceeds_float16(self.array(name))
        return self._overflows[name]

    def overflowing(self) -> list[str]:
        return [name for name, found in self._overflows.items() if found]


def _is(operations: frozenset[str]) -> Callable[[NodeProto, Facts], bool]:
    return lambda node, _: node.op_type in operations


def _is_angle(node: NodeProto, facts: Facts) -> bool:
    return key_of(node) in facts.angles


def _is_bias(node: NodeProto, facts: Facts) -> bool:
    """A vector along the last axis is added to the result of a contraction in the reduced type."""
    if node.op_type != "Add":
        return False
    weights = [name for name in node.input if name in facts.weights]
    others = [name for name in node.input if name not in weights]
    if len(weights) != 1 or len(others) != 1 or facts.choice(others[0]) != "reduced":
        return False
    sizes = list(facts.weights.tensors[weights[0]].dims)
    is_vector = len(sizes) > 0 and sizes[-1] > 1 and set(sizes[:-1]) <= {1}
    return is_vector and facts.nodes[facts.producers[others[0]]].op_type in CONTRACTIONS


def _overflows(node: NodeProto, facts: Facts) -> bool:
    """A mask may overflow: it means the same then."""
    has_weights = node.op_type in CONTRACTIONS - {"Attention"} or _is_bias(node, facts)
    return has_weights and any(
        facts.weights.overflows(name) for name in facts.floats(node.input) if name in facts.weights
    )


def _is_activation(node: NodeProto, facts: Facts) -> bool:
    """Also the product of a gated one: `x * sigmoid(x)`, `gelu(x) * y`."""
    if node.op_type in ACTIVATIONS:
        return True
    return node.op_type == "Mul" and any(facts.choice(name) == "between" for name in node.input)


def _has_no_form(node: NodeProto, facts: Facts) -> bool:
    """ONNX has no bfloat16 Einsum, for one."""
    if not onnx.defs.has(node.op_type, node.domain) or node.domain not in facts.versions:
        return False
    schema = onnx.defs.get_schema(node.op_type, facts.versions[node.domain], node.domain)
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    return any(
        f"tensor({facts.weights.dtype})" not in allowed.get(result.type_str, [result.type_str])
        for result, name in zip(schema.outputs, node.output, strict=False) if name in facts.floating
    )  # fmt: skip


def _is_movement(node: NodeProto, _: Facts) -> bool:
    if node.op_type != "Einsum" or len(node.input) != 1:
        return node.op_type in MOVEMENTS
    left, _arrow, right = _equation(node).partition("->")
    return sorted(left) == sorted(right)


def _is_contraction(node: NodeProto, facts: Facts) -> bool:
    return node.op_type in CONTRACTIONS and len(facts.floats(node.input)) > 1


RULES: tuple[Rule, ...] = (
    Rule("angle", "float32", _is_angle, "timesteps and positions are large: their last place is radians"),
    Rule("norm", "float32", _is(NORMS), "squares overflow float16, and means of many numbers need more bits than each"),
    Rule("softmax", "float32", _is(SOFTMAXES), "an exponential turns an absolute error into a relative one"),
    Rule("no form", "float32", _has_no_form, "ONNX does not define this operation in the reduced type"),
    Rule("overflow", "float32", _overflows, "a weight of this contraction is infinite in float16"),
    Rule("bias", "reduced", _is_bias, "kernels add it to the float32 sum before they store the result"),
    Rule("movement", "carried", _is_movement, "no arithmetic"),
    Rule("contraction", "reduced", _is_contraction, "nearly all the time and memory; the sums inside stay in float32"),
    Rule("activation", "between", _is_activation, "one rounding between two contractions, against two Casts"),
    Rule("sum", "float32", _is(SUMS), "residual streams, 1 + scale, shifts, combinations: small parts of large sums"),
    Rule("product", "float32", _is(PRODUCTS), "modulation, gates, rotations, weights of combinations: they feed sums"),
    Rule("elementwise", "float32", _is(ELEMENTWISE), "compared or cut off where it was computed"),
    Rule("conversion", "float32", _is(CONVERSIONS), "integers: above 2048 float16 is not exact, above 256 bfloat16"),
    Rule("unknown", "float32", lambda _, __: True, "no rule knows this operation"),
)


def key_of(node: NodeProto) -> str:
    """The name that a node goes by: its first output."""
    return next(name for name in node.output if name)


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _equation(node: NodeProto) -> str:
    return next(item.s.decode() for item in node.attribute if item.name == "equation").replace(" ", "")


def _exceeds_float16(array: np.ndarray) -> bool:
    if not array.size or array.dtype == np.float16:
        return False
    largest = max(-float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None)))
    if np.isinf(largest):
        largest = float(np.abs(array[np.isfinite(array)]).max(initial=0))
    return largest >= FLOAT16_OVERFLOW
