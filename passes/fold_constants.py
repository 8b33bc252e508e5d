"""What depends on no input is computed once, at compile time.

Only values that something else reads are stored, and only when storing them is not larger than `limit_bytes` or
than the weights they come from: generators (`arange`, `full`) are cheaper to run again than to store.

Numerics  bitwise equal: the same operations run on the same machine.
Refuses   values whose size depends on the batch; random draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dcc.ir.graph import is_scalar, is_static, is_tensor, is_weight, shape_of, tensor_inputs
from dcc.ir.interpret import evaluate, needed_by
from dcc.ir.program import PassReport, Program
from dcc.ir.rewrite import erase_dead, replace


@dataclass(frozen=True)
class FoldConstants:
    """See the module's text."""

    limit_bytes: int = 1 << 20
    name: str = "fold-constants"

    def apply(self, program: Program) -> PassReport:
        constant = _constant_nodes(program)
        frontier = [
            node
            for node in program.graph.nodes
            if node in constant and is_tensor(node) and any(user not in constant for user in node.users)
        ]
        folded, stored, skipped = 0, 0, 0
        for node in frontier:
            value, read = _evaluate(node, program)
            size = value.numel() * value.element_size()
            if size > max(self.limit_bytes, read):
                skipped += 1
                continue
            name = program.new_weight(f"folded.{node.name}", value)
            with program.graph.inserting_before(node):
                weight = program.graph.get_attr(name)
            weight.meta["val"] = node.meta["val"]
            replace(node, weight)
            folded, stored = folded + 1, stored + size
        if not folded:
            return PassReport(self.name, "declined", f"nothing to fold ({skipped} values too large to store)")
        erase_dead(program.graph)
        return PassReport(self.name, "applied", f"{folded} values folded", {"values": folded, "bytes": stored})


def _constant_nodes(program: Program) -> set[Node]:
    """Nodes without an input among their ancestors, of static size."""
    constant: set[Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or is_scalar(node) or any(is_scalar(source) for source in node.all_input_nodes):
            continue
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        if is_tensor(node) and not is_static(shape_of(node)):
            continue
        if all(source in constant or is_weight(source) for source in tensor_inputs(node)):
            constant.add(node)
    return constant


def _evaluate(node: Node, program: Program) -> tuple[Tensor, int]:
    """The node's value and the bytes of the weights it was made from."""
    value = evaluate(program, [node], {})[node]
    assert isinstance(value, Tensor)
    names = {str(source.target) for source in needed_by([node]) if is_weight(source)}
    return value, sum(program.weights[name].numel() * program.weights[name].element_size() for name in names)
