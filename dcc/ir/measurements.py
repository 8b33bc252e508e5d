"""What an exact run of the model on its own trajectories shows, and what a schedule pass sees of a Program.

`measure` turns the features of exact runs into `Measurements`, small enough for JSON. A *change* between an earlier
call a and a later call b is relative, in mean absolute values: `mean|v_b - v_a| / mean|v_a|`, over all rows.

`Subject` is all that a schedule pass knows. `apply_schedule` is what the `apply` of every such pass does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from dcc.errors import DccError, ScheduleError, UsageError
from dcc.ir.graph import op_name
from dcc.ir.ops import flops_of
from dcc.ir.program import PassReport, Program, Stage
from dcc.ir.schedule import BOTH, COMPUTE, GuidanceMode, Schedule, Unit, extrapolation, forecast

Array = np.ndarray[Any, np.dtype[Any]]
Value = Array | tuple[Array, ...]

FORMAT = 1
KIND = "dcc measurements"
WINDOW = 8
ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "_softmax"})
SMALLEST = 1e-30  # stands for a mean absolute value of zero
SIGNALS = ("first_block", "stack", "output", "latent", "guidance")
VECTORS = ("magnitude_ratio", "output_size", "latent_size", "sensitivity")
PAIRS = (*SIGNALS, "output_products")


class Declined(DccError):
    """A pass has no schedule for this subject; `reason` says why in one sentence."""

    stage = "schedule"

    @property
    def reason(self) -> str:
        return self.what


@dataclass(frozen=True)
class Features:
    """What one call of an exact run shows; rows are the conditional half first, then the unconditional one.

    `latent` is `[images, ...]` and `output` the denoiser's own, `[rows, ...]`. `branches` are the components' results
    before their gates, `streams` the residual stream before the first component and after each: one array
    `[rows, ..., width]`, or a tuple of them where a model has several streams.
    """

    call: int
    latent: Array
    output: Array
    images: int
    branches: tuple[Value, ...]
    streams: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Changes between calls of exact runs, averaged over runs; float64.

    branch           `[window, calls, components]`: at `[k - 1, t, c]` the change of a branch from call t - k to t
    first_block      `[calls, calls]`: at `[a, b]`, a < b, the change of what the first `first_block_components`
                     components add to the stream
    stack            the same for what all components add
    output, latent   the same for the denoiser's output and the latent
    guidance         the same for the difference of the halves; None where the run is not guided
    magnitude_ratio  `[calls]`: the mean over tokens of `|r_t| / |r_(t-1)|`, r being what all components add, and 1
                     for the first call (MagCache's gamma, arXiv:2506.09045)
    output_size, latent_size  `[calls]`: mean absolute values
    sensitivity      `[calls]`: root mean squared error of the sample for one of a call's guided output, the later calls
                     exact; 1 where it was not measured
    output_products  `[calls, calls]`: mean products of the guided outputs of two calls, from which the error of any
                     linear forecast of an output by others follows
    """

    name: str
    components: tuple[str, ...]
    first_block_components: int
    runs: int
    branch: Array
    first_block: Array
    stack: Array
    output: Array
    latent: Array
    guidance: Array | None
    magnitude_ratio: Array
    output_size: Array
    latent_size: Array
    sensitivity: Array
    output_products: Array

    def __post_init__(self) -> None:
        calls, count = len(self.output_size), len(self.components)
        shapes: dict[str, tuple[int, ...]] = {"branch": (self.window, calls, count)}
        shapes |= dict.fromkeys(PAIRS, (calls, calls)) | dict.fromkeys(VECTORS, (calls,))
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values is None and name == "guidance":
                continue
            if values.shape != shape or not np.isfinite(values).all():
                _refuse(name, f"shape {values.shape}", f"finite numbers of shape {shape}")
        if not calls or not 1 <= self.first_block_components <= count:
            _refuse("first_block_components", self.first_block_components, f"1 to {count}, and one call or more")

    @property
    def calls(self) -> int:
        return len(self.output_size)

    @property
    def window(self) -> int:
        return len(self.branch)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in fields.items()}
        return {"kind": KIND, "format": FORMAT, **plain, "components": list(self.components)}

    @staticmethod
    def from_json(value: object) -> Measurements:
        """The measurements that `to_json` gave. Raises ScheduleError, and nothing else, whatever `value` is."""
        names = {field.name for field in dataclasses.fields(Measurements)}
        if not isinstance(value, dict) or set(value) != names | {"kind", "format"}:
            _refuse("measurements", type(value).__name__, f"an object of {', '.join(sorted(names))}")
        if value["kind"] != KIND or value["format"] != FORMAT:
            _refuse("kind", f"{value['kind']!r:.40}, format {value['format']!r:.20}", f"{KIND!r}, format {FORMAT}")
        components = value["components"]
        if not isinstance(components, list) or not all(isinstance(item, str) for item in components):
            _refuse("components", type(components).__name__, "a list of names")
        for key in ("first_block_components", "runs"):
            if isinstance(value[key], bool) or not isinstance(value[key], int):
                _refuse(key, repr(value[key])[:40], "an integer")
        if not isinstance(value["name"], str):
            _refuse("name", type(value["name"]).__name__, "a text")
        arrays: dict[str, Any] = {
            key: _array(value[key], key) for key in ("branch", *PAIRS, *VECTORS) if value[key] is not None
        }
        if missing := {"branch", *PAIRS, *VECTORS} - set(arrays) - {"guidance"}:
            _refuse(min(missing), "null", "numbers")
        plain = {key: value[key] for key in ("name", "first_block_components", "runs")}
        return Measurements(components=tuple(components), **plain, **{"guidance": None, **arrays})


