"""`dcc targets`, `dcc passes`, `dcc samplers`: what there is to choose from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dcc.commands.options import JsonOption
from dcc.commands.terminal import Stages, print_json, print_table, say

if TYPE_CHECKING:
    from dcc.cost_model.targets import Target


TargetArgument = Annotated[
    str | None, typer.Argument(metavar="TARGET", help="A name, sm80, local, or the JSON file of a machine of yours.")
]


def targets(target: TargetArgument = None, as_json: JsonOption = False) -> None:
    """List the targets, or explain one: its figures, where each comes from, and why it has its backend."""
    from dcc.cost_model.targets import list_targets, target_named, this_machine

    machine = this_machine()
    if target is not None:
        found = target_named(target)
        if as_json:
            print_json({"target": found.to_json(), "machine": machine})
        else:
            _explain(found)
        return
    if as_json:
        print_json({"targets": [each.to_json() for each in list_targets()], "machine": machine})
        return
    columns = ("name", "chip", "capability", "memory", "bandwidth", "float16, dense", "backend")
    rows = []
    for each in list_targets():
        name = ", ".join((each.name, *each.aliases))
        capability = "-" if each.capability is None else f"sm{each.capability}"
        numbers = (_quantity(each, "memory"), _quantity(each, "bandwidth"), _quantity(each, "float16_flops"))
        rows.append((name, each.chip, capability, *numbers, each.backend))
    print_table("targets", columns, rows, right="memory bandwidth float16")
    say("also: local (this machine), sm80 and the like (any GPU of a capability), the path of a JSON file")
    say("figures and their sources: dcc targets NAME")
    say("this machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()))


def _explain(target: Target) -> None:
    """One target with the source of every figure."""
    also = f" (also {', '.join(target.aliases)})" if target.aliases else ""
    say(f"{target.name}{also}: {target.summary}")
    say(f"backend {target.backend}: {target.reason}")
    say(f"dtype {target.dtypes[0]} unless another is asked for: {', '.join(target.dtypes)}")
    shown = [item for item in target.figures if item.name != "backends"]
    rows = [(item.name, f"{_quantity(target, item.name)}", item.source) for item in shown]
    print_table("figures", ("figure", "value", "source"), rows)


def _quantity(target: Target, name: str) -> str:
    """The figure in a unit that leaves a few digits before the point; a dash where the target has none."""
    found = target.figure(name)
    if found is None:
        return "-"
    # Bytes below a million are sizes of pages, which people count in ones; capabilities have no unit.
    if isinstance(found.value, str) or not found.unit or 1 <= found.value < 1e6:
        return f"{found.value} {found.unit}".strip()
    unit, _, rest = found.unit.replace("bytes", "B").partition(" ")
    if unit == "of":
        return f"{found.value:.0%} {found.unit}"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0), ("u", 1e-6)):
        # Memory and bandwidths are known by their billions of bytes, however many.
        if found.value >= size and not (prefix == "T" and unit.startswith("B")):
            return f"{found.value / size:.5g} {prefix}{unit} {rest}".strip()
    return f"{found.value:.3g} {found.unit}"


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
