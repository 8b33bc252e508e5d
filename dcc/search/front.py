"""The front: what a search found, with everything that was measured, as one JSON file that holds the schedules too.

Quality is PSNR in dB and SSIM against the exact artifact's samples, on held-out seeds unless a name says otherwise.
PSNR of equal samples is infinite, which JSON cannot say: it is null there.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from dcc.errors import ExportError, ScheduleError, UsageError
from dcc.ir.schedule import Schedule
from dcc.runtime.strict_json import INTEGER_LIMIT, shown

KIND = "dcc front"
FORMAT = 1
FIELDS = (
    "kind", "format", "model", "program", "sampler", "steps", "target", "batch", "guidance_scale", "seeds", "held_out",
    "exact_ms", "evaluations", "seconds", "points", "others", "history", "notes",
)  # fmt: skip
POINT_FIELDS = (
    "name", "origin", "digest", "schedule", "latency_ms", "predicted_ms", "speedup", "computed_share", "psnr", "ssim",
    "fewer_steps",
)  # fmt: skip
NUMBER_LIMIT = 1e15
DEPTH_LIMIT = 32
SIZE_LIMIT = 256 << 20
NEAREST = 3
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class FewerSteps:
    """A run of the exact model with fewer steps, as many as fit the time of the point that it belongs to."""

    steps: int
    latency_ms: float
    psnr: float
    ssim: float | None = None

    def __post_init__(self) -> None:
        at = "fewer_steps"
        _check_count(self.steps, f"{at}.steps", least=1)
        _check_positive(self.latency_ms, f"{at}.latency_ms")
        _check_psnr(self.psnr, f"{at}.psnr")
        _check_ssim(self.ssim, f"{at}.ssim")

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "latency_ms": self.latency_ms, "psnr": _psnr_to_json(self.psnr), "ssim": self.ssim
        }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One schedule and what was measured of it. Raises ScheduleError where a number cannot be one.

    `origin` is "search", "exact" or the method's name. `latency_ms` is one whole generation of the batch, measured;
    `speedup` is against the exact artifact in the same run. `psnr` and `ssim` are on held-out seeds, `search_psnr`
    on those that the search saw; None where it was not measured.
    """

    name: str
    origin: str
    schedule: Schedule
    latency_ms: float
    speedup: float
    computed_share: float
    psnr: float
    ssim: float | None = None
    predicted_ms: float | None = None
    search_psnr: float | None = None
    fewer_steps: FewerSteps | None = None

    def __post_init__(self) -> None:
        for key in ("name", "origin"):
            _text(getattr(self, key), f"point, {key}")
        at = f"point '{self.name:.60}'"
        for key in ("latency_ms", "speedup"):
            _check_positive(getattr(self, key), f"{at}, {key}")
        if self.predicted_ms is not None:
            _check_positive(self.predicted_ms, f"{at}, predicted_ms")
        # Not exactly 1: the share of everything is a quotient of sums in two orders.
        if not 0 <= self.computed_share <= 1 + 1e-9:
            _refuse(f"{at}, computed_share", self.computed_share, "0 to 1")
        _check_psnr(self.psnr, f"{at}, psnr")
        if self.search_psnr is not None:
            _check_psnr(self.search_psnr, f"{at}, search_psnr")
        _check_ssim(self.ssim, f"{at}, ssim")

    @cached_property
    def digest(self) -> str:
        """The schedule's content hash, by which points are told apart."""
        return self.schedule.digest()

    def dominates(self, other: Point) -> bool:
        """Nowhere worse in speedup and PSNR, and better in one of them."""
        mine, theirs = (self.speedup, self.psnr), (other.speedup, other.psnr)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))

    def summary(self) -> str:
        """Name, digest and the two objectives, for messages."""
        return f"{self.name or self.origin} ({self.digest[:12]}): {self.speedup:.3g}x at {shown_psnr(self.psnr)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal; `search_psnr` is left out where it was not measured."""
        value = {
            "name": self.name,
            "origin": self.origin,
            "digest": self.digest,
            "schedule": self.schedule.to_json(),
            "latency_ms": self.latency_ms,
            "predicted_ms": self.predicted_ms,
            "speedup": self.speedup,
            "computed_share": self.computed_share,
            "psnr": _psnr_to_json(self.psnr),
            "ssim": self.ssim,
            "fewer_steps": None if self.fewer_steps is None else self.fewer_steps.to_json(),
        }
        return value if self.search_psnr is None else {**value, "search_psnr": _psnr_to_json(self.search_psnr)}

    @staticmethod
    def from_json(value: object, at: str = "point") -> Point:
        """The point that `to_json` gave. Raises ScheduleError, and nothing else, whatever `value` is."""
        fields = _object(value, POINT_FIELDS, at, optional=("search_psnr",))
        fewer = fields["fewer_steps"]
        point = Point(
            name=_text(fields["name"], f"{at}.name"),
            origin=_text(fields["origin"], f"{at}.origin"),
            schedule=_schedule(fields["schedule"], f"{at}.schedule"),
            latency_ms=_number(fields["latency_ms"], f"{at}.latency_ms"),
            speedup=_number(fields["speedup"], f"{at}.speedup"),
            computed_share=_number(fields["computed_share"], f"{at}.computed_share"),
            psnr=_psnr(fields["psnr"], f"{at}.psnr"),
            ssim=_optional(fields["ssim"], f"{at}.ssim"),
            predicted_ms=_optional(fields["predicted_ms"], f"{at}.predicted_ms"),
            search_psnr=_psnr(fields["search_psnr"], f"{at}.search_psnr") if "search_psnr" in fields else None,
            fewer_steps=None if fewer is None else _fewer_steps(fewer, f"{at}.fewer_steps"),
        )
        if fields["digest"] != point.digest:
            _refuse(f"{at}.digest", shown(fields["digest"]), f"{point.digest}, the hash of its schedule")
        return point


