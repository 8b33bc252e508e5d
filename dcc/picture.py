"""Samples as one picture: a grid of pixels, written by Pillow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dcc.errors import DccError

Array = np.ndarray[Any, np.dtype[Any]]
GAP = 2
BACKGROUND = 255
LEAST_SIDE = 64


def picture_channels(channels: int) -> int:
    """How many of the channels a picture shows: one (grey) or three (red, green, blue)."""
    return 3 if channels >= 3 else 1


def to_pixels(samples: Array, *, own_range: bool = False) -> Array:
    """`[N, C, H, W]` as bytes; -1 to 1 becomes 0 to 255, or with `own_range` the samples' own least to most."""
    shown = np.nan_to_num(samples[:, : picture_channels(samples.shape[1])].astype(np.float64))
    low, high = (float(shown.min()), float(shown.max())) if own_range else (-1.0, 1.0)
    scaled = (shown - low) / ((high - low) or 1.0)
    return np.rint(np.clip(scaled, 0.0, 1.0) * 255.0).astype(np.uint8)


def enlarged(pixels: Array) -> Array:
    """`[N, C, H, W]`; images too small to look at have each pixel repeated, by a whole factor."""
    factor = max(1, LEAST_SIDE // max(pixels.shape[-2:]))
    return pixels.repeat(factor, axis=-2).repeat(factor, axis=-1)


def grid(pixels: Array) -> Array:
    """`[N, C, H, W]` as one image `[rows, columns, C]`, near square, filled row by row."""
    count, channels, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels)
    sheet = np.full(shape, BACKGROUND, np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return sheet


def require_pillow() -> Any:
    """Pillow's `Image`. Raises DccError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DccError(
            "pictures are written by Pillow, which is not installed", next="pip install pillow, or -o samples.npy"
        ) from error
    return Image


def save_picture(sheet: Array, path: Path, kind: str) -> None:
    """The image `[H, W, C]` is in `path`, in the format `kind` (png, jpeg, webp)."""
    image = require_pillow().fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    image.save(path, format=kind)
