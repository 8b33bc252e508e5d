"""What a schedule is for: each change is refused by its own name and no other, and what changes nothing is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import studies
import torch
import zoo

from dcc.driver import compile
from dcc.errors import ScheduleError, UsageError
from dcc.frontend.schedules import moved_to
from dcc.ir.schedule import Schedule
from dcc.preparation import Source, prepare
from dcc.search.choose import sampler_digest


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        studies.share(patch)
        patch.setenv("DCC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def identity(**options: Any) -> dict[str, str]:
    """The hashes of the tiny model, compiled with these options."""
    source = Source(**{"model": studies.MODEL, **studies.CPU_OPTIONS, **options})
    program = studies.prepared(source).program
    return {"program": program.denoiser_hash(), "sampler": sampler_digest(program.sampler)}


@pytest.fixture(scope="module")
def schedule(shared: None) -> Schedule:
    components = studies.prepared(Source(studies.MODEL, **studies.CPU_OPTIONS)).program.components
    return replace(studies.spans(components, (0, 1, 3)), name="given", **identity())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, schedule: Schedule) -> Path:
    path = tmp_path_factory.mktemp("identity") / "schedule.json"
    path.write_text(json.dumps(schedule.to_json()))
    return path


def other_weights() -> dict[str, Any]:
    """The tiny model with one number changed."""
    module, inputs, roles = zoo.dit(depth=2)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    return {"model": module, "example_inputs": inputs, "roles": roles}


def refusal(schedule: Schedule | Path, folder: Path, **options: Any) -> dict[str, str]:
    given = {"model": studies.MODEL, **studies.CPU_OPTIONS, "images": studies.IMAGES, **options}
    with pytest.raises(ScheduleError, match="the schedule was made for something else") as refused:
        compile(given.pop("model"), output=folder / "a.dcc", schedule=schedule, **given)
    assert list(folder.iterdir()) == []
    return refused.value.details


@pytest.mark.parametrize("read", [False, True])
def test_other_steps(schedule: Schedule, file: Path, tmp_path: Path, read: bool) -> None:
    details = refusal(file if read else schedule, tmp_path, steps=6)
    assert (details["got"], details["want"]) == ("5 calls", "6 calls")
    assert details["next"] == "--transfer nearest, and see what that loses, or search again"


@pytest.mark.parametrize("options", [{"sampler": "euler"}, {"sampler_options": {"timestep_spacing": "trailing"}}])
def test_another_sampler(schedule: Schedule, tmp_path: Path, options: dict[str, Any]) -> None:
    details = refusal(schedule, tmp_path, **options)
    name = options.get("sampler", "ddim")
    own, other = schedule.sampler, identity(**options)["sampler"]
    assert own != other
    assert details["got"] == f"sampler ddim:{own.removeprefix('ddim:')[:12]}"
    assert details["want"] == f"sampler {name}:{other.removeprefix(f'{name}:')[:12]}"


def test_another_sampler_and_other_steps(schedule: Schedule, tmp_path: Path) -> None:
    details = refusal(schedule, tmp_path, sampler="euler", steps=6)
    assert (details["got"], details["want"]) == ("sampler ddim; 5 calls", "sampler euler; 6 calls")


def test_other_weights(schedule: Schedule, tmp_path: Path) -> None:
    details = refusal(schedule, tmp_path, **other_weights())
    assert details["got"] == f"weights and operations {schedule.program[:12]}"
    assert details["want"].startswith("weights and operations ") and ";" not in details["want"]


def test_other_components(schedule: Schedule, tmp_path: Path) -> None:
    module, inputs, roles = zoo.dit(depth=3)
    details = refusal(schedule, tmp_path, model=module, example_inputs=inputs, roles=roles)
    assert details["got"] == "4 components, number 4 none"
    assert details["want"] == "6 components, number 4 'blocks.2.attn'"
    assert details["next"] == "use it with the model that it was made for, or search again"


@pytest.mark.parametrize(
    "options", [{"max_batch": 8}, {"guidance_scale": 2.0}, {"guidance": "none"}, {"guidance": "cfg"}]
)
def test_what_changes_neither_is_taken(schedule: Schedule, options: dict[str, Any]) -> None:
    assert identity(**options) == {"program": schedule.program, "sampler": schedule.sampler}


def test_a_checkpoint_with_another_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    names, found = set(), set()
    for name in ("first_name", "second_name"):
        (tmp_path / f"{name}.py").write_text(f"from studies import tiny_dit as {name}\n")
        program = prepare(Source(f"{name}:{name}", **studies.CPU_OPTIONS)).program
        names.add(program.name)
        found.add(program.denoiser_hash())
    assert len(names) == 2 and len(found) == 1


def test_a_larger_batch_compiles(schedule: Schedule, tmp_path: Path) -> None:
    options = {**studies.CPU_OPTIONS, "max_batch": 8, "images": studies.IMAGES}
    report = compile(studies.MODEL, output=tmp_path / "a.dcc", schedule=schedule, **options)
    assert report.schedule is not None and report.schedule["digest"] == schedule.digest()


# --transfer


def test_what_is_transferred_is_said(schedule: Schedule) -> None:
    heard: list[str] = []
    moved = moved_to(schedule, 6, schedule.program, "euler:1234", "nearest", heard.append)
    assert (moved.calls, moved.program, moved.sampler) == (6, schedule.program, "euler:1234")
    assert heard == ["transferred (nearest): made for sampler ddim; 5 calls, wanted for sampler euler; 6 calls"]
    assert moved_to(schedule, 5, schedule.program, schedule.sampler, "nearest", heard.append) == schedule
    assert len(heard) == 1


def test_other_components_cannot_be_transferred(file: Path, tmp_path: Path) -> None:
    module, inputs, roles = zoo.dit(depth=3)
    details = refusal(file, tmp_path, model=module, example_inputs=inputs, roles=roles, transfer="nearest")
    assert details["got"] == "4 components, number 4 none"


@pytest.mark.parametrize("options", [{"transfer": "nearest"}, {"transfer": "farthest", "schedule": "a.json"}])
def test_a_transfer_needs_a_schedule_and_a_placement(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--transfer moves a given schedule to other steps"):
        compile("nowhere:model", output=tmp_path / "a.dcc", **options)
