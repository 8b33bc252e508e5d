"""What a schedule loses at another number of steps than it was made for; and that it compiles at another resolution.

    python examples/explore/transfer.py -o out/transfer
    python examples/explore/transfer.py -o out/transfer --schedule out/search/front.json --pick 2.5x

The yardsticks are a schedule made for that number of steps and a run of plain steps, of the same compute.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import dcc
from dcc import runtime
from dcc.commands.terminal import print_table
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.schedules import read_schedule, transfer
from dcc.ir.measurements import subject_of
from dcc.ir.schedule import Schedule
from dcc.passes.fora import Fora
from dcc.passes.optimal_steps import OptimalSteps
from dcc.preparation import Prepared, Source, prepare
from dcc.search.assess import PlainSteps, computed_share
from dcc.search.fitting import fit_weights
from dcc.search.front import Front, pick
from dcc.search.laboratory import Laboratory

COLUMNS = ("steps", "placement", "FLOPs", "as transferred", "refitted", "made for these steps", "loss", "plain steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/dit_digits.pt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/transfer"))
    parser.add_argument("--steps", type=int, default=20, help="that the schedule was made for")
    parser.add_argument("--to", type=int, nargs="+", default=[10, 50], help="steps that it is transferred to")
    parser.add_argument("--computed", type=int, default=8, help="calls that the schedule computes, where none is given")
    parser.add_argument("--schedule", type=Path, help="a schedule or a front for that number of steps")
    parser.add_argument("--pick", default="2.5x", help="the point of a front")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 6 steps to 4 and 8, 2 images")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.to, options.computed, options.images = 6, [4, 8], 3, 2
    options.output.mkdir(parents=True, exist_ok=True)
    prepared = prepare(Source(options.model, sampler="ddim", steps=options.steps, guidance="cfg"))
    program = prepared.program
    with tempfile.TemporaryDirectory() as folder:
        images = options.images
        home = Laboratory(program, Path(folder), images=images, held_out_images=2 * images, own_process=True)
        if options.schedule:
            picked = lambda value: pick(Front.from_json(value), options.pick).schedule  # noqa: E731
            schedule = read_schedule(options.schedule, program.components, program.calls, pick=picked)
        else:
            program.measurements = home.measurements()
            schedule = fit_weights(
                home, OptimalSteps(options.computed).propose(subject_of(program)), home.search
            ).schedule
        rows = []
        for steps in (options.steps, *options.to):
            rows += losses(prepared.with_steps(steps), home, schedule, Path(folder) / f"to-{steps}")
    with (options.output / "transfer.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    shown = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    print_table(f"{schedule.name}, {options.steps} ddim steps: PSNR in dB, held-out seeds", COLUMNS, shown)
    print(other_resolution(options.output))


def losses(prepared: Prepared, home: Laboratory, schedule: Schedule, folder: Path) -> list[tuple]:
    """A row for each placement of the computed calls. PSNR is against the exact samples of the same steps."""
    folder.mkdir()
    there = home.sibling(prepared.program, folder)
    calls = there.program.calls
    subject = replace(subject_of(there.program), measurements=there.measurements())
    plain = PlainSteps(prepared, there, folder)

    def psnr(candidate: Schedule) -> float:
        return there.quality(there.run(candidate, there.held_out).samples, there.held_out)[1]

    rows = []
    for placement in ("nearest", "interval") if calls != schedule.calls else ("unchanged",):
        moved = schedule if placement == "unchanged" else transfer(schedule, calls, placement=placement)
        share = computed_share(there, moved)
        count = min(calls - 1, round(share * calls))
        made = psnr(fit_weights(there, OptimalSteps(count).propose(subject), there.search).schedule)
        refitted = psnr(moved if moved is schedule else fit_weights(there, moved, there.search).schedule)
        rows.append((calls, placement, share, psnr(moved), refitted, made, made - refitted, plain.at(count, 1.0).psnr))
    return rows


def other_resolution(folder: Path) -> str:
    """A schedule for one resolution compiles at another. That says nothing of quality: these weights are random.

    The digits DiT was trained with one table of 8 by 8 positions, so its samples of any other size mean nothing.
    """
    small, large = (DiT(DiTConfig(size, 2, 1, 32, 1, 4, num_classes=10, learn_sigma=False)) for size in (8, 12))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    table = large.state_dict()["pos_embed"]
    large.load_state_dict({**small.state_dict(), "pos_embed": table})
    schedule = Fora(2).propose(subject_of(prepare(Source(small, sampler="ddim", steps=6)).program))
    file, moved = folder / "large.dcc", transfer(schedule, 4)
    dcc.compile(large, sampler="ddim", steps=4, schedule=moved, images=2, output=file, own_process=True)
    shape = runtime.load(file, own_process=True).sample({"y": [3]}, seed=0).shape
    return f"a schedule for 8x8 and 6 steps compiles for {shape[2]}x{shape[3]} and 4 steps (random weights, no quality)"


if __name__ == "__main__":
    main()
