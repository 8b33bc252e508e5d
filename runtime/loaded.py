"""A compiled denoiser, loaded: `sample` runs the whole loop, `denoise` one forward. No torch anywhere.

dit = dcc.runtime.load("model.dcc")
images = dit.sample(conditions={"y": [3, 7]}, guidance_scale=3.0, seed=0)      # [2, C, H, W] float32
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import Cancelled, ExecutionError, UsageError
from dcc.runtime.artifact import Artifact, Check
from dcc.runtime.guidance import Halves
from dcc.runtime.noise import Noise
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend
from dcc.runtime.plan import InputSpec, Plan
from dcc.runtime.request import Request
from dcc.runtime.sampler import Sampler, SamplerTable
from dcc.runtime.workspace import Workspace

Array = np.ndarray[Any, np.dtype[Any]]
KEPT_WORKSPACES = 2


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each sampler call; `latent` is valid until the callback returns."""

    call: int
    calls: int
    latent: Array


Callback = Callable[[Progress], bool | None]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    low_memory: bool = False,
    own_process: bool = False,
    check: Check = "auto",
) -> LoadedArtifact:
    """The artifact, checked and ready to sample.

    `threads` bounds the processors used (default: those the process may use). `low_memory` leaves weights mapped
    instead of repacking them: less memory, 8 to 27 % slower. `own_process` says that nobody else in the process makes
    ONNX Runtime sessions: the engines of a step that was cut then share one thread pool, which saves some 10 %, and
    which any later session of the process would have to share. Raises ArtifactError for a damaged or foreign file.
    """
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", got=threads)
    artifact = Artifact.open(path, check=check)
    return LoadedArtifact(artifact, OnnxRuntimeBackend(artifact, threads, low_memory, own_process))


