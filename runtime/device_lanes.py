"""Streams with scratch memory and workspaces, as many as requests may run side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from dcc.errors import ExecutionError
from dcc.runtime.device import DeviceMemoryError, Region, Stream
from dcc.runtime.device_layout import Size
from dcc.runtime.device_model import DeviceModel
from dcc.runtime.device_request import DeviceRequests
from dcc.runtime.loaded import KEPT_WORKSPACES


class Lane:
    """A stream with scratch memory and workspaces; one request at a time."""

    def __init__(self, model: DeviceModel, number: int) -> None:
        """Raises DeviceMemoryError where the engines' scratch memory does not fit."""
        self.model = model
        self._number = number
        self._timestep_scratch: Region | None = None
        self._requests: dict[Size, DeviceRequests] = {}
        try:
            self._scratch = model.device.allocate(max(model.scratch_bytes, 1), f"scratch of lane {number}")
        except DeviceMemoryError as error:
            raise _no_scratch(model, error) from error
        try:
            self.stream: Stream = model.device.stream()
        except BaseException:
            model.device.free(self._scratch)
            raise

    def requests(self, size: Size) -> DeviceRequests:
        """The workspace for this size. Others of the lane make room where the device has none left."""
        found = self._requests.pop(size, None)
        while found is None:
            try:
                found = DeviceRequests(self.model, size, self.stream, self._scratch)
            except DeviceMemoryError:
                if not self.drop_oldest():
                    raise
        self._requests[size] = found
        while len(self._requests) > KEPT_WORKSPACES:
            self.drop_oldest()
        return found

    def timestep_scratch(self) -> Region:
        """Scratch for the timestep engines, which are loaded now."""
        if self._timestep_scratch is None:
            engines = [self.model.engine(call.engine) for call in self.model.plan.timestep]
            nbytes = max((engine.scratch_bytes for engine in engines), default=0)
            label = f"timestep scratch of lane {self._number}"
            self._timestep_scratch = self.model.device.allocate(max(nbytes, 1), label)
        return self._timestep_scratch

    def drop_oldest(self) -> bool:
        """The workspace that was used longest ago is gone; False where there is none."""
        if not self._requests:
            return False
        self._requests.pop(next(iter(self._requests))).close()
        return True

    def close(self) -> None:
        """Its memory is free."""
        while self.drop_oldest():
            pass
        for region in (self._scratch, self._timestep_scratch):
            if region is not None:
                self.model.device.free(region)
        self._timestep_scratch = None
        self.stream.close()


class Lanes:
    """Up to `most` lanes, made as they are needed: the first one at once. Safe to use from several threads."""

    def __init__(self, model: DeviceModel, most: int) -> None:
        self.model, self._most = model, most
        self.every: list[Lane] = [Lane(model, 0)]
        self._free: list[Lane] = list(self.every)
        self._owners: set[int] = set()
        self._change = threading.Condition()
        self._closed = self._released = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[Lane]:
        """A lane that nobody else has; when it is given back, nothing is under way on it."""
        owner = threading.get_ident()
        lane = self._take(owner)
        try:
            yield lane
        finally:
            try:
                # After an error the buffers of this request may still be read from.
                lane.stream.synchronise()
            finally:
                with self._change:
                    self._owners.discard(owner)
                    self._free.append(lane)
                    # Everybody: whoever closes waits here as well as whoever wants a lane.
                    self._change.notify_all()

    def drop_unused(self) -> bool:
        """Workspaces of lanes that nobody has are gone; False where there were none."""
        with self._change:
            dropped = False
            for lane in self._free:
                while lane.drop_oldest():
                    dropped = True
            return dropped

    def close(self) -> None:
        """All memory of lanes and model is free, once the requests under way are done."""
        with self._change:
            if threading.get_ident() in self._owners:
                raise ExecutionError("a callback cannot close the artifact that is calling it")
            self._closed = True
            self._change.notify_all()
            while len(self._free) < len(self.every):
                self._change.wait()
            self.release()

    def release(self) -> None:
        """All memory is free; no request may be under way."""
        self._closed = True
        if self._released:
            return
        self._released = True
        self.model.device.activate()
        for lane in self.every:
            lane.close()
        self.every.clear()
        self._free.clear()
        self.model.close()

    def _take(self, owner: int) -> Lane:
        with self._change:
            if owner in self._owners:
                raise ExecutionError("a callback cannot start a request on the artifact that is calling it")
            self.model.device.activate()
            while not self._free or self._closed:
                if self._closed:
                    raise ExecutionError("the artifact was closed", next="load it again")
                if len(self.every) >= self._most:
                    self._change.wait()
                    continue
                try:
                    self._free.append(Lane(self.model, len(self.every)))
                    self.every.append(self._free[-1])
                except DeviceMemoryError:
                    # There is no room for requests side by side: they queue.
                    self._most = len(self.every)
            self._owners.add(owner)
            return self._free.pop()


def _no_scratch(model: DeviceModel, error: DeviceMemoryError) -> DeviceMemoryError:
    most = model.plan.symbols["B"][1]
    fit = most * error.free // max(error.wanted, 1)
    return DeviceMemoryError(
        "the engines' scratch memory does not fit into the device's memory", error.wanted, error.free,
        at=error.details.get("at"), got=f"{error.free / 2**20:.1f} MiB free",
        want=f"{error.wanted / 2**20:.1f} MiB for {most} rows, the most that the artifact takes",
        next=f"compile with a smaller --max-batch (about {fit} rows fit), or free memory of the device",
    )  # fmt: skip
