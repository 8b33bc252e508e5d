"""Every family from the traced model to an artifact: what it computes without torch is what eager torch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from compiled import NULLS, SAMPLERS, STEPS, relative_difference, write_artifact
from random_graphs import Sketch, aten, random_inputs

from dcc.frontend.families import PixArtAdapter
from dcc.frontend.trace import trace
from dcc.ir.interpret import run_graph
from dcc.runtime import load
from dcc.tolerances import TOLERANCE

LIMIT = TOLERANCE["float32"]


def batch_of(inputs: dict[str, torch.Tensor], rows: int, names: list[str]) -> dict[str, torch.Tensor]:
    """`rows` different rows of the example: its own and shifted ones; timesteps are distinct."""
    made = {}
    for name, value in inputs.items():
        if name not in names:
            made[name] = value
        elif value.is_floating_point():
            made[name] = torch.cat([value, 0.7 * value + 0.1, 0.3 * value - 0.2])[:rows]
        else:
            made[name] = torch.cat([value, (value + 1) % 10, (value + 2) % 10])[:rows]
    return made


def batched(loaded: Any) -> list[str]:
    return [item.name for item in loaded.plan.inputs if item.shape[:1] == ("B",)]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_forward_equals_eager(name: str, artifact: Callable, model: Callable) -> None:
    module, example, _ = model(name)
    loaded = load(artifact(name))
    for rows in (1, 3):
        inputs = batch_of(example, rows, batched(loaded))
        with torch.no_grad():
            wanted = module(**inputs).numpy()
        got = loaded.denoise(**{key: value.numpy() for key, value in inputs.items()})
        assert got.dtype == np.float32
        assert relative_difference(got, wanted) <= LIMIT.forward


def test_a_mask_of_text_tokens_reaches_every_query(tmp_path: Path) -> None:
    """As diffusers gives it to PixArt: one row of keys for all image tokens, different for each image."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    module = PixArtAdapter(zoo.randomise_constants(transformer)).eval()
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    example = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 6, 12), "encoder_attention_mask": mask,
    }  # fmt: skip
    roles = dict.fromkeys(example, "condition") | {"hidden_states": "latent", "timestep": "timestep"}
    write_artifact(trace(module, dict(example), roles, name="masked", rows=4), tmp_path / "masked.dcc")
    with torch.no_grad():
        wanted, unmasked = (module(**{**example, "encoder_attention_mask": m}).numpy() for m in (mask, mask * 0 + 1))
    got = load(tmp_path / "masked.dcc").denoise(**{key: value.numpy() for key, value in example.items()})
    assert relative_difference(got, wanted) <= LIMIT.forward < relative_difference(unmasked, wanted)


def scheduler_of(name: str) -> Any:
    sampler, options = SAMPLERS.get(name, ("ddim", {}))
    kinds = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "flow-euler": "FlowMatchEulerDiscreteScheduler"}
    return getattr(diffusers, kinds[sampler])(**options)


def eager_loop(name: str, module: Any, latent: str, timestep: str, conditions: dict[str, Any], scale: float) -> Any:
    """The plain loop: the module and the diffusers scheduler, both halves of guidance in one batch."""
    scheduler, generator = scheduler_of(name), torch.Generator().manual_seed(7)
    scheduler.set_timesteps(STEPS)
    nulls = NULLS.get(name, {})
    shape = conditions.pop("latent shape")
    x = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        inputs = {latent: scaled, **conditions}
        if nulls:
            inputs = {key: torch.cat([value, value if key == latent else torch.full_like(value, int(nulls[key]))])
                      for key, value in inputs.items()}  # fmt: skip
        times = torch.full((inputs[latent].shape[0],), float(time))
        output = module(**{**inputs, timestep: times})
        if nulls:
            channels = 4 if name == "diffusers_dit" else None
            wanted, null = output.chunk(2)
            mixed = null[:, :channels] + scale * (wanted[:, :channels] - null[:, :channels])
            output = torch.cat([mixed, wanted[:, mixed.shape[1] :]], dim=1)
        x = scheduler.step(output, time, x, **({"generator": generator} if name != "flux" else {})).prev_sample
    return x.numpy()


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "pixart"])
def test_the_sampling_loop_equals_pytorch_and_diffusers(name: str, artifact: Callable, model: Callable) -> None:
    module, example, roles = model(name)
    latent, timestep = (next(key for key, role in roles.items() if role == wanted) for wanted in ("latent", "timestep"))
    conditions = {key: value for key, value in example.items() if roles[key] == "condition"}
    loaded = load(artifact(name))
    guidance = {"guidance_scale": 2.5} if name in NULLS else {}
    got = loaded.sample({key: value.numpy() for key, value in conditions.items()}, images=2, seed=7, **guidance)
    with torch.no_grad():
        shape = {"latent shape": example[latent].shape}
        wanted = eager_loop(name, module, latent, timestep, conditions | shape, 2.5)
    assert got.shape == wanted.shape
    assert relative_difference(got, wanted) <= LIMIT.loop


