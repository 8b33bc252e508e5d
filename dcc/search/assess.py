"""What a schedule is worth: quality on held-out requests, and measured speed beside the exact run and fewer steps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcc.errors import SamplerError, UsageError
from dcc.ir.measurements import subject_of
from dcc.ir.schedule import Schedule
from dcc.preparation import Prepared
from dcc.quality import cosine, relative_l2
from dcc.runtime.loaded import LoadedArtifact
from dcc.search.front import FewerSteps
from dcc.search.laboratory import Laboratory, Requests

Array = np.ndarray[Any, np.dtype[Any]]
REPEATS = 4


@dataclass(frozen=True)
class Quality:
    """Samples against the exact ones of the same requests."""

    psnr: float
    ssim: float | None
    cosine: float
    relative_l2: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """PSNR of equal samples is null: JSON has no infinity."""
        return {**asdict(self), "psnr": self.psnr if math.isfinite(self.psnr) else None}


def quality_of(laboratory: Laboratory, samples: Array, requests: Requests) -> Quality:
    exact = laboratory.exact_trajectory(requests)[-1].astype(np.float32)
    _, decibels, structure = laboratory.quality(samples, requests)
    return Quality(decibels, structure, cosine(samples, exact), relative_l2(samples, exact), requests.images)


def beside_exact(
    laboratory: Laboratory, exact: LoadedArtifact, subjects: Mapping[str, LoadedArtifact], repeats: int = REPEATS
) -> tuple[dict[str, float], float]:
    """The time of a generation of each subject over that of the exact loop, and the exact loop's in milliseconds.

    Rounds over the subjects, the exact loop before and after every two: a subject's ratio of a round is to the exact
    runs around it, so that a disturbance of the machine meets both. Medians over rounds, after a run that is not
    counted.
    """

    def seconds(loaded: LoadedArtifact) -> float:
        values = laboratory.request_values(loaded, laboratory.search)
        start = time.perf_counter()
        loaded.sample(**values)
        return time.perf_counter() - start

    for loaded in (exact, *subjects.values()):
        seconds(loaded)
    ratios: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    exacts = [seconds(exact)]
    for _ in range(repeats):
        for pair in (names[begin : begin + 2] for begin in range(0, len(names), 2)):
            taken = [seconds(subjects[name]) for name in pair]
            exacts.append(seconds(exact))
            for name, value in zip(pair, taken, strict=True):
                ratios[name].append(value / statistics.mean(exacts[-2:]))
    return {name: statistics.median(values) for name, values in ratios.items()}, statistics.median(exacts) * 1e3


def computed_share(laboratory: Laboratory, schedule: Schedule) -> float:
    subject = subject_of(laboratory.program)
    return schedule.computed_share(subject.flops, subject.glue_flops)


class PlainSteps:
    """The exact loop with fewer steps: what the same time buys without any schedule."""

    def __init__(self, prepared: Prepared, laboratory: Laboratory, folder: Path) -> None:
        self._prepared, self._laboratory, self._folder = prepared, laboratory, folder
        self._made: dict[int, Laboratory | None] = {}

    def laboratory(self, steps: int) -> Laboratory | None:
        """The same requests at another number of steps; None where the sampler has no such table."""
        if steps not in self._made:
            folder = self._folder / f"steps-{steps}"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                program = self._prepared.with_steps(steps).program
            except (SamplerError, UsageError):
                self._made[steps] = None
            else:
                self._made[steps] = self._laboratory.sibling(program, folder)
        return self._made[steps]

    def at(self, steps: int, exact_ms: float) -> FewerSteps | None:
        """Quality of the run with so many steps; its latency is that of the exact run by the number of calls."""
        other = self.laboratory(steps)
        if other is None:
            return None
        trial = other.run(None, self._laboratory.held_out)
        _, decibels, structure = self._laboratory.quality(trial.samples, self._laboratory.held_out)
        latency = exact_ms * other.program.calls / self._laboratory.program.calls
        return FewerSteps(steps, latency, decibels, structure)

    def of_equal_time(self, speedup: float, exact_ms: float) -> FewerSteps | None:
        """The most steps that take no longer than the schedule, at least one."""
        sampler = self._prepared.program.sampler
        steps = max(1, math.floor(sampler.steps / speedup + 1e-6))
        return self.at(steps, exact_ms) if steps < sampler.steps else None
