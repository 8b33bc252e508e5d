"""`dcc search`: a Pareto front of caching schedules, measured, as JSON, CSV, a picture and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcc.commands import options
from dcc.commands.terminal import Stages, print_json, print_table, say, stdout_reserved
from dcc.errors import ExportError

if TYPE_CHECKING:
    from dcc.search.evolution import Progress
    from dcc.search.front import Front


LINES_EVERY = 10  # evaluations, where the output is not a terminal


def search(
    model: Annotated[
        str, typer.Argument(help="A .pt, .safetensors, .pt2, diffusers folder or package.module:factory.")
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Folder of the front and its report.")],
    target: Annotated[str, typer.Option(help="A name of `dcc targets`.")] = "cpu",
    budget: Annotated[int, typer.Option(min=1, help="Schedules to evaluate.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder.")] = False,
    images: Annotated[int, typer.Option(min=1, help="Images that a schedule is tried out on.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    unseeded: Annotated[bool, typer.Option("--unseeded", help="Start from schedules drawn at random.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Evaluations at a time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="auto|ADDRESS", help="Evaluate on a Ray cluster.")] = None,
    max_latency: Annotated[float | None, typer.Option(metavar="MS", help="Predicted milliseconds at most.")] = None,
    min_psnr: Annotated[float | None, typer.Option(metavar="DB", help="PSNR at least.")] = None,
    max_history: Annotated[float | None, typer.Option(metavar="MB", help="Kept values at most.")] = None,
    sampler: options.SamplerOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler (default 50).")] = None,
    sampler_option: options.SamplerValueOption = None,
    guidance: Annotated[str, typer.Option(help="auto, cfg or none.")] = "auto",
    guidance_scale: Annotated[float | None, typer.Option(help="Scale of the guidance.")] = None,
    condition: options.ConditionOption = None,
    arch: options.ArchOption = None,
    role: options.RoleOption = None,
    max_batch: Annotated[int, typer.Option(help="Most images in one request.")] = 64,
    trust_pickle: options.TrustOption = False,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Search what to compute, reuse and forecast in which step: a front in DIR/front.json, a page in DIR/index.html."""
    sampler_values = options.sampler_options(sampler_option)
    roles = options.key_values(role, "--role") or None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ExportError("the output is a file", at=folder, want="the name of a folder")
    with Stages(verbose) as stages, stdout_reserved():
        stages("importing torch")
        from dcc.preparation import DEFAULT_GUIDANCE_SCALE
        from dcc.search.study import search as study

        def shown(state: Progress) -> None:
            if stages.live or state.evaluations % LINES_EVERY == 0:
                stages(progress_text(state))

        front = study(
            model, output=folder, target=target, budget=budget, resume=resume, images=images, seed=seed,
            seeded=not unseeded, processes=processes, ray=ray, max_latency_ms=max_latency, min_psnr=min_psnr,
            max_history_bytes=None if max_history is None else int(max_history * 2**20),
            conditions=options.condition_values(condition), own_process=True, told=stages,
            progress=shown, sampler=sampler, steps=steps, sampler_options=sampler_values, guidance=guidance,
            guidance_scale=DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale, arch=arch,
            roles=roles, max_batch=max_batch, trust_pickle=trust_pickle,
        )  # fmt: skip
    if as_json:
        print_json(front.to_json())
    else:
        show_front(front)
        say(f"report  {folder / 'index.html'}")
        if front.points:
            say(f"next    dcc compile {model} --schedule {folder / 'front.json'} --pick 2x")
        else:
            say("next    wider limits, or a larger --budget: no schedule keeps the limits")


def progress_text(state: Progress) -> str:
    """Evaluations, hypervolume, the best at each speed and the time left, in one line."""
    best = ", ".join(f"{value:.1f} dB at {speed}" for speed, value in state.best.items())
    left = "" if state.seconds_left is None else f", {state.seconds_left:.0f} s left"
    return f"{state.evaluations} of {state.budget} evaluations, hypervolume {state.hypervolume:.3f}, {best}{left}"


def show_front(front: Front) -> None:
    """The points of a front, each beside the run with fewer plain steps that takes the same time."""

    def row(point: Any) -> tuple[str, ...]:
        plain = point.fewer_steps
        fewer = "" if plain is None else f"{plain.steps} steps: {plain.psnr:.2f} dB"
        structure = "" if point.ssim is None else f"{point.ssim:.4f}"
        decibels = "equal" if point.psnr == float("inf") else f"{point.psnr:.2f}"
        predicted = "" if point.predicted_ms is None else f"{point.predicted_ms:.0f}"
        return (
            point.name, f"{point.speedup:.2f}x", f"{point.latency_ms:.0f}", predicted, f"{point.computed_share:.1%}",
            decibels, structure, fewer, point.digest[:12],
        )  # fmt: skip

    print_table(
        f"{front.model}, {front.sampler} {front.steps} steps, {front.batch} images, held-out seeds",
        ("point", "speed-up", "ms", "predicted", "FLOPs", "PSNR, dB", "SSIM", "same time, fewer steps", "hash"),
        [row(point) for point in front.points],
    )
