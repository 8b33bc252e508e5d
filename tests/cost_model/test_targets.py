"""Targets: shipped files, names, lists, dtypes, and files of users that are wrong in each way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcc.cost_model.targets import (
    FOLDER,
    RTX_CAPABILITIES,
    Target,
    compilable,
    dtype_for,
    element_bytes,
    list_targets,
    read_target,
    target_named,
    targets_named,
)
from dcc.errors import UsageError

NAMES = [target.name for target in list_targets()]
GPUS = [target for target in list_targets() if target.capability is not None]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written(change)`: a user's file like that of the RTX 4090 under another name, after `change` to its data."""

    def write(change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
        data = json.loads((FOLDER / "rtx4090.json").read_text())
        data |= {"name": "attic", "aliases": []}
        change(data)
        path = tmp_path / "attic.json"
        path.write_text(json.dumps(data))
        return path

    return write


def figure_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in data["figures"] if item["name"] == name)
    return found


def without(name: str) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        data["figures"] = [item for item in data["figures"] if item["name"] != name]

    return change


def with_value(name: str, value: object, key: str = "value") -> Callable[[dict[str, Any]], object]:
    return lambda data: figure_of(data, name).update({key: value})


def test_the_targets_that_people_name() -> None:
    wanted = "cpu t4 a10 a100-40g a100-80g l4 l40s rtx3090 rtx4090 rtx5090 h100 h200 b200 orin"
    assert set(NAMES) == set(wanted.split())
    assert NAMES[0] == "cpu"
    assert target_named("a100") == target_named("A100 ") == target_named("a100-80g")


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name: str) -> None:
    target = target_named(name)
    assert (FOLDER / f"{name}.json").exists()
    assert all(len(item.source) > 20 for item in target.figures)
    assert target.reason and target.chip and target.summary
    assert json.loads(json.dumps(target.to_json(), allow_nan=False))["backend"] == target.backends[0]


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_a_gpu_has_dense_rates_that_fit_together(target: Target) -> None:
    half, whole = target.number("float16_flops"), target.number("float32_flops")
    assert half is not None and whole is not None and half > whole
    assert target.number("int8_operations") == pytest.approx(2 * half, rel=0.02) or target.name.startswith("rtx")
    if "bfloat16" in target.dtypes:
        assert target.number("bfloat16_flops") == half
    if "float8" in target.dtypes:
        assert target.number("float8_flops") == pytest.approx(2 * half, rel=0.02)
    assert target.memory_bytes is not None and 16e9 <= target.memory_bytes <= 200e9
    # Float16 operations for each byte: a wrong prefix would stand out.
    assert 40 < half / (target.number("bandwidth") or 1) < 450


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_engines_are_built_here_where_tensorrt_rtx_can(target: Target) -> None:
    assert (target.backend == "tensorrt-rtx") is (target.capability in RTX_CAPABILITIES)
    assert target.backends[-2:] == ("tensorrt", "onnxruntime-cuda")


def test_names_lead_to_one_target() -> None:
    spellings = [spelling for target in list_targets() for spelling in (target.name, *target.aliases)]
    devices = [name for target in list_targets() for name in target.devices]
    lenders = [target.capability for target in list_targets() if target.representative]
    for listed in (spellings, devices, lenders):
        assert len(set(listed)) == len(listed)
    assert set(lenders) == {target.capability for target in GPUS}


@pytest.mark.parametrize("name", ["sm80", "SM_80"])
def test_a_capability_is_a_target_with_the_figures_of_a_card(name: str) -> None:
    found, card = target_named(name), target_named("a100-80g")
    assert (found.name, found.capability, found.figures) == ("sm80", 80, card.figures)
    assert found.summary == "any GPU of compute capability 8.0, with the figures of a100-80g"
    assert found.devices == found.aliases == ()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("a101", "a100"), ("rtx4080", "rtx4090"), ("H10", "h100"), ("l40", "l40s"), ("sm81", "sm80"), ("orinn", "orin")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"unknown target '{name}'") as caught:
        target_named(name)
    assert nearest in caught.value.details["want"].split(" or ")
    assert "dcc targets" in caught.value.details["next"]


