"""Caching schedules: the search over them, its front, and what is written about it.

`dcc.search` is this package and, called, its search: `dcc.search(model, output="front", budget=200)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcc.search.study import search

__all__ = ["search"]


def __getattr__(name: str) -> Any:
    if name == "search":
        from dcc.search.study import search

        return search
    raise AttributeError(f"module 'dcc.search' has no attribute {name!r}")


class _Callable(ModuleType):
    """The package under its own name is the verb as well: `dcc.search(...)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from dcc.search.study import search

        return search(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
