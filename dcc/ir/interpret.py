"""What a Program means, in torch: the reference that every lowering is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcc.ir.graph import BATCH, DTYPES, outputs_of
from dcc.ir.program import Program, Role


def run_graph(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's output, node by node over the uncut graph."""
    final = outputs_of(program.graph)[0]
    result = evaluate(program, [final], inputs)[final]
    assert isinstance(result, Tensor)
    return result


def evaluate(program: Program, nodes: Iterable[Node], inputs: Mapping[str, Tensor]) -> dict[Node, Any]:
    """The values of `nodes`, computing only what they depend on."""
    values: dict[Node, Any] = {}

    def value_of(node: Node) -> Any:
        if node not in values:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "get_attr":
                values[node] = program.weights[str(node.target)]
            else:
                args = torch.fx.map_arg(node.args, value_of)
                values[node] = node.target(*args, **torch.fx.map_arg(node.kwargs, value_of))  # type: ignore[operator]
        return values[node]

    wanted = list(nodes)
    needed = needed_by(wanted)
    with torch.no_grad():
        # In the graph's order, so that recursion never gets deep.
        for node in program.graph.nodes:
            if node in needed:
                value_of(node)
    return {node: values[node] for node in wanted}


def needed_by(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that they read, sizes included."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def mixes_rows(program: Program, nodes: Sequence[Node], rows: int = 3) -> Node | None:
    """The first of `nodes`, `[B, ...]` each, whose first row depends on the other rows of the batch.

    Found by changing the other rows. Such a value cannot be batched with rows of other steps.
    """
    first = random_inputs(program, rows, seed=0)
    other = random_inputs(program, rows, seed=1)
    for item in program.inputs:
        if item.shape[:1] == (BATCH,):
            other[item.name][:1] = first[item.name][:1]
        else:
            other[item.name] = first[item.name]
    one, two = evaluate(program, nodes, first), evaluate(program, nodes, other)
    return next(
        (node for node in nodes if not torch.equal(one[node][:1].nan_to_num(), two[node][:1].nan_to_num())), None
    )


def random_inputs(program: Program, rows: int, seed: int) -> dict[str, Tensor]:
    """Inputs with another value in every row: normal, in range where a range is known, timesteps of the sampler."""
    generator = torch.Generator().manual_seed(seed)
    times = [call.timestep for call in program.sampler.calls] if program.sampler is not None else [999.0, 1.0]
    inputs: dict[str, Tensor] = {}
    for item in program.inputs:
        shape = [rows if isinstance(size, str) else size for size in item.shape]
        dtype = DTYPES[item.dtype]
        if item.role is Role.TIMESTEP:
            share = torch.rand(shape, generator=generator, dtype=torch.float64)
            value = min(times) + share * (max(times) - min(times))
        elif dtype is torch.bool:
            value = torch.ones(shape)
        elif dtype.is_floating_point:
            value = torch.randn(shape, generator=generator)
        else:
            high = 1 if item.maximum is None else item.maximum
            value = torch.randint(item.minimum or 0, high + 1, shape, generator=generator)
        inputs[item.name] = value.to(dtype)
    return inputs


def run_stages(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's output through the stages' templates: what the cut computes."""
    values: dict[Node, Tensor] = {node: inputs[node.name] for node in program.graph.nodes if node.op == "placeholder"}
    with torch.no_grad():
        for stage in program.stages:
            values.update(run_stage(program, stage.template, stage.inputs, stage.weights, stage.outputs, values))
    return values[outputs_of(program.graph)[0]]


def run_stage(
    program: Program,
    template: str,
    inputs: tuple[Node, ...],
    weights: tuple[str, ...],
    outputs: tuple[Node, ...],
    values: Mapping[Node, Tensor],
) -> dict[Node, Tensor]:
    """One stage on contiguous ports."""
    module = program.templates[template]
    tensors = [values[node].contiguous() for node in inputs] + [program.weights[name] for name in weights]
    return dict(zip(outputs, module(*tensors), strict=True))
