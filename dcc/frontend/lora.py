"""A LoRA file folded into the weights: W + scale * (alpha / rank) * B @ A, which costs nothing at run time.

Reads the keys of diffusers (`transformer.<path>.lora_A.weight`), of PEFT (`base_model.model.<path>...`, with
its adapter_config.json beside the file or its metadata in it), and `lora_down` / `lora_up` with an `alpha`
per layer. Everything in the file is used or refused.

Numerics  the product and the sum are in float64 and rounded once.
Source    Hu et al. 2021, arXiv:2106.09685; rank-stabilised scale: Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import LoadError
from dcc.frontend.checkpoints import fingerprint, read_json, read_tensors

PART = r"lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up"
KEY = re.compile(rf"(?P<path>.+?)[._](?P<part>{PART})(\.\w+)?\.weight")
ALPHA = ".alpha"
DOWN = ("lora_A", "lora_down", "lora.down")
PREFIXES = (
    "base_model.model.",
    "transformer.",
    "diffusion_model.",
    "model.",
    "lora_transformer_",
    "lora_unet_",
)
LISTED = 5


@dataclass(frozen=True)
class LoraReport:
    """What was folded: rank by module, the strength, the file with its hash, weights changed."""

    modules: dict[str, int]
    scale: float
    source: str
    parameters: int


@dataclass(frozen=True)
class _Settings:
    """Alpha as PEFT's config states it; without a config alpha equals the rank."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def factor(self, path: str, rank: int) -> float:
        # PEFT matches a pattern against the end of the module's path.
        patterned = (
            value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", path)
        )
        alpha = next(patterned, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass
class _Pair:
    """The two halves for one module and its own alpha, with the keys that they came from."""

    keys: list[str] = field(default_factory=list)
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def apply_lora(target: nn.Module | MutableMapping[str, Tensor], file: str | Path, scale: float) -> LoraReport:
    """Fold `file` into the weights of `target` in place; nothing is changed if anything is wrong.

    Raises LoadError for keys without a module, half a pair, wrong shapes, DoRA, and non-finite values.
    """
    path = _adapter_file(Path(file))
    if not math.isfinite(scale):
        raise LoadError("the LoRA scale must be a finite number", at=path, got=scale, next="--lora file:1.0")
    tensors, metadata = read_tensors(path)
    settings = _settings(path, metadata)
    weights = _weights_of(target)
    pairs = _paired(tensors, weights, path)
    folded = {}
    for name, pair in pairs.items():
        folded[name] = _folded(name, pair, weights[f"{name}.weight"], settings, scale, path)
    for name, weight in folded.items():
        _store(target, f"{name}.weight", weight)
    ranks = {name: int(pair.down.shape[0]) for name, pair in pairs.items() if pair.down is not None}
    changed = sum(weight.numel() for weight in folded.values())
    return LoraReport(ranks, scale, f"{path} sha256:{fingerprint([path])}", changed)


def _adapter_file(path: Path) -> Path:
    """The weight file itself, or the one in a PEFT or diffusers folder."""
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if path.is_dir() and (path / name).is_file():
            return path / name
    if path.is_dir():
        raise LoadError(
            "the folder holds no LoRA", at=path, want="adapter_model.safetensors", next="name the file"
        )
    return path


def _settings(path: Path, metadata: Mapping[str, str]) -> _Settings:
    sibling = path.with_name("adapter_config.json")
    values: dict[str, Any] = {}
    if sibling.is_file():
        values = read_json(sibling)
    elif "lora_adapter_metadata" in metadata:
        # diffusers stores PEFT's config flat, each name behind the component's.
        try:
            stored = dict(json.loads(metadata["lora_adapter_metadata"]))
        except (ValueError, TypeError) as error:
            raise LoadError("the LoRA's metadata is not a JSON object", at=path, got=error) from error
        values = {key.removeprefix("transformer."): value for key, value in stored.items()}
    _refuse_other_methods(values, path)
    alpha = values.get("lora_alpha")
    pattern = {str(key): float(value) for key, value in (values.get("alpha_pattern") or {}).items()}
    return _Settings(None if alpha is None else float(alpha), pattern, bool(values.get("use_rslora")))


def _refuse_other_methods(values: Mapping[str, Any], path: Path) -> None:
    """Raise LoadError for adapters of PEFT's that are not W + B @ A over the given W."""
    found = [
        key for key in ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens") if values.get(key)
    ]
    start = str(values.get("init_lora_weights")).lower()
    # These starts change W as well when the adapter is attached.
    found += [
        f"init_lora_weights={start}"
        for name in ("pissa", "olora", "corda", "loftq")
        if start.startswith(name)
    ]
    kind = str(values.get("peft_type") or "LORA")
    found += [f"peft_type={kind}"] if kind != "LORA" else []
    if found:
        raise LoadError(
            "the adapter is not a plain LoRA", at=path, got=", ".join(found), want="W + scale * B @ A",
            next="merge it with PEFT and load the result",
        )  # fmt: skip


def _weights_of(target: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices and convolution kernels that an adapter can change."""
    if isinstance(target, nn.Module):
        layers = (
            (name, layer) for name, layer in target.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        )  # fmt: skip
        return {f"{name}.weight": layer.weight for name, layer in layers}
    return {key: value for key, value in target.items() if key.endswith(".weight") and value.dim() in (2, 4)}


def _paired(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> dict[str, _Pair]:
    known = {key.removesuffix(".weight") for key in weights}
    flattened = {name.replace(".", "_"): name for name in known}
    pairs: dict[str, _Pair] = {}
    unmatched = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        written = match["path"] if match else key.removesuffix(ALPHA) if key.endswith(ALPHA) else None
        name = None if written is None else _module_named(written, known, flattened)
        if name is None:
            unmatched.append(key)
            continue
        pair = pairs.setdefault(name, _Pair())
        pair.keys.append(key)
        if match is None:
            pair.alpha = float(tensor)
        elif match["part"] in DOWN:
            pair.down = tensor
        else:
            pair.up = tensor
    if unmatched or not pairs:
        raise LoadError(
            f"{len(unmatched)} of {len(tensors)} LoRA tensors match no linear layer of the model", at=path,
            got=_listed(unmatched),
            want="a path such as " + min(known, default="none: the model has no linear layer"),
            next="use a LoRA that was trained for this transformer, without text encoders",
        )  # fmt: skip
    halves = [key for pair in pairs.values() if pair.down is None or pair.up is None for key in pair.keys]
    if halves:
        raise LoadError(
            "half of a LoRA pair is missing", at=path, got=_listed(halves), want="both A and B for each",
            next="export the LoRA again",
        )  # fmt: skip
    return pairs


def _module_named(written: str, known: set[str], flattened: Mapping[str, str]) -> str | None:
    """The module that a path in the file means: trainers put different prefixes before it."""
    candidates = [written]
    while candidates:
        path = candidates.pop()
        for name in (path, f"transformer.{path}"):
            if name in known:
                return name
            # Kohya's files write every dot of a path as an underscore.
            if "." not in path and name.replace(".", "_") in flattened:
                return flattened[name.replace(".", "_")]
        candidates += [path.removeprefix(prefix) for prefix in PREFIXES if path.startswith(prefix)]
    return None


def _folded(name: str, pair: _Pair, weight: Tensor, settings: _Settings, scale: float, path: Path) -> Tensor:
    assert pair.down is not None and pair.up is not None
    down, up = pair.down.double().flatten(1), pair.up.double().flatten(1)
    rank = down.shape[0]
    fits = up.shape[1] == rank and up.shape[0] == weight.shape[0] and down.shape[1] == weight[0].numel()
    if not fits or pair.down.dim() < 2:
        raise LoadError(
            f"the LoRA of '{name}' has the wrong shape", at=path,
            got=f"A {list(pair.down.shape)}, B {list(pair.up.shape)}",
            want=f"for a weight {list(weight.shape)}",
            next="use a LoRA that was trained for this model",
        )  # fmt: skip
    # A file's own alpha wins over the config, as in every trainer that writes one.
    own = None if pair.alpha is None else _Settings(pair.alpha, rank_stabilised=settings.rank_stabilised)
    factor = (own or settings).factor(name.removeprefix("transformer."), rank)
    result = weight.detach().double() + scale * factor * (up @ down).reshape(weight.shape)
    if not bool(torch.isfinite(result).all()):
        raise LoadError(f"the LoRA of '{name}' is not finite", at=path, next="train or export it again")
    return result.to(weight.dtype)


def _store(target: nn.Module | MutableMapping[str, Tensor], key: str, weight: Tensor) -> None:
    if isinstance(target, nn.Module):
        # A new tensor: the old one may be mapped to the checkpoint's file.
        target.get_parameter(key).data = weight
    else:
        target[key] = weight


def _listed(keys: Iterable[str]) -> str:
    names = list(keys)
    return (", ".join(names[:LISTED]) or "none") + (
        f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    )
