"""What reduced precision does to each engine, measured where no GPU is: the graphs run on ONNX Runtime's CPU provider.

Each engine gets what the exact one before it gave, so its error is its own; and the typed engines run once in a chain,
whose error is that of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from dcc.errors import ExportError
from dcc.exports.typed_graphs import rounded
from dcc.quality import difference
from dcc.runtime.artifact import Artifact
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend
from dcc.runtime.plan import InputSpec
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.workspace import Workspace
from dcc.tolerances import TOLERANCE

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class LayerCheck:
    """Largest differences over the range of the exact values: of each engine by itself, and of a forward in a chain."""

    engines: dict[str, float]
    forward: float

    def worst(self, other: LayerCheck) -> LayerCheck:
        """The larger difference of each engine and of a forward."""
        names = sorted({*self.engines, *other.engines})
        engines = {name: max(self.engines.get(name, 0.0), other.engines.get(name, 0.0)) for name in names}
        return LayerCheck(engines, max(self.forward, other.forward))


def check_layer(artifact: Artifact, dtype: str, graph: Callable[[str], bytes]) -> LayerCheck:
    """The graphs `graph(engine)` compute what the artifact's engines compute, within the dtype's tolerance.

    Every engine runs at least once, on values that a request makes. Values of the reduced type are rounded as it rounds
    (`typed_graphs.rounded`). Raises ExportError with the worst engine.
    """

    def runnable(engine: str) -> bytes:
        model = graph(engine)
        return rounded(onnx.load_model_from_string(model), dtype).SerializeToString()

    return _checked(artifact, dtype, lambda: _TypedBackend(artifact, runnable))


def check_functions(artifact: Artifact, dtype: str, function: Callable[[str], Function]) -> LayerCheck:
    """The same for engines that are functions of arrays, `function(engine)`, which round for themselves."""
    return _checked(artifact, dtype, lambda: _FunctionBackend(artifact, function))


def _checked(artifact: Artifact, dtype: str, typed: Callable[[], OnnxRuntimeBackend]) -> LayerCheck:
    compared = _ComparingBackend(artifact, typed())
    loaded = LoadedArtifact(artifact, compared)
    inputs = _random_inputs(artifact, loaded.sampler)
    exact = loaded.denoise(**inputs)
    if loaded.sampler is not None:
        _run_every_program(artifact, compared, loaded.sampler, inputs)
    compared.forget()
    got = LoadedArtifact(artifact, typed()).denoise(**inputs)
    found = LayerCheck(dict(sorted(compared.errors.items())), difference(got, exact))
    limit = TOLERANCE[dtype].forward
    worst = max(found.engines, key=lambda name: found.engines[name])
    if not max(found.engines[worst], found.forward) <= limit:
        raise ExportError(
            f"an engine in {dtype} does not compute what the exact one computes", at=f"engine {worst}",
            got=f"{found.engines[worst]:.2e} of the range, {found.forward:.2e} for a forward",
            want=f"at most {limit:.0e}", next="--dtype with another type, or report the model's architecture",
        )  # fmt: skip
    return found


class _TypedBackend(OnnxRuntimeBackend):
    """Runs other graphs in place of the artifact's engines."""

    def __init__(self, artifact: Artifact, graph: Callable[[str], bytes]) -> None:
        super().__init__(artifact, low_memory=True, optimize=False)
        self._graph = graph

    def model(self, engine: str) -> bytes:
        return self._graph(engine)


class _FunctionBackend(OnnxRuntimeBackend):
    """Runs functions in place of the artifact's engines."""

    def __init__(self, artifact: Artifact, function: Callable[[str], Function]) -> None:
        super().__init__(artifact, low_memory=True)
        self._function = function

    def bind(self, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
        return _Called(self._function(engine), inputs, outputs)


@dataclass(frozen=True)
class _Called:
    """A function bound to arrays."""

    function: Function
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def run(self) -> None:
        for name, made in self.function(self.inputs).items():
            np.copyto(self.outputs[name], made, casting="no")


class _ComparingBackend(OnnxRuntimeBackend):
    """Runs the artifact's engines; each time the typed one runs on the same inputs, its difference is noted."""

    def __init__(self, artifact: Artifact, typed: OnnxRuntimeBackend) -> None:
        super().__init__(artifact, low_memory=True)
        self._typed = typed
        self.errors: dict[str, float] = {}

    def bind(self, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
        exact = super().bind(engine, inputs, outputs)
        mine = {name: np.empty_like(array) for name, array in outputs.items()}
        typed = self._typed.bind(engine, inputs, mine)
        return _Compared(self, engine, exact, typed, outputs, mine)

    def forget(self) -> None:
        """Sessions are gone: the next ones need the memory."""
        self._sessions.clear()
        self._typed._sessions.clear()


class _Compared:
    """Two bindings of one engine."""

    def __init__(
        self, owner: _ComparingBackend, engine: str, exact: Any, typed: Any, wanted: Mapping[str, Array],
        got: Mapping[str, Array],
    ) -> None:  # fmt: skip
        self._owner, self._engine, self._exact, self._typed = owner, engine, exact, typed
        self._wanted, self._got = wanted, got

    def run(self) -> None:
        # An engine may write over what it reads (a buffer that dies in it), so the copy runs first.
        self._typed.run()
        self._exact.run()
        for name, wanted in self._wanted.items():
            if np.issubdtype(wanted.dtype, np.floating):
                error = difference(self._got[name], wanted)
                self._owner.errors[self._engine] = max(error, self._owner.errors.get(self._engine, 0.0))


def _run_every_program(
    artifact: Artifact, backend: OnnxRuntimeBackend, sampler: SamplerTable, inputs: Mapping[str, Array]
) -> None:
    """Each distinct step program runs once, in the order of their first calls: no history is read unwritten."""
    plan = artifact.plan
    roles = {item.role: item.name for item in plan.inputs}
    space = Workspace(artifact, backend, len(inputs[roles["latent"]]), plan)
    for name, array in inputs.items():
        np.copyto(space.inputs[name], array)
    space.call_timesteps = np.asarray([call.timestep for call in sampler.calls], np.float64)
    space.prepare(None)
    for call in [plan.order.index(program) for program in dict.fromkeys(plan.order)]:
        if "timestep" in roles:
            space.inputs[roles["timestep"]].fill(sampler.calls[call].timestep)
        space.step(call, plan.order[call])


def _random_inputs(artifact: Artifact, sampler: SamplerTable | None) -> dict[str, Array]:
    low, high = artifact.plan.symbols["B"]
    rows = max(low, min(2, high))
    generator = np.random.default_rng(0)
    return {item.name: _random_input(item, rows, sampler, generator) for item in artifact.plan.inputs}


def _random_input(
    item: InputSpec, rows: int, sampler: SamplerTable | None, generator: np.random.Generator
) -> Array:
    shape = tuple(rows if isinstance(size, str) else size for size in item.shape)
    if item.role == "timestep":
        times = [500.0] if sampler is None else [call.timestep for call in sampler.calls]
        return generator.choice(np.asarray(times), shape).astype(item.dtype)
    if np.issubdtype(np.dtype(item.dtype), np.integer):
        low = 0 if item.minimum is None else item.minimum
        high = low + 1 if item.maximum is None else item.maximum
        return generator.integers(low, high, shape, endpoint=True).astype(item.dtype)
    if item.dtype == "bool":
        return np.ones(shape, np.bool_)
    return generator.standard_normal(shape).astype(item.dtype)
