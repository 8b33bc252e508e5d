"""Device memory and bound engines for requests of one size; made once, used by every request of that size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dcc.runtime.device import (
    Array,
    Context,
    DeviceError,
    DeviceMemoryError,
    HostBuffer,
    Place,
    Region,
    Stream,
    byte_count,
)
from dcc.runtime.device_layout import COEFFICIENTS, Layout, Size, largest_images
from dcc.runtime.device_model import DeviceModel, upload
from dcc.runtime.plan import Call, EngineSpec, Ref
from dcc.runtime.workspace import concrete


class DeviceWorkspace:
    """Everything that one request at a time of this size needs. All work goes to one stream."""

    def __init__(self, model: DeviceModel, size: Size, stream: Stream, scratch: Region) -> None:
        """Raises DeviceMemoryError, with the most images that would fit, where the device has no room."""
        self.model, self.plan, self.size = model, model.plan, size
        self.layout = Layout(model.plan, model.loop, size, model.device.alignment)
        self.stream = stream
        self._scratch = scratch
        self._regions: dict[str, Region] = {}
        self._pinned: dict[str, HostBuffer] = {}
        self._contexts: dict[object, Context] = {}
        try:
            for label, nbytes in self.layout.regions.items():
                self._regions[label] = model.device.allocate(nbytes, label)
            self._pin()
            if size.calls:
                self._upload_timesteps()
            self._upload_rows()
        except DeviceMemoryError as error:
            self.close()
            raise self.no_room() from error
        except BaseException:
            self.close()
            raise

    def region(self, label: str) -> Region:
        return self._regions[label]

    def pinned(self, label: str) -> HostBuffer:
        return self._pinned[label]

    def place(self, label: str, dtype: str, shape: tuple[int, ...]) -> Place:
        """A tensor at the beginning of a region."""
        return Place(self._regions[label].part(0, byte_count(shape, dtype)), dtype, shape)

    def input(self, name: str) -> Place:
        item = next(item for item in self.plan.inputs if item.name == name)
        return self.place(f"input {name}", item.dtype, concrete(item.shape, self.size.rows))

    def entry(self, ref: Ref) -> Region:
        """Where the step engines read a value of the present sampler call."""
        entry = self.layout.block[ref]
        return self._regions["call block"].part(entry.start, entry.nbytes)

    def close(self) -> None:
        """All its memory is the device's again; nothing of it may be under way."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        for region in self._regions.values():
            self.model.device.free(region)
        for buffer in self._pinned.values():
            self.model.device.free_pinned(buffer)
        self._regions.clear()
        self._pinned.clear()

    def bind(self, key: object, engine: str, places: Mapping[str, Place], scratch: Region | None = None) -> Context:
        """The engine on these places, bound when the key is first asked for."""
        if key not in self._contexts:
            loaded = self.model.engine(engine)
            every = {**places, **self.model.weight_places(engine)}
            self._contexts[key] = loaded.bind(every, self._scratch if scratch is None else scratch)
        return self._contexts[key]

    def step_call(self, call: Call, rows: int) -> Context:
        """A call of a step program for the first `rows` rows."""
        key = ("step", call, rows)
        if key not in self._contexts:
            self.bind(key, call.engine, self._step_places(call, rows))
        return self._contexts[key]

    def request_call(self, call: Call) -> Context:
        return self.bind(("request", call), call.engine, self._step_places(call, self.size.rows))

    def _step_places(self, call: Call, rows: int) -> dict[str, Place]:
        spec = self.model.specs[call.engine]
        return {
            port.name: self._place_of(ref, port.dtype, concrete(port.shape, rows))
            for ports, refs in ((spec.inputs, call.inputs), (spec.outputs, call.outputs))
            for port, ref in zip(ports, refs, strict=True)
        }

    def _place_of(self, ref: Ref, dtype: str, shape: tuple[int, ...]) -> Place:
        if ref in self.layout.block:
            return Place(self.entry(ref).part(0, byte_count(shape, dtype)), dtype, shape)
        if ref.kind == "constant" and ref.name in self.model.constants:
            return self.model.constants[ref.name]
        if ref.kind == "buffer":
            slot = next(buffer.slot for buffer in self.plan.buffers if buffer.name == ref.name)
            return self.place(f"slot {slot}", dtype, shape)
        labels = {"request": "request port", "table": "table port"}
        return self.place(f"{labels.get(ref.kind, ref.kind)} {ref.name}", dtype, shape)

    def table_call(self, call: Call, number: int) -> Context:
        """A call of the tables for all sampler calls of a run at once."""
        rows = len(self.size.chunks()[number]) * self.size.rows
        return self.bind(("table", call, number), call.engine, self._table_places(call, number, rows))

    def _table_places(self, call: Call, number: int, rows: int) -> dict[str, Place]:
        spec: EngineSpec = self.model.specs[call.engine]
        places = {}
        for ports, refs in ((spec.inputs, call.inputs), (spec.outputs, call.outputs)):
            for port, ref in zip(ports, refs, strict=True):
                shape = concrete(port.shape, rows)
                if ref.kind == "constant":
                    places[port.name] = self._place_of(ref, port.dtype, shape)
                    continue
                names = {"timestep": f"timestep port {ref.name}", "request": f"request port {ref.name}"}
                label = names.get(ref.kind, f"{'table port' if ref.kind == 'table' else 'input'} {ref.name}")
                found = [f"{label}, run {number}", f"{label}, repeated", label]
                label = next(item for item in found if item in self._regions)
                places[port.name] = self.place(label, port.dtype, shape)
        return places

    def timestep_call(self, call: Call, scratch: Region) -> Context:
        """A call of the timestep engines, which have scratch of their own: few requests ever load them."""
        spec = self.model.specs[call.engine]
        places = {}
        for ports, refs in ((spec.inputs, call.inputs), (spec.outputs, call.outputs)):
            for port, ref in zip(ports, refs, strict=True):
                shape = concrete(port.shape, self.size.rows)
                if ref.kind == "constant":
                    places[port.name] = self._place_of(ref, port.dtype, shape)
                    continue
                label = f"input {ref.name}" if ref.kind == "input" else f"timestep port {ref.name}, run 0"
                places[port.name] = self.place(label, port.dtype, shape)
        return self.bind(("timestep", call), call.engine, places, scratch)

    def _pin(self) -> None:
        device, layout = self.model.device, self.layout
        for item in self.plan.inputs:
            label = f"input {item.name}"
            if label in self._regions and (item.role != "latent" or not self.size.calls):
                self._pinned[label] = device.pinned(self._regions[label].nbytes, label)
        if self.size.calls and self.model.sampler is not None and layout.loop is not None:
            latent = self.size.images * layout.image_bytes("latent")
            draws = 1 + sum(call.draws for call in self.model.sampler.calls)
            self._pinned["noise"] = device.pinned(latent * draws, "noise")
            for label in ("coefficients", "start values"):
                self._pinned[label] = device.pinned(self._regions[label].nbytes, label)
            self._pinned["result"] = device.pinned(latent, "result")
        else:
            nbytes = self.size.rows * layout.image_bytes("output")
            self._pinned["result"] = device.pinned(nbytes, "result")

    def _upload_rows(self) -> None:
        """Constants of one row are repeated over the batch: engines have no broadcasting ports."""
        for constant in self.plan.constants:
            label = f"constant {constant.name}"
            if label in self._regions and constant.rows and not constant.per_call:
                values = self.model.constant(constant.name)
                full = np.broadcast_to(values, (self.size.rows, *values.shape[1:]))
                upload(self.model.device, self.stream, self._regions[label], full)

    def _upload_timesteps(self) -> None:
        """What depends on the sampler's timesteps alone is in its places for all requests to come."""
        sampler = self.model.sampler
        if sampler is None:
            raise DeviceError("a loop without a sampler cannot be laid out")
        rows = self.size.rows
        times = np.asarray([call.timestep for call in sampler.calls], np.float64)
        for port in self.plan.timestep_ports:
            values = self.model.constant(port.name)
            full = np.broadcast_to(values, (self.size.calls, *concrete(port.shape, rows)))
            self._upload_calls(Ref("timestep", port.name), full, f"timestep port {port.name}")
        for item in self.plan.inputs:
            if item.role == "timestep":
                shape = (self.size.calls, *concrete(item.shape, rows))
                column = times.reshape(-1, *[1] * (len(shape) - 1))
                full = np.broadcast_to(column, shape).astype(item.dtype)
                self._upload_calls(Ref("input", item.name), full, f"input {item.name}")

    def _upload_calls(self, ref: Ref, values: Array, label: str) -> None:
        """Values of all sampler calls, `[calls, ...]`, go to the call blocks and to what table engines read."""
        for number, chunk in enumerate(self.size.chunks()):
            if f"{label}, run {number}" in self._regions:
                part = values[chunk.start : chunk.stop]
                upload(self.model.device, self.stream, self._regions[f"{label}, run {number}"], part)
        if ref not in self.layout.block:
            return
        device = self.model.device
        passing = device.allocate(values.nbytes, f"{label}, all calls")
        try:
            upload(device, self.stream, passing, values)
            self.to_blocks(ref, passing, range(self.size.calls))
            self.stream.synchronise()
        finally:
            device.free(passing)

    def to_blocks(self, ref: Ref, source: Region, calls: range) -> None:
        """The entry of each of these calls takes its part of the source."""
        entry = self.layout.block[ref]
        first = calls.start * self.layout.block_bytes + entry.start
        blocks = self._regions["call blocks"]
        target = blocks.part(first, (len(calls) - 1) * self.layout.block_bytes + entry.nbytes)
        self.stream.copy_rows(target, self.layout.block_bytes, source.part(0, entry.nbytes * len(calls)), len(calls))

    def coefficients_to_blocks(self) -> None:
        """Each call block takes its row of the coefficients."""
        self.to_blocks(COEFFICIENTS, self._regions["coefficients"], range(self.size.calls))

    def coefficients(self, count: int) -> Place:
        """The present call's coefficients, of which a kind reads the first `count`."""
        return Place(self.entry(COEFFICIENTS).part(0, 4 * count), "float32", (count,))

    def no_room(self, contexts: int = 0) -> DeviceMemoryError:
        """What is said where the workspace, which is closed, did not fit; `contexts` is what engines took besides."""
        free = self.model.device.memory().free
        fit = largest_images(self.plan, self.model.loop, self.size, self.layout.alignment, free - contexts)
        fit, wanted = min(fit, self.size.images - 1), self.layout.nbytes + contexts
        return DeviceMemoryError(
            "a request does not fit into the device's memory", wanted, free,
            at=f"{self.size.images} images, {self.size.rows} rows",
            got=f"{free / 2**20:.1f} MiB free", want=f"{wanted / 2**20:.1f} MiB",
            next=f"ask for at most {fit} images at once" if fit > 0 else "free memory of the device, or use another",
        )  # fmt: skip
