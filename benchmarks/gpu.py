"""DiT-XL/2, PixArt-Sigma, SD3-medium and FLUX-dev shapes on a GPU: every backend beside eager and torch.compile.

    python benchmarks/gpu.py --models dit-xl --seconds 540 -o gpu.json
    python benchmarks/gpu.py --models dit-xl --rows tensorrt --folder out/gpu    # goes on with what out/gpu holds
    python benchmarks/gpu.py --dry-run                                           # the same code on the processor, tiny

Weights are random and made on the GPU: speed, memory and equality are measured, and nobody's quality. A generation is
the whole loop (DDIM, or flow Euler for SD3 and FLUX), from noise on the host to the latent on the host, with both
halves of guidance where the model has it. Every row is a process of its own; torch's rows run dcc's sampler table on
the device, without waiting for it in the loop. Artifacts run exact, and under a TaylorSeer schedule over the whole
stack that computes about a third of the calls. They are made here too, and store float32 weights: FLUX-dev as released
takes 48 GB of disk for each.

`first` is the first generation, for an artifact with loading it, for torch.compile with compiling; `build` is what was
made ahead. `device` is the most that the GPU holds while it generates, over what it held before the first row, asked of
NVML for every row alike. `own` is the process's own count: torch.cuda.max_memory_allocated, or for artifacts what
cudaMemGetInfo lost from an empty context to the last generation. Errors are the largest difference over the
reference's range: of a forward and of the latent against the eager float32 model, of a schedule's latent against the
schedule in float32 torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dcc.cost_model.local_device import local_device
from dcc.errors import DccError
from dcc.quality import difference
from dcc.tolerances import TOLERANCE

if TYPE_CHECKING:
    import torch

    from dcc.frontend.architectures import Facts
    from dcc.ir.program import Program
    from dcc.layers import LayerRequest
    from dcc.passes.taylorseer import TaylorSeer
    from dcc.runtime import CompiledDenoiser, SamplerTable

Array = np.ndarray[Any, np.dtype[Any]]
Spec = dict[str, Any]
Forward = Callable[[int, "dict[str, torch.Tensor]"], "torch.Tensor"]

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime")
# The yardsticks first, and what takes longest to compile last.
ROWS = ("eager", "compile", *BACKENDS, "compile-graphs", "aotinductor")
VARIANTS = ("exact", "schedule")
COLUMNS = (
    "model", "row", "type", "generation, ms", "faster than eager", "than compile", "build, s", "first, s",
    "device, GiB", "own, GiB", "forward error", "latent error", "torch loaded", "note",
)  # fmt: skip
SCALE = 3.0
WARM_UPS = 2
SECONDS_BETWEEN_SAMPLES = 0.02
ASSUMED_CAPABILITY = 90  # of a dry run, which has no device


@dataclass(frozen=True)
class Shape:
    """A denoiser as released: its class in diffusers, or DiT, which is ours and needs no diffusers.

    `depth` has the entries that count blocks; `tiny` replaces entries in a dry run.
    """

    family: str
    config: dict[str, Any]
    depth: dict[str, int]
    tiny: dict[str, Any]
    flow: bool = False
    guided: bool = True


MODELS = {
    "dit-xl": Shape(
        "DiT", {}, {"depth": 28}, {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
    ),
    "pixart-sigma": Shape(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
            "cross_attention_dim": 1152, "sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        {"num_layers": 28},
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "sample_size": 8,
            "caption_channels": 20,
        },
    ),
    "sd3-medium": Shape(
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "sample_size": 128, "pos_embed_max_size": 192,
        },
        {"num_layers": 24},
        {
            "num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 20, "caption_projection_dim": 32,
            "pooled_projection_dim": 24, "sample_size": 8, "pos_embed_max_size": 8,
        },
        flow=True,
    ),
    "flux-dev": Shape(
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        {"num_layers": 19, "num_single_layers": 38},
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "joint_attention_dim": 20,
            "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
        },
        flow=True,
        guided=False,
    ),
}  # fmt: skip


def config_of(shape: Shape, depth: int | None, tiny: bool) -> dict[str, Any]:
    """The config with `depth` blocks of the first kind, and of other kinds as many more as the released model has."""
    first = next(iter(shape.depth.values()))
    blocks = {name: count if depth is None else max(1, depth * count // first) for name, count in shape.depth.items()}
    return {**shape.config, **(shape.tiny if tiny else {}), **blocks}


# What follows runs in processes that import torch, down to where artifacts are run.


@dataclass
class Denoiser:
    """A module on the device in float32, and its inputs; `channels` are those to guide where it predicts a variance."""

    module: torch.nn.Module
    facts: Facts
    roles: dict[str, str]
    unbatched: tuple[str, ...]
    channels: int | None

    def named(self, role: str) -> str:
        return next(name for name, mine in self.roles.items() if mine == role)


def denoiser(spec: Spec) -> Denoiser:
    """The model of the spec with weights that are equal in every process on this machine; no branch is zero."""
    import torch

    from dcc.frontend.architectures import facts_of
    from dcc.frontend.dit import DiT, DiTConfig
    from dcc.frontend.families import FAMILIES
    from dcc.frontend.roles import UNBATCHED, infer_roles

    shape, device = MODELS[spec["model"]], torch.device(spec["device"])
    config = config_of(shape, spec["depth"], spec["tiny"])
    torch.manual_seed(0)
    with device:
        if shape.family == "DiT":
            made: torch.nn.Module = DiT(DiTConfig(**config))
        else:
            import diffusers

            made = FAMILIES[shape.family].adapter(getattr(diffusers, shape.family)(**config))
    module = made.to(device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in module.parameters():
        # Gates that start at zero would switch their blocks off.
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=device) * 0.05)
    facts = facts_of(module)
    assert facts is not None
    # A padding mask would keep all: PixArt is run without.
    inputs = {name: value for name, value in facts.example_inputs.items() if name not in facts.optional}
    inputs = {name: fewer(name, value) for name, value in inputs.items()} if spec["tiny"] else inputs
    names, channels = list(inputs), config.get("in_channels", 4)
    learned = shape.family == "DiT" or config.get("out_channels") == 2 * channels
    unbatched = tuple(name for name in names if name in UNBATCHED)
    facts = replace(facts, example_inputs=inputs)
    return Denoiser(module, facts, infer_roles(names, {}), unbatched, channels if learned else None)


def fewer(name: str, value: torch.Tensor) -> torch.Tensor:
    """The input with 16 image tokens and 6 text tokens at most, where it counts them."""
    if name.endswith("_ids"):
        return value[: 16 if name == "img_ids" else 6]
    return value[:, : 6 if name == "encoder_hidden_states" else 16] if value.dim() == 3 else value


def sampler_of(spec: Spec, scale: float) -> SamplerTable:
    """The loop as a table whose every call is `latent = a * latent + b * output`."""
    from dcc.frontend.samplers import sampler_table, with_timesteps_scaled

    if MODELS[spec["model"]].flow:
        return with_timesteps_scaled(sampler_table("flow-euler", steps=spec["steps"], shift=3.0), scale)
    return ddim(spec["steps"])


def ddim(steps: int) -> SamplerTable:
    """What `sampler_table("ddim", steps=steps, clip_sample=False)` gives, without diffusers."""
    from dcc.runtime.sampler import SamplerCall, SamplerTable

    kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    stride, calls = 1000 // steps, []
    for step, timestep in enumerate(range((steps - 1) * stride, -1, -stride)):
        now, then = kept[timestep], kept[timestep - stride] if timestep >= stride else 1.0
        latent = float(np.sqrt(then / now))
        output = float(np.sqrt(1.0 - then) - latent * np.sqrt(1.0 - now))
        calls.append(SamplerCall(timestep, 1.0, None, ((latent, output, 0.0, 0.0),), None, 0, "float32", step))
    return SamplerTable("ddim", "DDIMScheduler", "epsilon", steps, "float32", 1, 1.0, None, None, tuple(calls))


def request_of(made: Denoiser, spec: Spec, table: SamplerTable) -> dict[str, Array]:
    """Arrays of a request, as condition/NAME, negative/NAME and noise, and of a forward, as input/NAME."""
    generator, images = np.random.default_rng(0), spec["batch"]
    halves = ("condition", "negative") if MODELS[spec["model"]].guided else ("condition",)
    found: dict[str, Array] = {}
    for name, example in made.facts.example_inputs.items():
        if name in made.unbatched:
            found |= dict.fromkeys((f"condition/{name}", f"input/{name}"), example.numpy())
        elif made.roles[name] == "condition":
            null = made.facts.nulls.get(name)
            values = [condition(example.numpy(), images, half, null, generator) for half in halves]
            found |= {f"{half}/{name}": value for half, value in zip(halves, values, strict=True)}
            found[f"input/{name}"] = np.concatenate(values)
    latent, rows = made.named("latent"), images * len(halves)
    size = made.facts.example_inputs[latent].shape[1:]
    found["noise"] = generator.standard_normal((images, *size), np.float32)
    found[f"input/{latent}"] = generator.standard_normal((rows, *size), np.float32)
    times = np.asarray([call.timestep for call in table.calls], np.float32)
    found[f"input/{made.named('timestep')}"] = times[np.linspace(0, len(times) - 1, rows).astype(int)]
    return found


def condition(example: Array, images: int, half: str, null: float | None, generator: np.random.Generator) -> Array:
    """A condition's rows for one half of guidance."""
    shape = (images, *example.shape[1:])
    if np.issubdtype(example.dtype, np.integer):
        high = int(null or 1)
        return np.full(shape, high) if half == "negative" else generator.integers(0, high, shape)
    # A strength of guidance stays what it is.
    if (example == example.flat[0]).all():
        return np.full(shape, example.flat[0])
    return generator.standard_normal(shape, np.float32)


