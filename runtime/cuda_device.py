"""An NVIDIA GPU as a device of the executor: cuda-python for memory, streams and graphs, TensorRT for engines.

Numerics and lifetimes are the executor's, which the simulated device proves; what is here is one call of the vendor's
API for each method of `device.py`. Without a GPU none of it can run: tests check that every function called exists.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dcc.runtime.cuda_driver import CudaDriver
from dcc.runtime.device import Array, DeviceError, Graph, HostBuffer, MemoryInfo, Region
from dcc.runtime.dlpack import CUDA
from dcc.runtime.tensorrt_engine import TensorRtEngine, TensorRtLoader

ALIGNMENT = 256  # what TensorRT asks of addresses, and what cudaMalloc gives


class CudaDevice:
    """Implements `Device`."""

    def __init__(self, index: int = 0, flavour: str = "tensorrt-rtx", api: Any = None) -> None:
        """`flavour` is the library that made the engines.

        Raises DeviceError where driver, device or library are missing.
        """
        self.driver = CudaDriver(api)
        if not 0 <= index < self.driver.count:
            raise DeviceError("there is no such device", got=index, want=f"0 to {self.driver.count - 1}")
        self._index = index
        self.activate()
        properties = self.driver.ask("cudaGetDeviceProperties", index)
        name = properties.name
        self.name = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
        self.capability = 10 * int(properties.major) + int(properties.minor)
        self.alignment = ALIGNMENT
        self.dlpack = (CUDA, index)
        self.threads = int(properties.multiProcessorCount) * int(properties.maxThreadsPerMultiProcessor)
        self._loader = TensorRtLoader(flavour, self.name, self.capability, lambda: self.memory().free)

    def activate(self) -> None:
        """The calling thread uses this device from now on."""
        self.driver.ask("cudaSetDevice", self._index)

    def allocate(self, nbytes: int, label: str) -> Region:
        return Region(label, self.driver.allocate(max(nbytes, 1), label), nbytes)

    def free(self, region: Region) -> None:
        self.driver.ask("cudaFree", region.address, at=region.label)

    def pinned(self, nbytes: int, label: str) -> PinnedBuffer:
        return PinnedBuffer(self.driver, nbytes, label)

    def free_pinned(self, buffer: HostBuffer) -> None:
        if isinstance(buffer, PinnedBuffer):
            buffer.free()

    def stream(self) -> CudaStream:
        return CudaStream(self.driver)

    def load(self, name: str, data: bytes) -> TensorRtEngine:
        return self._loader.load(name, data)

    def pointer(self, region: Region) -> int:
        return region.address

    def memory(self) -> MemoryInfo:
        free, total = self.driver.ask("cudaMemGetInfo")
        return MemoryInfo(int(free), int(total))


class PinnedBuffer:
    """Implements `HostBuffer`."""

    def __init__(self, driver: CudaDriver, nbytes: int, label: str) -> None:
        self.nbytes, self.label = nbytes, label
        self._driver = driver
        self.address = int(driver.ask("cudaMallocHost", max(nbytes, 1), at=label))
        self._bytes: Array = _bytes_at(self.address, max(nbytes, 1))

    def write(self, values: Array, start: int = 0) -> None:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._check(start, flat.size)
        self._bytes[start : start + flat.size] = flat

    def read(self, dtype: str, shape: tuple[int, ...], start: int = 0) -> Array:
        values: Array = np.empty(shape, dtype)
        self._check(start, values.nbytes)
        values.reshape(-1).view(np.uint8)[:] = self._bytes[start : start + values.nbytes]
        return values

    def part(self, start: int, nbytes: int) -> int:
        """The address of bytes that lie inside."""
        self._check(start, nbytes)
        return self.address + start

    def free(self) -> None:
        """The memory is the host's again."""
        if self.address:
            self._bytes = np.empty(0, np.uint8)
            self._driver.ask("cudaFreeHost", self.address, at=self.label)
            self.address = 0

    def _check(self, start: int, nbytes: int) -> None:
        if not self.address or start < 0 or start + nbytes > self.nbytes:
            raise DeviceError(
                "pinned memory is used beyond its end", at=self.label, got=f"bytes {start} to {start + nbytes}",
                want=f"inside {self.nbytes if self.address else 0} bytes",
            )  # fmt: skip


