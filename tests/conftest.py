"""What all tests share: goldens, seeds, one thread, and traces and artifacts made once in a session."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from hypothesis import settings
from torch.fx import Graph

from dcc.driver import _manifest, pipeline
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.lower import lower
from dcc.frontend.samplers import sampler_table
from dcc.frontend.trace import trace
from dcc.ir.program import Guidance, Program
from dcc.passes import run_passes

# Equal runs on every machine; no data base of earlier failures, no deadline on a busy machine.
settings.register_profile("dcc", derandomize=True, deadline=None, database=None)
settings.load_profile("dcc")
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
ROWS = 16


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
def one_thread() -> Iterator[None]:
    """Two busy cores: more threads than one make torch slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def copy_program(program: Program) -> Program:
    """A Program that passes may change; tensors are shared, because no pass writes into one."""
    graph, copies = Graph(), {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    assert [node.name for node in graph.nodes] == [node.name for node in program.graph.nodes]
    return replace(
        program, graph=graph, weights=dict(program.weights), scopes={}, stages=[], templates={}, reports=[]
    )


_MODELS: dict[str, zoo.ZooModel] = {}
_TRACES: dict[str, Program] = {}
VARIANTS: dict[str, Callable[[], zoo.ZooModel]] = {
    **zoo.MODELS,
    "dit8": lambda: zoo.dit(depth=8),
    "pixart_alpha": lambda: zoo.pixart(depth=2, additional_conditions=False),
}
# What the frontend knows of the families with class labels.
NULLS = {"dit": {"y": 10.0}, "dit8": {"y": 10.0}, "uvit": {"y": 10.0}, "diffusers_dit": {"class_labels": 10.0}}


@pytest.fixture(scope="session")
def model() -> Callable[[str], zoo.ZooModel]:
    """`model(name)`: the zoo model of this name, the same object each time."""

    def build(name: str) -> zoo.ZooModel:
        if name not in _MODELS:
            _MODELS[name] = VARIANTS[name]()
        return _MODELS[name]

    return build


@pytest.fixture(scope="session")
def traced(model: Callable[[str], zoo.ZooModel]) -> Callable[[str], Program]:
    """`traced(name)`: a fresh Program of a zoo model; torch.export takes seconds and runs once in a session."""

    def fresh(name: str) -> Program:
        if name not in _TRACES:
            module, inputs, roles = model(name)
            nulls = NULLS.get(name, {})
            _TRACES[name] = trace(
                module, inputs, roles, name=name, nulls=nulls, rows=ROWS,
                ranges={key: (0, int(null)) for key, null in nulls.items()},
                unbatched=[key for key in inputs if key.endswith("_ids")],
            )  # fmt: skip
        return copy_program(_TRACES[name])

    return fresh


SAMPLERS = {
    "diffusers_dit": {"name": "ddpm", "config": {"variance_type": "learned_range"}},
    "sd3": {"name": "flow-match-euler"},
    "sd35": {"name": "flow-match-euler"},
    "flux": {"name": "flow-match-euler"},
    "wan": {"name": "flow-match-euler"},
}


@pytest.fixture(scope="session")
def artifact(
    traced: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`artifact(name, granularity=, opt_level=)`: the file of a compiled zoo model, made once in a session."""
    made: dict[tuple[str, str, int], Path] = {}

    def compiled(name: str, granularity: str = "component", opt_level: int = 1) -> Path:
        key = (name, granularity, opt_level)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("artifacts") / f"{name}.{granularity}.O{opt_level}.dcc"
            write_artifact(traced(name), made[key], granularity, opt_level)
        return made[key]

    return compiled


def write_artifact(program: Program, path: Path, granularity: str = "component", opt_level: int = 1) -> None:
    """What `dcc.compile` does after tracing, without its check against the model."""
    if program.sampler is None:
        options = SAMPLERS.get(program.name, {"name": "ddim"})
        config = {"num_train_timesteps": 1000, **options.get("config", {})}
        program.sampler = sampler_table(options["name"], steps=4, config=config)
    if NULLS.get(program.name) and program.guidance.mode == "none":
        channels = 4 if program.name == "diffusers_dit" else None
        program.guidance = Guidance("cfg", 3.0, channels)
    run_passes(program, pipeline(opt_level))
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, granularity)
        writer.finish(_manifest(program, plan, program.hash(), "cpu", {}))
