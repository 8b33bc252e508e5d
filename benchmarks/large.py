"""DiT-XL/2 (675 M random parameters) compiled: seconds, peak memory, what leaves the loop, what layers for GPUs take.

    python benchmarks/large.py                               # the portable engines alone
    python benchmarks/large.py --target a100,rtx4090,rtx5090 # engines for GPUs as well, built here
    python benchmarks/large.py --target a100 --alone         # the same, added to the artifact by a process of its own
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


class PrivatePeak(threading.Thread):
    """The most memory, in bytes, that is this process's and its children's alone.

    Pages of mapped files are left out: they can be dropped, and count twice where a file is mapped twice.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nbytes = 0
        self.start()

    def run(self) -> None:
        tasks = Path("/proc/self/task")
        while True:
            children = [child for task in tasks.iterdir() for child in _read(task / "children").split()]
            self.nbytes = max(self.nbytes, sum(_private(Path("/proc", name)) for name in ("self", *children)))
            time.sleep(0.05)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def _private(process: Path) -> int:
    lines = [line for line in _read(process / "status").splitlines() if line.startswith("RssAnon")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def build_alone(path: Path, target: str) -> None:
    """Prints what adding the layer to an artifact takes, in a process that does nothing else."""
    import dcc

    private, start = PrivatePeak(), time.perf_counter()
    dcc.build(path, target=target, engine_cache=False, workers=1)
    print(json.dumps({"dcc build seconds": round(time.perf_counter() - start, 1), "private": private.nbytes}))


def layer_figures(path: Path) -> list[dict[str, Any]]:
    """Bytes of each layer's members against its weights in its own type, which the plan stores once each."""
    from dcc.runtime import Artifact

    artifact = Artifact.open(path, check="fast")
    sizes = {name: entry["size"] for name, entry in artifact.manifest["members"].items()}
    stored = sum(weight.nbytes for weight in artifact.plan.weights)
    rows = []
    for layer in artifact.layers:
        engines = layer.summary["engines"].values()
        halves = stored / 2
        rows.append({
            "layer": layer.name,
            "GB": round(sum(sizes[name] for name in layer.members()) / 1e9, 3),
            "over half-size weights": round(sum(sizes[name] for name in layer.members()) / halves, 3),
            "build seconds": round(sum(engine.get("seconds", 0.0) for engine in engines), 1),
            "worker peak GB": round(max((engine.get("peak_bytes", 0) for engine in engines), default=0) / 1e9, 3),
            "peak over half-size weights": round(
                max((engine.get("peak_bytes", 0) for engine in engines), default=0) / halves, 2
            ),
            "forward error": layer.summary["forward_error"],
        })  # fmt: skip
    return rows


def main() -> None:
    import models

    import dcc

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--alone", action="store_true", help="the layer is added by `dcc build`, in its own process")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    target = given.target
    if given.build is not None:
        build_alone(given.build, target)
        return
    made = models.dit_xl()
    weights = sum(p.numel() * p.element_size() for p in made["module"].parameters())
    with tempfile.TemporaryDirectory() as folder:
        private = PrivatePeak()
        start = time.perf_counter()
        report = dcc.compile(
            made["module"], example_inputs=made["example_inputs"], sampler="ddim", steps=50, guidance="none",
            output=Path(folder) / "xl.dcc", target="cpu" if given.alone else target, engine_cache=False,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        alone = {}
        if given.alone:
            command = [sys.executable, __file__, "--build", str(Path(folder) / "xl.dcc"), "--target", target]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            alone = json.loads(done.stdout.splitlines()[-1])
            alone["private over half-size weights"] = round(2 * alone["private"] / weights, 2)
        layers = layer_figures(Path(folder) / "xl.dcc")
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
                "private peak GB": round(private.nbytes / 1e9, 3),
                "private peak over weights": round(private.nbytes / weights, 2),
                "parameters that leave the loop": round(
                    hoist["figures"]["parameters"] / hoist["figures"]["total parameters"], 4
                ),
                "cut": cut["why"],
                "forward error": report.forward_error,
                **alone,
                "layers": layers,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
