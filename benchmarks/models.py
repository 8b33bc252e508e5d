"""Models for the benchmarks: random weights with open gates; nobody's quality is claimed on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import EasyControl, randomise_constants

from dcc.frontend.dit import DiT, DiTConfig


def dit_xl() -> dict[str, Any]:
    """DiT-XL/2 for a 32x32 latent: 675 M parameters."""
    with torch.device("meta"):
        module = DiT(DiTConfig())
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    inputs = {"x": torch.randn(2, 4, 32, 32), "t": torch.tensor([1.0, 999.0]), "y": torch.tensor([1, 2])}
    return {"module": module.eval(), "example_inputs": inputs, "nulls": {"y": 1000}, "ranges": {"y": (0, 1000)}}


def dit_s(depth: int = 12) -> dict[str, Any]:
    """DiT-S/2 for a 32x32 latent: 33 M parameters."""
    torch.manual_seed(0)
    module = randomise_constants(DiT(DiTConfig(depth=depth, hidden_size=384, num_heads=6))).eval()
    inputs = {"x": torch.randn(2, 4, 32, 32), "t": torch.tensor([1.0, 999.0]), "y": torch.tensor([1, 2])}
    return {"module": module, "example_inputs": inputs, "nulls": {"y": 1000}, "ranges": {"y": (0, 1000)}}


def pixart(width: int = 256, depth: int = 28) -> dict[str, Any]:
    """After PixArt-256: 28 blocks, 256 image tokens, 300 text tokens, at reduced width."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=width // 32, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=depth,
        cross_attention_dim=width, sample_size=32, patch_size=2, caption_channels=1024, use_additional_conditions=False,
    )  # fmt: skip
    module = _PixArt(randomise_constants(model)).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([1.0, 999.0]),
        "encoder_hidden_states": torch.randn(2, 300, 1024),
    }
    return {"module": module, "example_inputs": inputs}


class _PixArt(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        out = self.transformer(
            hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep, return_dict=False,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )  # fmt: skip
        result: torch.Tensor = out[0]
        return result


def easycontrol(width: int = 256, depth: int = 12, tokens: int = 256) -> dict[str, Any]:
    """After EasyControl: as many condition tokens as image tokens, isolated by a mask, one joint attention a block."""
    torch.manual_seed(0)
    module = EasyControl(width, depth, width // 32, tokens, patch=2, channels=4)
    size = 2 * int(tokens**0.5)
    inputs = {
        "x": torch.randn(2, 4, size, size),
        "t": torch.tensor([1.0, 999.0]),
        "condition": torch.randn(2, 4, size, size),
    }
    return {"module": randomise_constants(module).eval(), "example_inputs": inputs}
