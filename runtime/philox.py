"""Gaussian noise laid out as torch's CUDA generator lays it out, from numpy alone: Philox4x32-10 and Box-Muller.

Numerics  words and their order are exact. Normals differ from the GPU's in the last bits: its kernel takes
          `__sincosf` and `logf` of the hardware, these are numpy's in float32.
Layout    a grid of `threads` threads, 256 a block: as many blocks as the values need, at most what fills the GPU
          (multiprocessors times resident threads / 256). Thread k draws four normals at a time from subsequence k, for
          elements k, k + threads, k + 2 threads and k + 3 threads, then goes on by 4 threads. Below one full grid this
          is the first normal of subsequence k for element k, whatever the GPU.
Source    Salmon et al. 2011 (Random123, philox4x32-10); curand_philox4x32_x.h and curand_normal.h of CUDA;
          ATen/native/cuda/DistributionTemplates.h (calc_execution_policy, distribution_elementwise_grid_stride_kernel).
          Read, not run: no GPU was at hand to compare with.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.noise import check_seed

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
BLOCK = 256
UNROLL = 4
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_TO_UNIT = np.float32(2.0**-32)
_TO_ANGLE = np.float32(2.0**-32 * 2.0 * math.pi)


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10 of counters `[n, 4]` under one key, as uint32 `[n, 4]`."""
    words = [counter[:, index].astype(np.uint64) for index in range(4)]
    first, second = key
    for _ in range(ROUNDS):
        left, right = MULTIPLIERS[0] * words[0], MULTIPLIERS[1] * words[2]
        words = [
            (right >> _SHIFT) ^ words[1] ^ np.uint64(first), right & _LOW,
            (left >> _SHIFT) ^ words[3] ^ np.uint64(second), left & _LOW,
        ]  # fmt: skip
        first, second = (first + WEYL[0]) & 0xFFFFFFFF, (second + WEYL[1]) & 0xFFFFFFFF
    return np.stack(words, axis=1).astype(np.uint32)


class CudaGenerator:
    """A stream of normals: the numpy twin of `torch.Generator("cuda").manual_seed(seed)`.

    `threads` is the grid that fills the GPU: multiprocessors times resident threads (an H100 SXM: 132 * 2048).
    """

    def __init__(self, seed: int, threads: int = 132 * 2048) -> None:
        if threads < BLOCK or threads % BLOCK:
            raise UsageError("a grid is not made of whole blocks", got=threads, want=f"a multiple of {BLOCK}")
        value = check_seed(seed) & (2**64 - 1)
        self._key = (value & 0xFFFFFFFF, value >> 32)
        self._threads = threads
        self._offset = 0  # draws of four words that were used up

    def randn(self, shape: tuple[int, ...]) -> Array:
        """What `torch.randn(shape, generator=..., device="cuda")` would be, but for the last bits; float32."""
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, np.float32)
        threads = min(self._threads, BLOCK * -(-count // BLOCK))
        turns = -(-count // (threads * UNROLL))
        values = np.empty((turns, UNROLL, threads), np.float32)
        for turn in range(turns):
            values[turn] = self._normals(threads, self._offset + turn).T
        self._offset += turns
        return values.reshape(-1)[:count].reshape(shape)

    def _normals(self, threads: int, position: int) -> Array:
        """The four normals of each thread at this position of its subsequence, `[threads, 4]`."""
        counter = np.zeros((threads, 4), np.uint32)
        counter[:, 0], counter[:, 1] = position & 0xFFFFFFFF, position >> 32
        counter[:, 2] = np.arange(threads, dtype=np.uint32)
        words = philox(counter, self._key).astype(np.float32)
        normals = np.empty((threads, 4), np.float32)
        for first in (0, 2):
            unit = words[:, first] * _TO_UNIT + _TO_UNIT / np.float32(2)
            angle = words[:, first + 1] * _TO_ANGLE + _TO_ANGLE / np.float32(2)
            radius = np.sqrt(np.float32(-2) * np.log(unit))
            normals[:, first], normals[:, first + 1] = radius * np.sin(angle), radius * np.cos(angle)
        return normals
