"""Does torch-tensorrt make better TensorRT-RTX engines of the same stage graphs than the way through ONNX?

| form | how a stage becomes a network |
|---|---|
| onnx float32 | the template that dcc exports, as it is |
| onnx float16 | the same, every precision chosen by dcc's rules |
| torch-tensorrt float32 | the stage's ATen graph, as it is |
| torch-tensorrt typed | contractions in float16 and all else in float32, by casts that this script writes |
| torch-tensorrt autocast | the same asked of torch-tensorrt: its autocast, all but contractions excluded from it |

The first table has every distinct stage of a model as an engine of its own, the second its step as one engine. `graphs`
are seconds until there is something to build from, `builder` those of the builder. Ports are as planned where they
have the names, types and batch symbol that dcc's plan gives them. No engine is run, so no GPU is needed.

Install torch-tensorrt-rtx of torch's version, without the versions that it pins: they need another torch.

    pip install --no-deps torch-tensorrt-rtx==2.13.0 dllist
    python benchmarks/torch_tensorrt.py [--models digits pixart] [--forms "onnx float16" "torch-tensorrt typed"]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import onnx
import torch
from compiled import SAMPLERS, STEPS, VARIANTS, traced_program
from onnx import numpy_helper
from torch.fx import Graph, GraphModule, Node

from dcc.errors import DccError
from dcc.exports.compose import StoredWeights, compose, port_spec
from dcc.exports.precision import strongly_typed
from dcc.exports.precision_rules import is_external
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.exports.unroll import Operation, step_stages
from dcc.frontend.samplers import sampler_table
from dcc.ir.graph import BATCH, DTYPES, dtype_name, dtype_of, outputs_of, shape_of
from dcc.ir.program import Program, Stage
from dcc.passes import run_passes
from dcc.preparation import Source, pipeline, prepare
from dcc.runtime.network_record import NetworkRecord, check_network, layer_record, port_record
from dcc.runtime.plan import EngineSpec, WeightSpec
from dcc.runtime.tensorrt_builder import BuildRequest, TensorRt, serialize

aten = torch.ops.aten

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "examples" / "digits" / "dit_digits.pt"
MODELS = ("digits", "pixart", "sd3", "flux", "wan")
ONNX_FORMS = ("onnx float32", "onnx float16")
TORCH_FORMS = ("torch-tensorrt float32", "torch-tensorrt typed", "torch-tensorrt autocast")
FORMS = (*ONNX_FORMS, *TORCH_FORMS)
CAPABILITY = 80
ROWS = (1, 4, 16)
REDUCED = torch.float16
CONTRACTIONS = {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.scaled_dot_product_attention.default,
}  # fmt: skip
# Types of layers in the words of dcc's rules.
KINDS = {
    "contractions": ("matrix_multiply", "convolution", "attention_input"),
    "norms and softmax": ("normalization", "normalization_v2", "softmax", "reduce"),
    "other arithmetic": ("elementwise", "unary", "activation"),
    "casts": ("cast",),
}
# torch_tensorrt uses its Python runtime where these are not there.
LINKED_AGAINST_CUDA = ("libtorchtrt.so", "libtorchtrt_runtime.so")


@dataclass(frozen=True)
class Piece:
    """What becomes one engine: stages, the values that they read and those that leave."""

    name: str
    stages: tuple[Stage, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    def spec(self) -> EngineSpec:
        inputs, outputs = (tuple(map(port_spec, nodes)) for nodes in (self.inputs, self.outputs))
        return EngineSpec(self.name, "step", "", inputs, outputs)


@dataclass(frozen=True)
class Engine:
    """What came of a piece: the engine's size and costs, or in `refused` the reason why there is none."""

    refused: str = ""
    misplaced: str = ""
    graph_seconds: float = 0.0
    builder_seconds: float = 0.0
    size: int = 0
    layers: list[list[Any]] = field(default_factory=list)
    attention: str = ""


@dataclass(frozen=True)
class Measured:
    """The engines of one model in one form; `shared_seconds` were spent once, for all stages."""

    model: str
    form: str
    stages: list[Engine]
    shared_seconds: float
    step: Engine


Build = Callable[[Piece], Engine]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["digits", *VARIANTS], default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    torch_tensorrt = imported()
    try:
        library = TensorRt.find("tensorrt-rtx")
    except DccError as error:
        raise SystemExit(str(error)) from error
    with standard_output_to_standard_error():
        measured = [item for name in options.models for item in measure(name, options.forms, library)]
    print(
        f"torch {torch.__version__}, torch-tensorrt-rtx {torch_tensorrt.__version__}, TensorRT-RTX {library.version}, "
        f"sm{CAPABILITY}, batch {ROWS[0]} to {ROWS[-1]}, {torch.get_num_threads()} thread(s)\n"
    )
    print("| model | form | stages | ports as planned | graphs | builder | engines | layers | first reason |")
    print("|---|---|---|---|---|---|---|---|---|")
    for item in measured:
        print(coverage_row(item))
    print("\n| model | form | graphs | builder | engine | layers | " + " | ".join(KINDS) + " | attention |")
    print("|---|---|---|---|---|---|" + "---|" * len(KINDS) + "---|")
    for item in measured:
        print(step_row(item))


