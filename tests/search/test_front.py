"""The front: what it holds, that it survives a file, that a foreign one is refused, and what --pick finds."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcc.errors import DccError, ExportError, ScheduleError, UsageError
from dcc.ir.schedule import (
    BOTH,
    CONDITIONAL,
    REUSE_DIFFERENCE,
    Schedule,
    branch_units,
    delta_units,
    forecast,
    from_steps,
    full_schedule,
)
from dcc.search.front import FewerSteps, Front, HistoryRow, Point, non_dominated, pick, write_files

PROGRAM = "ab" * 32
CALLS = 20
COMPONENTS = tuple(f"blocks.{block}.{part}" for block in range(8) for part in ("attention", "mlp"))
EXACT_MS = 400.0


def made_up(name: str, origin: str, schedule: Schedule, gain: float) -> Point:
    """A point with numbers from a formula: time grows with the share computed, and `gain` dB are the method's."""
    share = schedule.computed_share([1.0] * len(schedule.components), 0.5)
    exact = share == 1.0
    latency = EXACT_MS * (0.03 + 0.97 * share)
    speedup = EXACT_MS / latency
    steps = max(round(CALLS * share), 1)
    level = math.inf if exact else 42.0 - 11.0 * math.log2(speedup) + gain
    fewer = FewerSteps(steps, EXACT_MS * steps / CALLS, 34.0 - 11.0 * math.log2(CALLS / steps), 0.71)
    return Point(
        name=name, origin=origin, schedule=replace(schedule, name=name), latency_ms=latency, speedup=speedup,
        computed_share=share, psnr=level, ssim=1.0 if exact else 0.9, predicted_ms=latency * 1.04,
        search_psnr=math.inf if exact else level + 0.6 if origin == "search" else None,
        fewer_steps=None if exact else fewer,
    )  # fmt: skip


