"""Small edits of a graph that keep its metadata right."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from dcc.ir.graph import refresh_value


def insert_before(anchor: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call node before `anchor`, with its shape and dtype computed."""
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    node.meta["stack_trace"] = anchor.meta.get("stack_trace")
    refresh_value(node)
    return node


def replace(old: Node, new: Node) -> None:
    """Every reader of `old` reads `new`; `old` is gone."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def erase_dead(graph: Graph) -> int:
    """Nodes whose results nobody reads are gone; inputs stay. Returns how many went."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
            removed += 1
    return removed
