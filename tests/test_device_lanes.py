"""Requests side by side on a device: where memory is short, where somebody closes, where nobody holds on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import relative_difference
from example_artifact import WIDTH
from simulated import LIMIT, engine_source, loaded_example
from test_device_array import array

from dcc.errors import Cancelled, DccError, ExecutionError, UsageError
from dcc.runtime.device import DeviceMemoryError, EngineRefused
from dcc.runtime.device_loop import DeviceArtifact
from dcc.runtime.device_steps import Steps
from dcc.runtime.dlpack import CUDA
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.simulated_device import SimulatedDevice

SECONDS = 30


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[LoadedArtifact]:
    with loaded_example(tmp_path / "a.dcc") as artifact:
        yield artifact


@pytest.fixture
def device(loaded: LoadedArtifact) -> SimulatedDevice:
    return SimulatedDevice(folder=loaded.artifact.folder)


def on(device: SimulatedDevice, loaded: LoadedArtifact, **options: Any) -> DeviceArtifact:
    return DeviceArtifact(loaded.artifact, device, engine_source(loaded), **options)


def conditions(images: int) -> dict[str, Any]:
    return {"y": [1] * images}


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What each task gives or raises, each in a thread; none may hang."""
    results: list[Any] = [None] * len(tasks)

    def run(index: int) -> None:
        try:
            results[index] = tasks[index]()
        except (DccError, AssertionError, threading.BrokenBarrierError) as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def test_four_threads_are_served_by_two_lanes(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    requests = [(conditions(1 + index % 3), index) for index in range(12)]
    wanted = [loaded.sample(values, seed=seed) for values, seed in requests]
    with on(device, loaded, lanes=2) as artifact:

        def serve(worker: int) -> list[np.ndarray]:
            return [artifact.sample(values, seed=seed) for values, seed in requests[worker::4]]

        results = at_once(*(lambda worker=worker: serve(worker) for worker in range(4)))
        assert len(artifact._lanes.every) <= 2
    for worker, got in enumerate(results):
        for result, index in zip(got, range(worker, 12, 4), strict=True):
            assert relative_difference(result, wanted[index]) <= LIMIT
    assert device.memory_map.used == 0
    assert set(device.live.values()) == {0}, device.live


def test_closing_ends_every_wait(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    """One lane: a request holds it, two wait for it, and somebody closes."""
    artifact = on(device, loaded, lanes=1)
    holds, may_end = threading.Event(), threading.Event()

    def told(_: object) -> None:
        holds.set()
        assert may_end.wait(SECONDS)

    def waiting() -> Any:
        assert holds.wait(SECONDS)
        return artifact.sample(conditions(1))

    def close() -> None:
        assert holds.wait(SECONDS)
        threading.Timer(0.05, may_end.set).start()
        artifact.close()

    first, *others, closed = at_once(lambda: artifact.sample(conditions(1), callback=told), waiting, waiting, close)
    assert first.shape == (1, WIDTH) and closed is None
    for error in others:
        assert isinstance(error, ExecutionError) and error.what == "the artifact was closed"
    assert device.memory_map.used == 0
    artifact.close()


def test_a_callback_cannot_close_what_calls_it(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    with on(device, loaded) as artifact:
        [error] = at_once(lambda: artifact.sample(conditions(1), callback=lambda _: artifact.close()))
        assert isinstance(error, ExecutionError) and error.what.startswith("a callback cannot close")
        assert artifact.sample(conditions(1)).shape == (1, WIDTH)


def test_memory_is_free_when_nobody_holds_the_artifact(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    artifact = on(device, loaded)
    artifact.sample(conditions(2))
    kept = artifact.sample_on_device(conditions(2), seed=3)
    del artifact
    gc.collect()
    assert device.memory_map.used == kept.place.nbytes
    assert relative_difference(kept.numpy(), loaded.sample(conditions(2), seed=3)) <= LIMIT
    del kept
    gc.collect()
    assert device.memory_map.used == 0
    assert set(device.live.values()) == {0}, device.live


def test_requests_queue_where_a_second_lane_has_no_room(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    artifact = on(device, loaded, lanes=2)
    artifact.sample(conditions(1))
    device.memory_map.total = device.memory_map.used + 100
    both = [at_once(*(lambda seed=seed: artifact.sample(conditions(1), seed=seed) for seed in range(3)))]
    for seed, got in enumerate(both[0]):
        assert relative_difference(got, loaded.sample(conditions(1), seed=seed)) <= LIMIT
    assert len(artifact._lanes.every) == 1


def test_lanes_that_nobody_uses_give_up_their_workspaces(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    artifact = on(device, loaded, lanes=2)
    both = threading.Barrier(2, timeout=SECONDS)
    at_once(*[lambda: artifact.sample(conditions(16), callback=lambda progress: progress.call or both.wait() < 9)] * 2)
    first, second = artifact._lanes.every
    used, workspaces = device.memory_map.used, []
    for lane in (first, second):
        lane.drop_oldest()
        workspaces.append(used - device.memory_map.used - sum(workspaces))
        assert workspaces[-1] > 2000
    base = device.memory_map.used
    artifact.sample(conditions(32))
    large = device.memory_map.used - base
    next(lane for lane in (first, second) if lane._requests).drop_oldest()
    at_once(*[lambda: artifact.sample(conditions(16), callback=lambda progress: progress.call or both.wait() < 9)] * 2)
    device.memory_map.total = base + large + 1500
    assert device.memory().free + max(workspaces) < large
    assert artifact.sample(conditions(32)).shape == (32, WIDTH)


def test_no_room_for_the_model_is_said_when_it_is_loaded(
    loaded: LoadedArtifact, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.memory_map.total = 1000
    with pytest.raises(DeviceMemoryError, match="the engines' scratch memory does not fit") as caught:
        on(device, loaded)
    assert "about 1" in caught.value.details["next"] and "--max-batch" in caught.value.details["next"]
    assert caught.value.wanted > caught.value.free == 1000

    def full(self: SimulatedDevice, name: str, data: bytes) -> Any:
        raise DeviceMemoryError("the device has no room for an engine", 5 * 2**20, 1000, at=f"engine {name}")

    monkeypatch.setattr(SimulatedDevice, "load", full)
    with pytest.raises(DeviceMemoryError, match="the model does not fit into the device's memory") as caught:
        on(device, loaded)
    assert caught.value.details["want"] == "5.0 MiB or more, before any request"
    assert "onnxruntime" in caught.value.details["next"] and "engine" in caught.value.details["at"]
    assert device.memory_map.used == 0 and set(device.live.values()) <= {0}


@pytest.mark.parametrize("context_bytes", [0, 400])
def test_no_room_for_a_request_says_what_would_fit(
    context_bytes: int, loaded: LoadedArtifact, device: SimulatedDevice
) -> None:
    """At the first request, and at a larger one afterwards; what engines take when they are bound counts."""
    device.context_bytes = context_bytes
    with on(device, loaded, lanes=1) as artifact:
        base = device.memory_map.used
        artifact.sample(conditions(4))
        device.memory_map.total = device.memory_map.used
        artifact._lanes.every[0].drop_oldest()
        for _ in range(2):
            with pytest.raises(DeviceMemoryError, match="a request does not fit") as caught:
                artifact.sample(conditions(20))
            assert caught.value.wanted > caught.value.free
            fit = int(caught.value.details["next"].removeprefix("ask for at most ").removesuffix(" images at once"))
            # Allocations take whole units of 256 bytes, which is much for an artifact as small as this.
            assert 1 <= fit <= 4
            for images in (fit, 4):
                assert artifact.sample(conditions(images)).shape == (images, WIDTH)
        artifact._lanes.every[0].drop_oldest()
        assert device.memory_map.used == base
        device.memory_map.total = base + 50
        with pytest.raises(DeviceMemoryError) as caught:
            artifact.sample(conditions(1))
        assert caught.value.details["next"] == "free memory of the device, or use another"
        assert device.memory_map.used == base
        with pytest.raises(UsageError, match="the batch is outside the profile"):
            artifact.sample(conditions(33))
    assert device.memory_map.used == 0 and set(device.live.values()) == {0}


def test_samples_on_the_device_are_there_for_others(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    with on(device, loaded) as artifact:
        samples = artifact.sample_on_device(conditions(2), seed=1)
        wanted = artifact.sample(conditions(2), seed=1)
        tensor = torch.from_dlpack(samples)
    assert np.array_equal(tensor.numpy(), wanted) and np.array_equal(np.from_dlpack(samples), wanted)
    del samples
    gc.collect()
    assert np.array_equal(tensor.numpy(), wanted)
    del tensor
    gc.collect()
    assert device.memory_map.used == 0


def test_no_memory_is_lost_where_samples_are_not_finished(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    with on(device, loaded) as artifact:
        artifact.sample(conditions(2))
        used = device.memory_map.used
        with pytest.raises(Cancelled, match="the callback stopped"):
            artifact.sample_on_device(conditions(2), callback=lambda _: False)
        assert device.memory_map.used == used


def test_a_request_takes_tensors_of_the_device(loaded: LoadedArtifact, device: SimulatedDevice) -> None:
    device.dlpack = (CUDA, 0)
    noise = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    labels = np.array([1, 2])
    with on(device, loaded) as artifact:
        wanted = artifact.sample({"y": labels}, noise=noise)
        given = artifact.sample({"y": array(device, labels)}, noise=array(device, noise))
        assert np.array_equal(given, wanted)
        # What was left on the device goes on from there.
        first = artifact.sample_on_device({"y": labels}, noise=noise)
        assert np.array_equal(
            artifact.sample({"y": labels}, noise=first), artifact.sample({"y": labels}, noise=first.numpy())
        )
        x, t = array(device, noise), np.full((2, 1), 5.0)
        assert np.array_equal(artifact.denoise(x=x, t=t, y=labels), artifact.denoise(x=noise, t=t, y=labels))
        elsewhere = SimulatedDevice()
        elsewhere.dlpack = (CUDA, 1)
        with pytest.raises(UsageError, match="a tensor lies on another device") as caught:
            artifact.sample({"y": array(elsewhere, labels)})
        assert caught.value.details["at"] == "'y'"


def test_nothing_is_collected_while_a_step_is_captured(
    loaded: LoadedArtifact, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cycle that holds an array would free its memory there, which ends the capture."""
    seen: list[tuple[bool, bool]] = []
    enqueue = Steps._enqueue

    def watching(self: Steps, work: Any) -> None:
        seen.append((bool(device.capturing), gc.isenabled()))
        enqueue(self, work)

    monkeypatch.setattr(Steps, "_enqueue", watching)
    with on(device, loaded) as artifact:
        artifact.sample(conditions(2))
    assert set(seen) == {(False, True), (True, False)} and gc.isenabled()


def test_a_refused_engine_is_asked_for_again_until_there_is_none(
    loaded: LoadedArtifact, device: SimulatedDevice
) -> None:
    source, asked = engine_source(loaded), []
    device._refuses = lambda name, data: "made for SM 8.0" if data.startswith(b"old") else None

    def rebuild(name: str, reason: str) -> bytes | None:
        asked.append((name, reason))
        return source(name) if name != "mix" else None

    with pytest.raises(EngineRefused, match="an engine does not fit this device") as caught:
        DeviceArtifact(loaded.artifact, device, lambda name: b"old " + name.encode(), rebuild=rebuild)
    assert caught.value.details["at"] == "engine mix" and caught.value.details["got"] == "made for SM 8.0"
    assert device.memory_map.used == 0 and set(device.live.values()) <= {0}
    asked.clear()
    with DeviceArtifact(
        loaded.artifact, device, lambda name: b"old" if name == "scale" else source(name), rebuild=rebuild
    ) as artifact:
        assert asked == [("scale", "made for SM 8.0")]
        assert relative_difference(artifact.sample(conditions(2)), loaded.sample(conditions(2))) <= LIMIT
