"""Engines by TensorRT-RTX, which needs no GPU to build them: what they are, what is refused, what the cache holds."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from example_artifact import write_example
from onnx import TensorProto, external_data_helper, helper, load_model_from_string, numpy_helper

from dcc.errors import ExportError
from dcc.exports import engine_workers
from dcc.exports.cached_build import build, request_key
from dcc.exports.engine_workers import build_all
from dcc.runtime.artifact import Artifact
from dcc.runtime.engine_cache import EngineCache, default_folder
from dcc.runtime.network_record import check_network, layer_counts
from dcc.runtime.plan import EngineSpec, TensorSpec
from dcc.runtime.tensorrt_builder import BuilderOptions, BuildRequest, BuiltEngine, TensorRt

pytest.importorskip("tensorrt_rtx", reason="needs pip install 'dcc[tensorrt-rtx]'", exc_type=ImportError)

LIBRARY = TensorRt.find("tensorrt-rtx")
ROWS = (1, 2, 4)
SPEC = EngineSpec(
    "tiny", "step", "engines/tiny.onnx",
    (TensorSpec("x", "float16", ("B", 4, 8)),), (TensorSpec("z", "float16", ("B", 4, 8)),),
)  # fmt: skip


def tiny_model(operation: str = "Gelu", dtype: int = TensorProto.FLOAT16, seed: int = 0) -> bytes:
    """A matrix product and one more operation, strongly typed if `dtype` is float16."""
    weight = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="first/product"),
        helper.make_node(operation, ["y"], ["z"], name=f"second/{operation}"),
    ]
    ports = [
        [helper.make_tensor_value_info(name, kind, ["B", 4, 8])]
        for name, kind in (("x", dtype), ("z", TensorProto.FLOAT16))
    ]
    graph = helper.make_graph(nodes, "tiny", ports[0], ports[1], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


def tiny(name: str = "tiny", **changes: Any) -> BuildRequest:
    return replace(BuildRequest(name, tiny_model(), (80,), ROWS), **changes)


@pytest.fixture(scope="module")
def built() -> BuiltEngine:
    return build(tiny(), LIBRARY)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers put their files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an engine was built")

    monkeypatch.setattr("dcc.exports.cached_build.serialize", refuse)
    monkeypatch.setattr("dcc.exports.engine_workers.subprocess.Popen", refuse)


def test_an_engine_records_what_was_built(built: BuiltEngine) -> None:
    assert built.record == {
        "library": "tensorrt-rtx", "version": LIBRARY.version, "device": "", "capabilities": [80],
        "inputs": [{"name": "x", "dtype": "float16", "shape": ["B", 4, 8]}],
        "outputs": [{"name": "z", "dtype": "float16", "shape": ["B", 4, 8]}],
        "profiles": [{"x": [[1, 4, 8], [2, 4, 8], [4, 4, 8]]}],
        "layers": [
            ["w", "constant", ["float16"]], ["ONNXTRT_Broadcast", "shuffle", ["float16"]],
            ["first/product", "matrix_multiply", ["float16"]], ["second/Gelu", "activation", ["float16"]],
        ],
        "attention": "",
        "options": {"level": None, "auxiliary_streams": None, "workspace_bytes": None, "tf32": False, "detailed": True},
    }  # fmt: skip
    assert json.loads(json.dumps(built.record)) == built.record
    assert layer_counts(built.record)["matrix_multiply float16"] == 1
    assert len(built.data) > 10_000
    assert built.cost.seconds > 0
    assert built.cost.peak_bytes > 2**20
    assert not built.cost.cached


def test_one_engine_serves_every_capability(built: BuiltEngine) -> None:
    assert {75, 80, 86, 89, 120} <= set(LIBRARY.capabilities)
    engine = build(tiny(capabilities=LIBRARY.capabilities), LIBRARY)
    assert engine.record["capabilities"] == list(LIBRARY.capabilities)
    assert len(built.data) <= len(engine.data) < 1.5 * len(built.data)


def test_the_record_is_checked_against_the_plan(built: BuiltEngine) -> None:
    check_network(built.record, SPEC)
    faults = [
        (replace(SPEC, inputs=(TensorSpec("x", "float32", ("B", 4, 8)),)), "input x", "float16['B', 4, 8]"),
        (replace(SPEC, inputs=(TensorSpec("x", "float16", (2, 4, 8)),)), "input x", "float16['B', 4, 8]"),
        (replace(SPEC, outputs=(TensorSpec("z", "float16", ("B", 8, 4)),)), "output z", "float16['B', 4, 8]"),
        (replace(SPEC, outputs=(TensorSpec("out", "float16", ("B", 4, 8)),)), "output out", "no such port"),
        (replace(SPEC, inputs=()), "input x", "float16['B', 4, 8]"),
    ]
    for spec, at, got in faults:
        with pytest.raises(ExportError, match="not the engine that the plan describes") as caught:
            check_network(built.record, spec)
        assert caught.value.details["at"] == f"engine tiny, {at}"
        assert caught.value.details["got"] == got
    with pytest.raises(ExportError, match="not the engine that the plan describes") as caught:
        check_network(built.record, SPEC, [TensorSpec("w", "float16", (8, 8))])
    assert caught.value.details["at"] == "engine tiny, input w"


def test_the_engines_of_an_artifact_are_built_as_its_plan_describes_them(tmp_path: Path) -> None:
    """Weights are read out of the artifact itself."""
    write_example(tmp_path / "example.dcc")
    opened = Artifact.open(tmp_path / "example.dcc")
    requests = [
        BuildRequest(spec.name, opened.engine_model(spec.name), (80,), ROWS, folder=Path(opened.folder))
        for spec in opened.plan.engines
    ]
    engines = list(build_all(requests, LIBRARY))
    for spec, engine in zip(opened.plan.engines, engines, strict=True):
        check_network(engine.record, spec)
        assert set(engine.record["profiles"][0]) == {port.name for port in spec.inputs}


def attention_model(dtype: int) -> bytes:
    ports = [helper.make_tensor_value_info(name, dtype, ["B", 2, 16, 64]) for name in ("q", "k", "v", "out")]
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"], name="attention")
    graph = helper.make_graph([node], "attention", ports[:3], ports[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


def test_the_record_says_whether_attention_has_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    """For float32 there is none. TensorRT prints that the first attempt failed; what a worker prints goes nowhere."""
    models = [attention_model(dtype) for dtype in (TensorProto.FLOAT16, TensorProto.FLOAT)]
    engines = build_all([tiny(model=model) for model in models], LIBRARY)
    assert [engine.record["attention"] for engine in engines] == ["fused", "decomposable"]
    assert "Internal Error" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("outside", [False, True])
def test_an_engine_holds_the_weights_as_they_are(outside: bool, tmp_path: Path) -> None:
    (weight,) = load_model_from_string(tiny_model()).graph.initializer
    model = with_external_weights(tmp_path / "weights.bin", b"before") if outside else tiny_model()
    assert weight.raw_data in build(tiny(model=model, folder=tmp_path), LIBRARY).data


def test_weights_may_be_inputs(built: BuiltEngine) -> None:
    model = load_model_from_string(tiny_model())
    weight = model.graph.initializer.pop()
    model.graph.input.append(helper.make_tensor_value_info("w", weight.data_type, weight.dims))
    engine = build(tiny(model=model.SerializeToString()), LIBRARY)
    check_network(engine.record, SPEC, [TensorSpec("w", "float16", (8, 8))])
    assert set(engine.record["profiles"][0]) == {"x"}


@pytest.mark.parametrize(
    ("request_", "what", "details"),
    [
        (
            tiny(model=tiny_model("Det")), "cannot read a model",
            {"at": "engine tiny, node second/Det (Det)", "got": "the operation Det is not supported"},
        ),
        (
            tiny(model=tiny_model("BitCast")), "cannot read a model",
            {"at": "engine tiny, node second/BitCast (BitCast)", "got": "the operation BitCast is not supported"},
        ),
        (tiny(model=b"no protobuf"), "cannot read a model", {"at": "engine tiny", "got": "it is empty, or not ONNX"}),
        (
            tiny(capabilities=(90, 80)), "does not build for this compute capability",
            {"at": "engine tiny", "got": "90", "want": ", ".join(map(str, LIBRARY.capabilities))},
        ),
        (
            tiny(rows=None), "an engine has a dimension that no profile bounds",
            {"at": "engine tiny, input x", "got": "B", "want": "fixed sizes, or B and the rows that it counts"},
        ),
        (
            tiny(rows=(2, 1, 4)), "a batch profile is not in order",
            {"at": "engine tiny", "got": "(2, 1, 4)", "want": "1 <= least <= typical <= most"},
        ),
    ],
)  # fmt: skip
def test_a_refusal_is_one_clear_error(
    request_: BuildRequest, what: str, details: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=what) as caught:
        build(request_, LIBRARY)
    got = dict(caught.value.details)
    got.pop("next", None)
    assert got == details
    assert capfd.readouterr().err == ""


def test_mixed_types_name_the_node() -> None:
    with pytest.raises(ExportError, match="cannot read a model") as caught:
        build(tiny(model=tiny_model(dtype=TensorProto.FLOAT)), LIBRARY)
    assert caught.value.details["at"] == "engine tiny, node first/product (MatMul)"
    assert "must have same input types" in caught.value.details["got"]
    assert "\n" not in caught.value.details["got"]
    assert "cuda" not in str(caught.value).lower()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model = with_external_weights(tmp_path / "weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match="cannot read a model") as caught:
        build(tiny(model=model, folder=tmp_path), LIBRARY)
    assert caught.value.details["got"] == f"the weight w cannot be read from {tmp_path}"


def test_progress_rises_to_one() -> None:
    told: list[tuple[str, float]] = []
    build(tiny(), LIBRARY, lambda name, done: told.append((name, done)))
    shares = [done for _, done in told]
    assert {name for name, _ in told} == {"tiny"}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 10


def test_progress_can_end_a_build() -> None:
    def told(name: str, done: float) -> None:
        if done > 0.3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        build(tiny(), LIBRARY, told)


def test_an_interrupt_ends_a_build() -> None:
    def told(name: str, done: float) -> None:
        if 0.3 < done < 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(tiny(), LIBRARY, told)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# The cache


def test_a_second_build_is_a_look_up(cache: EngineCache, no_builds_after: Callable[[], None]) -> None:
    first = build(tiny(), LIBRARY, cache=cache)
    no_builds_after()
    told: list[float] = []
    second = build(tiny("other"), LIBRARY, lambda _, done: told.append(done), cache)
    assert (second.name, second.data, second.record) == ("other", first.data, first.record)
    assert second.cost == replace(first.cost, cached=True)
    assert told == [1.0]
    assert [engine.data for engine in build_all([tiny(), tiny("b")], LIBRARY, 2, cache=cache)] == [first.data] * 2


@pytest.fixture
def no_builds_after(request: pytest.FixtureRequest) -> Callable[[], None]:
    return lambda: request.getfixturevalue("no_builds")


def test_keys_differ_where_engines_do(tmp_path: Path) -> None:
    key = request_key(tiny(), LIBRARY)
    assert request_key(tiny("other", capabilities=(80, 80)), LIBRARY) == key
    others = [
        tiny(model=tiny_model("Relu")), tiny(model=tiny_model(seed=1)), tiny(capabilities=(80, 89)),
        tiny(rows=(1, 2, 8)), tiny(options=BuilderOptions(tf32=True)), tiny(device="some GPU"),
    ]  # fmt: skip
    keys = {request_key(item, LIBRARY) for item in others} | {request_key(tiny(), replace(LIBRARY, version="1.8"))}
    assert len(keys | {key}) == len(others) + 2


def with_external_weights(path: Path, before: bytes = b"", seed: int = 0) -> bytes:
    """The tiny model with its weight in a file, after the bytes `before`."""
    model = load_model_from_string(tiny_model(seed=seed))
    (weight,) = model.graph.initializer
    data = weight.raw_data
    path.write_bytes(before + data)
    external_data_helper.set_external_data(weight, path.name, len(before), len(data))
    weight.ClearField("raw_data")
    return bytes(model.SerializeToString())


def test_what_is_no_model_has_no_key(cache: EngineCache) -> None:
    with pytest.raises(ExportError, match="this is not an ONNX model"):
        build(tiny(model=b"no protobuf"), LIBRARY, cache=cache)


def test_a_key_is_the_content_of_weights_and_not_their_place(tmp_path: Path) -> None:
    models = [
        with_external_weights(tmp_path / "a.bin"),
        with_external_weights(tmp_path / "b.bin", b"something before"),
        with_external_weights(tmp_path / "c.bin", seed=1),
    ]
    keys = [request_key(tiny(model=model, folder=tmp_path), LIBRARY) for model in models]
    assert keys[0] == keys[1] != keys[2]
    assert request_key(tiny(), LIBRARY) not in keys
    (tmp_path / "b.bin").write_bytes(b"short")
    with pytest.raises(ExportError, match="the weights of an ONNX model cannot be read") as caught:
        request_key(tiny(model=models[1], folder=tmp_path), LIBRARY)
    assert caught.value.details["got"] == "the file ends 128 bytes early"


def test_a_damaged_entry_is_replaced(cache: EngineCache, built: BuiltEngine) -> None:
    build(tiny(), LIBRARY, cache=cache)
    (entry,) = cache.folder.iterdir()
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (bytes(flipped), whole[:200], whole[: len(whole) // 2], b""):
        entry.write_bytes(damaged)
        engine = build(tiny(), LIBRARY, cache=cache) if damaged else next(build_all([tiny()], LIBRARY, cache=cache))
        assert (engine.data, engine.cost.cached) == (built.data, False)
        assert build(tiny(), LIBRARY, cache=cache).cost.cached
    assert list(cache.folder.iterdir()) == [entry]


def test_a_full_disk_does_not_fail_a_build(cache: EngineCache, built: BuiltEngine, tmp_path: Path) -> None:
    class Full(EngineCache):
        """The system lets it write 1000 bytes."""

        def put(self, *entry: Any) -> bool:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            try:
                return super().put(*entry)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    full = Full(cache.folder)
    assert build(tiny(), LIBRARY, cache=full).data == built.data
    assert full.problem == f"{cache.folder}: File too large"
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_does_not_fail_a_build(tmp_path: Path, built: BuiltEngine) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "engines")
    assert build(tiny(), LIBRARY, cache=cache).data == built.data
    assert cache.problem is not None


def test_where_engines_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/dcc/engines")
    monkeypatch.setenv("DCC_CACHE", "/elsewhere")
    assert default_folder() == Path("/elsewhere/engines")


# Workers


def test_engines_come_in_order(temporary: Path, built: BuiltEngine, tmp_path: Path) -> None:
    told: dict[str, float] = {}
    model = with_external_weights(tmp_path / "weights.bin")
    requests = [tiny("first", capabilities=(80, 89)), tiny("second", model=model, folder=tmp_path), tiny("third")]
    engines = list(build_all(requests, LIBRARY, 2, told.__setitem__))
    assert [engine.name for engine in engines] == ["first", "second", "third"]
    assert [engine.record["capabilities"] for engine in engines] == [[80, 89], [80], [80]]
    assert engines[1].data == engines[2].data == built.data
    assert engines[2].record == built.record
    assert told == {"first": 1.0, "second": 1.0, "third": 1.0}
    assert list(temporary.iterdir()) == []


def test_an_error_in_a_worker_is_the_same_error(temporary: Path) -> None:
    with pytest.raises(ExportError, match="cannot read a model") as caught:
        list(build_all([tiny(model=tiny_model("Det"))], LIBRARY))
    assert caught.value.details["got"] == "the operation Det is not supported"
    assert list(temporary.iterdir()) == []
    with pytest.raises(ExportError, match="does not build for this compute capability"):
        build_all([tiny(capabilities=(90,))], LIBRARY)


def plant(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Workers run this instead; `sys.argv[2]` is their folder."""
    monkeypatch.setattr(engine_workers, "_WORKER", textwrap.dedent(script))


