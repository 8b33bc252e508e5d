"""A plan out of untrusted JSON values: every field present, of its declared type and of bounded size.

The dataclasses of `plan.py` are the grammar; this module reads their annotations. What the values mean
together is checked by `plan_rules.py`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from dcc.errors import ArtifactError
from dcc.runtime.plan import REF_KINDS, Plan, Ref
from dcc.runtime.strict_json import INTEGER_LIMIT, shown

LIST_LIMIT = 100_000
TEXT_LIMIT = 512

Reader = Callable[[object, str], Any]


def decode_plan(value: object) -> Plan:
    """The plan that these JSON values spell; types and sizes are checked, meaning is not."""
    plan: Plan = _reader(Plan)(value, "plan")
    return plan


@cache
def _reader(kind: Any) -> Reader:
    """The function that reads values of this annotation; its second argument names the place in errors."""
    if kind is Ref:
        return _read_ref
    if is_dataclass(kind):
        return _record_reader(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _list_reader(arguments)
    if origin is dict:
        return _object_reader(_reader(arguments[1]))
    if origin is types.UnionType:
        return _union_reader(arguments)
    return _SCALARS[kind]


def _record_reader(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}

    def read(value: object, at: str) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            got = sorted(map(str, value.keys() ^ readers.keys()))[:8] if isinstance(value, dict) else [shown(value)]
            raise _refused(at, shown(", ".join(got), 200), f"exactly {', '.join(readers)}")
        return kind(*[reader(value[name], f"{at}.{name}") for name, reader in readers.items()])

    return read


def _list_reader(items: tuple[Any, ...]) -> Reader:
    """Of any length for `tuple[X, ...]`; otherwise of one type, and as long as the annotation."""
    reader = _reader(items[0])
    smallest, largest = (0, LIST_LIMIT) if items[-1] is Ellipsis else (len(items), len(items))

    def read(value: object, at: str) -> tuple[Any, ...]:
        if type(value) is not list or not smallest <= len(value) <= largest:
            raise _refused(at, shown(value), f"a list of {smallest} to {largest}")
        return tuple([reader(item, f"{at}[{index}]") for index, item in enumerate(value)])

    return read


def _object_reader(reader: Reader) -> Reader:
    def read(value: object, at: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) > LIST_LIMIT:
            raise _refused(at, shown(value), f"an object of at most {LIST_LIMIT} entries")
        return {_read_text(key, at): reader(item, f"{at}[{shown(key)}]") for key, item in value.items()}

    return read


def _union_reader(members: tuple[Any, ...]) -> Reader:
    """Integers go to `int` where it is one of the members; what fits no member is refused by the last."""
    nothing = types.NoneType in members
    readers = {member: _reader(member) for member in members if member is not types.NoneType}
    last = [*readers.values()][-1]

    def read(value: object, at: str) -> Any:
        return None if nothing and value is None else readers.get(type(value), last)(value, at)

    return read


def _read_text(value: object, at: str) -> str:
    if type(value) is not str or not 0 < len(value) <= TEXT_LIMIT or not value.isprintable():
        raise _refused(at, shown(value), f"1 to {TEXT_LIMIT} printable characters")
    return value


def _read_integer(value: object, at: str) -> int:
    if type(value) is not int or not -INTEGER_LIMIT <= value < INTEGER_LIMIT:
        raise _refused(at, shown(value), "an integer of 64 bits")
    return value


def _read_number(value: object, at: str) -> float:
    if type(value) is int and abs(value) < INTEGER_LIMIT:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise _refused(at, shown(value), "a finite number")
    return value


def _read_truth(value: object, at: str) -> bool:
    if type(value) is not bool:
        raise _refused(at, shown(value), "true or false")
    return value


def _read_ref(value: object, at: str) -> Ref:
    kind, _, name = _read_text(value, at).partition(":")
    if kind not in REF_KINDS or not name:
        raise _refused(at, shown(value), f"kind:name, with a kind of {', '.join(REF_KINDS)}")
    return Ref(kind, name)


_SCALARS: dict[Any, Reader] = {str: _read_text, int: _read_integer, float: _read_number, bool: _read_truth}


def _refused(at: str, got: str, want: str) -> ArtifactError:
    return ArtifactError(
        "the plan has a field that cannot be read",
        at=at,
        got=got,
        want=want,
        next="copy the artifact again, or compile the model again",
    )
