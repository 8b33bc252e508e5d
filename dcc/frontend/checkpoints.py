"""Weight files read into one `Checkpoint`, without running code that they carry and without the network.

A `.pt` is read with `weights_only=True`; a pickled module only where the caller trusts it. Tensors stay
mapped to the file where the format allows it, so that reading costs no second copy of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import LoadError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
NESTED_STATE = ("ema", "state_dict", "model", "module")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
TRUST = (
    "if you trust the file's author: --trust-pickle (Python: trust_pickle=True); else save its state_dict()"
)
# What torch's readers raise on damaged bytes; they have no exception of their own.
DAMAGED = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError,
    ImportError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError, OverflowError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and what the file says about the architecture and the sampler."""

    state: dict[str, Tensor]
    arch: str | None = None
    config: dict[str, Any] | None = None
    sampler: dict[str, Any] | None = None
    files: tuple[Path, ...] = field(default=())


def require_file(path: Path) -> None:
    """Raise LoadError unless `path` is a file with something in it that may be read."""
    if not path.exists():
        raise LoadError("no such file or folder", at=path, next="check the path")
    if not path.is_file():
        raise LoadError("not a regular file", at=path, next="give the weight file or a diffusers folder")
    try:
        with path.open("rb") as stream:
            first = stream.read(1)
    except OSError as error:
        raise LoadError(
            "the file cannot be read", at=path, got=error.strerror, next="check its permissions"
        ) from error
    if not first:
        raise LoadError("the file is empty", at=path, next="copy or download it again")


