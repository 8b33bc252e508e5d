"""hoist-scopes: every value is computed in the earliest scope that its inputs allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from random_graphs import Sketch, apply, aten, random_inputs
from torch.fx import Node

from dcc.frontend.samplers import sampler_table
from dcc.ir.graph import is_weight, op_name
from dcc.ir.interpret import run_graph, run_stages
from dcc.ir.program import Program, Scope
from dcc.ir.text import graph_text
from dcc.passes import ALWAYS, CUT, EXACT, Canonicalize, FoldConstants, HoistScopes, ShareCommon, run_passes
from dcc.preparation import pipeline

KEPT = "kept in the step"


def modulated() -> Program:
    """One layer of each scope: `x + gate(t, c) * body(x) + text(c)`."""
    s = Sketch()
    x, t, c = s.latent(), s.timestep(), s.condition(3)
    time = s.op(aten.silu.default, s.embed(t, "time"))
    text = s.linear(c, "text", 4)
    gate = s.linear(s.add(time, text), "gate", 4, bias=True)
    body = s.mul(s.linear(x, "body", 4), gate)
    return s.program(s.add(s.add(x, body), text))


def test_fires_on_every_scope(golden: Callable[[str], None]) -> None:
    program = modulated()
    report = apply(HoistScopes(), program)
    assert report.status == "applied"
    assert report.figures[KEPT] == []
    golden(graph_text(program))


def test_pays_what_is_counted_by_hand() -> None:
    program = modulated()
    report = apply(HoistScopes(), program)
    # FLOPs of two rows: a linear 2 * 2 * in * out, silu 4 an element, the other pointwise ones 1.
    assert report.figures["scopes"] == {
        "timestep": {"parameters": 4, "bytes": 16, "flops": 2 * 2 * 1 * 4 + 4 * 8},
        "request": {"parameters": 12, "bytes": 48, "flops": 2 * 2 * 3 * 4},
        "table": {"parameters": 20, "bytes": 80, "flops": 8 + 2 * 2 * 4 * 4},
        "step": {"parameters": 16, "bytes": 64, "flops": 2 * 2 * 4 * 4 + 8 + 8 + 8},
    }
    assert report.figures["parameters"] == 36
    assert report.figures["total parameters"] == 52
    assert report.figures["flops"] == 168
    assert report.figures["total flops"] == 256
    assert report.why == (
        "69.2% of the parameters and 65.6% of the FLOPs of a forward leave the loop"
    )


def test_declines_when_everything_depends_on_the_latent() -> None:
    s = Sketch()
    x = s.latent()
    program = s.program(s.add(x, s.linear(x, "l", 4)))
    report = apply(HoistScopes(), program)
    assert (report.status, report.why) == ("declined", "every computation depends on the latent")
    assert {str(scope) for node, scope in program.scopes.items() if node.op == "call_function"} == {"step"}


def test_refuses_a_table_over_the_byte_limit() -> None:
    s = Sketch()
    x, t, c = s.latent(1024, 1024), s.timestep(), s.condition(1024, 1024)
    small = s.add(s.op(aten.reshape.default, s.embed(t, width=1024), [-1, 1, 1024]), s.weight("w", 1, 1, 1024))
    large = s.add(s.linear(c, "text", 1024), small)
    program = s.program(s.add(s.add(x, large), small))
    report = apply(HoistScopes(table_limit_bytes=1 << 20), program)
    # Two rows of 1024 * 1024 floats are 8 MiB.
    reason = "8 MiB over 1 steps exceed the limit of 1 MiB"
    assert report.figures[KEPT] == [f"add_1: {reason}"]
    assert program.scopes[small] is Scope.TIMESTEP
    assert program.scopes[large] is Scope.STEP
    assert apply(HoistScopes(table_limit_bytes=9 << 20), program).figures[KEPT] == []


def test_refuses_request_values_over_the_byte_limit() -> None:
    s = Sketch()
    x, c = s.latent(512), s.condition(1024)
    text = s.linear(c, "text", 512)
    program = s.program(s.add(x, text))
    report = apply(HoistScopes(request_limit_bytes=4095), program)
    assert report.figures[KEPT] == ["linear: 0 MiB over 1 steps exceed the limit of 0 MiB"]
    assert report.status == "declined"
    assert apply(HoistScopes(request_limit_bytes=4096), program).figures[KEPT] == []


def test_the_limit_counts_every_sampler_call(traced: Callable) -> None:
    program = traced("dit")
    run_passes(program, ALWAYS)
    program.sampler = sampler_table("ddim", steps=7)
    report = apply(HoistScopes(table_limit_bytes=0), program)
    reasons = [reason for reason in report.figures[KEPT] if "exceed" in reason]
    assert reasons
    assert all(reason.endswith(": 0 MiB over 7 steps exceed the limit of 0 MiB") for reason in reasons)
    apply(CUT, program)
    assert {stage.kind for stage in program.stages} == {"request", "glue", "component", "residual"}


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_under_a_byte_limit_the_split_is_still_exact(name: str, traced: Callable, model: Callable) -> None:
    module, inputs, _ = model(name)
    program = traced(name)
    tight = tuple(HoistScopes(table_limit_bytes=3000) if item.name == "hoist-scopes" else item for item in EXACT)
    run_passes(program, (*ALWAYS, *tight, CUT))
    report = next(report for report in program.reports if report.name == "hoist-scopes")
    assert report.figures[KEPT]
    assert Scope.TABLE in program.scopes.values()  # the limit keeps some and moves others
    with torch.no_grad():
        assert torch.equal(run_stages(program, inputs), module(**inputs))


def test_refuses_a_timestep_value_without_rows() -> None:
    """A table needs a row for each call; a timestep without a batch dimension gives none."""
    s = Sketch()
    x, t = s.latent(), s.input("t", "timestep", 1)
    time = s.embed(t)
    program = s.program(s.add(x, time))
    report = apply(HoistScopes(), program)
    assert report.figures[KEPT] == [
        "linear: (1, 4) cannot be batched over steps", "unsqueeze: (1, 1) cannot be batched over steps",
    ]  # fmt: skip
    assert program.scopes[time] is Scope.STEP


def test_refuses_a_request_value_with_the_batch_elsewhere() -> None:
    """Keys as [B * heads, L, D]: ports have the batch in front or not at all."""
    s = Sketch()
    x, c = s.latent(2), s.condition(5, 4)
    projected = s.linear(c, "k", 4)
    heads = s.op(aten.reshape.default, s.op(aten.reshape.default, projected, [-1, 5, 2, 2]), [-1, 5, 2])
    keys = s.op(aten.mean.dim, s.op(aten.reshape.default, s.op(aten.tanh.default, heads), [-1, 2, 10]), [1])
    mixed = s.op(aten.tanh.default, s.op(aten.transpose.int, projected, 0, 1))
    second = s.op(aten.select.int, s.mul(mixed, s.op(aten.unsqueeze.default, s.linear(x, "q", 4), 0)), 0, 0)
    program = s.program(s.add(s.linear(keys, "mix", 2), s.linear(s.add(x, s.linear(second, "out", 2)), "last", 2)))
    report = apply(HoistScopes(), program)
    assert report.figures[KEPT] == [
        "tanh_1: (5, 'B', 4) has the batch elsewhere than in front",
        "transpose: (5, 'B', 4) has the batch elsewhere than in front",
    ]
    assert program.scopes[projected] is program.scopes[keys] is Scope.REQUEST


def test_keeps_a_condition_without_rows_in_the_request() -> None:
    """Positions of FLUX: shared by all rows, computed once for a request, and no table is made of them."""
    s = Sketch()
    x, ids = s.latent(6, 4), s.input("ids", "condition", 6, 3)
    rotary = s.op(aten.cos.default, s.linear(ids, "rope", 4))
    program = s.program(s.mul(x, rotary))
    report = apply(HoistScopes(), program)
    assert report.figures[KEPT] == []
    assert program.scopes[rotary] is Scope.REQUEST


def repeated_ids(s: Sketch, x: Node, ids: Node) -> Node:
    rows = s.op(aten.sym_size.int, x, 0)
    return s.op(aten.expand.default, s.op(aten.unsqueeze.default, ids, 0), [rows, 6, 4])


def ones_and_ids(s: Sketch, x: Node, ids: Node) -> Node:
    rows = s.op(aten.sym_size.int, x, 0)
    ones = s.op(aten.full.default, [rows, 6, 4], 1.0, dtype=torch.float32, device=torch.device("cpu"))
    return s.add(ones, ids)


@pytest.mark.parametrize("make", [repeated_ids, ones_and_ids])
def test_refuses_a_batch_that_only_the_latent_knows(make: Callable[[Sketch, Node, Node], Node]) -> None:
    s = Sketch()
    x, ids = s.latent(6, 4), s.input("ids", "condition", 6, 4)
    early = s.op(aten.cos.default, ids)
    repeated = make(s, x, early)
    program = s.program(s.add(x, s.op(aten.tanh.default, repeated)))
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    run_passes(program, (HoistScopes(), CUT))
    kept = f"{repeated.name}: has a batch that nothing in its scope knows"
    assert program.reports[0].figures[KEPT] == [kept]
    assert program.scopes[early] is Scope.REQUEST
    assert torch.equal(run_stages(program, inputs), wanted)


def test_refuses_an_expanded_copy_but_hoists_what_is_expanded() -> None:
    s = Sketch()
    x, t = s.latent(64, 4), s.timestep()
    time = s.op(aten.unsqueeze.default, s.embed(t), 1)
    wide = s.op(aten.expand.default, time, [-1, 64, 4])
    program = s.program(s.add(x, wide))
    report = apply(HoistScopes(), program)
    assert report.figures[KEPT] == ["expand: larger than what it is made from"]
    assert program.scopes[wide] is Scope.STEP
    assert program.scopes[time] is Scope.TIMESTEP


def test_pieces_of_one_operation_stay_together() -> None:
    import operator

    s = Sketch()
    x, t = s.latent(1024), s.timestep()
    parts = s.op(aten.split_with_sizes.default, s.embed(t, width=2048), [1024, 1024], 1)
    pieces = [s.op(operator.getitem, parts, index) for index in (0, 1)]
    program = s.program(s.add(s.mul(x, pieces[0]), pieces[1]))
    apply(HoistScopes(table_limit_bytes=1 << 13), program)
    scopes = {program.scopes[node] for node in (parts, *pieces)}
    assert scopes == {Scope.STEP}


def test_sizes_and_types_are_no_dependences() -> None:
    """`zeros_like(latent)`, `type_as(latent)` and its size read no value of the latent (Wan's rotary code)."""
    s = Sketch()
    x, t, c = s.latent(), s.timestep(), s.condition()
    rows = s.op(aten.sym_size.int, x, 0)
    time = s.op(aten.type_as.default, s.op(aten._to_copy.default, s.embed(t), dtype=torch.float64), x)
    shaped = s.op(aten.reshape.default, s.linear(c, "text", 4), [rows, 4])
    filled = s.add(s.op(aten.zeros_like.default, x), shaped)
    program = s.program(s.add(s.add(x, s.op(aten.tanh.default, time)), s.op(aten.silu.default, filled)))
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs)
    run_passes(program, (Canonicalize(), HoistScopes(), CUT))
    scope_of = {op_name(node): scope for node, scope in program.scopes.items() if node.op == "call_function"}
    assert scope_of["tanh"] is Scope.TIMESTEP
    assert scope_of["silu"] is Scope.REQUEST
    assert torch.equal(run_stages(program, inputs), wanted)


