"""A loaded artifact as a library inside somebody's process: requests, threads, neighbours, wrong input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from compiled import STEPS, model_of
from onnx import TensorProto, helper

from dcc.errors import Cancelled, DccError, ExecutionError, UsageError
from dcc.runtime import LoadedArtifact, Progress, load

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def path(artifact: Callable[..., Path]) -> Path:
    return artifact("dit")


@pytest.fixture(scope="module")
def dit(path: Path) -> LoadedArtifact:
    """Class-conditional, classes 0 to 9 and the null class 10, four DDIM steps, at most eight images with guidance."""
    return load(path)


def gaussian(images: int, seed: int = 0) -> np.ndarray:
    return torch.randn(images, *SHAPE, generator=torch.Generator().manual_seed(seed)).numpy()


def test_a_seed_draws_the_batch_and_a_list_draws_each_image(dit: LoadedArtifact) -> None:
    whole = dit.sample({"y": [3, 7]}, seed=5)
    assert whole.shape == (2, *SHAPE)
    assert whole.dtype == np.float32
    assert np.array_equal(whole, dit.sample({"y": [3, 7]}, noise=gaussian(2, seed=5)))
    each = dit.sample({"y": [3, 7]}, seed=[5, 6])
    noise = np.concatenate([gaussian(1, seed=5), gaussian(1, seed=6)])
    assert np.array_equal(each, dit.sample({"y": [3, 7]}, noise=noise))
    assert not np.allclose(whole[1], each[1])


def test_seeds_may_be_numpy_integers(dit: LoadedArtifact) -> None:
    assert np.array_equal(dit.sample({"y": 3}, seed=np.int64(5)), dit.sample({"y": 3}, seed=5))
    assert np.array_equal(dit.sample({"y": 3}, seed=np.array([5, 6])), dit.sample({"y": 3}, seed=[5, 6]))


def test_an_image_with_its_own_seed_does_not_depend_on_its_batch(dit: LoadedArtifact) -> None:
    together = dit.sample({"y": [3, 7, 1]}, seed=[5, 6, 7])
    for index, (label, seed) in enumerate(((3, 5), (7, 6), (1, 7))):
        alone = dit.sample({"y": [label]}, seed=[seed])
        np.testing.assert_allclose(together[index], alone[0], atol=1e-5 * np.ptp(together))


def test_equal_requests_give_equal_bits(dit: LoadedArtifact, path: Path) -> None:
    first = dit.sample({"y": [3, 7]}, seed=1)
    dit.sample({"y": [1, 1, 1]}, seed=2)
    assert np.array_equal(dit.sample({"y": [3, 7]}, seed=1), first)
    assert np.array_equal(load(path).sample({"y": [3, 7]}, seed=1), first)


def test_guidance_scale_one_is_the_condition_alone(dit: LoadedArtifact) -> None:
    """By hand: the sampler's own table over `denoise`, without a null half."""
    from dcc.runtime.sampler import Sampler

    assert dit.sampler is not None
    sampler = Sampler(dit.sampler, (2, *SHAPE))
    sampler.start(gaussian(2))
    for call, entry in enumerate(dit.sampler.calls):
        output = dit.denoise(x=sampler.model_input(call), t=float(entry.timestep), y=[3, 7])
        sampler.advance(call, output, lambda dtype: np.zeros((2, *SHAPE), dtype))
    got = dit.sample({"y": [3, 7]}, guidance_scale=1.0, seed=0)
    np.testing.assert_allclose(got, sampler.latent, atol=1e-5 * np.ptp(got))
    assert not np.allclose(got, dit.sample({"y": [3, 7]}, guidance_scale=3.0, seed=0))
    assert np.array_equal(dit.sample({"y": [3, 7]}, seed=0), dit.sample({"y": [3, 7]}, guidance_scale=3.0, seed=0))


def test_negative_conditions_stand_in_for_the_null_class(dit: LoadedArtifact) -> None:
    default = dit.sample({"y": 3}, seed=0)
    assert np.array_equal(dit.sample({"y": 3}, negative_conditions={"y": 10}, seed=0), default)
    assert not np.allclose(dit.sample({"y": 3}, negative_conditions={"y": 4}, seed=0), default)


def test_one_condition_serves_all_images(dit: LoadedArtifact) -> None:
    wanted = dit.sample({"y": [3, 3, 3]}, seed=0)
    for same in ({"y": 3}, {"y": [3]}, {"y": np.int32(3)}):
        assert np.array_equal(dit.sample(same, images=3, seed=0), wanted)


