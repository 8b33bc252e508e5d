"""Does torch-tensorrt make better TensorRT-RTX engines of the same stage graphs than the way through ONNX?

| form | how a stage becomes a network |
|---|---|
| onnx float32 | the template that dcc exports, as it is |
| onnx float16 | the same, every precision chosen by dcc's rules |
| torch-tensorrt float32 | the stage's ATen graph, as it is |
| torch-tensorrt typed | contractions in float16 and all else in float32, as `--lowering torch-tensorrt` writes it |
| torch-tensorrt autocast | the same asked of torch-tensorrt: its autocast, all but contractions excluded from it |

The first table has every distinct stage of a model as an engine of its own, the second its step as one engine. `graphs`
are seconds until there is something to build from, `builder` those of the builder, both of processor time: the machine
may have other work. Ports are as planned where they have the names, types and batch symbol that dcc's plan gives them.
No engine is run, so no GPU is needed.

Install torch-tensorrt-rtx of torch's version, without the versions that it pins: they need another torch.

    pip install --no-deps torch-tensorrt-rtx==2.13.0 dllist
    python benchmarks/torch_tensorrt.py [--models digits pixart] [--forms "onnx float16" "torch-tensorrt typed"]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import onnx
import torch
from compiled import SAMPLERS, STEPS, VARIANTS, traced_program
from onnx import numpy_helper
from torch.export import ExportedProgram

from dcc.errors import DccError
from dcc.exports.compose import EngineBody, StoredWeights, compose, port_spec
from dcc.exports.precision import strongly_typed
from dcc.exports.precision_rules import is_external
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.exports.torch_graphs import REDUCED, torch_engine
from dcc.exports.torch_tensorrt_lowering import check_installed
from dcc.exports.torch_tensorrt_networks import Converters, build_program, first_line, import_torch_tensorrt, quiet
from dcc.exports.unroll import Operation, step_stages
from dcc.frontend.samplers import sampler_table
from dcc.ir.graph import dtype_name, outputs_of
from dcc.ir.ops import is_contraction
from dcc.ir.program import Program, Stage
from dcc.passes import run_passes
from dcc.preparation import Source, pipeline, prepare
from dcc.runtime.network_record import NetworkRecord, check_network
from dcc.runtime.plan import EngineSpec, WeightSpec
from dcc.runtime.tensorrt_builder import BuildRequest, TensorRt, serialize

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "examples" / "digits" / "dit_digits.pt"
MODELS = ("digits", "pixart", "sd3", "flux", "wan")
ONNX_FORMS = ("onnx float32", "onnx float16")
TORCH_FORMS = ("torch-tensorrt float32", "torch-tensorrt typed", "torch-tensorrt autocast")
FORMS = (*ONNX_FORMS, *TORCH_FORMS)
CAPABILITY = 80
ROWS = (1, 4, 16)
DTYPE = "float16"
# Types of layers in the words of dcc's rules.
KINDS = {
    "contractions": ("matrix_multiply", "convolution", "attention_input"),
    "norms and softmax": ("normalization", "normalization_v2", "softmax", "reduce"),
    "other arithmetic": ("elementwise", "unary", "activation"),
    "casts": ("cast",),
}


@dataclass(frozen=True)
class Piece:
    """What becomes one engine."""

    name: str
    body: EngineBody

    def spec(self) -> EngineSpec:
        return EngineSpec(self.name, "step", "", tuple(self.body.inputs.values()), tuple(self.body.outputs.values()))


def piece(name: str, stages: Sequence[Stage], inputs: Sequence[Any], outputs: Sequence[Any]) -> Piece:
    operations = tuple(Operation("stage", stage.inputs, stage.outputs, stage.name) for stage in stages)
    ports = [{node: port_spec(node) for node in nodes} for nodes in (inputs, outputs)]
    return Piece(name, EngineBody(operations, *ports))


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
    # Python would take this script for the library, whose name it has.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    try:
        version = check_installed()
        library = TensorRt.find("tensorrt-rtx")
        import_torch_tensorrt()
    except DccError as error:
        raise SystemExit(str(error)) from error
    with standard_output_to_standard_error():
        measured = [item for name in options.models for item in measure(name, options.forms, library)]
    print(
        f"torch {torch.__version__}, torch-tensorrt-rtx {version}, TensorRT-RTX {library.version}, "
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
        distinct.setdefault(stage.template, piece(stage.name, [stage], stage.inputs, stage.outputs))
    in_step = {stage.template for stage in step_stages(program)}
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
    stages = step_stages(program)
    made = {node for stage in stages for node in stage.outputs}
    read = dict.fromkeys(node for stage in stages for node in stage.inputs if node not in made)
    return piece("step", stages, list(read), [outputs_of(program.graph)[0]])


def exported(program: Program, keys: Collection[str]) -> tuple[dict[str, OnnxTemplate], float]:
    """These templates as ONNX, and the seconds of it."""
    start = time.process_time()
    templates = export_templates({key: body for key, body in program.templates.items() if key in keys})
    return templates, time.process_time() - start


def attempt(build: Build, piece: Piece) -> Engine:
    try:
        with quiet():
            return build(piece)
    except DccError as error:
        return Engine(refused=str(error.details.get("got", error.what))[:160])
    except Exception as error:  # noqa: BLE001  libraries raise many types; every one means that there is no engine
        return Engine(refused=first_line(error)[:160])


def onnx_build(program: Program, templates: Mapping[str, OnnxTemplate], library: TensorRt, dtype: str) -> Build:
    """dcc's own route: templates composed, typed unless they stay in float32, and parsed by TensorRT."""

    stages = {stage.name: stage for stage in program.stages}

    def build(piece: Piece) -> Engine:
        start = time.process_time()
        specs, arrays = {}, {}
        for stage in (stages[name] for name in piece.body.stages()):
            for index, name in enumerate(stage.weights):
                transposed = index in templates[stage.template].transposed
                tensor = program.weights[name].t() if transposed else program.weights[name]
                label = f"{name}^T" if transposed else name
                arrays[f"w/{label}"] = array = tensor.contiguous().numpy()
                specs[name, transposed] = WeightSpec(
                    label, dtype_name(tensor.dtype), tuple(tensor.shape), "weights.bin", 0, array.nbytes
                )
        body = piece.body
        weights = StoredWeights(specs, 0)
        composed, _ = compose(piece.name, body.operations, stages, templates, body.inputs, body.outputs, weights)
        model = onnx.load_model_from_string(composed)
        if dtype == "float32":
            for tensor in model.graph.initializer:
                if is_external(tensor):
                    tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        else:
            model = strongly_typed(model, dtype, arrays.__getitem__).embedded()
        request = BuildRequest(piece.name, model.SerializeToString(), (CAPABILITY,), ROWS)
        seconds = time.process_time() - start
        start = time.process_time()
        data, record, _ = serialize(request, library)
        return engine(piece, record, data.nbytes, seconds, time.process_time() - start)

    return build


