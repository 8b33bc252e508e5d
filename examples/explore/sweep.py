"""Published caching methods at several settings: measured speed-up against PSNR on held-out seeds, on one plot.

    python examples/explore/sweep.py -o out/sweep
    python examples/explore/sweep.py -o out/sweep --fit      # the same with weights fitted on the model's trajectories

The yardstick is the same model with fewer plain steps: a method below that line is not worth its trouble.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from dcc.commands.terminal import print_table
from dcc.ir.measurements import subject_of
from dcc.passes.delta_dit import DeltaDit
from dcc.passes.fora import Fora
from dcc.passes.magcache import MagCache
from dcc.passes.smoothcache import SmoothCache
from dcc.passes.taylorseer import TaylorSeer
from dcc.preparation import Source, prepare
from dcc.search.assess import PlainSteps, beside_exact, computed_share
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory

METHODS = {
    "FORA": [Fora(interval) for interval in (2, 3, 4, 5)],
    "TaylorSeer": [TaylorSeer(interval, order=1) for interval in (2, 3, 4, 5)],
    "Delta-DiT": [DeltaDit(interval) for interval in (2, 3, 4)],
    "SmoothCache": [SmoothCache(target_share=share) for share in (0.6, 0.5, 0.35, 0.25)],
    "MagCache": [MagCache(target_share=share) for share in (0.6, 0.5, 0.35, 0.25)],
}
COLUMNS = ("method", "schedule", "FLOPs", "speed-up", "PSNR, dB", "plain steps in that time", "PSNR of those, dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/dit_digits.pt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/sweep"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16, help="images of a generation; twice as many are held out")
    parser.add_argument("--fit", action="store_true", help="fit the weights of every schedule on the trajectories")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 6 steps, 2 images, one setting a method")
    options = parser.parse_args()
    steps, images, settings = (6, 2, 1) if options.quick else (options.steps, options.images, None)
    options.output.mkdir(parents=True, exist_ok=True)
    prepared = prepare(Source(options.model, sampler="ddim", steps=steps, guidance="cfg"))
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(
            prepared.program, Path(folder), images=images, held_out_images=2 * images, own_process=True
        )
        subject = replace(subject_of(prepared.program), measurements=laboratory.measurements())
        found = {(method, step): step.propose(subject) for method in METHODS for step in METHODS[method][:settings]}
        if options.fit:
            found = {
                key: fit_weights(laboratory, schedule, laboratory.search).schedule for key, schedule in found.items()
            }
        loaded = {str(key): laboratory.load(schedule) for key, schedule in found.items()}
        ratios, exact_ms = beside_exact(laboratory, laboratory.load(None), loaded)
        plain, rows = PlainSteps(prepared, laboratory, Path(folder)), []
        for key, schedule in found.items():
            samples = laboratory.run(schedule, laboratory.held_out).samples
            speed, psnr = 1 / ratios[str(key)], laboratory.quality(samples, laboratory.held_out)[1]
            fewer = plain.of_equal_time(speed, exact_ms)
            beside = (fewer.steps, fewer.psnr) if fewer else (steps, float("inf"))
            rows.append((key[0], schedule.name, computed_share(laboratory, schedule), speed, psnr, *beside))
    with (options.output / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw(rows, steps, options.output / "sweep.png")
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    print_table(f"{prepared.program.name}, {steps} ddim steps, {images} images, held-out seeds", COLUMNS, shown)


def draw(rows: list[tuple], steps: int, path: Path) -> None:
    """Every method as a line, and the dashed line of fewer plain steps."""
    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    for method in dict.fromkeys(row[0] for row in rows):
        points = sorted((row[3], row[4]) for row in rows if row[0] == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    plain = sorted({(steps / row[5], row[6]) for row in rows})
    axes.plot(*zip(*plain, strict=True), color="black", linestyle="--", marker=".", label="fewer plain steps")
    axes.set(xlabel="measured speed-up", ylabel="PSNR against the exact samples, held-out seeds [dB]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
