"""Layers for GPUs: engines in a reduced type beside an artifact's portable ones, made from those alone.

A layer needs neither the model nor torch: it can be added to an artifact that has been served from for a year, and the
layers that are there keep their bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from dcc.cost_model.local_device import Device
from dcc.cost_model.targets import Target, dtype_for
from dcc.errors import ExportError, UsageError
from dcc.exports.artifact_extension import ArtifactExtension
from dcc.exports.engine_workers import build_all
from dcc.exports.precision import REDUCED, Typed, strongly_typed
from dcc.exports.typed_graphs import linked, with_weights_in_file
from dcc.exports.update_engines import update_engines
from dcc.layer_check import LayerCheck, check_layer
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER, Artifact, external_location
from dcc.runtime.device_engines import engine_specs, profile_rows
from dcc.runtime.engine_cache import EngineCache
from dcc.runtime.layers import Layer
from dcc.runtime.network_record import NetworkRecord, check_network, layer_counts
from dcc.runtime.plan import EngineSpec, Plan
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.tensorrt_builder import BuildCost, BuilderOptions, BuildRequest, TensorRt, check_capabilities

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


@dataclass
class BuildOptions:
    """How engines are built. `check` runs every graph on this machine's processor first."""

    workers: int = 1
    cache: EngineCache | None = None
    builder: BuilderOptions = field(default_factory=BuilderOptions)
    check: bool = True


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
    covered = {request: found for request in requests if (found := _covering(artifact, request)) is not None}
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
            built: dict[str, _Built] = {}
            if library is not None:
                layer, built = _with_engines(layer, request, library, artifact.plan, typed, extension, options, told)
            summary = _summary(request, typed, built, checks[request.name], options)
            records = f"layers/{request.name}/records.json"
            extension.add_member(records, _records(typed, built))
            made.append(replace(layer, records=records, summary=summary))
        extension.finish({
            "layers": [layer.to_json() for layer in (*kept, *made)],
            "report": {**(artifact.manifest["report"] or {}), **(report or {})},
            "tools": artifact.manifest["tools"] | {"onnx": onnx.__version__}
            | {name: library.version for name, library in libraries.items() if library is not None},
        })  # fmt: skip
    return made


