"""Every input form loads to the same outputs; every wrong input is one message with the next step."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor, nn

from dcc.errors import LoadError
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.load import LoadedModel, load_model

SAMPLER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("made_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model() -> DiT:
    module = zoo.dit(depth=2, learn_sigma=True).module
    assert isinstance(module, DiT)
    return module


def payload(model: DiT, /, **changes: Any) -> dict[str, Any]:
    return {
        "arch": "dit",
        "config": model.config.to_dict(),
        "sampler": SAMPLER,
        "state_dict": model.state_dict(),
    } | changes


def run(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return module(**inputs)


def assert_same(loaded: LoadedModel, original: nn.Module) -> None:
    assert isinstance(loaded.module, nn.Module)
    assert not any(part.training for part in loaded.module.modules())
    assert all(value.dtype == torch.float32 for value in loaded.module.parameters())
    assert torch.equal(run(loaded.module, loaded.example_inputs), run(original, loaded.example_inputs))


def message(*args: Any, hide: Path | None = None, **kwargs: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(*args, **kwargs)
    text = str(caught.value)
    return text.replace(str(hide), "FILE") if hide is not None else text


# --- state dicts of our DiT ---------------------------------------------------------------------------------


def test_checkpoint_with_config(work: Path, model: DiT) -> None:
    torch.save(payload(model), work / "dit digits.pt")
    loaded = load_model(work / "dit digits.pt")
    assert_same(loaded, model)
    assert loaded.name == "dit_digits"
    assert loaded.roles == {"x": "latent", "t": "timestep", "y": "condition"}
    assert (loaded.nulls, loaded.ranges) == ({"y": 10}, {"y": (0, 10)})
    assert loaded.sampler_config == SAMPLER
    assert (loaded.learned_variance, loaded.latent_channels) == (True, 3)
    assert loaded.parameters == sum(value.numel() for value in model.parameters())
    assert loaded.source.startswith(f"{work / 'dit digits.pt'} sha256:")
    assert len(loaded.source.rpartition(":")[2]) == 64
    assert {name: value.shape[0] for name, value in loaded.example_inputs.items()} == {"x": 2, "t": 2, "y": 2}
    assert loaded.unbatched == ()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_raw_state_dict_is_recognised(work: Path, model: DiT, suffix: str) -> None:
    torch.save(model.state_dict(), work / f"raw{suffix}")
    assert_same(load_model(work / f"raw{suffix}", arch="dit:num_heads=4"), model)


def test_released_widths_imply_the_heads(work: Path) -> None:
    config = DiTConfig(
        input_size=4, patch_size=4, in_channels=2, hidden_size=384, depth=1, num_heads=6, num_classes=3
    )
    small = zoo.build(lambda: DiT(config))
    torch.save(small.state_dict(), work / "s.pt")
    loaded = load_model(work / "s.pt")
    assert isinstance(loaded.module, DiT)
    assert loaded.module.config == config
    assert_same(loaded, small)


@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
def test_nested_state_dicts(work: Path, model: DiT, key: str) -> None:
    command = argparse.Namespace(model="DiT-S/2", image_size=256)
    torch.save({"opt": {"lr": 0.1}, "args": command, key: model.state_dict()}, work / "train.pt")
    assert_same(load_model(work / "train.pt", arch="dit:num_heads=4"), model)


def test_ema_is_preferred(work: Path, model: DiT) -> None:
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save(payload(model, model=other, ema=model.state_dict()), work / "train.pt")
    assert_same(load_model(work / "train.pt"), model)


def test_wrapper_prefixes_and_half_precision(work: Path, model: DiT) -> None:
    state = {f"module._orig_mod.{name}": value.bfloat16() for name, value in model.state_dict().items()}
    torch.save(payload(model, state_dict=state), work / "half.pt")
    loaded = load_model(work / "half.pt")
    expected = zoo.dit(depth=2, learn_sigma=True).module.bfloat16().float()
    assert_same(loaded, expected)


def test_legacy_torch_format(work: Path, model: DiT) -> None:
    torch.save(payload(model), work / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load_model(work / "old.pt"), model)


def test_arch_overrides_the_stored_config(work: Path, model: DiT) -> None:
    torch.save(payload(model), work / "m.pt")
    loaded = load_model(work / "m.pt", arch="dit:num_heads=2")
    assert isinstance(loaded.module, DiT)
    assert loaded.module.config.num_heads == 2


# --- safetensors ------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("where", ["sibling", "flat sibling", "metadata"])
def test_safetensors(work: Path, model: DiT, where: str) -> None:
    config = model.config.to_dict()
    metadata = {"config": json.dumps(config), "sampler": json.dumps(SAMPLER)} if where == "metadata" else None
    save_file(state_of(model), work / "m.safetensors", metadata=metadata)
    if where == "sibling":
        (work / "config.json").write_text(json.dumps({"arch": "dit", "config": config, "sampler": SAMPLER}))
    elif where == "flat sibling":
        (work / "config.json").write_text(json.dumps({**config, "image_size": 256}))
    loaded = load_model(work / "m.safetensors")
    assert_same(loaded, model)
    assert loaded.sampler_config == (None if where == "flat sibling" else SAMPLER)


def sharded(folder: Path, state: dict[str, Tensor], stem: str) -> Path:
    names = sorted(state)
    half = len(names) // 2
    files = {
        f"{stem}-00001-of-00002.safetensors": names[:half],
        f"{stem}-00002-of-00002.safetensors": names[half:],
    }
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors(work: Path, model: DiT) -> None:
    index = sharded(work, state_of(model), "m")
    loaded = load_model(index, arch="dit:num_heads=4")
    assert_same(loaded, model)
    assert loaded.name == "m"
    (work / "m-00002-of-00002.safetensors").unlink()
    assert message(index, hide=index) == (
        "load: 1 of 2 shards are missing\n"
        "  at    FILE\n"
        "  got   m-00002-of-00002.safetensors\n"
        "  next  download them into the same folder"
    )
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert message(index, hide=index) == (
        "load: the index names files outside its folder\n"
        "  at    FILE\n"
        "  got   ../secret.safetensors\n"
        "  next  check the index"
    )


# --- diffusers --------------------------------------------------------------------------------------------

FAMILIES = ["diffusers_dit", "pixart", "sd3", "sd35", "flux", "wan"]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_transformer_folder(work: Path, family: str) -> None:
    original, inputs, roles = zoo.MODELS[family]()
    original.transformer.save_pretrained(work / "transformer")
    # FLUX and Wan are shown at released sizes; the tiny inputs replace them.
    loaded = load_model(work / "transformer", example_inputs=inputs)
    assert {name: loaded.roles[name] for name in roles} == roles
    assert torch.equal(run(loaded.module, inputs), run(original, inputs))
    assert loaded.learned_variance == (family in ("diffusers_dit", "pixart"))
    assert loaded.latent_channels == inputs["hidden_states"].shape[2 if family == "flux" else 1]
    assert loaded.unbatched == (("img_ids", "txt_ids") if family == "flux" else ())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_example_inputs_without_being_told(family: str) -> None:
    original, inputs, _ = zoo.MODELS[family]()
    loaded = load_model(original.transformer)
    assert set(inputs) <= set(loaded.example_inputs)
    for name, value in inputs.items():
        known = loaded.example_inputs[name]
        assert (known.dim(), known.dtype) == (value.dim(), value.dtype), name
    assert loaded.learned_variance == (family in ("diffusers_dit", "pixart"))
    if family not in ("flux", "wan"):  # thousands of tokens
        assert run(loaded.module, loaded.example_inputs).isfinite().all()
    if family == "diffusers_dit":
        assert (loaded.nulls, loaded.ranges) == ({"class_labels": 10}, {"class_labels": (0, 10)})


def test_diffusers_pipeline_folder(work: Path) -> None:
    original, _, _ = zoo.diffusers_dit()
    original.transformer.save_pretrained(work / "DiT-tiny" / "transformer", max_shard_size="100KB")
    assert (work / "DiT-tiny/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (work / "DiT-tiny" / "model_index.json").write_text(json.dumps(index))
    (work / "DiT-tiny" / "scheduler").mkdir()
    (work / "DiT-tiny" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SAMPLER))
    for source in (work / "DiT-tiny", work / "DiT-tiny" / "transformer"):
        loaded = load_model(source)
        assert_same(loaded, original)
        assert loaded.name == "dit_tiny"
        assert loaded.sampler_config == (SAMPLER if source.name == "DiT-tiny" else None)
    (work / "DiT-tiny" / "model_index.json").write_text(
        json.dumps({**index, "transformer_2": ["diffusers", "X"]})
    )
    assert message(work / "DiT-tiny", hide=work / "DiT-tiny") == (
        "load: the pipeline is not made of one transformer\n"
        "  at    FILE\n"
        "  got   transformer, transformer_2\n"
        "  want  one 'transformer'\n"
        "  next  give the folder of one transformer"
    )


def test_diffusers_bin_and_weight_file(work: Path) -> None:
    original, _, _ = zoo.diffusers_dit()
    original.transformer.save_pretrained(work / "t")
    file = work / "t" / "diffusion_pytorch_model.safetensors"
    assert_same(load_model(file), original)
    file.unlink()
    torch.save(original.transformer.state_dict(), work / "t" / "diffusion_pytorch_model.bin")
    assert_same(load_model(work / "t"), original)


def test_diffusers_weights_that_do_not_fit(work: Path) -> None:
    original, _, _ = zoo.diffusers_dit()
    original.transformer.save_pretrained(work / "t")
    config = json.loads((work / "t" / "config.json").read_text())
    (work / "t" / "config.json").write_text(json.dumps({**config, "num_layers": 3, "in_channels": 5}))
    text = message(work / "t", hide=work / "t")
    assert text.startswith(
        "load: the weights do not fit 'DiTTransformer2DModel': 19 missing, 1 mis-shaped of 63 tensors"
    )
    assert "got   shapes pos_embed.proj.weight [32, 4, 2, 2]" in text
    (work / "t" / "config.json").write_text(json.dumps({**config, "norm_type": "other"}))
    assert "diffusers cannot build DiTTransformer2DModel from this config" in message(work / "t")
    (work / "t" / "config.json").write_text(json.dumps({"_class_name": "HunyuanDiT2DModel"}))
    assert message(work / "t", hide=work / "t") == (
        "load: 'HunyuanDiT2DModel' is not a known diffusers family\n"
        "  at    FILE/config.json\n"
        "  want  DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel,"
        " FluxTransformer2DModel, WanTransformer3DModel\n"
        "  next  give the model as package.module:factory with example inputs"
    )


def test_padding_mask_changes_the_answer() -> None:
    module, inputs, _ = zoo.pixart(mask=True)
    cut = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]}
    cut["encoder_attention_mask"] = torch.ones(2, 3)
    # The second sample keeps half of its tokens; the other half must not be seen.
    torch.testing.assert_close(run(module, inputs)[1], run(module, cut)[1], atol=1e-5, rtol=0)
    assert (run(module, inputs)[0] - run(module, cut)[0]).abs().max() > 1e-3


# --- modules, exported programs, factories, pickles ---------------------------------------------------------


class TwoInputs(nn.Module):
    """A denoiser of no known family; the output has twice the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, z: Tensor, sigma: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.linear(z.movedim(1, -1)).movedim(-1, 1) * sigma.reshape(-1, 1, 1, 1)
        return y if text is None else y + text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)


