"""From what the user names to a Program that is ready to be lowered or searched: load, tabulate, trace, run passes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import dcc
from dcc.errors import UsageError
from dcc.frontend.load import LoadedModel, load_model
from dcc.frontend.lora import apply_lora
from dcc.frontend.samplers import sampler_table, with_timesteps_scaled
from dcc.frontend.trace import trace
from dcc.ir.program import Guidance, PassReport, Program, Role, Scope
from dcc.passes import ALWAYS, CUT, EXACT, Pass, run_passes
from dcc.runtime.plan import Plan

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 3.0
OPT_LEVELS = (0, 1, 2, 3)

Model = str | os.PathLike[str] | nn.Module | ExportedProgram
Clock = Callable[[str], AbstractContextManager[None]]


class StageClock:
    """Wall seconds of each stage, which is announced as it starts."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._name = ""
        self._start = 0.0

    def __call__(self, name: str) -> StageClock:
        self._name = name
        self._progress(name)
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._start, 3)


@dataclass(frozen=True)
class Source:
    """What is compiled and for which sampling loop: the arguments that `compile`, `search` and `calibrate` share.

    `sampler` is a name, a diffusers scheduler, its config or the config's path; by default the model's own, and
    `"none"` compiles for `denoise` alone. `guidance` is `cfg`, `none` or `auto`: cfg where the null condition is
    known.
    """

    model: Model
    example_inputs: Mapping[str, Tensor] | None = None
    roles: Mapping[str, str] | None = None
    arch: str | None = None
    sampler: Any = None
    steps: int | None = None
    sampler_options: Mapping[str, Any] | None = None
    guidance: str = "auto"
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    lora: Sequence[tuple[str, float]] = ()
    max_batch: int = 64
    trust_pickle: bool = False

    def recipe(self) -> dict[str, Any]:
        """The arguments as plain data, for manifests and studies."""
        options = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in (self.sampler_options or {}).items()
        }
        return {
            "sampler_options": options, "lora": [list(item) for item in self.lora], "max_batch": self.max_batch,
            "arch": self.arch,
        }  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A Program after the passes, with the model that it was traced from."""

    source: Source
    loaded: LoadedModel
    program: Program

    def with_steps(self, steps: int) -> Prepared:
        """The same Program under another number of steps of its sampler."""
        source = replace(self.source, steps=steps)
        table = sampler_of(self.loaded, source.sampler, steps, dict(source.sampler_options or {}))
        program = replace(self.program, sampler=table, schedule=None, measurements=None)
        return Prepared(source, self.loaded, program)


def _no_clock(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def prepare(source: Source, opt_level: int = 1, clock: Clock = _no_clock) -> Prepared:
    """The Program of the source after the passes of the level. Raises a DccError of the stage that failed."""
    with clock("loading the model"):
        loaded = load_model(
            source.model, arch=source.arch, trust_pickle=source.trust_pickle,  # type: ignore[arg-type]
            example_inputs=source.example_inputs, roles=source.roles,
        )  # fmt: skip
    with clock("tabulating the sampler"):
        table = sampler_of(loaded, source.sampler, source.steps, dict(source.sampler_options or {}))
    guide = guidance_of(loaded, source.guidance, source.guidance_scale)
    with clock("tracing"):
        program = trace(
            loaded.module, loaded.example_inputs, loaded.roles, name=loaded.name, nulls=loaded.nulls,
            ranges=loaded.ranges, guidance=guide, unbatched=loaded.unbatched,
            rows=source.max_batch * (2 if guide.mode == "cfg" else 1),
        )  # fmt: skip
    program.sampler, program.source = table, loaded.source
    with clock("running passes"):
        _fold_lora(program, source.lora)
        run_passes(program, pipeline(opt_level))
    return Prepared(source, loaded, program)


def pipeline(opt_level: int) -> tuple[Pass, ...]:
    """The passes of an optimisation level, in order, ending with the cut."""
    return (*ALWAYS, *EXACT, CUT) if opt_level else (*ALWAYS, _StayInStep(), CUT)


@dataclass(frozen=True)
class _StayInStep:
    """`-O0`: every computation happens in the step."""

    name: str = "stay-in-step"

    def apply(self, program: Program) -> PassReport:
        program.scopes = {
            node: Scope.STEP for node in program.graph.nodes if node.op in ("call_function", "placeholder", "get_attr")
        }
        return PassReport(self.name, "applied", "-O0: nothing is hoisted")


def sampler_of(loaded: LoadedModel, sampler: Any, steps: int | None, options: dict[str, Any]) -> Any:
    if isinstance(sampler, str) and sampler.lower() == "none":
        return None
    if sampler is None:
        if loaded.sampler_config is None:
            if steps is not None or options:
                raise UsageError("steps without a sampler", next="name one with --sampler (dcc samplers lists them)")
            return None
        sampler = loaded.sampler_config
    named = isinstance(sampler, str) and not Path(sampler).exists()
    config = loaded.sampler_config if named else None
    table = sampler_table(sampler, steps=DEFAULT_STEPS if steps is None else steps, config=config, **options)
    return with_timesteps_scaled(table, loaded.timestep_scale)


def guidance_of(loaded: LoadedModel, mode: str, scale: float) -> Guidance:
    conditions = [name for name, role in loaded.roles.items() if role == Role.CONDITION]
    if mode == "auto":
        mode = "cfg" if conditions and all(name in loaded.nulls for name in conditions) else "none"
    if mode == "cfg" and not conditions:
        raise UsageError("guidance needs a condition to leave out", got="a model without conditions")
    if mode == "none":
        return Guidance()
    return Guidance("cfg", float(scale), loaded.latent_channels if loaded.learned_variance else None)


def _fold_lora(program: Program, lora: Sequence[tuple[str, float]]) -> None:
    if not lora:
        program.reports.append(PassReport("fold-lora", "declined", "no adapter was given"))
    for file, scale in lora:
        report = apply_lora(program.weights, file, scale)
        figures = {"file": str(file), "scale": scale, "modules": len(report.modules)}
        why = f"{len(report.modules)} weights changed by {Path(file).name} at scale {scale}"
        program.reports.append(PassReport("fold-lora", "applied", why, figures))


def manifest_of(program: Program, plan: Plan, digest: str, target: str, recipe: dict[str, Any]) -> dict[str, Any]:
    import onnx
    import onnxruntime

    guidance = program.guidance
    return {
        "name": program.name,
        "program_hash": digest,
        "target": target,
        "plan": plan,
        "layers": [],
        "sampler": None if program.sampler is None else program.sampler.to_json(),
        "guidance": {"mode": guidance.mode, "scale": guidance.scale, "channels": guidance.channels},
        "report": {"passes": [asdict(report) for report in program.reports]},
        "recipe": recipe,
        "tools": {
            "dcc": dcc.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
