"""What engines took on this machine, and what follows for engines that were not measured.

A measured engine takes what it took. Any other is the sum of its parts and the overhead of a call. Parts with weights
are solved for from the engines that hold them; for the rest, coefficients fitted to all measurements stand in. Between
measured numbers of rows the ratio of measured to fitted seconds is interpolated, so extrapolation follows the work.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dcc.cost_model.targets import this_machine
from dcc.cost_model.work import EngineWork, Part, Work
from dcc.errors import UsageError

FORMAT = 1
KIND = "dcc calibration"
# What a measurement is of: an engine, the runtime's own work in a sampler call, or around the loop.
KINDS = ENGINE, CALL, REQUEST = ("engine", "call", "request")
ROUNDS = 200
WORK_FIELDS = ("flops", "pointwise_flops", "read_bytes", "written_bytes", "weight_bytes", "operations")
LARGEST = 1e30


@dataclass(frozen=True)
class Machine:
    """What calibrations depend on: processor, how many of them and threads, and the runtime's version."""

    processor: str
    processors: int
    threads: int
    onnxruntime: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def machine_of_this_process(threads: int | None = None) -> Machine:
    """The machine that this process runs on; `threads` None stands for all processors that it may use."""
    usable = int(this_machine()["usable_processors"] or 1)
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    return Machine(_processor_name(), usable, threads or usable, version)