@pytest.mark.parametrize("name", ["", "zzz"])
def test_a_name_like_no_other_is_answered_with_all(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target") as caught:
        target_named(name)
    assert set(NAMES) <= set(caught.value.details["want"].split(", "))


def test_a_list_of_targets_keeps_its_order() -> None:
    assert [target.name for target in targets_named("a100, rtx4090,cpu")] == ["a100-80g", "rtx4090", "cpu"]
    assert [target.name for target in targets_named("sm80,a100")] == ["sm80", "a100-80g"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "a target has no name"),
        ("a100,,cpu", "a target has no name"),
        ("a100,a100-80g", "asked for twice\n  got   a100 and a100-80g"),
        ("cpu,cpu", "asked for twice\n  got   cpu twice"),
        ("cpu,a999", "unknown target 'a999'"),
    ],
)
def test_a_list_with_nothing_or_the_same_in_it_is_refused(names: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        targets_named(names)


def test_dtypes_have_a_default_and_spellings() -> None:
    assert dtype_for(target_named("cpu")) == "float32"
    assert {dtype_for(target) for target in GPUS} == {"float16"}
    assert dtype_for(target_named("a100"), "bf16") == "bfloat16"
    assert dtype_for(target_named("l4"), "FP8") == "float8"
    assert [element_bytes(dtype) for dtype in ("float32", "float16", "bfloat16", "float8")] == [4, 2, 2, 1]


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("t4", "bf16", "the target 't4' has no bf16\n  want  float16, float32"),
        ("a100", "fp8", "the target 'a100-80g' has no fp8\n  want  float16, bfloat16, float32"),
        ("cpu", "float16", "the target 'cpu' has no float16\n  want  float32"),
        ("h100", "float12", "unknown dtype float12\n  want  float16"),
    ],
)
def test_a_dtype_that_the_target_lacks_is_refused_with_what_it_has(name: str, dtype: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dtype_for(target_named(name), dtype)


def test_a_users_file_is_a_target(written: Callable[..., Path]) -> None:
    path = written(with_value("bandwidth", 5e11))
    found = target_named(str(path))
    assert (found.name, found.capability, found.number("bandwidth")) == ("attic", 89, 5e11)
    assert [target.name for target in targets_named(f"rtx4090,{path}")] == ["rtx4090", "attic"]


def test_a_users_file_may_be_short(tmp_path: Path) -> None:
    figures = {
        "backends": ("onnxruntime", ""), "dtypes": ("float32", ""), "bandwidth": (5e10, "bytes/s"),
        "float32_flops": (1e12, "FLOP/s"), "operation_overhead": (1e-6, "s"), "call_overhead": (5e-6, "s"),
    }  # fmt: skip
    rows = [
        {"name": name, "value": value, "unit": unit, "source": "a guess"} for name, (value, unit) in figures.items()
    ]
    path = tmp_path / "shed.json"
    path.write_text(json.dumps({"name": "shed", "summary": "an old server", "figures": rows}))
    found = read_target(path)
    assert (found.chip, found.capability, found.memory_bytes, found.aliases) == ("an old server", None, None, ())


WRONG: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
    (lambda data: data.pop("summary"), "the file", "no summary"),
    (lambda data: data.update(colour="red"), "the file", "an unknown field 'colour'"),
    (lambda data: data.update(name="My Card"), "name", "My Card"),
    (lambda data: data.update(name=7), "name", "7"),
    (lambda data: data.update(name="a100"), "name", "a100"),
    (lambda data: data.update(name="local"), "name", "local"),
    (lambda data: data.update(name="sm90"), "name", "sm90"),
    (lambda data: data.update(summary=" "), "summary", "' '"),
    (lambda data: data.update(aliases="x"), "aliases", "'x'"),
    (lambda data: data.update(representative="no"), "representative", "no"),
    (lambda data: data.update(figures={}), "figures", "dict"),
    (lambda data: data["figures"].append(5), "figures\\[\\d+\\]", "int"),
    (lambda data: data["figures"].append(figure_of(data, "memory")), "figures", "memory twice"),
    (lambda data: figure_of(data, "memory").pop("source"), "figures\\[\\d+\\]", "no source"),
    (with_value("memory", "", "source"), "source", "''"),
    (with_value("memory", "a\nb", "source"), "source", "'a\\\\nb'"),
    (with_value("memory", "GB", "unit"), "unit", "'GB' for memory"),
    (with_value("memory", -1), "value", "-1 for memory"),
    (with_value("memory", float("nan")), "value", "nan for memory"),
    (with_value("memory", float("inf")), "value", "inf for memory"),
    (with_value("memory", True), "value", "True for memory"),
    (with_value("memory", "24 GB"), "value", "'24 GB' for memory"),
    (with_value("memory", None), "value", "None for memory"),
    (with_value("bandwidth", "bandwith", "name"), "name", "bandwith"),
    (with_value("matrix_efficiency", 80), "value", "80 for matrix_efficiency"),
    (with_value("capability", 8.9), "value", "8.9 for capability"),
    (with_value("capability", 89.5), "value", "89.5 for capability"),
    (with_value("backends", "tensorflow"), "backends", "tensorflow"),
    (with_value("backends", "onnxruntime"), "backends", "onnxruntime"),
    (with_value("capability", 90), "backends", "tensorrt-rtx for capability 90"),
    (with_value("capability", 75), "dtypes", "bfloat16 for capability 75"),
    (with_value("dtypes", "float16, float12"), "dtypes", "float12"),
    (without("float16_flops"), "figures", "no float16_flops"),
    (without("bandwidth"), "figures", "no bandwidth"),
    (without("call_overhead"), "figures", "no call_overhead"),
    (without("memory"), "figures", "no memory"),
    (without("capability"), "figures", "no capability"),
    (without("backends"), "figures", "no backends"),
    (without("dtypes"), "figures", "no dtypes"),
]


@pytest.mark.parametrize(("change", "field", "got"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_by_field(
    change: Callable[[dict[str, Any]], object], field: str, got: str, written: Callable[..., Path]
) -> None:
    path = written(change)
    with pytest.raises(UsageError, match=f"the target's file is not valid: .*{field}") as caught:
        target_named(str(path))
    details = caught.value.details
    assert details["got"].startswith(got.replace("\\\\", "\\"))
    assert details["at"] == str(path) and details["want"]


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"name": ' * 100_000, "7"])
def test_a_file_that_is_no_target_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="the target's file"):
        target_named(str(path))


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        target_named(str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="cannot be read"):
        target_named(str(tmp_path))
    large = tmp_path / "large.json"
    large.write_text(" " * (1 << 21))
    with pytest.raises(UsageError, match="not valid: the file"):
        target_named(str(large))


def test_only_what_is_lowered_compiles() -> None:
    assert compilable("cpu").name == "cpu"
    with pytest.raises(UsageError, match="does not lower to the target 'a100") as caught:
        compilable("a100")
    assert "tensorrt-rtx" in caught.value.details["got"]
