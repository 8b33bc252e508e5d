"""Which inputs a value depends on, and therefore the earliest scope in which it can be computed.

Sizes are not dependences: reading the shape of a latent does not make a value depend on the latent.
"""

from __future__ import annotations

from torch.fx import Node

from dcc.ir.graph import is_scalar, tensor_inputs
from dcc.ir.ops import flops_of
from dcc.ir.program import Program, Role, Scope

LETTER = {Role.TIMESTEP: "t", Role.CONDITION: "c", Role.LATENT: "x"}


def label_scopes(program: Program) -> dict[Node, Scope]:
    """The earliest scope of every tensor-valued node, by the inputs that it depends on."""
    roles = {item.name: LETTER[item.role] for item in program.inputs}
    labels: dict[Node, frozenset[str]] = {}
    scopes: dict[Node, Scope] = {}
    for node in program.graph.nodes:
        if node.op == "output" or is_scalar(node):
            continue
        if node.op == "placeholder":
            labels[node] = frozenset(roles[node.name])
        else:
            labels[node] = frozenset().union(*(labels[source] for source in tensor_inputs(node)))
        scopes[node] = _scope_of(labels[node])
    return scopes


def _scope_of(label: frozenset[str]) -> Scope:
    if "x" in label:
        return Scope.STEP
    if not label:
        return Scope.CONSTANT
    if label == {"t"}:
        return Scope.TIMESTEP
    return Scope.REQUEST if label == {"c"} else Scope.TABLE


def step_flops(program: Program, scopes: dict[Node, Scope]) -> int:
    """Floating-point operations of two rows that these scopes leave in the step."""
    return sum(flops_of(node, 2) for node, scope in scopes.items() if scope is Scope.STEP)
