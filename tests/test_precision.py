"""Strongly typed engines: precisions by rule, few Casts, and results within the tolerance of their type.

ONNX Runtime's CPU provider has no bfloat16 kernels, and for float16 it computes runs of nodes in float32 without the
roundings between them. So both types are also emulated: every value of the reduced type is a float32 value that is
rounded to the type's mantissa, by arithmetic that ONNX Runtime runs as it is written. What happens inside one node
(the scores of a fused attention) is not rounded, as kernels keep float32 there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from compiled import relative_difference
from onnx import ModelProto, TensorProto, numpy_helper

from dcc.errors import ExportError
from dcc.exports.precision import REDUCED, Typed, strongly_typed
from dcc.exports.precision_rules import MOVEMENTS, RULES
from dcc.exports.typed_graphs import rounded, types_of
from dcc.runtime.artifact import Artifact
from dcc.runtime.plan import EngineSpec
from dcc.tolerances import TOLERANCE

FAMILIES = ("dit", "pixart", "sd3", "flux", "wan")
NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}

# A block as lowering writes it: modulation from a condition, attention, a gate, and an MLP.
BLOCK = """
block (float[B,16,32] x, float[B,32] c) => (float[B,16,32] y) {
  sigmoid = Sigmoid(c)
  silu = Mul(c, sigmoid)
  modulation = Gemm<transB=1>(silu, w_mod, b_mod)
  shift2, scale2, gate2 = Split<axis=1, num_outputs=3>(modulation)
  shift = Unsqueeze(shift2, axes)
  scale0 = Unsqueeze(scale2, axes)
  gate = Unsqueeze(gate2, axes)
  scale = Add(scale0, one)
  n = LayerNormalization<axis=-1>(x, unit)
  m = Mul(n, scale)
  a = Add(m, shift)
  q0 = MatMul(a, w_q)
  q = Add(q0, b_q)
  k0 = MatMul(a, w_k)
  k = Add(k0, b_k)
  v0 = MatMul(a, w_v)
  v = Add(v0, b_v)
  h = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)
  o0 = MatMul(h, w_o)
  o = Add(o0, b_o)
  gated = Mul(gate, o)
  r = Add(x, gated)
  n2 = LayerNormalization<axis=-1>(r, unit)
  f0 = MatMul(n2, w_1)
  f = Add(f0, b_1)
  u = Gelu<approximate="tanh">(f)
  d0 = MatMul(u, w_2)
  d = Add(d0, b_2)
  y = Add(r, d)
}
"""
BLOCK_SHAPES = {
    "w_mod": (96, 32), "b_mod": (96,), "unit": (32,), "w_q": (32, 32), "b_q": (32,), "w_k": (32, 32), "b_k": (32,),
    "w_v": (32, 32), "b_v": (32,), "w_o": (32, 32), "b_o": (32,), "w_1": (32, 128), "b_1": (128,), "w_2": (128, 32),
    "b_2": (32,), "one": (),
}  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return np.random.standard_normal(shape).astype(np.float32)


def parsed(text: str, **weights: np.ndarray) -> tuple[ModelProto, Callable[[str], np.ndarray]]:
    """A model whose floating weights are outside of it, as those of an engine are, and their loader."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]>\n{text}')
    for name, array in weights.items():
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        if array.dtype.kind != "i":
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights")
    return model, weights.__getitem__


def block() -> tuple[ModelProto, Callable[[str], np.ndarray]]:
    weights = {name: normal(*shape) for name, shape in BLOCK_SHAPES.items()}
    return parsed(BLOCK, **weights, axes=np.array([1]))


def typed_engines(path: Path, dtype: str) -> Iterator[tuple[EngineSpec, ModelProto, Typed]]:
    """Each engine of an artifact: what it is, in float32 with its weights inside, and typed."""
    opened = Artifact.open(path)
    for engine in opened.plan.engines:
        model = onnx.load_model_from_string(opened.engine_model(engine.name))
        typed = strongly_typed(model, dtype, lambda name: opened.map_weight(name.removeprefix("w/")))
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                array = np.array(opened.map_weight(tensor.name.removeprefix("w/")))
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        yield engine, model, typed


