"""Arrays on a device, given to others and taken from them: tried out on host memory, which numpy and torch can take."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest
import torch

from dcc.errors import UsageError
from dcc.runtime.device import DeviceError, Place
from dcc.runtime.device_array import DeviceArray, fetched
from dcc.runtime.dlpack import CUDA, HOST, _exported
from dcc.runtime.simulated_device import SimulatedDevice

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def array(device: SimulatedDevice, values: np.ndarray = VALUES) -> DeviceArray:
    """The values in memory of the device."""
    region = device.allocate(values.nbytes, "samples")
    stream, buffer = device.stream(), device.pinned(values.nbytes, "values")
    buffer.write(values)
    stream.upload(region, buffer)
    stream.close()
    device.free_pinned(buffer)
    return DeviceArray(device, Place(region, str(values.dtype), values.shape))


@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack])
def test_others_see_the_memory_and_keep_it(take: Any) -> None:
    device = SimulatedDevice()
    mine = array(device)
    memory = device.memory_map.view(mine.place.region, "a test")
    view = take(mine)
    del mine
    gc.collect()
    assert device.memory_map.used == VALUES.nbytes
    memory.view(np.float32)[5] = -1.0
    assert np.array_equal(np.asarray(view), memory.view(np.float32).reshape(2, 3, 4))
    del view
    gc.collect()
    assert device.memory_map.used == 0
    assert _exported == {}


def test_a_capsule_that_nobody_takes_lets_go() -> None:
    device = SimulatedDevice()
    capsule = array(device).__dlpack__()
    assert (len(_exported), device.memory_map.used) == (1, VALUES.nbytes)
    del capsule
    gc.collect()
    assert (len(_exported), device.memory_map.used) == (0, 0)


def test_the_cuda_interface_is_address_shape_and_type() -> None:
    device = SimulatedDevice()
    assert not hasattr(array(device), "__cuda_array_interface__")
    device.dlpack = (CUDA, 1)
    mine = array(device)
    found = mine.__cuda_array_interface__
    assert found["data"] == (mine.place.region.address, False)
    assert (found["shape"], found["typestr"]) == ((2, 3, 4), "<f4")
    assert mine.__dlpack_device__() == (CUDA, 1)


def test_copies_are_refused() -> None:
    with pytest.raises(DeviceError, match="not copied by DLPack"):
        array(SimulatedDevice()).__dlpack__(copy=True)
    assert ctypes.sizeof(ctypes.c_void_p) == 8


def test_an_array_that_was_closed_is_not_read() -> None:
    """Its memory may be somebody else's by now."""
    mine = array(SimulatedDevice())
    assert np.array_equal(mine.numpy(), VALUES)
    mine.close()
    mine.close()
    for use in (mine.numpy, mine.__dlpack__):
        with pytest.raises(DeviceError, match="an array is used after it was closed"):
            use()


@pytest.mark.parametrize("values", [VALUES, VALUES.astype(np.int64), VALUES[:0], VALUES.astype(np.float16)[:1]])
def test_a_tensor_on_the_device_is_read_back(values: np.ndarray) -> None:
    device = SimulatedDevice()
    device.dlpack = (CUDA, 0)
    theirs = array(device, values)
    before, live = device.memory_map.used, dict(device.live)
    got = fetched(device, theirs)
    assert np.array_equal(got, values)
    assert got.dtype == values.dtype
    assert (device.memory_map.used, dict(device.live)) == (before, live)
    del theirs
    gc.collect()
    assert device.memory_map.used == 0


def test_a_tensor_elsewhere_is_refused() -> None:
    one, other = SimulatedDevice(), SimulatedDevice()
    one.dlpack, other.dlpack = (CUDA, 0), (CUDA, 1)
    with pytest.raises(UsageError, match="a tensor lies on another device") as caught:
        fetched(one, array(other))
    assert (caught.value.details["got"], caught.value.details["want"]) == ("(2, 1)", "(2, 0)")
    assert HOST == 1
