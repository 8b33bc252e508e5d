"""Generation time of an artifact and of what people use today, measured so that the figures can be compared.

Candidates alternate in one process: whatever else the machine does, it does to all of them. Figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcc.errors import Cancelled, DccError

if TYPE_CHECKING:
    from dcc.original import Forward, Original, Request
    from dcc.runtime import CompiledDenoiser, Progress

Generate = Callable[[], object]
BASELINES = ("eager", "compile", "onnxruntime")
OPSET = 23
WARM_UPS = 1


@dataclass
class Timing:
    """Seconds of one candidate at one batch; `first` includes whatever is made on the first call."""

    candidate: str
    batch: int
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median_seconds": self.median}


def alternate(
    candidates: Mapping[str, Generate], batch: int, repeats: int, told: Callable[[str], None] = lambda _: None
) -> list[Timing]:
    """Each candidate warmed up, then `repeats` rounds of all of them, each round from another one on.

    A candidate that fails is reported with the reason and measured no further.
    """
    timings = {name: Timing(name, batch) for name in candidates}
    for name, generate in candidates.items():
        told(f"batch {batch}: first call of {name}")
        try:
            timings[name].first_seconds = timed(generate)
            for _ in range(WARM_UPS):
                generate()
        except DccError:
            raise
        except Exception as error:  # noqa: BLE001 - torch.compile and the exporter raise whatever they like
            timings[name].failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    names = [name for name in candidates if timings[name].failure is None]
    for repeat in range(repeats):
        told(f"batch {batch}: round {repeat + 1} of {repeats}")
        shift = repeat % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            timings[name].seconds.append(timed(candidates[name]))
    return list(timings.values())


def timed(generate: Generate) -> float:
    start = time.perf_counter()
    generate()
    return time.perf_counter() - start


def ratios(timings: Sequence[Timing], of: str = "artifact") -> dict[str, float]:
    """How many times the median of `of` every other candidate takes: above 1 means that `of` is faster."""
    medians = {item.candidate: item.median for item in timings}
    base = medians.get(of)
    return {name: value / base for name, value in medians.items() if name != of and value is not None and base}


def artifact_loop(
    artifact: CompiledDenoiser, conditions: Mapping[str, Any], negatives: Mapping[str, Any], seeds: Sequence[int],
    scale: float, calls: int | None,
) -> Generate:  # fmt: skip
    """A generation by the artifact. Ended after `calls`, it has still made its tables for the whole loop."""
    last = len(artifact.plan.order) if calls is None else calls

    def told(progress: Progress) -> bool:
        return progress.call + 1 < last or last >= progress.calls

    def generate() -> object:
        try:
            return artifact.sample(
                conditions, negative_conditions=negatives, guidance_scale=scale, seed=list(seeds),
                callback=None if last >= len(artifact.plan.order) else told,
            )
        except Cancelled:
            return None

    return generate


def original_loop(original: Original, request: Request, calls: int | None, forward: Forward | None = None) -> Generate:
    """The same generation as a plain loop around the diffusers scheduler."""
    return lambda: original.sample(request, forward=forward, calls=calls)


def compiled_forward(original: Original) -> Forward:
    """`torch.compile` of the module with its default options, for batches as they come."""
    import torch

    module = torch.compile(original.module, dynamic=False)

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = module(**inputs)
        return output

    return forward


def onnxruntime_forward(original: Original, threads: int | None = None) -> Forward:
    """The forward exported whole by `torch.onnx.export` and run by a default session of ONNX Runtime."""
    import onnxruntime
    import torch

    with tempfile.TemporaryDirectory(prefix="dcc-bench-") as folder:
        path = Path(folder) / "model.onnx"
        export_whole(original, path)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        feed = {name: np.ascontiguousarray(inputs[name].numpy()) for name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def export_whole(original: Original, path: Path) -> None:
    """The original's forward as one ONNX model with a dynamic batch is at `path`."""
    import torch

    inputs = dict(original.loaded.example_inputs)
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = {name: None if name in original.loaded.unbatched else {0: batch} for name in inputs}
    torch.onnx.export(
        original.module, args=(), f=str(path), kwargs=inputs, input_names=list(inputs), opset_version=OPSET,
        dynamo=True, dynamic_shapes=shapes, external_data=True, verbose=False,
    )  # fmt: skip
