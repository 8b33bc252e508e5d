"""The torch-free runtime: read an artifact, run the compiled sampling loop. Needs numpy and a backend."""

from __future__ import annotations

if __name__ != "dcc.runtime":
    raise ImportError("import this package as dcc.runtime: a second copy of its classes must not exist")

from dcc.runtime.artifact import Artifact
from dcc.runtime.loaded import LoadedArtifact, Progress, load
from dcc.runtime.noise import Generator, Noise
from dcc.runtime.sampler import SamplerTable

__all__ = ["Artifact", "Generator", "LoadedArtifact", "Noise", "Progress", "SamplerTable", "load"]
