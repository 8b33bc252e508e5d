"""The command line of schedules: search, calibrate, -O2, --schedule, --pick, --require, and inspect of the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import studies

from dcc import cli
from dcc.commands.inspect import schedule_lines
from dcc.cost_model.table import CalibrationTable, default_path
from dcc.driver import compile
from dcc.ir.schedule import (
    BOTH,
    CONDITIONAL,
    REUSE_DIFFERENCE,
    SKIP,
    Schedule,
    Unit,
    branch_units,
    from_steps,
    full_schedule,
)
from dcc.preparation import Source
from dcc.search.choose import sampler_digest
from dcc.search.front import Front, Point

COMMON = ("--sampler", "ddim", "--steps", studies.STEPS, "--max-batch", 4, "--images", studies.IMAGES)
EASY, IMPOSSIBLE = "cosine>=-1", "psnr>=100000"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def dcc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """One command line in this process."""
    monkeypatch.delenv("DCC_TRACEBACK", raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli.main([str(item) for item in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a failing command must leave nothing."""
    here = tmp_path / "out"
    here.mkdir()
    yield here
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedules")


@pytest.fixture(scope="module")
def artifact(folder: Path, shared: None) -> Path:
    path = folder / "fast.dcc"
    # Not the command, which would give this whole process one thread pool.
    compile(studies.MODEL, output=path, images=studies.IMAGES, opt_level=2, require=EASY, **studies.CPU_OPTIONS)
    return path


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """Of the tiny model at five steps."""
    program = studies.prepared(Source(studies.MODEL, **studies.CPU_OPTIONS)).program
    identity = {"program": program.denoiser_hash(), "sampler": sampler_digest(program.sampler)}
    return replace(studies.spans(program.components, (0, 1, 3)), name="given", **identity)


@pytest.fixture(scope="module")
def schedule_file(folder: Path, schedule: Schedule) -> Path:
    path = folder / "schedule.json"
    path.write_text(json.dumps(schedule.to_json()))
    return path


@pytest.fixture(scope="module")
def front_file(folder: Path, schedule: Schedule) -> Path:
    """The exact schedule and two others; their figures are made up, so that what is picked depends on no clock."""
    components, identity = schedule.components, {"program": schedule.program, "sampler": schedule.sampler}
    exact = replace(full_schedule(components, schedule.calls), **identity)
    fast = replace(studies.spans(components, (0, 2)), name="fast", **identity)
    points = tuple(
        Point(item.name, origin, item, 100 / speedup, speedup, 1 / speedup, decibels)
        for item, origin, speedup, decibels in (
            (exact, "exact", 1.0, float("inf")), (schedule, "search", 1.5, 30.0), (fast, "search", 2.5, 20.0),
        )
    )  # fmt: skip
    Front(
        model="tiny", program=schedule.program, sampler="ddim", steps=5, target="cpu", batch=2, exact_ms=100.0,
        points=points,
    ).write(folder / "front.json")  # fmt: skip
    return folder / "front.json"


def _compile(output: Path, model: str = studies.MODEL, *more: object) -> list[str]:
    return [str(item) for item in ("compile", model, "-o", output, *COMMON, *more)]


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One message that names the problem and the next step; no traceback, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "  next  " in result.err, result.err
    for part in parts:
        assert part in result.err, result.err


# Compiling.


def test_o2_says_what_it_is_worth(dcc: Run, tmp_path: Path) -> None:
    result = dcc(*_compile(tmp_path / "a.dcc"), "-O2", "--require", EASY)
    assert result.code == 0, result.err
    for part in ("speed-up", "% of the FLOPs", "quality", "held out", "required", EASY, "schedule"):
        assert part in result.out
    assert "dcc: choosing a schedule" in result.err and "of 5 calls: cosine" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcc"]


def test_json_holds_the_worth(dcc: Run, schedule_file: Path, schedule: Schedule, tmp_path: Path) -> None:
    result = dcc(*_compile(tmp_path / "a.dcc"), "--schedule", schedule_file, "--require", EASY, "--json")
    assert result.code == 0, result.err
    worth = json.loads(result.out)["schedule"]
    assert worth["digest"] == schedule.digest()
    assert worth["required"]["text"] == EASY


