"""`dcc.search`: what it leaves in its folder, what a resumed one repeats (nothing), and what it refuses."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import studies

import dcc
from dcc.cost_model.table import CalibrationTable
from dcc.errors import UsageError
from dcc.ir.measurements import Measurements, subject_of
from dcc.ir.schedule import full_schedule
from dcc.preparation import Source
from dcc.search.evaluator import TrajectoryEvaluator
from dcc.search.evolution import Progress
from dcc.search.front import Front, pick
from dcc.search.laboratory import HELD_OUT_SEED, SEARCH_SEED, Laboratory
from dcc.search.study import DATABASE, MEASURED, TABLE, _worker, classics, history_bytes, search, seeds
from dcc.search.workers import SerialWorkers

BUDGET = 6
REPORT = ("front.json", "front.csv", "front.png", "index.html")


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def searched(folder: Path, model: Any = studies.MODEL, **options: Any) -> Front:
    given = {**studies.CPU_OPTIONS, "images": studies.IMAGES, "budget": BUDGET, **options}
    return search(model, output=folder, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "front"


@pytest.fixture(scope="module")
def heard() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def front(folder: Path, heard: list[Progress], shared: None) -> Front:
    return searched(folder, progress=heard.append)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, front: Front, folder: Path) -> Laboratory:
    """As the search had it, with its measurements."""
    made = studies.laboratory(tmp_path_factory.mktemp("laboratory"), held_out_images=2 * studies.IMAGES)
    made.program.measurements = Measurements.from_json(json.loads((folder / MEASURED).read_text()))
    return made


def stored(folder: Path) -> list[tuple[str, float]]:
    """Digest and time of every evaluation in a search's folder."""
    with sqlite3.connect(folder / DATABASE) as connection:
        found = connection.execute("SELECT digest, created FROM evaluations ORDER BY created").fetchall()
    connection.close()
    return found


def digests(front: Front) -> list[str]:
    return sorted(point.digest for point in front.everything)


def test_the_report_is_in_the_folder(front: Front, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*REPORT, DATABASE, TABLE, MEASURED}
    assert Front.read(folder / "front.json") == front
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert len(rows) == len(front.everything)
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "data:image/png;base64" in page and 'src="http' not in page


def test_the_front_says_what_it_is_of(front: Front, laboratory: Laboratory) -> None:
    assert front.program == laboratory.program.denoiser_hash()
    assert (front.sampler, front.steps, front.target, front.batch) == ("ddim", 5, "cpu", 2)
    assert front.seeds == (SEARCH_SEED, SEARCH_SEED + 1)
    assert front.held_out == tuple(range(HELD_OUT_SEED, HELD_OUT_SEED + 4))
    assert front.evaluations == BUDGET == front.history[-1].evaluations
    assert front.guidance_scale == laboratory.program.guidance.scale
    assert front.exact is not None and front.exact.speedup == 1


def test_every_point_is_measured(front: Front, laboratory: Laboratory) -> None:
    found = {item.method for item in classics(subject_of(laboratory.program))}
    assert found & {point.origin for point in front.others}
    assert len(front.everything) > BUDGET
    for point in front.everything:
        assert point.schedule.program == front.program
        assert point.latency_ms == pytest.approx(front.exact_ms / point.speedup)
        assert point.predicted_ms is not None and point.predicted_ms > 0
        assert (point.search_psnr is not None) == (point.origin == "search")
        if point.origin == "exact":
            assert point.psnr == float("inf") and point.computed_share == pytest.approx(1)
        if point.fewer_steps is not None:
            assert point.fewer_steps.steps < front.steps
            assert point.fewer_steps.latency_ms <= point.latency_ms * 1.01


def test_quality_is_of_the_held_out_samples(front: Front, laboratory: Laboratory) -> None:
    for point in (front.points[-1], front.others[0]):
        samples = laboratory.run(point.schedule, laboratory.held_out).samples
        _, decibels, structure = laboratory.quality(samples, laboratory.held_out)
        assert decibels == pytest.approx(point.psnr, abs=0.01)
        assert structure == pytest.approx(point.ssim, abs=1e-4)


def test_a_point_can_be_picked(front: Front, folder: Path) -> None:
    again = Front.read(folder / "front.json")
    for point in front.points:
        assert pick(again, point.digest[:12]).schedule == point.schedule


def test_progress_is_told_after_each_evaluation(front: Front, heard: list[Progress]) -> None:
    assert [item.evaluations for item in heard] == list(range(1, BUDGET + 1))
    assert heard[-1].budget == BUDGET and heard[-1].seconds_left == 0


