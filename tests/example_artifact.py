"""A complete artifact of a few kilobytes: every scope and kind of place, with real ONNX models.

The denoiser is `output = x + (x * mod) @ w`, with `mod = (timestep features + class embedding) @ m`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from dcc.exports.artifact_writer import EXTERNAL_LOCATION_PLACEHOLDER, ArtifactWriter
from dcc.runtime.plan import (
    BufferSpec,
    Call,
    ConstantSpec,
    EngineSpec,
    InputSpec,
    Plan,
    PortSpec,
    Ref,
    TensorSpec,
    WeightSpec,
)

CALLS = 3
WIDTH = 8
ROW = ("B", WIDTH)

random = np.random.default_rng(5)
WEIGHTS = {
    "classes": random.standard_normal((4, WIDTH)).astype(np.float32),
    "m": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
    "w": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
    "frequencies": np.exp(-np.arange(WIDTH)).astype(np.float32),
    "rows": random.standard_normal((CALLS, 1, WIDTH)).astype(np.float32),
}

# Engine: kind, op, inputs with dtype and shape, output with shape, weight that is its last operand.
Port = tuple[str, str, tuple[int | str, ...]]
ENGINES: dict[str, tuple[str, str, tuple[Port, ...], Port, str | None]] = {
    "features": ("timestep", "Mul", (("t", "float32", ("B", 1)),), ("f", "float32", ROW), "frequencies"),
    "embed": ("request", "Gather", (("y", "int64", ("B",)),), ("c", "float32", ROW), "classes"),
    "add": ("table", "Add", (("f", "float32", ROW), ("c", "float32", ROW)), ("s", "float32", ROW), None),
    "modulate": ("table", "MatMul", (("s", "float32", ROW),), ("mod", "float32", ROW), "m"),
    "scale": ("step", "Mul", (("x", "float32", ROW), ("mod", "float32", ROW)), ("h", "float32", ROW), None),
    "mix": ("step", "MatMul", (("h", "float32", ROW),), ("z", "float32", ROW), "w"),
    "residual": (
        "step",
        "Add",
        (("x", "float32", ROW), ("z", "float32", ROW)),
        ("out", "float32", ROW),
        None,
    ),
}


def example_plan(weights: tuple[WeightSpec, ...]) -> Plan:
    """The plan over weights that are stored anywhere."""
    full = (
        Call("scale", (Ref("input", "x"), Ref("table", "mod")), (Ref("buffer", "h"),)),
        Call("mix", (Ref("buffer", "h"),), (Ref("buffer", "z"),)),
        Call("residual", (Ref("input", "x"), Ref("buffer", "z")), (Ref("output", "out"),)),
    )
    short = (Call("residual", (Ref("input", "x"), Ref("constant", "shift")), (Ref("output", "out"),)),)
    return Plan(
        symbols={"B": (1, 64)},
        inputs=(
            InputSpec("x", "latent", "float32", ROW),
            InputSpec("t", "timestep", "float32", ("B", 1)),
            InputSpec("y", "condition", "int64", ("B",), null=3.0, minimum=0, maximum=3),
        ),
        output=TensorSpec("out", "float32", ROW),
        weights=weights,
        engines=tuple(_engine_spec(name) for name in ENGINES),
        constants=(
            ConstantSpec("f", "rows", per_call=True, rows=True),
            ConstantSpec("shift", "shift", False, True),
        ),
        timestep_ports=(PortSpec("f", "float32", ROW, rows=True),),
        request_ports=(PortSpec("c", "float32", ROW, rows=True),),
        table_ports=(PortSpec("s", "float32", ROW, rows=True), PortSpec("mod", "float32", ROW, rows=True)),
        buffers=(BufferSpec("h", "float32", ROW, slot=0), BufferSpec("z", "float32", ROW, slot=1)),
        timestep=(Call("features", (Ref("input", "t"),), (Ref("timestep", "f"),)),),
        request=(Call("embed", (Ref("input", "y"),), (Ref("request", "c"),)),),
        table=(
            Call("add", (Ref("timestep", "f"), Ref("request", "c")), (Ref("table", "s"),)),
            Call("modulate", (Ref("table", "s"),), (Ref("table", "mod"),)),
        ),
        step_programs=(full, short),
        histories=(),
        guidance=(),
        order=(0, 1, 0),
    )


def stored_nowhere() -> tuple[WeightSpec, ...]:
    """Weight entries for a plan without a file."""
    arrays = [*WEIGHTS.items(), ("shift", WEIGHTS["rows"][0])]
    return tuple(
        WeightSpec(name, "float32", array.shape, "weights.bin", 1024 * index, array.nbytes)
        for index, (name, array) in enumerate(arrays)
    )


def manifest_fields(plan: Plan | dict[str, Any]) -> dict[str, Any]:
    """What the compiler would say beside the plan."""
    return {
        "name": "example",
        "program_hash": "0" * 64,
        "target": "cpu",
        "plan": plan,
        "layers": [],
        "sampler": {"kind": "opaque", "rows": [0.5, 1.5]},
        "guidance": {"mode": "cfg", "scale": 3.0, "channels": None},
        "report": {"passes": ["hoist"], "unicode": "é漢"},
        "recipe": None,
        "tools": {"dcc": "0.1.0"},
    }


def write_example(path: Path, more: Mapping[str, tuple[np.ndarray, str | None]] | None = None) -> Plan:
    """The plan of the artifact that now is at `path`; `more` weights (and dtypes) are stored, not used."""
    with ArtifactWriter(path) as writer:
        weights = {name: writer.add_weight(name, array) for name, array in WEIGHTS.items()}
        weights["shift"] = writer.add_weight("shift", WEIGHTS["rows"][0])
        for name, (array, dtype) in (more or {}).items():
            weights[name] = writer.add_weight(name, array, dtype)
        for name in ENGINES:
            writer.add_member(f"engines/{name}.onnx", onnx_model(name, weights, writer.weights_offset))
        plan = example_plan(tuple(weights.values()))
        writer.finish(manifest_fields(plan))
    return plan


def onnx_model(name: str, weights: dict[str, WeightSpec], weights_offset: int, inline: bool = False) -> bytes:
    """One engine, its weight outside at `weights_offset` or, as the yardstick, inside."""
    _, op, inputs, output, weight = ENGINES[name]
    operands = [port[0] for port in inputs] + ([weight] if weight else [])
    if op == "Gather":
        operands.reverse()
    tensors = [_tensor(weights[weight], weights_offset, inline)] if weight else []
    graph = helper.make_graph(
        [helper.make_node(op, operands, [output[0]])],
        name,
        [_value(port) for port in inputs],
        [_value(output)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def _tensor(spec: WeightSpec, weights_offset: int, inline: bool) -> TensorProto:
    tensor = TensorProto(name=spec.name, data_type=TensorProto.FLOAT, dims=spec.shape)
    if inline:
        tensor.raw_data = WEIGHTS[spec.name].tobytes()
        return tensor
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", EXTERNAL_LOCATION_PLACEHOLDER),
        ("offset", weights_offset + spec.offset),
        ("length", spec.nbytes),
    ):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _value(port: Port) -> Any:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    return helper.make_tensor_value_info(port[0], kinds[port[1]], list(port[2]))


def _engine_spec(name: str) -> EngineSpec:
    kind, _, inputs, output, weight = ENGINES[name]
    ports = tuple(TensorSpec(*port) for port in inputs)
    weights = (weight,) if weight else ()
    return EngineSpec(name, kind, f"engines/{name}.onnx", ports, (TensorSpec(*output),), weights)
