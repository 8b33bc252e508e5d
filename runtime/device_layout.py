"""How many bytes a request of a given size needs on a device, and where they lie: from the plan alone.

Everything that changes from one sampler call to the next (rows of tables, the timestep, coefficients) is packed into
one *call block*; the blocks of all calls lie behind one another, so that one copy brings a call's values to where the
step engines read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dcc.runtime.device import byte_count
from dcc.runtime.loop_spec import LoopSpec, update_ports
from dcc.runtime.plan import Plan, Ref, Shape
from dcc.runtime.workspace import TABLE_ROWS, concrete

COEFFICIENTS = Ref("input", "coefficients of the update")  # no input of a denoiser has spaces in its name


@dataclass(frozen=True)
class Size:
    """What a workspace is made for. `calls` sampler calls; 0 is one forward at timesteps that are given."""

    images: int
    guided: bool
    calls: int

    @property
    def rows(self) -> int:
        """Rows of the denoiser: both halves of the images under guidance."""
        return self.images * (2 if self.guided else 1)

    @property
    def blocks(self) -> int:
        return max(self.calls, 1)

    def chunks(self) -> list[range]:
        """The sampler calls that the table engines serve at once; workspaces of the CPU use the same."""
        step = max(1, TABLE_ROWS // self.rows)
        return [range(first, min(first + step, self.blocks)) for first in range(0, self.blocks, step)]


@dataclass(frozen=True)
class Entry:
    """A tensor inside the call block."""

    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return byte_count(self.shape, self.dtype)


class Layout:
    """Regions of one workspace with their bytes, and the entries of its call block."""

    def __init__(self, plan: Plan, loop: LoopSpec | None, size: Size, alignment: int) -> None:
        self.plan, self.loop, self.size = plan, loop if size.calls else None, size
        self.alignment = alignment
        self.block = self._block()
        last = max((entry.start + entry.nbytes for entry in self.block.values()), default=0)
        self.block_bytes = last + -last % alignment
        self.regions = dict(self._regions())

    @property
    def nbytes(self) -> int:
        """What all regions take, and what passes through device memory while they are filled."""
        entries = [entry.nbytes for ref, entry in self.block.items() if ref.kind in ("timestep", "input")]
        sizes = [*self.regions.values(), self.size.calls * max(entries, default=0)]
        return sum(size + -size % self.alignment for size in sizes)

    def image_bytes(self, kind: str) -> int:
        """Bytes of one image: `latent` in float32, `input` and `output` as the denoiser has them."""
        latent = next(item for item in self.plan.inputs if item.role == "latent")
        spec = self.plan.output if kind == "output" else latent
        return byte_count(concrete(spec.shape[1:], 1), "float32" if kind == "latent" else spec.dtype)

    @property
    def splits(self) -> bool:
        """Whether the second half of the denoiser's output starts where a port may."""
        return self.size.images * self.image_bytes("output") % self.alignment == 0

    def _block(self) -> dict[Ref, Entry]:
        read = {ref for program in self.plan.step_programs for call in program for ref in call.inputs}
        times = [item for item in self.plan.inputs if item.role == "timestep"]
        specs: list[tuple[Ref, str, Shape]] = [
            *((Ref("timestep", port.name), port.dtype, port.shape) for port in self.plan.timestep_ports),
            *((Ref("input", item.name), item.dtype, item.shape) for item in times),
            *((Ref("table", port.name), port.dtype, port.shape) for port in self.plan.table_ports),
        ]
        specs = [spec for spec in specs if spec[0] in read]
        if self.loop is not None:
            specs.append((COEFFICIENTS, "float32", (self.loop.coefficients,)))
        entries, start = {}, 0
        for ref, dtype, shape in specs:
            entries[ref] = Entry(start, dtype, concrete(shape, self.size.rows))
            start += entries[ref].nbytes
            start += -start % self.alignment
        return entries

    def _regions(self) -> Iterable[tuple[str, int]]:
        plan, rows = self.plan, self.size.rows

        def size(dtype: str, shape: Shape, count: int = rows) -> int:
            return byte_count(concrete(shape, count), dtype)

        for item in plan.inputs:
            if item.role != "timestep" or not self.size.calls:
                yield f"input {item.name}", size(item.dtype, item.shape)
        for port in plan.request_ports:
            yield f"request port {port.name}", size(port.dtype, port.shape)
        weights = {weight.name: weight for weight in plan.weights}
        for constant in plan.constants:
            weight = weights[constant.weight]
            if constant.rows and not constant.per_call:
                yield f"constant {constant.name}", size(weight.dtype, ("B", *weight.shape[1:]))
        slots: dict[int, int] = {}
        for buffer in plan.buffers:
            slots[buffer.slot] = max(slots.get(buffer.slot, 0), size(buffer.dtype, buffer.shape))
        yield from ((f"slot {slot}", nbytes) for slot, nbytes in slots.items())
        for history in plan.histories:
            yield f"history {history.name}", size(history.dtype, history.shape)
        yield f"output {plan.output.name}", size(plan.output.dtype, plan.output.shape)
        yield from self._table_regions()
        yield "call block", self.block_bytes
        if self.size.calls:
            yield "call blocks", self.block_bytes * self.size.calls
        yield from self._update_regions()

    def _table_regions(self) -> Iterable[tuple[str, int]]:
        """What table engines read and write, for all the calls of a run behind one another."""
        plan = self.plan
        read = {ref for call in plan.table for ref in call.inputs}
        chunks = self.size.chunks()
        longest = len(chunks[0]) * self.size.rows
        for number, chunk in enumerate(chunks):
            rows = len(chunk) * self.size.rows
            for port in plan.timestep_ports:
                if Ref("timestep", port.name) in read or not self.size.calls:
                    yield f"timestep port {port.name}, run {number}", byte_count(concrete(port.shape, rows), port.dtype)
            for item in plan.inputs:
                if item.role == "timestep" and self.size.calls and Ref("input", item.name) in read:
                    yield f"input {item.name}, run {number}", byte_count(concrete(item.shape, rows), item.dtype)
        if len(chunks[0]) > 1:
            for port in plan.request_ports:
                if port.rows and Ref("request", port.name) in read:
                    yield f"request port {port.name}, repeated", byte_count(concrete(port.shape, longest), port.dtype)
            for item in plan.inputs:
                repeated = item.role == "condition" and item.shape[:1] == ("B",)
                if repeated and Ref("input", item.name) in read:
                    yield f"input {item.name}, repeated", byte_count(concrete(item.shape, longest), item.dtype)
        for port in plan.table_ports:
            yield f"table port {port.name}", byte_count(concrete(port.shape, longest), port.dtype)

    def _update_regions(self) -> Iterable[tuple[str, int]]:
        if self.loop is None:
            return
        latent = self.image_bytes("latent") * self.size.images
        yield "noise", latent
        yield "start values", byte_count((len(self.loop.start_values),), "float32")
        yield "coefficients", byte_count((self.size.calls, self.loop.coefficients), "float32")
        for index in range(self.loop.registers):
            yield f"register {index}", latent
            yield f"new register {index}", latent
        if not self.size.guided:
            return
        if not self.splits:
            yield "null half", self.image_bytes("output") * self.size.images
        for kind in self.loop.kinds:
            if kind.keeps:
                spec = next(port for port in update_ports(kind)[1] if port.name == "new_difference")
                for index in range(self.loop.depth):
                    yield f"difference {index}", byte_count(concrete(spec.shape, self.size.images), spec.dtype)


def largest_images(plan: Plan, loop: LoopSpec | None, size: Size, alignment: int, free: int) -> int:
    """The most images whose workspace fits into `free` bytes; 0 if not even one does."""
    low, high = 0, size.images
    while low < high:
        middle = (low + high + 1) // 2
        fits = Layout(plan, loop, Size(middle, size.guided, size.calls), alignment).nbytes <= free
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
