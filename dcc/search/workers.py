"""Where evaluations run: in this process, in local processes, or on a Ray cluster.

All give the same: results as they come, each with the index of its candidate. A process or actor that dies is
replaced and its candidate repeated once. An exception in an evaluator ends the search with one error that names the
candidate; leaving the context stops what still runs.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from types import TracebackType
from typing import Any, Protocol

from dcc.errors import DccError, UsageError
from dcc.ir.schedule import Schedule
from dcc.search.store import Evaluation

ATTEMPTS = 2


class SearchError(DccError):
    """An evaluation failed, or what runs it."""

    stage = "search"


class Evaluator(Protocol):
    """Measures schedules; made once in each worker."""

    def evaluate(self, schedule: Schedule) -> Evaluation: ...


# Picklable: a module-level function, a class, or a functools.partial of one.
MakeEvaluator = Callable[[], Evaluator]


class Workers(Protocol):
    """Runs evaluations. `slots` is how many at a time."""

    slots: int

    def run(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, Evaluation]]:
        """Every schedule's index and evaluation, each as soon as it is there. Raises SearchError."""

    def close(self) -> None:
        """What still runs is stopped."""

    def __enter__(self) -> Workers: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Closing:
    def close(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SerialWorkers(_Closing):
    """One evaluation after the other in this process."""

    slots = 1

    def __init__(self, make: MakeEvaluator) -> None:
        self._make = make
        self._evaluator: Evaluator | None = None

    def __enter__(self) -> SerialWorkers:
        return self

    def run(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, Evaluation]]:
        for index, schedule in enumerate(schedules):
            try:
                if self._evaluator is None:
                    self._evaluator = self._make()
                found = _timed(self._evaluator, schedule)
            except Exception as error:
                raise _failed(schedule, error) from error
            yield index, found


class ProcessWorkers(_Closing):
    """`slots` local processes, started by spawning; each holds one evaluator.

    Each process is an executor of its own, so that it is known which candidate a dead process was at.
    """

    def __init__(self, make: MakeEvaluator, slots: int) -> None:
        if slots < 1:
            raise UsageError("a search needs workers", got=slots, want="at least 1")
        self.slots = slots
        self._make = make
        self._executors: list[ProcessPoolExecutor | None] = [None] * slots
        self._alive: list[Connection | None] = [None] * slots  # a process ends when its pipe closes

    def __enter__(self) -> ProcessWorkers:
        return self

    def run(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, Evaluation]]:
        waiting = deque(range(len(schedules)))
        attempts = [0] * len(schedules)
        running: dict[Future[Evaluation], tuple[int, int]] = {}
        while waiting or running:
            free = sorted(set(range(self.slots)) - {slot for slot, _ in running.values()})
            for slot in free[: len(waiting)]:
                index = waiting.popleft()
                attempts[index] += 1
                running[self._submit(slot, schedules[index])] = (slot, index)
            for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=lambda item: running[item]):
                slot, index = running.pop(future)
                try:
                    found = future.result()
                except BrokenProcessPool as error:
                    self._executors[slot] = None
                    if attempts[index] == ATTEMPTS:
                        raise _died(schedules[index], "the process") from error
                    waiting.appendleft(index)
                except Exception as error:
                    raise _failed(schedules[index], error) from error
                else:
                    yield index, found

    def close(self) -> None:
        for slot, (executor, alive) in enumerate(zip(self._executors, self._alive, strict=True)):
            if executor is not None:
                executor.shutdown(wait=False, cancel_futures=True)
            # A worker would finish its candidate first, which may take minutes; one that still starts sees it as well.
            if alive is not None:
                alive.close()
            self._executors[slot] = self._alive[slot] = None

    def _submit(self, slot: int, schedule: Schedule) -> Future[Evaluation]:
        executor = self._executors[slot]
        if executor is None:
            context = get_context("spawn")
            watched, self._alive[slot] = context.Pipe(duplex=False)
            executor = ProcessPoolExecutor(1, context, _start, (self._make, watched))
            self._executors[slot] = executor
        return executor.submit(_evaluate, schedule)