def part(data: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(f"{prefix}/"): data[name] for name in data if name.startswith(f"{prefix}/")}


def on_device(made: Denoiser, data: Mapping[str, Array], spec: Spec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a forward in `dtype`; positions and timesteps stay float32, as in the pipelines."""
    import torch

    exact = {made.named("timestep"), *made.unbatched}
    tensors = {name: torch.from_numpy(value).to(spec["device"]) for name, value in part(data, "input").items()}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and name not in exact else tensor
        for name, tensor in tensors.items()
    }


def torch_loop(
    forward: Forward, made: Denoiser, data: Mapping[str, Array], table: SamplerTable, spec: Spec, dtype: torch.dtype
) -> Callable[[], Array]:
    """The generation that the artifact is compiled for, in torch; only its end waits for the device."""
    import torch

    guided, inputs = MODELS[spec["model"]].guided, on_device(made, data, spec, dtype)
    latent_name, timestep_name = made.named("latent"), made.named("timestep")
    times = [torch.full_like(inputs[timestep_name], call.timestep) for call in table.calls]

    def generate() -> Array:
        with torch.no_grad():
            latent = torch.from_numpy(data["noise"]).to(spec["device"]) * table.init_sigma
            for call, entry in enumerate(table.calls):
                given = (torch.cat([latent, latent]) if guided else latent).to(dtype)
                output = forward(call, {**inputs, latent_name: given, timestep_name: times[call]}).float()
                output = output if made.channels is None else output[:, : made.channels]
                if guided:
                    wanted, null = output.chunk(2)
                    output = null + SCALE * (wanted - null)
                latent = entry.matrix[0][0] * latent + entry.matrix[0][1] * output
            values: Array = latent.cpu().numpy()
            return values

    return generate


def prepare(spec: Spec, folder: Path) -> Spec:
    """The request, its float32 references and the artifacts are in the folder; what failed is in the record."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    made = denoiser(spec)
    table = sampler_of(spec, made.facts.timestep_scale)
    data = request_of(made, spec, table)
    np.savez(folder / "request.npz", **data)  # type: ignore[arg-type]
    record: Spec = {
        "table": table.to_json(), "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in made.module.parameters()),
    }  # fmt: skip
    start = time.perf_counter()
    with torch.no_grad():
        references = {"forward": made.module(**on_device(made, data, spec, torch.float32)).cpu().numpy()}
    references["exact"] = torch_loop(
        lambda _, given: made.module(**given), made, data, table, spec, torch.float32
    )()  # fmt: skip
    record["reference seconds"] = time.perf_counter() - start
    try:
        if spec["artifacts"]:
            write_artifacts(made, data, table, spec, folder, references, record)
    except Exception as error:  # noqa: BLE001 - whatever fails, other rows can run
        traceback.print_exc()
        record["compile failure"] = reason(error)
    np.savez(folder / "references.npz", **references)
    return record


def write_artifacts(
    made: Denoiser, data: Mapping[str, Array], table: SamplerTable, spec: Spec, folder: Path,
    references: dict[str, Array], record: Spec,
) -> None:  # fmt: skip
    """What `dcc.compile` makes, without its checks on the processor, which the rows make up for on the device."""
    from dcc.exports.artifact_writer import ArtifactWriter
    from dcc.exports.lower import lower
    from dcc.exports.templates import export_templates
    from dcc.frontend.trace import trace
    from dcc.ir.program import Guidance
    from dcc.passes import run_passes
    from dcc.preparation import manifest_of, pipeline

    start = time.perf_counter()
    guided = MODELS[spec["model"]].guided
    # Engines are made for this batch and less: nothing is lost to a larger profile that nobody asks for here.
    rows = max(2, spec["batch"] * (2 if guided else 1))
    program = trace(
        made.module.to("cpu"), made.facts.example_inputs, made.roles, name=spec["model"], nulls=made.facts.nulls,
        ranges=made.facts.ranges, guidance=Guidance("cfg", SCALE, made.channels) if guided else Guidance(),
        unbatched=made.unbatched, rows=rows,
    )  # fmt: skip
    program.sampler, digest = table, program.hash()
    run_passes(program, pipeline(1))
    templates = export_templates(program.templates)
    traced = time.perf_counter() - start
    for variant in spec["artifacts"]:
        start = time.perf_counter()
        if variant == "schedule":
            report = third(len(table.calls)).apply(program)
            if program.schedule is None:
                record["schedule failure"] = report.why
                return
            record["schedule"] = f"{program.schedule.name}: {report.why}"
        with ArtifactWriter(folder / f"{variant}.dcc") as writer:
            plan = lower(program, writer, templates=templates)
            writer.finish(manifest_of(program, plan, digest, "cpu", {}))
        record[f"{variant} seconds"] = traced + time.perf_counter() - start
    if program.schedule is not None:
        start = time.perf_counter()
        references["schedule"] = scheduled(program, made, data, table, spec)
        record["schedule reference seconds"] = time.perf_counter() - start
        record["schedule moves the latent by"] = difference(references["schedule"], references["exact"])


def third(calls: int) -> TaylorSeer:
    """The setting whose share of computed calls is nearest to a third."""
    from dcc.passes.taylorseer import TaylorSeer

    def computed(option: TaylorSeer) -> int:
        return option.first_enhance + len(range(option.first_enhance - 1 + option.interval, calls, option.interval))

    options = [
        TaylorSeer(interval, first_enhance=first, stores="delta") for interval in range(2, 9) for first in (1, 2)
    ]
    return min(options, key=lambda option: abs(computed(option) - calls / 3))


def scheduled(program: Program, made: Denoiser, data: Mapping[str, Array], table: SamplerTable, spec: Spec) -> Array:
    """The latent under the program's schedule, by the tests' reading of it, in float32 on the device."""
    import torch
    from schedule_reference import Denoiser as Scheduled  # type: ignore[import-not-found]

    device = torch.device(spec["device"])
    program.weights = {name: weight.to(device) for name, weight in program.weights.items()}
    for module in program.templates.values():
        for node in module.graph.nodes:
            # It was traced on the processor.
            if "device" in node.kwargs:
                node.update_kwarg("device", device)
        module.recompile()
        module.to(device)
    assert program.schedule is not None
    run, latent = Scheduled(program, program.schedule), made.named("latent")
    with device:
        return torch_loop(lambda call, given: run(call, given[latent], given), made, data, table, spec, torch.float32)()


def torch_row(spec: Spec, folder: Path) -> Spec:
    """The model in torch, in the type that is asked for."""
    import torch

    from dcc.runtime import SamplerTable

    made, dtype = denoiser(spec), getattr(torch, spec["dtype"])
    module = made.module.to(dtype)
    if MODELS[spec["model"]].family == "DiT":
        # It leaves it to autocast to round its sinusoids; diffusers' models do it themselves.
        embedder: Any = module.get_submodule("t_embedder.mlp")
        embedder.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
    table = SamplerTable.from_json(json.loads((folder / "prepare.json").read_text())["table"])
    data = dict(np.load(folder / "request.npz"))
    inputs = on_device(made, data, spec, dtype)
    start = time.perf_counter()
    forward = torch_forward(spec["row"], module, inputs, folder)
    build = time.perf_counter() - start
    cuda = spec["device"] == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = measured(torch_loop(lambda _, given: forward(**given), made, data, table, spec, dtype), spec)
    own = torch.cuda.max_memory_allocated() if cuda else None
    with torch.no_grad():
        output = forward(**inputs).float().cpu().numpy()
    return {
        **found, **errors_of(folder, spec, spec["dtype"], output, found["latent"]), "dtype": spec["dtype"],
        "own bytes": own, "own count": "torch.cuda.max_memory_allocated", "torch": True, "note": "",
        "build": build if spec["row"] == "aotinductor" else None,
    }  # fmt: skip


def torch_forward(row: str, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], folder: Path) -> Any:
    """The module as the row runs it, called with its inputs by name."""
    import torch

    if row == "eager":
        return module
    if row in ("compile", "compile-graphs"):
        return torch.compile(module, dynamic=False, mode="reduce-overhead" if row == "compile-graphs" else None)
    with torch.no_grad():
        exported = torch.export.export(module, (), dict(inputs))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "aotinductor.pt2"))
    return torch._inductor.aoti_load_package(path)