def test_a_crash_names_the_engine(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(
        monkeypatch,
        """
        import os, signal, sys
        sys.stdin.readline()
        print("assertion in kernel failed", file=sys.stderr, flush=True)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
        """,
    )
    with pytest.raises(ExportError, match="the process that built an engine died") as caught:
        list(build_all([tiny("step.003")], LIBRARY, 2))
    assert caught.value.details == {
        "at": "engine step.003",
        "got": "Segmentation fault (signal 11): assertion in kernel failed",
        "next": "run this engine with ONNX Runtime, or report it with the model",
    }
    assert list(temporary.iterdir()) == []


SLEEPER = """
import os, pathlib, sys, time
sys.stdin.readline()
pathlib.Path(sys.argv[2]).with_name(f"started.{os.getpid()}").touch()
time.sleep(600)
"""


def started(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 120
    while len(found := list(folder.glob("started.*"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return [int(path.suffix[1:]) for path in found]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_leaves_no_process_and_no_file(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, SLEEPER)
    found: list[int] = []

    def interrupt() -> None:
        found.extend(started(temporary, 2))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(build_all([tiny("a"), tiny("b"), tiny("c")], LIBRARY, 2))
    thread.join()
    assert len(found) == 2
    assert not any(is_running(process) for process in found)
    assert [path for path in temporary.iterdir() if path.is_dir()] == []


def test_leaving_the_iterator_stops_the_workers(temporary: Path) -> None:
    with contextlib.closing(build_all([tiny(str(number)) for number in range(3)], LIBRARY, 2)) as engines:
        assert next(engines).name == "0"
    assert list(temporary.iterdir()) == []


def test_workers_do_not_outlive_a_killed_compiler(temporary: Path) -> None:
    """The script has no guard of its main module, and is killed; what its workers held is removed by them."""
    script = temporary.parent / "script.py"
    script.write_text(
        "import os, signal, sys, tempfile\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_tensorrt_builder import LIBRARY, build_all, tiny\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "def told(name, done):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "list(build_all([tiny()], LIBRARY, 1, told))\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, str(script), here, str(temporary)], check=False, timeout=250)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 120
    while list(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(temporary.iterdir()) == []


def test_no_room_for_files_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(ExportError, match="engines cannot be built, because files cannot be written") as caught:
        list(build_all([tiny()], LIBRARY))
    assert caught.value.details["at"] == str(tmp_path / "missing")
    assert caught.value.details["got"] == "No such file or directory"


# The library


def plant_library(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, name, None if version is None else module)  # type: ignore[arg-type]


def test_a_missing_or_old_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_library(monkeypatch, "tensorrt_rtx", None)
    plant_library(monkeypatch, "tensorrt", None)
    with pytest.raises(ExportError, match="TensorRT-RTX is not installed") as caught:
        TensorRt.find()
    assert caught.value.details == {
        "want": "TensorRT-RTX 1.7 or newer", "next": "pip install 'dcc[tensorrt-rtx]'"
    }  # fmt: skip
    plant_library(monkeypatch, "tensorrt", "10.9.0.34")
    with pytest.raises(ExportError, match="TensorRT is too old") as caught:
        TensorRt.find("tensorrt")
    assert caught.value.details == {
        "got": "10.9.0.34", "want": "TensorRT 10.14 or newer", "next": "pip install --upgrade 'dcc[tensorrt]'"
    }  # fmt: skip
    plant_library(monkeypatch, "tensorrt", "11.4.0.2")
    found = TensorRt.find()
    assert (found.flavour, found.version, found.capabilities) == ("tensorrt", "11.4.0.2", ())
    with pytest.raises(ExportError, match="builds for the GPU that is there"):
        build(tiny(capabilities=()), found)


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(ExportError, match="unknown TensorRT library"):
        TensorRt.find("openvino")  # type: ignore[arg-type]


def processes_of(parent: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                yield int(path.parent.name)


def test_no_worker_is_left() -> None:
    """The last test of the file: what it started is gone."""
    assert not [item for item in processes_of(os.getpid()) if b"engine_workers" in command_of(item)]


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
