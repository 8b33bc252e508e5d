"""The quality that a lossy artifact must have: `psnr>=30`, `ssim>=0.95`, or any metric as `module:function>=value`."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.quality import cosine, psnr, relative_l2, ssim

Array = np.ndarray[Any, np.dtype[Any]]
# Metrics that know the range of the data take it; whether more is better.
KNOWN = {"psnr": True, "ssim": True, "cosine": True, "relative_l2": False}
PATTERN = re.compile(r"\s*([\w.]+(?::\w+)?)\s*(>=|<=)\s*(\S+)\s*")
DEFAULT = "psnr>=30"


@dataclass(frozen=True)
class Requirement:
    """A bound on one metric of the samples against the exact ones."""

    metric: str
    at_least: bool
    bound: float

    @staticmethod
    def parse(text: str) -> Requirement:
        """Raises UsageError for anything but `metric>=number` and `metric<=number` with a known metric."""
        match = PATTERN.fullmatch(text)
        if match is None:
            raise UsageError("cannot read the requirement", got=text, want="metric>=number, as psnr>=30")
        name, comparison, number = match.groups()
        if name not in KNOWN and ":" not in name:
            raise UsageError("unknown metric", got=name, want=f"{', '.join(KNOWN)}, or module:function")
        try:
            bound = float(number)
        except ValueError as error:
            raise UsageError("cannot read the requirement", got=text, want="a number behind the comparison") from error
        if not math.isfinite(bound):
            raise UsageError("cannot read the requirement", got=text, want="a finite number")
        if name in KNOWN and KNOWN[name] != (comparison == ">="):
            want = f"{name}{'>=' if KNOWN[name] else '<='}{number}"
            raise UsageError("the requirement is the wrong way round", got=text, want=want)
        found = Requirement(name, comparison == ">=", bound)
        found.function()
        return found

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.bound:g}"

    def function(self) -> Callable[..., Any]:
        """The metric's function. Raises UsageError where it cannot be imported."""
        if self.metric in KNOWN:
            known: dict[str, Callable[..., Any]] = {
                "psnr": psnr, "ssim": ssim, "cosine": cosine, "relative_l2": relative_l2,
            }  # fmt: skip
            return known[self.metric]
        module, _, name = self.metric.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the module does when it is imported
            raise UsageError("the metric cannot be imported", at=self.metric, got=error) from error
        if not callable(found):
            raise UsageError("the metric is not a function", at=self.metric, got=type(found).__name__)
        return found

    def measure(self, samples: Array, exact: Array, data_range: float) -> float:
        """The metric of these samples. Raises UsageError where it has no value for them."""
        ranged = self.metric in ("psnr", "ssim")
        function = self.function()
        try:
            value = function(samples, exact, data_range) if ranged else function(samples, exact)
            found = None if value is None else float(value)
        except Exception as error:  # the user's function
            raise UsageError("the metric has no value", at=self.metric, got=error, want="a number") from error
        if found is None:
            raise UsageError(f"{self.metric} has no value for samples of this shape", got=samples.shape)
        return found

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound
