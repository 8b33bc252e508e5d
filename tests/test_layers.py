"""Who may import whom, read from the files themselves; and the four links that put root folders into the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("cost_model", "exports", "passes", "runtime")
STDLIB = set(sys.stdlib_module_names)


def imports_of(text: str, package: str) -> Iterator[str]:
    """Absolute names of every module that the source imports, wherever in it; `package` resolves relative ones."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from dcc import runtime` imports dcc.runtime.
            whole = module not in ("dcc", "") and not node.level
            yield from (module if whole else f"{module}.{alias.name}" for alias in node.names)


def below(name: str, *allowed: str) -> bool:
    return any(name == item or name.startswith(f"{item}.") for item in allowed)


def standard(name: str) -> bool:
    return name.split(".")[0] in STDLIB


def runtime_may(file: str, name: str) -> bool:
    if below(name, "onnxruntime"):
        return file == "onnxruntime_backend.py"
    return standard(name) or below(name, "dcc.runtime", "dcc.errors", "numpy")


def ir_may(file: str, name: str) -> bool:
    return standard(name) or below(name, "dcc.ir", "dcc.errors", "torch", "networkx", "numpy")


def passes_may(file: str, name: str) -> bool:
    if below(name, "dcc.passes"):
        return file == "__init__.py"
    return standard(name) or below(name, "dcc.ir", "dcc.errors", "torch", "networkx", "numpy")


def cost_model_may(file: str, name: str) -> bool:
    return standard(name) or below(name, "dcc.cost_model", "dcc.ir", "dcc.errors", "torch", "numpy")


RUNTIME_TYPES = (
    "artifact", "plan", "container", "manifest", "plan_rules", "plan_reader", "strict_json", "sampler", "loop_spec",
    "builder_callbacks", "engine_cache", "network_record", "tensorrt_builder",
)  # fmt: skip


def exports_may(file: str, name: str) -> bool:
    types = [f"dcc.runtime.{module}" for module in RUNTIME_TYPES]
    return standard(name) or below(
        name, "dcc.exports", "dcc.ir", "dcc.errors", *types, "torch", "numpy", "onnx", "onnxscript", "onnx_ir"
    )


def search_may(file: str, name: str) -> bool:
    """Everything but what is above it."""
    return not below(name, "dcc.commands", "dcc.cli", "dcc.driver", "dcc.compile", "typer", "rich")


CONTRACTS: dict[str, tuple[Path, Callable[[str, str], bool]]] = {
    "dcc.runtime": (ROOT / "runtime", runtime_may),
    "dcc.ir": (ROOT / "dcc/ir", ir_may),
    "dcc.passes": (ROOT / "passes", passes_may),
    "dcc.cost_model": (ROOT / "cost_model", cost_model_may),
    "dcc.exports": (ROOT / "exports", exports_may),
    "dcc.search": (ROOT / "dcc/search", search_may),
}


def violations(package: str, files: dict[str, str]) -> list[str]:
    allowed = CONTRACTS[package][1]
    return [
        f"{package}: {file} imports {name}"
        for file, text in sorted(files.items())
        for name in imports_of(text, package)
        if not allowed(Path(file).name, name)
    ]


def sources(package: str) -> dict[str, str]:
    folder = CONTRACTS[package][0]
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


@pytest.mark.parametrize("package", CONTRACTS)
def test_imports_keep_the_layers(package: str) -> None:
    assert sources(package)
    assert violations(package, sources(package)) == []


PLANTED = [
    ("dcc.runtime", "loaded.py", "import torch"),
    ("dcc.runtime", "loaded.py", "import onnxruntime"),
    ("dcc.runtime", "noise.py", "from dcc.ir.graph import is_tensor"),
    ("dcc.runtime", "noise.py", "def f():\n    import onnx"),
    ("dcc.runtime", "noise.py", "from dcc import driver"),
    ("dcc.runtime", "noise.py", "from ..ir import graph"),
    ("dcc.ir", "graph.py", "from dcc.passes import EXACT"),
    ("dcc.passes", "cut_stages.py", "from dcc.passes.hoist_scopes import is_port"),
    ("dcc.passes", "cut_stages.py", "from . import hoist_scopes"),
    ("dcc.passes", "cut_stages.py", "import onnxruntime"),
    ("dcc.cost_model", "roofline.py", "from dcc.exports.lower import lower"),
    ("dcc.exports", "lower.py", "from dcc.runtime.loaded import load"),
    ("dcc.exports", "lower.py", "from dcc.passes import EXACT"),
    ("dcc.exports", "lower.py", "import onnxruntime"),
    ("dcc.passes", "fora.py", "from dcc.passes.taylorseer import TaylorSeer"),
    ("dcc.passes", "fora.py", "from dcc.search.laboratory import Laboratory"),
    ("dcc.search", "study.py", "from dcc import compile"),
    ("dcc.search", "study.py", "from dcc.commands.terminal import say"),
]


@pytest.mark.parametrize(("package", "file", "line"), PLANTED)
def test_a_planted_violation_is_found(package: str, file: str, line: str) -> None:
    assert violations(package, {file: line}) != []


def test_allowed_imports_are_no_violations() -> None:
    text = "from __future__ import annotations\nimport json\nimport numpy as np\nfrom dcc.errors import DccError\n"
    for package in CONTRACTS:
        assert violations(package, {"some.py": text}) == []
    assert violations("dcc.runtime", {"onnxruntime_backend.py": "import onnxruntime as ort"}) == []
    assert violations("dcc.passes", {"__init__.py": "from dcc.passes.cut_stages import CutStages"}) == []


def test_the_package_root_is_light() -> None:
    """Only under TYPE_CHECKING, or inside a function, may `dcc/__init__.py` import more than the standard library."""
    tree = ast.parse((ROOT / "dcc/__init__.py").read_text())
    plain = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert all(standard(name) for name in imports_of(ast.unparse(plain), "dcc"))


def test_importing_the_passes_is_cheap() -> None:
    """They need torch, and nothing else that takes long."""
    script = (
        "import sys; import dcc.passes\n"
        "heavy = {'onnx', 'onnxruntime', 'diffusers', 'pymoo', 'matplotlib', 'ray', 'dcc.search', 'dcc.exports'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert len({step.name for step in dcc.passes.SCHEDULES}) == len(dcc.passes.SCHEDULES) == 10\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LINKED)
def test_the_link_is_relative_and_resolves(name: str) -> None:
    link = ROOT / "dcc" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_package_refuses_its_bare_name(name: str) -> None:
    """A second copy of every class would make `isinstance` lie."""
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"ImportError: import this package as dcc.{name}" in result.stderr


def test_verbs_stay_functions_whatever_was_imported() -> None:
    """A module of the verb's name would take its place as soon as anything imported it."""
    code = (
        "import pkgutil, importlib, dcc; "
        "[importlib.import_module(item.name) for item in pkgutil.iter_modules(dcc.__path__, 'dcc.')]; "
        "assert all(callable(getattr(dcc, name)) for name in dcc.__all__ if name != '__version__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
