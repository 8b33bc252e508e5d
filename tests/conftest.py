"""What all tests share: goldens, seeds, one thread, and traces and artifacts made once in a session."""

from __future__ import annotations

import random
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from compiled import model_of, traced_program, write_artifact
from hypothesis import settings

from dcc.ir.program import Program
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend

# Equal runs on every machine; no data base of earlier failures, no deadline on a busy machine.
settings.register_profile("dcc", derandomize=True, deadline=None, database=None)
settings.load_profile("dcc")
torch.set_num_threads(1)
# A parent that ignores interrupts (nohup, a background job) passes that on, and tests of interrupts need them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares the whole text with tests/golden/<file>/<test>.txt; call it once in a test."""
    name = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    path = GOLDEN / Path(request.node.fspath).stem / f"{name}.txt"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden {path}: run with --update-golden and read what it wrote"
        assert text == path.read_text()

    return compare


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every generator that a test may use by accident starts from the test's own name."""
    value = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {value}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def own_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test gives the whole process one thread pool: ONNX Runtime would refuse the plain sessions of later tests."""
    make = OnnxRuntimeBackend.__init__

    def without_shared_pool(self: OnnxRuntimeBackend, *arguments: Any, **options: Any) -> None:
        make(self, *arguments[:3], **{**options, "own_process": False})

    monkeypatch.setattr(OnnxRuntimeBackend, "__init__", without_shared_pool)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two busy cores: more threads than one make torch slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> Callable[[str], zoo.ZooModel]:
    """`model(name)`: the zoo model of this name, the same object each time."""
    return model_of


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Program]:
    """`traced(name)`: a Program of a zoo model that the test may change."""
    return traced_program


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact(name, granularity=, opt_level=)`: the file of a compiled zoo model, made once in a session."""
    made: dict[tuple[str, str, int], Path] = {}

    def compiled(name: str, granularity: str = "component", opt_level: int = 1) -> Path:
        key = (name, granularity, opt_level)
        if key not in made:
            path = tmp_path_factory.mktemp("artifacts") / f"{name}.{granularity}.O{opt_level}.dcc"
            write_artifact(traced_program(name), path, granularity, opt_level)
            made[key] = path
        return made[key]

    return compiled
