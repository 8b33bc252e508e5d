"""The fast search of -O2: the fewest computed calls that keep a requirement, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
import studies

from dcc.ir.schedule import Schedule
from dcc.search.fast import FastSearch
from dcc.search.laboratory import CHECK_SEED, Laboratory, Requests, requests_of
from dcc.search.requirement import Requirement


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return studies.laboratory(tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def check(laboratory: Laboratory) -> Requests:
    return requests_of(laboratory, range(CHECK_SEED, CHECK_SEED + studies.IMAGES))


def searching(laboratory: Laboratory, check: Requests, text: str, lines: list[str] | None = None) -> FastSearch:
    return FastSearch(laboratory, Requirement.parse(text), check, [].append if lines is None else lines.append)


def computed(schedule: Schedule) -> int:
    return sum(row[0].computes for row in schedule.actions)


def worst(laboratory: Laboratory, schedule: Schedule, requirement: Requirement, check: Requests) -> float:
    """The worse value of the two sets of requests."""
    values = []
    for requests in (laboratory.search, check):
        exact = laboratory.exact_trajectory(requests)[-1].astype(np.float32)
        samples = laboratory.run(schedule, requests).samples
        values.append(requirement.measure(samples, exact, laboratory.data_range))
    return min(values) if requirement.at_least else max(values)


def test_an_easy_requirement_needs_one_call(laboratory: Laboratory, check: Requests) -> None:
    first = next(searching(laboratory, check, "cosine>=-1").candidates())
    assert computed(first) == 1 and first.actions[0][0].computes
    assert first.name == "1 of 5 calls"


def test_slower_schedules_follow(laboratory: Laboratory, check: Requests) -> None:
    found = list(searching(laboratory, check, "cosine>=-1").candidates())
    assert [computed(schedule) for schedule in found] == [1, 2, 3, 4]


def test_an_impossible_requirement_leaves_nothing(laboratory: Laboratory, check: Requests) -> None:
    search = searching(laboratory, check, "psnr>=1000000")
    assert list(search.candidates()) == []


@pytest.mark.parametrize("metric", ["psnr", "relative_l2"])
def test_the_schedule_keeps_the_requirement_on_both_sets(
    laboratory: Laboratory, check: Requests, metric: str
) -> None:
    """The bound is what some schedule with three computed calls reaches."""
    easy = Requirement.parse("psnr>=-1e9" if metric == "psnr" else "relative_l2<=1e9")
    some = list(FastSearch(laboratory, easy, check, [].append).candidates())[2]
    assert computed(some) == 3
    requirement = Requirement(metric, easy.at_least, worst(laboratory, some, easy, check))
    first = next(FastSearch(laboratory, requirement, check, [].append).candidates())
    assert computed(first) <= 3
    assert requirement.holds(worst(laboratory, first, requirement, check))


def test_the_search_repeats_itself(laboratory: Laboratory, check: Requests) -> None:
    one, other = (
        [schedule.digest() for schedule in searching(laboratory, check, "psnr>=40").candidates()] for _ in range(2)
    )
    assert one == other


def test_each_evaluation_is_told_once(laboratory: Laboratory, check: Requests) -> None:
    lines: list[str] = []
    list(searching(laboratory, check, "cosine>=-1", lines).candidates())
    assert lines.pop(0) == "measuring exact trajectories"
    assert lines and all(" of 5 calls: cosine " in line for line in lines)
    assert len(lines) <= 2 + 3 * 5 + 8


def test_polishing_keeps_the_number_of_calls_and_is_no_worse(laboratory: Laboratory, check: Requests) -> None:
    requirement = Requirement.parse("psnr>=1")
    search = FastSearch(laboratory, requirement, check, [].append)
    candidates = search.candidates()
    for _ in range(2):  # the one that was accepted is polished, not the first
        plain = next(candidates)
    better = search.polished()
    assert computed(better) == computed(plain) and better.name == plain.name
    values = [worst(laboratory, schedule, requirement, check) for schedule in (plain, better)]
    # The form that keeps the output may cost a decibel.
    assert values[1] >= values[0] - 1.0 - 1e-6
    assert better.digest() == search.polished().digest()
