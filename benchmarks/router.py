"""Learned routers on the digits model beside FORA and SmoothCache that compute as much.

    python benchmarks/router.py                  # 20 and 50 DDIM steps
    python benchmarks/router.py --steps 20 --shares 0.5 0.33

Quality is on held-out seeds, samples against the exact ones. Training has other noise and draws its own labels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from dcc.ir.measurements import Declined, subject_of
from dcc.ir.schedule import Schedule
from dcc.passes import Fora, LearnedRouter, SmoothCache
from dcc.preparation import Source, prepare
from dcc.search.laboratory import Laboratory

MODEL = "examples/digits/dit_digits.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    parser.add_argument("--iterations", type=int, default=LearnedRouter().iterations)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| steps | method | computed | PSNR | SSIM | trained |")
    print("|---|---|---|---|---|---|", flush=True)
    for steps in options.steps:
        program = prepare(Source(options.model, sampler="ddim", steps=steps)).program
        with tempfile.TemporaryDirectory() as folder:
            laboratory = Laboratory(program, Path(folder), threads=options.threads)
            program.measurements = laboratory.measurements()
            subject = subject_of(program)

            def show(method: str, schedule: Schedule, trained: str = "", laboratory: Laboratory = laboratory) -> None:
                subject = subject_of(laboratory.program)
                share = schedule.computed_share(subject.flops, subject.glue_flops)
                samples = laboratory.run(schedule, laboratory.held_out).samples
                _, decibels, structure = laboratory.quality(samples, laboratory.held_out)
                line = [
                    str(laboratory.program.calls),
                    method,
                    f"{share:.1%}",
                    f"{decibels:.2f}",
                    f"{structure or 0:.4f}",
                    trained,
                ]
                print("| " + " | ".join(line) + " |", flush=True)

            for interval in (2, 3, 4):
                show(f"FORA every {interval}", Fora(interval).propose(subject))
            for share in options.shares:
                for longest in (3, 0):
                    try:
                        smooth = SmoothCache(longest=longest, target_share=share).propose(subject)
                    except Declined as declined:
                        print(json.dumps({"smoothcache": declined.reason}), flush=True)
                        continue
                    show(f"SmoothCache, reused {longest or 'any number of'} calls", smooth)
                router = replace(LearnedRouter(), target_share=share, iterations=options.iterations, seconds=0.0)
                training = router.train(program)
                note = f"{training.seconds:.0f} s, {len(training.errors)} iterations"
                show("learned router", router.schedule(subject, training), note)


if __name__ == "__main__":
    main()
