"""From named weights to a module: which architecture, its configuration, and whether the weights fit it.

The architecture is what `--arch` says, else what the file says, else what the key names and shapes of the
original DiT release show.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import LoadError
from dcc.frontend.checkpoints import Checkpoint
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.families import BATCH, FAMILIES, Adapter, family_of

# Hidden size, depth and heads of the released sizes.
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
HEADS_BY_WIDTH = {width: heads for width, _, heads in SIZES.values()}
PRESETS = {f"dit-{size}/{patch}": (size, patch) for size in SIZES for patch in (2, 4, 8)}
LISTED = 5


@dataclass(frozen=True)
class Facts:
    """What is known of a module without being told: example inputs, null classes, rows of embeddings."""

    example_inputs: dict[str, Tensor]
    nulls: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    # Inputs to leave out where the caller gives some and not these.
    optional: tuple[str, ...] = ()
    timestep_scale: float = 1.0


def facts_of(module: nn.Module) -> Facts | None:
    """The facts of a DiT and of a known diffusers family; None for any other module."""
    if isinstance(module, DiT):
        size, classes = module.config.input_size, module.config.num_classes
        noise = torch.randn(
            BATCH, module.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
        )
        inputs = {"x": noise, "t": torch.tensor([500.0, 20.0]), "y": torch.tensor([0, classes])}
        return Facts(inputs, {"y": classes}, {"y": (0, classes)})
    family = family_of(module)
    if family is None or not isinstance(module, Adapter):
        return None
    config: Mapping[str, Any] = getattr(module.transformer, "config")  # noqa: B009 - diffusers types it as unknown
    nulls = family.null_classes(config)
    ranges = {name: (0, null) for name, null in nulls.items()}
    return Facts(family.inputs(config), dict(nulls), ranges, family.optional, family.timestep_scale)


def build(checkpoint: Checkpoint, arch: str | None, where: Path) -> nn.Module:
    """The module with the checkpoint's weights: eval, float32, no gradients.

    Raises LoadError where the architecture is unknown, its configuration is wrong or the weights do not fit.
    """
    name, values = parse_arch(arch) if arch is not None else (_arch_of(checkpoint, where), {})
    if name in FAMILIES:
        config = {**(checkpoint.config or {}), "_class_name": name, **values}
        module = _empty_diffusers(name, config, where)
        fill(module, checkpoint.state, where, name)
        return FAMILIES[name].adapter(module).eval()
    shape = _dit_config(checkpoint, name, values, where)
    with torch.device("meta"):
        dit = DiT(shape)
    fill(dit, checkpoint.state, where, name)
    return dit


def parse_arch(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME[:key=value,...]` as the architecture's own spelling and its values (JSON, else text)."""
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise LoadError(
                f"cannot read --arch {text!r}",
                got=repr(item),
                want="key=value",
                next="--arch dit:num_heads=4,depth=8",
            )
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    return _known_name(name.strip()), values


def _known_name(name: str) -> str:
    known = ["dit", *PRESETS, *FAMILIES]
    for candidate in known:
        if candidate.lower() == name.lower():
            return candidate
    near = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=3, cutoff=0.4)
    spelled = {item.lower(): item for item in known}
    raise LoadError(
        f"unknown architecture '{name}'",
        want=", ".join(spelled[item] for item in near) if near else ", ".join(["dit", "dit-xl/2", *FAMILIES]),
        next="--arch one of these, or give the model as package.module:factory",
    )


def _arch_of(checkpoint: Checkpoint, where: Path) -> str:
    if checkpoint.arch is not None:
        return _known_name(checkpoint.arch)
    if _looks_like_dit(checkpoint.state):
        return "dit"
    raise LoadError(
        "the architecture is not recognised from the weights' names", at=where,
        got="keys " + _listed(checkpoint.state),
        want="a stored 'arch' and 'config', or the names of the DiT release",
        next="--arch NAME (dit, dit-xl/2, " + ", ".join(FAMILIES) + "), or give package.module:factory",
    )  # fmt: skip


def _looks_like_dit(state: Mapping[str, Tensor]) -> bool:
    # Names that other releases do not have together.
    needed = (
        "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "pos_embed",
        "blocks.0.adaLN_modulation.1.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight",
        "final_layer.linear.weight",
    )  # fmt: skip
    return all(key in state for key in needed)


