"""What `--require` says: read, refused with the reason, and measured."""

from __future__ import annotations

import numpy as np
import pytest

from dcc.errors import UsageError
from dcc.quality import psnr, relative_l2, ssim
from dcc.search.requirement import DEFAULT, Requirement


def samples(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 8, 8)).astype(np.float32)


def mean_gap(one: np.ndarray, other: np.ndarray) -> float:
    """A metric of somebody else."""
    return float(np.abs(one - other).mean())


def nothing(one: np.ndarray, other: np.ndarray) -> None:
    """A metric without a value."""


NUMBER = 7


@pytest.mark.parametrize(
    ("text", "metric", "at_least", "bound"),
    [
        (DEFAULT, "psnr", True, 30.0),
        (" psnr >= 27.5 ", "psnr", True, 27.5),
        ("ssim>=0.95", "ssim", True, 0.95),
        ("cosine>=-1", "cosine", True, -1.0),
        ("relative_l2<=1e-2", "relative_l2", False, 0.01),
        ("test_requirement:mean_gap<=0.5", "test_requirement:mean_gap", False, 0.5),
        ("test_requirement:mean_gap>=0.5", "test_requirement:mean_gap", True, 0.5),
    ],
)
def test_it_is_read(text: str, metric: str, at_least: bool, bound: float) -> None:
    found = Requirement.parse(text)
    assert found == Requirement(metric, at_least, bound)
    assert Requirement.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read the requirement"),
        ("30", "cannot read the requirement"),
        ("psnr", "cannot read the requirement"),
        ("psnr=30", "cannot read the requirement"),
        ("psnr>30", "cannot read the requirement"),
        ("psnr>=", "cannot read the requirement"),
        ("psnr>=thirty", "want  a number behind the comparison"),
        ("psnr>=30dB", "want  a number behind the comparison"),
        ("psnr>=nan", "want  a finite number"),
        ("psnr>=inf", "want  a finite number"),
        ("psnr>=30,ssim>=0.9", "want  a number behind the comparison"),
        ("fid<=3", "psnr, ssim, cosine, relative_l2, or module:function"),
        ("psnr<=30", "want  psnr>=30"),
        ("relative_l2>=0.1", "want  relative_l2<=0.1"),
        ("no_such_module:metric>=1", "the metric cannot be imported"),
        ("test_requirement:no_such_metric>=1", "the metric cannot be imported"),
        ("test_requirement:NUMBER>=1", "the metric is not a function"),
    ],
)
def test_a_wrong_text_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Requirement.parse(text)
    assert reason in str(refusal.value)


def test_it_measures_what_the_metric_says() -> None:
    one, other = samples(), samples(1)
    assert Requirement.parse("psnr>=1").measure(one, other, 4.0) == psnr(one, other, 4.0)
    assert Requirement.parse("ssim>=0").measure(one, other, 4.0) == ssim(one, other, 4.0)
    assert Requirement.parse("relative_l2<=1").measure(one, other, 4.0) == relative_l2(one, other)
    assert Requirement.parse("test_requirement:mean_gap<=1").measure(one, other, 4.0) == mean_gap(one, other)


def test_a_metric_without_a_value_is_refused() -> None:
    flat = samples().reshape(2, -1)
    with pytest.raises(UsageError, match="ssim has no value for samples of this shape"):
        Requirement.parse("ssim>=0.5").measure(flat, flat, 1.0)
    with pytest.raises(UsageError, match="nothing has no value"):
        Requirement.parse("test_requirement:nothing>=0.5").measure(flat, flat, 1.0)


@pytest.mark.parametrize(("text", "good", "bad"), [("psnr>=30", 30.0, 29.99), ("relative_l2<=0.1", 0.1, 0.11)])
def test_the_bound_itself_holds(text: str, good: float, bad: float) -> None:
    requirement = Requirement.parse(text)
    assert requirement.holds(good)
    assert not requirement.holds(bad)
    assert not requirement.holds(float("nan"))


def test_equal_samples_keep_every_requirement() -> None:
    for text in ("psnr>=1000", "ssim>=0.999", "cosine>=0.999", "relative_l2<=0"):
        requirement = Requirement.parse(text)
        assert requirement.holds(requirement.measure(samples(), samples(), 4.0))
