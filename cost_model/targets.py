"""The targets that dcc compiles for: one data file each, with the source of every figure."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcc.errors import UsageError

FOLDER = Path(__file__).resolve().parent / "targets"


@dataclass(frozen=True)
class Figure:
    """One fact about a target, its unit, and where it comes from."""

    name: str
    value: int | float | str
    unit: str
    source: str


@dataclass(frozen=True)
class Target:
    """A kind of machine and the backend that runs on it."""

    name: str
    summary: str
    backend: str
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_targets() -> tuple[Target, ...]:
    """Every target, by name."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("*.json")))


def target_named(name: str) -> Target:
    """The target of this name. Raises UsageError for one that does not exist."""
    known = {target.name: target for target in list_targets()}
    if name not in known:
        raise UsageError(f"unknown target '{name}'", want=", ".join(known), next="dcc targets")
    return known[name]


def this_machine() -> dict[str, Any]:
    """What can be told of the machine that this process runs on: processors it may use, memory in bytes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "usable_processors": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _read(path: Path) -> Target:
    data = json.loads(path.read_text(encoding="utf-8"))
    figures = tuple(Figure(**figure) for figure in data["figures"])
    return Target(data["name"], data["summary"], data["backend"], figures)
