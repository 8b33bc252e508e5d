"""How far is the cost model from the clock? Random schedules of two models, predicted and measured.

Each model is calibrated in this process, from engines of the finest cut alone; then random schedules run with their
engines merged as shipped, which the table has never seen. Rounds over the schedules alternate with nothing else; the
figure of a schedule is the median of its rounds. With `--threads 1` processor time of the one thread is compared,
which a busy machine does not disturb.

python benchmarks/cost_model.py [--quick] [--schedules 50] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import randomise_constants

from dcc.calibrate import calibrate, engine_contents, new_table, planned_loop, undisturbed
from dcc.calibrate import preemptions as count_preemptions
from dcc.cost_model.roofline import Roofline, predict
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.load import load_model
from dcc.frontend.samplers import sampler_table
from dcc.frontend.trace import trace
from dcc.ir.program import Guidance, Program
from dcc.ir.schedule import BOTH, CONDITIONAL, REUSE_DIFFERENCE, Schedule, branch_units, delta_units, from_steps
from dcc.passes import run_passes
from dcc.preparation import pipeline
from dcc.search.laboratory import Laboratory

DIGITS = Path(__file__).resolve().parents[1] / "examples/digits/dit_digits.pt"


def digits(steps: int, rows: int) -> Program:
    loaded = load_model(str(DIGITS))
    return _program(loaded.module, dict(loaded.example_inputs), loaded.roles, loaded.nulls, loaded.ranges, steps, rows)


def wide(steps: int, rows: int) -> Program:
    """A DiT of another shape: 4 blocks of width 256 on 256 tokens, random weights."""
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=32, patch_size=2, in_channels=4, hidden_size=256, depth=4, num_heads=4, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    module = randomise_constants(DiT(config)).eval()
    inputs = {"x": torch.randn(2, 4, 32, 32), "t": torch.tensor([1.0, 999.0]), "y": torch.tensor([1, 2])}
    roles = {"x": "latent", "t": "timestep", "y": "condition"}
    return _program(module, inputs, roles, {"y": 10.0}, {"y": (0, 10)}, steps, rows)


def _program(module: Any, inputs: Any, roles: Any, nulls: Any, ranges: Any, steps: int, rows: int) -> Program:
    guidance = Guidance("cfg", 3.0, None)
    program = trace(module, inputs, roles, name="model", nulls=nulls, ranges=ranges, guidance=guidance, rows=rows)
    program.sampler = sampler_table("ddim", steps=steps)
    run_passes(program, pipeline(1))
    return program


def random_schedule(components: Sequence[str], calls: int, generator: random.Random) -> Schedule:
    """Branches or spans, computed in a random share of calls, extrapolated with order 0 to 2, some calls unguided."""
    if generator.random() < 0.5:
        units = branch_units(components)
    else:
        inner = range(1, len(components))
        starts = sorted(generator.sample(inner, generator.randint(0, min(4, len(components) - 2))))
        units = delta_units(components, (0, *starts))
    share, together = generator.uniform(0.15, 0.9), generator.random() < 0.4
    computes = []
    for _ in range(calls):
        whole = generator.random() < share
        computes.append([whole if together else generator.random() < share for _ in units])
    modes = [BOTH] * calls
    if generator.random() < 0.3:
        mode = generator.choice((CONDITIONAL, REUSE_DIFFERENCE))
        modes = [BOTH if call < 2 or generator.random() < 0.6 else mode for call in range(calls)]
    return from_steps(components, units, computes, generator.randint(0, 2), modes)


def measure_model(
    name: str, program: Program, images: int, schedules: int, repeats: int, threads: int | None
) -> list[dict[str, Any]]:
    """Predicted and measured seconds of each random schedule, beside what the data sheet alone predicts."""
    generator = random.Random(name)
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(program, Path(folder), images=images, threads=threads, own_process=True)
        path = Path(folder) / "laboratory.dcc"
        contents = engine_contents(laboratory.load(None).artifact, program)
        listed = [random_schedule(program.components, program.calls, generator) for _ in range(schedules)]
        rows = sorted({images, 2 * images})
        found = calibrate(path, contents, rows, repeats=repeats + 2, threads=threads)
        table = new_table("cpu", threads).merged(found.measurements)
        sheet = Roofline.of("cpu", processors=threads)
        results = []
        loaded = [laboratory.load(schedule, finest=False) for schedule in listed]
        loops = [planned_loop(program, laboratory.plan_of(schedule, finest=False), images) for schedule in listed]
        samples: list[list[tuple[int, float, bool]]] = [[] for _ in listed]
        for repeat in range(repeats + 1):
            for number, artifact in enumerate(loaded):
                arguments = laboratory.request_values(artifact, laboratory.search)
                before, clock = count_preemptions(), time.thread_time if threads == 1 else time.perf_counter
                start = clock()
                artifact.sample(**arguments)
                seconds = clock() - start
                if repeat:
                    samples[number].append((repeat, seconds, threads != 1 and count_preemptions() != before))
        for schedule, loop, times in zip(listed, loops, samples, strict=True):
            measured = statistics.median(value for values in undisturbed(times).values() for value in values)
            prediction = predict(loop, table)
            results.append(
                {
                    "model": name, "schedule": schedule.digest()[:12], "measured_ms": measured * 1e3,
                    "predicted_ms": prediction.seconds * 1e3, "error": prediction.seconds / measured - 1,
                    "measured_share": prediction.measured_share,
                    "data_sheet_ms": predict(loop, sheet).seconds * 1e3,
                }
            )  # fmt: skip
    return results


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties are rare enough among seconds to be left in order."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    measured = [row["measured_ms"] for row in rows]
    return {
        "schedules": len(rows),
        "spearman": spearman(measured, [row["predicted_ms"] for row in rows]),
        "median_error": statistics.median(abs(row["error"]) for row in rows),
        "worst_error": max(abs(row["error"]) for row in rows),
        "bias": statistics.median(row["error"] for row in rows),
        "data_sheet_spearman": spearman(measured, [row["data_sheet_ms"] for row in rows]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="8 schedules, 6 steps, 2 images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.schedules, options.steps, options.images, options.repeats = 8, 6, 2, 2
    everything: list[dict[str, Any]] = []
    for name, make in (("digits", digits), ("wide", wide)):
        program = make(options.steps, max(8, 2 * options.images))
        rows = measure_model(name, program, options.images, options.schedules, options.repeats, options.threads)
        for row in rows:
            print(
                json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            )
        everything += rows
        print(name, json.dumps({key: round(value, 4) for key, value in figures(rows).items()}), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": everything, "options": vars(options)}, default=str, indent=1))


if __name__ == "__main__":
    main()
