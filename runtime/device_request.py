"""Requests of one size on one stream: what goes to the device, what runs there, what comes back.

Inside the loop the host asks for work and draws noise; it waits for nothing, allocates nothing, and every copy is
between places that do not move. It waits once at the end, and after each call where a callback wants the latent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from dcc.errors import Cancelled, ExecutionError
from dcc.runtime.device import Array, DeviceMemoryError, Region, Stream, byte_count
from dcc.runtime.device_layout import Size
from dcc.runtime.device_model import DeviceModel
from dcc.runtime.device_steps import StepKey, Steps
from dcc.runtime.device_workspace import DeviceWorkspace
from dcc.runtime.loop_spec import LoopSpec, with_scale
from dcc.runtime.plan import Ref
from dcc.runtime.request_rules import Forward, Generation
from dcc.runtime.workspace import concrete

Told = Callable[[int, Array], bool | None]


class DeviceRequests:
    """Runs requests of one size, one at a time."""

    def __init__(self, model: DeviceModel, size: Size, stream: Stream, scratch: Region) -> None:
        self.space = DeviceWorkspace(model, size, stream, scratch)
        self._model, self._plan, self._stream = model, model.plan, stream
        self.steps = Steps(self.space, model.loop) if size.calls and model.loop is not None else None
        free = model.device.memory().free
        try:
            self._bind()
        except DeviceMemoryError as error:
            contexts = free - model.device.memory().free + error.wanted
            self.close()
            raise self.space.no_room(contexts) from error
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        """Every engine that a sample needs is bound: contexts take memory, which must be there before the loop."""
        loop, steps, sampler = self._model.loop, self.steps, self._model.sampler
        if loop is None or steps is None or sampler is None:
            return
        for call in self._plan.request:
            self.space.request_call(call)
        for number in range(len(self.space.size.chunks())):
            for call in self._plan.table:
                self.space.table_call(call, number)
        steps.bind(self._keys(loop, self.space.size.guided))

    def _keys(self, loop: LoopSpec, guided: bool) -> list[StepKey]:
        """The step of each sampler call."""
        updates = loop.calls(guided)
        modes = [mode.mode == "both" for mode in self._plan.guidance] or [True] * len(updates)
        return [
            StepKey(program, update.kind, guided and both)
            for program, update, both in zip(self._plan.order, updates, modes, strict=True)
        ]

    def close(self) -> None:
        """Graphs, contexts and memory are free."""
        if self.steps is not None:
            self.steps.close()
        self.space.close()

    def sample(self, asked: Generation, told: Told | None, cancel: threading.Event | None) -> Array:
        """The samples, float32."""
        self._loop(asked, told, cancel)
        latent = self._latent()
        direct = self._model.sampler is not None and self._model.sampler.variance == "direct"
        if direct and not np.isfinite(latent).all():
            raise ExecutionError("the model predicts a negative variance, or values without end", got="samples of nan")
        return latent

    def sample_into(self, target: Region, asked: Generation, told: Told | None, cancel: threading.Event | None) -> None:
        """The samples are in `target`, which lies in device memory."""
        self._loop(asked, told, cancel)
        self._stream.copy(target, self.space.region("register 0"))
        self._stream.synchronise()

    def _loop(self, asked: Generation, told: Told | None, cancel: threading.Event | None) -> None:
        """All sampler calls are asked for; the samples will be in register 0."""
        self._begin(asked)
        sampler, steps = self._model.sampler, self.steps
        if sampler is None or steps is None or self._model.loop is None:
            raise ExecutionError("the artifact was compiled without a sampler: it can only denoise")
        keys, kinds = self._keys(self._model.loop, asked.guided), self._model.loop.kinds
        block, blocks = self.space.region("call block"), self.space.region("call blocks")
        for call, (entry, key) in enumerate(zip(sampler.calls, keys, strict=True)):
            if cancel is not None and cancel.is_set():
                raise Cancelled("the request was cancelled", at=f"sampler call {call} of {len(keys)}")
            self._stream.copy(block, blocks.part(call * block.nbytes, block.nbytes))
            if entry.draws:
                noise = asked.source.draw(asked.start.shape[1:], entry.draw_dtype)
                if kinds[key.kind].noise:
                    self._send_noise(noise)
            steps.run(key)
            if told is not None and told(call, self._latent()) is False:
                raise Cancelled("the callback stopped the request", at=f"sampler call {call} of {len(keys)}")

    def denoise(self, asked: Forward, scratch: Region) -> Array:
        """The denoiser's output for these inputs; `scratch` is for the timestep engines."""
        space, stream = self.space, self._stream
        for name, values in asked.inputs.items():
            self._send(f"input {name}", values)
        self._run_request_calls()
        for call in self._plan.timestep:
            space.timestep_call(call, scratch).enqueue(stream)
        for call in self._plan.table:
            space.table_call(call, 0).enqueue(stream)
        sources = {"timestep": "timestep port {}, run 0", "table": "table port {}", "input": "input {}"}
        for ref, entry in space.layout.block.items():
            source = space.region(sources[ref.kind].format(ref.name))
            stream.copy(space.entry(ref), source.part(0, entry.nbytes))
        for call in self._plan.step_programs[self._plan.order[0] if self._plan.order else 0]:
            space.step_call(call, asked.rows).enqueue(stream)
        output = self._plan.output
        shape = concrete(output.shape, asked.rows)
        result = space.pinned("result")
        stream.download(result, space.region(f"output {output.name}").part(0, byte_count(shape, output.dtype)))
        stream.synchronise()
        return result.read(output.dtype, shape)

    def _begin(self, asked: Generation) -> None:
        """Inputs, request ports, the rows of tables and coefficients are on the device; the latent is the start's."""
        loop, space, stream = self._model.loop, self.space, self._stream
        if loop is None:
            raise ExecutionError("the artifact was compiled without a sampler: it can only denoise")
        self._noise_sent = 0
        for name, values in asked.conditions.items():
            self._send(f"input {name}", values)
        self._run_request_calls()
        self._run_tables()
        self._send("start values", np.asarray(loop.start_values, np.float32))
        rows = np.zeros((space.size.calls, loop.coefficients), np.float32)
        for index, update in enumerate(loop.calls(asked.guided)):
            entries = with_scale(loop.kinds[update.kind], update.values, asked.scale)
            rows[index, : len(entries)] = entries
        self._send("coefficients", rows)
        space.coefficients_to_blocks()
        for index in range(1, loop.registers):
            stream.fill(space.region(f"register {index}"))
        self._send_noise(asked.start)
        if self.steps is not None:
            self.steps.start()

    def _run_request_calls(self) -> None:
        for call in self._plan.request:
            self.space.request_call(call).enqueue(self._stream)

    def _run_tables(self) -> None:
        """Table engines once for all sampler calls of a run; their rows go to the call blocks."""
        space = self.space
        if not self._plan.table:
            return
        chunks = space.size.chunks()
        for label in (label for label in space.layout.regions if label.endswith(", repeated")):
            self._repeat(space.region(label), space.region(label.removesuffix(", repeated")))
        for number, chunk in enumerate(chunks):
            for call in self._plan.table:
                space.table_call(call, number).enqueue(self._stream)
            for port in self._plan.table_ports:
                ref = Ref("table", port.name)
                if ref in space.layout.block:
                    space.to_blocks(ref, space.region(f"table port {port.name}"), chunk)

    def _repeat(self, target: Region, source: Region) -> None:
        """The target holds the source's bytes again and again: what is there is doubled until it is full."""
        self._stream.copy(target.part(0, source.nbytes), source)
        done = source.nbytes
        while done < target.nbytes:
            more = min(done, target.nbytes - done)
            self._stream.copy(target.part(done, more), target.part(0, more))
            done += more

    def _send(self, label: str, values: Array) -> None:
        """The region takes these values, by way of the pinned buffer of the same name."""
        buffer, region = self.space.pinned(label), self.space.region(label)
        buffer.write(values)
        self._stream.upload(region.part(0, values.nbytes), buffer)

    def _send_noise(self, noise: Array) -> None:
        """The next noise goes to its place; each draw has a part of the pinned buffer that is still under way."""
        values = np.ascontiguousarray(noise, np.float32)
        buffer, start = self.space.pinned("noise"), self._noise_sent * values.nbytes
        buffer.write(values, start)
        self._stream.upload(self.space.region("noise"), buffer, start)
        self._noise_sent += 1

    def _latent(self) -> Array:
        """The latent as it is when everything asked for is done."""
        size, latent = self.space.size, next(item for item in self._plan.inputs if item.role == "latent")
        result = self.space.pinned("result")
        self._stream.download(result, self.space.region("register 0"))
        self._stream.synchronise()
        return result.read("float32", concrete(latent.shape, size.images))
