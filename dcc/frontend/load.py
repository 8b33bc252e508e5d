"""Any form of a trained denoiser turned into a `LoadedModel`: a module, example inputs and what they mean.

Nothing is fetched from the network, and no code that a file carries is run unless the caller trusts it. A
caller's module is never changed: one that is not in eval mode and float32 is copied.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dcc.errors import LoadError
from dcc.frontend import checkpoints
from dcc.frontend.architectures import Facts, build, facts_of, require_finite
from dcc.frontend.checkpoints import Checkpoint, fingerprint
from dcc.frontend.exported import argument_names, example_of, output_shape, read_exported
from dcc.frontend.factories import call_factory, is_factory
from dcc.frontend.families import BATCH, FAMILIES, Adapter, family_of
from dcc.frontend.roles import LATENT, UNBATCHED, infer_roles

Module = nn.Module | ExportedProgram
FORMS = ".pt, .pth, .safetensors, a diffusers folder, .pt2, or package.module:factory"


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser ready to be traced: eval, float32, finite weights."""

    module: Module
    name: str
    # Keyword arguments of forward, batch 2; `unbatched` names those without a batch dimension.
    example_inputs: dict[str, Tensor]
    roles: dict[str, str]
    nulls: dict[str, float] = field(default_factory=dict)
    # Rows of the embedding that an integer condition indexes, both ends included.
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    sampler_config: dict[str, Any] | None = None
    learned_variance: bool = False
    latent_channels: int = 0
    source: str = ""
    parameters: int = 0
    unbatched: tuple[str, ...] = ()
    # The denoiser is given the scheduler's timestep times this (FLUX counts from 0 to 1).
    timestep_scale: float = 1.0


@dataclass(frozen=True)
class _Draft:
    """What a source gave, before anything is inferred."""

    module: Module
    name: str
    at: str
    files: tuple[Path, ...] = ()
    sampler_config: dict[str, Any] | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"{self.at} sha256:{fingerprint(self.files)}" if self.files else self.at


def load_model(
    source: str | Path | Module,
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    example_inputs: Mapping[str, Tensor] | None = None,
    roles: Mapping[str, str] | None = None,
) -> LoadedModel:
    """The denoiser in `source`, whatever its form; `example_inputs` and `roles` win over what is inferred.

    Raises LoadError for everything that is wrong with the source.
    """
    draft = _open(source, arch, trust_pickle)
    module = _settled(draft.module, draft.at)
    facts = _facts(module)
    stated = draft.stated
    given = {**(stated.get("example_inputs") or {}), **(example_inputs or {})}
    inputs = _joined(facts, given)
    _check_inputs(inputs, module, draft.at)
    assigned = infer_roles(list(inputs), {**(stated.get("roles") or {}), **(roles or {})})
    latent = next(name for name, role in assigned.items() if role == LATENT)
    unbatched = _without_batch(inputs, latent, stated.get("unbatched") or ())
    inputs = _batched(inputs, latent, unbatched, fixed=isinstance(module, ExportedProgram))
    channels, learned = _channels(module, inputs, latent, known=bool(facts.example_inputs) and not given)
    return LoadedModel(
        module=module,
        name=str(stated.get("name") or draft.name),
        example_inputs=inputs,
        roles=assigned,
        nulls={**facts.nulls, **(stated.get("nulls") or {})},
        ranges={**facts.ranges, **(stated.get("ranges") or {})},
        sampler_config=stated.get("sampler_config") or draft.sampler_config,
        learned_variance=bool(stated.get("learned_variance", learned)),
        latent_channels=int(stated.get("latent_channels") or channels),
        source=str(stated.get("source") or draft.source),
        parameters=sum(value.numel() for value in module.parameters()),
        unbatched=unbatched,
        timestep_scale=float(stated.get("timestep_scale", facts.timestep_scale)),
    )


def _facts(module: Module) -> Facts:
    if isinstance(module, ExportedProgram):
        return Facts(example_of(module))
    return facts_of(module) or Facts({})


