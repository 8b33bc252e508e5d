"""The plan: it survives JSON, and each rule refuses what it names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from example_artifact import ROW, example_plan, stored_nowhere
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.errors import ArtifactError
from dcc.runtime.plan import (
    BufferSpec,
    Call,
    CallGuidance,
    EngineSpec,
    Plan,
    Ref,
    TensorSpec,
    plan_from_json,
    plan_to_json,
)
from dcc.runtime.plan_reader import LIST_LIMIT, TEXT_LIMIT
from dcc.runtime.plan_rules import RULES

PLAN = example_plan(stored_nowhere())
JSON = plan_to_json(PLAN)


def test_survives_json() -> None:
    assert plan_from_json(json.loads(json.dumps(JSON))) == PLAN


def test_every_rule_has_a_name() -> None:
    names = [(rule.__doc__ or "").partition(":")[0] for rule in RULES]
    assert len(set(names)) == len(RULES)
    assert {name for name, _ in BROKEN} == set(names)


def edited(path: str, value: Any) -> dict[str, Any]:
    """The example's JSON with one place changed; `path` is keys and indices with dots between."""
    root = copy.deepcopy(JSON)
    *front, last = (int(key) if key.lstrip("-").isdigit() else key for key in path.split("."))
    place: Any = root
    for key in front:
        place = place[key]
    place[last] = value
    return root


def without(path: str) -> dict[str, Any]:
    """The example's JSON with one entry of an object removed."""
    root = copy.deepcopy(JSON)
    place: Any = root
    *front, last = path.split(".")
    for key in front:
        place = place[int(key) if key.isdigit() else key]
    del place[last]
    return root


def with_history(order: list[int], guidance: list[dict[str, Any]] | None = None, **calls: Any) -> dict[str, Any]:
    """The example where program 0 computes `k` and keeps it, and program 1 reads it; `calls` replaces their calls."""
    keeps, reads = copy.deepcopy(JSON["step_programs"])
    keeps[1]["outputs"] = keeps[2]["inputs"][1:] = reads[0]["inputs"][1:] = ["history:k"]
    for program, listed in (("keeps", keeps), ("reads", reads)):
        for call, change in calls.get(program, {}).items():
            listed[call] = listed[call] | change
    histories = [{"name": "k", "dtype": "float32", "shape": ["B", 8]}]
    return JSON | {
        "histories": histories, "step_programs": [keeps, reads], "order": order, "guidance": guidance or [],
    }  # fmt: skip