def test_seeds_come_first(front: Front, folder: Path, laboratory: Laboratory) -> None:
    """The budget is smaller than the seeds: the exact schedule, then as many of them as it allows."""
    first = seeds(subject_of(laboratory.program))
    assert len(first) > BUDGET
    assert [digest for digest, _ in stored(folder)][1:] == [item.digest() for item in first][: BUDGET - 1]


def test_resuming_evaluates_nothing_anew(
    front: Front, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(folder)
    kept = [(folder / name).read_bytes() for name in (TABLE, MEASURED)]

    def refuse(*_: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(TrajectoryEvaluator, "evaluate", refuse)
    monkeypatch.setattr(Laboratory, "measurements", refuse)
    monkeypatch.setattr("dcc.search.study.calibrate", refuse)
    again = searched(folder, resume=True)
    assert stored(folder) == before
    assert [(folder / name).read_bytes() for name in (TABLE, MEASURED)] == kept
    assert digests(again) == digests(front)
    assert again.evaluations == front.evaluations and again.history == front.history


def test_more_budget_goes_on(front: Front, tmp_path: Path) -> None:
    here = tmp_path / "front"
    first = searched(here, budget=2)
    before = stored(here)
    more = searched(here, budget=4, resume=True)
    assert len(before) == 2 and stored(here)[:2] == before and len(stored(here)) == 4
    assert (first.evaluations, more.evaluations) == (2, 4)


def test_dcc_search_is_the_verb(front: Front, folder: Path) -> None:
    with pytest.raises(UsageError, match="there is a search in this folder"):
        dcc.search(studies.MODEL, output=folder)


def test_a_folder_with_a_search_is_refused(front: Front, folder: Path) -> None:
    before = (folder / "front.json").read_bytes()
    with pytest.raises(UsageError, match="--resume, or another -o"):
        searched(folder)
    assert (folder / "front.json").read_bytes() == before


def test_another_search_cannot_be_resumed(front: Front, folder: Path) -> None:
    before = stored(folder)
    for options in ({"seed": 1}, {"steps": 4}, {"images": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(UsageError, match="the search to resume is another one"):
            searched(folder, resume=True, **options)
    assert stored(folder) == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no search to resume"):
        searched(tmp_path / "front", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (studies.MODEL, {"sampler": "none", "steps": None}, "a schedule needs a sampler"),
        (studies.PLAIN, {}, "no component was found"),
        (studies.MODEL, {"budget": 0}, "budget 0"),
        (studies.MODEL, {"images": 0}, "0 images"),
        (studies.MODEL, {"target": "abacus"}, "unknown target"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, model: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        searched(tmp_path / "front", model, **options)
    assert reason in str(refusal.value)
    assert not list(tmp_path.rglob("*.*"))


def test_other_processes_need_a_name(front: Front, tmp_path: Path) -> None:
    """A module cannot be sent to them."""
    loaded = studies.prepared(Source(studies.MODEL, **studies.CPU_OPTIONS)).loaded
    with pytest.raises(UsageError, match="other processes can only load a model that has a name"):
        searched(
            tmp_path / "front", loaded.module, example_inputs=loaded.example_inputs, roles=loaded.roles, processes=2
        )


def test_a_worker_evaluates_as_the_search_does(
    front: Front, folder: Path, laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = Source(studies.MODEL, **studies.CPU_OPTIONS)
    other = _worker(source, None, studies.IMAGES, str(folder), str(folder))
    own = TrajectoryEvaluator(laboratory, CalibrationTable.load(folder / TABLE))
    schedule = studies.spans(laboratory.program.components, (0, 2))
    one, two = own.evaluate(schedule), other.evaluate(schedule)
    assert (one.latency_ms, one.loss, one.psnr, one.schedule) == (two.latency_ms, two.loss, two.psnr, two.schedule)
    assert one.schedule is not None and one.latency_ms < own.latency_ms(None)
    exact = own.evaluate(full_schedule(laboratory.program.components, laboratory.program.calls))
    assert exact.loss == 0 and exact.schedule is None
    with SerialWorkers(lambda: own) as workers:
        assert [item.loss for _, item in workers.run([schedule])] == [one.loss]


def test_history_bytes_are_of_what_is_kept(laboratory: Laboratory) -> None:
    components = laboratory.program.components
    exact = full_schedule(components, laboratory.program.calls)
    reuse, forecast = (history_bytes(laboratory, studies.spans(components, (0, 1, 3), order)) for order in (0, 1))
    assert history_bytes(laboratory, exact) == 0
    assert 0 < reuse < forecast
