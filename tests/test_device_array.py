"""Arrays on a device, given to others: tried out on host memory, which numpy and torch can take."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest
import torch

from dcc.runtime.device import DeviceError, Place, Region
from dcc.runtime.device_array import CUDA, HOST, DeviceArray, _exported


class HostMemory:
    """A device whose memory is the host's."""

    def __init__(self) -> None:
        self.freed: list[Region] = []
        self.values = np.arange(24, dtype=np.float32)
        self.place = Place(Region("samples", self.values.ctypes.data, self.values.nbytes), "float32", (2, 3, 4))

    def free(self, region: Region) -> None:
        self.freed.append(region)


def array(memory: HostMemory, kind: int = HOST) -> DeviceArray:
    device: Any = memory
    return DeviceArray(device, memory.place, (kind, 0))


@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack])
def test_others_see_the_memory_and_keep_it(take: Any) -> None:
    memory = HostMemory()
    view = take(array(memory))
    gc.collect()
    assert memory.freed == []
    memory.values[5] = -1.0
    assert np.array_equal(np.asarray(view), memory.values.reshape(2, 3, 4))
    del view
    gc.collect()
    assert memory.freed == [memory.place.region]
    assert _exported == {}


def test_a_capsule_that_nobody_takes_lets_go() -> None:
    memory = HostMemory()
    capsule = array(memory).__dlpack__()
    assert len(_exported) == 1
    del capsule
    gc.collect()
    assert (len(_exported), len(memory.freed)) == (0, 1)


def test_the_cuda_interface_is_address_shape_and_type() -> None:
    memory = HostMemory()
    found = array(memory, CUDA).__cuda_array_interface__
    assert found["data"] == (memory.values.ctypes.data, False)
    assert (found["shape"], found["typestr"]) == ((2, 3, 4), "<f4")
    assert not hasattr(array(memory), "__cuda_array_interface__")


def test_copies_are_refused() -> None:
    with pytest.raises(DeviceError, match="not copied by DLPack"):
        array(HostMemory()).__dlpack__(copy=True)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
