"""Engines of a layer for the device that is there: those of the artifact, or built here once and kept beside it.

A layer without engines is built by its library where it is loaded first. So is one whose engines the device refuses:
the typed graphs and the weights are in the artifact, whatever was built from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcc.errors import ExportError
from dcc.runtime.artifact import Artifact
from dcc.runtime.container import WEIGHTS_MEMBER
from dcc.runtime.device_engines import engine_specs, profile_rows
from dcc.runtime.engine_cache import FORMAT, EngineCache, default_folder
from dcc.runtime.layers import Layer, holds_engines
from dcc.runtime.loop_spec import loop_spec
from dcc.runtime.network_record import check_network
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.tensorrt_builder import BuildRequest, TensorRt, serialize

Told = Callable[[str], None]


class LayerEngines:
    """`engine(name)` gives what the device loads; `rebuild(name, reason)` what it loads where it refused that."""

    def __init__(
        self, artifact: Artifact, layer: Layer, device: str, capability: int, cache: EngineCache | None = None,
        told: Told = lambda _: None, backend: str = "",
    ) -> None:  # fmt: skip
        """`device` and `capability` are those of the GPU; engines that are built are kept in `cache`.

        `backend` names the library where it is not the layer's own: graphs are the same for all of them.
        """
        self._artifact, self._layer, self._told = artifact, layer, told
        self._device, self._capability = device, capability
        self._cache, self._backend = cache, backend or layer.backend
        self._library: TensorRt | None = None
        table = artifact.manifest["sampler"]
        sampler = None if table is None else SamplerTable.from_json(table)
        guidance = artifact.manifest["guidance"]
        self._specs = engine_specs(
            artifact.plan, None if sampler is None else loop_spec(artifact.plan, sampler, guidance)
        )
        self.built: list[str] = []
        self._found: set[str] = set()

    @property
    def ready(self) -> bool:
        """The artifact holds engines for this device and library."""
        return self._backend == self._layer.backend and holds_engines(self._layer, self._device, self._capability)

    def engine(self, name: str) -> bytes:
        """Raises ArtifactError where the layer lacks the engine, ExportError where it cannot be built here."""
        if self.ready:
            return self._artifact.layer_engine(self._layer, name)
        return self._made(name, "")

    def rebuild(self, name: str, reason: str) -> bytes | None:
        """Another engine for this very device than the one it refused, None where that one was built here just now."""
        return None if name in self.built else self._made(name, reason)

    def _made(self, name: str, refused: str) -> bytes:
        """The engine from its graph: found in the cache, unless that is the one that was `refused`, or built now."""
        graph = self._artifact.layer_graph(self._layer, name)
        library = self._found_library()
        # A library that names capabilities builds for this one alone; the others build for the GPU that is there.
        capabilities = (self._capability,) if library.capabilities else ()
        request = BuildRequest(
            name, graph, capabilities, profile_rows(self._artifact.plan, self._specs[name]),
            Path(self._artifact.folder), device="" if library.capabilities else self._device,
        )  # fmt: skip
        key = self._key(request, library)
        found = self._cached(name, key)
        if found is not None:
            return found
        if self._cache is None:
            return self._build(request, library, refused)
        waiting = f"waiting for another process that builds {name} for {self._device}"
        with self._cache.building(key, lambda: self._told(waiting)):
            # Somebody else may have built it meanwhile.
            found = self._cached(name, key)
            if found is None:
                found = self._build(request, library, refused)
                facts = {"engine": name, "device": self._device, "version": library.version}
                self._cache.put(key, facts, found)
            return found

    def _cached(self, name: str, key: str) -> bytes | None:
        """The engine in the cache, which is given once: whoever asks again was refused it."""
        if self._cache is None or name in self._found:
            return None
        found = self._cache.get(key)
        if found is None:
            return None
        self._found.add(name)
        return found[1]

    def _build(self, request: BuildRequest, library: TensorRt, refused: str) -> bytes:
        why = f", which refused the one that was there: {refused}" if refused else ""
        self._told(f"building {request.name} for {self._device}{why}")
        data, record, _ = serialize(request, library)
        check_network(record, self._specs[request.name])
        self.built.append(request.name)
        return bytes(data)

    @property
    def problem(self) -> str | None:
        """Why engines that were built could not be kept."""
        return None if self._cache is None else self._cache.problem

    def _found_library(self) -> TensorRt:
        if self._library is None:
            flavour = self._backend
            if flavour not in ("tensorrt", "tensorrt-rtx"):
                raise ExportError("this backend builds no engines", got=flavour, want="tensorrt or tensorrt-rtx")
            self._library = TensorRt.find("tensorrt" if flavour == "tensorrt" else "tensorrt-rtx")
        return self._library

    def _key(self, request: BuildRequest, library: TensorRt) -> str:
        """Equal for requests that give equal engines: hashes of graph and weights stand for their bytes."""
        members: dict[str, Any] = self._artifact.manifest["members"]
        facts = {
            "format": FORMAT, "graph": members[self._layer.graphs[request.name]]["sha256"],
            "weights": members.get(WEIGHTS_MEMBER, {}).get("sha256", ""), "library": library.flavour,
            "version": library.version, "device": self._device, "capability": self._capability, "rows": request.rows,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cache_beside(artifact: Artifact) -> EngineCache:
    """Where engines that were built for an artifact are kept: a folder beside it, named after it.

    Where that cannot be written, as in an image that is read-only, they are in the user's own cache.
    """
    return EngineCache(f"{artifact.path}.engines", EngineCache(default_folder()))
