"""Exported programs (`.pt2`) read without running code that the archive carries.

`torch.export.load` falls back to full unpickling, loads compiled libraries and evaluates size expressions;
the checks here close these doors unless the caller trusts the file.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dcc.errors import LoadError
from dcc.frontend.checkpoints import DAMAGED, TRUST, require_file

CODE_MEMBERS = ("custom_obj_", "opaque_obj_", "/aotinductor/", "/executorch/")
# Size symbols, sympy's classes (upper case) and infinities; every builtin function is lower case.
SIZE_SYMBOL = re.compile(r"Symbol\('[suz]\d+'(, (positive|integer|nonnegative)=(True|False))*\)")
SIZE_NAME = re.compile(r"[suz]\d+|[A-Z]\w*|oo|int_oo|nan")
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_exported(path: Path, *, trust_pickle: bool = False) -> ExportedProgram:
    """The program in `path`."""
    require_file(path)
    try:
        if not trust_pickle:
            _refuse_code(path)
        with _tensors_only(not trust_pickle):
            return torch.export.load(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise LoadError(
            "the exported program carries pickled objects, which run code when they are read", at=path,
            got=refused.group(1) if refused else None, want="tensors and plain values only", next=TRUST,
        ) from error  # fmt: skip
    except DAMAGED as error:
        raise LoadError(
            "the file is damaged or not an exported program", at=path,
            got=f"{type(error).__name__}: {str(error)[:160].strip()}",
            next="write it with torch.export.save, by this torch version",
        ) from error  # fmt: skip


@contextmanager
def _tensors_only(active: bool) -> Iterator[None]:
    before = os.environ.get(FORCE)
    if active:
        os.environ[FORCE] = "1"
    try:
        yield
    finally:
        if active:
            os.environ.pop(FORCE)
            if before is not None:
                os.environ[FORCE] = before


def _refuse_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if any(part in f"/{member}" for part in CODE_MEMBERS):
                raise LoadError("the exported program carries code", at=path, got=member, next=TRUST)
            if member.endswith(".json"):
                for expression in _size_expressions(json.loads(archive.read(member))):
                    if not _is_size(expression):
                        raise LoadError(
                            "a size in the exported program is not a size",
                            at=path,
                            got=repr(expression[:80]),
                            next=TRUST,
                        )


def _size_expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr_str" and isinstance(item, str):
                yield item
            else:
                yield from _size_expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _size_expressions(item)


def _is_size(expression: str) -> bool:
    """Whether sympy would read it without calling anything but its own constructors."""
    expression = SIZE_SYMBOL.sub("s0", expression)
    if re.search(r"[^\w\s+\-*/(),.<>=&|~]|__|\.\D|[^\d]\.", expression):
        return False
    return all(SIZE_NAME.fullmatch(name) for name in re.findall(r"(?<![\w.])[A-Za-z_]\w*", expression))


def example_of(program: ExportedProgram) -> dict[str, Tensor]:
    """The program's own example inputs by the names in its signature; empty if it was saved without them."""
    if program.example_inputs is None:
        return {}
    names = program.graph_signature.user_inputs
    leaves = pytree.tree_leaves(program.example_inputs)
    if len(names) != len(leaves):
        return {}
    # An argument that is a constant has a leaf, and its value where others have a name.
    pairs = zip(names, leaves, strict=True)
    return {name: leaf for name, leaf in pairs if isinstance(name, str) and isinstance(leaf, Tensor)}


def argument_names(program: ExportedProgram) -> list[str]:
    return [name for name in program.graph_signature.user_inputs if isinstance(name, str)]


def output_shape(program: ExportedProgram) -> list[int | None]:
    """Sizes of the first output; None where a size is symbolic."""
    result = program.graph.output_node().args[0]
    first = result[0] if isinstance(result, (list, tuple)) else result
    value = getattr(first, "meta", {}).get("val")
    return [size if isinstance(size, int) else None for size in getattr(value, "shape", ())]
