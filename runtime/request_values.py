"""Values of a request as numpy arrays, whoever they belong to: numpy, torch, CuPy, or any tensor that knows DLPack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dcc.errors import DccError, UsageError
from dcc.runtime.dlpack import HOST, PINNED, borrowed, host_view

Array = np.ndarray[Any, np.dtype[Any]]
# Gives a copy of a tensor that lies on a device.
Fetch = Callable[[Any], Array]


def no_device(value: Any) -> Array:
    """The `Fetch` of whoever has no device."""
    kind = tuple(int(item) for item in value.__dlpack_device__())
    raise UsageError(
        "a tensor lies on a device, and the artifact runs on the processor", got=f"DLPack device {kind}",
        next="give its .cpu()",
    )  # fmt: skip


def array_of(name: str, value: Any, fetch: Fetch = no_device) -> Array:
    """The value as an array on the host; bfloat16, which numpy lacks, becomes float32.

    Raises UsageError that names what was given where it cannot be read.
    """
    try:
        # numpy's own arrays need no protocol; it has none for what is read-only.
        if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "__dlpack__"):
            return np.asarray(value)
        if int(value.__dlpack_device__()[0]) not in (HOST, PINNED):
            return fetch(value)
        with borrowed(value) as tensor:
            return tensor.read(host_view(tensor))
    except UsageError as error:
        raise UsageError(error.what, at=f"'{name}'", **error.details) from error
    except DccError:
        raise
    except Exception as error:  # whatever the tensor's owner raises: BufferError, RuntimeError, TypeError ...
        got = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"'{name}' cannot be read", got=got, want="numbers, an array, or a tensor that knows DLPack"
        ) from error


def arrays_of(values: Mapping[str, Any], fetch: Fetch = no_device) -> dict[str, Array]:
    """`array_of` every value. Raises UsageError where they have no names."""
    if not isinstance(values, Mapping):
        raise UsageError("inputs are given by name", got=type(values).__name__, want="{'name': value, ...}")
    return {str(name): array_of(str(name), value, fetch) for name, value in values.items()}
