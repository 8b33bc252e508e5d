"""FORA: every component is computed every `interval` calls, and its branch is reused in between.

Source    arXiv:2407.01425.
Numerics  the first call is exact; a reused branch gets the gate of the call that reuses it.
Refuses   a Program without components, without a sampler, or with one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcc.ir.measurements import Declined, Subject, apply_schedule, check_option, finished, name_of
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, branch_units, from_steps


@dataclass(frozen=True)
class Fora:
    """See the module's text. `kinds` are the `Subject.kinds` that are reused, empty for all."""

    interval: int = 3
    kinds: tuple[str, ...] = ()
    name: str = "fora"

    def __post_init__(self) -> None:
        check_option("interval", self.interval, 2)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        subject.check()
        if unknown := [kind for kind in self.kinds if kind not in subject.kinds]:
            raise Declined(f"no component of kind {unknown[0]}; there are {', '.join(sorted(set(subject.kinds)))}")
        computes = [
            [call % self.interval == 0 or bool(self.kinds and kind not in self.kinds) for kind in subject.kinds]
            for call in range(subject.calls)
        ]
        name = name_of(self, f"{self.name} every {self.interval}", "kinds")
        schedule = from_steps(subject.components, branch_units(subject.components), computes, name=name)
        return finished(schedule, subject, "nothing is reused")

    def options(self, subject: Subject) -> Sequence[Fora]:
        """Settings for a sweep, from the most to the least that is computed."""
        return [Fora(interval) for interval in range(2, min(8, subject.calls) + 1)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)
