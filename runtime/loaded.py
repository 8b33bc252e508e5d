"""A compiled denoiser, loaded: `sample` runs the whole loop, `denoise` one forward. No torch anywhere.

dit = dcc.runtime.load("model.dcc")
images = dit.sample(conditions={"y": [3, 7]}, guidance_scale=3.0, seed=0)      # [2, C, H, W] float32
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import Cancelled, ExecutionError
from dcc.runtime.artifact import Artifact
from dcc.runtime.guidance import Halves
from dcc.runtime.noise import CPU
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend
from dcc.runtime.placement import PROCESSOR, Placement
from dcc.runtime.plan import InputSpec, Plan
from dcc.runtime.request import Request
from dcc.runtime.request_rules import RequestRules
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


class LoadedArtifact:
    """See the module's text. Safe to use from several threads: requests queue, one runs at a time."""

    def __init__(
        self,
        artifact: Artifact,
        backend: OnnxRuntimeBackend,
        plan: Plan | None = None,
        constants: Mapping[str, Array] | None = None,
        placement: Placement | None = None,
    ) -> None:
        """`plan` replaces the artifact's own: another step over the same weights, as a search tries them out."""
        self.artifact = artifact
        self.placement = placement or Placement(PROCESSOR, None, True, "the processor", "asked for")
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
        self._rules = RequestRules(self.plan, self.guidance)
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
        return self._rules.latent

    @property
    def conditions(self) -> tuple[InputSpec, ...]:
        """The inputs that a request gives values for."""
        return self._rules.conditions

    @property
    def max_images(self) -> int:
        """Images in one guided request."""
        return self._rules.max_images

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
        """Samples `[images, C, H, W]`, float32: the compiled sampler from noise to the last latent.

        `seed`: an int draws the batch from one generator, as `torch.Generator().manual_seed(seed)` would; a list is
        one generator per image. `noise` replaces the first draw. `generator` cuda draws what torch's generator on a
        GPU would, but for the last bits; large draws need the GPU's name (`cuda:rtx4090`). Conditions and noise are
        numbers, arrays, or tensors of anybody's that know DLPack.

        `callback` is told after every sampler call and stops the request by returning False, `cancel` by being set;
        both raise Cancelled.
        """
        with self.request(
            conditions, negative_conditions=negative_conditions, images=images, guidance_scale=guidance_scale,
            seed=seed, noise=noise, generator=generator,
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
        noise: Any = None,
        generator: str = CPU,
    ) -> Iterator[Request]:
        """A generation to be walked through call by call, ready for the first; the artifact is taken meanwhile."""
        if self.sampler is None:
            raise ExecutionError(
                "the artifact was compiled without a sampler: it can only denoise", next="compile with --sampler"
            )
        asked = self._rules.generation(
            conditions or {}, negative_conditions, images, guidance_scale, seed, noise, generator
        )  # fmt: skip
        with self._taken():
            space = self._workspace(asked.rows)
            for name, array in asked.conditions.items():
                np.copyto(space.inputs[name], array)
            space.call_timesteps = np.asarray([call.timestep for call in self.sampler.calls], np.float64)
            space.prepare(None)
            shape = asked.start.shape
            if shape not in self._samplers:
                self._samplers[shape] = Sampler(self.sampler, shape)
            sampler = self._samplers[shape]
            sampler.start(asked.start)
            halves = Halves(space, asked.images, asked.scale, self.guidance["channels"])
            yield Request(space, sampler, halves, asked.source)

    def denoise(self, **inputs: Any) -> Array:
        """The denoiser's output for its own inputs, at any timesteps: what the model's forward returns."""
        asked = self._rules.forward(inputs)
        with self._taken():
            space = self._workspace(asked.rows)
            for name, array in asked.inputs.items():
                np.copyto(space.inputs[name], array)
            space.prepare(asked.timesteps)
            return space.step(0, self.plan.order[0] if self.plan.order else 0).copy()

    def close(self) -> None:
        """Buffers and sessions are free; the next request makes them again."""
        with self._taken():
            self._workspaces.clear()
            self._samplers.clear()
            self._backend.close()

    def __enter__(self) -> LoadedArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def guidance_scale(self, scale: float | None) -> float:
        """The guidance scale of a request that asks for this one; None is the artifact's own."""
        return self._rules.guidance_scale(scale)
