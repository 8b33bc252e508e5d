"""How values flow through the calls of a plan: the second half of its rules.

Every port meets a place that exists, may be used there, and has its dtype and shape; every place is written
once and before it is read; two buffers that are live at the same call never share memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dcc.errors import ArtifactError
from dcc.runtime.plan import (
    GUIDANCE_MODES,
    BufferSpec,
    Call,
    ConstantSpec,
    EngineSpec,
    InputSpec,
    Plan,
    PortSpec,
    Ref,
    Shape,
    TensorSpec,
    WeightSpec,
)
from dcc.runtime.strict_json import shown

BATCH = "B"

# Which kinds of place the calls of a scope may read and write, and which inputs of the denoiser they see.
READS = {
    "timestep": ("input", "constant", "timestep"),
    "request": ("input", "constant", "request"),
    "table": ("input", "constant", "timestep", "request", "table"),
    "step": ("input", "constant", "timestep", "request", "table", "buffer", "history", "output"),
}
WRITES = {
    "timestep": ("timestep",),
    "request": ("request",),
    "table": ("table",),
    "step": ("buffer", "history", "output"),
}
INPUT_ROLES = {
    "timestep": ("timestep",),
    "request": ("condition",),
    "table": ("timestep", "condition"),
    "step": ("latent", "timestep", "condition"),
}
Value = tuple[str, Shape]


def check_bindings(plan: Plan) -> None:
    """ports-meet-their-values: each call's places exist, are allowed there, and match the port."""
    engines = {engine.name: engine for engine in plan.engines}
    places = _places(plan)
    roles = {entry.name: entry.role for entry in plan.inputs}
    for scope, program, calls in _programs(plan):
        for index, call in enumerate(calls):
            at = f"{program}, call {index}, engine {shown(call.engine)}"
            engine = engines.get(call.engine)
            if engine is None or engine.kind != scope:
                got = "no such engine" if engine is None else f"an engine of kind {engine.kind}"
                raise broken("ports-meet-their-values", at, got, f"an engine of kind {scope}")
            _check_call(engine, call, at, places, scope)
            for ref in call.inputs:
                if ref.kind == "input" and roles[ref.name] not in INPUT_ROLES[scope]:
                    got = f"{roles[ref.name]} input {shown(ref.name)}"
                    raise broken("ports-meet-their-values", at, got, f"{' or '.join(INPUT_ROLES[scope])} input")


def check_timesteps(plan: Plan) -> None:
    """timesteps-are-stored: if there are sampler calls, each timestep port has its rows in a constant."""
    if not plan.order:
        return
    weights = {weight.name: weight for weight in plan.weights}
    rows = {entry.name: _constant_value(entry, weights[entry.weight]) for entry in plan.constants if entry.per_call}
    for port in plan.timestep_ports:
        got = rows.get(port.name)
        if got != (port.dtype, port.shape):
            raise broken(
                "timesteps-are-stored",
                f"timestep port {shown(port.name)}",
                "no per-call constant of this name" if got is None else type_text(got),
                type_text((port.dtype, port.shape)),
            )


def check_ports(plan: Plan) -> None:
    """ports-are-written-once: by the calls of their own scope, before they are read."""
    declared = {
        Ref(kind, port.name)
        for kind, ports in (
            ("timestep", plan.timestep_ports), ("request", plan.request_ports), ("table", plan.table_ports),
        )
        for port in ports
    }  # fmt: skip
    written: set[Ref] = set()
    for scope, program, calls in _programs(plan):
        if scope != "step":
            written |= _check_writes(calls, program, written, "ports-are-written-once")
    for ref in sorted(declared - written, key=str):
        raise broken("ports-are-written-once", _place(ref), "written by no call", "written by one call")


def check_buffers(plan: Plan) -> None:
    """buffers-are-written-once: before they are read, in each step program; and each writes `output`."""
    for scope, program, calls in _programs(plan):
        if scope != "step":
            continue
        written = _check_writes(calls, program, set(), "buffers-are-written-once")
        if not any(ref.kind == "output" for ref in written):
            raise broken("buffers-are-written-once", program, "output is never written", "written once")


def check_liveness(plan: Plan) -> None:
    """live-buffers-keep-their-slot: two buffers of one slot are never live at the same call.

    A buffer lives from the call that writes it to the last call that reads it, both included: a call may not
    write where it reads.
    """
    slots = {buffer.name: buffer.slot for buffer in plan.buffers}
    for buffer in plan.buffers:
        if not 0 <= buffer.slot < len(plan.buffers):
            got, want = f"slot {buffer.slot}", f"0 to {len(plan.buffers) - 1}"
            raise broken("live-buffers-keep-their-slot", f"buffer {shown(buffer.name)}", got, want)
    for scope, program, calls in _programs(plan):
        if scope != "step":
            continue
        last: dict[int, tuple[int, str]] = {}
        for name, (first, final) in sorted(_lifetimes(calls).items(), key=lambda item: item[1]):
            busy_until, holder = last.get(slots[name], (-1, ""))
            if first <= busy_until:
                raise broken(
                    "live-buffers-keep-their-slot",
                    f"{program}, call {first}",
                    f"{shown(name)} in slot {slots[name]}, where {shown(holder)} lives to call {busy_until}",
                    "one live buffer per slot",
                )
            last[slots[name]] = (final, name)


