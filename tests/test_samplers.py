"""Each sampler's table, run without torch, gives what diffusers' own loop gives."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.errors import ArtifactError, ExecutionError, SamplerError, UsageError
from dcc.frontend import samplers
from dcc.frontend.samplers import list_samplers, sampler_table
from dcc.runtime.noise import Noise
from dcc.runtime.sampler import Sampler, SamplerTable

diffusers = pytest.importorskip("diffusers")
# Schedulers give tensors to numpy, whose newer protocol torch does not speak yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (2, 4, 6, 6)
TOLERANCE = 1e-4
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
# Name, class, its configuration, arguments of set_timesteps, arguments of step.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ddpm": ("ddpm", "DDPMScheduler", {}, {}, {}),
    "ddpm-no-clip": ("ddpm", "DDPMScheduler", {"clip_sample": False}, {}, {}),
    "ddpm-large": ("ddpm", "DDPMScheduler", {"variance_type": "fixed_large"}, {}, {}),
    "ddpm-range": ("ddpm", "DDPMScheduler", {"variance_type": "learned_range"}, {}, {}),
    "ddpm-range-no-clip": (
        "ddpm", "DDPMScheduler", {"variance_type": "learned_range", "clip_sample": False}, {}, {},
    ),
    "ddpm-learned": ("ddpm", "DDPMScheduler", {"variance_type": "learned"}, {}, {}),
    "ddpm-v-linspace": (
        "ddpm", "DDPMScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace", "clip_sample": False}, {}, {},
    ),
    "ddim": ("ddim", "DDIMScheduler", {}, {}, {}),
    "ddim-no-clip": ("ddim", "DDIMScheduler", {"clip_sample": False}, {}, {}),
    "ddim-clip-3": ("ddim", "DDIMScheduler", {"clip_sample_range": 3.0}, {}, {}),
    "ddim-half": ("ddim", "DDIMScheduler", {}, {}, {"eta": 0.5}),
    "ddim-one": ("ddim", "DDIMScheduler", {"clip_sample": False}, {}, {"eta": 1.0}),
    "ddim-v": ("ddim", "DDIMScheduler", {"prediction_type": "v_prediction"}, {}, {}),
    "ddim-sample": ("ddim", "DDIMScheduler", {"prediction_type": "sample"}, {}, {}),
    "ddim-zero-snr": ("ddim", "DDIMScheduler", ZERO_SNR, {}, {"eta": 0.3}),
    "ddim-trailing": ("ddim", "DDIMScheduler", {"timestep_spacing": "trailing"}, {}, {}),
    "ddim-linspace": ("ddim", "DDIMScheduler", {"timestep_spacing": "linspace"}, {}, {}),
    "ddim-clipped-output": ("ddim", "DDIMScheduler", {}, {}, {"use_clipped_model_output": True}),
    "euler": ("euler", "EulerDiscreteScheduler", {}, {}, {}),
    "euler-v": ("euler", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {}, {}),
    "euler-karras": ("euler-karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}, {}),
    "euler-churn": ("euler", "EulerDiscreteScheduler", {}, {}, {"s_churn": 5.0}),
    "euler-a": ("euler-a", "EulerAncestralDiscreteScheduler", {}, {}, {}),
    "flow-euler": ("flow-euler", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}, {}),
    "flow-euler-mu": (
        "flow-euler", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.9}, {},
    ),
    "flow-euler-sigmas": (
        "flow-euler", "FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [1 - i / 12 for i in range(12)]}, {},
    ),
    "flow-euler-sde": (
        "flow-euler-sde", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, {},
    ),
    "flow-heun": ("flow-heun", "FlowMatchHeunDiscreteScheduler", {}, {}, {}),
    "flow-dpm++2m": ("flow-dpm++2m", "DPMSolverMultistepScheduler", FLOW_DPM, {}, {}),
    "flow-unipc": ("flow-unipc", "UniPCMultistepScheduler", FLOW_DPM, {}, {}),
    "dpm++2m": ("dpm++2m", "DPMSolverMultistepScheduler", {}, {}, {}),
    "dpm++2m-karras": ("dpm++2m-karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}, {}),
    "dpm++2m-sde": (
        "dpm++2m-sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, {},
    ),
    "dpm++3m": ("dpm++3m", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}, {}),
    "dpm++2s": ("dpm++2s", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}, {}),
    "unipc": ("unipc", "UniPCMultistepScheduler", {}, {}, {}),
    "unipc-3": ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, {}, {}),
    "deis": ("deis", "DEISMultistepScheduler", {}, {}, {}),
    "deis-3": ("deis", "DEISMultistepScheduler", {"solver_order": 3}, {}, {}),
    "heun": ("heun", "HeunDiscreteScheduler", {}, {}, {}),
    "heun-clip": ("heun", "HeunDiscreteScheduler", {"clip_sample": True}, {}, {}),
    "kdpm2-a": ("kdpm2-a", "KDPM2AncestralDiscreteScheduler", {}, {}, {}),
    "lcm": ("lcm", "LCMScheduler", {}, {}, {}),
    "lcm-clip": ("lcm", "LCMScheduler", {"clip_sample": True}, {}, {}),
    "tcd": ("tcd", "TCDScheduler", {}, {}, {"eta": 0.4}),
    "pndm": ("pndm", "PNDMScheduler", {}, {}, {}),
    "plms": ("plms", "PNDMScheduler", {"skip_prk_steps": True}, {}, {}),
    "ipndm": ("ipndm", "IPNDMScheduler", {}, {}, {}),
    "sa-solver": ("sa-solver", "SASolverScheduler", {}, {}, {}),
    "edm-euler": ("edm-euler", "EDMEulerScheduler", {}, {}, {}),
    "unclip": ("unclip", "UnCLIPScheduler", {}, {}, {}),
}  # fmt: skip
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def scheduler_of(case: str) -> Any:
    _, kind, config, _, _ = CASES[case]
    scheduler_class = getattr(diffusers, kind)
    has_betas = hasattr(scheduler_class().config, "beta_start")
    return scheduler_class(**{**(LINEAR if has_betas else {}), **config})


def toy_denoiser(sample: np.ndarray, timestep: float, multiple: int, positive: bool) -> np.ndarray:
    """Nonlinear in the latent, mixes channels, and of the size of a real prediction."""
    pattern = np.cos(np.arange(sample.size, dtype=np.float32)).reshape(sample.shape)
    mixed = 0.8 * sample + 0.4 * np.roll(sample, 1, axis=1) + pattern + np.float32(math.sin(timestep / 50.0))
    output = np.tanh(mixed) + np.float32(0.3) * np.sin(3 * mixed)
    if multiple == 1:
        return output.astype(np.float32)
    variance = 0.1 + np.cos(mixed) ** 2 if positive else np.cos(2 * mixed)
    return np.concatenate([output, variance], axis=1).astype(np.float32)


def diffusers_loop(case: str, steps: int, generator: Any, table: SamplerTable) -> np.ndarray:
    """The loop of a diffusers pipeline: the latent's noise first, then the same generator in `step`."""
    from diffusers.utils.torch_utils import randn_tensor

    _, _, _, timestep_options, step_options = CASES[case]
    scheduler = scheduler_of(case)
    count = {} if "sigmas" in timestep_options else {"num_inference_steps": steps}
    scheduler.set_timesteps(**count, **timestep_options)
    options = dict(step_options)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generator
    latent = randn_tensor(SHAPE, generator=generator, dtype=torch.float32)
    latent = latent * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = latent
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latent, timestep)
        output = toy_denoiser(scaled.numpy(), timestep.item(), table.output_multiple, table.variance == "direct")
        latent = scheduler.step(torch.from_numpy(output), timestep, latent, **options).prev_sample
    return np.asarray(latent.numpy())


