"""A compiled denoiser on a device: the same requests as `LoadedArtifact`, without torch and without waiting.

Requests from several threads run side by side, as many as there are lanes: each lane has a stream, scratch memory and
workspaces of its own; engines, weights and constants are shared. A lane's workspaces are kept for the sizes that were
asked for last.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dcc.errors import ExecutionError
from dcc.runtime.artifact import Artifact
from dcc.runtime.device import Array, Device, DeviceMemoryError, Region, Stream
from dcc.runtime.device_array import DeviceArray
from dcc.runtime.device_layout import Size
from dcc.runtime.device_model import DeviceModel, EngineSource, WeightSource
from dcc.runtime.device_request import DeviceRequests, Told
from dcc.runtime.loaded import KEPT_WORKSPACES, Callback, Progress
from dcc.runtime.placement import Placement
from dcc.runtime.plan import InputSpec, Plan
from dcc.runtime.request_rules import Generation, RequestRules
from dcc.runtime.sampler import SamplerTable

LANES = 2


class Lane:
    """A stream with scratch memory and workspaces; one request at a time."""

    def __init__(self, model: DeviceModel, number: int) -> None:
        self.model = model
        self.stream: Stream = model.device.stream()
        self._number = number
        self._scratch = model.device.allocate(max(model.scratch_bytes, 1), f"scratch of lane {number}")
        self._timestep_scratch: Region | None = None
        self._requests: dict[Size, DeviceRequests] = {}

    def requests(self, size: Size) -> DeviceRequests:
        """The workspace for this size. Others make room where the device has none left."""
        found = self._requests.pop(size, None)
        while found is None:
            try:
                found = DeviceRequests(self.model, size, self.stream, self._scratch)
            except DeviceMemoryError:
                if not self._requests:
                    raise
                self._drop_oldest()
        self._requests[size] = found
        while len(self._requests) > KEPT_WORKSPACES:
            self._drop_oldest()
        return found

    def timestep_scratch(self) -> Region:
        """Scratch for the timestep engines, which are loaded now."""
        if self._timestep_scratch is None:
            engines = [self.model.engine(call.engine) for call in self.model.plan.timestep]
            nbytes = max((engine.scratch_bytes for engine in engines), default=0)
            label = f"timestep scratch of lane {self._number}"
            self._timestep_scratch = self.model.device.allocate(max(nbytes, 1), label)
        return self._timestep_scratch

    def _drop_oldest(self) -> None:
        self._requests.pop(next(iter(self._requests))).close()

    def close(self) -> None:
        """Its memory is free."""
        while self._requests:
            self._drop_oldest()
        for region in (self._scratch, self._timestep_scratch):
            if region is not None:
                self.model.device.free(region)
        self._timestep_scratch = None
        self.stream.close()


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
    ) -> None:
        """`engine(name)` gives the bytes of each engine of the plan and of `LoopSpec.kinds`, for this device.

        `weight(key)` gives dtype and values of tensors that engines take as inputs. `lanes` requests run side by side.
        """
        self.artifact, self.device = artifact, device
        self.placement = placement or Placement("tensorrt", None, True, device.name, "engines were given")
        self._model = DeviceModel(artifact, device, engine, weight)
        self.plan: Plan = self._model.plan
        self.sampler: SamplerTable | None = self._model.sampler
        self.guidance: dict[str, Any] = self._model.guidance
        self._rules = RequestRules(self.plan, self.guidance)
        self._most = lanes
        self._lanes: list[Lane] = []
        self._free: list[Lane] = []
        self._owners: set[int] = set()
        self._change = threading.Condition()
        self._closed = False

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
        noise: Array | None = None,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> Array:
        """Samples `[images, C, H, W]`, float32, as `LoadedArtifact.sample` gives them.

        `callback` makes the host wait after every sampler call, and copies the latent. Raises DeviceMemoryError where
        the request does not fit, with the most images that would.
        """
        asked = self._generation(conditions, negative_conditions, images, guidance_scale, seed, noise)
        told = self._told(callback)
        with self._lane() as lane:
            return lane.requests(self._size(asked)).sample(asked, told, cancel)

    def sample_on_device(
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
    ) -> DeviceArray:
        """What `sample` gives, left on the device: for torch or CuPy, which take it without a copy."""
        asked = self._generation(conditions, negative_conditions, images, guidance_scale, seed, noise)
        told = self._told(callback)
        with self._lane() as lane:
            return DeviceArray(self.device, lane.requests(self._size(asked)).sample_in_place(asked, told, cancel))

    def denoise(self, **inputs: Any) -> Array:
        """The denoiser's output for its own inputs, at any timesteps: what the model's forward returns."""
        asked = self._rules.forward(inputs)
        with self._lane() as lane:
            scratch = lane.timestep_scratch()
            return lane.requests(Size(asked.rows, False, 0)).denoise(asked, scratch)

    def _generation(
        self,
        conditions: Mapping[str, Any] | None,
        negative_conditions: Mapping[str, Any] | None,
        images: int | None,
        guidance_scale: float | None,
        seed: int | Sequence[int],
        noise: Array | None,
    ) -> Generation:
        if self.sampler is None:
            raise ExecutionError(
                "the artifact was compiled without a sampler: it can only denoise", next="compile with --sampler"
            )
        return self._rules.generation(conditions or {}, negative_conditions, images, guidance_scale, seed, noise)

    def _size(self, asked: Generation) -> Size:
        return Size(asked.images, asked.guided, len(self.plan.order))

    def _told(self, callback: Callback | None) -> Told | None:
        """The callback as the loop calls it; without one the host waits for nothing."""
        if callback is None:
            return None
        calls = len(self.plan.order)
        return lambda call, latent: callback(Progress(call, calls, latent))

    def close(self) -> None:
        """All memory of the device is free, once the requests under way are done."""
        with self._change:
            self._closed = True
            while len(self._free) < len(self._lanes):
                self._change.wait()
            for lane in self._lanes:
                lane.close()
            self._lanes.clear()
            self._free.clear()
            self._model.close()

    def __enter__(self) -> DeviceArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        """A lane that nobody else has; when it is given back, nothing is under way on it."""
        owner = threading.get_ident()
        with self._change:
            if owner in self._owners:
                raise ExecutionError("a callback cannot start a request on the artifact that is calling it")
            while not self._closed and not self._free and len(self._lanes) >= self._most:
                self._change.wait()
            if self._closed:
                raise ExecutionError("the artifact was closed", next="load it again")
            self.device.activate()
            if not self._free:
                self._free.append(Lane(self._model, len(self._lanes)))
                self._lanes.append(self._free[-1])
            lane = self._free.pop()
            self._owners.add(owner)
        try:
            yield lane
        finally:
            try:
                # After an error the buffers of this request may still be read from.
                lane.stream.synchronise()
            finally:
                with self._change:
                    self._owners.discard(owner)
                    self._free.append(lane)
                    self._change.notify()
