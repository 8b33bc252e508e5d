"""Caching schedules on the digits model: classic methods, search, -O2, cost of the plan, in one set of tables.

    python benchmarks/schedules.py --steps 20 -o OUT          # everything at one number of steps
    python benchmarks/schedules.py --steps 20 --only search   # classics, search, speed-up against computed share
    python benchmarks/schedules.py --quick                    # small budgets, to see that it runs

Quality is on held-out seeds, speed against the exact loop that runs beside each candidate (medians of alternating
runs). "At the same latency" interpolates linearly in the logarithm of the speed-up between the two neighbours of a
method's own upper hull. Tables are Markdown on stdout and `schedules.json` in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import dcc
from dcc.ir.schedule import Schedule, delta_units, from_steps
from dcc.preparation import Source, StageClock, prepare
from dcc.runtime.onnxruntime_backend import Binding
from dcc.search.evaluator import TrajectoryEvaluator
from dcc.search.front import Front, Point
from dcc.search.laboratory import Laboratory
from dcc.search.study import calibrated, classics, measured_subject, run, seeds

PLAIN = "fewer plain steps"
MODEL = "examples/digits/dit_digits.pt"
SPEEDS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)


def hull(points: list[Point]) -> list[Point]:
    """Those that no other beats in speed and PSNR, by speed."""
    best: list[Point] = []
    for point in sorted(points, key=lambda item: -item.speedup):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best[::-1]


def at_speed(points: list[Point], speed: float) -> float | None:
    """PSNR at a speed-up, between neighbours of the hull; None outside it."""
    edge = [point for point in hull(points) if math.isfinite(point.psnr)]
    for left, right in itertools.pairwise(edge):
        if left.speedup <= speed <= right.speedup:
            share = math.log(speed / left.speedup) / math.log(right.speedup / left.speedup)
            return left.psnr + share * (right.psnr - left.psnr)
    return None


def family(point: Point) -> str:
    if point.origin != "taylorseer":
        return point.origin
    stores = "span" if len(point.schedule.units) == 1 else "components"
    return f"taylorseer, {stores}"


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def of_search(front: Front) -> dict[str, Any]:
    """The tables of one search; returns what they say."""
    methods: dict[str, list[Point]] = {}
    for point in front.others:
        if point.origin not in ("search", "exact"):
            methods.setdefault(family(point), []).append(point)
    ours = list(front.points)
    plain = [
        Point(f"{item.fewer_steps.steps} steps", "fewer steps", item.schedule, item.fewer_steps.latency_ms,
              front.exact_ms / item.fewer_steps.latency_ms, 1.0, item.fewer_steps.psnr)
        for item in front.everything if item.fewer_steps is not None
    ]  # fmt: skip
    lines: dict[str, list[Point]] = {PLAIN: plain, **dict(sorted(methods.items())), "search": ours}
    rows = [[name, *(figure(at_speed(points, speed)) for speed in SPEEDS)] for name, points in lines.items()]
    best = {
        speed: max(
            (value for points in methods.values() if (value := at_speed(points, speed)) is not None), default=None
        )
        for speed in SPEEDS
    }
    gained = {
        speed: mine - theirs
        for speed in SPEEDS
        if (mine := at_speed(ours, speed)) is not None and (theirs := best[speed]) is not None
    }
    rows.append(["best classic", *(figure(best[speed]) for speed in SPEEDS)])
    over = [f"{gained[speed]:+.1f}" if speed in gained else "" for speed in SPEEDS]
    rows.append(["search over the best classic", *over])
    table(
        f"PSNR (dB) on held-out seeds at measured speed-ups, {front.steps} steps, {front.evaluations} evaluations",
        ["", *(f"{speed:g}x" for speed in SPEEDS)], rows,
    )  # fmt: skip
    same_compute(front, lines)
    ideal = [
        (point.speedup * point.computed_share, point) for point in front.everything
        if point.origin != "exact" and point.computed_share < 0.7
    ]  # fmt: skip
    table(
        "Measured speed-up against what the computed share allows",
        ["", "computed", "ideal", "measured", "of the ideal"],
        [
            [point.name, f"{point.computed_share:.1%}", f"{1 / point.computed_share:.2f}x", f"{point.speedup:.2f}x",
             f"{share:.0%}"]
            for share, point in sorted(ideal, key=lambda item: item[1].computed_share)
        ],
    )  # fmt: skip
    errors = [abs(point.predicted_ms / point.latency_ms - 1) for point in front.everything if point.predicted_ms]
    print(f"predicted against measured latency: median error {np.median(errors):.1%} over {len(errors)} schedules")
    shares = [share for share, _ in ideal]
    print(f"of the ideal speed-up: median {np.median(shares):.0%}, least {min(shares):.0%}")
    over_classics = {f"{speed:g}x": value for speed, value in gained.items()}
    return {"gain over best classic": over_classics, "median of ideal": float(np.median(shares))}


def same_compute(front: Front, lines: dict[str, list[Point]]) -> None:
    """What the methods are worth where they compute the same share of FLOPs, whatever time they take."""
    shares = (0.6, 0.5, 0.4, 1 / 3, 0.3)
    rows = []
    for name, points in lines.items():
        by_compute = [
            replace(point, speedup=front.steps / int(point.name.split()[0]) if name == PLAIN else 1 / share)
            for point in points
            if (share := point.computed_share) > 0
        ]
        rows.append([name, *(figure(at_speed(by_compute, 1 / share)) for share in shares)])
    table(
        f"PSNR (dB) on held-out seeds at the same computed share of FLOPs, {front.steps} steps",
        ["", *(f"{share:.0%}" for share in shares)], rows,
    )  # fmt: skip


def levels(steps: int, folder: Path, front: Front | None) -> None:
    """-O2: how long it takes, and how far it is from the front at its speed."""
    rows = []
    for require in ("psnr>=30", "psnr>=35"):
        start = time.perf_counter()
        report = dcc.compile(
            MODEL, output=folder / "o2.dcc", sampler="ddim", steps=steps, opt_level=2, require=require, own_process=True
        )
        seconds = time.perf_counter() - start
        worth = report.schedule or {}
        found = worth["quality"]["psnr"]
        best = None if front is None else at_speed(list(front.points), worth["speedup"])
        rows.append([
            require, f"{seconds:.0f} s", f"{report.seconds['choosing a schedule']:.0f} s", f"{worth['speedup']:.2f}x",
            f"{found:.1f}", figure(best), "" if best is None else f"{found - best:+.1f}",
            "" if worth["fewer_steps"] is None else f"{worth['fewer_steps']['psnr']:.1f}",
        ])  # fmt: skip
    table(
        f"-O2 at {steps} steps",
        ["--require", "whole compile", "choosing", "speed-up", "PSNR, dB", "front there", "difference",
         "same time, fewer steps"],
        rows,
    )  # fmt: skip


def loss_of(laboratory: Laboratory, schedule: Schedule) -> float:
    """Mean squared error of the search's samples under the schedule as it is, nothing fitted."""
    return laboratory.quality(laboratory.run(schedule, laboratory.search).samples, laboratory.search)[0]


