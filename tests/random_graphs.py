"""Programs written operation by operation, as `torch.export` leaves them; and random ones for property tests.

Tracing a module takes a second, a sketch takes milliseconds, and its text holds only what the test is about.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dcc.ir.graph import BATCH, dtype_name, shape_of
from dcc.ir.program import Input, PassReport, Program, Role
from dcc.ir.verify import verify

aten = torch.ops.aten
EXAMPLE_ROWS = 5  # a size that no other dimension has, so that it becomes one symbol


class Sketch:
    """Inputs, weights and operations in order; `program(result)` ends it."""

    def __init__(self, name: str = "sketch") -> None:
        self.name = name
        self.graph = Graph()
        self.weights: dict[str, Tensor] = {}
        self.inputs: list[Input] = []
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._generator = torch.Generator().manual_seed(0)

    def input(self, name: str, role: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> Node:
        """A dimension written "B" is the batch."""
        real = torch.zeros([EXAMPLE_ROWS if size == BATCH else size for size in shape], dtype=dtype)
        context = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK if size == BATCH else DimDynamic.STATIC for size in shape]
        )
        node = self.graph.placeholder(name)
        node.meta["val"] = self._mode.from_tensor(real, symbolic_context=context, source=ConstantSource(name))
        self.inputs.append(Input(name, Role(role), dtype_name(dtype), shape_of(node)))
        return node

    def latent(self, *shape: int, name: str = "x") -> Node:
        return self.input(name, "latent", BATCH, *(shape or (4,)))

    def timestep(self, name: str = "t") -> Node:
        return self.input(name, "timestep", BATCH)

    def condition(self, *shape: int, name: str = "c") -> Node:
        return self.input(name, "condition", BATCH, *(shape or (4,)))

    def weight(self, name: str, *shape: int) -> Node:
        """A named parameter; a name used before gives another read of the same tensor."""
        if name not in self.weights:
            self.weights[name] = torch.randn(shape, generator=self._generator)
        node = self.graph.get_attr(name)
        node.meta["val"] = self._mode.from_tensor(self.weights[name], static_shapes=True)
        return node

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of an ATen operation (or of a function of sizes) with its shape and dtype computed."""
        schema = getattr(target, "_schema", None)
        name = schema.name.split("::")[-1] if schema is not None else target.__name__
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        values = torch.fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        with self._mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def linear(self, x: Node, name: str, width: int, bias: bool = False) -> Node:
        weight = self.weight(f"{name}.weight", width, int(shape_of(x)[-1]))
        extra = [self.weight(f"{name}.bias", width)] if bias else []
        return self.op(aten.linear.default, x, weight, *extra)

    def embed(self, t: Node, name: str = "t_embed", width: int = 4) -> Node:
        """A timestep `[B]` as `[B, width]`."""
        return self.linear(self.op(aten.unsqueeze.default, t, 1), name, width)

    def add(self, a: Node, b: Node) -> Node:
        return self.op(aten.add.Tensor, a, b)

    def mul(self, a: Node, b: Any) -> Node:
        return self.op(aten.mul.Tensor, a, b)

    def program(self, result: Node, rows: tuple[int, int] = (1, 16)) -> Program:
        self.graph.output((result,))
        return Program(self.name, self.graph, self.weights, tuple(self.inputs), rows)


def random_inputs(program: Program, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Different values in every row of every input."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for item in program.inputs:
        shape = [rows if isinstance(size, str) else size for size in item.shape]
        inputs[item.name] = torch.randn(shape, generator=generator).to(getattr(torch, item.dtype))
    return inputs


@dataclass(frozen=True)
class Recipe:
    """A random Program as data: each step names an operation and the values that it reads, by index."""

    steps: tuple[tuple[str, int, int], ...]

    def sketch(self) -> Program:
        """Values 0 to 3 are the latent, the timestep's and the condition's features and a weight, `[B or 1, 4]`."""
        s = Sketch("random")
        x, t, c = s.latent(), s.timestep(), s.condition()
        values = [x, s.embed(t), c, s.weight("w", 1, 4)]
        for index, (name, first, second) in enumerate(self.steps):
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(OPERATIONS[name](s, index, a, b))
        # Every value reaches the output, as in a model after dead code has gone.
        result = s.add(x, values[3])
        for value in values[4:]:
            result = s.add(result, s.op(aten.tanh.default, value))
        return s.program(result)


def _sized(s: Sketch, index: int, a: Node, b: Node) -> Node:
    """`zeros([rows of a, 4]) + b`: reads the size of `a`, never its values."""
    if shape_of(a)[0] != BATCH:
        return s.add(a, b)
    rows = s.op(aten.sym_size.int, a, 0)
    zeros = s.op(aten.full.default, [rows, 4], 0.5, dtype=torch.float32, device=torch.device("cpu"))
    return s.add(zeros, b)


def _halves(s: Sketch, index: int, a: Node, b: Node) -> Node:
    parts = s.op(aten.split_with_sizes.default, a, [2, 2], 1)
    left, right = s.op(operator.getitem, parts, 0), s.op(operator.getitem, parts, 1)
    return s.op(aten.cat.default, [right, left], 1)


OPERATIONS: dict[str, Callable[[Sketch, int, Node, Node], Node]] = {
    "add": lambda s, i, a, b: s.add(a, b),
    "mul": lambda s, i, a, b: s.mul(a, b),
    "silu": lambda s, i, a, b: s.op(aten.silu.default, a),
    "linear": lambda s, i, a, b: s.linear(a, f"linear{i}", 4),
    "reshape": lambda s, i, a, b: s.op(
        aten.reshape.default, s.op(aten.permute.default, s.op(aten.reshape.default, a, [-1, 2, 2]), [0, 2, 1]), [-1, 4]
    ),
    "zeros_like": lambda s, i, a, b: s.add(s.op(aten.zeros_like.default, a), b),
    "sized": _sized,
    "halves": _halves,
    "clone": lambda s, i, a, b: s.op(aten.clone.default, a),
}


FEW = settings(max_examples=25)  # of a property that one pass keeps; the split as a whole has more


def recipes(most: int = 12) -> st.SearchStrategy[Recipe]:
    step = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99))
    return st.lists(step, min_size=1, max_size=most).map(lambda steps: Recipe(tuple(steps)))


def lifetimes(most: int = 20) -> st.SearchStrategy[Sequence[tuple[int, int, int]]]:
    """(first write, last read, width) of buffers."""
    return st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, 10), st.integers(1, 64)).map(
            lambda entry: (entry[0], entry[0] + 1 + entry[1], entry[2])
        ),
        max_size=most,
    )


def apply(step: Any, program: Program) -> PassReport:
    """The pass's report; the Program obeys every rule before and after."""
    verify(program)
    report = step.apply(program)
    verify(program, after=report.name, canonical=report.name == "canonicalize")
    return report


def values_of(program: Program, inputs: Mapping[str, Tensor]) -> dict[Node, Any]:
    """What every node of the uncut graph is for these inputs."""
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "get_attr":
                values[node] = program.weights[str(node.target)]
            elif node.op == "call_function":
                arguments = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments[0], **arguments[1])
    return values