def made_up_points(components: tuple[str, ...] = COMPONENTS, calls: int = CALLS, searched: int = 24) -> list[Point]:
    """The exact one, classic methods, and random schedules as a search finds them."""
    draw = random.Random(7)
    branches = branch_units(components)
    points = [made_up("exact", "exact", full_schedule(components, calls), 0.0)]
    for origin, order, gain in (("fora", 0, -7.0), ("taylorseer", 1, -4.0)):
        for every in (2, 3, 4, 6):
            computes = [[call % every == 0] * len(branches) for call in range(calls)]
            points.append(made_up(f"{origin}-{every}", origin, from_steps(components, branches, computes, order), gain))
    spans = delta_units(components, (0, len(components) // 4, 3 * len(components) // 4))
    computes = [[call % 3 == 0, call % 2 == 0 or call < 4, True] for call in range(calls)]
    points.append(made_up("delta-dit", "delta-dit", from_steps(components, spans, computes), -5.0))
    for index in range(searched):
        share = 0.12 + 0.7 * index / searched
        computes = [[draw.random() < share for _ in branches] for _ in range(calls)]
        late = calls - calls // 4
        modes = [BOTH if call < late else (CONDITIONAL, REUSE_DIFFERENCE)[index % 2] for call in range(calls)]
        schedule = from_steps(components, branches, computes, index % 3, modes if index % 4 == 0 else ())
        points.append(made_up(f"search-{index}", "search", schedule, draw.uniform(-1.5, 1.0)))
    return points


def made_up_front(points: list[Point] | None = None, **changes: Any) -> Front:
    """A front of made-up points, with every field filled in."""
    front, others = non_dominated(made_up_points() if points is None else points)
    rows = [
        HistoryRow(count, 20.0 * (1 - math.exp(-count / 60)), {"2x": 25 + count / 40, "3x": 20 + count / 50})
        for count in range(0, 201, 8)
    ]
    fields: dict[str, Any] = {
        "model": "digits", "program": PROGRAM, "sampler": "ddim", "steps": CALLS, "target": "cpu", "batch": 16,
        "guidance_scale": 3.0, "seeds": (0, 1, 2, 3), "held_out": (100, 101, 102, 103), "exact_ms": EXACT_MS,
        "evaluations": 200, "seconds": 61.5, "points": front, "others": others, "history": tuple(rows),
        "notes": {"operators": {"mutation": "column", "rate": 0.1}, "warm": True, "seeded": ["fora", None]},
        **changes,
    }  # fmt: skip
    return Front(**fields)


@pytest.fixture(scope="module")
def front() -> Front:
    return made_up_front()


def test_the_file_reads_back_equal(front: Front, tmp_path: Path) -> None:
    assert front.exact is not None
    assert math.isinf(front.exact.psnr)
    front.write(tmp_path / "front.json")
    again = Front.read(tmp_path / "front.json")
    assert again == front
    assert again.to_bytes() == front.to_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_infinite_psnr_is_null_and_what_was_not_measured_is_told_from_it(front: Front) -> None:
    value = json.loads(front.to_bytes())
    entries = {entry["name"]: entry for entry in [*value["points"], *value["others"]]}
    assert entries["exact"]["psnr"] is None
    assert entries["exact"]["search_psnr"] is None
    assert "search_psnr" not in entries["fora-2"]
    points = {point.name: point for point in Front.from_json(value).everything}
    assert points["exact"].search_psnr == math.inf
    assert points["fora-2"].search_psnr is None


def test_non_dominated_is_what_no_other_point_dominates() -> None:
    draw = random.Random(1)
    base = made_up("p", "search", full_schedule(("a",), 2), 0.0)
    # A coarse lattice, so that ties in one and in both objectives occur.
    points = [replace(base, name=str(i), speedup=draw.randint(1, 6) / 2, psnr=draw.randint(20, 26)) for i in range(60)]
    front, rest = non_dominated(points)
    assert sorted([*front, *rest], key=lambda point: int(point.name)) == points
    assert [*front] == sorted(front, key=lambda point: point.speedup)
    for point in front:
        assert not any(other.dominates(point) for other in points)
    for point in rest:
        twins = [other for other in front if (other.speedup, other.psnr) == (point.speedup, point.psnr)]
        assert twins or any(other.dominates(point) for other in points)
    assert non_dominated([]) == ((), ())


def test_the_first_of_equal_points_stays() -> None:
    base = made_up("first", "search", full_schedule(("a",), 2), 0.0)
    twin = replace(base, name="second")
    assert non_dominated([base, twin]) == ((base,), (twin,))


@pytest.mark.parametrize("speed", [1.0, 1.5, 2.0, 3.0])
def test_a_speedup_picks_the_best_of_that_speed(front: Front, speed: float) -> None:
    best = max(point.psnr for point in front.points if point.speedup >= speed)
    assert pick(front, f"{speed}x").psnr == best
    assert pick(front, f" {speed:g} X ").psnr == best


@pytest.mark.parametrize("level", [20.0, 30.5])
def test_a_psnr_picks_the_fastest_that_reaches_it(front: Front, level: float) -> None:
    fastest = max(point.speedup for point in front.points if point.psnr >= level)
    assert pick(front, f"{level}dB").speedup == fastest
    assert pick(front, f"{level}db").speedup == fastest


def test_a_name_or_a_digest_picks_a_point_of_the_others_too(front: Front) -> None:
    classic = next(point for point in front.others if point.origin == "fora")
    assert pick(front, classic.name) == classic
    assert pick(front, classic.digest) == classic
    assert pick(front, classic.digest[:12].upper()) == classic


def test_too_much_asked_names_what_is_nearest_and_the_advice_works(front: Front) -> None:
    with pytest.raises(UsageError) as caught:
        pick(front, "90x")
    fastest = front.points[-1]
    assert caught.value.details["want"].startswith(f"{fastest.name} ({fastest.digest[:12]}): ")
    assert pick(front, caught.value.details["next"].removeprefix("--pick ")) == fastest


def test_a_psnr_out_of_reach_names_the_best() -> None:
    points = [point for point in made_up_points() if point.origin != "exact"]
    front = made_up_front(points)
    with pytest.raises(UsageError) as caught:
        pick(front, "99dB")
    assert pick(front, caught.value.details["next"].removeprefix("--pick ")) == front.points[0]


@pytest.mark.parametrize("text", ["", "ab", "nothing", "x", "-2x", "2.5", "1e3x", "nanx", "2xx", "\ud800"])
def test_what_names_no_point_is_refused(front: Front, text: str) -> None:
    with pytest.raises(UsageError, match="no point of the front has that name or digest"):
        pick(front, text)


def test_a_front_without_points_has_nothing_to_pick() -> None:
    with pytest.raises(UsageError, match="a front that has points"):
        pick(made_up_front([]), "2x")


def test_a_name_given_to_two_schedules_is_refused_and_to_one_twice_is_not(front: Front) -> None:
    first, second = (point for point in front.others if point.origin == "fora" and point.name in ("fora-2", "fora-3"))
    both = replace(front, points=(), others=(first, replace(second, name=first.name)))
    with pytest.raises(UsageError, match="several points of the front fit"):
        pick(both, first.name)
    again = replace(front, points=(), others=(first, replace(first, latency_ms=1.0)))
    assert pick(again, first.name) == first


def edited(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        inner: Any = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return edit


def swapped(data: dict[str, Any]) -> None:
    data["points"][0], data["points"][1] = data["points"][1], data["points"][0]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another kind": (edited("kind", value="dcc schedule"), "not a front that can be read"),
    "another format": (edited("format", value=2), "not a front that can be read"),
    "a missing field": (lambda data: data.pop("steps"), "no steps"),
    "an extra field": (edited("more", value=1), "also 'more'"),
    "a text for a number": (edited("points", 1, "latency_ms", value="fast"), r"points\[1\].latency_ms"),
    "true for a number": (edited("exact_ms", value=True), "exact_ms"),
    "no latency": (edited("points", 1, "latency_ms", value=0), "more than 0"),
    "a huge integer": (edited("points", 1, "speedup", value=10**400), "a number up to"),
    "NaN": (edited("points", 1, "psnr", value=math.nan), "a number up to"),
    "infinity": (edited("points", 1, "psnr", value=math.inf), "a number up to"),
    "minus infinity": (edited("others", 0, "search_psnr", value=-math.inf), "a number up to"),
    "a share above one": (edited("points", 1, "computed_share", value=1.5), "0 to 1"),
    "ssim above one": (edited("points", 1, "ssim", value=1.5), "-1 to 1"),
    "no steps": (edited("steps", value=0), "1 or more"),
    "steps of a fraction": (edited("steps", value=2.5), "an integer"),
    "a seed of text": (edited("seeds", 0, value="0"), r"seeds\[0\]"),
    "seeds that were seen": (edited("held_out", value=[3, 9]), "seeds that the search saw"),
    "another digest": (edited("points", 1, "digest", value="0" * 64), "the hash of its schedule"),
    "another program": (edited("program", value="cd" * 32), "a schedule for abab"),
    "a schedule cut short": (edited("points", 1, "schedule", "steps", value=[]), "needs at least one call"),
    "no schedule": (edited("points", 1, "schedule", value=None), r"points\[1\].schedule"),
    "an unsorted front": (swapped, "rising speedup and falling psnr"),
    "a dominated point": (edited("points", 1, "psnr", value=-900.0), "rising speedup and falling psnr"),
    "fewer steps of nothing": (edited("points", 1, "fewer_steps", value={}), "no latency_ms"),
    "a history of numbers": (edited("history", value=[1]), r"history\[0\]"),
    "half a surrogate": (edited("points", 1, "name", value="\ud800"), "Unicode"),
    "a long name": (edited("model", value="m" * 1000), "512"),
    "points as an object": (edited("points", value={}), "a list"),
    "notes as a list": (edited("notes", value=[]), "an object"),
    "NaN in notes": (edited("notes", value={"a": {"b": [math.nan]}}), r"notes.a.b\[0\]"),
}


@pytest.fixture(scope="module")
def value() -> dict[str, Any]:
    points = [replace(p, schedule=replace(p.schedule, program=PROGRAM)) for p in made_up_points(COMPONENTS[:4], 6, 6)]
    return made_up_front(points).to_json()


@pytest.mark.parametrize("name", WRONG)
def test_a_front_that_is_not_one_is_refused(value: dict[str, Any], name: str) -> None:
    edit, message = WRONG[name]
    data = copy.deepcopy(value)
    edit(data)
    with pytest.raises(ScheduleError, match=message):
        Front.from_json(data)


@pytest.mark.parametrize("junk", [None, 1, "front", [], {}, {"kind": "dcc front"}, {1: 2}, {"kind": [], "format": {}}])
def test_junk_is_refused(junk: object) -> None:
    with pytest.raises(ScheduleError):
        Front.from_json(junk)


def test_notes_that_nest_without_end_are_refused() -> None:
    notes: dict[str, Any] = {}
    notes["again"] = notes
    with pytest.raises(ScheduleError, match="levels"):
        made_up_front(notes=notes)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"kind": 1, "kind": 2}', b'{"kind": NaN}', b"9" * 10_000]
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "front.json").write_bytes(data)
    with pytest.raises(ScheduleError, match=r"front\.json"):
        Front.read(tmp_path / "front.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be read"):
        Front.read(tmp_path / "front.json")
    with pytest.raises(ScheduleError, match="cannot be read"):
        Front.read(tmp_path)


