"""Capture a denoiser with `torch.export` as the graph of a Program.

The graph is functional and keeps attention, linear and norms whole (`run_decompositions({})`); the batch is the one
symbolic dimension. The timestep is traced as float32 where the model allows it, because samplers give fractional
timesteps; a model that indexes a table with it keeps its integer type.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from dcc.errors import TraceError
from dcc.ir.graph import BATCH, dtype_name, outputs_of, shape_of
from dcc.ir.program import Guidance, Input, Program, Role

MAX_ROWS = 128
WIDE_ROWS = 16


def trace(
    module: nn.Module | ExportedProgram,
    example_inputs: Mapping[str, Tensor],
    roles: Mapping[str, str],
    *,
    name: str = "denoiser",
    nulls: Mapping[str, float] | None = None,
    ranges: Mapping[str, tuple[int, int]] | None = None,
    guidance: Guidance | None = None,
    unbatched: Sequence[str] = (),
    rows: int = MAX_ROWS,
) -> Program:
    """The module as a Program in which everything is still in the step.

    Raises TraceError for control flow that depends on data, for more than one output tensor, and for an input
    without a role.
    """
    if isinstance(module, ExportedProgram):
        exported = module
    else:
        exported = _export(module, dict(example_inputs), roles, rows, unbatched)
    with _quiet():
        exported = exported.run_decompositions({})
    graph, weights, placeholders = _flatten(exported)
    if len(outputs_of(graph)) != 1:
        raise TraceError(
            "the denoiser must return one tensor", got=f"{len(outputs_of(graph))} tensors",
            next="wrap the model so that its forward returns the prediction alone",
        )  # fmt: skip
    inputs = []
    for placeholder in placeholders:
        label = placeholder.name
        if label not in roles:
            raise TraceError(f"input '{label}' has no role", got=sorted(roles), next=f"say --role {label}=condition")
        low, high = (ranges or {}).get(label, (None, None))
        inputs.append(
            Input(
                label, Role(roles[label]), dtype_name(placeholder.meta["val"].dtype), shape_of(placeholder),
                (nulls or {}).get(label), low, high,
            )
        )  # fmt: skip
    symbolic = any(BATCH in item.shape for item in inputs)
    fixed = next((item.shape[0] for item in inputs if item.role is Role.LATENT), 1)
    limits = (1, rows) if symbolic else (int(fixed), int(fixed))
    return Program(name, graph, weights, tuple(inputs), limits, guidance=guidance or Guidance())


def _export(
    module: nn.Module, example: dict[str, Tensor], roles: Mapping[str, str], rows: int, unbatched: Sequence[str]
) -> ExportedProgram:
    latents = [name for name, role in roles.items() if role == Role.LATENT and name in example]
    if len(latents) != 1:
        raise TraceError("one input must be the latent", got=dict(roles), next="say --role NAME=latent")
    size = example[latents[0]].shape[0]
    batched = [key for key, value in example.items() if value.dim() and value.shape[0] == size and key not in unbatched]
    # With a batch of one the exporter would fix the batch to one.
    example |= {key: torch.cat([example[key]] * (2 if size == 1 else 1))[: max(2, size)] for key in batched}
    # In a narrow range the exporter finds other expressions for the same shapes, which cannot be ports.
    batch = Dim("B", min=1, max=max(rows, WIDE_ROWS))
    dynamic = {key: ({0: batch} if key in batched else None) for key in example}
    timesteps = [key for key in example if roles.get(key) == Role.TIMESTEP and not example[key].is_floating_point()]
    attempts = [{**example, **{key: example[key].float() for key in timesteps}}] if timesteps else []
    failure: Exception | None = None
    for inputs in [*attempts, example]:
        try:
            with _quiet(), torch.no_grad():
                return torch.export.export(module.eval(), (), inputs, dynamic_shapes=dynamic)
        except Exception as error:  # noqa: BLE001 - torch.export raises many types; every one means "not traceable"
            failure = failure or error
    assert failure is not None
    raise _trace_error(failure) from failure


def _trace_error(error: Exception) -> TraceError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith(("File ", "at ")) or ".py:" in line), None)
    message = lines[0] if lines else type(error).__name__
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        return TraceError(
            "the model's control flow depends on tensor values", at=where, got=message[:300],
            want="a forward whose branches depend on shapes and configuration only",
            next="replace the branch by torch.where, or move it out of forward",
        )  # fmt: skip
    return TraceError(
        "torch.export could not capture the model", at=where, got=f"{type(error).__name__}: {message[:300]}",
        next="make `torch.export.export(model, (), example_inputs)` pass, or give an ExportedProgram (.pt2)",
    )  # fmt: skip


def _flatten(exported: ExportedProgram) -> tuple[Graph, dict[str, Tensor], list[Node]]:
    """A copy of the exported graph in which parameters are `get_attr` nodes named after their module path."""
    names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            source: Mapping[str, Tensor] = exported.state_dict
            if spec.target not in source:
                source = exported.constants
            assert spec.target is not None
            names[spec.arg.name] = spec.target
            tensors[spec.target] = source[spec.target].detach()
        elif spec.kind is not InputKind.USER_INPUT:
            raise TraceError(f"unsupported input of kind {spec.kind.name}", at=spec.arg.name)
    if exported.graph_signature.buffers_to_mutate:
        raise TraceError(
            "the model changes its own buffers in forward",
            got=list(exported.graph_signature.buffers_to_mutate.values()),
            next="make forward a pure function of its inputs",
        )
    graph = Graph()
    copies: dict[Node, Node] = {}
    placeholders: list[Node] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            copy = graph.create_node("get_attr", names[node.name], name=node.name)
        elif node.op == "placeholder":
            copy = graph.placeholder(node.name)
            placeholders.append(copy)
        else:
            copy = graph.node_copy(node, lambda source: copies[source])
        copy.meta = {key: value for key, value in node.meta.items() if key in ("val", "stack_trace")}
        copies[node] = copy
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return graph, {name: tensors[name] for name in tensors if name in used}, placeholders


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
