"""`dcc inspect`: what an artifact (without torch) or a model (traced first) consists of."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcc.commands import options
from dcc.commands.compile import layer_rows, prediction_rows, schedule_rows, show_passes
from dcc.commands.terminal import Stages, flops, print_json, print_table, say, size, stdout_reserved
from dcc.errors import ScheduleError, UsageError

if TYPE_CHECKING:
    from dcc.ir.program import Program
    from dcc.ir.schedule import Action, Schedule
    from dcc.runtime import Artifact

TEXT_MEMBER = "program.txt"
SCHEDULE_MEMBER = "schedule.json"
CALLS_IN_A_LINE = 100
NAME_WIDTH = 32
MODES = {"both": "B", "conditional": "c", "reuse": "r"}
LEGEND = "# compute, . reuse, ~ forecast, blank skip; guidance: B both halves, c conditional alone, r reused difference"
SCOPES = ("constant", "timestep", "request", "table", "step")
COSTS = ("parameters", "bytes", "FLOPs a row")
NUMBERS = "parameters bytes FLOPs-a-row share weights model"
SECTIONS = {"build": "timestep", "request": "request", "table": "table", "step": "step"}


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL.dcc|MODEL", help="An artifact, or anything dcc compiles.")],
    graph: Annotated[bool, typer.Option("--graph", help="Show every operation (of a model, not an artifact).")] = False,
    sampler: options.SamplerOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler, for a model.")] = None,
    arch: options.ArchOption = None,
    role: options.RoleOption = None,
    trust_pickle: options.TrustOption = False,
    heat_map: Annotated[
        str | None, typer.Option("--heat-map", metavar="FILE.png", help="Draw the artifact's schedule.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show the program, its scopes, components, passes, sampler, engines and schedule."""
    if heat_map is not None and Path(heat_map).suffix.lower() != ".png":
        raise UsageError("unknown kind of picture", got=heat_map, want="a name that ends in .png")
    if is_artifact(Path(model)):
        if graph:
            raise UsageError(
                "an artifact holds stages, not single operations",
                at=model,
                next="dcc inspect --graph MODEL, the original",
            )
        from dcc.runtime import Artifact

        artifact = Artifact.open(model)
        found = describe_artifact(artifact)
        if heat_map is not None:
            _draw(schedule_of(artifact), Path(heat_map), model)
    else:
        if heat_map is not None:
            raise UsageError("only an artifact has a schedule to draw", at=model, next="dcc compile --schedule or -O2")
        roles = options.key_values(role, "--role") or None
        found = _describe_model(model, graph, sampler, steps, arch, roles, trust_pickle)
    if as_json:
        print_json(found)
    else:
        _show(found)


def is_artifact(path: Path) -> bool:
    """By its name, or because it is a zip with a manifest: torch's own files are zips too."""
    if path.suffix == ".dcc":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "manifest.json" in archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """Everything that the file says about itself."""
    manifest = artifact.manifest
    members = manifest["members"]
    text = artifact.read(TEXT_MEMBER).decode("utf-8", "replace") if TEXT_MEMBER in members else ""
    weights = {weight.name: weight for weight in artifact.plan.weights}
    engines = [
        {
            "name": engine.name, "kind": engine.kind, "model_bytes": members[engine.member]["size"],
            "weight_bytes": sum(weights[name].nbytes for name in engine.weights), "weights": len(engine.weights),
        }
        for engine in artifact.plan.engines
    ]  # fmt: skip
    sizes = {weight.nbytes / max(_count(weight.shape), 1) for weight in weights.values()}
    table = manifest["sampler"]
    schedule = schedule_of(artifact)
    passes = _passes(manifest)
    return {
        "kind": "artifact", "path": artifact.path, "size_bytes": Path(artifact.path).stat().st_size,
        "name": manifest["name"], "target": manifest["target"], "program_hash": manifest["program_hash"],
        "text": text, "sampler": None if table is None else _sampler_summary(table), "guidance": manifest["guidance"],
        "scopes": scope_rows(passes, text),
        "stages": stage_rows(text, sizes.pop() if len(sizes) == 1 else None),
        "passes": passes, "engines": engines, "layers": [layer.to_json() for layer in artifact.layers],
        "predictions": _predictions(manifest), "recipe": manifest["recipe"], "tools": manifest["tools"],
        "schedule": None if schedule is None else schedule.to_json(),
        "worth": next((row["figures"] for row in passes if row["name"] == "schedule"), None),
    }  # fmt: skip


