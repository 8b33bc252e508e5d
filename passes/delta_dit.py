"""Delta-DiT: a range of blocks is replaced by the delta that it added on the last call that computed it.

Every `interval` calls everything is computed. In between, the rear blocks are replaced in the first part of the
trajectory and the front blocks in the rest, because front blocks draw outlines and rear blocks details.

Where the two ranges overlap the stack is three units. A range keeps the newest delta it has: the front blocks that
the first part computes refresh theirs on every call, where the paper keeps that of the last full call.

Source    arXiv:2406.01125. The paper's 20 calls change over after 12; that three quarters of the blocks are replaced
          is derived from its 1.6x at an interval of 2.
Numerics  the first call is exact; no weights but 1.
Refuses   a Program with fewer than two blocks, without a sampler, or with one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcc.ir.measurements import Declined, Subject, apply_schedule, check_option, finished, name_of
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, delta_units, from_steps


@dataclass(frozen=True)
class DeltaDit:
    """See the module's text. `boundary` is the share of calls before the change, `fraction` that of the blocks."""

    interval: int = 2
    boundary: float = 0.6
    fraction: float = 0.75
    name: str = "delta-dit"

    def __post_init__(self) -> None:
        check_option("interval", self.interval, 2)
        check_option("boundary", self.boundary, 0, 1)
        check_option("fraction", self.fraction, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        subject.check()
        blocks = len(subject.blocks)
        if blocks < 2:
            raise Declined(f"{blocks} block: there is no front and no rear")
        replaced = min(blocks, max(1, round(self.fraction * blocks)))
        borders = sorted({0, replaced, blocks - replaced} - {blocks})
        units = delta_units(subject.components, [subject.blocks[border][0] for border in borders])
        change = round(self.boundary * subject.calls)
        computes = []
        for call in range(subject.calls):
            rear = call < change
            computes.append(
                [
                    call % self.interval == 0 or (border < blocks - replaced if rear else border >= replaced)
                    for border in borders
                ]
            )
        name = name_of(self, f"{self.name} every {self.interval}, {replaced} of {blocks} blocks", "boundary")
        return finished(from_steps(subject.components, units, computes, name=name), subject, "nothing is replaced")

    def options(self, subject: Subject) -> Sequence[DeltaDit]:
        """Settings for a sweep: half, three quarters and all of the blocks at each interval."""
        intervals = range(2, min(5, subject.calls) + 1)
        return [DeltaDit(interval, self.boundary, part) for interval in intervals for part in (0.5, 0.75, 1.0)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)
