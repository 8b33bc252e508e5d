"""The manifest of an artifact: what it is, how it was made, and the size and hash of each of its members."""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

from dcc.errors import ArtifactError
from dcc.runtime.container import is_member_name
from dcc.runtime.strict_json import INTEGER_LIMIT, parse_json, shown

FORMAT = 1
MANIFEST_MEMBER = "manifest.json"
MANIFEST_LIMIT = 16 * 2**20
TEXT_LIMIT = 512

# What the compiler says; `format` and `members` are added by the writer. `sampler`, `report` and `recipe` are
# opaque here: `dcc.runtime.sampler` reads the first, people read the others. `layers` is read by `dcc.runtime.layers`.
FIELDS = ("name", "program_hash", "target", "plan", "layers", "sampler", "guidance", "report", "recipe", "tools")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(data: bytes) -> dict[str, Any]:
    """The manifest in these bytes. Every field but the plan, the layers and the opaque ones has been checked."""
    value = parse_json(data, MANIFEST_MEMBER)
    if not isinstance(value, dict) or type(value.get("format")) is not int:
        _refuse("format", value, "an object with an integer format")
    if value["format"] > FORMAT:
        raise ArtifactError(
            "the artifact was made by a newer dcc",
            at=MANIFEST_MEMBER,
            got=f"format {value['format']}",
            want=f"format {FORMAT}",
            next="upgrade dcc, or compile the model again with this version",
        )
    if value["format"] != FORMAT:
        _refuse("format", value["format"], FORMAT)
    wanted = {"format", "members", *FIELDS}
    if value.keys() != wanted:
        _refuse("fields", ", ".join(sorted(value.keys() ^ wanted)[:8]), f"exactly {', '.join(sorted(wanted))}")
    for field in ("name", "program_hash", "target"):
        _check_text(field, value[field])
    for field in ("sampler", "report", "recipe"):
        if value[field] is not None and not isinstance(value[field], dict):
            _refuse(field, value[field], "an object or null")
    _check_tools(value["tools"])
    _check_guidance(value["guidance"])
    _check_members(value["members"])
    return value


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_LIMIT or not value.isprintable():
        _refuse(field, value, f"1 to {TEXT_LIMIT} printable characters")


def _check_tools(tools: object) -> None:
    if not isinstance(tools, dict):
        _refuse("tools", tools, "an object of versions")
    for name, version in tools.items():
        _check_text("tools", name)
        _check_text(f"tools.{name}", version)


def _check_guidance(guidance: object) -> None:
    if not isinstance(guidance, dict) or guidance.keys() != {"mode", "scale", "channels"}:
        _refuse("guidance", guidance, "an object of mode, scale and channels")
    mode, scale, channels = guidance["mode"], guidance["scale"], guidance["channels"]
    if mode not in ("cfg", "none"):
        _refuse("guidance.mode", mode, "cfg or none")
    if type(scale) not in (int, float) or not math.isfinite(scale):
        _refuse("guidance.scale", scale, "a finite number")
    if channels is not None and not (type(channels) is int and 1 <= channels <= 2**31):
        _refuse("guidance.channels", channels, "null, or a count of channels")


def _check_members(members: object) -> None:
    if not isinstance(members, dict):
        _refuse("members", members, "an object of sizes and hashes")
    for name, entry in members.items():
        at = f"members[{shown(name)}]"
        if not is_member_name(name) or name == MANIFEST_MEMBER:
            _refuse(at, name, f"a member name other than {MANIFEST_MEMBER}")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            _refuse(at, entry, "an object of size and sha256")
        if type(entry["size"]) is not int or not 0 <= entry["size"] < INTEGER_LIMIT:
            _refuse(f"{at}.size", entry["size"], "a count of bytes")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            _refuse(f"{at}.sha256", entry["sha256"], "64 hexadecimal digits")


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise ArtifactError(
        "the manifest has a field that cannot be read",
        at=f"{MANIFEST_MEMBER}, {at}",
        got=shown(got, 200),
        want=want,
        next="copy the artifact again, or compile the model again",
    )
