"""Cut a set of nodes out of a graph as a module of its own, with ports where it was cut.

Sizes never cross the cut: a batch size is read again from a port that has the batch as a dimension. Constants that
are cheap to make (`arange`, `full`) are made again inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dcc.errors import PassError
from dcc.ir.graph import (
    BATCH,
    SYM_SIZE,
    dtype_of,
    is_scalar,
    is_tensor,
    is_weight,
    op_name,
    refresh_value,
    shape_of,
    tensor_inputs,
    type_text,
)


@dataclass(frozen=True)
class Cut:
    """A module whose parameters are, in order, the tensors `inputs` and then the `weights`; it returns `outputs`."""

    module: GraphModule
    inputs: tuple[Node, ...]
    weights: tuple[str, ...]
    outputs: tuple[Node, ...]
    template: str


def boundary_outputs(nodes: Iterable[Node]) -> list[Node]:
    """The tensors among `nodes` that something outside reads."""
    inside = set(nodes)
    return [
        node
        for node in inside
        if is_tensor(node) and any(user not in inside and not is_scalar(user) for user in node.users)
    ]


def cut(nodes: Sequence[Node], outputs: Sequence[Node], rematerialize: set[Node]) -> Cut:
    """`nodes` as a module. Nodes outside that are in `rematerialize` are copied in; other tensors become ports.

    The body is numbered from the outputs, so that equal computations give equal modules and equal hashes whatever
    the order or names in the source graph.
    """
    inside = set(nodes)
    order = _order_from_outputs(outputs, inside, rematerialize)
    ports = [node for node in order if node not in inside and not is_weight(node) and node not in rematerialize]
    weights = list(dict.fromkeys(str(node.target) for node in order if is_weight(node)))
    graph = Graph()
    copies: dict[Node, Node] = {}
    by_name: dict[str, Node] = {}
    for index, port in enumerate(ports):
        copies[port] = graph.placeholder(f"p{index}")
        copies[port].meta = {"val": port.meta["val"]}
    for index, name in enumerate(weights):
        by_name[name] = graph.placeholder(f"w{index}")
    for node in order:
        if is_weight(node):
            copies[node] = by_name[str(node.target)]
            copies[node].meta = {"val": node.meta["val"]}
    sizes = _SizeReader(graph, [copies[port] for port in ports])
    for index, node in enumerate(node for node in order if node not in copies):
        copy = graph.node_copy(node, lambda source: copies[source] if source in copies else sizes.read(source))
        copy.name = f"v{index}"
        copy.meta = {"val": node.meta["val"]}
        copies[node] = copy
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    module = GraphModule(torch.nn.Module(), graph)
    return Cut(module, tuple(ports), tuple(weights), tuple(outputs), template_hash(module))


class _SizeReader:
    """Scalars of the source graph, recomputed from the ports of the cut."""

    def __init__(self, graph: Graph, ports: list[Node]) -> None:
        self.graph = graph
        self.ports = ports
        self.copies: dict[Node, Node] = {}

    def read(self, scalar: Node) -> Node:
        if not is_scalar(scalar):
            raise PassError("a tensor is read across a cut without a port", at=scalar.format_node())
        if scalar not in self.copies:
            if scalar.target is SYM_SIZE:
                self.copies[scalar] = self._size(scalar)
            else:
                self.copies[scalar] = self.graph.node_copy(scalar, self.read)
        return self.copies[scalar]

    def _size(self, scalar: Node) -> Node:
        for port in self.ports:
            for axis, size in enumerate(shape_of(port)):
                if size == BATCH:
                    node = self.graph.call_function(SYM_SIZE, (port, axis))
                    node.meta = {"val": scalar.meta["val"]}
                    return node
        raise PassError("no port of the cut has the batch as a dimension", at=scalar.format_node())


def _order_from_outputs(outputs: Sequence[Node], inside: set[Node], rematerialize: set[Node]) -> list[Node]:
    """Depth-first from the outputs, arguments in order: a numbering that depends on structure alone."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(outputs)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        if node in inside or node in rematerialize:
            stack += [(source, False) for source in reversed(tensor_inputs(node))]
    return order


def template_hash(module: GraphModule) -> str:
    """Equal for modules that compute the same from ports and weights of the same types."""
    digest = hashlib.sha256()
    numbers = {node: index for index, node in enumerate(module.graph.nodes)}

    def spell(value: Any) -> str:
        if isinstance(value, Node):
            return f"%{numbers[value]}"
        if isinstance(value, list | tuple):
            return f"[{','.join(map(spell, value))}]"
        if isinstance(value, dict):
            return f"{{{','.join(f'{key}={spell(value[key])}' for key in sorted(value))}}}"
        return f"{type(value).__name__}:{value}"

    for node in module.graph.nodes:
        kind = type_text(dtype_of(node), shape_of(node)) if is_tensor(node) else ""
        target = node.target if node.op == "call_function" else node.name[0]
        digest.update(f"{node.op} {target} {spell(node.args)} {spell(node.kwargs)} {kind}\n".encode())
    return digest.hexdigest()[:16]


__all__ = ["Cut", "boundary_outputs", "cut", "op_name", "refresh_value", "template_hash"]