def _recognised(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What names and shapes tell of a DiT: all but the number of heads, which the released widths imply."""
    if not _looks_like_dit(state):
        return {}
    patches = state["x_embedder.proj.weight"]
    if patches.dim() != 4 or state["pos_embed"].dim() != 3 or state["final_layer.linear.weight"].dim() != 2:
        return {}
    width, channels, patch = (int(size) for size in patches.shape[:3])
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    found = {
        "input_size": patch * round(state["pos_embed"].shape[1] ** 0.5),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * channels,
    }
    if width in HEADS_BY_WIDTH:
        found["num_heads"] = HEADS_BY_WIDTH[width]
    return found


def _dit_config(checkpoint: Checkpoint, name: str, given: Mapping[str, Any], where: Path) -> DiTConfig:
    stored = checkpoint.config or {}
    if checkpoint.arch is None:
        # A config beside the weights that does not name dit may hold other things too (image size, training).
        stored = {
            key: value for key, value in stored.items() if key in {item.name for item in fields(DiTConfig)}
        }
    values = {**_recognised(checkpoint.state), **stored}
    if name in PRESETS:
        size, patch = PRESETS[name]
        width, depth, heads = SIZES[size]
        values |= {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    values |= given
    if "num_heads" not in values and "hidden_size" in values:
        raise LoadError(
            "the number of attention heads cannot be read from the weights", at=where,
            got=f"hidden size {values['hidden_size']}",
            want="a released width (" + ", ".join(map(str, HEADS_BY_WIDTH)) + "), or the number",
            next="--arch dit:num_heads=4",
        )  # fmt: skip
    return _checked_dit_config(values, where)


def _checked_dit_config(values: Mapping[str, Any], where: Path) -> DiTConfig:
    known = {item.name: type(item.default) for item in fields(DiTConfig)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise LoadError(
                f"dit has no setting '{key}'", at=where, want=near[0] if near else ", ".join(known),
                next="--arch dit:key=value",
            )  # fmt: skip
        wanted = (int, float) if known[key] is float else known[key]
        positive = isinstance(value, bool) or (isinstance(value, (int, float)) and value > 0)
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool) or not positive:
            raise LoadError(
                f"dit's '{key}' has a wrong value", at=where, got=repr(value)[:80],
                want=f"a {'' if wanted is bool else 'positive '}{known[key].__name__}",
                next=f"--arch dit:{key}=...",
            )  # fmt: skip
    config = DiTConfig(**values)
    for whole, part in (("hidden_size", "num_heads"), ("input_size", "patch_size")):
        if getattr(config, whole) % getattr(config, part):
            raise LoadError(
                f"dit's {whole} must be a multiple of {part}", at=where,
                got=f"{getattr(config, whole)} and {getattr(config, part)}", next=f"--arch dit:{part}=...",
            )  # fmt: skip
    return config


def _empty_diffusers(name: str, config: Mapping[str, Any], where: Path) -> nn.Module:
    """The transformer with its parameters on the meta device and its constant buffers real."""
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise LoadError(f"{name} needs diffusers", got=error, next="pip install 'dcc[diffusers]'") from error
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = getattr(diffusers, name).from_config(dict(config))
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, ZeroDivisionError) as error:
        raise LoadError(
            f"diffusers cannot build {name} from this config", at=where,
            got=f"{type(error).__name__}: {error}", next="check config.json",
        ) from error  # fmt: skip
    return module


def fill(module: nn.Module, state: Mapping[str, Tensor], where: Path, name: str) -> None:
    """Put `state` into `module` as float32, without a copy where it is that already; eval, no gradients."""
    expected = module.state_dict()
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [key for key in state if key not in expected and not any(re.search(p, key) for p in patterns)]
    missing = [key for key in expected if key not in state]
    shaped = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    if extra or missing or shaped:
        raise _misfit(name, where, expected, state, (missing, extra, shaped))
    tensors = {key: state[key].float() if state[key].is_floating_point() else state[key] for key in expected}
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def _misfit(
    name: str,
    where: Path,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    keys: tuple[list[str], list[str], list[str]],
) -> LoadError:
    missing, extra, shaped = keys
    counts = zip((missing, extra, shaped), ("missing", "unexpected", "mis-shaped"), strict=True)
    got = [f"unexpected {_listed(extra, state)}"] if extra else []
    got += [f"shapes {_listed(shaped, state)}"] if shaped else []
    want = [f"missing {_listed(missing, expected)}"] if missing else []
    want += [f"shapes {_listed(shaped, expected)}"] if shaped else []
    return LoadError(
        f"the weights do not fit '{name}': "
        + ", ".join(f"{len(found)} {kind}" for found, kind in counts if found)
        + " of "
        + f"{len(expected)} tensors",
        at=where,
        got="; ".join(got) or None,
        want="; ".join(want) or None,
        next=f"correct the stored config, or say it: --arch {name}:key=value,...",
    )


def require_finite(state: Mapping[str, Tensor], where: object) -> None:
    """Raise LoadError if any weight is NaN or infinite."""
    broken = [
        key for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]  # fmt: skip
    if broken:
        raise LoadError(
            f"{len(broken)} of {len(state)} weight tensors hold NaN or infinite values", at=where,
            got=_listed(broken, state), want="finite weights",
            next="export the checkpoint again from a healthy step",
        )  # fmt: skip


def _listed(keys: Iterable[str], shapes: Mapping[str, Tensor] | None = None) -> str:
    """The first five names, with shapes, and how many more there are."""
    names = list(keys)
    shown = [f"{key} {list(shapes[key].shape)}" if shapes is not None else key for key in names[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
