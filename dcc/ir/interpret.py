"""What a Program means, in torch: the reference that every lowering is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcc.ir.graph import outputs_of
from dcc.ir.program import Program


def run_graph(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's output, node by node over the uncut graph."""
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "get_attr":
                values[node] = program.weights[str(node.target)]
            elif node.op == "call_function":
                args = torch.fx.map_arg(node.args, values.__getitem__)
                kwargs = torch.fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    result = values[outputs_of(program.graph)[0]]
    assert isinstance(result, Tensor)
    return result


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
