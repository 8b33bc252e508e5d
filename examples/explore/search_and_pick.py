"""Search for schedules, pick one by speed, compile it in, and sample from the artifact beside the exact one.

    python examples/explore/search_and_pick.py -o out/search --budget 200 --pick 2.5x

The folder gets the front (front.json, index.html ...), both artifacts, and their samples of the same seeds as
pictures. Sampling needs numpy and ONNX Runtime alone: `dcc run` does the same on a machine without torch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import dcc
from dcc import runtime
from dcc.commands.search import show_front
from dcc.picture import enlarged, grid, save_picture, to_pixels
from dcc.quality import psnr, ssim
from dcc.search.front import pick

SEED = 123_456  # the search and its report use other seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/dit_digits.pt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/search"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, default=200, help="schedules to evaluate")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--pick", default="2.5x", help="2.5x, 30dB, a name or the beginning of a hash")
    parser.add_argument("--resume", action="store_true", help="go on with the search in the folder")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 5 steps, 2 images, 4 evaluations")
    options = parser.parse_args()
    steps, budget, images = (5, 4, 2) if options.quick else (options.steps, options.budget, options.images)
    settings = {"sampler": "ddim", "steps": steps, "guidance": "cfg", "images": images, "own_process": True}

    model, resume = options.model, options.resume
    front = dcc.search(model, output=options.output, budget=budget, resume=resume, told=print, **settings)
    show_front(front)
    point = pick(front, "1x" if options.quick else options.pick)
    print(f"picked {point.summary()}")

    files = {"exact": None, "picked": point.schedule}
    for name, schedule in files.items():
        dcc.compile(model, output=options.output / f"{name}.dcc", schedule=schedule, **settings)

    # From here on there is no torch: this is what a serving process does.
    labels = np.arange(images) % 10
    samples, seconds = {}, {}
    for name in files:
        dit = runtime.load(options.output / f"{name}.dcc", own_process=True)
        dit.sample({"y": labels}, seed=SEED)
        start = time.perf_counter()
        samples[name] = dit.sample({"y": labels}, seed=SEED)
        seconds[name] = time.perf_counter() - start
        save_picture(grid(enlarged(to_pixels(samples[name]))), options.output / f"{name}.png", "png")
    decibels, structure = (measure(samples["picked"], samples["exact"]) for measure in (psnr, ssim))
    print(f"{seconds['exact'] / seconds['picked']:.2f}x as fast, {decibels:.1f} dB, SSIM {structure:.3f}, other seeds")


if __name__ == "__main__":
    main()