def test_every_single_damage_of_a_field_raises_only_a_schedule_error(value: dict[str, Any]) -> None:
    """A value of each kind in each place of the front and of one point."""
    point = value["points"][1]
    for junk in (None, True, -1, 0.5, "text", [], {}, [None], 10**30):
        fewer = ("points", 1, "fewer_steps")
        for holder, prefix in ((value, ()), (point, ("points", 1)), (point["fewer_steps"], fewer)):
            for key in holder:
                data = copy.copy(value)
                data["points"] = [value["points"][0], {**point, "fewer_steps": dict(point["fewer_steps"])}]
                edited(*prefix, key, value=junk)(data)
                try:
                    Front.from_json(data)
                except DccError as error:
                    assert isinstance(error, ScheduleError)


def test_a_failed_write_leaves_what_was_there(front: Front, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(ExportError):
        front.write(tmp_path / "none" / "front.json")


def test_forecast_weights_survive_exactly(front: Front, tmp_path: Path) -> None:
    schedule = from_steps(COMPONENTS, branch_units(COMPONENTS), [[call % 3 == 0] * 16 for call in range(CALLS)], 2)
    rows = [list(row) for row in schedule.actions]
    rows[5][3] = forecast((1 / 3, math.pi))
    point = made_up("odd", "search", replace(schedule, actions=tuple(map(tuple, rows))), 0.0)
    kept = replace(front, points=(point,), others=())
    kept.write(tmp_path / "front.json")
    assert Front.read(tmp_path / "front.json").points[0].schedule == point.schedule
