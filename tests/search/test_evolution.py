"""The search: it finds better schedules than its seeds, repeats itself, and survives being killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.pntx import PointCrossover

from dcc.errors import ScheduleError, UsageError
from dcc.ir.schedule import BOTH, REUSE_DIFFERENCE, Schedule, branch_units, delta_units, from_steps, full_schedule
from dcc.search.evolution import Limits, Options, Progress, Result, non_dominated, search
from dcc.search.genome import Genome, Space, from_schedule, staleness, to_schedule
from dcc.search.store import Evaluation, Store
from dcc.search.workers import ProcessWorkers, SerialWorkers

SPACE = Space(tuple(f"c{index}" for index in range(8)), 12, True)
UNGUIDED = replace(SPACE, guided=False)
QUICK = Options(budget=48, generation=8, population=16, screened=12, rounds=2)


@dataclass(frozen=True)
class StandIn:
    """An analytic denoiser: errors grow with staleness, add up over neighbours and calls, and matter most late."""

    space: Space = SPACE
    log: str = ""

    def latency(self, schedule: Schedule) -> float:
        weights = 0.5 + (np.arange(len(self.space.components)) % 3)
        spent = 0.0
        for row, mode in zip(schedule.component_actions(), schedule.guidance, strict=True):
            call = 0.5 + sum(weight for action, weight in zip(row, weights, strict=True) if action.computes)
            spent += call * (1.0 if mode.kind == "both" else 0.55)
        return float(spent + 0.005 * len(schedule.merged().units) * schedule.calls)

    def evaluate(self, schedule: Schedule) -> Evaluation:
        genome = from_schedule(self.space, schedule)
        ages, guided = staleness(genome)
        time = np.arange(self.space.calls) / self.space.calls
        curve = 0.2 + np.exp(-(((time - 0.25) / 0.12) ** 2)) + 2 * np.exp(-(((time - 0.85) / 0.1) ** 2))
        power = np.select([genome.actions == order for order in (1, 2, 3)], [ages, 0.45 * ages**1.4, 0.3 * ages**2], 0)
        local = power * (0.5 + np.cos(np.arange(power.shape[1])) ** 2)
        step = (np.abs(local.mean(axis=1)) + 0.2 * np.abs(np.diff(local, axis=1)).mean(axis=1)) * curve
        step += np.select([genome.guidance == mode for mode in (1, 2, 3)], [0.1 * guided, 0.06 * guided, 1.0], 0)
        carried = total = 0.0
        for error in step:
            carried = 0.9 * carried + error
            total += error * carried
        loss = 1e-4 * total
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(schedule.digest() + "\n")
        return Evaluation(self.latency(schedule), loss, 10 * math.log10(4 / loss) if loss else math.inf, 0.01)


def seeds(space: Space = SPACE) -> list[Schedule]:
    found = []
    for interval in (2, 3, 4):
        for order in (0, 1):
            for name, units in (("branch", branch_units(space.components)), ("span", delta_units(space.components))):
                computes = [[call % interval == 0] * len(units) for call in range(space.calls)]
                found.append(from_steps(space.components, units, computes, order, name=f"{name} {interval} {order}"))
    return found


def found_by(
    folder: Path,
    options: Options = QUICK,
    space: Space = SPACE,
    given: Sequence[Schedule] | None = None,
    **more: object,
) -> Result:
    folder.mkdir(exist_ok=True)
    with SerialWorkers(partial(StandIn, space)) as workers, Store(folder / "search.db", {}, options.budget) as store:
        return search(space, seeds(space) if given is None else given, workers, store, options, **more)  # type: ignore[arg-type]


def digests(result: Result) -> list[str]:
    return [item.digest for item in result.candidates]


def test_a_search_improves_on_its_seeds_and_spends_its_budget(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = found_by(tmp_path, progress=seen.append)
    assert len(set(digests(result))) == len(result.candidates) == result.computed == QUICK.budget
    assert [item.evaluations for item in seen] == list(range(1, QUICK.budget + 1))
    assert seen[-1].seconds_left == 0 and seen[-1].best
    assert result.candidates[0].origin == "exact" and result.candidates[0].evaluation.loss == 0
    volumes = [row.hypervolume for row in result.history]
    assert volumes == sorted(volumes) and volumes[-1] > 1.1 * volumes[0]
    for speed, psnr in result.history[0].best.items():
        assert result.history[-1].best[speed] >= psnr
    assert result.reference[0] == result.candidates[0].evaluation.latency_ms
    assert result.front == non_dominated(result.candidates)
    pairs = [(item.evaluation.latency_ms, item.evaluation.loss) for item in result.front]
    assert pairs == sorted(pairs) and [loss for _, loss in pairs] == sorted((loss for _, loss in pairs), reverse=True)
    assert not any(
        other.evaluation.latency_ms <= latency and other.evaluation.loss < loss
        for latency, loss in pairs
        for other in result.candidates
    )


def test_a_seed_of_the_search_decides_everything(tmp_path: Path) -> None:
    first, again = (digests(found_by(tmp_path / name)) for name in ("first", "again"))
    other = digests(found_by(tmp_path / "other", replace(QUICK, seed=1)))
    assert first == again
    assert first[:13] == other[:13] and first != other


def test_without_seeds_it_begins_from_the_exact_schedule(tmp_path: Path) -> None:
    result = found_by(tmp_path, given=[])
    assert len(result.candidates) == QUICK.budget
    assert result.history[-1].best


def test_a_budget_below_the_seeds_evaluates_the_first_ones(tmp_path: Path) -> None:
    result = found_by(tmp_path, replace(QUICK, budget=4))
    assert [item.origin for item in result.candidates] == ["exact", *(seed.name for seed in seeds()[:3])]


def test_equal_seeds_are_evaluated_once(tmp_path: Path) -> None:
    given = [*seeds(), *seeds(), full_schedule(SPACE.components, SPACE.calls)]
    assert digests(found_by(tmp_path, replace(QUICK, budget=13), given=given)) == digests(
        found_by(tmp_path / "one", replace(QUICK, budget=13))
    )


def test_a_space_with_few_schedules_ends_early(tmp_path: Path) -> None:
    space = Space(("a",), 3, orders=(0,))
    result = found_by(tmp_path, space=space, given=[])
    assert 3 <= len(result.candidates) < 12


def test_what_the_evaluator_returned_is_the_schedule_of_the_candidate(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Fitting(StandIn):
        def evaluate(self, schedule: Schedule) -> Evaluation:
            improved = replace(schedule, name="fitted")
            return replace(super().evaluate(schedule), schedule=improved)

    with SerialWorkers(Fitting) as workers, Store(tmp_path / "search.db", {}, 20) as store:
        result = search(SPACE, seeds(), workers, store, replace(QUICK, budget=20))
    assert {item.schedule.name for item in result.candidates} == {"fitted"}
    assert all(item.digest == item.asked.digest() for item in result.candidates)


def test_losses_that_are_no_numbers_are_the_worst_and_do_no_harm(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Exploding(StandIn):
        def evaluate(self, schedule: Schedule) -> Evaluation:
            found = super().evaluate(schedule)
            return replace(found, loss=math.nan, psnr=math.nan) if found.loss > 2e-3 else found

    with SerialWorkers(Exploding) as workers, Store(tmp_path / "search.db", {}, 40) as store:
        result = search(SPACE, seeds(), workers, store, replace(QUICK, budget=40))
    assert any(item.evaluation.loss == math.inf for item in result.candidates)
    assert all(math.isfinite(item.evaluation.loss) for item in result.front)


def test_seeds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="another program"):
        found_by(tmp_path, given=[full_schedule(("x",), 12)])
    modes = [BOTH] + [REUSE_DIFFERENCE] * (SPACE.calls - 1)
    units = delta_units(SPACE.components)
    guided = from_steps(SPACE.components, units, [[True]] * SPACE.calls, guidance=modes, name="guided")
    with pytest.raises(UsageError, match="guidance"):
        found_by(tmp_path / "other", space=UNGUIDED, given=[guided])


# --- Limits


def slots(schedule: Schedule) -> int:
    """Bytes of the histories, had every value eight bytes."""
    return 8 * sum(
        max((len(action.weights) for action in schedule.column(unit)), default=0) for unit in range(len(schedule.units))
    )


def test_limits_are_kept_by_what_is_tried_and_by_the_front(tmp_path: Path) -> None:
    stand_in = StandIn()
    exact = stand_in.latency(full_schedule(SPACE.components, SPACE.calls))
    limits = Limits(
        latency_ms=exact / 1.6, psnr=20.0, history_bytes=40, latency_of=stand_in.latency, history_bytes_of=slots
    )
    result = found_by(tmp_path, limits=limits)
    assert len(result.candidates) == QUICK.budget
    for item in result.candidates:
        if item.origin == "search":
            assert item.evaluation.latency_ms <= exact / 1.6
            assert slots(item.asked) <= 40
    assert result.front
    for item in result.front:
        assert item.evaluation.latency_ms <= exact / 1.6
        assert item.evaluation.psnr >= 20 and slots(item.asked) <= 40


def test_a_limit_of_what_nothing_predicts_is_refused() -> None:
    with pytest.raises(UsageError, match="history_bytes"):
        Limits(history_bytes=1)
    with pytest.raises(UsageError):
        Options(budget=0)


# --- Killed and resumed

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_evolution import resumable

if __name__ == "__main__":
    resumable(*sys.argv[1:])
"""


