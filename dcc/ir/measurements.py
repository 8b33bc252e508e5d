"""What an exact run of the model on its own trajectories shows: the basis of calibrated schedules.

Owned by the schedule passes; see `measure`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurements:
    """Filled in by `measure`."""
