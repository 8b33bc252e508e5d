"""What a request may be made of: numbers, arrays, and tensors of anybody's that know DLPack."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_artifact import WIDTH
from simulated import loaded_example

from dcc.errors import UsageError
from dcc.runtime.dlpack import CUDA, _exported
from dcc.runtime.loaded import LoadedArtifact
from dcc.runtime.request_values import array_of

NUMBERS = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


class Alone:
    """A tensor that knows DLPack and nothing else."""

    def __init__(self, tensor: Any, device: tuple[int, int] | None = None) -> None:
        self.tensor, self.device = tensor, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device or self.tensor.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8,
                                  torch.int8, torch.int16, torch.bool])  # fmt: skip
def test_every_type_arrives(kind: torch.dtype) -> None:
    tensor = NUMBERS.to(kind)
    got = array_of("x", Alone(tensor))
    assert got.dtype == tensor.numpy().dtype
    assert np.array_equal(got, tensor.numpy())


def test_bfloat16_which_numpy_lacks_becomes_float32() -> None:
    tensor = (NUMBERS / 7).to(torch.bfloat16)
    got = array_of("x", tensor)
    assert got.dtype == np.float32
    assert np.array_equal(got, tensor.float().numpy())


@pytest.mark.parametrize(
    "tensor",
    [
        NUMBERS.transpose(0, 2), NUMBERS[:, 1:, ::2], NUMBERS[:1].expand(5, 3, 4), NUMBERS[:0], NUMBERS[0, 0, 0],
        NUMBERS[1:],
    ],
)  # fmt: skip
def test_any_layout_arrives(tensor: torch.Tensor) -> None:
    got = array_of("x", Alone(tensor))
    assert got.shape == tuple(tensor.shape)
    assert np.array_equal(got, tensor.numpy())
    assert got.flags.c_contiguous


def test_what_arrives_is_a_copy_and_the_tensor_is_let_go_of() -> None:
    """By its deleter: the owner learns of it."""
    released: list[int] = []

    class Owner(np.ndarray):
        def __del__(self) -> None:
            released.append(1)

    values = np.arange(4.0).view(Owner)
    got = array_of("x", Alone(values))
    values[0] = 9.0
    assert got[0] == 0.0
    del values
    gc.collect()
    assert released and _exported == {}


@pytest.mark.parametrize("value", [3, 2.5, True, [1, 2], np.float32(1), np.arange(3), range(3), None])
def test_what_is_no_tensor_is_numpy_s(value: Any) -> None:
    assert np.array_equal(array_of("x", value), np.asarray(value))


def test_what_is_read_only_arrives() -> None:
    values = np.arange(3)
    values.flags.writeable = False
    assert np.array_equal(array_of("x", values), [0, 1, 2])


class Strange:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return "no capsule"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (NUMBERS.clone().requires_grad_(), "detach"),
        (Alone(NUMBERS.to(torch.complex64)), "type 5 with 64 bits"),
        (Strange(), "no capsule"),
        ([[1, 2], [3]], "inhomogeneous"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_it(value: Any, words: str) -> None:
    with pytest.raises(UsageError, match="'y' cannot be read") as caught:
        array_of("y", value)
    assert words in caught.value.details["got"]
    assert "DLPack" in caught.value.details["want"]


def test_a_tensor_on_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="a tensor lies on a device") as caught:
        array_of("y", Alone(NUMBERS, (CUDA, 0)))
    assert caught.value.details == {
        "at": "'y'", "got": "DLPack device (2, 0)", "next": "give its .cpu()",
    }  # fmt: skip


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[LoadedArtifact]:
    with loaded_example(tmp_path / "a.dcc") as artifact:
        yield artifact


def test_requests_take_tensors(loaded: LoadedArtifact) -> None:
    noise = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    wanted = loaded.sample({"y": [1, 2, 3]}, noise=noise, negative_conditions={"y": [0, 0, 1]})
    tensors: dict[str, Any] = {
        "noise": torch.from_numpy(noise), "negative_conditions": {"y": Alone(torch.tensor([0, 0, 1]))}
    }  # fmt: skip
    assert np.array_equal(loaded.sample({"y": torch.tensor([1, 2, 3])}, **tensors), wanted)
    seeded = loaded.sample({"y": [1, 2]}, seed=[3, 4])
    assert np.array_equal(loaded.sample({"y": [1, 2]}, seed=torch.tensor([3, 4])), seeded)  # type: ignore[arg-type]
    inputs = {"x": noise, "t": np.full((3, 1), 5.0), "y": np.array([1, 2, 3])}
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    assert np.array_equal(loaded.denoise(**given), loaded.denoise(**inputs))


@pytest.mark.parametrize(
    ("request_of", "what"),
    [
        ({"noise": "white"}, "noise is not made of numbers"),
        ({"noise": torch.zeros(2, WIDTH, dtype=torch.bool)}, "noise is not made of numbers"),
        ({"noise": torch.zeros(2, WIDTH).requires_grad_()}, "'noise' cannot be read"),
        ({"conditions": {"y": torch.tensor([0.5, 1.0])}}, "'y' cannot be converted"),
        ({"conditions": {"y": torch.tensor([1, 9])}}, "'y' is out of range"),
        ({"conditions": {"z": torch.tensor([1, 2])}}, "unknown condition 'z'"),
        ({"conditions": [1, 2]}, "inputs are given by name"),
        ({"negative_conditions": [1, 2]}, "inputs are given by name"),
        ({"seed": None}, "a seed is not an integer"),
        ({"seed": 1.5}, "a seed is not an integer"),
        ({"seed": torch.Generator()}, "a seed is not an integer"),
        ({"seed": "12"}, "a seed is not an integer"),
        ({"seed": torch.tensor([1.0, 2.0])}, "a seed is not an integer"),
        ({"guidance_scale": "high"}, "guidance_scale is not a number"),
        ({"generator": torch.Generator()}, "unknown generator of noise"),
    ],
)
def test_what_does_not_fit_is_refused(request_of: dict[str, Any], what: str, loaded: LoadedArtifact) -> None:
    with pytest.raises(UsageError) as caught:
        loaded.sample(**{"conditions": {"y": [1, 2]}, **request_of})
    assert caught.value.what == what