def test_a_missed_requirement_exits_3(dcc: Run, schedule_file: Path, unchanged: Path) -> None:
    output = unchanged / "a.dcc"
    missed = dcc(*_compile(output), "-O2", "--require", IMPOSSIBLE)
    assert_refused(missed, 3, "no schedule keeps the requirement", IMPOSSIBLE)
    given = dcc(*_compile(output), "--schedule", schedule_file, "--require", IMPOSSIBLE)
    assert_refused(given, 3, "the schedule misses the requirement")


@pytest.mark.parametrize(("text", "name"), [("1.3x", "given"), ("2x", "fast"), ("25dB", "given"), ("fast", "fast")])
def test_a_front_and_a_pick(dcc: Run, front_file: Path, tmp_path: Path, text: str, name: str) -> None:
    result = dcc(*_compile(tmp_path / "a.dcc"), "--schedule", front_file, "--pick", text)
    assert result.code == 0, result.err
    found = json.loads(dcc("inspect", tmp_path / "a.dcc", "--json").out)
    assert found["schedule"]["name"] == name


def test_a_front_without_a_pick(dcc: Run, front_file: Path, unchanged: Path) -> None:
    result = dcc(*_compile(unchanged / "a.dcc"), "--schedule", front_file)
    assert_refused(result, 1, "a front holds several schedules", "3 points", "--pick 2.5x")


