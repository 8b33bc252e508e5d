"""Seconds of an engine on a target from its data sheet alone, and seconds of a whole generation from those of engines.

An engine's part takes the longer of its arithmetic at the target's rate and its traffic at the target's bandwidth,
every operation adds an overhead, and so does every call. Compilers for GPUs fuse operations and compute in the dtype
that was asked for, so a part moves less there. `CalibrationTable` answers the same questions from measurements.
Source: the roofline model, Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dcc.cost_model.targets import Figure, Target, dtype_for, element_bytes, target_named, this_machine
from dcc.cost_model.work import EngineWork, Part, RowWork, Work
from dcc.errors import UsageError

# Copies of the latent and passes of guidance and of the sampler's update over it, in numpy, each read and written.
GUIDANCE_PASSES = 5
SAMPLER_PASSES = 7
HOST_OPERATIONS = 12


class CostModel(Protocol):
    """Whatever predicts seconds: a Roofline or a CalibrationTable."""

    def engine_seconds(self, engine: EngineWork, rows: int) -> float:
        """Seconds of one call of the engine with `rows` rows."""
        ...

    def host_seconds(self, part: Part, images: int) -> float:
        """Seconds that the runtime itself takes, in one sampler call or in one request as the part says."""
        ...

    def is_measured(self, engine: EngineWork, rows: int) -> bool:
        """Whether the engine, or every part of it, was measured rather than fitted."""
        ...


@dataclass(frozen=True)
class LoopWork:
    """One generation of `images` images: what runs before the loop, and in every sampler call.

    `early` and the entries of `calls` name an engine of `engines` and its rows: the images, or twice as many where
    both halves of guidance run. `hosts` is the runtime's own work in each sampler call, `request` that around the loop.
    """

    engines: Mapping[str, EngineWork]
    calls: tuple[tuple[tuple[str, int], ...], ...]
    images: int
    early: tuple[tuple[str, int], ...] = ()
    hosts: tuple[Part, ...] = ()
    request: Part | None = None


@dataclass(frozen=True)
class Prediction:
    """Seconds of one generation and of what it consists of; `measured_share` of them stand on measurements."""

    seconds: float
    early_seconds: float
    engine_seconds: float
    host_seconds: float
    measured_share: float
    call_seconds: tuple[float, ...] = field(repr=False, default=())

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "call_seconds"}


def predict(loop: LoopWork, model: CostModel) -> Prediction:
    """Seconds of the generation: early calls, then for each sampler call its engines and the runtime's own work."""
    known: dict[tuple[str, int], tuple[float, bool]] = {}

    def cost(name: str, rows: int) -> tuple[float, bool]:
        if (name, rows) not in known:
            engine = loop.engines[name]
            known[name, rows] = (model.engine_seconds(engine, rows), model.is_measured(engine, rows))
        return known[name, rows]

    early = [cost(name, rows) for name, rows in loop.early]
    calls = [[cost(name, rows) for name, rows in call] for call in loop.calls]
    runtime = {part: model.host_seconds(part, loop.images) for part in set(loop.hosts)}
    hosts = [runtime[part] for part in loop.hosts] or [0.0] * len(loop.calls)
    request = 0.0 if loop.request is None else model.host_seconds(loop.request, loop.images)
    early_seconds = sum(seconds for seconds, _ in early) + request
    call_seconds = tuple(host + sum(seconds for seconds, _ in call) for host, call in zip(hosts, calls, strict=True))
    engine_seconds = sum(call_seconds) - sum(hosts)
    costs = [*early, *(item for call in calls for item in call)]
    measured = sum(seconds for seconds, is_measured in costs if is_measured)
    return Prediction(
        seconds=early_seconds + sum(call_seconds), early_seconds=early_seconds, engine_seconds=engine_seconds,
        host_seconds=sum(hosts), measured_share=measured / (sum(seconds for seconds, _ in costs) or 1.0),
        call_seconds=call_seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """A target's figures: FLOPs and bytes a second, seconds of overhead for an operation and for an engine call.

    `pointwise_per_second` is the rate of what no matrix product does, where it differs. An element of an engine has
    `element_bytes`; `fused` says that the backend fuses operations. `figures` are what the rates were made from.
    """

    flops_per_second: float
    bytes_per_second: float
    operation_seconds: float
    call_seconds: float
    pointwise_per_second: float | None = None
    element_bytes: int = 4
    fused: bool = False
    figures: tuple[Figure, ...] = field(default=(), repr=False, compare=False)

    @staticmethod
    def of(target: str | Target, dtype: str | None = None, processors: int | None = None) -> Roofline:
        """The figures of the target in the dtype, by default its own.

        Where they are figures of one processor: for this many, by default those that this process may use. Raises
        UsageError for a target without figures for the dtype.
        """
        given = target_named(target) if isinstance(target, str) else target
        kind = dtype_for(given, dtype)
        count = int(this_machine()["usable_processors"] or 1) if processors is None else processors
        used: list[Figure] = []

        def rate(name: str) -> float:
            found = given.figure(name)
            if found is None or isinstance(found.value, str):
                raise UsageError(f"the target '{given.name}' has no figure {name}", want=f"{name}, a number")
            used.append(found)
            return float(found.value) * (count if found.unit.endswith("per processor") else 1)

        def share(name: str) -> float:
            return rate(name) if given.figure(name) is not None else 1.0

        # Tensor cores compute products; the rest is float32 arithmetic, whatever the dtype.
        pointwise = rate("float32_flops") if kind != "float32" else None
        return Roofline(
            rate(f"{kind}_flops") * share("matrix_efficiency"), rate("bandwidth") * share("bandwidth_efficiency"),
            rate("operation_overhead"), rate("call_overhead"), pointwise, element_bytes(kind),
            given.backend.startswith("tensorrt"), tuple(used),
        )  # fmt: skip

    def part_seconds(self, work: Work) -> float:
        """Seconds of one part, without the call."""
        pointwise = work.pointwise_flops / (self.pointwise_per_second or self.flops_per_second)
        arithmetic = (work.flops - work.pointwise_flops) / self.flops_per_second + pointwise
        return max(arithmetic, work.moved_bytes / self.bytes_per_second) + work.operations * self.operation_seconds

    def engine_seconds(self, engine: EngineWork, rows: int) -> float:
        counted = (part.fused if self.fused else part.work for part in engine.parts)
        works = (work.at(rows).with_elements_of(self.element_bytes) for work in counted)
        return self.call_seconds + sum(self.part_seconds(work) for work in works)

    def host_seconds(self, part: Part, images: int) -> float:
        """The latent and the sampler's arithmetic keep their dtype, whatever the engines compute in."""
        return self.part_seconds(part.work.at(images))

    def is_measured(self, engine: EngineWork, rows: int) -> bool:
        return False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GenerationPrediction:
    """Seconds of a generation of `images` images on a target in a dtype, and what they rest on.

    `sheet` is None where they rest on a calibration of the target.
    """

    target: str
    chip: str
    dtype: str
    images: int
    prediction: Prediction
    sheet: Roofline | None

    @property
    def seconds(self) -> float:
        return self.prediction.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the report of a compile."""
        return {
            "target": self.target, "chip": self.chip, "dtype": self.dtype, "images": self.images,
            **self.prediction.to_json(), "rests_on": "calibration" if self.sheet is None else "data sheet",
            "sheet": None if self.sheet is None else self.sheet.to_json(),
        }  # fmt: skip


def call_part(latent_elements: int, table_bytes: int, guided: bool, sampler: str, element_bytes: int = 4) -> Part:
    """The runtime's own work in one sampler call: rows of tables copied, guidance, the sampler's update.

    `latent_elements` of one image, `table_bytes` of one row (timestep and table ports).
    """
    size = float(latent_elements * element_bytes)
    rows = 2 if guided else 1
    moved = size * (rows + SAMPLER_PASSES + (GUIDANCE_PASSES if guided else 0)) + float(table_bytes * rows)
    key = f"call:{sampler}:{latent_elements}x{element_bytes}+{table_bytes}{'x2' if guided else ''}"
    per_image = Work(read_bytes=moved, written_bytes=moved)
    return Part(key, RowWork(Work(operations=float(HOST_OPERATIONS)), per_image))


def request_part(latent_elements: int, table_bytes: int, calls: int, guided: bool, sampler: str) -> Part:
    """The runtime's own work around the loop: noise, the tables of all sampler calls, early engines bound."""
    moved = 8.0 * latent_elements + float(table_bytes * (2 if guided else 1) * calls)
    key = f"request:{sampler}/{calls}:{latent_elements}+{table_bytes}{'x2' if guided else ''}"
    per_image = Work(read_bytes=moved, written_bytes=moved)
    return Part(key, RowWork(Work(operations=float(HOST_OPERATIONS)), per_image))
