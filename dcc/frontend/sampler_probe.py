"""Turn a diffusers scheduler into a table by running it on numbers chosen to reveal its coefficients.

Nothing of the scheduler's source is read. It runs once in float64 on a tensor whose last axis is a set of
independent *columns*: for every call a fresh random latent, output and noise. The scheduler's own
latent-shaped tensors are registers. Each new register is then solved for as a linear function of the old
ones, the output, the clipped prediction and the noise; a register that no later call reads is dropped.

Groups of columns separate what would otherwise mix. A plain sampler needs one, `unit`, fitted with the noise.
Else `tiny` (nothing is clipped, no noise) and the difference of `large` and `double` (everything is clipped)
give both sides of a clip, and `noise` the noise term as a function of a predicted variance. `check` is never
fitted and must be predicted to 1e-5.

Then the table is replayed against the scheduler, in the table's dtype, over the whole loop.
Refuses   whatever fails one of the two checks: thresholding, private noise, divisions by zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dcc.errors import ArtifactError
from dcc.frontend.sampler_replay import (
    REPLAY_TOLERANCE,
    Draws,
    Source,
    patched_noise,
    replay_error,
    scale_input,
    take_step,
)
from dcc.runtime.sampler import Array, SamplerCall, SamplerTable

PROBE_TOLERANCE = 1e-5
HISTORY = 6  # tensors of a list that are looked at: IPNDM keeps all of its history and reads four
ZERO_SNR = "zero terminal SNR divides by zero unless prediction_type is 'v_prediction' or 'sample'"
SAMPLE = "sample"  # the key of the latent among the registers
UNIT, TINY, LARGE, DOUBLE, NOISE, CHECK = (slice(32 * i, 32 * (i + 1)) for i in range(6))
COLUMNS = 32 * 6


@dataclass
class Observed:
    """One call on the columns: arrays are `[COLUMNS]`, `before` and `after` hold the registers by name."""

    timestep: int | float
    input_scale: float
    before: dict[str, Array]
    output: Array
    predicted: Array
    noise: Array
    after: dict[str, Array]
    draws: int
    pinned_dtype: str | None


@dataclass
class Row:
    """A new register as coefficients: by register, of the output, of the clipped prediction, of noise."""

    registers: dict[str, float]
    output: float
    clipped: float = 0.0
    noise: float = 0.0
    convert: tuple[float, float] | None = None
    variance: tuple[float, float] | None = None

    def copied(self) -> str | None:
        """The register that this row merely keeps, if it does."""
        if len(self.registers) != 1 or self.output or self.clipped or self.noise:
            return None
        ((name, coefficient),) = self.registers.items()
        return name if coefficient == 1.0 else None


def probe(source: Source, dtype: str = "float32") -> SamplerTable:
    """Return the table of `source`, which reproduced the scheduler's whole loop; else raise SamplerError."""
    config = source.scheduler.config
    if config.get("thresholding"):
        source.refuse(
            "uses dynamic thresholding, which is not linear", got="thresholding=True",
            want="thresholding=False",
            next="give thresholding=False, with clip_sample=True where the sampler has it",
        )  # fmt: skip
    # What is not finite is refused below, by name; numpy's own warnings would only come first.
    with np.errstate(all="ignore"):
        observed = _observe(source)
        solved, live = _solve(source, observed)
    registers, calls = _assemble(source, observed, solved, live, dtype)
    prediction = config.get("prediction_type") or ("flow" if "Flow" in source.kind else "unknown")
    table = SamplerTable(
        name=source.name,
        scheduler=source.kind,
        prediction=str(prediction),
        steps=source.steps,
        dtype=dtype,
        registers=registers,
        init_sigma=float(getattr(source.prepare(), "init_noise_sigma", 1.0)),
        clip=source.clip if any(call.convert for call in calls) else None,
        variance=source.variance if any(call.variance for call in calls) else None,
        calls=tuple(calls),
    )
    try:
        # The reader's rules hold for every table that is written.
        table = SamplerTable.from_json(table.to_json())
    except ArtifactError as broken:
        source.refuse("gives numbers that no table may hold", got=broken, want="finite numbers of moderate size")
    error = replay_error(source, table)
    # Over few steps of very different size float32 itself may lose more, in the scheduler as in the table.
    if not error <= REPLAY_TOLERANCE and not replay_error(source, replace(table, dtype="float64")) <= 1e-6:
        source.refuse(
            "is not reproduced by its table over the whole loop", got=f"relative error {error:.2g}",
            want=f"{REPLAY_TOLERANCE:g} or less",
        )  # fmt: skip
    return table


