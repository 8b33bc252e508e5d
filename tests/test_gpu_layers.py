"""Layers for GPUs: real engines without a GPU, added beside what is there, and refused with a reason."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dcc import cli
from dcc import layers as layers_module
from dcc.build_layers import build
from dcc.cost_model.local_device import Device
from dcc.cost_model.targets import targets_named
from dcc.errors import ArtifactError, ExportError, UsageError
from dcc.exports.artifact_extension import ArtifactExtension
from dcc.layer_check import check_layer
from dcc.layers import BuildOptions, LayerRequest, add_layers, layer_requests, on_this_device
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER, Artifact, external_location
from dcc.runtime.container import WEIGHTS_MEMBER
from dcc.runtime.device_engines import profile_rows
from dcc.runtime.layers import layers_from_json
from dcc.runtime.loading import load_on_processor as load
from dcc.runtime.tensorrt_builder import TensorRt
from dcc.tolerances import TOLERANCE

FAMILIES = ("dit", "pixart", "sd3", "flux", "wan")
PORTABLE = LayerRequest("tensorrt", "float16", (90,), ("h100",), "because")


def rtx() -> TensorRt:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'dcc[tensorrt-rtx]'", exc_type=ImportError)
    return TensorRt.find("tensorrt-rtx")


def digests(path: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in Artifact.open(path).manifest["members"].items()}


def typed_graphs(opened: Artifact) -> tuple[Any, tuple[bytes, bytes]]:
    """The engines in float16, and what to replace in their graphs by what, to find their weights."""
    placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
    return layers_module._typed_engines(opened, "float16"), (placeholder, external_location(Path(opened.path).name))


def test_targets_of_one_kind_share_a_layer() -> None:
    requests = layer_requests(targets_named("a100,rtx4090,cpu,h100,l4"))
    assert [(item.backend, item.dtype, item.capabilities, item.targets) for item in requests] == [
        ("tensorrt-rtx", "float16", (80, 89), ("a100-80g", "rtx4090", "l4")), ("tensorrt", "float16", (90,), ("h100",)),
    ]  # fmt: skip
    assert requests[0].name == "tensorrt-rtx-float16-sm80-sm89"
    assert layer_requests(targets_named("cpu")) == []
    assert [item.backend for item in layer_requests(targets_named("a100"), "bf16", "tensorrt")] == ["tensorrt"]


@pytest.mark.parametrize(
    ("targets", "dtype", "backend", "words"),
    [
        ("t4", "bf16", None, ("the target 't4' has no bf16", "float16, float32")),
        ("a100", "fp8", None, ("the target 'a100-80g' has no fp8",)),
        ("h100", "fp8", None, ("float8 needs quantized weights", "fp16 or bf16")),
        ("a100", "fp32", None, ("float32 runs on a processor", "fp16 or bf16")),
        ("h100", None, "tensorrt-rtx", ("the target 'h100' has no backend tensorrt-rtx", "tensorrt, onnxruntime-cuda")),
        ("cpu", None, "tensorrt", ("the target 'cpu' has no backend tensorrt",)),
    ],
)
def test_what_a_target_lacks_is_refused(targets: str, dtype: str, backend: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        layer_requests(targets_named(targets), dtype, backend)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("family", "dtype"), [("dit", "float16"), *((family, "bfloat16") for family in FAMILIES)])
def test_graphs_read_the_portable_weights_and_keep_meaning(
    family: str, dtype: str, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """Every engine on values that a request makes, and all of them in a chain."""
    path, output = artifact(family, "component"), tmp_path / "model.dcc"
    [layer] = add_layers(path, [LayerRequest("tensorrt", dtype, (90,), ("h100",), "because")], output)
    made = Artifact.open(output)
    assert layer == made.layers[0] and layer.engines == {} and layer.version == ""
    assert made.manifest["members"]["weights.bin"] == Artifact.open(path).manifest["members"]["weights.bin"]
    summary = layer.summary["engines"]
    updates = {name for name in layer.graphs if name.startswith("update_")}
    # Those are float32, and are compared with the formulas in test_update_engines.
    assert len(updates) >= 2 and all(summary[name]["reduced"] == 0 for name in updates)
    errors = [summary[name]["error"] for name in summary.keys() - updates]
    assert all(error is not None for error in errors), "an engine was never run"
    limit = TOLERANCE[dtype].forward
    assert max(errors) <= limit and layer.summary["forward_error"] <= limit
    assert max(errors) > TOLERANCE["float32"].forward / 10, "nothing was rounded"
    added = sum(made.manifest["members"][name]["size"] for name in layer.members())
    assert added < 0.5 * path.stat().st_size or added < 2**20


def test_a_wrong_graph_is_found(artifact: Callable[..., Path]) -> None:
    """The check compares: a graph whose weights are those of another engine does not pass."""
    opened = Artifact.open(artifact("dit", "component"))
    typed, located = typed_graphs(opened)
    first = next(engine.name for engine in opened.plan.engines if engine.kind == "step" and len(engine.weights) > 2)

    def graph(name: str) -> bytes:
        model = onnx.load_model_from_string(typed[name].graph.replace(*located))
        if name == first:
            # Another weight of the same size: the first bytes of the file.
            weight = next(item for item in model.graph.initializer if item.external_data)
            start = str(opened.member_offset(WEIGHTS_MEMBER))
            next(entry for entry in weight.external_data if entry.key == "offset").value = start
        return bytes(model.SerializeToString())

    with pytest.raises(ExportError, match="does not compute what the exact one computes") as caught:
        check_layer(opened, "float16", graph)
    assert first in str(caught.value)


def test_a_number_that_float16_cannot_hold_is_infinite_in_the_check(artifact: Callable[..., Path]) -> None:
    opened = Artifact.open(artifact("dit", "step"))
    typed, located = typed_graphs(opened)

    def overflowing(name: str) -> bytes:
        model = onnx.load_model_from_string(typed[name].graph.replace(*located))
        product = next((node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")), None)
        if name == "step" and product is not None:
            index, made = list(model.graph.node).index(product), product.output[0]
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(6e4, np.float16), "large"))
            product.output[0] = f"{made}/small"
            there = onnx.helper.make_node("Mul", [f"{made}/small", "large"], [f"{made}/large"])
            back = onnx.helper.make_node("Div", [f"{made}/large", "large"], [made])
            model.graph.node.insert(index + 1, there)
            model.graph.node.insert(index + 2, back)
        return bytes(model.SerializeToString())

    with pytest.raises(ExportError, match="inf of the range"):
        check_layer(opened, "float16", overflowing)


def test_engines_of_two_capabilities(artifact: Callable[..., Path], tmp_path: Path) -> None:
    library = rtx()
    path, output = artifact("dit", "step"), tmp_path / "model.dcc"
    requests = layer_requests(targets_named("a100,rtx4090,h100"))
    made = add_layers(path, requests, output)
    opened = Artifact.open(output)
    built, portable = opened.layers
    assert [layer.name for layer in made] == [built.name, portable.name]
    assert built.version == library.version and built.capabilities == (80, 89)
    assert opened.manifest["tools"]["tensorrt-rtx"] == library.version
    for name, member in built.engines.items():
        assert len(opened.read(member)) == built.summary["engines"][name]["engine_bytes"]
        assert built.summary["engines"][name]["layers"] > 0
    assert "float16" in "".join(built.summary["engines"]["step"]["kinds"])
    records = json.loads(opened.read(built.records))
    assert records["step"]["network"]["capabilities"] == [80, 89]
    assert records["step"]["precision"]["dtype"] == "float16"
    assert portable.engines == {} and json.loads(opened.read(portable.records))["step"]["network"] is None
    # The portable layer runs as before, and its members are the same.
    before = digests(path)
    assert {name: digest for name, digest in digests(output).items() if name in before} == before
    inputs = {item.name: np.ones([2 if size == "B" else size for size in item.shape], item.dtype) for item in
              opened.plan.inputs}  # fmt: skip
    assert np.array_equal(load(output).denoise(**inputs), load(path).denoise(**inputs))


def test_a_target_is_added_later_and_the_others_keep_their_bytes(
    artifact: Callable[..., Path], tmp_path: Path
) -> None:
    rtx()
    path = tmp_path / "model.dcc"
    path.write_bytes(artifact("dit", "step").read_bytes())
    build(path, target="a100", engine_cache=False)
    first = digests(path)
    build(path, target="t4,h200", engine_cache=False)
    second = digests(path)
    assert first.items() <= second.items() and len(second) > len(first)
    names = [layer.name for layer in Artifact.open(path).layers]
    assert names == ["tensorrt-rtx-float16-sm80", "tensorrt-rtx-float16-sm75", "tensorrt-float16-sm90"]
    # a100-40g has the capability that is there: nothing is built, and the layer knows the name.
    assert build(path, target="a100-40g", engine_cache=False) == []
    assert digests(path) == second and Artifact.open(path).layers[0].targets == ("a100-80g", "a100-40g")
    # Asked for again it is built again, in its place.
    [again] = build(path, target="a100,a100-40g", engine_cache=False)
    assert sorted(layer.name for layer in Artifact.open(path).layers) == sorted(names)
    assert digests(path).keys() == second.keys() and again.targets == ("a100-80g", "a100-40g")


def test_the_second_build_comes_from_the_cache_and_a_damaged_entry_is_built(
    artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "cache"))
    source = artifact("dit", "step")
    [fresh] = build(source, target="a100", output=tmp_path / "one.dcc")
    [cached] = build(source, target="a100", output=tmp_path / "two.dcc")
    for entry in (tmp_path / "cache/engines").glob("*.engine"):
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    [again] = build(source, target="a100", output=tmp_path / "three.dcc")
    assert [{row["cached"] for row in layer.summary["engines"].values()} for layer in (fresh, cached, again)] == [
        {False}, {True}, {False},
    ]  # fmt: skip
    one, two = (digests(tmp_path / f"{name}.dcc") for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == set(), "a cached engine is another"


def test_a_full_disk_leaves_the_artifact_as_it_was(
    artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.dcc"
    path.write_bytes(artifact("dit", "step").read_bytes())
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    write = ArtifactExtension._write

    def full(self: ArtifactExtension, name: str, data: bytes) -> None:
        if name.endswith("step.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(ArtifactExtension, "_write", full)
    with pytest.raises(ExportError, match="No space left on device"):
        add_layers(path, [PORTABLE], options=BuildOptions(check=False))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [item.name for item in tmp_path.iterdir()] == ["model.dcc"]


def test_a_library_that_is_not_there_is_named_with_a_way_out(
    artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("dcc.runtime.tensorrt_builder.importlib.import_module", missing)
    with pytest.raises(ExportError) as caught:
        build(artifact("dit", "step"), target="a100", output=tmp_path / "model.dcc")
    assert "pip install 'dcc[tensorrt-rtx]'" in str(caught.value) and "--backend tensorrt" in str(caught.value)
    # The way out.
    [layer] = build(artifact("dit", "step"), target="a100", backend="tensorrt", output=tmp_path / "model.dcc")
    assert layer.engines == {} and layer.capabilities == (80,)


def test_a_library_builds_only_what_it_knows(artifact: Callable[..., Path], tmp_path: Path) -> None:
    rtx()
    request = LayerRequest("tensorrt-rtx", "float16", (90,), ("h100",), "because")
    with pytest.raises(ExportError, match="does not build for this compute capability"):
        add_layers(artifact("dit", "step"), [request], tmp_path / "model.dcc")
    assert list(tmp_path.iterdir()) == []


def test_engines_are_built_here_where_the_gpu_is() -> None:
    card = Device("NVIDIA H100", 90, 80 << 30, "a test")
    assert on_this_device(PORTABLE, card).device == "NVIDIA H100"
    assert on_this_device(PORTABLE, None).device == ""
    assert on_this_device(PORTABLE, Device("NVIDIA A100", 80, 80 << 30, "a test")).device == ""


def test_profiles_hold_what_the_runtime_asks_for(artifact: Callable[..., Path]) -> None:
    plan = Artifact.open(artifact("dit", "component")).plan
    low, high = plan.symbols["B"]
    kinds = {engine.kind: profile_rows(plan, engine) for engine in plan.engines}
    least, typical, most = kinds["step"] or (0, 0, 0)
    assert least == 1 and least <= typical <= most == high and low >= 1
    assert (kinds["table"] or (0, 0, 0))[2] >= high * min(len(plan.order), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: {**layer, "backend": "abacus"}, "tensorrt-rtx, tensorrt, onnxruntime-cuda"),
        (lambda layer: {**layer, "dtype": "float8"}, "float32, float16, bfloat16"),
        (lambda layer: {**layer, "name": "../up"}, "lower-case letters"),
        (
            lambda layer: {**layer, "graphs": {"step": "nowhere.onnx"}},
            "every engine of the plan, or none, and update engines",
        ),
        (lambda layer: {**layer, "graphs": dict.fromkeys(layer["graphs"], "nowhere.onnx")}, "a member"),
        (lambda layer: {**layer, "capabilities": ["80"]}, "compute capabilities such as 80"),
        (lambda layer: {**layer, "records": "nowhere"}, "a member of the artifact, or nothing"),
        (lambda layer: {key: value for key, value in layer.items() if key != "summary"}, "exactly the fields"),
        (lambda layer: [layer], "exactly the fields"),
    ],
)
def test_a_damaged_layer_is_refused(
    change: Callable[[Any], Any], words: str, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    [layer] = add_layers(artifact("dit", "step"), [PORTABLE], tmp_path / "m.dcc", BuildOptions(check=False))
    opened = Artifact.open(tmp_path / "m.dcc")
    engines = {engine.name: engine for engine in opened.plan.engines}
    members = opened.manifest["members"]
    assert layers_from_json([layer.to_json()], engines, members) == (layer,)
    with pytest.raises(ArtifactError) as caught:
        layers_from_json([change(layer.to_json())], engines, members)
    assert words in str(caught.value)
    with pytest.raises(ArtifactError, match="each name once"):
        layers_from_json([layer.to_json()] * 2, engines, members)


def test_the_command_line_builds_and_shows_layers(
    artifact: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.dcc"
    assert cli.main(["build", str(artifact("dit", "step")), "--target", "h200", "-o", str(path)]) == 0
    assert "tensorrt float16 for h200: " in capsys.readouterr().out
    assert cli.main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "layer tensorrt-float16-sm90" in told and "not built" in told
    assert cli.main(["build", str(path), "--target", "cpu"]) == 2
    assert "need no engines of their own" in capsys.readouterr().err
    assert cli.main(["build", str(path), "--target", "b300"]) == 2
    assert "b200" in capsys.readouterr().err
    assert cli.main(["build", str(tmp_path / "none.dcc"), "--target", "h200"]) == 1
    assert "there is no artifact at this path" in capsys.readouterr().err
