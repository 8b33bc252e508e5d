"""Update engines as ONNX models: what `dcc.runtime.loop_spec` says in words, node by node.

A model has a few dozen element-wise nodes on latents; a builder fuses them into one or two kernels. Coefficients are
one input vector, because the guidance scale is an argument of the request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dcc.runtime.loop_spec import START, LoopSpec, UpdateKind, coefficient_names, loop_spec, update_ports
from dcc.runtime.plan import Plan
from dcc.runtime.sampler import SamplerTable

OPSET = 23
IR_VERSION = 11
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def update_engines(plan: Plan, sampler: SamplerTable, guidance: dict[str, Any]) -> tuple[LoopSpec, dict[str, bytes]]:
    """The loop's updates, and the ONNX model of each of its kinds by name. Open dimensions are B alone: images."""
    spec = loop_spec(plan, sampler, guidance)
    return spec, {kind.name: update_model(kind).SerializeToString() for kind in spec.kinds}


def update_model(kind: UpdateKind) -> onnx.ModelProto:
    """The engine of a kind."""
    network = _Network(kind)
    network.build()
    inputs, outputs = ([_value_info(port) for port in ports] for ports in update_ports(kind))
    graph = helper.make_graph(network.nodes, kind.name, inputs, outputs, network.constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dcc"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Network:
    """Nodes and constants as they are made; values are known by their names."""

    def __init__(self, kind: UpdateKind) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.factor: dict[str, str] = {}

    def build(self) -> None:
        """Every output of the kind is written."""
        self._split_coefficients()
        if self.kind.mode == START:
            latent = self._node("Mul", "noise", self.factor["init_sigma"], name="new_register0")
            self._finish(latent)
            return
        mean, variance = self._prediction()
        sources = [f"register{index}" for index in range(len(self.kind.terms))]
        sources += [mean, self._clipped(mean), self._noise(variance)]
        for index, terms in enumerate(self.kind.terms):
            if terms is not None:
                pairs = [(sources[source], self.factor[f"matrix{index}_{source}"]) for source in terms]
                self._sum(pairs, f"new_register{index}")
        self._finish("register0" if self.kind.terms[0] is None else "new_register0")

    def _split_coefficients(self) -> None:
        names = coefficient_names(self.kind)
        outputs = [f"coefficient_{name}" for name in names]
        if len(names) == 1:
            self._node("Identity", "coefficients", name=outputs[0])
        else:
            sizes = self._constant(np.ones(len(names), np.int64), "sizes")
            self.nodes.append(helper.make_node("Split", ["coefficients", sizes], outputs, "split", axis=0))
        self.factor = dict(zip(names, outputs, strict=True))

    def _prediction(self) -> tuple[str, str]:
        """The guided output, and the part of it that is a variance; empty where there is none."""
        kind = self.kind
        wanted = self._float("conditional", kind.output_dtype)
        whole = kind.channels >= kind.output[0]
        first = wanted if whole else self._channels(wanted, 0, kind.channels, "predicted")
        if kind.mode == "both":
            null = self._float("null", kind.output_dtype)
            null = null if whole else self._channels(null, 0, kind.channels, "null_predicted")
            difference = self._node("Sub", first, null, name="new_difference" if kind.keeps else "difference")
            push = self._node("Mul", difference, self.factor["scale"], name="push")
            first = self._node("Add", push, null, name="mix")
        for index in range(kind.differences):
            term = self._node("Mul", f"difference{index}", self.factor[f"difference{index}"], name=f"term{index}")
            first = self._node("Add", first, term, name=f"mix{index}")
        if kind.output == kind.latent:
            return first if whole else self._joined(wanted, first), ""
        # The latent's channels come first; guidance usually mixes exactly these.
        channels = kind.latent[0]
        if not whole and kind.channels == channels:
            return first, self._channels(wanted, channels, 2 * channels, "variance")
        guided = first if whole else self._joined(wanted, first)
        return (
            self._channels(guided, 0, channels, "mean"), self._channels(guided, channels, 2 * channels, "variance"),
        )  # fmt: skip

    def _joined(self, wanted: str, first: str) -> str:
        """The mixed channels with the others, which are the conditional half's own."""
        rest = self._channels(wanted, self.kind.channels, self.kind.output[0], "rest")
        self.nodes.append(helper.make_node("Concat", [first, rest], ["guided"], "guided", axis=1))
        return "guided"

    def _clipped(self, mean: str) -> str:
        if self.kind.clip is None:
            return ""
        pairs = [("register0", self.factor["convert0"]), (mean, self.factor["convert1"])]
        bounds = [
            self._constant(np.asarray(sign * self.kind.clip, np.float32), name)
            for sign, name in ((-1, "lowest"), (1, "highest"))
        ]
        return self._node("Clip", self._sum(pairs, "predicted_sample"), *bounds, name="clipped")

    def _noise(self, variance: str) -> str:
        if self.kind.variance is None:
            return "noise"
        spread = self._node("Mul", variance, self.factor["variance1"], name="spread")
        exponent = self._node("Add", spread, self.factor["variance0"], name="exponent")
        factor = self._node("Exp" if self.kind.variance == "range" else "Sqrt", exponent, name="deviation")
        return self._node("Mul", factor, "noise", name="scaled_noise")

    def _finish(self, latent: str) -> None:
        scaled = self.kind.latent_dtype == "float32"
        name = self._node("Mul", latent, self.factor["input_scale"], name="next_input" if scaled else "next_float")
        if not scaled:
            self._node("Cast", name, name="next_input", to=_TYPES[self.kind.latent_dtype])

    def _sum(self, pairs: list[tuple[str, str]], name: str) -> str:
        """The products of the pairs added up, in this order."""
        total = ""
        for index, (source, factor) in enumerate(pairs):
            last = index == len(pairs) - 1
            product = self._node("Mul", source, factor, name=name if last and not total else f"{name}_product{index}")
            total = self._node("Add", total, product, name=name if last else f"{name}_sum{index}") if total else product
        return total

    def _float(self, name: str, dtype: str) -> str:
        return name if dtype == "float32" else self._node("Cast", name, name=f"{name}_float", to=TensorProto.FLOAT)

    def _channels(self, source: str, first: int, last: int, name: str) -> str:
        bounds = [self._constant(np.asarray([value], np.int64), f"{name}_{value}") for value in (first, last)]
        return self._node("Slice", source, *bounds, self._constant(np.asarray([1], np.int64), "axis"), name=name)

    def _constant(self, values: np.ndarray, name: str) -> str:
        if name not in {constant.name for constant in self.constants}:
            self.constants.append(numpy_helper.from_array(values, name))
        return name

    def _node(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, [*inputs], [name], name, **attributes))
        return name


def _value_info(port: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, _TYPES[port.dtype], list(port.shape))
