"""The Program: the traced sampling loop as one denoiser graph, its scopes, its stages and its weights.

`graph` is the whole forward of the denoiser: placeholders are its inputs, `get_attr` nodes are entries of
`weights`. `scopes` says where each node is computed; before `hoist-scopes` has run everything is in the step.
`stages` cut the graph; before `cut-stages` has run there are none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dcc.ir.graph import Shape, op_name, outputs_of

if TYPE_CHECKING:
    from dcc.ir.measurements import Measurements
    from dcc.ir.schedule import Schedule


class Scope(StrEnum):
    """Where a value is computed, from earliest to latest."""

    CONSTANT = "constant"  # depends on nothing: folded or rematerialised
    TIMESTEP = "timestep"  # depends on the timestep only: a table made at compile time
    REQUEST = "request"  # depends on the condition only: once per generation
    TABLE = "table"  # timestep and condition: once per generation, batched over all steps
    STEP = "step"  # depends on the latent: in the loop


class Role(StrEnum):
    """What an input of the denoiser is."""

    LATENT = "latent"
    TIMESTEP = "timestep"
    CONDITION = "condition"


@dataclass(frozen=True)
class Input:
    """An input of the denoiser; `null` and the inclusive range are for integer conditions (class labels)."""

    name: str
    role: Role
    dtype: str
    shape: Shape
    null: float | None = None
    minimum: int | None = None
    maximum: int | None = None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `cfg` or `none`, the default scale, and how many output channels it mixes."""

    mode: str = "none"
    scale: float = 1.0
    channels: int | None = None


@dataclass(frozen=True)
class Residual:
    """`add` is `stream` plus the gated `branch`, which is a component's result."""

    add: Node
    stream: Node
    branch: Node


@dataclass
class Stage:
    """A run of nodes with ports: inputs and outputs are nodes of the Program's graph, weights are names.

    `kind` is component, residual (gates and residual adds, nothing else), glue, or the scope that the stage fills.
    `template` is the hash under which its body is lowered once, however many stages share it.
    """

    name: str
    kind: str
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...] = ()
    outputs: tuple[Node, ...] = ()
    weights: tuple[str, ...] = ()
    template: str = ""
    residuals: tuple[Residual, ...] = ()


@dataclass
class PassReport:
    """What a pass did: `status` is applied or declined, and `why` says so in one sentence."""

    name: str
    status: str
    why: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Program:
    """See the module's text."""

    name: str
    graph: Graph
    weights: dict[str, Tensor]
    inputs: tuple[Input, ...]
    rows: tuple[int, int]
    sampler: Any = None
    guidance: Guidance = field(default_factory=Guidance)
    scopes: dict[Node, Scope] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    templates: dict[str, torch.fx.GraphModule] = field(default_factory=dict)
    reports: list[PassReport] = field(default_factory=list)
    source: str = ""
    schedule: Schedule | None = None
    measurements: Measurements | None = None
    # Of each weight that was hashed: the tensor, its count of changes in place, its content hash.
    hashed: dict[str, tuple[Tensor, int, str]] = field(default_factory=dict, repr=False, compare=False)

    def scope(self, node: Node) -> Scope:
        return self.scopes.get(node, Scope.STEP)

    def input(self, role: Role) -> list[Input]:
        return [item for item in self.inputs if item.role == role]

    @property
    def latent(self) -> Input:
        return self.input(Role.LATENT)[0]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the order in which they run."""
        return tuple(stage.name for stage in self.stages if stage.kind == "component")

    @property
    def calls(self) -> int:
        """Sampler calls per generation; 1 for a Program compiled for `denoise` alone."""
        return len(self.sampler.calls) if self.sampler is not None else 1

    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    def new_weight(self, name: str, tensor: Tensor) -> str:
        """The tensor is stored under a free name derived from `name`, which is returned."""
        free, count = name, 1
        while free in self.weights:
            free, count = f"{name}.{count}", count + 1
        self.weights[free] = tensor.detach().contiguous()
        return free

    def hash(self) -> str:
        """Content hash of text and weights: equal programs hash equal in any process."""
        from dcc.ir.text import program_text  # which imports this module

        digest = hashlib.sha256(program_text(self).encode())
        for name in sorted(self.weights):
            digest.update(f"{name} {self._weight_hash(name)}\n".encode())
        return digest.hexdigest()

    def denoiser_hash(self) -> str:
        """Content hash of what the denoiser computes: operations, weights, and its inputs with their roles.

        Equal whatever the Program is called, for any sampler, number of steps, guidance and number of rows: those
        change neither a component nor a weight. The hash of a value is that of its operation and of its arguments'
        hashes, so neither the order of the operations nor the scopes and stages that they were divided into matter.
        """
        inputs = {item.name: item for item in self.inputs}
        found: dict[Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                spelled = repr(inputs[node.name])
            elif node.op == "get_attr":
                spelled = f"weight {self._weight_hash(str(node.target))}"
            elif node.op == "call_function":
                # The overload as well: `str` of what is not an operation of torch may hold an address.
                target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else op_name(node)
                spelled = f"{target} {_spelled(node.args, found)} {_spelled(node.kwargs, found)}"
            else:
                continue
            found[node] = hashlib.sha256(spelled.encode()).hexdigest()
        roles = [repr(item) for item in self.inputs]
        results = [found[node] for node in outputs_of(self.graph)]
        return hashlib.sha256("\n".join([*roles, *results]).encode()).hexdigest()

    def _weight_hash(self, name: str) -> str:
        """Content hash of one weight, taken again only where the tensor is another or was written to."""
        tensor = self.weights[name]
        version = -1 if tensor.is_inference() else tensor._version  # a tensor of inference mode counts no changes
        known = self.hashed.get(name)
        if known is None or known[0] is not tensor or known[1] != version:
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            known = self.hashed[name] = tensor, version, digest.hexdigest()
        return known[2]


def _spelled(value: object, found: dict[Node, str]) -> str:
    """An operation's argument as text, nodes by their hashes."""
    if isinstance(value, Node):
        return found[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spelled(part, found) for part in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_spelled(part, found)}' for key, part in sorted(value.items()))}}}"
    return repr(value)