def test_denoise_is_the_forward_of_the_model(dit: LoadedArtifact) -> None:
    module, example, _ = model_of("dit")
    with torch.no_grad():
        wanted = module(**example).numpy()
    got = dit.denoise(**{name: value.numpy() for name, value in example.items()})
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.ptp(wanted))
    # The result is the caller's: the next request does not write into it.
    kept = got.copy()
    dit.denoise(x=np.zeros((2, *SHAPE), np.float32), t=1.0, y=0)
    assert np.array_equal(got, kept)


def test_the_callback_sees_every_call_in_order(dit: LoadedArtifact) -> None:
    seen: list[tuple[int, int]] = []
    latents: list[np.ndarray] = []

    def callback(progress: Progress) -> None:
        seen.append((progress.call, progress.calls))
        latents.append(progress.latent.copy())

    result = dit.sample({"y": 3}, seed=0, callback=callback)
    assert seen == [(call, STEPS) for call in range(STEPS)]
    assert np.array_equal(latents[-1], result)


def test_a_callback_stops_the_request_and_the_next_is_whole(dit: LoadedArtifact) -> None:
    wanted = dit.sample({"y": 3}, seed=0)
    with pytest.raises(Cancelled, match="the callback stopped the request") as caught:
        dit.sample({"y": 3}, seed=0, callback=lambda progress: progress.call < 1)
    assert caught.value.details["at"] == f"sampler call 1 of {STEPS}"
    assert np.array_equal(dit.sample({"y": 3}, seed=0), wanted)


def test_an_event_cancels_before_the_next_call(dit: LoadedArtifact) -> None:
    event, seen = threading.Event(), []

    def callback(progress: Progress) -> None:
        seen.append(progress.call)
        event.set()

    with pytest.raises(Cancelled, match="the request was cancelled"):
        dit.sample({"y": 3}, callback=callback, cancel=event)
    assert seen == [0]


def test_an_error_in_a_callback_reaches_the_caller_and_frees_the_artifact(dit: LoadedArtifact) -> None:
    def callback(_: Progress) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        dit.sample({"y": 3}, callback=callback)
    assert dit.sample({"y": 3}).shape == (1, *SHAPE)


def test_a_callback_cannot_start_a_request(dit: LoadedArtifact) -> None:
    message = "a callback cannot start a request on the artifact that is calling it"
    for request in (lambda: dit.sample({"y": 3}), lambda: dit.denoise(x=np.zeros((1, *SHAPE)), t=1.0, y=0)):
        with pytest.raises(ExecutionError, match=message):
            dit.sample({"y": 3}, callback=lambda _, request=request: request() is None)


def test_threads_on_one_artifact_give_what_one_thread_gives(dit: LoadedArtifact) -> None:
    requests = [({"y": [index % 10] * (1 + index % 3)}, index) for index in range(9)]
    wanted = [dit.sample(conditions, seed=seed) for conditions, seed in requests]
    got: list[np.ndarray | BaseException] = [RuntimeError("not run")] * len(requests)
    together = threading.Barrier(3)

    def serve(worker: int) -> None:
        together.wait()
        for index in range(worker, len(requests), 3):
            try:
                got[index] = dit.sample(requests[index][0], seed=requests[index][1])
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                got[index] = error

    workers = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for mine, theirs in zip(got, wanted, strict=True):
        assert isinstance(mine, np.ndarray), mine
        assert np.array_equal(mine, theirs)


