"""What the evaluated schedules say about others: a Gaussian process on the log of the loss, a line through latency.

Used only to choose what to evaluate next; nothing that it predicts is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcc.search.genome import Array

SCALES = (0.5, 1.0, 2.0, 4.0)  # of the median distance
LINEAR_SHARES = (0.2, 0.5, 0.8)
NOISES = (3e-4, 3e-3, 3e-2)
# Coarser than what a change of the linear algebra library or its threads may alter: choices must repeat on resume.
DIGITS = 6


@dataclass(frozen=True)
class LossModel:
    """A Gaussian process: a linear kernel and a Matern kernel (3/2), fitted by marginal likelihood on a small grid."""

    points: Array  # [count, features]
    mean: float
    spread: float
    length: float
    linear: float
    inverse: Array  # [count, count], of the covariance
    solved: Array  # [count]
    scale: float

    @staticmethod
    def fit(points: Array, targets: Array) -> LossModel:
        """`points` are features [count, features], `targets` log losses [count], all finite; at least two."""
        mean, spread = float(targets.mean()), float(targets.std()) or 1.0
        centred = (targets - mean) / spread
        distances = _distances(points, points)
        middle = float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0
        best: tuple[float, LossModel] | None = None
        for length in (middle * scale for scale in SCALES):
            for linear in LINEAR_SHARES:
                values, vectors = np.linalg.eigh(_kernel(points, points, length, linear))
                turned = vectors.T @ centred
                for noise in NOISES:
                    spectrum = np.maximum(values, 0) + noise
                    scale = float((turned**2 / spectrum).mean())
                    likelihood = -0.5 * (len(centred) * np.log(scale + 1e-12) + np.log(spectrum).sum())
                    if best is None or likelihood > best[0] + 10.0**-DIGITS:
                        inverse = (vectors / spectrum) @ vectors.T
                        model = LossModel(points, mean, spread, length, linear, inverse, inverse @ centred, scale)
                        best = float(likelihood), model
        assert best is not None
        return best[1]

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the log loss of each of `points`."""
        cross = _kernel(points, self.points, self.length, self.linear)
        own = self.linear * _linear_diagonal(points) + 1 - self.linear
        variance = np.maximum(own - ((cross @ self.inverse) * cross).sum(axis=1), 0) * self.scale
        mean = self.mean + self.spread * (cross @ self.solved)
        return np.round(mean, DIGITS), np.round(self.spread * np.sqrt(variance), DIGITS)


@dataclass(frozen=True)
class LatencyModel:
    """Ridge regression of the latency on what a schedule computes."""

    weights: Array

    @staticmethod
    def fit(points: Array, targets: Array) -> LatencyModel:
        scale = float(np.abs(targets).mean()) or 1.0
        gram = points.T @ points + 1e-6 * np.eye(points.shape[1])
        return LatencyModel(np.linalg.solve(gram, points.T @ (targets / scale)) * scale)

    def predict(self, points: Array) -> Array:
        """Milliseconds, positive."""
        found = points @ self.weights
        return np.maximum(np.round(found, DIGITS), 10.0**-DIGITS)


def _kernel(left: Array, right: Array, length: float, linear: float) -> Array:
    ratio = np.sqrt(3) * _distances(left, right) / length
    size = left.shape[1]
    return linear * (1 + left @ right.T) / np.sqrt(size) + (1 - linear) * (1 + ratio) * np.exp(-ratio)


def _linear_diagonal(points: Array) -> Array:
    return (1 + (points**2).sum(axis=1)) / np.sqrt(points.shape[1])


def _distances(left: Array, right: Array) -> Array:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :] - 2 * left @ right.T
    return np.sqrt(np.maximum(squares, 0))
