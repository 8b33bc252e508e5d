"""Gaussian noise laid out as torch's CUDA generator lays it out, from numpy alone: Philox4x32-10 and Box-Muller.

Numerics  words and their order are exact. Normals differ from the GPU's in the last bits: its kernel takes
          `__sincosf` and `logf` of the hardware, these are numpy's in float32. Those that are published of a GPU
          (`tests/test_philox.py`) are met to 1e-6.
Layout    a grid of `threads` threads, 256 a block: as many blocks as the values need, at most what fills the GPU
          (multiprocessors times resident threads / 256). Thread k draws four normals at a time (two in float64) from
          subsequence k, for elements k, k + threads, k + 2 threads and k + 3 threads, then goes on by 4 threads. Below
          one full grid this is the first normal of subsequence k for element k, whatever the GPU.
Source    Salmon et al. 2011 (Random123, philox4x32-10); curand_philox4x32_x.h and curand_normal.h of CUDA;
          ATen/native/cuda/DistributionTemplates.h (calc_execution_policy, distribution_elementwise_grid_stride_kernel).
          Grids of more than one turn and float64 are read there, and were not compared with a GPU.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.seeds import check_seed

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
BLOCK = 256
# Threads that a GPU holds at once: multiprocessors (data sheets: CUDA cores / 128, T4 / 64) times the most resident
# threads of each (CUDA C++ Programming Guide, technical specifications by compute capability).
GRIDS = {
    "t4": 40 * 1024, "a10": 72 * 1536, "a100": 108 * 2048, "l4": 58 * 1536, "l40s": 142 * 1536, "rtx3090": 82 * 1536,
    "rtx4090": 128 * 1536, "rtx5090": 170 * 1536, "h100": 132 * 2048, "h200": 132 * 2048, "b200": 148 * 2048,
    "orin": 16 * 1536,
}  # fmt: skip
SMALLEST_GRID = min(GRIDS.values())
# Normals of one draw of four words.
NORMALS = {"float32": 4, "float64": 2}
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


def grid_of(gpu: str) -> int:
    """The threads of a GPU by its name. Raises UsageError with the nearest names."""
    found = GRIDS.get(gpu.lower())
    if found is None:
        near = difflib.get_close_matches(gpu.lower(), GRIDS, n=3)
        raise UsageError("no grid is known for this GPU", got=repr(gpu), want=" or ".join(near) or ", ".join(GRIDS))
    return found


class CudaGenerator:
    """A stream of normals: the numpy twin of `torch.Generator("cuda").manual_seed(seed)`.

    `threads` is the grid that fills the GPU (an H100 SXM: 132 * 2048). Without it, draws that would not be the same on
    every GPU are refused.
    """

    def __init__(self, seed: int, threads: int | None = None) -> None:
        if threads is not None and (threads < BLOCK or threads % BLOCK):
            raise UsageError("a grid is not made of whole blocks", got=threads, want=f"a multiple of {BLOCK}")
        value = check_seed(seed) & (2**64 - 1)
        self._key = (value & 0xFFFFFFFF, value >> 32)
        self._threads = threads
        self._offset = 0  # draws of four words that were used up

    def randn(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """What `torch.randn(shape, generator=..., device="cuda")` would be, but for the last bits."""
        if dtype not in NORMALS:
            raise UsageError("noise of this dtype is not reproduced", got=dtype, want=" or ".join(NORMALS))
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, dtype)
        if self._threads is None and count > SMALLEST_GRID:
            raise UsageError(
                "so much noise of torch's CUDA generator is not the same on every GPU", got=f"{count} values in a draw",
                want=f"a GPU by name, or at most {SMALLEST_GRID} values",
                next=f"generator='cuda:NAME', one of {', '.join(GRIDS)}",
            )  # fmt: skip
        threads = min(self._threads or SMALLEST_GRID, BLOCK * -(-count // BLOCK))
        turns = -(-count // (threads * NORMALS[dtype]))
        values = np.empty((turns, NORMALS[dtype], threads), dtype)
        for turn in range(turns):
            words = self._words(threads, self._offset + turn)
            values[turn] = (_normals_float32(words) if dtype == "float32" else _normals_float64(words)).T
        self._offset += turns
        return values.reshape(-1)[:count].reshape(shape)

    def _words(self, threads: int, position: int) -> Array:
        """The four words of each thread at this position of its subsequence, `[threads, 4]`."""
        counter = np.zeros((threads, 4), np.uint32)
        counter[:, 0], counter[:, 1] = position & 0xFFFFFFFF, position >> 32
        counter[:, 2] = np.arange(threads, dtype=np.uint32)
        return philox(counter, self._key)


def _normals_float32(drawn: Array) -> Array:
    """Four normals of four words, `[threads, 4]`."""
    words = drawn.astype(np.float32)
    normals = np.empty(words.shape, np.float32)
    for first in (0, 2):
        unit = words[:, first] * _TO_UNIT + _TO_UNIT / np.float32(2)
        angle = words[:, first + 1] * _TO_ANGLE + _TO_ANGLE / np.float32(2)
        radius = np.sqrt(np.float32(-2) * np.log(unit))
        normals[:, first], normals[:, first + 1] = radius * np.sin(angle), radius * np.cos(angle)
    return normals


def _normals_float64(drawn: Array) -> Array:
    """Two normals of four words, each from 53 bits of two words, `[threads, 2]`."""
    words = drawn.astype(np.uint64)
    unit, turn = (words[:, first] ^ words[:, first + 1] << np.uint64(21) for first in (0, 2))
    radius = np.sqrt(-2.0 * np.log(unit * 2.0**-53 + 2.0**-54))
    angle = math.pi * (turn * 2.0**-52 + 2.0**-53)
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