# Artifacts. The process that runs one imports no torch; what adds a layer may.


def add_layer(spec: Spec, folder: Path) -> Spec:
    """The artifact of the variant has a layer for the row's backend, with engines if they can be built ahead."""
    from dcc.layers import BuildOptions, add_layers, default_workers
    from dcc.runtime import Artifact

    path, request = folder / f"{spec['variant']}.dcc", layer_request(spec)
    start = time.perf_counter()
    if all(layer.name != request.name for layer in Artifact.open(path, check="fast").layers):
        options = BuildOptions(default_workers(), check=False)
        add_layers(path, [request], options=options, told=lambda text: print(text, flush=True))
    return {"seconds": time.perf_counter() - start, "layer": request.name}


def layer_request(spec: Spec) -> LayerRequest:
    """For the device, or for all that the library knows where it does not know this one."""
    from dcc.layers import LayerRequest
    from dcc.runtime.tensorrt_builder import TensorRt

    backend = spec["row"]
    capabilities: tuple[int, ...] = (spec["capability"],)
    if backend == "tensorrt-rtx":
        known = TensorRt.find("tensorrt-rtx").capabilities
        capabilities = capabilities if spec["capability"] in known else known
    device = spec["device name"] if backend == "tensorrt" else ""
    return LayerRequest(backend, spec["dtype"], capabilities, ("local",), "benchmarks/gpu.py", device)


