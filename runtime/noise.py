"""Gaussian noise equal to torch's CPU generator, from numpy alone.

An artifact's samples can be compared with the original pipeline image by image only if both start from the
same noise, so this file repeats what `torch.randn` computes, down to the rounding of each operation.

Numerics  float32: bit for bit `torch.randn` where torch runs its AVX2 or AVX-512 kernels, which round
          differently from its own scalar path (39 % of 12 million values differ, by up to 2.5e-6).
          float64: bit for bit as long as torch and Python share the C library's `log`, `cos` and `sin`.
Source    ATen/native/cpu/DistributionTemplates.h (normal_fill), avx_mathfun.h (Cephes polynomials, compiled
          with fused multiply-add), ATen/core/DistributionsHelper.h (normal_distribution and its cached second
          value).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.philox import CudaGenerator, grid_of
from dcc.runtime.seeds import check_seed

CPU, CUDA = "cpu", "cuda"  # whose generator the noise is equal to
GROUP = 16
CHUNK_GROUPS = 4096  # 64 Ki values at a time: the float64 temporaries stay in the cache
DTYPES = ("float32", "float64")

Array = np.ndarray[Any, np.dtype[Any]]

# Coefficients of Cephes logf, highest power first.
LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG_LOW, LOG_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)  # ln 2 in two parts
SQRT_HALF = np.float32(0.707106781186547524)
# Coefficients of Cephes sinf and cosf, and pi / 4 in three parts.
SINE_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
FOUR_OVER_PI = np.float32(1.27323954473516)
QUARTER_PI_PARTS = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
TWO_PI = np.float32(2.0 * math.pi)


class Generator:
    """A stream of normal numbers: the numpy twin of `torch.Generator().manual_seed(seed)`.

    Its state is the Mersenne Twister and one cached normal, which draws of fewer than 16 values leave behind.
    """

    def __init__(self, seed: int) -> None:
        # torch keeps the low 32 bits of the seed, in two's complement.
        self._twister = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._cached: float | None = None

    def randn(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """Return what `torch.randn(shape, generator=...)` would, and advance the stream as it does."""
        if dtype not in DTYPES:
            raise UsageError("noise of this dtype is not reproduced", got=dtype, want=" or ".join(DTYPES))
        count = math.prod(shape)
        if count < GROUP:
            # torch draws small tensors one by one in double precision, whatever their dtype.
            values = np.array([self._normal() for _ in range(count)], dtype=dtype)
        elif dtype == "float32":
            values = self._fill(count, np.dtype(np.float32))
        else:
            values = self._fill(count, np.dtype(np.float64))
        return values.reshape(shape)

    def _words(self, count: int) -> Array:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _uniform(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Uniform numbers in [0, 1): 24 bits of one word for float32, 53 bits of two words for float64."""
        if dtype == np.float32:
            return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
        words = self._words(2 * count).astype(np.uint64).reshape(count, 2)
        joined = (words[:, 0] << np.uint64(32) | words[:, 1]) & np.uint64(2**53 - 1)
        return joined.astype(np.float64) * 2.0**-53

    def _fill(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Box-Muller over groups of 16; a remainder is covered by redrawing the last 16 values."""
        values = self._uniform(count, dtype)
        transform = _box_muller_float32 if dtype == np.float32 else _box_muller_float64
        groups = values[: count - count % GROUP].reshape(-1, GROUP)
        for first in range(0, len(groups), CHUNK_GROUPS):
            chunk = groups[first : first + CHUNK_GROUPS]
            chunk[...] = transform(chunk)
        if count % GROUP:
            values[-GROUP:] = transform(self._uniform(GROUP, dtype).reshape(1, GROUP))[0]
        return values

    def _normal(self) -> float:
        """One double; every second call returns the sine half of the pair computed before."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        angle, distance = self._uniform(2, np.dtype(np.float64)).tolist()
        radius = math.sqrt(-2.0 * math.log1p(-distance))
        self._cached = radius * math.sin(2.0 * math.pi * angle)
        return radius * math.cos(2.0 * math.pi * angle)


class Noise:
    """The noise of a batch of `images`, in the order in which a diffusers pipeline draws it.

    One seed is one generator that draws the whole batch. A sequence of seeds is one generator per image, so
    an image does not depend on which others share its batch; this is a list of generators in diffusers.

    `generator` is `cpu`, or `cuda` for noise like that of torch's generator on a GPU, or `cuda:rtx4090` for that of a
    GPU by name; `threads` is what the GPU at hand holds at once.
    """

    def __init__(
        self, seed: int | Sequence[int], images: int, generator: str = CPU, threads: int | None = None
    ) -> None:
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise UsageError("the number of images is out of range", got=repr(images), want="an integer from 1")
        if isinstance(seed, str | bytes):
            raise UsageError("a seed is not an integer", got=repr(seed), want="an integer or a list of integers")
        self.images = images
        self._per_image = isinstance(seed, Sequence | np.ndarray)
        seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed]
        if self._per_image and len(seeds) != images:
            raise UsageError(
                "the seeds do not match the images", got=f"{len(seeds)} seeds",
                want=f"{images}, one per image",
                next="give one integer for the whole batch, or one seed per image",
            )  # fmt: skip
        kind, _, gpu = generator.partition(":") if isinstance(generator, str) else ("", "", "")
        if kind not in (CPU, CUDA) or (kind == CPU and gpu):
            raise UsageError("unknown generator of noise", got=repr(generator), want="cpu, cuda, or cuda:a100 and such")
        grid = grid_of(gpu) if gpu else threads
        self._generators = [Generator(value) if kind == CPU else CudaGenerator(value, grid) for value in seeds]

    def draw(self, shape_per_image: tuple[int, ...], dtype: str = "float32") -> Array:
        """Return the next noise of the batch, `[images, *shape_per_image]`."""
        if not self._per_image:
            return self._generators[0].randn((self.images, *shape_per_image), dtype)
        return np.concatenate([generator.randn((1, *shape_per_image), dtype) for generator in self._generators])


