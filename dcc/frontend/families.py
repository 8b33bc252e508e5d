"""The diffusers families that load without being told more: their forward arguments and their example sizes.

An adapter calls one diffusers transformer with `return_dict=False` and returns its tensor; its own signature
holds the tensors alone, so that an exported program has named inputs and nothing else. The transformer sits
under the attribute `transformer`, which is also the prefix of diffusers' LoRA files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import LoadError

Config = Mapping[str, Any]
BATCH = 2


class Adapter(nn.Module):
    """A diffusers transformer behind a forward of tensors only."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer


class DiTAdapter(Adapter):
    """hidden_states: [B, C, H, W]; timestep, class_labels: [B]."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels, return_dict=False)[0]


class PixArtAdapter(Adapter):
    """encoder_hidden_states: [B, L, D]; encoder_attention_mask: [B, L], 1 keeps.

    resolution: [B, 2]; aspect_ratio: [B, 1]; both only where the config has additional conditions.
    """

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]


class SD3Adapter(Adapter):
    """encoder_hidden_states: [B, L, D]; pooled_projections: [B, P]."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]


class FluxAdapter(Adapter):
    """hidden_states: [B, T, C] packed 2x2; img_ids: [T, 3]; txt_ids: [L, 3]; timestep in 0..1."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )[0]


class WanAdapter(Adapter):
    """hidden_states: [B, C, F, H, W]; encoder_hidden_states: [B, L, D]."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.transformer(
            hidden_states, timestep=timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False
        )[0]


def _noise(*shape: int) -> Tensor:
    """Standard normal values that are the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _dit_inputs(config: Config) -> dict[str, Tensor]:
    size = config["sample_size"]
    return {
        "hidden_states": _noise(BATCH, config["in_channels"], size, size),
        "timestep": torch.tensor([500.0, 20.0]),
        "class_labels": torch.tensor([0, config["num_embeds_ada_norm"]]),
    }


def _pixart_inputs(config: Config) -> dict[str, Tensor]:
    size = config["sample_size"]
    # PixArt-alpha was trained with 120 caption tokens, sigma with 300; only alpha conditions on the size.
    additional = config.get("use_additional_conditions")
    additional = size == 128 if additional is None else additional
    tokens = 120 if additional or size < 128 else 300
    width = config.get("caption_channels") or config["cross_attention_dim"]
    inputs = {
        "hidden_states": _noise(BATCH, config["in_channels"], size, size),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": _noise(BATCH, tokens, width),
        "encoder_attention_mask": torch.ones(BATCH, tokens),
    }
    if additional:
        inputs["resolution"] = torch.full((BATCH, 2), 8.0 * size)
        inputs["aspect_ratio"] = torch.ones(BATCH, 1)
    return inputs


def _sd3_inputs(config: Config) -> dict[str, Tensor]:
    size = config["sample_size"]
    return {
        "hidden_states": _noise(BATCH, config["in_channels"], size, size),
        "timestep": torch.tensor([500.0, 20.0]),
        # 77 CLIP tokens and 256 T5 tokens, as the pipeline joins them.
        "encoder_hidden_states": _noise(BATCH, 333, config["joint_attention_dim"]),
        "pooled_projections": _noise(BATCH, config["pooled_projection_dim"]),
    }


def flux_image_ids(height: int, width: int) -> Tensor:
    """[height * width, 3]: zero, row, column of each packed token, as the pipeline numbers them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, 3)


def _flux_inputs(config: Config) -> dict[str, Tensor]:
    """1024 x 1024 pixels and 512 text tokens, the sizes that the model was released for."""
    inputs = {
        "hidden_states": _noise(BATCH, 64 * 64, config["in_channels"]),
        "timestep": torch.tensor([0.5, 0.02]),
        "encoder_hidden_states": _noise(BATCH, 512, config["joint_attention_dim"]),
        "pooled_projections": _noise(BATCH, config["pooled_projection_dim"]),
        "img_ids": flux_image_ids(64, 64),
        "txt_ids": torch.zeros(512, 3),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((BATCH,), 3.5)
    return inputs


def _wan_inputs(config: Config) -> dict[str, Tensor]:
    """832 x 480 pixels, 81 frames, 512 text tokens, the sizes that the model was released for."""
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise LoadError(
            "the image-to-video variant of WanTransformer3DModel is not a known family",
            got=f"image_dim={config.get('image_dim')}",
            want="a text-to-video transformer",
            next="wrap the model in a factory and give package.module:factory",
        )
    return {
        "hidden_states": _noise(BATCH, config["in_channels"], 21, 60, 104),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": _noise(BATCH, 512, config["text_dim"]),
    }


def _dit_classes(config: Config) -> dict[str, int]:
    return {"class_labels": int(config["num_embeds_ada_norm"])}


def _no_classes(config: Config) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Family:
    """How one diffusers class is called and what its example inputs are."""

    adapter: type[Adapter]
    inputs: Callable[[Config], dict[str, Tensor]]
    # Null class by argument: the embedding's last row.
    null_classes: Callable[[Config], dict[str, int]] = field(default=_no_classes)
    # Inputs that the model also runs without, differently.
    optional: tuple[str, ...] = ()
    # What the family's pipeline multiplies the scheduler's timesteps by.
    timestep_scale: float = 1.0


FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(DiTAdapter, _dit_inputs, _dit_classes),
    "PixArtTransformer2DModel": Family(PixArtAdapter, _pixart_inputs, optional=("encoder_attention_mask",)),
    "SD3Transformer2DModel": Family(SD3Adapter, _sd3_inputs),
    "FluxTransformer2DModel": Family(FluxAdapter, _flux_inputs, timestep_scale=1e-3),
    "WanTransformer3DModel": Family(WanAdapter, _wan_inputs),
}


def family_of(module: nn.Module) -> Family | None:
    """The family of a diffusers transformer or of an adapter around one; None for any other module."""
    inner = module.transformer if isinstance(module, Adapter) else module
    return FAMILIES.get(type(inner).__name__) if type(inner).__module__.startswith("diffusers.") else None