def hypervolume(steps: int, budget: int, repeats: int) -> None:
    """Search with seeds and without, several times: hypervolume after so many evaluations, and that of the seeds."""
    prepared = prepare(Source(MODEL, sampler="ddim", steps=steps), 1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        laboratory = Laboratory(prepared.program, Path(work), images=8, held_out_images=8, own_process=True)
        clock = StageClock(lambda _: None)
        costs = calibrated(laboratory, Path(work), "cpu", clock)
        subject = measured_subject(laboratory, Path(work), clock)
        curves = {}
        for seeded in (True, False):
            for seed in range(repeats):
                place = Path(work) / f"{seeded}-{seed}"
                place.mkdir()
                evaluator = TrajectoryEvaluator(laboratory, costs)
                result = run(laboratory, subject, evaluator, place, budget=budget, seed=seed, seeded=seeded)
                losses = [(item.evaluation.latency_ms, item.evaluation.loss) for item in result.candidates]
                curves[seeded, seed] = losses
        exact = next(latency for latency, loss in curves[True, 0] if loss == 0.0)
        marks = [mark for mark in (20, 40, 60, 80, 100, 150, 200) if mark <= budget]
        for (seeded, seed), losses in curves.items():
            name = f"{'seeded' if seeded else 'unseeded'}, seed {seed}"
            rows.append([name, *(f"{common_hypervolume(losses[:mark], exact):.3f}" for mark in marks)])
        published = [(evaluator.latency_ms(item.schedule), loss_of(laboratory, item.schedule)) for item in
                     classics(subject)]  # fmt: skip
        alone = f"{len(published)} classic schedules, as published, alone"
        rows.append([alone, f"{common_hypervolume(published, exact):.3f}", *("" for _ in marks[1:])])
        first = common_hypervolume(curves[True, 0][: len(seeds(subject)) + 1], exact)
        rows.append([f"the search's {len(seeds(subject))} seeds alone", f"{first:.3f}", *("" for _ in marks[1:])])
        table(
            f"Hypervolume of the front over log speed-up and PSNR, {steps} steps, 8 images",
            ["", *(str(mark) for mark in marks)], rows,
        )  # fmt: skip


def common_hypervolume(losses: list[tuple[float, float]], exact: float) -> float:
    """Area under PSNR (0 to 60 dB) over log2 speed-up (0 to log2 6): the same reference for every search."""
    edge = []
    for latency, loss in losses:
        decibels = min(60.0, -10 * math.log10(loss)) if loss > 0 else 60.0
        edge.append((min(math.log2(6), max(0.0, math.log2(exact / latency))), max(0.0, decibels)))
    area, height, before = 0.0, 0.0, math.log2(6)
    for place, decibels in sorted(edge, reverse=True):
        area += height * (before - place)
        before, height = place, max(height, decibels)
    return (area + height * before) / 60.0


def overhead(steps: int) -> None:
    """What the plan itself costs: a sampler call's wall time outside its engines, and what numpy allocates in it."""
    rows = []
    for name, model, images, calls in (("digits", MODEL, 16, steps), ("DiT-S/2", "models:dit_s", 2, 6)):
        prepared = prepare(Source(model, sampler="ddim", steps=calls, guidance="cfg"), 1)
        with tempfile.TemporaryDirectory() as work:
            laboratory = Laboratory(prepared.program, Path(work), images=images, held_out_images=1, own_process=True)
            components = prepared.program.components
            thirds = from_steps(components, delta_units(components), [[call % 3 == 0] for call in range(calls)], 1)
            full = 0.0
            for schedule in (None, thirds):
                mean, within, allocated = call_costs(laboratory, schedule)
                full = full or mean
                rows.append([
                    f"{name}, {images} images, {'exact' if schedule is None else 'a third computed'}",
                    f"{mean:.2f} ms", f"{within:.2f} ms", f"{mean - within:.2f} ms", f"{(mean - within) / full:.1%}",
                    f"{allocated:,} B",
                ])  # fmt: skip
    table(
        "A sampler call: mean wall time, engines alone, the rest; most bytes allocated in a call after the first",
        ["", "call", "engines", "rest", "rest of a full call", "allocated"], rows,
    )  # fmt: skip


def call_costs(laboratory: Laboratory, schedule: Schedule | None) -> tuple[float, float, int]:
    """Mean milliseconds of a call and of the engines in it, merged as shipped; bytes of Python's memory in a call."""
    loaded = laboratory.load(schedule, finest=False)
    values = laboratory.request_values(loaded, laboratory.search)
    loaded.sample(**values)
    inside = [0.0]
    run = Binding.run

    def timed(binding: Binding) -> None:
        start = time.perf_counter()
        run(binding)
        inside[0] += time.perf_counter() - start

    total, engines, calls, allocated = 0.0, 0.0, 0, 0
    with mock.patch.object(Binding, "run", timed):
        for _ in range(10):
            with loaded.request(**values) as request:
                inside[0] = 0.0  # what a request computes once is no part of a call
                start = time.perf_counter()
                for call in range(request.calls):
                    request.advance(call, request.output(call))
                total += time.perf_counter() - start
                engines += inside[0]
                calls += request.calls
    tracemalloc.start()
    with loaded.request(**values) as request:
        for call in range(request.calls):
            tracemalloc.reset_peak()
            base, _ = tracemalloc.get_traced_memory()
            request.advance(call, request.output(call))
            if call:
                allocated = max(allocated, tracemalloc.get_traced_memory()[1] - base)
    tracemalloc.stop()
    return total / calls * 1e3, engines / calls * 1e3, allocated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--hypervolume-budget", type=int, default=100)
    parser.add_argument("--only", choices=("search", "levels", "hypervolume", "overhead"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/out"))
    options = parser.parse_args()
    folder = options.output / f"steps-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    budget = 24 if options.quick else options.budget
    front: Front | None = Front.read(folder / "front.json") if (folder / "front.json").exists() else None
    if options.only in (None, "search"):
        start = time.perf_counter()
        front = dcc.search(
            MODEL, output=folder, sampler="ddim", steps=options.steps, budget=budget, own_process=True,
            resume=(folder / "evaluations.sqlite").exists(), told=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        print(f"search and measuring: {time.perf_counter() - start:.0f} s")
    if front is not None:
        found = of_search(front)
        (folder / "schedules.json").write_text(json.dumps(found, indent=1))
    if options.only in (None, "levels"):
        levels(options.steps, folder, front)
    if options.only in (None, "overhead"):
        overhead(options.steps)
    if options.only in (None, "hypervolume"):
        hypervolume(options.steps, 24 if options.quick else options.hypervolume_budget, 3)


if __name__ == "__main__":
    main()
