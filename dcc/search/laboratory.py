"""Where schedules are tried out: a Program, its engines cut at every component, and exact samples to compare with.

Nothing is built per candidate but small engines without weights: components that a schedule reuses are simply not
called. What is measured is the samples' distance from the exact ones, on one set of seeds and conditions for the
search and on another for the report.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dcc.conditions import negatives_for, part_of, rows_for, with_classes, without_null
from dcc.errors import UsageError
from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.compose import StoredWeights
from dcc.exports.lower import lower
from dcc.exports.step_plan import StepPlan, StepPlanner
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.exports.unroll import step_stages
from dcc.ir.measurements import Features, Measurements, blocks_of, measure
from dcc.ir.program import Program
from dcc.ir.schedule import Schedule, full_schedule
from dcc.preparation import manifest_of
from dcc.quality import psnr, ssim, typical_range
from dcc.runtime.artifact import Artifact
from dcc.runtime.container import WEIGHTS_MEMBER
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.onnxruntime_backend import OnnxRuntimeBackend
from dcc.runtime.plan import Call, ConstantSpec, EngineSpec, Plan

Array = np.ndarray[Any, np.dtype[Any]]
SEARCH_SEED, CHECK_SEED, HELD_OUT_SEED = 1_000, 5_000, 9_000
SENSITIVITY_IMAGES = 6
SMALLEST = 1e-12


@dataclass(frozen=True)
class Trial:
    """One generation under a schedule: samples and wall seconds."""

    samples: Array
    seconds: float


@dataclass(frozen=True)
class Requests:
    """What is sampled: one seed and one row of conditions an image."""

    seeds: tuple[int, ...]
    conditions: Mapping[str, Any]
    guidance_scale: float | None = None

    @property
    def images(self) -> int:
        return len(self.seeds)


class Laboratory:
    """See the module's text. `folder` keeps the weights that the engines read; it must outlive the Laboratory."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        *,
        images: int = 16,
        held_out_images: int = 32,
        guidance_scale: float | None = None,
        conditions: Mapping[str, Any] | None = None,
        threads: int | None = None,
        own_process: bool = False,
        templates: Mapping[str, OnnxTemplate] | None = None,
    ) -> None:
        """Raises UsageError for a program without sampler or components."""
        if program.sampler is None:
            raise UsageError("a schedule needs a sampler", next="name one with --sampler (dcc samplers lists them)")
        if not program.components:
            raise UsageError("no component was found, so there is nothing to schedule", at=program.name)
        self.program = program
        self._threads, self.own_process = threads, own_process
        self.templates = export_templates(program.templates) if templates is None else templates
        path = folder / "laboratory.dcc"
        self._plan = _write_base(program, path, self.templates)
        artifact = Artifact.open(path, check="fast")
        stored = StoredWeights(_stored_weights(program, self._plan, self.templates), _weights_base(artifact))
        self._planner = StepPlanner(program, self.templates, stored)
        self._backend = OnnxRuntimeBackend(artifact, threads, own_process=own_process, several=True)
        self.artifact = artifact
        self._provided: set[str] = set()
        exact = self.load(None)
        self.search, self.held_out = (
            self._requests(exact, range(first, first + count), conditions or {}, guidance_scale, skipped)
            for first, count, skipped in ((SEARCH_SEED, images, 0), (HELD_OUT_SEED, held_out_images, images))
        )
        self._exact: dict[tuple[int, ...], tuple[list[Array], list[Array]]] = {}

    def _requests(
        self,
        loaded: LoadedArtifact,
        seeds: Sequence[int],
        conditions: Mapping[str, Any],
        scale: float | None,
        skipped: int,
    ) -> Requests:
        """The rows of the conditions after those skipped, so that other requests have others where there are more."""
        total = skipped + len(seeds)
        values = rows_for(loaded, with_classes(loaded, conditions, ()), total)
        return Requests(tuple(seeds), part_of(loaded, values, np.arange(skipped, total)), scale)

    @property
    def guided(self) -> bool:
        """Whether the requests run both halves."""
        scale = self.search.guidance_scale
        return self.program.guidance.mode == "cfg" and (self.program.guidance.scale if scale is None else scale) != 1.0

    def sibling(self, program: Program, folder: Path) -> Laboratory:
        """A Laboratory for the same Program under another sampler, with the same requests."""
        other = Laboratory(
            program, folder, images=1, held_out_images=1, conditions=self.search.conditions,
            threads=self._threads, own_process=self.own_process, templates=self.templates,
        )  # fmt: skip
        other.search, other.held_out = self.search, self.held_out
        return other

    def plan_of(self, schedule: Schedule | None, finest: bool = True) -> StepPlan:
        """The step under the schedule; its engines are ready to be bound."""
        step = self._planner.plan(schedule, finest)
        for key, engine in step.engines.items():
            if key not in self._provided:
                self._backend.provide(key, engine.model)
                self._provided.add(key)
        return step

    def load(self, schedule: Schedule | None, finest: bool = True) -> LoadedArtifact:
        """Ready to sample under the schedule, exact without one. `finest` False merges engines as shipped."""
        step = self.plan_of(schedule, finest)
        engines = tuple(
            EngineSpec(key, "step", "", engine.inputs, engine.outputs, engine.weights)
            for key, engine in step.engines.items()
        )
        plan = replace(
            self._plan,
            engines=(*(engine for engine in self._plan.engines if engine.kind != "step"), *engines),
            constants=(*self._plan.constants, *(ConstantSpec(name, name, False, False) for name in step.scalars)),
            buffers=step.buffers,
            histories=step.histories,
            step_programs=step.programs,
            order=step.order or self._plan.order,
            guidance=step.guidance,
        )
        return LoadedArtifact(self.artifact, self._backend, plan, step.scalars)

    def request_values(self, loaded: LoadedArtifact, requests: Requests) -> dict[str, Any]:
        """Arguments of `LoadedArtifact.sample` and `request`."""
        unknown = without_null(loaded)
        negatives = {key: value for key, value in negatives_for(loaded, requests.images).items() if key in unknown}
        guided = loaded.guidance["mode"] == "cfg" and requests.guidance_scale != 1.0
        return {
            "conditions": dict(requests.conditions),
            "negative_conditions": negatives if guided else None,
            "images": requests.images,
            "guidance_scale": requests.guidance_scale,
            "seed": list(requests.seeds),
        }

    def run(self, schedule: Schedule | None, requests: Requests, finest: bool = True) -> Trial:
        """The samples under the schedule and the seconds that they took, loading not counted."""
        loaded = self.load(schedule, finest)
        start = time.perf_counter()
        samples = loaded.sample(**self.request_values(loaded, requests))
        return Trial(samples, time.perf_counter() - start)

    def exact_trajectory(self, requests: Requests) -> list[Array]:
        """The exact latents after each sampler call; the last are the exact samples."""
        return self._exact_run(requests)[0]

    def exact_outputs(self, requests: Requests) -> list[Array]:
        """The guided output of each call of the exact run."""
        return self._exact_run(requests)[1]

    def _exact_run(self, requests: Requests) -> tuple[list[Array], list[Array]]:
        if requests.seeds not in self._exact:
            loaded = self.load(None)
            latents: list[Array] = []
            outputs: list[Array] = []
            with loaded.request(**self.request_values(loaded, requests)) as request:
                for call in range(request.calls):
                    outputs.append(request.output(call).copy())
                    latents.append(request.advance(call, outputs[-1]).copy())
            self._exact[requests.seeds] = latents, outputs
        return self._exact[requests.seeds]

    def quality(self, samples: Array, requests: Requests) -> tuple[float, float, float | None]:
        """Mean squared error, PSNR in dB and SSIM of samples against the exact ones."""
        exact = self.exact_trajectory(requests)[-1].astype(np.float32)
        error = float(np.mean((samples.astype(np.float64) - exact) ** 2))
        return error, psnr(samples, exact, self.data_range), ssim(samples, exact, self.data_range)

    @cached_property
    def data_range(self) -> float:
        """What PSNR and SSIM take as the range of values: the same for both sets of requests."""
        sets = [self.exact_trajectory(requests)[-1].ravel() for requests in (self.search, self.held_out)]
        return typical_range(np.concatenate(sets))

    def features(self, requests: Requests) -> Iterator[Features]:
        """What each call of an exact run shows."""
        schedule = full_schedule(self.program.components, self.program.calls)
        loaded, step = self.load(schedule), self.plan_of(schedule)
        first, branches, streams = _observed(self.program)
        watched = {first, *branches, *streams}
        with loaded.request(**self.request_values(loaded, requests)) as request:
            for call in range(request.calls):
                values: dict[str, Array] = {}

                def told(entry: Call, values: dict[str, Array] = values) -> None:
                    for port, ref in zip(step.engines[entry.engine].outputs, entry.outputs, strict=True):
                        if port.name in watched:
                            values[port.name] = request.space.array(ref).copy()

                latent = np.array(request.sampler.latent)
                output = request.output(call, told)
                whole = np.array(request.space.output)
                values.setdefault(first, latent)
                yield Features(
                    call, latent, whole, request.halves.count, tuple(values[name] for name in branches),
                    tuple(values[name] for name in (first, *streams)),
                )  # fmt: skip
                request.advance(call, output)

    def measurements(self) -> Measurements:
        """What calibrated schedules stand on, from the search's requests. Raises UsageError for a single call."""
        self._check_calls()
        scale = self.search.guidance_scale
        measured = measure(
            self.features(self.search), self.program.components, first_block=len(blocks_of(self.program)[0]),
            guidance_scale=self.program.guidance.scale if scale is None else scale, name=self.program.name,
        )  # fmt: skip
        return replace(measured, sensitivity=self.sensitivity())

    def _check_calls(self) -> None:
        if self.program.calls < 2:
            raise UsageError(
                "one sampler call leaves nothing to reuse", at=self.program.name, got="1 sampler call",
                want="2 or more", next="more --steps, or compile with -O1",
            )  # fmt: skip

    def sensitivity(self, images: int = SENSITIVITY_IMAGES) -> Array:
        """The sample's root mean squared error for one of a call's guided output, by trying it call by call.

        Each trial begins at the call on the exact trajectory, with its output forecast from those of the two calls
        before; later calls are computed. The geometric mean over images, because a few that end at another picture
        would decide a mean. Raises UsageError for a single call.
        """
        self._check_calls()
        requests = first_of(self.search, images)
        calls = self.program.calls
        loaded = self.load(full_schedule(self.program.components, calls))
        places, outputs = [], []
        with loaded.request(**self.request_values(loaded, requests)) as request:
            for call in range(calls):
                places.append(request.place())
                outputs.append(request.output(call).copy())
                request.advance(call, outputs[-1])
            exact = request.sampler.latent.copy()
        found = np.ones(calls)
        for call in range(1, calls):
            wrong = 2 * outputs[call - 1] - outputs[call - 2] if call > 1 else outputs[0]
            with loaded.request(**self.request_values(loaded, requests)) as request:
                request.return_to(places[call])
                for other in range(call, calls):
                    request.advance(other, wrong if other == call else request.output(other))
                reached = _root_mean_squares(request.sampler.latent - exact)
            given = _root_mean_squares(wrong - outputs[call])
            found[call] = np.exp(np.mean(np.log(np.maximum(reached, SMALLEST) / np.maximum(given, SMALLEST))))
        found[0] = found[1]
        return found


