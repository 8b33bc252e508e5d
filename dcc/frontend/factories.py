"""`package.module:factory` called, and what it returns taken apart."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from dcc.errors import LoadError

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
RETURNS = "a module, (module, example_inputs), or a mapping with 'module' and LoadedModel's fields"


def is_factory(source: str) -> bool:
    """Whether the text is spelt as a factory and is not a path that exists."""
    return FACTORY.fullmatch(source) is not None and not Path(source).exists()


def call_factory(source: str) -> dict[str, Any]:
    """What the factory returned, by LoadedModel's field names; `module` is always there.

    The current directory is importable while it runs. Raises LoadError, with the original error as its cause.
    """
    module_name, _, path = source.partition(":")
    with _current_directory_importable():
        try:
            value: Any = importlib.import_module(module_name)
        except Exception as error:
            raise _import_failure(source, module_name, error) from error
        for attribute in path.split("."):
            if not hasattr(value, attribute):
                raise LoadError(
                    f"'{module_name}' has no '{path}'", at=source, next="check the factory's name"
                )
            value = getattr(value, attribute)
        if not callable(value):
            raise LoadError(
                "the factory is not callable", at=source, got=type(value).__name__, next="give a function"
            )
        try:
            returned = value()
        except Exception as error:
            raise LoadError(
                "the factory failed", at=source, got=f"{type(error).__name__}: {error}",
                want="a function without required arguments",
                next="run it in Python to see the whole traceback",
            ) from error  # fmt: skip
    return _fields_of(returned, source)


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
        # A file written since the last import would otherwise be invisible.
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _import_failure(source: str, module_name: str, error: Exception) -> LoadError:
    own = isinstance(error, ModuleNotFoundError) and error.name is not None
    if own and (module_name == error.name or module_name.startswith(f"{error.name}.")):  # type: ignore[attr-defined]
        return LoadError(
            f"no module named '{module_name}'", at=source,
            want="a module on sys.path or in the current directory",
            next="run from its folder, or install its package",
        )  # fmt: skip
    return LoadError(
        f"importing '{module_name}' failed", at=source, got=f"{type(error).__name__}: {error}",
        next=f"make `python -c 'import {module_name}'` work",
    )  # fmt: skip


def _fields_of(returned: Any, source: str) -> dict[str, Any]:
    if isinstance(returned, (nn.Module, ExportedProgram)):
        return {"module": returned}
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        module, example_inputs = returned
        values: dict[str, Any] = {"module": module, "example_inputs": example_inputs}
    elif is_dataclass(returned) and not isinstance(returned, type):
        values = {item.name: getattr(returned, item.name) for item in fields(returned)}
    elif isinstance(returned, Mapping):
        values = dict(returned)
    else:
        values = {}
    if not isinstance(values.get("module"), (nn.Module, ExportedProgram)):
        raise LoadError(
            "the factory returned no module", at=source, got=type(returned).__name__, want=RETURNS,
            next="return one of these",
        )  # fmt: skip
    return values
