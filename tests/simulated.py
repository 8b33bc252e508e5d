"""Artifacts on the simulated device, watched: what the tests of the device loop share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from compiled import relative_difference
from example_artifact import CALLS, write_example

from dcc.exports.update_engines import update_engines
from dcc.runtime.artifact import Artifact
from dcc.runtime.device_loop import DeviceArtifact
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.loop_spec import loop_spec
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend
from dcc.runtime.plan_witness import Witness
from dcc.runtime.sampler import SamplerCall, SamplerTable
from dcc.runtime.simulated_device import SimulatedDevice

LIMIT = 2e-5  # float32 against float32, sums in another order, and sampler tables in float64


def engine_source(loaded: LoadedArtifact) -> Callable[[str], bytes]:
    """The portable engines, and the updates made for them."""
    updates = update_engines(loaded.plan, loaded.sampler, loaded.guidance)[1] if loaded.sampler is not None else {}
    return lambda name: updates[name] if name in updates else loaded.artifact.engine_model(name)


def simulated_device(loaded: LoadedArtifact, kind: type[SimulatedDevice] = SimulatedDevice) -> SimulatedDevice:
    return kind(folder=loaded.artifact.folder)


def loaded_example(path: Path, draws: bool = False) -> LoadedArtifact:
    """A complete artifact of a few kilobytes on the processor, guided, with three sampler calls."""
    write_example(path)
    opened = Artifact.open(path)
    row = (0.9, -0.3, 0.0, 0.1 if draws else 0.0)
    call = SamplerCall(5, 1.0, None, (row,), None, int(draws), "float32", 0)
    table = SamplerTable("plain", "Plain", "epsilon", 1, "float32", 1, 1.0, None, None, (call,) * CALLS)
    opened.manifest["sampler"] = table.to_json()
    return LoadedArtifact(opened, OnnxRuntimeBackend(opened, 1))


class Watched:
    """An artifact on the simulated device beside the one on the processor."""

    def __init__(self, loaded: LoadedArtifact, device: SimulatedDevice | None = None, lanes: int = 1) -> None:
        self.loaded = loaded
        self.device = device if device is not None else simulated_device(loaded)
        self.on_device = DeviceArtifact(loaded.artifact, self.device, engine_source(loaded), lanes=lanes)
        loop = None
        if loaded.sampler is not None:
            loop = loop_spec(loaded.plan, loaded.sampler, loaded.guidance)
        self.witness = Witness(loaded.artifact, loop, loaded.sampler)
        self.device.observers.append(self.witness)

    def sample(self, conditions: dict[str, Any] | None = None, **options: Any) -> np.ndarray:
        """Samples from the device, every launch of which was looked at."""
        names = ("negative_conditions", "images", "guidance_scale", "seed", "noise")
        given = [options.get(name) for name in names]
        given[3] = options.get("seed", 0)
        given.append(options.get("generator", "cpu"))
        self.witness.expect_sample(self.on_device._rules.generation(conditions or {}, *given))
        result = self.on_device.sample(conditions, **options)
        self.witness.finish()
        return result

    def denoise(self, **inputs: Any) -> np.ndarray:
        self.witness.expect_denoise(self.on_device._rules.forward(inputs))
        result = self.on_device.denoise(**inputs)
        self.witness.finish()
        return result

    def check(self, conditions: dict[str, Any] | None = None, limit: float = LIMIT, **options: Any) -> None:
        """The device samples what the processor does: once as it is asked for, and once from graphs."""
        wanted = self.loaded.sample(conditions, **options)
        for _ in range(2):
            assert relative_difference(self.sample(conditions, **options), wanted) <= limit
