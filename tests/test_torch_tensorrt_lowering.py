"""`--lowering torch-tensorrt`: the same engines by another way, proven by the same check, and refused in time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from schedule_reference import subject
from test_schedule_lowering import SCHEDULES
from torch.fx import Graph, GraphModule

from dcc import cli
from dcc import layers as layers_module
from dcc.cost_model.targets import targets_named
from dcc.driver import compile
from dcc.errors import DccError, ExportError, UsageError
from dcc.exports import torch_tensorrt_lowering as lowering_module
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import EngineBody
from dcc.exports.lower import lower
from dcc.exports.torch_graphs import as_function, reduce_contractions, torch_engine
from dcc.exports.torch_tensorrt_lowering import TorchTensorRt, check_installed
from dcc.ir.program import Program
from dcc.layer_check import check_functions
from dcc.layers import BuildOptions, add_layers, layer_requests
from dcc.preparation import manifest_of
from dcc.runtime.artifact import Artifact
from dcc.runtime.engine_cache import EngineCache
from dcc.runtime.tensorrt_builder import TensorRt
from dcc.tolerances import TOLERANCE

aten = torch.ops.aten


@dataclass(frozen=True)
class Lowered:
    """An artifact, and what its engines compute."""

    path: Path
    program: Program
    bodies: Mapping[str, EngineBody]


@pytest.fixture
def installed() -> None:
    """Skips where an engine cannot be made."""
    try:
        check_installed()
        TensorRt.find("tensorrt-rtx")
    except ExportError as error:
        pytest.skip(f"{error.what}: {error.details['next']}")


def lowered(name: str, what: str, path: Path) -> Lowered:
    """A zoo model under a schedule."""
    model = subject(name)
    schedule = SCHEDULES[what](model.program.components, model.program.calls)
    program, bodies = replace(model.program, schedule=schedule), {}
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, templates=model.templates, bodies=bodies)
        writer.finish(manifest_of(program, plan, "0" * 64, "cpu", {}))
    assert bodies.keys() == {engine.name for engine in plan.engines}
    return Lowered(path, program, bodies)


def test_torch_graphs_compute_what_the_engines_compute(tmp_path: Path) -> None:
    """Copies and combinations among them; and a graph with another weight does not pass."""
    made = lowered("dit", "output", tmp_path / "model.dcc")
    artifact = Artifact.open(made.path)
    functions = {engine: as_function(torch_engine(made.program, body), body) for engine, body in made.bodies.items()}
    found = check_functions(artifact, "float32", functions.__getitem__)
    assert found.engines.keys() == made.bodies.keys(), "an engine was never run"
    kinds = {operation.kind for body in made.bodies.values() for operation in body.operations}
    assert kinds == {"stage", "combine", "copy"}
    engine = next(spec for spec in artifact.plan.engines if spec.kind == "step" and spec.weights)
    name = next(name for name in engine.weights if made.program.weights[name.removesuffix("^T")].ndim > 1)
    name = name.removesuffix("^T")
    wrong = replace(made.program, weights=made.program.weights | {name: made.program.weights[name] * 2})
    body = made.bodies[engine.name]
    functions[engine.name] = as_function(torch_engine(wrong, body), body)
    with pytest.raises(ExportError, match="does not compute what the exact one computes") as caught:
        check_functions(artifact, "float32", functions.__getitem__)
    assert engine.name in str(caught.value)


def contractions(weight: float, angle: bool, to: torch.dtype = torch.float16) -> list[str]:
    """The types that a linear and what reads it compute in, after the reduction."""
    root, graph = torch.nn.Module(), Graph()
    root.register_buffer("w", torch.full((4, 4), weight))
    x = graph.placeholder("x")
    w = graph.get_attr("w")
    product = graph.call_function(aten.linear.default, (x, w))
    result = graph.call_function((aten.sin if angle else aten.exp).default, (product,))
    for node in (x, w, product, result):
        node.meta["val"] = torch.zeros(4, 4)
    graph.output((result,))
    module = GraphModule(root, graph)
    reduce_contractions(module, to)
    seen: list[str] = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            made = super().call_function(target, args, kwargs)
            if target is not aten._to_copy.default:
                seen.append(f"{target._schema.name.removeprefix('aten::')} {made.dtype}")
            return made

    Watch(module).run(torch.zeros(4, 4))
    assert [*module.state_dict()] == (["w_reduced"] if str(to) in seen[0] else ["w"])
    return seen


def test_contractions_are_reduced_by_the_rules() -> None:
    assert contractions(1.0, angle=False) == ["linear torch.float16", "exp torch.float32"]
    assert contractions(1.0, angle=True) == ["linear torch.float32", "sin torch.float32"]
    assert contractions(1e5, angle=False) == ["linear torch.float32", "exp torch.float32"]
    assert contractions(1e5, angle=False, to=torch.bfloat16) == ["linear torch.bfloat16", "exp torch.float32"]


def test_engines_of_a_schedule_are_those_of_the_plan(
    installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several step engines, histories and combinations; two capabilities in one engine; the second time cached."""
    made = lowered("dit", "whole stack", tmp_path / "model.dcc")
    networks = TorchTensorRt(made.program, made.bodies)
    options = BuildOptions(cache=EngineCache(tmp_path / "cache"), networks=networks)
    requests = layer_requests(targets_named("a100,rtx4090"), "bf16")
    [layer] = add_layers(made.path, requests, tmp_path / "out.dcc", options)
    artifact = Artifact.open(tmp_path / "out.dcc")
    assert artifact.manifest["tools"]["torch-tensorrt"] == networks.version
    assert layer.summary["lowering"] == f"torch-tensorrt {networks.version}"
    assert TOLERANCE["float32"].forward < layer.summary["forward_error"] <= TOLERANCE["bfloat16"].forward
    assert layer.graphs.keys() == layer.engines.keys() > made.bodies.keys()
    records = json.loads(artifact.read(layer.records))
    assert len([name for name in made.bodies if name.startswith("step.")]) > 1 and artifact.plan.histories
    for name, body in made.bodies.items():
        network = records[name]["network"]
        assert network["capabilities"] == [80, 89]
        assert [port["name"] for port in network["inputs"]] == [port.name for port in body.inputs.values()]
        shapes = [port["shape"] for port in network["inputs"]]
        assert len(network["profiles"]) == any("B" in shape for shape in shapes)
        kinds = {(kind, dtype) for _, kind, dtypes in network["layers"] for dtype in dtypes}
        assert {dtype for kind, dtype in kinds if kind in ("matrix_multiply", "convolution")} <= {"bfloat16"}
        assert {dtype for kind, dtype in kinds if kind in ("normalization", "softmax")} <= {"float32"}
    [again] = add_layers(made.path, requests, tmp_path / "again.dcc", replace(options, check=False))
    assert {row["cached"] for row in again.summary["engines"].values()} == {True}
    assert cli.main(["inspect", str(tmp_path / "again.dcc")]) == 0
    assert f"networks by torch-tensorrt {networks.version}" in capsys.readouterr().out