def measure(
    features: Iterable[Features],
    components: Sequence[str],
    window: int = WINDOW,
    *,
    first_block: int = 1,
    guidance_scale: float = 1.0,
    name: str = "",
) -> Measurements:
    """The changes between the calls of one exact run or of several, each from call 0 on and one after the other.

    `first_block` is the number of components of the first block. Of the branches the last `window` calls are kept, of
    the other signals one array a call, and of earlier runs only their changes. Raises ScheduleError if calls are not
    in order or have other shapes than the call before. Numerics: differences in the features' dtype, means in float64.
    """
    window = max(1, window)
    runs: list[_Run] = []
    for item in features:
        if len(item.branches) != len(components) or len(item.streams) != len(components) + 1:
            got = f"{len(item.branches)} branches and {len(item.streams)} streams"
            _refuse(f"features of call {item.call}", got, f"{len(components)} and {len(components) + 1}")
        if item.call == 0:
            if runs:
                runs[-1].forget()
            runs.append(_Run(window, first_block, guidance_scale))
        if not runs or item.call != runs[-1].calls:
            _refuse("features", f"call {item.call}", f"call {runs[-1].calls if runs else 0}")
        runs[-1].add(item)
    if not runs:
        _refuse("features", "nothing", "one run or more")
    if len({run.calls for run in runs}) > 1:
        _refuse("features", f"runs of {sorted({run.calls for run in runs})} calls", "runs of equal length")
    guided = all(run.guided for run in runs)
    averages: dict[str, Any] = {
        key: np.mean([run.result(key) for run in runs], axis=0)
        for key in ("branch", *PAIRS, *VECTORS)
        if guided or key != "guidance"
    }
    return Measurements(name, tuple(components), first_block, len(runs), **{"guidance": None, **averages})


