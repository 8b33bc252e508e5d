"""What a request may say, checked against the plan: the same rules on every backend.

A request becomes rows of the denoiser's inputs, in their dtypes and shapes: the conditional half first, then, under
guidance, the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.noise import CPU, Noise
from dcc.runtime.plan import InputSpec, Plan
from dcc.runtime.request_values import Array, Fetch, array_of, arrays_of, no_device


@dataclass(frozen=True)
class Generation:
    """A request for samples: `images` of them, guided unless `scale` is 1, from the latents `start`.

    `conditions` has an array for each condition, with all rows of the batch. `source` goes on drawing noise.
    """

    images: int
    scale: float
    start: Array
    source: Noise
    conditions: dict[str, Array]

    @property
    def guided(self) -> bool:
        return self.scale != 1.0

    @property
    def rows(self) -> int:
        """Rows of the denoiser."""
        return self.images * (2 if self.guided else 1)


@dataclass(frozen=True)
class Forward:
    """A request for one forward: all the denoiser's inputs, and the timesteps among them."""

    rows: int
    inputs: dict[str, Array]
    timesteps: Array


class RequestRules:
    """What requests a plan takes; `guidance` is the entry of the artifact's manifest.

    `fetch` reads tensors that lie on a device; `threads` is how many the device holds, for noise like its own.
    """

    def __init__(
        self, plan: Plan, guidance: Mapping[str, Any], fetch: Fetch = no_device, threads: int | None = None
    ) -> None:
        self.plan, self.guidance = plan, guidance
        self._fetch, self._threads = fetch, threads

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

    def generation(
        self,
        conditions: Mapping[str, Any],
        negative_conditions: Mapping[str, Any] | None,
        images: int | None,
        guidance_scale: float | None,
        seed: int | Sequence[int],
        noise: Any,
        generator: str = CPU,
    ) -> Generation:
        """The request for samples. Raises UsageError that names what does not fit."""
        scale = self.guidance_scale(guidance_scale)
        conditions = arrays_of(conditions, self._fetch)
        negative_conditions = arrays_of(negative_conditions or {}, self._fetch)
        noise = None if noise is None else array_of("noise", noise, self._fetch)
        seed = self._seeds(seed)
        count = self._image_count(conditions, images, seed, noise)
        guided = scale != 1.0
        self._check_rows(count * (2 if guided else 1), count)
        shape = (count, *(int(size) for size in self.latent.shape[1:]))
        source = Noise(seed, count, generator, self._threads)
        start = source.draw(shape[1:]) if noise is None else self._given_noise(noise, shape)
        rows = self._condition_rows(conditions, negative_conditions, count, guided)
        return Generation(count, scale, start, source, rows)

    def forward(self, inputs: Mapping[str, Any]) -> Forward:
        """The request for one forward. Raises UsageError that names what does not fit."""
        wanted = [item.name for item in self.plan.inputs]
        if set(inputs) != set(wanted):
            raise UsageError("denoise takes the denoiser's inputs by name", got=sorted(inputs), want=wanted)
        inputs = arrays_of(inputs, self._fetch)
        latent = np.asarray(inputs[self.latent.name])
        rows = latent.shape[0] if latent.ndim else 1
        self._check_rows(rows, rows)
        arrays = {item.name: self._array(item, inputs[item.name], rows) for item in self.plan.inputs}
        times = next((arrays[item.name] for item in self.plan.inputs if item.role == "timestep"), None)
        return Forward(rows, arrays, np.zeros(rows, np.float32) if times is None else np.ascontiguousarray(times))

    def guidance_scale(self, scale: float | None) -> float:
        """The scale that a request gets; 1.0 where the artifact has no guidance."""
        if self.guidance["mode"] == "none":
            if scale not in (None, 1.0, 1):
                raise UsageError(
                    "the artifact was compiled without guidance", got=f"guidance_scale {scale}",
                    next="compile with --guidance cfg",
                )  # fmt: skip
            return 1.0
        try:
            value = float(self.guidance["scale"] if scale is None else scale)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError("guidance_scale is not a number", got=repr(scale)[:100]) from error
        if not np.isfinite(value):
            raise UsageError("guidance_scale must be finite", got=value)
        return value

    def _seeds(self, seed: Any) -> int | list[Any]:
        """One seed, or a list of one per image."""
        if isinstance(seed, int | np.integer):
            return int(seed) if not isinstance(seed, bool) else seed
        if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
            return list(seed)
        if hasattr(seed, "__dlpack__"):
            values = array_of("seed", seed, self._fetch).tolist()
            return values if isinstance(values, list) else [values]
        want = "an integer, or a list of one per image"
        raise UsageError("a seed is not an integer", got=repr(seed)[:100], want=want)

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
        if not isinstance(seed, int):
            counts["seed"] = len(seed)
        if noise is not None and noise.ndim:
            counts["noise"] = noise.shape[0]
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
        if noise.dtype.kind not in "fiu":
            raise UsageError("noise is not made of numbers", got=noise.dtype, want="float32")
        if noise.shape != shape:
            raise UsageError("noise has the wrong shape", got=noise.shape, want=shape)
        return noise.astype(np.float32)

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
