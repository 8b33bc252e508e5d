"""The scripts in examples/explore run, on a small model; and the documentation's schedule is one."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from PIL import Image
from subjects import applied, sketch, subject

from dcc import runtime
from dcc.frontend.dit import DiT
from dcc.ir.schedule import Schedule, extrapolation
from dcc.search.front import Front

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = zoo.dit(depth=2).module
    assert isinstance(module, DiT)
    path = tmp_path_factory.mktemp("explore") / "tiny.pt"
    torch.save({"arch": "dit", "config": module.config.to_dict(), "state_dict": module.state_dict()}, path)
    return path


def run(name: str, checkpoint: Path, output: Path) -> str:
    """What the script prints."""
    command = [sys.executable, f"examples/explore/{name}.py", "--quick", "--model", str(checkpoint), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sweep(checkpoint: Path, tmp_path: Path) -> None:
    run("sweep", checkpoint, tmp_path)
    rows = rows_of(tmp_path / "sweep.csv")
    assert [row["method"] for row in rows] == ["FORA", "TaylorSeer", "Delta-DiT", "SmoothCache", "MagCache"]
    for row in rows:
        assert 0 < float(row["FLOPs"]) < 1
        assert float(row["speed-up"]) > 0
        assert float(row["PSNR, dB"]) > 0
    with Image.open(tmp_path / "sweep.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_transfer(checkpoint: Path, tmp_path: Path) -> None:
    printed = run("transfer", checkpoint, tmp_path)
    rows = rows_of(tmp_path / "transfer.csv")
    kinds = [(row["steps"], row["placement"]) for row in rows]
    assert kinds == [("6", "unchanged")] + [(steps, how) for steps in ("4", "8") for how in ("nearest", "interval")]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["made for these steps"]) - float(row["refitted"]))
    assert "compiles for 12x12" in printed
    assert (tmp_path / "large.dcc").exists()


def test_search_and_pick(checkpoint: Path, tmp_path: Path) -> None:
    printed = run("search_and_pick", checkpoint, tmp_path)
    front = Front.read(tmp_path / "front.json")
    assert (front.steps, front.batch, front.evaluations) == (5, 2, 4)
    # The best of at least the exact artifact's speed: equal samples, before any that is faster.
    assert re.search(r"^picked .*: 1x at equal samples$", printed, re.MULTILINE)
    for name in ("exact", "picked"):
        compiled = runtime.load(tmp_path / f"{name}.dcc")
        assert compiled.sample({"y": [0, 1]}, seed=1).shape == (2, 3, 8, 8)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert re.search(r"^\d+\.\d\dx as fast, inf dB, SSIM 1\.000, other seeds$", printed, re.MULTILINE)


def test_the_documented_schedule_is_one() -> None:
    text = (ROOT / "docs/schedules.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    schedule = Schedule.from_json(json.loads(blocks[0]))
    history = schedule.history(3, 0)
    assert schedule.actions[3][0].weights == extrapolation(history, 3, order=1)


def test_the_documented_pass_proposes_a_schedule() -> None:
    text = (ROOT / "docs/writing-a-pass.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class ReuseLast" in block)
    names: dict[str, object] = {"__name__": "documented"}
    exec(compile(block, "docs/writing-a-pass.md", "exec", dont_inherit=True), names)
    made = names["ReuseLast"](left_out=3)  # type: ignore[operator]
    computes = [row[0].computes for row in made.propose(subject()).actions]
    assert computes == [True] * 7 + [False] * 3
    assert applied(made, sketch()).status == "applied"