def artifact_row(spec: Spec, folder: Path) -> Spec:
    """An artifact, run by dcc.runtime alone."""
    data = dict(np.load(folder / "request.npz"))
    before = device_bytes()
    start = time.perf_counter()
    artifact, note = opened(folder / f"{spec['variant']}.dcc", spec["row"], spec["capability"])
    loading = time.perf_counter() - start
    options: dict[str, Any] = {"noise": data["noise"]}
    if MODELS[spec["model"]].guided:
        options |= {"negative_conditions": part(data, "negative"), "guidance_scale": SCALE}
    found = measured(lambda: artifact.sample(part(data, "condition"), **options), spec)
    after = device_bytes()
    output, layer = artifact.denoise(**part(data, "input")), artifact.placement.layer
    dtype = "float32" if layer is None else layer.dtype
    return {
        **found, **errors_of(folder, spec, dtype, output, found["latent"]), "dtype": dtype,
        "first": loading + found["first"], "loading": loading, "own count": "cudaMemGetInfo",
        "own bytes": None if before is None or after is None else after - before, "torch": "torch" in sys.modules,
        "note": note, "placement": str(artifact.placement), "tools": artifact.artifact.manifest["tools"],
    }  # fmt: skip


def opened(path: Path, backend: str, capability: int) -> tuple[CompiledDenoiser, str]:
    """The artifact on the backend. Portable engines are tried out although none of them is for this device."""
    from dcc import runtime
    from dcc.runtime.cuda_device import CudaDevice

    try:
        return runtime.load(path, backend=backend, told=lambda text: print(text, flush=True)), ""
    except DccError as refused:
        artifact = runtime.Artifact.open(path)
        layer = next(layer for layer in artifact.layers if layer.backend == backend)
        if not layer.engines or capability in layer.capabilities:
            raise
        engines = ", ".join(f"sm{known}" for known in layer.capabilities)
        try:
            device = CudaDevice(0, backend)
            loaded = runtime.DeviceArtifact(artifact, device, lambda name: artifact.layer_engine(layer, name))
        except DccError as error:
            raise DccError(f"{reason(refused)}; engines for {engines}, tried out: {reason(error)}") from error
        loaded.placement = replace(loaded.placement, layer=layer)
        return loaded, f"engines for {engines} run here, although load() says: {reason(refused)}"


