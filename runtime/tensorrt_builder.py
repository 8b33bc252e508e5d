"""TensorRT engines from ONNX models that say the type of every value.

One code path for TensorRT 10 and 11 (`tensorrt`), which builds for the GPU that is there, and for TensorRT-RTX
(`tensorrt_rtx`), which builds on any machine and puts several compute capabilities into one engine. Precision is in
the model: the network is strongly typed, and nothing here chooses a type.
"""

from __future__ import annotations

import importlib
import re
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dcc.errors import ExportError
from dcc.runtime.builder_callbacks import Told, make_logger, make_monitor, stopped_by_interrupt
from dcc.runtime.network_record import BATCH, NetworkRecord, layer_record, port_record

Flavour = Literal["tensorrt-rtx", "tensorrt"]

FLOORS = {"tensorrt-rtx": (1, 7), "tensorrt": (10, 14)}
TITLES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
# Without a driver these are said of good builds as well.
_HARMLESS = ("cudaError 35", "Thread context has not been set")


@dataclass(frozen=True)
class BuilderOptions:
    """How the builder works; None leaves the library's default.

    `level` is its optimization level, 0 to 5 (TensorRT-RTX gives equal engines for all). `tf32` lets float32
    contractions round their operands. `detailed` keeps what the engine inspector shows on a GPU; the size is the same.
    """

    level: int | None = None
    auxiliary_streams: int | None = None
    workspace_bytes: int | None = None
    tf32: bool = False
    detailed: bool = True


@dataclass(frozen=True)
class BuildRequest:
    """An ONNX model and what to build from it. External data of the model lies in `folder`.

    `capabilities` are compute capabilities such as 80; `rows` is least, typical and most of the symbol B.
    `device` names the GPU for a library that builds for the one that is there: its engines fit no other.
    """

    name: str
    model: bytes
    capabilities: tuple[int, ...]
    rows: tuple[int, int, int] | None = None
    folder: Path | None = None
    options: BuilderOptions = BuilderOptions()
    device: str = ""


@dataclass(frozen=True)
class BuildCost:
    """What a build took; for an engine from the cache, what it took then.

    `peak_bytes` is the most memory that the building process held: an empty worker holds some 150 MiB.
    """

    seconds: float
    peak_bytes: int
    warnings: int
    cached: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """An engine as the library serialized it."""

    name: str
    data: bytes
    record: NetworkRecord
    cost: BuildCost


@dataclass(frozen=True)
class TensorRt:
    """An installed library. `capabilities` is empty where it builds for the GPU that is there alone."""

    flavour: Flavour
    version: str
    capabilities: tuple[int, ...]
    module: Any

    @classmethod
    def find(cls, flavour: Flavour | None = None) -> TensorRt:
        """The installed library; without a flavour TensorRT-RTX if it is there, because it needs no GPU.

        Raises ExportError that names the extra to install where it is missing, too old, or cannot be loaded.
        """
        if flavour is not None:
            return cls._load(flavour)
        try:
            return cls._load("tensorrt-rtx")
        except ExportError as error:
            try:
                return cls._load("tensorrt")
            except ExportError:
                raise error from None

    @classmethod
    def _load(cls, flavour: Flavour) -> TensorRt:
        if flavour not in get_args(Flavour):
            raise ExportError("unknown TensorRT library", got=flavour, want=", ".join(get_args(Flavour)))
        install = f"pip install 'dcc[{flavour}]'"
        floor = FLOORS[flavour]
        wanted = f"{TITLES[flavour]} {floor[0]}.{floor[1]} or newer"
        try:
            module = importlib.import_module(flavour.replace("-", "_"))
        except ModuleNotFoundError as error:
            raise ExportError(f"{TITLES[flavour]} is not installed", want=wanted, next=install) from error
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ExportError(f"{TITLES[flavour]} cannot be loaded", got=reason, want=wanted, next=install) from error
        version = str(module.__version__)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < floor:
            upgrade = install.replace("install", "install --upgrade")
            raise ExportError(f"{TITLES[flavour]} is too old", got=version, want=wanted, next=upgrade)
        names = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
        found = sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
        return cls(flavour, version, tuple(found), module)


