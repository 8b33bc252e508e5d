"""SmoothCache: a kind of component is reused while its measured change since it was computed is below `alpha`.

The change is relative L1, averaged over the blocks; one decision for a kind and call. The last call is computed.

Source    arXiv:2411.10510. Changes are relative to the earlier value.
Numerics  the first and the last call are exact up to what was reused before them.
Refuses   a Program without measurements of its own components and calls; a share that no alpha reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcc.ir.measurements import Subject, apply_schedule, check_option, finished, name_of, reach_share
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, branch_units, from_steps


@dataclass(frozen=True)
class SmoothCache:
    """See the module's text.

    A value is reused for at most `longest` calls, 0 for as many as were measured. With `target_share` alpha is the
    one whose computed share is nearest.
    """

    alpha: float = 0.08
    longest: int = 3
    target_share: float | None = None
    name: str = "smoothcache"

    def __post_init__(self) -> None:
        check_option("alpha", self.alpha, 0)
        check_option("longest", self.longest, 0)
        check_option("target_share", self.target_share or 0.0, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        measured = subject.measured()
        longest = min(self.longest or measured.window, measured.window)
        kinds = sorted(set(subject.kinds))
        members = {kind: [i for i, other in enumerate(subject.kinds) if other == kind] for kind in kinds}
        errors = {kind: np.mean(measured.branch[:, :, members[kind]], axis=2) for kind in kinds}
        units = branch_units(subject.components)

        def computes_at(alpha: float) -> list[list[bool]]:
            columns = {
                kind: _column([list(row) for row in errors[kind][:longest]], subject.calls, alpha) for kind in kinds
            }
            return [[columns[kind][call] for kind in subject.kinds] for call in range(subject.calls)]

        alpha, computes = self.alpha, computes_at(self.alpha)
        if self.target_share is not None:
            alpha, computes = reach_share(computes_at, subject, units, self.target_share)
        name = name_of(self, f"{self.name} below {alpha:.3g}", "longest")
        schedule = from_steps(subject.components, units, computes, name=name)
        return finished(schedule, subject, f"no change is below {alpha:.3g}")

    def options(self, subject: Subject) -> Sequence[SmoothCache]:
        """Settings for a sweep by computed share."""
        return [replace(self, longest=0, target_share=share) for share in (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)


def _column(errors: Sequence[Sequence[float]], calls: int, alpha: float) -> list[bool]:
    """Which calls compute; `errors[k - 1][call]` is the change since k calls before."""
    column, last = [], 0
    for call in range(calls):
        distance = call - last
        error = errors[distance - 1][call] if 0 < distance <= len(errors) else math.inf
        computes = call == 0 or call == calls - 1 or error >= alpha
        last = call if computes else last
        column.append(computes)
    return column