def device_bytes() -> int | None:
    """What is in use on the device, as this process sees it; None where there is none."""
    from dcc.runtime.cuda_driver import CudaDriver

    try:
        free, total = CudaDriver().ask("cudaMemGetInfo")
    except DccError:
        return None
    return int(total) - int(free)


def measured(generate: Callable[[], Array], spec: Spec) -> Spec:
    """Seconds of generations, one after the other, and the times of the clock between which all was warm."""
    seconds, started, latent = [], 0.0, np.empty(0)
    for repeat in range(WARM_UPS + spec["repeats"]):
        if repeat == WARM_UPS:
            started = time.time()
        start = time.perf_counter()
        latent = generate()
        seconds.append(time.perf_counter() - start)
    warm = seconds[WARM_UPS:]
    return {
        "first": seconds[0], "seconds": warm, "median": statistics.median(warm), "started": started,
        "ended": time.time(), "latent": latent,
    }  # fmt: skip


def errors_of(folder: Path, spec: Spec, dtype: str, output: Array, latent: Array) -> Spec:
    """Differences from the references and the limits of the type; the latent itself is not for JSON."""
    references, limit, variant = np.load(folder / "references.npz"), TOLERANCE[dtype], spec["variant"]
    return {
        "forward error": difference(output, references["forward"]), "forward limit": limit.forward, "latent": None,
        "latent error": difference(latent, references[variant]) if variant in references else None,
        "latent limit": limit.loop,
    }  # fmt: skip