def default_path(target: str = "cpu", machine: Machine | None = None) -> Path:
    """Where the table of a machine is kept: $DCC_CACHE, else $XDG_CACHE_HOME/dcc, else ~/.cache/dcc."""
    found = machine or machine_of_this_process()
    base = os.environ.get("DCC_CACHE", "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base else (Path(shared) if shared else Path.home() / ".cache") / "dcc"
    return folder / "calibration" / f"{target}-{found.digest}.json"


@dataclass(frozen=True)
class Measurement:
    """Median seconds of one call. `spread` is half the interquartile range over the median; `parts` as (key, work)."""

    key: str
    rows: int
    seconds: float
    spread: float
    samples: int
    parts: tuple[tuple[str, Work], ...]
    kind: str = ENGINE

    @property
    def work(self) -> Work:
        return sum((work for _, work in self.parts), Work())


@dataclass(frozen=True)
class Coefficients:
    """Seconds for a floating-point operation of a matrix product, for any other, for a byte moved, for an operation run
    and for a call; none is negative."""

    flop: float = 0.0
    pointwise: float = 0.0
    byte: float = 0.0
    operation: float = 0.0
    call: float = 0.0

    def part_seconds(self, work: Work) -> float:
        """Seconds of the work without the call."""
        columns = _columns(work)
        return sum(
            each * count
            for each, count in zip((self.flop, self.pointwise, self.byte, self.operation), columns, strict=True)
        )


@dataclass(frozen=True)
class CalibrationTable:
    """See the module's text. Equal tables predict equal seconds; measurements are never changed, only added to."""

    target: str
    machine: Machine
    measurements: tuple[Measurement, ...] = ()
    own_process: bool = True

    def merged(self, newer: Iterable[Measurement]) -> CalibrationTable:
        """The table with these measurements as well; one of the same key and rows replaces the older."""
        found = {(item.kind, item.key, item.rows): item for item in self.measurements}
        found |= {(item.kind, item.key, item.rows): item for item in newer}
        kept = tuple(found[key] for key in sorted(found))
        return CalibrationTable(self.target, self.machine, kept, self.own_process)

    @cached_property
    def coefficients(self) -> dict[str, Coefficients]:
        """Fitted to all measurements of each kind."""
        return {kind: fit([item for item in self.measurements if item.kind == kind]) for kind in KINDS}

    def engine_seconds(self, engine: EngineWork, rows: int) -> float:
        """Seconds of one call of the engine with `rows` rows."""
        fitted = self.coefficients[ENGINE]
        costs = [(part.key, _part_seconds(fitted, part.work.at(rows))) for part in engine.parts]
        points = self._ratios.get((ENGINE, engine.key))
        if points is not None:
            return _interpolated(points, rows) * (fitted.call + sum(seconds for _, seconds in costs))
        known = self._part_ratios
        return fitted.call + sum(
            seconds * (_interpolated(known[key], rows) if key in known else 1.0) for key, seconds in costs
        )

    def host_seconds(self, part: Part, images: int) -> float:
        """Seconds of the runtime's own work for `images` images, in a sampler call or around the loop."""
        kind = part.key.partition(":")[0]
        fitted = self.coefficients[kind]
        points = self._ratios.get((kind, part.key), [(1, 1.0)])
        return _interpolated(points, images) * (fitted.call + _part_seconds(fitted, part.work.at(images)))

    def is_measured(self, engine: EngineWork, rows: int) -> bool:
        """Whether the engine, or every part of it that has weights, was measured at this number of rows."""
        if any(item == rows for item, _ in self._ratios.get((ENGINE, engine.key), ())):
            return True
        parts = (self._part_ratios.get(part.key, ()) for part in engine.parts if part.work.at(rows).weight_bytes)
        return all(any(item == rows for item, _ in points) for points in parts)

    @cached_property
    def _ratios(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """Measured over fitted seconds by kind and key, ascending in rows."""
        found: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for item in sorted(self.measurements, key=lambda item: item.rows):
            fitted = self.coefficients[item.kind]
            seconds = fitted.call + sum(_part_seconds(fitted, work) for _, work in item.parts)
            found.setdefault((item.kind, item.key), []).append((item.rows, item.seconds / seconds))
        return found

    @cached_property
    def _part_ratios(self) -> dict[str, list[tuple[int, float]]]:
        """Seconds of each part over its fitted seconds, ascending in rows."""
        found: dict[str, list[tuple[int, float]]] = {}
        engines = [item for item in self.measurements if item.kind == ENGINE]
        for rows in sorted({item.rows for item in engines}):
            here = [item for item in engines if item.rows == rows]
            for key, ratio in solve_parts(here, self.coefficients[ENGINE]).items():
                found.setdefault(key, []).append((rows, ratio))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal."""
        return {
            "kind": KIND, "format": FORMAT, "target": self.target, "machine": asdict(self.machine),
            "own_process": self.own_process,
            "coefficients": {kind: asdict(self.coefficients[kind]) for kind in KINDS},
            "measurements": [
                {
                    "kind": item.kind, "key": item.key, "rows": item.rows, "seconds": item.seconds,
                    "spread": item.spread, "samples": item.samples,
                    "parts": [{"key": key, **work.to_json()} for key, work in item.parts],
                }
                for item in self.measurements
            ],
        }  # fmt: skip

    @staticmethod
    def from_json(value: object) -> CalibrationTable:
        """The table that `to_json` gave. Raises UsageError, and nothing else, whatever `value` is."""
        names = (
            "kind", "format", "target", "machine", "own_process", "coefficients", "measurements"
        )  # fmt: skip
        fields = _object(value, names, "table")
        if fields["kind"] != KIND or fields["format"] != FORMAT:
            _refuse("kind", f"{fields['kind']!r:.40}, format {fields['format']!r:.20}", f"{KIND!r}, format {FORMAT}")
        machine = _object(fields["machine"], ("processor", "processors", "threads", "onnxruntime"), "machine")
        if not isinstance(fields["own_process"], bool):
            _refuse("own_process", fields["own_process"], "true or false")
        return CalibrationTable(
            _text(fields["target"], "target"),
            Machine(
                _text(machine["processor"], "machine.processor"),
                int(_number(machine["processors"], "machine.processors", 1)),
                int(_number(machine["threads"], "machine.threads", 1)),
                _text(machine["onnxruntime"], "machine.onnxruntime"),
            ),
            tuple(
                _measurement(item, f"measurements[{index}]")
                for index, item in enumerate(_list(fields["measurements"], "measurements"))
            ),
            fields["own_process"],
        )

    def save(self, path: Path) -> None:
        """The table is at `path`, whose folder is made; a reader sees the old one or the new one, never half of it.

        Raises UsageError where it cannot be written.
        """
        partial = path.with_name(f".{os.getpid():x}.{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise UsageError(
                "the calibration table cannot be written", at=path, got=error, next="another -o"
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> CalibrationTable:
        """The table at `path`. Raises UsageError where there is none, or something else."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UsageError(
                "the calibration table cannot be read", at=path, got=reason, next="dcc calibrate MODEL"
            ) from error
        return CalibrationTable.from_json(value)


def table_of_this_machine(
    target: str = "cpu", threads: int | None = None, note: Callable[[str], None] = lambda _: None
) -> CalibrationTable | None:
    """The table that `dcc calibrate` left for this machine and target; None where there is none.

    `note` hears of one that is there and cannot be used: damaged, or of another machine or target.
    """
    machine = machine_of_this_process(threads)
    path = default_path(target, machine)
    if not path.exists():
        return None
    try:
        table = CalibrationTable.load(path)
    except UsageError as error:
        # A cache: what rests on it goes on without, and somebody should know.
        found = error.details.get("got", error.what)
        note(f"the calibration table {path} is damaged ({found}): dcc calibrate MODEL makes a new one")
        return None
    if (table.machine, table.target) != (machine, target):
        note(f"the calibration table {path} is of another machine: dcc calibrate MODEL makes one of this machine")
        return None
    return table


def fit(measurements: Sequence[Measurement]) -> Coefficients:
    """Coefficients of least squared relative error, none negative.

    Exact: of all sets of coefficients that are kept, the best whose solution has no negative entry.
    """
    if not measurements:
        return Coefficients()
    columns = np.array([[*_columns(item.work), 1.0] for item in measurements])
    relative = columns / np.array([item.seconds for item in measurements])[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    matrix, wanted = relative / scale, np.ones(len(measurements))
    best, least = np.zeros(5), math.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(5), count) for count in range(1, 6)):
        solution = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
        error = float(((matrix[:, kept] @ solution - wanted) ** 2).sum())
        if (solution >= 0).all() and error < least * (1 - 1e-9):
            best, least = np.zeros(5), error
            best[list(kept)] = solution
    return Coefficients(*(float(value) for value in best / scale))


