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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcc.ir.graph import BATCH, DTYPES, outputs_of
from dcc.ir.interpret import run_stage
from dcc.ir.measurements import Declined, Subject, check_option, finished, subject_of
from dcc.ir.program import Input, PassReport, Program, Role, Scope, Stage
from dcc.ir.schedule import Schedule, branch_units, from_steps

EARLY = (Scope.TIMESTEP, Scope.REQUEST, Scope.TABLE)
LOGIT_LIMIT = 5.0
PROBES = 24  # calls whose image error is measured; those between are interpolated
SMALLEST = 1e-30
SMALLEST_REST = 0.025  # of 1 - r, which both gradients are divided by
CONTEXT = 10.0  # how far the router's run may move a call's image error from that of an exact run
LARGEST_SHIFT = 0.3  # of all logits in one iteration

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
    refresh        iterations between two measurements of the image error in the router's run; 0: on exact runs alone
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
        """The trained logits as a schedule under the subject's guidance modes. Raises Declined if nothing is reused."""
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
        self.gains: Tensor | None = None

    def run(self) -> Training:
        options = self.options
        began = time.monotonic()
        errors: list[float] = []
        shares: list[float] = []
        for iteration in range(options.iterations):
            if options.seconds and errors and time.monotonic() - began > options.seconds:
                break
            batch = Batch.draw(self.program, options, self.generator)
            share = self._share(iteration)
            computes = self._computes(share)
            due = self.gains is None or (options.refresh and iteration % options.refresh == 0)
            if options.image_error and due:
                self._weigh(batch, computes)
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

    def _weigh(self, batch: Batch, computes: Tensor) -> None:
        """Measure the image error of each call: on exact runs at first, then beside the router's own run."""
        if self.gains is None:
            self.gains = image_gains(batch)
            self.weights = self.gains
        else:
            measured = router_gains(batch, computes.tolist(), self.gains)
            self.weights = (self.weights.log() / 2 + measured.log() / 2).exp()

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
                    pressure[earlier, index] -= sum(float((a * b).sum()) for a, b in zip(slopes, change, strict=True))
                change = tuple(a - b for a, b in zip(new, slots[index], strict=True))
                if computes[call, index]:
                    recent[index], slots[index] = [], new
                recent[index] = [*recent[index], (call, change)][-self.options.credit :] if self.options.credit else []
            registers = batch.advance(call, registers, output.detach())
        return pressure, total

    def _step(self, pressure: Tensor, share: float | None, iteration: int) -> None:
        """One optimiser step on all logits: each gradient is divided by the sum of its two terms' magnitudes."""
        options = self.options
        rest = (1 - self.logits.sigmoid()).clamp_min(SMALLEST_REST)
        # Both terms fall with 1 - r in the concave penalty; what is left is in units of beta.
        gain = (pressure / self.cost / (2 * rest))[1:]
        beta = options.beta if share is None else float(gain.clamp_min(SMALLEST).quantile(min(0.95, 1 - share)))
        balance = (gain - beta) / (gain.abs() + beta + SMALLEST)
        self.momentum[1:] = options.momentum * self.momentum[1:] + (1 - options.momentum) * balance
        step = options.learning_rate * self.momentum[1:] / (1 - options.momentum ** (iteration + 1))
        self.logits[1:] = (self.logits[1:] + step).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        if share is not None:
            self._settle(highest(self.logits, self.subject, share)[1:])

    def _settle(self, computes: Tensor) -> None:
        """Move all logits together until tau lies between those that are computed and the others, in small steps."""
        logits = self.logits[1:]
        if computes.all() or not computes.any():
            return
        between = float(logits[~computes].max() + logits[computes].min()) / 2
        shift = min(max(_logit(self.options.tau) - between, -LARGEST_SHIFT), LARGEST_SHIFT)
        self.logits[1:] = (logits + shift).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class Batch:
    """Some requests of a Program: conditions, noise, and values of early scopes, which are computed once.

    Registers are the sampler's state, `registers[0]` the latent. Rows are the conditional half, then the other.
    """

    def __init__(self, program: Program, conditions: Mapping[str, Tensor], noise: Sequence[Tensor]) -> None:
        """`conditions` of all rows, and standard normal `noise` for the first latent and for every call."""
        self.program, self.noise = program, noise
        self.table = program.sampler
        self.guided = _guided(program)
        self.inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        self.steps = [stage for stage in program.stages if stage.kind not in EARLY]
        self.final = outputs_of(program.graph)[0]
        rows = len(noise[0]) * (2 if self.guided else 1)
        self.early = [self._prepare(conditions, float(call.timestep), rows) for call in self.table.calls]

    @staticmethod
    def draw(program: Program, options: LearnedRouter, generator: torch.Generator) -> Batch:
        """A random batch. Raises Declined for a condition of unknown values."""
        halves = 2 if _guided(program) else 1
        low, high = (-(-program.rows[0] // halves), program.rows[1] // halves)
        if high < 1:
            raise Declined(f"the batch is fixed at {program.rows[1]}: two halves do not fit")
        images = min(max(options.images, low), high)
        conditions = {}
        for item in program.input(Role.CONDITION):
            rows, null = _condition(item, options, images, generator)
            if halves == 2 and item.shape[:1] == (BATCH,):
                if null is None:
                    raise Declined(f"the unconditional half of '{item.name}' is not known: give negative")
                rows = torch.cat([rows, null.expand_as(rows)])
            conditions[item.name] = rows.to(DTYPES[item.dtype])
        shape = [images, *(int(size) for size in program.latent.shape[1:])]
        noise = [torch.randn(shape, generator=generator) for _ in range(1 + program.calls)]
        return Batch(program, conditions, noise)

    def start(self) -> list[Tensor]:
        """The registers before the first call."""
        latent = self.noise[0].to(getattr(torch, self.table.dtype)) * self.table.init_sigma
        return [latent, *(torch.zeros_like(latent) for _ in range(self.table.registers - 1))]

    def advance(self, call: int, registers: Sequence[Tensor], output: Tensor) -> list[Tensor]:
        """The registers after a call; the formulas are those of dcc.runtime.sampler."""
        entry, latent = self.table.calls[call], registers[0]
        output = output.to(latent.dtype)
        mean, variance = output[:, : latent.shape[1]], output[:, latent.shape[1] :]
        clipped, noise = torch.zeros_like(latent), torch.zeros_like(latent)
        if entry.convert is not None and self.table.clip is not None:
            clipped = entry.convert[0] * latent + entry.convert[1] * mean
            clipped = clipped.clamp(-self.table.clip, self.table.clip)
        if entry.draws:
            noise = self.noise[call + 1].to(latent.dtype)
            if entry.variance is not None:
                factor = entry.variance[0] + entry.variance[1] * variance
                noise = (factor.exp() if self.table.variance == "range" else factor.sqrt()) * noise
        sources = [*registers, mean, clipped, noise]
        return [
            sum((value * source for value, source in zip(row, sources, strict=True) if value), torch.zeros_like(latent))
            for row in entry.matrix
        ]

    def exact(self, call: int, latent: Tensor) -> tuple[Tensor, Slots]:
        """The guided output with everything computed, and all branches."""
        with torch.no_grad():
            return self._run(call, latent, lambda index, fresh: fresh())

    def routed(self, call: int, latent: Tensor, slots: Slots, computes: Sequence[bool]) -> tuple[Tensor, Slots]:
        """The guided output that computes some components and reads the slots of the others, and the slots after."""
        with torch.no_grad():
            return self._run(call, latent, lambda index, fresh: fresh() if computes[index] else slots[index])

    def blended(self, call: int, latent: Tensor, slots: Slots, ratios: Tensor) -> tuple[Tensor, Slots]:
        """The guided output of blended components, differentiable, and the fresh branches, which are not."""
        fresh_branches: Slots = []

        def blend(index: int, fresh: Callable[[], Branches]) -> Branches:
            new = fresh()
            fresh_branches.append(tuple(tensor.detach() for tensor in new))
            return tuple(old + ratios[index] * (value - old) for old, value in zip(slots[index], new, strict=True))

        return self._run(call, latent, blend)[0], fresh_branches

    def simulate(
        self, computes: Sequence[Sequence[bool]], first: int = 0, registers: list[Tensor] | None = None,
        slots: Slots | None = None,
    ) -> Tensor:  # fmt: skip
        """The final latent where `computes[call]` says what is computed, from call `first` on."""
        registers = self.start() if registers is None else registers
        slots = [] if slots is None else slots
        for call in range(first, len(self.table.calls)):
            output, slots = self.routed(call, registers[0], slots, computes[call])
            registers = self.advance(call, registers, output)
        return registers[0]

    def _prepare(self, conditions: Mapping[str, Tensor], timestep: float, rows: int) -> dict[Node, Tensor]:
        """Inputs without the latent, and values of the early stages, at one call."""
        values = {self.inputs[name]: value for name, value in conditions.items()}
        for item in self.program.input(Role.TIMESTEP):
            shape = [rows if isinstance(size, str) else size for size in item.shape]
            values[self.inputs[item.name]] = torch.full(shape, timestep, dtype=DTYPES[item.dtype])
        with torch.no_grad():
            for stage in self.program.stages:
                if stage.kind in EARLY:
                    values.update(self._stage(stage, values))
        return values

    def _run(self, call: int, latent: Tensor, branches: Callable[..., Branches]) -> tuple[Tensor, Slots]:
        """`branches(index, fresh)` says what a component gives, `fresh()` computes it."""
        values = dict(self.early[call])
        item = self.program.latent
        scaled = (latent * self.table.calls[call].input_scale).to(DTYPES[item.dtype])
        values[self.inputs[item.name]] = torch.cat([scaled, scaled]) if self.guided else scaled
        given: Slots = []
        for stage in self.steps:
            if stage.kind == "component":
                results = branches(len(given), lambda stage=stage: tuple(self._stage(stage, values).values()))
                given.append(results)
                values.update(zip(stage.outputs, results, strict=True))
            else:
                values.update(self._stage(stage, values))
        return self._guide(values[self.final]), given

    def _guide(self, output: Tensor) -> Tensor:
        """`u + s (c - u)` on the predicted channels; the rest is the conditional half's own."""
        if not self.guided:
            return output
        guidance = self.program.guidance
        wanted, null = output.chunk(2)
        mixed = null + guidance.scale * (wanted - null)
        if guidance.channels is None:
            return mixed
        return torch.cat([mixed[:, : guidance.channels], wanted[:, guidance.channels :]], dim=1)

    def _stage(self, stage: Stage, values: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        return run_stage(self.program, stage.template, stage.inputs, stage.weights, stage.outputs, values)


def image_gains(batch: Batch) -> Tensor:
    """By call: squared error of the final sample over that of the guided output, if the call reuses everything.

    Everything else is computed. At most PROBES calls are measured; between them the logarithm is interpolated.
    """
    calls = len(batch.table.calls)
    count = min(calls - 1, PROBES)
    probes = sorted({1 + round(index * (calls - 2) / max(1, count - 1)) for index in range(count)})
    registers = batch.start()
    slots: list[Any] = []
    everything: list[list[bool]] = [[True] * len(batch.program.components)] * calls
    wrong: list[tuple[int, float, Tensor]] = []
    for call in range(calls):
        exact, fresh = batch.exact(call, registers[0])
        if call in probes:
            output, _ = batch.routed(call, registers[0], slots, [False] * len(slots))
            moved = batch.advance(call, registers, output)
            final = batch.simulate(everything, call + 1, moved, slots)
            wrong.append((call, float((output - exact).square().mean()), final))
        slots = fresh
        registers = batch.advance(call, registers, exact)
    ratios = {
        call: math.log(max(float((final - registers[0]).square().mean()), SMALLEST) / max(error, SMALLEST))
        for call, error, final in wrong
    }
    return torch.tensor([_between(ratios, probes, call) for call in range(calls)]).exp()


def router_gains(batch: Batch, computes: Sequence[Sequence[bool]], gains: Tensor) -> Tensor:
    """By call: what the final sample's squared error gains over that of the output, if the call computes everything.

    The router decides the other calls. A call that computes everything, or is not measured, keeps its `gains`; others
    stay within a factor CONTEXT of it: near a sample without an error the difference says nothing.
    """
    calls = len(computes)
    everything = [True] * len(computes[0])
    exact = batch.simulate([everything] * calls)
    reusing = [call for call in range(1, calls) if not all(computes[call])]
    probes = {reusing[index * len(reusing) // min(len(reusing), PROBES)] for index in range(min(len(reusing), PROBES))}
    registers = batch.start()
    slots: list[Any] = []
    found: list[tuple[int, float, Tensor]] = []
    for call in range(calls):
        output, after = batch.routed(call, registers[0], slots, computes[call])
        if call in probes:
            wanted, fresh = batch.exact(call, registers[0])
            moved = batch.advance(call, registers, wanted)
            final = batch.simulate(computes, call + 1, moved, fresh)
            found.append((call, float((output - wanted).square().mean()), final))
        slots = after
        registers = batch.advance(call, registers, output)
    error = float((registers[0] - exact).square().mean())
    result = gains.clone()
    for call, step_error, final in found:
        gained = (error - float((final - exact).square().mean())) / max(step_error, SMALLEST)
        base = float(gains[call])
        result[call] = min(max(gained, base / CONTEXT), base * CONTEXT)
    return result


def _between(values: Mapping[int, float], known: Sequence[int], call: int) -> float:
    above = next((place for place in known if place >= call), known[-1])
    below = next((place for place in reversed(known) if place <= call), known[0])
    part = (call - below) / (above - below) if above > below else 0.0
    return (1 - part) * values[below] + part * values[above]


def _condition(
    item: Input, options: LearnedRouter, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Values of a condition for `images` rows, and its row in the unconditional half if that is known."""
    null = None if item.null is None else torch.tensor(item.null)
    if item.name in options.negative:
        null = options.negative[item.name]
    if item.name in options.conditions:
        given = options.conditions[item.name]
        if item.shape[:1] != (BATCH,):
            return given, null
        return given[torch.randint(len(given), (images,), generator=generator)], null
    if item.minimum is None or item.maximum is None or item.shape != (BATCH,):
        raise Declined(f"the values of condition '{item.name}' are not known: give conditions")
    values = torch.tensor([value for value in range(item.minimum, item.maximum + 1) if value != item.null])
    return values[torch.randint(len(values), (images,), generator=generator)], null


def _guided(program: Program) -> bool:
    return program.guidance.mode != "none" and program.guidance.scale != 1.0 and bool(program.input(Role.CONDITION))


def _logit(ratio: float) -> float:
    return math.log(ratio / (1 - ratio))