def reason(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, DccError):
        got = error.details.get("got")
        return " ".join((error.what + (f" ({got})" if got else "")).split())[:400]
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:400]


WORK: dict[str, Callable[[Spec, Path], Spec]] = {
    "prepare": prepare, "layer": add_layer, "artifact": artifact_row, "torch": torch_row
}  # fmt: skip


def work(spec: Spec) -> None:
    """One process's part; what came of it is in the file that the spec names."""
    try:
        record = WORK[spec["work"]](spec, Path(spec["folder"]))
    except Exception as error:  # noqa: BLE001 - torch, its compilers and the backends raise whatever they like
        traceback.print_exc()
        record = {"failure": reason(error)}
    partial = Path(f"{spec['record']}.partial")
    partial.write_text(json.dumps(record))
    partial.replace(spec["record"])


# The process that was started by hand: it imports neither torch nor a backend.


class DeviceMemory:
    """Bytes in use on the first GPU, whoever uses them, asked of NVML again and again; nothing where NVML is not."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        read = self._reader()
        if read is not None:
            self._idle = read()
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def peak(self, start: float, end: float) -> int | None:
        """The most between two times of the clock, over what was in use before all."""
        found = [used for when, used in self._samples if start <= when <= end]
        return max(found) - self._idle if found else None

    def _watch(self, read: Callable[[], int]) -> None:
        while True:
            self._samples.append((time.time(), read()))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    @staticmethod
    def _reader() -> Callable[[], int] | None:
        memory, handle = (ctypes.c_ulonglong * 3)(), ctypes.c_void_p()  # total, free, used
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return None

        def read() -> int:
            library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            return int(memory[2])

        return read


@dataclass
class Benchmark:
    """All that one call of the script does; `common` is the part of every spec that is the same."""

    options: argparse.Namespace
    common: Spec
    memory: DeviceMemory = field(default_factory=DeviceMemory)
    end: float = 0.0
    models: dict[str, Spec] = field(default_factory=dict)
    rows: list[Spec] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def run(self) -> bool:
        """The table is printed, each row as soon as it is there; says whether all artifacts keep to their limits."""
        self.end = time.monotonic() + self.options.seconds
        print(", ".join(f"{key}: {value}" for key, value in self.common.items()), end="\n\n")
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
        for model in self.options.models:
            with self.folder(model) as folder:
                self.model(model, folder)
        for model, record in self.models.items():
            facts = {key: value for key, value in record.items() if key not in ("table", "spec")}
            print(f"\n{model}: {json.dumps(facts)}")
        if self.left_out:
            print(f"\nLeft out, because the {self.options.seconds:g} seconds were spent: {', '.join(self.left_out)}")
        return all(within(row) for row in self.rows)

    def model(self, model: str, folder: Path) -> None:
        """The rows of a model."""
        variants = {row: self.options.variants if row in BACKENDS else ("exact",) for row in self.options.rows}
        artifacts = self.options.variants if set(variants) & set(BACKENDS) else []
        if not self.time_left():
            self.left_out.append(f"{model} (all rows)")
            return
        spec = {**self.common, "model": model, "folder": str(folder)}
        prepared = self.process({**spec, "work": "prepare", "artifacts": artifacts}, folder / "prepare.json")
        self.models[model] = prepared
        for row, variant in [(row, variant) for row, kinds in variants.items() for variant in kinds]:
            if not self.time_left():
                self.left_out.append(titled(model, row, variant))
                continue
            found = self.row({**spec, "row": row, "variant": variant}, prepared, folder)
            self.rows.append({"model": model, "row": row, "variant": variant, **found})
            print("| " + " | ".join(self.cells(self.rows[-1])) + " |", flush=True)
            if self.options.output is not None:
                report = {"settings": self.common, "models": self.models, "rows": self.rows, "left out": self.left_out}
                Path(self.options.output).write_text(json.dumps(report, indent=1))

    def row(self, spec: Spec, prepared: Spec, folder: Path) -> Spec:
        """What was measured, or the failure."""
        row, variant = spec["row"], spec["variant"]
        if "failure" in prepared:
            return {"failure": f"the model could not be prepared: {prepared['failure']}"}
        if row not in BACKENDS:
            return self.process({**spec, "work": "torch"}, folder / f"{row}.json")
        if f"{variant} seconds" not in prepared:
            failure = prepared.get(f"{variant} failure") or prepared.get("compile failure")
            return {"failure": f"the artifact could not be compiled: {failure}"}
        build = prepared[f"{variant} seconds"]
        if row != "onnxruntime":
            layer = self.process({**spec, "work": "layer"}, folder / f"layer-{row}-{variant}.json")
            if "failure" in layer:
                return {"failure": f"no layer: {layer['failure']}"}
            build += layer["seconds"]
        return {"build": build, **self.process({**spec, "work": "artifact"}, folder / f"{row}-{variant}.json")}

    def process(self, spec: Spec, path: Path) -> Spec:
        """The record of a process that does the spec's work, or the one that an earlier call left there."""
        if path.exists():
            kept: Spec = json.loads(path.read_text())
            if kept.get("spec") == spec and "failure" not in kept:
                return kept
            path.unlink()
        if spec["work"] == "prepare":
            # Layers and rows of artifacts that are about to be replaced.
            for stale in [*path.parent.glob("*-exact.json"), *path.parent.glob("*-schedule.json")]:
                stale.unlink()
        print(titled(spec["model"], spec.get("row", ""), spec.get("variant", "")), spec["work"], file=sys.stderr)
        given, log = json.dumps({**spec, "record": str(path)}), path.with_suffix(".log")
        # Without -P this folder would be on the path, and its names would hide packages.
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--work", given]
        with log.open("w") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
        try:
            child.wait(max(1.0, self.time_left()))
            how = f"with code {child.returncode}" if child.returncode >= 0 else f"by signal {-child.returncode}"
        except subprocess.TimeoutExpired:
            how = "because the time was spent"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        record: Spec = {}
        if path.exists():
            record = json.loads(path.read_text())
        else:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
            record["failure"] = f"the process ended in {spec['work']} {how}; it last said: {lines[-1][:200]}"
        if "started" in record:
            record["device bytes"] = self.memory.peak(record["started"], record["ended"])
        path.write_text(json.dumps({**record, "spec": spec}))
        return record

    def time_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    @contextmanager
    def folder(self, model: str) -> Iterator[Path]:
        """Where a model's files are; kept only where the folder was named."""
        if self.options.folder is None:
            with tempfile.TemporaryDirectory(prefix="dcc-gpu-", ignore_cleanup_errors=True) as name:
                yield Path(name)
            return
        folder = Path(self.options.folder).resolve() / model
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def cells(self, row: Spec) -> list[str]:
        """A row of the table."""
        name = titled("", row["row"], row["variant"])
        if "failure" in row:
            return [row["model"], name, *[""] * (len(COLUMNS) - 3), row["failure"].replace("|", "/")]
        mine = [other for other in self.rows if other["model"] == row["model"] and "median" in other]
        times = {other["row"]: other["median"] for other in mine}
        faster = [f"{times[other] / row['median']:.2f}x" if other in times else "" for other in ("eager", "compile")]
        build = "" if row["build"] is None else f"{row['build']:.1f}"
        sizes = ["" if row[key] is None else f"{row[key] / 2**30:.2f}" for key in ("device bytes", "own bytes")]
        errors = [compared(row[f"{what} error"], row[f"{what} limit"]) for what in ("forward", "latent")]
        return [
            row["model"], name, row["dtype"], f"{row['median'] * 1e3:.1f}", *faster, build, f"{row['first']:.2f}",
            *sizes, *errors, "yes" if row["torch"] else "no", row["note"].replace("|", "/"),
        ]  # fmt: skip