def serialize(
    request: BuildRequest, library: TensorRt, told: Told = lambda name, done: None
) -> tuple[memoryview, NetworkRecord, BuildCost]:
    """What `build` does without a cache; the bytes are the library's own memory, not a copy."""
    check_request(request, library)
    _forget_peak()
    start = time.perf_counter()
    # A kernel for every attention is asked for first, so that the record can say whether there is one.
    data, record, logger = _attempt(request, library, told, decomposable=False)
    if data is None and record["attention"]:
        data, record, logger = _attempt(request, library, told, decomposable=True)
    if data is None:
        names = [row[0] for row in record["layers"] if row[0]]
        raise _failure(request, library, "cannot build an engine", logger.errors, names)
    told(request.name, 1.0)
    cost = BuildCost(round(time.perf_counter() - start, 3), _peak_bytes(), logger.warnings)
    return memoryview(data), record, cost


def check_request(request: BuildRequest, library: TensorRt) -> None:
    """Raises ExportError where the library cannot do what the request asks, whatever the model."""
    at = f"engine {request.name}"
    check_capabilities(request.capabilities, library, at)
    if not library.capabilities and not request.device:
        raise ExportError("this library builds for the GPU that is there", at=at, want="the GPU's name as `device`")
    if request.rows is not None and not 1 <= request.rows[0] <= request.rows[1] <= request.rows[2]:
        raise ExportError(
            "a batch profile is not in order", at=at, got=request.rows, want="1 <= least <= typical <= most"
        )


def check_capabilities(capabilities: Sequence[int], library: TensorRt, at: str) -> None:
    """Raises ExportError where the library builds for some capabilities, and these are not among them."""
    unknown = sorted(set(capabilities) - set(library.capabilities))
    if library.capabilities and (unknown or not capabilities):
        raise ExportError(
            f"{TITLES[library.flavour]} {library.version} does not build for this compute capability", at=at,
            got=", ".join(map(str, unknown)) or "none", want=", ".join(map(str, library.capabilities)),
            next="choose another target, or build on the GPU itself with pip install 'dcc[tensorrt]'",
        )  # fmt: skip


