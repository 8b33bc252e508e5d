"""Values of options that typer does not read itself, and the options that several verbs share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dcc.errors import ExportError, UsageError

ArtifactArgument = Annotated[str, typer.Argument(metavar="MODEL.dcc", help="An artifact of dcc compile.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show warnings and times of stages.")]
ArchOption = Annotated[str | None, typer.Option(metavar="NAME[:key=value,...]", help="Architecture of a state dict.")]
RoleOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=ROLE", help="Role of an input: latent, timestep or condition.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-pickle", help="Read pickled modules, which run the code that they carry.")
]
TargetsOption = Annotated[
    str, typer.Option(metavar="TARGET[,TARGET...]", help="Names of `dcc targets`, sm80, local, or a JSON file.")
]
DtypeOption = Annotated[
    str | None, typer.Option(metavar="fp16|bf16", help="What GPU engines compute in (default: the target's).")
]
BackendOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="tensorrt-rtx, tensorrt or onnxruntime-cuda (default: the target's first)."),
]
LoweringOption = Annotated[
    str,
    typer.Option(
        metavar="onnx|torch-tensorrt", help="How GPU engines get their networks (torch-tensorrt: tensorrt-rtx alone)."
    ),
]
EngineCacheOption = Annotated[
    bool, typer.Option("--engine-cache/--no-engine-cache", help="Keep built engines for the next time.")
]
RunsWithOption = Annotated[
    str,
    typer.Option(
        "--backend", metavar="NAME",
        help="auto (a GPU for which there is a layer, else the processor), onnxruntime, tensorrt, tensorrt-rtx, "
        "onnxruntime-cuda.",
    ),
]  # fmt: skip
ThreadsOption = Annotated[int | None, typer.Option(metavar="N", help="Processors to use (default: all).")]
SamplerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A name of `dcc samplers`, a scheduler_config.json, or none."),
]
SamplerValueOption = Annotated[
    list[str] | None, typer.Option("--sampler-option", metavar="KEY=VALUE", help="An option of the scheduler.")
]
ConditionOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="JSON or a .npy file: one row, or one per image.")
]
# Arguments of `sampler_table` that have options of their own, or none.
NOT_SAMPLER_OPTIONS = ("source", "steps", "config", "dtype")


def key_values(items: Sequence[str] | None, flag: str) -> dict[str, str]:
    """`["a=1", "b=x=y"]` as {"a": "1", "b": "x=y"}."""
    values: dict[str, str] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"cannot read {flag} {item!r}", want="name=value", next=f"{flag} name=value")
        if key.strip() in values:
            raise UsageError(f"{flag} names '{key.strip()}' twice", next="give it once")
        values[key.strip()] = value
    return values


def parsed(text: str) -> Any:
    """JSON where it is JSON (numbers, lists, true, null), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def sampler_options(items: Sequence[str] | None) -> dict[str, Any]:
    values = {key: parsed(value) for key, value in key_values(items, "--sampler-option").items()}
    for key in NOT_SAMPLER_OPTIONS:
        if key in values:
            raise UsageError(
                f"'{key}' is not an option of a scheduler", got=f"--sampler-option {key}={values[key]}",
                next="--steps N" if key == "steps" else "leave it out",
            )  # fmt: skip
    return values


def condition_values(items: Sequence[str] | None, flag: str = "--condition") -> dict[str, Any]:
    """JSON, or the array in a .npy file, by name of the condition."""
    import numpy as np

    values: dict[str, Any] = {}
    for name, text in key_values(items, flag).items():
        if not text.endswith(".npy"):
            values[name] = parsed(text)
            continue
        try:
            values[name] = np.load(text, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {flag} {name}", at=text, got=error, next="give a .npy array") from error
    return values


def lora_files(items: Sequence[str] | None) -> list[tuple[str, float]]:
    """`file:scale` or `file`, whose scale is 1."""
    files = []
    for item in items or ():
        file, colon, scale = item.rpartition(":")
        try:
            files.append((file, float(scale)) if colon and file else (item, 1.0))
        except ValueError:
            files.append((item, 1.0))
    return files


def integers(text: str, flag: str) -> list[int]:
    """`1,2,3` as a list of at least one."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"cannot read {flag} {text!r}", want="integers, as 1,2,3", got=error) from error
    return values


def check_writable(path: Path) -> None:
    """Fail before the work is done, not after."""
    folder = path.parent
    if path.is_dir():
        raise ExportError("the output is a directory", at=path, want="the name of a file", next="add a file name")
    if not folder.is_dir():
        raise ExportError("the output folder does not exist", at=folder, next=f"mkdir -p {folder}")
    probe = partial_path(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError("the output folder cannot be written", at=folder, got=error, next="another -o") from error


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name: same folder, hidden, this process's own."""
    return path.with_name(f".{os.getpid():x}.{path.name[:60]}.partial")
