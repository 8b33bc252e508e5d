"""TensorRT engines for `cuda_device.py`: `tensorrt` 10 and 11 and `tensorrt_rtx`, which have one Python API.

Scratch memory is the executor's (`USER_MANAGED`), shared by engines that never run at once. A context is bound once
and keeps its shapes and addresses, because a captured graph holds them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dcc.runtime.device import DeviceError, DeviceMemoryError, EngineRefused, Place, Port, Region, Stream, check_places

# What TensorRT says where memory is short: such an engine fits the device, and building it again would not help.
NO_ROOM = ("outofmemory", "out of memory", "cuda error 2", "bad_alloc")
# TensorRT's names of types that ports may have.
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
# What is called of each class: tests look every name up in the libraries that are installed.
METHODS = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context", "device_memory_size_v2", "get_tensor_dtype", "get_tensor_mode", "get_tensor_name",
        "get_tensor_shape", "num_io_tensors",
    ),
    "IExecutionContext": (
        "execute_async_v3", "infer_shapes", "set_device_memory", "set_input_shape", "set_tensor_address",
    ),
}  # fmt: skip
# RTX compiles kernels on the device: what this needs exists there alone.
RTX_METHODS = {
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"),
}


class TensorRtLoader:
    """Makes engines of one library for one device, `free()` bytes of whose memory are free."""

    def __init__(self, flavour: str, device: str, capability: int, free: Callable[[], int] = lambda: 0) -> None:
        name = flavour.replace("-", "_")
        try:
            self.library: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise DeviceError(f"{flavour} is not installed", next=f"pip install 'dcc[{flavour}]'") from error
        except (ImportError, OSError, RuntimeError) as error:
            got = (str(error).splitlines() or [""])[0]
            raise DeviceError(f"{flavour} cannot be loaded", got=got, next=f"pip install 'dcc[{flavour}]'") from error
        self.flavour, self._device, self._capability, self._free = flavour, device, capability, free
        self._errors: list[str] = []
        self._logger = self._make_logger()
        self._runtime = self.library.Runtime(self._logger)

    def load(self, name: str, data: bytes) -> TensorRtEngine:
        """The engine. Raises EngineRefused or DeviceMemoryError with the library's reason."""
        engine = self._deserialize(data)
        if engine is not None:
            return TensorRtEngine(self.library, self.flavour, name, engine)
        reason = next((line for line in self._errors if line), "no reason given")[:300]
        if any(word in line.lower() for line in self._errors for word in NO_ROOM):
            free = self._free()
            raise DeviceMemoryError(
                "the device has no room for an engine", len(data), free, at=f"engine {name}",
                got=f"{free / 2**20:.1f} MiB free: {reason}", want=f"{len(data) / 2**20:.1f} MiB or more",
            )  # fmt: skip
        raise EngineRefused(
            "an engine does not fit this device", reason, at=f"engine {name}",
            want=f"an engine for {self._device}, compute capability {self._capability}, made by {self.flavour} "
            f"{self.library.__version__}",
            next="dcc build MODEL.dcc --target local on this machine, or load with backend onnxruntime",
        )  # fmt: skip

    def _deserialize(self, data: bytes) -> Any:
        self._errors.clear()
        try:
            return self._runtime.deserialize_cuda_engine(data)
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:
            self._errors.append(str(error) or type(error).__name__)
            return None

    def _make_logger(self) -> Any:
        errors = self._errors
        base: Any = self.library.ILogger

        class Logger(base):
            """Keeps errors for the message, and says nothing."""

            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                    errors.append(text)

        return Logger()


class TensorRtEngine:
    """Implements `Engine`."""

    def __init__(self, library: Any, flavour: str, name: str, engine: Any) -> None:
        self.name = name
        self._library, self._flavour, self._engine = library, flavour, engine
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.ports: Mapping[str, Port] = {
            port.name: port for port in (self._port(index) for index in range(engine.num_io_tensors))
        }

    def _port(self, index: int) -> Port:
        name = self._engine.get_tensor_name(index)
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise DeviceError(
                "an engine has a port of an unknown dtype", at=f"engine {self.name}, port {name}", got=kind
            )
        # Engines have lost the names of open dimensions: any of them is the batch.
        shape = tuple("B" if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        output = self._engine.get_tensor_mode(name) == self._library.TensorIOMode.OUTPUT
        return Port(name, DTYPES[kind], shape, output)

    def bind(self, places: Mapping[str, Place], scratch: Region) -> TensorRtContext:
        """Raises DeviceError where TensorRT refuses a shape, because it is outside the profile."""
        from dcc.runtime.cuda_device import ALIGNMENT

        check_places(self.name, self.ports, places, ALIGNMENT)
        if scratch.nbytes < self.scratch_bytes:
            want = f"{self.scratch_bytes} bytes"
            raise DeviceError(
                "an engine's scratch is too small", at=f"engine {self.name}", got=scratch.nbytes, want=want
            )
        context = self._context()
        if context is None:
            raise DeviceMemoryError("an engine has no room for another context", 0, 0, at=f"engine {self.name}")
        context.set_device_memory(scratch.address, scratch.nbytes)
        for name, port in self.ports.items():
            place = places[name]
            if not port.output and not context.set_input_shape(name, place.shape):
                raise DeviceError(
                    "a shape is outside the profile that was built", at=f"engine {self.name}, port {name}",
                    got=list(place.shape), next="ask for fewer images, or compile with a larger --max-batch",
                )  # fmt: skip
            if not context.set_tensor_address(name, place.region.address):
                raise DeviceError("TensorRT refuses an address", at=f"engine {self.name}, port {name}")
        missing = list(context.infer_shapes())
        if missing:
            raise DeviceError("an engine's shapes are not all known", at=f"engine {self.name}", got=missing)
        return TensorRtContext(self.name, context)

    def _context(self) -> Any:
        """A context whose scratch is ours."""
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        kinds = getattr(self._library, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is not None:
            # Kernels for these shapes are ready after the first run. By default they are made beside it, and a graph
            # captured before they are would keep the general ones.
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        return self._engine.create_execution_context(config)


class TensorRtContext:
    """Implements `Context`."""

    def __init__(self, engine: str, context: Any) -> None:
        self._engine, self._context = engine, context

    def enqueue(self, stream: Stream) -> None:
        if self._context is None or not self._context.execute_async_v3(int(getattr(stream, "handle"))):  # noqa: B009
            raise DeviceError("TensorRT cannot run an engine", at=f"engine {self._engine}")

    def close(self) -> None:
        self._context = None
