"""An artifact, placed on what this machine has and loaded: `dcc.runtime.load`."""

from __future__ import annotations

import os
from collections.abc import Callable

from dcc.errors import ExportError, UsageError
from dcc.runtime.artifact import Artifact, Check
from dcc.runtime.cuda_device import CudaDevice
from dcc.runtime.cuda_driver import CudaDriver
from dcc.runtime.device import Device
from dcc.runtime.device_loop import LANES, DeviceArtifact
from dcc.runtime.first_build import LayerEngines, cache_beside
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend, cuda_missing
from dcc.runtime.placement import AUTO, Gpu, Placement, place, reason_of
from dcc.runtime.tensorrt_builder import TensorRt, check_capabilities

Told = Callable[[str], None]
CompiledDenoiser = LoadedArtifact | DeviceArtifact


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = AUTO,
    device: int = 0,
    lanes: int = LANES,
    threads: int | None = None,
    low_memory: bool = False,
    own_process: bool = False,
    check: Check = "auto",
    told: Told = lambda _: None,
) -> CompiledDenoiser:
    """The artifact, checked and ready to sample; `.placement` says on what it runs, and why.

    `backend` auto takes a layer that fits the GPU `device`, else the processor; onnxruntime is the processor, and
    tensorrt, tensorrt-rtx or onnxruntime-cuda is taken or refused. `told` says which, and why. `lanes` requests run
    side by side on a GPU. Engines that the file does not hold, or that the GPU refuses, are built now, `told` of each,
    and kept in the folder `PATH.engines`, or in the user's cache where that cannot be written.

    `threads` bounds the processors used (default: those the process may use). `low_memory` leaves weights mapped
    instead of repacking them: less memory, 8 to 27 % slower. `own_process` says that nobody else in the process makes
    ONNX Runtime sessions: the engines of a step that was cut then share one thread pool, which saves some 10 %, and
    which any later session of the process would have to share.

    Raises ArtifactError for a damaged or foreign file, DeviceError where the GPU cannot do what was asked.
    """
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", got=threads)
    if lanes < 1:
        raise UsageError("a device needs a lane for its requests", got=lanes, want="1 or more")
    artifact = Artifact.open(path, check=check)
    placement = place(artifact.layers, backend, lambda: gpu_of(device), library_missing)
    if artifact.layers or backend != AUTO:
        told(f"running with {placement}")
    if placement.backend in ("tensorrt", "tensorrt-rtx"):
        return _on_device(artifact, placement, device, lanes, told)
    cuda = device if placement.backend == "onnxruntime-cuda" else None
    runner = OnnxRuntimeBackend(artifact, threads, low_memory, own_process, layer=placement.layer, cuda_device=cuda)
    return LoadedArtifact(artifact, runner, placement=placement)


def load_on_processor(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    low_memory: bool = False,
    own_process: bool = False,
    check: Check = "auto",
) -> LoadedArtifact:
    """`load` with the portable engines, whatever the machine has: what the compiler measures with."""
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", got=threads)
    artifact = Artifact.open(path, check=check)
    return LoadedArtifact(artifact, OnnxRuntimeBackend(artifact, threads, low_memory, own_process))


def gpu_of(index: int) -> Gpu:
    """The GPU as its driver names it.

    Raises DeviceError where there is none that can be used, UsageError where there is none of this number.
    """
    driver = CudaDriver()
    if not 0 <= index < driver.count:
        raise UsageError("there is no such device", got=index, want=f"0 to {driver.count - 1}")
    properties = driver.ask("cudaGetDeviceProperties", index)
    name = properties.name
    text = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
    return Gpu(text, 10 * int(properties.major) + int(properties.minor))


def library_missing(backend: str, capability: int, builds: bool) -> str | None:
    """Why the library of a backend cannot be used for a GPU of this capability, or None; `builds`: and build for it."""
    if backend == "onnxruntime-cuda":
        return cuda_missing()
    try:
        library = TensorRt.find("tensorrt" if backend == "tensorrt" else "tensorrt-rtx")
        if builds:
            check_capabilities((capability,), library, "")
    except ExportError as error:
        return reason_of(error)
    return None


def open_device(index: int, flavour: str) -> Device:
    """The GPU, for engines of one library."""
    return CudaDevice(index, flavour)


def _on_device(artifact: Artifact, placement: Placement, index: int, lanes: int, told: Told) -> DeviceArtifact:
    layer = placement.layer
    assert layer is not None  # a placement on a device has one
    gpu = gpu_of(index)
    engines = LayerEngines(
        artifact, layer, gpu.name, gpu.capability, cache_beside(artifact), told, backend=placement.backend
    )
    device = open_device(index, placement.backend)
    loaded = DeviceArtifact(
        artifact, device, engines.engine, lanes=lanes, placement=placement, rebuild=engines.rebuild
    )  # fmt: skip
    if engines.problem is not None:
        told(f"engines that were built could not be kept, and will be built again: {engines.problem}")
    return loaded
