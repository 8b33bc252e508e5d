"""Samples that stay on the device: an array that torch, CuPy and others take without a copy.

`torch.from_dlpack(array)` and `cupy.from_dlpack(array)` see the memory itself; so does whoever knows
`__cuda_array_interface__`. The memory is freed when nobody holds it any more. Work on it is done when the array exists.

Source    dlpack.h of DLPack 0.8 (DLManagedTensor); Python's data interchange protocol of the array API standard.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

from dcc.runtime.device import Array, Device, DeviceError, Place

HOST, CUDA = 1, 2  # DLDeviceType
_CODES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int64": (0, 64), "int32": (0, 32)}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    """DLManagedTensor; the deleter is called by whoever took the tensor, once."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# What an exported tensor needs until its deleter is called, by the address of its description.
_exported: dict[int, tuple[Any, ...]] = {}


def _capsule_api(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.pythonapi, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_new = _capsule_api("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_is_valid = _capsule_api("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer = _capsule_api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_NAME = b"dltensor"


def _let_go(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _end_capsule(capsule: int) -> None:
    # Whoever takes the tensor renames the capsule; a capsule that nobody took must let go itself.
    if _is_valid(capsule, _NAME):
        _exported.pop(_pointer(capsule, _NAME), None)


# Kept here: a callback that is collected would be called all the same.
_forget, _capsule_ends = _Deleter(_let_go), _Destructor(_end_capsule)


class DeviceArray:
    """Owns the memory of `place`, which is given back to `device` when the array and all its views are gone."""

    def __init__(self, device: Device, place: Place, kind: tuple[int, int] = (CUDA, 0)) -> None:
        self.device, self.place, self._kind = device, place, kind
        self._free = weakref.finalize(self, device.free, place.region)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> str:
        return self.place.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._kind[0] != CUDA or self.place.dtype == "bfloat16":
            raise AttributeError("this array cannot be described by __cuda_array_interface__")
        codes = {"float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4"}
        return {
            "shape": self.place.shape, "typestr": codes[self.place.dtype], "data": (self.place.region.address, False),
            "version": 3, "strides": None, "stream": None,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """The work on the array is done, so `stream` need not wait. Raises DeviceError where a copy is asked for."""
        if copy or (dl_device is not None and tuple(dl_device) != self._kind):
            raise DeviceError("an array on a device is not copied by DLPack", next="use its numpy()")
        code, bits = _CODES[self.place.dtype]
        sizes = (ctypes.c_int64 * len(self.place.shape))(*self.place.shape)
        address = ctypes.c_void_p(self.place.region.address)
        tensor = _Tensor(address, *self._kind, len(sizes), code, bits, 1, sizes, None, 0)
        managed = _Managed(tensor, None, _forget)
        _exported[ctypes.addressof(managed)] = (managed, sizes, self)
        return _new(ctypes.addressof(managed), _NAME, _capsule_ends)

    def numpy(self) -> Array:
        """A copy on the host."""
        stream = self.device.stream()
        buffer = self.device.pinned(self.place.nbytes, "array")
        try:
            stream.download(buffer, self.place.region.part(0, self.place.nbytes))
            stream.synchronise()
            return buffer.read(self.place.dtype, self.place.shape)
        finally:
            self.device.free_pinned(buffer)
            stream.close()

    def close(self) -> None:
        """The memory is free now; nobody may hold a view of it."""
        self._free()
