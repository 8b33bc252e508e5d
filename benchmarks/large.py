"""DiT-XL/2 (675 M random parameters) compiled for the CPU: seconds, peak memory, what leaves the loop."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    import models

    import dcc

    made = models.dit_xl()
    weights = sum(p.numel() * p.element_size() for p in made["module"].parameters())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = dcc.compile(
            made["module"], example_inputs=made["example_inputs"], sampler="ddim", steps=50, guidance="none",
            output=Path(folder) / "xl.dcc", progress=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    hoist = next(item for item in report.passes if item["name"] == "hoist-scopes")
    cut = next(item for item in report.passes if item["name"] == "cut-stages")
    print(
        json.dumps(
            {
                "parameters": report.parameters,
                "weights GB": round(weights / 1e9, 3),
                "artifact GB": round(report.size_bytes / 1e9, 3),
                "compile seconds": round(seconds, 1),
                "seconds by stage": report.seconds,
                "peak memory GB": round(peak / 1e9, 3),
                "peak over weights": round(peak / weights, 2),
                "parameters that leave the loop": round(
                    hoist["figures"]["parameters"] / hoist["figures"]["total parameters"], 4
                ),
                "cut": cut["why"],
                "forward error": report.forward_error,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
