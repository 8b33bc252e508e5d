"""`dcc build` that does not come to its end, or is not alone: the artifact stays whole, and nobody's work is lost."""

from __future__ import annotations

import errno
import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dcc import build_layers as build_module
from dcc import cli
from dcc.build_layers import build
from dcc.errors import ArtifactError, ExportError, UsageError
from dcc.exports.artifact_extension import ArtifactExtension
from dcc.layers import BuildOptions, LayerRequest, add_layers
from dcc.runtime.artifact import Artifact

H100 = LayerRequest("tensorrt", "float16", (90,), ("h100",), "because")
B200 = LayerRequest("tensorrt", "float16", (100,), ("b200",), "because")
UNCHECKED = BuildOptions(check=False)


@pytest.fixture
def path(artifact: Callable[..., Path], tmp_path: Path) -> Path:
    copied = tmp_path / "model.dcc"
    copied.write_bytes(artifact("dit", "step").read_bytes())
    return copied


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(path: Path) -> list[str]:
    return [layer.name for layer in Artifact.open(path, check="full").layers]


@pytest.mark.parametrize("where", ["told", "_write", "_copy", "_check"])
def test_an_interrupt_anywhere_leaves_the_artifact_as_it_was(
    where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its first moments, wherever the interpreter happens to be."""
    before, moments = digest(path), [0]

    def interrupting(method: Callable[..., None], last: int) -> Callable[..., None]:
        def called(*arguments: object, **options: object) -> None:
            moments[0] += 1
            if moments[0] == last:
                raise KeyboardInterrupt
            method(*arguments, **options)

        return called

    for last in (1, 2, 3):
        moments[0] = 0
        with monkeypatch.context() as patch:
            told = interrupting(lambda _: None, last) if where == "told" else lambda _: None
            if where != "told":
                patch.setattr(ArtifactExtension, where, interrupting(getattr(ArtifactExtension, where), last))
            try:
                add_layers(path, [H100], options=UNCHECKED, told=told)
            except KeyboardInterrupt:
                assert digest(path) == before
            else:
                assert moments[0] < last
                path.write_bytes(path.read_bytes())
        assert [item.name for item in path.parent.iterdir()] == [path.name]
    add_layers(path, [H100], options=UNCHECKED)
    assert names(path) == ["tensorrt-float16-sm90"]


@pytest.mark.parametrize("where", ["_copy", "_write"])
def test_a_full_disk_is_said_and_leaves_the_artifact_as_it_was(
    where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = digest(path)
    monkeypatch.setattr(ArtifactExtension, where, full)
    with pytest.raises(ExportError, match="the artifact cannot be written") as caught:
        add_layers(path, [H100], options=UNCHECKED)
    assert caught.value.details["got"] == "No space left on device" and "space" in caught.value.details["next"]
    assert digest(path) == before and [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_kill_in_the_middle_of_writing_leaves_the_artifact_as_it_was(path: Path) -> None:
    before = digest(path)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dcc.exports.artifact_extension import ArtifactExtension\n"
        "from dcc.runtime.artifact import Artifact\n"
        "with ArtifactExtension(Artifact.open(sys.argv[1]), sys.argv[1]) as extension:\n"
        "    extension.add_member('layers/x/step.engine', bytes(2**20))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert digest(path) == before and names(path) == []
    add_layers(path, [H100], options=UNCHECKED)
    assert names(path) == ["tensorrt-float16-sm90"]


@pytest.mark.parametrize("moment", [1, 2])
def test_two_builds_of_one_artifact_lose_nothing(moment: int, path: Path) -> None:
    """The slower one would write over the other's layer: it is told to start again."""
    heard: list[str] = []

    def told(text: str) -> None:
        heard.append(text)
        if len(heard) == moment:
            add_layers(path, [B200], options=UNCHECKED)

    with pytest.raises((ExportError, ArtifactError)) as caught:
        add_layers(path, [H100], options=BuildOptions(check=moment == 2), told=told)
    assert "again" in caught.value.details["next"]
    assert names(path) == ["tensorrt-float16-sm100"]
    add_layers(path, [H100], options=UNCHECKED)
    assert names(path) == ["tensorrt-float16-sm100", "tensorrt-float16-sm90"]
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_change_at_the_last_moment_is_seen(path: Path) -> None:
    with ArtifactExtension(Artifact.open(path), path) as extension:
        add_layers(path, [B200], options=UNCHECKED)
        with pytest.raises(ExportError, match="the artifact was changed while this was made of it"):
            extension.finish({})
    assert names(path) == ["tensorrt-float16-sm100"]
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_machine_without_a_gpu_has_nothing_local(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dcc.cost_model.targets.local_device", lambda: None)
    monkeypatch.setattr(build_module, "local_device", lambda: None)
    with pytest.raises(UsageError, match="no driver of NVIDIA answers on this machine") as caught:
        build(path)
    assert "--target a100" in caught.value.details["next"]
    assert cli.main(["build", str(path), "--target", "cpu"]) == 2
    assert "these targets need no engines of their own" in capsys.readouterr().err
    with pytest.raises(ExportError, match="the output is a directory"):
        build(path, target="h100", output=path.parent)


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.dcc").write_text("no zip file")
    with pytest.raises(ArtifactError, match="this is not a dcc artifact") as caught:
        Artifact.open(tmp_path / "model.dcc")
    assert caught.value.details["at"] == repr(str(tmp_path / "model.dcc"))
