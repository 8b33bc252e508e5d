"""Many engines at once, each built in a worker process.

A worker is a fresh interpreter that takes one job after the other: a crash in the builder ends it and not the
compiler, and the memory of a build is that of one engine for each worker. Models and engines travel as files in a
temporary folder, lines of JSON through the worker's pipes say which. When its pipe closes, a worker ends in the middle
of whatever it does, so none outlives the process that started it.

`multiprocessing` would import the caller's main module again in every worker, which a script without a guard does not
survive.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Any, NoReturn

from dcc.errors import ExportError
from dcc.exports.cached_build import cached_engine, request_key, store_engine
from dcc.runtime.builder_callbacks import Told
from dcc.runtime.engine_cache import EngineCache
from dcc.runtime.tensorrt_builder import (
    BuildCost,
    BuilderOptions,
    BuildRequest,
    BuiltEngine,
    TensorRt,
    check_request,
    serialize,
)

_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dcc.exports.engine_workers import serve; serve(sys.argv[2])"
)


def build_all(
    requests: Sequence[BuildRequest],
    library: TensorRt,
    workers: int = 1,
    told: Told = lambda name, done: None,
    cache: EngineCache | None = None,
) -> Generator[BuiltEngine, None, None]:
    """The engines in the order of `requests`, each as soon as it and those before it are there.

    Only the engine that was given last is in memory: the others lie in a temporary folder or in `cache`. `told` is
    called in this thread. Leaving the iterator early, by whatever exception, stops the workers and removes the folder.

    Raises ExportError as `build` does, and where a worker died or there is no room for files.
    """
    if workers < 1:
        raise ExportError("engines need a process to be built in", got=f"{workers} workers", want="at least 1")
    for request in requests:
        check_request(request, library)
    return _built(requests, library, workers, told, cache)


def _built(
    requests: Sequence[BuildRequest], library: TensorRt, workers: int, told: Told, cache: EngineCache | None
) -> Generator[BuiltEngine, None, None]:
    with _Crew(requests, library, workers, told) as crew:
        keys = []
        for number, request in enumerate(requests):
            keys.append("" if cache is None else request_key(request, library))
            if cache is None or not cache.has(keys[number]):
                crew.submit(number)
        for number, request in enumerate(requests):
            engine = None
            if cache is not None and not crew.has(number):
                engine = cached_engine(request, keys[number], cache)
                told(request.name, 1.0)
            if engine is None:
                engine = crew.result(number)
                if cache is not None:
                    store_engine(engine, keys[number], cache)
            yield engine


@dataclass(frozen=True)
class _Event:
    """What a worker said about a job: `told`, `built`, `failed`; or `died`, with its exit status and last words."""

    number: int
    kind: str
    content: Any


class _Crew:
    """Up to `most` workers, started as jobs come; each has a thread that speaks with it."""

    def __init__(self, requests: Sequence[BuildRequest], library: TensorRt, most: int, told: Told) -> None:
        self._requests, self._library, self._most, self._told = requests, library, most, told
        self._submitted: set[int] = set()
        self._built: dict[int, Any] = {}
        self._jobs: Queue[int | None] = Queue()
        self._events: Queue[_Event] = Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Crew:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="dcc-engines-"))
        except OSError as error:
            raise _no_room(Path(tempfile.gettempdir()), error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # a job that was never read is lost with its worker
                    if pipe is not None:
                        pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def has(self, number: int) -> bool:
        return number in self._submitted

    def submit(self, number: int) -> None:
        """The request is built as soon as a worker is free."""
        self._submitted.add(number)
        self._jobs.put(number)
        if len(self._processes) < min(self._most, len(self._submitted)):
            self._start()

    def result(self, number: int) -> BuiltEngine:
        """The engine of a request, waited for; its file is gone."""
        if number not in self._submitted:
            self.submit(number)
        while number not in self._built:
            self._take(self._events.get())
        reply = self._built.pop(number)
        path = self._path(number, "engine")
        try:
            data = path.read_bytes()
            path.unlink()
        except OSError as error:
            raise _no_room(self._folder, error) from error
        return BuiltEngine(self._requests[number].name, data, reply["record"], BuildCost(**reply["cost"]))

    def _take(self, event: _Event) -> None:
        name = self._requests[event.number].name
        if event.kind == "told":
            self._told(name, event.content)
        elif event.kind == "built":
            self._told(name, 1.0)
            self._built[event.number] = event.content
        elif event.kind == "failed":
            raise ExportError(event.content["what"], **event.content["details"])
        else:
            raise _died(name, *event.content)

    def _start(self) -> None:
        log = self._folder / f"worker-{len(self._processes)}.log"
        path = [str(Path(entry).absolute()) for entry in sys.path]
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-c", _WORKER, json.dumps(path), str(self._folder)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                )  # fmt: skip
        except OSError as error:
            raise _no_room(self._folder, error) from error
        self._processes.append(process)
        thread = threading.Thread(target=self._converse, args=(process, log), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _converse(self, process: subprocess.Popen[str], log: Path) -> None:
        """Jobs go to the worker and events come back, until there is nothing more to do or the worker has died."""
        assert process.stdin is not None and process.stdout is not None
        while (number := self._jobs.get()) is not None:
            done = False
            try:
                self._path(number, "onnx").write_bytes(self._requests[number].model)
                process.stdin.write(json.dumps(self._job(number)) + "\n")
                process.stdin.flush()
                while not done and (line := process.stdout.readline()):
                    kind, content = json.loads(line)
                    done = kind != "told"
                    self._events.put(_Event(number, kind, content))
            except BrokenPipeError:
                pass  # it died while it was idle
            except OSError as error:
                refused = _no_room(self._folder, error)
                self._events.put(_Event(number, "failed", {"what": refused.what, "details": refused.details}))
                return
            if not done:
                words = log.read_text(errors="replace").split("\n") if log.exists() else []
                last = next((line.strip() for line in reversed(words) if line.strip()), "")
                self._events.put(_Event(number, "died", (process.wait(), last)))
                return

    def _job(self, number: int) -> dict[str, Any]:
        request = replace(self._requests[number], model=b"")
        values = asdict(request) | {"model": str(self._path(number, "onnx"))}
        values["folder"] = None if request.folder is None else str(request.folder.absolute())
        return {"flavour": self._library.flavour, "engine": str(self._path(number, "engine")), "request": values}

    def _path(self, number: int, kind: str) -> Path:
        return self._folder / f"{number}.{kind}"


def serve(folder: str) -> None:
    """The worker: jobs are read and answered until the other side closes the pipe."""
    # Both go to the whole group, and whoever started this process ends it: by killing it, or by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorRT prints to standard output when it fails
    jobs: Queue[str] = Queue()
    threading.Thread(target=_listen, args=(jobs, folder), daemon=True).start()
    while True:
        job = json.loads(jobs.get())
        try:
            answer = "built", _serve_one(job, answers)
        except ExportError as error:
            answer = "failed", {"what": error.what, "details": error.details}
        except OSError as error:
            refused = _no_room(Path(folder), error)
            answer = "failed", {"what": refused.what, "details": refused.details}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except OSError:  # nobody is there any more; who listens may not have noticed yet
            _leave(folder)


def _listen(jobs: Queue[str], folder: str) -> None:
    for line in sys.stdin:
        jobs.put(line)
    _leave(folder)


def _leave(folder: str) -> NoReturn:
    """The process ends, and the folder is gone: whoever removes it otherwise may have been killed."""
    # Again, because the other thread may have written a file meanwhile.
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            break
    os._exit(0)


def _serve_one(job: dict[str, Any], answers: Any) -> dict[str, Any]:
    values = job["request"]
    model = Path(values["model"])
    rows = values["rows"]
    request = BuildRequest(
        values["name"], model.read_bytes(), tuple(values["capabilities"]), None if rows is None else tuple(rows),
        None if values["folder"] is None else Path(values["folder"]), BuilderOptions(**values["options"]),
        values["device"],
    )  # fmt: skip
    model.unlink()

    def told(name: str, done: float) -> None:
        print(json.dumps(("told", done)), file=answers, flush=True)

    data, record, cost = serialize(request, TensorRt.find(job["flavour"]), told)
    with Path(job["engine"]).open("wb") as file:
        file.write(data)
    return {"record": record, "cost": asdict(cost)}


def _died(name: str, status: int, last: str) -> ExportError:
    reason = f"exit status {status}"
    advice = "run this engine with ONNX Runtime, or report it with the model"
    if status < 0:
        reason = f"{signal.strsignal(-status)} (signal {-status})"
    if -status == signal.SIGKILL:
        advice = "free some memory or use fewer workers, if the system ran out of it"
    return ExportError(
        "the process that built an engine died", at=f"engine {name}",
        got=f"{reason}: {last[:300]}" if last else reason, next=advice,
    )  # fmt: skip


def _no_room(folder: Path, error: OSError) -> ExportError:
    return ExportError(
        "engines cannot be built, because files cannot be written", at=folder, got=error.strerror or error,
        next="free some space, or set TMPDIR to a folder that has it",
    )  # fmt: skip