def _stored(scheduler: Any, shape: torch.Size) -> dict[str, Array]:
    """The scheduler's own latent-shaped tensors, copied: PNDM adds to its own in place."""
    found: dict[str, Array] = {}
    for name, value in vars(scheduler).items():
        items = list(value) if isinstance(value, list | tuple) else [value]
        for index, item in list(enumerate(items))[-HISTORY:]:
            if isinstance(item, torch.Tensor) and item.shape == shape:
                found[f"{name}[{index}]"] = item.to(torch.float64).numpy().reshape(-1).copy()
    return found


def _column_scales(clip: float | None) -> Array:
    scales = np.ones(COLUMNS)
    reach = clip or 1.0
    scales[UNIT] = scales[CHECK] = 2.0 * reach  # beyond the clip, so that a hidden one is noticed
    scales[TINY] = scales[NOISE] = 1e-6
    scales[LARGE] = 1e4 * reach
    return scales


def _draw_columns(source: Source, random: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Return a call's latent, output, noise and predicted variance, each group as the module's text says."""
    scales = _column_scales(source.clip)
    sample, output = (random.standard_normal(COLUMNS) * scales for _ in range(2))
    sample[DOUBLE], output[DOUBLE] = 2.0 * sample[LARGE], 2.0 * output[LARGE]
    noise = np.zeros(COLUMNS)
    for group in (NOISE, CHECK, UNIT) if source.plain else (NOISE, CHECK):
        noise[group] = random.standard_normal(32)
    low = -1.0 if source.variance == "range" else 0.05  # a variance is positive, its position in a range is not
    return sample, output, noise, random.uniform(low, 1.0, COLUMNS)


def _input_scale(source: Source, sample: Array, scaled: Array, timestep: float) -> float:
    _check_finite(source, scaled, timestep)
    scale = float(scaled @ sample / (sample @ sample))
    if not np.allclose(scaled, scale * sample, rtol=1e-6, atol=0.0):
        source.refuse(
            "does not scale the denoiser's input by a number", got=f"another input at timestep {timestep}",
            want="scale_model_input = a * sample",
        )  # fmt: skip
    return scale


def _observe(source: Source) -> list[Observed]:
    """Run the loop once in float64 on the columns and record every call."""
    scheduler = source.prepare()
    random = np.random.default_rng(20240607)
    shape = torch.Size((1, 1, 1, COLUMNS))
    stored: dict[str, Array] = {}
    calls = []
    for timestep in scheduler.timesteps:
        sample, output, noise, predicted = _draw_columns(source, random)
        tensor = torch.from_numpy(sample.reshape(shape))
        scaled = scale_input(scheduler, tensor.clone(), timestep).numpy().reshape(-1)
        input_scale = _input_scale(source, sample, scaled, timestep.item())
        values = [output] if source.variance is None else [output, predicted]
        draws = Draws(noise)
        with patched_noise(scheduler, draws):
            given = torch.from_numpy(np.stack(values).reshape(1, len(values), 1, COLUMNS))
            result = take_step(source, scheduler, given, timestep, tensor.clone())
        before = {SAMPLE: sample, **stored}
        stored = _stored(scheduler, shape)
        after = {SAMPLE: result.to(torch.float64).numpy().reshape(-1).copy(), **stored}
        pinned = "float32" if draws.dtype == torch.float32 else None
        if draws.count > 1:
            source.refuse("draws noise more than once in a call", got=draws.count, want="0 or 1")
        calls.append(
            Observed(timestep.item(), input_scale, before, output, predicted, noise, after, draws.count, pinned)
        )
    return calls


def _check_finite(source: Source, values: Array, timestep: float) -> None:
    if not np.isfinite(values).all():
        zero_snr = source.scheduler.config.get("rescale_betas_zero_snr")
        source.refuse(
            f"gives numbers that are not finite at timestep {timestep}", got="a division by zero",
            want="finite coefficients", next=ZERO_SNR if zero_snr else "take another number of steps",
        )  # fmt: skip


def _solve(source: Source, observed: list[Observed]) -> tuple[list[dict[str, Row]], list[list[str]]]:
    """Solve backwards from the sample, so that only registers that a later call reads are solved and kept.

    Returns the rows of each call by register, and what is live before each call and at the end.
    """
    rows: list[dict[str, Row]] = [{} for _ in observed]
    live: list[list[str]] = [[SAMPLE] for _ in range(len(observed) + 1)]
    for index in reversed(range(len(observed))):
        call = observed[index]
        for name in live[index + 1]:
            _check_finite(source, call.after[name], call.timestep)
        basis = _independent(call.before)
        rows[index] = {name: _solve_row(source, call, basis, name) for name in live[index + 1]}
        used = {register for row in rows[index].values() for register in row.registers}
        live[index] = [SAMPLE, *sorted(used - {SAMPLE})]
    if live[0] != [SAMPLE]:
        source.refuse("starts from more than the latent", got=live[0], want=[SAMPLE])
    return rows, live


def _independent(registers: dict[str, Array]) -> list[str]:
    """Choose registers none of which is a combination of the others, the sample first."""
    directions: list[Array] = []
    chosen = []
    for name, values in registers.items():
        vector = values[UNIT]
        size = float(np.linalg.norm(vector))
        if size == 0.0:
            continue
        rest = vector / size
        for direction in directions:
            rest = rest - (rest @ direction) * direction
        if (length := float(np.linalg.norm(rest))) > 1e-5:
            chosen.append(name)
            directions.append(rest / length)
    return chosen


def _fit(matrix: Array, target: Array) -> tuple[Array, float]:
    """Least squares, terms below the noise of the fit set to 0; returns coefficients, relative residual."""
    sizes = np.linalg.norm(matrix, axis=1)
    scaled = matrix / sizes[:, None]
    solution = np.linalg.lstsq(scaled.T, target, rcond=None)[0]
    reach = max(float(np.abs(solution).max()), float(np.linalg.norm(target)), 1e-300)
    residual = float(np.linalg.norm(scaled.T @ solution - target)) / reach
    keep = np.abs(solution) > max(1e-12, 2.0 * residual) * reach
    solution = np.zeros_like(solution)
    if keep.any():
        solution[keep] = np.linalg.lstsq(scaled[keep].T, target, rcond=None)[0]
    return solution / sizes, residual


def _solve_row(source: Source, call: Observed, basis: list[str], name: str) -> Row:
    """Solve one new register, noise and clip included, and check it on columns that were not fitted."""
    target = call.after[name]
    inputs = np.stack([*(call.before[register] for register in basis), call.output])
    row = Row({}, 0.0)
    if source.plain:
        given = np.vstack([inputs, call.noise[None]]) if call.draws else inputs
        coefficients, _ = _fit(given[:, UNIT], target[UNIT])
        if call.draws:
            coefficients, row.noise = coefficients[:-1], float(coefficients[-1])
    else:
        coefficients, _ = _fit(inputs[:, TINY], target[TINY])
        if call.draws:
            row.noise, row.variance = _solve_noise(source, call, (target - coefficients @ inputs)[NOISE])
        if source.clip is not None:
            coefficients, row.clipped, row.convert = _solve_clip(inputs, target, coefficients, source.clip)
    coefficients[np.abs(coefficients - 1.0) < 1e-13] = 1.0
    row.registers = {register: float(value) for register, value in zip(basis, coefficients, strict=False) if value}
    row.output = float(coefficients[-1])
    _check_row(source, call, row, name)
    return row


def _solve_clip(
    inputs: Array, target: Array, linear: Array, clip: float
) -> tuple[Array, float, tuple[float, float] | None]:
    """Split `linear`, the coefficients while nothing is clipped, into a direct part and one through the clip.

    The sample is the first input and the output the last; registers in between never pass through the clip.
    """
    ends = np.array([0, -1])
    coefficients = linear.copy()
    coefficients[ends] = 0.0
    change = inputs[:, DOUBLE] - inputs[:, LARGE]
    moved = target[DOUBLE] - target[LARGE] - coefficients @ change
    direct, _ = _fit(change[ends], moved)
    # A column may lie where the prediction is 0 and nothing is clipped: leave out those that fit worst.
    best = np.argsort(np.abs(moved - direct @ change[ends]))[:24]
    coefficients[ends], _ = _fit(change[np.ix_(ends, best)], moved[best])
    rest = target[LARGE] - coefficients @ inputs[:, LARGE]
    clipped = float(np.median(np.abs(rest))) / clip
    p, q = (linear - coefficients)[ends]
    if clipped * clip < 1e-9 * float(np.abs(target[LARGE]).max()) and np.abs([p, q]).max() < 1e-9:
        return linear, 0.0, None
    return coefficients, clipped, (float(p / clipped), float(q / clipped))


def _solve_noise(source: Source, call: Observed, rest: Array) -> tuple[float, tuple[float, float] | None]:
    """Return the noise's coefficient, or 1 and `(g0, g1)` where the model predicts the variance."""
    noise = call.noise[NOISE]
    factor = rest / noise
    if source.variance is not None and (factor > 0.0).all():
        values = np.log(factor) if source.variance == "range" else factor**2
        slope, start = np.polyfit(call.predicted[NOISE], values, 1)
        # The root of a variance that is 0 but for rounding would not exist.
        return 1.0, (float(start) if abs(start) > 1e-12 else 0.0, float(slope))
    coefficient = float(rest @ noise / (noise @ noise))
    return (coefficient if abs(coefficient) > 1e-12 else 0.0), None


def _check_row(source: Source, call: Observed, row: Row, name: str) -> None:
    """Predict the columns kept for checking; what is not of the table's form shows here."""
    values = {register: array[CHECK] for register, array in call.before.items()}
    terms = [coefficient * values[register] for register, coefficient in row.registers.items()]
    terms.append(row.output * call.output[CHECK])
    if row.convert is not None and source.clip is not None:
        p, q = row.convert
        prediction = p * values[SAMPLE] + q * call.output[CHECK]
        terms.append(row.clipped * np.clip(prediction, -source.clip, source.clip))
    factor = np.ones(32)
    if row.variance is not None:
        exponent = row.variance[0] + row.variance[1] * call.predicted[CHECK]
        factor = np.exp(exponent) if source.variance == "range" else np.sqrt(exponent)
    terms.append(row.noise * factor * call.noise[CHECK])
    reach = max(float(np.abs(term).max()) for term in terms)
    error = float(np.abs(sum(terms) - call.after[name][CHECK]).max())
    if not error <= PROBE_TOLERANCE * max(reach, 1e-12):
        zero_snr = source.scheduler.config.get("rescale_betas_zero_snr")
        source.refuse(
            f"is not linear at timestep {call.timestep}",
            got=f"relative error {error / max(reach, 1e-12):.2g}",
            want=f"{PROBE_TOLERANCE:g} or less",
            next=ZERO_SNR if zero_snr else "take a sampler of list_samplers()",
        )


def _assemble(
    source: Source, observed: list[Observed], solved: list[dict[str, Row]], live: list[list[str]], dtype: str
) -> tuple[int, list[SamplerCall]]:
    """Number the live registers and write the matrices; a register that is only kept stays in place."""
    registers = max(map(len, live))
    slots = {SAMPLE: 0}
    steps = _steps_of_calls(source, len(observed))
    calls = []
    for call, rows, step in zip(observed, solved, steps, strict=True):
        convert = _common_convert(rows)
        new_slots = _place(rows, slots, registers)
        matrix = np.zeros((registers, registers + 3))
        matrix[np.arange(registers), np.arange(registers)] = 1.0  # a dead register is left alone
        for name, row in rows.items():
            line = matrix[new_slots[name]]
            line[:] = 0.0
            for register, coefficient in row.registers.items():
                line[slots[register]] = coefficient
            line[registers:] = row.output, row.clipped, row.noise
        sample = rows[SAMPLE]
        calls.append(
            SamplerCall(
                timestep=call.timestep,
                input_scale=call.input_scale,
                convert=convert,
                matrix=tuple(tuple(map(float, line)) for line in matrix),
                variance=sample.variance,
                draws=call.draws,
                draw_dtype=call.pinned_dtype or dtype,
                step=step,
            )
        )
        slots = new_slots
    return registers, calls


def _common_convert(rows: dict[str, Row]) -> tuple[float, float] | None:
    """Give the rows of a call one sign: the clip is odd, so each row alone leaves it open."""
    clipped = [row for row in rows.values() if row.convert is not None]
    if not clipped:
        return None
    common = np.array(clipped[0].convert)
    for row in clipped:
        if common @ np.array(row.convert) < 0:
            row.clipped = -row.clipped
    return clipped[0].convert


def _place(rows: dict[str, Row], slots: dict[str, int], registers: int) -> dict[str, int]:
    """Number the registers after a call: 0 is the sample, copies keep theirs, the rest take what is free."""
    placed = {SAMPLE: 0}
    for name, row in rows.items():
        origin = row.copied()
        if name != SAMPLE and origin is not None and slots[origin] not in placed.values():
            placed[name] = slots[origin]
    free = [slot for slot in range(registers) if slot not in placed.values()]
    for name in rows:
        if name not in placed:
            placed[name] = free.pop(0)
    return placed


def _steps_of_calls(source: Source, calls: int) -> list[int]:
    """Say which step each call belongs to: Heun calls twice a step, PNDM's Runge-Kutta start four times."""
    steps = source.steps
    if calls == 2 * steps - 1:
        return [call // 2 for call in range(calls)]
    if calls == steps + 9 and source.kind == "PNDMScheduler":
        return [call // 4 if call < 12 else call - 9 for call in range(calls)]
    if calls == steps + 1 and source.kind == "PNDMScheduler":
        return [max(0, call - 1) for call in range(calls)]
    return [call * steps // calls for call in range(calls)]
