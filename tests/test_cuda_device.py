"""The CUDA device without a GPU: every function it calls exists, and what is missing is said."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcc.errors import DccError
from dcc.runtime import tensorrt_engine
from dcc.runtime.cuda_device import CudaDevice
from dcc.runtime.cuda_driver import FUNCTIONS, CudaDriver
from dcc.runtime.device import DeviceError, DeviceMemoryError
from dcc.runtime.tensorrt_engine import DTYPES, METHODS, RTX_METHODS, TensorRtLoader

SUCCESS, NO_MEMORY, TOO_OLD, NO_DEVICE, BAD = 0, 2, 35, 100, 700


class Codes:
    """`cudaError_t` as far as it is asked."""

    cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver, cudaErrorNoDevice = 0, 2, 35, 100

    def __init__(self, code: int) -> None:
        self.code = code


def api(**answers: Any) -> Any:
    """A runtime API that gives these answers."""
    known: dict[str, Any] = {
        "cudaRuntimeGetVersion": (SUCCESS, 13040), "cudaDriverGetVersion": (SUCCESS, 13040),
        "cudaGetDeviceCount": (SUCCESS, 1), "cudaMemGetInfo": (SUCCESS, 3 * 2**20, 2**30),
        "cudaMalloc": (NO_MEMORY, None), "cudaGetErrorString": (SUCCESS, b"an illegal memory access"),
    } | answers  # fmt: skip
    functions = {name: (lambda *_, answer=answer: answer) for name, answer in known.items()}
    return SimpleNamespace(**functions, cudaError_t=Codes)


def test_every_function_exists() -> None:
    """Of the API that is installed."""
    module = pytest.importorskip("cuda.bindings.runtime")
    assert [function for function in FUNCTIONS if not hasattr(module, function)] == []
    assert module.cudaStreamNonBlocking == 1
    assert hasattr(module.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    for way in ("HostToDevice", "DeviceToHost", "DeviceToDevice"):
        assert hasattr(module.cudaMemcpyKind, f"cudaMemcpy{way}")
    for code in ("cudaErrorMemoryAllocation", "cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaSuccess"):
        assert getattr(module.cudaError_t, code) == getattr(Codes, code)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_every_method_exists(name: str) -> None:
    """Of the libraries that are installed; the source is read, so that no call is missing in the tables."""
    module = pytest.importorskip(name)
    source = Path(tensorrt_engine.__file__).read_text()
    called = set(re.findall(r"(?:_engine|engine|context|_context|config|_runtime)\.(\w+)\b(?= ?[(=])", source))
    known = {method for table in (METHODS, RTX_METHODS) for names in table.values() for method in names}
    assert called - known <= {"_context", "enqueue"}
    tables = [METHODS, RTX_METHODS] if name == "tensorrt_rtx" else [METHODS]
    for table in tables:
        for kind, names in table.items():
            assert [method for method in names if not hasattr(getattr(module, kind), method)] == []
    assert hasattr(module.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert {kind for kind in DTYPES if not hasattr(module.DataType, kind)} == set()
    assert hasattr(module.TensorIOMode, "OUTPUT")
    assert hasattr(module.ILogger.Severity, "INTERNAL_ERROR")
    if name == "tensorrt_rtx":
        assert hasattr(module.DynamicShapesKernelSpecializationStrategy, "EAGER")


def test_this_machine_says_what_it_lacks() -> None:
    """With cuda-python and without a driver, as here; on a machine with a GPU there is nothing to say."""
    module = pytest.importorskip("cuda.bindings.runtime")
    if not int(module.cudaGetDeviceCount()[0]):
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError) as caught:
        CudaDevice()
    assert caught.value.what in ("there is no NVIDIA driver", "there is no CUDA device")
    assert "next" in caught.value.details


def test_a_missing_cuda_python_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings.runtime", "cuda.bindings", "cuda.cudart", "cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match="cuda-python is not installed") as caught:
        CudaDriver()
    assert caught.value.details["next"] == "pip install 'dcc[cuda]'"


def test_an_old_driver_is_said() -> None:
    old = api(cudaGetDeviceCount=(TOO_OLD, None), cudaDriverGetVersion=(SUCCESS, 12020))
    with pytest.raises(DeviceError, match="the NVIDIA driver is too old") as caught:
        CudaDriver(old)
    assert caught.value.details["got"] == "a driver for CUDA 12.2"
    assert caught.value.details["want"] == "a driver for CUDA 13.4 or newer"
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        CudaDriver(api(cudaGetDeviceCount=(TOO_OLD, None), cudaDriverGetVersion=(SUCCESS, 0)))


def test_no_device_is_said() -> None:
    for answer in ((NO_DEVICE, None), (SUCCESS, 0)):
        with pytest.raises(DeviceError, match="there is no CUDA device"):
            CudaDriver(api(cudaGetDeviceCount=answer))


def test_full_memory_says_how_much_was_wanted() -> None:
    with pytest.raises(DeviceMemoryError, match="the device has no room") as caught:
        CudaDriver(api()).allocate(5 * 2**20, "slot 3")
    assert (caught.value.wanted, caught.value.free) == (5 * 2**20, 3 * 2**20)
    assert caught.value.details == {"at": "slot 3", "got": "3.0 MiB free", "want": "5.0 MiB"}


def test_any_other_error_is_the_driver_s_text() -> None:
    with pytest.raises(DeviceError, match="a CUDA call failed") as caught:
        CudaDriver(api(cudaFree=(BAD,))).ask("cudaFree", 1, at="slot 3")
    assert caught.value.details == {"at": "cudaFree, slot 3", "got": "an illegal memory access (700)"}


class Library:
    """A TensorRT that takes no engine but b"good"."""

    __version__ = "10.13"

    class ILogger:
        class Severity:
            ERROR, INTERNAL_ERROR = "error", "internal error"

    class TensorIOMode:
        OUTPUT = "output"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            if data == b"good":
                return SimpleNamespace(num_io_tensors=0, device_memory_size_v2=7)
            self.logger.log("error", "IRuntime::deserializeCudaEngine: Error Code 1: engine is for SM 8.0")
            return None


def test_an_engine_for_another_gpu_is_built_again_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", Library)  # type: ignore[arg-type]
    assert importlib.import_module("tensorrt") is Library  # type: ignore[comparison-overlap]
    asked: list[str] = []

    def rebuild(name: str) -> bytes:
        asked.append(name)
        return b"good"

    assert TensorRtLoader("tensorrt", "H200", 90, rebuild).load("step", b"bad").scratch_bytes == 7
    assert asked == ["step"]
    with pytest.raises(DccError) as caught:
        TensorRtLoader("tensorrt", "H200", 90, None).load("step", b"bad")
    assert caught.value.what == "an engine does not fit this device"
    assert caught.value.details["got"].endswith("engine is for SM 8.0")
    assert "compute capability 90" in caught.value.details["want"]
    assert caught.value.details["next"] == "compile with --target sm90, or run dcc build on this machine"


def test_a_missing_tensorrt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DeviceError, match="tensorrt-rtx is not installed") as caught:
        TensorRtLoader("tensorrt-rtx", "A100", 80, None)
    assert caught.value.details["next"] == "pip install 'dcc[tensorrt-rtx]'"
