"""`dcc.compile`: from a model to an artifact, every stage in order."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import dcc
from dcc.cost_model.targets import target_named
from dcc.errors import DccError, ExportError, UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.lower import GRANULARITIES, lower
from dcc.frontend.load import LoadedModel, load_model
from dcc.frontend.lora import apply_lora
from dcc.frontend.samplers import sampler_table, with_timesteps_scaled
from dcc.frontend.trace import trace
from dcc.ir.interpret import random_inputs, run_graph
from dcc.ir.program import Guidance, PassReport, Program, Role, Scope
from dcc.ir.text import program_text
from dcc.passes import ALWAYS, CUT, EXACT, Pass, run_passes
from dcc.quality import difference
from dcc.runtime.loaded import load
from dcc.runtime.plan import Plan
from dcc.tolerances import TOLERANCE

OPT_LEVELS = (0, 1)
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 3.0
LARGE_WEIGHTS = 1 << 30

Model = str | os.PathLike[str] | nn.Module | ExportedProgram
ProgressReport = Callable[[str], None]


@dataclass
class CompileReport:
    """What was made and what each pass did; `forward_error` is the largest difference over the output's range."""

    path: str
    program_hash: str
    target: str
    opt_level: int
    parameters: int
    size_bytes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    forward_error: float
    engines: int
    passes: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compile(
    model: Model,
    *,
    output: str | os.PathLike[str] = "model.dcc",
    target: str = "cpu",
    example_inputs: Mapping[str, Tensor] | None = None,
    roles: Mapping[str, str] | None = None,
    arch: str | None = None,
    sampler: Any = None,
    steps: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    guidance: str = "auto",
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    lora: Sequence[tuple[str, float]] = (),
    opt_level: int = 1,
    max_batch: int = 64,
    granularity: str = "step",
    trust_pickle: bool = False,
    progress: ProgressReport = lambda _: None,
) -> CompileReport:
    """An artifact at `output` that samples, without torch, what the model samples.

    `model` is a module, an ExportedProgram, or anything `dcc.frontend.load` reads. `sampler` is a name, a diffusers
    scheduler, its config or the config's path; by default the model's own, and `"none"` compiles for `denoise`
    alone. `guidance` is `cfg`, `none` or `auto` (cfg where the null condition is known). `opt_level` 0 traces and
    lowers, 1 runs the exact passes. The artifact is checked against the model before it gets its name; nothing is
    left behind otherwise. Raises a DccError of the stage that failed.
    """
    _check_options(target, opt_level, granularity, max_batch, guidance)
    clock = _Clock(progress)
    destination = Path(output)
    _check_destination(destination)
    with clock("loading the model"):
        loaded = load_model(model, arch=arch, trust_pickle=trust_pickle, example_inputs=example_inputs, roles=roles)  # type: ignore[arg-type]
    with clock("tabulating the sampler"):
        table = _sampler(loaded, sampler, steps, dict(sampler_options or {}))
    guide = _guidance(loaded, guidance, guidance_scale)
    with clock("tracing"):
        program = trace(
            loaded.module, loaded.example_inputs, loaded.roles, name=loaded.name, nulls=loaded.nulls,
            ranges=loaded.ranges, guidance=guide, unbatched=loaded.unbatched,
            rows=max_batch * (2 if guide.mode == "cfg" else 1),
        )  # fmt: skip
    program.sampler, program.source = table, loaded.source
    with clock("running passes"):
        _fold_lora(program, lora)
        run_passes(program, pipeline(opt_level))
    recipe = {
        "source": loaded.source, "target": target, "opt_level": opt_level,
        "sampler": None if table is None else table.name, "steps": None if table is None else table.steps,
        "sampler_options": {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in (sampler_options or {}).items()
        },
        "guidance": guide.mode, "guidance_scale": guide.scale, "lora": [list(item) for item in lora],
        "max_batch": max_batch, "granularity": granularity,
    }  # fmt: skip
    partial = destination.with_name(f".{os.getpid():x}.{destination.name[:60]}.partial")
    try:
        with clock("lowering"), ArtifactWriter(partial) as writer:
            plan = lower(program, writer, granularity)
            writer.add_member("program.txt", program_text(program, costs=True).encode())
            digest = program.hash()
            writer.finish(_manifest(program, plan, digest, target, recipe))
        with clock("checking against the model"):
            error = check_forward(partial, program, loaded)
        partial.replace(destination)
    except OSError as failure:
        raise ExportError(
            "the artifact cannot be written", at=destination, got=failure, next="free some space, or choose another -o"
        ) from failure
    finally:
        partial.unlink(missing_ok=True)
    return CompileReport(
        path=str(destination), program_hash=digest, target=target, opt_level=opt_level,
        parameters=loaded.parameters, size_bytes=destination.stat().st_size, seconds=clock.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, forward_error=error,
        engines=len(plan.engines), passes=[asdict(report) for report in program.reports],
    )  # fmt: skip


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