def imported() -> ModuleType:
    """torch_tensorrt, for the building of engines alone. Raises SystemExit in one line where there is none."""
    # Python would take this script for the library, whose name it has.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise SystemExit("torch_tensorrt is not installed: pip install --no-deps torch-tensorrt-rtx dllist")
    try:
        with quiet(), with_or_without_a_gpu():
            return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it looks for devices and libraries, and raises whatever they raise
        raise SystemExit(f"torch_tensorrt cannot be imported: {first_line(error)}") from error


@contextmanager
def with_or_without_a_gpu() -> Iterator[None]:
    """torch_tensorrt can be imported where there is no GPU, though it asks for one."""
    found = os.path.isfile
    patches = [
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (0, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        # It is only the name of a parameter's type.
        mock.patch.object(torch._C, "_CudaDeviceProperties", object, create=True),
        mock.patch.object(os.path, "isfile", lambda path: Path(path).name not in LINKED_AGAINST_CUDA and found(path)),
    ]
    with ExitStack() as stack:
        for patch in () if torch.cuda.is_available() else patches:
            stack.enter_context(patch)
        yield


@contextmanager
def standard_output_to_standard_error() -> Iterator[None]:
    """TensorRT prints to standard output where it fails."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def prepared(name: str) -> Program:
    """The Program of a model after the exact passes."""
    if name == "digits":
        return prepare(Source(DIGITS, max_batch=ROWS[-1] // 2)).program
    program = traced_program(name)
    sampler, sampler_options = SAMPLERS.get(name, ("ddim", {}))
    program.sampler = sampler_table(sampler, steps=STEPS, **sampler_options)
    run_passes(program, pipeline(1))
    return program


def measure(name: str, forms: Sequence[str], library: TensorRt) -> Iterator[Measured]:
    """Every form of the model's distinct stages and of its step."""
    program = prepared(name)
    step = whole_step(program)
    distinct: dict[str, Piece] = {}
    for stage in program.stages:
        distinct.setdefault(stage.template, Piece(stage.name, (stage,), stage.inputs, stage.outputs))
    in_step = {stage.template for stage in step.stages}
    templates, step_seconds = exported(program, in_step)
    others, other_seconds = exported(program, distinct.keys() - in_step)
    for form in forms:
        print(f"{name}: {form}", file=sys.stderr, flush=True)
        through_onnx = form in ONNX_FORMS
        if through_onnx:
            build = onnx_build(program, templates | others, library, form.removeprefix("onnx "))
        else:
            build = torch_build(program, library, form)
        stages = [attempt(build, piece) for piece in distinct.values()]
        whole = attempt(build, step)
        if through_onnx:
            whole = replace(whole, graph_seconds=whole.graph_seconds + step_seconds)
        yield Measured(name, form, stages, through_onnx * (step_seconds + other_seconds), whole)


def whole_step(program: Program) -> Piece:
    """What the compiler makes one engine without a schedule."""
    stages = tuple(step_stages(program))
    made = {node for stage in stages for node in stage.outputs}
    read = dict.fromkeys(node for stage in stages for node in stage.inputs if node not in made)
    return Piece("step", stages, tuple(read), (outputs_of(program.graph)[0],))


def exported(program: Program, keys: Collection[str]) -> tuple[dict[str, OnnxTemplate], float]:
    """These templates as ONNX, and the seconds of it."""
    start = time.perf_counter()
    templates = export_templates({key: body for key, body in program.templates.items() if key in keys})
    return templates, time.perf_counter() - start


def attempt(build: Build, piece: Piece) -> Engine:
    try:
        with quiet():
            return build(piece)
    except Exception as error:  # noqa: BLE001  converters raise many types; every one means that there is no engine
        return Engine(refused=first_line(error))


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:160]}"


