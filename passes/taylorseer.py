"""TaylorSeer: components are computed every `interval` calls and forecast by a Taylor series in between.

The derivatives are the paper's backward differences over the computed calls: with gaps `d`,
`F_(i+1) = (F_i(new) - F_i(previous)) / d`, and `k` calls later the value is `sum_i F_i k^i / i!`. Both are linear in
the computed values, so a forecast is a row of weights. At unequal gaps the second order differs from the polynomial
through the values, as it does in the paper. Orders that the history cannot give yet are left out.

Source    arXiv:2503.06923.
Numerics  the first `first_enhance` calls are exact; the error of order `O` grows like `k^(O+1)`.
Refuses   a Program without components, without a sampler, or with one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcc.errors import UsageError
from dcc.ir.measurements import Subject, apply_schedule, check_option, finished, name_of
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import COMPUTE, Action, Schedule, Stores, branch_units, delta_units, forecast


@dataclass(frozen=True)
class TaylorSeer:
    """See the module's text. `stores` is `branch`, each component by itself, or `delta`, the whole stack as one."""

    interval: int = 4
    order: int = 1
    first_enhance: int = 2
    stores: str = "branch"
    name: str = "taylorseer"

    def __post_init__(self) -> None:
        check_option("interval", self.interval, 2)
        check_option("order", self.order, 0, 2)
        check_option("first_enhance", self.first_enhance, 1)
        if self.stores not in (Stores.BRANCH, Stores.DELTA):
            raise UsageError("the option is unknown", at="stores", got=self.stores, want="branch or delta")

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        subject.check()
        units = (branch_units if self.stores == Stores.BRANCH else delta_units)(subject.components)
        history: list[int] = []
        rows: list[tuple[Action, ...]] = []
        for call in range(subject.calls):
            if call < self.first_enhance or call - history[0] >= self.interval:
                history.insert(0, call)
                action = COMPUTE
            else:
                action = forecast(taylor_weights(history, call, self.order))
            rows.append((action,) * len(units))
        name = name_of(self, f"{self.name} every {self.interval}, order {self.order}", "stores", "first_enhance")
        reason = f"the first {self.first_enhance} calls are all there is"
        return finished(Schedule(subject.components, units, tuple(rows), name=name), subject, reason)

    def options(self, subject: Subject) -> Sequence[TaylorSeer]:
        """Settings for a sweep: orders 1 and 2 at each interval."""
        intervals = range(2, min(8, subject.calls - self.first_enhance) + 1)
        return [replace(self, interval=interval, order=order) for interval in intervals for order in (1, 2)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)


def taylor_weights(history: Sequence[int], call: int, order: int) -> tuple[float, ...]:
    """The paper's forecast at `call` as weights of the values computed at `history`, newest first."""
    used = min(order, len(history) - 1) + 1
    differences = np.eye(used)  # row j: the i-th difference at history[j], as weights
    total = np.zeros(used)
    for degree in range(used):
        total += differences[0] * float(call - history[0]) ** degree / math.factorial(degree)
        gaps = np.array([history[j] - history[j + 1] for j in range(len(differences) - 1)], dtype=np.float64)
        differences = (differences[:-1] - differences[1:]) / gaps[:, None]
    return tuple(total.tolist())


__all__ = ["TaylorSeer", "taylor_weights"]
