"""Arrays in device memory: samples that stay there for torch or CuPy, and theirs as what a request says.

`torch.from_dlpack(array)` and `cupy.from_dlpack(array)` see the memory itself; so does whoever knows
`__cuda_array_interface__`. The memory is freed when nobody holds it any more. Work on it is done when the array exists.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.device import Array, Device, DeviceError, Place, Region
from dcc.runtime.dlpack import CODES, CUDA, MANAGED, borrowed, capsule_of


class DeviceArray:
    """Owns the memory of `place`, which is given back to `device` when the array and all its views are gone."""

    def __init__(self, device: Device, place: Place) -> None:
        self.device, self.place = device, place
        self._free = weakref.finalize(self, device.free, place.region)
        # The process is about to end, and the driver may be gone.
        self._free.atexit = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> str:
        return self.place.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device.dlpack[0] != CUDA or self.place.dtype == "bfloat16":
            raise AttributeError("this array cannot be described by __cuda_array_interface__")
        return {
            "shape": self.place.shape, "typestr": np.dtype(self.place.dtype).str, "data": (self._address(), False),
            "version": 3, "strides": None, "stream": None,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """The work on the array is done, so `stream` need not wait. Raises DeviceError where a copy is asked for."""
        if copy or (dl_device is not None and tuple(dl_device) != self.device.dlpack):
            raise DeviceError("an array on a device is not copied by DLPack", next="use its numpy()")
        if self.place.dtype not in CODES:
            raise DeviceError("DLPack has no such type", got=self.place.dtype, next="use its numpy()")
        return capsule_of(self._address(), self.device.dlpack, self.place.dtype, self.place.shape, self)

    def numpy(self) -> Array:
        """A copy on the host."""
        self._address()
        self.device.activate()
        flat = read_back(self.device, self.place.region.part(0, self.place.nbytes))
        return flat.view(self.place.dtype).reshape(self.place.shape)

    def close(self) -> None:
        """The memory is free now; nobody may hold a view of it."""
        self._free()

    def _address(self) -> int:
        if not self._free.alive:
            raise DeviceError("an array is used after it was closed", at=self.place.region.label)
        return self.device.pointer(self.place.region)


def fetched(device: Device, value: Any) -> Array:
    """A copy on the host of somebody else's tensor in the memory of `device`, as its stream will have left it.

    Raises UsageError for a tensor that lies elsewhere.
    """
    kind = tuple(int(item) for item in value.__dlpack_device__())
    if kind[0] not in (CUDA, MANAGED) or (kind[0] == CUDA and kind != device.dlpack):
        raise UsageError("a tensor lies on another device", got=kind, want=device.dlpack, next="copy it there first")
    device.activate()
    stream = device.stream()
    try:
        # Whoever made the tensor lets our stream wait for the work on it; 1 is CUDA's default stream.
        with borrowed(value, stream=int(getattr(stream, "handle", 1))) as tensor:
            if not tensor.nbytes:
                return tensor.read(np.empty(0, np.uint8))
            region = Region("a tensor of the request", tensor.address, tensor.nbytes)
            return tensor.read(read_back(device, region, stream))
    finally:
        stream.close()


def read_back(device: Device, region: Region, stream: Any = None) -> Array:
    """A copy of the region's bytes, by way of pinned memory."""
    own = device.stream() if stream is None else stream
    try:
        buffer = device.pinned(region.nbytes, region.label)
        try:
            own.download(buffer, region)
            own.synchronise()
            return buffer.read("uint8", (region.nbytes,))
        finally:
            device.free_pinned(buffer)
    finally:
        if stream is None:
            own.close()
