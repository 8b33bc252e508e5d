"""TensorRT networks that torch-tensorrt's converters make, built as those that TensorRT's ONNX parser makes.

torch-tensorrt's own `convert_exported_program_to_serialized_trt_engine` does the same steps, but knows no compute
capability and ends with loading the engine, which needs a GPU. Here its converters stand in the parser's place, and
all else (capabilities, profile, attention, options, the record) is `tensorrt_builder.serialize`.

Importing torch-tensorrt changes a process: it puts a module of its own in place of `tensorrt`, and without a GPU it is
imported only with a few functions of torch exchanged. So compilers do all this in a worker, `serve`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram

from dcc.errors import ExportError
from dcc.ir.graph import BATCH, DTYPES
from dcc.runtime.builder_callbacks import Told
from dcc.runtime.network_record import NetworkRecord
from dcc.runtime.plan import TensorSpec
from dcc.runtime.tensorrt_builder import BuildCost, BuilderOptions, BuildRequest, TensorRt, serialize

ADVICE = "--lowering onnx"
# torch_tensorrt uses its Python runtime where these are not there.
LINKED_AGAINST_CUDA = ("libtorchtrt.so", "libtorchtrt_runtime.so")
Ports = Sequence[TensorSpec]


def import_torch_tensorrt() -> Any:
    """torch_tensorrt, for the making of networks alone. Raises ExportError where it cannot be imported."""
    try:
        with _with_or_without_a_gpu(), quiet():
            return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it looks for devices and libraries, and raises whatever they raise
        raise ExportError("torch-tensorrt cannot be imported", got=first_line(error), next=ADVICE) from error


@contextmanager
def _with_or_without_a_gpu() -> Iterator[None]:
    """torch_tensorrt can be imported where there is no GPU, though it asks for one."""
    found = os.path.isfile
    patches: list[Any] = [
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (0, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        # It is only the name of a parameter's type.
        mock.patch.object(torch._C, "_CudaDeviceProperties", object, create=True),
        mock.patch.object(os.path, "isfile", lambda path: Path(path).name not in LINKED_AGAINST_CUDA and found(path)),
    ]
    with ExitStack() as stack:
        for patch in () if torch.cuda.is_available() else patches:
            stack.enter_context(patch)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Neither torch nor torch-tensorrt logs or warns."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def first_line(error: Exception) -> str:
    """The error in one line of a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:300]}"


class Converters:
    """Makes the network of a program; each object is one program, after torch-tensorrt's own passes.

    `settings` are torch-tensorrt's, beside those that make its networks what dcc's are.
    """

    def __init__(self, name: str, program: ExportedProgram, inputs: Ports, outputs: Ports, **settings: Any) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs
        import_torch_tensorrt()
        lowering = importlib.import_module("torch_tensorrt.dynamo.lowering")
        dynamo = importlib.import_module("torch_tensorrt.dynamo")
        device = importlib.import_module("torch_tensorrt").Device(gpu_id=0)
        self._settings = dynamo.CompilationSettings(
            device=device, disable_tf32=True, truncate_double=True, attn_bias_is_causal=False, **settings
        )
        try:
            with torch.no_grad():
                program = lowering.pre_export_lowering(program, self._settings)
                program = program.run_decompositions(lowering.get_decompositions(False, False, False))
                self._module = lowering.post_lowering(program.module(), self._settings)
        except Exception as error:  # its passes raise whatever they raise
            raise self._refused(error, None) from error

    def network(self, network: Any, logger: Any) -> Any:
        """The program is in the network; what is returned holds the weights. Raises ExportError with the node."""
        conversion = importlib.import_module("torch_tensorrt.dynamo.conversion")
        interpreters = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
        outputs = importlib.import_module("torch_tensorrt.dynamo.conversion._conversion")
        # Its own logger raises inside of a callback.
        with mock.patch.object(interpreters, "TRT_LOGGER", logger):
            interpreter = None
            try:
                with torch.no_grad():
                    dtypes = outputs.infer_module_output_dtypes(self._module, truncate_double=True)
                    interpreter = conversion.TRTInterpreter(
                        self._module, self._descriptions(), output_dtypes=dtypes, compilation_settings=self._settings
                    )
                    interpreter.ctx.net = network
                    # Its `run` would go on to build and load the engine.
                    interpreter._construct_trt_network_def()
            except Exception as error:  # converters raise many types; every one means that there is no network
                raise self._refused(error, getattr(interpreter, "_cur_node", None)) from error
        for count, place, ports in (
            (network.num_inputs, network.get_input, self._inputs),
            (network.num_outputs, network.get_output, self._outputs),
        ):
            if count != len(ports):
                raise self._refused(ValueError(f"{count} ports where {len(ports)} are planned"), None)
            for index, port in enumerate(ports):
                place(index).name = port.name
        return interpreter

    def _descriptions(self) -> list[Any]:
        """torch-tensorrt's words for the inputs. Only that the rows are open counts: dcc has its own profile."""
        inputs = importlib.import_module("torch_tensorrt").Input
        found = []
        for port in self._inputs:
            shapes = [[rows if size == BATCH else int(size) for size in port.shape] for rows in (1, 2, 3)]
            sizes = dict(zip(("min_shape", "opt_shape", "max_shape"), shapes, strict=True))
            dtype = DTYPES[port.dtype]
            found.append(inputs(dtype=dtype, **(sizes if BATCH in port.shape else {"shape": shapes[0]})))
        return found

    def _refused(self, error: Exception, node: torch.fx.Node | None) -> ExportError:
        at = f"engine {self._name}"
        if node is not None:
            stage = (node.meta.get("custom") or {}).get("stage")
            at += (f", stage {stage}" if stage else "") + f", {node.name} ({node.target})"
        return ExportError("torch-tensorrt refuses an engine", at=at, got=first_line(error), next=ADVICE)


