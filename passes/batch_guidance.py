"""Classifier-free guidance runs its two halves as one batch.

Rows are [condition; null condition]; one forward of 2n rows reads every weight once instead of twice, and early
scopes run once for both halves.

Numerics  rows are independent: equal to two forwards within the dtype's tolerance.
Refuses   a Program without guidance, without a condition, or whose batch is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcc.ir.program import PassReport, Program, Role


@dataclass(frozen=True)
class BatchGuidance:
    """See the module's text."""

    name: str = "batch-guidance"

    def apply(self, program: Program) -> PassReport:
        if program.guidance.mode == "none":
            return PassReport(self.name, "declined", "the Program samples without guidance")
        if not program.input(Role.CONDITION):
            return PassReport(self.name, "declined", "no condition to leave out")
        if program.rows[1] < 2:
            return PassReport(self.name, "declined", f"the batch is fixed at {program.rows[1]}: two halves do not fit")
        nulls = {item.name: item.null for item in program.input(Role.CONDITION) if item.null is not None}
        why = f"two halves in one batch, up to {program.rows[1] // 2} images a request"
        return PassReport(self.name, "applied", why, {"null conditions": nulls})
