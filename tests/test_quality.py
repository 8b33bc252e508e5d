"""Metrics against their definitions and against scikit-image; pictures of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dcc.picture import enlarged, grid, to_pixels
from dcc.quality import compare, cosine, difference, psnr, relative_l2, ssim


def images(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 12, 9)).astype(np.float32)


def test_equal_arrays() -> None:
    found = compare(images(0), images(0), 1e-5)
    assert (found.difference, found.psnr, found.ssim, found.cosine, found.relative_l2) == (0.0, math.inf, 1.0, 1.0, 0.0)
    assert found.passed and found.to_json()["psnr"] is None


def test_definitions() -> None:
    wanted = np.array([[0.0, 4.0], [3.0, 0.0]])
    got = np.array([[0.0, 4.0], [3.0, 1.0]])
    assert difference(got, wanted) == 0.25
    assert psnr(got, wanted) == pytest.approx(10 * math.log10(16 / 0.25))
    assert relative_l2(got, wanted) == pytest.approx(0.2)
    assert cosine(got, wanted) == pytest.approx(3 / math.sqrt(10))
    assert cosine(-wanted, wanted) == -1.0


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    wanted, got = images(1), images(1) + 0.3 * images(2)
    span = float(wanted.max() - wanted.min())
    expected = [
        metrics.structural_similarity(a[c].astype(np.float64), b[c].astype(np.float64), data_range=span, full=True)[1]
        for a, b in zip(wanted, got, strict=True)
        for c in range(2)
    ]
    inner = np.stack(expected)[:, 3:-3, 3:-3]  # scikit-image pads; whole windows lie inside
    assert ssim(got, wanted) == pytest.approx(float(inner.mean()), abs=1e-9)
    assert ssim(got[..., :5], wanted[..., :5]) is None


def test_what_is_not_finite_never_passes() -> None:
    broken = images(0)
    broken[0, 0, 0, 0] = np.nan
    found = compare(broken, images(0), 1e-3)
    assert not found.passed and found.to_json()["difference"] is None
    with pytest.raises(ValueError, match="cannot compare"):
        compare(images(0), images(0, 2), 1e-3)


def test_pixels_and_grid() -> None:
    samples = np.array([-1.0, 0.0, 1.0, 7.0], np.float32).reshape(4, 1, 1, 1)
    pixels = to_pixels(samples)
    assert pixels.ravel().tolist() == [0, 128, 255, 255]
    assert to_pixels(samples, own_range=True).ravel().tolist() == [0, 32, 64, 255]
    assert enlarged(np.zeros((2, 3, 16, 20), np.uint8)).shape == (2, 3, 48, 60)
    assert enlarged(np.zeros((2, 3, 128, 20), np.uint8)).shape == (2, 3, 128, 20)
    sheet = grid(np.zeros((5, 3, 4, 6), np.uint8))
    assert sheet.shape == (2 + 2 * 6, 2 + 3 * 8, 3)
    assert int((sheet == 0).sum()) == 5 * 4 * 6 * 3
