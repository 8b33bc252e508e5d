"""`dcc.compile`: from a model to an artifact, every stage in order."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dcc.build_layers import check_destination
from dcc.cost_model.targets import Target, dtype_for, targets_named
from dcc.errors import DccError, ExportError, UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import EngineBody
from dcc.exports.lower import GRANULARITIES, lower
from dcc.frontend.load import LoadedModel
from dcc.frontend.schedules import PLACEMENTS
from dcc.ir.interpret import random_inputs, run_graph
from dcc.ir.program import Program
from dcc.ir.schedule import Schedule
from dcc.ir.text import program_text
from dcc.preparation import DEFAULT_GUIDANCE_SCALE, OPT_LEVELS, Model, Source, StageClock, manifest_of, prepare
from dcc.quality import difference
from dcc.runtime.loading import load_on_processor
from dcc.tolerances import TOLERANCE

if TYPE_CHECKING:
    from dcc.layers import LayerRequest, Networks
    from dcc.runtime.layers import Layer
    from dcc.search.choose import Chosen

LARGE_WEIGHTS = 1 << 30
DEFAULT_BUDGET = 200
# Schedules are tried out, measured and predicted on this machine, whatever the artifact is for.
PROCESSOR = "cpu"
DEFAULT_IMAGES = 16
LOWERINGS = ("onnx", "torch-tensorrt")

ProgressReport = Callable[[str], None]


@dataclass
class CompileReport:
    """What was made and what each pass did; `forward_error` is the largest difference over the output's range.

    `schedule` says what the artifact's schedule is worth, measured; None for an exact artifact. `layers` are the
    engines beside the portable ones, `predictions` the latency on targets that need not be here, and what it rests on.
    """

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
    schedule: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compile(
    model: Model,
    *,
    output: str | os.PathLike[str] = "model.dcc",
    target: str = "cpu",
    dtype: str | None = None,
    backend: str | None = None,
    lowering: str = "onnx",
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
    require: str | None = None,
    schedule: Schedule | str | os.PathLike[str] | None = None,
    pick: str | None = None,
    transfer: str | None = None,
    budget: int = DEFAULT_BUDGET,
    images: int = DEFAULT_IMAGES,
    conditions: Mapping[str, Any] | None = None,
    max_batch: int = 64,
    granularity: str = "step",
    engine_cache: bool = True,
    trust_pickle: bool = False,
    own_process: bool = False,
    progress: ProgressReport = lambda _: None,
) -> CompileReport:
    """An artifact at `output` that samples, without torch, what the model samples.

    `target` is one or more of `dcc targets`, with commas between them: the artifact runs on a processor in any case,
    and has engines in `dtype` (by default the target's own) for the `backend` of each GPU. `lowering` makes their
    networks: `onnx`, or `torch-tensorrt` where every backend is tensorrt-rtx. `engine_cache` keeps built engines for
    the next compile.

    `model` is a module, an ExportedProgram, or anything `dcc.frontend.load` reads; `Source` says more of the sampler
    and guidance. `opt_level` 0 traces and lowers, 1 runs the exact passes, 2 adds a calibrated schedule within
    `require` (by default psnr>=30 against the exact samples), 3 a search of `budget` evaluations for one. `schedule`
    is a schedule or a file of one; `pick` chooses from a front, `transfer` (nearest or interval) moves one of other
    steps or another sampler. Schedules are tried out on `images` images and checked on others; `conditions` are needed
    where the model has some that are not classes. `own_process` as in `dcc.runtime.load`. The artifact is checked
    before it gets its name; nothing is left behind otherwise. Raises a DccError of the stage that failed, QualityError
    where the requirement is missed.
    """
    _check_options(opt_level, granularity, max_batch, guidance)
    targets = targets_named(target)
    requests = _layers_for(targets, dtype, backend, lowering)
    _check_schedule_options(opt_level, require, schedule, pick, transfer, budget, images)
    clock = StageClock(progress)
    destination = Path(output)
    check_destination(destination)
    source = Source(
        model, example_inputs, roles, arch, sampler, steps, sampler_options, guidance, guidance_scale, lora,
        max_batch, trust_pickle,
    )  # fmt: skip
    prepared = prepare(source, opt_level, clock)
    program, loaded = prepared.program, prepared.loaded
    digest, parameters = program.hash(), loaded.parameters
    table, guide = program.sampler, program.guidance
    recipe = {
        "source": loaded.source, "target": target, "dtype": dtype, "backend": backend, "lowering": lowering,
        "opt_level": opt_level,
        "sampler": None if table is None else table.name, "steps": None if table is None else table.steps,
        "guidance": guide.mode, "guidance_scale": guide.scale, "granularity": granularity, "require": require,
        **source.recipe(),
    }  # fmt: skip
    partial = destination.with_name(f".{os.getpid():x}.{destination.name[:60]}.partial")
    chosen: Chosen | None = None
    try:
        if opt_level >= 2 or schedule is not None:
            from dcc.search.choose import choose

            with tempfile.TemporaryDirectory(prefix="dcc-", ignore_cleanup_errors=True) as folder:
                chosen = choose(
                    prepared, Path(folder), opt_level=opt_level, require=require, schedule=schedule, pick=pick,
                    transfer=transfer, budget=budget, images=min(images, max_batch), conditions=conditions,
                    target=PROCESSOR, own_process=own_process, clock=clock, told=progress,
                )  # fmt: skip
            program.schedule = chosen.schedule
            program.reports.append(chosen.report)
        bodies: dict[str, EngineBody] = {}
        with clock("lowering"), ArtifactWriter(partial) as writer:
            plan = lower(program, writer, granularity, templates=chosen.templates if chosen else None, bodies=bodies)
            writer.add_member("program.txt", program_text(program, costs=True).encode())
            if program.schedule is not None:
                writer.add_member("schedule.json", json.dumps(program.schedule.to_json()).encode())
            writer.finish(manifest_of(program, plan, digest, target, recipe))
        with clock("checking against the model"):
            # A pruned component is missing in a single forward as well.
            pruned = any(action.kind == "skip" for action in program.schedule.actions[0]) if program.schedule else False
            error = float("nan") if pruned else check_forward(partial, program, loaded)
        passes = [asdict(report) for report in program.reports]
        predictions = predict_targets(partial, program, targets, dtype, min(images, max_batch))
        layers: list[Layer] = []
        if requests:
            networks = _networks(lowering, program, bodies)
            # What builds the engines needs the memory.
            del prepared, program, loaded, bodies
            layers = _add_layers(partial, requests, networks, engine_cache, predictions, clock, progress)
        partial.replace(destination)
    except OSError as failure:
        raise ExportError(
            "the artifact cannot be written", at=destination, got=failure, next="free some space, or choose another -o"
        ) from failure
    finally:
        partial.unlink(missing_ok=True)
    return CompileReport(
        path=str(destination), program_hash=digest, target=target, opt_level=opt_level,
        parameters=parameters, size_bytes=destination.stat().st_size, seconds=clock.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, forward_error=error,
        engines=len(plan.engines), passes=passes, schedule=None if chosen is None else chosen.worth,
        layers=[layer.to_json() for layer in layers], predictions=predictions,
    )  # fmt: skip


def _layers_for(targets: Sequence[Target], dtype: str | None, backend: str | None, lowering: str) -> list[LayerRequest]:
    """What the targets ask for beside the portable layer, which can be built here, and nothing that cannot."""
    if lowering not in LOWERINGS:
        raise UsageError(f"unknown lowering '{lowering}'", want=" or ".join(LOWERINGS))
    if all(target.capability is None for target in targets):
        for target in targets:
            dtype_for(target, dtype)
            if backend not in (None, *target.backends):
                want = ", ".join(target.backends)
                raise UsageError(f"the target '{target.name}' has no backend {backend}", want=want)
        if lowering != "onnx":
            names = ", ".join(target.name for target in targets)
            raise UsageError(
                f"--lowering {lowering} makes engines for GPUs", got=f"target {names}",
                want="a target whose backend is tensorrt-rtx, such as a100", next="leave --lowering out",
            )  # fmt: skip
        return []
    from dcc.layers import layer_requests, library_for

    requests = layer_requests(targets, dtype, backend)
    if lowering != "onnx":
        _check_lowering(lowering, requests)
    for request in requests:
        library_for(request)
    return requests


def _check_lowering(lowering: str, requests: Sequence[LayerRequest]) -> None:
    """Raises a DccError where this lowering cannot make the engines here and now."""
    for request in requests:
        if request.backend != "tensorrt-rtx":
            raise UsageError(
                f"--lowering {lowering} cannot serve the backend {request.backend}, which works from ONNX graphs where"
                " the artifact is loaded", at=f"target {', '.join(request.targets)}",
                want="targets whose backend is tensorrt-rtx", next="leave --lowering out, or these targets",
            )  # fmt: skip
    from dcc.exports.torch_tensorrt_lowering import check_installed

    check_installed()


def _networks(lowering: str, program: Program, bodies: Mapping[str, EngineBody]) -> Networks | None:
    """What makes the networks of the engines in place of TensorRT's ONNX parser; None where that does."""
    if lowering == "onnx":
        return None
    from dcc.exports.torch_tensorrt_lowering import TorchTensorRt

    return TorchTensorRt(program, bodies)


def _add_layers(
    path: Path, requests: Sequence[LayerRequest], networks: Networks | None, engine_cache: bool,
    predictions: list[dict[str, Any]], clock: StageClock, progress: ProgressReport,
) -> list[Layer]:  # fmt: skip
    from dcc.layers import BuildOptions, add_layers, default_workers
    from dcc.runtime.engine_cache import EngineCache, default_folder

    cache = EngineCache(default_folder()) if engine_cache else None
    options = BuildOptions(default_workers(), cache, networks=networks)
    with clock("making layers for " + ", ".join(name for request in requests for name in request.targets)):
        return add_layers(path, requests, options=options, told=progress, report={"predictions": predictions})


def predict_targets(
    path: Path, program: Program, targets: Sequence[Target], dtype: str | None, images: int
) -> list[dict[str, Any]]:
    """Latency of one generation on each GPU, for one image and for `images`, from its data sheet."""
    gpus = [target for target in targets if target.capability is not None]
    if not gpus or program.sampler is None:
        return []
    from dcc.search.choose import predicted_generation

    large = path.stat().st_size > LARGE_WEIGHTS
    artifact = load_on_processor(path, low_memory=True, check="fast" if large else "auto")
    return [
        predicted_generation(program, artifact, target, count, dtype).to_json()
        for target in gpus
        for count in dict.fromkeys((1, images))
    ]


def _check_options(opt_level: int, granularity: str, max_batch: int, guidance: str) -> None:
    if opt_level not in OPT_LEVELS:
        want = "0 (trace and lower), 1 (exact passes), 2 (calibrated schedule) or 3 (search)"
        raise UsageError(f"unknown optimisation level {opt_level}", want=want)
    if granularity not in GRANULARITIES:
        raise UsageError(f"unknown granularity '{granularity}'", want=", ".join(GRANULARITIES))
    if not 1 <= max_batch <= 4096:
        raise UsageError("max_batch is out of range", got=max_batch, want="1 to 4096")
    if guidance not in ("auto", "cfg", "none"):
        raise UsageError(f"unknown guidance '{guidance}'", want="auto, cfg or none")


def _check_schedule_options(
    opt_level: int, require: str | None, schedule: Any, pick: str | None, transfer: str | None, budget: int, images: int
) -> None:
    if schedule is not None and opt_level >= 2:
        raise UsageError("a schedule is given, and -O2 and -O3 choose one", next="leave out one of them")
    if require is not None and schedule is None and opt_level < 2:
        raise UsageError(
            "nothing lossy is asked for, so there is nothing to require", got=require, next="-O2, -O3 or --schedule"
        )
    if pick is not None and schedule is None:
        raise UsageError("--pick chooses from a front", got=pick, next="--schedule front.json")
    if transfer is not None and (schedule is None or transfer not in PLACEMENTS):
        want = f"--schedule FILE, and {' or '.join(PLACEMENTS)}"
        raise UsageError("--transfer moves a given schedule to other steps", got=transfer, want=want)
    if budget < 1 or images < 1:
        got = f"budget {budget}, {images} images"
        raise UsageError("the options of the search are out of range", got=got, want="1 or more of each")
    if require is not None:
        from dcc.search.requirement import Requirement

        Requirement.parse(require)


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
        artifact = load_on_processor(path, low_memory=large, check="fast" if large else "auto")
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
