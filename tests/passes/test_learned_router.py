"""learned-router: logits trained on the model's own trajectories become a schedule of reuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from subjects import ddim

from dcc.errors import UsageError
from dcc.frontend.samplers import sampler_table
from dcc.ir.interpret import run_stages
from dcc.ir.measurements import Declined, subject_of
from dcc.ir.program import Guidance, Program
from dcc.ir.schedule import BOTH, REUSE, GuidanceMode, full_schedule
from dcc.passes import run_passes
from dcc.passes.learned_router import Batch, LearnedRouter, Training, highest, image_gains
from dcc.preparation import pipeline
from dcc.runtime.sampler import Sampler

CALLS = 6
SHORT = LearnedRouter(iterations=6, images=2, learning_rate=0.8, credit=2)


def compiled(traced: Callable[[str], Program], name: str = "dit", sampler: str = "ddim", **options: object) -> Program:
    """A zoo program with a sampler of six calls and guidance 3, cut into stages."""
    program = traced(name)
    program.sampler = sampler_table(sampler, steps=CALLS, **options)
    program.guidance = Guidance("cfg", 3.0)
    run_passes(program, pipeline(1))
    return program


@pytest.fixture(scope="module")
def program(traced: Callable[[str], Program]) -> Program:
    return compiled(traced)


@pytest.fixture(scope="module")
def training(program: Program) -> Training:
    return SHORT.train(program)


def batch_of(program: Program, seed: int = 0, images: int = 2) -> Batch:
    return Batch.draw(program, replace(SHORT, images=images), torch.Generator().manual_seed(seed))


def test_fires(traced: Callable[[str], Program]) -> None:
    program = compiled(traced)
    report = replace(SHORT, iterations=2).apply(program)
    assert report.status == "applied"
    assert report.why.endswith("of the step's FLOPs are computed, after 2 iterations")
    schedule = program.schedule
    assert schedule is not None
    assert report.figures["schedule"] == schedule.digest()
    assert report.figures["computed share"] == pytest.approx(0.5, abs=0.02)
    assert len(report.figures["errors"]) == 2
    assert set(schedule.guidance) == {BOTH}


def test_the_first_call_is_computed_and_the_rest_is_reuse(program: Program, training: Training) -> None:
    schedule = SHORT.schedule(subject_of(program), training)
    assert all(action.computes for action in schedule.actions[0])
    others = [action for row in schedule.actions for action in row if not action.computes]
    assert others
    assert set(others) == {REUSE}


def test_keeps_the_guidance_modes_of_the_program(program: Program, training: Training) -> None:
    modes = (BOTH, BOTH, *[GuidanceMode("conditional")] * 2, BOTH, BOTH)
    before = replace(full_schedule(program.components, CALLS), guidance=modes)
    subject = replace(subject_of(program), schedule=before)
    assert SHORT.schedule(subject, training).guidance == modes


def test_is_deterministic(program: Program, training: Training) -> None:
    again = SHORT.train(program)
    assert torch.equal(again.logits, training.logits)
    assert (again.errors, again.shares) == (training.errors, training.shares)
    assert not torch.equal(replace(SHORT, seed=1).train(program).logits, training.logits)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_pays_the_share_that_was_asked_for(share: float, program: Program, training: Training) -> None:
    subject = subject_of(program)
    schedule = replace(SHORT, target_share=share).schedule(subject, training)
    got = schedule.computed_share(subject.flops, subject.glue_flops)
    one = max(subject.flops) / (CALLS * (sum(subject.flops) + subject.glue_flops))
    assert share - one < got <= share + 1e-9


def test_the_share_falls_while_it_trains(training: Training) -> None:
    assert training.shares[0] == 1.0
    assert list(training.shares) == sorted(training.shares, reverse=True)
    assert training.shares[-1] == pytest.approx(0.5, abs=0.03)


def test_training_lowers_the_error_of_the_schedule(program: Program, training: Training) -> None:
    """On noise and labels that it has not seen, against the mean of random schedules of the same share."""
    subject = subject_of(program)
    batch = batch_of(program, seed=100, images=4)
    everything = batch.simulate([[True] * len(subject.components)] * CALLS)

    def error(logits: torch.Tensor) -> float:
        return float((batch.simulate(highest(logits, subject, 0.5).tolist()) - everything).square().mean())

    generator = torch.Generator().manual_seed(0)
    random = [error(torch.randn(training.logits.shape, generator=generator)) for _ in range(8)]
    assert error(training.logits) < 0.7 * sum(random) / len(random)


def test_a_large_penalty_leaves_the_first_call_and_none_leaves_everything(program: Program) -> None:
    options = replace(SHORT, target_share=None, image_error=False, iterations=8)
    subject = subject_of(program)
    dear = replace(options, beta=1e6)
    schedule = dear.schedule(subject, dear.train(program))
    assert [all(action.computes for action in row) for row in schedule.actions] == [True] + [False] * 5
    assert not any(action.computes for row in schedule.actions[1:] for action in row)
    free = replace(options, beta=0.0)
    with pytest.raises(Declined) as raised:
        free.schedule(subject, free.train(program))
    assert raised.value.reason == "the router computes everything"


def test_only_the_schedule_of_the_program_changes(traced: Callable[[str], Program]) -> None:
    program = compiled(traced)
    before = program.hash()
    replace(SHORT, iterations=1).apply(program)
    first = program.schedule
    program.schedule = None
    assert program.hash() == before
    replace(SHORT, iterations=1).apply(program)
    assert program.schedule == first
    assert all(not tensor.requires_grad for tensor in program.weights.values())


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", {"eta": 0.5}), ("dpm++2m", {}), ("euler", {}), ("ddim", {"clip_sample": True})],
)
def test_walks_as_the_runtime_samples(sampler: str, options: dict, traced: Callable[[str], Program]) -> None:
    program = compiled(traced, sampler=sampler, **options)
    batch = batch_of(program)
    halves = program.inputs
    original = Sampler(program.sampler, tuple(batch.noise[0].shape))
    original.start(batch.noise[0].numpy())
    label = next(item.name for item in halves if item.name == "y")
    labels = batch.early[0][batch.inputs[label]]
    assert labels[2:].tolist() == [10, 10]
    for call, entry in enumerate(program.sampler.calls):
        latent = torch.from_numpy(original.model_input(call).copy()).float()
        inputs = {"x": torch.cat([latent, latent]), "t": torch.full((4,), float(entry.timestep)), "y": labels}
        wanted, null = run_stages(program, inputs).chunk(2)
        guided = null + 3.0 * (wanted - null)
        noise = batch.noise[call + 1].numpy()
        original.advance(call, guided.numpy(), lambda dtype, noise=noise: noise.astype(dtype))
    got = batch.simulate([[True] * len(program.components)] * len(program.sampler.calls))
    scale = float(got.abs().max())
    assert float((got - torch.from_numpy(original.latent)).abs().max()) < 1e-4 * scale


def test_the_blend_at_one_is_the_exact_model_and_at_zero_the_cache(program: Program) -> None:
    batch = batch_of(program)
    latent = batch.start()[0]
    count = len(program.components)
    _, slots = batch.exact(0, latent)
    wanted, fresh = batch.exact(1, latent)
    got, also = batch.blended(1, latent, slots, torch.ones(count))
    assert torch.allclose(got, wanted, atol=1e-5)
    assert all(
        torch.allclose(a, b, atol=1e-5) for x, y in zip(also, fresh, strict=True) for a, b in zip(x, y, strict=True)
    )
    stale, _ = batch.routed(1, latent, slots, [False] * count)
    assert torch.allclose(batch.blended(1, latent, slots, torch.zeros(count))[0], stale, atol=1e-5)


def test_image_gains_count_what_an_error_does_to_the_sample(traced: Callable[[str], Program]) -> None:
    """The last call of DDIM adds its output, times a coefficient, to the sample: the gain is its square."""
    program = compiled(traced)
    program.sampler = ddim(2)  # the calls differ enough for float32
    gains = image_gains(batch_of(program))
    assert gains.shape == (2,)
    assert float(gains[-1]) == pytest.approx(program.sampler.calls[-1].matrix[0][1] ** 2, rel=0.01)


def test_declines_with_the_reason(traced: Callable[[str], Program], program: Program) -> None:
    def declined(other: Program, options: LearnedRouter = SHORT) -> str:
        report = options.apply(other)
        assert report.status == "declined"
        assert other.schedule is None
        return report.why

    assert declined(replace(program, sampler=None)) == "the Program has no sampler: there is nothing to schedule"
    assert declined(replace(program, stages=[])) == "the Program has no components: its step is one stage"
    fixed = replace(program, rows=(1, 1))
    assert declined(fixed) == "the batch is fixed at 1: two halves do not fit"
    texts = compiled(traced, "pixart_alpha")
    name = next(item.name for item in texts.inputs if item.role == "condition")
    assert declined(texts) == f"the values of condition '{name}' are not known: give conditions"
    assert declined(replace(program, inputs=tuple(replace(item, null=None) for item in program.inputs))) == (
        "the unconditional half of 'y' is not known: give negative"
    )


@pytest.mark.parametrize("change", [{"target_share": 1.5}, {"iterations": 0}, {"tau": 0.9}, {"momentum": 1.0}])
def test_refuses_options_out_of_range(change: dict) -> None:
    with pytest.raises(UsageError, match="out of range"):
        replace(SHORT, **change)


def test_trains_on_given_conditions(traced: Callable[[str], Program]) -> None:
    program = compiled(traced, "pixart_alpha")
    shapes = {item.name: item.shape[1:] for item in program.inputs if item.role == "condition"}
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(3, *map(int, shape), generator=generator) for name, shape in shapes.items()}
    options = replace(
        SHORT, iterations=1, image_error=False, conditions=given,
        negative={name: torch.zeros(1, *value.shape[1:]) for name, value in given.items()},
    )  # fmt: skip
    assert options.apply(program).status == "applied"