class CudaGraph:
    """Implements `Graph`."""

    def __init__(self, driver: CudaDriver, graph: Any) -> None:
        self._driver = driver
        try:
            self.handle = driver.ask("cudaGraphInstantiate", graph, 0)
        finally:
            driver.ask("cudaGraphDestroy", graph)

    def close(self) -> None:
        if self.handle is not None:
            self._driver.ask("cudaGraphExecDestroy", self.handle)
            self.handle = None


class CudaStream:
    """Implements `Stream`."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        # Not ordered with the default stream, which other libraries of the process use.
        self.handle = driver.ask("cudaStreamCreateWithFlags", driver.api.cudaStreamNonBlocking)

    def upload(self, target: Region, source: HostBuffer, start: int = 0) -> None:
        self._copy(target.address, _pinned(source).part(start, target.nbytes), target.nbytes, "HostToDevice")

    def download(self, target: HostBuffer, source: Region, start: int = 0) -> None:
        self._copy(_pinned(target).part(start, source.nbytes), source.address, source.nbytes, "DeviceToHost")

    def copy(self, target: Region, source: Region) -> None:
        if target.nbytes != source.nbytes:
            raise DeviceError("a copy has two lengths", at=target.label, got=target.nbytes, want=source.nbytes)
        self._copy(target.address, source.address, source.nbytes, "DeviceToDevice")

    def copy_rows(self, target: Region, pitch: int, source: Region, rows: int) -> None:
        width = source.nbytes // rows
        if width > pitch or (rows - 1) * pitch + width > target.nbytes:
            raise DeviceError("rows of a copy do not fit", at=target.label, got=f"{rows} of {width} bytes", want=pitch)
        kind = self._driver.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._driver.ask(
            "cudaMemcpy2DAsync", target.address, pitch, source.address, width, width, rows, kind, self.handle,
            at=target.label,
        )  # fmt: skip

    def fill(self, target: Region) -> None:
        self._driver.ask("cudaMemsetAsync", target.address, 0, target.nbytes, self.handle, at=target.label)

    def begin_capture(self) -> None:
        # Other threads may allocate meanwhile: only what this thread does is part of the capture.
        mode = self._driver.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._driver.ask("cudaStreamBeginCapture", self.handle, mode)

    def end_capture(self) -> CudaGraph:
        return CudaGraph(self._driver, self._driver.ask("cudaStreamEndCapture", self.handle))

    def launch(self, graph: Graph) -> None:
        if not isinstance(graph, CudaGraph) or graph.handle is None:
            raise DeviceError("a graph is launched after it was closed")
        self._driver.ask("cudaGraphLaunch", graph.handle, self.handle)

    def synchronise(self) -> None:
        if self.handle is not None:
            self._driver.ask("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        if self.handle is not None:
            self.synchronise()
            self._driver.ask("cudaStreamDestroy", self.handle)
            self.handle = None

    def _copy(self, target: int, source: int, nbytes: int, way: str) -> None:
        kind = getattr(self._driver.api.cudaMemcpyKind, f"cudaMemcpy{way}")
        if nbytes:
            self._driver.ask("cudaMemcpyAsync", target, source, nbytes, kind, self.handle, at=way)


def _bytes_at(address: int, nbytes: int) -> Array:
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, np.uint8)


def _pinned(buffer: HostBuffer) -> PinnedBuffer:
    if not isinstance(buffer, PinnedBuffer):
        raise DeviceError("memory that is not pinned cannot be copied without waiting", next="use Device.pinned")
    return buffer
