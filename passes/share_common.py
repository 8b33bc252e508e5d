"""Equal computations happen once (common subexpression elimination).

Before ports are chosen this matters most: FLUX's rotary table is unsqueezed anew by each of 57 blocks, and without
sharing every copy would become a port.

Numerics  bitwise equal.
Refuses   operations that draw random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dcc.ir.program import PassReport, Program
from dcc.ir.rewrite import replace


@dataclass(frozen=True)
class ShareCommon:
    """See the module's text."""

    name: str = "share-common"

    def apply(self, program: Program) -> PassReport:
        seen: dict[Any, Node] = {}
        shared = 0
        for node in list(program.graph.nodes):
            if node.op not in ("call_function", "get_attr") or _is_random(node):
                continue
            key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
                shared += 1
        if not shared:
            return PassReport(self.name, "declined", "no two operations compute the same")
        return PassReport(self.name, "applied", f"{shared} repeated operations computed once", {"nodes": shared})


def _is_random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _frozen(value: Any) -> Any:
    """A hashable spelling; 1, 1.0 and True stay different because graphs must not mix them."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(part) for part in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(part)) for key, part in value.items()))
    return (type(value).__name__, value)
