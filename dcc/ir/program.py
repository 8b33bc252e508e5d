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

from dcc.ir.graph import Shape

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
        from dcc.ir.text import program_text

        digest = hashlib.sha256(program_text(self).encode())
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