class _Run:
    """The signals of one run: kept values to compare the next call with, and the changes found so far."""

    def __init__(self, window: int, first_block: int, guidance_scale: float) -> None:
        self.window, self.first_block, self.guidance_scale = window, first_block, guidance_scale
        self.outputs: list[Array] = []  # guided
        self.calls = 0
        self.guided = True
        self.kept: dict[str, list[tuple[Value, float]]] = {name: [] for name in SIGNALS}
        self.changes: dict[str, list[list[float]]] = {name: [] for name in SIGNALS}
        self.branches: list[list[tuple[Value, float]]] = []  # newest first
        self.branch_changes: list[list[list[float]]] = []
        self.ratios: list[float] = []
        self.products: Array = np.zeros((0, 0))
        self.sizes: dict[str, list[float]] = {"output_size": [], "latent_size": []}

    def add(self, item: Features) -> None:
        stack = _difference(item.streams[-1], item.streams[0])
        signals: dict[str, Value] = {
            "first_block": _difference(item.streams[self.first_block], item.streams[0]),
            "stack": stack,
            "output": item.output,
            "latent": item.latent,
        }
        if len(item.output) == 2 * item.images:
            signals["guidance"] = _difference(item.output[: item.images], item.output[item.images :])
        else:
            self.guided = False
        kept = self.kept["stack"]
        self.ratios.append(_magnitude_ratio(stack, kept[-1][0]) if kept else 1.0)
        for name, value in signals.items():
            self.changes[name].append([_change(value, *earlier) for earlier in self.kept[name]])
            # The runner may write the next call into the same buffers.
            self.kept[name].append((_copy(value), _size(value)))
        guided: Array = item.output[: item.images].astype(np.float64)
        if len(item.output) == 2 * item.images:
            guided = guided + (self.guidance_scale - 1.0) * (guided - item.output[item.images :])
        self.outputs.append(guided.ravel())
        self.sizes["output_size"].append(_size(item.output))
        self.sizes["latent_size"].append(_size(item.latent))
        self.branch_changes.append(
            [
                [_change(value, *before) for value, before in zip(item.branches, earlier, strict=True)]
                for earlier in self.branches
            ]
        )
        self.branches = [[(_copy(value), _size(value)) for value in item.branches], *self.branches][: self.window]
        self.calls += 1

    def forget(self) -> None:
        self.products = self.result("output_products")
        self.kept, self.branches, self.outputs = {name: [] for name in SIGNALS}, [], []

    def result(self, name: str) -> Array:
        if name == "magnitude_ratio":
            return np.array(self.ratios)
        if name == "output_products":
            if not self.outputs:
                return self.products
            stacked = np.stack(self.outputs)
            return np.asarray(stacked @ stacked.T / stacked.shape[1])
        if name in self.sizes:
            return np.array(self.sizes[name])
        if name == "sensitivity":
            return np.ones(self.calls)
        if name == "branch":
            count = len(self.branch_changes[-1][0]) if self.calls > 1 else 0
            branch = np.zeros((self.window, self.calls, count))
            for call, rows in enumerate(self.branch_changes):
                for distance, row in enumerate(rows):
                    branch[distance, call] = row
            return branch
        pairs = np.zeros((self.calls, self.calls))
        for later, row in enumerate(self.changes[name]):
            pairs[: len(row), later] = row
        return pairs


def _arrays(value: Value) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def _difference(one: Value, other: Value) -> Value:
    left, right = _arrays(one), _arrays(other)
    shapes = [array.shape for array in left], [array.shape for array in right]
    if shapes[0] != shapes[1]:
        _refuse("features", f"a stream of {shapes[0]}", f"{shapes[1]}, as before")
    return tuple(a - b for a, b in zip(left, right, strict=True))


def _copy(value: Value) -> Value:
    return tuple(array.copy() for array in _arrays(value))


def _size(value: Value) -> float:
    arrays = _arrays(value)
    return sum(float(np.abs(array).sum(dtype=np.float64)) for array in arrays) / sum(array.size for array in arrays)


def _change(later: Value, earlier: Value, size: float) -> float:
    changed = _size(_difference(later, earlier))
    return changed / max(size, SMALLEST) if changed else 0.0


def _magnitude_ratio(later: Value, earlier: Value) -> float:
    total, count = 0.0, 0
    for new, old in zip(_arrays(later), _arrays(earlier), strict=True):
        above, below = (np.linalg.norm(array.astype(np.float64), axis=-1) for array in (new, old))
        total += float(np.divide(above, below, out=np.ones_like(above), where=below > 0).sum())
        count += above.size
    return total / count


