"""An artifact with more members, or fewer: the others keep their bytes, and the weights their place in the file.

    with ArtifactExtension(artifact, "model.dcc", drop=old_members) as extension:
        extension.add_member("layers/tensorrt-rtx/step.engine", data)
        extension.finish({"layers": [...]})

The file appears under its name only when it is whole and the reader has accepted it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dcc.errors import ArtifactError, ExportError
from dcc.exports.artifact_writer import sync_folder
from dcc.runtime.artifact import CHUNK, Artifact
from dcc.runtime.container import Member, directory, is_member_name, local_header
from dcc.runtime.manifest import FIELDS, FORMAT, MANIFEST_MEMBER
from dcc.runtime.plan import plan_to_json


class ArtifactExtension:
    """A context in which `output` is made from an artifact; leaving it without `finish` leaves no file.

    `drop` names members that are left out. `output` may be the artifact's own path.
    """

    def __init__(self, artifact: Artifact, output: str | os.PathLike[str], drop: Collection[str] = ()) -> None:
        self.output = Path(output)
        self._artifact = artifact
        self._drop = frozenset(drop)
        self._temporary = self.output.with_name(f".dcc-{secrets.token_hex(8)}.tmp")
        self._file: BinaryIO | None = None
        self._members: list[Member] = []
        self._table: dict[str, dict[str, Any]] = {}
        self._finished = False

    def __enter__(self) -> ArtifactExtension:
        try:
            with self._reported():
                self._begin()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._finished:
            self._discard()

    def add_member(self, name: str, data: bytes | memoryview) -> None:
        """`data` is in the file; nothing of it is kept in memory."""
        if not is_member_name(name) or name in self._table or name == MANIFEST_MEMBER:
            raise ExportError("a member cannot be added under this name", at=self.output, got=name)
        with self._reported():
            self._write(name, data)
        self._table[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def finish(self, changes: Mapping[str, object]) -> None:
        """The artifact stands at `output`, with these fields of the manifest changed."""
        file = self._open_file()
        fields = {name: self._artifact.manifest[name] for name in FIELDS} | dict(changes)
        fields["plan"] = plan_to_json(self._artifact.plan)
        value = {"format": FORMAT, **fields, "members": self._table}
        manifest = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        with self._reported():
            self._write(MANIFEST_MEMBER, manifest.encode())
            file.write(directory(self._members))
            file.flush()
            os.fsync(file.fileno())
            self._check()
            file.close()
            self._check_source()
            self._temporary.replace(self.output)
        self._finished = True
        sync_folder(self.output.parent)

    def _begin(self) -> None:
        """The kept members are in the temporary file, and its end is where the next one goes."""
        kept = [member for member in self._artifact.members if member.name not in {*self._drop, MANIFEST_MEMBER}]
        table = self._artifact.manifest["members"]
        self._table = {member.name: table[member.name] for member in kept}
        self._file = self._temporary.open("x+b")
        # Inside, because a disk that is full is no fault of the artifact that is read.
        with self._artifact.reopened() as source, self._reported():
            for member in kept:
                self._copy(source, member)

    def _copy(self, source: BinaryIO, member: Member) -> None:
        copied = Member(member.name, member.size, member.crc, self._end)
        file = self._open_file()
        file.write(local_header(copied))
        source.seek(member.data)
        left = member.size
        while left and (chunk := source.read(min(16 * CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
        self._members.append(copied)

    def _write(self, name: str, data: bytes | memoryview) -> None:
        member = Member(name, len(data), zlib.crc32(data), self._end)
        file = self._open_file()
        file.write(local_header(member))
        file.write(data)
        self._members.append(member)

    @property
    def _end(self) -> int:
        return self._members[-1].end if self._members else 0

    def _check(self) -> None:
        """The reader accepts what was written."""
        try:
            Artifact.open(self._temporary, check="fast")
        except ArtifactError as error:
            raise ExportError(
                f"the artifact would be refused by the reader: {error.what}", at=error.details.get("at"),
                got=error.details.get("got"), want=error.details.get("want"), next="report this",
            ) from error  # fmt: skip

    def _check_source(self) -> None:
        """The artifact is still the one that was opened: what somebody else put in its place is not written over."""
        try:
            with self._artifact.reopened():
                return
        except ArtifactError as error:
            raise ExportError(
                "the artifact was changed while this was made of it", at=self._artifact.path, got=error.what,
                want="one dcc build at a time", next="run this again: engines that were built are in the cache",
            ) from error  # fmt: skip

    def _discard(self) -> None:
        # Closing flushes, which fails once more where the disk is full.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def _open_file(self) -> BinaryIO:
        if self._file is None or self._finished:
            raise RuntimeError("an ArtifactExtension is used inside its `with` block, before finish")
        return self._file

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ExportError(
                "the artifact cannot be written", at=self.output, got=error.strerror or error,
                next="check the folder, its permissions and the space left",
            ) from error  # fmt: skip