class RayWorkers(_Closing):
    """`slots` actors on a Ray cluster, each with one evaluator.

    `address` is that of a cluster; "auto" joins a running one or starts one on this machine, "local" starts one.
    Without `slots` as many actors are made as the cluster has CPUs (or GPUs, where an actor takes one).
    Raises UsageError when Ray is not installed or the cluster does not answer.
    """

    def __init__(
        self,
        make: MakeEvaluator,
        address: str = "auto",
        slots: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        **options: Any,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # What Ray will do in a later version, without the warning that it will.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed", next="pip install 'dcc[dist]'") from error
        self._ray = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            # "auto" would refuse to start a cluster where None does not.
            where: dict[str, Any] = {} if address == "auto" else {"address": address}
            try:
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise UsageError("the Ray cluster does not answer", at=address, got=_first_line(error)) from error
        self._actor = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        resources = ray.cluster_resources()
        room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1) / max(cpus, 1e-9)
        self.slots = slots or max(1, int(room))
        self._make = make
        self._actors: list[Any] = [None] * self.slots

    def __enter__(self) -> RayWorkers:
        return self

    def run(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, Evaluation]]:
        ray = self._ray
        waiting = deque(range(len(schedules)))
        attempts = [0] * len(schedules)
        running: dict[Any, tuple[int, int]] = {}
        while waiting or running:
            free = sorted(set(range(self.slots)) - {slot for slot, _ in running.values()})
            for slot in free[: len(waiting)]:
                index = waiting.popleft()
                attempts[index] += 1
                if self._actors[slot] is None:
                    self._actors[slot] = self._actor.remote(self._make)
                running[self._actors[slot].evaluate.remote(schedules[index])] = (slot, index)
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                slot, index = running.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    self._actors[slot] = None
                    cause = getattr(error, "cause", None)
                    if attempts[index] == ATTEMPTS:
                        raise _died(schedules[index], "the actor", cause or error) from error
                    waiting.appendleft(index)
                except ray.exceptions.RayTaskError as error:
                    raise _failed(schedules[index], error.cause or error) from error
                else:
                    yield index, found

    def close(self) -> None:
        for slot, actor in enumerate(self._actors):
            if actor is not None:
                self._ray.kill(actor)
            self._actors[slot] = None
        if self._owned:
            self._ray.shutdown()
            self._owned = False


class _Actor:
    """What runs in an actor."""

    def __init__(self, make: MakeEvaluator) -> None:
        self._evaluator = make()

    def evaluate(self, schedule: Schedule) -> Evaluation:
        return _timed(self._evaluator, schedule)


_evaluator: Evaluator | BaseException | None = None


def _start(make: MakeEvaluator, alive: Connection) -> None:
    """Runs first in each process: the evaluator is made, interrupts are the parent's business."""
    global _evaluator
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    try:
        _evaluator = make()
    except Exception as error:  # noqa: BLE001 - raised again by the first evaluation, where the parent sees it
        _evaluator = error


def _end_with(alive: Connection) -> None:
    """Ends this process when the search closes its end of the pipe, or is killed: it would wait for work forever."""
    wait_for([alive])
    os._exit(1)


def _evaluate(schedule: Schedule) -> Evaluation:
    if isinstance(_evaluator, BaseException):
        raise _evaluator
    assert _evaluator is not None
    return _timed(_evaluator, schedule)


def _timed(evaluator: Evaluator, schedule: Schedule) -> Evaluation:
    start = time.perf_counter()
    found = evaluator.evaluate(schedule)
    return found if found.seconds else replace(found, seconds=time.perf_counter() - start)


def _failed(schedule: Schedule, error: BaseException) -> SearchError:
    at = schedule.name or f"candidate {schedule.digest()[:12]}"
    got = str(error) if isinstance(error, DccError) else f"{type(error).__name__}: {_first_line(error)}"
    next = "what was evaluated is kept: --resume goes on from there"
    return SearchError("a candidate could not be evaluated", at=at, got=got, next=next)


def _died(schedule: Schedule, what: str, error: BaseException | None = None) -> SearchError:
    at = schedule.name or f"candidate {schedule.digest()[:12]}"
    why = f" ({_first_line(error)})" if error is not None else ""
    got = f"{what} that evaluated it died {ATTEMPTS} times{why}"
    return SearchError("a candidate could not be evaluated", at=at, got=got, next="out of memory? try fewer workers")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

