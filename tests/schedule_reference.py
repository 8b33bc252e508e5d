"""What a schedule means, said slowly in torch: stage by stage, call by call, with everything that is kept in a list.

Written from the text of `dcc/ir/schedule.py` alone. A branch that is left out is zeros, so its gate adds nothing. The
delta of a run is taken along every stream that passes through it; what else leaves the run is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compiled import NULLS, SAMPLERS, model_of, relative_difference, traced_program
from hypothesis import strategies as st
from random_graphs import Sketch, aten
from torch import Tensor
from torch.fx import Node

from dcc.exports.artifact_writer import ArtifactWriter
from dcc.exports.lower import lower
from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.frontend.samplers import sampler_table
from dcc.ir.graph import outputs_of
from dcc.ir.interpret import run_stage
from dcc.ir.program import Guidance, Program, Role, Stage
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    REUSE,
    SKIP,
    Action,
    GuidanceMode,
    Schedule,
    Stores,
    Unit,
    delta_units,
    forecast,
    full_schedule,
    output_unit,
)
from dcc.passes import run_passes
from dcc.preparation import manifest_of, pipeline
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.loading import load_on_processor as load
from dcc.runtime.noise import Noise
from dcc.runtime.sampler import Sampler
from dcc.tolerances import TOLERANCE

EARLY = ("timestep", "request", "table")
LIMIT = TOLERANCE["float32"].loop
STEPS = 6
Values = dict[Node, Tensor]
_SUBJECTS: dict[str, Subject] = {}


@dataclass(frozen=True)
class Subject:
    """A Program after the exact passes, its exported templates, and a request for two images."""

    program: Program
    templates: Mapping[str, OnnxTemplate]
    conditions: Mapping[str, np.ndarray]
    negatives: Mapping[str, np.ndarray]

    def rows(self, images: int) -> dict[str, Any]:
        """`conditions` and `negative_conditions` of a request for so many images."""
        batched = {item.name for item in self.program.inputs if item.shape[:1] == ("B",)}
        both = []
        for values in (self.conditions, self.negatives):
            turns = np.arange(images)
            both.append({k: v[turns % len(v)] if k in batched else v for k, v in values.items()})
        negatives = both[1] if self.program.guidance.mode == "cfg" else None
        return {"conditions": both[0], "negative_conditions": negatives, "images": images}


def subject(name: str) -> Subject:
    """A zoo model ready for schedules of six steps, guided; made once in a process."""
    if name not in _SUBJECTS:
        _SUBJECTS[name] = _make_subject(name)
    return _SUBJECTS[name]


def without_guidance(subject: Subject) -> Subject:
    """The same without guidance: one half, whatever the schedule says."""
    return replace(subject, program=replace(subject.program, guidance=Guidance()))


def _make_subject(name: str) -> Subject:
    program = traced_program(name)
    sampler, options = SAMPLERS.get(name, ("ddim", {}))
    program.sampler = sampler_table(sampler, steps=STEPS, **options)
    program.guidance = Guidance("cfg", 2.5, 4 if name == "diffusers_dit" else None)
    run_passes(program, pipeline(1))
    example = {key: value.numpy() for key, value in model_of(name).example_inputs.items()}
    names = [item.name for item in program.input(Role.CONDITION)]
    null = NULLS.get(name, {})
    conditions = {key: example[key] if key not in null else np.array([3, 7]) for key in names}
    negatives = {key: np.full_like(conditions[key], null.get(key, 0.1)) for key in names if key not in null}
    batched = {item.name for item in program.inputs if item.shape[:1] == ("B",)}
    return Subject(
        program, export_templates(program.templates), conditions,
        {key: value for key, value in negatives.items() if key in batched},
    )  # fmt: skip


def write(subject: Subject, schedule: Schedule | None, path: Path, granularity: str = "step") -> LoadedArtifact:
    """The artifact compiled under the schedule, loaded."""
    program = replace(subject.program, schedule=schedule)
    with ArtifactWriter(path) as writer:
        plan = lower(program, writer, granularity, templates=subject.templates)
        writer.finish(manifest_of(program, plan, "0" * 64, "cpu", {}))
    return load(path, threads=1)


def check(
    subject: Subject,
    schedule: Schedule,
    folder: Path,
    *,
    images: Sequence[int] = (2,),
    scales: Sequence[float | None] = (None,),
    granularities: Sequence[str] = ("step", "component"),
) -> dict[str, LoadedArtifact]:
    """Artifacts of the schedule sample what the reference does, each for all sizes and scales in turn.

    They are also ten times nearer to it than the exact samples are, where those differ.
    """
    loaded = {kind: write(subject, schedule, folder / f"{kind}.dcc", kind) for kind in granularities}
    for count in images:
        for scale in scales:
            wanted = reference(subject, schedule, images=count, scale=scale)
            exact = reference(subject, full_schedule(schedule.components, schedule.calls), images=count, scale=scale)
            apart = relative_difference(exact, wanted)
            limit = min(LIMIT, apart / 10) if apart > LIMIT / 10 else LIMIT
            for kind, artifact in loaded.items():
                got = artifact.sample(**subject.rows(count), guidance_scale=scale, seed=5)
                difference = relative_difference(got, wanted)
                assert difference <= limit, f"{kind}, {count} images, scale {scale}: {difference:.3g}"
    return loaded


def reference(
    subject: Subject, schedule: Schedule, *, images: int = 2, scale: float | None = None, seed: int | list[int] = 5
) -> np.ndarray:
    """Samples of the plain loop under the schedule, `[images, ...]`."""
    return [*trajectory(subject, schedule, images=images, scale=scale, seed=seed)][-1]


def trajectory(
    subject: Subject, schedule: Schedule, *, images: int = 2, scale: float | None = None, seed: int | list[int] = 5
) -> list[np.ndarray]:
    """The latent after each sampler call."""
    program, given = subject.program, subject.rows(images)
    guidance = program.guidance
    scale = (guidance.scale if scale is None else scale) if guidance.mode == "cfg" else 1.0
    guided = scale != 1.0
    halves = _halves(program, given["conditions"], given["negative_conditions"] or {}, images)
    denoiser = Denoiser(program, schedule)
    source = Noise(seed, images)
    shape = (images, *(int(size) for size in program.latent.shape[1:]))
    sampler = Sampler(program.sampler, shape)
    sampler.start(source.draw(shape[1:]))
    differences: list[Tensor] = []
    latents = []
    for call, mode in enumerate(schedule.guidance):
        latent = torch.from_numpy(np.array(sampler.model_input(call)))
        if guided and mode.kind == "both":
            inputs = {key: torch.cat(pair) if len(pair) > 1 else pair[0] for key, pair in halves.items()}
            wanted, null = denoiser(call, torch.cat([latent, latent]), inputs).chunk(2)
            channels = slice(None, guidance.channels)
            differences.insert(0, wanted[:, channels] - null[:, channels])
            output = wanted.clone()
            output[:, channels] = null[:, channels] + scale * differences[0]
        else:
            output = denoiser(call, latent, {key: pair[0] for key, pair in halves.items()})
            if guided and mode.kind == "reuse":
                reused = sum(weight * value for weight, value in zip(mode.weights, differences, strict=False))
                output[:, : guidance.channels] += (scale - 1) * reused
        latents.append(sampler.advance(call, output.numpy(), lambda dtype: source.draw(shape[1:], dtype)).copy())
    return latents


def _halves(
    program: Program, conditions: Mapping[str, Any], negatives: Mapping[str, Any], images: int
) -> dict[str, tuple[Tensor, ...]]:
    """Each condition for the conditional half and, where it has rows, for the other."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for item in program.input(Role.CONDITION):
        value = torch.from_numpy(np.asarray(conditions[item.name]))
        if item.shape[:1] != ("B",):
            found[item.name] = (value,)
        elif item.name in negatives:
            found[item.name] = (value, torch.from_numpy(np.asarray(negatives[item.name])))
        else:
            found[item.name] = (value, torch.full_like(value, item.null or 0))
    return found


