"""What the evaluated schedules say about others: a Gaussian process on the log of the loss, a line through latency.

Used only to choose what to evaluate next; nothing that it predicts is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcc.search.genome import Array

SCALES = (0.5, 1.0, 2.0, 4.0)  # of the median distance
NOISES = (3e-3, 2e-2, 5e-2, 2e-1)
RIDGE = 1e-2
# Coarser than what a change of the linear algebra library or its threads may alter: choices must repeat on resume.
DIGITS = 6


@dataclass(frozen=True)
class LossModel:
    """A line through what schedules leave out, and a Gaussian process on the rest.

    The kernel is exponential, its length and noise of greatest marginal likelihood on a small grid. On the 200
    evaluations of a digits search its predictions of what came next correlated with what the line left over by 0.42,
    those of smoother kernels (Matern 3/2, Gaussian) by 0.19 and 0.16.
    """

    points: Array  # [count, features]
    line: Array  # [trends]
    length: float
    inverse: Array  # [count, count], of the covariance
    solved: Array  # [count]
    scale: float
    noise: float

    @staticmethod
    def fit(points: Array, trends: Array, targets: Array) -> LossModel:
        """`points` [count, features], `trends` [count, trends], `targets` log losses [count]; all finite."""
        line = np.linalg.solve(trends.T @ trends + RIDGE * np.eye(trends.shape[1]), trends.T @ targets)
        rest = targets - trends @ line
        distances = _distances(points, points)
        middle = float(np.median(distances[distances > 1e-6])) if (distances > 1e-6).any() else 1.0
        best: tuple[float, LossModel] | None = None
        for length in (middle * scale for scale in SCALES):
            values, vectors = np.linalg.eigh(_kernel(points, points, length))
            turned = vectors.T @ rest
            for noise in NOISES:
                spectrum = np.maximum(values, 0) + noise
                scale = float((turned**2 / spectrum).mean())
                likelihood = -0.5 * (len(rest) * np.log(scale + 1e-12) + np.log(spectrum).sum())
                if best is None or likelihood > best[0] + 10.0**-DIGITS:
                    inverse = (vectors / spectrum) @ vectors.T
                    model = LossModel(points, line, length, inverse, inverse @ rest, scale, noise)
                    best = float(likelihood), model
        assert best is not None
        return best[1]

    def predict(self, points: Array, trends: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the log loss of each of `points`."""
        cross = _kernel(points, self.points, self.length)
        variance = np.maximum(1 + self.noise - ((cross @ self.inverse) * cross).sum(axis=1), 0) * self.scale
        return np.round(trends @ self.line + cross @ self.solved, DIGITS), np.round(np.sqrt(variance), DIGITS)


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


def _kernel(left: Array, right: Array, length: float) -> Array:
    return np.exp(-_distances(left, right) / length)


def _distances(left: Array, right: Array) -> Array:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :] - 2 * left @ right.T
    return np.sqrt(np.maximum(squares, 0))