def show(model: ModelProto) -> str:
    """The nodes with the types of what they give, and the types of the weights."""
    types = types_of(model)

    def spelt(name: str) -> str:
        return NAMES.get(types[name], "integer")

    lines = [
        f"{', '.join(node.output)}: {spelt(node.output[0])} = {node.op_type}({', '.join(node.input)})"
        for node in model.graph.node
    ]
    lines += [f"weight {tensor.name}: {spelt(tensor.name)}" for tensor in model.graph.initializer]
    return "\n".join(lines) + "\n"


def run(model: ModelProto, inputs: Mapping[str, np.ndarray], as_written: bool = False) -> Sequence[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def random_inputs(path: Path, engine: EngineSpec) -> dict[str, np.ndarray]:
    requested = {item.name: item for item in Artifact.open(path).plan.inputs}
    made = {}
    for spec in engine.inputs:
        shape = [2 if size == "B" else size for size in spec.shape]
        item = requested.get(spec.name)
        if spec.dtype == "int64" and item is not None:
            made[spec.name] = np.random.randint(item.minimum, item.maximum + 1, shape)
        elif item is not None and item.role == "timestep":
            made[spec.name] = np.random.uniform(0, 1000, shape).astype(spec.dtype)
        else:
            made[spec.name] = normal(*shape)
    return made


def test_fires(golden: Callable[[str], None]) -> None:
    model, weights = block()
    golden(show(strongly_typed(model, "float16", weights).embedded()))


def test_records_what_it_chose(golden: Callable[[str], None]) -> None:
    model, weights = block()
    record = strongly_typed(model, "bfloat16", weights).record
    golden(json.dumps(record.to_json(), indent=1) + "\n")


@pytest.mark.parametrize(
    ("rule", "kept", "body"),
    [
        ("angle", ["f", "s"], "f = MatMul(x, w)\n s = Sin(f)\n y = MatMul(s, w)"),
        ("norm", ["t", "e"], "t = ReduceMean<keepdims=1>(x, axis)\n e = Sqrt(t)\n d = Div(x, e)\n y = MatMul(d, w)"),
        ("softmax", ["p"], "s = MatMul(x, x)\n p = Softmax(s)\n y = MatMul(p, w)"),
        # A combination of kept values, as a schedule writes it.
        ("sum", ["y"], "a = Mul(x, c)\n b = Mul(x, c)\n y = Add(a, b)"),
        ("product", ["a", "b"], "a = Mul(x, c)\n b = Mul(x, c)\n y = Add(a, b)"),
        ("elementwise", ["m"], "m = Clip(x)\n y = MatMul(m, w)"),
        ("conversion", ["f"], "i = Cast<to=7>(x)\n f = Cast<to=1>(i)\n y = MatMul(f, w)"),
        ("unknown", ["u"], "u = CumSum(x, zero)\n y = MatMul(u, w)"),
        ("activation", ["s", "z"], "a = Add(x, x)\n s = Sigmoid(a)\n z = Mul(a, s)\n y = MatMul(z, w)"),
    ],
)
def test_keeps_float32(rule: str, kept: list[str], body: str) -> None:
    model, weights = parsed(
        f"g (float[4,4] x) => (float[4,4] y) {{ {body} }}",
        w=normal(4, 4), c=normal(1), zero=np.array(0), axis=np.array([0]),
    )  # fmt: skip
    typed = strongly_typed(model, "float16", weights)
    assert set(kept) <= set(typed.record.float32[rule])
    made = typed.embedded()
    onnx.checker.check_model(made, full_check=True)
    types = types_of(made)
    assert all(types[name] in (TensorProto.FLOAT, TensorProto.INT64) for name in kept)


def test_keeps_float32_where_onnx_has_no_other_form() -> None:
    model, weights = parsed(
        'g (float[4,4] x) => (float[4,4] y) { m = MatMul(x, w)\n y = Einsum<equation="ij->ji">(m) }', w=normal(4, 4)
    )
    assert strongly_typed(model, "bfloat16", weights).record.float32 == {"no form": ["y"]}
    assert strongly_typed(model, "float16", weights).record.float32 == {}


def test_every_rule_has_a_choice_and_a_reason() -> None:
    assert {rule.choice for rule in RULES} == {"float32", "reduced", "between", "carried"}
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.why for rule in RULES)


def test_a_weight_that_overflows_keeps_its_node_in_float32() -> None:
    text = "g (float[4,4] x) => (float[4,4] y) { a = MatMul(x, w)\n b = Add(a, v)\n y = MatMul(b, u) }"
    large = normal(4, 4)
    large[1, 2] = -65520
    model, weights = parsed(text, w=large, v=normal(4), u=normal(4, 4))
    record = strongly_typed(model, "float16", weights).record
    assert record.overflows == ["w"]
    assert record.float32 == {"overflow": ["a"], "sum": ["b"]}
    assert strongly_typed(model, "bfloat16", weights).record.overflows == []