def requests_of(laboratory: Laboratory, seeds: Sequence[int]) -> Requests:
    """Other seeds under the conditions of the search's requests."""
    given = laboratory.search
    rows = {
        name: np.asarray(value)[np.arange(len(seeds)) % given.images]
        if np.ndim(value) and len(value) == given.images else value
        for name, value in given.conditions.items()
    }  # fmt: skip
    return Requests(tuple(seeds), rows, given.guidance_scale)


def first_of(requests: Requests, images: int) -> Requests:
    """The first images of the requests."""
    count = min(images, requests.images)
    conditions = {
        name: value[:count] if len(np.shape(value)) and len(value) == requests.images else value
        for name, value in requests.conditions.items()
    }
    return Requests(requests.seeds[:count], conditions, requests.guidance_scale)


def _root_mean_squares(values: Array) -> Array:
    """Of each image."""
    return np.asarray(np.sqrt(np.mean(values.reshape(len(values), -1).astype(np.float64) ** 2, axis=1)))


def _write_base(program: Program, path: Path, templates: Mapping[str, OnnxTemplate]) -> Plan:
    plain = replace(program, schedule=None)
    with ArtifactWriter(path) as writer:
        plan = lower(plain, writer, "component", templates=templates)
        writer.finish(manifest_of(plain, plan, "laboratory", "cpu", {}))
    return plan


