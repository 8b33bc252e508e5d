"""Engines built from ONNX models, or found in the cache by what they would be built from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcc.errors import ExportError
from dcc.runtime.builder_callbacks import Told
from dcc.runtime.engine_cache import FORMAT, EngineCache
from dcc.runtime.tensorrt_builder import BuildCost, BuildRequest, BuiltEngine, TensorRt, check_request, serialize

if TYPE_CHECKING:  # workers build without onnx, and need a third of a second less to start
    from onnx import GraphProto, TensorProto

CHUNK = 2**20


def cache_key(model: bytes, folder: Path | None, facts: Mapping[str, Any]) -> str:
    """Equal for models of equal meaning and weights, wherever the weights lie, built under equal `facts`.

    Raises ExportError where `model` is not ONNX or its external data in `folder` cannot be read.
    """
    from onnx import ModelProto, TensorProto

    proto = ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's own type, and protobuf is no dependence of ours
        raise ExportError("this is not an ONNX model", got=f"{len(model)} bytes that do not decode") from error
    digest = hashlib.sha256(json.dumps([FORMAT, facts], sort_keys=True).encode())
    for tensor in _tensors(proto.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            digest.update(_external_digest(tensor, folder))
            del tensor.external_data[:]
    digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()


def build(
    request: BuildRequest, library: TensorRt, told: Told = lambda name, done: None, cache: EngineCache | None = None
) -> BuiltEngine:
    """The engine, built in this process or found in `cache`, where it now is.

    What TensorRT writes to standard output when a build fails is written: `build_all` keeps it away.
    Raises ExportError with the library's first error, the ONNX node that it names, and what to do.
    """
    check_request(request, library)
    key = request_key(request, library) if cache is not None else ""
    if cache is not None and (found := cached_engine(request, key, cache)) is not None:
        told(request.name, 1.0)
        return found
    data, record, cost = serialize(request, library, told)
    engine = BuiltEngine(request.name, bytes(data), record, cost)
    if cache is not None:
        store_engine(engine, key, cache)
    return engine


def request_key(request: BuildRequest, library: TensorRt) -> str:
    """The cache's key of the engine: equal for requests that give equal engines, whatever their names."""
    facts = {
        "library": library.flavour, "version": library.version, "device": request.device, "rows": request.rows,
        "capabilities": sorted(set(request.capabilities)), "options": asdict(request.options),
    }  # fmt: skip
    return cache_key(request.model, request.folder, facts)


def cached_engine(request: BuildRequest, key: str, cache: EngineCache) -> BuiltEngine | None:
    """The engine of an earlier build, or None."""
    found = cache.get(key)
    if found is None:
        return None
    facts, data = found
    try:
        return BuiltEngine(request.name, data, facts["record"], BuildCost(**facts["cost"] | {"cached": True}))
    except (KeyError, TypeError):  # written by another version of dcc
        return None


def store_engine(engine: BuiltEngine, key: str, cache: EngineCache) -> None:
    """The engine is in the cache, or the cache says what its problem is."""
    cache.put(key, {"record": engine.record, "cost": asdict(engine.cost)}, engine.data)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def _external_digest(tensor: TensorProto, folder: Path | None) -> bytes:
    """The sha256 of the tensor's bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = (folder or Path()) / entries.get("location", "")
    left = int(entries.get("length", "-1"))
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(int(entries.get("offset", "0")))
            while left and (chunk := file.read(min(CHUNK, left) if left > 0 else CHUNK)):
                digest.update(chunk)
                left -= len(chunk) if left > 0 else 0
    except OSError as error:
        raise _unreadable(tensor, path, error.strerror or str(error)) from error
    if left > 0:
        raise _unreadable(tensor, path, f"the file ends {left} bytes early")
    return digest.digest()


def _unreadable(tensor: TensorProto, path: Path, reason: str) -> ExportError:
    return ExportError(
        "the weights of an ONNX model cannot be read", at=f"{tensor.name} in {path}", got=reason,
        next="give the folder that the external data lies in",
    )  # fmt: skip
