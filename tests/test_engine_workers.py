"""Workers whose compiler is gone: neither they nor their files stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcc.exports.engine_workers import _WORKER


def worker(folder: Path, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, json.dumps(sys.path), str(folder)], stdin=subprocess.PIPE, stdout=output
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "dcc-engines"
    made.mkdir()
    (made / "0.onnx").write_bytes(b"no model")
    (made / "weights").write_bytes(bytes(1000))
    return made


def test_a_worker_that_nobody_listens_to_leaves_nothing(folder: Path) -> None:
    """It learns so by its answer, while its own input is still open."""
    reading, writing = os.pipe()
    process = worker(folder, writing)
    os.close(writing)
    os.close(reading)
    job = {
        "flavour": "abacus", "engine": str(folder / "0.engine"),
        "request": {
            "name": "step", "model": str(folder / "0.onnx"), "capabilities": [80], "rows": None, "folder": None,
            "options": {}, "device": "",
        },
    }  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    assert process.wait(timeout=120) == 0
    process.stdin.close()
    assert not folder.exists()


def test_a_worker_whose_input_ends_leaves_nothing(folder: Path) -> None:
    process = worker(folder, subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    assert not folder.exists()
