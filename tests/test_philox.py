"""Philox against the known answers of Random123, and the layout that torch gives its draws."""

from __future__ import annotations

import numpy as np
import pytest

from dcc.errors import UsageError
from dcc.runtime.philox import CudaGenerator, philox

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
