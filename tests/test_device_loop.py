"""The whole loop on the simulated device: what it samples, what it launches, what it keeps."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import relative_difference
from example_artifact import WIDTH
from schedule_reference import subject, write
from simulated import LIMIT, Watched, engine_source, loaded_example, simulated_device
from test_schedule_lowering import SCHEDULES

from dcc.errors import ArtifactError, Cancelled, ExecutionError
from dcc.exports.update_engines import update_engines
from dcc.frontend.samplers import sampler_table
from dcc.runtime.device import DeviceMemoryError
from dcc.runtime.device_engines import largest_table_rows
from dcc.runtime.device_loop import DeviceArtifact
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.sampler import SamplerTable
from dcc.runtime.simulated_device import SimulatedDevice

SAMPLERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddim": ("dit", "ddim", {}),
    "second order": ("dit", "dpm++2m", {}),
    "more calls than steps": ("dit", "heun", {}),
    "noise in every call": ("dit", "euler-a", {}),
    "clipped": ("dit", "ddpm", {}),
    "learned variance": ("diffusers_dit", "ddpm", {"variance_type": "learned_range"}),
    "five registers": ("dit", "pndm", {}),
}
FAMILIES = ("sd3", "flux", "pixart")


def with_sampler(name: str, table: SamplerTable, path: Path) -> LoadedArtifact:
    """A zoo model compiled for another sampler, guided."""
    model = subject(name)
    return write(replace(model, program=replace(model.program, sampler=table)), None, path, "component")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedArtifact:
    """Class-conditional, four DDIM steps, one engine a component."""
    return with_sampler("dit", sampler_table("ddim", steps=4), tmp_path_factory.mktemp("dit") / "a.dcc")


@pytest.fixture(scope="module")
def watched(loaded: LoadedArtifact) -> Watched:
    return Watched(loaded)


@pytest.mark.parametrize("what", SAMPLERS)
def test_samplers_give_what_the_processor_gives(what: str, tmp_path: Path) -> None:
    model, name, options = SAMPLERS[what]
    watched = Watched(with_sampler(model, sampler_table(name, steps=4, **options), tmp_path / "a.dcc"))
    for scale, seed in ((None, 1), (1.0, [5, 6]), (-2.0, 3)):
        watched.check(**subject(model).rows(2), guidance_scale=scale, seed=seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_what_the_processor_gives(name: str, tmp_path: Path) -> None:
    """Exact, and with histories in every second component, some of the one half alone."""
    model = subject(name)
    for schedule in (None, SCHEDULES["modes"](model.program.components, model.program.calls)):
        watched = Watched(write(model, schedule, tmp_path / "a.dcc", "component"))
        watched.check(**model.rows(2), seed=2)


@pytest.mark.parametrize("what", ["order 2", "components out of phase", "mixed", "output", "modes"])
@pytest.mark.parametrize("granularity", ["step", "component"])
def test_schedules_give_what_the_processor_gives(what: str, granularity: str, tmp_path: Path) -> None:
    """Histories, forecasts, and calls that run one half or reuse a difference of earlier ones."""
    dit = subject("dit")
    schedule = SCHEDULES[what](dit.program.components, dit.program.calls)
    watched = Watched(write(dit, schedule, tmp_path / "a.dcc", granularity))
    for images in (2, 1):
        watched.check(**dit.rows(images), seed=3)
    watched.check(**dit.rows(2), guidance_scale=1.0, seed=3)


def test_denoise_is_what_the_processor_gives(watched: Watched) -> None:
    random = np.random.default_rng(0)
    for rows in (3, 1):
        inputs = {
            "x": random.standard_normal((rows, 3, 8, 8)).astype(np.float32),
            "t": random.uniform(0, 999, rows), "y": random.integers(0, 10, rows),
        }  # fmt: skip
        assert relative_difference(watched.denoise(**inputs), watched.loaded.denoise(**inputs)) <= LIMIT


def test_halves_that_start_where_no_port_may(tmp_path: Path) -> None:
    """32 bytes an image: the second half of the output lies between the addresses that ports may have."""
    watched = Watched(loaded_example(tmp_path / "a.dcc"))
    for images in (1, 3, 8):
        watched.check({"y": [1] * images}, seed=1)
        noise = np.random.default_rng(images).standard_normal((images, WIDTH)).astype(np.float32)
        watched.check({"y": [2] * images}, noise=noise, guidance_scale=1.0)


def test_table_engines_run_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three sampler calls at once where the rows of four would be too many; the last piece is shorter."""
    for module in ("device_layout", "device_engines"):
        monkeypatch.setattr(f"dcc.runtime.{module}.TABLE_ROWS", 12)
    for name, sampler in (("sd3", "flow-euler"), ("dit", "ddim")):
        watched = Watched(with_sampler(name, sampler_table(sampler, steps=4), tmp_path / "a.dcc"))
        watched.check(**subject(name).rows(2), seed=2)
        assert largest_table_rows(watched.loaded.plan) == 16
    monkeypatch.setattr("dcc.runtime.device_engines.TABLE_ROWS", 4096)
    assert largest_table_rows(watched.loaded.plan) == 16 * 4


