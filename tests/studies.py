"""One tiny model, traced and exported once in a process, for all tests that choose, search and fit schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from dcc.exports.templates import OnnxTemplate, export_templates
from dcc.ir.schedule import BOTH, GuidanceMode, Schedule, delta_units, from_steps
from dcc.preparation import Clock, Prepared, Source, prepare, sampler_of
from dcc.search.laboratory import Laboratory

MODEL = "studies:tiny_dit"
PLAIN = "studies:plain"
STEPS = 5
IMAGES = 2
CPU_OPTIONS = {"sampler": "ddim", "steps": STEPS, "max_batch": 4}
_TRACED: dict[tuple[object, ...], Prepared] = {}
_TEMPLATES: dict[int, Mapping[str, OnnxTemplate]] = {}


def tiny_dit() -> dict[str, Any]:
    """A factory: two blocks, hence four components, with classes and guidance."""
    module, inputs, roles = zoo.dit(depth=2)
    return {"module": module, "example_inputs": inputs, "roles": roles}


class Plain(nn.Module):
    """Nothing is added to a stream, so there is no component."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) * t[:, None, None]


def plain() -> dict[str, Any]:
    module = zoo.build(Plain)
    inputs = {"x": torch.ones(2, 3, 4), "t": torch.tensor([1.0, 2.0])}
    return {"module": module, "example_inputs": inputs, "roles": {"x": "latent", "t": "timestep"}}


def prepared(source: Source, opt_level: int = 1, clock: Clock | None = None) -> Prepared:
    """What `dcc.preparation.prepare` gives for the source, from one trace per model, guidance and batch."""
    key = (source.model, source.guidance, source.guidance_scale, source.max_batch, min(opt_level, 1))
    if key not in _TRACED:
        _TRACED[key] = prepare(replace(source, sampler="ddim", steps=STEPS), opt_level)
    found = _TRACED[key]
    table = sampler_of(found.loaded, source.sampler, source.steps, dict(source.sampler_options or {}))
    program = replace(found.program, sampler=table, reports=list(found.program.reports))
    return Prepared(source, found.loaded, program)


def exported(templates: Mapping[str, torch.fx.GraphModule]) -> Mapping[str, OnnxTemplate]:
    """The templates of a Program that `prepared` gave, exported once."""
    if id(templates) not in _TEMPLATES:
        _TEMPLATES[id(templates)] = export_templates(templates)  # type: ignore[arg-type]
    return _TEMPLATES[id(templates)]


def share(patch: pytest.MonkeyPatch) -> None:
    """dcc's verbs trace and export the models of this module once in a process; everything else is as it is."""
    for module in ("dcc.driver", "dcc.search.study", "dcc.calibrate"):
        patch.setattr(f"{module}.prepare", prepared)
    for module in ("dcc.search.laboratory", "dcc.exports.lower"):
        patch.setattr(f"{module}.export_templates", exported)


def laboratory(folder: Path, model: str = MODEL, steps: int = STEPS, **options: Any) -> Laboratory:
    """A Laboratory of the tiny model, or of another factory of this module, with two images in each set."""
    program = prepared(Source(model, **{**CPU_OPTIONS, "steps": steps})).program
    counts = {"images": IMAGES, "held_out_images": IMAGES}
    return Laboratory(program, folder, templates=exported(program.templates), **{**counts, **options})


def spans(
    components: Sequence[str], calls: Sequence[int], order: int = 1, guidance: Sequence[GuidanceMode] = (BOTH,) * STEPS
) -> Schedule:
    """Two spans that are computed in these calls and forecast in the others."""
    units = delta_units(components, (0, len(components) // 2))
    return from_steps(components, units, [[call in calls] * 2 for call in range(len(guidance))], order, guidance)
