"""What a search refuses before any work is done, who gets which processors, and what a point is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import studies

from dcc.cost_model.table import default_path, machine_of_this_process
from dcc.driver import compile
from dcc.errors import UsageError
from dcc.ir.schedule import full_schedule
from dcc.preparation import Source
from dcc.search.front import Front, pick
from dcc.search.study import DATABASE, search, told_apart
from dcc.search.workers import SerialWorkers


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Nothing here is about the classic methods, whose measuring would take most of the time.
        patch.setattr("dcc.search.study.classics", lambda _: [])
        yield


def searched(folder: Path, model: Any = studies.MODEL, **options: Any) -> Front:
    return search(model, output=folder, **{**studies.CPU_OPTIONS, "images": studies.IMAGES, "budget": 1, **options})


class Elsewhere(SerialWorkers):
    """Workers that say what they were given, and whether they were left."""

    made: list[Elsewhere]

    def __init__(self, make: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(make)
        self.make, self.arguments, self.options, self.closed = make, arguments, options, False
        self.made.append(self)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Elsewhere]:
    made: list[Elsewhere] = []
    monkeypatch.setattr(Elsewhere, "made", made, raising=False)
    monkeypatch.setattr("dcc.search.study.ProcessWorkers", Elsewhere)
    monkeypatch.setattr("dcc.search.study.RayWorkers", Elsewhere)
    return made


# Before the model is loaded: there is no such model.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"processes": 0}, "a search needs workers"),
        ({"processes": 2, "ray": "auto"}, "--ray and --processes exclude one another"),
        ({"max_latency_ms": 0.0}, "the limit of latency is out of range"),
        ({"max_history_bytes": -1}, "the limit of history is out of range"),
        ({"min_psnr": float("nan")}, "the limit of psnr is out of range"),
        ({"processes": 2, "model": object()}, "other processes can only load a model that has a name"),
        ({"ray": "auto", "model": object()}, "other processes can only load a model that has a name"),
    ],
)
def test_options_are_refused_first(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        searched(tmp_path / "front", **{"model": "nowhere:model", **options})
    assert reason in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_ray_that_is_not_there_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Ray is not installed"):
        searched(tmp_path / "front", "nowhere:model", ray="auto")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object, **__: object) -> None:
        raise UsageError("the Ray cluster does not answer")

    monkeypatch.setattr("dcc.search.study.RayWorkers", dead)
    with pytest.raises(UsageError, match="the Ray cluster does not answer"):
        searched(tmp_path / "front", "nowhere:model", ray="127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


# Workers.


def test_processes_divide_the_processors(
    elsewhere: list[Elsewhere], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(machine_of_this_process(), processors=10)
    monkeypatch.setattr("dcc.search.study.machine_of_this_process", lambda: machine)
    for options in ({"processes": 3}, {"processes": 64}, {"ray": "auto"}):
        with pytest.raises(Exception, match="nowhere"):
            searched(tmp_path / "front", "nowhere:model", **options)
    assert [item.make.keywords for item in elsewhere] == [{"threads": 3}, {"threads": 1}, {"threads": 1}]
    assert [item.arguments for item in elsewhere] == [(3,), (64,), ()]
    assert elsewhere[2].options == {"address": "auto", "cpus": 1}
    assert all(item.closed for item in elsewhere)


def test_workers_are_left_where_the_store_refuses(elsewhere: list[Elsewhere], tmp_path: Path) -> None:
    folder = tmp_path / "front"
    folder.mkdir()
    (folder / DATABASE).write_text("no data base")
    with pytest.raises(UsageError, match="the search's file"):
        searched(folder, ray="auto", resume=True)
    assert [item.closed for item in elsewhere] == [True]


# Points.


def test_schedules_of_one_name_are_told_apart() -> None:
    components = ("a", "b", "c", "d")
    one, two = (replace(studies.spans(components, calls), name="same") for calls in ((0, 2), (0, 3)))
    found, exact = replace(studies.spans(components, (0, 1)), name="search"), full_schedule(components, studies.STEPS)
    assert told_apart([one, two, found, exact]) == {
        one.digest(): f"same {one.digest()[:8]}",
        two.digest(): f"same {two.digest()[:8]}",
        found.digest(): f"search {found.digest()[:8]}",
        exact.digest(): "exact",
    }


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, shared: None) -> Front:
    """With points that the search made: the seeds are seven, and come after the exact schedule."""
    return searched(tmp_path_factory.mktemp("points") / "front", budget=20)


def test_every_point_can_be_picked_by_its_name(front: Front) -> None:
    assert any(point.name.startswith("search ") for point in front.everything)
    for point in front.everything:
        assert pick(front, point.name) == point
        assert point.schedule.name == point.name
        if point.name.startswith("search "):
            assert point.name == f"search {point.digest[:8]}"
            assert pick(front, point.name.removeprefix("search ")) == point


def test_the_exact_schedule_is_no_point_where_it_breaks_a_limit(tmp_path: Path) -> None:
    found = searched(tmp_path / "front", max_latency_ms=1e-3)
    assert found.points == ()
    assert [point.name for point in found.others] == ["exact"] and found.exact is not None
    assert Front.read(tmp_path / "front/front.json") == found
    assert (tmp_path / "front/front.png").exists() and (tmp_path / "front/index.html").exists()
    with pytest.raises(UsageError, match="no point of the front is that fast"):
        pick(found, "1x")


# Predictions.


def test_o3_predicts_from_the_table_that_it_made(tmp_path: Path) -> None:
    options = {**studies.CPU_OPTIONS, "images": studies.IMAGES, "budget": 6, "require": "cosine>=-1"}
    worth = compile(studies.MODEL, output=tmp_path / "a.dcc", opt_level=3, **options).schedule
    assert worth is not None and worth["predicted_ms"] > 0
    assert worth["prediction_error"] == pytest.approx(worth["predicted_ms"] / worth["latency_ms"] - 1)


def test_a_damaged_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "cache"))
    path = default_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    program = studies.prepared(Source(studies.MODEL, **studies.CPU_OPTIONS)).program
    options = {**studies.CPU_OPTIONS, "images": studies.IMAGES}
    heard: list[str] = []
    worth = compile(
        studies.MODEL, output=tmp_path / "a.dcc", schedule=studies.spans(program.components, (0, 2)),
        progress=heard.append, **options,
    ).schedule  # fmt: skip
    assert worth is not None and worth["predicted_ms"] is None
    assert [text for text in heard if f"the calibration table {path} is damaged" in text]
