"""The reader trusts nothing: whatever is done to an artifact, one ArtifactError comes out, soon.

Or the artifact loads and its content is provably that of the original. Cases are drawn from fixed seeds.
Tracing memory makes a case five times slower, so one case in `TRACED` is traced.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_artifact import write_example

from dcc.errors import ArtifactError
from dcc.runtime.artifact import Artifact
from dcc.runtime.container import Member, directory, local_header
from dcc.runtime.manifest import MANIFEST_LIMIT
from dcc.runtime.plan import plan_from_json, plan_to_json
from dcc.runtime.strict_json import VALUE_LIMIT

SECONDS_LIMIT = 5.0  # a case takes milliseconds; the machine may be busy
TRACED = 20
BYTES_LIMIT = 4 * 2**20  # the artifact has 13 KB, its plan about 150 KB of objects

Case = bytes | Callable[[Path], None]


class Trial:
    """Opens damaged copies of one artifact and judges what happens."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.dcc"
        write_example(self.path)
        self.whole = self.path.read_bytes()
        original = Artifact.open(self.path, "full")
        self.content = content_of(original)
        self.manifest = original.manifest
        self.members = [(name, original.read(name)) for name in ordered(original)]
        self.outcomes: Counter[str] = Counter()
        self.cases = 0

    def open(self, data: bytes, bytes_limit: int | None = None) -> Artifact | None:
        """The artifact in `data`, or None where it is refused in the one permitted way."""
        self.path.write_bytes(data)
        self.cases += 1
        if bytes_limit is None and self.cases % TRACED:
            return self.open_path(self.path)
        tracemalloc.start(1)
        try:
            artifact = self.open_path(self.path, 10 * SECONDS_LIMIT)
            assert tracemalloc.get_traced_memory()[1] < (bytes_limit or BYTES_LIMIT)
        finally:
            tracemalloc.stop()
        return artifact

    def open_path(self, path: str | Path, seconds_limit: float = SECONDS_LIMIT) -> Artifact | None:
        """The artifact at `path`, or None as above; and it did not take long."""
        started = time.perf_counter()
        artifact = None
        try:
            artifact = Artifact.open(path, "full")
            self.outcomes["loaded"] += 1
        except ArtifactError as error:
            message = str(error)
            message.encode("utf-8")
            assert len(message) < 2000 and error.what and error.details["next"]
            self.outcomes[error.what] += 1
        assert time.perf_counter() - started < seconds_limit
        return artifact

    def refuse_or_equal(self, data: bytes) -> None:
        """The reader refuses `data`, or finds in it what was in the original."""
        artifact = self.open(data)
        if artifact is not None:
            assert content_of(artifact) == self.content
        assert artifact is None or data == self.whole, "a changed byte went unnoticed"

    def refused(self, data: bytes, what: str) -> None:
        """The reader refuses `data` with this message."""
        self.outcomes.clear()
        assert self.open(data, BYTES_LIMIT + 4 * len(data)) is None
        assert self.outcomes == {what: 1}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def ordered(artifact: Artifact) -> list[str]:
    """Names of the members but the manifest, as they lie in the file."""
    return sorted(artifact.manifest["members"], key=artifact.member_offset)


def content_of(artifact: Artifact) -> tuple[Any, ...]:
    """Everything that can be asked of an artifact."""
    weights = [(spec.name, artifact.map_weight(spec.name)) for spec in artifact.plan.weights]
    return (
        artifact.manifest,
        artifact.plan,
        {name: artifact.read(name) for name in artifact.manifest["members"]},
        [(name, array.dtype.str, array.shape, array.tobytes()) for name, array in weights],
        [artifact.engine_model(engine.name) for engine in artifact.plan.engines],
    )


def sealed(members: list[tuple[str, bytes]]) -> bytes:
    """These members as the container that a writer would make: checksums, offsets and padding are right."""
    entries: list[Member] = []
    parts: list[bytes] = []
    for name, data in members:
        entries.append(Member(name, len(data), zlib.crc32(data), entries[-1].end if entries else 0))
        parts += [local_header(entries[-1]), data]
    return b"".join([*parts, directory(entries)])


