"""A router is trained: one logit for every sampler call and component says whether the component is computed.

While it trains, a component gives `r * fresh + (1 - r) * cached` with `r = sigmoid(logit)`. Each iteration walks one
batch from noise to sample. At every call the guided output of the blended model is compared with the exact model's
on the same latent, and the blended output advances the latent (step-wise denoising training): no images are needed,
and training sees what sampling will see. The loss of call t is

    lambda_t * MSE_t + beta * sum_i cost_i * penalty(r_ti)

where `lambda_t` is what an error at call t does to the final sample (image-error proxy). Afterwards a component is
computed where `r > tau` and gives its last computed branch elsewhere. Only the logits are trained.

Numerics  the sampler's table and the program's dtypes; the same schedule for a seed, unless `seconds` ends it early.
Refuses   a Program without a sampler, without components or of one call; conditions that it does not know to draw.
Source    Huang et al. 2024, HarmoniCa, arXiv:2410.01723, and the router of Ma et al. 2024, arXiv:2406.01733.
          Ours, so that tens of iterations do what they did with thousands: costs are FLOPs, beta follows
          `target_share`, which falls from 1 (`ramp`); lambda_t is measured per squared error of the output on exact
          runs; the penalty is concave, `1 - (1 - r)^2`, so that logits part; a call that computes a branch is
          credited for the calls that reuse it (`credit`); a logit's step is the balance of its two gradients.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcc.errors import PassError, UsageError
from dcc.ir.graph import BATCH, DTYPES, outputs_of
from dcc.ir.interpret import run_stage
from dcc.ir.measurements import Declined, Subject, check_option, finished, subject_of
from dcc.ir.program import PassReport, Program, Role, Scope, Stage
from dcc.ir.schedule import Schedule, branch_units, from_steps

EARLY = (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE)
LOGIT_LIMIT = 5.0
PROBES = 24  # calls whose image error is measured; those between are interpolated
SMALLEST = 1e-30

Branches = tuple[Tensor, ...]
Slots = list[Branches]


@dataclass(frozen=True)
class Training:
    """What the training left: float32 logits `[calls, components]` and image-error weights `[calls]`.

    `errors` has the sum of `lambda_t * MSE_t` of every iteration, `shares` what its router computed.
    """

    logits: Tensor
    weights: Tensor
    errors: tuple[float, ...]
    shares: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class LearnedRouter:
    """See the module's text.

    target_share   of the step's FLOPs to compute, reached exactly up to one component; None: beta decides
    beta           the penalty if there is no target_share
    iterations     trajectories to train on; `seconds` ends the training before that, 0 never
    images         in a batch
    tau            a component is computed where sigmoid(logit) is above
    refresh        iterations between two measurements of the image error, which are averaged; 0 measures it once
    image_error    False: all calls weigh the same
    ramp           the part of the iterations in which the share falls from 1 to target_share
    credit         how many calls back a reused branch credits the call that computed it; 0 is the paper's
    conditions     rows to draw from for conditions without a range of integers; whole values for unbatched ones
    negative       their values in the unconditional half, one row each
    """

    target_share: float | None = 0.5
    beta: float = 1e-4
    iterations: int = 40
    seconds: float = 300.0
    learning_rate: float = 0.4
    momentum: float = 0.5
    images: int = 2
    tau: float = 0.1
    refresh: int = 0
    image_error: bool = True
    ramp: float = 0.6
    credit: int = 4
    seed: int = 0
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "learned-router"

    def __post_init__(self) -> None:
        if self.target_share is not None:
            check_option("target_share", self.target_share, 0, 1)
        for option in ("iterations", "images"):
            check_option(option, getattr(self, option), 1)
        for option in ("beta", "seconds", "learning_rate", "refresh", "credit"):
            check_option(option, getattr(self, option), 0)
        for option in ("momentum", "ramp"):
            check_option(option, getattr(self, option), 0, 1 - 1e-9)
        check_option("tau", self.tau, 1e-2, 0.5)

    def train(self, program: Program) -> Training:
        """The trained logits. Raises Declined for a Program that cannot be trained on."""
        subject = subject_of(program)
        subject.check()
        return _Trainer(self, program, subject).run()

    def schedule(self, subject: Subject, training: Training) -> Schedule:
        """The trained logits as a schedule, under the subject's guidance modes. Raises Declined if nothing is reused."""
        if self.target_share is None:
            computes = training.logits > _logit(self.tau)
        else:
            computes = highest(training.logits, subject, self.target_share)
        schedule = from_steps(
            subject.components, branch_units(subject.components), computes.tolist(), name=self._title()
        )
        return finished(schedule, subject, "the router computes everything")

    def apply(self, program: Program) -> PassReport:
        subject = subject_of(program)
        try:
            training = self.train(program)
            schedule = self.schedule(subject, training)
        except Declined as declined:
            return PassReport(self.name, "declined", declined.reason)
        program.schedule = schedule
        share = schedule.computed_share(subject.flops, subject.glue_flops)
        done = len(training.errors)
        hidden = ("name", "conditions", "negative")
        figures = {
            "computed share": round(share, 6),
            "iterations": done,
            "seconds": round(training.seconds, 1),
            "errors": [float(f"{error:.4g}") for error in training.errors],
            "image error": [float(f"{weight:.4g}") for weight in training.weights.tolist()],
            "options": {
                option.name: getattr(self, option.name)
                for option in dataclasses.fields(self)
                if option.name not in hidden
            },
            "schedule": schedule.digest(),
        }
        why = f"{share:.1%} of the step's FLOPs are computed, after {done} iterations"
        return PassReport(self.name, "applied", why, figures)

    def _title(self) -> str:
        aim = f"beta {self.beta:.3g}" if self.target_share is None else f"{self.target_share:.3g}"
        return f"{self.name} {aim}"


