"""scikit-learn's bundled handwritten digits at 16x16, split once into training and held-out images."""

from __future__ import annotations

import numpy as np
from skimage.transform import resize
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 16
HELD_OUT = 0.25


def load_split(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(train images, train labels, held-out images, held-out labels); images are [N, 1, 16, 16] in -1 to 1."""
    digits = load_digits()
    images = np.stack([resize(image / 16.0, (IMAGE_SIZE, IMAGE_SIZE), order=3) for image in digits.images])
    images = (np.clip(images, 0.0, 1.0) * 2.0 - 1.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=HELD_OUT, random_state=seed, stratify=labels
    )
    return train_x, train_y, test_x, test_y
