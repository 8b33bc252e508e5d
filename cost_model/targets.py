"""The targets that dcc compiles for: one data file each, with the source of every figure.

A target is named (`a100`), asked for by compute capability (`sm80`), detected (`local`) or read from a user's file.
Rates are dense: data sheets print those of sparse matrices, twice as high, first.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from dcc.cost_model.local_device import Device, local_device
from dcc.errors import UsageError

FOLDER = Path(__file__).resolve().parent / "targets"
LOCAL = "local"
BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
# ComputeCapability of tensorrt_rtx: engines for these are built without a GPU.
RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
# Bytes of an element, and the first compute capability whose tensor cores have the type.
DTYPES = {"float32": (4, 0), "float16": (2, 70), "bfloat16": (2, 80), "float8": (1, 89)}
SPELLINGS = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
    "fp8": "float8", "f8": "float8",
}  # fmt: skip
RATE = ("FLOP/s", "FLOP/s per processor")
# The units that a figure may have. Figures without a unit are texts, or counts.
UNITS: dict[str, tuple[str, ...]] = {
    "capability": ("",), "backends": ("",), "dtypes": ("",), "memory": ("bytes",), "bandwidth": ("bytes/s",),
    **{f"{dtype}_flops": RATE for dtype in (*DTYPES, "tensorfloat32")}, "int8_operations": ("OP/s",),
    "matrix_efficiency": ("of the dense rate",), "bandwidth_efficiency": ("of the bandwidth",),
    "operation_overhead": ("s",), "call_overhead": ("s",),
    "onnxruntime": ("",), "opset": ("",), "page": ("bytes",), "alignment": ("bytes",),
}  # fmt: skip
TEXTS = ("backends", "dtypes", "onnxruntime")
NEEDED = ("backends", "dtypes", "bandwidth", "operation_overhead", "call_overhead")
NEEDED_OF_GPUS = ("capability", "memory")
FIELDS = ("name", "summary", "figures")
OPTIONAL_FIELDS = ("aliases", "chip", "devices", "representative")
FIGURE_FIELDS = ("name", "value", "unit", "source")
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
CAPABILITY = re.compile(r"sm_?(\d{2,3})")
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One fact about a target, its unit, and where it comes from."""

    name: str
    value: int | float | str
    unit: str
    source: str


@dataclass(frozen=True)
class Target:
    """A kind of machine: its figures, by which its backends and dtypes are given as well.

    `devices` are the names that NVIDIA's driver gives it. A `representative` lends its figures to `sm80` and the like.
    """

    name: str
    summary: str
    figures: tuple[Figure, ...]
    chip: str = ""
    aliases: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    representative: bool = False

    def figure(self, name: str) -> Figure | None:
        """The figure of this name, None where the target has none."""
        return next((item for item in self.figures if item.name == name), None)

    def number(self, name: str) -> float | None:
        """The value of a figure that is a number, in its unit; None where the target has none."""
        found = self.figure(name)
        return None if found is None or isinstance(found.value, str) else float(found.value)

    @property
    def capability(self) -> int | None:
        """Compute capability, 80 for 8.0; None for what is no NVIDIA GPU."""
        value = self.number("capability")
        return None if value is None else int(value)

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the device's memory; None where it is that of the machine."""
        value = self.number("memory")
        return None if value is None else int(value)

    @property
    def backends(self) -> tuple[str, ...]:
        """What runs on the target, by preference; the first is what `dcc compile` builds for."""
        return self._listed("backends")

    @property
    def backend(self) -> str:
        return self.backends[0]

    @property
    def reason(self) -> str:
        """Why this backend, and what stands behind it."""
        found = self.figure("backends")
        return "" if found is None else found.source

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the target computes in, the default first."""
        return self._listed("dtypes")

    def to_json(self) -> dict[str, Any]:
        derived = {
            "backend": self.backend, "backends": list(self.backends), "reason": self.reason,
            "dtypes": list(self.dtypes), "capability": self.capability, "memory_bytes": self.memory_bytes,
        }  # fmt: skip
        return {**asdict(self), **derived}

    def _listed(self, name: str) -> tuple[str, ...]:
        found = self.figure(name)
        return () if found is None else tuple(item.strip() for item in str(found.value).split(","))


def list_targets() -> tuple[Target, ...]:
    """Every target that dcc knows: the processor, then GPUs by compute capability."""
    return _shipped()


def target_named(name: str) -> Target:
    """The target of this name or alias, of this capability (`sm80`), in this file (`.json`), or this machine's.

    Raises UsageError with the nearest names for one that does not exist, and for a file that is not valid.
    """
    asked = name.strip()
    if asked.endswith(".json") or os.sep in asked:
        return read_target(Path(asked))
    lowered = asked.lower()
    if lowered == LOCAL:
        return local_target()
    known = {spelling: target for target in _shipped() for spelling in (target.name, *target.aliases)}
    if lowered in known:
        return known[lowered]
    generic = {f"sm{target.capability}": target for target in _shipped() if target.representative}
    digits = CAPABILITY.fullmatch(lowered)
    if digits and f"sm{digits[1]}" in generic:
        return _of_capability(generic[f"sm{digits[1]}"])
    spellings = [*known, *generic, LOCAL]
    near = difflib.get_close_matches(lowered, list(generic) if digits else spellings, n=4, cutoff=0.5)
    raise UsageError(
        f"unknown target '{name}'", want=" or ".join(near) if near else ", ".join(spellings),
        next="dcc targets, or describe the machine in a JSON file like those of cost_model/targets",
    )  # fmt: skip


def compilable(name: str) -> Target:
    """The target of this name, if dcc lowers to one of its backends. Raises UsageError otherwise."""
    found = target_named(name)
    if "onnxruntime" not in found.backends:
        raise UsageError(
            f"dcc does not lower to the target '{found.name}' yet", got=", ".join(found.backends), want="cpu",
            next="--target cpu; dcc targets NAME says what is known of a target",
        )  # fmt: skip
    return found


def targets_named(names: str) -> tuple[Target, ...]:
    """The targets of a list like `a100,rtx4090,cpu`, in its order.

    Raises UsageError for an empty list, and for one target under two names.
    """
    asked = [name.strip() for name in names.split(",")]
    if not all(asked):
        raise UsageError("a target has no name", got=repr(names), want="names with commas between them, as a100,cpu")
    found: dict[str, str] = {}
    targets = []
    for name in asked:
        target = target_named(name)
        if target.name in found:
            both = f"{found[target.name]} and {name}" if found[target.name] != name else f"{name} twice"
            raise UsageError(f"the target '{target.name}' is asked for twice", got=both, next="give it once")
        found[target.name] = name
        targets.append(target)
    return tuple(targets)


def dtype_for(target: Target, asked: str | None = None) -> str:
    """The dtype that `asked` spells (`fp16`, `bfloat16`), or the target's default.

    Raises UsageError for one that the target lacks.
    """
    # The default of every GPU is float16. Turing's tensor cores have nothing else, one TensorRT-RTX engine serves all
    # its capabilities in one dtype, and weights are stored once for all targets of an artifact. It rounds eight times
    # finer than bfloat16, and what would overflow it (norms, softmax, modulation) is float32 in any case.
    if asked is None:
        return target.dtypes[0]
    found = SPELLINGS.get(asked.lower(), asked.lower())
    if found not in target.dtypes:
        what = "unknown dtype" if found not in DTYPES else f"the target '{target.name}' has no"
        raise UsageError(
            f"{what} {asked}", want=", ".join(target.dtypes), next="choose one of these, or leave it to the target"
        )
    return found


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype that targets compute in."""
    return DTYPES[dtype][0]


