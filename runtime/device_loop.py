"""A compiled denoiser on a device: the same requests as `LoadedArtifact`, without torch and without waiting.

Requests from several threads run side by side, as many as there are lanes: each lane has a stream, scratch memory and
workspaces of its own; engines, weights and constants are shared. A lane's workspaces are kept for the sizes that were
asked for last.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dcc.errors import DccError, ExecutionError
from dcc.runtime.artifact import Artifact
from dcc.runtime.device import Array, Device, DeviceMemoryError, Place, byte_count
from dcc.runtime.device_array import DeviceArray, fetched
from dcc.runtime.device_lanes import Lanes
from dcc.runtime.device_layout import Size
from dcc.runtime.device_model import DeviceModel, EngineSource, Rebuild, WeightSource
from dcc.runtime.device_request import Told
from dcc.runtime.loaded import Callback, Progress
from dcc.runtime.noise import CPU
from dcc.runtime.placement import Placement
from dcc.runtime.plan import InputSpec, Plan
from dcc.runtime.request_rules import Generation, RequestRules
from dcc.runtime.sampler import SamplerTable

Made = TypeVar("Made")
LANES = 2


class DeviceArtifact:
    """See the module's text. Safe to use from several threads."""

    def __init__(
        self,
        artifact: Artifact,
        device: Device,
        engine: EngineSource,
        weight: WeightSource | None = None,
        lanes: int = LANES,
        placement: Placement | None = None,
        rebuild: Rebuild | None = None,
    ) -> None:
        """`engine(name)` gives the bytes of each engine of the plan and of `LoopSpec.kinds`, for this device.

        `weight(key)` gives dtype and values of tensors that engines take as inputs. `lanes` requests run side by side,
        fewer where memory does not allow it. `rebuild(name, reason)` gives an engine in place of one that the device
        refuses. Raises DeviceMemoryError where not even the model fits.
        """
        self.artifact, self.device = artifact, device
        self.placement = placement or Placement("tensorrt", None, True, device.name, "engines were given")
        self._model = DeviceModel(artifact, device, engine, weight, rebuild)
        self.plan: Plan = self._model.plan
        self.sampler: SamplerTable | None = self._model.sampler
        self.guidance: dict[str, Any] = self._model.guidance
        self._rules = RequestRules(
            self.plan, self.guidance, lambda value: fetched(device, value), device.threads or None
        )  # fmt: skip
        try:
            self._lanes = Lanes(self._model, lanes)
        except BaseException:
            self._model.close()
            raise
        # Memory of a device is nobody's object: it would stay taken when the artifact is gone.
        self._release = weakref.finalize(self, _let_go, self._lanes)
        # The process is about to end, and the driver may be gone.
        self._release.atexit = False

    @property
    def latent(self) -> InputSpec:
        """The denoiser's latent input; its shape without the batch is the shape of one sample."""
        return self._rules.latent

    @property
    def conditions(self) -> tuple[InputSpec, ...]:
        """The inputs that a request gives values for."""
        return self._rules.conditions

    @property
    def max_images(self) -> int:
        """Images in one guided request."""
        return self._rules.max_images

    def guidance_scale(self, scale: float | None) -> float:
        """The guidance scale of a request that asks for this one; None is the artifact's own."""
        return self._rules.guidance_scale(scale)

    def sample(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        negative_conditions: Mapping[str, Any] | None = None,
        images: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: Any = None,
        generator: str = CPU,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> Array:
        """Samples `[images, C, H, W]`, float32, as `LoadedArtifact.sample` gives them.

        Conditions and noise may be tensors on this device (torch's, CuPy's, a DeviceArray), which are read back first.
        `callback` makes the host wait after every sampler call, and copies the latent. Raises DeviceMemoryError where
        the request does not fit, with the most images that would.
        """
        asked = self._generation(conditions, negative_conditions, images, guidance_scale, seed, noise, generator)
        told = self._told(callback)
        with self._lanes.taken() as lane:
            return self._with_room(lambda: lane.requests(self._size(asked))).sample(asked, told, cancel)

    def sample_on_device(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        negative_conditions: Mapping[str, Any] | None = None,
        images: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: Any = None,
        generator: str = CPU,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> DeviceArray:
        """What `sample` gives, left on the device: for torch or CuPy, which take it without a copy."""
        asked = self._generation(conditions, negative_conditions, images, guidance_scale, seed, noise, generator)
        told = self._told(callback)
        with self._lanes.taken() as lane:
            requests = self._with_room(lambda: lane.requests(self._size(asked)))
            nbytes = byte_count(asked.start.shape, "float32")
            # Taken before the work is done, not after it.
            region = self._with_room(lambda: self.device.allocate(nbytes, "samples"))
            samples = DeviceArray(self.device, Place(region, "float32", asked.start.shape))
            try:
                requests.sample_into(region, asked, told, cancel)
            except BaseException:
                lane.stream.synchronise()
                samples.close()
                raise
            return samples

    def denoise(self, **inputs: Any) -> Array:
        """The denoiser's output for its own inputs, at any timesteps: what the model's forward returns."""
        asked = self._rules.forward(inputs)
        with self._lanes.taken() as lane:
            scratch = self._with_room(lane.timestep_scratch)
            return self._with_room(lambda: lane.requests(Size(asked.rows, False, 0))).denoise(asked, scratch)

    def _with_room(self, make: Callable[[], Made]) -> Made:
        """What `make` gives; where memory is short, lanes that nobody uses give up their workspaces first."""
        try:
            return make()
        except DeviceMemoryError:
            if not self._lanes.drop_unused():
                raise
            return make()

    def _generation(
        self,
        conditions: Mapping[str, Any] | None,
        negative_conditions: Mapping[str, Any] | None,
        images: int | None,
        guidance_scale: float | None,
        seed: int | Sequence[int],
        noise: Any,
        generator: str,
    ) -> Generation:
        if self.sampler is None:
            raise ExecutionError(
                "the artifact was compiled without a sampler: it can only denoise", next="compile with --sampler"
            )
        return self._rules.generation(
            conditions or {}, negative_conditions, images, guidance_scale, seed, noise, generator
        )  # fmt: skip

    def _size(self, asked: Generation) -> Size:
        return Size(asked.images, asked.guided, len(self.plan.order))

    def _told(self, callback: Callback | None) -> Told | None:
        """The callback as the loop calls it; without one the host waits for nothing."""
        if callback is None:
            return None
        calls = len(self.plan.order)
        return lambda call, latent: callback(Progress(call, calls, latent))

    def close(self) -> None:
        """All memory of the device is free, once the requests under way are done; samples on it live on."""
        self._lanes.close()

    def __enter__(self) -> DeviceArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _let_go(lanes: Lanes) -> None:
    """The memory of an artifact that nobody holds any more is free; nobody is there to be told what fails."""
    with contextlib.suppress(DccError):
        lanes.release()
