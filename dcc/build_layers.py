"""`dcc.build`: an artifact gets engines for more targets. Neither the model nor torch is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dcc.cost_model.local_device import local_device
from dcc.cost_model.targets import LOCAL, targets_named
from dcc.errors import ExportError, UsageError

if TYPE_CHECKING:
    from dcc.runtime.layers import Layer

ProgressReport = Callable[[str], None]


def build(
    artifact: str | os.PathLike[str],
    *,
    target: str = "local",
    dtype: str | None = None,
    backend: str | None = None,
    output: str | os.PathLike[str] | None = None,
    engine_cache: bool = True,
    workers: int | None = None,
    progress: ProgressReport = lambda _: None,
) -> list[Layer]:
    """The artifact has engines for these targets as well; layers that it had keep their bytes. Returns the new layers.

    Neither the model nor torch is needed. On a machine with the GPU itself, engines for it are built with `tensorrt`
    where that is its backend. Raises a DccError of the stage that failed; the artifact then is as it was.
    """
    from dcc.layers import BuildOptions, add_layers, default_workers, layer_requests, on_this_device
    from dcc.runtime.engine_cache import EngineCache, default_folder

    targets = targets_named(target)
    requests = [on_this_device(request, local_device()) for request in layer_requests(targets, dtype, backend)]
    if not requests:
        raise _nothing_to_build(target, ", ".join(item.name for item in targets))
    destination = Path(artifact if output is None else output)
    check_destination(destination)
    if workers is not None and workers < 1:
        raise UsageError("engines need a process to be built in", got=f"{workers} workers", want="1 or more")
    options = BuildOptions(workers or default_workers(), EngineCache(default_folder()) if engine_cache else None)
    return add_layers(Path(artifact), requests, destination, options, told=progress)


def _nothing_to_build(asked: str, names: str) -> UsageError:
    advice = "name a GPU of dcc targets: dcc build MODEL.dcc --target a100 needs none on this machine"
    if LOCAL in [item.strip().lower() for item in asked.split(",")]:
        return UsageError(
            "no driver of NVIDIA answers on this machine, so there is no GPU to build for", got=asked, want="a GPU",
            next=advice,
        )  # fmt: skip
    return UsageError(
        "these targets need no engines of their own", got=names, want="a GPU of dcc targets", next=advice
    )


def check_destination(destination: Path) -> None:
    """Fail before the work is done, not after."""
    folder = destination.parent
    if destination.is_dir():
        want = "the name of a file"
        raise ExportError("the output is a directory", at=destination, want=want, next="add a file name")
    if not folder.is_dir():
        raise ExportError("the output folder does not exist", at=folder, next=f"mkdir -p {folder}")
    probe = folder / f".{os.getpid():x}.dcc-writable"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError(
            "the output folder cannot be written", at=folder, got=error, next="choose another -o"
        ) from error
