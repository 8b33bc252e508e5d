"""benchmarks/gpu.py where no GPU is: its tables and its bookkeeping; a whole dry run is slow."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dcc.frontend.samplers import sampler_table

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it puts folders on the path, which other tests must not see."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("steps", [6, 30, 50])
def test_its_own_ddim_is_that_of_diffusers(gpu: ModuleType, steps: int) -> None:
    pytest.importorskip("diffusers")
    mine, probed = gpu.ddim(steps), sampler_table("ddim", steps=steps, clip_sample=False)
    assert [call.timestep for call in mine.calls] == [call.timestep for call in probed.calls]
    assert (mine.registers, mine.init_sigma, mine.clip) == (probed.registers, probed.init_sigma, None)
    matrices = [np.asarray([call.matrix for call in table.calls]) for table in (mine, probed)]
    np.testing.assert_allclose(*matrices, rtol=1e-5, atol=1e-6)
    assert all(call.draws == 0 and call.input_scale == 1.0 for call in probed.calls)


def test_the_schedule_computes_about_a_third(gpu: ModuleType) -> None:
    """Every third call; of four calls the first and the last would be half of them."""
    for calls in (6, 28, 30, 50):
        chosen = gpu.third(calls)
        assert (chosen.interval, chosen.first_enhance, chosen.stores) == (3, 1, "delta")
    assert gpu.third(4).interval > 3


def test_depth_scales_every_kind_of_block(gpu: ModuleType) -> None:
    flux = gpu.MODELS["flux-dev"]
    assert [gpu.config_of(flux, None, False)[name] for name in flux.depth] == [19, 38]
    assert [gpu.config_of(flux, 2, True)[name] for name in flux.depth] == [2, 4]


def test_without_a_gpu_it_refuses_in_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "local_device", lambda: None)
    assert gpu.main([]) == 1
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and errors.startswith("dcc: ") and "--dry-run" in errors


def test_what_there_is_no_time_for_is_named(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--dry-run", "--models", "dit-xl", "flux-dev", "--seconds", "0", "--folder", str(tmp_path)]
    assert gpu.main(command) == 0
    assert "dit-xl (all rows), flux-dev (all rows)" in capsys.readouterr().out


def test_a_process_that_fails_is_a_reason(gpu: ModuleType, tmp_path: Path) -> None:
    benchmark = gpu.Benchmark(None, {}, end=gpu.time.monotonic() + 60.0)
    spec = {"work": "artifact", "model": "dit-xl", "folder": str(tmp_path), "row": "tensorrt", "variant": "exact"}
    found = benchmark.process(spec, tmp_path / "row.json")
    assert found["failure"].startswith("FileNotFoundError: ")
    cells = benchmark.cells({**found, **spec})
    assert len(cells) == len(gpu.COLUMNS) and cells[-1] == found["failure"]


def test_a_miss_shows(gpu: ModuleType) -> None:
    row = {
        "model": "dit-xl", "row": "tensorrt", "variant": "exact", "dtype": "float16", "median": 0.01, "first": 1.0,
        "build": 2.0, "device bytes": None, "own bytes": 2**30, "torch": False, "note": "a | b",
        "forward error": 1e-3, "forward limit": 5e-3, "latent error": float("inf"), "latent limit": 5e-2,
    }  # fmt: skip
    cells = gpu.Benchmark(None, {}).cells(row)
    assert len(cells) == len(gpu.COLUMNS) and not any("|" in cell for cell in cells)
    assert "1.0e-03, within 5e-03" in cells and "inf, MORE THAN 5e-02" in cells
    assert not gpu.within(row) and gpu.within(row | {"row": "eager"}) and gpu.within(row | {"latent error": 0.0})


@pytest.mark.slow
def test_a_dry_run_measures_every_kind_of_row(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [
        "--dry-run", "--models", "dit-xl", "--rows", "eager", "onnxruntime", "onnxruntime-cuda", "--repeats", "1",
        "--folder", str(tmp_path), "-o", str(tmp_path / "gpu.json"),
    ]  # fmt: skip
    assert gpu.main(command) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    measured = {(row["row"], row["variant"]): row for row in rows if "failure" not in row}
    assert {("eager", "exact"), ("onnxruntime", "exact"), ("onnxruntime", "schedule")} <= measured.keys()
    assert not any(row["torch"] for (name, _), row in measured.items() if name != "eager")
    capsys.readouterr()
    assert gpu.main(command) == 0
    again = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["median"] for row in again if "median" in row] == [row["median"] for row in rows if "median" in row]
