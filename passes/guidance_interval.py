"""Guidance is applied between two noise levels only; the other calls run the conditional half alone.

Guidance harms at high noise and hardly acts at low noise. The pass changes the guidance modes of the Program's
schedule, or of one that computes everything; what was kept of a half that was left out is computed anew.

Source    arXiv:2404.07724: w inside (low, high], else 1. The defaults are the paper's for DiT-XL/2.
Numerics  calls outside the interval are those of a scale of 1.
Refuses   a Program without guidance; noise levels that the sampler's table does not give; an interval of all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dcc.errors import UsageError
from dcc.ir.measurements import Declined, Subject, apply_schedule, check_option, guidance_modes, with_guidance
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, full_schedule

UNITS = ("sigma", "fraction")


@dataclass(frozen=True)
class GuidanceInterval:
    """Guided are the calls within (low, high] of EDM's sigma, or, in the unit `fraction`, [low, high) of the calls."""

    low: float = 0.34
    high: float = 1.02
    unit: str = "sigma"
    name: str = "guidance-interval"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError("the option is unknown", at="unit", got=self.unit, want=" or ".join(UNITS))
        check_option("low", self.low, 0)
        check_option("high", self.high, self.low)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        subject.check()
        if not subject.guided:
            raise Declined("the Program samples without guidance")
        if self.unit == "sigma":
            if subject.sigmas is None:
                raise Declined("the sampler's table does not give its noise levels: use the unit fraction")
            alone = [not self.low < sigma <= self.high for sigma in subject.sigmas]
        else:
            alone = [not self.low <= call / subject.calls < self.high for call in range(subject.calls)]
        if not any(alone):
            raise Declined(f"all {subject.calls} calls lie in the interval")
        name = f"{self.name} {self.low:g} to {self.high:g}, {self.unit}"
        schedule = subject.schedule or replace(full_schedule(subject.components, subject.calls), name=name)
        orders = [len(mode.weights) - 1 if mode.kind == "reuse" else None for mode in schedule.guidance]
        alone = [
            left_out or mode.kind == "conditional" for left_out, mode in zip(alone, schedule.guidance, strict=True)
        ]
        return with_guidance(schedule, guidance_modes(orders, alone))

    def options(self, subject: Subject) -> Sequence[GuidanceInterval]:
        """Settings for a sweep, by share of the calls."""
        borders = ((0.0, 0.8), (0.0, 0.6), (0.2, 1.0), (0.2, 0.8), (0.1, 0.6), (0.3, 0.7))
        return [GuidanceInterval(low, high, "fraction") for low, high in borders]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)