def check_histories(plan: Plan) -> None:
    """histories-are-written-before-read: by an earlier sampler call or engine, for both halves where both are read.

    No engine writes a history that it reads. The first sampler call reads no value of another one: `denoise` runs
    its program alone.
    """
    rule = "histories-are-written-before-read"
    written: dict[str, bool] = {}  # whether the value holds for both halves
    modes = [entry.mode == "both" for entry in plan.guidance] or [True] * len(plan.order)
    for number, (program, both) in enumerate(zip(plan.order or (0,), modes or [True], strict=True)):
        for index, call in enumerate(plan.step_programs[program]):
            at = f"sampler call {number}, step program {program}, call {index}"
            reads = [ref.name for ref in call.inputs if ref.kind == "history"]
            writes = [ref.name for ref in call.outputs if ref.kind == "history"]
            for name in reads:
                if name not in written or (both and not written[name]) or name in writes:
                    halves = "both halves" if both else "the conditional half"
                    got = f"reads history {shown(name)}, not written for {halves} yet"
                    got = f"writes {shown(name)}, which it reads" if name in writes else got
                    raise broken(rule, at, got, "written before")
            written |= dict.fromkeys(writes, both)


def check_guidance(plan: Plan) -> None:
    """guidance-has-its-differences: a known mode for every sampler call; weights only of earlier guided calls."""
    if plan.guidance and len(plan.guidance) != len(plan.order):
        got, want = f"{len(plan.guidance)} modes", f"{len(plan.order)}, one per sampler call, or none"
        raise broken("guidance-has-its-differences", "guidance", got, want)
    known = 0
    for index, entry in enumerate(plan.guidance):
        fits = len(entry.weights) <= known and bool(entry.weights) == (entry.mode == "reuse")
        if entry.mode not in GUIDANCE_MODES or not fits:
            got = f"{shown(entry.mode)} with {len(entry.weights)} weights after {known} guided calls"
            want = f"{', '.join(GUIDANCE_MODES)}; weights for reuse alone"
            raise broken("guidance-has-its-differences", f"guidance[{index}]", got, want)
        known += entry.mode == "both"


def _programs(plan: Plan) -> Iterator[tuple[str, str, tuple[Call, ...]]]:
    """Scope, name and calls of every straight line of calls, in the order in which they run."""
    yield "timestep", "timestep calls", plan.timestep
    yield "request", "request calls", plan.request
    yield "table", "table calls", plan.table
    for index, calls in enumerate(plan.step_programs):
        yield "step", f"step program {index}", calls


def _places(plan: Plan) -> dict[Ref, Value]:
    """Everything that a call may name, with its dtype and shape as an engine sees it."""
    weights = {weight.name: weight for weight in plan.weights}
    tables: tuple[tuple[str, Iterable[InputSpec | PortSpec | BufferSpec | TensorSpec]], ...] = (
        ("input", plan.inputs), ("timestep", plan.timestep_ports), ("request", plan.request_ports),
        ("table", plan.table_ports), ("buffer", plan.buffers), ("history", plan.histories),
    )  # fmt: skip
    places = {Ref(kind, entry.name): (entry.dtype, entry.shape) for kind, entries in tables for entry in entries}
    for constant in plan.constants:
        if not constant.per_call:
            places[Ref("constant", constant.name)] = _constant_value(constant, weights[constant.weight])
    places[Ref("output", plan.output.name)] = (plan.output.dtype, plan.output.shape)
    return places


def _constant_value(constant: ConstantSpec, weight: WeightSpec) -> Value:
    """Dtype and shape of one row, or of the whole where there is no row per sampler call."""
    shape: Shape = weight.shape[1:] if constant.per_call else weight.shape
    return weight.dtype, ((BATCH, *shape[1:]) if constant.rows else shape)


def _check_call(engine: EngineSpec, call: Call, at: str, places: Mapping[Ref, Value], scope: str) -> None:
    for refs, ports, kinds in (
        (call.inputs, engine.inputs, READS[scope]),
        (call.outputs, engine.outputs, WRITES[scope]),
    ):
        if len(refs) != len(ports):
            raise broken("ports-meet-their-values", at, f"{len(refs)} places", f"{len(ports)}, one per port")
        for ref, port in zip(refs, ports, strict=True):
            value = places.get(ref) if ref.kind in kinds else None
            if value != (port.dtype, port.shape):
                raise broken(
                    "ports-meet-their-values",
                    f"{at}, port {shown(port.name)}",
                    f"{_place(ref)}, {'which has no place here' if value is None else type_text(value)}",
                    type_text((port.dtype, port.shape)),
                )


def _check_writes(calls: tuple[Call, ...], program: str, before: set[Ref], rule: str) -> set[Ref]:
    """What these calls write: each place once, and none of their own kinds after it was read."""
    kinds = ("buffer", "output") if rule.startswith("buffers") else ("timestep", "request", "table")
    written: set[Ref] = set()
    for index, call in enumerate(calls):
        at = f"{program}, call {index}"
        for ref in call.inputs:
            if ref.kind in kinds and ref not in written and ref not in before:
                raise broken(rule, at, f"reads {_place(ref)}, not written yet", "written before")
        for ref in call.outputs:
            if ref in written or ref in before:
                raise broken(rule, at, f"writes {_place(ref)} again", "written once")
            written.add(ref)
    return written


def _lifetimes(calls: tuple[Call, ...]) -> dict[str, tuple[int, int]]:
    """For each buffer the call that writes it and the last one that touches it."""
    lives: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for ref in call.outputs + call.inputs:
            if ref.kind == "buffer":
                lives[ref.name] = (lives.get(ref.name, (index, index))[0], index)
    return lives


def _place(ref: Ref) -> str:
    return f"{ref.kind} {shown(ref.name)}"


def type_text(value: Value) -> str:
    dtype, shape = value
    return f"{shown(dtype)}[{', '.join(shown(dimension) for dimension in shape[:20])}]"


def broken(rule: str, at: str, got: str, want: str) -> ArtifactError:
    return ArtifactError(
        f"the plan breaks the rule {rule}",
        at=at,
        got=got,
        want=want,
        next="compile the model again; if that does not help, report it with this text",
    )