def with_manifest(trial: Trial, manifest: bytes) -> bytes:
    return sealed([*trial.members, ("manifest.json", manifest)])


# Damage by chance.


def test_sealing_again_gives_the_original(trial: Trial) -> None:
    text = json.dumps(trial.manifest, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    assert with_manifest(trial, text) == trial.whole


def test_2500_truncations(trial: Trial) -> None:
    source = random.Random(1)
    lengths = {*range(256), *range(len(trial.whole) - 1024, len(trial.whole))}
    while len(lengths) < 2500:
        lengths.add(source.randrange(len(trial.whole)))
    for length in sorted(lengths):
        assert trial.open(trial.whole[:length]) is None
    assert trial.outcomes.total() == 2500


def test_3500_bit_flips(trial: Trial) -> None:
    """Every bit counts: a flip is never overlooked, wherever it is."""
    source = random.Random(2)
    for _ in range(3500):
        damaged = bytearray(trial.whole)
        for _ in range(source.choice((1, 1, 1, 2, 8))):
            damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
        trial.refuse_or_equal(bytes(damaged))
    assert trial.outcomes.total() == 3500


def test_1500_splices(trial: Trial) -> None:
    source = random.Random(3)
    whole = trial.whole
    for _ in range(1500):
        start, end = sorted(source.choices(range(len(whole) + 1), k=2))
        other = source.randrange(len(whole))
        end = source.choice((end, min(start + source.randrange(80), len(whole))))
        piece = source.choice((b"", source.randbytes(end - start), whole[other : other + end - start], bytes(9)))
        trial.refuse_or_equal(whole[:start] + piece + whole[source.choice((start, end)) :])
    assert trial.outcomes.total() == 1500


# Damage on purpose: the manifest, in a file that is sealed again.

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**31 + 1, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308, "", "B", "\x00",
    "../../etc/passwd", "/etc/passwd", "a\\b", "x" * 600, "é", "weights.bin", "manifest.json", "constant:f",
    "buffer:h", "output:out", [], {}, [[]], [None], [1, 2], ["B", 8], {"": 1},
    {"size": 0, "sha256": "0" * 64},
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        found.append((value, key))
        found += places(item)
    return found


def mutate(manifest: dict[str, Any], source: random.Random) -> None:
    """One small lie somewhere in the manifest."""
    spots = places(manifest)
    spot, key = source.choice(spots)
    value = spot[key]
    kind = source.randrange(7)
    if kind == 0:
        del spot[key]
    elif kind == 1 and isinstance(spot, list):
        spot.insert(key, copy.deepcopy(source.choice(spot)))
    elif kind == 2 and isinstance(spot, dict):
        spot[source.choice(("surplus", "", key + "s"))] = spot.pop(key)
    elif kind == 3:
        other, place = source.choice(spots)
        spot[key] = copy.deepcopy(other[place])
    elif kind == 4 and type(value) is int:
        spot[key] = source.choice((value + 1, value - 1, -value, value * 64, value + 64, value << 40))
    elif kind == 5 and isinstance(value, list):
        spot[key] = source.choice((value[::-1], value * 2, value[:-1], value * 500))
    else:
        spot[key] = copy.deepcopy(source.choice(HOSTILE))


def test_1500_sealed_lies_in_the_manifest(trial: Trial) -> None:
    """Hashes and checksums are right, so only the rules are left; what they let through can be used."""
    source = random.Random(4)
    for _ in range(1500):
        manifest = copy.deepcopy(trial.manifest)
        for _ in range(source.choice((1, 1, 2))):
            mutate(manifest, source)
        artifact = trial.open(with_manifest(trial, json.dumps(manifest).encode()))
        if artifact is not None:
            usable(artifact, manifest, dict(trial.members))
    assert trial.outcomes.total() == 1500
    assert 0 < trial.outcomes["loaded"] < 600


def usable(artifact: Artifact, manifest: dict[str, Any], members: dict[str, bytes]) -> None:
    """What was loaded is what the file says, and everything in it is in bounds."""
    assert artifact.manifest == manifest
    assert plan_from_json(plan_to_json(artifact.plan)) == artifact.plan
    assert {name: artifact.read(name) for name in manifest["members"]} == members
    for spec in artifact.plan.weights:
        raw = members[spec.member][spec.offset : spec.offset + spec.nbytes]
        mapped = artifact.map_weight(spec.name)
        assert mapped.tobytes() == raw and mapped.shape == spec.shape
    for engine in artifact.plan.engines:
        try:
            model = artifact.engine_model(engine.name)
        except ArtifactError as error:
            assert error.what == "an engine's model and its list of weights disagree"
        else:
            assert len(model) == len(members[engine.member])


JSON_TEXTS: dict[str, bytes] = {
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open brackets": b"[" * 1_000_000,
    "closing brackets": b"]" * 1_000_000,
    "brackets in strings": b'["' + b"[" * 1000 + b'\\"' + b"[" * 1000 + b'"]',
    "open string": b'"\\"' * 200_000,
    "escapes": b'"' + b'\\"' * 500_000,
    "trailing backslash": b'"abc\\',
    "NaN": b'{"format": NaN}',
    "infinity": b'{"format": -Infinity}',
    "too large float": b'{"format": 1e999}',
    "large integer": b'{"format": 18446744073709551616}',
    "huge integer": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "huge float": b'{"format": 1.' + b"9" * 1_000_000 + b"}",
    "surrogate": b'{"format": 1, "name": "\\ud800"}',
    "surrogate key": b'{"\\udfff": 1}',
    "twice": b'{"format": 1, "format": 1}',
    "twice inside": b'{"format": 1, "report": {"a": {"b": 1, "b": 2}}}',
    "not UTF-8": b'{"format": "\xff"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"format": 1}',
    "control character": b'{"name": "a\nb"}',
    "empty": b"",
    "zeros": bytes(1000),
    "two values": b"{} {}",
    "comment": b"{} // done",
    "single quotes": b"{'format': 1}",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "float format": b'{"format": 1.0}',
    "true format": b'{"format": true}',
    "old format": b'{"format": 0}',
    "format alone": b'{"format": 1}',
}


@pytest.mark.parametrize("text", JSON_TEXTS.values(), ids=JSON_TEXTS.keys())
def test_hostile_json(trial: Trial, text: bytes) -> None:
    assert trial.open(with_manifest(trial, text), BYTES_LIMIT + 8 * len(text)) is None
    assert set(trial.outcomes) <= {
        "the file holds JSON that cannot be read",
        "the file holds JSON that is too large to be dcc's",
        "the manifest has a field that cannot be read",
    }


@pytest.mark.parametrize(
    "extra",
    ['"name": "example"', '"report": {"a": 1, "a": 1}', '"report": {"a": "\\ud800"}', '"report": {"\\udfff": 1}',
     '"report": {"a": NaN}', '"report": {"a": 1e999}', '"report": {"a": 9223372036854775808}'],
)  # fmt: skip
def test_manifest_that_only_the_parser_can_refuse(trial: Trial, extra: str) -> None:
    """All else in it is right, so what other JSON readers let through would be loaded."""
    kept = {key: value for key, value in trial.manifest.items() if key != "report" or "report" not in extra}
    text = json.dumps(kept)[:-1] + ", " + extra + "}"
    trial.refused(with_manifest(trial, text.encode()), "the file holds JSON that cannot be read")


def large_texts() -> Iterator[tuple[str, bytes, int]]:
    """Manifests at the limits of size and count, what is said of them, and how many bytes each may cost."""
    unreadable = "the manifest has a field that cannot be read"
    room = VALUE_LIMIT - 10
    yield unreadable, b"[" + b"{}," * (room // 2) + b"1]", 128 * 2**20
    yield unreadable, b"{" + b",".join(b'"%d":1' % index for index in range(room)) + b"}", 256 * 2**20
    yield "the file holds JSON that is too large to be dcc's", b"[" + b"1," * (VALUE_LIMIT + 1) + b"1]", 16 * 2**20
    yield "the artifact has no manifest", b'["' + b"x" * MANIFEST_LIMIT + b'"]', 4 * 2**20


def test_large_json_stays_in_bounds(trial: Trial) -> None:
    for what, text, limit in large_texts():
        trial.outcomes.clear()
        assert trial.open(with_manifest(trial, text), limit) is None
        assert trial.outcomes == {what: 1}


def test_nesting_has_a_limit(trial: Trial) -> None:
    """Far below where the parser itself gives up."""
    for depth, what in ((60, "loaded"), (70, "the file holds JSON that is too large to be dcc's")):
        nested: Any = 1
        for _ in range(depth):
            nested = {"a": nested}
        trial.open(manifest_with(trial, report=nested))
        assert trial.outcomes == {what: 1}
        trial.outcomes.clear()


def test_newer_format_says_upgrade(trial: Trial) -> None:
    trial.path.write_bytes(with_manifest(trial, json.dumps({"format": 2, "anything": []}).encode()))
    with pytest.raises(ArtifactError) as refused:
        Artifact.open(trial.path)
    assert str(refused.value) == (
        "artifact: the artifact was made by a newer dcc\n"
        "  at    manifest.json\n"
        "  got   format 2\n"
        "  want  format 1\n"
        "  next  upgrade dcc, or compile the model again with this version"
    )


def manifest_with(trial: Trial, **changes: Any) -> bytes:
    return with_manifest(trial, json.dumps(trial.manifest | changes).encode())


def test_sealed_lies_about_members(trial: Trial) -> None:
    unreadable = "the manifest has a field that cannot be read"
    table = trial.manifest["members"]
    mix = table["engines/mix.onnx"]
    for change, what in (
        ({"size": mix["size"] + 1}, "the manifest and the file disagree about a member"),
        ({"size": -1}, unreadable),
        ({"size": True}, unreadable),
        ({"sha256": hashlib.sha256(b"").hexdigest()}, "a member's bytes are not those that were written"),
        ({"sha256": mix["sha256"].upper()}, unreadable),
        ({"sha256": mix["sha256"] + "\n"}, unreadable),
        ({"sha256": None}, unreadable),
        ({"mode": 7}, unreadable),
    ):
        members = table | {"engines/mix.onnx": mix | change}
        trial.refused(manifest_with(trial, members=members), what)
    for name in ("../x", "manifest.json", "a\\b", "/a"):
        trial.refused(manifest_with(trial, members=table | {name: mix}), unreadable)
    fewer = {name: entry for name, entry in table.items() if name != "engines/mix.onnx"}
    disagree = "the manifest and the file disagree about a member"
    trial.refused(manifest_with(trial, members=fewer), disagree)
    trial.refused(manifest_with(trial, members=table | {"more.onnx": mix}), disagree)


def test_weights_and_engines_outside(trial: Trial) -> None:
    plan = trial.manifest["plan"]
    for change, what in (
        ({"offset": 2**40}, "a weight lies outside the artifact"),
        ({"offset": 896}, "a weight lies outside the artifact"),
        ({"member": "nothing.bin"}, "a weight lies outside the artifact"),
        ({"member": "manifest.json"}, "a weight lies outside the artifact"),
        ({"shape": [8, 4], "nbytes": 2**33}, "the plan breaks the rule weights-fill-their-bytes"),
        ({"shape": [2**31, 2**31], "nbytes": 2**62}, "the plan breaks the rule tensors-are-known"),
    ):
        weights = [plan["weights"][0] | change, *plan["weights"][1:]]
        trial.refused(manifest_with(trial, plan=plan | {"weights": weights}), what)
    for member in ("nothing.onnx", "manifest.json", "weights.bin"):
        engines = [plan["engines"][0] | {"member": member}, *plan["engines"][1:]]
        trial.refused(manifest_with(trial, plan=plan | {"engines": engines}), "an engine has no model")


# Damage on purpose: the container.


def header_places(whole: bytes) -> list[list[int]]:
    """Where each member's local and central header lie, and last the end record."""
    end = len(whole) - 22
    position = struct.unpack_from("<I", whole, end + 16)[0]
    found = []
    while position < end:
        name_size, extra_size = struct.unpack_from("<2H", whole, position + 28)
        found.append([struct.unpack_from("<I", whole, position + 42)[0], position])
        position += 46 + name_size + extra_size
    return [*found, [end]]


# Offset in a local header, in a central one, and width, for the fields that both have.
SHARED_FIELDS = [(4, 6, 2), (6, 8, 2), (8, 10, 2), (10, 12, 2), (12, 14, 2), (14, 16, 4), (18, 20, 4),
                 (22, 24, 4), (26, 28, 2), (28, 30, 2)]  # fmt: skip
NUMBERS = [0, 1, 2, 8, 20, 45, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]


def test_1500_consistent_lies_in_headers(trial: Trial) -> None:
    """Both copies of a field say the same wrong thing, or one field of the directory does."""
    source = random.Random(5)
    found = header_places(trial.whole)
    for _ in range(1500):
        damaged = bytearray(trial.whole)
        for _ in range(source.choice((1, 1, 2, 3))):
            spot = source.choice(found)
            value = source.choice((source.choice(NUMBERS), source.randrange(len(damaged)), source.getrandbits(32)))
            if len(spot) == 1 or source.random() < 0.3:
                write(damaged, spot[-1] + source.randrange(0, 44 if len(spot) == 2 else 20), 2, value)
                continue
            local, central, width = source.choice(SHARED_FIELDS)
            write(damaged, spot[0] + local, width, value)
            write(damaged, spot[1] + central, width, value)
        trial.refuse_or_equal(bytes(damaged))
    assert trial.outcomes.total() == 1500


def write(data: bytearray, offset: int, width: int, value: int) -> None:
    data[offset : offset + width] = (value & (256**width - 1)).to_bytes(width, "little")


@pytest.mark.parametrize(
    "name",
    [b"../../../mix.onn", b"/etc/passwd.onnx", b"engines\\mix.onnx", b"engines/mix.onn\0",
     b"C:engine/mix.onx",
     b"engines//mix.onx", b"engines/./mix.on", b"engines/../m.onx",
     b"engines/mix.onn/", b".ngines/mix.onnx", b"engines/mi\xc3\xa9.onn", b"engines/mi\xff.onnx",
     b"engines/mix.on\n\n"],
)  # fmt: skip
def test_hostile_member_name(trial: Trial, name: bytes) -> None:
    """The directory, the local header and the manifest agree on a name that could leave the folder."""
    assert len(name) == len("engines/mix.onnx")
    text = json.dumps(trial.manifest).replace("engines/mix.onnx", "engines/m1x.onnx").encode()
    members = [(key.replace("mix", "m1x"), data) for key, data in trial.members]
    whole = sealed([*members, ("manifest.json", text)])
    assert trial.open(whole) is not None
    outside = whole.replace(b"engines/m1x.onnx", name)
    assert outside.count(name) >= 2
    trial.refused(outside, "a member has a name that dcc never writes")


def test_two_members_of_one_name(trial: Trial) -> None:
    members = [("engines/mix.onnx" if name == "engines/add.onnx" else name, data) for name, data in trial.members]
    text = json.dumps(trial.manifest).encode()
    trial.refused(sealed([*members, ("manifest.json", text)]), "two members have the same name")


def test_overlaps_and_gaps(trial: Trial) -> None:
    whole = trial.whole
    spots = header_places(whole)
    for victim, target in ((1, 0), (2, 1), (3, 3)):
        damaged = bytearray(whole)
        offset = spots[target][0] + (1 if victim == target else 0)
        write(damaged, spots[victim][1] + 42, 4, offset)
        trial.refused(bytes(damaged), "members overlap or leave a gap")
    # One local file, listed many times: the bomb that needs no compression.
    text = json.dumps(trial.manifest).encode()
    entry = Member("weights.bin", 10_000_000, 0, 0)
    header = local_header(entry)
    bomb = header + text + directory([entry, *(Member(f"copy{i}", 10_000_000, 0, 0) for i in range(1000))])
    trial.refused(bomb, "the artifact's directory is out of bounds")
    start = struct.pack("<I", len(header + text))
    trial.refused(bomb[:-6] + start + bomb[-2:], "members overlap or leave a gap")


def test_other_writers_archives(trial: Trial) -> None:
    """A zip file with the right content from another tool: stored, compressed, commented."""
    text = json.dumps(trial.manifest).encode()
    everything = [*trial.members, ("manifest.json", text)]
    for method, comment in (
        (zipfile.ZIP_STORED, b""),
        (zipfile.ZIP_DEFLATED, b""),
        (zipfile.ZIP_STORED, b"hello"),
    ):
        with zipfile.ZipFile(trial.path, "w", method) as archive:
            for name, data in everything:
                archive.writestr(name, data)
            archive.comment = comment
        assert trial.open_path(trial.path) is None
    assert trial.outcomes["a member is compressed or encrypted"] == 1


def test_zip_bomb(trial: Trial) -> None:
    with zipfile.ZipFile(trial.path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", bytes(50 * 2**20))
    assert trial.path.stat().st_size < 100_000
    trial.refused(trial.path.read_bytes(), "a member is compressed or encrypted")


def test_encrypted_flag(trial: Trial) -> None:
    damaged = bytearray(trial.whole)
    for spot in header_places(trial.whole)[:-1]:
        write(damaged, spot[0] + 6, 2, 1)
        write(damaged, spot[1] + 8, 2, 1)
    trial.refused(bytes(damaged), "a member is compressed or encrypted")


def test_bytes_around_it(trial: Trial) -> None:
    cut = "the artifact is cut short, or has bytes after its end"
    for tail in (b"\0", b"garbage", bytes(70_000)):
        trial.refused(trial.whole + tail, cut)
    trial.refused(trial.whole + trial.whole, "the artifact's directory is not what dcc writes")
    for head in (b"\0", b"#!/bin/sh\n", bytes(4096)):
        assert trial.open(head + trial.whole) is None
    trial.refused(trial.whole[:-22] + b"PK\5\6" + bytes(18), "the artifact's directory is not what dcc writes")
    trial.refused(b"PK\5\6" + bytes(18), "the artifact has no manifest")


def test_not_an_artifact(trial: Trial) -> None:
    other = "this is not a dcc artifact"
    for data in (b"", b"P", b"PK", bytes(5000), b"\x80\x02}q\x00.", b"\x89HDF\r\n\x1a\n", os.urandom(3000)):
        trial.refused(data, other)
    np.savez(trial.path.with_suffix(".npz"), a=np.ones(3))
    assert trial.open_path(trial.path.with_suffix(".npz")) is None


# Paths that are no artifact.


def test_odd_paths(trial: Trial, tmp_path: Path) -> None:
    pipe, loop, folder = tmp_path / "pipe", tmp_path / "loop", tmp_path / "folder"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    folder.mkdir()
    for path, what in (
        (tmp_path / "missing.dcc", "there is no artifact at this path"),
        (trial.path / "inside", "the artifact cannot be read"),
        (folder, "this is not a file"),
        (pipe, "this is not a file"),
        ("/dev/zero", "this is not a file"),
        (loop, "the artifact cannot be read"),
        ("nul\0byte", "the artifact cannot be read"),
        ("x" * 5000, "the artifact cannot be read"),
        ("\ud800.dcc", "the artifact cannot be read"),
        ("", "this is not a file"),
    ):
        assert trial.open_path(path) is None
        assert trial.outcomes == {what: 1}, path
        trial.outcomes.clear()
