"""Every value is computed in the earliest scope that its inputs allow (loop-invariant code motion, exact).

Label each value with the inputs that it depends on. Values of the timestep alone become tables at compile time,
values of the condition alone are computed once per generation, values of both once per generation, batched over all
steps. Sizes are not dependences. A port that would break the batching over steps (its shape, or rows that depend on
one another, which is tried out with numbers), or that costs more to keep than
`table_limit_bytes` / `request_limit_bytes` allow, stays in the step together with what reads it.

Shapes    timestep, table: ports are [B, ...] with the batch leading and nowhere else, or they are not hoisted;
          request: the same, or static.
Numerics  bitwise equal per operation; batching over steps may change the order of a matrix product's sums.
Source    DESIGN.md section 2; dependence rules checked on seven families.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dcc.ir.dependence import label_scopes
from dcc.ir.graph import (
    BATCH,
    bytes_of,
    elements,
    has_rows,
    is_scalar,
    is_static,
    is_tensor,
    is_weight,
    op_name,
    shape_of,
    tensor_inputs,
)
from dcc.ir.interpret import mixes_rows
from dcc.ir.ops import flops_of, is_contraction
from dcc.ir.program import PassReport, Program, Scope

BATCHED = (Scope.TIMESTEP, Scope.TABLE)
# Operations whose result is larger than what they read: keep what they read instead.
GROWING = frozenset({"expand", "repeat", "repeat_interleave", "cat", "add", "mul", "sub", "div"})


@dataclass(frozen=True)
class HoistScopes:
    """Limits are bytes per generation of two rows (one guided image)."""

    table_limit_bytes: int = 256 << 20
    request_limit_bytes: int = 2 << 30
    name: str = "hoist-scopes"

    def apply(self, program: Program) -> PassReport:
        scopes = label_scopes(program)
        demoted: list[str] = []
        while True:
            victim = self._first_violation(program, scopes) or _mixing(program, scopes)
            if victim is None:
                break
            node, reason = victim
            _demote(node, scopes)
            demoted.append(f"{node.name}: {reason}")
        program.scopes = scopes
        return self._report(program, demoted)

    def _first_violation(self, program: Program, scopes: dict[Node, Scope]) -> tuple[Node, str] | None:
        ports = [node for node in scopes if is_port(node, scopes)]
        for node in ports:
            if scopes[node] in BATCHED and not has_rows(shape_of(node)):
                return node, f"{shape_of(node)} cannot be batched over steps"
            if scopes[node] is Scope.REQUEST and not has_rows(shape_of(node)) and not is_static(shape_of(node)):
                return node, f"{shape_of(node)} has the batch elsewhere than in front"
            if _grows(node, scopes):
                return node, "larger than what it is made from"
        for node in _sized_by_others(scopes):
            return node, "has a batch that nothing in its scope knows"
        for limit, kinds, calls in (
            (self.table_limit_bytes, BATCHED, program.calls),
            (self.request_limit_bytes, (Scope.REQUEST,), 1),
        ):
            sized = [(bytes_of(node, 2) * calls, node) for node in ports if scopes[node] in kinds]
            if sum(size for size, _ in sized) > limit:
                # Of equal ports the one that the step alone reads: a port that a table reads takes the table along.
                size, node = max(sized, key=lambda pair: (pair[0], _only_step_reads(pair[1], scopes)))
                return node, f"{size >> 20} MiB over {calls} steps exceed the limit of {limit >> 20} MiB"
        return None

    def _report(self, program: Program, demoted: list[str]) -> PassReport:
        moved = scope_figures(program)
        figures: dict[str, Any] = {"scopes": moved, "kept in the step": demoted}
        left = sum(row["parameters"] for scope, row in moved.items() if scope != Scope.STEP)
        total = sum(row["parameters"] for row in moved.values())
        flops = sum(row["flops"] for scope, row in moved.items() if scope != Scope.STEP)
        everything = sum(row["flops"] for row in moved.values())
        if not flops and not left:
            return PassReport(self.name, "declined", "every computation depends on the latent", figures)
        why = (
            f"{left / max(total, 1):.1%} of the parameters and {flops / max(everything, 1):.1%} of the FLOPs of a"
            f" forward leave the loop"
        )
        figures |= {"parameters": left, "flops": flops, "total parameters": total, "total flops": everything}
        return PassReport(self.name, "applied", why, figures)


def is_port(node: Node, scopes: dict[Node, Scope]) -> bool:
    """A tensor computed in an earlier scope that a later one reads; inputs and constants are none."""
    if node.op != "call_function" or not is_tensor(node) or scopes[node] is Scope.CONSTANT:
        return False
    mine = scopes[node]
    return any(scopes.get(user, mine) is not mine for user in _readers(node)) and mine is not Scope.STEP


def _mixing(program: Program, scopes: dict[Node, Scope]) -> tuple[Node, str] | None:
    """A port that normalises over the batch, say: right in a batch of one step, wrong in a batch of all steps."""
    ports = [node for node in scopes if scopes[node] in BATCHED and is_port(node, scopes)]
    node = mixes_rows(program, ports) if ports else None
    return None if node is None else (node, "mixes the rows of its batch: it cannot be batched over steps")


def _readers(node: Node) -> Iterable[Node]:
    return (user for user in node.users if not is_scalar(user) and user.op != "output")


def _sized_by_others(scopes: dict[Node, Scope]) -> Iterator[Node]:
    """Early values given a batch that none of their inputs has: `ids.expand(B, -1, -1)` of unbatched ids."""
    batched: set[Node] = set()
    sized: set[Node] = set()
    for node, scope in scopes.items():
        given = node.op == "placeholder" and BATCH in shape_of(node)
        if given or any(source in batched for source in tensor_inputs(node)):
            batched.add(node)
        elif any(is_scalar(source) or source in sized for source in node.all_input_nodes):
            if scope is Scope.CONSTANT:
                sized.add(node)
            elif scope is not Scope.STEP:
                yield node


def _only_step_reads(node: Node, scopes: dict[Node, Scope]) -> bool:
    return all(scopes.get(user, Scope.STEP) is Scope.STEP for user in _readers(node))


def _grows(node: Node, scopes: dict[Node, Scope]) -> bool:
    if op_name(node) not in GROWING or is_contraction(node):
        return False
    sources = [
        source for source in tensor_inputs(node) if not is_weight(source) and scopes[source] is not Scope.CONSTANT
    ]
    fixed = [source for source in tensor_inputs(node) if source not in sources]
    if any(not is_tensor(source) for source in sources):
        return False
    kept = sum(elements(shape_of(source), 2) for source in sources)
    read = sum(elements(shape_of(source), 2) for source in fixed if is_tensor(source))
    return elements(shape_of(node), 2) > 4 * (kept + (read if op_name(node) == "cat" else 0))


def _demote(node: Node, scopes: dict[Node, Scope]) -> None:
    """The node and every reader of it is computed in the step."""
    stack = [node]
    while stack:
        current = stack.pop()
        if scopes.get(current) is not Scope.STEP and current in scopes:
            scopes[current] = Scope.STEP
            stack += list(_readers(current))
        # Pieces of one multi-result operation stay with it.
        if current is not node or not is_tensor(current):
            continue
        if op_name(current) == "getitem" and scopes[current.args[0]] is not Scope.STEP:  # type: ignore[index]
            stack.append(current.args[0])  # type: ignore[arg-type]


def scope_figures(program: Program) -> dict[str, dict[str, int]]:
    """Parameters, their bytes and the FLOPs of two rows, by scope; a weight counts where it is last read."""
    order = list(Scope)
    last: dict[str, Scope] = {}
    flops = dict.fromkeys(order, 0)
    for node, scope in program.scopes.items():
        flops[scope] += flops_of(node, 2)
        for source in node.all_input_nodes:
            if is_weight(source):
                name = str(source.target)
                last[name] = max(last.get(name, Scope.CONSTANT), scope, key=order.index)
    figures = {str(scope): {"parameters": 0, "bytes": 0, "flops": flops[scope]} for scope in order}
    for name, scope in last.items():
        tensor = program.weights[name]
        figures[scope]["parameters"] += tensor.numel()
        figures[scope]["bytes"] += tensor.numel() * tensor.element_size()
    return {scope: row for scope, row in figures.items() if any(row.values())}
