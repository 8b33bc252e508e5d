"""Which backend and layer an artifact runs with, decided from facts alone, and what is said of it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from dcc.errors import UsageError
from dcc.runtime import loading
from dcc.runtime.device import DeviceError
from dcc.runtime.layers import Layer
from dcc.runtime.placement import Gpu, place
from dcc.runtime.tensorrt_builder import TensorRt

H100 = Gpu("NVIDIA H100", 90)
A100 = Gpu("NVIDIA A100", 80)
T4 = Gpu("Tesla T4", 75)


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


def test_a_library_that_cannot_build_for_the_gpu_is_passed_over() -> None:
    """An artifact for an A100 on an H100: TensorRT-RTX has no engines for it, and graphs are the same for all."""
    found = place([RTX], "auto", lambda: H100, as_rtx_1_7)
    assert found.backend == "onnxruntime" and "RTX does not build for it" in found.reason
    assert found.reason.count("tensorrt is not installed") == 1
    taken = place([RTX], "auto", lambda: H100, lambda name, *rest: None if name == "tensorrt" else "no")
    assert (taken.backend, taken.layer, taken.built) == ("tensorrt", RTX, False)
    assert "tensorrt, layer tensorrt-rtx-float16, on NVIDIA H100: engines are built here" in str(taken)
    # For an A100 it need not build anything.
    assert place([RTX], "auto", lambda: A100, as_rtx_1_7).built
    with pytest.raises(DeviceError, match="cannot run with tensorrt-rtx") as caught:
        place([RTX], "tensorrt-rtx", lambda: H100, as_rtx_1_7)
    assert "RTX does not build for it" in caught.value.details["got"]
    # What was asked for by name is built from graphs that were made for another library.
    assert place([RTX], "tensorrt", lambda: A100, nothing_missing).backend == "tensorrt"


def test_a_missing_or_old_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__dict__["__version__"] = "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    said = loading.library_missing("tensorrt", 90, False) or ""
    assert said.startswith("TensorRT is too old; got 8.6.1; want TensorRT 10.14 or newer") and "pip install" in said
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
    assert "TensorRT is not installed" in (loading.library_missing("tensorrt", 90, False) or "")
    assert "CUDA provider" in (loading.library_missing("onnxruntime-cuda", 90, False) or "")
    library = TensorRt("tensorrt-rtx", "1.7", (80, 89), None)
    monkeypatch.setattr("dcc.runtime.loading.TensorRt.find", lambda _: library)
    assert loading.library_missing("tensorrt-rtx", 80, True) is None
    assert loading.library_missing("tensorrt-rtx", 90, False) is None
    said = loading.library_missing("tensorrt-rtx", 90, True) or ""
    assert "does not build for this compute capability; got 90" in said


def test_an_old_driver_is_said_with_what_it_is() -> None:
    def old() -> Gpu:
        raise DeviceError("the NVIDIA driver is too old", got="a driver for CUDA 12.2", want="a driver for CUDA 13.0")

    found = place([RTX], "auto", old, nothing_missing)
    assert found.backend == "onnxruntime"
    assert found.reason == "the NVIDIA driver is too old; got a driver for CUDA 12.2; want a driver for CUDA 13.0"
