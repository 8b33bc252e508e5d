"""The models that other tests stand on: small, equal in every process, sensitive to each of their inputs."""

from __future__ import annotations

import pytest
import torch
import zoo

MODELS = {
    **zoo.MODELS,
    "pixart_mask": lambda: zoo.pixart(mask=True),
    "flux_schnell": lambda: zoo.flux(guidance=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_input_matters(name: str) -> None:
    module, inputs, roles = MODELS[name]()
    again = MODELS[name]().module
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert sum(value.numel() for value in module.parameters()) <= 200_000
    assert not any(bool((value == 0).all()) for value in module.parameters())
    assert list(roles) == list(inputs)
    assert sorted(set(roles.values())) == ["condition", "latent", "timestep"]
    with torch.no_grad():
        output = module(**inputs)
        for key, value in inputs.items():
            other = value + 1 if key != "class_labels" and key != "y" else value - 2
            other = 1 - value if key == "encoder_attention_mask" else other
            other = value * torch.arange(1, len(value) + 1)[:, None] if key == "img_ids" else other
            other = torch.arange(value.numel()).reshape(value.shape).float() if key == "txt_ids" else other
            assert (module(**{**inputs, key: other}) - output).abs().max() > 1e-4, key


def test_easycontrol_condition_rows_do_not_see_the_image() -> None:
    module, inputs, _ = zoo.easycontrol(depth=3)
    seen: list[torch.Tensor] = []
    for block in module.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    with torch.no_grad():
        module(**inputs)
        module(**{**inputs, "x": inputs["x"] + 1, "t": inputs["t"] / 2})
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "depth", "tokens"), [(64, 2, 64), (48, 4, 25)])
def test_easycontrol_scales(width: int, depth: int, tokens: int) -> None:
    module, inputs, _ = zoo.easycontrol(width=width, depth=depth, tokens=tokens)
    with torch.no_grad():
        assert module(**inputs).shape == inputs["x"].shape
    with pytest.raises(ValueError, match="tokens must be a square"):
        zoo.easycontrol(tokens=24)
