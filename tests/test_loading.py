"""Where an artifact runs, why, and that it then computes what it computes on the processor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from dcc.runtime.placement import Gpu, place
from dcc.runtime.simulated_device import SimulatedDevice
from dcc.runtime.tensorrt_builder import BuildCost, BuildRequest, TensorRt
from dcc.tolerances import TOLERANCE

H100 = Gpu("NVIDIA H100", 90)
A100 = Gpu("NVIDIA A100", 80)
T4 = Gpu("Tesla T4", 75)
REQUEST = LayerRequest("tensorrt", "float16", (90,), ("h100",), "because")


def layer(
    backend: str = "tensorrt", dtype: str = "float16", capabilities: tuple[int, ...] = (90,), device: str = "",
    engines: bool = False,
) -> Layer:  # fmt: skip
    members = {"step": "step.onnx"}
    name = f"{backend}-{dtype}"
    return Layer(name, backend, dtype, capabilities, ("x",), "", device, members, members if engines else {}, "", {})


def no_gpu() -> Gpu:
    raise DeviceError("there is no NVIDIA driver")


def nothing_missing(*_: Any) -> str | None:
    return None


def as_rtx_1_7(backend: str, capability: int, builds: bool) -> str | None:
    """What TensorRT-RTX 1.7 alone is good for."""
    if backend != "tensorrt-rtx":
        return f"{backend} is not installed"
    return "TensorRT-RTX does not build for it" if builds and capability in (90, 100) else None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache is that of the test."""
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "cache"))


RTX = layer("tensorrt-rtx", capabilities=(80, 89), engines=True)
HERE = layer(device="NVIDIA H100", engines=True)
GRAPHS = layer()


@pytest.mark.parametrize(
    ("layers", "gpu", "backend", "built", "words"),
    [
        ([], H100, "onnxruntime", True, "no layer for a GPU"),
        ([RTX, GRAPHS], H100, "tensorrt", False, "built here"),
        ([RTX, HERE], H100, "tensorrt", True, "holds engines"),
        ([RTX, GRAPHS], A100, "tensorrt-rtx", True, "holds engines"),
        ([layer("onnxruntime-cuda"), RTX], H100, "tensorrt-rtx", False, "built here"),
        ([layer("onnxruntime-cuda")], T4, "onnxruntime-cuda", True, "typed graphs"),
        ([layer(dtype="bfloat16")], T4, "onnxruntime", True, "bfloat16 needs compute capability 80, this is 75"),
    ],
)
def test_what_fits_best_is_taken(layers: list[Layer], gpu: Gpu, backend: str, built: bool, words: str) -> None:
    found = place(layers, "auto", lambda: gpu, nothing_missing)
    assert (found.backend, found.built) == (backend, built)
    assert words in found.reason and found.backend in str(found)
    assert found.device == ("the processor" if backend == "onnxruntime" else gpu.name)


def test_without_a_gpu_or_a_library_it_is_the_processor_and_says_why() -> None:
    assert place([RTX], "auto", no_gpu, nothing_missing).reason == "there is no NVIDIA driver"
    found = place([RTX], "auto", lambda: A100, lambda name, *_: f"{name} is not installed")
    assert found.backend == "onnxruntime" and "tensorrt-rtx is not installed" in found.reason
    assert "dcc build" in found.reason


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert place([RTX], "onnxruntime", lambda: A100, nothing_missing).backend == "onnxruntime"
    assert place([], "onnxruntime-cuda", lambda: A100, nothing_missing).layer is None
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        place([RTX], "tensorrt-rtx", no_gpu, nothing_missing)
    with pytest.raises(DeviceError, match="cannot run with tensorrt on this device") as caught:
        place([], "tensorrt", lambda: A100, nothing_missing)
    assert "no layer for a GPU" in str(caught.value) and "dcc build" in str(caught.value)
    with pytest.raises(DeviceError, match="not installed"):
        place([RTX], "onnxruntime-cuda", lambda: A100, lambda name, *_: f"{name} is not installed")
    with pytest.raises(UsageError, match="unknown backend") as wrong:
        place([RTX], "tensorrtx", lambda: A100, nothing_missing)
    assert "tensorrt-rtx" in str(wrong.value)


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
