"""Philox against the known answers of Random123, and the layout that torch gives its draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from simulated import Watched, loaded_example, simulated_device

from dcc.errors import UsageError
from dcc.runtime.philox import SMALLEST_GRID, CudaGenerator, grid_of, philox

# kat_vectors of Random123: philox4x32 10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]) -> None:
    assert philox(np.array([counter], np.uint32), key)[0].tolist() == list(wanted)


def test_an_element_below_one_grid_is_its_own_subsequence() -> None:
    """Whatever the GPU, and however many others there are."""
    few, many = CudaGenerator(7).randn((300,)), CudaGenerator(7, threads=4096).randn((2000,))
    assert np.array_equal(few, many[:300])
    assert few.dtype == np.float32


def test_beyond_a_grid_the_other_normals_of_each_thread_follow() -> None:
    values = CudaGenerator(7, threads=256).randn((256 * 5,)).reshape(5, 256)
    assert np.array_equal(values[0], CudaGenerator(7).randn((256,)))
    generator = CudaGenerator(7)
    for _ in range(2):
        later = generator.randn((256,))
    # The fifth normal of a thread is the first of its next draw.
    assert np.array_equal(values[4], later)
    # Sine and cosine of one pair lie on a circle: no two rows are equal.
    assert len({row.tobytes() for row in values}) == 5


def test_draws_are_normal_and_go_on() -> None:
    generator = CudaGenerator(2**40 + 3)
    values = np.concatenate([generator.randn((100, 100)).ravel() for _ in range(20)]).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert np.isfinite(values).all()
    assert generator.randn((0, 3)).shape == (0, 3)


def test_wrong_arguments_are_refused() -> None:
    for arguments in ((True,), (2**70,), (1, 100)):
        with pytest.raises(UsageError):
            CudaGenerator(*arguments)


def test_what_a_gpu_drew() -> None:
    """`torch.randn(3, 4, device="cuda")` after `manual_seed(0)`, as AUTOMATIC1111's rng_philox.py publishes it."""
    drawn = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388], [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]  # fmt: skip
    got = CudaGenerator(0).randn((3, 4))
    # Its logarithm and sine are the hardware's approximations.
    assert np.abs(got - drawn).max() < 2e-6


def test_large_draws_need_the_gpu_s_name() -> None:
    """From one turn of the smallest grid on, elements go to other threads on other GPUs."""
    largest = CudaGenerator(1).randn((SMALLEST_GRID,))
    for gpu in ("t4", "RTX4090", "h100"):
        assert np.array_equal(CudaGenerator(1, grid_of(gpu)).randn((SMALLEST_GRID,)), largest)
    with pytest.raises(UsageError, match="not the same on every GPU") as caught:
        CudaGenerator(1).randn((SMALLEST_GRID + 1,))
    assert "cuda:NAME" in caught.value.details["next"] and "rtx4090" in caught.value.details["next"]
    with pytest.raises(UsageError, match="no grid is known for this GPU") as caught:
        grid_of("rtx409")
    assert "rtx4090" in caught.value.details["want"]


def test_float64_takes_two_normals_of_four_words() -> None:
    values = CudaGenerator(3, threads=256).randn((256 * 3,), "float64")
    words = philox(np.array([[0, 0, 7, 0]], np.uint32), (3, 0))[0].astype(object)
    unit = ((words[0] ^ words[1] << 21) + 0.5) * 2.0**-53
    angle = math.pi * ((words[2] ^ words[3] << 21) * 2.0**-52 + 2.0**-53)
    radius = math.sqrt(-2 * math.log(unit))
    assert values.dtype == np.float64
    assert values[7] == pytest.approx(radius * math.sin(angle), abs=1e-12)
    assert values[256 + 7] == pytest.approx(radius * math.cos(angle), abs=1e-12)
    many = CudaGenerator(3, threads=256 * 64).randn((100_000,), "float64")
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    with pytest.raises(UsageError, match="noise of this dtype is not reproduced"):
        CudaGenerator(3).randn((4,), "float16")


def test_a_request_may_ask_for_it(tmp_path: Path) -> None:
    """In the order in which a pipeline draws: the latent, then each call's noise, an image by its own generator."""
    with loaded_example(tmp_path / "a.dcc", draws=True) as artifact:
        conditions = {"y": [1, 2]}
        default = artifact.sample(conditions, seed=[4, 5])
        drawn = artifact.sample(conditions, seed=[4, 5], generator="cuda")
        assert not np.allclose(default, drawn)
        assert np.array_equal(artifact.sample(conditions, seed=[4, 5], generator="cpu"), default)
        assert np.array_equal(artifact.sample(conditions, seed=[4, 5], generator="cuda:a100"), drawn)
        # An image of a list of seeds depends on no other.
        assert np.array_equal(artifact.sample({"y": [2]}, seed=[5], generator="cuda")[0], drawn[1])
        watched = Watched(artifact)
        watched.check(conditions, seed=[4, 5], generator="cuda")
        for wrong in ("mt19937", "cpu:a100", 3):
            with pytest.raises(UsageError, match="unknown generator of noise"):
                artifact.sample(conditions, generator=wrong)  # type: ignore[arg-type]


def test_on_a_gpu_the_grid_is_its_own(tmp_path: Path) -> None:
    with loaded_example(tmp_path / "a.dcc") as artifact:
        device = simulated_device(artifact)
        device.threads = 256
        watched = Watched(artifact, device)
        asked = watched.on_device._rules.generation({"y": [1] * 64}, None, None, 1.0, 9, None, "cuda")
    assert np.array_equal(asked.start.ravel(), CudaGenerator(9, threads=256).randn((64 * 8,)))
    assert not np.array_equal(asked.start.ravel(), CudaGenerator(9, threads=512).randn((64 * 8,)))
