"""The model that an artifact was compiled from, run in plain PyTorch with its diffusers scheduler.

The reference of `dcc verify` and the baseline of `dcc bench`; nothing here shares code with the runtime's loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dcc.errors import UsageError
from dcc.frontend import samplers
from dcc.frontend.load import LoadedModel, load_model
from dcc.frontend.lora import apply_lora
from dcc.frontend.roles import LATENT, TIMESTEP
from dcc.frontend.sampler_probe import probe
from dcc.frontend.sampler_replay import Source, scale_input

Forward = Callable[[dict[str, Tensor]], Tensor]
Told = Callable[[int], None]


@dataclass(frozen=True)
class Original:
    """A loaded model, the module that its forward is, and its scheduler (None: it can only denoise)."""

    loaded: LoadedModel
    module: nn.Module
    sampler: Source | None

    @property
    def latent(self) -> str:
        return next(name for name, role in self.loaded.roles.items() if role == LATENT)

    @property
    def timestep(self) -> str:
        return next(name for name, role in self.loaded.roles.items() if role == TIMESTEP)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            output = self.module(**inputs)
        assert isinstance(output, Tensor)
        return output

    def timesteps(self, value: float, rows: int) -> Tensor:
        """The timestep input with the scheduler's `value` in every row, as the denoiser counts."""
        example = self.loaded.example_inputs[self.timestep]
        shape = example.shape if self.timestep in self.loaded.unbatched else (rows, *example.shape[1:])
        return torch.full(shape, value * self.loaded.timestep_scale, dtype=example.dtype)

    def sample(
        self, request: Request, *, forward: Forward | None = None, calls: int | None = None, told: Told = lambda _: None
    ) -> Tensor:
        """The whole loop, as a diffusers pipeline writes it; `calls` ends it early, `forward` replaces the module."""
        if self.sampler is None:
            raise UsageError("the artifact was compiled without a sampler", next="dcc compile --sampler NAME")
        with samplers._quiet():
            scheduler = self.sampler.prepare()
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
            shape = (1, *self.loaded.example_inputs[self.latent].shape[1:])
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
            latent = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
            options: dict[str, Any] = {**self.sampler.step_options, "return_dict": False}
            if "generator" in inspect.signature(scheduler.step).parameters:
                options["generator"] = generators
            for call, timestep in enumerate(scheduler.timesteps[:calls]):
                model_input = scale_input(scheduler, latent, timestep).to(torch.float32)
                output = self.predict(request, model_input, float(timestep), forward or self.forward)
                latent = scheduler.step(output, timestep, latent, **options)[0]
                told(call)
        return latent

    def predict(self, request: Request, latent: Tensor, timestep: float, forward: Forward) -> Tensor:
        """The guided prediction: both halves in one batch, mixed on the channels that are predicted."""
        if request.scale == 1.0:
            times = self.timesteps(timestep, len(latent))
            return self._for_scheduler(forward({**request.conditions, self.latent: latent, self.timestep: times}))
        both = {
            name: value if name in self.loaded.unbatched else torch.cat([value, request.negatives[name]])
            for name, value in request.conditions.items()
        }
        both |= {self.latent: torch.cat([latent, latent]), self.timestep: self.timesteps(timestep, 2 * len(latent))}
        wanted, null = forward(both).chunk(2)
        channels = self.loaded.latent_channels if self.loaded.learned_variance else wanted.shape[1]
        mixed = null[:, :channels] + request.scale * (wanted[:, :channels] - null[:, :channels])
        return self._for_scheduler(torch.cat([mixed, wanted[:, channels:]], dim=1))

    def _for_scheduler(self, output: Tensor) -> Tensor:
        """Without the predicted variance, where the scheduler has no use for it."""
        assert self.sampler is not None
        ignored = self.loaded.learned_variance and self.sampler.variance is None
        return output[:, : self.loaded.latent_channels] if ignored else output


