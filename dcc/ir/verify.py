"""Named rules that every Program obeys before and after each pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from dcc.errors import VerifyError
from dcc.ir.graph import is_scalar, is_tensor, is_weight, op_name, outputs_of, tensor_inputs
from dcc.ir.program import Program, Scope

NOT_CANONICAL = frozenset(
    {"view", "_unsafe_view", "clone", "empty_like", "zeros_like", "ones_like", "full_like", "type_as"}
)
EARLIER = {
    Scope.CONSTANT: {Scope.CONSTANT},
    Scope.TIMESTEP: {Scope.CONSTANT, Scope.TIMESTEP},
    Scope.REQUEST: {Scope.CONSTANT, Scope.REQUEST},
    Scope.TABLE: {Scope.CONSTANT, Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE},
    Scope.STEP: set(Scope),
}


def verify(program: Program, *, after: str = "trace", canonical: bool = False) -> None:
    """Raises VerifyError, naming the rule and the node, unless every rule holds."""
    for rule, check in RULES.items():
        problem = check(program)
        if problem is not None:
            node, got, want = problem
            raise _error(rule, after, node, got, want)
    if canonical:
        for node in program.graph.nodes:
            if op_name(node) in NOT_CANONICAL:
                raise _error(
                    "canonical-form", after, node, op_name(node), "reshape, and no copies or *_like operations"
                )


Problem = tuple[Node | str, str, str] | None


def _error(rule: str, after: str, node: Node | str, got: str, want: str) -> VerifyError:
    at = f"{node.format_node() if isinstance(node, Node) else node}"
    return VerifyError(f"rule {rule} broken after '{after}'", at=at, got=got, want=want)


def _defined_before_use(program: Program) -> Problem:
    seen: set[Node] = set()
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                return node, f"{source.name} is defined later", "every operand defined above its use"
        seen.add(node)
    return None


def _weights_resolve(program: Program) -> Problem:
    for node in program.graph.nodes:
        if is_weight(node) and str(node.target) not in program.weights:
            return node, f"no weight '{node.target}'", "an entry of Program.weights"
        if is_weight(node) and tuple(program.weights[str(node.target)].shape) != tuple(node.meta["val"].shape):
            got = tuple(program.weights[str(node.target)].shape)
            return node, f"weight of shape {got}", f"{tuple(node.meta['val'].shape)}"
    return None


def _types_known(program: Program) -> Problem:
    for node in program.graph.nodes:
        if node.op != "output" and node.users and "val" not in node.meta:
            return node, "no shape and dtype", "metadata 'val' on every node"
    return None


def _functional(program: Program) -> Problem:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return node, f"{node.target} writes into an argument", "operations without side effects"
    return None


def _outputs_defined(program: Program) -> Problem:
    if not outputs_of(program.graph) or not all(is_tensor(node) for node in outputs_of(program.graph)):
        return "output", "no result tensor", "one tensor"
    return None


def _inputs_match(program: Program) -> Problem:
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    declared = [item.name for item in program.inputs]
    if names != declared:
        return "inputs", str(names), str(declared)
    return None


def _scopes_ordered(program: Program) -> Problem:
    for node, scope in program.scopes.items():
        if is_weight(node):
            continue
        for source in tensor_inputs(node):
            if not is_weight(source) and program.scopes[source] not in EARLIER[scope]:
                return node, f"{scope} reads {source.name} of scope {program.scopes[source]}", "an earlier scope"
    return None


def _stages_cover(program: Program) -> Problem:
    if not program.stages:
        return None
    owners: dict[Node, str] = {}
    for stage in program.stages:
        for node in stage.nodes:
            if node in owners:
                return node, f"in stages {owners[node]} and {stage.name}", "one stage"
            owners[node] = stage.name
    for node, scope in program.scopes.items():
        computed = node.op == "call_function" and scope is not Scope.CONSTANT
        if computed and node not in owners and node.users and not is_scalar(node):
            return node, "in no stage", "one stage"
    return None


def _stages_ordered(program: Program) -> Problem:
    ready = {node for node in program.graph.nodes if node.op == "placeholder" or is_weight(node)}
    for stage in program.stages:
        for node in stage.inputs:
            if node not in ready:
                return stage.name, f"reads {node.name} before it is computed", "stages in executable order"
        ready |= set(stage.outputs)
    return None


def _templates_match(program: Program) -> Problem:
    for stage in program.stages:
        module = program.templates.get(stage.template)
        if module is None:
            return stage.name, f"no template {stage.template}", "an entry of Program.templates"
        ports = sum(node.op == "placeholder" for node in module.graph.nodes)
        if ports != len(stage.inputs) + len(stage.weights):
            return (
                stage.name,
                f"template takes {ports} tensors",
                f"{len(stage.inputs)} ports, {len(stage.weights)} weights",
            )
        if len(outputs_of(module.graph)) != len(stage.outputs):
            return stage.name, f"template returns {len(outputs_of(module.graph))}", f"{len(stage.outputs)} tensors"
    return None


RULES: dict[str, Callable[[Program], Problem]] = {
    "types-known": _types_known,
    "defined-before-use": _defined_before_use,
    "inputs-match": _inputs_match,
    "weights-resolve": _weights_resolve,
    "functional": _functional,
    "outputs-defined": _outputs_defined,
    "scopes-ordered": _scopes_ordered,
    "stages-cover-step": _stages_cover,
    "stages-ordered": _stages_ordered,
    "templates-match": _templates_match,
}