def local_target() -> Target:
    """The target that this machine is: its first GPU if NVIDIA's driver answers, else the processor.

    Raises UsageError for a GPU of a compute capability that dcc has no figures for.
    """
    device = local_device()
    if device is None:
        return next(target for target in _shipped() if target.name == "cpu")
    for target in _shipped():
        if device.name in target.devices:
            return target
    for target in _shipped():
        if target.representative and target.capability == device.capability:
            return _of_capability(target, device)
    raise UsageError(
        "no figures for this machine's GPU", got=f"{device.name}, compute capability {device.capability / 10:.1f}",
        want=", ".join(f"sm{target.capability}" for target in _shipped() if target.representative),
        next="--target cpu, or describe it in a JSON file like those of cost_model/targets",
    )  # fmt: skip


def this_machine() -> dict[str, Any]:
    """What can be told of the machine that this process runs on: processors it may use, memory in bytes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "usable_processors": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def read_target(path: Path) -> Target:
    """The target that a JSON file describes. Raises UsageError: which field, what was got, what is wanted."""
    try:
        if path.stat().st_size > MAX_BYTES:
            _refuse(path, "the file", f"more than {MAX_BYTES} bytes", "a target of a few figures")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError("the target's file cannot be read", at=path, got=reason, want="a JSON object") from error
    target = _checked(data, path)
    taken = {spelling for item in _shipped() for spelling in (item.name, *item.aliases)}
    # An artifact names its targets: one name has one meaning.
    if target.name in taken or target.name == LOCAL or CAPABILITY.fullmatch(target.name):
        _refuse(path, "name", target.name, "a name that dcc does not have")
    return target


@cache
def _shipped() -> tuple[Target, ...]:
    targets = [_checked(json.loads(path.read_text(encoding="utf-8")), path) for path in FOLDER.glob("*.json")]
    return tuple(sorted(targets, key=lambda target: (target.capability or 0, target.name)))


def _of_capability(card: Target, device: Device | None = None) -> Target:
    """Any card of this one's compute capability, with its figures; with the memory of the device where one is known."""
    text = f"{(card.capability or 0) / 10:.1f}"
    chip = f"any GPU of compute capability {text}" if device is None else device.name
    found = replace(
        card, name=f"sm{card.capability}", chip=chip, aliases=(), devices=(), representative=False,
        summary=f"{chip}, with the figures of {card.name}",
    )  # fmt: skip
    if device is None:
        return found
    memory = Figure("memory", device.memory_bytes, "bytes", f"this machine's driver, by {device.found_by}")
    return replace(found, figures=tuple(memory if item.name == "memory" else item for item in card.figures))