def test_a_mask_is_cut_off_instead() -> None:
    mask = np.where(np.tri(3, dtype=bool), np.float32(0), np.finfo(np.float32).min)
    text = "g (float[1,1,3,8] x) => (float[1,1,3,8] y) { y = Attention(x, x, x, mask) }"
    model, weights = parsed(text, mask=mask)
    typed = strongly_typed(model, "float16", weights)
    assert typed.record.float32 == {}
    assert typed.weight("mask").min() == -65504
    inputs = {"x": normal(1, 1, 3, 8)}
    embedded = strongly_typed(typed.embedded(), "float16", weights).embedded()
    assert np.isfinite(run(embedded, inputs)[0]).all()


def test_a_mask_that_is_computed_has_the_type_of_the_scores() -> None:
    text = "g (float[1,1,3,8] x, float[3,3] m) => (float[1,1,3,8] y) { y = Attention(x, x, x, m) }"
    model, weights = parsed(text)
    assert strongly_typed(model, "bfloat16", weights).record.casts == ["x to bfloat16", "m to bfloat16", "y to float32"]


def test_a_weight_is_stored_in_each_type_that_reads_it() -> None:
    text = "g (float[4,4] x) => (float[4,4] y) { a = MatMul(x, w)\n y = Mul(a, w) }"
    model, weights = parsed(text, w=normal(4, 4))
    typed = strongly_typed(model, "bfloat16", weights)
    assert typed.declared() == ["w", "w/bfloat16"]
    assert typed.weight("w").dtype == np.float32
    assert typed.weight("w/bfloat16").dtype == ml_dtypes.bfloat16
    assert "w/bfloat16" in typed.model.graph.node[1].input


def test_takes_reduced_weights_as_they_are() -> None:
    """A model that was traced in bfloat16 has its weights stored so; numpy maps them as uint16."""
    stored = normal(4, 4).astype(ml_dtypes.bfloat16)
    model, _ = parsed("g (float[4,4] x) => (float[4,4] y) { y = MatMul(x, w) }", w=stored)
    typed = strongly_typed(model, "bfloat16", lambda _: stored.view(np.uint16))
    assert typed.weight("w").tobytes() == stored.tobytes()


def test_float64_becomes_float32() -> None:
    text = """g (float[4,4] x) => (float[4,4] y) {
        d = Cast<to=11>(x)  e = Mul(d, w)  c = Cos(e)  f = Cast<to=1>(c)  y = Mul(x, f) }"""
    model, weights = parsed(text, w=normal(4).astype(np.float64))
    typed = strongly_typed(model, "float16", weights).embedded()
    assert [node.op_type for node in typed.graph.node] == ["Mul", "Cos", "Mul"]
    assert set(types_of(typed).values()) == {TensorProto.FLOAT}


def test_names_and_types_of_ports_stay() -> None:
    text = """g (float[4,4] x, float16[4,4] h) => (float[4,4] y, float16[4,4] z, float[4,4] i) {
        y = MatMul(x, w)  sum = Add(y, x)  z = Cast<to=10>(sum)  i = Cast<to=1>(h) }"""
    model, weights = parsed(text, w=normal(4, 4))
    typed = strongly_typed(model, "float16", weights)
    assert list(typed.model.graph.input) == list(model.graph.input)
    assert list(typed.model.graph.output) == list(model.graph.output)
    inputs = {"x": normal(4, 4), "h": normal(4, 4).astype(np.float16)}
    for got, wanted in zip(run(typed.embedded(), inputs), run(embedded_plainly(model, weights), inputs), strict=True):
        assert relative_difference(got, wanted) < TOLERANCE["float16"].forward


def embedded_plainly(model: ModelProto, weights: Callable[[str], np.ndarray]) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(weights(tensor.name), tensor.name))
    return result


def test_refuses_another_dtype() -> None:
    model, weights = block()
    with pytest.raises(ExportError) as caught:
        strongly_typed(model, "float8", weights)
    assert str(caught.value) == ("export: unknown reduced precision\n  got   float8\n  want  float16, bfloat16")


