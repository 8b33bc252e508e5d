"""The outside of an artifact: a zip file of stored, aligned members in one canonical form.

The bytes of every header follow from the members' names, sizes, checksums and order, and from nothing else:

    local header, name, padding, data | local header, ... | central directory | zip64 records if needed | end

Members follow one another without gaps, the padding (an alignment field, zeros) puts each member's data on
a multiple of 64 bytes (`weights.bin`: 4096), dates are fixed, nothing is compressed. The reader parses the
central directory, encodes again what a writer would have written, and compares: whatever a zip file can say
in two ways, or say wrongly, needs no rule of its own. The rules there are exist to name the cause.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from dcc.errors import ArtifactError
from dcc.runtime.strict_json import shown

WEIGHTS_MEMBER = "weights.bin"
ALIGNMENT = 64
WEIGHTS_ALIGNMENT = 4096
MEMBER_LIMIT = 4096
DIRECTORY_LIMIT = 2**20
# Sizes and offsets from here on go to zip64 fields.
ZIP64_LIMIT = 0xFFFFFFFF

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_NAME_LIMIT = 128

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_DATE = (1 << 5) | 1  # 1980-01-01, the first day that a zip can name
_MADE_BY_UNIX = 3 << 8
_FILE_MODE = 0o100644 << 16
_ZIP64_FIELD = 0x0001
_ALIGNMENT_FIELD = 0xD935  # as Android's zipalign writes it
_PADDING_MINIMUM = 6 + 20  # an alignment field, and room for a zip64 field that is decided after the data

_AGAIN = "copy or download the file again, or compile the model again; re-zipping an artifact breaks it"


@dataclass(frozen=True)
class Member:
    """A file inside the artifact. `header` is where its local header starts."""

    name: str
    size: int
    crc: int
    header: int

    @property
    def data(self) -> int:
        """Absolute offset of its first byte."""
        smallest = self.header + _LOCAL.size + len(self.name) + _PADDING_MINIMUM
        alignment = alignment_of(self.name)
        return -(-smallest // alignment) * alignment

    @property
    def end(self) -> int:
        """Absolute offset of the byte after its last one."""
        return self.data + self.size


def alignment_of(name: str) -> int:
    """What the absolute offset of this member's data is a multiple of."""
    return WEIGHTS_ALIGNMENT if name == WEIGHTS_MEMBER else ALIGNMENT


def is_member_name(name: str) -> bool:
    """Whether a member may be called this: relative, ASCII, no `.` or `..` parts, no backslash."""
    return len(name) <= _NAME_LIMIT and _NAME.fullmatch(name) is not None


def local_header(member: Member) -> bytes:
    """Everything from `member.header` to `member.data`."""
    name = member.name.encode("ascii")
    large = member.size >= ZIP64_LIMIT
    size = 0xFFFFFFFF if large else member.size
    extra = member.data - member.header - _LOCAL.size - len(name)
    zip64 = struct.pack("<2H2Q", _ZIP64_FIELD, 16, member.size, member.size) if large else b""
    padding = extra - len(zip64)
    return b"".join(
        (
            _LOCAL.pack(b"PK\3\4", _version(large), 0, 0, 0, _DATE, member.crc, size, size, len(name), extra),
            name,
            zip64,
            struct.pack("<3H", _ALIGNMENT_FIELD, padding - 4, alignment_of(member.name)),
            bytes(padding - 6),
        )
    )


def directory(members: list[Member]) -> bytes:
    """Everything after the last member's data: central directory and end records."""
    entries = b"".join(_central_entry(member) for member in members)
    start = members[-1].end if members else 0
    count = len(members)
    if start < ZIP64_LIMIT:
        return entries + _END.pack(b"PK\5\6", 0, 0, count, count, len(entries), start, 0)
    made_by = _MADE_BY_UNIX | _version(True)
    return b"".join(
        (
            entries,
            _END64.pack(b"PK\6\6", 44, made_by, _version(True), 0, 0, count, count, len(entries), start),
            _LOCATOR.pack(b"PK\6\7", 0, start + len(entries), 1),
            _END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0),
        )
    )


def read_members(file: BinaryIO, file_size: int) -> dict[str, Member]:
    """The members of a canonical artifact, whose every header byte has been compared."""
    start, size, count = _find_directory(file, file_size)
    if count > MEMBER_LIMIT or size > DIRECTORY_LIMIT or start + size > file_size:
        raise _damaged(
            "the artifact's directory is out of bounds",
            got=f"{count} members in {size} bytes at {start}, in a file of {file_size} bytes",
            want=f"at most {MEMBER_LIMIT} members in {DIRECTORY_LIMIT} bytes, inside the file",
        )
    file.seek(start)
    tail = file.read(file_size - start) if file_size - start <= 2 * DIRECTORY_LIMIT else b""
    members = _parse_entries(tail[:size], count)
    _check_layout(members, start)
    if directory(members) != tail:
        raise _damaged("the artifact's directory is not what dcc writes", want="one canonical central directory")
    for member in members:
        expected = local_header(member)
        file.seek(member.header)
        if file.read(len(expected)) != expected:
            raise _damaged("a member's local header disagrees with the directory", at=member.name)
    return {member.name: member for member in members}


