"""Threshold caches as a static table: the stack is reused while a measured signal has changed less than a threshold.

The released methods decide at run time, which costs a synchronisation a call. Here their rule runs once, at compile
time, on the changes measured on the model's own trajectories. `signal` says whose rule it is:

    first_block  the change of the first block's residual since the last computed call (first-block cache). The first
                 block is computed in every call; what is reused begins after it
    stack        the change of the whole stack's residual since the last computed call: the error itself
    input        the changes of the latent from call to call, through a polynomial fitted to the changes of the stack,
                 added up since the last computed call (TeaCache, arXiv:2411.19108)
    output       the size of the latent's changes times the rate at which the output follows them, over the size of
                 the last output, added up (EasyCache, arXiv:2507.02860). EasyCache keeps the delta of the whole
                 denoiser; here it is that of the stack

Numerics  the first `warmup` calls are exact; `order` 1 forecasts where the methods reuse.
Refuses   a Program without measurements of its own components and calls; a share that no threshold reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcc.errors import UsageError
from dcc.ir.measurements import (
    Declined,
    Measurements,
    Subject,
    apply_schedule,
    check_option,
    finished,
    name_of,
    reach_share,
)
from dcc.ir.program import PassReport, Program
from dcc.ir.schedule import Schedule, delta_units, from_steps

SIGNALS = ("first_block", "stack", "output", "input")
DEGREE = 4  # of TeaCache's polynomial


@dataclass(frozen=True)
class ResidualThreshold:
    """See the module's text.

    `max_consecutive` bounds the reused calls in a row, 0 does not. With `target_share` the threshold is the one whose
    computed share is nearest.
    """

    signal: str = "first_block"
    threshold: float = 0.08
    warmup: int = 1
    max_consecutive: int = 0
    order: int = 0
    compute_last: bool = False
    target_share: float | None = None
    name: str = "residual-threshold"

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise UsageError("the option is unknown", at="signal", got=self.signal, want=" or ".join(SIGNALS))
        check_option("threshold", self.threshold, 0)
        check_option("warmup", self.warmup, 1)
        check_option("max_consecutive", self.max_consecutive, 0)
        check_option("order", self.order, 0, 1)
        check_option("target_share", self.target_share or 0.0, 0, 1)

    def propose(self, subject: Subject) -> Schedule:
        """Raises Declined."""
        measured = subject.measured()
        starts = [0]
        if self.signal == "first_block":
            starts.append(measured.first_block_components)
            if starts[1] == len(subject.components):
                raise Declined("the first block is the only one: nothing is left to reuse")
        units = delta_units(subject.components, starts)
        estimate = _estimate(self.signal, measured)

        def computes_at(threshold: float) -> list[list[bool]]:
            column = self._column(estimate, subject.calls, threshold)
            return [[*(True for _ in starts[1:]), computes] for computes in column]

        threshold, computes = self.threshold, computes_at(self.threshold)
        if self.target_share is not None:
            threshold, computes = reach_share(computes_at, subject, units, self.target_share)
        start = f"{self.signal} below {threshold:.3g}, order {self.order}"
        name = name_of(self, start, "warmup", "max_consecutive", "compute_last")
        schedule = from_steps(subject.components, units, computes, self.order, name=name)
        return finished(schedule, subject, f"no change of the {self.signal} signal is below {threshold:.3g}")

    def _column(self, estimate: Callable[[int, int, int], float], calls: int, threshold: float) -> list[bool]:
        column: list[bool] = []
        last, before = 0, 0
        for call in range(calls):
            computes = (
                call < self.warmup
                or (self.compute_last and call == calls - 1)
                or bool(self.max_consecutive and call - last > self.max_consecutive)
                or estimate(before, last, call) >= threshold
            )
            if computes:
                last, before = call, last
            column.append(computes)
        return column

    def options(self, subject: Subject) -> Sequence[ResidualThreshold]:
        """Settings for a sweep by computed share, reused and forecast."""
        shares = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)
        return [replace(self, order=order, target_share=share) for share in shares for order in (0, 1)]

    def apply(self, program: Program) -> PassReport:
        return apply_schedule(self, program)


def _estimate(signal: str, measured: Measurements) -> Callable[[int, int, int], float]:
    """The error estimated at `call` if it reuses `last`; `before` is the computed call before `last`."""
    if signal in ("first_block", "stack"):
        changes = measured.first_block if signal == "first_block" else measured.stack
        return lambda before, last, call: float(changes[last, call])
    steps = np.array([measured.latent[call - 1, call] for call in range(1, measured.calls)])
    if signal == "input":
        wanted = [measured.stack[call - 1, call] for call in range(1, measured.calls)]
        added = np.maximum(_fitted(steps, np.array(wanted)), 0)
        return lambda before, last, call: float(added[last:call].sum())
    moved = np.array([size * step for size, step in zip(measured.latent_size, steps, strict=False)])

    def output(before: int, last: int, call: int) -> float:
        if last == before:
            return math.inf  # one computed call gives no rate
        latent = measured.latent[before, last] * measured.latent_size[before]
        rate = measured.output[before, last] * measured.output_size[before] / max(latent, 1e-30)
        return float(rate * moved[last:call].sum() / max(measured.output_size[last], 1e-30))

    return output


def _fitted(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`wanted` as TeaCache's polynomial of `values`, of a lower degree where there are few of them."""
    degree = min(DEGREE, (len(set(values.tolist())) - 1) // 2)
    return np.asarray(np.polynomial.Polynomial.fit(values, wanted, degree)(values)) if degree else wanted