def highest(logits: Tensor, subject: Subject, share: float) -> Tensor:
    """Which calls and components compute, `[calls, components]`: the first call, then the highest logits.

    As many as fit into `share` of the step's FLOPs. Equal logits: the earlier call, then the earlier component.
    """
    flops = subject.flops
    calls = len(logits)
    computes = torch.zeros(logits.shape, dtype=torch.bool)
    computes[0] = True
    left = share * calls * (sum(flops) + subject.glue_flops) - sum(flops) - calls * subject.glue_flops
    values = logits.tolist()
    places = [(call, index) for call in range(1, calls) for index in range(len(flops))]
    for call, index in sorted(places, key=lambda place: -values[place[0]][place[1]]):
        if flops[index] <= left * (1 + 1e-9):
            computes[call, index] = True
            left -= flops[index]
    return computes


class _Trainer:
    """One training: logits, their momentum, and the weights of the calls."""

    def __init__(self, options: LearnedRouter, program: Program, subject: Subject) -> None:
        self.options, self.program, self.subject = options, program, subject
        self.generator = torch.Generator().manual_seed(options.seed)
        flops = torch.tensor(subject.flops)
        self.cost = flops / flops.mean()
        self.shape = (subject.calls, len(subject.components))
        self.logits = torch.full(self.shape, 1.0)
        self.logits[0] = LOGIT_LIMIT
        self.momentum = torch.zeros(self.shape)
        self.weights = torch.ones(subject.calls)
        self.measured = 0

    def run(self) -> Training:
        options = self.options
        began = time.monotonic()
        errors: list[float] = []
        shares: list[float] = []
        for iteration in range(options.iterations):
            if options.seconds and errors and time.monotonic() - began > options.seconds:
                break
            batch = Batch.draw(self.program, options, self.generator)
            if options.image_error and (not self.measured or (options.refresh and iteration % options.refresh == 0)):
                self._weigh(batch)
            share = self._share(iteration)
            computes = self._computes(share)
            pressure, error = self._walk(batch, computes)
            self._step(pressure, share, iteration)
            errors.append(error)
            shares.append(self.subject.share(branch_units(self.subject.components), computes.tolist()))
        seconds = time.monotonic() - began
        return Training(self.logits, self.weights, tuple(errors), tuple(shares), seconds)

    def _share(self, iteration: int) -> float | None:
        if self.options.target_share is None:
            return None
        end = self.options.ramp * self.options.iterations
        return 1 - (1 - self.options.target_share) * (min(1.0, iteration / end) if end else 1.0)

    def _computes(self, share: float | None) -> Tensor:
        if share is None:
            return self.logits > _logit(self.options.tau)
        return highest(self.logits, self.subject, share)

    def _weigh(self, batch: Batch) -> None:
        """Average the image error of this batch into the calls' weights, whose mean is 1 after the first call."""
        gains = image_gains(batch)
        gains = gains / gains[1:].mean()
        self.weights = (self.weights * self.measured + gains) / (self.measured + 1)
        self.measured += 1

    def _walk(self, batch: Batch, computes: Tensor) -> tuple[Tensor, float]:
        """What the error loses if a component is computed a little more, `[calls, components]`, and the error."""
        pressure = torch.zeros(self.shape)
        total = 0.0
        ratios = self.logits.sigmoid()
        registers = batch.start()
        output, slots = batch.exact(0, registers[0])
        registers = batch.advance(0, registers, output)
        # For each component the calls since it was last computed, that one included, and what computing changed.
        recent: list[list[tuple[int, Branches]]] = [[] for _ in slots]
        for call in range(1, self.shape[0]):
            wanted, _ = batch.exact(call, registers[0])
            row = ratios[call].clone().requires_grad_()
            cached = [tuple(tensor.detach().requires_grad_() for tensor in branches) for branches in slots]
            output, fresh = batch.blended(call, registers[0], cached, row)
            error = self.weights[call] * (output - wanted).square().mean()
            flat = [tensor for branches in cached for tensor in branches]
            slope, *slot_slopes = torch.autograd.grad(error, [row, *flat])
            pressure[call] -= slope
            total += float(error.detach())
            pending = iter(slot_slopes)
            for index, new in enumerate(fresh):
                slopes = [next(pending) for _ in new]
                for earlier, change in recent[index]:
                    pressure[earlier, index] -= sum(
                        float((a * b).sum()) for a, b in zip(slopes, change, strict=True)
                    )
                change = tuple(a - b for a, b in zip(new, slots[index], strict=True))
                if computes[call, index]:
                    recent[index], slots[index] = [], new
                recent[index] = [*recent[index], (call, change)][-self.options.credit :] if self.options.credit else []
            registers = batch.advance(call, registers, output.detach())
        return pressure, total

    def _step(self, pressure: Tensor, share: float | None, iteration: int) -> None:
        """One optimiser step on all logits: each gradient is divided by the sum of its two terms' magnitudes."""
        options = self.options
        rest = (1 - self.logits.sigmoid()).clamp_min(0.025)
        # Both terms fall with 1 - r in the concave penalty; what is left is in units of beta.
        gain = (pressure / self.cost / (2 * rest))[1:]
        if share is None:
            beta = options.beta
        else:
            beta = float(gain.clamp_min(SMALLEST).quantile(min(0.95, 1 - share)))
        balance = (gain - beta) / (gain.abs() + beta + SMALLEST)
        self.momentum[1:] = options.momentum * self.momentum[1:] + (1 - options.momentum) * balance
        step = options.learning_rate * self.momentum[1:] / (1 - options.momentum ** (iteration + 1))
        self.logits[1:] = (self.logits[1:] + step).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
