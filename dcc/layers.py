"""Layers for GPUs: engines in a reduced type beside an artifact's portable ones, made from those alone.

A layer needs neither the model nor torch: it can be added to an artifact that has been served from for a year, and the
layers that are there keep their bytes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import onnx

from dcc.cost_model.local_device import Device
from dcc.cost_model.targets import Target, dtype_for
from dcc.errors import ExportError, UsageError
from dcc.exports.artifact_extension import ArtifactExtension
from dcc.exports.engine_workers import build_all
from dcc.exports.precision import REDUCED, strongly_typed
from dcc.exports.typed_graphs import linked
from dcc.exports.update_engines import update_engines
from dcc.layer_check import Function, LayerCheck, check_functions, check_layer
from dcc.layer_summary import Built, TypedEngine, layer_records, layer_summary
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER, Artifact, external_location
from dcc.runtime.device_engines import engine_specs, profile_rows
from dcc.runtime.engine_cache import EngineCache
from dcc.runtime.layers import Layer
from dcc.runtime.network_record import check_network
from dcc.runtime.plan import Plan
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.tensorrt_builder import (
    BuilderOptions,
    BuildRequest,
    BuiltEngine,
    TensorRt,
    check_capabilities,
)

SECONDS_BETWEEN_LINES = 10.0
WEIGHT_PREFIX = "w/"

Told = Callable[[str], None]


@dataclass(frozen=True)
class LayerRequest:
    """A layer to be added: for which targets, which backend runs it, in which type, and why so.

    `device` names the GPU for a library that builds for the one that is there.
    """

    backend: str
    dtype: str
    capabilities: tuple[int, ...]
    targets: tuple[str, ...]
    reason: str
    device: str = ""

    @property
    def name(self) -> str:
        return "-".join((self.backend, self.dtype, *(f"sm{capability}" for capability in self.capabilities)))


class Networks(Protocol):
    """Another way to the networks of a plan's engines than TensorRT's ONNX parser: `TorchTensorRt` is one."""

    name: str
    version: str

    def function(self, engine: str, dtype: str) -> Function: ...

    def build_all(
        self, requests: Sequence[BuildRequest], dtype: str, library: TensorRt, told: Callable[[str, float], None],
        cache: EngineCache | None,
    ) -> Generator[BuiltEngine, None, None]: ...  # fmt: skip


@dataclass
class BuildOptions:
    """How engines are built. `check` runs every graph on this machine's processor first.

    With `networks` the plan's engines are made of its networks, and update engines of ONNX models still. Layers then
    must have engines that are built here; the ONNX graphs are in them all the same.
    """

    workers: int = 1
    cache: EngineCache | None = None
    builder: BuilderOptions = field(default_factory=BuilderOptions)
    check: bool = True
    networks: Networks | None = None

    @property
    def lowering(self) -> str:
        return "onnx" if self.networks is None else f"{self.networks.name} {self.networks.version}"


def layer_requests(
    targets: Sequence[Target], dtype: str | None = None, backend: str | None = None
) -> list[LayerRequest]:
    """One request for all targets that one set of engines serves. Targets without a GPU need no layer.

    A backend is the target's first unless `backend` names another of its own. Raises UsageError where a target lacks
    the backend or the dtype.
    """
    groups: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        if target.capability is None:
            if backend not in (None, "onnxruntime"):
                raise UsageError(
                    f"the target '{target.name}' has no backend {backend}", want=", ".join(target.backends)
                )
            continue
        chosen = target.backend if backend is None else backend
        if chosen not in target.backends:
            raise UsageError(
                f"the target '{target.name}' has no backend {chosen}", want=", ".join(target.backends),
                next="choose one of these, or leave --backend out",
            )  # fmt: skip
        kind = dtype_for(target, dtype)
        if kind not in REDUCED:
            reason = "needs quantized weights, which no pass makes yet" if kind == "float8" else "runs on a processor"
            raise UsageError(f"dcc makes no {kind} engines for GPUs: {kind} {reason}", want="fp16 or bf16")
        groups.setdefault((chosen, kind), []).append(target)
    return [
        LayerRequest(
            chosen, kind, tuple(sorted({target.capability or 0 for target in members})),
            tuple(target.name for target in members), members[0].reason,
        )
        for (chosen, kind), members in groups.items()
    ]  # fmt: skip


def on_this_device(request: LayerRequest, device: Device | None) -> LayerRequest:
    """The request, to be built here where its backend builds for the GPU that is there, and this is it."""
    here = device is not None and request.capabilities == (device.capability,) and request.backend == "tensorrt"
    return replace(request, device=device.name) if device is not None and here else request


def add_layers(
    path: Path,
    requests: Sequence[LayerRequest],
    output: Path | None = None,
    options: BuildOptions | None = None,
    told: Told = lambda _: None,
    report: Mapping[str, Any] | None = None,
) -> list[Layer]:
    """The artifact at `output` (by default `path`) has these layers beside those it had; returns the new ones.

    A layer of the same name is replaced; where one that is there serves a request as it is, it only learns the names of
    the targets. `report` is added to the artifact's. Nothing is left behind where something fails. Raises ExportError
    of the stage that failed.
    """
    options = options or BuildOptions()
    artifact = Artifact.open(path)
    covered = {request: found for request in requests if (found := _covering(artifact, request, options)) is not None}
    requests = [request for request in requests if request not in covered]
    names = {request.name for request in requests}
    replaced = [layer for layer in artifact.layers if layer.name in names]
    kept = [_also_for(layer, covered) for layer in artifact.layers if layer.name not in names]
    drop = {member for layer in replaced for member in layer.members()}
    made = []
    libraries = {request.backend: library_for(request) for request in requests}
    prepared = {}
    for request in requests:
        told(f"choosing precisions for {request.dtype}")
        prepared[request.name] = _typed_engines(artifact, request.dtype)
    checks: dict[str, LayerCheck | None] = {}
    for request in requests:
        checks[request.name] = _checked(artifact, request, prepared[request.name], checks, requests, options, told)
    with ArtifactExtension(artifact, output or path, drop) as extension:
        for request in requests:
            typed = prepared[request.name]
            graphs = {}
            for name, engine in typed.items():
                graphs[name] = f"layers/{request.name}/{name}.onnx"
                extension.add_member(graphs[name], engine.graph)
            layer = Layer(
                request.name, request.backend, request.dtype, request.capabilities, request.targets, "", request.device,
                graphs, {}, "", {"reason": request.reason},
            )  # fmt: skip
            library = libraries[request.backend]
            built: dict[str, Built] = {}
            if library is not None:
                layer, built = _with_engines(layer, request, library, artifact.plan, typed, extension, options, told)
            problem = None if options.cache is None else options.cache.problem
            summary = layer_summary(typed, built, checks[request.name]) | {
                "reason": request.reason, "cache_problem": problem, "lowering": options.lowering,
            }  # fmt: skip
            records = f"layers/{request.name}/records.json"
            extension.add_member(records, layer_records(typed, built))
            made.append(replace(layer, records=records, summary=summary))
        extension.finish({
            "layers": [layer.to_json() for layer in (*kept, *made)],
            "report": {**(artifact.manifest["report"] or {}), **(report or {})},
            "tools": artifact.manifest["tools"] | {"onnx": onnx.__version__}
            | {name: library.version for name, library in libraries.items() if library is not None}
            | ({} if options.networks is None else {options.networks.name: options.networks.version}),
        })  # fmt: skip
    return made


def library_for(request: LayerRequest) -> TensorRt | None:
    """What builds the engines now; None where the device that loads them does.

    Raises ExportError where it is missing, too old, or does not build for these capabilities.
    """
    if request.backend == "tensorrt-rtx":
        try:
            library = TensorRt.find("tensorrt-rtx")
        except ExportError as error:
            advice = f"{error.details['next']}; or --backend tensorrt, which builds where the artifact is loaded"
            raise ExportError(error.what, **error.details | {"next": advice}) from error
        check_capabilities(request.capabilities, library, f"layer {request.name}")
        return library
    return TensorRt.find("tensorrt") if request.backend == "tensorrt" and request.device else None


def _covering(artifact: Artifact, request: LayerRequest, options: BuildOptions) -> Layer | None:
    """A layer of the artifact that serves the request: of the same kind, for its capabilities and more.

    Who asks for networks of another kind asks for them to be made.
    """
    for layer in artifact.layers if options.networks is None else ():
        same = (layer.backend, layer.dtype, layer.device) == (request.backend, request.dtype, request.device)
        missing = not set(request.targets) <= set(layer.targets)
        if same and missing and layer.engines and set(request.capabilities) <= set(layer.capabilities):
            return layer
    return None


def _also_for(layer: Layer, covered: Mapping[LayerRequest, Layer]) -> Layer:
    names = [name for request, found in covered.items() if found is layer for name in request.targets]
    return replace(layer, targets=tuple(dict.fromkeys((*layer.targets, *names))))


def _typed_engines(artifact: Artifact, dtype: str) -> dict[str, TypedEngine]:
    """The plan's engines in `dtype`; weights are read from the artifact when they are needed."""
    engines = {}
    real = external_location(Path(artifact.path).name)
    placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
    for spec in artifact.plan.engines:
        source = onnx.load_model_from_string(artifact.engine_model(spec.name))
        typed = strongly_typed(source, dtype, lambda name: artifact.map_weight(name.removeprefix(WEIGHT_PREFIX)))
        graph = linked(typed, source).SerializeToString().replace(real, placeholder)
        engines[spec.name] = TypedEngine(spec, typed, graph)
    return engines | _update_engines(artifact)


