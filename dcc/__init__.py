"""dcc: a compiler and minimal runtime for Diffusion Transformers.

This module stays light on purpose: `import dcc.runtime` passes through it and must not pull torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "compile", "search"]

if TYPE_CHECKING:
    from dcc.build_layers import build
    from dcc.driver import compile
    from dcc.search import search


def __getattr__(name: str) -> Any:
    if name == "build":
        from dcc.build_layers import build

        return build
    if name == "compile":
        from dcc.driver import compile

        return compile
    if name == "search":
        from dcc.search import search

        return search
    raise AttributeError(f"module 'dcc' has no attribute {name!r}")
