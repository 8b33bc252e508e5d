"""Transformations of a Program, one file per technique.

A pass is a frozen dataclass whose fields are its options, with a `name` and `apply(program) -> PassReport`. It
changes the Program in place and reports *applied*, or leaves it alone and reports *declined* with the reason, or
raises. `EXACT` is the ordered pipeline of `-O1`.
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
from dcc.passes.drop_dead import DropDead
from dcc.passes.fold_constants import FoldConstants
from dcc.passes.hoist_scopes import HoistScopes
from dcc.passes.share_common import ShareCommon
from dcc.passes.split_rows import SplitRows
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
    "ALWAYS", "CUT", "EXACT", "BatchGuidance", "Canonicalize", "CutStages", "DropDead", "FoldConstants",
    "HoistScopes", "Pass", "ShareCommon", "SplitRows", "UnpackProjections", "run_passes",
]  # fmt: skip
