"""A Program becomes a plan, engines and stored weights in an artifact.

Neighbouring stages of the step that always run together become one engine: without a schedule the whole step is one
engine, with `granularity="component"` every component is an engine of its own together with the glue before it.
Values between engines are buffers that share memory by liveness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from dcc.errors import ExportError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import StoredWeights, compose, port_name, port_spec
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.ir.graph import dtype_of, elements, outputs_of, shape_of
from dcc.ir.interpret import run_stage
from dcc.ir.program import Program, Role, Scope, Stage
from dcc.runtime.plan import (
    BufferSpec,
    Call,
    ConstantSpec,
    EngineSpec,
    InputSpec,
    Plan,
    PortSpec,
    Ref,
    TensorSpec,
    WeightSpec,
)

GRANULARITIES = ("step", "component")
Progress = Callable[[str], None]


@dataclass
class _Lowering:
    program: Program
    writer: ArtifactWriter
    templates: Mapping[str, OnnxTemplate]
    weights: dict[tuple[str, bool], WeightSpec] = field(default_factory=dict)
    engines: list[EngineSpec] = field(default_factory=list)
    constants: list[ConstantSpec] = field(default_factory=list)
    extra: list[WeightSpec] = field(default_factory=list)


def lower(
    program: Program, writer: ArtifactWriter, granularity: str = "step", progress: Progress = lambda _: None
) -> Plan:
    """The plan of the Program; its engines and weights are in `writer`."""
    if granularity not in GRANULARITIES:
        raise ExportError("unknown granularity", got=granularity, want=", ".join(GRANULARITIES))
    progress(f"exporting {len(program.templates)} templates")
    lowering = _Lowering(program, writer, export_templates(program.templates))
    progress("writing weights")
    for stage in program.stages:
        _store_weights(lowering, stage)
    progress("composing engines")
    early = {scope: [stage for stage in program.stages if stage.kind == scope] for scope in _EARLY}
    calls = {scope: _early_calls(lowering, scope, stages) for scope, stages in early.items()}
    groups = _groups([stage for stage in program.stages if stage.kind not in _EARLY], granularity)
    step, buffers = _step_calls(lowering, groups)
    _store_timestep_tables(lowering, early[Scope.TIMESTEP])
    final = outputs_of(program.graph)[0]
    return Plan(
        symbols={"B": program.rows},
        inputs=tuple(
            InputSpec(item.name, str(item.role), item.dtype, item.shape, item.null, item.minimum, item.maximum)
            for item in program.inputs
        ),
        output=TensorSpec("output", dtype_of(final), shape_of(final)),
        weights=(*lowering.weights.values(), *lowering.extra),
        engines=tuple(lowering.engines),
        constants=tuple(lowering.constants),
        timestep_ports=_ports(early[Scope.TIMESTEP]),
        request_ports=_ports(early[Scope.REQUEST]),
        table_ports=_ports(early[Scope.TABLE]),
        buffers=buffers,
        timestep=calls[Scope.TIMESTEP],
        request=calls[Scope.REQUEST],
        table=calls[Scope.TABLE],
        step_programs=(step,),
        order=(0,) * (program.calls if program.sampler is not None else 0),
    )


_EARLY = (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE)


def _store_weights(lowering: _Lowering, stage: Stage) -> None:
    template = lowering.templates[stage.template]
    for index, name in enumerate(stage.weights):
        transposed = index in template.transposed
        if (name, transposed) in lowering.weights:
            continue
        tensor = lowering.program.weights[name]
        stored = tensor.t() if transposed else tensor
        label = f"{name}^T" if transposed else name
        lowering.weights[name, transposed] = lowering.writer.add_weight(label, stored.contiguous().numpy())


def _ports(stages: Sequence[Stage]) -> tuple[PortSpec, ...]:
    return tuple(
        PortSpec(port_name(node), dtype_of(node), shape_of(node), shape_of(node)[:1] == ("B",))
        for stage in stages
        for node in stage.outputs
    )


def _ref(lowering: _Lowering, node: Node, inside: str = "buffer") -> Ref:
    if node.op == "placeholder":
        return Ref("input", node.name)
    scope = lowering.program.scopes.get(node, Scope.STEP)
    return Ref(str(scope) if scope in _EARLY else inside, port_name(node))


def _engine(
    lowering: _Lowering, name: str, kind: str, stages: Sequence[Stage], outputs: Sequence[Node]
) -> tuple[Node, ...]:
    """The stages become an engine; returns the nodes that it reads."""
    made = {node for stage in stages for node in stage.outputs}
    inputs = tuple(dict.fromkeys(node for stage in stages for node in stage.inputs if node not in made))
    stored = StoredWeights(lowering.weights, lowering.writer.weights_offset)
    model, used = compose(name, stages, lowering.templates, inputs, outputs, stored)
    member = f"engines/{name}.onnx"
    lowering.writer.add_member(member, model)
    lowering.engines.append(
        EngineSpec(name, kind, member, tuple(map(port_spec, inputs)), tuple(map(port_spec, outputs)), used)
    )
    return inputs


def _early_calls(lowering: _Lowering, scope: Scope, stages: Sequence[Stage]) -> tuple[Call, ...]:
    calls = []
    for stage in stages:
        inputs = _engine(lowering, stage.name, str(scope), [stage], stage.outputs)
        outputs = tuple(Ref(str(scope), port_name(node)) for node in stage.outputs)
        calls.append(Call(stage.name, tuple(_ref(lowering, node) for node in inputs), outputs))
    return tuple(calls)


def _groups(stages: Sequence[Stage], granularity: str) -> list[list[Stage]]:
    if granularity == "step":
        return [list(stages)] if stages else []
    groups: list[list[Stage]] = [[]]
    for stage in stages:
        groups[-1].append(stage)
        if stage.kind == "component":
            groups.append([])
    return [group for group in groups if group]


def _step_calls(
    lowering: _Lowering, groups: Sequence[Sequence[Stage]]
) -> tuple[tuple[Call, ...], tuple[BufferSpec, ...]]:
    final = outputs_of(lowering.program.graph)[0]
    readers: dict[Node, int] = {}
    for index, group in enumerate(groups):
        for stage in group:
            readers |= dict.fromkeys(stage.inputs, index)
    calls: list[Call] = []
    written: dict[Node, int] = {}
    for index, group in enumerate(groups):
        outputs = [node for stage in group for node in stage.outputs if readers.get(node, -1) > index or node is final]
        name = "step" if len(groups) == 1 else f"step.{index:03d}"
        inputs = _engine(lowering, name, "step", group, outputs)
        places = tuple(Ref("output", "output") if node is final else Ref("buffer", port_name(node)) for node in outputs)
        written |= dict.fromkeys((node for node in outputs if node is not final), index)
        calls.append(Call(name, tuple(_ref(lowering, node) for node in inputs), places))
    return tuple(calls), assign_slots(written, readers)


def assign_slots(written: Mapping[Node, int], last_read: Mapping[Node, int]) -> tuple[BufferSpec, ...]:
    """Buffers in slots so that two in one slot are never live at the same engine; best fit by size at two rows."""
    slots: list[tuple[int, int]] = []  # (bytes at two rows, engine after which it is free)
    specs = []
    for node, start in sorted(written.items(), key=lambda pair: (pair[1], pair[0].name)):
        size = elements(shape_of(node), 2) * int(node.meta["val"].element_size())
        free = [index for index, (_, until) in enumerate(slots) if until < start]
        chosen = min(free, key=lambda index: abs(slots[index][0] - size), default=None)
        if chosen is None:
            slots.append((size, last_read[node]))
            chosen = len(slots) - 1
        else:
            slots[chosen] = (max(size, slots[chosen][0]), last_read[node])
        specs.append(BufferSpec(port_name(node), dtype_of(node), shape_of(node), chosen))
    return tuple(specs)


def _store_timestep_tables(lowering: _Lowering, stages: Sequence[Stage]) -> None:
    """Timestep-only values for every sampler call, computed now: `[calls, 1, ...]`."""
    program = lowering.program
    if program.sampler is None or not stages:
        return
    name = program.input(Role.TIMESTEP)[0].name
    spec = program.input(Role.TIMESTEP)[0]
    placeholder = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == name)
    times = torch.tensor([call.timestep for call in program.sampler.calls], dtype=torch.float64)
    values: dict[Node, Tensor] = {placeholder: times.to(getattr(torch, spec.dtype))}
    for stage in stages:
        made = run_stage(program, stage.template, stage.inputs, stage.weights, stage.outputs, values)
        values |= made
        for node, table in made.items():
            label = f"table.{port_name(node)}"
            array: np.ndarray = table.contiguous().unsqueeze(1).numpy()
            lowering.extra.append(lowering.writer.add_weight(label, array))
            lowering.constants.append(ConstantSpec(port_name(node), label, per_call=True, rows=True))
