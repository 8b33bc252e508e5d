"""Samplers as tables: the whole update rule of a sampler as numbers, and the few lines that execute them.

A *call* is one call of the denoiser; a Heun or PNDM *step* takes more than one. State is `registers` arrays
of the latent's shape; register 0 is the latent. Call `i` computes, with `x` the registers, `m` the denoiser's
output and `n` fresh noise:

    input  = input_scale * x[0]
    D      = clip(p * x[0] + q * m, -clip, clip)     where `convert = (p, q)`: the prediction of x0
    n'     = exp(g0 + g1 * v) * n                    where `variance = (g0, g1)` and the table says "range"
             sqrt(g0 + g1 * v) * n                   ... and the table says "direct"
    x      = matrix @ [x, m, D, n']                  `[R, R + 3]`

`v` is the second half of the output's channels in models that predict their variance. Draws are counted, not
inferred: several samplers draw noise that they multiply by 0, and the stream of the generator must not shift.

Numerics  coefficients are float64 and exact through JSON; arithmetic runs in the table's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, cast

import numpy as np

from dcc.errors import ArtifactError, ExecutionError

DTYPES = ("float32", "float64")
VARIANCES = ("range", "direct")
MAXIMUM_REGISTERS = 16
MAXIMUM_CALLS = 20_000
MAXIMUM_TEXT = 200
MAXIMUM_TIMESTEP = 2**31 - 1
MAXIMUM_NUMBER = 1e30  # products of two stay finite in float64, and each is finite in float32

Array = np.ndarray[Any, np.dtype[Any]]
DrawNoise = Callable[[str], Array]


@dataclass(frozen=True)
class SamplerCall:
    """One call of the denoiser and the update after it; see the module's text for the formulas.

    `timestep` is what the denoiser is given, an int where the scheduler counts in ints. `step` says which of
    the sampler's steps the call belongs to.
    """

    timestep: int | float
    input_scale: float
    convert: tuple[float, float] | None
    matrix: tuple[tuple[float, ...], ...]
    variance: tuple[float, float] | None
    draws: int
    draw_dtype: str
    step: int


@dataclass(frozen=True)
class SamplerTable:
    """A sampler with its number of steps fixed. `name`, `scheduler` and `prediction` are for reports."""

    name: str
    scheduler: str
    prediction: str
    steps: int
    dtype: str
    registers: int
    init_sigma: float
    clip: float | None
    variance: str | None
    calls: tuple[SamplerCall, ...]

    @property
    def output_multiple(self) -> int:
        """How many times the latent's channels the denoiser must return."""
        return 1 if self.variance is None else 2

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `json.dumps` writes each float so that it reads back as the same float64."""
        return asdict(self)

    @staticmethod
    def from_json(data: object) -> SamplerTable:
        """Check every field of `data`, which nobody vouches for, and return the table; else ArtifactError."""
        entries = _fields(data, SamplerTable, "sampler")
        registers = _integer(entries["registers"], "sampler.registers", 1, MAXIMUM_REGISTERS)
        steps = _integer(entries["steps"], "sampler.steps", 1, MAXIMUM_CALLS)
        calls = _list(entries["calls"], "sampler.calls", 1, MAXIMUM_CALLS)
        clip, variance = entries["clip"], entries["variance"]
        table = SamplerTable(
            name=_text(entries["name"], "sampler.name"),
            scheduler=_text(entries["scheduler"], "sampler.scheduler"),
            prediction=_text(entries["prediction"], "sampler.prediction"),
            steps=steps,
            dtype=_choice(entries["dtype"], "sampler.dtype", DTYPES),
            registers=registers,
            init_sigma=_number(entries["init_sigma"], "sampler.init_sigma"),
            clip=None if clip is None else _number(clip, "sampler.clip", 0.0),
            variance=None if variance is None else _choice(variance, "sampler.variance", VARIANCES),
            calls=tuple(_call(call, f"sampler.calls[{i}]", registers, steps) for i, call in enumerate(calls)),
        )
        _check_consistent(table)
        return table


class Sampler:
    """Executes a table on latents of one shape `[images, channels, ...]`.

    For each call in order: `model_input(i)`, the denoiser, `advance(i, output, draw_noise)`. Buffers are
    allocated by the first request and kept for the next.
    """

    def __init__(self, table: SamplerTable, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ExecutionError("a latent needs images and channels", got=shape, want="[images, channels, ...]")
        self.table = table
        self.shape = tuple(shape)
        self._dtype = np.dtype(table.dtype)
        self._registers = [np.zeros(self.shape, self._dtype) for _ in range(table.registers)]
        self._spare: list[Array] = []
        self._term, self._clipped, self._scaled_noise, self._input = (self._empty() for _ in range(4))
        self._next = len(table.calls)

    @property
    def latent(self) -> Array:
        """The current latent: after the last call, the sample. Valid until the next `advance` or `start`."""
        return self._registers[0]

    def start(self, noise: Array) -> None:
        """Begin a request from standard normal `noise`, which is scaled here and not kept."""
        self._check_shape(noise, "the initial noise")
        np.multiply(noise, self.table.init_sigma, out=self._registers[0], casting="same_kind")
        for register in self._registers[1:]:
            register.fill(0)
        self._next = 0

    def fork(self) -> Sampler:
        """Another sampler in the same state, which goes on by itself."""
        other = Sampler(self.table, self.shape)
        for mine, theirs in zip(self._registers, other._registers, strict=True):
            np.copyto(theirs, mine)
        other._next = self._next
        return other

    def model_input(self, call: int) -> Array:
        """Return the latent as the denoiser takes it at this call: read-only for the caller, until `advance`."""
        scale = self._expect(call).input_scale
        if scale == 1.0:
            return self._registers[0]
        return cast(Array, np.multiply(self._registers[0], scale, out=self._input))

    def advance(self, call: int, output: Array, draw_noise: DrawNoise) -> Array:
        """Update the registers with the denoiser's output and return the new latent.

        `draw_noise(dtype)` is called as often as the original scheduler draws, even if the noise is unused.
        """
        entry = self._expect(call)
        mean, variance = self._split(output)
        sources = [*self._registers, mean, self._clipped, self._scaled_noise]
        if entry.convert is not None and self.table.clip is not None:
            self._combine(entry.convert, (self._registers[0], mean), self._clipped)
            np.clip(self._clipped, -self.table.clip, self.table.clip, out=self._clipped)
        for _ in range(entry.draws):
            noise = np.asarray(draw_noise(entry.draw_dtype), self._dtype)
            self._check_shape(noise, "noise")
            sources[-1] = noise if entry.variance is None else self._scale_noise(noise, variance, entry.variance)
        self._update(entry.matrix, sources)
        self._next += 1
        return self._registers[0]

    def _update(self, matrix: tuple[tuple[float, ...], ...], sources: list[Array]) -> None:
        """Compute every row that changes its register from the old values, then put the new ones in place."""
        changed: dict[int, Array] = {}
        for index, row in enumerate(matrix):
            if row[index] == 1.0 and sum(value != 0.0 for value in row) == 1:
                continue
            target = self._spare.pop() if self._spare else self._empty()
            changed[index] = self._combine(row, sources, target)
        for index, target in changed.items():
            self._spare.append(self._registers[index])
            self._registers[index] = target

    def _combine(self, row: tuple[float, ...], sources: list[Array] | tuple[Array, ...], target: Array) -> Array:
        """`target = sum(row * sources)`; a source whose coefficient is 0 is not read."""
        started = False
        for coefficient, source in zip(row, sources, strict=True):
            if coefficient == 0.0:
                continue
            if started:
                np.multiply(source, coefficient, out=self._term)
                np.add(target, self._term, out=target)
            else:
                np.multiply(source, coefficient, out=target)
                started = True
        if not started:
            target.fill(0)
        return target

    def _scale_noise(self, noise: Array, values: Array | None, variance: tuple[float, float]) -> Array:
        if values is None:
            raise ExecutionError(
                "this sampler needs the variance that the model predicts",
                got=f"{self.shape[1]} output channels",
                want=f"{2 * self.shape[1]}", next="compile with variance_type='fixed_small'",
            )  # fmt: skip
        factor = np.multiply(values, variance[1], out=self._scaled_noise)
        factor += variance[0]
        if self.table.variance == "range":
            np.exp(factor, out=factor)
        elif factor.min() < 0:
            raise ExecutionError("the model predicts a negative variance", got=float(factor.min()), want="0 or more")
        else:
            np.sqrt(factor, out=factor)
        factor *= noise
        return cast(Array, factor)

    def _split(self, output: Array) -> tuple[Array, Array | None]:
        """Separate the prediction from a predicted variance, which samplers with a fixed one ignore."""
        values = np.asarray(output, self._dtype)
        channels = self.shape[1]
        if values.shape == self.shape:
            return values, None
        if values.shape == (self.shape[0], 2 * channels, *self.shape[2:]):
            return values[:, :channels], values[:, channels:]
        raise ExecutionError(
            "the denoiser's output does not have the latent's shape", got=values.shape,
            want=f"{self.shape}, or twice the channels",
        )  # fmt: skip

    def _expect(self, call: int) -> SamplerCall:
        if call != self._next or not 0 <= call < len(self.table.calls):
            want = self._next if self._next < len(self.table.calls) else "start() first"
            raise ExecutionError("sampler calls are out of order", got=call, want=want)
        return self.table.calls[call]

    def _check_shape(self, values: Array, what: str) -> None:
        if tuple(values.shape) != self.shape:
            raise ExecutionError(f"{what} does not have the latent's shape", got=values.shape, want=self.shape)

    def _empty(self) -> Array:
        return np.empty(self.shape, self._dtype)


def _call(data: object, at: str, registers: int, steps: int) -> SamplerCall:
    entries = _fields(data, SamplerCall, at)
    rows = _list(entries["matrix"], f"{at}.matrix", registers, registers)
    return SamplerCall(
        timestep=_timestep(entries["timestep"], f"{at}.timestep"),
        input_scale=_number(entries["input_scale"], f"{at}.input_scale"),
        convert=_pair(entries["convert"], f"{at}.convert"),
        matrix=tuple(_numbers(row, f"{at}.matrix[{i}]", registers + 3) for i, row in enumerate(rows)),
        variance=_pair(entries["variance"], f"{at}.variance"),
        draws=_integer(entries["draws"], f"{at}.draws", 0, 1),
        draw_dtype=_choice(entries["draw_dtype"], f"{at}.draw_dtype", DTYPES),
        step=_integer(entries["step"], f"{at}.step", 0, steps - 1),
    )


def _check_consistent(table: SamplerTable) -> None:
    """Refuse a table whose parts contradict one another: a coefficient of what is never computed."""
    for i, call in enumerate(table.calls):
        at = f"sampler.calls[{i}]"
        if call.convert is not None and table.clip is None:
            _refuse(f"{at}.convert", "a conversion", "null in a table without clip")
        if call.convert is None and any(row[-2] != 0.0 for row in call.matrix):
            _refuse(f"{at}.matrix", "a coefficient of the clipped prediction", "0 where convert is null")
        if call.draws == 0 and any(row[-1] != 0.0 for row in call.matrix):
            _refuse(f"{at}.matrix", "a coefficient of noise", "0 where draws is 0")
        if call.variance is not None and (table.variance is None or call.draws == 0):
            _refuse(f"{at}.variance", "a learned variance", "null in a table or call without one")
        if i and call.step < table.calls[i - 1].step:
            _refuse(f"{at}.step", call.step, f"at least {table.calls[i - 1].step}, the call's before it")


def _refuse(at: str, got: object, want: object) -> NoReturn:
    # A hostile value may be megabytes long, and Python refuses to print very long integers.
    brief = f"a {type(got).__name__}" if isinstance(got, int | list | tuple | dict) else repr(got)[:MAXIMUM_TEXT]
    raise ArtifactError("the sampler table is damaged", at=at, got=brief, want=want, next="compile it again")


def _fields(data: object, kind: Any, at: str) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict):
        _refuse(at, data, "an object")
    if set(data) != names:
        _refuse(at, f"the fields {sorted(map(repr, data))[:20]}", f"the fields {sorted(names)}")
    return data


def _list(value: object, at: str, minimum: int, maximum: int) -> Sequence[object]:
    # Tuples too: `to_json` returns them, and a table in memory may skip the text form.
    if not isinstance(value, list | tuple) or not minimum <= len(value) <= maximum:
        _refuse(at, value, f"a list of {minimum} to {maximum} items")
    return value


def _integer(value: object, at: str, minimum: int, maximum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        _refuse(at, value, f"an integer, {minimum} to {maximum}")
    return value


def _number(value: object, at: str, minimum: float = -MAXIMUM_NUMBER, maximum: float = MAXIMUM_NUMBER) -> float:
    # The comparison is false for NaN, and exact for integers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
        _refuse(at, value, f"a number, {minimum:g} to {maximum:g}")
    return float(value)


def _timestep(value: object, at: str) -> int | float:
    if isinstance(value, int):
        return _integer(value, at, -MAXIMUM_TIMESTEP, MAXIMUM_TIMESTEP)
    return _number(value, at, -MAXIMUM_TIMESTEP, MAXIMUM_TIMESTEP)


def _numbers(value: object, at: str, count: int) -> tuple[float, ...]:
    return tuple(_number(item, f"{at}[{i}]") for i, item in enumerate(_list(value, at, count, count)))


def _pair(value: object, at: str) -> tuple[float, float] | None:
    if value is None:
        return None
    first, second = _numbers(value, at, 2)
    return first, second


def _choice(value: object, at: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        _refuse(at, value, " or ".join(choices))
    return value


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or len(value) > MAXIMUM_TEXT or not value.isprintable():
        _refuse(at, value, f"printable text of at most {MAXIMUM_TEXT} characters")
    return value
