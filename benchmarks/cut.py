"""What does cutting the step at every component cost, against the same step as one engine?

The cut engines share one thread pool (`own_process=True`), as they do in `dcc run`.

python benchmarks/cut.py [MODEL]          default: the digits example
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

import dcc
from dcc import runtime
from dcc.bench import alternate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="examples/digits/dit_digits.pt")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for granularity in ("step", "component"):
            path = Path(folder) / f"{granularity}.dcc"
            dcc.compile(options.model, steps=options.steps, granularity=granularity, output=path)
            loaded[granularity] = runtime.load(path, own_process=granularity == "component")
        for batch in map(int, options.batch.split(",")):
            labels = np.arange(batch) % 10
            candidates = {
                name: (lambda dit=dit, labels=labels: dit.sample({"y": labels}, seed=0)) for name, dit in loaded.items()
            }
            timings = {item.candidate: item for item in alternate(candidates, batch, options.repeats)}
            medians = {name: statistics.median(timings[name].seconds) / options.steps * 1e3 for name in loaded}
            pairs = zip(timings["component"].seconds, timings["step"].seconds, strict=True)
            engines = sum(engine.kind == "step" for engine in loaded["component"].plan.engines)
            print(
                json.dumps(
                    {
                        "batch": batch, "engines": engines,
                        "one engine, ms a step": round(medians["step"], 3),
                        "cut, ms a step": round(medians["component"], 3),
                        "median ratio": round(statistics.median(cut / whole for cut, whole in pairs), 4),
                    }
                ),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
