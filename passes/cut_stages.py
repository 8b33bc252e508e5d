"""The graph is cut into stages: one per early scope, and in the step a chain of components, residuals and glue.

The gates and residual adds behind a component are a stage of their own where nothing else lies between them: there
the stream can be read, and a component left out. Equal stages share a template and are lowered once, however deep
the model is. Stages are in a linear order: a glue node comes after the last component that it depends on, so the
chain is always executable from left to right.

Shapes    ports are contiguous tensors; a component's outputs are its branch tensors and nothing else.
Numerics  bitwise equal.
Refuses   a step in which a value between components has another size than the batch in front (`[B * heads, ...]`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch.fx import Node

from dcc.ir.components import Component, find_components, residual_adds
from dcc.ir.extract import boundary_outputs, cut
from dcc.ir.graph import (
    ancestors,
    descendants,
    dtype_of,
    has_rows,
    is_static,
    is_weight,
    outputs_of,
    shape_of,
    tensor_inputs,
    type_text,
)
from dcc.ir.ops import flops_of
from dcc.ir.program import PassReport, Program, Residual, Scope, Stage

EARLY = (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE)


@dataclass(frozen=True)
class CutStages:
    """See the module's text."""

    name: str = "cut-stages"

    def apply(self, program: Program) -> PassReport:
        if not program.scopes:
            return PassReport(self.name, "declined", "scopes are not known yet: run hoist-scopes first")
        program.stages, program.templates = [], {}
        final = outputs_of(program.graph)
        constants = {node for node, scope in program.scopes.items() if scope is Scope.CONSTANT and not is_weight(node)}
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        names: set[str] = set()
        parts, residuals, obstacle = _parts(program)
        for kind, nodes in parts:
            outputs = sorted(boundary_outputs(nodes), key=order.__getitem__)
            outputs += [node for node in final if node in nodes and node not in outputs]
            if not outputs:
                continue
            self._add_stage(program, kind, nodes, outputs, constants, names)
            if kind == "residual":
                program.stages[-1].residuals = tuple(
                    Residual(node, *residuals[node]) for node in nodes if node in residuals
                )
        components = [stage for stage in program.stages if stage.kind == "component"]
        distinct = len({stage.template for stage in components})
        flops: dict[str, int] = {}
        for stage in program.stages:
            kind = stage.kind if stage.kind in EARLY else "step"
            flops[kind] = flops.get(kind, 0) + sum(flops_of(node, 2) for node in stage.nodes)
        figures = {
            "stages": len(program.stages),
            "components": len(components),
            "component templates": distinct,
            "templates": len(program.templates),
            "component flops": sum(flops_of(node, 2) for stage in components for node in stage.nodes),
            "flops": flops,
        }
        if not components:
            why = f"{obstacle or 'no residual branch found'}: the step is one stage"
            return PassReport(self.name, "declined", why, figures)
        why = f"{len(components)} components of {distinct} kinds, {len(program.templates)} templates in all"
        return PassReport(self.name, "applied", why, figures)

    @staticmethod
    def _add_stage(
        program: Program, kind: str, nodes: Sequence[Node], outputs: list[Node], constants: set[Node], names: set[str]
    ) -> None:
        part = cut(nodes, outputs, constants)
        name = _stage_name(kind, part.weights, names)
        program.templates.setdefault(part.template, part.module)
        stage = Stage(name, kind, tuple(nodes), part.inputs, part.outputs, part.weights, part.template)
        program.stages.append(stage)


def _parts(program: Program) -> tuple[list[tuple[str, list[Node]]], dict[Node, tuple[Node, Node]], str | None]:
    """The stages' nodes in order, the residual adds, and why the step could not be cut."""
    parts = []
    for scope in EARLY:
        nodes = [
            node for node in program.graph.nodes if program.scopes.get(node) is scope and node.op == "call_function"
        ]
        if nodes:
            parts.append((str(scope), nodes))
    step = [
        node for node in program.graph.nodes if program.scopes.get(node) is Scope.STEP and node.op == "call_function"
    ]
    early = {node for node, scope in program.scopes.items() if scope in EARLY and not is_weight(node)}
    links = chain(step, early)
    for node in (node for _, nodes in links for node in boundary_outputs(nodes)):
        shape = shape_of(node)
        if not is_static(shape) and not has_rows(shape):
            why = f"{type_text(dtype_of(node), shape)} between components cannot be a port"
            return [*parts, ("glue", step)], {}, why
    return parts + links, residual_adds(step, early), None


def chain(step: list[Node], early: set[Node]) -> list[tuple[str, list[Node]]]:
    """Glue, components and residuals of the step in executable order; every step node is in exactly one part."""
    components = _executable(find_components(step, early), step)
    results = {node for component in components for node in component.results}
    adds = {add: branch for add, (_, branch) in residual_adds(step, early).items() if branch in results}
    owner = {node: index for index, component in enumerate(components) for node in component.nodes}
    level: dict[Node, int] = {}
    glue: dict[int, list[Node]] = {}
    for node in step:
        sources = [source for source in tensor_inputs(node) if source in level]
        if node in owner:
            level[node] = owner[node] + 1
            continue
        level[node] = max((level[source] for source in sources), default=0)
        glue.setdefault(level[node], []).append(node)
    parts: list[tuple[str, list[Node]]] = []
    for index in range(len(components) + 1):
        parts += _split_residual(glue.get(index, []), adds)
        if index < len(components):
            parts.append(("component", list(components[index].nodes)))
    return parts


def _split_residual(glue: list[Node], adds: Mapping[Node, Node]) -> list[tuple[str, list[Node]]]:
    """Glue before, the residual adds with their gates, glue after; all of it glue where that order is impossible."""
    inside = set(glue)
    members: set[Node] = set()
    for add, branch in adds.items():
        if add in inside:
            members |= ancestors([add], inside) & descendants([branch], inside | {branch})
    before = ancestors(members, inside) - members
    if not members or any(source in members for node in before for source in tensor_inputs(node)):
        return [("glue", glue)] if glue else []
    parts = [("glue", before), ("residual", members), ("glue", inside - members - before)]
    return [(kind, [node for node in glue if node in nodes]) for kind, nodes in parts if nodes]


def _executable(components: list[Component], step: list[Node]) -> list[Component]:
    """Components ordered so that each comes after all that it depends on; one in a cycle stays glue."""
    inside = set(step)
    above = {index: ancestors(component.nodes, inside) for index, component in enumerate(components)}
    ordered: list[Component] = []
    done: set[int] = set()
    while len(done) < len(components):
        ready = [
            index
            for index in range(len(components))
            if index not in done
            and all(
                other in done or other == index or not (set(components[other].nodes) & above[index])
                for other in range(len(components))
            )
        ]
        if not ready:
            break
        ordered.append(components[ready[0]])
        done.add(ready[0])
    return ordered


def _common_path(paths: Sequence[str]) -> str:
    """The longest run of leading names that all the dotted paths share."""
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(names[0] for names in shared)


def _stage_name(kind: str, weights: Sequence[str], names: set[str]) -> str:
    """The common module path of the stage's weights, or its kind; made unique with a number."""
    base = kind
    if kind in ("component", "glue") and weights:
        owned = [weight.rsplit(".", 1)[0] for weight in weights if not weight.startswith("folded.")]
        base = _common_path(owned) or kind
    name, count = base, 1
    while name in names:
        name, count = f"{base}.{count}", count + 1
    names.add(name)
    return name


__all__ = ["CutStages", "chain"]
