"""Seconds of an engine on a target from its data sheet alone, and seconds of a whole generation from those of engines.

An engine's part takes the longer of its arithmetic at the target's peak and its traffic at the target's bandwidth,
every operation adds an overhead, and so does every call. `CalibrationTable` answers the same questions from
measurements. Source: the roofline model, Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dcc.cost_model.targets import Target, target_named, this_machine
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
    """A target's figures: FLOPs and bytes a second, seconds of overhead for an operation and for an engine call."""

    flops_per_second: float
    bytes_per_second: float
    operation_seconds: float
    call_seconds: float

    @staticmethod
    def of(target: str | Target, dtype: str = "float32", processors: int | None = None) -> Roofline:
        """The figures of the target for this many processors, by default those that this process may use.

        Raises UsageError for a target without figures for the dtype.
        """
        given = target_named(target) if isinstance(target, str) else target
        figures = {item.name: item.value for item in given.figures}
        count = int(this_machine()["usable_processors"] or 1) if processors is None else processors
        wanted = (f"{dtype}_flops", "bandwidth", "operation_overhead", "call_overhead")
        missing = [name for name in wanted if not isinstance(figures.get(name), int | float)]
        if missing:
            raise UsageError(
                f"the target '{given.name}' has no figure {missing[0]}", got=dtype, want=figures.get("dtypes")
            )
        peak, bandwidth, operation, call = (float(figures[name]) for name in wanted)
        return Roofline(peak * count, bandwidth, operation, call)

    def part_seconds(self, work: Work) -> float:
        """Seconds of one part, without the call."""
        arithmetic, traffic = work.flops / self.flops_per_second, work.moved_bytes / self.bytes_per_second
        return max(arithmetic, traffic) + work.operations * self.operation_seconds

    def engine_seconds(self, engine: EngineWork, rows: int) -> float:
        return self.call_seconds + sum(self.part_seconds(part.work.at(rows)) for part in engine.parts)

    def host_seconds(self, part: Part, images: int) -> float:
        return self.part_seconds(part.work.at(images))

    def is_measured(self, engine: EngineWork, rows: int) -> bool:
        return False


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