@dataclass(frozen=True)
class HistoryRow:
    """How far the search was after so many evaluations; `best` is the PSNR on search seeds by speed, {"2x": 31.5}."""

    evaluations: int
    hypervolume: float
    best: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count(self.evaluations, "history, evaluations")
        _check_finite(self.hypervolume, "history, hypervolume")
        for speed, value in self.best.items():
            _check_psnr(value, f"history, best {speed!r:.20}")

    def to_json(self) -> dict[str, Any]:
        best = {speed: _psnr_to_json(value) for speed, value in self.best.items()}
        return {"evaluations": self.evaluations, "hypervolume": self.hypervolume, "best": best}


@dataclass(frozen=True)
class Front:
    """What one search found. Raises ScheduleError where the parts do not fit together.

    `points` are those that no other dominates, by rising speedup and so by falling PSNR; `non_dominated` gives them.
    `others` are the classic methods and whatever else is worth plotting. `exact_ms` is one whole generation of the
    batch by the exact artifact. `seeds` are those that the search saw; `held_out` shares none with them. `notes` is
    plain JSON. `program` is `Program.denoiser_hash()`; the schedules of all points are for it, or for any.
    """

    model: str
    program: str
    sampler: str
    steps: int
    target: str
    batch: int
    exact_ms: float
    points: tuple[Point, ...]
    others: tuple[Point, ...] = ()
    guidance_scale: float | None = None
    seeds: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    evaluations: int = 0
    seconds: float = 0.0
    history: tuple[HistoryRow, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("model", "program", "sampler", "target"):
            _text(getattr(self, key), key)
        for key, least in (("steps", 1), ("batch", 1), ("evaluations", 0)):
            _check_count(getattr(self, key), key, least=least)
        _check_positive(self.exact_ms, "exact_ms")
        _check_finite(self.seconds, "seconds")
        if self.guidance_scale is not None:
            _check_finite(self.guidance_scale, "guidance_scale")
        for seed in (*self.seeds, *self.held_out):
            _integer(seed, "seeds")
        shared = set(self.seeds) & set(self.held_out)
        if shared:
            _refuse("held_out", f"seeds that the search saw: {sorted(shared)[:8]}", "other seeds")
        for slower, faster in zip(self.points, self.points[1:], strict=False):
            if not (slower.speedup < faster.speedup and slower.psnr > faster.psnr):
                _refuse(
                    "points", f"{slower.summary()} before {faster.summary()}", "rising speedup and falling psnr"
                )  # fmt: skip
        for point in (*self.points, *self.others):
            if point.schedule.program not in ("", self.program):
                _refuse(f"point '{point.name:.60}'", f"a schedule for {point.schedule.program:.16}", self.program[:16])
        _check_plain(self.notes, "notes", DEPTH_LIMIT)

    @property
    def everything(self) -> tuple[Point, ...]:
        """`points`, then `others`."""
        return (*self.points, *self.others)

    @property
    def exact(self) -> Point | None:
        """The first point whose origin is "exact"."""
        return next((point for point in self.everything if point.origin == "exact"), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "model": self.model,
            "program": self.program,
            "sampler": self.sampler,
            "steps": self.steps,
            "target": self.target,
            "batch": self.batch,
            "guidance_scale": self.guidance_scale,
            "seeds": list(self.seeds),
            "held_out": list(self.held_out),
            "exact_ms": self.exact_ms,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "points": [point.to_json() for point in self.points],
            "others": [point.to_json() for point in self.others],
            "history": [row.to_json() for row in self.history],
            "notes": dict(self.notes),
        }

    @staticmethod
    def from_json(value: object) -> Front:
        """The front that `to_json` gave. Raises ScheduleError, and nothing else, whatever `value` is."""
        # What else is in a file of another kind does not matter: say first that it is another kind.
        if isinstance(value, dict) and (value.get("kind"), value.get("format")) != (KIND, FORMAT):
            got = f"{value.get('kind')!r:.40}, format {value.get('format')!r:.20}"
            raise ScheduleError("this is not a front that can be read", got=got, want=f"{KIND!r}, format {FORMAT}")
        fields = _object(value, FIELDS, "front")
        notes = fields["notes"]
        if not isinstance(notes, dict):
            _refuse("notes", type(notes).__name__, "an object")
        return Front(
            model=_text(fields["model"], "model"),
            program=_text(fields["program"], "program"),
            sampler=_text(fields["sampler"], "sampler"),
            steps=_integer(fields["steps"], "steps"),
            target=_text(fields["target"], "target"),
            batch=_integer(fields["batch"], "batch"),
            guidance_scale=_optional(fields["guidance_scale"], "guidance_scale"),
            seeds=_integers(fields["seeds"], "seeds"),
            held_out=_integers(fields["held_out"], "held_out"),
            exact_ms=_number(fields["exact_ms"], "exact_ms"),
            evaluations=_integer(fields["evaluations"], "evaluations"),
            seconds=_number(fields["seconds"], "seconds"),
            points=_points(fields["points"], "points"),
            others=_points(fields["others"], "others"),
            history=tuple(
                _history_row(item, f"history[{index}]")
                for index, item in enumerate(_list(fields["history"], "history"))
            ),
            notes=notes,
        )

    def to_bytes(self) -> bytes:
        """The text of front.json: a line for each field of the front and for each point."""
        return _lines(self.to_json()).encode()

    def write(self, path: str | os.PathLike[str]) -> None:
        """The front is in the file, whole, or the file is as it was. Raises ExportError."""
        write_files({Path(path): self.to_bytes()})

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Front:
        """The front that `write` put there. Raises ScheduleError where the file is anything else."""
        try:
            with Path(path).open("rb") as stream:
                data = stream.read(SIZE_LIMIT + 1)
        except OSError as error:
            raise ScheduleError("the front cannot be read", at=path, got=error, want="front.json") from error
        if len(data) > SIZE_LIMIT:
            raise ScheduleError("the front is too large to be dcc's", at=path, want=f"{SIZE_LIMIT >> 20} MiB at most")
        try:
            value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            got = str(error)[:200].encode("ascii", "backslashreplace").decode()
            raise ScheduleError(
                "the front is not JSON that can be read", at=path, got=got, want="the front.json of `dcc search`"
            ) from error
        try:
            return Front.from_json(value)
        except ScheduleError as error:
            details = {**error.details, "at": f"{path}: {error.details.get('at', 'front')}"}
            raise ScheduleError(error.what, **details) from error


def non_dominated(points: Iterable[Point]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """The points that no other dominates, by rising speedup, and the rest in the order given.

    Of points equal in speedup and PSNR the first stays.
    """
    given = list(points)
    kept: dict[int, Point] = {}
    best = -math.inf
    # The fastest first; of equally fast ones the best, and of equal ones the first.
    for index in sorted(range(len(given)), key=lambda index: (-given[index].speedup, -given[index].psnr, index)):
        if given[index].psnr > best:
            best = given[index].psnr
            kept[index] = given[index]
    rest = tuple(point for index, point in enumerate(given) if index not in kept)
    return tuple(reversed(kept.values())), rest


def pick(front: Front, text: str) -> Point:
    """The point that `text` names. Raises UsageError where there is none, or more than one.

    "2.5x" is the best PSNR among `front.points` of at least that speedup, "30dB" the fastest of them with at least
    that PSNR. Anything else is the name of a point, or the beginning of its digest (4 characters or more), of all
    points of the front, `others` too.
    """
    wanted = text.strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(x|db)", wanted, re.IGNORECASE)
    if match is None:
        return _named(front, wanted)
    bound, speed = float(match[1]), match[2] in "xX"
    able = [point for point in front.points if (point.speedup if speed else point.psnr) >= bound]
    if able:
        return max(able, key=lambda point: (point.psnr, point.speedup) if speed else (point.speedup, point.psnr))
    near = sorted(front.points, key=lambda point: -(point.speedup if speed else point.psnr))[:NEAREST]
    most = None
    if near:
        # Rounded down, so that asking for it succeeds.
        unit = (near[0].speedup, "x") if speed else (near[0].psnr, "dB")
        most = f"--pick {math.floor(unit[0] * 100) / 100:g}{unit[1]}"
    raise UsageError(
        "no point of the front is that fast" if speed else "no point of the front is that near to the exact samples",
        got=f"--pick {wanted}",
        want="; ".join(point.summary() for point in near) or "a front that has points",
        next=most,
    )


def _named(front: Front, text: str) -> Point:
    named = [point for point in front.everything if point.name == text]
    prefix = text.lower()
    if not named and len(prefix) >= SHORTEST_PREFIX:
        named = [point for point in front.everything if point.digest.startswith(prefix)]
    found = {point.digest: point for point in reversed(named)}
    if len(found) == 1:
        return next(iter(found.values()))
    raise UsageError(
        "several points of the front fit" if found else "no point of the front has that name or digest",
        got=f"--pick {text[:80]}",
        want="; ".join(point.summary() for point in [*reversed(found.values())][:NEAREST])
        or "a speedup (2.5x), a PSNR (30dB), a name or the beginning of a digest",
        next="give more of the digest" if found else f"one of: {_some_names(front)}",
    )


def _some_names(front: Front) -> str:
    shown = [point.name or point.digest[:12] for point in front.everything]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def shown_psnr(value: float) -> str:
    """In dB with one decimal; equal samples say so."""
    return "equal samples" if math.isinf(value) else f"{value:.1f} dB"


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Every file holds its new bytes. Raises ExportError, and then leaves nothing half-written behind.

    All bytes are on the disk beside their targets before the first of them gets its name.
    """
    partial = {path: path.with_name(f".dcc-{secrets.token_hex(8)}.tmp") for path in contents}
    at = next(iter(contents), None)
    try:
        for at, temporary in partial.items():
            if at.is_dir():
                raise IsADirectoryError(f"{at} is a folder")
            temporary.write_bytes(contents[at])
        for at, temporary in partial.items():
            temporary.replace(at)
    except OSError as error:
        raise ExportError("the file cannot be written", at=at, got=error, next="choose another -o") from error
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def _lines(value: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and for each item of an entry that is a list of objects."""
    entries = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            inner = ",\n".join(_compact(part) for part in item)
            entries.append(f"{_compact(key)}: [\n{inner}\n]")
        else:
            entries.append(f"{_compact(key)}: {_compact(item)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _compact(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _psnr_to_json(value: float) -> float | None:
    return None if math.isinf(value) else value


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise ScheduleError("the front is not valid", at=at, got=str(got)[:200], want=want)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_finite(value: object, at: str) -> None:
    # The comparison is false for NaN, and exact for integers that no float can hold.
    if not (_is_number(value) and abs(value) <= NUMBER_LIMIT):  # type: ignore[arg-type]
        _refuse(at, shown(value), f"a number up to {NUMBER_LIMIT:g}")


def _check_positive(value: float, at: str) -> None:
    _check_finite(value, at)
    if value <= 0:
        _refuse(at, value, "more than 0")


def _check_count(value: int, at: str, least: int = 0) -> None:
    if _integer(value, at) < least or value > NUMBER_LIMIT:
        _refuse(at, value, f"{least} or more")


def _check_psnr(value: float, at: str) -> None:
    if value != math.inf:
        _check_finite(value, at)


def _check_ssim(value: float | None, at: str) -> None:
    if value is not None:
        _check_finite(value, at)
        # The mean of local products over sums: between -1 and 1 up to rounding.
        if abs(value) > 1 + 1e-6:
            _refuse(at, value, "-1 to 1")


def _check_plain(value: object, at: str, depth: int) -> None:
    """Only what JSON can say, and reads back equal."""
    if depth == 0:
        _refuse(at, "deep nesting", f"at most {DEPTH_LIMIT} levels")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _text(key, f"a key of {at}"[:80])
            _check_plain(item, f"{at}.{key:.40}"[:200], depth - 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{at}[{index}]"[:200], depth - 1)
    elif isinstance(value, str):
        _text(value, at, limit=100_000)
    elif _is_number(value):
        _check_finite(value, at)
    elif value is not None and not isinstance(value, bool):
        _refuse(at, type(value).__name__, "plain JSON")


def _object(value: object, keys: Sequence[str], at: str, optional: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) - set(optional) != set(keys):
        got: object = type(value).__name__
        if isinstance(value, dict):
            # The difference, as both lists are long.
            missing = sorted(set(keys) - set(value))
            extra = sorted(str(key)[:40] for key in set(value) - set(keys) - set(optional))[:8]
            got = ", ".join([*(f"no {key}" for key in missing), *(f"also {key!r}" for key in extra)])
        _refuse(at, got, f"an object of {', '.join(keys)}")
    return value


def _list(value: object, at: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > 100_000:
        _refuse(at, type(value).__name__, "a list")
    return value


def _text(value: object, at: str, limit: int = 512) -> str:
    if not isinstance(value, str) or len(value) > limit:
        _refuse(at, type(value).__name__, f"a text of at most {limit} characters")
    # Half a surrogate pair could not be written again.
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        _refuse(at, ascii(value[:60]), "text that is Unicode")
    return value


def _integer(value: object, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > INTEGER_LIMIT:
        _refuse(at, shown(value), "an integer of 64 bits")
    return value


def _integers(value: object, at: str) -> tuple[int, ...]:
    return tuple(_integer(item, f"{at}[{index}]") for index, item in enumerate(_list(value, at)))


def _number(value: object, at: str) -> float:
    _check_finite(value, at)
    return float(value)  # type: ignore[arg-type]


def _optional(value: object, at: str) -> float | None:
    return None if value is None else _number(value, at)


def _psnr(value: object, at: str) -> float:
    return math.inf if value is None else _number(value, at)


def _schedule(value: object, at: str) -> Schedule:
    try:
        return Schedule.from_json(value)
    except ScheduleError as error:
        details = {**error.details, "at": f"{at}: {error.details.get('at', 'schedule')}"}
        raise ScheduleError(error.what, **details) from error


def _points(value: object, at: str) -> tuple[Point, ...]:
    return tuple(Point.from_json(item, f"{at}[{index}]") for index, item in enumerate(_list(value, at)))


def _fewer_steps(value: object, at: str) -> FewerSteps:
    fields = _object(value, ("steps", "latency_ms", "psnr", "ssim"), at)
    return FewerSteps(
        steps=_integer(fields["steps"], f"{at}.steps"),
        latency_ms=_number(fields["latency_ms"], f"{at}.latency_ms"),
        psnr=_psnr(fields["psnr"], f"{at}.psnr"),
        ssim=_optional(fields["ssim"], f"{at}.ssim"),
    )


def _history_row(value: object, at: str) -> HistoryRow:
    fields = _object(value, ("evaluations", "hypervolume", "best"), at)
    best = fields["best"]
    if not isinstance(best, dict):
        _refuse(f"{at}.best", type(best).__name__, "an object")
    return HistoryRow(
        evaluations=_integer(fields["evaluations"], f"{at}.evaluations"),
        hypervolume=_number(fields["hypervolume"], f"{at}.hypervolume"),
        best={_text(key, f"a key of {at}.best"): _psnr(item, f"{at}.best") for key, item in best.items()},
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key is given twice")
    return unique


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
