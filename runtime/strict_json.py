"""JSON from a stranger: parsed within fixed limits, or one ArtifactError.

Refused beside what is not JSON: duplicate keys, NaN and infinities, integers beyond 64 bits, text that is not
Unicode (lone surrogates), nesting deeper than `DEPTH_LIMIT` and more than `VALUE_LIMIT` values.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import chain

from dcc.errors import ArtifactError

DEPTH_LIMIT = 64
VALUE_LIMIT = 500_000
INTEGER_LIMIT = 2**63


def shown(value: object, limit: int = 80) -> str:
    """`value` as at most about `limit` characters of printable text, whatever it is."""
    if isinstance(value, str):
        text = repr(value[:limit])
        return text if len(value) <= limit else f"{text}... ({len(value)} characters)"
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:limit]


def parse_json(data: bytes, at: str) -> object:
    """The value that `data` spells. `at` names the place in errors."""
    _check_count(data, at)
    try:
        text = data.decode("utf-8")
        value: object = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_integer,
            parse_float=_finite_float,
            parse_constant=_no_constant,
        )
        _check_depth(value, at)
        # Escapes can spell half a surrogate pair, which no later output could encode.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            "the file holds JSON that cannot be read",
            at=at,
            got=str(error)[:200].encode("ascii", "backslashreplace").decode(),
            want="UTF-8 JSON with unique keys and finite numbers",
            next="copy the file again, or compile the model again",
        ) from error
    return value


def _check_count(data: bytes, at: str) -> None:
    """Before anything is built: a small file must not become a large object."""
    # Commas and brackets inside strings count as well, which errs on the safe side.
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > VALUE_LIMIT:
        raise _too_large(at, f"about {values} values", f"at most {VALUE_LIMIT}")


def _check_depth(value: object, at: str) -> None:
    """Level by level, because what recurses over the value later has less stack than the parser had."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        lists = [item for item in level if type(item) is list]
        objects = [item.values() for item in level if type(item) is dict]
        level = [*chain.from_iterable(lists), *chain.from_iterable(objects)]
        if not level:
            return
    raise _too_large(at, f"more than {DEPTH_LIMIT} levels of nesting", f"at most {DEPTH_LIMIT}")


def _too_large(at: str, got: str, want: str) -> ArtifactError:
    return ArtifactError(
        "the file holds JSON that is too large to be dcc's",
        at=at,
        got=got,
        want=want,
        next="do not trust this file; compile the model again",
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} is given twice")
    return unique


def _bounded_integer(digits: str) -> int:
    if len(digits) > 20 or not -INTEGER_LIMIT <= int(digits) < INTEGER_LIMIT:
        raise ValueError(f"an integer of {len(digits)} characters does not fit 64 bits")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is not finite")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