def _open(source: str | Path | Module, arch: str | None, trust_pickle: bool) -> _Draft:
    if isinstance(source, (nn.Module, ExportedProgram)):
        _no_arch(arch, "a module that is built already")
        inner = source.transformer if isinstance(source, Adapter) else source
        name = type(inner).__name__ if isinstance(inner, nn.Module) else "exported"
        return _Draft(source, _identifier(name), f"{type(inner).__module__}.{type(inner).__qualname__}")
    if isinstance(source, str) and is_factory(source):
        _no_arch(arch, "a factory")
        values = call_factory(source)
        known = {item.name for item in dataclasses.fields(LoadedModel)}
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise LoadError(
                f"the factory returned an unknown field '{unknown[0]}'",
                at=source,
                want=", ".join(sorted(known)),
            )
        return _Draft(values["module"], _identifier(source.rpartition(":")[2]), source, stated=values)
    if not isinstance(source, (str, Path)):
        raise LoadError(
            f"a {type(source).__name__} is not a model", want=f"a torch module, an ExportedProgram, {FORMS}",
            next="give its denoiser, for a diffusers pipeline pipe.transformer",
        )  # fmt: skip
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, arch)
    return _open_file(path, arch, trust_pickle)


def _open_file(path: Path, arch: str | None, trust_pickle: bool) -> _Draft:
    checkpoints.require_file(path)
    name = _identifier(path.name.removesuffix(checkpoints.INDEX_SUFFIX).removesuffix(path.suffix))
    read: Checkpoint | nn.Module | ExportedProgram
    if path.name.endswith(checkpoints.INDEX_SUFFIX):
        read = checkpoints.read_sharded(path)
    elif path.suffix == ".safetensors":
        read = checkpoints.read_safetensors(path)
    elif path.suffix == ".pt2":
        read = read_exported(path, trust_pickle=trust_pickle)
    elif path.suffix in checkpoints.TORCH_SUFFIXES:
        read = checkpoints.read_torch(path, trust_pickle=trust_pickle)
    else:
        raise LoadError(
            "unknown kind of file",
            at=path,
            got=f"suffix '{path.suffix}'",
            want=FORMS,
            next="rename or convert it",
        )
    if isinstance(read, Checkpoint):
        return _Draft(build(read, arch, path), name, str(path), read.files, read.sampler)
    _no_arch(arch, "a file that holds a whole module")
    return _Draft(read, name, str(path), (path,))


def _open_folder(folder: Path, arch: str | None) -> _Draft:
    """A diffusers pipeline (transformer and scheduler) or one transformer with its config.json."""
    inner, sampler = folder, None
    if (folder / "model_index.json").is_file():
        index = checkpoints.read_json(folder / "model_index.json")
        experts = [key for key in index if key.startswith("transformer_")]
        if "transformer" not in index or experts:
            raise LoadError(
                "the pipeline is not made of one transformer", at=folder,
                got=", ".join(key for key in index if not key.startswith("_")), want="one 'transformer'",
                next="give the folder of one transformer",
            )  # fmt: skip
        inner = folder / "transformer"
        scheduler = folder / "scheduler" / "scheduler_config.json"
        sampler = checkpoints.read_json(scheduler) if scheduler.is_file() else None
    config = inner / "config.json"
    if not config.is_file():
        raise LoadError(
            "the folder holds no model config", at=folder,
            want=f"model_index.json, or {config.name} with _class_name",
            next="give a diffusers pipeline, its transformer folder, or a weight file",
        )  # fmt: skip
    class_name = checkpoints.read_json(config).get("_class_name")
    if arch is None and class_name is not None and class_name not in FAMILIES:
        raise LoadError(
            f"'{class_name}' is not a known diffusers family", at=config, want=", ".join(FAMILIES),
            next="give the model as package.module:factory with example inputs",
        )  # fmt: skip
    read = checkpoints.read_folder(inner)
    name = folder.resolve().parent.name if folder.resolve().name == "transformer" else folder.resolve().name
    module = build(read, arch, inner)
    return _Draft(module, _identifier(name), str(folder), (config, *read.files), sampler or read.sampler)


def _no_arch(arch: str | None, what: str) -> None:
    if arch is not None:
        raise LoadError(
            f"--arch does not apply to {what}", got=arch, want="a state dict", next="leave it out"
        )


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower() or "model"


def _settled(module: Module, at: str) -> Module:
    """In eval mode and float32, a known diffusers model behind its adapter, its weights finite."""
    state = module.state_dict if isinstance(module, ExportedProgram) else module.state_dict()
    require_finite(state, at)
    other = [
        key for key, value in state.items() if value.is_floating_point() and value.dtype != torch.float32
    ]
    if isinstance(module, ExportedProgram):
        if other:
            raise LoadError(
                "the exported program is not float32", at=at, got=f"{other[0]} {state[other[0]].dtype}",
                next="export model.float()",
            )  # fmt: skip
        return module
    if other or any(part.training for part in module.modules()):
        module = copy.deepcopy(module).float().eval()
    family = family_of(module)
    return module if family is None or isinstance(module, Adapter) else family.adapter(module).eval()