class _Clock:
    """Wall seconds of each stage, which is announced as it starts."""

    def __init__(self, progress: ProgressReport) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._name = ""
        self._start = 0.0

    def __call__(self, name: str) -> _Clock:
        self._name = name
        self._progress(name)
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._start, 3)


def _check_options(target: str, opt_level: int, granularity: str, max_batch: int, guidance: str) -> None:
    target_named(target)
    if opt_level not in OPT_LEVELS:
        raise UsageError(f"unknown optimisation level {opt_level}", want="0 (trace and lower) or 1 (exact passes)")
    if granularity not in GRANULARITIES:
        raise UsageError(f"unknown granularity '{granularity}'", want=", ".join(GRANULARITIES))
    if not 1 <= max_batch <= 4096:
        raise UsageError("max_batch is out of range", got=max_batch, want="1 to 4096")
    if guidance not in ("auto", "cfg", "none"):
        raise UsageError(f"unknown guidance '{guidance}'", want="auto, cfg or none")


def _check_destination(destination: Path) -> None:
    """Fail before the work is done, not after."""
    folder = destination.parent
    if destination.is_dir():
        raise ExportError("the output is a directory", at=destination, want="the name of a file")
    if not folder.is_dir():
        raise ExportError("the output folder does not exist", at=folder, next=f"mkdir -p {folder}")
    probe = folder / f".{os.getpid():x}.dcc-writable"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError(
            "the output folder cannot be written", at=folder, got=error, next="choose another -o"
        ) from error


def _sampler(loaded: LoadedModel, sampler: Any, steps: int | None, options: dict[str, Any]) -> Any:
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


def _guidance(loaded: LoadedModel, mode: str, scale: float) -> Guidance:
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


def _manifest(program: Program, plan: Plan, digest: str, target: str, recipe: dict[str, Any]) -> dict[str, Any]:
    import onnx
    import onnxruntime

    guidance = program.guidance
    return {
        "name": program.name,
        "program_hash": digest,
        "target": target,
        "plan": plan,
        "sampler": None if program.sampler is None else program.sampler.to_json(),
        "guidance": {"mode": guidance.mode, "scale": guidance.scale, "channels": guidance.channels},
        "report": {"passes": [asdict(report) for report in program.reports]},
        "recipe": recipe,
        "tools": {
            "dcc": dcc.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip


def check_forward(path: Path, program: Program, loaded: LoadedModel) -> float:
    """The artifact's forward equals the original's within float32's tolerance; returns the difference."""
    rows = min(3, program.rows[1]) if program.rows[0] == 1 else program.rows[0]
    inputs = random_inputs(program, rows, seed=0)
    module = loaded.module.module() if isinstance(loaded.module, ExportedProgram) else loaded.module
    if any(report.name == "fold-lora" and report.status == "applied" for report in program.reports):
        wanted = run_graph(program, inputs).numpy()
    else:
        with torch.no_grad():
            wanted = module(**inputs).numpy()
    large = path.stat().st_size > LARGE_WEIGHTS
    try:
        artifact = load(path, low_memory=large, check="fast" if large else "auto")
        got = artifact.denoise(**{name: value.numpy() for name, value in inputs.items()})
    except DccError as error:
        raise ExportError("the artifact does not run", got=error, next="report this model's architecture") from error
    gap = difference(got, wanted)
    limit = TOLERANCE["float32"].forward
    if not gap <= limit:
        raise ExportError(
            "the artifact does not compute what the model computes", got=f"{gap:.2e} of the output's range",
            want=f"at most {limit:.0e}", next="try -O0, and report the model's architecture",
        )  # fmt: skip
    return gap
