"""The Program as text: deterministic, numbered by position, one line per stage."""

from __future__ import annotations

from torch.fx import Node

from dcc.ir.graph import dtype_of, is_tensor, is_weight, op_name, outputs_of, shape_of, type_text
from dcc.ir.ops import flops_of
from dcc.ir.program import Program, Scope, Stage


def program_text(program: Program, costs: bool = False) -> str:
    """The whole Program; `costs` adds parameters and FLOPs of one row after `//`."""
    sampler = program.sampler
    loop = f"{sampler.name}/{sampler.steps}" if sampler is not None else "none"
    low, high = program.rows
    lines = [f"program {program.name}  sampler={loop}  guidance={program.guidance.mode}  B in {low}..{high}"]
    names = _names(program)
    for item in program.inputs:
        lines.append(f"{item.role:<9} {names_of_input(item.name):<18} : {type_text(item.dtype, item.shape)}")
    current = None
    for stage in program.stages:
        section = stage.kind if stage.kind in (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE) else "step"
        if section != current:
            current = section
            lines.append(section if section != "timestep" else "build")
        lines.append(_stage_line(program, stage, names, costs))
    if not program.stages:
        lines += ["step", f"  {len(program.graph.nodes)} operations, not cut yet"]
    results = ", ".join(names.get(node, node.name) for node in outputs_of(program.graph))
    return "\n".join([*lines, f"return {results}", ""])


def names_of_input(name: str) -> str:
    return f"%{name}"


def _names(program: Program) -> dict[Node, str]:
    names = {node: f"%{node.name}" for node in program.graph.nodes if node.op == "placeholder"}
    count = 0
    for stage in program.stages:
        for node in stage.outputs:
            names[node] = f"%{count}"
            count += 1
    return names


def _stage_line(program: Program, stage: Stage, names: dict[Node, str], costs: bool) -> str:
    inputs = ", ".join(names.get(node, f"%{node.name}") for node in stage.inputs)
    results = ", ".join(names[node] for node in stage.outputs)
    types = ", ".join(type_text(dtype_of(node), shape_of(node)) for node in stage.outputs[:3])
    if len(stage.outputs) > 3:
        types += f", ... {len(stage.outputs)} in all"
    line = f"  {_shortened(results)} = {stage.name}({_shortened(inputs)}) : {types}  @{stage.template}"
    if not costs:
        return line
    parameters = sum(program.weights[name].numel() for name in stage.weights)
    flops = sum(flops_of(node, 1) for node in stage.nodes)
    kind = "component, " if stage.kind == "component" else ""
    return f"{line}  // {kind}{parameters:,} parameters, {flops / 1e6:.1f} MF a row"


def _shortened(names: str, most: int = 8) -> str:
    parts = names.split(", ")
    if len(parts) <= most:
        return names
    return ", ".join([*parts[: most // 2], f"... {len(parts) - most} more", *parts[-most // 2 :]])


def graph_text(program: Program) -> str:
    """Every operation of the denoiser with its scope; for tests of single passes and for `inspect --graph`."""
    numbers: dict[Node, str] = {}
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            numbers[node] = f"%{node.name}"
        elif is_weight(node):
            numbers[node] = f"@{node.target}"
        elif node.op == "call_function":
            numbers[node] = f"%{len([name for name in numbers.values() if name[1:].isdigit()])}"
            kind = f" : {type_text(dtype_of(node), shape_of(node))}" if is_tensor(node) else ""
            scope = f"{program.scopes[node]:<8} " if node in program.scopes else ""
            arguments = ", ".join(_spell(value, numbers) for value in node.args)
            options = "".join(f", {key}={_spell(value, numbers)}" for key, value in sorted(node.kwargs.items()))
            lines.append(f"{scope}{numbers[node]} = {op_name(node)}({arguments}{options}){kind}")
    results = ", ".join(numbers[node] for node in outputs_of(program.graph))
    return "\n".join([*lines, f"return {results}", ""])


def _spell(value: object, numbers: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return numbers[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spell(part, numbers) for part in value)}]"
    return str(value)
