"""`dcc calibrate`: what a model's engines take on this machine, kept for later compiles."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcc.commands import options
from dcc.commands.terminal import Stages, flops, notice, print_json, print_table, say, size, stdout_reserved
from dcc.errors import UsageError

if TYPE_CHECKING:
    from dcc.calibrate import Check
    from dcc.cost_model.table import CalibrationTable, Measurement
    from dcc.cost_model.work import EngineWork


def calibrate(
    model: Annotated[
        str, typer.Argument(help="A .pt, .safetensors, .pt2, diffusers folder or package.module:factory.")
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="TABLE.json", help="Default: the user's cache folder.")
    ] = None,
    target: Annotated[str, typer.Option(help="A name of `dcc targets`.")] = "cpu",
    rows: Annotated[
        str, typer.Option(metavar="2,8,32", help="Rows of a batch: twice the images under guidance.")
    ] = "2,8,32",
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    sampler: options.SamplerOption = None,
    sampler_option: options.SamplerValueOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler (default 50).")] = None,
    arch: options.ArchOption = None,
    role: options.RoleOption = None,
    trust_pickle: options.TrustOption = False,
    threads: options.ThreadsOption = None,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Measure a model's engines on this machine; later compiles and searches predict latency from the table."""
    counts = sorted(set(options.integers(rows, "--rows")))
    if target != "cpu":
        raise UsageError(f"the target '{target}' cannot be measured here", want="cpu")
    roles = options.key_values(role, "--role") or None
    with Stages(verbose, live=False) as stages, stdout_reserved():
        stages("importing torch")
        from dcc.calibrate import calibrate as measure
        from dcc.calibrate import check, compile_for_calibration, engine_contents, engine_titles, new_table
        from dcc.cost_model.table import CalibrationTable, default_path
        from dcc.preparation import Source
        from dcc.runtime.loading import load_on_processor

        path = Path(output) if output else default_path(target)
        if output:
            options.check_writable(path)
        with tempfile.TemporaryDirectory(prefix="dcc-calibrate-") as folder:
            stages("compiling, cut at every component")
            file = Path(folder) / "model.dcc"
            source = Source(
                model, sampler=sampler, steps=steps, arch=arch, roles=roles, trust_pickle=trust_pickle,
                sampler_options=options.sampler_options(sampler_option), max_batch=max(64, *counts),
            )  # fmt: skip
            program = compile_for_calibration(source, file)
            artifact = load_on_processor(file, threads=threads, own_process=True)
            contents = engine_contents(artifact.artifact, program)
            found = measure(file, contents, counts, repeats, threads=threads, told=stages)
            fresh = new_table(target, threads)
            table = (_known(CalibrationTable, path, fresh)).merged(found.measurements)
            titles = engine_titles(artifact.artifact)
            checks = check(artifact, contents, found, table, threads)
        table.save(path)
    report = {
        "table": str(path), "machine": table.to_json()["machine"], "coefficients": table.to_json()["coefficients"],
        "measurements": len(found.measurements), "engines": _engines(found.measurements, contents, titles, table),
        "check": [{**vars(item), "error": item.error} for item in checks],
    }  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _show(report, checks)


def _known(kind: type[CalibrationTable], path: Path, fresh: CalibrationTable) -> CalibrationTable:
    """What was measured before on this machine and is at `path`; a table of another machine is replaced."""
    if not path.exists():
        return fresh
    try:
        known = kind.load(path)
    except UsageError as error:
        notice(f"the calibration table {path} is damaged and is replaced: {error.details.get('got', error.what)}")
        return fresh
    if (known.machine, known.target, known.own_process) != (fresh.machine, fresh.target, fresh.own_process):
        notice(f"the calibration table {path} is of another machine and is replaced")
        return fresh
    return known


def _engines(
    found: tuple[Measurement, ...], contents: dict[str, EngineWork], titles: dict[str, str], table: CalibrationTable
) -> list[dict[str, Any]]:
    """Each distinct engine of the model: its stages, how many there are of it, measured and fitted seconds."""
    names: dict[str, list[str]] = {}
    for name, engine in contents.items():
        names.setdefault(engine.key, []).append(name)
    fitted = table.coefficients["engine"]
    return [
        {
            "engine": titles[names[item.key][0]], "count": len(names[item.key]), "rows": item.rows,
            "seconds": item.seconds,
            "spread": item.spread, "samples": item.samples, "flops": item.work.flops, "bytes": item.work.moved_bytes,
            "fitted_seconds": fitted.call + fitted.part_seconds(item.work),
        }
        for item in found
        if item.key in names
    ]  # fmt: skip


def _show(report: dict[str, Any], checks: tuple[Check, ...]) -> None:
    rows = [
        (
            item["engine"], item["count"], item["rows"], f"{item['seconds'] * 1e3:.3f} ms",
            f"{item['spread'] * 100:.0f} %", flops(item["flops"]), size(item["bytes"]),
            f"{item['fitted_seconds'] * 1e3:.3f} ms",
        )
        for item in report["engines"]
    ]  # fmt: skip
    print_table(
        "engines on this machine, medians",
        ("engine", "count", "rows", "measured", "spread", "work", "traffic", "by the fit alone"), rows,
        "count rows measured spread work traffic by-the-fit-alone",
    )  # fmt: skip
    print_table(
        "a whole sampler call", ("rows", "measured", "predicted", "error"),
        [(item.rows, f"{item.measured_seconds * 1e3:.2f} ms", f"{item.predicted_seconds * 1e3:.2f} ms",
          f"{item.error * 100:+.1f} %") for item in checks], "rows measured predicted error",
    )  # fmt: skip
    say(f"table  {report['table']}")