def _arguments(module: Module) -> tuple[list[str], list[str]]:
    """All names that forward takes, and those that it needs; (["*"], []) where any name is taken."""
    if isinstance(module, ExportedProgram):
        names = argument_names(module)
        return names, names
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        return ["*"], []
    named = [item for item in parameters if item.kind is not item.VAR_POSITIONAL]
    return [item.name for item in named], [item.name for item in named if item.default is item.empty]


def _inputs_needed(module: Module, at: str) -> LoadError:
    names, needed = _arguments(module)
    shown = ", ".join(f"{name}: ..." for name in needed or names)
    return LoadError(
        "example inputs are needed: the model is of no known family", at=at,
        got=f"forward({', '.join(names)})", want="one tensor per argument, batch 2",
        next=f"example_inputs={{{shown}}}, or a factory that returns (module, example_inputs)",
    )  # fmt: skip


def _joined(facts: Facts, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left_out = facts.optional if given else ()
    return {name: value for name, value in facts.example_inputs.items() if name not in left_out} | dict(given)


def _check_inputs(inputs: Mapping[str, Any], module: Module, at: str) -> None:
    if not inputs:
        raise _inputs_needed(module, at)
    names, needed = _arguments(module)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise LoadError(
                f"example input '{name}' is not a tensor", got=type(value).__name__, next="give a tensor"
            )
        if names != ["*"] and name not in names:
            raise LoadError(
                f"forward has no argument '{name}'", want=", ".join(names), next="name one of these"
            )
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise LoadError(
            "example inputs are missing", got=", ".join(inputs), want=", ".join(missing),
            next="give a tensor for every argument without a default",
        )  # fmt: skip


def _without_batch(inputs: Mapping[str, Tensor], latent: str, stated: Sequence[str]) -> tuple[str, ...]:
    rows = inputs[latent].shape[:1]
    return tuple(
        name for name, value in inputs.items()
        if name in stated or name in UNBATCHED or (name != latent and value.shape[:1] != rows)
    )  # fmt: skip


def _batched(
    inputs: Mapping[str, Tensor], latent: str, unbatched: Sequence[str], *, fixed: bool
) -> dict[str, Tensor]:
    """Float inputs in float32, batch 2: a batch of one would be fixed to one by the exporter."""
    result = {}
    if inputs[latent].dim() < 2:
        raise LoadError(
            f"the latent '{latent}' has no batch and channels", got=f"shape {list(inputs[latent].shape)}",
            want="[2, ...]", next="give the example with its batch dimension",
        )  # fmt: skip
    for name, value in inputs.items():
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        if not fixed and name not in unbatched:
            value = value.repeat(BATCH, *[1] * (value.dim() - 1)) if value.shape[0] == 1 else value[:BATCH]
        result[name] = value
    return result


def _channels(module: Module, inputs: Mapping[str, Tensor], latent: str, *, known: bool) -> tuple[int, bool]:
    """Channels of the latent, and whether the output has twice as many (the second half is the variance)."""
    # [B, T, C] token sequences have channels last; images and videos second.
    axis = 2 if inputs[latent].dim() == 3 else 1
    channels = inputs[latent].shape[axis]
    if isinstance(module, ExportedProgram):
        shape = output_shape(module)
    elif known and isinstance(module, Adapter):
        config: Mapping[str, Any] = getattr(module.transformer, "config")  # noqa: B009 - diffusers types it as unknown
        return channels, config.get("out_channels") == 2 * channels
    elif known:
        return channels, getattr(module, "out_channels", channels) == 2 * channels
    else:
        shape = _run_once(module, inputs)
    return channels, len(shape) == inputs[latent].dim() and shape[axis] == 2 * channels


def _run_once(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[int | None]:
    """Sizes of what the module returns for its example inputs, which shows that they are right."""
    try:
        with torch.no_grad():
            output = module(**inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise LoadError(
            "forward fails on the example inputs", at=type(module).__name__,
            got=f"{type(error).__name__}: {str(error)[:200]}", want=f"a tensor from {shapes}",
            next="correct the example inputs; all are passed by keyword",
        ) from error  # fmt: skip
    if not isinstance(output, Tensor):
        raise LoadError(
            "forward must return one tensor", at=type(module).__name__, got=type(output).__name__,
            next="wrap the model so that its forward returns the prediction alone",
        )  # fmt: skip
    return list(output.shape)
