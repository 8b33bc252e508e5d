"""residual-threshold: first-block cache, TeaCache and EasyCache as static tables."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from subjects import SHARES, check_settles, features, subject, table, without_measurements

from dcc.errors import UsageError
from dcc.ir.measurements import Declined
from dcc.passes.residual_threshold import SIGNALS, ResidualThreshold


@pytest.mark.parametrize("signal", SIGNALS)
def test_fires(signal: str, golden: Callable[[str], None]) -> None:
    golden(table(ResidualThreshold(signal, threshold=0.25, order=1).propose(subject())))


@pytest.mark.parametrize("signal", SIGNALS)
def test_settles(signal: str) -> None:
    check_settles(ResidualThreshold(signal, target_share=0.75 if signal == "first_block" else 0.5))


def test_the_first_block_is_always_computed() -> None:
    schedule = ResidualThreshold(threshold=0.3).propose(subject())
    assert [unit.members for unit in schedule.units] == [range(2), range(2, 8)]
    assert all(row[0].computes for row in schedule.actions)
    assert not all(row[1].computes for row in schedule.actions)


@pytest.mark.parametrize("signal", ["first_block", "stack"])
def test_reused_calls_have_changed_less_than_the_threshold(signal: str) -> None:
    one = subject()
    assert one.measurements is not None
    changes = getattr(one.measurements, signal)
    schedule = ResidualThreshold(signal, threshold=0.3).propose(one)
    unit = len(schedule.units) - 1
    for call in range(1, one.calls):
        last = schedule.history(call, unit)[0]
        assert schedule.actions[call][unit].computes == (changes[last, call] >= 0.3)


def test_output_follows_easycache() -> None:
    """The released rule, run on the latents and outputs themselves."""
    run = [(item.latent, item.output) for item in features()]
    computed: list[int] = []
    total = 0.0
    for call, (latent, _) in enumerate(run):
        skips = False
        if len(computed) >= 2:
            before, last = computed[-2:]
            moved = np.abs(run[last][0] - run[before][0]).mean()
            rate = np.abs(run[last][1] - run[before][1]).mean() / moved
            total += rate * np.abs(latent - run[call - 1][0]).mean() / np.abs(run[last][1]).mean()
            skips = total < 0.3
        if not skips:
            computed.append(call)
            total = 0.0
    schedule = ResidualThreshold("output", threshold=0.3).propose(subject())
    assert [call for call, row in enumerate(schedule.actions) if row[0].computes] == computed
    assert 2 < len(computed) < 10


def test_warmup_and_the_longest_run() -> None:
    schedule = ResidualThreshold(
        "stack", threshold=99.0, warmup=3, max_consecutive=2, compute_last=True
    ).propose(subject())  # fmt: skip
    assert [call for call, row in enumerate(schedule.actions) if row[0].computes] == [0, 1, 2, 5, 8, 9]


@pytest.mark.parametrize("signal", ["stack", "output", "input"])
@pytest.mark.parametrize("target", SHARES)
def test_pays_the_target_share(signal: str, target: float) -> None:
    one = subject(calls=20)
    schedule = ResidualThreshold(signal, target_share=target).propose(one)
    assert schedule.computed_share(one.flops, one.glue_flops) == pytest.approx(target, abs=0.06)


def test_a_sweep_pays_less_than_everything() -> None:
    one = subject()
    assert all(option.propose(one).computed_share(one.flops) < 1 for option in ResidualThreshold("stack").options(one))


def test_declines_with_the_reason() -> None:
    with pytest.raises(Declined, match="no measurements"):
        ResidualThreshold().propose(without_measurements())
    with pytest.raises(Declined, match="no change of the stack signal is below 0"):
        ResidualThreshold("stack", threshold=0.0).propose(subject())
    with pytest.raises(Declined, match="the first block is the only one"):
        ResidualThreshold().propose(subject(blocks=1))
    with pytest.raises(Declined, match=r"no threshold computes 20%: the least is 3\d%"):
        ResidualThreshold(target_share=0.2).propose(subject())


@pytest.mark.parametrize("options", [{"signal": "loss"}, {"warmup": 0}, {"order": 2}, {"max_consecutive": -1}])
def test_an_option_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        ResidualThreshold(**options)


def test_input_follows_teacache() -> None:
    """The released rule with a polynomial fitted by other means: estimates add up, a computed call resets them."""
    run = list(features(calls=20))
    changes, wanted = [], []
    for old, new in pairwise(run):
        changes.append(np.abs(new.latent - old.latent).mean() / np.abs(old.latent).mean())
        before, after = old.streams[-1] - old.streams[0], new.streams[-1] - new.streams[0]
        wanted.append(np.abs(after - before).mean() / np.abs(before).mean())
    estimates = np.polyval(np.polyfit(changes, wanted, 4), changes)
    computed, total = [0], 0.0
    for call in range(1, 20):
        total += max(0.0, estimates[call - 1])
        if total >= 0.4:
            computed.append(call)
            total = 0.0
    schedule = ResidualThreshold("input", threshold=0.4).propose(subject(calls=20))
    assert [call for call, row in enumerate(schedule.actions) if row[0].computes] == computed
    assert 2 < len(computed) < 15