def _version(large: bool) -> int:
    return 45 if large else 20


def _central_entry(member: Member) -> bytes:
    name = member.name.encode("ascii")
    wide = [member.size, member.size] if member.size >= ZIP64_LIMIT else []
    size = 0xFFFFFFFF if wide else member.size
    offset = 0xFFFFFFFF if member.header >= ZIP64_LIMIT else member.header
    wide += [member.header] if member.header >= ZIP64_LIMIT else []
    extra = struct.pack(f"<2H{len(wide)}Q", _ZIP64_FIELD, 8 * len(wide), *wide) if wide else b""
    version = _version(bool(wide))
    header = _CENTRAL.pack(
        b"PK\1\2", _MADE_BY_UNIX | version, version, 0, 0, 0, _DATE, member.crc, size, size,
        len(name), len(extra), 0, 0, 0, _FILE_MODE, offset,
    )  # fmt: skip
    return header + name + extra


def _find_directory(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """Start, size and member count of the central directory, unchecked."""
    file.seek(max(0, file_size - _END.size))
    end = file.read(_END.size)
    file.seek(0)
    if not end.startswith(b"PK\5\6") or len(end) < _END.size:
        if file.read(4) != b"PK\3\4":
            raise _damaged("this is not a dcc artifact", got=f"{file_size} bytes that are no zip file")
        raise _damaged("the artifact is cut short, or has bytes after its end", got=f"{file_size} bytes")
    _, _, _, _, count, size, start, _ = _END.unpack(end)
    if start != 0xFFFFFFFF:
        return start, size, count
    file.seek(max(0, file_size - _END.size - _LOCATOR.size - _END64.size))
    record = file.read(_END64.size)
    if not record.startswith(b"PK\6\6") or len(record) < _END64.size:
        raise _damaged("the artifact's zip64 record is missing")
    *_, count, size, start = _END64.unpack(record)
    return start, size, count


def _parse_entries(data: bytes, count: int) -> list[Member]:
    members: list[Member] = []
    position = 0
    for index in range(count):
        if position + _CENTRAL.size > len(data) or data[position : position + 4] != b"PK\1\2":
            raise _damaged("the artifact's directory ends early", got=f"{index} members", want=f"{count} members")
        fields = _CENTRAL.unpack_from(data, position)
        flags, method, crc, packed, size, name_size, extra_size = fields[3], fields[4], *fields[7:12]
        name_at = position + _CENTRAL.size
        name = data[name_at : name_at + name_size].decode("ascii", "backslashreplace")
        if not is_member_name(name):
            raise _damaged("a member has a name that dcc never writes", at=shown(name), want="relative ASCII path")
        if flags or method or packed != size:
            raise _damaged("a member is compressed or encrypted", at=name, got=f"method {method}, flags {flags:#x}")
        extra = data[name_at + name_size : name_at + name_size + extra_size]
        size, header = _widen(size, fields[16], extra, name)
        members.append(Member(name, size, crc, header))
        position = name_at + name_size + extra_size
    return members


def _widen(size: int, header: int, extra: bytes, name: str) -> tuple[int, int]:
    """Size and header offset with their zip64 values put in."""
    wide = (2 if size == 0xFFFFFFFF else 0) + (1 if header == 0xFFFFFFFF else 0)
    if len(extra) != (4 + 8 * wide if wide else 0):
        raise _damaged("a member has an extra field that dcc never writes", at=name, got=f"{len(extra)} bytes")
    values = list(struct.unpack(f"<{wide}Q", extra[4:]))
    if header == 0xFFFFFFFF:
        header = values.pop()
    return (values[0] if values else size), header


def _check_layout(members: list[Member], start: int) -> None:
    """Members follow one another from 0 to the directory, and no name comes twice."""
    position = 0
    names: set[str] = set()
    for member in members:
        if member.name in names:
            raise _damaged("two members have the same name", at=member.name)
        names.add(member.name)
        if member.header != position:
            raise _damaged(
                "members overlap or leave a gap",
                at=member.name,
                got=f"local header at {member.header}",
                want=f"local header at {position}",
            )
        position = member.end
    if position != start:
        raise _damaged(
            "the directory does not follow the last member",
            got=f"directory at {start}",
            want=f"at {position}",
        )


def _damaged(what: str, *, at: object = None, got: object = None, want: object = None) -> ArtifactError:
    return ArtifactError(what, at=at, got=got, want=want, next=_AGAIN)