def build_program(
    request: BuildRequest, converters: Converters, library: TensorRt, told: Told = lambda name, done: None
) -> tuple[memoryview, NetworkRecord, BuildCost]:
    """What `serialize` does, with the network that the converters make in place of the request's model."""
    trt = library.module

    class Parser:
        """As TensorRT's for ONNX; what it holds must live until the engine is built."""

        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger, self._held = network, logger, None

        def parse(self, *_: object) -> bool:
            self._held = converters.network(self._network, self._logger)
            # Its converter lets every attention become several kernels; serialize allows that where it must.
            for index in range(self._network.num_layers):
                layer = self._network.get_layer(index)
                if layer.type == trt.LayerType.ATTENTION_INPUT:
                    layer.__class__ = trt.IAttentionInputLayer
                    layer.attention.decomposable = False
            return True

    class Module:
        OnnxParser = Parser

        def __getattr__(self, name: str) -> Any:
            return getattr(trt, name)

    try:
        return serialize(request, replace(library, module=Module()), told)
    except ExportError as error:
        raise ExportError(error.what, **error.details | {"next": ADVICE}) from error


def serve() -> None:
    """The worker: jobs are read and answered until the other side closes the pipe."""
    # Both go to the whole group, and whoever started this process ends it: by killing it, or by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorRT prints to standard output when it fails
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    jobs: Queue[str] = Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        job = json.loads(jobs.get())
        try:
            answer: tuple[str, Any] = "built", _serve_one(job, answers)
        except ExportError as error:
            answer = "failed", {"what": error.what, "details": error.details}
        except OSError as error:
            answer = "failed", {"what": "files cannot be written", "details": {"got": error.strerror or str(error)}}
        print(json.dumps(answer), file=answers, flush=True)


def _listen(jobs: Queue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def _serve_one(job: dict[str, Any], answers: Any) -> dict[str, Any]:
    values, path = job["request"], Path(job["program"])
    rows = values["rows"]
    request = BuildRequest(
        values["name"], b"", tuple(values["capabilities"]), None if rows is None else tuple(rows), None,
        BuilderOptions(**values["options"]), values["device"],
    )  # fmt: skip
    ports = [[TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in job[side]] for side in ("in", "out")]

    def told(name: str, done: float) -> None:
        print(json.dumps(("told", done)), file=answers, flush=True)

    program = torch.export.load(path)
    path.unlink()
    converters = Converters(request.name, program, *ports)
    data, record, cost = build_program(request, converters, TensorRt.find(job["flavour"]), told)
    with Path(job["engine"]).open("wb") as file:
        file.write(data)
    return {"record": record, "cost": asdict(cost)}
