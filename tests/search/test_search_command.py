"""`dcc search` as it is called, on the digits: killed at random moments, in several processes, and on a Ray cluster.

Latencies are predicted from a table that a search measures when it begins. So the search that nothing disturbs, and
those that evaluate elsewhere, take the table of the one that is killed: they begin in a copy of its folder without
evaluations. Then everything must be equal but what the report measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dcc.cost_model.table import CalibrationTable
from dcc.ir.measurements import Measurements
from dcc.search.front import Front
from dcc.search.study import DATABASE, MEASURED, TABLE

# Six searches, minutes each: `make test-slow`. The suite kills a search in test_evolution, and has Ray in test_workers.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUDGET = 18
# When processes are killed; how far they get until then differs a little with the machine.
MOMENTS = random.Random(20_261_123)
Rows = dict[str, tuple[Any, ...]]
Moment = Callable[[subprocess.Popen[str]], None]
REPORT = {"front.json", "front.csv", "front.png", "index.html"}
PREPARING = ("exporting stages", "calibrating the cost model", "measuring exact trajectories")
# SQLite's own files beside a data base that was not closed.
JOURNALS = {f"{DATABASE}-wal", f"{DATABASE}-shm"}
# A trigger runs before what is ignored because it is stored already, too.
ASKED = """
CREATE TABLE asked (digest TEXT);
CREATE TRIGGER asks BEFORE INSERT ON evaluations BEGIN INSERT INTO asked VALUES (NEW.digest); END;
"""


def command(folder: Path, *more: str) -> list[str]:
    program = "import sys; from dcc.cli import main; sys.exit(main())"
    options = ["--sampler", "ddim", "--steps", "5", "--guidance", "cfg", "--images", "2", "--max-batch", "4"]
    model = str(ROOT / "examples/digits/dit_digits.pt")
    return [sys.executable, "-c", program, "search", model, "-o", str(folder), "--budget", str(BUDGET), *options, *more]


def environment(temporary: Path) -> dict[str, str]:
    temporary.mkdir(exist_ok=True)
    # Sockets have short names: Ray keeps its own folder, and is given the time to start that a busy machine takes.
    ray = {"RAY_TMPDIR": "/tmp", "RAY_raylet_start_wait_time_s": "120"}
    return {**os.environ, **ray, "TMPDIR": str(temporary), "DCC_CACHE": str(temporary.parent / "cache")}


def finish(folder: Path, temporary: Path, *more: str) -> str:
    """The whole command; nothing of dcc is left in its temporary folder. Returns what it says on the way."""
    done = subprocess.run(
        command(folder, *more), env=environment(temporary), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # torch and the multiprocessing of Python leave folders of their own.
    assert [path for path in temporary.iterdir() if path.name.startswith("dcc")] == []
    return done.stderr


def kill(folder: Path, temporary: Path, moment: Moment, *more: str) -> Rows:
    """The command is killed as soon as `moment` returns, and has left nothing that is not whole.

    Returns what it had stored. That is read from a copy: reading mends what a killed process left.
    """
    process = subprocess.Popen(
        command(folder, *more), env=environment(temporary), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr:
        try:
            moment(process)
        finally:
            process.kill()
            code = process.wait(timeout=60)
    assert code == -signal.SIGKILL
    with tempfile.TemporaryDirectory(dir=temporary.parent) as copy:
        if folder.exists():
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        assert_whole(Path(copy))
        return rows(Path(copy))


def in_stage(name: str, delay: float) -> Moment:
    def wait(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        assert any(line == f"dcc: {name}\n" for line in process.stderr)
        time.sleep(delay)

    return wait


def with_evaluations(folder: Path, count: int, delay: float) -> Moment:
    def wait(process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        # The data base is not read before it has a journal: that could keep the search from making one.
        while not (folder / f"{DATABASE}-wal").exists() or len(rows(folder)) < count:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        time.sleep(delay)

    return wait


def rows(folder: Path) -> Rows:
    """Every evaluation by its digest: the schedule, what was run, latency, loss, psnr, and when."""
    path = folder / DATABASE
    if not path.exists():
        return {}
    query = "SELECT digest, schedule, result, latency_ms, loss, psnr, created FROM evaluations"
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        try:
            return {digest: tuple(others) for digest, *others in connection.execute(query)}
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error)
            return {}


def assert_whole(folder: Path) -> None:
    """There is nothing in the folder but what can be read, and no report yet."""
    files = {path.name for path in folder.iterdir()}
    assert files <= {DATABASE, TABLE, MEASURED, *JOURNALS}
    if TABLE in files:
        CalibrationTable.load(folder / TABLE)
    if MEASURED in files:
        Measurements.from_json(json.loads((folder / MEASURED).read_text()))
    if DATABASE in files:
        assert {TABLE, MEASURED} <= files
        with closing(sqlite3.connect(folder / DATABASE)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def without_evaluations(folder: Path, copy: Path) -> Path:
    """A copy of a search's folder as it was when it began to evaluate."""
    copy.mkdir()
    for name in (TABLE, MEASURED):
        shutil.copy(folder / name, copy / name)
    with closing(sqlite3.connect(folder / DATABASE)) as source, closing(sqlite3.connect(copy / DATABASE)) as target:
        source.backup(target)
        target.execute("DELETE FROM evaluations")
        target.execute("DROP TRIGGER asks")
        target.execute("DROP TABLE asked")
        target.commit()
    return copy


