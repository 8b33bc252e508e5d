"""`dcc.search`: from a model to a front of schedules, measured, with its report.

Everything that decides what is evaluated is the same when the search is resumed: the calibration table, the
measurements and the seeds are kept in the folder beside the store of evaluations.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcc.calibrate import calibrate, engine_contents, new_table
from dcc.cost_model.table import CalibrationTable, machine_of_this_process
from dcc.cost_model.targets import compilable
from dcc.errors import UsageError
from dcc.ir.measurements import Declined, Measurements, Subject, subject_of
from dcc.ir.schedule import Schedule, full_schedule
from dcc.passes.delta_dit import DeltaDit
from dcc.passes.fora import Fora
from dcc.passes.guidance_reuse import GuidanceReuse
from dcc.passes.magcache import MagCache
from dcc.passes.optimal_steps import OptimalSteps
from dcc.passes.residual_threshold import ResidualThreshold
from dcc.passes.smoothcache import SmoothCache
from dcc.passes.taylorseer import TaylorSeer
from dcc.picture import enlarged, grid, to_pixels
from dcc.preparation import Clock, Prepared, Source, StageClock, prepare
from dcc.search.assess import PlainSteps, beside_exact, computed_share
from dcc.search.choose import sampler_digest
from dcc.search.evaluator import TrajectoryEvaluator
from dcc.search.evolution import Candidate, Limits, Options, Progress, Result
from dcc.search.evolution import search as evolve
from dcc.search.front import Front, HistoryRow, Point, non_dominated, write_files
from dcc.search.genome import Space, to_schedule
from dcc.search.laboratory import Laboratory
from dcc.search.moves import drawn
from dcc.search.report import write_report
from dcc.search.requirement import Requirement
from dcc.search.store import Store
from dcc.search.workers import ProcessWorkers, RayWorkers, SerialWorkers, Workers

Array = np.ndarray[Any, np.dtype[Any]]
Told = Callable[[str], None]
FRONT_POINTS = 16
DRAWN = 12  # schedules that a search without seeds starts from, as many as there are seeds
DATABASE, TABLE, MEASURED = "evaluations.sqlite", "calibration.json", "measurements.json"
CALIBRATION_REPEATS = 7


@dataclass(frozen=True)
class Classic:
    """A schedule of a published method, with the setting that made it."""

    method: str
    schedule: Schedule


def classics(subject: Subject) -> list[Classic]:
    """The published methods at several settings; those that decline are left out."""
    passes: list[Any] = [Fora(interval=count) for count in (2, 3, 4, 5, 6)]
    passes += [TaylorSeer(interval=count, order=1) for count in (2, 3, 4, 5, 6)]
    passes += [TaylorSeer(interval=count, order=1, stores="delta") for count in (2, 3, 4, 5, 6)]
    passes += [TaylorSeer(interval=count, order=2, stores="delta") for count in (2, 3, 4, 5)]
    passes += [DeltaDit(interval=count) for count in (2, 3)]
    shares = (0.6, 0.5, 0.35, 0.25)
    passes += [SmoothCache(target_share=share) for share in shares]
    passes += [MagCache(order=1, target_share=share) for share in shares[1:]]
    passes += [ResidualThreshold(signal="first_block", order=1, target_share=share) for share in shares]
    found: dict[str, Classic] = {}
    for step in passes:
        try:
            schedule = step.propose(subject)
        except Declined:
            continue
        found.setdefault(schedule.digest(), Classic(step.name, schedule))
    return list(found.values())


def seeds(subject: Subject) -> list[Schedule]:
    """What a search starts from: best steps by dynamic programming, even ones, and the better classics."""
    found = []
    calls = subject.calls
    for share in (0.75, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2):
        count = max(1, round(share * calls))
        with suppress(Declined):
            found.append(OptimalSteps(computed=count).propose(subject))
    for count in (2, 3, 4, 5):
        with suppress(Declined):
            found.append(TaylorSeer(interval=count, order=1, first_enhance=1, stores="delta").propose(subject))
    if subject.guided:
        with suppress(Declined):
            found.append(GuidanceReuse(interval=2, order=1, start=0.0).propose(subject))
    return list({schedule.digest(): schedule for schedule in found}.values())


def drawn_seeds(space: Space, seed: int, count: int = DRAWN) -> list[Schedule]:
    """What a search starts from without `seeds`: schedules of the whole stack drawn at random, slow to fast."""
    random = np.random.default_rng(seed)
    computed = np.round(space.calls / np.geomspace(*Options().speeds, count)).astype(int)
    genomes = [drawn(space, int(number), random) for number in np.clip(computed, 1, space.calls)]
    found = [to_schedule(space, genome, f"drawn {index}") for index, genome in enumerate(genomes)]
    return list({schedule.digest(): schedule for schedule in found}.values())


def search(
    model: Any,
    *,
    output: str | os.PathLike[str],
    target: str = "cpu",
    budget: int = 200,
    images: int = 16,
    conditions: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeded: bool = True,
    resume: bool = False,
    processes: int = 1,
    ray: str | None = None,
    max_latency_ms: float | None = None,
    min_psnr: float | None = None,
    max_history_bytes: int | None = None,
    own_process: bool = False,
    told: Told = lambda _: None,
    progress: Callable[[Progress], None] | None = None,
    **source: Any,
) -> Front:
    """A front of schedules, written with its report into the folder `output`.

    `source` are the arguments of `Source` that `dcc.compile` takes as well: sampler, steps, guidance, arch and so on.
    `budget` counts evaluated schedules. `processes` evaluates that many at a time on this machine, `ray` on a cluster
    (`auto` or its address); both need a model given by name. With `resume` a search in the folder goes on: nothing is
    evaluated twice, and the front is that of a search that was never interrupted. Raises a DccError of the stage that
    failed.
    """
    if budget < 1 or images < 1:
        raise UsageError("the options of the search are out of range", got=f"budget {budget}, {images} images")
    compilable(target)
    check_workers(processes, ray, model)
    # What predicts them is known when the model is loaded; whether they can be kept at all, now.
    limits = Limits(max_latency_ms, min_psnr, max_history_bytes, lambda _: 0.0, lambda _: 0)
    timer = StageClock(told)
    folder = Path(output)
    found = (folder / DATABASE).exists()
    if found and not resume:
        raise UsageError("there is a search in this folder", at=folder, next="--resume, or another -o")
    if resume and not found:
        raise UsageError("there is no search to resume", at=folder, next="leave out --resume to begin one")
    start = time.perf_counter()
    given = Source(model, **source)
    images = min(images, given.max_batch)
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="dcc-search-", ignore_cleanup_errors=True))
        make = functools.partial(_worker, given, conditions, images, str(folder.resolve()), work)
        # A cluster that does not answer is found out before the model is loaded.
        workers = _workers(make, processes, ray)
        if workers is not None:
            stack.enter_context(workers)
        prepared = prepare(given, 1, timer)
        if prepared.program.sampler is not None and prepared.program.components:
            folder.mkdir(parents=True, exist_ok=True)
        with timer("exporting stages"):
            laboratory = Laboratory(
                prepared.program, Path(work), images=images, held_out_images=min(2 * images, given.max_batch),
                guidance_scale=None, conditions=conditions, own_process=own_process,
            )  # fmt: skip
        table = calibrated(laboratory, folder, target, timer, kept=resume)
        subject = measured_subject(laboratory, folder, timer, kept=resume)
        evaluator = TrajectoryEvaluator(laboratory, table)
        limits = replace(
            limits, latency_of=evaluator.latency_ms, history_bytes_of=functools.partial(history_bytes, laboratory)
        )
        result = run(
            laboratory, subject, evaluator, folder, budget=budget, seed=seed, seeded=seeded, resume=resume,
            workers=workers, limits=limits, progress=progress,
        )  # fmt: skip
        with timer("measuring the front"):
            front, grids = report_of(
                prepared, laboratory, subject, evaluator, result, Path(work), target, start, told, limits
            )
        with timer("writing the report"):
            write_report(front, folder, grids)
    return front


def run(
    laboratory: Laboratory,
    subject: Subject,
    evaluator: TrajectoryEvaluator,
    folder: Path,
    *,
    budget: int,
    seed: int = 0,
    seeded: bool = True,
    resume: bool = False,
    workers: Workers | None = None,
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The evolutionary search alone; evaluations lie in the folder."""
    program = laboratory.program
    space = Space(program.components, program.calls, guided=laboratory.guided, kinds=subject.kinds)
    first = seeds(subject) if seeded else drawn_seeds(space, seed)
    identity = {
        "program": program.denoiser_hash(), "sampler": sampler_digest(program.sampler), "seed": seed, "seeded": seeded,
        "images": laboratory.search.images, "guidance": [program.guidance.mode, program.guidance.scale],
        "first": [schedule.digest() for schedule in first],
        "conditions": _digest_of(laboratory.search.conditions),
        "limits": None if limits is None else [limits.latency_ms, limits.psnr, limits.history_bytes],
    }  # fmt: skip
    # Workers first: a cluster that they started is left also where the store refuses.
    with (
        workers or SerialWorkers(lambda: evaluator) as running,
        Store(folder / DATABASE, identity, budget, resume=resume) as store,
    ):
        return evolve(space, first, running, store, Options(budget=budget, seed=seed), limits, progress)


