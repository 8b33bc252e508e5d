"""Classifier-free guidance: which halves of the batch a sampler call runs, and how they are mixed.

The conditional half comes first. `u + s (c - u)` equals `c + (s - 1) d` with the difference `d = c - u`, which is what
a call without the unconditional half takes from earlier calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dcc.runtime.plan import Call, CallGuidance
from dcc.runtime.workspace import Workspace

Array = np.ndarray[Any, np.dtype[Any]]
BOTH = CallGuidance("both", ())


class Halves:
    """Runs the calls of one request of `count` images; the latents of the first half are in the workspace."""

    def __init__(self, space: Workspace, count: int, scale: float, channels: int | None) -> None:
        self._space, self.count, self._channels = space, count, channels
        self._scale = np.float32(scale)
        plan = space.plan
        self._order = plan.order
        self.guided = space.rows > count
        # May be replaced while weights are fitted.
        self.modes = list(plan.guidance if self.guided and plan.guidance else (BOTH,) * len(plan.order))
        self._latent = next(space.inputs[item.name] for item in plan.inputs if item.role == "latent")
        # Differences that later calls read, in turn; as many as any call looks back.
        depth = max((len(mode.weights) for mode in self.modes), default=0)
        shape = (count, *space.output.shape[1:])
        self._ring = [np.empty(shape, space.output.dtype)[:, :channels] for _ in range(depth)]
        self._term: Array = np.empty_like(self._ring[0]) if depth else np.empty(0)
        # How many guided calls there were so far.
        self.known = 0

    def run(self, call: int, told: Callable[[Call], None] | None = None) -> Array:
        """The guided output of a sampler call, `[count, ...]`: valid until the next."""
        mode, count = self.modes[call], self.count
        if self._space.rows == count:
            return self._space.step(call, self._order[call], None, told)
        if mode.mode == "both":
            np.copyto(self._latent[count:], self._latent[:count])
            return self._mix(self._space.step(call, self._order[call], None, told))
        output = self._space.step(call, self._order[call], count, told)
        if mode.mode == "reuse":
            self._add_difference(output[:, : self._channels], mode.weights)
        return output

    def _mix(self, output: Array) -> Array:
        """`u + s (c - u)` on the predicted channels, in place of the conditional half; the rest is its own."""
        count = self.count
        wanted, null = output[:count, : self._channels], output[count:, : self._channels]
        np.subtract(wanted, null, out=wanted)
        if self._ring:
            np.copyto(self._ring[self.known % len(self._ring)], wanted)
            self.known += 1
        np.multiply(wanted, self._scale, out=wanted)
        np.add(wanted, null, out=wanted)
        return output[:count]

    def _add_difference(self, wanted: Array, weights: tuple[float, ...]) -> None:
        for back, weight in enumerate(weights, start=1):
            difference = self._ring[(self.known - back) % len(self._ring)]
            np.multiply(difference, np.float32(weight) * (self._scale - np.float32(1)), out=self._term)
            np.add(wanted, self._term, out=wanted)
