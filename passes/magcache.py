"""MagCache: the whole stack is reused while the growth of its residual, which hardly depends on data, stays near 1.

The measured ratios multiply up since the last computed call, and the distances of their product from 1 add up. A call
is reused while that sum is at most `threshold`, for at most `longest` calls in a row, and not in the first `retention`
of the calls. The method looks at no data at run time, so its rule is folded into the table here.

Source    arXiv:2506.09045; the defaults are those of Diffusers.
Numerics  the first calls are exact; `order` 1 forecasts where the paper reuses.
Refuses   a Program without measurements of its own components and calls; a share that no threshold reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dcc.ir.measurements import Subject, apply_schedule, check_option, finished, name_of, reach_share
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, delta_units, from_steps


@dataclass(frozen=True)
class MagCache:
    """See the module's text: E, K and R of the paper. With `target_share` the threshold follows from it."""

    threshold: float = 0.06
    longest: int = 3
    retention: float = 0.2
    order: int = 0
    target_share: float | None = None
    name: str = "magcache"

    def __post_init__(self) -> None:
        check_option("threshold", self.threshold, 0)
        check_option("longest", self.longest, 1)
        check_option("retention", self.retention, 0, 1)
        check_option("order", self.order, 0, 2)
        check_option("target_share", self.target_share or 0.0, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        ratios = subject.measured().magnitude_ratio.tolist()
        units = delta_units(subject.components)
        threshold, computes = self.threshold, self._computes(ratios, self.threshold)
        if self.target_share is not None:
            threshold, computes = reach_share(
                lambda value: self._computes(ratios, value), subject, units, self.target_share
            )
        name = name_of(self, f"{self.name} up to {threshold:.3g}, order {self.order}", "longest", "retention")
        schedule = from_steps(subject.components, units, computes, self.order, name=name)
        return finished(schedule, subject, f"no accumulated error is at most {threshold:.3g}")

    def _computes(self, ratios: Sequence[float], threshold: float) -> list[list[bool]]:
        rows = []
        product, error, skipped = 1.0, 0.0, 0
        for call, ratio in enumerate(ratios):
            computes = True
            if call > 0 and call >= self.retention * len(ratios):
                product *= ratio
                error += abs(1 - product)
                skipped += 1
                computes = error > threshold or skipped > self.longest
            if computes:
                product, error, skipped = 1.0, 0.0, 0
            rows.append([computes])
        return rows

    def options(self, subject: Subject) -> Sequence[MagCache]:
        """Settings for a sweep by computed share, reused and forecast."""
        shares = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)
        return [
            replace(self, longest=8, retention=0.1, order=order, target_share=share)
            for share in shares
            for order in (0, 1)
        ]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)
