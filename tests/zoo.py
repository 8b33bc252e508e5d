"""Tiny random models for the whole test-suite; parameters that start at zero are random, no branch is zero.

Each function returns a `ZooModel`, which unpacks into (module, example_inputs, roles). Modules are in eval
mode, inputs are float32 (classes int64) with batch 2, and equal arguments give equal values in every process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcc.frontend.dit import Attention, DiT, DiTConfig, Mlp, PatchEmbed, TimestepEmbedder, modulate
from dcc.frontend.families import (
    DiTAdapter,
    FluxAdapter,
    PixArtAdapter,
    SD3Adapter,
    WanAdapter,
    flux_image_ids,
)

BATCH = 2


class ZooModel(NamedTuple):
    module: nn.Module
    example_inputs: dict[str, Tensor]
    roles: dict[str, str]


def randomise_constants(module: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Add noise to every parameter whose values are all equal (zero gates and biases, unit norm weights)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module that `make` returns, the same for a seed whatever was drawn before; no branch is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    return randomise_constants(module, seed).eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timesteps() -> Tensor:
    return torch.tensor([700.0, 31.0])


def roles_of(inputs: dict[str, Tensor], latent: str, timestep: str) -> dict[str, str]:
    return {name: {latent: "latent", timestep: "timestep"}.get(name, "condition") for name in inputs}


def dit(depth: int = 3, learn_sigma: bool = False, width: int = 32) -> ZooModel:
    """Our DiT: class-conditional, adaLN-zero."""
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=3, hidden_size=width, depth=depth, num_heads=4,
        num_classes=10, learn_sigma=learn_sigma,
    )  # fmt: skip
    inputs = {"x": normal(BATCH, 3, 8, 8), "t": timesteps(), "y": torch.tensor([3, 10])}
    return ZooModel(build(lambda: DiT(config)), inputs, roles_of(inputs, "x", "t"))


def diffusers_dit(depth: int = 2) -> ZooModel:
    """The DiT of diffusers with learned variance, as DiT-XL/2 has it; each block embeds the timestep."""
    from diffusers import DiTTransformer2DModel

    def make() -> nn.Module:
        return DiTAdapter(
            DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=depth,
                sample_size=8, patch_size=2, num_embeds_ada_norm=10,
            )
        )  # fmt: skip

    inputs = {
        "hidden_states": normal(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "class_labels": torch.tensor([3, 10]),
    }
    return ZooModel(build(make), inputs, roles_of(inputs, "hidden_states", "timestep"))


def pixart(
    depth: int = 3, additional_conditions: bool = True, mask: bool = False, tokens: int = 6
) -> ZooModel:
    """PixArt: cross-attention without a gate; with `mask`, the text's padding mask is an input as well."""
    from diffusers import PixArtTransformer2DModel

    def make() -> nn.Module:
        return PixArtAdapter(
            PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=depth,
                cross_attention_dim=48, sample_size=8, patch_size=2, caption_channels=20,
                use_additional_conditions=additional_conditions,
            )
        )  # fmt: skip

    inputs = {
        "hidden_states": normal(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": normal(BATCH, tokens, 20, seed=2),
    }
    if mask:
        kept = torch.tensor([[tokens], [tokens // 2]])
        inputs["encoder_attention_mask"] = (torch.arange(tokens)[None] < kept).float()
    if additional_conditions:
        inputs["resolution"] = torch.tensor([[64.0, 64.0], [96.0, 48.0]])
        inputs["aspect_ratio"] = torch.tensor([[1.0], [2.0]])
    return ZooModel(build(make), inputs, roles_of(inputs, "hidden_states", "timestep"))


def sd3(depth: int = 3, dual: tuple[int, ...] = (), qk_norm: str | None = None) -> ZooModel:
    """SD3: joint attention; the last block does not update the text."""
    from diffusers import SD3Transformer2DModel

    def make() -> nn.Module:
        return SD3Adapter(
            SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth,
                attention_head_dim=8, num_attention_heads=4, joint_attention_dim=20,
                caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=8,
                dual_attention_layers=dual, qk_norm=qk_norm,
            )
        )  # fmt: skip

    inputs = {
        "hidden_states": normal(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": normal(BATCH, 6, 20, seed=2),
        "pooled_projections": normal(BATCH, 24, seed=3),
    }
    return ZooModel(build(make), inputs, roles_of(inputs, "hidden_states", "timestep"))


def sd35(depth: int = 3) -> ZooModel:
    """SD3.5: RMS-normalised queries and keys; the first two blocks attend a second time to the same input."""
    return sd3(depth, dual=(0, 1), qk_norm="rms_norm")


def flux(depth: int = 2, single_depth: int = 2, guidance: bool = True) -> ZooModel:
    """FLUX: double and single blocks, rotary positions from ids that have no batch dimension."""
    from diffusers import FluxTransformer2DModel

    def make() -> nn.Module:
        return FluxAdapter(
            FluxTransformer2DModel(
                in_channels=16, num_layers=depth, num_single_layers=single_depth, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=20, pooled_projection_dim=24,
                guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
            )
        )  # fmt: skip

    inputs = {
        "hidden_states": normal(BATCH, 16, 16),
        "timestep": timesteps() / 1000,
        "encoder_hidden_states": normal(BATCH, 6, 20, seed=2),
        "pooled_projections": normal(BATCH, 24, seed=3),
        "img_ids": flux_image_ids(4, 4),
        "txt_ids": torch.zeros(6, 3),
    }
    if guidance:
        inputs["guidance"] = torch.tensor([3.5, 1.5])
    return ZooModel(build(make), inputs, roles_of(inputs, "hidden_states", "timestep"))


def wan(depth: int = 2) -> ZooModel:
    """Wan text-to-video: 3-D patches, rotary positions, cross-attention without a gate."""
    from diffusers import WanTransformer3DModel

    def make() -> nn.Module:
        return WanAdapter(
            WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20,
                freq_dim=32, ffn_dim=64, num_layers=depth, rope_max_seq_len=16,
            )
        )  # fmt: skip

    inputs = {
        "hidden_states": normal(BATCH, 4, 3, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": normal(BATCH, 6, 20, seed=2),
    }
    return ZooModel(build(make), inputs, roles_of(inputs, "hidden_states", "timestep"))


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; a block of the second half first joins its input with a long skip."""

    def __init__(self, width: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """After Bao et al. 2023 (arXiv:2209.12152): time and class are tokens, long skips join the two halves."""

    def __init__(
        self, width: int, heads: int, half: int, size: int, patch: int, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.grid, self.patch, self.channels = size // patch, patch, channels
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.time_embed = TimestepEmbedder(width, frequencies=32)
        self.label_embed = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + self.grid**2, width) * 0.02)
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, skip=False) for _ in range(half))
        self.mid_block = UViTBlock(width, heads, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, patch * patch * channels)
        self.final_layer = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch = x.shape[0]
        tokens = [self.time_embed(t).unsqueeze(1), self.label_embed(y).unsqueeze(1), self.patch_embed(x)]
        h = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        h = self.decoder(self.norm(h))[:, 2:]
        grid, patch, channels = self.grid, self.patch, self.channels
        h = h.reshape(batch, grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(h.reshape(batch, channels, grid * patch, grid * patch))


def uvit(half: int = 2) -> ZooModel:
    """A U-ViT of `2 * half + 1` blocks: nothing is modulated, so almost everything depends on the latent."""
    inputs = {"x": normal(BATCH, 3, 8, 8), "t": timesteps(), "y": torch.tensor([3, 10])}
    module = build(lambda: UViT(width=32, heads=4, half=half, size=8, patch=2, channels=3, classes=10))
    return ZooModel(module, inputs, roles_of(inputs, "x", "t"))


class EasyControlBlock(nn.Module):
    """Joint attention over [image; condition] rows under a mask; each half has its own modulation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, rows: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, width = rows.shape
        qkv = self.qkv(rows).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))

    def forward(
        self, image: Tensor, condition: Tensor, c: Tensor, c_zero: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        image_mod = self.adaLN_modulation(c).chunk(6, dim=1)
        condition_mod = self.adaLN_modulation(c_zero).chunk(6, dim=1)
        rows = torch.cat(
            [
                modulate(self.norm1(image), image_mod[0], image_mod[1]),
                modulate(self.norm1(condition), condition_mod[0], condition_mod[1]),
            ],
            dim=1,
        )
        mixed = self.attention(rows, mask)
        image_rows, condition_rows = mixed.split([image.shape[1], condition.shape[1]], dim=1)
        image = image + image_mod[2].unsqueeze(1) * image_rows
        condition = condition + condition_mod[2].unsqueeze(1) * condition_rows
        return self.feed_forward(image, image_mod), self.feed_forward(condition, condition_mod)

    def feed_forward(self, x: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        return x + mod[5].unsqueeze(1) * self.mlp(modulate(self.norm2(x), mod[3], mod[4]))


class EasyControl(nn.Module):
    """After EasyControl (arXiv:2503.07027): condition rows see only themselves and the timestep 0.

    So their keys and values are equal at every step, though one `cat` per block mixes them with the image's.
    """

    def __init__(self, width: int, depth: int, heads: int, tokens: int, patch: int, channels: int) -> None:
        super().__init__()
        self.grid = math.isqrt(tokens)
        if self.grid**2 != tokens:
            raise ValueError(f"tokens must be a square, got {tokens}")
        self.patch, self.channels = patch, channels
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.condition_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = TimestepEmbedder(width, frequencies=64)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(EasyControlBlock(width, heads) for _ in range(depth))
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, patch * patch * channels)
        mask = torch.ones(2 * tokens, 2 * tokens, dtype=torch.bool)
        mask[tokens:, :tokens] = False
        self.register_buffer("mask", mask)
        self.register_buffer("zero_timestep", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        batch = x.shape[0]
        image = self.x_embedder(x) + self.pos_embed
        reference = self.condition_embedder(condition) + self.pos_embed
        c, c_zero = self.t_embedder(t), self.t_embedder(self.zero_timestep)
        for block in self.blocks:
            image, reference = block(image, reference, c, c_zero, self.mask)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        y = self.linear(modulate(self.norm_final(image), shift, scale))
        grid, patch, channels = self.grid, self.patch, self.channels
        y = y.reshape(batch, grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(batch, channels, grid * patch, grid * patch)


def easycontrol(
    width: int = 32, depth: int = 3, heads: int = 4, tokens: int = 16, channels: int = 4
) -> ZooModel:
    """As many condition tokens as image tokens: half of the step's work is the same at every step."""
    size = 2 * math.isqrt(tokens)
    inputs = {
        "x": normal(BATCH, channels, size, size),
        "t": timesteps(),
        "condition": normal(BATCH, channels, size, size, seed=2),
    }
    module = build(lambda: EasyControl(width, depth, heads, tokens, patch=2, channels=channels))
    return ZooModel(module, inputs, roles_of(inputs, "x", "t"))


MODELS: dict[str, Callable[[], ZooModel]] = {
    "dit": dit,
    "diffusers_dit": diffusers_dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd35": sd35,
    "flux": flux,
    "wan": wan,
    "uvit": uvit,
    "easycontrol": easycontrol,
}
