"""Samplers by name, by scheduler or by configuration, compiled to tables.

`sampler_table` finds a diffusers scheduler, configures it, and has `sampler_probe` turn it into numbers.
diffusers is an extra and is imported only there; the table needs neither diffusers nor torch.

Named samplers have linear betas 1e-4 to 0.02 over 1000 training steps, and diffusers' defaults otherwise (so
"ddim" and "ddpm" clip the predicted x0 to 1 unless told `clip_sample=False`). A checkpoint's own
configuration replaces those.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcc.errors import SamplerError, UsageError
from dcc.runtime.sampler import DTYPES, MAXIMUM_CALLS, SamplerTable

if TYPE_CHECKING:
    from dcc.frontend.sampler_replay import Source

MAXIMUM_CONFIG_BYTES = 1 << 20
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# Given by the loop itself, never by a caller.
RESERVED = {
    "self",
    "num_inference_steps",
    "device",
    "model_output",
    "timestep",
    "sample",
    "generator",
    "return_dict",
}


@dataclass(frozen=True)
class NamedSampler:
    """A name that `sampler_table` takes, the diffusers scheduler behind it and what is set on it."""

    name: str
    scheduler: str
    summary: str
    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
SAMPLERS = (
    NamedSampler("ddim", "DDIMScheduler", "deterministic; eta= adds noise"),
    NamedSampler("ddpm", "DDPMScheduler", "ancestral; learned variance with variance_type="),
    NamedSampler("euler", "EulerDiscreteScheduler", "first order in sigma"),
    NamedSampler("euler-karras", "EulerDiscreteScheduler", "the same on Karras sigmas", KARRAS),
    NamedSampler("euler-a", "EulerAncestralDiscreteScheduler", "Euler with fresh noise", {}, ("euler-ancestral",)),
    NamedSampler(
        "flow-euler",
        FLOW_EULER,
        "rectified flow; shift= or mu=",
        {},
        ("flow", "flow-match-euler", "rectified-flow"),
    ),
    NamedSampler("flow-euler-sde", FLOW_EULER, "rectified flow with fresh noise", {"stochastic_sampling": True}),
    NamedSampler("flow-heun", "FlowMatchHeunDiscreteScheduler", "rectified flow, second order, two calls a step"),
    NamedSampler("flow-lcm", "FlowMatchLCMScheduler", "rectified flow, consistency models"),
    NamedSampler("flow-dpm++2m", DPM, "rectified flow, second order, one call a step", FLOW),
    NamedSampler("flow-unipc", UNIPC, "rectified flow, predictor and corrector", FLOW),
    NamedSampler("dpm++2m", DPM, "second order multistep", {}, ("dpm++", "dpm-solver++", "dpmsolver++")),
    NamedSampler("dpm++2m-karras", DPM, "the same on Karras sigmas", KARRAS),
    NamedSampler("dpm++2m-sde", DPM, "the same with fresh noise", SDE, ("dpm++sde", "dpm++2m-sde++")),
    NamedSampler("dpm++2m-sde-karras", DPM, "with fresh noise on Karras sigmas", {**SDE, **KARRAS}),
    NamedSampler("dpm++3m", DPM, "third order multistep", {"solver_order": 3}),
    NamedSampler("dpm++3m-sde", DPM, "third order with fresh noise", {"solver_order": 3, **SDE}),
    NamedSampler("dpm++2s", "DPMSolverSinglestepScheduler", "second order singlestep", {"lower_order_final": True}),
    NamedSampler("unipc", UNIPC, "predictor and corrector", {}, ("uni-pc",)),
    NamedSampler("deis", "DEISMultistepScheduler", "exponential integrator, second order"),
    NamedSampler("heun", "HeunDiscreteScheduler", "second order, two calls a step"),
    NamedSampler("kdpm2", "KDPM2DiscreteScheduler", "second order, two calls a step", {}, ("dpm2",)),
    NamedSampler(
        "kdpm2-a",
        "KDPM2AncestralDiscreteScheduler",
        "the same with fresh noise",
        {},
        ("dpm2-a", "kdpm2-ancestral"),
    ),
    NamedSampler("lcm", "LCMScheduler", "latent consistency models, few steps"),
    NamedSampler("tcd", "TCDScheduler", "trajectory consistency models, few steps; eta="),
    NamedSampler("pndm", "PNDMScheduler", "linear multistep after a Runge-Kutta start, nine more calls"),
    NamedSampler("plms", "PNDMScheduler", "linear multistep, one more call", {"skip_prk_steps": True}),
    NamedSampler("ipndm", "IPNDMScheduler", "improved PNDM on its own schedule"),
    NamedSampler("sa-solver", "SASolverScheduler", "stochastic Adams", {}, ("sasolver",)),
    NamedSampler("edm-euler", "EDMEulerScheduler", "EDM preconditioning, first order"),
    NamedSampler("edm-dpm++2m", "EDMDPMSolverMultistepScheduler", "EDM preconditioning, second order"),
    NamedSampler(
        "unclip", "UnCLIPScheduler", "the ancestral sampler of UnCLIP", {"beta_schedule": "squaredcos_cap_v2"}
    ),
)


def list_samplers() -> tuple[NamedSampler, ...]:
    """Return the samplers known by name, without importing diffusers."""
    return SAMPLERS


def sampler_table(
    source: object,
    *,
    steps: int,
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    **options: Any,
) -> SamplerTable:
    """Compile a sampler to a table that reproduced the original's whole loop.

    Reproduced is: to 1e-4 of the latent's size in `dtype`, or to 1e-6 in float64.

    `source` is a name of `list_samplers()`, a diffusers scheduler or the name of its class, a configuration
    with `_class_name`, or the path of a scheduler_config.json or of a folder with one. `config` is a
    checkpoint's configuration under a named sampler: it fixes betas and prediction type, the name the method.
    `options` are arguments of the scheduler's constructor, of `set_timesteps` (`mu`, `sigmas`, `timesteps`)
    or of `step` (`eta`).

    Raises UsageError for steps or options that do not exist, SamplerError for anything that is no table.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAXIMUM_CALLS // 2:
        raise UsageError("steps is out of range", got=repr(steps), want=f"an integer from 1 to {MAXIMUM_CALLS // 2}")
    if dtype not in DTYPES:
        raise UsageError("a sampler of this dtype does not exist", got=dtype, want=" or ".join(DTYPES))
    diffusers = _import_diffusers()
    from dcc.frontend.sampler_probe import probe

    with _quiet():
        return probe(_find(diffusers, source, steps, config, options), dtype)