def test_granularity_and_level_do_not_change_what_is_computed(artifact: Callable, model: Callable) -> None:
    example = {key: value.numpy() for key, value in model("dit").example_inputs.items()}
    loaded = {
        (granularity, level): load(artifact("dit", granularity, level))
        for granularity, level in (("component", 1), ("step", 1), ("component", 0))
    }
    kinds = {key: [engine.kind for engine in item.plan.engines] for key, item in loaded.items()}
    assert kinds["component", 0] == ["step"] * 8  # the first glue, six components with the light stages after, the last
    assert kinds["component", 1] == ["timestep", "request", "table"] + ["step"] * 8
    assert kinds["step", 1] == ["timestep", "request", "table", "step"]
    outputs = [item.denoise(**example) for item in loaded.values()]
    samples = [item.sample({"y": [1, 2]}, seed=3) for item in loaded.values()]
    for got in (outputs, samples):
        assert relative_difference(got[1], got[0]) <= LIMIT.forward
        assert relative_difference(got[2], got[0]) <= LIMIT.forward


def test_every_weight_is_stored_once(artifact: Callable, model: Callable) -> None:
    """Bytes of the weights that a plan holds: the module's, whatever the number of engines."""
    plan = load(artifact("dit")).plan
    parameters = sum(value.numel() for value in model("dit").module.parameters())
    stored = sum(weight.nbytes for weight in plan.weights if not weight.name.startswith(("table.", "folded.")))
    buffers = sum(value.numel() for value in model("dit").module.buffers())
    assert 4 * parameters <= stored <= 4 * (parameters + buffers)
    owners = [name for engine in plan.engines for name in engine.weights]
    assert len(owners) == len(set(owners))


def collision() -> Any:
    """A parameter at the root of the module may have the name of an input, or of a value."""
    s = Sketch()
    x, t = s.latent(), s.timestep()
    shifted = s.add(x, s.weight("x", 4))
    scaled = s.mul(shifted, s.weight("add", 4))
    return s.program(s.add(s.linear(scaled, "linear", 4), s.embed(t)))


def heads_in_the_batch() -> Any:
    """Keys and values of the text as [B * heads, L, D], the old way to write attention."""
    s = Sketch()
    x, t, c = s.latent(6, 4), s.timestep(), s.condition(5, 4)

    def heads(value: Any, tokens: int) -> Any:
        split = s.op(aten.permute.default, s.op(aten.reshape.default, value, [-1, tokens, 2, 2]), [0, 2, 1, 3])
        return s.op(aten.reshape.default, split, [-1, tokens, 2])

    keys = s.op(aten.transpose.int, heads(s.linear(c, "k", 4), 5), 1, 2)
    h = s.linear(x, "embed", 4)
    scores = s.op(aten.softmax.int, s.op(aten.bmm.default, heads(s.linear(h, "q", 4), 6), keys), -1)
    mixed = s.op(aten.bmm.default, scores, heads(s.linear(c, "v", 4), 5))
    merged = s.op(aten.permute.default, s.op(aten.reshape.default, mixed, [-1, 2, 6, 2]), [0, 2, 1, 3])
    branch = s.linear(s.op(aten.reshape.default, merged, [-1, 6, 4]), "out", 4)
    return s.program(s.add(s.add(h, branch), s.op(aten.unsqueeze.default, s.embed(t), 1)))


def nothing_of_the_latent_in_the_gate() -> Any:
    """A timestep that only scales, no condition, and a request port without rows."""
    s = Sketch()
    x, t, ids = s.latent(6, 4), s.timestep(), s.input("ids", "condition", 6, 3)
    positions = s.op(aten.sin.default, s.linear(ids, "positions", 4))
    gate = s.op(aten.unsqueeze.default, s.op(aten.silu.default, s.embed(t)), 1)
    both = s.mul(gate, s.op(aten.tanh.default, positions))
    h = s.linear(x, "embed", 4)
    return s.program(s.add(h, s.mul(s.linear(s.add(h, positions), "body", 4), s.linear(both, "mix", 4))))


@pytest.mark.parametrize("make", [collision, heads_in_the_batch, nothing_of_the_latent_in_the_gate])
def test_hand_made_models_lower_exactly(make: Callable[[], Any], tmp_path: Any) -> None:
    program = make()
    inputs = random_inputs(program)
    wanted = run_graph(program, inputs).numpy()
    write_artifact(program, tmp_path / "model.dcc")
    got = load(tmp_path / "model.dcc").denoise(**{key: value.numpy() for key, value in inputs.items()})
    assert relative_difference(got, wanted) <= LIMIT.forward