def modes(*entries: str) -> list[dict[str, Any]]:
    """Guidance of each call: a mode, with the number of its weights after a space."""
    pairs = [entry.partition(" ") for entry in entries]
    return [{"mode": mode, "weights": [0.5] * int(count or 0)} for mode, _, count in pairs]


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("names-are-unique", edited("weights.1.name", "classes")),
    ("names-are-unique", edited("buffers.1.name", "h")),
    ("names-are-unique", edited("engines.2.inputs.1.name", "f")),
    ("names-are-unique", edited("engines.0.weights", ["frequencies", "frequencies"])),
    ("symbols-in-range", edited("symbols.B", [0, 64])),
    ("symbols-in-range", edited("symbols.B", [64, 1])),
    ("symbols-in-range", edited("symbols.B", [1, 65537])),
    ("symbols-in-range", edited("symbols", {"B": [1, 64], "not a name": [1, 2]})),
    ("tensors-are-known", edited("output.dtype", "float33")),
    ("tensors-are-known", edited("output.shape", ["N", 8])),
    ("tensors-are-known", edited("output.shape", [0, 8])),
    ("tensors-are-known", edited("output.shape", [2**31 + 1, 8])),
    ("tensors-are-known", edited("output.shape", [1] * 17)),
    ("tensors-are-known", edited("output.shape", [2**31, 2**31])),
    ("tensors-are-known", edited("request_ports.0.shape", [2, 8])),
    ("tensors-are-known", edited("weights.0.shape", [-4, -8])),
    ("inputs-have-roles", edited("inputs.0.role", "condition")),
    ("inputs-have-roles", edited("inputs.1.role", "latent")),
    ("inputs-have-roles", edited("inputs.2.role", "timestep")),
    ("inputs-have-roles", edited("inputs.2.role", "weather")),
    ("inputs-have-roles", edited("inputs.0.minimum", 1)),
    ("inputs-have-roles", edited("inputs.2.null", 4.0)),
    ("inputs-have-roles", edited("inputs.2.null", 0.5)),
    ("inputs-have-roles", edited("inputs.2.minimum", 4)),
    ("inputs-have-roles", edited("inputs.2.dtype", "int32") | {"inputs": [
        *JSON["inputs"][:2], JSON["inputs"][2] | {"dtype": "uint8", "minimum": -1},
    ]}),
    ("order-names-programs", edited("order.0", 2)),
    ("order-names-programs", edited("order.0", -1)),
    ("order-names-programs", edited("step_programs", [])),
    ("weights-fill-their-bytes", edited("weights.0.nbytes", 127)),
    ("weights-fill-their-bytes", edited("weights.0.offset", -64)),
    ("weights-fill-their-bytes", edited("weights.0.offset", 4)),
    ("weights-fill-their-bytes", edited("weights.0.dtype", "float64")),
    ("constants-are-stored", edited("constants.0.weight", "nothing")),
    ("constants-are-stored", edited("constants.0.weight", "m")),
    ("constants-are-stored", edited("constants.1.weight", "m")),
    ("constants-are-stored", edited("order", [0, 1])),
    ("engines-are-complete", edited("engines.0.kind", "build")),
    ("engines-are-complete", edited("engines.0.outputs", [])),
    ("engines-are-complete", edited("engines.0.weights", ["nothing"])),
    ("ports-meet-their-values", edited("table.0.engine", "nothing")),
    ("ports-meet-their-values", edited("table.0.engine", "scale")),
    ("ports-meet-their-values", edited("table.0.inputs", ["timestep:f"])),
    ("ports-meet-their-values", edited("table.0.inputs.1", "request:nothing")),
    ("ports-meet-their-values", edited("table.0.inputs.1", "buffer:h")),
    ("ports-meet-their-values", edited("table.0.inputs.1", "input:x")),
    ("ports-meet-their-values", edited("table.0.outputs.0", "request:c")),
    ("ports-meet-their-values", edited("step_programs.1.0.inputs.1", "constant:f")),
    ("ports-meet-their-values", edited("engines.3.inputs.0.dtype", "float16")),
    ("ports-meet-their-values", edited("buffers.0.shape", ["B", 9])),
    ("timesteps-are-stored", edited("constants.0.name", "g")),
    ("timesteps-are-stored", edited("constants.0.rows", False)),
    ("ports-are-written-once", edited("request", [])),
    ("ports-are-written-once", edited("table", JSON["table"][::-1])),
    ("ports-are-written-once", edited("request", JSON["request"] * 2)),
    ("buffers-are-written-once", edited("step_programs.0", JSON["step_programs"][0][:2])),
    ("buffers-are-written-once", edited("step_programs.1", JSON["step_programs"][1] * 2)),
    ("buffers-are-written-once", edited("step_programs.0", JSON["step_programs"][0][1:])),
    ("buffers-are-written-once", edited("step_programs.1", [])),
    ("live-buffers-keep-their-slot", edited("buffers.1.slot", 0)),
    ("live-buffers-keep-their-slot", edited("buffers.1.slot", 2)),
    ("live-buffers-keep-their-slot", edited("buffers.1.slot", -1)),
    ("names-are-unique", with_history([0, 1, 0]) | {"histories": with_history([0])["histories"] * 2}),
    ("tensors-are-known", with_history([0, 1, 0]) | {"histories": [{"name": "k", "dtype": "f", "shape": ["B", 8]}]}),
    ("ports-meet-their-values", with_history([0, 1, 0]) | {"histories": []}),
    ("ports-meet-their-values", with_history([0, 1, 0]) | {
        "histories": [{"name": "k", "dtype": "float16", "shape": ["B", 8]}],
    }),
    ("ports-meet-their-values", edited("table.0.inputs.1", "history:k")),
    ("histories-are-written-before-read", with_history([1, 0, 1])),
    ("histories-are-written-before-read", with_history([0, 1, 0], keeps={0: {"inputs": ["history:k", "table:mod"]}})),
    ("histories-are-written-before-read", with_history([0, 1, 0]) | {"step_programs": [
        with_history([0])["step_programs"][0],
        [{"engine": "mix", "inputs": ["history:k"], "outputs": ["history:k"]}, *with_history([0])["step_programs"][1]],
    ]}),
    ("buffers-are-written-once", with_history([0, 1, 0], keeps={
        0: {"outputs": ["history:k"]}, 1: {"inputs": ["input:x"]},
    })),
    ("histories-are-written-before-read", with_history([0, 1, 0], modes("conditional", "both", "both"))),
    ("histories-are-written-before-read", with_history([0, 0, 1], modes("both", "conditional", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "both", "both", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "neither", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "both 1", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "conditional 1", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "reuse", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("reuse 1", "both", "both"))),
    ("guidance-has-its-differences", edited("guidance", modes("both", "conditional", "reuse 2"))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "value"), BROKEN, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BROKEN)])