@dataclass(frozen=True)
class Subject:
    """What a schedule pass sees of a Program.

    `kinds` names the place of each component in its block: attention, attention 2, mlp, mlp 2, or block. `blocks` are
    component indices. `sigmas` are the calls' ratios of noise to signal (`sqrt(1 - a) / sqrt(a)`, EDM's sigma), None
    where the sampler's table does not give them away.
    `flops` are of one call of each component, `glue_flops` of the
    rest of the step. `guidance` are the modes of the Program's schedule, empty where it has none.
    """

    name: str
    components: tuple[str, ...]
    kinds: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]
    calls: int
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None
    guided: bool
    flops: tuple[float, ...]
    glue_flops: float = 0.0
    measurements: Measurements | None = None
    schedule: Schedule | None = None

    @property
    def guidance(self) -> tuple[GuidanceMode, ...]:
        return () if self.schedule is None else self.schedule.guidance

    def check(self) -> None:
        """Raises Declined unless there are components and two calls or more."""
        if not self.components:
            raise Declined("the Program has no components: its step is one stage")
        if not self.timesteps:
            raise Declined("the Program has no sampler: there is nothing to schedule")
        if self.calls < 2:
            raise Declined(f"{self.calls} call: nothing was computed before it")

    def measured(self) -> Measurements:
        """The measurements. Raises Declined if there are none, or they are of other components or calls."""
        self.check()
        if self.measurements is None:
            raise Declined("the Program has no measurements: run it exactly first")
        if self.measurements.components != self.components:
            raise Declined("the measurements are of other components")
        if self.measurements.calls != self.calls:
            raise Declined(f"the measurements are of {self.measurements.calls} calls, not of {self.calls}")
        return self.measurements

    def share(self, units: Sequence[Unit], computes: Sequence[Sequence[bool]]) -> float:
        """FLOPs over those of computing everything, both halves in every call."""
        costs = np.array([sum(self.flops[member] for member in unit.members) for unit in units])
        spent = float((np.asarray(computes, dtype=np.float64) @ costs).sum())
        return (spent + self.glue_flops * self.calls) / ((sum(self.flops) + self.glue_flops) * self.calls)


class SchedulePass(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str: ...

    def propose(self, subject: Subject) -> Schedule: ...

    def apply(self, program: Program) -> PassReport: ...


def subject_of(program: Program) -> Subject:
    """The Program as schedule passes see it; its stages must have been cut."""
    stages = [stage for stage in program.stages if stage.kind == "component"]
    blocks = _blocks(stages)
    sampler = program.sampler
    schedule = program.schedule
    return Subject(
        name=program.name,
        components=tuple(stage.name for stage in stages),
        kinds=_kinds(stages, blocks),
        blocks=blocks,
        calls=program.calls,
        timesteps=() if sampler is None else tuple(float(call.timestep) for call in sampler.calls),
        sigmas=None if sampler is None else noise_levels(sampler),
        guided=program.guidance.mode != "none" and program.guidance.scale != 1.0,
        flops=tuple(_flops(stage) for stage in stages),
        glue_flops=sum(_flops(stage) for stage in program.stages if stage.kind in ("glue", "residual")),
        measurements=program.measurements,
        schedule=schedule,
    )


def apply_schedule(step: SchedulePass, program: Program) -> PassReport:
    """The Program has the schedule that the pass proposes, or the report says why not."""
    subject = subject_of(program)
    try:
        schedule = step.propose(subject)
    except Declined as declined:
        return PassReport(step.name, "declined", declined.reason)
    program.schedule = schedule
    share = schedule.computed_share(subject.flops, subject.glue_flops)
    alone = sum(mode.kind != "both" for mode in schedule.guidance)
    why = f"{share:.1%} of the step's FLOPs are computed"
    if alone:
        why += f", the conditional half alone in {alone} of {schedule.calls} calls"
    options = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}  # type: ignore[arg-type]
    figures = {
        "computed share": round(share, 6),
        "conditional calls": alone,
        "options": {key: value for key, value in options.items() if key != "name"},
        "schedule": schedule.digest(),
    }
    return PassReport(step.name, "applied", why, figures)