def table_loop(table: SamplerTable, seed: int | list[int], sampler: Sampler | None = None) -> np.ndarray:
    noise = Noise(seed, SHAPE[0])
    sampler = sampler or Sampler(table, SHAPE)
    sampler.start(noise.draw(SHAPE[1:]))
    for index, call in enumerate(table.calls):
        given = sampler.model_input(index)
        output = toy_denoiser(given, call.timestep, table.output_multiple, table.variance == "direct")
        sampler.advance(index, output, lambda dtype: noise.draw(SHAPE[1:], dtype))
    return sampler.latent.copy()


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    assert np.isfinite(want).all()
    return float(np.abs(got - want).max() / (want.max() - want.min()))


def table_of(case: str, steps: int = 12) -> SamplerTable:
    name, _, config, timestep_options, step_options = CASES[case]
    return sampler_table(name, steps=steps, **config, **timestep_options, **step_options)


@pytest.mark.parametrize("case", CASES)
def test_a_table_equals_the_diffusers_loop(case: str) -> None:
    table = table_of(case)
    # Through text, as an artifact holds it.
    assert SamplerTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    want = diffusers_loop(case, 12, torch.Generator().manual_seed(7), table)
    assert relative_error(table_loop(table, 7), want) <= TOLERANCE


@pytest.mark.parametrize("case", ["ddpm", "euler-a", "dpm++2m-sde", "flow-euler-sde"])
def test_a_seed_per_image_equals_a_list_of_generators(case: str) -> None:
    table = table_of(case)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert relative_error(table_loop(table, [3, 4]), diffusers_loop(case, 12, generators, table)) <= TOLERANCE


