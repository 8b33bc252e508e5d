"""The CUDA device without a GPU: every function it calls exists, and what is missing is said."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcc.runtime import tensorrt_engine
from dcc.runtime.cuda_device import CudaDevice
from dcc.runtime.cuda_driver import FUNCTIONS, CudaDriver
from dcc.runtime.device import DeviceError, DeviceMemoryError, EngineRefused, Region
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
        "cudaGetLastError": (SUCCESS,),
    } | answers  # fmt: skip
    asked: list[str] = []

    def function(name: str) -> Any:
        def answer(*_: Any) -> Any:
            asked.append(name)
            return known[name]

        return answer

    return SimpleNamespace(**{name: function(name) for name in known}, cudaError_t=Codes, asked=asked)


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
    assert caught.value.details["at"] == "cudaGetDeviceCount"
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        CudaDriver(api(cudaGetDeviceCount=(TOO_OLD, None), cudaDriverGetVersion=(SUCCESS, 0)))


def test_no_device_is_said() -> None:
    for answer in ((NO_DEVICE, None), (SUCCESS, 0)):
        with pytest.raises(DeviceError, match="there is no CUDA device"):
            CudaDriver(api(cudaGetDeviceCount=answer))


def test_full_memory_says_how_much_was_wanted() -> None:
    full = api(cudaGraphInstantiate=(NO_MEMORY, None), cudaMallocHost=(NO_MEMORY, None))
    driver = CudaDriver(full)
    with pytest.raises(DeviceMemoryError, match="the device has no room") as caught:
        driver.allocate(5 * 2**20, "slot 3")
    assert (caught.value.wanted, caught.value.free) == (5 * 2**20, 3 * 2**20)
    assert caught.value.details == {"at": "slot 3", "got": "3.0 MiB free", "want": "5.0 MiB"}
    with pytest.raises(DeviceMemoryError, match="the device has no room") as caught:
        driver.ask("cudaGraphInstantiate", 1, 0)
    assert caught.value.details == {"at": "cudaGraphInstantiate", "got": "3.0 MiB free"}
    with pytest.raises(DeviceMemoryError, match="the host has no room for pinned memory"):
        driver.ask("cudaMallocHost", 1, at="noise")
    # The runtime's last error would be taken by TensorRT for its own.
    assert full.asked.count("cudaGetLastError") == 3


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
            if data == b"large":
                self.logger.log("error", "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)")
                return None
            self.logger.log("error", "IRuntime::deserializeCudaEngine: Error Code 1: engine is for SM 8.0")
            return None


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> TensorRtLoader:
    monkeypatch.setitem(sys.modules, "tensorrt", Library)  # type: ignore[arg-type]
    return TensorRtLoader("tensorrt", "H200", 90, lambda: 3 * 2**20)


def test_an_engine_for_another_gpu_is_refused_with_the_reason(loader: TensorRtLoader) -> None:
    assert loader.load("step", b"good").scratch_bytes == 7
    with pytest.raises(EngineRefused) as caught:
        loader.load("step", b"bad")
    assert caught.value.what == "an engine does not fit this device"
    assert caught.value.reason.endswith("engine is for SM 8.0")
    assert caught.value.details["got"] == caught.value.reason
    assert "compute capability 90" in caught.value.details["want"]
    assert "dcc build MODEL.dcc --target local" in caught.value.details["next"]


def test_an_engine_without_room_is_not_taken_for_another_gpu_s(loader: TensorRtLoader) -> None:
    """Building it again would take minutes, and would not help."""
    with pytest.raises(DeviceMemoryError, match="the device has no room for an engine") as caught:
        loader.load("step", b"large")
    assert (caught.value.wanted, caught.value.free) == (5, 3 * 2**20)
    assert "out of memory" in caught.value.details["got"]


def test_arrays_are_on_the_gpu_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second GPU's memory is not said to be the first one's; its grid is what it holds."""
    monkeypatch.setitem(sys.modules, "tensorrt", Library)  # type: ignore[arg-type]
    properties = SimpleNamespace(
        name=b"NVIDIA A100\0", major=8, minor=0, multiProcessorCount=108, maxThreadsPerMultiProcessor=2048
    )
    two = api(
        cudaGetDeviceCount=(SUCCESS, 2), cudaSetDevice=(SUCCESS,), cudaGetDeviceProperties=(SUCCESS, properties)
    )  # fmt: skip
    device = CudaDevice(1, "tensorrt", two)
    assert (device.dlpack, device.threads, device.name) == ((2, 1), 108 * 2048, "NVIDIA A100")
    assert device.pointer(Region("a", 4096, 8)) == 4096


def test_a_missing_tensorrt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DeviceError, match="tensorrt-rtx is not installed") as caught:
        TensorRtLoader("tensorrt-rtx", "A100", 80)
    assert caught.value.details["next"] == "pip install 'dcc[tensorrt-rtx]'"