def fingerprint(files: Iterable[Path]) -> str:
    """The sha256 of one file, or of the names and hashes of several, in the order of their names."""
    digests = []
    for path in sorted(files):
        with path.open("rb") as stream:
            digests.append((path.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError("not valid JSON", at=path, got=error, next="copy or download it again") from error
    if not isinstance(value, dict):
        raise LoadError(
            "the JSON must be an object", at=path, got=type(value).__name__, next="check the file"
        )
    return value


def read_torch(path: Path, *, trust_pickle: bool = False) -> Checkpoint | nn.Module:
    """The state dict in a torch file, or the pickled module where `trust_pickle` allows it."""
    require_file(path)
    payload = _unpickle(path, trust_pickle)
    module = _module_in(payload)
    if module is not None:
        return module
    if not isinstance(payload, Mapping):
        raise LoadError(
            "the file holds no state dict", at=path, got=type(payload).__name__,
            want="a mapping of names to tensors, alone or under " + ", ".join(NESTED_STATE),
            next="save {'arch': ..., 'config': ..., 'state_dict': model.state_dict()}",
        )  # fmt: skip
    arch, config, sampler = split_config(payload, path)
    return Checkpoint(_state_in(payload, path), arch, config, sampler, (path,))


def _unpickle(path: Path, trust_pickle: bool) -> Any:
    # Only torch's zip format can be mapped; older files are read whole.
    mapped = zipfile.is_zipfile(path)
    try:
        # DiT's training script stores its command line, a Namespace: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=mapped)
    except DAMAGED as error:
        raise _unreadable(path, error, zipped=mapped, trust_pickle=trust_pickle) from error


def _unreadable(path: Path, error: Exception, *, zipped: bool, trust_pickle: bool) -> LoadError:
    message = str(error)
    if "TorchScript" in message:
        return LoadError(
            "a TorchScript archive cannot be compiled", at=path,
            next="save the model's state_dict(), or an exported program (.pt2)",
        )  # fmt: skip
    refused = re.search(r"GLOBAL ([\w.]+)", message)
    if not trust_pickle and isinstance(error, pickle.UnpicklingError) and (refused or zipped):
        return LoadError(
            "the file holds pickled Python objects, which run code when they are read", at=path,
            got=refused.group(1) if refused else message.splitlines()[0][:200],
            want="tensors and plain values only", next=TRUST,
        )  # fmt: skip
    if isinstance(error, (ImportError, AttributeError)) and trust_pickle:
        return LoadError(
            "the pickled module's class cannot be imported", at=path,
            got=f"{type(error).__name__}: {message}", next="run where its package is importable",
        )  # fmt: skip
    return LoadError(
        "the file is damaged or not a torch file", at=path,
        got=f"{type(error).__name__}: {message[:160].strip()}", next="copy or download it again",
    )  # fmt: skip


def _module_in(payload: Any) -> nn.Module | None:
    candidates = [payload]
    if isinstance(payload, Mapping):
        candidates += [payload.get(key) for key in NESTED_STATE]
    return next((item for item in candidates if isinstance(item, nn.Module)), None)


def _state_in(payload: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    while True:
        tensors = {
            key: value for key, value in payload.items() if isinstance(key, str) and isinstance(value, Tensor)
        }
        if tensors:
            return _without_wrapper(tensors)
        keys = [str(key) for key in payload]
        nested = [
            payload[key] for key in NESTED_STATE if isinstance(payload.get(key), Mapping) and payload[key]
        ]
        if not nested:
            raise LoadError(
                "the file holds no state dict", at=path, got="keys " + (", ".join(keys[:8]) or "none"),
                want="names to tensors, alone or under " + ", ".join(NESTED_STATE),
                next="save {'arch': ..., 'config': ..., 'state_dict': model.state_dict()}",
            )  # fmt: skip
        payload = nested[0]


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel and torch.compile put before every name."""
    for prefix in WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _without_wrapper({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def split_config(
    values: Mapping[Any, Any], path: Path
) -> tuple[str | None, dict[str, Any] | None, dict[str, Any] | None]:
    """The entries `arch`, `config` and `sampler`, checked; a diffusers config is its own `config`."""
    if isinstance(values.get("_class_name"), str):
        return values["_class_name"], dict(values), None
    arch = values.get("arch")
    if arch is not None and not isinstance(arch, str):
        raise LoadError("'arch' must be a name", at=path, got=repr(arch)[:80], next="--arch NAME")
    tables = []
    for key in ("config", "sampler"):
        value = values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise LoadError(
                f"'{key}' must be a mapping", at=path, got=type(value).__name__, next="save it as a dict"
            )
        tables.append(None if value is None else dict(value))
    return arch, tables[0], tables[1]


def read_safetensors(path: Path) -> Checkpoint:
    """The tensors of one file; the config is the sibling config.json or the metadata entry of that name."""
    state, metadata = read_tensors(path)
    arch, config, sampler = _described(path, metadata)
    return Checkpoint(_without_wrapper(state), arch, config, sampler, (path,))


def read_sharded(index: Path) -> Checkpoint:
    """The tensors that an index names, from the files beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(
            "the index has no weight_map", at=index, next="give the index that was saved with the shards"
        )
    shards = sorted({str(name) for name in weight_map.values()})
    foreign = [name for name in shards if Path(name).name != name]
    if foreign:
        raise LoadError(
            "the index names files outside its folder", at=index, got=foreign[0], next="check the index"
        )
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise LoadError(
            f"{len(missing)} of {len(shards)} shards are missing", at=index, got=", ".join(missing[:5]),
            next="download them into the same folder",
        )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= read_tensors(index.parent / name)[0]
    arch, config, sampler = _described(index, {})
    files = (index, *(index.parent / name for name in shards))
    return Checkpoint(_without_wrapper(state), arch, config, sampler, files)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
            return state, dict(stream.metadata() or {})
    except (SafetensorError, *DAMAGED) as error:
        raise LoadError(
            "the file is damaged or not a safetensors file", at=path, got=str(error)[:160],
            next="copy or download it again",
        ) from error  # fmt: skip


def _described(
    path: Path, metadata: Mapping[str, str]
) -> tuple[str | None, dict[str, Any] | None, dict[str, Any] | None]:
    sibling = path.with_name("config.json")
    if sibling.is_file():
        values = read_json(sibling)
        # A file with the fields alone is as good as {"config": fields}.
        return split_config(
            values if {"_class_name", "config", "arch"} & set(values) else {"config": values}, sibling
        )
    entries: dict[str, Any] = {key: metadata[key] for key in ("arch",) if key in metadata}
    for key in ("config", "sampler"):
        if key in metadata:
            try:
                entries[key] = json.loads(metadata[key])
            except ValueError as error:
                raise LoadError(
                    f"metadata '{key}' is not JSON", at=path, got=error, next="write it with json"
                ) from error
    nested = entries.get("config")
    if isinstance(nested, dict) and "_class_name" in nested:
        return nested["_class_name"], nested, entries.get("sampler")
    return split_config(entries, path)


def read_folder(folder: Path) -> Checkpoint:
    """The weights of a diffusers transformer folder: one file, an index with shards, or an older `.bin`."""
    stem = "diffusion_pytorch_model"
    for name, read in ((f"{stem}.safetensors", read_safetensors), (f"{stem}{INDEX_SUFFIX}", read_sharded)):
        if (folder / name).is_file():
            return read(folder / name)
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(found) != 1:
        raise LoadError(
            "the folder does not say which weight file to read", at=folder,
            got=", ".join(path.name for path in found[:5]) or "no *.safetensors", want=f"{stem}.safetensors",
            next="give the weight file itself; a sibling config.json is read with it",
        )  # fmt: skip
    if found[0].suffix == ".safetensors":
        return read_safetensors(found[0])
    checkpoint = read_torch(found[0])
    assert isinstance(checkpoint, Checkpoint)  # a module would have needed trust_pickle
    arch, config, sampler = split_config(read_json(folder / "config.json"), folder)
    return Checkpoint(checkpoint.state, arch, config, sampler, checkpoint.files)