def _weights_base(artifact: Artifact) -> int:
    return artifact.member_offset(WEIGHTS_MEMBER)


def _stored_weights(program: Program, plan: Plan, templates: Mapping[str, OnnxTemplate]) -> dict[tuple[str, bool], Any]:
    specs = {spec.name: spec for spec in plan.weights}
    found = {}
    for stage in program.stages:
        for index, name in enumerate(stage.weights):
            transposed = index in templates[stage.template].transposed
            found[name, transposed] = specs[f"{name}^T" if transposed else name]
    return found


def _observed(program: Program) -> tuple[str, list[str], list[str]]:
    """Ports to watch: the stream before the first component, each component's result, the stream after each.

    Of several streams (image and text) the larger one of the first component is followed; where another is added to,
    or both joined, it is as it was.
    """
    stages = step_stages(program)
    branches, streams = [], []
    first, shape = "", None
    for index, stage in enumerate(stages):
        if stage.kind != "component":
            continue
        branches.append(stage.outputs[0].name)
        after = next((item for item in stages[index + 1 :] if item.kind != "glue"), None)
        if after is not None and after.kind == "residual":
            item = max(after.residuals, key=lambda item: item.add.meta["val"].numel())
            first, shape = first or item.stream.name, shape or item.add.meta["val"].shape
        followed = [] if after is None else [item for item in after.residuals if item.add.meta["val"].shape == shape]
        if followed:
            streams.append(followed[0].add.name)
        else:
            streams.append(streams[-1] if streams else first or stage.outputs[0].name)
    return first or branches[0], branches, streams