@pytest.mark.parametrize("case", ["ddim", "unipc", "heun", "pndm"])
@pytest.mark.parametrize("steps", [4, 50])
def test_few_and_many_steps(case: str, steps: int) -> None:
    table = table_of(case, steps)
    want = diffusers_loop(case, steps, torch.Generator().manual_seed(1), table)
    assert relative_error(table_loop(table, 1), want) <= TOLERANCE


def test_a_sampler_serves_one_request_after_another() -> None:
    table = table_of("unipc")
    sampler = Sampler(table, SHAPE)
    first = table_loop(table, 1, sampler)
    table_loop(table, 2, sampler)
    np.testing.assert_array_equal(table_loop(table, 1, sampler), first)


def test_a_float64_table_is_exact_where_the_scheduler_is() -> None:
    from dcc.frontend.sampler_replay import Source, replay_error

    source = Source(diffusers.DDIMScheduler(clip_sample=False), "ddim", 20)
    assert replay_error(source, sampler_table("ddim", steps=20, clip_sample=False, dtype="float64")) < 1e-12


def test_clipping_was_active() -> None:
    clipped = table_loop(table_of("ddim"), 0)
    assert relative_error(clipped, table_loop(table_of("ddim-no-clip"), 0)) > 0.05


def test_calls_are_not_steps() -> None:
    assert [call.step for call in table_of("heun", 3).calls] == [0, 0, 1, 1, 2]
    assert [call.step for call in table_of("plms", 4).calls] == [0, 0, 1, 2, 3]
    assert [call.step for call in table_of("pndm", 5).calls] == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4]


def test_draws_are_counted_where_the_noise_is_unused() -> None:
    assert [call.draws for call in table_of("ddpm", 3).calls] == [1, 1, 0]
    last = table_of("euler-a", 3).calls[-1]
    assert last.draws == 1 and last.matrix[0][-1] == 0.0


def test_a_sampler_that_ignores_the_variance_takes_both_halves() -> None:
    table = table_of("ddim-no-clip", 3)
    sampler = Sampler(table, SHAPE)
    noise = Noise(0, 2).draw(SHAPE[1:])
    sampler.start(noise)
    wide = sampler.advance(0, np.concatenate([noise, noise + 5], axis=1), lambda _: noise).copy()
    sampler.start(noise)
    np.testing.assert_array_equal(sampler.advance(0, noise, lambda _: noise), wide)