def changes(watched: Watched, **request: Any) -> Counter[str]:
    before = Counter(watched.device.counts)
    watched.sample({"y": [1, 2]}, **request)
    return Counter({key: value - before[key] for key, value in watched.device.counts.items() if value != before[key]})


def test_a_call_is_one_copy_and_one_launch(loaded: LoadedArtifact) -> None:
    """Nothing is allocated, bound or captured in the second request, and the host waits at its end alone."""
    watched = Watched(loaded)
    first, second = changes(watched), changes(watched)
    # The first call of a kind runs as it is asked for, and is captured then.
    assert (first["launch"], first["capture"], first["engine"] > 4) == (3, 1, True)
    assert second.keys() <= {"launch", "copy", "engine", "upload", "download", "synchronise"}
    assert second["launch"] == 4
    # Request and table engines, and the start.
    assert second["engine"] == len(watched.loaded.plan.request) + len(watched.loaded.plan.table) + 1
    assert second["download"] == 1
    assert second["synchronise"] <= 2


def test_copies_do_not_grow_with_calls_but_by_one(tmp_path: Path) -> None:
    counts = []
    for steps in (4, 8):
        watched = Watched(with_sampler("dit", sampler_table("euler-a", steps=steps), tmp_path / f"{steps}.dcc"))
        changes(watched)
        counts.append(changes(watched))
    grown = counts[1] - counts[0]
    # One more doubling repeats the conditions over twice the calls.
    repeated = sum(", repeated" in label for label in _regions(watched))
    assert grown["copy"] - repeated == 4
    # The last call's noise is multiplied by zero: drawn, not sent.
    assert grown["upload"] == 4
    assert grown["launch"] == 4
    assert grown.keys() <= {"copy", "upload", "launch"}


def _regions(watched: Watched) -> list[str]:
    requests = next(iter(watched.on_device._lanes.every[0]._requests.values()))
    return list(requests.space.layout.regions)


def test_all_memory_is_given_back(loaded: LoadedArtifact) -> None:
    watched = Watched(loaded)
    for images in (1, 2, 3, 1):
        watched.check({"y": [1] * images})
    watched.denoise(x=np.zeros((2, 3, 8, 8)), t=1.0, y=0)
    watched.on_device.close()
    assert watched.device.memory_map.used == 0
    with pytest.raises(ExecutionError, match="the artifact was closed"):
        watched.on_device.sample({"y": 1})


def test_a_callback_sees_every_latent_and_may_stop(watched: Watched) -> None:
    seen: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    watched.loaded.sample({"y": [3]}, callback=lambda progress: wanted.append(progress.latent.copy()))
    result = watched.sample({"y": [3]}, callback=lambda progress: seen.append(progress.latent))
    for got, latent in zip(seen, wanted, strict=True):
        assert relative_difference(got, latent) <= LIMIT
    assert np.array_equal(seen[-1], result)
    watched.witness.finish()
    watched.device.observers.clear()
    with pytest.raises(Cancelled, match="the callback stopped the request"):
        watched.on_device.sample({"y": [3]}, callback=lambda progress: progress.call < 1)
    event = threading.Event()
    event.set()
    with pytest.raises(Cancelled, match="the request was cancelled"):
        watched.on_device.sample({"y": [3]}, cancel=event)
    watched.device.observers.append(watched.witness)
    assert np.array_equal(watched.sample({"y": [3]}), result)


def test_a_callback_cannot_start_a_request(watched: Watched) -> None:
    def again(_: object) -> None:
        watched.on_device.sample({"y": 3})

    watched.device.observers.remove(watched.witness)
    with pytest.raises(ExecutionError, match="a callback cannot start a request"):
        watched.on_device.sample({"y": 3}, callback=again)
    watched.device.observers.append(watched.witness)


