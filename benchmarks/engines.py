"""What do TensorRT-RTX engines cost to build on this machine, which needs no GPU for it?

The denoiser's step of a DiT (one block unless `--depth` says more, with the patch embedding and the last layer) in
float16, for one compute capability and for all that the library has, with the weights in the engine and as inputs of
it. Medians of `--repeats` builds in one worker process; `peak` is all that the worker held.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, helper, load_model_from_string

from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.engine_workers import build_all
from dcc.exports.lower import lower
from dcc.exports.precision import Typed, strongly_typed
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.samplers import sampler_table
from dcc.frontend.trace import trace
from dcc.ir.program import Guidance
from dcc.passes import run_passes
from dcc.preparation import manifest_of, pipeline
from dcc.runtime.artifact import Artifact
from dcc.runtime.tensorrt_builder import BuildRequest, TensorRt

WIDTHS = {"DiT-S/2": (384, 6), "DiT-XL/2": (1152, 16)}
ROWS = (1, 4, 16)
MIB = 2**20


def step(width: int, heads: int, depth: int) -> Typed:
    """The step of a DiT with random weights, in float16 where that is right."""
    module = DiT(DiTConfig(hidden_size=width, num_heads=heads, depth=depth)).eval()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    inputs = {"x": torch.randn(2, 4, 32, 32), "t": torch.tensor([1.0, 999.0]), "y": torch.tensor([1, 2])}
    roles = {"x": "latent", "t": "timestep", "y": "condition"}
    program = trace(
        module, inputs, roles, name="dit", nulls={"y": 1000.0}, rows=ROWS[-1], ranges={"y": (0, 1000)}
    )  # fmt: skip
    program.sampler, program.guidance = sampler_table("ddim", steps=4), Guidance("cfg", 3.0, None)
    run_passes(program, pipeline(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit.dcc"
        with ArtifactWriter(path) as writer:
            plan = lower(program, writer)
            writer.finish(manifest_of(program, plan, program.hash(), "cpu", {}))
        artifact = Artifact.open(path)
        weights = {f"w/{spec.name}": artifact.map_weight(spec.name).copy() for spec in plan.weights}
        model = load_model_from_string(artifact.engine_model("step"))
    return strongly_typed(model, "float16", weights.__getitem__)


def with_weights_in_file(typed: Typed, path: Path) -> ModelProto:
    """A copy of the model whose large weights lie in the file, one in memory at a time."""
    model = ModelProto()
    model.CopyFrom(typed.model)
    declared = set(typed.declared())
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name in declared:
                data = np.ascontiguousarray(typed.weight(tensor.name)).tobytes()
                del tensor.external_data[:]
                place = {"location": path.name, "offset": file.tell(), "length": len(data)}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                file.write(data)
    return model


def with_weights_as_inputs(typed: Typed) -> ModelProto:
    """A copy of the model that is given its large weights in every call."""
    model = ModelProto()
    model.CopyFrom(typed.model)
    declared = set(typed.declared())
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in declared]
    for tensor in model.graph.initializer:
        if tensor.name in declared:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def measure(name: str, typed: Typed, repeats: int, library: TensorRt, folder: Path) -> Iterator[str]:
    """Rows of the table."""
    size = sum(typed.weight(weight).nbytes for weight in typed.declared())
    forms = {
        "in the engine": with_weights_in_file(typed, folder / "weights.bin"),
        "as inputs": with_weights_as_inputs(typed),
    }
    for form, model in forms.items():
        for capabilities in ((80,), library.capabilities):
            request = BuildRequest("step", model.SerializeToString(), capabilities, ROWS, folder=folder)
            seconds, peaks = [], []
            for engine in build_all([request] * repeats, library):
                seconds.append(engine.cost.seconds)
                peaks.append(engine.cost.peak_bytes)
            yield (
                f"| {name} | {form} | {' '.join(map(str, capabilities))} | {statistics.median(seconds):.2f} s "
                f"| {len(engine.data):,} B | {size:,} B | {max(peaks) / MIB:.0f} MiB "
                f"| {len(engine.record['layers'])} | {engine.record['attention']} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    options = parser.parse_args()
    torch.manual_seed(0)
    library = TensorRt.find("tensorrt-rtx")
    print(f"TensorRT-RTX {library.version}, {options.depth} block(s), batch {ROWS[0]} to {ROWS[-1]}\n")
    print("| model | weights | capabilities | build | engine | weights' bytes | peak | layers | attention |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            typed = step(*WIDTHS[name], options.depth)
            for row in measure(name, typed, options.repeats, library, Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
