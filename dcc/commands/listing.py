"""`dcc targets`, `dcc passes`, `dcc samplers`: what there is to choose from."""

from __future__ import annotations

import sys

from dcc.commands.options import JsonOption
from dcc.commands.terminal import Stages, print_json, print_table, say


def targets(as_json: JsonOption = False) -> None:
    """List the targets, and where each of their figures comes from."""
    from dcc.cost_model.targets import list_targets, this_machine

    machine = this_machine()
    if as_json:
        print_json({"targets": [target.to_json() for target in list_targets()], "machine": machine})
        return
    for target in list_targets():
        rows = [(item.name, f"{item.value} {item.unit}".strip(), item.source) for item in target.figures]
        print_table(f"{target.name}: {target.summary}", ("figure", "value", "source"), rows)
    say("this machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()))


def passes(as_json: JsonOption = False) -> None:
    """List the exact passes in the order in which they run, then the passes that make schedules."""
    with Stages() as stages:
        stages("importing torch")
        from dcc.frontend import lora
        from dcc.passes import SCHEDULES
        from dcc.preparation import pipeline

    first = {"name": "fold-lora", "level": 0, "summary": _first_line(lora.__doc__)}
    always = {step.name for step in pipeline(0)}
    rows = [first]
    for step in pipeline(1):
        rows.append({"name": step.name, "level": 0 if step.name in always else 1, "summary": _summary(step)})
    schedules = [{"name": step.name, "summary": _summary(step)} for step in SCHEDULES]
    if as_json:
        print_json({"passes": rows, "schedules": schedules})
        return
    print_table("exact passes, in order", ("pass", "from", "what is true after it"),
                [(row["name"], f"-O{row['level']}", row["summary"]) for row in rows])  # fmt: skip
    print_table("schedule passes", ("pass", "what its schedule does"),
                [(row["name"], row["summary"]) for row in schedules])  # fmt: skip


def samplers(as_json: JsonOption = False) -> None:
    """List the samplers known by name."""
    from dcc.frontend.samplers import list_samplers

    known = list_samplers()
    if as_json:
        rows = [
            {"name": item.name, "scheduler": item.scheduler, "summary": item.summary, "aliases": list(item.aliases)}
            for item in known
        ]
        print_json({"samplers": rows})
        return
    print_table(
        "samplers (a diffusers scheduler_config.json does as well)",
        ("name", "scheduler of diffusers", "what it is", "also"),
        [(item.name, item.scheduler, item.summary, ", ".join(item.aliases)) for item in known],
    )


def _summary(step: object) -> str:
    """The first line of the module that defines the pass."""
    return _first_line(sys.modules[type(step).__module__].__doc__)


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""