def _checked(data: object, path: Path) -> Target:
    """The target in `data`, every field of which is what it must be."""
    fields = _object(data, FIELDS, OPTIONAL_FIELDS, path, "the file")
    name = _text(fields["name"], path, "name")
    if not NAME.fullmatch(name):
        _refuse(path, "name", name, "lower-case letters, digits, dots and dashes")
    rows = fields["figures"]
    if not isinstance(rows, list):
        _refuse(path, "figures", type(rows).__name__, "a list of figures")
    figures = tuple(_figure(row, path, f"figures[{index}]") for index, row in enumerate(rows))
    names = [item.name for item in figures]
    for item in names:
        if names.count(item) > 1:
            _refuse(path, "figures", f"{item} twice", "each figure once")
    representative = fields.get("representative", False)
    if not isinstance(representative, bool):
        _refuse(path, "representative", representative, "true or false")
    summary = _text(fields["summary"], path, "summary")
    target = Target(
        name, summary, figures, _text(fields.get("chip", summary), path, "chip"),
        _texts(fields.get("aliases", []), path, "aliases"), _texts(fields.get("devices", []), path, "devices"),
        representative,
    )  # fmt: skip
    _check_together(target, path)
    return target


def _check_together(target: Target, path: Path) -> None:
    """What figures say of one another."""
    capability = target.capability
    gpu = capability is not None or target.backends != ("onnxruntime",)
    for name in (*NEEDED, *(NEEDED_OF_GPUS if gpu else ())):
        if target.figure(name) is None:
            _refuse(path, "figures", f"no {name}", f"the figure {name} in {' or '.join(UNITS[name]) or 'no unit'}")
    for backend in target.backends:
        if backend not in BACKENDS:
            _refuse(path, "backends", backend, ", ".join(BACKENDS))
        if (backend == "onnxruntime") is gpu:
            _refuse(path, "backends", backend, "onnxruntime without a capability, the others with one")
        if backend == "tensorrt-rtx" and capability not in RTX_CAPABILITIES:
            want = f"tensorrt: tensorrt-rtx builds for {', '.join(map(str, RTX_CAPABILITIES))}"
            _refuse(path, "backends", f"{backend} for capability {capability}", want)
    for dtype in target.dtypes:
        if dtype not in DTYPES:
            _refuse(path, "dtypes", dtype, ", ".join(DTYPES))
        if capability is not None and capability < DTYPES[dtype][1]:
            _refuse(path, "dtypes", f"{dtype} for capability {capability}", f"a capability from {DTYPES[dtype][1]}")
        if target.figure(f"{dtype}_flops") is None:
            _refuse(path, "figures", f"no {dtype}_flops", f"the dense rate of every dtype in {RATE[0]}")


def _figure(row: object, path: Path, at: str) -> Figure:
    fields = _object(row, FIGURE_FIELDS, (), path, at)
    name = _text(fields["name"], path, f"{at}.name")
    if name not in UNITS:
        near = difflib.get_close_matches(name, UNITS, n=3)
        _refuse(path, f"{at}.name", name, " or ".join(near) or ", ".join(UNITS))
    value, unit = fields["value"], fields["unit"]
    if unit not in UNITS[name]:
        _refuse(path, f"{at}.unit", f"{unit!r} for {name}", " or ".join(map(repr, UNITS[name])))
    if name in TEXTS:
        _text(value, path, f"{at}.value")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        _refuse(path, f"{at}.value", f"{value!r:.60} for {name}", "a number above 0")
    elif name.endswith("_efficiency") and value > 1:
        _refuse(path, f"{at}.value", f"{value} for {name}", "a share of at most 1")
    elif name == "capability" and (not isinstance(value, int) or not 50 <= value <= 999):
        _refuse(path, f"{at}.value", f"{value} for capability", "a whole number, 80 for compute capability 8.0")
    return Figure(name, value, unit, _text(fields["source"], path, f"{at}.source"))


def _object(
    value: object, needed: tuple[str, ...], optional: tuple[str, ...], path: Path, at: str
) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, at, type(value).__name__, f"an object of {', '.join(needed)}")
    for name in needed:
        if name not in value:
            _refuse(path, at, f"no {name}", f"all of {', '.join(needed)}")
    for name in value:
        if name not in (*needed, *optional):
            near = difflib.get_close_matches(name, (*needed, *optional), n=1)
            _refuse(path, at, f"an unknown field {name!r:.60}", near[0] if near else ", ".join((*needed, *optional)))
    return value


def _text(value: object, path: Path, at: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 1000 or not value.isprintable():
        _refuse(path, at, f"{value!r:.60}", "a printable text that is not empty")
    return value


def _texts(value: object, path: Path, at: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        _refuse(path, at, f"{value!r:.60}", "a list of texts")
    return tuple(_text(item, path, at) for item in value)


def _refuse(path: Path, field: str, got: object, want: object) -> NoReturn:
    raise UsageError(f"the target's file is not valid: {field}", at=path, got=got, want=want)