def _update_engines(artifact: Artifact) -> dict[str, TypedEngine]:
    """The loop between the forwards; nothing where the artifact has no sampler."""
    table = artifact.manifest["sampler"]
    if table is None:
        return {}
    loop, models = update_engines(artifact.plan, SamplerTable.from_json(table), artifact.manifest["guidance"])
    specs = engine_specs(artifact.plan, loop)
    return {name: TypedEngine(specs[name], None, model) for name, model in models.items()}


def _checked(
    artifact: Artifact, request: LayerRequest, typed: Mapping[str, TypedEngine], done: Mapping[str, LayerCheck | None],
    requests: Sequence[LayerRequest], options: BuildOptions, told: Told,
) -> LayerCheck | None:  # fmt: skip
    """Graphs of one dtype are the same for all backends: they are checked once."""
    if not options.check:
        return None
    for other in requests:
        if other.dtype == request.dtype and other.name in done:
            return done[other.name]
    told(f"checking the {request.dtype} graphs on this processor")
    placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
    real = external_location(Path(artifact.path).name)
    check = check_layer(artifact, request.dtype, lambda name: typed[name].graph.replace(placeholder, real))
    networks = options.networks
    if networks is None:
        return check
    told(f"checking the {request.dtype} graphs for {networks.name} on this processor")
    return check.worst(check_functions(artifact, request.dtype, lambda name: networks.function(name, request.dtype)))


