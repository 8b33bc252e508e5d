"""What all requests of an artifact share on a device: its engines, their weights, and constants.

Engines come from whoever made the artifact: `engine(name)` gives the bytes that this device loads, under the plan's
names and those of `LoopSpec.kinds`. Their ports are in the plan's dtypes, whatever they compute in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dcc.errors import ArtifactError
from dcc.runtime.artifact import Artifact
from dcc.runtime.device import (
    Array,
    Device,
    DeviceMemoryError,
    Engine,
    EngineRefused,
    HostBuffer,
    Place,
    Region,
    Stream,
    byte_count,
)
from dcc.runtime.device_engines import engine_specs
from dcc.runtime.loop_spec import LoopSpec, loop_spec
from dcc.runtime.plan import Plan, TensorSpec
from dcc.runtime.sampler import SamplerTable

UPLOAD_BYTES = 64 * 2**20  # one piece of a large tensor on its way through pinned memory


@dataclass(frozen=True)
class EngineImage:
    """A serialized engine. `weights` are ports that hold weights, each with the key of its tensor."""

    data: bytes
    weights: Mapping[str, str] = field(default_factory=dict)


EngineSource = Callable[[str], EngineImage | bytes]
WeightSource = Callable[[str], tuple[str, Array]]
# Given an engine's name and why the device refused it: another one, or None where there is none to be had.
Rebuild = Callable[[str, str], bytes | None]


class DeviceModel:
    """Engines, weights and constants of one artifact on one device."""

    def __init__(
        self, artifact: Artifact, device: Device, engine: EngineSource, weight: WeightSource | None = None,
        rebuild: Rebuild | None = None,
    ) -> None:  # fmt: skip
        """`weight(key)` gives dtype and values of the tensors that `EngineImage.weights` names.

        Everything but the timestep engines is loaded: only `denoise` needs those. `rebuild` is asked for what the
        device refuses. Raises ArtifactError where an engine is missing, DeviceError where one cannot be used here.
        """
        self.artifact, self.device = artifact, device
        self.plan: Plan = artifact.plan
        table = artifact.manifest["sampler"]
        self.sampler: SamplerTable | None = None if table is None else SamplerTable.from_json(table)
        self.guidance: dict[str, Any] = artifact.manifest["guidance"]
        self.loop: LoopSpec | None = None
        if self.sampler is not None:
            self.loop = loop_spec(self.plan, self.sampler, self.guidance)
        self.specs = engine_specs(self.plan, self.loop)
        self._engine_source, self._weight_source, self._rebuild = engine, weight, rebuild
        self._engines: dict[str, Engine] = {}
        self._images: dict[str, Mapping[str, str]] = {}
        self._weights: dict[str, Place] = {}
        self._owned: list[Region] = []
        self._lock = threading.Lock()
        device.activate()
        free = device.memory().free
        self._stream = device.stream()
        self.constants: dict[str, Place] = {}
        try:
            self._load()
        except DeviceMemoryError as error:
            self.close()
            raise self._no_room(error, free) from error
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        weights = {weight.name: weight for weight in self.plan.weights}
        for constant in self.plan.constants:
            if not constant.per_call and not constant.rows:
                spec = weights[constant.weight]
                self.constants[constant.name] = self._stored(
                    f"constant {constant.name}", spec.dtype, self.artifact.map_weight(spec.name)
                )
        names = [spec.name for spec in self.plan.engines if spec.kind != "timestep"]
        names += [kind.name for kind in self.loop.kinds] if self.loop is not None else []
        for name in names:
            self.engine(name)
        # Engines of a lane never run at once, so the largest one's scratch serves all of them.
        self.scratch_bytes = max((self._engines[name].scratch_bytes for name in names), default=0)

    def constant(self, name: str) -> Array:
        """A constant of the plan, on the host."""
        entry = next(item for item in self.plan.constants if item.name == name)
        return self.artifact.map_weight(entry.weight)

    def engine(self, name: str) -> Engine:
        """The engine, loaded when first asked for. Raises ArtifactError where it has other ports than the plan says."""
        with self._lock:
            if name not in self._engines:
                given = self._engine_source(name)
                image = given if isinstance(given, EngineImage) else EngineImage(given)
                engine = self._accepted(name, image.data)
                self._check_ports(name, engine, image)
                self._images[name] = image.weights
                for key in image.weights.values():
                    self._upload_weight(name, key)
                self._engines[name] = engine
            return self._engines[name]

    def _accepted(self, name: str, data: bytes) -> Engine:
        """The engine on the device: this one, or what `rebuild` gives in its place. Raises EngineRefused otherwise."""
        while True:
            try:
                return self.device.load(name, data)
            except EngineRefused as refused:
                other = None if self._rebuild is None else self._rebuild(name, refused.reason)
                if other is None:
                    raise
                data = other

    def _no_room(self, error: DeviceMemoryError, free: int) -> DeviceMemoryError:
        """What is said where not even the model itself fits into what was `free` before."""
        wanted = free - error.free + error.wanted
        return DeviceMemoryError(
            "the model does not fit into the device's memory", wanted, free, at=error.details.get("at"),
            got=f"{free / 2**20:.1f} MiB free", want=f"{wanted / 2**20:.1f} MiB or more, before any request",
            next="free memory of the device, use another, or load with backend onnxruntime",
        )  # fmt: skip

    def weight_places(self, name: str) -> dict[str, Place]:
        """Where an engine's ports for weights read."""
        return {port: self._weights[key] for port, key in self._images[name].items()}

    def _upload_weight(self, engine: str, key: str) -> None:
        if key in self._weights:
            return
        if self._weight_source is None:
            raise ArtifactError("an engine reads weights that nobody gives", at=f"engine {engine}", got=key)
        dtype, values = self._weight_source(key)
        self._weights[key] = self._stored(f"weight {key}", dtype, values)

    def _check_ports(self, name: str, engine: Engine, image: EngineImage) -> None:
        inputs, outputs = self._wanted_ports(name)
        wanted = {port.name: (port.dtype, len(port.shape), False) for port in inputs}
        wanted |= {port.name: (port.dtype, len(port.shape), True) for port in outputs}
        got = {
            port.name: (port.dtype, len(port.shape), port.output)
            for port in engine.ports.values() if port.name not in image.weights
        }  # fmt: skip
        wrong = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
        if wrong:
            raise ArtifactError(
                "an engine has other ports than the plan says", at=f"engine {name}, port {wrong[0]}",
                got=_port_text(got.get(wrong[0])), want=_port_text(wanted.get(wrong[0])),
                next="compile the model again",
            )  # fmt: skip

    def _wanted_ports(self, name: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        return self.specs[name].inputs, self.specs[name].outputs

    def _stored(self, label: str, dtype: str, values: Array) -> Place:
        """A new region that holds the values."""
        region = self.device.allocate(byte_count(values.shape, dtype), label)
        self._owned.append(region)
        upload(self.device, self._stream, region, values)
        return Place(region, dtype, values.shape)

    def close(self) -> None:
        """Engines and memory are free; no request may be under way."""
        self._engines.clear()
        for region in self._owned:
            self.device.free(region)
        self._owned.clear()
        self._stream.close()


def upload(device: Device, stream: Stream, target: Region, values: Array) -> None:
    """The region holds the bytes of `values`: piece by piece through pinned memory, done on return."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if not flat.size:
        return
    staging: HostBuffer = device.pinned(min(flat.size, UPLOAD_BYTES), f"upload of {target.label}")
    try:
        for start in range(0, flat.size, UPLOAD_BYTES):
            piece = flat[start : start + UPLOAD_BYTES]
            staging.write(piece)
            stream.upload(target.part(start, piece.size), staging)
            stream.synchronise()
    finally:
        device.free_pinned(staging)


def _port_text(port: tuple[str, int, bool] | None) -> str:
    return "no such port" if port is None else f"{'output' if port[2] else 'input'} {port[0]} of rank {port[1]}"