def two_inputs(batch: int = 1) -> dict[str, Tensor]:
    return {
        "z": torch.randn(batch, 4, 6, 6),
        "sigma": torch.full((batch,), 0.5),
        "text": torch.randn(batch, 3, 5),
    }


def test_module_object() -> None:
    module = TwoInputs().double()
    inputs = {name: value.double() for name, value in two_inputs().items()}
    loaded = load_model(module, example_inputs=inputs)
    assert module.training and module.linear.weight.dtype == torch.float64  # the caller's module is untouched
    assert loaded.roles == {"z": "latent", "sigma": "timestep", "text": "condition"}
    assert (loaded.learned_variance, loaded.latent_channels, loaded.name) == (True, 4, "twoinputs")
    assert all(
        value.shape[0] == 2 and value.dtype == torch.float32 for value in loaded.example_inputs.values()
    )
    assert run(loaded.module, loaded.example_inputs).shape == (2, 8, 6, 6)


def test_our_dit_as_an_object_needs_nothing(model: DiT) -> None:
    loaded = load_model(model)
    assert loaded.module is model
    assert loaded.nulls == {"y": 10}


def test_exported_program(work: Path, model: DiT) -> None:
    inputs = zoo.dit(depth=2).example_inputs
    batch = torch.export.Dim("B", max=16)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
    torch.export.save(program, work / "m.pt2")
    for source in (work / "m.pt2", program):
        loaded = load_model(source)
        assert isinstance(loaded.module, torch.export.ExportedProgram)
        assert loaded.roles == {"x": "latent", "t": "timestep", "y": "condition"}
        assert (loaded.learned_variance, loaded.latent_channels) == (True, 3)
        assert torch.equal(
            run(loaded.module.module(), loaded.example_inputs), run(model, loaded.example_inputs)
        )


