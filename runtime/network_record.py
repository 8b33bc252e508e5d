"""The network that TensorRT was handed, as data: for the manifest, for people, and to be checked against the plan.

An engine cannot be looked into without a GPU, its network can, before the builder takes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict

from dcc.errors import ExportError

if TYPE_CHECKING:  # importing the runtime would cost every worker a third of a second
    from dcc.runtime.plan import EngineSpec, TensorSpec

BATCH = "B"
# TensorRT's names and the plan's.
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool", "FP8": "float8_e4m3fn", "E8M0": "float8_e8m0fnu", "FP4": "float4_e2m1fn_x2",
    "INT4": "int4",
}  # fmt: skip


class PortRecord(TypedDict):
    """An input or output of a network; B stands for a dimension that the profile bounds."""

    name: str
    dtype: str
    shape: list[int | str]


class NetworkRecord(TypedDict):
    """The network that was handed to the builder, as JSON: the same for equal requests.

    `layers` are rows of name, type and dtypes of the outputs. `attention` is `fused` where the library had a kernel
    for every attention, `decomposable` where it had to be allowed to do without, and empty where there is none.
    """

    library: str
    version: str
    device: str
    capabilities: list[int]
    inputs: list[PortRecord]
    outputs: list[PortRecord]
    profiles: list[dict[str, list[list[int]]]]
    layers: list[list[Any]]
    attention: str
    options: dict[str, Any]


def check_network(record: NetworkRecord, engine: EngineSpec, weights: Iterable[TensorSpec] = ()) -> None:
    """The network has exactly the ports of the plan's engine, with `weights` among its inputs.

    Ports are bound by name, so their order is free. Raises ExportError with the first difference.
    """
    for side, specs, ports in (
        ("input", (*engine.inputs, *weights), record["inputs"]),
        ("output", engine.outputs, record["outputs"]),
    ):
        wanted = {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in specs}
        got = {port["name"]: f"{port['dtype']}{port['shape']}" for port in ports}
        for name in (*wanted, *got):
            if wanted.get(name) != got.get(name):
                raise ExportError(
                    "the network for TensorRT is not the engine that the plan describes",
                    at=f"engine {engine.name}, {side} {name}", got=got.get(name, "no such port"),
                    want=wanted.get(name, "no such port"), next="this is a fault of dcc: report it with the model",
                )  # fmt: skip


def layer_counts(record: NetworkRecord) -> dict[str, int]:
    """How many layers there are of each type and dtype, such as `matrix_multiply float16`, the most first."""
    return dict(
        Counter(f"{kind} {'+'.join(sorted(set(dtypes)))}" for _, kind, dtypes in record["layers"]).most_common()
    )


def port_record(tensor: Any) -> PortRecord:
    """An ITensor at the edge of a network."""
    shape: list[int | str] = [BATCH if size < 0 else int(size) for size in tensor.shape]
    return {"name": tensor.name, "dtype": _dtype(tensor.dtype), "shape": shape}


def layer_record(layer: Any) -> list[Any]:
    """A row of NetworkRecord's `layers`."""
    dtypes = [_dtype(layer.get_output_type(index)) for index in range(layer.num_outputs)]
    return [layer.name, layer.type.name.lower(), dtypes]


def _dtype(dtype: Any) -> str:
    return DTYPES.get(dtype.name, dtype.name.lower())
