"""Transformations of a Program, one file per technique.

A pass is a frozen dataclass whose fields are its options, with a `name` and `apply(program) -> PassReport`. It
changes the Program in place and reports *applied*, or leaves it alone and reports *declined* with the reason, or
raises. `EXACT` is the ordered pipeline of `-O1`. Each of `SCHEDULES` gives the Program a schedule, which is lossy.
"""

from __future__ import annotations

from typing import Protocol

if __name__ != "dcc.passes":
    raise ImportError("import this package as dcc.passes: a second copy of its classes must not exist")

from dcc.ir.program import PassReport, Program
from dcc.ir.verify import verify
from dcc.passes.batch_guidance import BatchGuidance
from dcc.passes.canonicalize import Canonicalize
from dcc.passes.cut_stages import CutStages
from dcc.passes.delta_dit import DeltaDit
from dcc.passes.drop_dead import DropDead
from dcc.passes.fold_constants import FoldConstants
from dcc.passes.fora import Fora
from dcc.passes.guidance_interval import GuidanceInterval
from dcc.passes.guidance_reuse import GuidanceReuse
from dcc.passes.hoist_scopes import HoistScopes
from dcc.passes.learned_router import LearnedRouter
from dcc.passes.magcache import MagCache
from dcc.passes.optimal_steps import OptimalSteps
from dcc.passes.residual_threshold import ResidualThreshold
from dcc.passes.share_common import ShareCommon
from dcc.passes.smoothcache import SmoothCache
from dcc.passes.split_rows import SplitRows
from dcc.passes.taylorseer import TaylorSeer
from dcc.passes.unpack_projections import UnpackProjections


class Pass(Protocol):
    """What the pipeline needs of a pass."""

    @property
    def name(self) -> str: ...

    def apply(self, program: Program) -> PassReport: ...


ALWAYS: tuple[Pass, ...] = (Canonicalize(), ShareCommon())
EXACT: tuple[Pass, ...] = (
    FoldConstants(),
    UnpackProjections(),
    SplitRows(),
    FoldConstants(),
    ShareCommon(),
    DropDead(),
    BatchGuidance(),
    HoistScopes(),
)
CUT = CutStages()
SCHEDULES: tuple[Pass, ...] = (
    Fora(),
    TaylorSeer(),
    DeltaDit(),
    SmoothCache(),
    MagCache(),
    ResidualThreshold(),
    GuidanceInterval(),
    GuidanceReuse(),
    LearnedRouter(),
    OptimalSteps(),
)


def run_passes(program: Program, passes: tuple[Pass, ...]) -> list[PassReport]:
    """The passes run in order, the Program is verified around each, and their reports are appended to it."""
    verify(program)
    canonical = False
    for step in passes:
        report = step.apply(program)
        canonical = canonical or report.name == "canonicalize"
        verify(program, after=report.name, canonical=canonical)
        program.reports.append(report)
    return program.reports[-len(passes) :]


__all__ = [
    "ALWAYS", "CUT", "EXACT", "SCHEDULES", "BatchGuidance", "Canonicalize", "CutStages", "DeltaDit", "DropDead",
    "FoldConstants", "Fora", "GuidanceInterval", "GuidanceReuse", "HoistScopes", "LearnedRouter", "MagCache",
    "OptimalSteps", "Pass", "ResidualThreshold", "ShareCommon", "SmoothCache", "SplitRows", "TaylorSeer",
    "UnpackProjections", "run_passes",
]  # fmt: skip