def with_timesteps_scaled(table: SamplerTable, factor: float) -> SamplerTable:
    """The table with every timestep that the denoiser is given multiplied by `factor`."""
    if factor == 1.0:
        return table
    return replace(table, calls=tuple(replace(call, timestep=call.timestep * factor) for call in table.calls))


def _import_diffusers() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise SamplerError(
            "samplers are compiled from diffusers' schedulers, and diffusers cannot be imported", got=error,
            want="diffusers 0.42 or later, at compile time only", next="pip install 'dcc[diffusers]'",
        ) from error  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers warns about each default that it corrects, at each of several copies; errors still show."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Schedulers give tensors to numpy, whose newer protocol torch does not speak yet.
            warnings.filterwarnings("ignore", "__array_", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _find(
    diffusers: Any, source: object, steps: int, config: Mapping[str, Any] | None, options: dict[str, Any]
) -> Source:
    """Resolve `source` to a configured scheduler; options go to whichever of its functions takes them."""
    if isinstance(source, str | Path):
        named = _named(str(source))
        if named is not None:
            return _from_name(diffusers, named, steps, config, options)
        if str(source).endswith("Scheduler"):
            kind = _scheduler_class(diffusers, str(source))
            return _source(kind, dict(config or {}), str(source), steps, options)
        source = _read_config(Path(source), _known_classes(diffusers))
    if config is not None:
        raise UsageError(
            "config goes with a sampler's name", got=type(source).__name__, want="a name such as 'ddim'",
            next="give one of the two",
        )  # fmt: skip
    if isinstance(source, Mapping):
        if not isinstance(source.get("_class_name"), str):
            raise SamplerError(
                "the configuration does not say which scheduler it is for", got=sorted(map(str, source))[:8],
                want="a field _class_name, such as 'DDIMScheduler'",
                next="add it, or give a name and this configuration as config=",
            )  # fmt: skip
        name = source["_class_name"]
        return _source(_scheduler_class(diffusers, name), dict(source), name, steps, options)
    return _from_object(source, steps, options)


def _from_name(
    diffusers: Any, named: NamedSampler, steps: int, config: Mapping[str, Any] | None, options: dict[str, Any]
) -> Source:
    """Configure a named sampler: defaults or the checkpoint's values, then the name's own, then options."""
    kind = _scheduler_class(diffusers, named.scheduler)
    base = dict(BETAS if config is None else config)
    if config is not None and _is_flow(config) != named.name.startswith("flow-"):
        flow = _is_flow(config)
        raise SamplerError(
            f"sampler {named.name!r} does not fit a model trained {'as a flow' if flow else 'by diffusion'}",
            got=f"a configuration of {config.get('_class_name', 'diffusion')}",
            want=", ".join(entry.name for entry in SAMPLERS if entry.name.startswith("flow-") == flow),
            next="take one of these",
        )  # fmt: skip
    if named.config.get("use_flow_sigmas") and "shift" in base:
        base["flow_shift"] = base["shift"]  # the same number has two names in diffusers
    return _source(kind, {**base, **named.config}, named.name, steps, options)


def _from_object(source: object, steps: int, options: dict[str, Any]) -> Source:
    from dcc.frontend.sampler_replay import Source

    kind = type(source)
    if not all(hasattr(source, name) for name in ("config", "set_timesteps", "step")):
        raise SamplerError(
            "this is not a sampler", got=kind.__name__,
            want="a name, a diffusers scheduler, its config or a path", next="list_samplers() has the names",
        )  # fmt: skip
    construct, timesteps, step = _route(kind, kind.__name__, options)
    config = dict(source.config)  # type: ignore[attr-defined]
    if construct or config.get("variance_type"):
        return _source(kind, config, kind.__name__, steps, options)
    return Source(copy.deepcopy(source), kind.__name__, steps, timesteps, step)


def _source(kind: Any, config: dict[str, Any], name: str, steps: int, options: dict[str, Any]) -> Source:
    """Build the scheduler from what its constructor takes of `config`; the rest is other schedulers'."""
    from dcc.frontend.sampler_replay import REFUSALS, Source

    construct, timesteps, step = _route(kind, name, options)
    accepted = _parameters(kind.__init__)
    chosen = {key: value for key, value in config.items() if key in accepted}
    if "algorithm_type" in accepted:
        # The DPM-Solver family never uses a predicted variance: it cuts the output to 3 channels. Here the
        # second half of the channels is ignored, whatever their number.
        chosen.pop("variance_type", None)
    try:
        scheduler = kind.from_config({**chosen, **construct})
    except REFUSALS as error:
        raise SamplerError(
            f"{kind.__name__} refuses this configuration", at=f"sampler {name!r}", got=error,
            want="values that diffusers accepts", next=f"correct {sorted({**chosen, **construct})}",
        ) from error  # fmt: skip
    return Source(scheduler, name, steps, timesteps, step)


def _route(kind: Any, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Divide options over the constructor, `set_timesteps` and `step`; one that none takes is an error."""
    targets = [_parameters(function) for function in (kind.__init__, kind.set_timesteps, kind.step)]
    routed: list[dict[str, Any]] = [{}, {}, {}]
    for option, value in options.items():
        for target, accepted in zip(routed, targets, strict=True):
            if option in accepted:
                target[option] = value
                break
        else:
            known = sorted(set().union(*targets))
            raise UsageError(
                f"sampler {name!r} has no option {option!r}", got=option,
                want=", ".join(difflib.get_close_matches(option, known, 3, 0.4) or known),
                next=f"the options are those of diffusers.{kind.__name__}",
            )  # fmt: skip
    return routed[0], routed[1], routed[2]


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - RESERVED - {"args", "kwargs"}


def _named(text: str) -> NamedSampler | None:
    """Find a sampler by name or alias, however it is spelt: `DPM++ 2M Karras` is dpm++2m-karras."""
    wanted = _normal(text)
    for entry in SAMPLERS:
        if wanted in map(_normal, (entry.name, *entry.aliases)):
            return entry
    return None


def _normal(text: str) -> str:
    plain = text.lower().replace("dpmpp", "dpm++")
    return "".join(letter for letter in plain if letter not in "-_ ")


def _is_flow(config: Mapping[str, Any]) -> bool:
    flow_class = str(config.get("_class_name", "")).startswith("FlowMatch")
    return flow_class or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def _scheduler_class(diffusers: Any, name: str) -> Any:
    known = _known_classes(diffusers)
    if name not in known:
        raise _unknown(name, known)
    try:
        kind = getattr(diffusers, name)
        usable = hasattr(kind, "set_timesteps") and hasattr(kind, "step")
    except ImportError as error:  # diffusers puts a placeholder where a package of its own is absent
        raise SamplerError(
            f"{name} needs a package that is absent", got=str(error).strip(),
            want="that package, at compile time",
            next="take a sampler of list_samplers()",
        ) from error  # fmt: skip
    if not usable:
        raise SamplerError(f"{name} has no single step function", got=name, want="set_timesteps() and step()")
    return kind


def _known_classes(diffusers: Any) -> list[str]:
    return [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]


def _unknown(name: str, classes: list[str]) -> SamplerError:
    names = [entry for named in SAMPLERS for entry in (named.name, *named.aliases)]
    near = difflib.get_close_matches(name, names + classes, 4, 0.4) or [named.name for named in SAMPLERS[:8]]
    return SamplerError(
        "no sampler has this name", got=repr(name[:200]), want=f"for example {', '.join(near)}",
        next="list_samplers() has all names; a diffusers scheduler or its configuration does as well",
    )  # fmt: skip


def _read_config(path: Path, known: list[str]) -> dict[str, Any]:
    """Read scheduler_config.json from a file, a scheduler's folder or a pipeline's folder."""
    for file in (path, path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"):
        if file.is_file():
            break
    else:
        if path.is_dir() or path.suffix == ".json":
            raise SamplerError(
                "no scheduler_config.json is here",
                at=path,
                got="no such file",
                want="a file or a folder that has one",
                next="correct the path, or take a name of list_samplers()",
            )
        raise _unknown(str(path), known)
    try:
        if file.stat().st_size > MAXIMUM_CONFIG_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SamplerError(
            "the scheduler's configuration is unreadable",
            at=file,
            got=error,
            want="UTF-8 JSON of at most 1 MiB",
        ) from error
    if not isinstance(config, dict):
        raise SamplerError(
            "the scheduler's configuration is no object",
            at=file,
            got=type(config).__name__,
            want="an object with _class_name",
        )
    return config