def _fused(a: Array, b: Array | np.float32, c: Array | np.float32) -> Array:
    """`a * b + c` in float32 rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """Horner's rule with fused steps, as the compiler contracts the kernel."""
    value: Array | np.float32 = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fused(x, value, np.float32(coefficient))
    return np.asarray(value)


def _log(x: Array) -> Array:
    """`log256_ps` for x in (0, 1]: Cephes logf with the contractions that torch's build has."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa < SQRT_HALF
    e = (exponent - small).astype(np.float32)
    m = np.where(small, (mantissa - np.float32(1)) + mantissa, mantissa - np.float32(1)).astype(np.float32)
    z = m * m
    y = _polynomial(m, LOG_POLYNOMIAL) * m
    y = _fused(y, z, e * LOG_LOW)
    y = _fused(z, np.float32(-0.5), y)
    return _fused(e, LOG_HIGH, m + y)


def _sine_cosine(x: Array) -> tuple[Array, Array]:
    """`sincos256_ps` for x in [0, 2 pi): octant reduction in three fused parts, then two polynomials."""
    octant = ((x * FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    y = octant.astype(np.float32)
    for part in QUARTER_PI_PARTS:
        x = _fused(y, np.float32(part), x)
    z = x * x
    cosine = _polynomial(z, COSINE_POLYNOMIAL) * z
    cosine = _fused(cosine, z, np.float32(-0.5) * z) + np.float32(1)
    sine = _polynomial(z, SINE_POLYNOMIAL) * z
    sine = _fused(sine, x, x)
    swap = (octant & 2) != 0
    sine_negative = (octant & 4) != 0
    cosine_negative = ((octant - 2) & 4) == 0
    first, second = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    return np.where(sine_negative, -first, first), np.where(cosine_negative, -second, second)


def _box_muller_float32(groups: Array) -> Array:
    """Turn `[n, 16]` uniforms into normals: columns 0 to 7 give the radius, 8 to 15 the angle."""
    half = GROUP // 2
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - groups[:, :half]))
    sine, cosine = _sine_cosine(TWO_PI * groups[:, half:])
    # The kernel ends in n * 1 + 0 with a fused add, which turns -0 into 0.
    return np.concatenate([radius * cosine, radius * sine], axis=1) + np.float32(0)


def _box_muller_float64(groups: Array) -> Array:
    """The same in double; element by element, because numpy's vector `log` and `cos` round differently."""
    half = GROUP // 2
    log, cos, sin = math.log, math.cos, math.sin
    first = [math.sqrt(-2.0 * log(1.0 - u)) for u in groups[:, :half].ravel().tolist()]
    angles = [2.0 * math.pi * u for u in groups[:, half:].ravel().tolist()]
    radius = np.array(first).reshape(-1, half)
    cosine = np.array([cos(angle) for angle in angles]).reshape(-1, half)
    sine = np.array([sin(angle) for angle in angles]).reshape(-1, half)
    return np.concatenate([radius * cosine, radius * sine], axis=1) + 0.0