@dataclass(frozen=True)
class Memory:
    """What one call computed of a unit, by result; `both` says that it holds for both halves."""

    both: bool
    values: Values


class Denoiser:
    """The denoiser under a schedule: calls in order, each with the latent and conditions of the rows that run."""

    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program, self.schedule = program, schedule
        self.early = [stage for stage in program.stages if stage.kind in EARLY]
        self.stages = [stage for stage in program.stages if stage.kind not in EARLY]
        self.final = outputs_of(program.graph)[0]
        self.memories: list[list[Memory]] = [[] for _ in schedule.units]
        places = [index for index, stage in enumerate(self.stages) if stage.kind == "component"]
        self.runs = {self._start(unit, places): number for number, unit in enumerate(schedule.units)}
        self.ends = [self._end(unit, places) for unit in schedule.units]

    @staticmethod
    def _start(unit: Unit, places: Sequence[int]) -> int:
        return 0 if unit.stores is Stores.OUTPUT else places[unit.first]

    def _end(self, unit: Unit, places: Sequence[int]) -> int:
        """The stage after the unit: behind the residual adds of its last component, for a delta."""
        if unit.stores is Stores.OUTPUT:
            return len(self.stages)
        first, following = places[unit.last] + 1, [*places, len(self.stages)][unit.last + 1]
        if unit.stores is Stores.DELTA:
            for index in range(first, following):
                if self.stages[index].kind == "residual":
                    return index + 1
        return first

    def __call__(self, call: int, latent: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        values: Values = {}
        times = torch.full((len(latent),), float(self.program.sampler.calls[call].timestep))
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                item = next(item for item in self.program.inputs if item.name == node.name)
                given = {Role.LATENT: latent, Role.TIMESTEP: times}.get(item.role, conditions.get(item.name))
                assert given is not None
                values[node] = given.to(getattr(torch, item.dtype))
        with torch.no_grad():
            for stage in self.early:
                self._run(stage, values)
            index = 0
            while index < len(self.stages):
                if index in self.runs:
                    unit = self.runs[index]
                    self._unit(call, unit, self.stages[index : self.ends[unit]], values, len(latent))
                    index = self.ends[unit]
                else:
                    self._run(self.stages[index], values)
                    index += 1
        return values[self.final].clone()

    def _run(self, stage: Stage, values: Values) -> None:
        values |= run_stage(self.program, stage.template, stage.inputs, stage.weights, stage.outputs, values)

    def _unit(self, call: int, number: int, stages: Sequence[Stage], values: Values, rows: int) -> None:
        unit, action = self.schedule.units[number], self.schedule.actions[call][number]
        both = self.schedule.guidance[call].kind == "both"
        bases = self._bases(unit, stages)
        if action.computes:
            for stage in stages:
                self._run(stage, values)
            made = {node: values[node] - values[base] if base else values[node] for node, base in bases.items()}
            self.memories[number].insert(0, Memory(both, made))
            return
        valid = [memory.values for memory in self.memories[number] if memory.both or not both]
        for node, base in bases.items():
            substitute = self._substitute(node, action, [memory[node][:rows] for memory in valid], rows)
            values[node] = values[base] + substitute if base else substitute

    @staticmethod
    def _substitute(node: Node, action: Action, history: Sequence[Tensor], rows: int) -> Tensor:
        total = torch.zeros([int(size) if isinstance(size, int) else rows for size in node.meta["val"].shape])
        for weight, value in zip(action.weights, history, strict=False):
            total = total + weight * value
        return total

    def _bases(self, unit: Unit, stages: Sequence[Stage]) -> dict[Node, Node | None]:
        """What leaves the unit, with the stream that it was added to on the way, None where there is none."""
        inside = {node for stage in stages for node in stage.outputs}
        others = [stage for stage in self.stages if stage not in stages]
        read = {node for stage in others for node in stage.inputs} | {self.final}
        streams = {item.add: item.stream for stage in stages for item in stage.residuals}
        found: dict[Node, Node | None] = {}
        for node in (node for stage in stages for node in stage.outputs if node in read):
            base: Node = node
            while base in inside and base in streams:
                base = streams[base]
            found[node] = base if unit.stores is Stores.DELTA and base not in inside else None
        return found


def chain(depth: int = 3, head: bool = True) -> Program:
    """Components on one stream, each with its gate; without `head` the stream itself is the output."""
    s = Sketch()
    x, t = s.latent(6, 4), s.timestep()
    h = s.linear(x, "embed", 4)
    for index in range(depth):
        h = s.add(h, s.mul(s.linear(h, f"body.{index}", 4), _gate(s, t, index)))
    return _prepared(s.program(s.linear(h, "head", 4) if head else h))


def long_skip(joined: int = 2) -> Program:
    """Three components; before number `joined`, glue joins the stream with what it was before them all."""
    s = Sketch()
    x, t = s.latent(6, 4), s.timestep()
    first = h = s.linear(x, "embed", 4)
    for index in range(3):
        if index == joined:
            h = s.linear(s.op(aten.cat.default, [h, first], -1), "join", 4)
        h = s.add(h, s.mul(s.linear(h, f"body.{index}", 4), _gate(s, t, index)))
    return _prepared(s.program(s.linear(h, "head", 4)))


def two_streams() -> Program:
    """A component on a second stream, which only the component after it reads."""
    s = Sketch()
    x, t = s.latent(6, 4), s.timestep()
    h, text = s.linear(x, "embed", 4), s.linear(x, "text_embed", 4)
    text = s.add(text, s.mul(s.linear(text, "text", 4), _gate(s, t, 0)))
    h = s.add(h, s.mul(s.linear(s.mul(h, text), "joint", 4), _gate(s, t, 1)))
    h = s.add(h, s.mul(s.linear(h, "last", 4), _gate(s, t, 2)))
    return _prepared(s.program(s.linear(h, "head", 4)))


def _gate(s: Sketch, t: Node, index: int) -> Node:
    return s.op(aten.unsqueeze.default, s.op(aten.silu.default, s.embed(t, f"gate.{index}")), 1)


def _prepared(program: Program) -> Program:
    program.sampler = sampler_table("ddim", steps=STEPS)
    run_passes(program, pipeline(1))
    return program


def sketch_subject(program: Program) -> Subject:
    """A hand-made Program without conditions, ready for schedules."""
    return Subject(program, export_templates(program.templates), {}, {})


@st.composite
def schedules(draw: st.DrawFn, names: tuple[str, ...], calls: int, join: int = 0) -> Schedule:
    """Any schedule: random units, actions with random weights near one in sum, and modes.

    Some units are skipped in all calls, which is what lets them be skipped in the first. Before component `join`
    streams are joined to one; a run of components across that place has nothing to pass by them, so is not skipped.
    """
    starts = [0, *(index for index in range(1, len(names)) if draw(st.booleans()))]
    units = [
        replace(unit, stores=draw(st.sampled_from([Stores.BRANCH, Stores.DELTA]))) if unit.first == unit.last else unit
        for unit in delta_units(names, starts)
    ]
    whole = len(units) == 1 and draw(st.booleans())
    units = [*output_unit(names)] if whole else units
    modes: list[GuidanceMode] = []
    for _ in range(calls):
        known = sum(mode.kind == "both" for mode in modes)
        kinds = [BOTH, BOTH, CONDITIONAL, *([GuidanceMode("reuse", draw(weights(known)))] if known else [])]
        modes.append(draw(st.sampled_from(kinds)))
    columns = []
    for unit in units:
        column: list[Action] = []
        skippable = not whole and not unit.first < join <= unit.last
        if skippable and draw(st.integers(0, 7)) == 7:
            columns.append([SKIP] * calls)
            continue
        for call in range(calls):
            valid = sum(
                action.computes and (mode.kind == "both" or modes[call].kind != "both")
                for action, mode in zip(column, modes, strict=False)
            )
            kinds = [
                COMPUTE,
                *([REUSE, forecast(draw(weights(valid)))] if valid else []),
                *([SKIP] if call and skippable else []),
            ]
            column.append(draw(st.sampled_from(kinds)))
        columns.append(column)
    return Schedule(names, tuple(units), tuple(zip(*columns, strict=True)), tuple(modes))


def weights(known: int) -> st.SearchStrategy[tuple[float, ...]]:
    later = st.integers(-3, 3).map(lambda value: value / 8)
    return st.lists(later, max_size=min(known, 3) - 1).map(lambda rest: (1.0 - sum(rest), *rest))
