"""smoothcache: kinds of components are reused while their measured change is small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from subjects import SHARES, check_settles, subject, table, without_measurements

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.passes.smoothcache import SmoothCache


def test_fires(golden: Callable[[str], None]) -> None:
    golden(table(SmoothCache(alpha=0.2).propose(subject())))


def test_settles() -> None:
    check_settles(SmoothCache(target_share=0.75))


def test_keeps_the_contract() -> None:
    one = subject()
    assert one.measurements is not None
    schedule = SmoothCache(alpha=0.25, longest=2).propose(one)
    for kind in ("attention", "mlp"):
        members = [index for index, other in enumerate(one.kinds) if other == kind]
        for call in range(one.calls):
            actions = {schedule.actions[call][index].kind for index in members}
            assert len(actions) == 1
            if actions == {"combine"}:
                distance = call - schedule.history(call, members[0])[0]
                error = np.mean([one.measurements.branch[distance - 1, call, index] for index in members])
                assert distance <= 2
                assert error < 0.25
    assert all(action.computes for action in schedule.actions[-1])


def test_a_higher_alpha_computes_less() -> None:
    one = subject()
    shares = [SmoothCache(alpha).propose(one).computed_share(one.flops) for alpha in (0.1, 0.2, 0.3, 0.5)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] < 1


@pytest.mark.parametrize("target", SHARES)
def test_pays_the_target_share(target: float) -> None:
    one = subject()
    share = SmoothCache(longest=0, target_share=target).propose(one).computed_share(one.flops, one.glue_flops)
    assert share == pytest.approx(target, abs=0.07)  # one kind in one call is 3 to 7 %


def test_a_sweep_pays_less_than_everything() -> None:
    one = subject()
    assert all(option.propose(one).computed_share(one.flops) < 1 for option in SmoothCache().options(one))


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="no measurements"):
        SmoothCache().propose(without_measurements())
    with pytest.raises(Declined, match="of 10 calls, not of 8"):
        SmoothCache().propose(replace(subject(calls=8), measurements=subject().measurements))
    with pytest.raises(Declined, match="of other components"):
        SmoothCache().propose(replace(subject(), measurements=subject(blocks=3).measurements))
    with pytest.raises(Declined, match=r"no change is below 1e-09"):
        SmoothCache(alpha=1e-9).propose(subject())
    with pytest.raises(Declined, match=r"no threshold computes 10%: the least is 4\d%"):
        SmoothCache(target_share=0.1).propose(subject())


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"longest": -1}, {"target_share": 1.5}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        SmoothCache(**options)
