"""Every sampler on the digits example: the artifact's whole loop against plain PyTorch and the diffusers scheduler.

Same seeds, same labels, guidance 3; the figure is the largest difference over the range of the original's samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dcc
from dcc import runtime
from dcc.exports import lower as lowering
from dcc.original import open_original, request_for
from dcc.quality import difference
from dcc.tolerances import TOLERANCE

SAMPLERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddpm", {}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0, "clip_sample": True}),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("euler", {}),
    ("euler", {"prediction_type": "v_prediction"}),
    ("euler-karras", {}),
    ("euler-a", {}),
    ("flow-euler", {}),
    ("dpm++2m", {}),
    ("dpm++3m", {}),
    ("dpm++2m-sde", {}),
    ("unipc", {}),
    ("deis", {}),
    ("heun", {}),
    ("lcm", {}),
    ("pndm", {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/dit_digits.pt")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    # The denoiser is the same every time: its templates are exported once.
    exported: dict[tuple[str, ...], Any] = {}
    export = lowering.export_templates

    def once(templates: Any) -> Any:
        key = tuple(templates)
        if key not in exported:
            exported[key] = export(templates)
        return exported[key]

    lowering.export_templates = once
    worst = 0.0
    for name, extra in SAMPLERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "digits.dcc"
            source = name
            if name == "flow-euler":
                # A flow sampler refuses the betas in the checkpoint's configuration: it is given its own.
                source = str(Path(folder) / "scheduler_config.json")
                Path(source).write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
            dcc.compile(options.model, sampler=source, steps=options.steps, sampler_options=extra, output=path)
            artifact = runtime.load(path)
            original = open_original(artifact.artifact.manifest, options.model, sampler=source)
            labels = np.arange(4) * 2
            got = artifact.sample({"y": labels}, guidance_scale=3.0, seed=[0, 1, 2, 3])
        wanted = original.sample(request_for(original, {"y": labels}, {"y": [10]}, [0, 1, 2, 3], 3.0)).numpy()
        gap = difference(got, wanted)
        worst = max(worst, gap)
        said = " ".join(f"{key}={value}" for key, value in extra.items())
        print(
            json.dumps({"sampler": f"{name} {said}".strip(), "difference over range": float(f"{gap:.2e}")}), flush=True
        )
    print(json.dumps({"worst": float(f"{worst:.2e}"), "limit": TOLERANCE["float32"].loop}))


if __name__ == "__main__":
    main()
