"""Noise drawn without torch equals torch's, value by value and in the same order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dcc.errors import UsageError
from dcc.runtime.noise import Generator, Noise

SEEDS = (
    0, 1, 2, 7, 11, 42, 999, 31337, 123456789, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3, 2**63,
    2**64 - 1, -1, -5, -(2**40), -(2**63),
)  # fmt: skip
SMALL_SIZES = (0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 100, 1000, 1023)
# torch's scalar path rounds its logarithm and cosine differently; only the vector paths are reproduced.
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def assert_equal_noise(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    if EXACT:
        np.testing.assert_array_equal(got, want)
        assert got.tobytes() == want.tobytes()  # -0 is not 0
    else:
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_consecutive_draws_of_mixed_sizes_equal_torch(seed: int) -> None:
    choose = random.Random(seed)
    ours, theirs = Generator(seed), torch_generator(seed)
    sizes = [choose.choice(SMALL_SIZES) for _ in range(30)] + [choose.randrange(20_000) for _ in range(3)]
    choose.shuffle(sizes)
    for size in sizes:
        assert_equal_noise(ours.randn((size,)), torch.randn((size,), generator=theirs).numpy())


@pytest.mark.parametrize("size", [65_536, 100_003, 250_000])
def test_large_draws_equal_torch(size: int) -> None:
    assert_equal_noise(Generator(3).randn((size,)), torch.randn((size,), generator=torch_generator(3)).numpy())


def test_dtypes_share_one_stream() -> None:
    choose = random.Random(0)
    ours, theirs = Generator(5), torch_generator(5)
    for _ in range(60):
        size, dtype = choose.choice(SMALL_SIZES), choose.choice(("float32", "float64"))
        want = torch.randn((size,), generator=theirs, dtype=getattr(torch, dtype)).numpy()
        assert_equal_noise(ours.randn((size,), dtype), want)


def test_shapes_are_those_of_torch() -> None:
    ours, theirs = Generator(1), torch_generator(1)
    for shape in ((), (3, 0), (2, 3), (2, 4, 8, 8)):
        assert_equal_noise(ours.randn(shape), torch.randn(shape, generator=theirs).numpy())


def test_one_seed_draws_the_batch() -> None:
    noise, theirs = Noise(7, 3), torch_generator(7)
    for _ in range(2):
        assert_equal_noise(noise.draw((4, 8, 8)), torch.randn((3, 4, 8, 8), generator=theirs).numpy())


def test_a_list_of_seeds_equals_a_list_of_diffusers_generators() -> None:
    torch_utilities = pytest.importorskip("diffusers.utils.torch_utils")
    seeds = [3, 1, 2**33]
    noise, theirs = Noise(seeds, 3), [torch_generator(seed) for seed in seeds]
    for _ in range(2):
        want = torch_utilities.randn_tensor((3, 4, 5, 5), generator=theirs)
        assert_equal_noise(noise.draw((4, 5, 5)), want.numpy())


def test_an_image_with_its_own_seed_does_not_depend_on_the_batch() -> None:
    np.testing.assert_array_equal(Noise([5, 6], 2).draw((4, 4, 4))[1], Noise([6], 1).draw((4, 4, 4))[0])


@pytest.mark.parametrize("seed", ["7", 1.0, True, None, 2**64, -(2**63) - 1, [1], [1, "2"], [1, 2, 3], []])
def test_bad_seeds_are_usage_errors(seed: object) -> None:
    with pytest.raises(UsageError):
        Noise(seed, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [0, -1, True, 1.5])
def test_bad_numbers_of_images_are_usage_errors(images: object) -> None:
    with pytest.raises(UsageError):
        Noise(0, images)  # type: ignore[arg-type]


def test_a_dtype_that_torch_draws_otherwise_is_refused() -> None:
    with pytest.raises(UsageError, match="dtype"):
        Generator(0).randn((4,), "float16")
