"""What the tests of schedule passes share: features of analytic runs, subjects made of them, schedules as text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from random_graphs import Sketch, aten

from dcc.ir.measurements import Features, Subject, measure
from dcc.ir.program import Guidance, PassReport, Program
from dcc.ir.schedule import Action, Schedule
from dcc.passes import CUT, HoistScopes, Pass, run_passes
from dcc.runtime.sampler import SamplerCall, SamplerTable

BLOCKS = 4
CALLS = 10
SHARES = (0.75, 0.6, 0.5, 0.4)


def alphas(calls: int) -> list[float]:
    """Signal in the variance-preserving latent of each call, from noise to image."""
    return [float(np.cos(np.pi / 2 * (1 - (call + 0.05) / calls))) for call in range(calls)]


def ddim(calls: int = CALLS, converts: bool = False) -> SamplerTable:
    """Deterministic DDIM; `converts` states the update through the prediction of x0, as a clipping sampler does."""
    signal = [*alphas(calls), 1.0]
    noise = [float(np.sqrt(1 - value**2)) for value in signal]
    rows = []
    for call in range(calls):
        grows = signal[call + 1] / signal[call]
        epsilon = noise[call + 1] - grows * noise[call]
        convert = (1 / signal[call], -noise[call] / signal[call]) if converts else None
        row = (0.0, noise[call + 1], signal[call + 1], 0.0) if converts else (grows, epsilon, 0.0, 0.0)
        timestep = 1000 * (calls - 1 - call) // calls
        rows.append(SamplerCall(timestep, 1.0, convert, (row,), None, 0, "float32", call))
    clip = 1e9 if converts else None
    return SamplerTable("ddim", "hand-made", "epsilon", calls, "float32", 1, 1.0, clip, None, tuple(rows))


def components(blocks: int = BLOCKS) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.{part}" for block in range(blocks) for part in ("attn", "mlp"))


def features(calls: int = CALLS, blocks: int = BLOCKS, seed: int = 0, guided: bool = True) -> Iterator[Features]:
    """A smooth trajectory that moves fast at both ends; attention moves less than the MLPs, late blocks more."""
    random = np.random.default_rng(seed)
    images, rows = 2, 4 if guided else 2
    names = components(blocks)
    start, end = random.standard_normal((2, len(names), rows, 5, 6))
    latents = random.standard_normal((2, images, 3, 4))
    for call in range(calls):
        place = 2 * call / (calls - 1) - 1
        angle = 0.5 * (place + place**3)
        branches = []
        for index in range(len(names)):
            speed = (0.5 + 0.1 * index) * (1.0 if index % 2 else 0.5)
            branches.append(np.cos(speed * angle) * start[index] + np.sin(speed * angle) * end[index])
        streams = [np.ones((rows, 5, 6))]
        for branch in branches:
            streams.append(streams[-1] + 0.3 * branch)
        latent = np.cos(angle) * latents[0] + np.sin(angle) * latents[1]
        yield Features(call, latent, streams[-1].mean(axis=2), images, tuple(branches), tuple(streams))


def subject(calls: int = CALLS, blocks: int = BLOCKS, guided: bool = True) -> Subject:
    """A measured model of `blocks` blocks of an attention and an MLP that costs twice as much."""
    names = components(blocks)
    return Subject(
        name="analytic",
        components=names,
        kinds=("attention", "mlp") * blocks,
        blocks=tuple((index, index + 1) for index in range(0, len(names), 2)),
        calls=calls,
        timesteps=tuple(float(call.timestep) for call in ddim(calls).calls),
        sigmas=tuple(float(np.sqrt(1 - value**2) / value) for value in alphas(calls)),
        guided=guided,
        flops=(1.0, 2.0) * blocks,
        glue_flops=0.5,
        measurements=measure(features(calls, blocks, guided=guided), names, first_block=2) if calls > 1 else None,
    )


def without_measurements() -> Subject:
    return Subject(**{**vars(subject()), "measurements": None})


def sketch(calls: int = CALLS, measured: bool = True) -> Program:
    """A cut Program of two residual layers with a sampler and guidance, and measurements of an analytic run."""
    s = Sketch()
    x, time = s.linear(s.latent(6, 3), "embed", 4), s.op(aten.unsqueeze.default, s.embed(s.timestep()), 1)
    for index in range(2):
        branch = s.op(aten.silu.default, s.linear(x, f"blocks.{index}.body", 4))
        x = s.add(x, s.mul(branch, s.linear(time, f"blocks.{index}.gate", 4)))
    program = s.program(s.linear(x, "final", 3))
    program.sampler, program.guidance = ddim(calls), Guidance("cfg", 3.0)
    run_passes(program, (HoistScopes(), CUT))
    if measured:
        # One block of two components, named as this Program names them.
        names = tuple(stage.name for stage in program.stages if stage.kind == "component")
        program.measurements = measure(features(calls, 1), names, first_block=1)
    return program


def applied(step: Pass, program: Program) -> PassReport:
    return run_passes(program, (step,))[0]


def check_settles(step: Pass) -> PassReport:
    """A second application finds nothing to change; the first call computes both; returns the first report."""
    program = sketch()
    report = applied(step, program)
    assert report.status == "applied", report.why
    first = program.schedule
    assert first is not None
    assert applied(step, program) == report
    assert program.schedule == first
    assert first.components == tuple(stage.name for stage in program.stages if stage.kind == "component")
    assert all(action.computes for action in first.actions[0])
    assert report.figures["computed share"] < 1
    return report


def table(schedule: Schedule) -> str:
    """Guidance and units by call: C computed, r reused, a digit the order of a forecast, s skipped."""
    marks = {"both": "b", "conditional": "c", "reuse": "r"}
    lines = ["guidance  " + "".join(marks[mode.kind] for mode in schedule.guidance)]
    width = max(len(unit.name) for unit in schedule.units)
    for index, unit in enumerate(schedule.units):
        column = "".join(_mark(action) for action in schedule.column(index))
        lines.append(f"{unit.name:{width}}  {unit.stores:6}  {column}")
    return "\n".join([schedule.name, *lines]) + "\n"


def _mark(action: Action) -> str:
    if action.kind != "combine":
        return {"compute": "C", "skip": "s"}[action.kind]
    return "r" if len(action.weights) == 1 else str(len(action.weights) - 1)
