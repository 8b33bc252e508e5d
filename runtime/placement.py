"""Where an artifact runs: which backend and layer, on what, and why; decided from facts alone.

The order of preference is: engines that are in the file for this GPU; engines that TensorRT builds here from the file's
graphs; ONNX Runtime on the GPU; another library than a layer was made for, because graphs are the same for all of them;
the processor. What was asked for by name is taken, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcc.errors import DccError, UsageError
from dcc.runtime.device import DeviceError
from dcc.runtime.layers import BACKENDS, Layer, holds_engines

AUTO = "auto"
PROCESSOR = "onnxruntime"
CHOICES = (AUTO, PROCESSOR, *BACKENDS)
_PREFERENCE = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
# The least compute capability that has the type.
LEAST_CAPABILITY = {"float32": 0, "float16": 70, "bfloat16": 80}


# Why a library cannot be used, given backend, compute capability and whether it has to build; None where it can.
Missing = Callable[[str, int, bool], str | None]


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver names it; capability 80 for 8.0."""

    name: str
    capability: int


@dataclass(frozen=True)
class Placement:
    """The decision; `layer` is None for the portable engines, `built` says that engines are in the file."""

    backend: str
    layer: Layer | None
    built: bool
    device: str
    reason: str

    def __str__(self) -> str:
        what = self.backend if self.layer is None else f"{self.backend}, layer {self.layer.name}"
        return f"{what}, on {self.device}: {self.reason}"


def place(layers: Sequence[Layer], wanted: str, gpu: Callable[[], Gpu], missing: Missing) -> Placement:
    """The placement for `wanted`, one of CHOICES.

    `gpu()` raises DeviceError where there is none that can be used. Raises UsageError or DeviceError where what was
    asked for by name is impossible.
    """
    if wanted not in CHOICES:
        raise UsageError("unknown backend", got=wanted, want=", ".join(CHOICES))
    if wanted == PROCESSOR:
        return Placement(PROCESSOR, None, True, "the processor", "asked for")
    if not layers and wanted == AUTO:
        return Placement(PROCESSOR, None, True, "the processor", "the artifact has no layer for a GPU")
    try:
        found = gpu()
    except DeviceError as error:
        if wanted != AUTO:
            raise
        return Placement(PROCESSOR, None, True, "the processor", reason_of(error, ("got", "want")))
    backends = BACKENDS if wanted == AUTO else (wanted,)
    pairs = [(layer, backend) for layer in layers for backend in backends]
    reasons: list[str] = []
    for layer, backend in sorted(pairs, key=lambda pair: _rank(pair[0], pair[1], found)):
        reason = _unfit(layer, found) or missing(backend, found.capability, not _ready(layer, backend, found))
        if reason is None:
            return _placed(layer, backend, found, wanted)
        reasons.append(f"{layer.name}: {reason}" if backend == layer.backend else reason)
    if wanted == "onnxruntime-cuda":
        reason = missing(wanted, found.capability, False)
        if reason is None:
            return Placement(wanted, None, True, found.name, "asked for; the portable engines in float32")
        reasons.append(reason)
    return _refused(wanted, found, "; ".join(dict.fromkeys(reasons)))


def reason_of(error: DccError, names: Sequence[str] = ("got", "want", "next")) -> str:
    """An error in one line: what, and these details of it."""
    return "; ".join([error.what, *(f"{name} {error.details[name]}" for name in names if name in error.details)])


def _refused(wanted: str, gpu: Gpu, why: str) -> Placement:
    """The processor, where that is left to us; else DeviceError."""
    if wanted != AUTO:
        raise DeviceError(
            f"the artifact cannot run with {wanted} on this device", got=why or "no layer for a GPU",
            want=f"{wanted} and a layer for {gpu.name}, compute capability {gpu.capability}",
            next=f"dcc build MODEL.dcc --target local --backend {wanted} adds a layer; backend onnxruntime needs none",
        )  # fmt: skip
    reason = f"no layer fits {gpu.name} (sm{gpu.capability}): {why}; dcc build MODEL.dcc --target local adds one"
    return Placement(PROCESSOR, None, True, "the processor", reason)


def _placed(layer: Layer, backend: str, gpu: Gpu, wanted: str) -> Placement:
    asked = "" if wanted == AUTO else "asked for; "
    if backend == "onnxruntime-cuda":
        return Placement(backend, layer, True, gpu.name, f"{asked}typed graphs of the artifact")
    if _ready(layer, backend, gpu):
        return Placement(backend, layer, True, gpu.name, f"{asked}the artifact holds engines for it")
    return Placement(backend, layer, False, gpu.name, f"{asked}engines are built here and kept")


def _ready(layer: Layer, backend: str, gpu: Gpu) -> bool:
    return backend == layer.backend and holds_engines(layer, gpu.name, gpu.capability)


def _rank(layer: Layer, backend: str, gpu: Gpu) -> tuple[bool, bool, int]:
    """The library that a layer was made for comes before another one over its graphs."""
    return (not _ready(layer, backend, gpu), backend != layer.backend, _PREFERENCE.index(backend))


def _unfit(layer: Layer, gpu: Gpu) -> str | None:
    """Why the layer cannot run on the GPU, whatever is installed."""
    least = LEAST_CAPABILITY[layer.dtype]
    if gpu.capability < least:
        return f"{layer.dtype} needs compute capability {least}, this is {gpu.capability}"
    if not layer.graphs:
        return "it has no graphs"
    return None