def test_rule_refuses(rule: str, value: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as refused:
        plan_from_json(value)
    assert refused.value.what == f"the plan breaks the rule {rule}"
    assert refused.value.details.keys() == {"at", "got", "want", "next"}


MALFORMED: list[tuple[str, Any]] = [
    ("plan", None),
    ("plan", []),
    ("plan", 7),
    ("plan", {}),
    ("plan", without("order")),
    ("plan", JSON | {"surplus": 1}),
    ("plan.engines", edited("engines", {"0": 1})),
    ("plan.engines", edited("engines", None)),
    ("plan.symbols", edited("symbols", [])),
    ("plan.symbols", edited("symbols", {"": [1, 2]})),
    ("plan.symbols['B']", edited("symbols.B", [1])),
    ("plan.symbols['B'][0]", edited("symbols.B", ["1", 2])),
    ("plan.order[0]", edited("order.0", True)),
    ("plan.order[0]", edited("order.0", 0.0)),
    ("plan.order[0]", edited("order.0", 2**63)),
    ("plan.order[0]", edited("order.0", 10**5000)),
    ("plan.order", edited("order", [0] * (LIST_LIMIT + 1))),
    ("plan.output.name", edited("output.name", "")),
    ("plan.output.name", edited("output.name", "a\x00b")),
    ("plan.output.name", edited("output.name", "\ud800")),
    ("plan.output.name", edited("output.name", "x" * (TEXT_LIMIT + 1))),
    ("plan.output.shape[0]", edited("output.shape.0", None)),
    ("plan.output.shape[0]", edited("output.shape.0", 1.5)),
    ("plan.output.shape[0]", edited("output.shape.0", ["B"])),
    ("plan.weights[0].shape[0]", edited("weights.0.shape.0", "B")),
    ("plan.inputs[2].null", edited("inputs.2.null", float("nan"))),
    ("plan.inputs[2].null", edited("inputs.2.null", 10**400)),
    ("plan.inputs[2].minimum", edited("inputs.2.minimum", 1.0)),
    ("plan.constants[0].rows", edited("constants.0.rows", 1)),
    ("plan.inputs[2]", without("inputs.2.null")),
    ("plan.guidance[0].mode", edited("guidance", [{"mode": None, "weights": []}])),
    ("plan.guidance[0].weights", edited("guidance", [{"mode": "reuse", "weights": 1.0}])),
    ("plan.guidance[0].weights[1]", edited("guidance", [{"mode": "reuse", "weights": [1.0, float("inf")]}])),
    ("plan.histories[0].shape[0]", edited("histories", [{"name": "k", "dtype": "float32", "shape": [None]}])),
    ("plan.table[0].inputs[0]", edited("table.0.inputs.0", "timestep")),
    ("plan.table[0].inputs[0]", edited("table.0.inputs.0", "register:f")),
    ("plan.table[0].inputs[0]", edited("table.0.inputs.0", "timestep:")),
    ("plan.table[0].inputs[0]", edited("table.0.inputs.0", {"kind": "timestep", "name": "f"})),
]


@pytest.mark.parametrize(("at", "value"), MALFORMED, ids=[f"{i}-{at}" for i, (at, _) in enumerate(MALFORMED)])
def test_malformed_field_is_named(at: str, value: Any) -> None:
    with pytest.raises(ArtifactError) as refused:
        plan_from_json(value)
    assert refused.value.what == "the plan has a field that cannot be read"
    assert refused.value.details["at"] == at
    str(refused.value).encode("utf-8")


def test_message_is_whole() -> None:
    with pytest.raises(ArtifactError) as refused:
        plan_from_json(edited("buffers.1.slot", 0))
    assert str(refused.value) == (
        "artifact: the plan breaks the rule live-buffers-keep-their-slot\n"
        "  at    step program 0, call 1\n"
        "  got   'z' in slot 0, where 'h' lives to call 1\n"
        "  want  one live buffer per slot\n"
        "  next  compile the model again; if that does not help, report it with this text"
    )


def test_denoise_alone_needs_no_sampler_calls() -> None:
    """Without a sampler there are no calls, and timestep values have no stored rows."""
    plan = replace(PLAN, order=(), constants=PLAN.constants[1:])
    assert plan_from_json(plan_to_json(plan)) == plan


def test_histories_and_guidance_that_keep_the_rules_are_read() -> None:
    for value in (
        with_history([0, 1, 0]),
        with_history([0, 1, 1], modes("conditional", "conditional", "conditional")),
        with_history([0, 0, 1], modes("conditional", "both", "both")),
        with_history([0, 1, 1], modes("both", "reuse 1", "conditional")),
        with_history([0, 0, 1], modes("both", "both", "reuse 2")),
    ):
        plan = plan_from_json(value)
        assert plan_to_json(plan) == value


# For each sampler call whether both halves run, and in order the histories that its engines read and write.
Halves = list[tuple[bool, list[tuple[frozenset[int], int]]]]


def stale(calls: Halves) -> bool:
    """The meaning of the rule on histories, row by row: a row that runs reads what no call wrote for it."""
    memory: dict[int, tuple[bool, bool]] = {}
    for both, engines in calls:
        runs = (True, both)
        for read, new in engines:
            for history in read:
                held = memory.get(history, (False, False))
                if any(needed and not there for needed, there in zip(runs, held, strict=True)) or history == new:
                    return True
            memory[new] = runs
    return False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(
                st.tuples(st.frozensets(st.integers(0, 2), max_size=2), st.integers(0, 2)),
                max_size=3,
                unique_by=lambda engine: engine[1],
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_history_rule_agrees_with_brute_force(calls: Halves) -> None:
    plan = plan_of([], [])
    programs = []
    for _, engines in calls:
        program = [
            Call(
                f"reads{len(read)}", tuple(Ref("history", f"k{i}") for i in sorted(read)), (Ref("history", f"k{new}"),)
            )
            for read, new in engines
        ]
        programs.append((*program, *plan.step_programs[0]))
    plan = replace(
        plan,
        histories=tuple(TensorSpec(f"k{index}", "float32", ROW) for index in range(3)),
        step_programs=tuple(programs),
        order=tuple(range(len(calls))),
        guidance=tuple(CallGuidance("both" if both else "conditional", ()) for both, _ in calls),
        constants=PLAN.constants[1:],
        timestep_ports=(),
        timestep=(),
        table=(),
        table_ports=(),
    )
    value = plan_to_json(plan)
    if stale(calls):
        with pytest.raises(ArtifactError, match="histories-are-written-before-read"):
            plan_from_json(value)
    else:
        assert plan_from_json(value) == plan


# A step program as data: for each call the buffers that it reads and the one that it writes.
Steps = list[tuple[frozenset[int], int]]


@st.composite
def step_programs(draw: Callable[..., Any]) -> tuple[Steps, list[int]]:
    """Calls that each write one new buffer and read older ones, and a slot for each buffer."""
    count = draw(st.integers(1, 7))
    calls: Steps = []
    for index in range(count):
        read = draw(st.frozensets(st.integers(0, index - 1), max_size=3)) if index else frozenset()
        calls.append((read, index))
    slots = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    return calls, slots


def plan_of(calls: Steps, slots: list[int]) -> Plan:
    port = TensorSpec("x", "float32", ROW)
    engines = {
        reads: EngineSpec(
            f"reads{reads}",
            "step",
            "engines/any.onnx",
            tuple(replace(port, name=f"in{index}") for index in range(reads)),
            (port,),
        )
        for reads in range(5)
    }
    program = [
        Call(
            f"reads{len(read)}",
            tuple(Ref("buffer", f"b{i}") for i in sorted(read)),
            (Ref("buffer", f"b{new}"),),
        )
        for read, new in calls
    ]
    program.append(Call("reads1", (Ref("input", "x"),), (Ref("output", "out"),)))
    return replace(
        PLAN,
        engines=(*PLAN.engines, *engines.values()),
        buffers=tuple(BufferSpec(f"b{i}", "float32", ROW, slot) for i, slot in enumerate(slots)),
        step_programs=(tuple(program),),
        order=(0, 0, 0),
    )


def collides(calls: Steps, slots: list[int]) -> bool:
    """The meaning of the liveness rule, by brute force: at some call, two live buffers hold one slot."""
    for moment in range(len(calls)):
        live = [
            slots[buffer]
            for buffer in range(len(calls))
            if buffer <= moment and (buffer == moment or any(buffer in read for read, _ in calls[moment:]))
        ]
        if len(live) != len(set(live)):
            return True
    return False


@settings(max_examples=400, deadline=None, derandomize=True)
@given(step_programs())
def test_liveness_rule_agrees_with_brute_force(case: tuple[Steps, list[int]]) -> None:
    calls, slots = case
    value = plan_to_json(plan_of(calls, slots))
    if collides(calls, slots):
        with pytest.raises(ArtifactError, match="live-buffers-keep-their-slot"):
            plan_from_json(value)
    else:
        assert plan_from_json(value).buffers[0].slot == slots[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(step_programs())
def test_memory_keeps_its_values(case: tuple[Steps, list[int]]) -> None:
    """In a plan that the rule accepts, every read finds the value that was written for it."""
    calls, slots = case
    if collides(calls, slots):
        slots = list(range(len(calls)))
    plan_from_json(plan_to_json(plan_of(calls, slots)))
    memory: dict[int, int] = {}
    for read, new in calls:
        assert all(memory[slots[buffer]] == buffer for buffer in read)
        memory[slots[new]] = new
