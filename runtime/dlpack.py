"""DLPack by ctypes: tensors given to torch, CuPy and others without a copy, and theirs read.

Source    dlpack.h of DLPack 0.8 (DLManagedTensor); Python's data interchange protocol of the array API standard.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

HOST, CUDA, PINNED, MANAGED = 1, 2, 3, 13  # DLDeviceType
# DLDataTypeCode and bits of the types that ports may have.
CODES = {
    "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "float64": (2, 64), "int64": (0, 64),
    "int32": (0, 32), "int16": (0, 16), "int8": (0, 8), "uint8": (1, 8), "bool": (6, 8),
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in CODES.items()}

Array = np.ndarray[Any, np.dtype[Any]]


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
    # A prototype of our own: setting the types of `ctypes.pythonapi`'s functions would set them for everybody.
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _capsule_api("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_is_valid = _capsule_api("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer = _capsule_api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_rename = _capsule_api("PyCapsule_SetName", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_NAME, _USED = b"dltensor", b"used_dltensor"


def _let_go(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _end_capsule(capsule: int) -> None:
    # Whoever takes the tensor renames the capsule; a capsule that nobody took must let go itself.
    if _is_valid(capsule, _NAME):
        _exported.pop(_pointer(capsule, _NAME), None)


# Kept here: a callback that is collected would be called all the same.
_forget, _capsule_ends = _Deleter(_let_go), _Destructor(_end_capsule)


def capsule_of(pointer: int, kind: tuple[int, int], dtype: str, shape: tuple[int, ...], owner: object) -> Any:
    """A capsule of C-ordered memory on the device `kind`; `owner` lives until whoever took it lets go."""
    code, bits = CODES[dtype]
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(ctypes.c_void_p(pointer), *kind, len(sizes), code, bits, 1, sizes, None, 0)
    managed = _Managed(tensor, None, _forget)
    _exported[ctypes.addressof(managed)] = (managed, sizes, owner)
    return _new(ctypes.addressof(managed), _NAME, _capsule_ends)


@dataclass(frozen=True)
class Borrowed:
    """Somebody else's tensor: its elements lie in `nbytes` bytes from `address` on, `strides` bytes apart."""

    kind: tuple[int, int]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    nbytes: int

    def read(self, memory: Array) -> Array:
        """A copy of the tensor whose bytes are in `memory`; bfloat16, which numpy lacks, becomes float32."""
        wide = self.dtype == "bfloat16"
        stored = np.dtype("uint16" if wide else self.dtype)
        # An empty buffer is refused even for an empty array.
        buffer = memory if memory.size else np.zeros(stored.itemsize, np.uint8)
        values: Array = np.ndarray(self.shape, stored, buffer.data, 0, self.strides)
        return (values.astype(np.uint32) << 16).view(np.float32) if wide else values.copy()


@contextmanager
def borrowed(value: Any, **options: Any) -> Iterator[Borrowed]:
    """The tensor of an object with `__dlpack__`, which is called with `options`; it is let go of afterwards.

    Raises what the object raises, and ValueError for a tensor that cannot be described.
    """
    capsule = value.__dlpack__(**options)
    address = id(capsule)
    if not _is_valid(address, _NAME):
        raise ValueError("what __dlpack__ gives is no capsule that can be taken")
    managed = ctypes.cast(_pointer(address, _NAME), ctypes.POINTER(_Managed))
    _rename(address, _USED)
    try:
        yield _described(managed.contents.tensor)
    finally:
        if managed.contents.deleter:
            managed.contents.deleter(managed)


def host_view(tensor: Borrowed) -> Array:
    """The bytes of a tensor in host memory, not copied."""
    if not tensor.nbytes:
        return np.empty(0, np.uint8)
    raw: Any = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.address)
    return np.frombuffer(raw, np.uint8)


def _described(tensor: Any) -> Borrowed:
    known = _DTYPES.get((tensor.code, tensor.bits))
    if known is None or tensor.lanes != 1:
        raise ValueError(f"a tensor of DLPack's type {tensor.code} with {tensor.bits} bits")
    size, rank = CODES[known][1] // 8, tensor.rank
    shape = tuple(tensor.shape[axis] for axis in range(rank))
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(rank))
    if tensor.strides:
        steps = tuple(tensor.strides[axis] for axis in range(rank))
    if any(step < 0 for step in steps):
        raise ValueError("a tensor with negative strides")
    last = sum((count - 1) * step for count, step in zip(shape, steps, strict=True))
    nbytes = (last + 1) * size if math.prod(shape) else 0
    address = (tensor.data or 0) + tensor.byte_offset
    strides = tuple(step * size for step in steps)
    return Borrowed((tensor.device_type, tensor.device_id), known, shape, strides, address, nbytes)
