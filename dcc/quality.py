"""How far one array of samples is from another, and whether that is near enough. numpy only.

Every metric takes the reference second; ranges are the reference's own, so that latents of any scale compare.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
WINDOW = 7
# Constants of the paper, as shares of the range.
K1, K2 = 0.01, 0.03


def value_range(reference: Array) -> float:
    """Maximum minus minimum; 1 for a constant, so that it can be divided by."""
    return float(reference.max()) - float(reference.min()) or 1.0


def difference(got: Array, wanted: Array) -> float:
    """The largest absolute difference over the range of `wanted`; infinite where anything is not finite."""
    worst = float(np.abs(_wide(got) - _wide(wanted)).max()) / value_range(wanted)
    return worst if math.isfinite(worst) else math.inf


def typical_range(reference: Array) -> float:
    """The range that all but one value in a thousand lie in: a few outliers of unbounded latents do not widen it."""
    low, high = np.quantile(_wide(reference), (0.0005, 0.9995))
    return float(high - low) or 1.0


def psnr(got: Array, wanted: Array, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal arrays, minus infinity where a difference is.

    The range is the reference's unless given.
    """
    error = float(np.mean((_wide(got) - _wide(wanted)) ** 2))
    peak = value_range(wanted) if data_range is None else data_range
    if math.isinf(error):
        return -math.inf
    return math.inf if error == 0.0 else 10.0 * math.log10(peak**2 / error)


def cosine(got: Array, wanted: Array) -> float:
    """The least cosine of the angle between a sample and its reference; 1 for equal arrays, zero ones too."""
    worst = 1.0
    for a, b in zip(_wide(got), _wide(wanted), strict=True):
        norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
        if norm:
            worst = min(worst, float((a * b).sum()) / norm)
        elif not np.array_equal(a, b):
            return 0.0
    return worst


def relative_l2(got: Array, wanted: Array) -> float:
    """The norm of the difference over the norm of the reference."""
    norm = float(np.linalg.norm(_wide(wanted)))
    return float(np.linalg.norm(_wide(got) - _wide(wanted))) / (norm or 1.0)


def ssim(got: Array, wanted: Array, data_range: float | None = None) -> float | None:
    """Mean structural similarity over 7x7 windows; None where the last two dimensions are smaller than one.

    The range is the reference's unless given.

    Source    Wang et al. 2004, "Image quality assessment", with uniform windows and sample covariance.
    """
    if got.ndim < 3 or min(got.shape[-2:]) < WINDOW:
        return None
    x, y = _wide(got), _wide(wanted)
    count = WINDOW**2
    correction = count / (count - 1)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = (_window_mean(x * x) - mean_x**2) * correction
    var_y = (_window_mean(y * y) - mean_y**2) * correction
    both = (_window_mean(x * y) - mean_x * mean_y) * correction
    peak = value_range(wanted) if data_range is None else data_range
    c1, c2 = ((share * peak) ** 2 for share in (K1, K2))
    score = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())


def _window_mean(images: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(images, (WINDOW, WINDOW), axis=(-2, -1))
    return np.asarray(windows.mean(axis=(-2, -1)))


def _wide(values: Array) -> Array:
    return values.astype(np.float64)


@dataclass(frozen=True)
class Comparison:
    """Samples against their reference; `limit` bounds `difference`, which is relative to the range."""

    difference: float
    limit: float
    psnr: float
    ssim: float | None
    cosine: float
    relative_l2: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit

    def to_json(self) -> dict[str, Any]:
        """As JSON has no infinity, PSNR of equal arrays and the difference of broken ones are null."""
        values = {key: value if value is None or math.isfinite(value) else None for key, value in asdict(self).items()}
        return {**values, "passed": self.passed}


def compare(got: Array, wanted: Array, limit: float) -> Comparison:
    """All metrics of `got` against `wanted`, whose shapes must be equal."""
    if got.shape != wanted.shape:
        raise ValueError(f"cannot compare {got.shape} with {wanted.shape}")
    worst, noise, structure = difference(got, wanted), psnr(got, wanted), ssim(got, wanted)
    return Comparison(worst, limit, noise, structure, cosine(got, wanted), relative_l2(got, wanted))
