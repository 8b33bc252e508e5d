"""The artifact: what is written can be read, run and moved; what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from example_artifact import WEIGHTS, manifest_fields, onnx_model, write_example

from dcc.errors import ArtifactError, ExportError, UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.runtime import artifact as artifact_module
from dcc.runtime import container
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER, Artifact, Check, external_location
from dcc.runtime.plan import plan_to_json

H = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "model.dcc"
    write_example(path)
    return path


def run_mix(model: bytes, folder: str) -> np.ndarray:
    """What the engine `mix`, whose weight may lie outside its model, makes of `H`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"h": H})[0]
    return result


def mixed(path: Path, check: Check = "auto") -> np.ndarray:
    artifact = Artifact.open(path, check)
    return run_mix(artifact.engine_model("mix"), artifact.folder)


def refusal(path: str | Path, check: Check = "auto") -> ArtifactError:
    with pytest.raises(ArtifactError) as refused:
        Artifact.open(path, check)
    return refused.value


# What is written can be read.


def test_reads_what_was_written(example: Path, tmp_path: Path) -> None:
    plan = write_example(tmp_path / "again.dcc")
    artifact = Artifact.open(example)
    assert artifact.path == str(example) and artifact.folder == str(tmp_path)
    assert artifact.plan == plan
    members = artifact.manifest.pop("members")
    assert artifact.manifest == manifest_fields(plan_to_json(plan)) | {"format": 1}
    assert list(members) == sorted(["weights.bin", *(engine.member for engine in plan.engines)])
    stored = Artifact.open(example).read("weights.bin")
    for name, array in WEIGHTS.items():
        mapped = artifact.map_weight(name)
        assert np.array_equal(mapped, array) and not mapped.flags.writeable
        spec = next(weight for weight in plan.weights if weight.name == name)
        assert stored[spec.offset : spec.offset + spec.nbytes] == array.tobytes()


def test_members_lie_where_the_artifact_says(example: Path) -> None:
    artifact, whole = Artifact.open(example), example.read_bytes()
    assert artifact.member_offset("weights.bin") == 4096
    for name in artifact.manifest["members"]:
        offset = artifact.member_offset(name)
        assert offset % 64 == 0 and whole[offset:].startswith(artifact.read(name))


def test_equal_input_gives_equal_bytes(example: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "again.dcc")
    assert (tmp_path / "again.dcc").read_bytes() == example.read_bytes()


def test_other_zip_readers_accept_it(example: Path) -> None:
    with zipfile.ZipFile(example) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "weights.bin" and archive.namelist()[-1] == "manifest.json"
        assert json.loads(archive.read("manifest.json"))["name"] == "example"


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_accepts_it(example: Path) -> None:
    done = subprocess.run(["unzip", "-t", example], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "No errors detected" in done.stdout, done.stdout


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    more = {"a": base, "b": base.reshape(4, 3).copy(), "c": base.T}
    plan = write_example(tmp_path / "model.dcc", {name: (array, None) for name, array in more.items()})
    a, b, c = plan.weights[-3:]
    assert a.offset == b.offset != c.offset
    artifact = Artifact.open(tmp_path / "model.dcc")
    for name, array in more.items():
        assert np.array_equal(artifact.map_weight(name), array)


def test_every_dtype_survives(tmp_path: Path) -> None:
    names = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")
    more: dict[str, tuple[np.ndarray, str | None]] = {
        name: (np.array([[0, 1, 1], [1, 0, 1]], dtype=name), None) for name in names
    }
    more["scalar"] = (np.array(2.5, dtype=np.float32), None)
    more["from big endian"] = (np.array([1.5, -2.5], dtype=">f4"), None)
    more["half"] = (np.array([0x3F80, 0xC000], dtype=np.uint16), "bfloat16")
    plan = write_example(tmp_path / "model.dcc", more)
    artifact = Artifact.open(tmp_path / "model.dcc")
    dtypes = {weight.name: weight.dtype for weight in plan.weights}
    for name, (array, _) in more.items():
        mapped = artifact.map_weight(name)
        assert mapped.shape == array.shape and mapped.dtype == array.dtype.newbyteorder("<")
        assert np.array_equal(mapped, array)
    assert all(dtypes[name] == name for name in names)
    assert dtypes["half"] == "bfloat16" and dtypes["from big endian"] == "float32"


# Engines find their weights in the zip, whatever the file is called.


def test_engine_runs_from_the_zip_as_if_its_weight_were_inside(example: Path) -> None:
    artifact = Artifact.open(example)
    weights = {weight.name: weight for weight in artifact.plan.weights}
    inline = run_mix(onnx_model("mix", weights, 0, inline=True), artifact.folder)
    assert mixed(example).tobytes() == inline.tobytes()
    np.testing.assert_allclose(inline, H @ WEIGHTS["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["a", "ab.dcc", "two words.dcc", "größe-漢字.dcc", "%2e%2e.dcc", "..dcc", "line\nbreak.dcc",
     "back\\slash.dcc", "-", "~", "$HOME", "'quoted\".dcc", "x" * 237, "x" * 238, "é" * 119],
)  # fmt: skip
def test_renamed_and_moved_artifact_gives_equal_bits(example: Path, tmp_path: Path, name: str) -> None:
    before = mixed(example)
    folder = tmp_path / "other folder-ü"
    folder.mkdir()
    example.rename(folder / name)
    assert mixed(folder / name).tobytes() == before.tobytes()


def test_link_is_followed(example: Path, tmp_path: Path) -> None:
    """ONNX Runtime refuses symbolic links, so the artifact answers with the file behind them."""
    link = tmp_path / "folder" / "link.dcc"
    link.parent.mkdir()
    link.symlink_to(example)
    assert mixed(link).tobytes() == mixed(example).tobytes()


def test_relative_path_survives_a_change_of_folder(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = Artifact.open(example.name)
    monkeypatch.chdir("/")
    assert run_mix(artifact.engine_model("mix"), artifact.folder).shape == (2, 8)


@pytest.mark.parametrize("name", [b"x" * 239, b"x" * 241, b"x" * 255, b"latin-\xe9.dcc"])
def test_name_that_onnx_runtime_cannot_take_is_refused(example: Path, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    os.rename(example, path)  # noqa: PTH104 - pathlib has no bytes
    artifact = Artifact.open(os.fsdecode(path))
    with pytest.raises(ArtifactError, match="file name cannot be given to ONNX Runtime") as refused:
        artifact.engine_model("mix")
    str(refused.value).encode("utf-8")
    assert artifact.engine_model("add") == artifact.read("engines/add.onnx")


def test_location_keeps_the_length_and_names_the_file() -> None:
    assert len(EXTERNAL_LOCATION_PLACEHOLDER) == 240
    for length in (*range(1, 239), 240):
        location = external_location("x" * length)
        assert len(location) == 240
        assert os.path.normpath(location) == b"x" * length and not location.startswith(b"/")


def test_engine_and_weights_must_agree(example: Path) -> None:
    with ArtifactWriter(example.with_name("b.dcc")) as writer:
        source = Artifact.open(example)
        for weight in source.plan.weights:
            writer.add_weight(weight.name, source.map_weight(weight.name))
        for engine in source.plan.engines:
            writer.add_member(engine.member, source.read("engines/add.onnx"))
        writer.finish(manifest_fields(source.plan))
    with pytest.raises(ArtifactError, match="an engine's model and its list of weights disagree"):
        Artifact.open(example.with_name("b.dcc")).engine_model("mix")


# How much is checked.


def damage(path: Path, member: str) -> None:
    """The last byte of a member changes, and the file keeps its size."""
    artifact = Artifact.open(path)
    with path.open("r+b") as file:
        file.seek(artifact.member_offset(member) + artifact.manifest["members"][member]["size"] - 1)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize(
    ("member", "limit", "refused_by"),
    [
        ("weights.bin", artifact_module.AUTO_CHECK_LIMIT, ["auto", "full"]),
        ("weights.bin", 4096, ["full"]),
        ("engines/mix.onnx", artifact_module.AUTO_CHECK_LIMIT, ["auto", "full"]),
        ("engines/mix.onnx", 4096, ["auto", "full"]),
    ],
)
def test_what_each_check_finds(
    example: Path, monkeypatch: pytest.MonkeyPatch, member: str, limit: int, refused_by: list[str]
) -> None:
    damage(example, member)
    monkeypatch.setattr(artifact_module, "AUTO_CHECK_LIMIT", limit)
    checks: tuple[Check, ...] = ("auto", "full", "fast")
    for check in checks:
        if check in refused_by:
            error = refusal(example, check)
            assert error.what == "a member's bytes are not those that were written"
            assert error.details["at"] == member
        else:
            with pytest.raises(ArtifactError, match="not those that were written"):
                Artifact.open(example, check).read(member)


def test_unknown_check_is_a_usage_error(example: Path) -> None:
    with pytest.raises(UsageError):
        Artifact.open(example, "thorough")  # type: ignore[arg-type]


def test_replaced_file_is_noticed(example: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(example)
    write_example(tmp_path / "new.dcc")
    (tmp_path / "new.dcc").replace(example)
    for access in (lambda: artifact.read("weights.bin"), lambda: artifact.map_weight("w")):
        with pytest.raises(ArtifactError, match="was replaced after it was opened"):
            access()


def test_unknown_names_are_refused(example: Path) -> None:
    artifact = Artifact.open(example)
    for access in (artifact.read, artifact.member_offset, artifact.map_weight, artifact.engine_model):
        with pytest.raises(ArtifactError, match="no such"):
            access("nothing")
    with pytest.raises(ArtifactError, match="no hash of its own"):
        artifact.read("manifest.json")


# More than 4 GiB.


def test_zip64_records_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a large file needs, in a small one: the limit is lowered."""
    for limit in (1, 300, 700, 6000):
        monkeypatch.setattr(container, "ZIP64_LIMIT", limit)
        path = tmp_path / f"{limit}.dcc"
        plan = write_example(path)
        assert Artifact.open(path, "full").plan == plan
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert mixed(path).shape == (2, 8)


def test_weights_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 5 GiB: the hole is skipped instead of written, so its hash is not looked at."""
    hole = 5 * 2**30
    add_weight = ArtifactWriter.add_weight

    def after_a_hole(writer: ArtifactWriter, name: str, array: np.ndarray, dtype: str | None = None) -> object:
        if name == "m":
            assert writer._file is not None
            writer._file.seek(hole, os.SEEK_CUR)
            writer._size += hole
        return add_weight(writer, name, array, dtype)

    monkeypatch.setattr(ArtifactWriter, "add_weight", after_a_hole)
    path = tmp_path / "large.dcc"
    write_example(path)
    assert path.stat().st_size > hole and path.stat().st_blocks * 512 < 2**20
    artifact = Artifact.open(path)  # `auto` leaves out weights of this size
    assert artifact.member_offset("engines/mix.onnx") > hole
    assert np.array_equal(artifact.map_weight("w"), WEIGHTS["w"])
    np.testing.assert_allclose(mixed(path), H @ WEIGHTS["w"], rtol=1e-5)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("weights.bin").file_size > hole
        assert archive.read("engines/mix.onnx") == artifact.read("engines/mix.onnx")


# What cannot be written leaves nothing behind.


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interrupted_writer_leaves_the_old_file(example: Path, error: type[BaseException]) -> None:
    before = example.read_bytes()
    with pytest.raises(error), ArtifactWriter(example) as writer:
        writer.add_weight("a", np.ones(100_000, np.float32))
        raise error
    assert example.read_bytes() == before
    assert [path.name for path in example.parent.iterdir()] == ["model.dcc"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.dcc"
    named_at_sync: list[bool] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        named_at_sync.append(path.exists())
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_example(path)
    assert named_at_sync == [False, True]  # the file, then the folder that names it


def test_unfinished_writer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="was not finished"), ArtifactWriter(tmp_path / "model.dcc"):
        pass
    assert not list(tmp_path.iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` fails, as on a full disk. Python ignores the signal, so an OSError remains."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 4000, 5000, 12000])
def test_full_disk_is_one_export_error(tmp_path: Path, size: int) -> None:
    with file_size_limit(size), pytest.raises(ExportError, match="the artifact cannot be written"):
        write_example(tmp_path / "model.dcc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/proc/model.dcc", "/nowhere/at/all/model.dcc", "/dev/null/model.dcc"])
def test_folder_that_takes_no_files_is_one_export_error(path: str) -> None:
    with pytest.raises(ExportError, match="the artifact cannot be written"):
        write_example(Path(path))


def test_target_that_is_a_folder_is_one_export_error(tmp_path: Path) -> None:
    (tmp_path / "model.dcc").mkdir()
    with pytest.raises(ExportError, match="Is a directory"):
        write_example(tmp_path / "model.dcc")
    assert [path.name for path in tmp_path.iterdir()] == ["model.dcc"]


@pytest.mark.parametrize("name", ["x" * 239, "\ud800.dcc"])
def test_name_that_could_not_be_run_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="file name cannot be given to ONNX Runtime"):
        write_example(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones(3, np.complex64), None),
        (np.ones(3, np.uint16), None),
        (np.ones(3, np.float32), "bfloat16"),
        (np.ones(3, np.float32), "float33"),
        (np.ones((3, 0), np.float32), None),
        (np.array(["text"]), None),
        (np.array([object()]), None),
    ],
)
def test_weight_that_has_no_form_is_refused(tmp_path: Path, array: np.ndarray, dtype: str | None) -> None:
    with pytest.raises(ExportError, match="a weight cannot be stored"):
        write_example(tmp_path / "model.dcc", {"odd": (array, dtype)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin", "a", "../b", "/b", "c\\d", "", "é", "x" * 200])
def test_member_name_is_checked(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ExportError, match="cannot be added"),
        ArtifactWriter(tmp_path / "model.dcc") as writer,
    ):
        writer.add_member("a", b"1")
        writer.add_member(name, b"2")
    assert not list(tmp_path.iterdir())


def test_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    plan = plan_to_json(write_example(tmp_path / "model.dcc"))
    fields = manifest_fields(plan)
    for odd, what in (
        ({"plan": plan | {"order": [7]}}, "would be refused by the reader: the plan breaks the rule"),
        ({"plan": plan}, "would be refused by the reader: a weight lies outside"),
        ({"report": {"loss": float("nan")}}, "the manifest is not JSON"),
        ({"report": {"loss": np.float32(1)}}, "the manifest is not JSON"),
        ({"report": {"text": "\ud800"}}, "the manifest is not JSON"),
        ({"name": ""}, "would be refused by the reader: the manifest has a field"),
        ({"surplus": 1}, "missing or unknown fields"),
    ):
        with pytest.raises(ExportError) as refused, ArtifactWriter(tmp_path / "other.dcc") as writer:
            writer.finish(fields | odd)
        assert what in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.dcc"]


def test_writer_is_used_inside_its_block(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "model.dcc")
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        writer.add_weight("a", np.ones(3, np.float32))