@dataclass(frozen=True)
class Request:
    """What a generation is asked for, as tensors: one row an image, one seed an image."""

    conditions: dict[str, Tensor]
    negatives: dict[str, Tensor]
    seeds: tuple[int, ...]
    scale: float


def open_original(
    manifest: Mapping[str, Any], model: str, *, arch: str | None = None, roles: Mapping[str, str] | None = None,
    trust_pickle: bool = False, sampler: str | None = None, sampler_options: Mapping[str, Any] | None = None,
) -> Original:  # fmt: skip
    """The model at `model` with the LoRAs and the scheduler that the artifact of this manifest was compiled with.

    Raises UsageError where the scheduler that is found does not have the artifact's table.
    """
    loaded = load_model(model, arch=arch, trust_pickle=trust_pickle, roles=roles)
    module = loaded.module.module() if isinstance(loaded.module, ExportedProgram) else loaded.module
    adapters = (manifest["recipe"] or {}).get("lora") or []
    if adapters:
        module = copy.deepcopy(module)
        for file, scale in adapters:
            apply_lora(module, file, float(scale))
    return Original(loaded, module, _scheduler(manifest, loaded, sampler, dict(sampler_options or {})))


def _scheduler(
    manifest: Mapping[str, Any], loaded: LoadedModel, sampler: str | None, options: dict[str, Any]
) -> Source | None:
    """By the name in the artifact and the model's own configuration, or as said; its table must be the artifact's."""
    table = manifest["sampler"]
    if table is None:
        return None
    recipe = manifest["recipe"] or {}
    options = options or dict(recipe.get("sampler_options") or {})
    source: object = sampler or table["name"]
    config = loaded.sampler_config
    if source == (config or {}).get("_class_name"):
        source, config = config, None
    elif sampler is not None and samplers._named(sampler) is None:
        config = None
    diffusers = samplers._import_diffusers()
    with samplers._quiet():
        found = samplers._find(diffusers, source, int(table["steps"]), config, options)
        probed = samplers.with_timesteps_scaled(probe(found, table["dtype"]), loaded.timestep_scale)
        if not _same_table(probed.to_json(), table):
            raise UsageError(
                "the artifact's sampler cannot be rebuilt from its name and the model's configuration",
                got=f"another table for {table['name']}, {table['steps']} steps",
                next="give --sampler and --sampler-option as they were given to dcc compile",
            )
    return found


def _same_table(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Equal up to what another version of torch rounds otherwise."""
    plain = ("scheduler", "prediction", "steps", "registers", "variance")
    if any(one[key] != other[key] for key in plain) or len(one["calls"]) != len(other["calls"]):
        return False
    if (one["clip"] is None) != (other["clip"] is None):
        return False
    return all(
        a["draws"] == b["draws"] and (a["convert"] is None) == (b["convert"] is None)
        and np.allclose(_numbers(a), _numbers(b), rtol=1e-6, atol=1e-7)
        for a, b in zip(one["calls"], other["calls"], strict=True)
    )  # fmt: skip


def _numbers(call: Mapping[str, Any]) -> list[float]:
    matrix = [value for row in call["matrix"] for value in row]
    return [call["timestep"], call["input_scale"], *(call["convert"] or ()), *(call["variance"] or ()), *matrix]


def request_for(
    original: Original, values: Mapping[str, Any], negatives: Mapping[str, Any], seeds: Sequence[int], scale: float
) -> Request:
    """Arrays as tensors in the dtypes of the model's inputs; negatives get one row an image."""
    examples = original.loaded.example_inputs
    conditions = {name: torch.from_numpy(np.array(value)).to(examples[name].dtype) for name, value in values.items()}
    others = {}
    for name, value in conditions.items():
        other = torch.as_tensor(np.array(negatives[name])).to(value.dtype) if name in negatives else value
        others[name] = other.expand(value.shape)
    return Request(conditions, others, tuple(seeds), scale)
