"""How many of 1,000 generated digits does a classifier of real digits read as the class that was asked for?

    python examples/digits/evaluate.py out/digits.dcc

The classifier (a support vector machine on the pixels) is fitted on the images that the DiT was trained on and
checked on held-out real ones. The samples come from the artifact: no torch is imported here.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from dataset import load_split
from rich.progress import track
from sklearn.svm import SVC

from dcc import runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("-n", "--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train_x, train_y, test_x, test_y = load_split()
    classifier = SVC(C=10.0, gamma="scale").fit(train_x.reshape(len(train_x), -1), train_y)
    real = float(classifier.score(test_x.reshape(len(test_x), -1), test_y))

    dit = runtime.load(options.artifact)
    assert dit.sampler is not None
    wanted = np.arange(options.samples) % 10
    images = []
    for start in track(range(0, options.samples, options.batch), "sampling"):
        labels = wanted[start : start + options.batch]
        seeds = [options.seed + index for index in range(start, start + len(labels))]
        images.append(dit.sample({"y": labels}, seed=seeds, guidance_scale=options.guidance_scale))
    pixels = np.clip(np.concatenate(images), -1.0, 1.0)
    read = classifier.predict(pixels.reshape(len(pixels), -1))
    by_class = {int(digit): float((read[wanted == digit] == digit).mean()) for digit in range(10)}
    print(
        json.dumps(
            {
                "held-out real digits read correctly": round(real, 4),
                "samples": options.samples,
                "sampler": f"{dit.sampler.name}/{dit.sampler.steps}",
                "generated digits read as asked": round(float((read == wanted).mean()), 4),
                "by class": by_class,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
