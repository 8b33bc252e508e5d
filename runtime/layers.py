"""Layers of an artifact: engines for one backend, dtype and kind of device, beside the portable ones.

The portable layer (ONNX models and their weights) is always there, and every other layer can be made again from it.
`graphs` are the same engines strongly typed, their weights still those of the artifact, and the update engines of the
loop (`loop_spec.py`); `engines` are what a library built from them ahead of time. A layer without engines is built
where it is loaded first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from dcc.errors import ArtifactError
from dcc.runtime.strict_json import shown

BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
DTYPES = ("float32", "float16", "bfloat16")
LAYER_LIMIT = 64
TEXT_LIMIT = 200
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,79}")
_UPDATE = re.compile(r"update_[a-z]{1,20}_[0-9a-f]{12}")


@dataclass(frozen=True)
class Layer:
    """`name` is its folder in the artifact; `version` and `device` say what built its engines, and for which GPU.

    `graphs` and `engines` map names of the plan's engines and of update engines to members. `records` is the member
    that holds every network as it was handed to the builder; `summary` is for people. `targets` are the names that were
    asked for.
    """

    name: str
    backend: str
    dtype: str
    capabilities: tuple[int, ...]
    targets: tuple[str, ...]
    version: str
    device: str
    graphs: dict[str, str]
    engines: dict[str, str]
    records: str
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"capabilities": list(self.capabilities), "targets": list(self.targets)}

    def members(self) -> tuple[str, ...]:
        """All members that belong to this layer."""
        return (*self.graphs.values(), *self.engines.values(), *([self.records] if self.records else []))


def holds_engines(layer: Layer, device: str, capability: int) -> bool:
    """Whether the layer has engines that were built for a GPU of this name and compute capability."""
    mine = layer.device == device if layer.device else capability in layer.capabilities
    return bool(layer.engines) and mine


def layers_from_json(value: object, engines: Mapping[str, Any], members: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers, whose every name is an engine of the plan or a member. Raises ArtifactError, and nothing else."""
    if not isinstance(value, list) or len(value) > LAYER_LIMIT:
        _refuse("layers", value, f"a list of at most {LAYER_LIMIT} layers")
    found = tuple(_layer(item, f"layers[{index}]", engines, members) for index, item in enumerate(value))
    names = [layer.name for layer in found]
    if len(set(names)) < len(names):
        _refuse("layers", ", ".join(names), "each name once")
    return found


def _layer(value: object, at: str, engines: Mapping[str, Any], members: Mapping[str, Any]) -> Layer:
    names = {field.name for field in fields(Layer)}
    if not isinstance(value, dict) or value.keys() != names:
        got = sorted(map(str, value.keys() ^ names))[:8] if isinstance(value, dict) else value
        _refuse(at, got, f"exactly the fields {', '.join(sorted(names))}")
    if not isinstance(value["name"], str) or not _NAME.fullmatch(value["name"]):
        _refuse(f"{at}.name", value["name"], "lower-case letters, digits, dots and dashes")
    for key, known in (("backend", BACKENDS), ("dtype", DTYPES)):
        if value[key] not in known:
            _refuse(f"{at}.{key}", value[key], ", ".join(known))
    for key in ("version", "device"):
        _text(value[key], f"{at}.{key}")
    for key in ("capabilities", "targets"):
        if not isinstance(value[key], list) or len(value[key]) > LAYER_LIMIT:
            _refuse(f"{at}.{key}", value[key], "a list")
    for target in value["targets"]:
        _text(target, f"{at}.targets")
    for capability in value["capabilities"]:
        if type(capability) is not int or not 10 <= capability <= 999:
            _refuse(f"{at}.capabilities", capability, "compute capabilities such as 80")
    for key in ("graphs", "engines"):
        _members(value[key], f"{at}.{key}", engines, members)
    if value["engines"] and value["engines"].keys() != value["graphs"].keys():
        _refuse(f"{at}.engines", sorted(value["engines"].keys() ^ value["graphs"].keys())[:8], "one for every graph")
    if value["records"] and (not isinstance(value["records"], str) or value["records"] not in members):
        _refuse(f"{at}.records", value["records"], "a member of the artifact, or nothing")
    if not isinstance(value["summary"], dict):
        _refuse(f"{at}.summary", value["summary"], "an object")
    values = value | {"capabilities": tuple(value["capabilities"]), "targets": tuple(value["targets"])}
    return Layer(**values | {"records": value["records"] or ""})


def _members(value: object, at: str, engines: Mapping[str, Any], members: Mapping[str, Any]) -> None:
    """All engines of the plan have a member, or none has."""
    if not isinstance(value, dict):
        _refuse(at, value, "an object of members by engine")
    wrong = [name for name in value.keys() - engines.keys() if not _UPDATE.fullmatch(name)]
    if value and (wrong or engines.keys() - value.keys()):
        got = sorted([*wrong, *(engines.keys() - value.keys())])[:8]
        _refuse(at, got, "every engine of the plan, or none, and update engines")
    for engine, member in value.items():
        if not isinstance(member, str) or member not in members:
            _refuse(f"{at}.{shown(engine)}", member, "a member of the artifact")


def _text(value: object, at: str) -> None:
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or (value and not value.isprintable()):
        _refuse(at, value, f"at most {TEXT_LIMIT} printable characters")


def _refuse(at: str, got: object, want: object) -> NoReturn:
    raise ArtifactError(
        "the manifest has a layer that cannot be read", at=f"manifest.json, {at}", got=shown(got, 200), want=want,
        next="copy the artifact again, or compile the model again",
    )  # fmt: skip