def onnx_build(program: Program, templates: Mapping[str, OnnxTemplate], library: TensorRt, dtype: str) -> Build:
    """dcc's own route: templates composed, typed unless they stay in float32, and parsed by TensorRT."""

    def build(piece: Piece) -> Engine:
        start = time.perf_counter()
        specs, arrays = {}, {}
        for stage in piece.stages:
            for index, name in enumerate(stage.weights):
                transposed = index in templates[stage.template].transposed
                tensor = program.weights[name].t() if transposed else program.weights[name]
                label = f"{name}^T" if transposed else name
                arrays[f"w/{label}"] = array = tensor.contiguous().numpy()
                specs[name, transposed] = WeightSpec(
                    label, dtype_name(tensor.dtype), tuple(tensor.shape), "weights.bin", 0, array.nbytes
                )
        operations = [Operation("stage", stage.inputs, stage.outputs, stage.name) for stage in piece.stages]
        stages = {stage.name: stage for stage in piece.stages}
        inputs, outputs = ({node: port_spec(node) for node in nodes} for nodes in (piece.inputs, piece.outputs))
        composed, _ = compose(piece.name, operations, stages, templates, inputs, outputs, StoredWeights(specs, 0))
        model = onnx.load_model_from_string(composed)
        if dtype == "float32":
            for tensor in model.graph.initializer:
                if is_external(tensor):
                    tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        else:
            model = strongly_typed(model, dtype, arrays.__getitem__).embedded()
        request = BuildRequest(piece.name, model.SerializeToString(), (CAPABILITY,), ROWS)
        seconds = time.perf_counter() - start
        data, record, cost = serialize(request, library)
        return engine(piece, record, data.nbytes, seconds, cost.seconds)

    return build


def torch_build(program: Program, library: TensorRt, form: str) -> Build:
    """torch-tensorrt's converters make the network, and TensorRT's builder, set as dcc sets it, the engine.

    Its own `convert_exported_program_to_serialized_trt_engine` does the same steps, but knows no compute capability and
    ends with loading the engine, which needs a GPU.
    """

    def build(piece: Piece) -> Engine:
        start = time.perf_counter()
        module = module_of(program, piece)
        if form.endswith("typed"):
            cast_contractions(module)
        interpreter = interpreted(module, piece, autocast=form.endswith("autocast"))
        network = interpreter.ctx.net
        for index, node in enumerate(piece.outputs):
            network.get_output(index).name = port_spec(node).name
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        # A kernel for every attention is asked for first, as dcc's builder does.
        fused = True
        count = let_attention_decompose(network, library.module, False)
        data = serialized(interpreter, library)
        if data is None and count:
            fused = False
            let_attention_decompose(network, library.module, True)
            data = serialized(interpreter, library)
        if data is None:
            raise RuntimeError("the builder returned no engine")
        record = recorded(network, library, ("fused" if fused else "decomposable") if count else "")
        return engine(piece, record, memoryview(data).nbytes, seconds, time.perf_counter() - start)

    return build


def module_of(program: Program, piece: Piece) -> GraphModule:
    """The piece's ATen graph, its weights inside."""
    graph, root = Graph(), torch.nn.Module()
    values: dict[Node, Node] = {}
    weights: dict[str, Node] = {}
    for node in piece.inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta["val"] = node.meta["val"]
    for stage in piece.stages:
        template = program.templates[stage.template].graph
        ports, names = iter(stage.inputs), iter(stage.weights)
        copies: dict[Node, Node] = {}
        for node in template.nodes:
            if node.op == "placeholder" and node.name.startswith("p"):
                copies[node] = values[next(ports)]
            elif node.op == "placeholder":
                name = next(names)
                if name not in weights:
                    attribute = f"weight{len(weights)}"
                    root.register_buffer(attribute, program.weights[name])
                    weights[name] = graph.get_attr(attribute)
                    weights[name].meta["val"] = program.weights[name]
                copies[node] = weights[name]
            elif node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        values |= {made: copies[result] for made, result in zip(stage.outputs, outputs_of(template), strict=True)}
    graph.output(tuple(values[node] for node in piece.outputs))
    return GraphModule(root, graph)


def cast_contractions(module: GraphModule) -> None:
    """Contractions compute in the reduced type; what reads them has float32 again."""
    graph = module.graph

    def reduced(value: Node) -> Node:
        known = value.meta.get("val")
        if not isinstance(known, torch.Tensor) or known.dtype != torch.float32:
            return value
        return graph.call_function(aten._to_copy.default, (value,), {"dtype": REDUCED})

    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in CONTRACTIONS:
            continue
        with graph.inserting_before(node):
            node.args = torch.fx.map_arg(node.args, reduced)
            node.kwargs = torch.fx.map_arg(node.kwargs, reduced)
        with graph.inserting_after(node):
            result = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result, lambda user, result=result: user is not result)
    module.recompile()