def test_positional_exported_program(work: Path) -> None:
    module = TwoInputs().eval()
    program = torch.export.export(module, tuple(two_inputs(2).values()))
    torch.export.save(program, work / "m.pt2")
    assert load_model(work / "m.pt2").roles == {"z": "latent", "sigma": "timestep", "text": "condition"}


class Runs:
    """Unpickling it writes a file: what a hostile checkpoint would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


def test_an_exported_program_with_pickles_is_refused(work: Path, model: DiT) -> None:
    inputs = zoo.dit(depth=2).example_inputs
    program = torch.export.export(model, (), inputs)
    program.example_inputs = ((), {**inputs, "x": Runs()})  # type: ignore[assignment]
    torch.export.save(program, work / "m.pt2")
    text = message(work / "m.pt2")
    assert not (work / "pwned").exists()
    assert "the exported program carries pickled objects, which run code when they are read" in text
    assert "got   io.open" in text or "got   _io.open" in text


@pytest.mark.parametrize(
    "expression", ["exec(chr(49))", "__import__('os').getcwd()", "(1).bit_length()", "Symbol('x')"]
)
def test_a_size_that_calls_something_is_refused(work: Path, expression: str) -> None:
    batch = torch.export.Dim("B", max=16)
    names = two_inputs(2)
    program = torch.export.export(
        TwoInputs().eval(), (), names, dynamic_shapes={name: {0: batch} for name in names}
    )
    torch.export.save(program, work / "good.pt2")
    assert load_model("good.pt2").roles["z"] == "latent"
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for member in good.namelist():
            content = good.read(member)
            if member.endswith("models/model.json"):
                content = re.sub(
                    rb'"expr_str": "[^"]*"', b'"expr_str": "%s"' % expression.encode(), content, count=1
                )
            bad.writestr(member, content)
    assert message("bad.pt2") == (
        "load: a size in the exported program is not a size\n"
        "  at    bad.pt2\n"
        f"  got   {expression!r}\n"
        "  next  if you trust the file's author: --trust-pickle (Python: trust_pickle=True);"
        " else save its state_dict()"
    )


def test_factories(work: Path) -> None:
    (work / "made_factory.py").write_text(
        "import torch, test_load\n"
        "def pair():\n    return test_load.TwoInputs(), test_load.two_inputs()\n"
        "def table():\n"
        "    return {'module': test_load.TwoInputs(), 'example_inputs': test_load.two_inputs(2),\n"
        "            'nulls': {'text': 0.0}, 'name': 'mine', 'learned_variance': False,\n"
        "            'sampler_config': {'_class_name': 'DDIMScheduler'}}\n"
        "def bare():\n    return test_load.TwoInputs()\n"
        "def wrong():\n    return {'module': test_load.TwoInputs(), 'ranks': 3}\n"
        "def nothing():\n    return 3\n"
        "def fails():\n    raise KeyError('weights')\n"
        "class Nested:\n    pair = staticmethod(pair)\n"
        "text = 'x'\n"
    )
    loaded = load_model("made_factory:pair")
    assert (loaded.name, loaded.source, loaded.learned_variance) == ("pair", "made_factory:pair", True)
    assert load_model("made_factory:Nested.pair").roles["sigma"] == "timestep"
    table = load_model("made_factory:table", roles={"text": "condition"})
    assert (table.name, table.nulls, table.learned_variance) == ("mine", {"text": 0.0}, False)
    assert table.sampler_config == {"_class_name": "DDIMScheduler"}
    assert load_model("made_factory:bare", example_inputs=two_inputs()).latent_channels == 4
    assert str(work) not in sys.path
    assert message("made_factory:bare") == (
        "load: example inputs are needed: the model is of no known family\n"
        "  at    made_factory:bare\n"
        "  got   forward(z, sigma, text)\n"
        "  want  one tensor per argument, batch 2\n"
        "  next  example_inputs={z: ..., sigma: ...}, or a factory that returns (module, example_inputs)"
    )
    assert "the factory returned an unknown field 'ranks'" in message("made_factory:wrong")
    assert message("made_factory:nothing") == (
        "load: the factory returned no module\n"
        "  at    made_factory:nothing\n"
        "  got   int\n"
        "  want  a module, (module, example_inputs), or a mapping with 'module' and LoadedModel's fields\n"
        "  next  return one of these"
    )
    assert message("made_factory:fails") == (
        "load: the factory failed\n"
        "  at    made_factory:fails\n"
        "  got   KeyError: 'weights'\n"
        "  want  a function without required arguments\n"
        "  next  run it in Python to see the whole traceback"
    )
    assert "'made_factory' has no 'absent'" in message("made_factory:absent")
    assert "the factory is not callable" in message("made_factory:text")
    assert "--arch does not apply to a factory" in message("made_factory:pair", arch="dit")


def test_factory_import_errors(work: Path) -> None:
    assert message("made_absent:make") == (
        "load: no module named 'made_absent'\n"
        "  at    made_absent:make\n"
        "  want  a module on sys.path or in the current directory\n"
        "  next  run from its folder, or install its package"
    )
    (work / "made_broken.py").write_text("import made_dependency\n")
    assert message("made_broken:make") == (
        "load: importing 'made_broken' failed\n"
        "  at    made_broken:make\n"
        "  got   ModuleNotFoundError: No module named 'made_dependency'\n"
        "  next  make `python -c 'import made_broken'` work"
    )
    (work / "made_syntax.py").write_text("def make(:\n")
    assert "got   SyntaxError: " in message("made_syntax:make")


def test_pickled_module(work: Path, model: DiT) -> None:
    torch.save(model, work / "whole.pt")
    text = message(work / "whole.pt", hide=work / "whole.pt")
    assert text == (
        "load: the file holds pickled Python objects, which run code when they are read\n"
        "  at    FILE\n"
        "  got   dcc.frontend.dit.DiT\n"
        "  want  tensors and plain values only\n"
        "  next  if you trust the file's author: --trust-pickle (Python: trust_pickle=True);"
        " else save its state_dict()"
    )
    assert_same(load_model(work / "whole.pt", trust_pickle=True), model)
    torch.save({"ema": model, "step": 3}, work / "nested.pt")
    assert_same(load_model(work / "nested.pt", trust_pickle=True), model)
    torch.save({"state_dict": model.state_dict(), "x": Runs()}, work / "hostile.pt")
    assert "pickled Python objects" in message(work / "hostile.pt")
    assert not (work / "pwned").exists()


# --- roles ------------------------------------------------------------------------------------------------


class Unusual(nn.Module):
    def forward(self, noisy: Tensor, x: Tensor, clock: Tensor) -> Tensor:
        return noisy + x + clock.reshape(-1, 1)


def test_roles_given_and_open() -> None:
    inputs = {"noisy": torch.randn(2, 4), "x": torch.randn(2, 4), "clock": torch.rand(2)}
    given = {"noisy": "latent", "clock": "timestep"}
    loaded = load_model(Unusual(), example_inputs=inputs, roles=given)
    assert loaded.roles == {"noisy": "latent", "x": "condition", "clock": "timestep"}
    assert message(Unusual(), example_inputs=inputs) == (
        "load: cannot tell which argument is the timestep\n"
        "  got   arguments noisy, x, clock\n"
        "  want  one of them named as the timestep\n"
        "  next  --role noisy=timestep (Python: roles={'noisy': 'timestep'})"
    )
    assert "unknown role 'noise' for 'x'" in message(Unusual(), example_inputs=inputs, roles={"x": "noise"})
    assert "a role is given for 'y', which is not an argument" in message(
        Unusual(), example_inputs=inputs, roles={"y": "latent"}
    )
    assert "2 arguments are given as the latent" in message(
        Unusual(), example_inputs=inputs, roles={"x": "latent", "noisy": "latent"}
    )


class TwoLatents(nn.Module):
    def forward(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return x + z + t.reshape(-1, 1)


def test_two_possible_latents() -> None:
    inputs = {"x": torch.randn(2, 4), "z": torch.randn(2, 4), "t": torch.rand(2)}
    assert message(TwoLatents(), example_inputs=inputs) == (
        "load: cannot tell which argument is the latent\n"
        "  got   arguments x, z, t; x, z could all be it\n"
        "  want  one of them named as the latent\n"
        "  next  --role x=latent (Python: roles={'x': 'latent'})"
    )


def test_example_inputs_that_do_not_fit() -> None:
    good = two_inputs()
    assert "forward has no argument 'extra'" in message(
        TwoInputs(), example_inputs={**good, "extra": torch.ones(1)}
    )
    assert "example inputs are missing" in message(TwoInputs(), example_inputs={"z": good["z"]})
    assert "example input 'sigma' is not a tensor" in message(
        TwoInputs(), example_inputs={**good, "sigma": 0.5}
    )
    bad = {**good, "z": torch.randn(1, 5, 6, 6)}
    assert message(TwoInputs(), example_inputs=bad) == (
        "load: forward fails on the example inputs\n"
        "  at    TwoInputs\n"
        "  got   RuntimeError: mat1 and mat2 shapes cannot be multiplied (72x5 and 4x8)\n"
        "  want  a tensor from z [2, 5, 6, 6], sigma [2], text [2, 3, 5]\n"
        "  next  correct the example inputs; all are passed by keyword"
    )


# --- wrong files --------------------------------------------------------------------------------------------


def test_missing_and_empty_files(work: Path) -> None:
    assert message("absent.pt") == "load: no such file or folder\n  at    absent.pt\n  next  check the path"
    for name in ("empty.pt", "empty.safetensors", "empty.pt2"):
        (work / name).touch()
        assert message(name) == f"load: the file is empty\n  at    {name}\n  next  copy or download it again"
    (work / "folder").mkdir()
    assert message("folder") == (
        "load: the folder holds no model config\n"
        "  at    folder\n"
        "  want  model_index.json, or config.json with _class_name\n"
        "  next  give a diffusers pipeline, its transformer folder, or a weight file"
    )
    (work / "model.onnx").write_text("x")
    assert message("model.onnx") == (
        "load: unknown kind of file\n"
        "  at    model.onnx\n"
        "  got   suffix '.onnx'\n"
        "  want  .pt, .pth, .safetensors, a diffusers folder, .pt2, or package.module:factory\n"
        "  next  rename or convert it"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.pt", "a torch file"), ("m.safetensors", "a safetensors file"), ("m.pt2", "an exported program")],
)
def test_files_that_are_something_else(work: Path, name: str, kind: str) -> None:
    for content in (
        b"not a model at all\n" * 9,
        bytes(200),
        b"PK\x03\x04" + bytes(80),
        random.Random(0).randbytes(500),
    ):
        (work / name).write_bytes(content)
        assert message(name).startswith(f"load: the file is damaged or not {kind}\n  at    {name}\n  got   ")


def test_random_damage_is_one_error(work: Path, model: DiT) -> None:
    torch.save(payload(model), work / "good.pt")
    torch.save(payload(model), work / "old.pt", _use_new_zipfile_serialization=False)
    save_file(
        state_of(model), work / "good.safetensors", metadata={"config": json.dumps(model.config.to_dict())}
    )
    chance = random.Random(1)
    for name in ("good.pt", "old.pt", "good.safetensors"):
        content = (work / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            if chance.random() < 0.4:
                del damaged[chance.randrange(1, len(damaged)) :]
            else:  # names and headers are at the ends
                for _ in range(3):
                    place = chance.randrange(2000) * chance.choice((1, -1))
                    damaged[place] ^= 1 << chance.randrange(8)
            broken = work / f"broken{Path(name).suffix}"
            broken.write_bytes(damaged)
            try:
                load_model(broken)
            except LoadError as error:
                assert "\n  next  " in str(error)


def test_keys_that_do_not_fit(work: Path, model: DiT) -> None:
    state = dict(model.state_dict())
    state["extra.weight"] = torch.ones(2, 3)
    state["blocks.0.attn.proj.weight"] = torch.ones(32, 31)
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    torch.save(payload(model, state_dict=state), work / "m.pt")
    assert message(work / "m.pt", hide=work / "m.pt") == (
        "load: the weights do not fit 'dit': 10 missing, 1 unexpected, 1 mis-shaped of 32 tensors\n"
        "  at    FILE\n"
        "  got   unexpected extra.weight [2, 3]; shapes blocks.0.attn.proj.weight [32, 31]\n"
        "  want  missing blocks.1.attn.qkv.weight [96, 32], blocks.1.attn.qkv.bias [96],"
        " blocks.1.attn.proj.weight [32, 32], blocks.1.attn.proj.bias [32], blocks.1.mlp.fc1.weight [128, 32]"
        " and 5 more; shapes blocks.0.attn.proj.weight [32, 32]\n"
        "  next  correct the stored config, or say it: --arch dit:key=value,..."
    )


def test_weights_that_are_not_finite(work: Path, model: DiT) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["x_embedder.proj.bias"][0] = float("nan")
    state["final_layer.linear.bias"][0] = float("inf")
    torch.save(payload(model, state_dict=state), work / "m.pt")
    assert message(work / "m.pt", hide=work / "m.pt") == (
        "load: 2 of 32 weight tensors hold NaN or infinite values\n"
        "  at    FILE\n"
        "  got   x_embedder.proj.bias [32], final_layer.linear.bias [24]\n"
        "  want  finite weights\n"
        "  next  export the checkpoint again from a healthy step"
    )
    module = TwoInputs()
    nn.init.constant_(module.linear.bias, float("nan"))
    assert "1 of 2 weight tensors hold NaN or infinite values" in message(module, example_inputs=two_inputs())


def test_unknown_architectures(work: Path, model: DiT) -> None:
    torch.save(payload(model), work / "m.pt")
    assert message("m.pt", arch="dit-xl2") == (
        "load: unknown architecture 'dit-xl2'\n"
        "  want  dit-xl/2, dit-l/2, dit-xl/8\n"
        "  next  --arch one of these, or give the model as package.module:factory"
    )
    assert "want  FluxTransformer2DModel" in message("m.pt", arch="FluxTransformer")
    torch.save(payload(model, arch="unet"), work / "unet.pt")
    assert "unknown architecture 'unet'" in message("unet.pt")
    torch.save({"weight": torch.ones(2)}, work / "other.pt")
    assert message("other.pt") == (
        "load: the architecture is not recognised from the weights' names\n"
        "  at    other.pt\n"
        "  got   keys weight\n"
        "  want  a stored 'arch' and 'config', or the names of the DiT release\n"
        "  next  --arch NAME (dit, dit-xl/2, DiTTransformer2DModel, PixArtTransformer2DModel,"
        " SD3Transformer2DModel, FluxTransformer2DModel, WanTransformer3DModel), or give"
        " package.module:factory"
    )
    torch.save({"step": 3}, work / "none.pt")
    assert "the file holds no state dict" in message("none.pt")
    torch.save([1, 2], work / "list.pt")
    assert "the file holds no state dict" in message("list.pt")


def test_architecture_settings(work: Path, model: DiT) -> None:
    torch.save(model.state_dict(), work / "raw.pt")
    assert message("raw.pt") == (
        "load: the number of attention heads cannot be read from the weights\n"
        "  at    raw.pt\n"
        "  got   hidden size 32\n"
        "  want  a released width (384, 768, 1024, 1152), or the number\n"
        "  next  --arch dit:num_heads=4"
    )
    assert message("raw.pt", arch="dit:num_heads=4,heads=4") == (
        "load: dit has no setting 'heads'\n  at    raw.pt\n  want  num_heads\n  next  --arch dit:key=value"
    )
    assert message("raw.pt", arch="dit:num_heads=four") == (
        "load: dit's 'num_heads' has a wrong value\n"
        "  at    raw.pt\n"
        "  got   'four'\n"
        "  want  a positive int\n"
        "  next  --arch dit:num_heads=..."
    )
    assert "dit's hidden_size must be a multiple of num_heads" in message("raw.pt", arch="dit:num_heads=5")
    assert "cannot read --arch 'dit:num_heads'" in message("raw.pt", arch="dit:num_heads")
    for config in ({"depth": True}, {"learn_sigma": 1}, {"input_size": 0}, {"mlp_ratio": float("nan")}):
        torch.save(payload(model, config={**model.config.to_dict(), **config}), work / "bad.pt")
        assert f"dit's '{next(iter(config))}' has a wrong value" in message("bad.pt")
    torch.save(payload(model, config=3), work / "bad.pt")
    assert "'config' must be a mapping" in message("bad.pt")


def test_preset_with_other_weights(work: Path, model: DiT) -> None:
    torch.save(model.state_dict(), work / "raw.pt")
    text = message("raw.pt", arch="DiT-S/2")
    assert text.startswith("load: the weights do not fit 'dit-s/2': 100 missing, ")
    assert "want  missing blocks.2.attn.qkv.weight [1152, 384]" in text


def test_arch_of_a_diffusers_class(work: Path) -> None:
    original, _, _ = zoo.diffusers_dit()
    original.transformer.save_pretrained(work / "t")
    shutil.move(work / "t" / "diffusion_pytorch_model.safetensors", work / "alone.safetensors")
    arch = (
        "DiTTransformer2DModel:num_attention_heads=2,attention_head_dim=16,out_channels=8,num_layers=2,sample_size=8,"
        "num_embeds_ada_norm=10"
    )
    assert_same(load_model(work / "alone.safetensors", arch=arch), original)
