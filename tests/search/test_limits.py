"""`dcc search` under a limit: it finds points, all of them keep the limit, and without it some would not."""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import studies

from dcc import cli
from dcc.cost_model.table import CalibrationTable
from dcc.ir.measurements import subject_of
from dcc.ir.schedule import Schedule
from dcc.search.evaluator import TrajectoryEvaluator
from dcc.search.front import Front, Point
from dcc.search.laboratory import Laboratory
from dcc.search.study import DATABASE, TABLE, history_bytes, seeds

# Evaluations beside the exact schedule and the seeds, which are evaluated whatever the limits.
CHOSEN = 8
MIB = 2**20


class Search(NamedTuple):
    """The points that a search found, with the schedules that it chose to evaluate after the seeds."""

    points: list[Point]
    chosen: list[Schedule]


Searched = Callable[..., Search]


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Limits do not concern the classic methods, whose measuring would take most of the time.
        patch.setattr("dcc.search.study.classics", lambda _: [])
        yield


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, shared: None) -> Laboratory:
    made = studies.laboratory(tmp_path_factory.mktemp("laboratory"), held_out_images=2 * studies.IMAGES)
    made.program.measurements = made.measurements()
    return made


@pytest.fixture(scope="module")
def searched(laboratory: Laboratory) -> Searched:
    """`searched(folder, *limits)`: one command line."""
    first = 1 + len(seeds(subject_of(laboratory.program)))

    def run(folder: Path, *limits: object) -> Search:
        command = (
            "search", studies.MODEL, "-o", folder, "--sampler", "ddim", "--steps", studies.STEPS, "--max-batch", 4,
            "--images", studies.IMAGES, "--budget", first + CHOSEN, *limits,
        )  # fmt: skip
        assert cli.main([str(part) for part in command]) == 0
        with sqlite3.connect(folder / DATABASE) as connection:
            rows = connection.execute("SELECT schedule FROM evaluations ORDER BY created, rowid").fetchall()
        connection.close()
        points = [point for point in Front.read(folder / "front.json").everything if point.origin == "search"]
        return Search(points, [Schedule.from_json(json.loads(text)) for (text,) in rows[first:]])

    return run


@pytest.fixture(scope="module")
def free(searched: Searched, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Search]:
    """The folder and the outcome of a search without a limit."""
    folder = tmp_path_factory.mktemp("free") / "front"
    return folder, searched(folder)


@pytest.fixture
def limited(searched: Searched, free: tuple[Path, Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searched:
    """`limited(option, bound)`: the same search under a limit, with the latencies that the free one had."""
    table = CalibrationTable.load(free[0] / TABLE)
    monkeypatch.setattr("dcc.search.study.calibrated", lambda laboratory, folder, *_, **__: table)
    return lambda option, bound: searched(tmp_path / "front", option, repr(bound))


def assert_kept(free: Search, found: Search, value: Callable[[Point], float], keeps: Callable[[float], bool]) -> None:
    assert found.points and found.chosen
    assert all(keeps(value(point)) for point in found.points)
    assert not all(keeps(value(point)) for point in free.points)


def test_the_latency_stays_below_its_limit(
    free: tuple[Path, Search], limited: Searched, laboratory: Laboratory
) -> None:
    def latency(point: Point) -> float:
        assert point.predicted_ms is not None
        return point.predicted_ms

    bound = statistics.median(map(latency, free[1].points))
    found = limited("--max-latency", bound)
    assert_kept(free[1], found, latency, lambda value: value <= bound)
    # Known beforehand, so that no evaluation is spent on what would break it.
    evaluator = TrajectoryEvaluator(laboratory, CalibrationTable.load(free[0] / TABLE))
    assert all(evaluator.latency_ms(schedule) <= bound for schedule in found.chosen)


def test_the_histories_stay_below_their_limit(
    free: tuple[Path, Search], limited: Searched, laboratory: Laboratory
) -> None:
    def kept(point: Point) -> int:
        return history_bytes(laboratory, point.schedule)

    most = max(map(kept, free[1].points))
    bound = most / 2
    found = limited("--max-history", bound / MIB)
    assert_kept(free[1], found, kept, lambda value: value <= bound)
    # Not only what keeps nothing at all.
    assert any(kept(point) > 0 for point in found.points)
    assert all(history_bytes(laboratory, schedule) <= bound for schedule in found.chosen)
    assert any(history_bytes(laboratory, schedule) > bound for schedule in free[1].chosen)


@pytest.mark.slow
def test_no_history_leaves_what_keeps_nothing(limited: Searched, laboratory: Laboratory) -> None:
    found = limited("--max-history", 0.0)
    assert all(history_bytes(laboratory, schedule) == 0 for schedule in found.chosen)
    assert all(history_bytes(laboratory, point.schedule) == 0 for point in found.points)


def test_the_psnr_stays_above_its_limit(free: tuple[Path, Search], limited: Searched) -> None:
    def decibels(point: Point) -> float:
        assert point.search_psnr is not None
        return point.search_psnr

    bound = statistics.median(map(decibels, free[1].points))
    assert_kept(free[1], limited("--min-psnr", bound), decibels, lambda value: value >= bound)


def test_a_limit_that_nothing_keeps_leaves_the_exact_schedule(limited: Searched, tmp_path: Path) -> None:
    assert limited("--min-psnr", 1e6).points == []
    assert [point.origin for point in Front.read(tmp_path / "front/front.json").points] == ["exact"]
