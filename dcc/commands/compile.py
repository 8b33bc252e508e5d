"""`dcc compile`: a model becomes an artifact, with progress and an account of what each pass did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcc.commands import options
from dcc.commands.terminal import Stages, flops, print_json, print_table, say, size, stdout_reserved

if TYPE_CHECKING:
    from dcc.driver import CompileReport

LoraOption = Annotated[list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="Fold a LoRA into the weights.")]


def compile_model(
    model: Annotated[
        str, typer.Argument(help="A .pt, .safetensors, .pt2, diffusers folder or package.module:factory.")
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="The artifact to write.")] = "model.dcc",
    target: options.TargetsOption = "cpu",
    dtype: options.DtypeOption = None,
    backend: options.BackendOption = None,
    lowering: options.LoweringOption = "onnx",
    opt_level: Annotated[
        int,
        typer.Option(
            "-O", "--opt-level", metavar="LEVEL",
            help="0 traces and lowers, 1 runs exact passes, 2 adds a calibrated schedule, 3 searches for one.",
        ),
    ] = 1,
    require: Annotated[
        str | None, typer.Option(metavar="METRIC>=VALUE", help="Quality of a schedule (default with -O2: psnr>=30).")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="FILE", help="A schedule, a front.json, ECAD's file or a step mask.")
    ] = None,
    pick: Annotated[str | None, typer.Option(metavar="2.5x|30dB|HASH", help="Which point of a front.json.")] = None,
    transfer: Annotated[
        str | None, typer.Option(metavar="nearest|interval", help="Move a schedule of other steps or another sampler.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Evaluations of -O3.")] = 200,
    images: Annotated[int, typer.Option(help="Images that a schedule is tried out on.")] = 16,
    condition: options.ConditionOption = None,
    sampler: options.SamplerOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler (default 50).")] = None,
    sampler_option: options.SamplerValueOption = None,
    guidance: Annotated[str, typer.Option(help="auto, cfg or none.")] = "auto",
    guidance_scale: Annotated[float | None, typer.Option(help="Default scale of the artifact.")] = None,
    lora: LoraOption = None,
    arch: options.ArchOption = None,
    role: options.RoleOption = None,
    max_batch: Annotated[int, typer.Option(help="Most images in one request.")] = 64,
    granularity: Annotated[str, typer.Option(help="step (one engine) or component.")] = "step",
    engine_cache: options.EngineCacheOption = True,
    trust_pickle: options.TrustOption = False,
    as_json: options.JsonOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Compile a trained model into MODEL.dcc; exact unless a schedule is asked for with -O2, -O3 or --schedule."""
    sampler_values = options.sampler_options(sampler_option)
    roles = options.key_values(role, "--role")
    files = options.lora_files(lora)
    with Stages(verbose) as stages, stdout_reserved():
        stages("importing torch")
        from dcc.driver import compile
        from dcc.preparation import DEFAULT_GUIDANCE_SCALE

        report = compile(
            model, output=output, target=target, dtype=dtype, backend=backend, lowering=lowering,
            roles=roles or None, arch=arch, sampler=sampler, steps=steps,
            sampler_options=sampler_values, guidance=guidance,
            guidance_scale=DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale, lora=files,
            opt_level=opt_level, require=require, schedule=schedule, pick=pick, transfer=transfer, budget=budget,
            images=images, conditions=options.condition_values(condition), max_batch=max_batch, granularity=granularity,
            engine_cache=engine_cache, trust_pickle=trust_pickle, own_process=True, progress=stages,
        )  # fmt: skip
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)


def _show(report: CompileReport) -> None:
    show_passes(report.passes)
    rows = [("output", report.path), ("size", size(report.size_bytes)), ("parameters", f"{report.parameters:,}")]
    moved = moved_out(report.passes)
    if moved is not None:
        rows.append(("left the loop", moved))
    rows += [
        ("engines", str(report.engines)),
        ("check", f"forward equals the model's to {report.forward_error:.1e} of its range"),
        ("time", f"{sum(report.seconds.values()):.1f} s, {size(report.peak_memory_bytes)} of memory at most"),
    ]
    rows += schedule_rows(report.schedule)
    rows += [line for layer in report.layers for line in layer_rows(layer)]
    rows += prediction_rows(report.predictions)
    say("\n".join(f"{name:<14} {value}" for name, value in rows))


