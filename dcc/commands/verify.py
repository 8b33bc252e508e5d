"""`dcc verify`: an artifact against its original, the single forward and the whole loop, with the same seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dcc.commands import options
from dcc.commands.terminal import CountedProgress, Stages, notice, print_json, print_table, stdout_reserved
from dcc.errors import QualityError

if TYPE_CHECKING:
    from dcc.original import Original
    from dcc.quality import Comparison
    from dcc.runtime import CompiledDenoiser
    from dcc.tolerances import Tolerance

FORWARD_ROWS = 3
UNKNOWN_TIMESTEP = 500.0
AgainstOption = Annotated[str, typer.Option("--against", metavar="MODEL", help="What the artifact was compiled from.")]


def verify(
    model: options.ArtifactArgument,
    against: AgainstOption,
    seeds: Annotated[str, typer.Option(metavar="1,2,3", help="One image per seed.")] = "0,1,2,3",
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
    """Compare an artifact with its original in PyTorch; exit code 3 if they differ by more than rounding."""
    chosen = options.integers(seeds, "--seeds")
    sampler_values = options.sampler_options(sampler_option)
    roles = options.key_values(role, "--role") or None
    with Stages(verbose) as stages, stdout_reserved():
        stages(f"loading {model}")
        from dcc.runtime import load

        artifact = load(model, backend=backend, threads=threads, told=stages)
        stages("importing torch")
        from dcc.original import open_original

        stages(f"loading {against}")
        original = open_original(
            artifact.artifact.manifest, against, arch=arch, roles=roles, trust_pickle=trust_pickle,
            sampler=sampler, sampler_options=sampler_values,
        )  # fmt: skip
        warn_of_another_source(artifact, original)
        stages("single forward")
        found = {"forward": compare_forward(artifact, original)}
    if original.sampler is not None:
        with stdout_reserved():
            found["loop"] = compare_loop(artifact, original, chosen, guidance_scale)
    _report(found, model, against, chosen, as_json)


def warn_of_another_source(artifact: CompiledDenoiser, original: Original) -> None:
    """A difference may be no fault of the compiler's: say so where the files are not the same."""
    compiled = str((artifact.artifact.manifest["recipe"] or {}).get("source", ""))
    hashes = [text.rpartition(" sha256:")[2] for text in (compiled, original.loaded.source) if " sha256:" in text]
    if len(set(hashes)) == 2:
        notice("the model's file is not the one that the artifact was compiled from (its sha256 differs)")


def conditions_for(artifact: CompiledDenoiser, original: Original, images: int) -> dict[str, Any]:
    """Every class in turn, and the model's own example for any other condition."""
    from dcc.conditions import class_conditions, classes_of, rows_for

    examples = original.loaded.example_inputs
    values: dict[str, Any] = {item.name: examples[item.name].numpy() for item in artifact.conditions}
    for item in class_conditions(artifact):
        everything = classes_of(item)
        if everything is not None:
            values[item.name] = np.asarray(everything, item.dtype)
    return rows_for(artifact, values, images)


def tolerance_of(artifact: CompiledDenoiser) -> Tolerance:
    """What rounding explains, in the type that the artifact computes in where it was placed."""
    from dcc.tolerances import TOLERANCE

    layer = artifact.placement.layer
    return TOLERANCE["float32" if layer is None else layer.dtype]


def compare_forward(artifact: CompiledDenoiser, original: Original) -> Comparison:
    """One forward on noise, at timesteps from all over the loop."""
    import torch

    from dcc.quality import compare

    low, high = artifact.plan.symbols["B"]
    rows = max(low, min(FORWARD_ROWS, high))
    calls = artifact.sampler.calls if artifact.sampler is not None else ()
    places = np.linspace(0, len(calls) - 1, rows) if calls else ()
    times = [float(calls[int(place)].timestep) for place in places] or [UNKNOWN_TIMESTEP] * rows
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.from_numpy(np.array(value)).to(original.loaded.example_inputs[name].dtype)
        for name, value in conditions_for(artifact, original, rows).items()
    }
    inputs[original.latent] = torch.randn((rows, *map(int, artifact.latent.shape[1:])), generator=generator)
    timestep = original.timesteps(times[0], rows)
    if original.timestep not in original.loaded.unbatched:
        column = torch.tensor(times, dtype=timestep.dtype)
        timestep = column.reshape(rows, *[1] * (timestep.dim() - 1)).expand(timestep.shape)
    inputs[original.timestep] = timestep
    wanted = original.forward(inputs).numpy()
    got = artifact.denoise(**{name: value.numpy() for name, value in inputs.items()})
    return compare(got, wanted, tolerance_of(artifact).forward)


def compare_loop(
    artifact: CompiledDenoiser, original: Original, seeds: list[int], guidance_scale: float | None
) -> Comparison:
    """The whole loop with the same seeds: the artifact's samples, then PyTorch's, in the artifact's batches."""
    from dcc.commands.run import batches_of, sample_all
    from dcc.conditions import negatives_for, part_of, without_null
    from dcc.original import request_for
    from dcc.quality import compare

    rows = conditions_for(artifact, original, len(seeds))
    negatives = negatives_for(artifact, len(seeds))
    scale = artifact.guidance_scale(guidance_scale)
    # Where the artifact knows the null, it must fill it in itself.
    told = {name: value for name, value in negatives.items() if name in without_null(artifact)}
    got = sample_all(artifact, rows, told, seeds, guidance_scale)
    batches = batches_of(artifact, len(seeds), guidance_scale)
    parts = []
    with CountedProgress("the original, in PyTorch", len(artifact.plan.order) * len(batches)) as progress:
        for index, kept in batches:
            request = request_for(
                original, part_of(artifact, rows, index), part_of(artifact, negatives, index),
                [seeds[place] for place in index], scale,
            )  # fmt: skip
            parts.append(original.sample(request, told=lambda _: progress.advance()).numpy()[:kept])
    return compare(got, np.concatenate(parts).astype(np.float32), tolerance_of(artifact).loop)


def _report(found: dict[str, Comparison], model: str, against: str, seeds: list[int], as_json: bool) -> None:
    passed = all(item.passed for item in found.values())
    if as_json:
        values = {name: item.to_json() for name, item in found.items()}
        print_json({"artifact": model, "against": against, "seeds": seeds, "passed": passed, **values})
    else:
        print_table(
            f"{model} against {against}, seeds {','.join(map(str, seeds))}",
            ("what", "difference / range", "limit", "PSNR, dB", "SSIM", "cosine", "relative L2", ""),
            [
                (name, f"{item.difference:.2e}", f"{item.limit:.0e}", f"{item.psnr:.1f}",
                 "" if item.ssim is None else f"{item.ssim:.6f}", f"{item.cosine:.8f}", f"{item.relative_l2:.2e}",
                 "ok" if item.passed else "MISSED")
                for name, item in found.items()
            ],
        )  # fmt: skip
    for name, item in found.items():
        if not item.passed:
            raise QualityError(
                f"the artifact's {name} is not the original's", at=model, got=f"{item.difference:.2e} of the range",
                want=f"at most {item.limit:.0e}", next="check that --against is what was compiled",
            )  # fmt: skip