def resumable(path: str, log: str, workers: str, budget: str, resume: str) -> None:
    """What the killed process runs: a search that says each evaluation on its output."""
    make = partial(StandIn, SPACE, log)
    pool = ProcessWorkers(make, int(workers)) if int(workers) > 1 else SerialWorkers(make)
    options = replace(QUICK, budget=int(budget))
    with pool, Store(path, {"model": "stand-in"}, options.budget, resume == "resume") as store:
        result = search(SPACE, seeds(), pool, store, options, progress=lambda seen: print(seen.evaluations, flush=True))
    print(json.dumps([item.digest for item in result.front]), flush=True)
    print(result.computed, flush=True)


@pytest.mark.parametrize(("workers", "kills"), [(1, (17, 30)), (2, (23,))])
def test_a_killed_search_ends_where_it_would_have_ended(workers: int, kills: Sequence[int], tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    path, log = tmp_path / "search.db", tmp_path / "evaluated"
    arguments = [sys.executable, str(script), str(path), str(log), str(workers), str(QUICK.budget)]
    for turn, kill_at in enumerate(kills):
        process = subprocess.Popen(
            [*arguments, "resume" if turn else "begin"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if int(line) >= kill_at:
                break
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
    with Store(path, {"model": "stand-in"}, resume=True) as store:
        kept = {row.digest for row in store.all()}
    before = len(log.read_text().split())
    assert kills[-1] <= len(kept) < QUICK.budget
    finished = subprocess.run([*arguments, "resume"], capture_output=True, text=True, check=True)
    *_, front, computed = finished.stdout.splitlines()
    assert int(computed) == QUICK.budget - len(kept)
    # A killed worker may have been about to write its last line.
    assert not kept & set(log.read_text().split()[before + workers :])
    whole = found_by(tmp_path / "whole")
    assert json.loads(front) == [item.digest for item in whole.front]


def test_a_larger_budget_on_resume_goes_on_from_where_it_was(tmp_path: Path) -> None:
    first = found_by(tmp_path)
    options = replace(QUICK, budget=QUICK.budget + 16)
    store = Store(tmp_path / "search.db", {}, options.budget, resume=True)
    with SerialWorkers(StandIn) as workers, store:
        second = search(SPACE, seeds(), workers, store, options)
    assert second.computed == 16
    assert digests(second)[: QUICK.budget] == digests(first)


# --- Against what ECAD does


class BitFlips(Mutation):
    """ECAD's: one child in twenty, each gene with probability one over their number."""

    def _do(self, problem: Problem, X: np.ndarray, *args: object, random_state: np.random.Generator, **kw: object):  # type: ignore[no-untyped-def]
        flipped = X.copy()
        for row in flipped:
            if random_state.random() < 0.05:
                genes = random_state.random(len(row)) < 1 / len(row)
                row[genes] = np.where(row[genes] == 0, 2, 0)
        return flipped


def bit_flip_search(stand_in: StandIn, options: Options) -> list[Evaluation]:
    """pymoo's NSGA-II with ECAD's operators, from the same seeds."""
    space = stand_in.space
    problem = Problem(n_var=space.size, n_obj=2, vtype=int)
    given = [full_schedule(space.components, space.calls), *seeds(space)]
    vectors = np.stack([from_schedule(space, seed).vector() for seed in given])
    algorithm = NSGA2(
        pop_size=options.population, n_offsprings=options.generation, sampling=Population.new("X", vectors),
        crossover=PointCrossover(n_points=4, prob=0.9), mutation=BitFlips(), seed=options.seed,
    )  # fmt: skip
    algorithm.setup(problem)
    found: dict[str, Evaluation] = {}
    for _ in range(400):
        asked = algorithm.ask()
        rows = []
        for individual in asked:
            schedule = to_schedule(space, Genome.of_vector(space, individual.X))
            row = found.setdefault(schedule.digest(), stand_in.evaluate(schedule))
            rows.append([math.log(row.latency_ms), math.log(row.loss + 1e-9)])
        asked.set("F", np.array(rows))
        algorithm.tell(infills=asked)
        if len(found) >= options.budget:
            break
    return list(found.values())[: options.budget]


def best_psnr(found: Sequence[Evaluation], latency: float) -> float:
    return max((item.psnr for item in found if item.latency_ms <= latency), default=-math.inf)


def test_it_beats_bit_flips_from_the_same_seeds(tmp_path: Path) -> None:
    options = replace(QUICK, budget=100, screened=30, rounds=3)
    exact = StandIn().latency(full_schedule(SPACE.components, SPACE.calls))
    gains = []
    flips = bit_flip_search(StandIn(), options)
    result = found_by(tmp_path, options)
    for speed in (1.5, 2.0, 2.5, 3.0, 4.0):
        ours = best_psnr([item.evaluation for item in result.candidates], exact / speed)
        gains.append(ours - best_psnr(flips, exact / speed))
    print("dB over bit flips:", [round(gain, 2) for gain in gains])
    assert sum(gains) / len(gains) > 1.0


@pytest.fixture(autouse=True)
def no_resource_is_left(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [item for item in recwarn if issubclass(item.category, ResourceWarning)]
