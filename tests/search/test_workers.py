"""Workers: the same results everywhere, clean stops, one error that names the candidate, a second try for the dead."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dcc.errors import UsageError
from dcc.ir.schedule import Schedule, branch_units, from_steps, full_schedule
from dcc.search.store import Evaluation
from dcc.search.workers import ProcessWorkers, SearchError, SerialWorkers, Workers

COMPONENTS = ("a", "b")
CALLS = 6
TEST_FOLDER = str(Path(__file__).parent)


def schedules() -> list[Schedule]:
    """One that computes every call, every second, every third ..."""
    units = branch_units(COMPONENTS)
    return [
        from_steps(COMPONENTS, units, [[call % every == 0] * 2 for call in range(CALLS)], name=f"every {every}")
        for every in range(1, CALLS + 1)
    ]


def computed(schedule: Schedule) -> int:
    return sum(row[0].computes for row in schedule.actions)


@dataclass(frozen=True)
class Share:
    """Counts what a schedule computes; misbehaves on the one that computes `at` calls."""

    at: int = 0
    how: str = ""
    folder: str = ""

    def evaluate(self, schedule: Schedule) -> Evaluation:
        found = computed(schedule)
        if found == self.at:
            if self.how == "raise":
                raise RuntimeError("the samples are lost")
            if self.how == "sleep":
                time.sleep(600)
            first = Path(self.folder) / "died"
            if self.how == "die" or not first.exists():
                first.touch()
                os._exit(3)
        return Evaluation(found, 1.0 / found, 10.0, 1.0, {"process": os.getpid()})


@dataclass(frozen=True)
class Unmakeable:
    def __call__(self) -> Share:
        raise UsageError("the model is not there", at="model.pt")


def found_by(workers: Workers) -> list[float]:
    with workers as running:
        found = dict(running.run(schedules()))
    return [found[index].latency_ms for index in range(len(found))]


EXPECTED = [float(computed(schedule)) for schedule in schedules()]


def test_serial() -> None:
    assert found_by(SerialWorkers(Share)) == EXPECTED
    with pytest.raises(SearchError) as caught:
        found_by(SerialWorkers(partial(Share, 2, "raise")))
    assert caught.value.details["at"] == "every 3"


def test_processes_keep_their_evaluator_and_are_used() -> None:
    with ProcessWorkers(Share, 2) as workers:
        found = dict(workers.run(schedules()))
        again = dict(workers.run(schedules()))
    assert [found[index].latency_ms for index in range(len(found))] == EXPECTED
    used = {item.extra["process"] for item in [*found.values(), *again.values()]}
    assert len(used) == 2 and os.getpid() not in used


def test_an_exception_in_a_process_names_the_candidate_and_stops() -> None:
    start = time.monotonic()
    with ProcessWorkers(partial(Share, 2, "raise"), 1) as workers:
        got = []
        with pytest.raises(SearchError) as caught:
            for index, _ in workers.run(schedules()):
                got.append(index)
    assert got == [0, 1]
    assert caught.value.details["at"] == "every 3"
    assert caught.value.details["got"] == "RuntimeError: the samples are lost"
    assert time.monotonic() - start < 60


def test_an_evaluator_that_cannot_be_made_is_the_same_error() -> None:
    for workers in (SerialWorkers(Unmakeable()), ProcessWorkers(Unmakeable(), 1)):
        with workers, pytest.raises(SearchError, match="the model is not there"):
            list(workers.run(schedules()))


def test_a_process_that_dies_once_is_replaced(tmp_path: Path) -> None:
    assert found_by(ProcessWorkers(partial(Share, 2, "die once", str(tmp_path)), 1)) == EXPECTED
    assert (tmp_path / "died").exists()


def test_a_process_that_dies_again_is_an_error(tmp_path: Path) -> None:
    with ProcessWorkers(partial(Share, 2, "die", str(tmp_path)), 1) as workers, pytest.raises(SearchError) as caught:
        list(workers.run(schedules()))
    assert caught.value.details["at"] == "every 3"
    assert "died 2 times" in caught.value.details["got"]


SLEEPS = """
import sys
sys.path.insert(0, {folder!r})
from functools import partial
from test_workers import Share, schedules
from dcc.search.workers import ProcessWorkers

if __name__ == "__main__":
    try:
        with ProcessWorkers(partial(Share, 3, "sleep"), 2) as workers:
            for index, found in workers.run(schedules()):
                print(found.extra["process"], flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_search_leaves_no_process(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS.format(folder=TEST_FOLDER))
    # A parent that ignores interrupts hands that down.
    default = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, preexec_fn=default)
    assert process.stdout is not None
    # All candidates but the sleeping one are there, so that one process sleeps.
    workers = {int(process.stdout.readline()) for _ in range(len(schedules()) - EXPECTED.count(3.0))}
    process.send_signal(how)
    rest = process.stdout.read() if how == signal.SIGINT else ""
    assert process.wait(timeout=60) == (0 if how == signal.SIGINT else -signal.SIGKILL)
    assert rest == ("interrupted\n" if how == signal.SIGINT else "")
    process.stdout.close()
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_number_of_workers_that_makes_no_sense() -> None:
    with pytest.raises(UsageError):
        ProcessWorkers(Share, 0)


ON_RAY = """
import sys
sys.path.insert(0, {folder!r})
from functools import partial
from test_workers import Share, found_by
from dcc.search.workers import RayWorkers

if __name__ == "__main__":
    workers = RayWorkers(partial(Share, 2, "die once", sys.argv[1]), "local", num_cpus=2, include_dashboard=False)
    print(workers.slots, found_by(workers), flush=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_on_a_local_cluster(tmp_path: Path) -> None:
    # In a process of its own: Ray leaves threads and sockets behind that later tests would be blamed for.
    script = tmp_path / "on_ray.py"
    script.write_text(ON_RAY.format(folder=TEST_FOLDER))
    # Actors import this file, which belongs to no package.
    paths = [TEST_FOLDER, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # Ray gives its own processes 30 s to start, which a busy machine may take.
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "RAY_raylet_start_wait_time_s": "120",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"2 {EXPECTED}"
    assert (tmp_path / "died").exists()


def test_full_schedules_cost_most() -> None:
    assert computed(full_schedule(COMPONENTS, CALLS)) == max(EXPECTED)
