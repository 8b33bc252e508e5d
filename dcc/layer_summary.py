"""The engines of a layer while it is made, and what the layer remembers of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from dcc.exports.precision import Typed
from dcc.exports.typed_graphs import with_weights_in_file
from dcc.layer_check import LayerCheck
from dcc.runtime.network_record import NetworkRecord, layer_counts
from dcc.runtime.plan import EngineSpec
from dcc.runtime.tensorrt_builder import BuildCost


@dataclass(frozen=True)
class TypedEngine:
    """An engine of the plan in the layer's type, or an update engine: float32 throughout, without weights."""

    spec: EngineSpec
    typed: Typed | None
    graph: bytes

    def buildable(self, weights: Path) -> bytes:
        """The model as builders take it, its large weights in the file."""
        return self.graph if self.typed is None else with_weights_in_file(self.typed, weights).SerializeToString()

    def facts(self) -> dict[str, Any]:
        """What people ask of the graph."""
        if self.typed is None:
            operations = [node.op_type for node in onnx.load_model_from_string(self.graph).graph.node]
            return {
                "nodes": {"float32": len(operations)}, "casts": operations.count("Cast"), "overflows": 0,
                "float32": {"the sampler's update": len(operations)}, "reduced": 0, "weight_bytes": 0,
            }  # fmt: skip
        record = self.typed.record
        return {
            "nodes": record.nodes, "casts": len(record.casts), "overflows": len(record.overflows),
            "float32": {rule: len(nodes) for rule, nodes in record.float32.items()}, "reduced": record.reduced,
            "weight_bytes": record.weight_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What is remembered of an engine whose bytes are in the file."""

    size: int
    record: NetworkRecord
    cost: BuildCost


def layer_summary(
    typed: Mapping[str, TypedEngine], built: Mapping[str, Built], check: LayerCheck | None
) -> dict[str, Any]:
    """What people ask of a layer, engine by engine: `nodes` of the ONNX graphs, `kinds` of the networks."""
    engines = {}
    for name, engine in typed.items():
        engines[name] = engine.facts() | {"error": None if check is None else check.engines.get(name)}
        if name in built:
            result = built[name]
            engines[name] |= {
                "engine_bytes": result.size, "layers": len(result.record["layers"]),
                "kinds": layer_counts(result.record), "attention": result.record["attention"],
                "inputs": result.record["inputs"], "outputs": result.record["outputs"],
                "profiles": result.record["profiles"], **asdict(result.cost),
            }  # fmt: skip
    return {"engines": engines, "forward_error": None if check is None else check.forward}


def layer_records(typed: Mapping[str, TypedEngine], built: Mapping[str, Built]) -> bytes:
    """Every choice and every layer, for whoever wants to know."""
    rows = {
        name: {
            "precision": None if engine.typed is None else engine.typed.record.to_json(),
            "network": built[name].record if name in built else None,
        }
        for name, engine in typed.items()
    }
    return json.dumps(rows).encode()