def test_sources_agree(tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    by_name = sampler_table("Euler Karras", steps=5)
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = dict(scheduler.config, _class_name="EulerDiscreteScheduler")
    before = copy.deepcopy(vars(scheduler))
    sources = [scheduler, config, tmp_path, str(tmp_path / "scheduler"), "EulerDiscreteScheduler"]
    for source in sources:
        options = {"use_karras_sigmas": True} if source == "EulerDiscreteScheduler" else {}
        assert sampler_table(source, steps=5, **options).calls == by_name.calls
    assert vars(scheduler).keys() == before.keys() and scheduler.num_inference_steps is None


def test_a_checkpoint_configuration_goes_under_a_name() -> None:
    config = {
        "_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "prediction_type": "v_prediction", "variance_type": "learned_range",
        "clip_sample": False,
    }  # fmt: skip
    table = sampler_table("dpm++2m", steps=6, config=config)
    assert table.prediction == "v_prediction" and table.variance is None
    kept = {key: value for key, value in config.items() if key not in ("variance_type", "clip_sample", "_class_name")}
    assert table.calls == sampler_table(diffusers.DPMSolverMultistepScheduler(**kept), steps=6).calls
    assert sampler_table("ddpm", steps=6, config=config).output_multiple == 2


def test_a_flow_configuration_needs_a_flow_sampler() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(SamplerError, match="flow-euler"):
        sampler_table("ddim", steps=4, config=config)
    with pytest.raises(SamplerError, match="ddim"):
        sampler_table("flow-euler", steps=4, config={"_class_name": "DDIMScheduler"})
    shifted = sampler_table("flow-unipc", steps=4, config=config)
    assert shifted.calls == sampler_table("flow-unipc", steps=4, flow_shift=3.0).calls


@pytest.mark.parametrize("entry", list_samplers(), ids=lambda entry: entry.name)
def test_every_listed_sampler_compiles(entry: samplers.NamedSampler) -> None:
    assert sampler_table(entry.name, steps=4).scheduler == entry.scheduler
    for alias in entry.aliases:
        assert samplers._named(alias.upper().replace("-", " ")) is entry


class OutOfTune(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler whose update is not linear, and says so nowhere."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        return super().step(torch.sin(model_output), timestep, sample, **options)


class Forgetful(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler that draws noise of its own."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        result = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (result + torch.rand(result.shape, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("source", [OutOfTune(), OutOfTune(clip_sample=False), Forgetful(clip_sample=False)])
def test_what_is_not_linear_is_refused(source: Any) -> None:
    with pytest.raises(SamplerError, match="not linear"):
        sampler_table(source, steps=4)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ddmi", {}, "ddim"),
        ("DDIMSchedular", {}, "DDIMScheduler"),
        ("/nowhere/scheduler_config.json", {}, "no scheduler_config.json"),
        ({"beta_start": 0.1}, {}, "_class_name"),
        ({"_class_name": "torch"}, {}, "no sampler"),
        (3, {}, "not a sampler"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "zero terminal SNR"),
        ("ddim", {"beta_schedule": "cubic"}, "cubic"),
        ("ddim", {"prediction_type": "guess"}, "guess"),
        ("flow-euler", {"use_dynamic_shifting": True}, "mu"),
        ("flow-euler", {"sigmas": [1.0, 0.5]}, "2 calls"),
        ("kdpm2-a", {"steps": 2}, "not finite"),
        ("RePaintScheduler", {}, "original_image"),
        ("ScoreSdeVeScheduler", {}, "step"),
    ],
)
def test_what_is_no_sampler_is_refused_by_name(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError) as caught:
        sampler_table(source, **{"steps": 4, **options})
    assert message in str(caught.value)
    assert {"got", "want"} <= set(caught.value.details)


def test_requests_that_make_no_sense_are_usage_errors() -> None:
    for steps in (0, -1, 2.0, True, None, 10**9):
        with pytest.raises(UsageError, match="steps"):
            sampler_table("ddim", steps=steps)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        sampler_table("ddim", steps=4, etta=1.0)
    assert "eta" in str(caught.value)
    with pytest.raises(UsageError, match="dtype"):
        sampler_table("ddim", steps=4, dtype="float16")
    with pytest.raises(UsageError, match="config"):
        sampler_table(diffusers.DDIMScheduler(), steps=4, config={})


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SamplerError, match=r"dcc\[diffusers\]"):
        try:
            sampler_table("ddim", steps=4)
        except SamplerError as error:
            raise SamplerError(str(error)) from error


