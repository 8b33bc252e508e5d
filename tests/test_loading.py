"""Where an artifact runs, why, and that it then computes what it computes on the processor."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dcc import cli
from dcc.errors import ArtifactError, ExecutionError, ExportError, UsageError
from dcc.exports.typed_graphs import rounded
from dcc.layers import LayerRequest, add_layers
from dcc.runtime import Artifact, DeviceArtifact, LoadedArtifact, load, loading
from dcc.runtime.device import DeviceError
from dcc.runtime.engine_cache import EngineCache
from dcc.runtime.first_build import LayerEngines, cache_beside
from dcc.runtime.layers import Layer
from dcc.runtime.placement import Gpu
from dcc.runtime.simulated_device import SimulatedDevice
from dcc.runtime.tensorrt_builder import BuildCost, BuildRequest, TensorRt
from dcc.tolerances import TOLERANCE

H100 = Gpu("NVIDIA H100", 90)
REQUEST = LayerRequest("tensorrt", "float16", (90,), ("h100",), "because")


def nothing_missing(*_: Any) -> str | None:
    return None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache is that of the test."""
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def portable(artifact: Callable[..., Path], tmp_path: Path) -> Path:
    """An artifact with a layer that is built where it is loaded."""
    output = tmp_path / "model.dcc"
    add_layers(artifact("dit", "component"), [REQUEST], output)
    return output


class Builder:
    """Stands in for TensorRT: an engine is its ONNX graph, rounded as the type rounds, and is run by the simulator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[BuildRequest] = []
        library = TensorRt("tensorrt", "10.14", (), None)
        monkeypatch.setattr("dcc.runtime.first_build.TensorRt.find", lambda _: library)
        monkeypatch.setattr("dcc.runtime.first_build.serialize", self.serialize)

    def serialize(self, request: BuildRequest, library: TensorRt) -> tuple[memoryview, Any, BuildCost]:
        self.requests.append(request)
        model = onnx.load_model_from_string(request.model)
        names = {1: "float32", 7: "int64", 9: "bool"}
        inputs, outputs = (
            [
                {
                    "name": port.name, "dtype": names[port.type.tensor_type.elem_type],
                    "shape": [item.dim_param or item.dim_value for item in port.type.tensor_type.shape.dim],
                }
                for port in ports
            ]
            for ports in (model.graph.input, model.graph.output)
        )  # fmt: skip
        if not request.name.startswith("update"):
            model = rounded(model, "float16")
        return memoryview(model.SerializeToString()), {"inputs": inputs, "outputs": outputs}, BuildCost(0.0, 0, 0)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(monkeypatch)


@pytest.fixture
def simulated(portable: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A machine with an H100 that is simulated."""
    device = SimulatedDevice(folder=str(portable.parent))
    monkeypatch.setattr(loading, "gpu_of", lambda _: H100)
    monkeypatch.setattr(loading, "library_missing", nothing_missing)
    monkeypatch.setattr(loading, "open_device", lambda index, flavour: device)
    return device


def test_the_first_load_builds_and_the_next_finds_what_was_built(
    portable: Path, builder: Builder, simulated: SimulatedDevice
) -> None:
    told: list[str] = []
    request: dict[str, Any] = {"conditions": {"y": [3, 5]}, "seed": [1, 2]}
    with load(portable, told=told.append) as first:
        assert isinstance(first, DeviceArtifact)
        assert first.placement.backend == "tensorrt" and "built here" in first.placement.reason
        got = first.sample(**request)
    names = {item.name for item in builder.requests}
    assert told[0] == f"running with {first.placement}"
    assert {f"building {name} for NVIDIA H100" for name in names} == set(told[1:])
    timestep = {engine.name for engine in first.plan.engines if engine.kind == "timestep"}
    assert names > {engine.name for engine in first.plan.engines} - timestep
    assert sum(name.startswith("update") for name in names) >= 2
    assert all(item.device == "NVIDIA H100" and item.capabilities == () for item in builder.requests)
    with load(portable, backend="onnxruntime") as processor:
        assert isinstance(processor, LoadedArtifact) and processor.placement.layer is None
        wanted = processor.sample(**request)
    apart = np.abs(got - wanted).max() / np.ptp(wanted)
    assert 1e-6 < apart <= TOLERANCE["float16"].loop
    count = len(builder.requests)
    with load(portable) as again:
        np.testing.assert_array_equal(again.sample(**request), got)
    assert len(builder.requests) == count
    assert len(list(Path(f"{portable}.engines").glob("*.engine"))) == count


