"""The roofline of a target, and a generation's seconds from its engines'."""

from __future__ import annotations

import pytest

from dcc.cost_model.roofline import LoopWork, Roofline, call_part, predict, request_part
from dcc.cost_model.targets import Figure, Target, target_named
from dcc.cost_model.work import EngineWork, Part, RowWork, Work, sum_part
from dcc.errors import UsageError

SHEET = Roofline(flops_per_second=100.0, bytes_per_second=10.0, operation_seconds=1.0, call_seconds=5.0)


def engine(flops: float = 0.0, moved: float = 0.0, operations: float = 0.0, key: str = "e") -> EngineWork:
    work = RowWork(Work(operations=operations), Work(flops=flops, read_bytes=moved))
    return EngineWork((Part(key, work),))


def test_a_part_takes_the_longer_of_arithmetic_and_traffic() -> None:
    assert SHEET.engine_seconds(engine(flops=200.0, moved=10.0), 1) == pytest.approx(5 + 2)
    assert SHEET.engine_seconds(engine(flops=200.0, moved=50.0), 1) == pytest.approx(5 + 5)
    assert SHEET.engine_seconds(engine(flops=200.0, moved=50.0), 3) == pytest.approx(5 + 15)
    assert SHEET.engine_seconds(engine(operations=4.0), 3) == pytest.approx(5 + 4)


def test_the_sheet_of_the_cpu_scales_with_processors() -> None:
    one, four = (Roofline.of("cpu", processors=count) for count in (1, 4))
    assert four.flops_per_second == 4 * one.flops_per_second
    assert (four.bytes_per_second, four.call_seconds) == (one.bytes_per_second, one.call_seconds)
    assert all(item.source for item in target_named("cpu").figures)


def test_a_target_without_the_figures_is_refused() -> None:
    target = Target("slate", "", (Figure("dtypes", "float32", "", ""),))
    with pytest.raises(UsageError, match="no figure float32_flops"):
        Roofline.of(target)
    with pytest.raises(UsageError, match="the target 'cpu' has no float16"):
        Roofline.of("cpu", dtype="float16")


def test_a_generation_is_its_early_calls_and_its_sampler_calls() -> None:
    engines = {"table": engine(flops=100.0), "a": engine(flops=100.0), "b": engine(flops=300.0)}
    hosts = (Part("call:x", RowWork(Work(operations=2.0))),) * 2
    request = Part("request:x", RowWork(Work(operations=7.0)))
    loop = LoopWork(engines, ((("a", 4), ("b", 4)), (("a", 2),)), 2, (("table", 4),), hosts, request)
    found = predict(loop, SHEET)
    assert found.early_seconds == pytest.approx(5 + 4 + 7)
    assert found.call_seconds == pytest.approx((5 + 4 + 5 + 12 + 2, 5 + 2 + 2))
    assert found.host_seconds == pytest.approx(4)
    assert found.seconds == pytest.approx(found.early_seconds + found.engine_seconds + found.host_seconds)
    assert found.measured_share == 0.0
    assert "call_seconds" not in found.to_json()


def test_a_loop_without_host_work_has_none() -> None:
    loop = LoopWork({"a": EngineWork((sum_part(8),))}, ((("a", 1),),) * 3, 1)
    assert predict(loop, SHEET).host_seconds == 0.0


def test_guidance_and_tables_cost_the_runtime_more() -> None:
    plain, guided = (call_part(64, 1000, both, "ddim") for both in (False, True))
    assert guided.work.at(2).moved_bytes > plain.work.at(2).moved_bytes
    assert plain.key != guided.key
    assert request_part(64, 1000, 20, True, "ddim").work.at(1).moved_bytes > 20 * 1000