def with_guidance(schedule: Schedule, modes: Sequence[GuidanceMode]) -> Schedule:
    """The schedule under other guidance modes, with weights over the values that are valid under them.

    A unit that would combine older values than before is computed: a half that was left out for a while comes back
    fresh. Weights over other values than before become those of the polynomial of the same order.
    """
    rows = []
    computed: list[list[int]] = [[] for _ in schedule.units]
    for call, row in enumerate(schedule.actions):
        actions = []
        for index, action in enumerate(row):
            if action.kind == "combine":
                both = modes[call].kind == "both"
                known = [earlier for earlier in computed[index] if not both or modes[earlier].kind == "both"]
                before = schedule.history(call, index)
                used = len(action.weights)
                if not known or known[0] < before[0]:
                    action = COMPUTE
                elif tuple(known[:used]) != before[:used]:
                    action = forecast(extrapolation(known, call, used - 1))
            if action.computes:
                computed[index].insert(0, call)
            actions.append(action)
        rows.append(tuple(actions))
    return dataclasses.replace(schedule, actions=tuple(rows), guidance=tuple(modes))


def guidance_modes(orders: Sequence[int | None], alone: Sequence[bool]) -> tuple[GuidanceMode, ...]:
    """Modes by call: conditional where `alone`, else reuse with the order given, else (None) both.

    A call without an earlier call of both halves to reuse runs both.
    """
    known: list[int] = []
    modes = []
    for call, (order, left_out) in enumerate(zip(orders, alone, strict=True)):
        if left_out:
            modes.append(GuidanceMode("conditional"))
        elif order is None or not known:
            known.insert(0, call)
            modes.append(BOTH)
        else:
            modes.append(GuidanceMode("reuse", extrapolation(known, call, order)))
    return tuple(modes)


def finished(schedule: Schedule, subject: Subject, reason: str) -> Schedule:
    """The schedule under the subject's guidance modes. Raises Declined with `reason` if it computes everything."""
    if all(action.computes for row in schedule.actions for action in row):
        raise Declined(reason)
    return with_guidance(schedule, subject.guidance) if subject.guidance else schedule


def reach_share(
    computes_at: Callable[[float], list[list[bool]]], subject: Subject, units: Sequence[Unit], target: float
) -> tuple[float, list[list[bool]]]:
    """The threshold whose computed share is nearest to `target`, and the calls and units that it computes.

    Found by bisection of the logarithm; shares are as `Subject.share` has them, before guidance. Raises Declined if
    no threshold computes as little.
    """
    low, high = -30.0, 30.0
    found = []
    for exponent in (high, low):
        computes = computes_at(math.exp(exponent))
        found.append((subject.share(units, computes), math.exp(exponent), computes))
    if found[0][0] > target + 0.02:
        raise Declined(f"no threshold computes {target:.0%}: the least is {found[0][0]:.0%}")
    for _ in range(50):
        middle = (low + high) / 2
        computes = computes_at(math.exp(middle))
        share = subject.share(units, computes)
        found.append((share, math.exp(middle), computes))
        low, high = (middle, high) if share > target else (low, middle)
    _, threshold, computes = min(found, key=lambda item: (abs(item[0] - target), item[1]))
    return threshold, computes


def name_of(step: Any, start: str, *options: str) -> str:
    """`start`, and those of the pass's options that are not at their defaults: a name tells settings apart."""
    defaults = {field.name: field.default for field in dataclasses.fields(step)}
    texts = []
    for option in options:
        value = getattr(step, option)
        if value != defaults[option]:
            shown = " and ".join(value) if isinstance(value, tuple) else value
            texts.append(f", {option.replace('_', ' ')} {shown}")
    return start + "".join(texts)


def check_option(name: str, got: float, lowest: float, highest: float = math.inf) -> None:
    """Raises UsageError unless `lowest <= got <= highest`; for the options of passes."""
    if not lowest <= got <= highest:
        want = f"{lowest:g} or more" if highest == math.inf else f"{lowest:g} to {highest:g}"
        raise UsageError("the option is out of range", at=name, got=got, want=want)


