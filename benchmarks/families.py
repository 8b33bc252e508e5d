"""Engines for GPUs (sm80, sm89, sm120) of models at released widths and reduced depth, made and checked without a GPU.

    python benchmarks/families.py                                                 # PixArt, SD3, FLUX, Wan
    python benchmarks/families.py --models digits --steps 50 --front front.json   # a searched schedule

Random weights: `error` is the layer's forward on the processor, every value rounded, against the float32 artifact, over
the output's range. 256 image tokens. `over weights` is the engines' size over the weights in the layer's type, and
`weights stored` how many bytes of weights they were given, over the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from zoo import randomise_constants

import dcc
from dcc.frontend.architectures import facts_of
from dcc.frontend.families import FAMILIES
from dcc.runtime import Artifact
from dcc.tolerances import TOLERANCE

DIGITS = "examples/digits/dit_digits.pt"
TARGETS = "a100,rtx4090,rtx5090"
# Widths, heads and text as released; fewer blocks and a smaller picture.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixart": ("PixArtTransformer2DModel", {
        "num_layers": 2, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "cross_attention_dim": 1152, "sample_size": 32, "patch_size": 2, "caption_channels": 4096,
        "use_additional_conditions": False,
    }),
    "sd3": ("SD3Transformer2DModel", {
        "num_layers": 2, "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    }),
    "flux": ("FluxTransformer2DModel", {
        "num_layers": 1, "num_single_layers": 1, "in_channels": 64, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }),
    "wan": ("WanTransformer3DModel", {
        "num_layers": 2, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
        "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960,
    }),
}  # fmt: skip
TOKENS = {"hidden_states": 256, "img_ids": 256, "encoder_hidden_states": 128, "txt_ids": 128}
HEADER = (
    "model", "type", "parameters", "engines", "operations", "layers", "build", "size", "over weights",
    "weights stored", "error", "limit",
)  # fmt: skip


def model_of(name: str, steps: int = 4) -> dict[str, Any]:
    """Arguments of `dcc.compile` for the model, with random weights whose gates are open."""
    if name == "digits":
        return {"model": DIGITS, "sampler": "ddim", "steps": steps}
    import diffusers

    kind, config = CONFIGS[name]
    torch.manual_seed(0)
    module = FAMILIES[kind].adapter(randomise_constants(getattr(diffusers, kind)(**config)).eval())
    facts = facts_of(module)
    assert facts is not None
    inputs = {key: _shorter(key, value) for key, value in facts.example_inputs.items()}
    sampler = "ddim" if name == "pixart" else "flow-euler"
    return {"model": module, "example_inputs": inputs, "sampler": sampler, "steps": steps, "guidance": "none"}


def _shorter(name: str, value: torch.Tensor) -> torch.Tensor:
    """The input with as many tokens as a picture of 256 has."""
    if name.endswith("_ids"):
        return value[: TOKENS[name]]
    if value.dim() == 5:
        return value[:, :, :1, :32, :32]
    return value[:, : TOKENS[name]] if value.dim() == 3 else value


def rows(name: str, path: Path, parameters: int) -> list[list[str]]:
    """A row of the table for each layer of the artifact."""
    artifact = Artifact.open(path, check="fast")
    stored = sum(weight.nbytes for weight in artifact.plan.weights)
    found = []
    for layer in artifact.layers:
        engines = layer.summary["engines"]
        size = sum(artifact.manifest["members"][member]["size"] for member in layer.engines.values())
        steps = len(artifact.plan.step_programs)
        found.append([
            f"{name}, {steps} distinct steps" if steps > 1 else name, layer.dtype, f"{parameters / 1e6:,.1f} M",
            str(len(layer.engines)), f"{sum(sum(engine['nodes'].values()) for engine in engines.values()):,}",
            f"{sum(engine['layers'] for engine in engines.values()):,}",
            f"{sum(engine['seconds'] for engine in engines.values()):.1f} s", f"{size / 2**20:,.1f} MiB",
            f"{size / (stored / 2):.3f}x",
            f"{sum(engine['weight_bytes'] for engine in engines.values()) / (stored / 2):.2f}x",
            f"{layer.summary['forward_error']:.1e}",
            f"{TOLERANCE[layer.dtype].forward:.0e}",
        ])  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["digits", *CONFIGS], default=list(CONFIGS))
    parser.add_argument("--types", nargs="+", choices=["fp16", "bf16"], default=["fp16", "bf16"])
    parser.add_argument("--front", help="a front.json: the digits model is compiled with a schedule of it")
    parser.add_argument("--pick", default="2x")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.dcc"
            arguments = model_of(name, options.steps)
            if name == "digits" and options.front:
                arguments |= {"schedule": options.front, "pick": options.pick}
            start = time.perf_counter()
            report = dcc.compile(output=path, max_batch=4, **arguments)
            del arguments
            for kind in options.types:
                dcc.build(path, target=TARGETS, dtype=kind, engine_cache=False)
            for row in rows(name, path, report.parameters):
                print("| " + " | ".join(row) + " |", flush=True)
            print(f"{name}: {time.perf_counter() - start:.0f} s in all", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
