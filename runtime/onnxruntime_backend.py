"""The ONNX Runtime backend, on the processor or by its CUDA provider: the only file that knows ONNX Runtime.

Sessions own their thread pools, whose threads spin for a millisecond at most: the process burns nothing between
calls, and other sessions of the host application are left alone (a global pool would make them raise). Where a step
has many engines, their sessions share one memory arena, which makes them nearly as fast as one. Weights are mapped
from the artifact's own file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcc.errors import ExecutionError
from dcc.runtime.artifact import EXTERNAL_LOCATION_PLACEHOLDER, Artifact, external_location
from dcc.runtime.layers import Layer

Array = np.ndarray[Any, np.dtype[Any]]

# How long an idle thread of a session spins before it sleeps. Long enough to bridge the gaps between operations, and
# where the step is one engine between steps; short where the next engine's threads need the processors. ONNX Runtime's
# default spins for tens of milliseconds after every run; without spinning a batch of one is some 10 % slower.
SPIN_MICROSECONDS = {"one engine": "1000", "several": "100"}

CUDA_PROVIDER = "CUDAExecutionProvider"

_once = threading.Lock()
_arena_ready = False
_pool_ready = False


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExecutionError(
            "ONNX Runtime is not installed", want="onnxruntime 1.30 or newer", next="pip install 'dcc[cpu]'"
        ) from error
    return onnxruntime


def cuda_missing() -> str | None:
    """Why the CUDA provider cannot be used, or None."""
    try:
        providers = _onnxruntime().get_available_providers()
    except ExecutionError as error:
        return error.what
    return None if CUDA_PROVIDER in providers else "this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu"


def _share_arena() -> None:
    """One CPU arena for all sessions that ask for it; registered once in a process, by us or by the host."""
    global _arena_ready
    with _once:
        if _arena_ready:
            return
        ort = _onnxruntime()
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        # Registered already, by the host application: sessions use that one.
        with contextlib.suppress(Exception):
            ort.create_and_register_allocator(memory, None)
        _arena_ready = True


def _share_pool(threads: int) -> None:
    """One thread pool for all sessions of the process: from now on every other session must ask for it as well."""
    global _pool_ready
    with _once:
        if not _pool_ready:
            _onnxruntime().set_global_thread_pool_sizes(threads, 1)
            _pool_ready = True


def default_threads() -> int:
    """The processors that this process may use; 0 (ONNX Runtime's own choice) where it may use all of them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return 0 if allowed == os.cpu_count() else allowed


class OnnxRuntimeBackend:
    """Sessions for the engines of one artifact, made when first asked for."""

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        low_memory: bool = False,
        own_process: bool = False,
        several: bool = False,
        optimize: bool = True,
        layer: Layer | None = None,
        cuda_device: int | None = None,
    ) -> None:
        """`several` says that a step will have several engines although the artifact's has one.

        Without `optimize` every node runs as it is written. `layer` gives the typed graphs that run in place of the
        portable engines. `cuda_device` is the GPU that runs them; what enters and leaves an engine stays on the host.
        """
        self._optimize = optimize
        self._layer = layer
        self._cuda_device = cuda_device
        self._artifact = artifact
        self._threads = default_threads() if threads is None else threads
        self._low_memory = low_memory
        self._sessions: dict[str, Any] = {}
        self._models: dict[str, bytes] = {}
        self._light: set[str] = set()
        self._lock = threading.Lock()
        # One engine a step is a little faster with memory of its own; several are much faster with common memory.
        self._several = several or sum(engine.kind == "step" for engine in artifact.plan.engines) > 1
        # A step of several engines wakes the threads of each in turn, unless all share one pool.
        self._shared_pool = own_process and self._several
        if own_process:
            # A host application decides for itself.
            _onnxruntime().disable_telemetry_events()
        if self._several:
            _share_arena()
        if self._shared_pool:
            _share_pool(self._threads)

    def provide(self, engine: str, model: bytes) -> None:
        """The engine has this model, whose weights lie in the artifact; used where plans are tried out."""
        placeholder = EXTERNAL_LOCATION_PLACEHOLDER.encode("ascii")
        if placeholder not in model:
            self._light.add(engine)
        self._models[engine] = model.replace(placeholder, external_location(Path(self._artifact.path).name))

    def model(self, engine: str) -> bytes:
        """The engine's ONNX model, its weights located in the artifact."""
        if engine in self._models:
            return self._models[engine]
        if self._layer is not None:
            return self._artifact.layer_graph(self._layer, engine)
        return self._artifact.engine_model(engine)

    def session(self, engine: str) -> Any:
        """The engine's session. Raises ExecutionError where ONNX Runtime refuses the model."""
        with self._lock:
            if engine not in self._sessions:
                self._sessions[engine] = self._create(engine)
            return self._sessions[engine]

    def _create(self, engine: str) -> Any:
        ort = _onnxruntime()
        # What is wrong with the artifact is not what ONNX Runtime refuses.
        model, options = self.model(engine), self._session_options(engine)
        try:
            session = ort.InferenceSession(model, options, providers=self._providers())
        except Exception as error:  # ONNX Runtime raises its own family of types
            raise ExecutionError(
                "ONNX Runtime refuses an engine of the artifact", at=engine, got=str(error).splitlines()[0][:300],
                want=f"a model for opset 23; this is onnxruntime {ort.__version__}",
                next="upgrade onnxruntime, or compile the model again with this version",
            ) from error  # fmt: skip
        if self._cuda_device is not None and CUDA_PROVIDER not in session.get_providers():
            # ONNX Runtime only warns, and would run on the processor.
            raise ExecutionError(
                "ONNX Runtime cannot use the GPU", at=engine, got=", ".join(session.get_providers()),
                want=CUDA_PROVIDER, next="check that CUDA and cuDNN of onnxruntime-gpu's version are installed",
            )  # fmt: skip
        return session

    def _session_options(self, engine: str) -> Any:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        # Once the process has a common pool, ONNX Runtime refuses sessions with pools of their own.
        shared = self._shared_pool or _pool_ready
        if shared:
            options.use_per_session_threads = False
        else:
            # Plans that are tried out bring many engines without weights: pools of their own would fill the process.
            options.intra_op_num_threads = 1 if engine in self._light else self._threads
            options.inter_op_num_threads = 1
        options.log_severity_level = 3
        entries = {
            "session.intra_op.spin_duration_us": SPIN_MICROSECONDS["several" if self._several else "one engine"],
            "session.model_external_initializers_file_folder_path": self._artifact.folder,
        }
        if shared:
            del entries["session.intra_op.spin_duration_us"]
        if self._several:
            entries["session.use_env_allocators"] = "1"
        if self._low_memory:
            entries["session.disable_prepacking"] = "1"
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if not self._optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    def _providers(self) -> list[Any]:
        processor = "CPUExecutionProvider"
        if self._cuda_device is None:
            return [processor]
        return [(CUDA_PROVIDER, {"device_id": self._cuda_device}), processor]

    def close(self) -> None:
        """Sessions are gone, and with them their threads and packed weights."""
        with self._lock:
            self._sessions.clear()

    def bind(self, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Binding:
        """The engine reading and writing these arrays in place, each time it runs."""
        return Binding(self.session(engine), engine, inputs, outputs)


class Binding:
    """One engine bound to preallocated arrays; they must stay contiguous and where they are."""

    def __init__(self, session: Any, engine: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        ort = _onnxruntime()
        self._session = session
        self._engine = engine
        self._binding = session.io_binding()
        self._arrays = (*inputs.values(), *outputs.values())
        for array in self._arrays:
            # A copy would be bound silently, and its results lost.
            if not array.flags.c_contiguous:
                raise ExecutionError("an engine is bound to an array that is not contiguous", at=engine)
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))

    def run(self) -> None:
        """The outputs hold the engine's results for what the inputs hold now."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises its own family of types
            raise ExecutionError("an engine failed", at=self._engine, got=str(error).splitlines()[0][:300]) from error


class CpuModel:
    """An ONNX model as a function on this processor, with one thread; `folder` holds its external data, if any."""

    def __init__(self, name: str, model: bytes, folder: str | None = None) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        if _pool_ready:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._name = name
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own family of types
            got = str(error).splitlines()[0][:300]
            raise ExecutionError("ONNX Runtime refuses a model", at=name, got=got) from error
        self.inputs = {port.name: _port(port) for port in self._session.get_inputs()}
        self.outputs = {port.name: _port(port) for port in self._session.get_outputs()}

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name."""
        try:
            results = self._session.run(list(self.outputs), dict(values))
        except Exception as error:  # ONNX Runtime raises its own family of types
            raise ExecutionError("an engine failed", at=self._name, got=str(error).splitlines()[0][:300]) from error
        return dict(zip(self.outputs, results, strict=True))


_ORT_DTYPES = {"float": "float32", "double": "float64"}


def _port(port: Any) -> tuple[str, tuple[int | str, ...]]:
    kind = str(port.type).removeprefix("tensor(").removesuffix(")")
    # A dimension without a name may have any size.
    shape = (f"{port.name}.{axis}" if size is None else size for axis, size in enumerate(port.shape))
    return _ORT_DTYPES.get(kind, kind), tuple(shape)
