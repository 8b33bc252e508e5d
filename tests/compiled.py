"""Zoo models traced and compiled, each once in a process: torch.export and the ONNX exporter take seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import zoo
from torch.fx import Graph

from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.lower import lower
from dcc.frontend.samplers import sampler_table
from dcc.frontend.trace import trace
from dcc.ir.program import Guidance, Program
from dcc.passes import run_passes
from dcc.preparation import manifest_of, pipeline

ROWS = 16
STEPS = 4
VARIANTS: dict[str, Callable[[], zoo.ZooModel]] = {
    **zoo.MODELS,
    "dit8": lambda: zoo.dit(depth=8),
    "pixart_alpha": lambda: zoo.pixart(depth=2, additional_conditions=False),
}
# What the frontend knows of the families with class labels.
NULLS = {"dit": {"y": 10.0}, "dit8": {"y": 10.0}, "uvit": {"y": 10.0}, "diffusers_dit": {"class_labels": 10.0}}
# A sampler and its options for each family; "ddim" for the others.
SAMPLERS: dict[str, tuple[str, dict[str, str]]] = {
    "diffusers_dit": ("ddpm", {"variance_type": "learned_range"}),
    **dict.fromkeys(("sd3", "sd35", "flux", "wan"), ("flow-euler", {})),
}
_MODELS: dict[str, zoo.ZooModel] = {}
_TRACES: dict[str, Program] = {}


def model_of(name: str) -> zoo.ZooModel:
    """The zoo model of this name, the same object each time."""
    if name not in _MODELS:
        _MODELS[name] = VARIANTS[name]()
    return _MODELS[name]


def traced_program(name: str) -> Program:
    """A fresh Program of a zoo model."""
    if name not in _TRACES:
        module, inputs, roles = model_of(name)
        nulls = NULLS.get(name, {})
        _TRACES[name] = trace(
            module, inputs, roles, name=name, nulls=nulls, rows=ROWS,
            ranges={key: (0, int(null)) for key, null in nulls.items()},
            unbatched=[key for key in inputs if key.endswith("_ids")],
        )  # fmt: skip
    return copy_program(_TRACES[name])


def copy_program(program: Program) -> Program:
    """A Program that passes may change; tensors are shared, because no pass writes into one."""
    graph, copies = Graph(), {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    assert [node.name for node in graph.nodes] == [node.name for node in program.graph.nodes]
    return replace(
        program, graph=graph, weights=dict(program.weights), scopes={}, stages=[], templates={}, reports=[]
    )


def write_artifact(program: Program, path: Path, granularity: str = "component", opt_level: int = 1) -> None:
    """What `dcc.compile` does after tracing, without its check against the model."""
    if program.sampler is None:
        name, options = SAMPLERS.get(program.name, ("ddim", {}))
        program.sampler = sampler_table(name, steps=STEPS, **options)
    if NULLS.get(program.name) and program.guidance.mode == "none":
        channels = 4 if program.name == "diffusers_dit" else None
        program.guidance = Guidance("cfg", 3.0, channels)
    run_passes(program, pipeline(opt_level))
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, granularity)
        writer.finish(manifest_of(program, plan, program.hash(), "cpu", {}))


def relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute difference over the range of `wanted`, as `dcc.tolerances` means it."""
    return float(np.abs(got.astype(np.float64) - wanted).max() / (np.ptp(wanted) or 1.0))
