"""Engines by way of torch-tensorrt (`--lowering torch-tensorrt`): a second route from the Program, beside ONNX.

The same engines of the same plan, with the same ports. The graphs are those of `torch_graphs.py`: what torch exports
runs on this machine's processor for the check, and goes in a file to a worker that imports torch-tensorrt
(`torch_tensorrt_networks.py` says why a worker), makes the networks and builds them one after the other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from dcc.errors import ExportError
from dcc.exports.cached_build import cached_engine, store_engine
from dcc.exports.compose import EngineBody
from dcc.exports.torch_graphs import Function, as_function, torch_engine
from dcc.ir.program import Program
from dcc.runtime.builder_callbacks import Told
from dcc.runtime.engine_cache import FORMAT, EngineCache
from dcc.runtime.tensorrt_builder import BuildCost, BuildRequest, BuiltEngine, TensorRt, check_request

PACKAGE = "torch-tensorrt-rtx"
# What it imports besides torch and TensorRT-RTX, which it would install in versions of its own.
NEEDED = {"torch_tensorrt": PACKAGE, "dllist": "dllist", "psutil": "psutil", "packaging": "packaging"}
ADVICE = "--lowering onnx"
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dcc.exports.torch_tensorrt_networks import serve; serve()"
)


def check_installed() -> str:
    """The version of torch-tensorrt. Raises ExportError where it is missing, or is for another torch than this one."""
    numbers = torch.__version__.split("+")[0].split(".")[:2]
    wanted = f"{PACKAGE} {'.'.join(numbers)}, for torch {torch.__version__}"
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    more = [name for name in missing if name not in (PACKAGE, "dllist")]
    # Its own requirements pin another torch.
    command = " ".join(["pip install --no-deps", f"{PACKAGE}=={'.'.join(numbers)}.0", "dllist", *more])
    advice = f"{command}; or {ADVICE}"
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ExportError("torch-tensorrt is not installed", want=wanted, next=advice) from None
    if version.split(".")[:2] != numbers:
        raise ExportError("torch-tensorrt is for another torch", got=f"{PACKAGE} {version}", want=wanted, next=advice)
    if missing:
        raise ExportError(
            "torch-tensorrt lacks what it imports", got=f"no {', '.join(missing)}", want=wanted, next=advice
        )
    return version


class TorchTensorRt:
    """The engines of one plan, made from the Program by torch-tensorrt: `layers.Networks`."""

    def __init__(self, program: Program, bodies: Mapping[str, EngineBody]) -> None:
        self.name, self.version = "torch-tensorrt", check_installed()
        self._program, self._bodies = program, bodies
        self._exported: dict[tuple[str, str], ExportedProgram] = {}

    def function(self, engine: str, dtype: str) -> Function:
        """The engine's very graph in this dtype, run by torch. Raises ExportError where torch refuses it."""
        return as_function(self._program_of(engine, dtype), self._bodies[engine])

    def build_all(
        self, requests: Sequence[BuildRequest], dtype: str, library: TensorRt, told: Told, cache: EngineCache | None
    ) -> Generator[BuiltEngine, None, None]:
        """The engines in the order of `requests`, whose models are not read; one is built at a time.

        Leaving the iterator early, by whatever exception, stops the worker and removes its files. Raises ExportError
        where torch-tensorrt or the builder refuses an engine, the worker dies, or there is no room.
        """
        for request in requests:
            check_request(request, library)
        with _working() as worker:
            for request in requests:
                exported = self._program_of(request.name, dtype)
                key = "" if cache is None else self._key(request, exported, library)
                engine = None if cache is None else cached_engine(request, key, cache)
                if engine is None:
                    engine = worker.build(request, exported, self._bodies[request.name], library, told)
                    if cache is not None:
                        store_engine(engine, key, cache)
                self._exported.pop((request.name, dtype))
                told(request.name, 1.0)
                yield engine

    def _program_of(self, engine: str, dtype: str) -> ExportedProgram:
        if (engine, dtype) not in self._exported:
            self._exported[engine, dtype] = torch_engine(self._program, self._bodies[engine], dtype)
        return self._exported[engine, dtype]

    def _key(self, request: BuildRequest, exported: ExportedProgram, library: TensorRt) -> str:
        """The cache's key: equal for equal graphs and weights, built in the same way by the same versions."""
        body = self._bodies[request.name]
        facts = {
            "lowering": self.name, "versions": [self.version, torch.__version__, library.flavour, library.version],
            "device": request.device, "rows": request.rows, "capabilities": sorted(set(request.capabilities)),
            "options": asdict(request.options), "graph": str(exported.graph),
            "ports": [asdict(port) for port in (*body.inputs.values(), *body.outputs.values())],
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps([FORMAT, facts], sort_keys=True).encode())
        for name, tensor in sorted({**exported.state_dict, **exported.constants}.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


@contextmanager
def _working() -> Iterator[_Worker]:
    """A worker that has not been started yet, and is gone afterwards with its files."""
    try:
        with tempfile.TemporaryDirectory(prefix="dcc-torch-tensorrt-", ignore_cleanup_errors=True) as folder:
            worker = _Worker(Path(folder))
            try:
                yield worker
            finally:
                worker.stop()
    except OSError as error:
        raise ExportError(
            "engines cannot be built, because files cannot be written", at=tempfile.gettempdir(),
            got=error.strerror or error, next="free some space, or set TMPDIR to a folder that has it",
        ) from error  # fmt: skip


class _Worker:
    """The process that imports torch-tensorrt; a program goes in and an engine comes back through its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def build(
        self, request: BuildRequest, exported: ExportedProgram, body: EngineBody, library: TensorRt, told: Told
    ) -> BuiltEngine:
        process = self._started()
        program, engine = self._folder / "program.pt2", self._folder / "engine"
        try:
            torch.export.save(exported, program)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        values = asdict(request) | {"model": "", "folder": None}
        job = {
            "flavour": library.flavour, "request": values, "program": str(program), "engine": str(engine),
            "in": [[port.name, port.dtype, port.shape] for port in body.inputs.values()],
            "out": [[port.name, port.dtype, port.shape] for port in body.outputs.values()],
        }  # fmt: skip
        content = self._answer(process, request.name, job, told)
        data = engine.read_bytes()
        engine.unlink()
        return BuiltEngine(request.name, data, content["record"], BuildCost(**content["cost"]))

    def stop(self) -> None:
        """The process is gone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # a job that was never read is lost with its worker
                if pipe is not None:
                    pipe.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            path = [str(Path(entry).absolute()) for entry in sys.path]
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _WORKER, json.dumps(path)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
        return self._process

    def _answer(self, process: subprocess.Popen[str], name: str, job: Mapping[str, Any], told: Told) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it died: its exit status says more
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            kind, content = json.loads(line)
            if kind == "built":
                return dict(content)
            if kind == "failed":
                raise ExportError(content["what"], **content["details"])
            told(name, content)
        status = process.wait()
        words = (self._folder / "log").read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(words) if line.strip()), "")
        reason = f"exit status {status}" if status >= 0 else f"{signal.strsignal(-status)} (signal {-status})"
        raise ExportError(
            "the process that built an engine with torch-tensorrt died", at=f"engine {name}",
            got=f"{reason}: {last[:300]}" if last else reason, next=ADVICE,
        )  # fmt: skip