def test_compile_gives_the_layer_what_every_engine_computes(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs, roles = zoo.dit(depth=1)
    given: list[tuple[Artifact, BuildOptions]] = []

    def made(path: Path, _: Any, options: BuildOptions, **others: Any) -> list[Any]:
        given.append((Artifact.open(path), options))
        return []

    monkeypatch.setattr(layers_module, "add_layers", made)
    compile(
        module, output=tmp_path / "a.dcc", example_inputs=inputs, roles=roles, target="a100", sampler="ddim", steps=2,
        lowering="torch-tensorrt", engine_cache=False,
    )  # fmt: skip
    [(artifact, options)] = given
    assert isinstance(options.networks, TorchTensorRt)
    assert options.networks._bodies.keys() == {engine.name for engine in artifact.plan.engines}
    assert artifact.manifest["recipe"]["lowering"] == "torch-tensorrt"


def test_an_operation_without_a_converter_is_named(installed: None, tmp_path: Path) -> None:
    made = lowered("dit", "exact", tmp_path / "model.dcc")
    before = made.path.read_bytes()
    stage = made.program.stages[0]
    graph = Graph()
    graph.output(graph.graph_copy(made.program.templates[stage.template].graph, {}))
    linear = next(node for node in graph.nodes if node.target is aten.linear.default)
    with graph.inserting_after(linear):
        odd = graph.call_function(aten.lgamma.default, (linear,))
    odd.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(odd, lambda user: user is not odd)
    templates = made.program.templates | {stage.template: GraphModule(torch.nn.Module(), graph)}
    networks = TorchTensorRt(replace(made.program, templates=templates), made.bodies)
    options = BuildOptions(check=False, networks=networks)
    with pytest.raises(ExportError, match="torch-tensorrt refuses an engine") as caught:
        add_layers(made.path, layer_requests(targets_named("a100")), options=options)
    message = str(caught.value)
    assert "lgamma" in message and f"stage {stage.name}" in message and "--lowering onnx" in message
    assert made.path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["model.dcc"]


def test_a_worker_that_dies_is_an_error(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lowered("dit", "exact", tmp_path / "model.dcc")
    monkeypatch.setattr(lowering_module, "_WORKER", "import os; os.write(2, b'last words'); os.kill(os.getpid(), 9)")
    options = BuildOptions(check=False, networks=TorchTensorRt(made.program, made.bodies))
    with pytest.raises(ExportError, match="died") as caught:
        add_layers(made.path, layer_requests(targets_named("a100")), options=options)
    assert "signal 9" in str(caught.value) and "last words" in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["model.dcc"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lowering": "onnx-trt"}, ("unknown lowering 'onnx-trt'", "onnx or torch-tensorrt")),
        ({"target": "cpu"}, ("makes engines for GPUs", "target cpu", "a100")),
        ({"target": "h100"}, ("cannot serve the backend tensorrt,", "h100", "leave --lowering out")),
        ({"target": "a100,h200"}, ("cannot serve the backend tensorrt,", "h200")),
        ({"target": "a100", "backend": "onnxruntime-cuda"}, ("cannot serve the backend onnxruntime-cuda", "a100")),
    ],
)
def test_what_it_cannot_serve_is_refused_before_the_model_is_read(
    options: dict[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        compile(tmp_path / "nowhere.pt", output=tmp_path / "m.dcc", **{"lowering": "torch-tensorrt"} | options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("version", "words"), [(None, "is not installed"), ("2.1.0", "is for another torch")])
def test_a_missing_or_foreign_library_is_refused(
    version: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(lowering_module.importlib.metadata, "version", found)
    with pytest.raises(DccError, match=words) as caught:
        compile(tmp_path / "nowhere.pt", output=tmp_path / "m.dcc", target="a100", lowering="torch-tensorrt")
    numbers = ".".join(torch.__version__.split(".")[:2])
    assert f"pip install --no-deps torch-tensorrt-rtx=={numbers}.0 dllist" in str(caught.value)
    assert "--lowering onnx" in str(caught.value)


def test_dcc_build_has_no_such_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "model.dcc", "--target", "a100", "--lowering", "torch-tensorrt"]) == 2
    assert "--lowering" in capsys.readouterr().err
