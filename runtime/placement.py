"""Where an artifact runs: which backend and layer, on what, and why; decided from facts alone.

The order of preference is: engines that are in the file for this GPU; engines that TensorRT builds here from the file's
graphs; ONNX Runtime on the GPU; the processor. What was asked for by name is taken, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcc.errors import UsageError
from dcc.runtime.device import DeviceError
from dcc.runtime.layers import BACKENDS, Layer

AUTO = "auto"
PROCESSOR = "onnxruntime"
CHOICES = (AUTO, PROCESSOR, *BACKENDS)
# The least compute capability that has the type.
LEAST_CAPABILITY = {"float32": 0, "float16": 70, "bfloat16": 80}


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


def place(
    layers: Sequence[Layer], wanted: str, gpu: Callable[[], Gpu], missing: Callable[[str], str | None]
) -> Placement:
    """The placement for `wanted`, one of CHOICES.

    `gpu()` raises DeviceError where there is none that can be used; `missing(backend)` says why a backend's library
    cannot be used, or None. Raises UsageError or DeviceError where what was asked for by name is impossible.
    """
    if wanted not in CHOICES:
        raise UsageError("unknown backend", got=wanted, want=", ".join(CHOICES))
    if wanted == PROCESSOR:
        return Placement(PROCESSOR, None, True, "the processor", "asked for")
    fitting = [layer for layer in layers if wanted in (AUTO, layer.backend)]
    if not fitting and wanted == AUTO:
        return Placement(PROCESSOR, None, True, "the processor", "the artifact has no layer for a GPU")
    try:
        found = gpu()
    except DeviceError as error:
        if wanted != AUTO:
            raise
        return Placement(PROCESSOR, None, True, "the processor", error.what)
    reasons = []
    for layer in sorted(fitting, key=lambda layer: _rank(layer, found)):
        reason = _unfit(layer, found) or missing(layer.backend)
        if reason is None:
            return _placed(layer, found, wanted)
        reasons.append(f"{layer.name}: {reason}")
    if wanted == "onnxruntime-cuda" and (reason := missing(wanted)) is None:
        return Placement(wanted, None, True, found.name, "asked for; the portable engines in float32")
    if wanted == "onnxruntime-cuda":
        reasons.append(f"{wanted}: {reason}")
    if wanted != AUTO:
        raise DeviceError(
            f"the artifact cannot run with {wanted} on this device", got="; ".join(reasons) or "no such layer",
            want=f"a layer for {found.name}, compute capability {found.capability}",
            next=f"dcc build MODEL.dcc --target local --backend {wanted}",
        )  # fmt: skip
    why = f"no layer fits {found.name} (sm{found.capability}): {'; '.join(reasons)}"
    return Placement(PROCESSOR, None, True, "the processor", f"{why}; dcc build MODEL.dcc --target local adds one")


def _placed(layer: Layer, gpu: Gpu, wanted: str) -> Placement:
    asked = "" if wanted == AUTO else "asked for; "
    if layer.backend == "onnxruntime-cuda":
        return Placement(layer.backend, layer, True, gpu.name, f"{asked}typed graphs of the artifact")
    if _ready(layer, gpu):
        return Placement(layer.backend, layer, True, gpu.name, f"{asked}the artifact holds engines for it")
    return Placement(layer.backend, layer, False, gpu.name, f"{asked}engines are built here and kept beside the file")


def _ready(layer: Layer, gpu: Gpu) -> bool:
    mine = layer.device == gpu.name if layer.device else gpu.capability in layer.capabilities
    return bool(layer.engines) and mine


def _rank(layer: Layer, gpu: Gpu) -> tuple[int, int]:
    kinds = {"tensorrt": 0, "tensorrt-rtx": 1, "onnxruntime-cuda": 2}
    return (0 if _ready(layer, gpu) else 1, kinds[layer.backend])


def _unfit(layer: Layer, gpu: Gpu) -> str | None:
    """Why the layer cannot run on the GPU, whatever is installed."""
    least = LEAST_CAPABILITY[layer.dtype]
    if gpu.capability < least:
        return f"{layer.dtype} needs compute capability {least}, this is {gpu.capability}"
    if not layer.graphs:
        return "it has no graphs"
    return None
