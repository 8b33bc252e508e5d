"""Built engines on disk, found again by what they were built from.

An entry is one file: the sha256 of everything after it, a line of JSON about the engine, the engine. A damaged entry
is as good as none, and the next build replaces it. Nothing here can fail a build: an entry that cannot be written is
not written, and `EngineCache.problem` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcc.errors import ExportError

if TYPE_CHECKING:  # workers build without onnx, and need a third of a second less to start
    from onnx import GraphProto, TensorProto

FORMAT = 1
CHUNK = 2**20
_DIGEST = 64  # hexadecimal digits of a sha256


class EngineCache:
    """A folder of engines, made when the first is stored. Processes may share it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.problem: str | None = None

    def has(self, key: str) -> bool:
        """There is an entry, which may turn out to be damaged."""
        return self._path(key).is_file()

    def get(self, key: str) -> tuple[dict[str, Any], bytes] | None:
        """What was stored under `key`; None where there is nothing, or nothing whole."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        body = memoryview(content)[_DIGEST:]
        if hashlib.sha256(body).hexdigest().encode() != content[:_DIGEST]:
            return None
        end = content.index(b"\n", _DIGEST)
        facts: dict[str, Any] = json.loads(content[_DIGEST:end])
        return facts, content[end + 1 :]

    def put(self, key: str, facts: Mapping[str, Any], engine: bytes | memoryview) -> bool:
        """The entry is there, whole; or False, nothing has changed and `problem` says why."""
        line = json.dumps(facts).encode() + b"\n"
        digest = hashlib.sha256(line)
        digest.update(engine)
        path = self._path(key)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(digest.hexdigest().encode())
                file.write(line)
                file.write(engine)
            temporary.replace(path)
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.engine"


def default_folder() -> Path:
    """Where engines are kept: `engines` in $DCC_CACHE, else in $XDG_CACHE_HOME/dcc, else in ~/.cache/dcc."""
    base = os.environ.get("DCC_CACHE", "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base else (Path(shared) if shared else Path.home() / ".cache") / "dcc"
    return folder / "engines"


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
