"""A Program becomes a plan, engines and stored weights in an artifact.

Neighbouring stages of the step that always run together become one engine: without a schedule the whole step is one
engine, with `granularity="component"` every component is an engine of its own, in which candidates of a search run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from dcc.errors import ExportError, ScheduleError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import EngineBody, StoredWeights, compose, port_name, port_spec
from dcc.exports.step_plan import StepEngine, StepPlan, StepPlanner
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.exports.unroll import EARLY, Operation, Value, step_stages, unroll
from dcc.ir.graph import dtype_of, outputs_of, shape_of
from dcc.ir.interpret import run_stage
from dcc.ir.program import Program, Role, Scope, Stage
from dcc.runtime.plan import Call, ConstantSpec, EngineSpec, InputSpec, Plan, PortSpec, Ref, TensorSpec, WeightSpec

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
    bodies: dict[str, EngineBody] = field(default_factory=dict)

    @property
    def stored(self) -> StoredWeights:
        return StoredWeights(self.weights, self.writer.weights_offset)


def lower(
    program: Program,
    writer: ArtifactWriter,
    granularity: str = "step",
    progress: Progress = lambda _: None,
    templates: Mapping[str, OnnxTemplate] | None = None,
    bodies: dict[str, EngineBody] | None = None,
) -> Plan:
    """The plan of the Program under its schedule; its engines and weights are in `writer`.

    Weights of components that no sampler call computes are left out. `templates` are those of the Program where they
    have been exported before. `bodies` is given what each engine computes, for whoever lowers the same engines another
    way. Raises ScheduleError for a schedule that the Program cannot follow.
    """
    if granularity not in GRANULARITIES:
        raise ExportError("unknown granularity", got=granularity, want=", ".join(GRANULARITIES))
    calls = program.calls if program.sampler is not None else 0
    if program.schedule is not None and program.schedule.calls != calls:
        raise ScheduleError(
            "the schedule is for another sampler", got=f"{program.schedule.calls} sampler calls", want=str(calls),
            next="search again for this number of steps, or transfer the schedule",
        )  # fmt: skip
    if templates is None:
        progress(f"exporting {len(program.templates)} templates")
        templates = export_templates(program.templates)
    lowering = _Lowering(program, writer, templates, bodies={} if bodies is None else bodies)
    progress("writing weights")
    skipped = never_computed(program)
    for stage in program.stages:
        if stage.name not in skipped:
            _store_weights(lowering, stage)
    progress("composing engines")
    early = {scope: [stage for stage in program.stages if stage.kind == scope] for scope in EARLY}
    early_calls = {scope: _early_calls(lowering, scope, stages) for scope, stages in early.items()}
    step = _step(lowering, granularity)
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
        buffers=step.buffers,
        histories=step.histories,
        timestep=early_calls[Scope.TIMESTEP],
        request=early_calls[Scope.REQUEST],
        table=early_calls[Scope.TABLE],
        step_programs=step.programs,
        order=step.order or (0,) * calls,
        guidance=step.guidance,
    )


def never_computed(program: Program) -> set[str]:
    """Names of the stages that no sampler call runs."""
    if program.schedule is None:
        return set()
    run = {operation.stage for call in unroll(program, program.schedule) for operation in call}
    return {stage.name for stage in step_stages(program)} - run


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


def _early_calls(lowering: _Lowering, scope: Scope, stages: Sequence[Stage]) -> tuple[Call, ...]:
    calls = []
    for stage in stages:
        specs: list[dict[Value, TensorSpec]] = [
            {node: port_spec(node) for node in nodes} for nodes in (stage.inputs, stage.outputs)
        ]
        operation = Operation("stage", stage.inputs, stage.outputs, stage.name)
        model, used = compose(
            stage.name, [operation], {stage.name: stage}, lowering.templates, specs[0], specs[1], lowering.stored
        )
        member = f"engines/{stage.name}.onnx"
        lowering.writer.add_member(member, model)
        lowering.bodies[stage.name] = EngineBody((operation,), *specs)
        ports = tuple(specs[0].values()), tuple(specs[1].values())
        lowering.engines.append(EngineSpec(stage.name, str(scope), member, *ports, used))
        inputs = tuple(_early_reference(lowering.program, node) for node in stage.inputs)
        calls.append(Call(stage.name, inputs, tuple(Ref(str(scope), port_name(node)) for node in stage.outputs)))
    return tuple(calls)


def _early_reference(program: Program, node: Node) -> Ref:
    return Ref("input" if node.op == "placeholder" else str(program.scopes[node]), port_name(node))


def _step(lowering: _Lowering, granularity: str) -> StepPlan:
    """The step's engines are written, named by the order in which they are first used."""
    planner = StepPlanner(lowering.program, lowering.templates, lowering.stored)
    step = planner.plan(lowering.program.schedule, finest=granularity == "component")
    names: dict[str, str] = {}
    for key, engine in step.engines.items():
        name = names[key] = "step" if len(step.engines) == 1 else f"step.{len(names):03d}"
        member = f"engines/{name}.onnx"
        lowering.writer.add_member(member, engine.model)
        lowering.engines.append(EngineSpec(name, "step", member, engine.inputs, engine.outputs, engine.weights))
        lowering.bodies[name] = _body(engine)
    step.programs = tuple(
        tuple(Call(names[call.engine], call.inputs, call.outputs) for call in program) for program in step.programs
    )
    for name, value in step.scalars.items():
        lowering.extra.append(lowering.writer.add_weight(name, value))
        lowering.constants.append(ConstantSpec(name, name, per_call=False, rows=False))
    return step


def _body(engine: StepEngine) -> EngineBody:
    """The engine's operations with its ports: values that are read and not made, and those that leave."""
    made = dict.fromkeys(value for operation in engine.operations for value in operation.outputs)
    read = dict.fromkeys(value for operation in engine.operations for value in operation.inputs)
    inputs = [value for value in read if value not in made]
    names = {spec.name for spec in engine.outputs}
    # A kept value always leaves.
    outputs = [value for value in made if not isinstance(value, Node) or value.name in names]
    ports = zip(inputs, engine.inputs, strict=True), zip(outputs, engine.outputs, strict=True)
    return EngineBody(engine.operations, *map(dict, ports))


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
