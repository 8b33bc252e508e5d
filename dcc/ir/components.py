"""Find components: the branches that a transformer adds to its residual stream. No module names are read.

`add(a, b)` of equal shapes is a residual add if some x, reached from `a` by walking down residual adds, is an
ancestor of `b`; the nodes between x and `b` are the branch. The walk finds parallel branches (SD3.5). Branches that
share nodes (joint attention) are one component with several results. A component's results are its branch tensors
and nothing else: a member that is read elsewhere becomes glue, together with what it depends on. A component ends
before its gate when the gate does not depend on the latent: that is the tensor caching methods store.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dcc.ir.graph import ancestors, descendants, is_scalar, is_tensor, op_name, shape_of, tensor_inputs
from dcc.ir.ops import is_contraction

CASTS = frozenset({"_to_copy", "to"})


@dataclass(frozen=True)
class Component:
    """`nodes` in graph order; `results` are the branch tensors that the glue reads."""

    nodes: tuple[Node, ...]
    results: tuple[Node, ...]


@dataclass(frozen=True)
class _Branch:
    source: Node  # x: where the branch leaves the stream
    result: Node  # the branch tensor, before its gate
    add: Node  # where it joins the stream again
    stream: Node  # what it is added to


def find_components(order: list[Node], early: set[Node]) -> list[Component]:
    """Components among the step nodes `order` (in graph order), in topological order, disjoint and convex.

    `early` are tensors of earlier scopes: a stream may start there (the text half of a first joint block).
    """
    inside = set(order)
    position = {node: index for index, node in enumerate(order)}
    branches = _branches(order, inside, inside | early)
    groups = _merge([(branch, _between([branch], inside, early)) for branch in branches], inside, early)
    components = []
    for members, nodes in groups:
        results = sorted({branch.result for branch in members}, key=position.__getitem__)
        kept = _without_escapes(nodes, set(results))
        kept = ancestors(results, kept)
        if any(is_contraction(node) for node in kept):
            components.append(Component(tuple(sorted(kept, key=position.__getitem__)), tuple(results)))
    return sorted(components, key=lambda component: position[component.nodes[-1]])


def residual_adds(order: list[Node], early: set[Node]) -> dict[Node, tuple[Node, Node]]:
    """Every residual add among the step nodes, with the stream and the branch tensor that it adds."""
    inside = set(order)
    return {branch.add: (branch.stream, branch.result) for branch in _branches(order, inside, inside | early)}


def _branches(order: list[Node], inside: set[Node], known: set[Node]) -> list[_Branch]:
    accumulated: dict[Node, Node] = {}
    branches = []
    for node in order:
        if op_name(node) != "add" or len(node.args) < 2 or node.kwargs:
            continue
        left, right = node.args[:2]
        if not (isinstance(left, Node) and isinstance(right, Node) and left in known and right in known):
            continue
        if shape_of(left) != shape_of(node) or shape_of(right) != shape_of(node):
            continue
        for stream, branch in ((left, right), (right, left)):
            source = _source_of(stream, branch, known, accumulated) if branch in inside else None
            if source is not None:
                accumulated[node] = stream
                branches.append(_Branch(source, _before_gate(branch, inside), node, stream))
                break
    return branches


def _source_of(stream: Node, branch: Node, known: set[Node], accumulated: dict[Node, Node]) -> Node | None:
    """The nearest x under `stream` that `branch` is computed from by at least one contraction."""
    above = ancestors([branch], known)
    current: Node | None = stream
    while current is not None:
        current = _through_casts(current, known)
        if current in above and current is not branch:
            between = descendants([current], above)
            return current if any(is_contraction(node) for node in between) else None
        current = accumulated.get(current)
    return None


def _through_casts(node: Node, inside: set[Node]) -> Node:
    while op_name(node) in CASTS and node.args[0] in inside:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _before_gate(branch: Node, inside: set[Node]) -> Node:
    node = _through_casts(branch, inside)
    if op_name(node) == "mul":
        factors = [factor for factor in node.args[:2] if isinstance(factor, Node)]
        latent = [factor for factor in factors if factor in inside]
        if len(latent) == 1 and shape_of(latent[0]) == shape_of(node):
            return _through_casts(latent[0], inside)
    return branch


def _between(branches: list[_Branch], inside: set[Node], early: set[Node]) -> set[Node]:
    results = ancestors([branch.result for branch in branches], inside)
    return descendants([branch.source for branch in branches], inside | early) & results


def _merge(
    parts: list[tuple[_Branch, set[Node]]], inside: set[Node], early: set[Node]
) -> list[tuple[list[_Branch], set[Node]]]:
    """Branches that share a contraction are one component; sharing only cheap nodes (a norm) is not."""
    groups: list[tuple[list[_Branch], set[Node]]] = []
    for branch, nodes in parts:
        members, union = [branch], nodes
        for group in list(groups):
            if any(is_contraction(node) for node in group[1] & union):
                groups.remove(group)
                members = group[0] + members
                union = _between(members, inside, early)
        groups.append((members, union))
    return groups


def _without_escapes(nodes: set[Node], results: set[Node]) -> set[Node]:
    kept = set(nodes)
    while True:
        escaping = [
            node
            for node in kept
            if node not in results and any(user not in kept and not is_scalar(user) for user in node.users)
        ]
        # Pieces of an operation with several results stay with it.
        orphans = {node for node in kept if op_name(node) == "getitem" and node.args[0] not in kept}
        if not escaping and not orphans:
            return kept
        kept -= ancestors([*escaping, *orphans], kept) | orphans


def reads(component: Component) -> list[Node]:
    """Tensors that the component reads from outside, in order of first use."""
    inside = set(component.nodes)
    found = [source for node in component.nodes for source in tensor_inputs(node) if source not in inside]
    return [node for node in dict.fromkeys(found) if is_tensor(node)]
