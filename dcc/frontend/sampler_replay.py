"""A diffusers scheduler run with noise from outside, and compared with its table.

`Source` holds a configured scheduler; `replay_error` runs it beside a table over the whole loop. Noise
reaches the scheduler by replacing `randn_tensor` in the modules that define its class, for the length of one
call.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import torch

from dcc.errors import SamplerError
from dcc.runtime.noise import Generator
from dcc.runtime.sampler import Array, Sampler, SamplerTable

REPLAY_TOLERANCE = 1e-4
REPLAY_SHAPE = (2, 3, 4, 4)
# What diffusers raises on arguments that it does not accept.
REFUSALS = (
    ValueError, TypeError, AssertionError, NotImplementedError, LookupError, ArithmeticError, ImportError,
    AttributeError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A configured scheduler and what to give its `set_timesteps` and `step`; copied, never changed."""

    scheduler: Any
    name: str
    steps: int
    timestep_options: dict[str, Any] = field(default_factory=dict)
    step_options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return type(self.scheduler).__name__

    @property
    def clip(self) -> float | None:
        config = self.scheduler.config
        return float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None

    @property
    def variance(self) -> str | None:
        return {"learned_range": "range", "learned": "direct"}.get(str(self.scheduler.config.get("variance_type")))

    @property
    def plain(self) -> bool:
        """Neither a clip nor a learned variance is asked for: one linear fit, noise included, is enough."""
        return self.clip is None and self.variance is None

    def refuse(self, what: str, **details: object) -> NoReturn:
        details.setdefault("next", "dcc.frontend.samplers.list_samplers() names the samplers that work")
        raise SamplerError(f"{self.kind} {what}", at=f"sampler {self.name!r}, {self.steps} steps", **details)

    def prepare(self) -> Any:
        """Return a copy of the scheduler that is ready for its first call."""
        scheduler = copy.deepcopy(self.scheduler)
        given = {"timesteps", "sigmas"} & set(self.timestep_options)
        steps = {} if given else {"num_inference_steps": self.steps}
        try:
            scheduler.set_timesteps(**steps, **self.timestep_options)
        except REFUSALS as error:
            self.refuse(
                "refuses these steps", got=error, want="steps that it accepts",
                next="change the steps, or give the option that it names",
            )  # fmt: skip
        calls = len(scheduler.timesteps)
        # Heun calls twice a step; PNDM once or nine times more than it has steps.
        if given and calls not in (self.steps, 2 * self.steps - 1, self.steps + 1, self.steps + 9):
            self.refuse("makes another number of steps of these", got=f"{calls} calls", want=f"{self.steps} steps")
        return scheduler


@dataclass
class Draws:
    """Stands in for `randn_tensor`: hands out prepared noise and counts what was asked for."""

    noise: Array
    count: int = 0
    dtype: torch.dtype | None = None

    def __call__(self, shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Any:
        self.count += 1
        self.dtype = dtype or torch.float32
        return torch.from_numpy(self.noise).reshape(tuple(shape)).to(self.dtype, copy=True)


def replay_error(source: Source, table: SamplerTable) -> float:
    """Run scheduler and table side by side on a nonlinear toy denoiser, with the same noise.

    Returns the largest difference after any call, relative to the latent's largest value (at least 1).
    """
    scheduler = source.prepare()
    dtype = getattr(torch, table.dtype)
    initial, draws = Generator(0), Generator(1)
    sampler = Sampler(table, REPLAY_SHAPE)
    start = initial.randn(REPLAY_SHAPE)
    sampler.start(start)
    sample = torch.from_numpy(start).to(dtype) * table.init_sigma
    worst = 0.0
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scale_input(scheduler, sample, timestep)
        output = toy_denoiser(sampler.model_input(index), index, table.variance)
        reference = torch.from_numpy(toy_denoiser(scaled.numpy(), index, source.variance))
        noise = Draws(draws.randn(REPLAY_SHAPE))
        with patched_noise(scheduler, noise):
            sample = take_step(source, scheduler, reference, timestep, sample)
        served: list[None] = []
        latent = sampler.advance(index, output, partial(_serve, noise, served))
        if len(served) != noise.count:
            return float("inf")
        expected = sample.numpy()
        worst = max(worst, float(np.abs(latent - expected).max() / max(1.0, np.abs(expected).max())))
        if not np.isfinite(latent).all():
            return float("inf")
    return worst


def _serve(noise: Draws, served: list[None], _: str) -> Array:
    """The recorded draw, whatever dtype is asked for; `served` counts."""
    served.append(None)
    return noise.noise


def toy_denoiser(sample: Array, call: int, variance: str | None) -> Array:
    """A smooth, bounded, nonlinear denoiser, large enough that predictions of x0 are clipped often."""
    pattern = np.cos(np.arange(sample.size, dtype=sample.dtype)).reshape(sample.shape)
    output = 1.5 * np.tanh(0.9 * sample + 0.3 * pattern + 0.1 * np.sin(sample.dtype.type(call)))
    if variance is None:
        return np.asarray(output, sample.dtype)
    predicted = np.tanh(sample - pattern)
    if variance == "direct":
        predicted = 0.1 + np.square(predicted)  # away from 0, where the square root is steep
    return np.concatenate([output, predicted], axis=1).astype(sample.dtype)


@contextmanager
def patched_noise(scheduler: Any, draws: Draws) -> Iterator[None]:
    """Replace `randn_tensor` in the modules that define the scheduler's class, for the length of one call."""
    modules = {base.__module__ for base in type(scheduler).__mro__}
    targets = [name for name in sorted(modules) if hasattr(sys.modules[name], "randn_tensor")]
    patches = [patch(f"{name}.randn_tensor", draws) for name in targets]
    for entry in patches:
        entry.start()
    try:
        yield
    finally:
        for entry in patches:
            entry.stop()


def scale_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    if not hasattr(scheduler, "scale_model_input"):  # flow matching schedulers have none
        return sample
    return torch.as_tensor(scheduler.scale_model_input(sample, timestep))


def take_step(
    source: Source, scheduler: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> torch.Tensor:
    try:
        result = scheduler.step(output, timestep, sample, return_dict=False, **source.step_options)
    except REFUSALS as error:
        source.refuse("fails on plain random numbers", got=error, want="a step on any latent")
    return torch.as_tensor(result[0])
