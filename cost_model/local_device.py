"""The GPU of this machine, asked of NVIDIA's driver: by cuda-python where it is installed, else by nvidia-smi.

torch is not asked: it takes seconds to import, and machines that only run artifacts do not have it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

SECONDS_TO_ANSWER = 20.0
QUERY = ("--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Device:
    """A GPU as NVIDIA's driver names it; capability 80 for 8.0. `found_by` says who asked the driver."""

    name: str
    capability: int
    memory_bytes: int
    found_by: str


def local_device() -> Device | None:
    """The first GPU that this process may use; None where no driver answers."""
    # CUDA hides every GPU for an empty list and for -1; nvidia-smi does not know of the variable.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = None if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    return _asked_by_cuda_python() or _asked_by_nvidia_smi(first)


def _asked_by_cuda_python() -> Device | None:
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
        if int(driver.cuInit(0)[0]) != 0 or driver.cuDeviceGetCount()[1] == 0:
            return None
    except (ImportError, RuntimeError):  # not installed; installed, and there is no driver to load
        return None
    device = driver.cuDeviceGet(0)[1]
    name = driver.cuDeviceGetName(96, device)[1].split(b"\0")[0].decode(errors="replace")
    names = (f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR"))
    attributes = (getattr(driver.CUdevice_attribute, item) for item in names)
    major, minor = (int(driver.cuDeviceGetAttribute(item, device)[1]) for item in attributes)
    return Device(name, 10 * major + minor, int(driver.cuDeviceTotalMem(device)[1]), "cuda-python")


def _asked_by_nvidia_smi(first: str | None) -> Device | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, *QUERY, *([f"--id={first}"] if first else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return None
    row = [item.strip() for item in (done.stdout.splitlines() or [""])[0].split(",")]
    if done.returncode != 0 or len(row) != 3 or not re.fullmatch(r"\d+\.\d", row[1]):
        return None
    # An Orin shares the machine's memory, and nvidia-smi says "[N/A]".
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(row[2]) << 20 if row[2].isdigit() else shared
    return Device(row[0], int(row[1].replace(".", "")), memory, "nvidia-smi")