def torch_build(program: Program, library: TensorRt, form: str) -> Build:
    """torch-tensorrt's converters make the network, and TensorRT's builder, set as dcc sets it, the engine."""

    def build(piece: Piece) -> Engine:
        start = time.process_time()
        exported = torch_engine(program, piece.body, DTYPE if form.endswith("typed") else "float32")
        settings = autocast(exported) if form.endswith("autocast") else {}
        ports = list(piece.body.inputs.values()), list(piece.body.outputs.values())
        converters = Clocked(piece.name, exported, *ports, **settings)
        seconds = time.process_time() - start
        request = BuildRequest(piece.name, b"", (CAPABILITY,), ROWS)
        start = time.process_time()
        data, record, _ = build_program(request, converters, library)
        building = time.process_time() - start - converters.seconds
        return engine(piece, record, data.nbytes, seconds + converters.seconds, building)

    return build


class Clocked(Converters):
    """Knows how long it made networks: the builder's seconds have that inside."""

    seconds = 0.0

    def network(self, network: Any, logger: Any) -> Any:
        start = time.process_time()
        made = super().network(network, logger)
        self.seconds += time.process_time() - start
        return made


def autocast(exported: ExportedProgram) -> dict[str, Any]:
    """torch-tensorrt's own reduction of precision, of contractions alone."""
    registry = importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry").ConverterRegistry
    excluded = {
        registry.qualified_name_or_str(node.target) for node in exported.graph.nodes
        if node.op == "call_function" and not is_contraction(node)
    }  # fmt: skip
    return {
        "enable_autocast": True, "autocast_low_precision_type": REDUCED[DTYPE], "autocast_excluded_ops": excluded,
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
