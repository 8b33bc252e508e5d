"""`-O2`, `-O3` and `--schedule` as `dcc.compile` runs them: the schedule, what it is worth, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import studies

from dcc.driver import CompileReport, compile
from dcc.errors import QualityError, ScheduleError, UsageError
from dcc.ir.schedule import Schedule, full_schedule
from dcc.quality import psnr
from dcc.runtime import Artifact, load
from dcc.search.choose import sampler_digest
from dcc.search.laboratory import HELD_OUT_SEED, Laboratory

EASY, IMPOSSIBLE = "cosine>=-1", "psnr>=100000"


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return studies.laboratory(tmp_path_factory.mktemp("choose"), held_out_images=2 * studies.IMAGES)


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Path]:
    """Where a compile that fails must leave nothing."""
    here = tmp_path / "out"
    here.mkdir()
    yield here / "a.dcc"
    assert list(here.iterdir()) == []


class Compiled(NamedTuple):
    path: Path
    report: CompileReport

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_json(json.loads(Artifact.open(self.path).read("schedule.json")))

    @property
    def entry(self) -> dict[str, Any]:
        """The pass report named schedule."""
        rows = Artifact.open(self.path).manifest["report"]["passes"]
        return next(row for row in rows if row["name"] == "schedule")


def compiled(path: Path, model: Any = studies.MODEL, **options: Any) -> Compiled:
    given = {**studies.CPU_OPTIONS, "images": studies.IMAGES, **options}
    return Compiled(path, compile(model, output=path, **given))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, shared: None) -> Compiled:
    return compiled(tmp_path_factory.mktemp("chosen") / "a.dcc", opt_level=2, require=EASY)


def forecasts(laboratory: Laboratory, **changes: Any) -> Schedule:
    return replace(studies.spans(laboratory.program.components, (0, 1, 3)), **changes)


# -O2.


def test_o2_compiles_its_schedule_in(chosen: Compiled, laboratory: Laboratory) -> None:
    schedule = chosen.schedule
    assert sum(row[0].computes for row in schedule.actions) == 1
    assert schedule.components == laboratory.program.components
    assert schedule.program == laboratory.program.denoiser_hash()
    assert schedule.sampler == sampler_digest(laboratory.program.sampler)
    recipe = Artifact.open(chosen.path).manifest["recipe"]
    assert (recipe["opt_level"], recipe["require"]) == (2, EASY)


def test_the_report_says_what_it_is_worth(chosen: Compiled) -> None:
    worth, entry = chosen.report.schedule, chosen.entry
    assert worth is not None
    assert entry["figures"] == worth == json.loads(json.dumps(worth, allow_nan=False))
    assert entry["status"] == "applied" and "found by bisection" in entry["why"]
    assert worth["digest"] == chosen.schedule.digest()
    assert 0 < worth["computed_share"] < 0.5
    assert worth["speedup"] == pytest.approx(worth["exact_ms"] / worth["latency_ms"])
    assert worth["required"]["text"] == EASY and worth["required"]["value"] >= -1
    assert worth["held_out_seeds"] == [HELD_OUT_SEED, HELD_OUT_SEED + 3] and worth["quality"]["images"] == 4
    assert worth["predicted_ms"] is None and worth["prediction_error"] is None
    plain = worth["fewer_steps"]
    assert plain is None or (1 <= plain["steps"] < studies.STEPS and plain["latency_ms"] <= worth["latency_ms"] * 1.01)


def test_the_artifact_has_the_quality_that_is_reported(chosen: Compiled, laboratory: Laboratory) -> None:
    artifact = load(chosen.path, own_process=True)
    samples = artifact.sample(**laboratory.request_values(artifact, laboratory.held_out))
    exact = laboratory.exact_trajectory(laboratory.held_out)[-1]
    worth = chosen.report.schedule
    assert worth is not None
    assert psnr(samples, exact, worth["data_range"]) == pytest.approx(worth["quality"]["psnr"], abs=0.05)
    assert worth["data_range"] == laboratory.data_range


def test_o2_repeats_itself(chosen: Compiled, tmp_path: Path) -> None:
    assert compiled(tmp_path / "again.dcc", opt_level=2, require=EASY).schedule == chosen.schedule


def test_an_impossible_requirement_leaves_no_file(unchanged: Path) -> None:
    with pytest.raises(QualityError, match="no schedule keeps the requirement") as refusal:
        compiled(unchanged, opt_level=2, require=IMPOSSIBLE)
    assert refusal.value.exit_code == 3
    assert "nothing but the exact loop" in str(refusal.value) and "-O1" in str(refusal.value)


def test_a_bound_of_somebody_elses_metric(tmp_path: Path) -> None:
    report = compiled(tmp_path / "a.dcc", opt_level=2, require="numpy:allclose<=1").report
    assert report.schedule is not None and report.schedule["required"]["value"] in (0.0, 1.0)


def test_one_step_leaves_nothing_to_reuse(unchanged: Path) -> None:
    for level in (2, 3):
        with pytest.raises(UsageError, match="one sampler call leaves nothing to reuse") as refusal:
            compiled(unchanged, opt_level=level, require=EASY, budget=4, steps=1)
        assert refusal.value.details["got"] == "1 sampler call"
        assert refusal.value.details["next"] == "more --steps, or compile with -O1"


# -O3.


def test_o3_searches(tmp_path: Path) -> None:
    found = compiled(tmp_path / "a.dcc", opt_level=3, require=EASY, budget=6)
    assert "searched for with 6 evaluations" in found.entry["why"]
    assert found.schedule.computed_share([1.0] * 4) < 1


def test_o3_misses_an_impossible_requirement(unchanged: Path) -> None:
    """Only the exact schedule keeps it, and that is no schedule."""
    try:
        found = compiled(unchanged, opt_level=3, require=IMPOSSIBLE, budget=4)
    except QualityError:
        return
    assert found.schedule.computed_share([1.0] * 4) == 1
    unchanged.unlink()


# A schedule that is given.


def test_a_schedule_is_taken_as_it_is(laboratory: Laboratory, tmp_path: Path) -> None:
    schedule = forecasts(laboratory, name="mine")
    found = compiled(tmp_path / "a.dcc", schedule=schedule)
    assert found.schedule.digest() == replace(
        schedule, program=found.schedule.program, sampler=found.schedule.sampler
    ).digest()
    assert found.schedule.name == "mine"
    assert "given" in found.entry["why"]
    assert "required" not in found.entry["figures"]
    samples = load(tmp_path / "a.dcc", own_process=True)
    got = samples.sample(**laboratory.request_values(samples, laboratory.search))
    np.testing.assert_allclose(got, laboratory.run(schedule, laboratory.search).samples, rtol=0, atol=1e-4)


def test_the_exact_schedule_is_worth_nothing_and_loses_nothing(laboratory: Laboratory, tmp_path: Path) -> None:
    schedule = full_schedule(laboratory.program.components, laboratory.program.calls)
    found = compiled(tmp_path / "a.dcc", schedule=schedule, require="psnr>=200")
    worth = found.report.schedule
    assert worth is not None
    assert worth["computed_share"] == pytest.approx(1)
    assert worth["quality"]["psnr"] is None and worth["quality"]["relative_l2"] == 0
    assert worth["required"]["value"] is None and worth["required"]["holds"]


def test_a_given_schedule_must_keep_the_requirement(laboratory: Laboratory, unchanged: Path) -> None:
    with pytest.raises(QualityError, match="misses the requirement on held-out requests") as refusal:
        compiled(unchanged, schedule=forecasts(laboratory), require=IMPOSSIBLE)
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("steps", [4, 6])
def test_a_schedule_of_other_steps_is_refused(laboratory: Laboratory, unchanged: Path, steps: int) -> None:
    with pytest.raises(ScheduleError) as refusal:
        compiled(unchanged, schedule=forecasts(laboratory), steps=steps)
    assert "5 calls" in str(refusal.value) and f"{steps} calls" in str(refusal.value)


@pytest.mark.parametrize(("key", "what"), [("program", "weights and operations"), ("sampler", "sampler")])
def test_a_schedule_of_something_else_is_refused(
    laboratory: Laboratory, unchanged: Path, key: str, what: str
) -> None:
    with pytest.raises(ScheduleError, match=f"{what} abcabcabcabc"):
        compiled(unchanged, schedule=forecasts(laboratory, **{key: "abc" * 20}))


def test_a_schedule_of_other_components_is_refused(unchanged: Path) -> None:
    with pytest.raises(ScheduleError):
        compiled(unchanged, schedule=studies.spans(("a", "b"), (0, 1)))


def test_a_schedule_needs_a_sampler_and_components(laboratory: Laboratory, unchanged: Path) -> None:
    for options in ({"sampler": "none", "steps": None}, {"model": studies.PLAIN}):
        with pytest.raises(UsageError, match="a schedule needs a sampler and components"):
            compiled(unchanged, schedule=forecasts(laboratory), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("opt_level", [2, 3])
def test_choosing_needs_a_sampler_and_components(unchanged: Path, opt_level: int) -> None:
    with pytest.raises(UsageError, match="a schedule needs a sampler"):
        compiled(unchanged, opt_level=opt_level, sampler="none", steps=None)
    with pytest.raises(UsageError, match="no component was found"):
        compiled(unchanged, studies.PLAIN, opt_level=opt_level)


# Options that disagree are found before anything is loaded: there is no such model.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"opt_level": 2, "schedule": "a.json"}, "a schedule is given, and -O2 and -O3 choose one"),
        ({"opt_level": 3, "schedule": "a.json"}, "a schedule is given, and -O2 and -O3 choose one"),
        ({"require": "psnr>=30"}, "nothing lossy is asked for"),
        ({"opt_level": 0, "require": "psnr>=30"}, "nothing lossy is asked for"),
        ({"pick": "2x"}, "--pick chooses from a front"),
        ({"opt_level": 2, "pick": "2x"}, "--pick chooses from a front"),
        ({"opt_level": 2, "require": "psnr=30"}, "cannot read the requirement"),
        ({"opt_level": 2, "require": "fid<=3"}, "unknown metric"),
        ({"opt_level": 2, "require": "psnr<=30"}, "the wrong way round"),
        ({"opt_level": 3, "budget": 0}, "out of range"),
        ({"opt_level": 2, "images": 0}, "out of range"),
    ],
)
def test_options_that_disagree(unchanged: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        compiled(unchanged, "nowhere:model", **options)
    assert reason in str(refusal.value)
