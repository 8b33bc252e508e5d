"""Does hoisting save the time that its counted share of FLOPs promises?

Each model is compiled at -O0 (everything in the loop) and -O1 (exact passes); whole generations alternate in one
process. `counted` is the share of a generation's FLOPs that leaves it, the per-request work included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import models
import torch

import dcc
from dcc import runtime
from dcc.bench import alternate


def measure(name: str, made: dict[str, Any], steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a generation of one image without guidance, both ways, and the two shares."""
    loaded, flops = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for level in (0, 1):
            path = Path(folder) / f"{name}-O{level}.dcc"
            report = dcc.compile(
                made["module"], example_inputs=made["example_inputs"], sampler="flow-euler", steps=steps,
                guidance="none", opt_level=level, max_batch=8, output=path,
            )  # fmt: skip
            loaded[level] = runtime.load(path)
            flops[level] = next(item["figures"]["flops"] for item in report.passes if item["name"] == "cut-stages")
        conditions = {item.name: made["example_inputs"][item.name][:1].numpy() for item in loaded[1].conditions}
        candidates = {
            f"O{level}": (lambda level=level: loaded[level].sample(conditions, images=2, seed=0)) for level in (0, 1)
        }
        timings = {item.candidate: item for item in alternate(candidates, 2, repeats)}
    slow, fast = (statistics.median(timings[key].seconds) for key in ("O0", "O1"))
    # Timestep tables are made at compile time; the others cost what they cost, once or for every step.
    after = flops[1]["step"] * steps + flops[1].get("request", 0) + flops[1].get("table", 0) * steps
    counted = 1 - after / (flops[0]["step"] * steps)
    saved = 1 - fast / slow
    return {
        "model": name, "steps": steps, "O0 seconds": round(slow, 3), "O1 seconds": round(fast, 3),
        "counted share": round(counted, 4), "time saved": round(saved, 4),
        "saved of counted": round(saved / counted, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    for name, make in (("pixart-256-like", models.pixart), ("easycontrol-like", models.easycontrol)):
        print(json.dumps(measure(name, make(), options.steps, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