def _attempt(
    request: BuildRequest, library: TensorRt, told: Told, decomposable: bool
) -> tuple[Any, NetworkRecord, Any]:
    """The serialized engine or None, what was handed to the builder, and the logger that heard it."""
    trt, logger = library.module, make_logger(library.module)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError):  # what the bindings make of a null pointer
        raise _failure(request, library, "cannot start", logger.errors) from None
    # The parser owns weights of the network, and must live as long.
    network, parser = _parsed(builder, request, library, logger)
    attention = _attention_layers(network, trt, decomposable)
    config = builder.create_builder_config()
    _configure(config, request, library)
    profile, shapes = _profile(builder, network, request)
    if shapes:
        config.add_optimization_profile(profile)
    record: NetworkRecord = {
        "library": library.flavour, "version": library.version, "device": request.device,
        "capabilities": sorted(set(request.capabilities)),
        "inputs": [port_record(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [port_record(network.get_output(index)) for index in range(network.num_outputs)],
        "profiles": [shapes] if shapes else [],
        "layers": [layer_record(network.get_layer(index)) for index in range(network.num_layers)],
        "attention": ("decomposable" if decomposable else "fused") if attention else "",
        "options": asdict(request.options),
    }  # fmt: skip
    monitor = make_monitor(trt, request.name, told)
    config.progress_monitor = monitor
    with stopped_by_interrupt(monitor):
        data = builder.build_serialized_network(network, config)
    del parser
    if monitor.raised is not None:
        raise monitor.raised
    return data, record, logger


def _parsed(builder: Any, request: BuildRequest, library: TensorRt, logger: Any) -> tuple[Any, Any]:
    """The network of the model and its parser. Raises ExportError that names the node which could not be read."""
    trt = library.module
    # TensorRT 11 knows no other typing, and may drop the flag that asks for it.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    # The path need not exist: external data is looked for beside it.
    beside = [str(request.folder / "model.onnx")] if request.folder is not None else []
    if parser.parse(request.model, *beside) and network.num_outputs:
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors or "Failed to parse the ONNX model" in errors[0].desc():
        raise _failure(request, library, "cannot read a model", ["it is empty, or not ONNX"])
    name, operation = errors[0].node_name(), errors[0].node_operator()
    texts = [error.desc() for error in errors]
    # For a weight the text is a failed assertion, for an operation without importer it speaks of plugins.
    if "Failed to import initializer: " in texts[0]:
        texts = [f"the weight {texts[0].rsplit(': ', 1)[1]} cannot be read from {request.folder or 'the model'}"]
    if "Plugin not found" in texts[0] or texts[0] == "false":
        texts = [f"the operation {operation} is not supported"]
    raise _failure(request, library, "cannot read a model", texts, [name] if name else [], operation)


def _attention_layers(network: Any, trt: Any, decomposable: bool) -> int:
    """How many attentions there are, each of them allowed to become several kernels if `decomposable`."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [layer for layer in layers if kind is not None and layer.type == kind]
    for layer in found if decomposable else ():
        # The bindings give the base class; this is how a layer becomes what it is.
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = True
    return len(found)


def _configure(config: Any, request: BuildRequest, library: TensorRt) -> None:
    trt, options = library.module, request.options
    if library.capabilities:
        chosen = sorted(set(request.capabilities))
        config.num_compute_capabilities = len(chosen)
        for index, capability in enumerate(chosen):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.auxiliary_streams is not None:
        config.max_aux_streams = options.auxiliary_streams
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _profile(builder: Any, network: Any, request: BuildRequest) -> tuple[Any, dict[str, list[list[int]]]]:
    """The optimization profile and its bounds by input: least, typical and largest shape. Fixed inputs need none."""
    shapes: dict[str, list[list[int]]] = {}
    for index in range(network.num_inputs):
        port = network.get_input(index)
        sizes = list(port.shape)
        names = {port.get_dimension_name(axis) or BATCH for axis, size in enumerate(sizes) if size < 0}
        if names - {BATCH} or (names and request.rows is None):
            raise ExportError(
                "an engine has a dimension that no profile bounds", at=f"engine {request.name}, input {port.name}",
                got=", ".join(sorted(names)), want=f"fixed sizes, or {BATCH} and the rows that it counts",
            )  # fmt: skip
        if names and request.rows is not None:
            shapes[port.name] = [[rows if size < 0 else size for size in sizes] for rows in request.rows]
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.items():
        profile.set_shape(name, *map(tuple, bounds))
    return profile, shapes


def _failure(
    request: BuildRequest, library: TensorRt, what: str, texts: Iterable[str], names: Iterable[str] = (), kind: str = ""
) -> ExportError:
    """The first line of `texts` that gives a reason, and of the nodes `names` the one that it speaks of."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not any(harmless in line for harmless in _HARMLESS)] or lines
    line = next((line for line in lines if "Error Code" in line), lines[0] if lines else "no reason given")
    line = re.sub(r"\s*In \w+ at \S+:\d+", "", line)
    names = list(names)
    # Of several names the longest: `block/add` is part of `block/add_1`.
    name = names[0] if len(names) == 1 else max((name for name in names if name in line), key=len, default="")
    at = f"engine {request.name}" + (f", node {name}" if name else "") + (f" ({kind})" if kind else "")
    advice = "run this engine with ONNX Runtime, or report it with the model"
    if what == "cannot start":
        advice = "build where the GPU is, or with dcc[tensorrt-rtx], which needs none"
    return ExportError(f"{TITLES[library.flavour]} {library.version} {what}", at=at, got=line[:400], next=advice)


def _forget_peak() -> None:
    """The kernel's record of this process's most memory starts anew, where it lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
