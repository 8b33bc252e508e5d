"""Other families than the digits' DiT: several streams, joined streams, text conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from schedule_reference import subject

from dcc.ir.measurements import subject_of
from dcc.passes import Fora, TaylorSeer
from dcc.search.fitting import fit_weights
from dcc.search.laboratory import Laboratory


@pytest.mark.parametrize("family", ["pixart", "sd3", "flux"])
def test_is_measured_and_fitted(family: str, tmp_path: Path) -> None:
    program = subject(family).program
    texts = {
        item.name: np.zeros([1 if isinstance(size, str) else size for size in item.shape], item.dtype)
        for item in program.inputs
        if str(item.role) == "condition" and item.minimum is None
    }
    laboratory = Laboratory(program, tmp_path, images=2, held_out_images=2, conditions=texts)
    measured = laboratory.measurements()
    assert measured.calls == program.calls
    # A component of its own for each weight of FLUX's many would take minutes.
    steps = (Fora(interval=2), TaylorSeer(interval=2, order=1)) if family != "flux" else ()
    for step in steps:
        schedule = step.propose(subject_of(program))
        fit = fit_weights(laboratory, schedule, laboratory.search)
        plain = laboratory.quality(laboratory.run(schedule, laboratory.search).samples, laboratory.search)[0]
        assert laboratory.quality(fit.samples, laboratory.search)[0] <= plain * 1.05
