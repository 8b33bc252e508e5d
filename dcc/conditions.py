"""Values for an artifact's conditions, one row an image; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcc.errors import UsageError
from dcc.runtime.loading import CompiledDenoiser
from dcc.runtime.plan import InputSpec

Array = np.ndarray[Any, np.dtype[Any]]


def has_rows(item: InputSpec) -> bool:
    return item.shape[:1] == ("B",)


def class_conditions(artifact: CompiledDenoiser) -> list[InputSpec]:
    """The conditions that are one integer an image."""
    return [item for item in artifact.conditions if item.shape == ("B",) and "int" in item.dtype]


def classes_of(item: InputSpec) -> list[int] | None:
    """Every class that can be asked for, without the null class; None where the range is not known."""
    if item.minimum is None or item.maximum is None:
        return None
    return [value for value in range(item.minimum, item.maximum + 1) if value != item.null]


def with_classes(artifact: CompiledDenoiser, given: Mapping[str, Any], classes: Sequence[int]) -> dict[str, Any]:
    """`given` and a value for the class condition: `classes`, or every class in turn where none are named."""
    values = dict(given)
    known = [item for item in class_conditions(artifact) if item.name not in given]
    if classes and len(known) != 1:
        raise UsageError(
            "--class needs exactly one integer condition", got=", ".join(item.name for item in known) or "none",
            want=_listed(artifact), next="--condition NAME=VALUE",
        )  # fmt: skip
    for item in known:
        everything = classes_of(item)
        if classes:
            _check_range(item, classes)
            values[item.name] = list(classes)
        elif everything is not None:
            values[item.name] = everything
    missing = [item.name for item in artifact.conditions if item.name not in values]
    if missing:
        raise UsageError(
            f"condition '{missing[0]}' is missing", want=_listed(artifact),
            next=f"--condition {missing[0]}=file.npy (or JSON)",
        )  # fmt: skip
    return values


def rows_for(artifact: CompiledDenoiser, values: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Each condition with `images` rows: what is given is repeated in turn. Others pass as they are."""
    specs = {item.name: item for item in artifact.conditions}
    rows: dict[str, Any] = {}
    for name, value in values.items():
        item = specs.get(name)
        array = np.asarray(value)
        if item is not None and has_rows(item):
            array = array[None] if array.ndim == len(item.shape) - 1 else array
            if array.ndim != len(item.shape) or not len(array):
                raise UsageError(
                    f"'{name}' has the wrong shape", got=array.shape, want=f"one row or more of {item.shape}"
                )
            array = array[np.arange(images) % len(array)]
        rows[name] = array
    return rows


def part_of(artifact: CompiledDenoiser, rows: Mapping[str, Any], index: Array) -> dict[str, Any]:
    """The rows at `index` of every condition that has rows."""
    batched = {item.name for item in artifact.conditions if has_rows(item)}
    return {name: value[index] if name in batched else value for name, value in rows.items()}


def without_null(artifact: CompiledDenoiser) -> set[str]:
    """Conditions for which a guided request must say what the other half is."""
    return {item.name for item in artifact.conditions if item.null is None and has_rows(item)}


def negatives_for(artifact: CompiledDenoiser, images: int) -> dict[str, Any]:
    """The other half of guidance, one row an image: the null where there is one, else zeros."""
    return {
        item.name: np.full((images, *map(int, item.shape[1:])), item.null or 0, item.dtype)
        for item in artifact.conditions
        if has_rows(item)
    }


def _check_range(item: InputSpec, classes: Sequence[int]) -> None:
    """Before the first batch: a wrong class may only come up in the last."""
    null = "" if item.null is None else f" ({item.null:g} is the null class)"
    for value in classes:
        if (item.minimum is not None and value < item.minimum) or (item.maximum is not None and value > item.maximum):
            raise UsageError(
                f"class {value} is out of range", at=f"condition '{item.name}'", got=value,
                want=f"{item.minimum} to {item.maximum}{null}",
                next="--class with one of these; dcc inspect shows the conditions",
            )  # fmt: skip


def _listed(artifact: CompiledDenoiser) -> str:
    texts = (f"{item.name} {item.dtype}[{','.join(map(str, item.shape))}]" for item in artifact.conditions)
    return ", ".join(texts) or "no conditions"
