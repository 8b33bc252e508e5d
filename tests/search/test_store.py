"""The store: one commit per evaluation, one study per identity, one clear error for everything else."""

from __future__ import annotations

import math
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcc.errors import UsageError
from dcc.ir.schedule import REUSE, Schedule, from_steps, full_schedule
from dcc.search.genome import Genome, Space, to_schedule
from dcc.search.store import APPLICATION, Evaluation, Store

COMPONENTS = ("a", "b")
IDENTITY: dict[str, Any] = {"model": "m" * 64, "sampler": "ddim", "steps": 4, "seeds": [0, 1], "seed": 0}


def schedule(*computes: int) -> Schedule:
    units = full_schedule(COMPONENTS, 4).units
    return from_steps(COMPONENTS, units, [[call in computes] * 2 for call in range(4)], order=1)


def test_what_is_put_is_read_back(tmp_path: Path) -> None:
    improved = schedule(0, 2)
    found = Evaluation(12.5, 0.25, 30.0, 1.5, {"per seed": [0.1, 0.4]}, improved)
    exact = Evaluation(20.0, 0.0, math.inf)
    with Store(tmp_path / "search.db", IDENTITY, 10) as store:
        assert store.put(schedule(0, 1), found) == found
        store.put(schedule(0, 1, 2, 3), exact)
    with Store(tmp_path / "search.db", IDENTITY, 20, resume=True) as store:
        assert store.get(schedule(0, 1).digest()) == found
        assert store.get(schedule(0, 1, 2, 3).digest()) == exact
        assert store.get(schedule(0).digest()) is None
        assert [row.schedule for row in store.all()] == [schedule(0, 1), schedule(0, 1, 2, 3)]
        assert store.first_budget == 10


def test_the_first_evaluation_of_a_schedule_stays(tmp_path: Path) -> None:
    with Store(tmp_path / "search.db", IDENTITY) as store:
        store.put(schedule(0), Evaluation(1.0, 2.0, 3.0))
        assert store.put(schedule(0), Evaluation(4.0, 5.0, 6.0)).loss == 2.0
        assert len(store.all()) == 1


def test_a_figure_that_is_no_number_counts_as_the_worst(tmp_path: Path) -> None:
    with Store(tmp_path / "search.db", IDENTITY) as store:
        kept = store.put(schedule(0), Evaluation(1.0, math.nan, math.nan))
    assert (kept.loss, kept.psnr) == (math.inf, -math.inf)


def test_another_study_on_resume_says_what_differs(tmp_path: Path) -> None:
    with Store(tmp_path / "search.db", IDENTITY):
        pass
    with pytest.raises(UsageError) as caught:
        Store(tmp_path / "search.db", {**IDENTITY, "steps": 8}, resume=True)
    assert caught.value.details["got"] == "steps 8"
    assert caught.value.details["want"] == "steps 4"


def test_a_begun_search_is_not_begun_again_by_accident(tmp_path: Path) -> None:
    with Store(tmp_path / "search.db", IDENTITY) as store:
        store.put(schedule(0), Evaluation(1.0, 2.0, 3.0))
    with pytest.raises(UsageError, match="begun before"):
        Store(tmp_path / "search.db", IDENTITY)
    # Another study may be in the same file.
    with Store(tmp_path / "search.db", {**IDENTITY, "seed": 1}) as store:
        assert store.get(schedule(0).digest()) is None


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no search to resume"):
        Store(tmp_path / "search.db", IDENTITY, resume=True)
    assert not (tmp_path / "search.db").exists()


def write_text(path: Path) -> None:
    path.write_bytes(b"not a data base" * 1000)


def write_other_application(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()


def write_other_format(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def write_damaged(path: Path) -> None:
    with Store(path, IDENTITY) as store:
        for calls in range(1, 4):
            store.put(schedule(*range(calls)), Evaluation(1.0, 2.0, 3.0))
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x5a" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize("write", [write_text, write_other_application, write_other_format, write_damaged])
def test_a_foreign_or_damaged_file_is_one_error(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    write(path)
    with pytest.raises(UsageError) as caught:
        Store(path, IDENTITY, resume=True)
    assert caught.value.details["at"] == str(path)


def test_a_damaged_row_is_one_error(tmp_path: Path) -> None:
    with Store(tmp_path / "search.db", IDENTITY) as store:
        store.put(schedule(0), Evaluation(1.0, 2.0, 3.0))
        for text in ("{", '{"kind": "dcc schedule"}'):
            store._connection.execute("UPDATE evaluations SET schedule = ?", (text,))
            with pytest.raises(UsageError, match="damaged"):
                store.get(schedule(0).digest())


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        Store(tmp_path / "none" / "search.db", IDENTITY)


def put_many(path: Path, first: int, barrier: Any) -> None:
    space = Space(COMPONENTS, 4)
    rows = np.random.default_rng(0).integers(0, 4, size=(40, space.size))
    barrier.wait(timeout=60)
    with Store(path, IDENTITY, resume=path.exists()) as store:
        for row in rows:
            store.put(to_schedule(space, Genome.of_vector(space, row)), Evaluation(1.0, float(first), 3.0))


def test_two_searches_may_use_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    Store(path, IDENTITY).close()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=put_many, args=(path, first, barrier)) for first in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    with Store(path, IDENTITY, resume=True) as store:
        rows = store.all()
    assert len({row.digest for row in rows}) == len(rows) > 10
    assert {row.evaluation.loss for row in rows} <= {1.0, 2.0}


def test_reuse_and_forecast_survive_the_text(tmp_path: Path) -> None:
    asked = schedule(0, 2)
    assert asked.actions[1][0] == REUSE
    with Store(tmp_path / "search.db", IDENTITY) as store:
        store.put(asked, Evaluation(1.0, 2.0, 3.0))
        assert store.all()[0].schedule.digest() == asked.digest()
