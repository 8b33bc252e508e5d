"""Reading an artifact: one file, checked before it is used, its weights mapped where they lie.

`Artifact.open` either returns an artifact whose manifest, plan, sizes, bounds and hashes agree, or raises one
ArtifactError that says what is wrong. Nothing in the file is trusted, and nothing in it is code.

What `check` verifies beyond the structure, the manifest and the plan:

| check | sha256 and CRC of |
|---|---|
| `auto` | every member, if they are at most 256 MiB together; otherwise all but the weights |
| `full` | every member |
| `fast` | the manifest (CRC) |

`read` compares the hash whatever was checked at `open`. Weights that are mapped without having been checked
are the one place where a damaged disk goes unnoticed. The file must not be truncated while it is mapped: the
operating system ends a process that reads a page which is gone.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from dcc.errors import ArtifactError, UsageError
from dcc.runtime.container import WEIGHTS_MEMBER, Member, read_members
from dcc.runtime.layers import Layer, layers_from_json
from dcc.runtime.manifest import MANIFEST_LIMIT, MANIFEST_MEMBER, read_manifest
from dcc.runtime.plan import EngineSpec, Plan, WeightSpec, plan_from_json
from dcc.runtime.strict_json import shown

Check = Literal["auto", "full", "fast"]

AUTO_CHECK_LIMIT = 256 * 2**20
MEMBER_SIZE_LIMIT = 2**31
CHUNK = 2**20

# An ONNX model names the file that holds its weights. The artifact may be renamed after it was written, so
# models are stored with this name, and `engine_model` puts the real one in its place: same length, so that no
# length field of the protobuf changes.
EXTERNAL_LOCATION_PLACEHOLDER = "dcc-the-weights-are-in-the-artifact-itself".ljust(240, "_")

# numpy has no bfloat16: its bits are mapped as unsigned integers.
_NUMPY_NAMES = {"bfloat16": "uint16"}

_AGAIN = "copy or download the file again, or compile the model again"


def external_location(name: str) -> bytes:
    """A relative path of exactly the placeholder's length that names the file `name` in its own folder."""
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        encoded = b""
    length = len(EXTERNAL_LOCATION_PLACEHOLDER)
    room = length - len(encoded)
    # One byte too few for `./` cannot be filled.
    if not encoded or room < 0 or room == 1:
        raise ArtifactError(
            "the artifact's file name cannot be given to ONNX Runtime",
            got=f"{shown(name, 300)}, {len(name.encode('utf-8', 'surrogatepass'))} bytes",
            want=f"UTF-8 of at most {length - 2} bytes",
            next="rename the file",
        )
    filler = b".//" + b"./" * ((room - 3) // 2) if room % 2 else b"./" * (room // 2)
    return filler + encoded


class Artifact:
    """An opened artifact.

    The file is opened again for each access, and must still be the one that was checked.
    """

    def __init__(
        self,
        path: str,
        identity: tuple[int, ...],
        members: dict[str, Member],
        manifest: dict[str, Any],
        plan: Plan,
        layers: tuple[Layer, ...] = (),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.plan = plan
        self.layers = layers
        self._identity = identity
        self._members = members
        self._weights = {weight.name: weight for weight in plan.weights}
        self._engines = {engine.name: engine for engine in plan.engines}
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: Check = "auto") -> Artifact:
        """The artifact at `path`, checked; `Artifact.path` has symbolic links resolved."""
        if check not in get_args(Check):
            raise UsageError("an artifact cannot be checked this way", got=check, want=", ".join(get_args(Check)))
        real = _real_path(path)
        with _opened(real) as file, _located(real):
            status = os.fstat(file.fileno())
            members = read_members(file, status.st_size)
            manifest = read_manifest(_read_manifest_bytes(file, members))
            _check_table(members, manifest["members"])
            plan = plan_from_json(manifest["plan"])
            _check_bounds(plan, members)
            layers = layers_from_json(manifest["layers"], {engine.name: engine for engine in plan.engines}, members)
            for name in _names_to_hash(members, check):
                _check_content(file, members[name], manifest["members"][name]["sha256"])
        return cls(real, _identity(status), members, manifest, plan, layers)

    @property
    def folder(self) -> str:
        """Where the file lies: ONNX Runtime's `session.model_external_initializers_file_folder_path`."""
        return str(Path(self.path).parent)

    @property
    def members(self) -> tuple[Member, ...]:
        """All members in the order of the file."""
        return tuple(self._members.values())

    def member_offset(self, name: str) -> int:
        """Absolute offset of a member's first byte in the file."""
        return self._member(name).data

    def read(self, member: str) -> bytes:
        """The bytes of a member, whose hash has been compared."""
        entry = self._member(member)
        if member == MANIFEST_MEMBER:
            raise _damaged("the manifest has no hash of its own", at=member, next="use Artifact.manifest")
        with self.reopened() as file:
            file.seek(entry.data)
            data = file.read(entry.size)
        if hashlib.sha256(data).hexdigest() != self.manifest["members"][member]["sha256"]:
            raise _damaged("a member's bytes are not those that were written", at=member, next=_AGAIN)
        return data

    def map_weight(self, name: str) -> np.ndarray:
        """A weight as a read-only view of the file, nothing copied; bfloat16 comes as its bits in uint16."""
        spec = self._weight(name)
        if self._map is None:
            with self.reopened() as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = np.dtype(_NUMPY_NAMES.get(spec.dtype, spec.dtype)).newbyteorder("<")
        count = spec.nbytes // dtype.itemsize
        offset = self._members[spec.member].data + spec.offset
        return np.frombuffer(self._map, dtype, count, offset).reshape(spec.shape)

    def engine_model(self, engine: str) -> bytes:
        """The ONNX model of an engine, its external data located in this very file under its present name."""
        spec = self._engine(engine)
        return self._located(self.read(spec.member), spec)

    def layer_graph(self, layer: Layer, engine: str) -> bytes:
        """The strongly typed model of an engine in a layer; its weights are those of the portable one.

        Raises ArtifactError where the layer has no such engine.
        """
        model = self.read(self._layer_member(layer, layer.graphs, engine))
        return self._located(model, self._engines[engine]) if engine in self._engines else model

    def layer_engine(self, layer: Layer, engine: str) -> bytes:
        """What a library built from an engine of the layer. Raises ArtifactError where the layer has none."""
        return self.read(self._layer_member(layer, layer.engines, engine))

    def _layer_member(self, layer: Layer, members: Mapping[str, str], engine: str) -> str:
        if engine not in members:
            raise _damaged(
                "a layer lacks an engine", at=f"layer {layer.name}", got=f"{len(members)} others", want=shown(engine),
                next=f"dcc build {self.path} --target {','.join(layer.targets)} makes the layer again",
            )  # fmt: skip
        return members[engine]

    def _located(self, model: bytes, spec: EngineSpec) -> bytes:
        """The model with its external data in this very file."""
        engine = spec.name
        placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
        if (placeholder in model) != bool(spec.weights):
            raise _damaged(
                "an engine's model and its list of weights disagree",
                at=f"engine {shown(engine)}",
                got=f"{len(spec.weights)} weights, and {model.count(placeholder)} external tensors",
                next="compile the model again",
            )
        if not spec.weights:
            return model
        return model.replace(placeholder, external_location(Path(self.path).name))

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise _damaged("the artifact has no such member", at=shown(name), got=", ".join(sorted(self._members)[:20]))
        return self._members[name]

    def _weight(self, name: str) -> WeightSpec:
        if name not in self._weights:
            raise _damaged("the artifact has no such weight", at=shown(name), got=f"{len(self._weights)} others")
        return self._weights[name]

    def _engine(self, name: str) -> EngineSpec:
        if name not in self._engines:
            raise _damaged("the artifact has no such engine", at=shown(name), got=f"{len(self._engines)} others")
        return self._engines[name]

    @contextmanager
    def reopened(self) -> Iterator[BinaryIO]:
        """The file, to be read. Raises ArtifactError where it is no longer the one that was checked."""
        with _opened(self.path) as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                raise _damaged(
                    "the artifact was replaced after it was opened",
                    at=shown(self.path, 400),
                    next="open it again",
                )
            yield file


def _real_path(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.realpath(os.fsdecode(path), strict=True)
    except (OSError, ValueError) as error:
        raise _unreadable(os.fspath(path), error) from error


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The regular file at `path`; what the operating system refuses inside is an ArtifactError as well."""
    try:
        # Looked at before it is opened: opening a pipe would wait for its other end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise _damaged("this is not a file", at=shown(path, 400), want="an artifact, as dcc compile writes it")
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


@contextmanager
def _located(path: str) -> Iterator[None]:
    """An error that does not say where it is names the file."""
    try:
        yield
    except ArtifactError as error:
        error.details = {"at": shown(path, 400), **error.details}
        raise


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_manifest_bytes(file: BinaryIO, members: dict[str, Member]) -> bytes:
    member = members.get(MANIFEST_MEMBER)
    if member is None or member.size > MANIFEST_LIMIT:
        got = "none" if member is None else f"{member.size} bytes"
        raise _damaged(
            "the artifact has no manifest", got=got, want=f"{MANIFEST_MEMBER} of up to {MANIFEST_LIMIT} bytes"
        )
    file.seek(member.data)
    data = file.read(member.size)
    if zlib.crc32(data) != member.crc:
        raise _damaged("a member's bytes are not those that were written", at=MANIFEST_MEMBER, next=_AGAIN)
    return data


def _check_table(members: dict[str, Member], table: dict[str, dict[str, Any]]) -> None:
    """The manifest lists exactly the members that are there, with their sizes."""
    for name in sorted(table.keys() | members.keys() - {MANIFEST_MEMBER}):
        got = members[name].size if name in members else "no member"
        want = table[name]["size"] if name in table else "no member"
        if got != want:
            raise _damaged("the manifest and the file disagree about a member", at=name, got=got, want=want)
        if name != WEIGHTS_MEMBER and members[name].size > MEMBER_SIZE_LIMIT:
            raise _damaged("a member is too large", at=name, got=got, want=f"at most {MEMBER_SIZE_LIMIT} bytes")


def _check_bounds(plan: Plan, members: dict[str, Member]) -> None:
    """Weights lie inside their member, and engines have one."""
    for weight in plan.weights:
        size = members[weight.member].size if weight.member in members else -1
        if weight.member == MANIFEST_MEMBER or weight.offset + weight.nbytes > size:
            got = f"bytes {weight.offset} to {weight.offset + weight.nbytes} of {shown(weight.member)}"
            want = f"inside {size} bytes" if size >= 0 else "a member of the artifact"
            raise _damaged("a weight lies outside the artifact", at=shown(weight.name), got=got, want=want)
    for engine in plan.engines:
        if engine.member not in members or engine.member in (MANIFEST_MEMBER, WEIGHTS_MEMBER):
            raise _damaged("an engine has no model", at=shown(engine.name), got=shown(engine.member))


def _names_to_hash(members: dict[str, Member], check: Check) -> list[str]:
    skipped = {MANIFEST_MEMBER}
    if check == "auto" and sum(member.size for member in members.values()) > AUTO_CHECK_LIMIT:
        skipped.add(WEIGHTS_MEMBER)
    return [name for name in members if name not in skipped and check != "fast"]


def _check_content(file: BinaryIO, member: Member, sha256: str) -> None:
    digest, crc, left = hashlib.sha256(), 0, member.size
    file.seek(member.data)
    while left and (chunk := file.read(min(CHUNK, left))):
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    if left or crc != member.crc or digest.hexdigest() != sha256:
        raise _damaged("a member's bytes are not those that were written", at=member.name, next=_AGAIN)


def _unreadable(path: object, error: Exception) -> ArtifactError:
    missing = isinstance(error, FileNotFoundError)
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return _damaged(
        "there is no artifact at this path" if missing else "the artifact cannot be read",
        at=shown(path, 400),
        got=reason,
        next="check the path; dcc compile writes artifacts" if missing else "check the file's permissions",
    )


def _damaged(
    what: str, *, at: object = None, got: object = None, want: object = None, next: object = _AGAIN
) -> ArtifactError:
    return ArtifactError(what, at=at, got=got, want=want, next=next)