def test_wan_generators_are_remade_and_its_rotary_code_is_constant(traced: Callable) -> None:
    program = traced("wan")
    run_passes(program, pipeline(1))
    step = [node for node, scope in program.scopes.items() if scope is Scope.STEP and node.op == "call_function"]
    assert "arange" not in {op_name(node) for node in step}
    assert not any(op_name(node) in ("full", "arange") for stage in program.stages for node in stage.outputs)


def test_a_timestep_only_model_needs_no_table(traced: Callable) -> None:
    """adaLN-single without size conditions: everything of the timestep is made at compile time."""
    program = traced("pixart_alpha")
    run_passes(program, pipeline(1))
    kinds = [stage.kind for stage in program.stages]
    assert kinds[:2] == ["timestep", "request"]
    assert "table" not in kinds


def test_size_conditions_make_a_table(traced: Callable) -> None:
    program = traced("pixart")
    run_passes(program, pipeline(1))
    kinds = [stage.kind for stage in program.stages]
    assert kinds[:3] == ["timestep", "request", "table"]


def owned(module: torch.nn.Module, *parts: str) -> int:
    """Parameters whose name contains one of the parts."""
    return sum(value.numel() for name, value in module.named_parameters() if any(part in name for part in parts))


def test_pays_the_modulation_of_dit(traced: Callable, model: Callable) -> None:
    """Width 32, depth 3: six rows of modulation per block and two at the end, class and time embeddings."""
    program = traced("dit")
    run_passes(program, pipeline(1))
    report = next(report for report in program.reports if report.name == "hoist-scopes")
    scopes = report.figures["scopes"]
    assert scopes["table"]["parameters"] == 3 * (32 * 192 + 192) + 32 * 64 + 64
    assert scopes["table"]["parameters"] == owned(model("dit").module, "adaLN")
    assert scopes["table"]["bytes"] == 4 * scopes["table"]["parameters"]
    assert scopes["request"]["parameters"] == 11 * 32  # ten classes and the null class
    module = model("dit").module
    assert scopes["timestep"]["parameters"] >= owned(module, "t_embedder")
    assert scopes["step"]["parameters"] >= owned(module, "attn", "mlp", "x_embedder") - owned(module, "t_embedder.mlp")
    # The linears of the modulation, two rows; silu and additions come on top.
    linears = 2 * 2 * 32 * (3 * 192 + 64)
    assert linears <= scopes["table"]["flops"] <= 1.02 * linears
    counted = sum(row["parameters"] for row in scopes.values())
    assert counted == report.figures["total parameters"] == program.parameters()


