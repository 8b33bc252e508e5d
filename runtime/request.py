"""One generation, call by call: the denoiser's guided output, then the sampler's update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from dcc.runtime.guidance import Halves
from dcc.runtime.noise import Noise
from dcc.runtime.plan import Call
from dcc.runtime.sampler import Sampler
from dcc.runtime.workspace import Workspace

Array = np.ndarray[Any, np.dtype[Any]]


class Request:
    """For each sampler call in order `output(call)`, then `advance(call, output)`."""

    def __init__(self, space: Workspace, sampler: Sampler, halves: Halves, source: Noise) -> None:
        self.space = space
        self.sampler = sampler
        self.halves = halves
        self.calls = len(space.plan.order)
        self._source = source
        inputs = {item.role: space.inputs[item.name] for item in space.plan.inputs if item.role != "condition"}
        self._latent, self._timestep = inputs["latent"], inputs.get("timestep")

    def output(self, call: int, told: Callable[[Call], None] | None = None) -> Array:
        """The guided output of the denoiser for the present latent, valid until the next; `told` of each engine."""
        np.copyto(self._latent[: self.halves.count], self.sampler.model_input(call), casting="same_kind")
        if self._timestep is not None:
            self._timestep.fill(self.sampler.table.calls[call].timestep)
        return self.halves.run(call, told)

    def advance(self, call: int, output: Array) -> Array:
        """The new latent, valid until the next call."""
        return self.sampler.advance(call, output, self.draw)

    def peek(self, call: int) -> Array:
        """The latent that the call would lead to, a copy; request and noise stay where they are."""
        known = self.halves.known
        output = self.output(call)
        self.halves.known = known
        sampler = self.sampler.fork()
        # A generator's state is large: it is copied for samplers that draw.
        noise = copy.deepcopy(self._source) if self.sampler.table.calls[call].draws else self._source
        return sampler.advance(call, output, lambda dtype: noise.draw(self.sampler.shape[1:], dtype)).copy()

    def place(self) -> tuple[Sampler, Noise]:
        """Sampler and noise as they are before the next call, for `return_to`."""
        return self.sampler.fork(), self._copy_of(self._source)

    def return_to(self, place: tuple[Sampler, Noise]) -> None:
        """The request goes on from a place where it, or another one of the same arguments, was."""
        sampler, source = place
        self.sampler, self._source = sampler.fork(), self._copy_of(source)

    def _copy_of(self, source: Noise) -> Noise:
        """A generator's state is large: it is copied for samplers that draw."""
        return copy.deepcopy(source) if any(call.draws for call in self.sampler.table.calls) else source

    def draw(self, dtype: str) -> Array:
        """Fresh noise of the latent's shape, the next of the request's generators."""
        return self._source.draw(self.sampler.shape[1:], dtype)