@dataclass(frozen=True)
class _TypedEngine:
    """An engine of the plan in the layer's type, or an update engine: float32 throughout, without weights."""

    spec: EngineSpec
    typed: Typed | None
    graph: bytes

    def buildable(self, weights: Path) -> bytes:
        """The model as builders take it, its large weights in the file."""
        return self.graph if self.typed is None else with_weights_in_file(self.typed, weights).SerializeToString()

    def facts(self) -> dict[str, Any]:
        """What people ask of the graph."""
        if self.typed is None:
            operations = [node.op_type for node in onnx.load_model_from_string(self.graph).graph.node]
            return {
                "nodes": {"float32": len(operations)}, "casts": operations.count("Cast"), "overflows": 0,
                "float32": {"the sampler's update": len(operations)}, "reduced": 0, "weight_bytes": 0,
            }  # fmt: skip
        record = self.typed.record
        return {
            "nodes": record.nodes, "casts": len(record.casts), "overflows": len(record.overflows),
            "float32": {rule: len(nodes) for rule, nodes in record.float32.items()}, "reduced": record.reduced,
            "weight_bytes": record.weight_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class _Built:
    """What is remembered of an engine whose bytes are in the file."""

    size: int
    record: NetworkRecord
    cost: BuildCost


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


def _covering(artifact: Artifact, request: LayerRequest) -> Layer | None:
    """A layer of the artifact that serves the request: of the same kind, for its capabilities and more."""
    for layer in artifact.layers:
        same = (layer.backend, layer.dtype, layer.device) == (request.backend, request.dtype, request.device)
        missing = not set(request.targets) <= set(layer.targets)
        if same and missing and layer.engines and set(request.capabilities) <= set(layer.capabilities):
            return layer
    return None


def _also_for(layer: Layer, covered: Mapping[LayerRequest, Layer]) -> Layer:
    names = [name for request, found in covered.items() if found is layer for name in request.targets]
    return replace(layer, targets=tuple(dict.fromkeys((*layer.targets, *names))))


def _typed_engines(artifact: Artifact, dtype: str) -> dict[str, _TypedEngine]:
    """The plan's engines in `dtype`; weights are read from the artifact when they are needed."""
    engines = {}
    real = external_location(Path(artifact.path).name)
    placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
    for spec in artifact.plan.engines:
        source = onnx.load_model_from_string(artifact.engine_model(spec.name))
        typed = strongly_typed(source, dtype, lambda name: artifact.map_weight(name.removeprefix(WEIGHT_PREFIX)))
        graph = linked(typed, source).SerializeToString().replace(real, placeholder)
        engines[spec.name] = _TypedEngine(spec, typed, graph)
    return engines | _update_engines(artifact)


def _update_engines(artifact: Artifact) -> dict[str, _TypedEngine]:
    """The loop between the forwards; nothing where the artifact has no sampler."""
    table = artifact.manifest["sampler"]
    if table is None:
        return {}
    loop, models = update_engines(artifact.plan, SamplerTable.from_json(table), artifact.manifest["guidance"])
    specs = engine_specs(artifact.plan, loop)
    return {name: _TypedEngine(specs[name], None, model) for name, model in models.items()}


def _checked(
    artifact: Artifact, request: LayerRequest, typed: Mapping[str, _TypedEngine], done: Mapping[str, LayerCheck | None],
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
    return check_layer(artifact, request.dtype, lambda name: typed[name].graph.replace(placeholder, real))


def _with_engines(
    layer: Layer, request: LayerRequest, library: TensorRt, plan: Plan, typed: Mapping[str, _TypedEngine],
    extension: ArtifactExtension, options: BuildOptions, told: Told,
) -> tuple[Layer, dict[str, _Built]]:  # fmt: skip
    """The layer with its engines in the file; what is returned of them has no bytes."""
    members: dict[str, str] = {}
    built: dict[str, _Built] = {}
    with _weights_folder() as folder:
        builds = []
        for name, engine in typed.items():
            model = engine.buildable(folder / f"{name}.weights")
            rows = profile_rows(plan, engine.spec)
            builds.append(
                BuildRequest(name, model, request.capabilities, rows, folder, options.builder, request.device)
            )
        progress = _BuildProgress(request, len(typed), told)
        with closing(build_all(builds, library, options.workers, progress, options.cache)) as engines:
            for made in engines:
                check_network(made.record, typed[made.name].spec)
                members[made.name] = f"layers/{request.name}/{made.name}.engine"
                extension.add_member(members[made.name], made.data)
                built[made.name] = _Built(len(made.data), made.record, made.cost)
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


def _summary(
    request: LayerRequest, typed: Mapping[str, _TypedEngine], built: Mapping[str, _Built],
    check: LayerCheck | None, options: BuildOptions,
) -> dict[str, Any]:  # fmt: skip
    """What people ask of a layer, engine by engine."""
    engines = {}
    for name, engine in typed.items():
        engines[name] = engine.facts() | {"error": None if check is None else check.engines.get(name)}
        if name in built:
            result = built[name]
            engines[name] |= {
                "engine_bytes": result.size, "layers": len(result.record["layers"]),
                "kinds": layer_counts(result.record), "attention": result.record["attention"],
                "inputs": result.record["inputs"], "outputs": result.record["outputs"],
                "profiles": result.record["profiles"], **asdict(result.cost),
            }  # fmt: skip
    return {
        "reason": request.reason, "engines": engines, "forward_error": None if check is None else check.forward,
        "cache_problem": None if options.cache is None else options.cache.problem,
    }  # fmt: skip


def _records(typed: Mapping[str, _TypedEngine], built: Mapping[str, _Built]) -> bytes:
    """Every choice and every layer, for whoever wants to know."""
    rows = {
        name: {
            "precision": None if engine.typed is None else engine.typed.record.to_json(),
            "network": built[name].record if name in built else None,
        }
        for name, engine in typed.items()
    }
    return json.dumps(rows).encode()


def default_workers() -> int:
    """Processes that build at once: each holds one engine, so two at most, and one where there is one processor."""
    return max(1, min(2, (os.cpu_count() or 1) // 2))