def interpreted(module: GraphModule, piece: Piece, autocast: bool) -> Any:
    """torch-tensorrt's interpreter after it has made the network. Raises whatever its converters raise."""
    from torch_tensorrt import Device
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import ConverterRegistry
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    excluded = {
        ConverterRegistry.qualified_name_or_str(node.target) for node in module.graph.nodes
        if node.op == "call_function" and node.target not in CONTRACTIONS
    }  # fmt: skip
    settings = CompilationSettings(
        device=Device(gpu_id=0), disable_tf32=True, truncate_double=True, attn_bias_is_causal=False,
        enable_autocast=autocast, autocast_low_precision_type=REDUCED if autocast else None,
        autocast_excluded_ops=excluded if autocast else set(),
    )  # fmt: skip
    with torch.no_grad():
        examples, symbols, profiles = described(piece.inputs)
        program = torch.export.export(module, examples, dynamic_shapes=symbols)
        program = pre_export_lowering(program, settings)
        lowered = post_lowering(program.run_decompositions(get_decompositions(False, False, False)).module(), settings)
        dtypes = infer_module_output_dtypes(lowered, truncate_double=True)
        interpreter = TRTInterpreter(lowered, profiles, output_dtypes=dtypes, compilation_settings=settings)
        # Its `run` would go on to build and load the engine.
        interpreter._construct_trt_network_def()
    return interpreter


def described(inputs: Sequence[Node]) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...], list[Any]]:
    """Of each input an example, its axes that count rows, and torch-tensorrt's profile of it."""
    from torch_tensorrt import Input

    batch = torch.export.Dim("B", min=1, max=65536)
    examples, symbols, profiles = [], [], []
    for node in inputs:
        shape, dtype = shape_of(node), DTYPES[dtype_of(node)]
        examples.append(torch.zeros([3 if size == BATCH else int(size) for size in shape], dtype=dtype))
        symbols.append({axis: batch for axis, size in enumerate(shape) if size == BATCH} or None)
        least, typical, most = ([rows if size == BATCH else size for size in shape] for rows in ROWS)
        sizes = {"min_shape": least, "opt_shape": typical, "max_shape": most} if BATCH in shape else {"shape": most}
        profiles.append(Input(dtype=dtype, **sizes))
    return tuple(examples), tuple(symbols), profiles


def let_attention_decompose(network: Any, trt: ModuleType, decomposable: bool) -> int:
    """How many attentions there are, all of them now allowed to become several kernels, or none."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for layer in found:
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = decomposable
    return len(found)


def serialized(interpreter: Any, library: TensorRt) -> Any:
    """The engine of the interpreter's network, or None."""
    trt = library.module
    config = interpreter.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{CAPABILITY}"), 0)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in interpreter.optimization_profiles or ():
        config.add_optimization_profile(profile)
    return interpreter.builder.build_serialized_network(interpreter.ctx.net, config)


def recorded(network: Any, library: TensorRt, attention: str) -> NetworkRecord:
    return {
        "library": library.flavour, "version": library.version, "device": "", "capabilities": [CAPABILITY],
        "inputs": [port_record(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [port_record(network.get_output(index)) for index in range(network.num_outputs)],
        "profiles": [], "layers": [layer_record(network.get_layer(index)) for index in range(network.num_layers)],
        "attention": attention, "options": {},
    }  # fmt: skip


def engine(piece: Piece, record: NetworkRecord, size: int, graph_seconds: float, builder_seconds: float) -> Engine:
    misplaced = ""
    try:
        check_network(record, piece.spec())
    except DccError as error:
        misplaced = f"{error.details['at']}: {error.details['got']}, planned {error.details['want']}"
    return Engine("", misplaced, graph_seconds, builder_seconds, size, record["layers"], record["attention"])


def coverage_row(item: Measured) -> str:
    made = [engine for engine in item.stages if not engine.refused]
    as_planned = sum(not engine.misplaced for engine in made)
    reasons = [*(engine.refused for engine in item.stages), *(engine.misplaced for engine in made)]
    reason = next(filter(None, reasons), "")
    seconds = item.shared_seconds + sum(engine.graph_seconds for engine in made)
    return (
        f"| {item.model} | {item.form} | {len(made)} of {len(item.stages)} | {as_planned} of {len(made)} "
        f"| {seconds:.1f} s | {sum(engine.builder_seconds for engine in made):.1f} s "
        f"| {sum(engine.size for engine in made):,} B | {sum(len(engine.layers) for engine in made)} | {reason} |"
    )


def step_row(item: Measured) -> str:
    step = item.step
    if step.refused:
        return f"| {item.model} | {item.form} | {step.refused} |" + " |" * (len(KINDS) + 4)
    counts = []
    for kinds in KINDS.values():
        types = Counter("+".join(sorted(set(dtypes))) for _, kind, dtypes in step.layers if kind in kinds)
        counts.append(", ".join(f"{count} {dtype}" for dtype, count in types.most_common()) or "none")
    return (
        f"| {item.model} | {item.form} | {step.graph_seconds:.1f} s | {step.builder_seconds:.1f} s | {step.size:,} B "
        f"| {len(step.layers)} | " + " | ".join(counts) + f" | {step.attention} |"
    )


if __name__ == "__main__":
    main()
