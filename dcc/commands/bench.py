"""`dcc bench`: generation time of the whole loop, against the same model run in other ways."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcc.commands import options
from dcc.commands.terminal import Stages, notice, print_json, print_table, stdout_reserved
from dcc.errors import UsageError

if TYPE_CHECKING:
    from dcc.bench import Generate, Timing
    from dcc.original import Forward, Original
    from dcc.runtime import CompiledDenoiser

BaselineOption = Annotated[
    str | None, typer.Option(metavar="eager,compile,onnxruntime", help="What to compare with (default: all; or none).")
]


def bench(
    model: options.ArtifactArgument,
    baseline: BaselineOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original (default: the path that was compiled).")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="1,4,16", help="Images in a request.")] = "1,4,16",
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    calls: Annotated[int | None, typer.Option(min=1, help="End each loop after so many sampler calls.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the artifact's.")] = None,
    sampler: options.SamplerOption = None,
    sampler_option: options.SamplerValueOption = None,
    arch: options.ArchOption = None,
    role: options.RoleOption = None,
    trust_pickle: options.TrustOption = False,
    backend: options.RunsWithOption = "auto",
    threads: options.ThreadsOption = None,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Measure generation time, guidance on, alternating with plain PyTorch, torch.compile and ONNX Runtime."""
    batches = options.integers(batch, "--batch")
    with Stages(verbose, live=False) as stages, stdout_reserved():
        stages(f"loading {model}")
        start = time.perf_counter()
        from dcc.runtime import load

        imported = time.perf_counter() - start
        artifact = load(model, backend=backend, threads=threads, told=stages)
        loaded = time.perf_counter() - start - imported
        _check_batches(artifact, batches)
        path = against or _compiled_from(artifact)
        names = _baselines(baseline, path)
        original = None
        if names:
            stages("importing torch and loading the original")
            from dcc.original import open_original

            original = open_original(
                artifact.artifact.manifest, str(path), arch=arch, roles=options.key_values(role, "--role") or None,
                trust_pickle=trust_pickle, sampler=sampler, sampler_options=options.sampler_options(sampler_option),
            )  # fmt: skip
        found = measure(artifact, original, names, batches, repeats, calls, guidance_scale, threads, stages)
    report = {
        "artifact": model, "against": path if names else None, "calls": calls or len(artifact.plan.order),
        "repeats": repeats, "import_seconds": imported, "load_seconds": loaded, "batches": found[1],
    }  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _show(report, found[0])


def measure(
    artifact: CompiledDenoiser, original: Original | None, names: list[str], batches: list[int], repeats: int,
    calls: int | None, guidance_scale: float | None, threads: int | None, stages: Stages,
) -> tuple[list[list[Timing]], list[dict[str, Any]]]:  # fmt: skip
    """Timings of every candidate, by batch; and the same for JSON."""
    from dcc.bench import alternate, ratios

    forwards = {} if original is None else _forwards(original, names, threads, stages)
    timings, rows = [], []
    for images in batches:
        candidates = _candidates(artifact, original, forwards, images, calls, guidance_scale)
        measured = alternate(candidates, images, repeats, stages)
        timings.append(measured)
        slower = ratios(measured)
        rows.append({
            "batch": images, "candidates": [item.to_json() for item in measured],
            "times_the_artifact": {name: round(value, 4) for name, value in slower.items()},
        })  # fmt: skip
    return timings, rows


def _forwards(original: Original, names: list[str], threads: int | None, stages: Stages) -> dict[str, Forward]:
    import torch

    from dcc.bench import compiled_forward, onnxruntime_forward

    if threads is not None:
        torch.set_num_threads(threads)
    forwards: dict[str, Forward] = {}
    for name in names:
        stages(f"preparing {name}")
        if name == "eager":
            forwards[name] = original.forward
        elif name == "compile":
            forwards[name] = compiled_forward(original)
        else:
            forwards[name] = onnxruntime_forward(original, threads)
    return forwards


def _candidates(
    artifact: CompiledDenoiser, original: Original | None, forwards: dict[str, Forward], images: int, calls: int | None,
    guidance_scale: float | None,
) -> dict[str, Generate]:  # fmt: skip
    from dcc.bench import artifact_loop, original_loop
    from dcc.commands.verify import conditions_for
    from dcc.conditions import negatives_for, rows_for, with_classes

    scale = artifact.guidance_scale(guidance_scale)
    negatives = negatives_for(artifact, images)
    if original is None:
        rows = rows_for(artifact, with_classes(artifact, {}, ()), images)
    else:
        rows = conditions_for(artifact, original, images)
    seeds = list(range(images))
    candidates = {"artifact": artifact_loop(artifact, rows, negatives, seeds, scale, calls)}
    if original is not None:
        from dcc.original import request_for

        request = request_for(original, rows, negatives, seeds, scale)
        candidates |= {name: original_loop(original, request, calls, forward) for name, forward in forwards.items()}
    return candidates


def _baselines(text: str | None, path: str | None) -> list[str]:
    from dcc.bench import BASELINES

    if text is None and path is None:
        notice("the original is not where it was compiled from: only the artifact is measured (--against MODEL)")
        return []
    names = list(BASELINES) if text is None else [name for name in text.split(",") if name and name != "none"]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise UsageError(f"unknown baseline '{unknown[0]}'", want=", ".join((*BASELINES, "none")))
    if names and path is None:
        raise UsageError("baselines need the original", got="no --against", next="dcc bench ... --against MODEL")
    return names


def _compiled_from(artifact: CompiledDenoiser) -> str | None:
    """The path in the artifact's recipe, if there still is something there."""
    recipe = artifact.artifact.manifest["recipe"] or {}
    path = str(recipe.get("source", "")).partition(" sha256:")[0]
    return path if path and Path(path).exists() else None


def _check_batches(artifact: CompiledDenoiser, batches: list[int]) -> None:
    for images in batches:
        if not 1 <= images <= artifact.max_images:
            raise UsageError(
                "the batch is outside the profile that was compiled", got=f"{images} images",
                want=f"1 to {artifact.max_images}", next="--batch within it, or compile with a larger --max-batch",
            )  # fmt: skip


def _show(report: dict[str, Any], timings: list[list[Timing]]) -> None:
    from dcc.bench import ratios

    rows: list[tuple[object, ...]] = []
    for measured in timings:
        slower = ratios(measured)
        for item in measured:
            time_text = item.failure if item.median is None else f"{item.median * 1e3:.1f} ms"
            spread = f"{min(item.seconds) * 1e3:.1f} to {max(item.seconds) * 1e3:.1f}" if item.seconds else ""
            ratio = f"{slower[item.candidate]:.2f}x" if item.candidate in slower else ""
            rows.append((item.batch, item.candidate, time_text, spread, ratio, f"{item.first_seconds:.2f} s"))
    print_table(
        f"generation of {report['calls']} sampler calls, medians of {report['repeats']};"
        f" artifact: import {report['import_seconds']:.2f} s, load {report['load_seconds']:.2f} s",
        ("batch", "candidate", "median", "least to most, ms", "times the artifact", "first call"), rows, "batch median",
    )  # fmt: skip
