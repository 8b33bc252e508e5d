"""The target that this machine is, told by drivers that are made up here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dcc.cost_model.local_device import Device, local_device
from dcc.cost_model.targets import local_target, target_named, targets_named
from dcc.errors import UsageError

MODULE = "cuda.bindings.driver"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a driver, all programs of which are in this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, MODULE, None)  # importing it raises ImportError
    return tmp_path


def nvidia_smi(folder: Path, answer: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nfor each; do case $each in --id=*) echo "$each" > {folder}/asked;; esac; done\n'
                       f"echo '{answer}'\nexit {code}\n")  # fmt: skip
    program.chmod(0o755)


def cuda_python(error: int = 0, count: int = 1) -> ModuleType:
    """The binding as it is with one L4, with `count` devices, or with an error of the driver."""
    names = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    module = ModuleType(MODULE)
    module.CUdevice_attribute = SimpleNamespace(**{item: item for item in names})  # type: ignore[attr-defined]
    values = dict(zip(names, (8, 9), strict=True))
    answers = {
        "cuInit": lambda flags: (error,),
        "cuDeviceGetCount": lambda: (0, count),
        "cuDeviceGet": lambda index: (0, index),
        "cuDeviceGetName": lambda length, device: (0, b"NVIDIA L4".ljust(length, b"\0")),
        "cuDeviceGetAttribute": lambda item, device: (0, values[item]),
        "cuDeviceTotalMem": lambda device: (0, 24 << 30),
    }
    for key, value in answers.items():
        setattr(module, key, value)
    return module


def test_a_machine_without_a_driver_is_the_processor(folder: Path) -> None:
    assert local_device() is None
    assert target_named("local") == target_named("cpu")
    with pytest.raises(UsageError, match="local and cpu"):
        targets_named("local,cpu")


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("NVIDIA A100-SXM4-80GB, 8.0, 81920", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB, 8.0, 40960", "a100-40g"),
        ("Tesla T4, 7.5, 15360", "t4"),
        ("NVIDIA H200, 9.0, 143771", "h200"),
        ("NVIDIA GeForce RTX 5090, 12.0, 32607", "rtx5090"),
    ],
)
def test_a_card_that_is_known_is_itself(folder: Path, answer: str, name: str) -> None:
    nvidia_smi(folder, answer)
    assert local_target() == target_named(name)


def test_another_card_has_the_figures_of_its_capability_and_its_own_memory(folder: Path) -> None:
    nvidia_smi(folder, "NVIDIA RTX A6000, 8.6, 49140")
    found = target_named("local")
    assert (found.name, found.chip, found.capability) == ("sm86", "NVIDIA RTX A6000", 86)
    assert found.memory_bytes == 49140 << 20
    assert found.number("bandwidth") == target_named("rtx3090").number("bandwidth")
    memory = found.figure("memory")
    assert memory is not None and memory.source == "this machine's driver, by nvidia-smi"


def test_an_orin_has_the_machines_memory(folder: Path) -> None:
    nvidia_smi(folder, "Orin (nvgpu), 8.7, [N/A]")
    device = local_device()
    assert device is not None and device.memory_bytes > 1 << 28
    assert local_target().backend == "tensorrt"


def test_a_card_without_figures_is_refused(folder: Path) -> None:
    nvidia_smi(folder, "NVIDIA V100, 7.0, 32768")
    with pytest.raises(UsageError, match="no figures for this machine's GPU") as caught:
        local_target()
    assert caught.value.details["got"] == "NVIDIA V100, compute capability 7.0"
    assert "sm75" in caught.value.details["want"] and "--target cpu" in caught.value.details["next"]


@pytest.mark.parametrize("answer", ["", "No devices were found", "NVIDIA A10, eight, 1", "a,b"])
def test_what_is_no_answer_is_no_driver(folder: Path, answer: str) -> None:
    nvidia_smi(folder, answer)
    assert local_device() is None


def test_a_program_that_fails_or_cannot_run_is_no_driver(folder: Path) -> None:
    nvidia_smi(folder, "NVIDIA A10, 8.6, 23028", code=9)
    assert local_device() is None
    (folder / "nvidia-smi").write_bytes(b"\x7fELF")
    assert local_device() is None


def test_the_first_visible_device_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(folder, "NVIDIA A10, 8.6, 23028")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert local_target().name == "a10"
    assert (folder / "asked").read_text().strip() == "--id=2"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert local_device() is None


def test_cuda_python_is_asked_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(folder, "NVIDIA A10, 8.6, 23028")
    monkeypatch.setitem(sys.modules, MODULE, cuda_python())
    assert local_device() == Device("NVIDIA L4", 89, 24 << 30, "cuda-python")
    assert local_target() == target_named("l4")


@pytest.mark.parametrize("module", [cuda_python(error=100), cuda_python(count=0)], ids=["no driver", "no device"])
def test_cuda_python_without_a_driver_is_no_driver(
    folder: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert local_device() is None


def test_cuda_python_that_finds_no_library_is_no_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cuda_python()

    def fails(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module.cuInit = fails  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert local_device() is None