def test_refuses_nested_graphs() -> None:
    text = """g (bool b, float[4] x) => (float[4] y) {
        y = If (b) <then_branch = t () => (float[4] p) { p = Identity(x) },
                    else_branch = e () => (float[4] q) { q = Neg(x) }> }"""
    model, weights = parsed(text)
    with pytest.raises(ExportError) as caught:
        strongly_typed(model, "float16", weights)
    assert str(caught.value) == (
        "export: an engine has more than one plain graph\n  got   ['If']\n  want  nodes and dense weights only"
    )


def test_refuses_float64_ports() -> None:
    model, weights = parsed("g (double[4] x) => (double[4] y) { y = Neg(x) }")
    with pytest.raises(ExportError) as caught:
        strongly_typed(model, "float16", weights)
    assert str(caught.value) == (
        "export: an engine has float64 ports\n  got   ['x', 'y']\n  want  float32: TensorRT has no float64"
    )


def test_refuses_a_weight_of_another_shape() -> None:
    model, _ = parsed("g (float[4,4] x) => (float[4,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    with pytest.raises(ExportError) as caught:
        strongly_typed(model, "float16", lambda _: normal(2, 2))
    assert str(caught.value) == "export: a weight has another shape\n  at    w\n  got   (2, 2)\n  want  (4, 4)"


def test_refuses_to_embed_what_protobuf_cannot_hold() -> None:
    model, weights = parsed("g (float[4,4] x) => (float[4,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    del model.graph.output[0].type.tensor_type.shape.dim[:], model.graph.input[0].type.tensor_type.shape.dim[:]
    model.graph.initializer[0].dims[:] = [32768, 40000]
    # bfloat16 overflows no weight, so none is loaded to look.
    typed = strongly_typed(model, "bfloat16", weights)
    with pytest.raises(ExportError) as caught:
        typed.embedded()
    assert str(caught.value) == (
        "export: an engine's weights do not fit into one protobuf\n  got   2621440000 bytes\n"
        "  want  at most 2147483647\n  next  give the weights by name, or cut the step into several engines"
    )


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_meaning(family: str, dtype: str, artifact: Callable[..., Path]) -> None:
    path = artifact(family, "step")
    for engine, model, typed in typed_engines(path, dtype):
        made = typed.embedded()
        onnx.checker.check_model(made, full_check=True)
        inputs = random_inputs(path, engine)
        wanted = run(model, inputs)
        results = {"emulated": run(rounded(made, dtype), inputs, as_written=True)}
        if dtype == "float16":
            results["ONNX Runtime"] = run(made, inputs)
        for way, result in results.items():
            assert [got.dtype for got in result] == [want.dtype for want in wanted]
            errors = [relative_difference(got, want) for got, want in zip(result, wanted, strict=True)]
            print(f"{family} {engine.name} {dtype} {way}: {max(errors):.1e}")
            assert max(errors) < TOLERANCE[dtype].forward, (engine.name, way)


@pytest.mark.parametrize("family", FAMILIES)
def test_settles(family: str, artifact: Callable[..., Path]) -> None:
    for _, _, typed in typed_engines(artifact(family, "step"), "bfloat16"):
        again = strongly_typed(typed.model, "bfloat16", typed.weight)
        assert again.model == typed.model
        assert again.record.nodes == typed.record.nodes
        assert again.record.casts == typed.record.casts


@pytest.mark.parametrize("family", FAMILIES)
def test_pays(family: str, artifact: Callable[..., Path]) -> None:
    for engine, _, typed in typed_engines(artifact(family, "step"), "float16"):
        record = typed.record
        assert record.float32.keys() & {"unknown", "overflow", "no form"} == set()
        contractions = record.reduced.get("contraction", 0)
        if contractions:
            # Norms and positions, which stay, are large beside the weights of models as small as these.
            assert record.weight_bytes < 0.55 * record.weight_bytes_before, engine.name
        assert len(record.casts) <= 2 * contractions
        assert len(set(record.casts)) == len(record.casts)
        assert not cast_back(typed.model)


def cast_back(model: ModelProto) -> list[str]:
    """Casts of what was cast before, at once or after it was moved about."""
    cast: set[str] = set()
    found = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in cast:
            found.append(node.name)
        # Not Concat: it puts together what was cast and what was not.
        moves = node.op_type in MOVEMENTS - {"Concat", "ScatterND"} and node.input[0] in cast
        if node.op_type == "Cast" or moves:
            cast |= set(node.output)
    return found