def test_the_executor_needs_neither_torch_nor_diffusers() -> None:
    code = "import sys, dcc.runtime.sampler, dcc.runtime.noise\nprint({'torch', 'diffusers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_executor_checks_order_and_shapes() -> None:
    table = table_of("ddpm-range", 3)
    sampler = Sampler(table, SHAPE)
    noise = Noise(0, 2).draw(SHAPE[1:])
    with pytest.raises(ExecutionError, match="order"):
        sampler.model_input(0)
    with pytest.raises(ExecutionError, match="initial noise"):
        sampler.start(noise[:1])
    sampler.start(noise)
    with pytest.raises(ExecutionError, match="order"):
        sampler.advance(1, noise, lambda _: noise)
    with pytest.raises(ExecutionError, match="variance"):
        sampler.advance(0, noise, lambda _: noise)
    with pytest.raises(ExecutionError, match="output"):
        sampler.advance(0, noise[:, :1], lambda _: noise)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=5),
    st.just([]), st.just({}), st.just([[1.0]]), st.lists(st.floats(allow_nan=True), max_size=5),
)  # fmt: skip
TABLE = {
    "name": "ddim", "scheduler": "DDIMScheduler", "prediction": "epsilon", "steps": 2, "dtype": "float32",
    "registers": 1, "init_sigma": 1.0, "clip": 1.0, "variance": "range",
    "calls": [
        {"timestep": 999 - i, "input_scale": 1.0, "convert": [1.0, -1.0], "matrix": [[0.5, 0.5, 1.0, 0.1]],
         "variance": [0.1, 0.2], "draws": 1, "draw_dtype": "float32", "step": i} for i in range(2)
    ],
}  # fmt: skip


def places(value: Any) -> list[tuple[Any, ...]]:
    """Every path to a value inside a JSON value, the whole included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, inner in items for rest in places(inner))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.sampled_from(places(TABLE)), VALUES)
def test_a_damaged_table_is_refused_or_still_sound(path: tuple[Any, ...], value: Any) -> None:
    try:
        table = SamplerTable.from_json(replaced(TABLE, path, value))
    except ArtifactError as error:
        assert len(str(error)) < 2000
        return
    assert SamplerTable.from_json(table.to_json()) == table
    numbers = [number for call in table.calls for row in call.matrix for number in row]
    assert all(math.isfinite(number) for number in [*numbers, table.init_sigma, table.calls[0].timestep])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("calls", 0, "matrix", 0, 1), math.nan),
        (("calls", 0, "matrix", 0, 1), math.inf),
        (("calls", 0, "matrix", 0, 1), 1e300),
        (("calls", 0, "matrix", 0), [1.0] * 5),
        (("calls", 0, "draws"), 0),
        (("calls", 0, "draws"), 2),
        (("calls", 0, "convert"), None),
        (("calls", 0, "step"), 2),
        (("calls", 1, "step"), -1),
        (("calls", 0, "draw_dtype"), "float16"),
        (("calls",), []),
        (("clip",), None),
        (("clip",), -1.0),
        (("variance",), None),
        pytest.param(("variance",), 10**5000, id="unprintable integer"),
        (("registers",), 10**6),
        (("name",), "a\x1b[2J"),
        pytest.param(("name",), "x" * 10**6, id="long name"),
    ],
)
def test_contradictions_are_refused(path: tuple[Any, ...], value: Any) -> None:
    assert SamplerTable.from_json(TABLE).output_multiple == 2
    with pytest.raises(ArtifactError) as caught:
        SamplerTable.from_json(replaced(TABLE, path, value))
    assert len(str(caught.value)) < 2000


def test_missing_and_unknown_fields_are_refused() -> None:
    for damaged in ({**TABLE, "extra": 1}, {key: TABLE[key] for key in list(TABLE)[1:]}, {1: 2}, [], None):
        with pytest.raises(ArtifactError):
            SamplerTable.from_json(damaged)


def test_float64_survives_the_text() -> None:
    awkward = replaced(TABLE, ("calls", 0, "matrix", 0, 0), 0.1 + 0.2)
    table = SamplerTable.from_json(json.loads(json.dumps(awkward)))
    assert table.calls[0].matrix[0][0] == 0.1 + 0.2