@pytest.mark.parametrize(("text", "part"), [("9x", "no point of the front is that fast"), ("slow", "no point")])
def test_a_pick_that_there_is_not(dcc: Run, front_file: Path, unchanged: Path, text: str, part: str) -> None:
    assert_refused(dcc(*_compile(unchanged / "a.dcc"), "--schedule", front_file, "--pick", text), 2, part)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "schedule"),
        ("{", "not JSON that can be read"),
        ("{}", "this is not a schedule that can be read"),
        ('{"kind": "dcc schedule"}', "schedule"),
        ("[1, 0, 1]", "3 steps"),
        ("\x00\x01", "schedule"),
    ],
)
def test_a_wrong_file(dcc: Run, unchanged: Path, tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    result = dcc(*_compile(unchanged / "a.dcc"), "--schedule", path)
    assert result.code == 1 and result.out == "" and "Traceback" not in result.err
    assert result.err.splitlines()[-1] and "schedule: " in result.err and str(path) in result.err
    assert part in result.err


def test_no_such_file(dcc: Run, unchanged: Path, tmp_path: Path) -> None:
    result = dcc(*_compile(unchanged / "a.dcc"), "--schedule", tmp_path / "none.json")
    assert result.code == 1 and "the schedule file cannot be read" in result.err


def test_a_steps_mask(dcc: Run, tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    path.write_text("[1, 0, 1, 0, 1]")
    result = dcc(*_compile(tmp_path / "a.dcc"), "--schedule", path, "--json")
    assert result.code == 0, result.err
    found = json.loads(dcc("inspect", tmp_path / "a.dcc", "--json").out)
    # The first block is always computed.
    kinds = [step["actions"][-1] == "compute" for step in found["schedule"]["steps"]]
    assert kinds == [True, False, True, False, True]


def test_a_schedule_of_other_steps(dcc: Run, schedule_file: Path, unchanged: Path) -> None:
    result = dcc(*_compile(unchanged / "a.dcc"), "--steps", 6, "--schedule", schedule_file)
    assert result.code == 1 and result.out == ""
    for part in ("got   5 calls\n", "want  6 calls\n", str(schedule_file), "--transfer nearest"):
        assert part in result.err


def test_a_schedule_is_transferred_to_other_steps(dcc: Run, schedule_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.dcc"
    result = dcc(*_compile(output), "--steps", 6, "--schedule", schedule_file, "--transfer", "interval")
    assert result.code == 0, result.err
    assert "transferred (interval): made for 5 calls, wanted for 6 calls" in result.err
    assert "given and transferred (interval)" in result.out
    assert len(json.loads(dcc("inspect", output, "--json").out)["schedule"]["steps"]) == 6


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--schedule", "a.json", "-O2"), "a schedule is given, and -O2 and -O3 choose one"),
        (("--schedule", "a.json", "-O3"), "a schedule is given, and -O2 and -O3 choose one"),
        (("--require", "psnr>=30"), "nothing lossy is asked for"),
        (("--pick", "2x"), "--pick chooses from a front"),
        (("--transfer", "nearest"), "--transfer moves a given schedule"),
        (("--transfer", "elsewhere", "--schedule", "a.json"), "--transfer moves a given schedule"),
        (("-O2", "--require", "psnr"), "cannot read the requirement"),
        (("-O2", "--require", "psnr>=x"), "cannot read the requirement"),
        (("-O2", "--require", "sharpness>=3"), "unknown metric"),
        (("-O2", "--require", "relative_l2>=3"), "the wrong way round"),
        (("-O3", "--budget", "0"), "out of range"),
    ],
)
def test_wrong_options(dcc: Run, unchanged: Path, arguments: tuple[str, ...], part: str) -> None:
    assert_refused(dcc(*_compile(unchanged / "a.dcc", "nowhere:model"), *arguments), 2, part)


# Inspecting.


def test_inspect_shows_the_worth_and_the_schedule(dcc: Run, artifact: Path) -> None:
    result = dcc("inspect", artifact)
    assert result.code == 0, result.err
    for part in ("speed-up", "held out", "required", "require cosine>=-1", "schedule  1 of 5 calls"):
        assert part in result.out, part
    lines = result.out.splitlines()
    found = next(line for line in lines if line.startswith("guidance    ") and line.endswith("BBBBB"))
    below = lines[lines.index(found) + 1]
    assert below.startswith("blocks.0.attn..blocks.1.mlp") and below.endswith("  #~~~~")


def test_inspect_json_holds_the_schedule(dcc: Run, artifact: Path, schedule: Schedule) -> None:
    found = json.loads(dcc("inspect", artifact, "--json").out)
    read = Schedule.from_json(found["schedule"])
    assert found["worth"]["digest"] == read.digest()
    assert found["recipe"]["require"] == EASY
    assert (read.program, read.sampler) == (schedule.program, schedule.sampler)


def test_an_exact_artifact_has_none(dcc: Run, tmp_path: Path) -> None:
    assert dcc(*_compile(tmp_path / "a.dcc")).code == 0
    found = json.loads(dcc("inspect", tmp_path / "a.dcc", "--json").out)
    assert found["schedule"] is None and found["worth"] is None
    assert "guidance: B both" not in dcc("inspect", tmp_path / "a.dcc").out
    result = dcc("inspect", tmp_path / "a.dcc", "--heat-map", tmp_path / "map.png")
    assert_refused(result, 2, "there is no schedule to draw")
    assert not (tmp_path / "map.png").exists()


def test_the_heat_map_is_a_picture(dcc: Run, artifact: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert dcc("inspect", artifact, "--heat-map", tmp_path / "map.png").code == 0
    with image.open(tmp_path / "map.png") as picture:
        assert picture.width > 200 and picture.height > 200
        assert len(set(picture.convert("RGB").get_flattened_data())) > 10


@pytest.mark.parametrize("name", ["map.jpg", "map", "nowhere/map.png"])
def test_a_heat_map_that_cannot_be_written(dcc: Run, artifact: Path, unchanged: Path, name: str) -> None:
    code, part = (1, "output folder does not exist") if "/" in name else (2, "unknown kind of picture")
    assert_refused(dcc("inspect", artifact, "--heat-map", unchanged / name), code, part)


def test_only_an_artifact_has_a_heat_map(dcc: Run, unchanged: Path) -> None:
    assert_refused(dcc("inspect", studies.MODEL, "--heat-map", unchanged / "a.png"), 2, "only an artifact")


def test_inspect_stays_without_torch(artifact: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from dcc import cli\n"
        f"assert cli.main(['inspect', {str(artifact)!r}, '--heat-map', {str(tmp_path / 'map.png')!r}]) == 0\n"
        "assert not {'torch', 'onnx', 'diffusers', 'onnxruntime'} & set(sys.modules), 'a heavy package was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "guidance: B both" in done.stdout


def test_the_text_of_a_schedule() -> None:
    components = tuple(f"blocks.{block}.{part}" for block in range(3) for part in ("attn", "mlp"))
    units = (*branch_units(components)[:3], Unit("tail", 3, 4), Unit("last", 5, 5))
    computes = [[call in (0, 2), call in (0, 2), True, call in (0, 1, 3), call in (0, 1, 3)] for call in range(5)]
    modes = (BOTH, CONDITIONAL, BOTH, REUSE_DIFFERENCE, BOTH)
    made = from_steps(components, units, computes, 1, modes)
    assert schedule_lines(made)[:-1] == [
        "call                         keeps   0",
        "guidance                             BcBrB",
        "blocks.0.attn..blocks.0.mlp  branch  #.#~~",
        "blocks.1.attn                branch  #####",
        "blocks.1.mlp..blocks.2.mlp   delta   ##.#.",
    ]
    pruned = replace(made, actions=tuple((*row[:4], SKIP) for row in made.actions))
    assert [line[-5:] for line in schedule_lines(pruned)[4:6]] == ["##.#.", "     "]


def test_the_text_of_many_calls_is_cut_into_lines() -> None:
    components = ("a" * 40, "b")
    made = from_steps(components, branch_units(components), [[call % 7 == 0] * 2 for call in range(250)])
    lines = schedule_lines(made)
    assert len(lines) == 3 * 3 + 1 and max(map(len, lines)) < 150
    marks = "".join(line.rpartition("  ")[2] for line in lines if line.startswith("aaa"))
    assert marks == "".join("#" if call % 7 == 0 else "." for call in range(250))


# Searching and calibrating.


def test_search_and_resume(dcc: Run, tmp_path: Path) -> None:
    command = ("search", studies.MODEL, "-o", tmp_path / "front", "--budget", 3, *COMMON)
    first = dcc(*command)
    assert first.code == 0, first.err
    for part in ("speed-up", "same time, fewer steps", "index.html", "--pick 2x"):
        assert part in first.out
    assert_refused(dcc(*command), 2, "there is a search in this folder", "--resume, or another -o")
    again = dcc(*command, "--resume", "--json")
    assert again.code == 0, again.err
    found = Front.from_json(json.loads(again.out))
    assert found == Front.read(tmp_path / "front/front.json") and found.evaluations == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--sampler", "none"), "steps without a sampler"),
        (("--resume",), "there is no search to resume"),
        (("--budget", "0"), "--budget"),
        (("--target", "abacus"), "unknown target"),
    ],
)
def test_what_cannot_be_searched(dcc: Run, unchanged: Path, arguments: tuple[str, ...], part: str) -> None:
    command = ["search", studies.MODEL, "-o", unchanged / "front", "--budget", 3, *COMMON, *arguments]
    if arguments == ("--sampler", "none"):
        command.remove("--steps")
        command.remove(studies.STEPS)
        part = "a schedule needs a sampler"
    assert_refused(dcc(*command), 2, part)


def test_a_file_is_no_folder(dcc: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = dcc("search", studies.MODEL, "-o", tmp_path / "file", *COMMON)
    assert result.code == 1 and "the output is a file" in result.err


def test_calibrate_writes_what_a_compile_predicts_from(
    dcc: Run, schedule_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCC_CACHE", str(tmp_path / "cache"))
    command = ("calibrate", studies.MODEL, "--sampler", "ddim", "--steps", 5, "--rows", "2,4", "--repeats", 3)
    result = dcc(*command, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert Path(found["table"]) == default_path("cpu") and default_path("cpu").is_relative_to(tmp_path)
    table = CalibrationTable.load(default_path("cpu"))
    assert len(table.measurements) >= found["measurements"] > 0
    assert {item["rows"] for item in found["engines"]} >= {2, 4}
    assert all(item["seconds"] > 0 for item in found["engines"])
    compiled = dcc(*_compile(tmp_path / "a.dcc"), "--schedule", schedule_file, "--json")
    assert compiled.code == 0, compiled.err
    worth = json.loads(compiled.out)["schedule"]
    assert worth["predicted_ms"] > 0
    assert worth["prediction_error"] == pytest.approx(worth["predicted_ms"] / worth["latency_ms"] - 1)
    assert "predicted" in dcc("inspect", tmp_path / "a.dcc").out


def test_a_table_at_a_path(dcc: Run, tmp_path: Path) -> None:
    command = ("calibrate", studies.MODEL, "--sampler", "ddim", "--steps", 5, "--rows", "2", "--repeats", 1)
    result = dcc(*command, "-o", tmp_path / "table.json")
    assert result.code == 0, result.err
    assert "engines on this machine" in result.out
    assert CalibrationTable.load(tmp_path / "table.json").measurements


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--rows", "two"), 2, "cannot read --rows 'two'"),
        (("--target", "h200"), 2, "cannot be measured here"),
        (("-o", "nowhere/table.json"), 1, "output folder does not exist"),
    ],
)
def test_what_cannot_be_calibrated(dcc: Run, arguments: tuple[str, ...], code: int, part: str) -> None:
    assert_refused(dcc("calibrate", studies.MODEL, "--steps", 5, "--sampler", "ddim", *arguments), code, part)
