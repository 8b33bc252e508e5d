"""What happens between two runs of the denoiser, as engines: guidance, the sampler's update, the next input.

On a device the loop has no arithmetic of its own. Each sampler call ends with one *update engine*; calls of one *kind*
share it and differ in a vector of numbers, the call's coefficients, so that the guidance scale stays an argument. An
engine's name is made from its kind: the compiler stores it under that name, and a runtime that would compute
something else does not find it.

With `c` and `u` the halves of the denoiser's output, `d` kept differences newest first, `x` the registers (0 is the
latent), `n` noise, and `v` a learned variance, which is the second half of the channels:

    o    = u + scale (c - u)            mode "both"; the difference c - u may be kept
           c + sum of weight_k d_k      mode "reuse"; weights are multiplied by scale - 1
           c                            mode "single"
    D    = clip(p x[0] + q m)           where the kind has `clip`; m is o without v
    n'   = exp(g0 + g1 v) n, or sqrt    where the kind has `variance`
    x'   = matrix @ [x, m, D, n']       the terms that some call of the kind needs
    next = input_scale x'[0]            the denoiser's next input

Numerics  everything is float32 here, also where the sampler's table is float64: differences stay near 1e-6.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dcc.errors import ExecutionError
from dcc.runtime.plan import CallGuidance, Plan, Shape, TensorSpec
from dcc.runtime.sampler import SamplerCall, SamplerTable

# Part of every engine's name: raise it when a kind's formulas, ports or coefficients change their meaning.
VERSION = 1
BATCH = "B"
START = "start"


@dataclass(frozen=True)
class UpdateKind:
    """What an update engine computes; `mode` is both, single or reuse, or start for the very first input.

    `differences` counts the kept differences that it reads, `keeps` says that it gives a new one of the first
    `channels` channels. `terms` has, for each register, the sources that it is made from (registers, then m, D, n'),
    or None where the register stays as it is. `latent` and `output` are shapes without the images, with their dtypes.
    """

    mode: str
    differences: int
    keeps: bool
    channels: int
    terms: tuple[tuple[int, ...] | None, ...]
    clip: float | None
    variance: str | None
    noise: bool
    latent: tuple[int, ...]
    latent_dtype: str
    output: tuple[int, ...]
    output_dtype: str

    @property
    def name(self) -> str:
        """The engine's name: equal for kinds that compute the same, different for others."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return f"update_{self.mode}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class UpdateCall:
    """The update after one sampler call: which kind, and its coefficients for a guidance scale of any value.

    The coefficient of scale is `values[0]` times the request's scale in mode both; weights of differences are
    multiplied by scale - 1. `kind` counts in `LoopSpec.kinds`.
    """

    kind: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class LoopSpec:
    """The updates of all sampler calls, with guidance and without. `depth` differences are kept.

    `guided` is empty where the artifact has no guidance. `kinds[start]` makes the first input from noise, with
    `start_values`.
    """

    registers: int
    depth: int
    kinds: tuple[UpdateKind, ...]
    start: int
    start_values: tuple[float, ...]
    guided: tuple[UpdateCall, ...]
    unguided: tuple[UpdateCall, ...]

    def calls(self, guided: bool) -> tuple[UpdateCall, ...]:
        return self.guided if guided else self.unguided

    @property
    def coefficients(self) -> int:
        """The longest vector of coefficients."""
        return max(len(call.values) for call in self.guided + self.unguided)


def loop_spec(plan: Plan, sampler: SamplerTable, guidance: dict[str, Any]) -> LoopSpec:
    """The updates of this plan under this sampler; `guidance` is the manifest's entry.

    Raises ExecutionError where the sampler needs what the denoiser does not give.
    """
    latent = next(item for item in plan.inputs if item.role == "latent")
    shape, output = _fixed(latent.shape), _fixed(plan.output.shape)
    channels = output[0] if guidance["channels"] is None else int(guidance["channels"])
    if output != shape and output != (2 * shape[0], *shape[1:]):
        raise ExecutionError(
            "the denoiser's output does not have the latent's shape", got=output,
            want=f"{shape}, or twice the channels",
        )  # fmt: skip
    modes = plan.guidance or (CallGuidance("both", ()),) * len(plan.order)
    depth = max((len(mode.weights) for mode in modes), default=0)
    single = (CallGuidance("conditional", ()),) * len(plan.order)
    empty = UpdateKind(
        "", 0, False, channels, (), None, None, False, shape, latent.dtype, output, plan.output.dtype
    )  # fmt: skip
    kinds: list[UpdateKind] = []
    runs = [("guided", modes)] if guidance["mode"] == "cfg" else []
    # Both runs together, so that a kind's terms are those of all its calls.
    everything = [
        (_kind(empty, call, sampler, mode, depth), call, index, mode, run)
        for run, entries in [*runs, ("unguided", single)]
        for index, (call, mode) in enumerate(zip(sampler.calls, entries, strict=True))
    ]
    for kind in dict.fromkeys(entry[0] for entry in everything):
        matrices = [call.matrix for other, call, *_ in everything if other == kind]
        kinds.append(replace(kind, terms=_terms(matrices)))
    places = {kind: number for number, kind in enumerate(dict.fromkeys(entry[0] for entry in everything))}
    found: dict[str, list[UpdateCall]] = {"guided": [], "unguided": []}
    for kind, call, index, mode, run in everything:
        following = sampler.calls[index + 1].input_scale if index + 1 < len(sampler.calls) else 1.0
        number = places[kind]
        found[run].append(UpdateCall(number, _values(kinds[number], call, mode, following)))
    kinds.append(replace(empty, mode=START, terms=((0,),), noise=True, output=(), output_dtype="", channels=0))
    return LoopSpec(
        sampler.registers, depth, tuple(kinds), len(kinds) - 1, (sampler.init_sigma, sampler.calls[0].input_scale),
        tuple(found["guided"]), tuple(found["unguided"]),
    )  # fmt: skip


def coefficient_names(kind: UpdateKind) -> list[str]:
    """What each entry of the kind's vector of coefficients multiplies, in order."""
    if kind.mode == START:
        return ["init_sigma", "input_scale"]
    names = ["scale"] if kind.mode == "both" else []
    names += [f"difference{index}" for index in range(kind.differences)]
    names += ["convert0", "convert1"] if kind.clip is not None else []
    names += ["variance0", "variance1"] if kind.variance is not None else []
    names += [f"matrix{row}_{source}" for row, sources in enumerate(kind.terms) for source in sources or ()]
    return [*names, "input_scale"]


def with_scale(kind: UpdateKind, values: Sequence[float], scale: float) -> list[float]:
    """The coefficients of a request whose guidance scale this is."""
    factors = {"scale": scale} | {f"difference{index}": scale - 1.0 for index in range(kind.differences)}
    return [value * factors.get(name, 1.0) for name, value in zip(coefficient_names(kind), values, strict=True)]


def update_ports(kind: UpdateKind) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the kind's engine; B counts images."""
    latent: Shape = (BATCH, *kind.latent)
    coefficients = TensorSpec("coefficients", "float32", (len(coefficient_names(kind)),))
    noise = [TensorSpec("noise", "float32", latent)] if kind.noise else []
    following = TensorSpec("next_input", kind.latent_dtype, latent)
    if kind.mode == START:
        return (*noise, coefficients), (TensorSpec("new_register0", "float32", latent), following)
    difference: Shape = (BATCH, kind.channels, *kind.output[1:])
    inputs = [TensorSpec("conditional", kind.output_dtype, (BATCH, *kind.output))]
    if kind.mode == "both":
        inputs.append(TensorSpec("null", kind.output_dtype, (BATCH, *kind.output)))
    inputs += [TensorSpec(f"register{index}", "float32", latent) for index in read_registers(kind)]
    inputs += [TensorSpec(f"difference{index}", "float32", difference) for index in range(kind.differences)]
    outputs = [
        TensorSpec(f"new_register{index}", "float32", latent)
        for index, sources in enumerate(kind.terms) if sources is not None
    ]  # fmt: skip
    if kind.keeps:
        outputs.append(TensorSpec("new_difference", "float32", difference))
    return (*inputs, *noise, coefficients), (*outputs, following)


def read_registers(kind: UpdateKind) -> list[int]:
    """The registers that the update reads."""
    read = {source for sources in kind.terms for source in sources or ()}
    if kind.clip is not None or kind.terms[0] is None:
        read.add(0)  # a prediction of x0 is made from the latent, and so is the next input
    return sorted(source for source in read if source < len(kind.terms))


def _kind(
    empty: UpdateKind, call: SamplerCall, sampler: SamplerTable, mode: CallGuidance, depth: int
) -> UpdateKind:  # fmt: skip
    """The kind of a call, its terms still open: whether each register stays is what they begin with."""
    noise = any(row[-1] != 0.0 for row in call.matrix)
    clipped = call.convert is not None and any(row[-2] != 0.0 for row in call.matrix)
    learned = noise and call.variance is not None
    if learned and empty.output == empty.latent:
        raise ExecutionError(
            "this sampler needs the variance that the model predicts", got=f"{empty.output[0]} output channels",
            want=f"{2 * empty.latent[0]}", next="compile with variance_type='fixed_small'",
        )  # fmt: skip
    return replace(
        empty, mode="single" if mode.mode == "conditional" else mode.mode, differences=len(mode.weights),
        keeps=mode.mode == "both" and depth > 0, clip=sampler.clip if clipped else None,
        variance=sampler.variance if learned else None, noise=noise,
    )  # fmt: skip


def _terms(matrices: Sequence[tuple[tuple[float, ...], ...]]) -> tuple[tuple[int, ...] | None, ...]:
    """For each register the sources that some call reads, or None if it stays in all of them."""
    found: list[tuple[int, ...] | None] = []
    for index in range(len(matrices[0])):
        rows = [matrix[index] for matrix in matrices]
        if all(row[index] == 1.0 and sum(value != 0.0 for value in row) == 1 for row in rows):
            found.append(None)
            continue
        read = [source for source in range(len(rows[0])) if any(row[source] != 0.0 for row in rows)]
        # A register that becomes zero is made from nothing; an engine needs something to make it from.
        found.append(tuple(read) or (index,))
    return tuple(found)


def _values(kind: UpdateKind, call: SamplerCall, mode: CallGuidance, following: float) -> tuple[float, ...]:
    known: dict[str, float] = {"scale": 1.0, "input_scale": following}
    known |= {f"difference{index}": weight for index, weight in enumerate(mode.weights)}
    for name, pair in (("convert", call.convert), ("variance", call.variance)):
        known |= {f"{name}{index}": value for index, value in enumerate(pair or ())}
    known |= {
        f"matrix{row}_{source}": value
        for row, values in enumerate(call.matrix) for source, value in enumerate(values)
    }  # fmt: skip
    return tuple(known[name] for name in coefficient_names(kind))


def _fixed(shape: Shape) -> tuple[int, ...]:
    """The shape without its images, where no other dimension is open."""
    sizes = tuple(size for size in shape[1:] if isinstance(size, int))
    if shape[:1] != (BATCH,) or len(sizes) != len(shape) - 1 or math.prod(sizes) < 1 or not sizes:
        raise ExecutionError("a device loop needs a latent of fixed size", got=shape, want=f"({BATCH}, channels, ...)")
    return sizes