def titled(model: str, row: str, variant: str) -> str:
    return " ".join(filter(None, (model, row, "schedule" if variant == "schedule" else "")))


def compared(error: float | None, limit: float) -> str:
    if error is None:
        return "no reference"
    return f"{error:.1e}, {'within' if error <= limit else 'MORE THAN'} {limit:.0e}"


def within(row: Spec) -> bool:
    """No artifact that ran is further from its reference than its type explains."""
    if "failure" in row or row["row"] not in BACKENDS:
        return True
    errors = [(row[f"{what} error"], row[f"{what} limit"]) for what in ("forward", "latent")]
    return all(error is not None and error <= limit for error, limit in errors)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", "--backends", nargs="+", choices=ROWS, help="default: all that fit the machine")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of each artifact")
    parser.add_argument("--steps", type=int, help="default: 30, in a dry run 6")
    parser.add_argument("--batch", type=int, default=1, help="images in a generation")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--depth", type=int, help="blocks of the first kind (default: as released, in a dry run 1)")
    parser.add_argument("--repeats", type=int, default=5, help="measured generations, after two that are not")
    parser.add_argument("--seconds", type=float, default=540.0, help="no row starts after these or outlives them")
    parser.add_argument("--folder", help="keep artifacts and measured rows here, and go on with those that are here")
    parser.add_argument("-o", "--output", metavar="FILE", help="JSON, written after every row")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the processor")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work is not None:
        work(json.loads(options.work))
        return 0
    for name, least in (("steps", 2), ("batch", 1), ("depth", 1), ("repeats", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name} must be {least} or more")
    device = None if options.dry_run else local_device()
    if device is None and not options.dry_run:
        what = "this benchmark needs a CUDA GPU, and none answers here; --dry-run runs tiny models on the processor"
        print(DccError(what), file=sys.stderr)
        return 1
    options.variants = [variant for variant in VARIANTS if variant in options.variants]
    if options.rows is None:
        options.rows = [row for row in ROWS if row != "onnxruntime"] if device else ["eager", "compile", "onnxruntime"]
    common: Spec = {
        "device": "cuda" if device else "cpu", "device name": device.name if device else "",
        "capability": device.capability if device else ASSUMED_CAPABILITY, "tiny": device is None,
        "steps": options.steps or (30 if device else 6), "batch": options.batch, "dtype": options.dtype,
        "depth": options.depth or (None if device else 1), "repeats": options.repeats,
    }  # fmt: skip
    return 0 if Benchmark(options, common).run() else 1


if __name__ == "__main__":
    sys.exit(main())