def figures(front: Front) -> dict[str, Any]:
    """What does not depend on how long anything took in the report."""
    points = {
        point.digest: (point.name, point.origin, point.schedule, point.psnr, point.ssim, point.search_psnr,
                       point.predicted_ms, point.computed_share)
        for point in front.everything
    }  # fmt: skip
    fixed = (front.program, front.sampler, front.steps, front.seeds, front.held_out, front.evaluations, front.history)
    return {"fixed": fixed, "points": points}


def assert_same(folder: Path, other: Path) -> None:
    """Equal evaluations, and of them an equal front."""
    evaluated, wanted = ({digest: row[:-1] for digest, row in rows(here).items()} for here in (folder, other))
    assert evaluated == wanted
    assert figures(Front.read(folder / "front.json")) == figures(Front.read(other / "front.json"))
    assert {path.name for path in folder.iterdir()} == {DATABASE, TABLE, MEASURED, *REPORT}


@dataclass
class Killed:
    """A search that was killed several times and then ended; what was stored at each kill, and what was asked since."""

    folder: Path
    stored: list[Rows] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    here = tmp_path_factory.mktemp("killed")
    folder, temporary = here / "front", here / "temporary"
    found = Killed(folder)
    assert kill(folder, temporary, in_stage(MOMENTS.choice(PREPARING), MOMENTS.uniform(0, 0.1))) == {}
    counts = sorted(MOMENTS.sample(range(1, BUDGET - 2), 2))
    for turn, count in enumerate(counts):
        resume = ("--resume",) if turn else ()
        moment = with_evaluations(folder, count, MOMENTS.uniform(0, 0.2))
        found.stored.append(kill(folder, temporary, moment, *resume))
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.executescript(ASKED)
    shutil.rmtree(temporary)
    finish(folder, temporary, "--resume")
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        found.asked = [digest for (digest,) in connection.execute("SELECT digest FROM asked")]
    return found


@pytest.fixture(scope="module")
def undisturbed(killed: Killed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that did everything in one go, with the killed one's table."""
    here = tmp_path_factory.mktemp("undisturbed")
    folder = without_evaluations(killed.folder, here / "front")
    finish(folder, here / "temporary", "--resume")
    return folder


def test_a_killed_search_repeats_no_evaluation(killed: Killed) -> None:
    final = rows(killed.folder)
    assert len(final) == BUDGET
    for before, after in zip(killed.stored, [*killed.stored[1:], final], strict=True):
        assert 0 < len(before) < len(after)
        # When each was stored is a part of its row.
        assert before.items() <= after.items()
    assert len(killed.asked) == len(set(killed.asked))
    assert set(killed.asked) == set(final) - set(killed.stored[-1])


def test_a_killed_search_ends_at_the_front_of_an_undisturbed_one(killed: Killed, undisturbed: Path) -> None:
    assert_same(killed.folder, undisturbed)


@pytest.mark.parametrize(
    "where",
    [
        ("--processes", "2"),
        pytest.param(
            ("--ray", "local"),
            marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
        ),
    ],
    ids=["processes", "ray"],
)
def test_other_workers_end_at_the_same_front(
    where: tuple[str, str], killed: Killed, undisturbed: Path, tmp_path: Path
) -> None:
    folder = without_evaluations(killed.folder, tmp_path / "front")
    finish(folder, tmp_path / "temporary", "--resume", *where)
    assert_same(folder, undisturbed)