def host_model() -> bytes:
    node = helper.make_node("Add", ["a", "a"], ["b"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "ab"]
    graph = helper.make_graph([node], "host", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_the_host_keeps_its_own_onnxruntime_sessions(path: Path) -> None:
    """Sessions with default options, made before and after a load, run between requests."""
    ones = np.ones(4, np.float32)
    before = ort.InferenceSession(host_model(), providers=["CPUExecutionProvider"])
    loaded = load(path)
    first = loaded.sample({"y": 3}, seed=0)
    after = ort.InferenceSession(host_model(), providers=["CPUExecutionProvider"])
    for session in (before, after):
        assert np.array_equal(session.run(None, {"a": ones})[0], 2 * ones)
    del before
    assert np.array_equal(loaded.sample({"y": 3}, seed=0), first)
    assert np.array_equal(after.run(None, {"a": ones})[0], 2 * ones)


def test_no_processor_time_is_burned_between_requests(path: Path) -> None:
    loaded = load(path, threads=2)
    loaded.sample({"y": [1, 2]})
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.2 * 0.3


X, ONE = np.zeros((1, *SHAPE), np.float32), {"x": np.zeros((1, *SHAPE), np.float32), "t": 1.0, "y": 0}
WRONG: dict[str, tuple[Callable[[LoadedArtifact], Any], str]] = {
    "unknown condition": (
        lambda a: a.sample({"y": 3, "label": 1}), "usage: unknown condition 'label'\n  want  ['y']"
    ),
    "unknown negative condition": (
        lambda a: a.sample({"y": 3}, negative_conditions={"label": 1}),
        "usage: unknown condition 'label'\n  want  ['y']",
    ),
    "missing condition": (lambda a: a.sample(), "usage: condition 'y' is missing\n  want  ['y']"),
    "class too large": (
        lambda a: a.sample({"y": [3, 11]}), "usage: 'y' is out of range\n  got   3 to 11\n  want  0 to 10"
    ),
    "negative class": (lambda a: a.sample({"y": -1}), "usage: 'y' is out of range\n  got   -1 to -1\n  want  0 to 10"),
    "fraction of a class": (
        lambda a: a.sample({"y": 1.5}),
        "usage: 'y' cannot be converted\n  got   fractions for an integer input\n  want  int64",
    ),
    "condition of a wrong shape": (
        lambda a: a.sample({"y": [[1, 2]]}, images=1), "usage: 'y' has the wrong shape\n  got   (1, 2)\n  want  (1,)"
    ),
    "latent of a wrong shape": (
        lambda a: a.denoise(**{**ONE, "x": X[:, :2]}),
        "usage: 'x' has the wrong shape\n  got   (1, 2, 8, 8)\n  want  (1, 3, 8, 8)",
    ),
    "latent without a batch": (
        lambda a: a.denoise(**{**ONE, "x": np.float32(0)}),
        "usage: 'x' has the wrong shape\n  got   ()\n  want  (1, 3, 8, 8)",
    ),
    "missing input": (
        lambda a: a.denoise(x=X, t=1.0),
        "usage: denoise takes the denoiser's inputs by name\n  got   ['t', 'x']\n  want  ['x', 't', 'y']",
    ),
    "batch beyond the profile": (
        lambda a: a.sample({"y": 3}, images=9),
        "usage: the batch is outside the profile that was compiled\n  got   9 images, 18 rows\n"
        "  want  1 to 16 rows\n  next  split the request, or compile with a larger --max-batch",
    ),
    "no images": (lambda a: a.sample({"y": 3}, images=0), "usage: a request needs at least one image\n  got   0"),
    "counts that disagree": (
        lambda a: a.sample({"y": [1, 2]}, images=3),
        "usage: the request disagrees about the number of images\n  got   {'images': 3, 'y': 2}",
    ),
    "seeds that disagree": (
        lambda a: a.sample({"y": [1, 2]}, seed=[1, 2, 3]),
        "usage: the request disagrees about the number of images\n  got   {'y': 2, 'seed': 3}",
    ),
    "noise of a wrong shape": (
        lambda a: a.sample({"y": 1}, noise=np.zeros((1, 3, 4, 4))),
        "usage: noise has the wrong shape\n  got   (1, 3, 4, 4)\n  want  (1, 3, 8, 8)",
    ),
    "guidance that is no number": (
        lambda a: a.sample({"y": 1}, guidance_scale=float("nan")), "usage: guidance_scale must be finite\n  got   nan"
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_message(case: str, dit: LoadedArtifact) -> None:
    request, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        request(dit)
    assert str(caught.value) == message


def test_threads_below_one_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="threads must be at least 1"):
        load(path, threads=0)


def test_a_request_goes_back_to_a_place_with_its_noise(artifact: Callable[..., Path]) -> None:
    """DDPM draws in every call; another request of the same arguments may go there as well."""
    arguments: dict[str, Any] = {"conditions": {"class_labels": [1, 2]}, "seed": 3}

    def finished(request: Any, first: int) -> np.ndarray:
        for call in range(first, request.calls):
            request.advance(call, request.output(call))
        return request.sampler.latent.copy()

    with load(artifact("diffusers_dit")) as loaded:
        with loaded.request(**arguments) as request:
            request.advance(0, request.output(0))
            place = request.place()
            wanted = finished(request, 1)
            request.return_to(place)
            assert np.array_equal(finished(request, 1), wanted)
        with loaded.request(**arguments) as request:
            request.return_to(place)
            assert np.array_equal(finished(request, 1), wanted)


def test_no_call_after_the_first_allocates(dit: LoadedArtifact) -> None:
    """numpy reports its memory to tracemalloc; eight images with guidance have latents of 12 KiB."""
    dit.sample({"y": [3] * 8}, seed=1)
    tracemalloc.start()
    try:
        with dit.request({"y": [3] * 8}, seed=1) as request:
            for call in range(request.calls):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                request.advance(call, request.output(call))
                if call:
                    assert tracemalloc.get_traced_memory()[1] - before < 4 * 8 * 3 * 8 * 8 / 2
    finally:
        tracemalloc.stop()


def test_the_largest_batch_of_the_profile_runs(dit: LoadedArtifact) -> None:
    assert dit.max_images == 8
    assert dit.sample({"y": 3}, images=8).shape == (8, *SHAPE)


def test_renamed_moved_linked_and_loaded_twice(path: Path, tmp_path: Path, dit: LoadedArtifact) -> None:
    wanted = dit.sample({"y": 3}, seed=0)
    renamed = tmp_path / "a name with spaces, ünïcode and 'quotes'.dcc"
    shutil.copyfile(path, renamed)
    assert np.array_equal(load(renamed).sample({"y": 3}, seed=0), wanted)
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    moved = renamed.rename(folder / "m.dcc")
    linked = tmp_path / "hardlink.dcc"
    os.link(moved, linked)
    symbolic = tmp_path / "symbolic.dcc"
    symbolic.symlink_to(moved)
    for place in (moved, linked, symbolic):
        pair = load(place), load(place)
        for loaded in pair:
            assert np.array_equal(loaded.sample({"y": 3}, seed=0), wanted)


def test_a_relative_path_survives_a_change_of_folder(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(path.parent)
    loaded = load(path.name)
    monkeypatch.chdir(tmp_path)
    assert loaded.denoise(**ONE).shape == (1, *SHAPE)  # its timestep engine is made only now


def test_low_memory_computes_the_same(path: Path, dit: LoadedArtifact) -> None:
    got, wanted = load(path, low_memory=True).sample({"y": 3}, seed=0), dit.sample({"y": 3}, seed=0)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.ptp(wanted))


def test_an_artifact_for_denoise_alone_cannot_sample(dit: LoadedArtifact, monkeypatch: Any) -> None:
    monkeypatch.setattr(dit, "sampler", None)
    with pytest.raises(ExecutionError, match="compiled without a sampler: it can only denoise"):
        dit.sample({"y": 3})


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "diffusers", "networkx", "onnxscript"):
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
import dcc.runtime
loaded = dcc.runtime.load(sys.argv[1])
print(loaded.sample({"y": [3, 7]}, seed=0).tobytes().hex()[:64])
print(sorted({"torch", "onnx", "diffusers", "networkx"} & set(sys.modules)))
"""


def test_an_artifact_runs_where_torch_cannot_be_imported(path: Path, dit: LoadedArtifact, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, str(path)], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    bits, modules = result.stdout.splitlines()
    assert modules == "[]"
    assert bits == dit.sample({"y": [3, 7]}, seed=0).tobytes().hex()[:64]


def test_every_error_is_one_of_ours(dit: LoadedArtifact) -> None:
    """Whatever the values are, a wrong request is a DccError and the artifact goes on."""
    wrong: list[dict[str, Any]] = [
        {"conditions": {"y": None}}, {"conditions": {"y": [[[1]]]}}, {"conditions": {"y": [1, "a"]}},
        {"conditions": {"y": []}}, {"conditions": {"y": 3}, "seed": 2**80}, {"conditions": {"y": 3}, "seed": "7"},
        {"conditions": {"y": 3}, "noise": np.zeros(())}, {"conditions": {"y": 3}, "seed": []},
        {"conditions": {"y": float("nan")}}, {"conditions": {"y": 3}, "images": -1},
    ]  # fmt: skip
    for request in wrong:
        with pytest.raises(DccError):
            dit.sample(**request)
    assert dit.sample({"y": 3}).shape == (1, *SHAPE)