def searched(
    laboratory: Laboratory, folder: Path, budget: int, requirement: Requirement, target: str, told: Told
) -> Iterator[Schedule]:
    """For `-O3`: the schedules of a front that keep the requirement on the search's requests, fastest first."""
    quiet: Clock = lambda _: nullcontext()  # noqa: E731
    table = calibrated(laboratory, folder, target, quiet)
    subject = measured_subject(laboratory, folder, quiet)
    evaluator = TrajectoryEvaluator(laboratory, table)

    def shown(state: Progress) -> None:
        best = ", ".join(f"{value:.1f} dB at {speed}" for speed, value in state.best.items())
        told(f"{state.evaluations} of {state.budget} evaluations: {best}")

    result = run(laboratory, subject, evaluator, folder, budget=budget, progress=shown)
    exact = laboratory.exact_trajectory(laboratory.search)[-1].astype(np.float32)
    for candidate in sorted(result.front, key=lambda item: item.evaluation.latency_ms):
        samples = laboratory.run(candidate.schedule, laboratory.search).samples
        if requirement.holds(requirement.measure(samples, exact, laboratory.data_range)):
            yield candidate.schedule


def _digest_of(conditions: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(conditions):
        array = np.ascontiguousarray(conditions[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def history_bytes(laboratory: Laboratory, schedule: Schedule) -> int:
    """Bytes of the values that the schedule keeps from call to call, for the search's images in both halves."""
    rows = laboratory.search.images * (2 if laboratory.guided else 1)
    return sum(
        math.prod(rows if isinstance(size, str) else size for size in spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in laboratory.plan_of(schedule).histories
    )


def _worker(
    source: Source, conditions: Mapping[str, Any] | None, images: int, folder: str, parent: str,
    threads: int | None = None,
) -> TrajectoryEvaluator:  # fmt: skip
    """The evaluator in another process or on another machine, made from the model's name."""
    prepared = prepare(source, 1)
    # On this machine inside the search's own folder, which goes with it: a worker is killed, not asked to tidy up.
    work = Path(tempfile.mkdtemp(prefix="dcc-search-", dir=parent if Path(parent).is_dir() else None))
    # The held-out images too: the range that PSNR is relative to must be the same in every process.
    laboratory = Laboratory(
        prepared.program, work, images=images, held_out_images=min(2 * images, source.max_batch),
        conditions=conditions, threads=threads, own_process=True,
    )  # fmt: skip
    return TrajectoryEvaluator(laboratory, CalibrationTable.load(Path(folder) / TABLE))


def check_workers(processes: int, ray: str | None, model: Any) -> None:
    """Raises UsageError for processes that cannot be, and for a model that other processes could not load."""
    if processes < 1:
        raise UsageError("a search needs workers", got=f"{processes} processes", want="1 or more")
    if ray is not None and processes > 1:
        raise UsageError(
            "--ray and --processes exclude one another: the cluster says how many evaluations run at a time",
            got=f"{processes} processes, ray {ray}", next="leave out one of them",
        )  # fmt: skip
    if ray is not None and importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed", next="pip install 'dcc[dist]'")
    if (ray is not None or processes > 1) and not isinstance(model, str | os.PathLike):
        raise UsageError(
            "other processes can only load a model that has a name", got=type(model).__name__,
            want="a path or package.module:factory", next="leave out processes and ray",
        )  # fmt: skip


def _workers(make: Callable[..., TrajectoryEvaluator], processes: int, ray: str | None) -> Workers | None:
    """None for evaluations in this process. Processors are divided: each evaluation would use them all."""
    if ray is not None:
        return RayWorkers(functools.partial(make, threads=1), address=ray, cpus=1)
    if processes == 1:
        return None
    threads = max(1, machine_of_this_process().processors // processes)
    return ProcessWorkers(functools.partial(make, threads=threads), processes)


def calibrated(
    laboratory: Laboratory, folder: Path, target: str, clock: Clock, kept: bool = False
) -> CalibrationTable:
    """A new table of the laboratory's engines, which is left in the folder; with `kept` the one that lies there."""
    path = folder / TABLE
    if kept and path.exists():
        return CalibrationTable.load(path)
    with clock("calibrating the cost model"):
        rows = laboratory.search.images
        counts = (rows, 2 * rows) if laboratory.guided else (rows,)
        contents = engine_contents(laboratory.artifact, laboratory.program)
        found = calibrate(
            laboratory.artifact.path, contents, counts, CALIBRATION_REPEATS, own_process=laboratory.own_process
        )
        table = new_table(target, None).merged(found.measurements)
        table.save(path)
    return table


def measured_subject(laboratory: Laboratory, folder: Path, clock: Clock, kept: bool = False) -> Subject:
    """The Program's subject with new measurements, left in the folder; with `kept` those that lie there."""
    path = folder / MEASURED
    if kept and path.exists():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                "the search's measurements cannot be read", at=path, got=error, next="another -o, to begin again"
            ) from error
        laboratory.program.measurements = Measurements.from_json(value)
    else:
        with clock("measuring exact trajectories"):
            laboratory.program.measurements = laboratory.measurements()
        write_files({path: json.dumps(laboratory.program.measurements.to_json()).encode()})
    return subject_of(laboratory.program)


def report_of(
    prepared: Prepared,
    laboratory: Laboratory,
    subject: Subject,
    evaluator: TrajectoryEvaluator,
    result: Result,
    work: Path,
    target: str,
    start: float,
    told: Told = lambda _: None,
    limits: Limits | None = None,
) -> tuple[Front, dict[str, Array]]:
    """The front as measured on held-out requests, beside the classic methods, and a grid of samples for each point.

    The exact schedule is no point of the front where it breaks a limit.
    """
    program = laboratory.program
    identity: dict[str, Any] = {"program": program.denoiser_hash(), "sampler": sampler_digest(program.sampler)}
    exact = replace(full_schedule(program.components, program.calls), **identity)
    wanted = [("search", replace(item.schedule, name=item.origin, **identity), item) for item in thinned(result.front)]
    named = [(item.method, replace(item.schedule, **identity), None) for item in classics(subject)]
    listed: list[tuple[str, Schedule, Candidate | None]] = [("exact", exact, None), *wanted, *named]
    listed = list({schedule.digest(): (origin, schedule, item) for origin, schedule, item in reversed(listed)}.values())
    names = told_apart([schedule for _, schedule, _ in listed])
    times, exact_ms = _times(laboratory, [schedule for _, schedule, _ in listed], told)
    plain = PlainSteps(prepared, laboratory, work)
    points, grids = [], {}
    for origin, schedule, item in listed:
        samples = laboratory.run(schedule, laboratory.held_out).samples
        _, decibels, structure = laboratory.quality(samples, laboratory.held_out)
        speedup = exact_ms / times[schedule.digest()] if origin != "exact" else 1.0
        point = Point(
            name=names[schedule.digest()], origin=origin, schedule=replace(schedule, name=names[schedule.digest()]),
            latency_ms=times[schedule.digest()] if origin != "exact" else exact_ms, speedup=speedup,
            computed_share=computed_share(laboratory, schedule), psnr=decibels, ssim=structure,
            predicted_ms=evaluator.latency_ms(schedule),
            search_psnr=None if item is None else item.evaluation.psnr,
            fewer_steps=plain.of_equal_time(speedup, exact_ms) if speedup > 1.02 else None,
        )  # fmt: skip
        points.append(point)
        grids[point.digest] = _grid(samples)
        told(f"{point.name}: {speedup:.2f}x, {decibels:.2f} dB")
    kept = {"search"} if limits is not None and limits.broken_before(exact) else {"search", "exact"}
    best, rest = non_dominated([point for point in points if point.origin in kept])
    front = Front(
        model=program.name, program=identity["program"], sampler=program.sampler.name, steps=program.sampler.steps,
        target=target, batch=laboratory.search.images, exact_ms=exact_ms, points=best,
        others=(*rest, *(point for point in points if point.origin not in kept)),
        guidance_scale=program.guidance.scale, seeds=laboratory.search.seeds, held_out=laboratory.held_out.seeds,
        evaluations=len(result.candidates), seconds=time.perf_counter() - start,
        history=tuple(HistoryRow(row.evaluations, row.hypervolume, dict(row.best)) for row in result.history),
        notes={"data_range": laboratory.data_range},
    )  # fmt: skip
    return front, grids


def thinned(front: Sequence[Candidate], most: int = FRONT_POINTS) -> list[Candidate]:
    """At most so many points of a front, spread evenly over the logarithm of the latency, the ends among them."""
    lossy = [item for item in front if not all(action.computes for row in item.schedule.actions for action in row)]
    if len(lossy) <= most:
        return lossy
    places = np.log([item.evaluation.latency_ms for item in lossy])
    wanted = np.linspace(places[0], places[-1], most)
    return [lossy[index] for index in sorted({int(np.abs(places - place).argmin()) for place in wanted})]


def _times(laboratory: Laboratory, schedules: Sequence[Schedule], told: Told) -> tuple[dict[str, float], float]:
    """Milliseconds of each schedule's generation by its digest, and of the exact loop's, which runs beside them."""
    ratios: dict[str, float] = {}
    exacts = []
    exact = laboratory.load(None, finest=False)
    for begin in range(0, len(schedules), 4):
        group = {item.digest(): laboratory.load(item, finest=False) for item in schedules[begin : begin + 4]}
        found, exact_ms = beside_exact(laboratory, exact, group)
        ratios |= found
        exacts.append(exact_ms)
        told(f"measured {min(begin + 4, len(schedules))} of {len(schedules)} schedules")
    middle = float(np.median(exacts))
    return {digest: ratio * middle for digest, ratio in ratios.items()}, middle


def told_apart(schedules: Sequence[Schedule]) -> dict[str, str]:
    """A name for each schedule by its digest: its own, with the beginning of the digest where others have it too.

    What the search made has no name but "search".
    """
    names = Counter(schedule.name for schedule in schedules)
    return {
        schedule.digest(): f"{schedule.name} {schedule.digest()[:8]}"
        if names[schedule.name] > 1 or schedule.name == "search"
        else schedule.name
        for schedule in schedules
    }


def _grid(samples: Array, most: int = 16) -> Array:
    """The first samples as one picture of bytes, `[H, W, C]`."""
    if samples.ndim != 4:
        return np.zeros((1, 1, 1), np.uint8)
    return grid(enlarged(to_pixels(samples[:most], own_range=samples.shape[1] not in (1, 3))))
