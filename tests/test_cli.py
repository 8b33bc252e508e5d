"""The command line: every verb on one tiny artifact, and every wrong input of the issue as one clear message."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from dcc import cli
from dcc.errors import DccError


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


class Forking(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(-x) + t[:, None, None]


def forking() -> tuple[nn.Module, dict[str, Tensor]]:
    return Forking().eval(), {"x": torch.randn(2, 3, 4), "t": torch.tensor([1.0, 2.0])}


def write_checkpoint(path: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    module = zoo.dit(depth=1).module
    config: Any = module.config
    values = {
        "arch": "dit", "config": config.to_dict(), "state_dict": dict(module.state_dict()),
        "sampler": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False},
    }  # fmt: skip
    change(values)
    torch.save(values, path)
    return path


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "tiny.pt")


@pytest.fixture(scope="module")
def compiled(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The one artifact of this file, and what `dcc compile --json` said about it in a process of its own."""
    command = [sys.executable, "-m", "dcc.cli", "compile", checkpoint, "-o", folder / "tiny.dcc", "--steps", "4"]
    done = subprocess.run(
        [*map(str, command), "-O1", "--max-batch", "4", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "dcc: tracing" in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def artifact(compiled: dict[str, Any]) -> Path:
    return Path(compiled["path"])


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a failing command must leave nothing."""
    here = tmp_path / "out"
    here.mkdir()
    yield here
    assert list(here.iterdir()) == []


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One message that names the problem and the next step; no traceback, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert "  next  " in result.err, result.err
    for part in parts:
        assert part in result.err, result.err


# What works.


def test_compile_reports_passes(compiled: dict[str, Any]) -> None:
    assert compiled["forward_error"] <= 1e-5
    assert compiled["target"] == "cpu" and compiled["opt_level"] == 1
    assert {"hoist-scopes", "cut-stages"} <= {row["name"] for row in compiled["passes"]}


def test_compile_table(dcc: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = dcc("compile", checkpoint, "-o", tmp_path / "a.dcc", "--steps", 2, "-O", 0, "--guidance", "none")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcc"]
    for part in ("stay-in-step", "declined", "cut-stages", "parameters", "forward equals the model's"):
        assert part in result.out
    assert "dcc: lowering" in result.err


def test_run_writes_a_picture(dcc: Run, artifact: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    result = dcc("run", artifact, "-n", 6, "-o", tmp_path / "grid.png")
    assert result.code == 0, result.err
    with image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (2 + 3 * 66, 2 + 2 * 66)  # 3 columns, 2 rows of 8 pixels, each 8 times, and a gap


def test_run_image_is_its_seeds(dcc: Run, artifact: Path, tmp_path: Path) -> None:
    """`-n 6` is more than the profile's 4 images; image i does not depend on what shares its batch."""
    report = dcc("run", artifact, "--class", 3, "-n", 6, "--seed", 5, "-o", tmp_path / "many.npy", "--json")
    values = json.loads(report.out)
    assert values["seeds"] == [5, 6, 7, 8, 9, 10] and values["conditions"] == {"y": [3] * 6}
    assert dcc("run", artifact, "-c", 3, "--seeds", "9,6", "-o", tmp_path / "two.npy").code == 0
    many, two = np.load(tmp_path / "many.npy"), np.load(tmp_path / "two.npy")
    assert many.shape == (6, 3, 8, 8) and many.dtype == np.float32
    np.testing.assert_allclose(two, many[[4, 1]], rtol=0, atol=1e-5)


def test_run_cycles_through_classes(dcc: Run, artifact: Path, tmp_path: Path) -> None:
    every = json.loads(dcc("run", artifact, "-n", 12, "-o", tmp_path / "a.npy", "--json").out)
    assert every["conditions"] == {"y": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]}
    two = json.loads(dcc("run", artifact, "-n", 3, "-c", 1, "-c", 4, "-o", tmp_path / "a.npy", "--json").out)
    assert two["conditions"] == {"y": [1, 4, 1]}
    said = json.loads(dcc("run", artifact, "-n", 2, "--condition", "y=[7,8]", "-o", tmp_path / "a.npy", "--json").out)
    assert said["conditions"] == {"y": [7, 8]}


def test_torch_free_verbs(artifact: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from dcc import cli\n"
        f"codes = [cli.main(['inspect', {str(artifact)!r}, '--json']), cli.main(['targets']),"
        f" cli.main(['run', {str(artifact)!r}, '-n', '1', '-o', {str(tmp_path / 'a.png')!r}]), cli.main(['--help'])]\n"
        "assert codes == [0, 0, 0, 0], codes\n"
        "assert not {'torch', 'onnx', 'diffusers'} & set(sys.modules), 'a heavy package was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_inspect_artifact(dcc: Run, artifact: Path) -> None:
    found = json.loads(dcc("inspect", artifact, "--json").out)
    assert found["text"].startswith("program tiny") and found["sampler"]["calls"] == 4
    assert [row["scope"] for row in found["scopes"]] == ["timestep", "request", "table", "step"]
    components = [row["name"] for row in found["stages"] if row["component"]]
    assert components == ["blocks.0.attn", "blocks.0.mlp"]
    assert sum(row["parameters"] for row in found["stages"]) == sum(row["parameters"] for row in found["scopes"])
    assert {engine["kind"] for engine in found["engines"]} == {"timestep", "request", "table", "step"}
    shown = dcc("inspect", artifact)
    for part in ("program tiny", "scopes", "stages", "hoist-scopes", "engines", "onnxruntime"):
        assert part in shown.out


def test_inspect_model(dcc: Run, checkpoint: Path) -> None:
    result = dcc("inspect", checkpoint, "--graph", "--sampler", "none", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert "linear" in found["graph"] and found["sampler"] is None
    assert [row["name"] for row in found["stages"] if row["component"]] == ["blocks.0.attn", "blocks.0.mlp"]


def test_verify(dcc: Run, artifact: Path, checkpoint: Path) -> None:
    result = dcc("verify", artifact, "--against", checkpoint, "--seeds", "0,1,2,3,4", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["passed"] and found["forward"]["difference"] <= 1e-5 and found["loop"]["difference"] <= 1e-3
    assert found["loop"]["ssim"] > 0.999 and found["loop"]["cosine"] > 0.99999


def test_verify_misses_with_exit_code_3(dcc: Run, artifact: Path, tmp_path: Path) -> None:
    def louder(values: dict[str, Any]) -> None:
        values["state_dict"]["final_layer.linear.weight"] = values["state_dict"]["final_layer.linear.weight"] * 1.01

    other = write_checkpoint(tmp_path / "tiny.pt", louder)
    result = dcc("verify", artifact, "--against", other, "--seeds", "0")
    assert result.code == 3
    assert "MISSED" in result.out and "quality: the artifact's forward is not the original's" in result.err
    assert "sha256 differs" in result.err


def test_verify_needs_the_same_sampler(dcc: Run, artifact: Path, checkpoint: Path) -> None:
    result = dcc("verify", artifact, "--against", checkpoint, "--sampler", "heun")
    assert_refused(result, 2, "the artifact's sampler cannot be rebuilt", "--sampler-option")


def test_bench(dcc: Run, artifact: Path, checkpoint: Path) -> None:
    result = dcc(
        "bench", artifact, "--against", checkpoint, "--baseline", "eager,onnxruntime", "--batch", "1,2",
        "--repeats", 2, "--calls", 2, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(result.out)
    for row in found["batches"]:
        assert [item["candidate"] for item in row["candidates"]] == ["artifact", "eager", "onnxruntime"]
        assert all(item["failure"] is None and len(item["seconds"]) == 2 for item in row["candidates"])
        assert row["times_the_artifact"].keys() == {"eager", "onnxruntime"}
    alone = dcc("bench", artifact, "--baseline", "none", "--batch", "1", "--repeats", 1)
    assert alone.code == 0 and "artifact" in alone.out


def test_lists(dcc: Run) -> None:
    targets = {row["name"]: row for row in json.loads(dcc("targets", "--json").out)["targets"]}
    assert targets["cpu"]["backend"] == "onnxruntime" and targets["a100-80g"]["backend"] == "tensorrt-rtx"
    assert all(figure["source"] for row in targets.values() for figure in row["figures"])
    assert "a100-80g, a100" in dcc("targets").out and "312 TFLOP/s" in dcc("targets").out
    told = dcc("targets", "a100").out
    assert "TensorRT-RTX builds engines for 8.0 without a GPU" in told and "data sheet" in told
    assert json.loads(dcc("targets", "sm80", "--json").out)["target"]["name"] == "sm80"
    assert dcc("targets", "a101").code == 2
    listed = json.loads(dcc("passes", "--json").out)
    names = [row["name"] for row in listed["passes"]]
    assert names[0] == "fold-lora" and "hoist-scopes" in names and names[-1] == "cut-stages"
    assert {"fora", "taylorseer", "optimal-steps"} <= {row["name"] for row in listed["schedules"]}
    assert all(row["summary"].endswith((".", ":")) for row in (*listed["passes"], *listed["schedules"]))
    shown = dcc("passes").out
    assert shown.index("cut-stages") < shown.index("schedule passes") < shown.index("delta-dit")
    assert "flow-euler" in dcc("samplers").out
    assert dcc("--version").out.startswith("dcc 0.")


# Wrong input: one message, the next step, exit code 1 or 2, nothing left behind.


def change_state(key: str, value: Tensor | None) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        del values["state_dict"][key]
        if value is not None:
            values["state_dict"][key] = value

    return change


def add_key(values: dict[str, Any]) -> None:
    values["state_dict"]["blocks.9.surplus"] = torch.zeros(2)


BIAS = "final_layer.linear.bias"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "missing": (change_state(BIAS, None), ("1 missing", BIAS)),
    "unexpected": (add_key, ("1 unexpected", "blocks.9.surplus")),
    "mis-shaped": (change_state(BIAS, torch.zeros(5)), ("1 mis-shaped", "[5]")),
    "nan": (change_state(BIAS, torch.full((12,), float("nan"))), ("NaN", BIAS)),
    "architecture": (lambda values: values.update(arch="mystery"), ("unknown architecture 'mystery'",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(dcc: Run, tmp_path: Path, unchanged: Path, name: str) -> None:
    change, parts = BROKEN[name]
    path = write_checkpoint(tmp_path / "broken.pt", change)
    assert_refused(dcc("compile", path, "-o", unchanged / "a.dcc"), 1, *parts)


def test_missing_and_empty_file(dcc: Run, tmp_path: Path, unchanged: Path) -> None:
    empty = tmp_path / "empty.pt"
    empty.touch()
    for path, part in ((tmp_path / "none.pt", "no such file"), (empty, "the file is empty")):
        assert_refused(dcc("compile", path, "-o", unchanged / "a.dcc"), 1, part, str(path))
        assert_refused(dcc("inspect", path), 1, part)
    for path in (tmp_path / "none.dcc", tmp_path):
        assert_refused(dcc("run", path, "-o", unchanged / "a.png"), 1, "artifact: ")


def test_pickled_module(dcc: Run, tmp_path: Path, unchanged: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    result = dcc("compile", tmp_path / "module.pt", "-o", unchanged / "a.dcc")
    assert_refused(result, 1, "pickled Python objects", "--trust-pickle")


def test_data_dependent_control_flow(
    dcc: Run, tmp_path: Path, unchanged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    result = dcc("compile", "test_cli:forking", "--sampler", "none", "-o", unchanged / "a.dcc")
    assert_refused(result, 1, "trace: ")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--target", "abacus"), 2, "unknown target 'abacus'"),
        (("--sampler", "eulr"), 1, "no sampler has this name"),
        (("--steps", "0"), 2, "steps is out of range"),
        (("-O7",), 2, "unknown optimisation level 7"),
        (("-O", "fast"), 2, "-O"),
        (("--guidance", "maybe"), 2, "unknown guidance 'maybe'"),
        (("--sampler-option", "eta"), 2, "cannot read --sampler-option 'eta'"),
        (("--sampler-option", "steps=3"), 2, "'steps' is not an option of a scheduler"),
        (("--sampler-option", "banana=3"), 2, "banana"),
        (("--role", "x"), 2, "cannot read --role 'x'"),
        (("--role", "nobody=latent"), 1, "nobody"),
        (("--lora", "none.safetensors:0.5"), 1, "none.safetensors"),
        (("--max-batch", "0"), 2, "max_batch is out of range"),
        (("--frobnicate",), 2, "--frobnicate"),
    ],
)  # fmt: skip
def test_wrong_options(
    dcc: Run, checkpoint: Path, unchanged: Path, arguments: tuple[str, ...], code: int, part: str
) -> None:
    assert_refused(dcc("compile", checkpoint, "-o", unchanged / "a.dcc", *arguments), code, part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--class", "11"), "class 11 is out of range"),
        (("--class", "-1"), "class -1 is out of range"),
        (("--condition", "z=1"), "unknown condition 'z'"),
        (("--condition", "y=0.5"), "'y' cannot be converted"),
        (("-n", "0"), "at least one image"),
        (("-n", "3", "--seeds", "1,2"), "-n and --seeds disagree"),
        (("--seeds", "a"), "cannot read --seeds 'a'"),
        (("--guidance-scale", "nan"), "guidance_scale must be finite"),
        (("--threads", "0"), "threads must be at least 1"),
        (("-o", "grid.tiff"), "unknown kind of output"),
    ],
)
def test_wrong_requests(dcc: Run, artifact: Path, unchanged: Path, arguments: tuple[str, ...], part: str) -> None:
    assert_refused(dcc("run", artifact, "-o", unchanged / "a.png", *arguments), 2, part)


def test_batch_beyond_the_profile(dcc: Run, artifact: Path) -> None:
    result = dcc("bench", artifact, "--baseline", "none", "--batch", "5")
    assert_refused(result, 2, "outside the profile", "1 to 4")


def test_output_folders(dcc: Run, checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "a"
    assert_refused(dcc("compile", checkpoint, "-o", f"{missing}.dcc"), 1, "output folder does not exist", "mkdir -p")
    assert_refused(dcc("run", artifact, "-o", f"{missing}.png"), 1, "output folder does not exist", "mkdir -p")
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder(
    dcc: Run, checkpoint: Path, artifact: Path, unchanged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal of the operating system is played."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    assert_refused(dcc("compile", checkpoint, "-o", unchanged / "a.dcc"), 1, "cannot be written", "Permission denied")
    assert_refused(dcc("run", artifact, "-o", unchanged / "a.png"), 1, "cannot be written", "Permission denied")


def test_full_disk(
    dcc: Run, checkpoint: Path, artifact: Path, unchanged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcc.exports.artifact_writer import ArtifactWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "finish", full)
        assert_refused(dcc("compile", checkpoint, "-o", unchanged / "a.dcc", "--steps", 2), 1, "No space left")
    monkeypatch.setattr(np, "save", full)
    assert_refused(dcc("run", artifact, "-n", 1, "-o", unchanged / "a.npy"), 1, "No space left")


def test_artifact_of_a_newer_format(dcc: Run, artifact: Path, tmp_path: Path, unchanged: Path) -> None:
    from dcc.runtime.manifest import read_manifest

    with zipfile.ZipFile(artifact) as archive:
        values = json.loads(archive.read("manifest.json"))
    values["format"] += 1
    with pytest.raises(DccError, match="made by a newer dcc") as refusal:
        read_manifest(json.dumps(values).encode())
    assert "upgrade dcc" in str(refusal.value)
    newer = tmp_path / "newer.dcc"
    newer.write_bytes(_same_length_manifest(artifact))
    for verb in (("run", newer, "-o", unchanged / "a.png"), ("inspect", newer)):
        assert_refused(dcc(*verb), 1, "made by a newer dcc", "format 9", "upgrade dcc")


def _same_length_manifest(artifact: Path) -> bytes:
    """The artifact with `format` 9 in its manifest and the checksums of the container made right again."""
    import zlib

    data = artifact.read_bytes()
    with zipfile.ZipFile(artifact) as archive:
        before = archive.read("manifest.json")
    after = before.replace(b'"format":1', b'"format":9').replace(b'"format": 1', b'"format": 9')
    assert len(after) == len(before) and after != before
    old, new = (zlib.crc32(text).to_bytes(4, "little") for text in (before, after))
    return data.replace(before, after).replace(old, new)


# How it ends.


def test_unexpected_error_is_called_a_bug(dcc: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one over nothing\nsecond line")

    monkeypatch.setattr("dcc.runtime.load", explode)
    result = dcc("run", artifact)
    assert_refused(result, 1, "unexpected ZeroDivisionError: one over nothing", "--traceback", "bug")
    assert "second line" not in result.err
    assert "Traceback" in dcc("run", artifact, "--traceback").err
    monkeypatch.setenv("DCC_TRACEBACK", "1")
    assert "Traceback" in dcc("run", artifact).err


def test_interrupted_while_sampling(dcc: Run, artifact: Path, unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcc.commands.run.sample_all", interrupt)
    result = dcc("run", artifact, "-o", unchanged / "a.png")
    assert result.code == 130 and result.out == ""
    assert result.err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("stage", ["importing torch", "tracing", "lowering"])
def test_control_c_while_compiling(checkpoint: Path, unchanged: Path, stage: str) -> None:
    command = [
        sys.executable,
        "-m",
        "dcc.cli",
        "compile",
        str(checkpoint),
        "-o",
        str(unchanged / "a.dcc"),
        "--steps",
        "2",
    ]
    # A parent that ignores interrupts (nohup, a background job) would pass that on.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if stage in line:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.stdout.read() == ""
        assert process.wait(120) == 130, "".join(lines) + rest
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "interrupted"


def test_an_interrupt_that_a_library_hides(dcc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch turns an interrupt within its dispatch into a TypeError of its own and logs that with its traceback."""

    def hide(_: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            logging.getLogger("torch").error("fake tensor raised TypeError")
            raise TypeError("dispatch failed") from None

    monkeypatch.setattr("dcc.cli._run", hide)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = dcc("inspect", "a.dcc")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert logging.root.manager.disable == logging.NOTSET


def test_closed_pipe_is_quiet(artifact: Path) -> None:
    command = f"{sys.executable} -m dcc.cli inspect {artifact} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("program tiny") and done.stderr == ""


def test_no_colour_without_a_terminal(dcc: Run, artifact: Path) -> None:
    assert "\x1b" not in dcc("inspect", artifact).out
    assert os.environ.get("NO_COLOR") is None or os.environ["NO_COLOR"]


def test_an_interrupt_that_comes_while_an_object_is_deleted_is_not_lost(
    dcc: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would print it as ignored, with its traceback, and the command would go on."""

    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def command(_: list[str]) -> int:
        Deleted()
        for _ in range(1000):
            time.sleep(0.001)
        return 0

    monkeypatch.setattr("dcc.cli._run", command)
    before = sys.unraisablehook
    result = dcc("targets")
    assert result.code == 130 and result.err.splitlines() == ["interrupted"]
    assert sys.unraisablehook is before