class LoadedArtifact:
    """See the module's text. Safe to use from several threads: requests queue, one runs at a time."""

    def __init__(
        self,
        artifact: Artifact,
        backend: OnnxRuntimeBackend,
        plan: Plan | None = None,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        """`plan` replaces the artifact's own: another step over the same weights, as a search tries them out."""
        self.artifact = artifact
        self.plan: Plan = artifact.plan if plan is None else plan
        self.constants: Mapping[str, Array] = constants or {}
        table = artifact.manifest["sampler"]
        self.sampler: SamplerTable | None = None if table is None else SamplerTable.from_json(table)
        if self.sampler is not None and len(self.sampler.calls) != len(self.plan.order):
            raise ExecutionError(
                "the sampler and the plan disagree", got=f"{len(self.sampler.calls)} sampler calls",
                want=f"{len(self.plan.order)}", next="compile the model again",
            )  # fmt: skip
        self.guidance: dict[str, Any] = artifact.manifest["guidance"]
        self._backend = backend
        self._workspaces: dict[int, Workspace] = {}
        self._samplers: dict[tuple[int, ...], Sampler] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None
        for engine in self.plan.engines:
            if engine.kind != "timestep":  # only `denoise` needs those, and they may hold many parameters
                backend.session(engine.name)

    @property
    def latent(self) -> InputSpec:
        """The denoiser's latent input; its shape without the batch is the shape of one sample."""
        return next(item for item in self.plan.inputs if item.role == "latent")

    @property
    def conditions(self) -> tuple[InputSpec, ...]:
        """The inputs that a request gives values for."""
        return tuple(item for item in self.plan.inputs if item.role == "condition")

    @property
    def max_images(self) -> int:
        """Images in one guided request."""
        return self.plan.symbols["B"][1] // (2 if self.guidance["mode"] == "cfg" else 1)

    def sample(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        negative_conditions: Mapping[str, Any] | None = None,
        images: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: Array | None = None,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> Array:
        """Samples `[images, C, H, W]`, float32: the compiled sampler from noise to the last latent.

        `seed`: an int draws the batch from one generator, as `torch.Generator().manual_seed(seed)` would; a list is
        one generator per image. `noise` replaces the first draw. `callback` is told after every sampler call and
        stops the request by returning False, `cancel` by being set; both raise Cancelled.
        """
        with self.request(
            conditions, negative_conditions=negative_conditions, images=images, guidance_scale=guidance_scale,
            seed=seed, noise=noise,
        ) as request:  # fmt: skip
            calls = request.calls
            for call in range(calls):
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the request was cancelled", at=f"sampler call {call} of {calls}")
                current = request.advance(call, request.output(call))
                if callback is not None and callback(Progress(call, calls, current)) is False:
                    raise Cancelled("the callback stopped the request", at=f"sampler call {call} of {calls}")
            return request.sampler.latent.astype(np.float32)

    @contextmanager
    def request(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        negative_conditions: Mapping[str, Any] | None = None,
        images: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: Array | None = None,
    ) -> Iterator[Request]:
        """A generation to be walked through call by call, ready for the first; the artifact is taken meanwhile."""
        if self.sampler is None:
            raise ExecutionError(
                "the artifact was compiled without a sampler: it can only denoise", next="compile with --sampler"
            )
        scale = self._guidance_scale(guidance_scale)
        count = self._image_count(conditions or {}, images, seed, noise)
        guided = scale != 1.0
        rows = count * (2 if guided else 1)
        self._check_rows(rows, count)
        shape = (count, *(int(size) for size in self.latent.shape[1:]))
        source = Noise(seed if isinstance(seed, int | np.integer) else list(seed), count)
        start = source.draw(shape[1:]) if noise is None else self._given_noise(noise, shape)
        values = self._condition_rows(conditions or {}, negative_conditions, count, guided)
        with self._taken():
            space = self._workspace(rows)
            for name, array in values.items():
                np.copyto(space.inputs[name], array)
            space.call_timesteps = np.asarray([call.timestep for call in self.sampler.calls], np.float64)
            space.prepare(None)
            if shape not in self._samplers:
                self._samplers[shape] = Sampler(self.sampler, shape)
            sampler = self._samplers[shape]
            sampler.start(start)
            yield Request(space, sampler, Halves(space, count, scale, self.guidance["channels"]), source)

    def denoise(self, **inputs: Any) -> Array:
        """The denoiser's output for its own inputs, at any timesteps: what the model's forward returns."""
        wanted = [item.name for item in self.plan.inputs]
        if set(inputs) != set(wanted):
            raise UsageError("denoise takes the denoiser's inputs by name", got=sorted(inputs), want=wanted)
        latent = np.asarray(inputs[self.latent.name])
        rows = latent.shape[0] if latent.ndim else 1
        self._check_rows(rows, rows)
        arrays = {item.name: self._array(item, inputs[item.name], rows) for item in self.plan.inputs}
        times = next((arrays[item.name] for item in self.plan.inputs if item.role == "timestep"), None)
        with self._taken():
            space = self._workspace(rows)
            for name, array in arrays.items():
                np.copyto(space.inputs[name], array)
            space.prepare(np.zeros(rows, np.float32) if times is None else np.ascontiguousarray(times))
            return space.step(0, self.plan.order[0] if self.plan.order else 0).copy()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise ExecutionError("a callback cannot start a request on the artifact that is calling it")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _workspace(self, rows: int) -> Workspace:
        space = self._workspaces.pop(rows, None) or Workspace(
            self.artifact, self._backend, rows, self.plan, self.constants
        )
        self._workspaces[rows] = space
        while len(self._workspaces) > KEPT_WORKSPACES:
            del self._workspaces[next(iter(self._workspaces))]
        while len(self._samplers) > KEPT_WORKSPACES:
            del self._samplers[next(iter(self._samplers))]
        return space

    def _guidance_scale(self, scale: float | None) -> float:
        if self.guidance["mode"] == "none":
            if scale not in (None, 1.0, 1):
                raise UsageError(
                    "the artifact was compiled without guidance", got=f"guidance_scale {scale}",
                    next="compile with --guidance cfg",
                )  # fmt: skip
            return 1.0
        value = float(self.guidance["scale"] if scale is None else scale)
        if not np.isfinite(value):
            raise UsageError("guidance_scale must be finite", got=value)
        return value

    def _image_count(
        self, conditions: Mapping[str, Any], images: int | None, seed: int | Sequence[int], noise: Array | None
    ) -> int:
        """All that says how many images there are must agree; a single row serves any number."""
        counts: dict[str, int] = {}
        if images is not None:
            counts["images"] = images
        for item in self.conditions:
            if item.name in conditions and item.shape[:1] == ("B",):
                array = np.asarray(conditions[item.name])
                if array.ndim == len(item.shape) and array.shape[0] != 1:
                    counts[item.name] = array.shape[0]
        if not isinstance(seed, int | np.integer):
            counts["seed"] = len(seed)
        if noise is not None and np.ndim(noise):
            counts["noise"] = np.asarray(noise).shape[0]
        if len(set(counts.values())) > 1:
            raise UsageError("the request disagrees about the number of images", got=counts)
        count = next(iter(counts.values()), 1)
        if count < 1:
            raise UsageError("a request needs at least one image", got=count)
        return count

    def _check_rows(self, rows: int, count: int) -> None:
        low, high = self.plan.symbols["B"]
        if not low <= rows <= high:
            raise UsageError(
                "the batch is outside the profile that was compiled", got=f"{count} images, {rows} rows",
                want=f"{low} to {high} rows", next="split the request, or compile with a larger --max-batch",
            )  # fmt: skip

    def _given_noise(self, noise: Array, shape: tuple[int, ...]) -> Array:
        array = np.asarray(noise, np.float32)
        if array.shape != shape:
            raise UsageError("noise has the wrong shape", got=array.shape, want=shape)
        return array

    def _condition_rows(
        self, conditions: Mapping[str, Any], negative: Mapping[str, Any] | None, count: int, guided: bool
    ) -> dict[str, Array]:
        known = [item.name for item in self.conditions]
        for name in (*conditions, *(negative or {})):
            if name not in known:
                raise UsageError(f"unknown condition '{name}'", want=known)
        rows = {}
        for item in self.conditions:
            if item.name not in conditions:
                raise UsageError(f"condition '{item.name}' is missing", want=known)
            array = self._array(item, conditions[item.name], count)
            if guided and item.shape[:1] == ("B",):
                array = np.concatenate([array, self._negative(item, negative or {}, array, count)])
            rows[item.name] = array
        return rows

    def _negative(self, item: InputSpec, negative: Mapping[str, Any], array: Array, count: int) -> Array:
        if item.name in negative:
            return self._array(item, negative[item.name], count)
        if item.null is None:
            raise UsageError(
                f"guidance needs a negative condition for '{item.name}'",
                next=f"give negative_conditions={{'{item.name}': ...}}, or guidance_scale=1.0",
            )
        return np.full_like(array, item.null)

    def _array(self, item: InputSpec, value: Any, rows: int) -> Array:
        """The value in the input's dtype and shape; a missing batch dimension or a single row is repeated."""
        try:
            array = np.asarray(value)
            integral = array.dtype.kind in "iub" or not np.issubdtype(np.dtype(item.dtype), np.integer)
            if not integral and not np.array_equal(array, np.rint(array)):
                raise ValueError("fractions for an integer input")
            converted = array.astype(item.dtype)
        except (ValueError, TypeError) as error:
            raise UsageError(f"'{item.name}' cannot be converted", got=error, want=item.dtype) from error
        shape = tuple(rows if isinstance(size, str) else size for size in item.shape)
        if item.shape[:1] == ("B",) and converted.ndim == len(shape) - 1:
            converted = converted[None]
        try:
            full = np.broadcast_to(converted, shape) if converted.ndim == len(shape) else None
        except ValueError:
            full = None
        if full is None or converted.shape[1:] != shape[1:]:
            raise UsageError(f"'{item.name}' has the wrong shape", got=array.shape, want=shape)
        for bound, wrong in ((item.minimum, np.less), (item.maximum, np.greater)):
            if bound is not None and bool(wrong(full, bound).any()):
                raise UsageError(
                    f"'{item.name}' is out of range", got=f"{full.min()} to {full.max()}",
                    want=f"{item.minimum} to {item.maximum}",
                )  # fmt: skip
        return full