def test_lanes_serve_threads_side_by_side(loaded: LoadedArtifact) -> None:
    requests = [({"y": [index % 10] * (1 + index % 3)}, index) for index in range(6)]
    wanted = [loaded.sample(conditions, seed=seed) for conditions, seed in requests]
    device = simulated_device(loaded)
    got: dict[int, Any] = {}
    inside, most, lock = set(), [0], threading.Lock()
    with DeviceArtifact(loaded.artifact, device, engine_source(loaded), lanes=2) as artifact_on_device:
        both = threading.Barrier(2, timeout=20)

        def serve(worker: int) -> None:
            def told(progress: Any) -> None:
                with lock:
                    inside.add(worker)
                    most[0] = max(most[0], len(inside))
                if progress.call == 0:
                    both.wait()

            for index in range(worker, len(requests), 2):
                got[index] = artifact_on_device.sample(requests[index][0], seed=requests[index][1], callback=told)
                with lock:
                    inside.discard(worker)

        workers = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert len(artifact_on_device._lanes.every) == 2
    assert most == [2]
    for index, result in enumerate(wanted):
        assert relative_difference(got[index], result) <= LIMIT
    assert device.memory_map.used == 0


def test_too_little_memory_says_what_would_fit(loaded: LoadedArtifact) -> None:
    full = Watched(loaded)
    full.sample({"y": [1] * 2})
    device = SimulatedDevice(total=full.device.memory_map.used + 100_000, folder=loaded.artifact.folder)
    watched = Watched(loaded, device)
    with pytest.raises(DeviceMemoryError, match="a request does not fit into the device's memory") as caught:
        watched.on_device.sample({"y": [1] * 8})
    fit = int(caught.value.details["next"].removeprefix("ask for at most ").split()[0])
    assert 2 <= fit < 8
    assert caught.value.wanted > caught.value.free > 0
    watched.sample({"y": [1] * fit})
    with pytest.raises(DeviceMemoryError):
        watched.on_device.sample({"y": [1] * (fit + 1)})
    # Another size makes room for itself.
    watched.sample({"y": [1]})
    watched.sample({"y": [1] * fit})


def test_an_engine_with_other_ports_is_refused(loaded: LoadedArtifact) -> None:
    right = engine_source(loaded)
    steps = [engine.name for engine in loaded.plan.engines if engine.kind == "step"]

    def wrong(name: str) -> bytes:
        return right(steps[1] if name == steps[0] else name)

    device = simulated_device(loaded)
    with pytest.raises(ArtifactError, match="an engine has other ports than the plan says"):
        DeviceArtifact(loaded.artifact, device, wrong)
    assert device.memory_map.used == 0


def test_no_torch_in_the_process(loaded: LoadedArtifact, tmp_path: Path) -> None:
    """The executor, the simulated device and the CUDA one are imported, and a loop is run, without torch or onnx."""
    source = engine_source(loaded)
    names = [engine.name for engine in loaded.plan.engines]
    assert loaded.sampler is not None
    spec, _ = update_engines(loaded.plan, loaded.sampler, loaded.guidance)
    for name in [*names, *(kind.name for kind in spec.kinds)]:
        (tmp_path / name).write_bytes(source(name))
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\n"
        "from pathlib import Path\n"
        "import dcc.runtime.cuda_device\n"
        "from dcc.runtime import load\n"
        "from dcc.runtime.device_loop import DeviceArtifact\n"
        "from dcc.runtime.simulated_device import SimulatedDevice\n"
        "loaded, folder = load(sys.argv[1], threads=1), Path(sys.argv[2])\n"
        "device = SimulatedDevice(folder=loaded.artifact.folder)\n"
        "dit = DeviceArtifact(loaded.artifact, device, lambda name: (folder / name).read_bytes())\n"
        "assert dit.sample({'y': [3, 7]}).shape == (2, 3, 8, 8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, loaded.artifact.path, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_samples_may_stay_on_the_device(loaded: LoadedArtifact) -> None:
    watched = Watched(loaded)
    wanted = watched.sample({"y": [3, 7]}, seed=1)
    watched.device.observers.clear()
    used = watched.device.memory_map.used
    first = watched.on_device.sample_on_device({"y": [3, 7]}, seed=1)
    # The next request does not write into it.
    watched.on_device.sample({"y": [1, 2]}, seed=2)
    assert np.array_equal(first.numpy(), wanted)
    assert first.shape == wanted.shape
    first.close()
    assert watched.device.memory_map.used == used
