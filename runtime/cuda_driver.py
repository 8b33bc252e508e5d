"""CUDA's runtime API by cuda-python, found when it is needed, and its errors as ours."""

from __future__ import annotations

import importlib
from typing import Any

from dcc.runtime.device import DeviceError, DeviceMemoryError

INSTALL = "pip install 'dcc[cuda]'"
# Functions that the device calls; older cuda-python has them in cuda.cudart.
FUNCTIONS = (
    "cudaDeviceGetAttribute", "cudaDriverGetVersion", "cudaFree", "cudaFreeHost", "cudaGetDeviceCount",
    "cudaGetDeviceProperties", "cudaGetLastError", "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate",
    "cudaGraphLaunch", "cudaMalloc", "cudaMallocHost", "cudaMemGetInfo", "cudaMemcpy2DAsync", "cudaMemcpyAsync",
    "cudaMemsetAsync", "cudaRuntimeGetVersion", "cudaSetDevice", "cudaStreamBeginCapture",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture", "cudaStreamSynchronize",
)  # fmt: skip


class CudaDriver:
    """The runtime API; `ask` calls a function of it and raises what it answers."""

    def __init__(self, api: Any = None) -> None:
        """Raises DeviceError where cuda-python is missing or no device can be used."""
        self.api = _find() if api is None else api
        self.version = _version(self.api.cudaRuntimeGetVersion()[1])
        error, count = self.api.cudaGetDeviceCount()
        if int(error) or not count:
            raise self.failure("cudaGetDeviceCount", int(error), "")
        self.count: int = count

    def ask(self, name: str, *arguments: Any, at: str = "") -> Any:
        """The function's result, without its error code."""
        error, *results = getattr(self.api, name)(*arguments)
        if int(error):
            raise self.failure(name, int(error), at)
        return results[0] if len(results) == 1 else tuple(results)

    def failure(self, name: str, error: int, at: str) -> DeviceError:
        """What is raised for an error code, with what the driver is and should be."""
        codes = self.api.cudaError_t
        if error == codes.cudaErrorMemoryAllocation:
            return self._no_room(name, 0, at)
        driver = self.api.cudaDriverGetVersion()[1]
        if error == codes.cudaErrorInsufficientDriver:
            missing = not driver
            return DeviceError(
                "there is no NVIDIA driver" if missing else "the NVIDIA driver is too old", at=at or name,
                got=None if missing else f"a driver for CUDA {_version(driver)}",
                want=None if missing else f"a driver for CUDA {self.version} or newer",
                next="run on a machine with an NVIDIA GPU, or on the processor with backend onnxruntime"
                if missing else f"update the driver, or install a cuda-python for CUDA {_version(driver)}",
            )  # fmt: skip
        if error in (codes.cudaSuccess, codes.cudaErrorNoDevice):
            return DeviceError(
                "there is no CUDA device", at=at or name, next="check CUDA_VISIBLE_DEVICES, or use backend onnxruntime"
            )
        known = self.api.cudaGetErrorString(codes(error))[1]
        text = known.decode() if isinstance(known, bytes) else str(known)
        return DeviceError("a CUDA call failed", at=f"{name}, {at}" if at else name, got=f"{text} ({error})")

    def allocate(self, nbytes: int, label: str) -> int:
        """The address of new device memory. Raises DeviceMemoryError with what is free."""
        error, address = self.api.cudaMalloc(nbytes)
        if int(error) == int(self.api.cudaError_t.cudaErrorMemoryAllocation):
            raise self._no_room("cudaMalloc", nbytes, label)
        if int(error):
            raise self.failure("cudaMalloc", int(error), label)
        return int(address)

    def _no_room(self, name: str, nbytes: int, label: str) -> DeviceMemoryError:
        """What is raised for an allocation that failed; `nbytes` is 0 where the driver alone knows how many."""
        # The runtime keeps the error, and whoever asks for the last one next would take it for theirs: TensorRT does.
        self.api.cudaGetLastError()
        if name == "cudaMallocHost":
            return DeviceMemoryError("the host has no room for pinned memory", nbytes, 0, at=label or name)
        error, *memory = self.api.cudaMemGetInfo()
        free = 0 if int(error) else int(memory[0])
        return DeviceMemoryError(
            "the device has no room", nbytes, free, at=label or name, got=f"{free / 2**20:.1f} MiB free",
            want=f"{nbytes / 2**20:.1f} MiB" if nbytes else None,
        )  # fmt: skip


def _find() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            api = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            got = (str(error).splitlines() or [""])[0]
            raise DeviceError("cuda-python cannot be loaded", got=got, next=INSTALL) from error
        missing = [function for function in FUNCTIONS if not hasattr(api, function)]
        if missing:
            raise DeviceError("cuda-python is too old", got=f"no {missing[0]}", want="12.6 or newer", next=INSTALL)
        return api
    raise DeviceError("cuda-python is not installed", want="cuda-python 12.6 or newer", next=INSTALL)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