def _predictions(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = (manifest["report"] or {}).get("predictions")
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def schedule_of(artifact: Artifact) -> Schedule | None:
    """The schedule that is compiled in; None for an exact artifact. Raises ScheduleError for a damaged one."""
    from dcc.ir.schedule import Schedule

    if SCHEDULE_MEMBER not in artifact.manifest["members"]:
        return None
    try:
        return Schedule.from_json(json.loads(artifact.read(SCHEDULE_MEMBER)))
    except (ValueError, RecursionError) as error:
        raise ScheduleError(
            "the artifact's schedule cannot be read", at=artifact.path, got=str(error)[:200], next="compile it again"
        ) from error


def schedule_lines(schedule: Schedule) -> list[str]:
    """The schedule as text: a row for neighbouring units that do the same, a column for each call; see LEGEND."""
    spans: list[tuple[int, int, int]] = []  # the first and last component, and a unit that stands for them
    for index, unit in enumerate(schedule.units):
        same = spans and schedule.column(spans[-1][2]) == schedule.column(index)
        if same and schedule.units[spans[-1][2]].stores is unit.stores:
            spans[-1] = (spans[-1][0], unit.last, index)
        else:
            spans.append((unit.first, unit.last, index))
    lines = [("guidance", "", "".join(MODES[mode.kind] for mode in schedule.guidance))]
    for first, last, index in spans:
        names = schedule.components[first], schedule.components[last]
        marks = "".join(map(_mark, schedule.column(index)))
        lines.append((names[0] if first == last else "..".join(names), str(schedule.units[index].stores), marks))
    ruler = "".join(f"{call:<10}" for call in range(0, schedule.calls, 10))
    width = min(NAME_WIDTH, max(len(name) for name, _, _ in lines))
    shown = []
    for begin in range(0, schedule.calls, CALLS_IN_A_LINE):
        part = slice(begin, begin + CALLS_IN_A_LINE)
        shown.append(f"{'call':{width}}  {'keeps':6}  {ruler[part]}".rstrip())
        shown += [f"{_shortened(name):{width}}  {stores:6}  {marks[part]}" for name, stores, marks in lines]
    return [*shown, LEGEND]


def _mark(action: Action) -> str:
    if action.kind == "combine":
        return "." if action.weights == (1.0,) else "~"
    return "#" if action.computes else " "


def _shortened(name: str) -> str:
    half = (NAME_WIDTH - 2) // 2
    return name if len(name) <= NAME_WIDTH else f"{name[:half]}..{name[-half:]}"


def _draw(schedule: Schedule | None, path: Path, model: str) -> None:
    from dcc.search.front import write_files
    from dcc.search.report import heat_map_png

    if schedule is None:
        raise UsageError("the artifact is exact, so there is no schedule to draw", at=model, next="dcc compile -O2")
    options.check_writable(path)
    write_files({path: heat_map_png(schedule)})


def _describe_model(
    model: str, graph: bool, sampler: str | None, steps: int | None, arch: str | None, roles: dict[str, str] | None,
    trust_pickle: bool,
) -> dict[str, Any]:  # fmt: skip
    with Stages() as stages, stdout_reserved():
        stages("importing torch")
        from dataclasses import asdict

        from dcc.ir.text import graph_text, program_text

        program = _trace(stages, model, sampler, steps, arch, roles, trust_pickle)
        text = program_text(program, costs=True)
        reports = [asdict(report) for report in program.reports]
        table = None if program.sampler is None else _sampler_summary(program.sampler.to_json())
        sizes = {tensor.element_size() for tensor in program.weights.values()}
        found = {
            "kind": "model", "path": model, "name": program.name, "source": program.source, "text": text,
            "program_hash": program.hash(), "parameters": program.parameters(), "sampler": table,
            "guidance": asdict(program.guidance), "scopes": scope_rows(reports, text),
            "stages": stage_rows(text, sizes.pop() if len(sizes) == 1 else None), "passes": reports,
        }  # fmt: skip
        if graph:
            found["graph"] = graph_text(program)
    return found


def _trace(
    stages: Stages, model: str, sampler: str | None, steps: int | None, arch: str | None,
    roles: dict[str, str] | None, trust_pickle: bool,
) -> Program:  # fmt: skip
    """The Program as `dcc compile` would lower it."""
    from dcc import preparation
    from dcc.frontend.load import load_model
    from dcc.frontend.trace import trace
    from dcc.passes import run_passes

    stages("loading the model")
    loaded = load_model(model, arch=arch, trust_pickle=trust_pickle, roles=roles)
    stages("tabulating the sampler")
    table = preparation.sampler_of(loaded, sampler, steps, {})
    stages("tracing")
    program = trace(
        loaded.module, loaded.example_inputs, loaded.roles, name=loaded.name, nulls=loaded.nulls, ranges=loaded.ranges,
        guidance=preparation.guidance_of(loaded, "auto", preparation.DEFAULT_GUIDANCE_SCALE),
        unbatched=loaded.unbatched,
    )  # fmt: skip
    program.sampler, program.source = table, loaded.source
    stages("running passes")
    run_passes(program, preparation.pipeline(1))
    return program


def _sampler_summary(table: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: table[key] for key in ("name", "scheduler", "prediction", "steps", "registers", "clip", "variance")}
    draws = sum(call["draws"] for call in table["calls"])
    return {**kept, "calls": len(table["calls"]), "noise_draws": draws}


def _passes(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The compiler's reports; people read them, so one that is not as expected is left out, not refused."""
    reports = (manifest["report"] or {}).get("passes")
    known = [row for row in reports if isinstance(row, dict)] if isinstance(reports, list) else []
    return [row for row in known if {"name", "status", "why", "figures"} <= row.keys()]


def scope_rows(reports: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Parameters, bytes and FLOPs of one row by scope: as `hoist-scopes` counted them, else from the stages."""
    figures: Any = next((row["figures"] for row in reports if row["name"] == "hoist-scopes"), None)
    scopes = figures.get("scopes") if isinstance(figures, dict) else None
    if isinstance(scopes, dict) and scopes.keys() <= set(SCOPES):
        # The pass counts two rows: one guided image.
        return [
            {"scope": scope, "parameters": row["parameters"], "bytes": row["bytes"], "flops": row["flops"] / 2}
            for scope, row in sorted(scopes.items(), key=lambda item: SCOPES.index(item[0]))
        ]
    totals: dict[str, dict[str, Any]] = {}
    for stage in stage_rows(text, None):
        row = totals.setdefault(stage["scope"], {"scope": stage["scope"], "parameters": 0, "bytes": None, "flops": 0.0})
        row["parameters"] += stage["parameters"]
        row["flops"] += stage["flops"]
    return list(totals.values())


def stage_rows(text: str, element_bytes: float | None) -> list[dict[str, Any]]:
    """The stages of a program's text with costs; bytes are known where all weights have one element size."""
    rows = []
    scope = "step"
    for line in text.splitlines():
        if line in SECTIONS:
            scope = SECTIONS[line]
        left, found, costs = line.rpartition("  // ")
        call, at, template = left.rpartition("  @")
        if not (line.startswith("  ") and found and at):
            continue
        parts = costs.removeprefix("component, ").replace(",", "").split()
        try:
            parameters, million = int(parts[0]), float(parts[2])
        except (IndexError, ValueError):
            continue
        rows.append({
            "name": call.partition(" = ")[2].partition("(")[0], "scope": scope,
            "component": costs.startswith("component, "), "template": template, "parameters": parameters,
            "bytes": None if element_bytes is None else int(parameters * element_bytes), "flops": million * 1e6,
        })  # fmt: skip
    return rows


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def _show(found: dict[str, Any]) -> None:
    say(found.get("graph") or found["text"])
    scopes = found["scopes"]
    total = sum(row["flops"] for row in scopes) or 1.0
    rows: list[tuple[object, ...]] = [(row["scope"], *_costs(row), f"{row['flops'] / total:.1%}") for row in scopes]
    print_table("scopes", ("scope", *COSTS, "share"), rows, NUMBERS)
    rows = [
        (row["name"], row["scope"], "component" if row["component"] else "", *_costs(row), row["template"])
        for row in found["stages"]
    ]
    print_table("stages", ("stage", "scope", "kind", *COSTS, "template"), rows, NUMBERS)
    show_passes(found["passes"])
    _show_schedule(found)
    engines = found.get("engines", [])
    rows = [(row["name"], row["kind"], size(row["weight_bytes"]), size(row["model_bytes"])) for row in engines]
    if rows:
        print_table("engines", ("engine", "scope", "weights", "model"), rows, NUMBERS)
    _show_layers(found)
    _show_summary(found)


def _show_layers(found: dict[str, Any]) -> None:
    """Each layer with its engines: layers by kind and precision, rows of the profile, size, error against float32."""
    columns = ("engine", "engine bytes", "weights", "layers", "by precision", "rows", "attention", "error")
    for layer in found.get("layers", []):
        try:
            rows = [_layer_row(name, engine) for name, engine in layer["summary"]["engines"].items()]
            lines = layer_rows(layer)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            rows, lines = [], []  # people read it: a summary that is not as expected is left out, not refused
        capabilities = ", ".join(f"sm{capability}" for capability in layer["capabilities"])
        library = f"{layer['backend']} {layer['version']}".strip()
        title = f"layer {layer['name']}: {library}, {layer['dtype']}, {capabilities}"
        if rows:
            print_table(title, columns, rows, "engine-bytes weights layers error")
        say("\n".join(f"{name:<10} {value}" for name, value in lines if name == "" or not rows))
    try:
        predicted = prediction_rows(found.get("predictions", []))
    except (KeyError, TypeError, ValueError):
        predicted = []
    if predicted:
        say("\n".join(f"{name:<10} {value}" for name, value in predicted))


def _layer_row(name: str, engine: Mapping[str, Any]) -> tuple[object, ...]:
    counts: dict[str, int] = {}
    for kind, count in engine.get("kinds", {}).items():
        for dtype in kind.rpartition(" ")[2].split("+"):
            counts[dtype] = counts.get(dtype, 0) + count
    if not counts:
        counts = {dtype: count for dtype, count in engine["nodes"].items() if count}
    precisions = ", ".join(f"{dtype} {count}" for dtype, count in sorted(counts.items(), key=lambda item: -item[1]))
    profiles = engine.get("profiles") or [{}]
    bounds: list[list[int]] = next(iter(profiles[0].values()), [])
    rows = "/".join(str(shape[0]) for shape in bounds) or "-"
    built = size(engine["engine_bytes"]) if "engine_bytes" in engine else "not built"
    error = "-" if engine["error"] is None else f"{engine['error']:.1e}"
    return (
        name, built, size(engine["weight_bytes"]), engine.get("layers", sum(engine["nodes"].values())), precisions,
        rows, engine.get("attention") or "-", error,
    )  # fmt: skip

def _show_schedule(found: dict[str, Any]) -> None:
    from dcc.ir.schedule import Schedule

    if found.get("schedule") is None:
        return
    schedule = Schedule.from_json(found["schedule"])
    say("\n".join([f"schedule  {schedule.name or schedule.digest()[:12]}", *schedule_lines(schedule)]))
    try:
        rows = schedule_rows(found["worth"])
    except (KeyError, TypeError, ValueError, IndexError):
        rows = []  # people read it: a report that is not as expected is left out, not refused
    if rows:
        say("\n".join(f"{name:<14} {value}" for name, value in rows))


def _costs(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['parameters']:,}", "" if row["bytes"] is None else size(row["bytes"]), flops(row["flops"])


def _show_summary(found: dict[str, Any]) -> None:
    sampler = found["sampler"]
    rows = [("name", found["name"]), ("hash", found["program_hash"]), ("guidance", _spelled(found["guidance"]))]
    rows.append(("sampler", "none: denoise only" if sampler is None else _spelled(sampler)))
    for key in ("recipe", "tools"):
        if found.get(key):
            rows.append((key, _spelled(found[key])))
    if "size_bytes" in found:
        rows.append(("size", size(found["size_bytes"])))
    say("\n".join(f"{name:<10} {value}" for name, value in rows))


def _spelled(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