def schedule_rows(worth: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a schedule is worth, beside the run with fewer steps that takes the same time."""
    if worth is None:
        return []
    quality, plain = worth["quality"], worth["fewer_steps"]

    def shown(value: float | None, structure: float | None) -> str:
        text = "equal" if value is None else f"{value:.2f} dB"
        return text if structure is None else f"{text}, SSIM {structure:.4f}"

    seeds = worth["held_out_seeds"]
    latency = f"{worth['latency_ms']:.0f} ms for {worth['images']} images, exact {worth['exact_ms']:.0f} ms"
    rows = [
        ("speed-up", f"{worth['speedup']:.2f}x: {latency}; {worth['computed_share']:.1%} of the FLOPs"),
        ("quality", f"{shown(quality['psnr'], quality['ssim'])} on seeds {seeds[0]} to {seeds[1]}, held out"),
    ]
    if plain is not None:
        same = f"{plain['steps']} plain steps, {plain['latency_ms']:.0f} ms"
        rows.append(("fewer steps", f"{same}: {shown(plain['psnr'], plain['ssim'])}"))
    if worth["predicted_ms"] is not None:
        rows.append(("predicted", f"{worth['predicted_ms']:.0f} ms, {worth['prediction_error']:+.1%} of the measured"))
    if "required" in worth:
        value = worth["required"]["value"]
        figure = ("exact" if worth["required"]["holds"] else "not finite") if value is None else f"{value:.3f}"
        rows.append(("required", f"{worth['required']['text']}: {figure}"))
    return rows


def layer_rows(layer: dict[str, Any]) -> list[tuple[str, str]]:
    """A layer in a few lines: what it is and why, what lowered it, how far its graphs are from the exact ones."""
    engines, count = layer["summary"]["engines"], len(layer["graphs"])
    title = f"{layer['backend']} {layer['dtype']} for {', '.join(layer['targets'])}"
    if layer["engines"]:
        built = size(sum(engine["engine_bytes"] for engine in engines.values()))
        seconds = sum(engine["seconds"] for engine in engines.values())
        cached = sum(engine["cached"] for engine in engines.values())
        peak = size(max(engine["peak_bytes"] for engine in engines.values()))
        text = f"{title}: {count} engines, {built}, built in {seconds:.1f} s with {peak} at most"
        text += f" ({cached} from the cache)" if cached else ""
    else:
        built = layer["backend"] != "onnxruntime-cuda"
        then = "engines are built on the device" if built else "which ONNX Runtime runs"
        text = f"{title}: {count} graphs; {then}"
    rows = [("layer", text), ("", layer["summary"]["reason"])]
    if layer["engines"]:
        # Artifacts made before there were two ways say nothing.
        rows.append(("", f"networks by {layer['summary'].get('lowering', 'onnx')}"))
    error = layer["summary"]["forward_error"]
    if error is not None:
        worst = max(engine["error"] for engine in engines.values() if engine["error"] is not None)
        rows.append(("", f"{error:.1e} of the range away from float32 in a forward, {worst:.1e} in the worst engine"))
    return rows


def prediction_rows(predictions: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Latency on targets that need not be here."""
    return [
        (
            "predicted",
            f"{row['seconds'] * 1e3:.1f} ms for {row['images']} image{'s'[: row['images'] > 1]} on {row['target']}"
            f" ({row['dtype']}), from its {row['rests_on']}; not measured",
        )
        for row in predictions
    ]


def show_passes(reports: list[dict[str, Any]]) -> None:
    """The table of what each pass did and why."""
    print_table("passes", ("pass", "did", "why"), [(row["name"], row["status"], row["why"]) for row in reports])


def moved_out(reports: list[dict[str, Any]]) -> str | None:
    """What `hoist-scopes` took out of the loop, in one line; None where it moved nothing."""
    figures: dict[str, Any] = next((row["figures"] for row in reports if row["name"] == "hoist-scopes"), {})
    if "parameters" not in figures:
        return None
    early = [row for scope, row in figures["scopes"].items() if scope != "step"]
    parameters, count = figures["parameters"], figures["flops"]
    return (
        f"{parameters:,} parameters ({parameters / max(figures['total parameters'], 1):.1%}),"
        f" {size(sum(row['bytes'] for row in early))},"
        f" {flops(count / 2)} a row and call ({count / max(figures['total flops'], 1):.1%})"
    )
