"""Writing an artifact: weights streamed to disk once, then the members, then one rename.

Equal input gives equal bytes. The file appears under its name only when it is whole and the reader has
accepted it; whatever happens before, nothing is left behind.

    with ArtifactWriter("model.dcc") as writer:
        spec = writer.add_weight("blocks.0.weight", array)     # spec.offset counts from writer.weights_offset
        writer.add_member("engines/step.onnx", model_bytes)
        writer.finish({"name": ..., "plan": plan, ...})        # manifest.FIELDS
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from dcc.errors import ArtifactError, ExportError
from dcc.runtime.artifact import CHUNK, EXTERNAL_LOCATION_PLACEHOLDER, Artifact, external_location
from dcc.runtime.container import ALIGNMENT, WEIGHTS_MEMBER, Member, directory, is_member_name, local_header
from dcc.runtime.manifest import FIELDS, FORMAT, MANIFEST_MEMBER
from dcc.runtime.plan import DTYPES, Plan, WeightSpec, plan_to_json
from dcc.runtime.strict_json import shown

__all__ = ["EXTERNAL_LOCATION_PLACEHOLDER", "ArtifactWriter"]


class ArtifactWriter:
    """A context in which an artifact is written; leaving it without `finish` leaves no file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".dcc-{secrets.token_hex(8)}.tmp")
        self._file: BinaryIO | None = None
        self._finished = False
        self._size = 0
        self._crc = 0
        self._digest = hashlib.sha256()
        self._stored: dict[bytes, int] = {}
        self._names: set[str] = set()
        self._members: dict[str, bytes] = {}

    @property
    def weights_offset(self) -> int:
        """Absolute offset in the file from which `WeightSpec.offset` counts; known from the beginning."""
        return Member(WEIGHTS_MEMBER, 0, 0, 0).data

    def __enter__(self) -> ArtifactWriter:
        try:
            external_location(self.path.name)
        except ArtifactError as error:
            raise self._refused(error.what, got=error.details["got"], want=error.details["want"]) from error
        try:
            with self._reported():
                if self.path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                self._file = self._temporary.open("xb")
                self._file.write(bytes(self.weights_offset))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._finished:
            self._discard()
            if error is None:
                raise self._refused("the artifact was not finished", want="a call of ArtifactWriter.finish")

    def add_weight(self, name: str, array: np.ndarray, dtype: str | None = None) -> WeightSpec:
        """Where `array` now lies in the file; equal bytes are stored once.

        `dtype` names what the elements are when numpy cannot say it: bfloat16 held in uint16. One tensor is
        in memory at a time: the caller's, or a copy of it if it is not contiguous and little-endian.
        """
        spelt = dtype or array.dtype.name
        if spelt not in DTYPES or DTYPES[spelt] != array.dtype.itemsize or array.size == 0:
            got = f"{array.dtype.name}{list(array.shape)} as {shown(spelt)}"
            raise self._refused(
                "a weight cannot be stored", at=shown(name), got=got, want=f"one of {', '.join(DTYPES)}"
            )
        if name in self._names:
            raise self._refused("a weight is added twice", at=shown(name))
        self._names.add(name)
        if array.dtype.str.startswith(">"):
            array = array.astype(array.dtype.newbyteorder("<"))
        # Through uint8, because ml_dtypes' bfloat16 has no buffer of its own.
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return WeightSpec(name, spelt, tuple(array.shape), WEIGHTS_MEMBER, self._store(data), data.nbytes)

    def add_member(self, name: str, data: bytes) -> None:
        """`data` is kept in memory and written by `finish`, after the last weight."""
        if not is_member_name(name) or name in self._members or name in (MANIFEST_MEMBER, WEIGHTS_MEMBER):
            want = "a new relative ASCII name of letters, digits, _ - . and /"
            raise self._refused("a member cannot be added under this name", at=shown(name), want=want)
        self._members[name] = bytes(data)

    def finish(self, manifest_fields: Mapping[str, object]) -> None:
        """The artifact stands at `path`, whole, synced to disk and accepted by the reader.

        `manifest_fields` are exactly `manifest.FIELDS`; the plan may be a `Plan` or its JSON.
        """
        file = self._open_file()
        manifest = self._manifest(manifest_fields)
        with self._reported():
            members = [Member(WEIGHTS_MEMBER, self._size, self._crc, 0)]
            for name, data in (*self._members.items(), (MANIFEST_MEMBER, manifest)):
                member = Member(name, len(data), zlib.crc32(data), members[-1].end)
                file.write(local_header(member))
                file.write(data)
                members.append(member)
            file.write(directory(members))
            file.seek(0)
            file.write(local_header(members[0]))
            file.flush()
            os.fsync(file.fileno())
            self._check()
            file.close()
            self._temporary.replace(self.path)
        self._finished = True
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        """Nothing is left beside the target."""
        # Closing flushes, which fails once more where the disk is full.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def _store(self, data: memoryview) -> int:
        """Offset in the weights member at which these bytes are, written unless they already were."""
        digest = hashlib.sha256(data).digest()
        if digest in self._stored:
            return self._stored[digest]
        padding = bytes(-self._size % ALIGNMENT)
        offset = self._size + len(padding)
        with self._reported():
            self._append(padding)
            for start in range(0, data.nbytes, CHUNK):
                self._append(data[start : start + CHUNK])
        self._size = offset + data.nbytes
        self._stored[digest] = offset
        return offset

    def _append(self, chunk: bytes | memoryview) -> None:
        self._open_file().write(chunk)
        self._crc = zlib.crc32(chunk, self._crc)
        self._digest.update(chunk)

    def _manifest(self, manifest_fields: Mapping[str, object]) -> bytes:
        if manifest_fields.keys() != set(FIELDS):
            odd = ", ".join(sorted(map(str, manifest_fields.keys() ^ set(FIELDS))))
            raise self._refused(
                "the manifest has missing or unknown fields", got=odd, want=f"exactly {', '.join(FIELDS)}"
            )
        value: dict[str, Any] = {"format": FORMAT, **manifest_fields}
        if isinstance(value["plan"], Plan):
            value["plan"] = plan_to_json(value["plan"])
        value["members"] = {WEIGHTS_MEMBER: {"size": self._size, "sha256": self._digest.hexdigest()}} | {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self._members.items()
        }
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
            return text.encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise self._refused("the manifest is not JSON", got=str(error), want="plain finite values") from error

    def _check(self) -> None:
        """The reader accepts what was written; it must never be the user who finds out that it does not."""
        try:
            Artifact.open(self._temporary, check="fast")
        except ArtifactError as error:
            raise self._refused(
                f"the artifact would be refused by the reader: {error.what}",
                at=error.details.get("at"),
                got=error.details.get("got"),
                want=error.details.get("want"),
            ) from error

    def _open_file(self) -> BinaryIO:
        if self._file is None or self._finished:
            raise RuntimeError("an ArtifactWriter is used inside its `with` block, before finish")
        return self._file

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refused(
                "the artifact cannot be written",
                got=error.strerror or str(error),
                next="check the folder, its permissions and the space left",
            ) from error

    def _refused(
        self, what: str, *, at: object = None, got: object = None, want: object = None, next: object = None
    ) -> ExportError:
        path = shown(str(self.path), 400)
        place = path if at is None else f"{path}: {at}"
        return ExportError(
            what,
            at=place,
            got=got,
            want=want,
            next=next or "report this: the compiler should not have asked for it",
        )


def sync_folder(folder: Path) -> None:
    """The rename survives a crash, on file systems that can promise it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
