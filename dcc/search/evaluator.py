"""What one evaluation of a search is: weights fitted, samples made on the real engines, latency from the cost model.

A schedule that computes or leaves out the whole stack is tried in two forms: with the stack's delta kept, and with the
denoiser's output kept, which is faster and follows the exact trajectory less closely. The form that is better at the
trade-off that fronts have is the schedule's evaluation.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from dcc.calibrate import planned_loop
from dcc.cost_model.roofline import CostModel, predict
from dcc.ir.schedule import Schedule, Stores, output_unit
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory
from dcc.search.store import Evaluation

# A front loses some 15 dB for each doubling of the speed: loss grows like the fifth power of it.
TRADE = 5.0


class TrajectoryEvaluator:
    """Evaluates schedules in a Laboratory. Equal tables and schedules give equal evaluations, seconds apart."""

    def __init__(self, laboratory: Laboratory, costs: CostModel, *, fit: bool = True) -> None:
        self.laboratory, self.costs, self._fit = laboratory, costs, fit

    def latency_ms(self, schedule: Schedule | None) -> float:
        """Predicted milliseconds of one generation of the search's images."""
        laboratory = self.laboratory
        loop = planned_loop(
            laboratory.program, laboratory.plan_of(schedule), laboratory.search.images, laboratory.guided
        )
        return predict(loop, self.costs).seconds * 1e3

    def evaluate(self, schedule: Schedule) -> Evaluation:
        """Loss and PSNR on the search's requests, with fitted weights where the schedule combines."""
        start = time.perf_counter()
        found = [self._try(form) for form in forms(schedule)]
        best = min(found, key=lambda item: math.log(item.loss or 1e-30) + TRADE * math.log(item.latency_ms))
        used = best.schedule if best.schedule != schedule else None
        return replace(best, schedule=used, seconds=time.perf_counter() - start)

    def _try(self, schedule: Schedule) -> Evaluation:
        laboratory, requests = self.laboratory, self.laboratory.search
        if self._fit:
            fit = fit_weights(laboratory, schedule, requests)
            used, samples = fit.schedule, fit.samples
        else:
            used, samples = schedule, laboratory.run(schedule, requests).samples
        loss, decibels, _ = laboratory.quality(samples, requests)
        if used != schedule and _mixed(schedule):
            # Calls that compute some units and forecast others follow the exact trajectory less well.
            plain, as_given, _ = laboratory.quality(laboratory.run(schedule, requests).samples, requests)
            if plain < loss:
                used, loss, decibels = schedule, plain, as_given
        return Evaluation(latency_ms=self.latency_ms(used), loss=loss, psnr=decibels, schedule=used)


def forms(schedule: Schedule) -> list[Schedule]:
    """The schedule itself and, where it is one span that is left out at times, the one that keeps the output."""
    merged = schedule.merged()
    spans = len(merged.units) == 1 and merged.units[0].stores is Stores.DELTA
    if not spans or all(action.computes for action in merged.column(0)):
        return [schedule]
    return [schedule, replace(merged, units=output_unit(schedule.components))]


def _mixed(schedule: Schedule) -> bool:
    return any(
        any(action.computes for action in row) and any(action.weights for action in row) for row in schedule.actions
    )
