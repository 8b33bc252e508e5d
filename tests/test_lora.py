"""A folded LoRA equals the adapter run beside the layer; what does not match is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcc.errors import LoadError
from dcc.frontend.lora import apply_lora

TOLERANCE = 1e-6  # float32 outputs of order one; the fold is rounded once


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(x).mean(dim=(2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def random_pair(rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], rank) * 0.1


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_equals_peft_unmerged(tmp_path: Path, rank_stabilised: bool) -> None:
    base = small()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["conv", "body.0", "body.2"], use_rslora=rank_stabilised,
        alpha_pattern={"body.2": 10}, rank_pattern={"body.0": 2},
    )  # fmt: skip
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = adapted(x)
        before = base(x)
        report = apply_lora(base, tmp_path, 1.0)
        assert (base(x) - expected).abs().max() <= TOLERANCE
    assert (expected - before).abs().max() > 0.01
    assert report.modules == {"conv": 4, "body.0": 2, "body.2": 4}
    assert report.parameters == 8 * 27 + 128 + 64
    assert report.source.startswith(f"{tmp_path / 'adapter_model.safetensors'} sha256:")


@pytest.mark.parametrize("prefixed", [False, True])
def test_files_that_diffusers_writes(tmp_path: Path, prefixed: bool) -> None:
    model, inputs, _ = zoo.sd3(depth=2)
    inner = copy.deepcopy(model.transformer)
    targets = ["to_q", "proj_out", "proj"]  # linears of attention and MLP, and the patch convolution
    inner.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False))
    inner.save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if prefixed:  # as a pipeline's save_lora_weights writes it
        with safe_open(path, "pt") as stream:
            state = {f"transformer.{key}": stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            stored = json.loads(stream.metadata()["lora_adapter_metadata"])
        stored = {f"transformer.{key}": value for key, value in stored.items()}
        save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(stored)})
    adapted = type(model)(inner)
    with torch.no_grad():
        expected, before = adapted(**inputs), model(**inputs)
        report = apply_lora(model, path, 1.0)
        assert (model(**inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (expected - before).abs().max() > 1e-2
    assert report.modules["transformer.pos_embed.proj"] == 3


@pytest.mark.parametrize(
    ("style", "alpha"),
    [
        ("transformer.body.0.lora_A.weight|transformer.body.0.lora_B.weight", None),
        ("base_model.model.body.0.lora_A.weight|base_model.model.body.0.lora_B.weight", None),
        ("body.0.lora_A.default.weight|body.0.lora_B.default.weight", None),
        ("body.0.lora_down.weight|body.0.lora_up.weight", "body.0.alpha"),
        ("lora_unet_body_0.lora_down.weight|lora_unet_body_0.lora_up.weight", "lora_unet_body_0.alpha"),
        ("body.0.lora.down.weight|body.0.lora.up.weight", None),
        ("body.0_lora.down.weight|body.0_lora.up.weight", None),
    ],
)
@pytest.mark.parametrize("form", ["module", "state_dict"])
def test_key_styles(tmp_path: Path, style: str, alpha: str | None, form: str) -> None:
    base = small()
    weight = base.body[0].weight.clone()
    down, up = random_pair(4, weight)
    down_key, up_key = style.split("|")
    tensors = {down_key: down, up_key: up}
    if alpha is not None:
        tensors[alpha] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = weight + 0.5 * (0.5 if alpha else 1.0) * up @ down
    if form == "module":
        report = apply_lora(base, tmp_path / "lora.safetensors", 0.5)
        result = base.body[0].weight
    else:
        state = base.state_dict()
        report = apply_lora(state, tmp_path / "lora.safetensors", 0.5)
        result = state["body.0.weight"]
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=0)
    assert report.modules == {"body.0": 4}


def test_two_files_add_up(tmp_path: Path) -> None:
    base = small()
    weight = base.body[0].weight.clone()
    total = weight.clone()
    for index, scale in enumerate((1.0, -0.7)):
        down, up = random_pair(2, weight)
        save_file(
            {"body.0.lora_A.weight": down, "body.0.lora_B.weight": up}, tmp_path / f"{index}.safetensors"
        )
        apply_lora(base, tmp_path / f"{index}.safetensors", scale)
        total += scale * up @ down
    torch.testing.assert_close(base.body[0].weight.data, total, atol=TOLERANCE, rtol=0)


def refused(tmp_path: Path, tensors: dict[str, Tensor], scale: float = 1.0) -> str:
    base = small()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoadError) as caught:
        apply_lora(base, path, scale)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    return str(caught.value).replace(str(path), "FILE")


def test_refuses_unmatched_keys(tmp_path: Path) -> None:
    down, up = random_pair(4, torch.zeros(16, 8))
    tensors = {
        "body.0.lora_A.weight": down,
        "body.0.lora_B.weight": up,
        "text_encoder.q.lora_A.weight": down.clone(),
        "body.0.lora_magnitude_vector": up[:, 0].clone(),
    }
    assert refused(tmp_path, tensors) == (
        "load: 2 of 4 LoRA tensors match no linear layer of the model\n"
        "  at    FILE\n"
        "  got   body.0.lora_magnitude_vector, text_encoder.q.lora_A.weight\n"
        "  want  a path such as body.0\n"
        "  next  use a LoRA that was trained for this transformer, without text encoders"
    )


def test_refuses_half_a_pair(tmp_path: Path) -> None:
    assert refused(tmp_path, {"body.0.lora_A.weight": torch.ones(4, 8)}) == (
        "load: half of a LoRA pair is missing\n"
        "  at    FILE\n"
        "  got   body.0.lora_A.weight\n"
        "  want  both A and B for each\n"
        "  next  export the LoRA again"
    )


def test_refuses_wrong_shapes(tmp_path: Path) -> None:
    tensors = {"body.0.lora_A.weight": torch.ones(4, 9), "body.0.lora_B.weight": torch.ones(16, 4)}
    assert refused(tmp_path, tensors) == (
        "load: the LoRA of 'body.0' has the wrong shape\n"
        "  at    FILE\n"
        "  got   A [4, 9], B [16, 4]\n"
        "  want  for a weight [16, 8]\n"
        "  next  use a LoRA that was trained for this model"
    )


def test_refuses_non_finite_values(tmp_path: Path) -> None:
    tensors = {
        "body.0.lora_A.weight": torch.full((4, 8), float("nan")),
        "body.0.lora_B.weight": torch.ones(16, 4),
    }
    assert refused(tmp_path, tensors) == (
        "load: the LoRA of 'body.0' is not finite\n  at    FILE\n  next  train or export it again"
    )
    assert refused(tmp_path, tensors, float("inf")) == (
        "load: the LoRA scale must be a finite number\n  at    FILE\n  got   inf\n  next  --lora file:1.0"
    )


def test_refuses_dora_and_missing_files(tmp_path: Path) -> None:
    save_file({"body.0.lora_A.weight": torch.ones(4, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(LoadError, match=r"the adapter is not a plain LoRA\n.*\n  got   use_dora"):
        apply_lora(small(), tmp_path, 1.0)
    with pytest.raises(LoadError, match="no such file or folder"):
        apply_lora(small(), tmp_path / "absent.safetensors", 1.0)
