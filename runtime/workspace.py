"""Memory and bound engines for one number of rows: made once, used by every request of that size.

Rows of tables are packed so that one copy per sampler call puts all of them where the step engines read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dcc.errors import ExecutionError
from dcc.runtime.artifact import Artifact
from dcc.runtime.onnxruntime_backend import Binding, OnnxRuntimeBackend
from dcc.runtime.plan import Call, EngineSpec, Plan, Ref, Shape, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
ALIGNMENT = 64
TABLE_ROWS = 4096  # rows of one run of a table engine: bounds its activations, large enough to read weights once


def concrete(shape: Shape, rows: int) -> tuple[int, ...]:
    return tuple(rows if isinstance(size, str) else size for size in shape)


def aligned_empty(shape: tuple[int, ...], dtype: str) -> Array:
    """Uninitialised memory on a 64-byte boundary."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class Packed:
    """Arrays of given shapes laid in one block of bytes, each aligned; `block` is copied as a whole."""

    def __init__(self, specs: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self.layout: dict[str, tuple[int, str, tuple[int, ...]]] = {}
        offset = 0
        for name, dtype, shape in specs:
            self.layout[name] = (offset, dtype, shape)
            offset += math.prod(shape) * np.dtype(dtype).itemsize
            offset += -offset % ALIGNMENT
        self.size = offset
        self.block = aligned_empty((offset,), "uint8")

    def view(self, name: str, block: Array | None = None) -> Array:
        """The array of this name inside `block` (its own by default)."""
        offset, dtype, shape = self.layout[name]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return (self.block if block is None else block)[offset : offset + size].view(dtype).reshape(shape)


class Workspace:
    """Everything that `rows` rows need, from the inputs to the denoiser's output."""

    def __init__(
        self,
        artifact: Artifact,
        backend: OnnxRuntimeBackend,
        rows: int,
        plan: Plan,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        """`plan` is the artifact's own, or another step over the same weights, with `constants` that it adds."""
        self.plan = plan
        self.rows = rows
        # One timestep per sampler call, for models whose tables read the timestep itself.
        self.call_timesteps: Array = np.zeros(0)
        self._artifact = artifact
        self._backend = backend
        self._engines = {engine.name: engine for engine in plan.engines}
        self.inputs = {item.name: aligned_empty(concrete(item.shape, rows), item.dtype) for item in plan.inputs}
        self.output = aligned_empty(concrete(plan.output.shape, rows), plan.output.dtype)
        self._request = {
            port.name: aligned_empty(concrete(port.shape, rows), port.dtype) for port in plan.request_ports
        }
        self._row = Packed(
            (f"{kind}/{port.name}", port.dtype, concrete(port.shape, rows))
            for kind, ports in (("timestep", plan.timestep_ports), ("table", plan.table_ports))
            for port in ports
        )
        self._tables: Array = np.empty((0, self._row.size), np.uint8)
        self._buffers = self._allocate_buffers(plan, rows)
        self._histories = {item.name: aligned_empty(concrete(item.shape, rows), item.dtype) for item in plan.histories}
        given = dict(constants or {})
        self._constants = given | {
            item.name: artifact.map_weight(item.weight) for item in plan.constants if item.name not in given
        }
        self._request_calls = [self._bind(call, rows) for call in plan.request]
        # By step program and number of rows: a call that runs one half reads and writes the first rows alone.
        self._programs: dict[tuple[int, int], list[Binding]] = {}

    @staticmethod
    def _allocate_buffers(plan: Plan, rows: int) -> dict[str, Array]:
        sizes: dict[int, int] = {}
        for buffer in plan.buffers:
            size = math.prod(concrete(buffer.shape, rows)) * np.dtype(buffer.dtype).itemsize
            sizes[buffer.slot] = max(size, sizes.get(buffer.slot, 0))
        slots = {slot: aligned_empty((size,), "uint8") for slot, size in sizes.items()}
        arrays = {}
        for buffer in plan.buffers:
            shape = concrete(buffer.shape, rows)
            size = math.prod(shape) * np.dtype(buffer.dtype).itemsize
            arrays[buffer.name] = slots[buffer.slot][:size].view(buffer.dtype).reshape(shape)
        return arrays

    def array(self, ref: Ref) -> Array:
        """Where a call of the step reads or writes."""
        if ref.kind == "input":
            return self.inputs[ref.name]
        if ref.kind == "output":
            return self.output
        if ref.kind == "request":
            return self._request[ref.name]
        if ref.kind == "buffer":
            return self._buffers[ref.name]
        if ref.kind == "history":
            return self._histories[ref.name]
        if ref.kind == "constant":
            return self._constants[ref.name]
        return self._row.view(f"{ref.kind}/{ref.name}")

    def _bind(self, call: Call, rows: int) -> Binding:
        engine = self._engines[call.engine]

        def place(port: TensorSpec, ref: Ref) -> Array:
            array = self.array(ref)
            return array[:rows] if rows < self.rows and port.shape[:1] == ("B",) else array

        inputs = {port.name: place(port, ref) for port, ref in zip(engine.inputs, call.inputs, strict=True)}
        outputs = {port.name: place(port, ref) for port, ref in zip(engine.outputs, call.outputs, strict=True)}
        return self._backend.bind(call.engine, inputs, outputs)

    def bind_program(self, program: int, rows: int) -> list[Binding]:
        """The bound calls of a step program for the first `rows` rows, made when first asked for."""
        key = program, rows
        if key not in self._programs:
            self._programs[key] = [self._bind(call, rows) for call in self.plan.step_programs[program]]
        return self._programs[key]

    def prepare(self, timesteps: Array | None) -> None:
        """Request ports and tables hold the values for what `inputs` hold now.

        `timesteps` None: for the sampler calls that were compiled in. Otherwise `[rows]`, one forward at these.
        """
        for binding in self._request_calls:
            binding.run()
        calls = len(self.plan.order) if timesteps is None else 1
        if self._tables.shape[0] != calls:
            self._tables = aligned_empty((calls, self._row.size), "uint8")
        early = self._timestep_values(timesteps)
        for name, values in early.items():
            self._fill(f"timestep/{name}", slice(0, calls), values)
        chunk = max(1, TABLE_ROWS // self.rows)
        for start in range(0, calls, chunk) if self.plan.table else ():
            self._run_tables(slice(start, min(start + chunk, calls)), early, timesteps)

    def _fill(self, name: str, calls: slice, values: Array) -> None:
        """Rows `calls` of the table take `values`, `[calls, rows or 1, ...]`."""
        offset, dtype, shape = self._row.layout[name]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        target = self._tables[calls, offset : offset + size].view(dtype)
        np.copyto(target, np.broadcast_to(values, (len(target), *shape)).reshape(target.shape))

    def _timestep_values(self, timesteps: Array | None) -> dict[str, Array]:
        """Timestep-only values as `[calls, 1 or rows, ...]`."""
        if timesteps is None:
            return {port.name: self._constants[port.name] for port in self.plan.timestep_ports}
        name = next(item.name for item in self.plan.inputs if item.role == "timestep")
        values: dict[str, Array] = {}
        for call in self.plan.timestep:
            engine = self._engines[call.engine]
            places = {"input": {name: timesteps}, "timestep": values}
            made = self._run_free(engine, call, places, self.rows)
            values |= made
        return {key: value[None] for key, value in values.items()}

    def _run_tables(self, calls: slice, early: Mapping[str, Array], timesteps: Array | None) -> None:
        """Table engines once for all sampler calls in the range, call-major."""
        count = calls.stop - calls.start
        batched: dict[str, dict[str, Array]] = {"timestep": {}, "request": {}, "input": {}, "table": {}}
        for name, values in early.items():
            part = values[calls] if values.shape[0] > 1 else values
            rows = np.broadcast_to(part, (count, self.rows, *values.shape[2:]))
            batched["timestep"][name] = np.ascontiguousarray(rows).reshape(-1, *values.shape[2:])
        for port in self.plan.request_ports:
            array = self._request[port.name]
            batched["request"][port.name] = np.tile(array, (count, *[1] * (array.ndim - 1))) if port.rows else array
        for item in self.plan.inputs:
            array = self._timestep_input(calls, timesteps) if item.role == "timestep" else self.inputs[item.name]
            if item.role == "condition" and item.shape[:1] == ("B",):
                array = np.tile(array, (count, *[1] * (array.ndim - 1)))
            batched["input"][item.name] = np.ascontiguousarray(array.astype(item.dtype, copy=False))
        for call in self.plan.table:
            batched["table"] |= self._run_free(self._engines[call.engine], call, batched, count * self.rows)
        for name, values in batched["table"].items():
            self._fill(f"table/{name}", calls, values.reshape(count, self.rows, *values.shape[1:]))

    def _timestep_input(self, calls: slice, timesteps: Array | None) -> Array:
        if timesteps is not None:
            return timesteps
        return np.repeat(self.call_timesteps[calls], self.rows)

    def _run_free(
        self, engine: EngineSpec, call: Call, places: Mapping[str, Mapping[str, Array]], rows: int
    ) -> dict[str, Array]:
        """Run an early engine on arrays that are not part of the workspace; returns its outputs by port name."""
        inputs = {}
        for port, ref in zip(engine.inputs, call.inputs, strict=True):
            inputs[port.name] = self._constants[ref.name] if ref.kind == "constant" else places[ref.kind][ref.name]
        outputs = {port.name: aligned_empty(concrete(port.shape, rows), port.dtype) for port in engine.outputs}
        self._backend.bind(engine.name, inputs, outputs).run()
        return {ref.name: outputs[port.name] for port, ref in zip(engine.outputs, call.outputs, strict=True)}

    def step(
        self, call: int, program: int, rows: int | None = None, told: Callable[[Call], None] | None = None
    ) -> Array:
        """The denoiser's output at sampler call `call` for the first `rows` rows of the latent in `inputs`.

        Valid until the next step. All rows run by default. `told` is called after each engine.
        """
        if call >= len(self._tables):
            raise ExecutionError("a step was run before its tables were prepared", at=f"sampler call {call}")
        np.copyto(self._row.block, self._tables[call])
        rows = self.rows if rows is None else rows
        bindings = self.bind_program(program, rows)
        if told is None:
            for binding in bindings:
                binding.run()
        else:
            for binding, entry in zip(bindings, self.plan.step_programs[program], strict=True):
                binding.run()
                told(entry)
        return self.output[:rows]
