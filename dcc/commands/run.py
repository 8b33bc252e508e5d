"""`dcc run`: samples of an artifact as a picture or an array. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dcc.commands import options
from dcc.commands.terminal import CountedProgress, Stages, notice, print_json, say
from dcc.errors import ExportError, UsageError

if TYPE_CHECKING:
    from dcc.runtime import CompiledDenoiser, Progress

PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
DEFAULT_IMAGES = 16

Array = np.ndarray[Any, np.dtype[Any]]
SeedsOption = Annotated[str | None, typer.Option(metavar="1,2,3", help="One seed per image.")]


def run(
    model: options.ArtifactArgument,
    classes: Annotated[
        list[int] | None, typer.Option("--class", "-c", help="Class to draw; several are taken in turn (default: all).")
    ] = None,
    condition: options.ConditionOption = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="The condition of the other half of guidance.")
    ] = None,
    images: Annotated[
        int | None, typer.Option("-n", "--images", help=f"How many images (default {DEFAULT_IMAGES}).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next has the next.")] = 0,
    seeds: SeedsOption = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 switches guidance off.")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp), or .npy for the numbers.")
    ] = "samples.png",
    backend: options.RunsWithOption = "auto",
    threads: options.ThreadsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Sample images from an artifact; image i has its own seed, whatever else is in the batch."""
    path = Path(output)
    kind = _kind(path)
    given = options.condition_values(condition, "--condition")
    others = options.condition_values(negative, "--negative")
    chosen = _seeds(images, seed, seeds, classes)
    options.check_writable(path)
    with Stages() as stages:
        stages(f"loading {model}")
        from dcc.conditions import rows_for, with_classes
        from dcc.runtime import load

        artifact = load(model, backend=backend, threads=threads, own_process=True, told=stages)
    _check_picture(artifact, kind)
    values = with_classes(artifact, given, classes or ())
    rows = rows_for(artifact, values, len(chosen))
    start = time.perf_counter()
    samples = sample_all(artifact, rows, rows_for(artifact, others, len(chosen)), chosen, guidance_scale)
    seconds = time.perf_counter() - start
    save(samples, path, kind)
    if as_json:
        print_json(_report(artifact, path, samples, chosen, rows, seconds))
    else:
        say(f"{path}: {len(samples)} images {list(samples.shape[1:])} in {seconds:.2f} s")


def sample_all(
    artifact: CompiledDenoiser, rows: Mapping[str, Any], others: Mapping[str, Any], seeds: Sequence[int],
    guidance_scale: float | None,
) -> Array:  # fmt: skip
    """One sample per seed, in batches that the artifact's profile allows."""
    from dcc.conditions import part_of

    calls = len(artifact.plan.order)
    batches = batches_of(artifact, len(seeds), guidance_scale)
    parts = []
    with CountedProgress("sampling", calls * len(batches)) as progress:

        def told(_: Progress) -> None:
            progress.advance()

        for index, kept in batches:
            part = artifact.sample(
                part_of(artifact, rows, index), negative_conditions=part_of(artifact, others, index),
                guidance_scale=guidance_scale, seed=[seeds[place] for place in index], callback=told,
            )  # fmt: skip
            parts.append(part[:kept])
    return np.concatenate(parts)


def batches_of(artifact: CompiledDenoiser, images: int, guidance_scale: float | None) -> list[tuple[Array, int]]:
    """Rows of each batch, and how many of them are wanted: a profile with a least size is filled up."""
    low, high = artifact.plan.symbols["B"]
    guided = artifact.guidance["mode"] == "cfg" and guidance_scale != 1.0
    halves = 2 if guided else 1
    least, most = -(-low // halves), max(high // halves, 1)
    batches = []
    for start in range(0, images, most):
        index = np.arange(start, min(start + most, images))
        filled = index if len(index) >= least else np.resize(index, least)
        batches.append((filled, len(index)))
    return batches


def save(samples: Array, path: Path, kind: str | None) -> None:
    """The samples are in `path`, whole, or nothing is: they are written beside it and renamed."""
    partial = options.partial_path(path)
    try:
        if kind is None:
            with partial.open("wb") as stream:
                np.save(stream, samples)
        else:
            from dcc.picture import enlarged, grid, save_picture, to_pixels

            own_range = samples.shape[1] not in (1, 3)
            save_picture(grid(enlarged(to_pixels(samples, own_range=own_range))), partial, kind)
        partial.replace(path)
    except OSError as error:
        raise ExportError("the samples cannot be written", at=path, got=error, next="choose another -o") from error
    finally:
        partial.unlink(missing_ok=True)


def _kind(path: Path) -> str | None:
    """Pillow's name of the picture format; None for .npy."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return None
    if suffix not in PICTURES:
        raise UsageError(
            "unknown kind of output", at=path, got=f"suffix '{path.suffix}'", want=", ".join([*PICTURES, ".npy"]),
            next="-o samples.png",
        )  # fmt: skip
    return PICTURES[suffix]


def _check_picture(artifact: CompiledDenoiser, kind: str | None) -> None:
    """Before sampling: whether this latent can be shown, and what of it."""
    if kind is None:
        return
    from dcc.picture import picture_channels, require_pillow

    require_pillow()
    shape = artifact.latent.shape
    if len(shape) != 4:
        raise UsageError(
            "this latent is not a picture", got=f"shape {list(shape)}", want="[B, C, H, W]", next="-o samples.npy"
        )
    channels = int(shape[1])
    if channels not in (1, 3):
        notice(
            f"the latent has {channels} channels: the picture shows {picture_channels(channels)} of them, over their"
            " own range (-o samples.npy keeps all)"
        )


def _seeds(images: int | None, seed: int, seeds: str | None, classes: Sequence[int] | None) -> list[int]:
    if images is not None and images < 1:
        raise UsageError("a request needs at least one image", got=f"-n {images}", next="-n 16")
    if seeds is None:
        count = images or (len(classes) if classes else DEFAULT_IMAGES)
        return list(range(seed, seed + count))
    values = options.integers(seeds, "--seeds")
    if images is not None and images != len(values):
        raise UsageError("-n and --seeds disagree", got=f"-n {images}, {len(values)} seeds", next="leave -n out")
    return values


def _report(
    artifact: CompiledDenoiser, path: Path, samples: Array, seeds: list[int], rows: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    small = {name: value.tolist() for name, value in rows.items() if value.ndim <= 1}
    return {
        "output": str(path), "images": len(samples), "shape": list(samples.shape), "seeds": seeds, "conditions": small,
        "calls": len(artifact.plan.order), "seconds": round(seconds, 4),
        "minimum": float(samples.min()), "maximum": float(samples.max()), "placement": str(artifact.placement),
    }  # fmt: skip
