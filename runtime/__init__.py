"""The torch-free runtime: read an artifact, run the compiled sampling loop. Needs numpy and a backend."""

from __future__ import annotations

if __name__ != "dcc.runtime":
    raise ImportError("import this package as dcc.runtime: a second copy of its classes must not exist")

from dcc.runtime.artifact import Artifact
from dcc.runtime.device_loop import DeviceArtifact
from dcc.runtime.loaded import LoadedArtifact, Progress
from dcc.runtime.loading import CompiledDenoiser, load
from dcc.runtime.noise import Generator, Noise
from dcc.runtime.sampler import SamplerTable

__all__ = [
    "Artifact", "CompiledDenoiser", "DeviceArtifact", "Generator", "LoadedArtifact", "Noise", "Progress",
    "SamplerTable", "load",
]  # fmt: skip
