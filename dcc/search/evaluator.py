"""What one evaluation of a search is: weights fitted, samples made on the real engines, latency from the cost model."""

from __future__ import annotations

import time

from dcc.calibrate import planned_loop
from dcc.cost_model.roofline import CostModel, predict
from dcc.ir.schedule import Schedule
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory
from dcc.search.store import Evaluation


class TrajectoryEvaluator:
    """Evaluates schedules in a Laboratory. Equal tables and schedules give equal evaluations, seconds apart."""

    def __init__(self, laboratory: Laboratory, costs: CostModel, *, fit: bool = True) -> None:
        self.laboratory, self.costs, self._fit = laboratory, costs, fit

    def latency_ms(self, schedule: Schedule | None) -> float:
        """Predicted milliseconds of one generation of the search's images."""
        laboratory = self.laboratory
        requests = laboratory.search
        loop = planned_loop(laboratory.program, laboratory.plan_of(schedule), requests.images, laboratory.guided)
        return predict(loop, self.costs).seconds * 1e3

    def evaluate(self, schedule: Schedule) -> Evaluation:
        """Loss and PSNR on the search's requests, with fitted weights where the schedule combines."""
        start = time.perf_counter()
        laboratory, requests = self.laboratory, self.laboratory.search
        used = fit_weights(laboratory, schedule, requests) if self._fit else schedule
        loss, decibels, _ = laboratory.quality(laboratory.run(used, requests).samples, requests)
        return Evaluation(
            latency_ms=self.latency_ms(schedule), loss=loss, psnr=decibels, seconds=time.perf_counter() - start,
            schedule=used if used != schedule else None,
        )  # fmt: skip