def test_a_damaged_engine_beside_the_artifact_is_built_again(
    portable: Path, builder: Builder, simulated: SimulatedDevice
) -> None:
    load(portable).close()
    count = len(builder.requests)
    victim = next(Path(f"{portable}.engines").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    load(portable).close()
    assert len(builder.requests) == count + 1


def test_engines_that_cannot_be_kept_are_used_all_the_same(
    portable: Path, builder: Builder, simulated: SimulatedDevice
) -> None:
    """Beside the artifact, then in the user's cache, then nowhere."""
    Path(f"{portable}.engines").write_text("in the way")
    told: list[str] = []
    load(portable, told=told.append).close()
    count = len(builder.requests)
    assert not any("could not be kept" in text for text in told)
    load(portable).close()
    assert len(builder.requests) == count
    assert len(list((portable.parent / "cache/engines").glob("*.engine"))) == count
    shutil.rmtree(portable.parent / "cache")
    (portable.parent / "cache").write_text("in the way")
    with load(portable, told=told.append) as loaded:
        assert loaded.sample({"y": [3]}).shape[0] == 1
    assert "could not be kept" in told[-1] and len(builder.requests) == 2 * count


def test_a_layer_without_an_update_engine_says_what_makes_it_again(portable: Path, builder: Builder) -> None:
    artifact = Artifact.open(portable)
    [found] = artifact.layers
    name = next(name for name in found.graphs if name.startswith("update"))
    del found.graphs[name]
    with pytest.raises(ArtifactError, match="lacks an engine") as caught:
        LayerEngines(artifact, found, "NVIDIA H100", 90).engine(name)
    assert name in str(caught.value) and "dcc build" in str(caught.value)


def test_another_gpu_or_version_finds_no_engine_of_this_one(portable: Path, builder: Builder, tmp_path: Path) -> None:
    artifact = Artifact.open(portable)
    [found] = artifact.layers
    cache = EngineCache(tmp_path / "engines")
    name = next(iter(found.graphs))
    for device, capability in (("NVIDIA H100", 90), ("NVIDIA H200", 90), ("NVIDIA H100", 90), ("NVIDIA B200", 100)):
        LayerEngines(artifact, found, device, capability, cache).engine(name)
    assert [item.device for item in builder.requests] == ["NVIDIA H100", "NVIDIA H200", "NVIDIA B200"]


def test_every_engine_of_a_layer_is_built_by_tensorrt_from_the_artifact_alone(
    artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """The weights are those in the artifact; a layer for one GPU serves another, for which it is built again."""
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'dcc[tensorrt-rtx]'", exc_type=ImportError)
    output = tmp_path / "model.dcc"
    [made] = add_layers(
        artifact("dit", "step"), [LayerRequest("tensorrt-rtx", "float16", (80,), ("a100-80g",), "because")], output
    )
    opened = Artifact.open(output)
    mine, other = (LayerEngines(opened, made, *gpu, cache_beside(opened)) for gpu in (("A100", 80), ("RTX 5090", 120)))
    assert mine.ready and not other.ready
    for name in made.graphs:
        assert mine.engine(name) == opened.layer_engine(made, name)
        assert len(other.engine(name)) > 1000
    assert mine.built == [] and other.built == list(made.graphs)
    # An engine that the device refuses is built again for the very same one.
    name = next(iter(made.graphs))
    assert len(mine.rebuild(name, "refused") or b"") > 1000
    # What was built here just now and is refused will not be better the next time.
    assert mine.rebuild(name, "refused") is None


def test_a_backend_that_builds_nothing_says_so(portable: Path) -> None:
    artifact = Artifact.open(portable)
    found = Layer(**{**artifact.layers[0].__dict__, "backend": "onnxruntime-cuda"})
    with pytest.raises(ExportError, match="builds no engines"):
        LayerEngines(artifact, found, "NVIDIA H100", 90).rebuild(next(iter(found.graphs)), "")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("tensorrt", ("NVIDIA driver", "processor's backend")),
        ("fastest", ("unknown backend", "onnxruntime-cuda")),
    ],
)
def test_the_command_line_refuses_what_is_not_here(
    portable: Path, backend: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    def refuse(_: int) -> Gpu:
        raise DeviceError("there is no NVIDIA driver", next="load with the processor's backend")

    monkeypatch.setattr(loading, "gpu_of", refuse)
    assert cli.main(["run", str(portable), "--backend", backend, "-o", str(tmp_path / "a.png")]) in (1, 2)
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not (tmp_path / "a.png").exists()


def test_the_cuda_provider_is_refused_where_onnxruntime_has_none(
    portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend, cuda_missing

    assert cuda_missing() is not None
    backend = OnnxRuntimeBackend(Artifact.open(portable), cuda_device=0)
    with pytest.raises(ExecutionError):
        backend.session(Artifact.open(portable).plan.engines[0].name)


def test_typed_graphs_run_in_place_of_the_portable_engines(portable: Path) -> None:
    """What the CUDA provider is given; on the processor ONNX Runtime has kernels for float16 where it needs them."""
    from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend

    opened = Artifact.open(portable)
    typed = LoadedArtifact(opened, OnnxRuntimeBackend(opened, layer=opened.layers[0]))
    request: dict[str, Any] = {"conditions": {"y": [3, 5]}, "seed": [1, 2]}
    wanted = load(portable, backend="onnxruntime").sample(**request)
    apart = np.abs(typed.sample(**request) - wanted).max() / np.ptp(wanted)
    assert 0 < apart <= TOLERANCE["float16"].loop


def test_graphs_of_one_library_are_built_by_another(
    portable: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    library = TensorRt("tensorrt", "10.14", (), None)
    monkeypatch.setattr("dcc.runtime.first_build.TensorRt.find", lambda flavour: asked.append(flavour) or library)
    artifact = Artifact.open(portable)
    theirs = replace(artifact.layers[0], backend="tensorrt-rtx", capabilities=(90,), engines=artifact.layers[0].graphs)
    engines = LayerEngines(artifact, theirs, "NVIDIA H100", 90, backend="tensorrt")
    name = next(iter(theirs.graphs))
    # Engines for this very GPU, which the other library does not read.
    assert not engines.ready and LayerEngines(artifact, theirs, "NVIDIA H100", 90).ready
    assert engines.engine(name) and asked == ["tensorrt"] and engines.built == [name]


def test_a_device_that_is_not_there_is_refused(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not answered with the processor: its number was asked for."""

    class Driver:
        count = 2

    monkeypatch.setattr(loading, "CudaDriver", Driver)
    for index in (2, -1):
        with pytest.raises(UsageError, match="there is no such device") as caught:
            load(portable, device=index)
        assert (caught.value.details["got"], caught.value.details["want"]) == (str(index), "0 to 1")


def test_a_refused_engine_is_built_again_and_kept(
    portable: Path, builder: Builder, simulated: SimulatedDevice
) -> None:
    """One that the device takes no more, from the folder beside the artifact: it is whole, and of no use."""
    load(portable).close()
    count = len(builder.requests)
    name = next(item.name for item in builder.requests if item.name.startswith("update"))
    stale = {path.read_bytes()[64:].partition(b"\n")[2] for path in Path(f"{portable}.engines").glob("*.engine")}
    refused: list[str] = []

    def refuses(engine: str, data: bytes) -> str | None:
        if engine == name and data in stale and not refused:
            refused.append(engine)
            return "made by another driver"
        return None

    simulated._refuses = refuses
    told: list[str] = []
    load(portable, told=told.append).close()
    why = "which refused the one that was there: made by another driver"
    assert told[1:] == [f"building {name} for NVIDIA H100, {why}"]
    assert len(builder.requests) == count + 1
    load(portable).close()
    assert len(builder.requests) == count + 1


def test_an_engine_that_is_refused_as_it_was_built_is_an_error(
    portable: Path, builder: Builder, simulated: SimulatedDevice
) -> None:
    simulated._refuses = lambda name, data: "no kernel image is available"
    with pytest.raises(DeviceError, match="an engine does not fit this device") as caught:
        load(portable)
    assert caught.value.details["got"] == "no kernel image is available"
    assert len(builder.requests) == 1
    assert simulated.memory_map.used == 0


def test_processes_that_load_at_once_build_once(portable: Path, builder: Builder) -> None:
    """Threads with caches of their own stand for processes."""
    artifact = Artifact.open(portable)
    [found] = artifact.layers
    start, told = threading.Barrier(3, timeout=30), []

    def build() -> None:
        engines = LayerEngines(artifact, found, "NVIDIA H100", 90, cache_beside(artifact), told.append)
        start.wait()
        for name in found.graphs:
            assert engines.engine(name)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(item.name for item in builder.requests) == sorted(found.graphs)
    assert {text.partition(" ")[0] for text in told} <= {"building", "waiting"}


def test_where_it_runs_is_said(portable: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An artifact for GPUs on a machine without one: the user learns why it is slow."""
    assert cli.main(["run", str(portable), "-n", "1", "-o", str(tmp_path / "a.npy")]) == 0
    said = capsys.readouterr().err
    assert "running with onnxruntime, on the processor: " in said


def test_a_layer_of_a_newer_library_is_built_again_by_the_one_that_is_here(
    portable: Path, builder: Builder, simulated: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines are in the file, for this very GPU, and this library does not read them."""
    opened = Artifact.open(portable)
    [found] = opened.layers
    newer = replace(found, device="NVIDIA H100", version="99.1", engines=found.graphs)
    opened.layers = (newer,)
    monkeypatch.setattr("dcc.runtime.loading.Artifact.open", lambda *_, **__: opened)
    refused: set[str] = set()

    def refuses(name: str, data: bytes) -> str | None:
        first = name not in refused
        refused.add(name)
        return "made by TensorRT 99.1" if first else None

    simulated._refuses = refuses
    told: list[str] = []
    with load(portable, told=told.append) as loaded:
        assert "the artifact holds engines for it" in loaded.placement.reason
        assert loaded.sample({"y": [3]}).shape[0] == 1
    assert all(text.endswith("refused the one that was there: made by TensorRT 99.1") for text in told[1:])
    assert len(told) == 1 + len(builder.requests)