def test_a_weight_counts_where_it_is_last_read() -> None:
    s = Sketch()
    x, c = s.latent(), s.condition()
    program = s.program(s.add(s.linear(x, "shared", 4), s.linear(c, "shared", 4)))
    report = apply(HoistScopes(), program)
    assert report.figures["parameters"] == 0
    assert report.figures["scopes"]["step"]["parameters"] == 16


@pytest.mark.parametrize("name", zoo.MODELS)
def test_keeps_meaning(name: str, traced: Callable, model: Callable) -> None:
    """The split computes bit for bit what the module does, with another number of rows as well."""
    module, inputs, _ = model(name)
    program = traced(name)
    run_passes(program, pipeline(1))
    for rows in (1, 2, 3):
        picked = [0, 1, 0][:rows]
        batch = {
            item.name: inputs[item.name][picked] if item.shape[:1] == ("B",) else inputs[item.name]
            for item in program.inputs
        }
        with torch.no_grad():
            wanted = module(**batch)
        assert torch.equal(run_graph(program, batch), wanted)
        assert torch.equal(run_stages(program, batch), wanted)


def test_settles(traced: Callable) -> None:
    program = traced("sd3")
    run_passes(program, (*ALWAYS, FoldConstants(), ShareCommon()))
    first = apply(HoistScopes(), program)
    before = graph_text(program)
    assert apply(HoistScopes(), program) == first
    assert graph_text(program) == before


@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_no_scope_reads_a_later_one(name: str, traced: Callable) -> None:
    program = traced(name)
    run_passes(program, pipeline(1))
    order = list(Scope)
    for node, scope in program.scopes.items():
        for source in node.all_input_nodes:
            if source in program.scopes and not is_weight(source):
                assert order.index(program.scopes[source]) <= order.index(scope)


def test_keeps_rows_that_depend_on_one_another_in_the_step() -> None:
    """Batched with the rows of other steps, a mean over the batch would be another mean."""
    s = Sketch()
    x, t, c = s.latent(), s.timestep(), s.condition()
    both = s.add(s.embed(t), c)
    centred = s.op(aten.sub.Tensor, both, s.op(aten.mean.dim, both, [0], True))
    alone = s.linear(both, "alone", 4)
    program = s.program(s.add(s.add(x, centred), alone))
    report = apply(HoistScopes(), program)
    reasons = report.figures["kept in the step"]
    assert any(reason.endswith("mixes the rows of its batch: it cannot be batched over steps") for reason in reasons)
    assert program.scopes[centred] is Scope.STEP
    assert program.scopes[alone] is Scope.TABLE
