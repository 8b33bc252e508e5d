"""Weights and operations that the output does not depend on leave the Program.

Training-only parts (projectors, second heads, an auxiliary output) go this way.

Numerics  bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcc.ir.program import PassReport, Program
from dcc.ir.rewrite import erase_dead


@dataclass(frozen=True)
class DropDead:
    """See the module's text."""

    name: str = "drop-dead"

    def apply(self, program: Program) -> PassReport:
        nodes = erase_dead(program.graph)
        used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        dead = [name for name in program.weights if name not in used]
        parameters = sum(program.weights[name].numel() for name in dead)
        for name in dead:
            del program.weights[name]
        if not nodes and not dead:
            return PassReport(self.name, "declined", "every operation and weight reaches the output")
        figures = {"nodes": nodes, "weights": len(dead), "parameters": parameters}
        return PassReport(self.name, "applied", f"{nodes} operations and {len(dead)} weights removed", figures)
