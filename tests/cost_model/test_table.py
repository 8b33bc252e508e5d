"""The calibration table: what was measured comes back, what was not follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcc.cost_model.table import (
    CALL,
    ENGINE,
    CalibrationTable,
    Coefficients,
    Machine,
    Measurement,
    default_path,
    fit,
    machine_of_this_process,
    solve_parts,
    table_of_this_machine,
)
from dcc.cost_model.work import EngineWork, Part, RowWork, Work, combination_part, sum_part
from dcc.errors import UsageError

MACHINE = Machine("a processor", 2, 2, "1.30.0")
TRUTH = Coefficients(flop=2e-11, pointwise=3e-10, byte=5e-11, operation=1e-6, call=8e-6)


def weighted(key: str, flops: float = 1e6, moved: float = 1e4) -> Part:
    """A part with weights."""
    return Part(key, RowWork(Work(weight_bytes=4096.0, operations=4.0), Work(flops, flops / 50, moved, moved)))


def measured(engine: EngineWork, rows: int, seconds: float, kind: str = ENGINE) -> Measurement:
    parts = tuple((part.key, part.work.at(rows)) for part in engine.parts)
    return Measurement(engine.key, rows, seconds, 0.02, 9, parts, kind)


def true_seconds(engine: EngineWork, rows: int) -> float:
    return TRUTH.call + sum(TRUTH.part_seconds(part.work.at(rows)) for part in engine.parts)


def engines() -> list[EngineWork]:
    parts = [
        sum_part(64),
        sum_part(4096),
        combination_part(2, 4096),
        weighted("stage:a"),
        weighted("stage:b", 4e6, 2e4),
    ]
    return [EngineWork((part,)) for part in parts] + [EngineWork((parts[3], parts[1])), EngineWork(tuple(parts))]


def table(rows: tuple[int, ...] = (2, 8, 32)) -> CalibrationTable:
    found = [measured(engine, count, true_seconds(engine, count)) for engine in engines() for count in rows]
    return CalibrationTable("cpu", MACHINE).merged(found)


def test_a_fit_finds_the_coefficients_that_made_the_seconds() -> None:
    found = table().coefficients[ENGINE]
    assert vars(found) == pytest.approx(vars(TRUTH), rel=1e-6)


def test_a_fit_is_never_negative_and_no_worse_than_leaving_columns_out() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        items = [
            measured(EngineWork((weighted("k", *generator.uniform(1e3, 1e7, 2)),)), 2, generator.uniform(1e-6, 1e-2))
            for _ in range(6)
        ]
        found = fit(items)
        assert all(value >= 0 for value in vars(found).values())

        def loss(item: Coefficients, items: list[Measurement] = items) -> float:
            return sum(((item.call + item.part_seconds(one.work)) / one.seconds - 1) ** 2 for one in items)

        for alone in (Coefficients(call=found.call), Coefficients(flop=found.flop), Coefficients(byte=found.byte)):
            assert loss(found) <= loss(alone) + 1e-9


def test_nothing_measured_is_nothing_known() -> None:
    assert fit([]) == Coefficients()
    assert CalibrationTable("cpu", MACHINE).engine_seconds(engines()[0], 2) < 1e-9


def test_a_measured_engine_takes_what_it_took() -> None:
    engine = EngineWork((weighted("stage:slow"), sum_part(4096)))
    found = table().merged([measured(engine, 8, 0.5)])
    assert found.engine_seconds(engine, 8) == pytest.approx(0.5)
    assert found.is_measured(engine, 8)
    assert not found.is_measured(engine, 9)


def test_rows_between_are_interpolated_and_beyond_follow_the_work() -> None:
    found = table()
    for engine in engines():
        for rows in (1, 2, 5, 16, 32, 100):
            assert found.engine_seconds(engine, rows) == pytest.approx(true_seconds(engine, rows), rel=1e-5)
    # An engine that is twice as slow as the fit at the most rows measured stays so beyond.
    engine = EngineWork((weighted("stage:slow", 8e6),))
    slow = found.merged(measured(engine, rows, 2 * true_seconds(engine, rows)) for rows in (2, 8, 32))
    fitted = slow.coefficients[ENGINE]
    ratio = slow.engine_seconds(engine, 32) / (fitted.call + fitted.part_seconds(engine.at(32)))
    assert slow.engine_seconds(engine, 64) == pytest.approx(
        ratio * (fitted.call + fitted.part_seconds(engine.at(64))), rel=1e-9
    )


def test_an_engine_that_was_not_measured_is_the_sum_of_its_parts_and_one_call() -> None:
    fast, slow = weighted("stage:fast", 3e6), weighted("stage:slow", 2e6)
    seconds = {"stage:fast": 1e-4, "stage:slow": 9e-4}
    known = [EngineWork((part,)) for part in (fast, slow)]
    found = table().merged(measured(item, 8, TRUTH.call + seconds[item.key]) for item in known)
    merged = EngineWork((fast, slow, slow))
    call = found.coefficients[ENGINE].call
    apart = sum(found.engine_seconds(item, 8) for item in (known[0], known[1], known[1]))
    assert found.engine_seconds(merged, 8) == pytest.approx(apart - 2 * call, rel=1e-6)
    assert found.is_measured(merged, 8)


def test_parts_are_solved_for_from_the_engines_that_hold_them() -> None:
    one, two, light = weighted("stage:one"), weighted("stage:two"), sum_part(4096)
    fitted = {part.key: TRUTH.part_seconds(part.work.at(4)) for part in (one, two, light)}
    both = EngineWork((one, two))
    items = [
        measured(both, 4, TRUTH.call + 3 * fitted["stage:one"] + 0.5 * fitted["stage:two"]),
        measured(EngineWork((one, light)), 4, TRUTH.call + 3 * fitted["stage:one"] + fitted[light.key]),
    ]
    found = solve_parts(items, TRUTH)
    assert found == pytest.approx({"stage:one": 3.0, "stage:two": 0.5}, rel=0.02)


def test_open_parts_keep_the_fitted_proportions() -> None:
    one, two = weighted("stage:one"), weighted("stage:two", 5e6)
    total = sum(TRUTH.part_seconds(part.work.at(4)) for part in (one, two))
    found = solve_parts([measured(EngineWork((one, two)), 4, TRUTH.call + 2 * total)], TRUTH)
    assert found == pytest.approx({"stage:one": 2.0, "stage:two": 2.0})


@given(st.lists(st.floats(1e-6, 1e-1), min_size=3, max_size=3))
def test_solved_parts_are_positive_whatever_was_measured(seconds: list[float]) -> None:
    one, two = weighted("stage:one"), weighted("stage:two", 5e6)
    listed = [EngineWork((one,)), EngineWork((one, two)), EngineWork((two, sum_part(64)))]
    items = [measured(engine, 4, value) for engine, value in zip(listed, seconds, strict=True)]
    assert all(0 < ratio < 1e9 for ratio in solve_parts(items, TRUTH).values())


def test_the_newer_measurement_replaces_the_older() -> None:
    engine = EngineWork((weighted("stage:a"),))
    found = CalibrationTable("cpu", MACHINE).merged([measured(engine, 2, 1.0)]).merged([measured(engine, 2, 2.0)])
    assert [item.seconds for item in found.measurements] == [2.0]


def test_the_runtime_s_own_work_is_kept_apart() -> None:
    part = Part("call:ddim:64", RowWork(Work(operations=12.0), Work(read_bytes=1e3)))
    found = table().merged(measured(EngineWork((part,)), rows, 1e-4 * rows, CALL) for rows in (1, 4))
    assert found.host_seconds(part, 4) == pytest.approx(4e-4)
    assert 1e-4 < found.host_seconds(part, 2) < 4e-4
    assert found.coefficients[ENGINE] == table().coefficients[ENGINE]


def test_a_table_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    table().save(path)
    assert CalibrationTable.load(path) == table()
    assert [item.name for item in path.parent.iterdir()] == ["table.json"]


def broken() -> list[tuple[str, Any]]:
    good = table((2,)).to_json()

    def changed(**values: Any) -> dict[str, Any]:
        return {**json.loads(json.dumps(good)), **values}

    first = good["measurements"][0]
    return [
        ("table", []),
        ("table", {key: value for key, value in good.items() if key != "machine"}),
        ("kind", changed(kind="dcc schedule")),
        ("kind", changed(format=2)),
        ("machine", changed(machine={"processor": "x"})),
        ("machine.threads", changed(machine={**good["machine"], "threads": 0})),
        ("own_process", changed(own_process="yes")),
        ("measurements", changed(measurements={})),
        ("measurements[0].kind", changed(measurements=[{**first, "kind": "guess"}])),
        ("measurements[0].seconds", changed(measurements=[{**first, "seconds": 0}])),
        ("measurements[0].seconds", changed(measurements=[{**first, "seconds": float("nan")}])),
        ("measurements[0].rows", changed(measurements=[{**first, "rows": "2"}])),
        ("measurements[0].parts", changed(measurements=[{**first, "parts": []}])),
        ("measurements[0].parts[0]", changed(measurements=[{**first, "parts": [{"key": "x"}]}])),
    ]


@pytest.mark.parametrize(("at", "value"), broken())
def test_what_is_no_table_is_refused_with_the_place(at: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        CalibrationTable.from_json(value)
    assert caught.value.details["at"] == at


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"kind": 1e999}', "\x00"])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        CalibrationTable.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        CalibrationTable.load(tmp_path / "missing.json")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DCC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    ending = f"calibration/cpu-{MACHINE.digest}.json"
    assert default_path("cpu", MACHINE) == tmp_path / ".cache/dcc" / ending
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path("cpu", MACHINE) == tmp_path / "xdg/dcc" / ending
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "own"))
    assert default_path("cpu", MACHINE) == tmp_path / "own" / ending


def test_later_compiles_find_the_table_of_their_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCC_CACHE", str(tmp_path))
    assert table_of_this_machine() is None
    mine = CalibrationTable("cpu", machine_of_this_process()).merged(table().measurements)
    mine.save(default_path("cpu", mine.machine))
    assert table_of_this_machine() == mine
    assert table_of_this_machine(threads=97) is None
    path, heard = default_path("cpu", mine.machine), list[str]()
    table().save(path)  # another machine's table under this machine's name
    assert table_of_this_machine(note=heard.append) is None
    path.write_text("{")
    assert table_of_this_machine(note=heard.append) is None
    assert [text.partition(str(path))[2].split(":")[0] for text in heard] == [
        " is of another machine",
        " is damaged (Expecting property name enclosed in double quotes",
    ]
    assert all("dcc calibrate MODEL" in text for text in heard)


def test_a_table_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the calibration table cannot be written"):
        table().save(tmp_path / "file" / "table.json")