def solve_parts(measurements: Sequence[Measurement], fitted: Coefficients) -> dict[str, float]:
    """Each part's seconds over its fitted seconds, so that the engines' parts and one call add up to what they took.

    Parts without weights keep their fitted seconds and are left out, unless some engine holds nothing else: the
    coefficients stand on many engines of such parts. Multiplicative updates from the fitted values: nothing gets
    negative, and what the engines leave open keeps the fitted proportions.
    Source: Richardson, JOSA 62(1), 1972; Lucy, AJ 79, 1974.
    """
    costs = {key: _part_seconds(fitted, work) for item in measurements for key, work in item.parts}
    alone = {item.parts[0][0] for item in measurements if len({key for key, _ in item.parts}) == 1}
    weighted = {key for item in measurements for key, work in item.parts if work.weight_bytes}
    keys = [key for key in costs if key in alone or key in weighted]
    if not keys:
        return {}
    index = {key: number for number, key in enumerate(keys)}
    counts = np.zeros((len(measurements), len(keys)))
    took = np.zeros(len(measurements))
    for row, item in enumerate(measurements):
        held = sum(costs[key] for key, _ in item.parts if key not in index)
        for key, _ in item.parts:
            if key in index:
                counts[row, index[key]] += 1
        # An engine of little more than a call says little about its parts: its remainder is kept above zero.
        took[row] = max(item.seconds - fitted.call - held, 0.02 * item.seconds)
    solved = counts.any(axis=1)
    counts, took = counts[solved], took[solved]
    start = np.array([costs[key] for key in keys])
    seconds = start.copy()
    # Engines count by their relative error, or the largest would hide the others.
    weights = counts * seconds / (counts @ seconds)[:, None]
    for _ in range(ROUNDS):
        seconds = seconds * ((weights * (took / (counts @ seconds))[:, None]).sum(axis=0) / weights.sum(axis=0))
    return {key: float(seconds[number] / start[number]) for key, number in index.items()}


def _columns(work: Work) -> tuple[float, float, float, float]:
    return work.flops - work.pointwise_flops, work.pointwise_flops, work.moved_bytes, work.operations


def _part_seconds(fitted: Coefficients, work: Work) -> float:
    """Never zero: ratios are taken of it."""
    return max(fitted.part_seconds(work), 1e-12)


def _interpolated(points: Sequence[tuple[int, float]], rows: int) -> float:
    """The ratio at `rows`: linear in the logarithm between points, constant outside."""
    place = bisect_left(points, (rows, -math.inf))
    if place == 0:
        return points[0][1]
    if place == len(points):
        return points[-1][1]
    (low, below), (high, above) = points[place - 1], points[place]
    share = (math.log(rows) - math.log(low)) / (math.log(high) - math.log(low))
    return below + share * (above - below)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, "") or platform.processor() or platform.machine()


def _measurement(value: object, at: str) -> Measurement:
    fields = _object(value, ("kind", "key", "rows", "seconds", "spread", "samples", "parts"), at)
    if fields["kind"] not in KINDS:
        _refuse(f"{at}.kind", fields["kind"], ", ".join(KINDS))
    parts = []
    for index, item in enumerate(_list(fields["parts"], f"{at}.parts")):
        place = f"{at}.parts[{index}]"
        entry = _object(item, ("key", *WORK_FIELDS), place)
        work = Work(*(_number(entry[name], f"{place}.{name}") for name in WORK_FIELDS))
        parts.append((_text(entry["key"], f"{place}.key"), work))
    if not parts:
        _refuse(f"{at}.parts", "none", "at least one")
    return Measurement(
        _text(fields["key"], f"{at}.key"), int(_number(fields["rows"], f"{at}.rows", 1)),
        _number(fields["seconds"], f"{at}.seconds", 1e-12), _number(fields["spread"], f"{at}.spread"),
        int(_number(fields["samples"], f"{at}.samples", 1)), tuple(parts), fields["kind"],
    )  # fmt: skip


def _object(value: object, keys: Sequence[str], at: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        got = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        _refuse(at, got, f"an object of {', '.join(keys)}")
    return value


def _list(value: object, at: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > 1_000_000:
        _refuse(at, type(value).__name__, "a list")
    return value


def _number(value: object, at: str, least: float = 0.0) -> float:
    # The comparison is false for NaN, and exact for integers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST:
        _refuse(at, repr(value)[:40], f"a number from {least:g}")
    return float(value)


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 512 or not value.isprintable():
        _refuse(at, repr(value)[:40], "a printable text")
    return value


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise UsageError(
        "the calibration table is not valid", at=at, got=str(got)[:200], want=want, next="dcc calibrate MODEL"
    )
