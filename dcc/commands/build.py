"""`dcc build`: engines for more targets in an artifact that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcc.commands import options
from dcc.commands.compile import layer_rows
from dcc.commands.terminal import Stages, print_json, say, size, stdout_reserved


def build(
    artifact: options.ArtifactArgument,
    target: options.TargetsOption = "local",
    dtype: options.DtypeOption = None,
    backend: options.BackendOption = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Another file (default: the same).")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Engines that are built at once.")] = None,
    engine_cache: options.EngineCacheOption = True,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Add engines for TARGET to MODEL.dcc. The model is not needed, and layers that are there keep their bytes."""
    with Stages(verbose) as stages, stdout_reserved():
        from dcc.build_layers import build as build_layers

        stages(f"making layers for {target}")
        made = build_layers(
            artifact, target=target, dtype=dtype, backend=backend, output=output, engine_cache=engine_cache,
            workers=workers, progress=stages,
        )  # fmt: skip
    path = artifact if output is None else output
    layers = [layer.to_json() for layer in made]
    if as_json:
        print_json({"path": path, "layers": layers})
        return
    rows = [("output", path), ("size", size(Path(path).stat().st_size))]
    rows += [line for layer in layers for line in layer_rows(layer)]
    if not layers:
        rows.append(("layer", "engines for these targets were there already"))
    say("\n".join(f"{name:<14} {value}" for name, value in rows))
