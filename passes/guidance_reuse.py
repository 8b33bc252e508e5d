"""The difference of the guidance halves is computed every `interval` calls, and reused or forecast in between.

The calls in between run the conditional half alone. The pass changes the guidance modes of the Program's schedule, or
of one that computes everything; calls that leave guidance out stay as they are.

Source    FasterCache, arXiv:2410.19355: every 5 calls after the first part of the trajectory. It weighs low and high
          frequencies apart; this pass does not.
Numerics  the first `start` of the calls are guided as before; order 1 forecasts the difference.
Refuses   a Program without guidance; a trajectory without a call in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dcc.ir.measurements import (
    Declined,
    Subject,
    apply_schedule,
    check_option,
    guidance_modes,
    name_of,
    with_guidance,
)
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, full_schedule


@dataclass(frozen=True)
class GuidanceReuse:
    """See the module's text. `start` is the share of the calls that run both halves first."""

    interval: int = 5
    order: int = 0
    start: float = 0.36
    name: str = "guidance-reuse"

    def __post_init__(self) -> None:
        check_option("interval", self.interval, 2)
        check_option("order", self.order, 0, 2)
        check_option("start", self.start, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        subject.check()
        if not subject.guided:
            raise Declined("the Program samples without guidance")
        name = name_of(self, f"{self.name} every {self.interval}, order {self.order}", "start")
        schedule = subject.schedule or replace(full_schedule(subject.components, subject.calls), name=name)
        alone = [mode.kind == "conditional" for mode in schedule.guidance]
        orders: list[int | None] = []
        last: int | None = None
        for call, left_out in enumerate(alone):
            both = last is None or call < self.start * subject.calls or call - last >= self.interval
            if both and not left_out:
                last = call
            orders.append(None if both else self.order)
        modes = guidance_modes(orders, alone)
        if not any(mode.kind == "reuse" for mode in modes):
            raise Declined(f"no call lies between two of an interval of {self.interval}")
        return with_guidance(schedule, modes)

    def options(self, subject: Subject) -> Sequence[GuidanceReuse]:
        """Settings for a sweep: reused and forecast at each interval, from the first call on."""
        intervals = range(2, min(5, subject.calls) + 1)
        return [replace(self, interval=interval, order=order, start=0.0) for interval in intervals for order in (0, 1)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)