def noise_levels(sampler: Any) -> tuple[float, ...] | None:
    """The calls' ratios of noise to signal, read from a sampler's table; None where it does not give them away.

    From the conversion to x0 where every call has one; else from the input's scale, `1 / sqrt(sigma^2 + 1)`; else, for
    a sampler without noise, from the trajectory of a constant epsilon or flow, which such samplers follow exactly and
    which ends in x0 alone. A level above a million is infinite (pure noise).
    """
    calls = sampler.calls
    if sampler.prediction in ("epsilon", "v_prediction") and all(call.convert is not None for call in calls):
        if sampler.prediction == "epsilon":
            return tuple(-float(call.convert[1]) for call in calls)  # x0 = x / sqrt(a) - sqrt(1 - a) / sqrt(a) * m
        return tuple(-float(call.convert[1]) / max(float(call.convert[0]), 1e-6) for call in calls)
    flow = sampler.prediction in ("flow", "flow_prediction")
    if not flow and any(call.input_scale != 1.0 for call in calls):
        return tuple(math.sqrt(max(0.0, float(call.input_scale) ** -2 - 1)) for call in calls)
    if not (flow or sampler.prediction == "epsilon") or any(row[-1] for call in calls for row in call.matrix):
        return None
    # Registers as combinations of the first latent and of the output, which does not change.
    registers = np.zeros((sampler.registers, 2))
    registers[0, 0] = 1.0
    output, none = np.array([0.0, 1.0]), np.zeros(2)
    latents = []
    for call in calls:
        latents.append(registers[0])
        converted = none if call.convert is None else call.convert[0] * registers[0] + call.convert[1] * output
        registers = np.array(call.matrix) @ np.stack([*registers, output, converted, none])
    last, added = registers[0]
    in_signal = -1.0 if flow else 0.0  # of the output: epsilon, or epsilon - x0
    if not last:
        return None
    signal, noise = (1.0 - in_signal * added) / last, -added / last
    levels = []
    for first, rest in latents:
        signal_now, noise_now = signal * first + in_signal * rest, noise * first + rest
        if not (signal_now > -1e-3 and noise_now > -1e-3):
            return None
        levels.append(math.inf if signal_now < 1e-6 * noise_now else max(0.0, float(noise_now / signal_now)))
    return tuple(levels)


def blocks_of(program: Program) -> tuple[tuple[int, ...], ...]:
    """Which components form a block, as indices."""
    return _blocks([stage for stage in program.stages if stage.kind == "component"])


def _blocks(stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
    """A block begins with an attention that follows something else, and with a template that it already has."""
    blocks: list[list[int]] = []
    for index, stage in enumerate(stages):
        begins = _attends(stage) and index > 0 and not _attends(stages[index - 1])
        if not blocks or begins or stage.template in {stages[member].template for member in blocks[-1]}:
            blocks.append([])
        blocks[-1].append(index)
    return tuple(tuple(block) for block in blocks)


def _kinds(stages: Sequence[Stage], blocks: Sequence[Sequence[int]]) -> tuple[str, ...]:
    kinds = []
    for block in blocks:
        counts: dict[str, int] = {}
        for member in block:
            base = "block" if len(block) == 1 else "attention" if _attends(stages[member]) else "mlp"
            counts[base] = counts.get(base, 0) + 1
            kinds.append(base if counts[base] == 1 else f"{base} {counts[base]}")
    return tuple(kinds)


def _attends(stage: Stage) -> bool:
    return any(op_name(node) in ATTENTION for node in stage.nodes)


def _flops(stage: Stage) -> float:
    return float(sum(flops_of(node, 2) for node in stage.nodes))


def _array(value: object, at: str) -> Array:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        _refuse(at, type(value).__name__, "numbers")
    if not array.ndim:
        _refuse(at, type(value).__name__, "a list of numbers")
    return array


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise ScheduleError("the measurements are not valid", at=at, got=str(got)[:200], want=want)