def _with_engines(
    layer: Layer, request: LayerRequest, library: TensorRt, plan: Plan, typed: Mapping[str, TypedEngine],
    extension: ArtifactExtension, options: BuildOptions, told: Told,
) -> tuple[Layer, dict[str, Built]]:  # fmt: skip
    """The layer with its engines in the file; what is returned of them has no bytes."""
    members: dict[str, str] = {}
    built: dict[str, Built] = {}
    with _weights_folder() as folder:
        parsed: list[BuildRequest] = []
        others: list[BuildRequest] = []
        for name, engine in typed.items():
            through_onnx = options.networks is None or engine.typed is None
            model = engine.buildable(folder / f"{name}.weights") if through_onnx else b""
            rows = profile_rows(plan, engine.spec)
            build = BuildRequest(name, model, request.capabilities, rows, folder, options.builder, request.device)
            (parsed if through_onnx else others).append(build)
        progress = _BuildProgress(request, len(typed), told)
        with ExitStack() as stack:
            sources = [stack.enter_context(closing(
                build_all(parsed, library, options.workers, progress, options.cache)
            ))]  # fmt: skip
            if options.networks is not None:
                found = options.networks.build_all(others, request.dtype, library, progress, options.cache)
                sources.insert(0, stack.enter_context(closing(found)))
            for made in chain(*sources):
                check_network(made.record, typed[made.name].spec)
                members[made.name] = f"layers/{request.name}/{made.name}.engine"
                extension.add_member(members[made.name], made.data)
                built[made.name] = Built(len(made.data), made.record, made.cost)
    return replace(layer, engines=members, version=library.version), built


class _BuildProgress:
    """Tells of each engine once, and again every few seconds: the library's monitor speaks many times a second."""

    def __init__(self, request: LayerRequest, count: int, told: Told) -> None:
        self._title = f"building {request.backend} engines for {', '.join(request.targets)}"
        self._count, self._told = count, told
        self._names: dict[str, float] = {}
        self._spoken = 0.0

    def __call__(self, name: str, done: float) -> None:
        new = name not in self._names
        self._names[name] = done
        if new or time.monotonic() - self._spoken > SECONDS_BETWEEN_LINES:
            self._spoken = time.monotonic()
            finished = sum(value >= 1.0 for value in self._names.values())
            self._told(f"{self._title}: {name} {done:.0%}, {finished} of {self._count} done")


@contextmanager
def _weights_folder() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="dcc-weights-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            "engines cannot be built, because files cannot be written", at=tempfile.gettempdir(),
            got=error.strerror or error, next="free some space, or set TMPDIR to a folder that has it",
        ) from error  # fmt: skip


def default_workers() -> int:
    """Processes that build at once: each holds one engine, so two at most, and one where there is one processor."""
    return max(1, min(2, (os.cpu_count() or 1) // 2))
