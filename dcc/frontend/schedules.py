"""Schedule files: dcc's own, fronts of a search, ECAD's, and step masks in the notation of cache-dit.

Blocks are read off the names of components: the first number of a module path that differs between components that
share the path before it. `transformer.transformer_blocks.3.ff.net` is in block 3 of the stack
`transformer.transformer_blocks`. A part's kind comes from its name (`attn1`, `ff.net`, `mlp`).

ECAD's file onto components:
    blocks       in order: block "0", "1", ... of the file, then "single_0", ..., are the program's first, second, ...
    PixArt       attn1, attn2, ff: self-attention, cross-attention, feed-forward
    FLUX double  full_attn, full_ff, full_ff_context: joint attention, feed-forward, feed-forward of the text
    in a block   by kind where every name tells it, else by position where the names that tell it agree
    FLUX single  single_attn, single_proj_mlp and single_proj_out are one component. Its result is what proj_out
                 gives, so it is computed where proj_out runs on inputs that changed since proj_out last ran, and
                 reused elsewhere. Where only one input is new, dcc renews both.

Sources: ECAD (arXiv 2506.15682), cache-dit (github.com/vipshop/cache-dit, Apache-2.0: presets and their rescaling).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, groupby, islice, zip_longest
from pathlib import Path
from typing import Any, NoReturn

from dcc.errors import ScheduleError
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    HISTORY_LIMIT,
    KIND,
    REUSE,
    SKIP,
    WEIGHT_LIMIT,
    Action,
    GuidanceMode,
    Schedule,
    Stores,
    branch_units,
    delta_units,
    extrapolation,
    forecast,
    from_steps,
)

FILE_LIMIT = 64 << 20
NOTATION_LIMIT = 4096
BLOCK_LIMIT = 1000
CALL_LIMIT = 10_000
PLACEMENTS = ("nearest", "interval")

Note = Callable[[str], None]
Pick = Callable[[Mapping[str, Any]], Schedule]

PIXART = ("attn1", "attn2", "ff")
DOUBLE = ("full_attn", "full_ff", "full_ff_context")
SINGLE = ("single_attn", "single_proj_mlp", "single_proj_out")
KINDS = {
    **dict.fromkeys(("attn", "attn1", "self_attn", "attention", "full_attn"), "attention"),
    **dict.fromkeys(("attn2", "cross_attn", "cross_attention"), "cross-attention"),
    **dict.fromkeys(("ff", "ffn", "mlp", "feed_forward", "img_mlp", "full_ff"), "feed-forward"),
    **dict.fromkeys(("ff_context", "txt_mlp", "full_ff_context"), "context feed-forward"),
}

# cache-dit's runs of computed and of cached steps. Those of 28 are stretched or cut to 16 steps and more, those of
# 15 are cut to 10 steps and more; the others stand for themselves.
PRESETS: dict[int, dict[str, tuple[list[int], list[int]]]] = {
    28: {
        "slow": ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3]),
        "medium": ([6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3]),
        "fast": ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4]),
        "ultra": ([4, 1, 1, 1, 1], [2, 5, 6, 7]),
    },
    15: {
        "slow": ([4, 2, 2, 2, 1], [1, 1, 1, 1]),
        "medium": ([4, 2, 1, 1, 1], [1, 1, 2, 2]),
        "fast": ([3, 1, 1, 1, 1], [1, 2, 2, 3]),
        "ultra": ([2, 1, 1, 1, 1], [1, 2, 3, 3]),
    },
    9: {
        "slow": ([5, 2, 1], [1]),
        "medium": ([5, 1, 1], [1, 1]),
        "fast": ([4, 1, 1], [1, 2]),
        "ultra": ([3, 1, 1], [2, 2]),
    },
    8: {
        "slow": ([5, 1, 1], [1]),
        "medium": ([4, 1, 1], [1, 1]),
        "fast": ([3, 1, 1], [1, 2]),
        "ultra": ([2, 1, 1], [2, 2]),
    },
    6: dict.fromkeys(("slow", "medium", "fast", "ultra"), ([3, 1], [2])),
    4: dict.fromkeys(("slow", "medium", "fast", "ultra"), ([2, 1], [1])),
}
CACHE_CONFIG = re.compile(
    r"(?:DBCache_)?F(?P<first>\d+)B(?P<last>\d+)_W(?P<warmup>\d+)(?:I(?P<interval>\d+))?M(?P<most>\d+)MC(?P<run>\d+)"
    r"_R(?P<threshold>\d+(?:\.\d+)?)(?:_SCM(?P<mask>[01]+)_(?P<policy>static|dynamic))?(?:_N(?P<calls>\d+))?"
    r"(?:_FR(?P<refresh>\d+)_(?:once|repeat))?(?:_CFG[01])?(?:_(?:T[01]O(?P<order>\d)|NONE))?(?:_S\d+)?"
)


@dataclass(frozen=True)
class Block:
    """A block of the model: `members` are indices into the components, in order."""

    stack: str
    members: tuple[int, ...]
    parts: tuple[str, ...]


def component_blocks(components: Sequence[str]) -> tuple[Block, ...]:
    """The blocks that the components' names spell, in order of their first component."""
    names = [_without_count(name, set(components)).split(".") for name in components]
    found: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    stacks: dict[tuple[str, ...], str] = {}
    for index, words in enumerate(names):
        at = _number_place(words, names)
        block = tuple(words if at is None else words[: at + 1])
        stacks[block] = ".".join(words if at is None else words[:at])
        found.setdefault(block, []).append((index, ".".join(words[len(block) :])))
    return tuple(
        Block(stacks[block], tuple(index for index, _ in parts), tuple(part for _, part in parts))
        for block, parts in found.items()
    )


def _without_count(name: str, names: set[str]) -> str:
    """Without the number that makes a second component of the same path unique."""
    base, _, count = name.rpartition(".")
    return base if count.isdecimal() and base in names else name


def _number_place(words: list[str], names: list[list[str]]) -> int | None:
    places = [place for place, word in enumerate(words) if word.isdecimal()]
    for place in places:
        if any(other[:place] == words[:place] and other[place : place + 1] != [words[place]] for other in names):
            return place
    return places[0] if places else None


def _kind(part: str) -> str:
    return next((KINDS[word] for word in reversed(part.split(".")) if word in KINDS), "")


def read_schedule(
    path: str | Path,
    components: Sequence[str] | None = None,
    calls: int | None = None,
    *,
    program: str = "",
    sampler: str = "",
    placement: str | None = None,
    pick: Pick | None = None,
    note: Note = lambda text: None,
) -> Schedule:
    """The schedule in the file, which is told by its content: dcc's, a front, ECAD's, or a step mask.

    What is given of `components`, `calls` and the hashes `program` and `sampler` is checked against it; ECAD's files
    and masks need the components, masks the calls as well. With a `placement` it is transferred to the calls and the
    hashes first. `pick` chooses of a front with several points and gets the whole front. `note` hears what was
    changed in reading. Raises ScheduleError.
    """
    try:
        schedule = _parse(_content(Path(path)), components, calls, pick, note)
        if placement is not None:
            schedule = moved_to(schedule, calls or schedule.calls, program, sampler, placement, note)
        check_fits(schedule, program, sampler, components, calls)
    except ScheduleError as error:
        details = {**error.details, "at": ": ".join(filter(None, (str(path), error.details.get("at"))))}
        raise ScheduleError(error.what, **details) from error
    return schedule


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise ScheduleError("the file is too large to be a schedule", want=f"at most {FILE_LIMIT >> 20} MiB")
        return data.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError("the schedule file cannot be read", got=str(error)[:200]) from error


def _parse(text: str, components: Sequence[str] | None, calls: int | None, pick: Pick | None, note: Note) -> Schedule:
    if text[:1] not in ("{", "["):
        return read_notation(text, _needed(components, "components"), _needed(calls, "number of calls"))
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        got = str(error)[:200].encode("ascii", "backslashreplace").decode()
        raise ScheduleError(
            "the schedule file is not JSON that can be read", got=got, want="UTF-8 JSON, each key once"
        ) from error
    if isinstance(value, list):
        return read_steps_mask(value, _needed(components, "components"), _needed(calls, "number of calls"))
    if value.get("kind") == KIND:
        return Schedule.from_json(value)
    if "cache_schedule" in value:
        return _from_ecad(value, _needed(components, "components"), note)
    if "points" in value:
        return _from_front(value, pick)
    raise ScheduleError(
        "this is not a schedule that can be read",
        got=f"an object of {', '.join(sorted(value)[:8])[:200] or 'nothing'}",
        want=f"kind {KIND!r}, a front (points), ECAD's cache_schedule, or a list of 0 and 1",
    )


def _needed(value: Any, what: str) -> Any:
    if value is None:
        raise ScheduleError(f"this kind of schedule file cannot be read without the {what} of the program")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return unique


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _from_front(value: Mapping[str, Any], pick: Pick | None) -> Schedule:
    points = value["points"]
    if not isinstance(points, list) or not points:
        raise ScheduleError("the front has no points", at="points", want="a list of one or more")
    if pick is not None:
        return pick(value)
    if len(points) > 1:
        raise ScheduleError(
            "a front holds several schedules",
            got=f"{len(points)} points",
            want="one",
            next="pick one, such as --pick 2.5x",
        )
    if not isinstance(points[0], dict) or "schedule" not in points[0]:
        raise ScheduleError("a point of the front has no schedule", at="points[0]", want="an object with a schedule")
    return Schedule.from_json(points[0]["schedule"])


def check_fits(
    schedule: Schedule,
    program: str = "",
    sampler: str = "",
    components: Sequence[str] | None = None,
    calls: int | None = None,
) -> None:
    """Raises ScheduleError with all that differs; a hash of "" on either side and None fit anything.

    What follows from a difference that is named is not named as well: other components are another model, and the
    tables of one sampler for two numbers of steps differ.
    """
    got: list[str] = []
    want: list[str] = []
    same_components = components is None or tuple(components) == schedule.components
    same_calls = calls is None or calls == schedule.calls
    if components is not None and not same_components:
        got.append(_components_text(schedule.components, components))
        want.append(_components_text(components, schedule.components))
    elif schedule.program and program and schedule.program != program:
        got.append(f"weights and operations {schedule.program[:12]}")
        want.append(f"weights and operations {program[:12]}")
    own, given = schedule.sampler, sampler
    if not same_calls:
        own, given = own.rpartition(":")[0], given.rpartition(":")[0]
    if own and given and own != given:
        got.append(f"sampler {_sampler_text(own)}")
        want.append(f"sampler {_sampler_text(given)}")
    if not same_calls:
        got.append(f"{schedule.calls} calls")
        want.append(f"{calls} calls")
    if got:
        raise ScheduleError(
            "the schedule was made for something else",
            got="; ".join(got),
            want="; ".join(want),
            next="--transfer nearest, and see what that loses, or search again"
            if same_components
            else "use it with the model that it was made for, or search again",
        )


def _sampler_text(identity: str) -> str:
    name, colon, digest = identity.rpartition(":")
    return f"{name}{colon}{digest[:12]}"


def _components_text(names: Sequence[str], others: Sequence[str]) -> str:
    index = next((i for i, (a, b) in enumerate(zip_longest(names, others)) if a != b), 0)
    own = f"'{names[index]:.60}'" if index < len(names) else "none"
    return f"{len(names)} components, number {index} {own}"


def _from_ecad(value: Mapping[str, Any], components: Sequence[str], note: Note) -> Schedule:
    content = _entry(value, "cache_schedule", dict, "the file")
    calls = _count(content, "num_inference_steps", 1, CALL_LIMIT)
    layout = _ecad_layout(content)
    steps = _entry(content, "schedule", dict, "cache_schedule")
    if {_number(key) for key in steps} != set(range(calls)) or len(steps) != calls:
        _wrong_ecad(
            "schedule", f"{len(steps)} steps: {', '.join(sorted(steps)[:4])[:80]} ...", f"000 to {calls - 1:03}"
        )
    rows = [_ecad_row(step, layout, key) for key, step in sorted(steps.items(), key=lambda item: int(item[0]))]
    missing = sum(not bit for bits in rows[0].values() for bit in bits)
    if missing:
        note(
            f"step 0 reuses {missing} of {sum(map(len, rows[0].values()))} slots that are still empty: computed instead"
        )
        rows[0] = {key: (True,) * len(bits) for key, bits in rows[0].items()}
    computes = [[False] * len(components) for _ in rows]
    for (key, roles), owners in zip(layout, _owners(layout, components), strict=True):
        columns = [row[key] for row in rows]
        if roles == SINGLE:
            columns = [(computed,) for computed in _single_column(columns)]
        for call, bits in enumerate(columns):
            for owner, bit in zip(owners, bits, strict=True):
                computes[call][owner] = bit
    for text in _single_notes([[row[key] for row in rows] for key, roles in layout if roles == SINGLE]):
        note(text)
    config = value.get("config")
    if isinstance(config, dict) and config:
        note(f"the file was made with {', '.join(f'{key}={config[key]}' for key in sorted(config))[:200]}")
    name = content.get("name")
    return from_steps(
        components, branch_units(components), computes, name=name[:200] if isinstance(name, str) else "ecad"
    )


Layout = list[tuple[str, tuple[str, ...]]]


def _ecad_layout(content: Mapping[str, Any]) -> Layout:
    """The keys and slots of the file's blocks, in order."""
    blocks = _count(content, "num_blocks", 0, BLOCK_LIMIT)
    flux = "num_single_blocks" in content
    singles = _count(content, "num_single_blocks", 0, BLOCK_LIMIT) if flux else 0
    if not blocks + singles:
        _wrong_ecad("num_blocks", "0 blocks", "one or more")
    layout: Layout = [(str(index), DOUBLE if flux else PIXART) for index in range(blocks)]
    return layout + [(f"single_{index}", SINGLE) for index in range(singles)]


def _ecad_row(step: object, layout: Layout, at: str) -> dict[str, tuple[bool, ...]]:
    """Which slots of each block the step recomputes."""
    if not isinstance(step, dict) or set(step) != {key for key, _ in layout}:
        got = f"{len(step)} blocks" if isinstance(step, dict) else type(step).__name__
        _wrong_ecad(f"step {at}", got, f"{len(layout)} blocks, {layout[0][0]} to {layout[-1][0]}")
    row = {}
    for key, roles in layout:
        block = step[key]
        where = f"step {at}, block {key}"
        if not isinstance(block, dict):
            _wrong_ecad(where, type(block).__name__, ", ".join(roles))
        custom = sorted(name for name in block if name.startswith("custom_compute"))
        if custom:
            raise ScheduleError(
                "the schedule calls a function of ECAD's own in place of a component",
                at=where,
                got=", ".join(custom)[:120],
                want="recompute or reuse only",
                next="take a schedule without it; for T-Gate's, reuse attn2",
            )
        if set(block) != set(roles) or not all(value in (0, 1) for value in block.values()):
            _wrong_ecad(where, ", ".join(sorted(block))[:120] or "nothing", f"true or false for {', '.join(roles)}")
        row[key] = tuple(bool(block[role]) for role in roles)
    return row


def _owners(layout: Layout, components: Sequence[str]) -> list[tuple[int, ...]]:
    """For each block of the file, the component of each slot; one for the three of a single block."""
    blocks = component_blocks(components)
    owners = [_owner(roles, block) for (_, roles), block in zip(layout, blocks, strict=False)]
    if len(layout) != len(blocks) or None in owners:
        wrong = owners.index(None) if None in owners else min(len(layout), len(blocks))
        raise ScheduleError(
            "ECAD's blocks do not fit the program's",
            at=f"block {wrong}",
            got=_sides([tuple(roles) for _, roles in layout]) + " in the file",
            want=_sides([block.parts for block in blocks]) + " in the program",
            next="use a schedule of the same model; the rules are in dcc/frontend/schedules.py",
        )
    return [owner for owner in owners if owner is not None]


def _owner(roles: tuple[str, ...], block: Block) -> tuple[int, ...] | None:
    if roles == SINGLE:
        return block.members if len(block.members) == 1 else None
    wanted = [KINDS[role] for role in roles]
    kinds = [_kind(part) for part in block.parts]
    if len(kinds) != len(wanted):
        return None
    if sorted(kinds) == sorted(wanted):
        return tuple(block.members[kinds.index(kind)] for kind in wanted)
    # A name such as `blocks.0` tells no kind: then the order decides, if no name contradicts it.
    agrees = all(kind in ("", role) for kind, role in zip(kinds, wanted, strict=True))
    return block.members if agrees else None


def _sides(blocks: Iterable[tuple[str, ...]]) -> str:
    """Runs of like blocks, such as `19 blocks of (attn, ff.net), 38 blocks of (whole)`."""
    runs = [(parts, len(list(run))) for parts, run in groupby(blocks)]
    return ", ".join(f"{count} of ({', '.join(part or 'whole' for part in parts)})" for parts, count in runs)[:300]


def _single_column(bits: Sequence[tuple[bool, ...]]) -> list[bool]:
    """Where the one component of a FLUX single block is computed; `bits` are attn, proj_mlp, proj_out by call."""
    changed = False
    column = []
    for attention, hidden, result in bits:
        changed = changed or attention or hidden
        column.append(result and changed)
        changed = changed and not result
    return column


def _single_notes(columns: Sequence[Sequence[tuple[bool, ...]]]) -> Iterator[str]:
    dead = mixed = repeated = 0
    for bits in columns:
        computed = _single_column(bits)
        for (attention, hidden, result), whole in zip(bits, computed, strict=True):
            mixed += whole and not (attention and hidden)
            repeated += result and not whole
        for slot in (0, 1):
            unread = False
            for row in bits:
                dead += row[slot] and unread
                unread = (unread or row[slot]) and not row[2]
            dead += unread
    if dead:
        yield f"{dead} results of single_attn or single_proj_mlp are never read: dead work, left out"
    if repeated:
        yield f"{repeated} runs of single_proj_out repeat their inputs: reused instead, which gives the same"
    if mixed:
        yield f"{mixed} runs of single_proj_out mix new and kept inputs: dcc computes the whole block there"


def write_ecad(schedule: Schedule, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """The schedule is in the file, in ECAD's format; `config` is written as it is (height, width, guidance_scale).

    The file has all of it or is as it was. Raises ScheduleError for what ECAD has no word for (deltas, forecasts,
    skips, guidance modes, other blocks) and where the file cannot be written.
    """
    for call, (mode, row) in enumerate(zip(schedule.guidance, schedule.actions, strict=True)):
        if mode != BOTH:
            _unwritable(f"call {call}", f"guidance {mode.kind}")
        for unit, action in zip(schedule.units, row, strict=True):
            if action not in (COMPUTE, REUSE):
                _unwritable(f"call {call}, {unit.name}", "a forecast" if action.weights else "a skip")
    for index, unit in enumerate(schedule.units):
        if unit.stores is Stores.DELTA and REUSE in schedule.column(index):
            _unwritable(unit.name, "a reused delta")
    layout = _layout_of(schedule.components)
    owners = _owners(layout, schedule.components)
    rows = schedule.component_actions()
    steps = {
        f"{call:03}": {
            key: {role: row[owner[0] if roles == SINGLE else owner[slot]].computes for slot, role in enumerate(roles)}
            for (key, roles), owner in zip(layout, owners, strict=True)
        }
        for call, row in enumerate(rows)
    }
    singles = sum(roles == SINGLE for _, roles in layout)
    counts = {"num_blocks": len(layout) - singles}
    if layout[0][1] != PIXART:
        counts["num_single_blocks"] = singles
    content = {
        **counts,
        "num_inference_steps": schedule.calls,
        "name": schedule.name,
        "attributes": {},
        "schedule": steps,
    }
    value = {"cache_schedule": content, "config": dict(config or {}), "metrics": {}}
    target = Path(path)
    partial = target.parent / f".{os.getpid():x}.{target.name[:60]}.partial"
    try:
        partial.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise ScheduleError("the schedule file cannot be written", at=target, got=error, next="another path") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _layout_of(components: Sequence[str]) -> Layout:
    blocks = component_blocks(components)
    if all(_owner(PIXART, block) for block in blocks):
        return [(str(index), PIXART) for index in range(len(blocks))]
    double = next((index for index, block in enumerate(blocks) if _owner(DOUBLE, block) is None), len(blocks))
    if any(_owner(SINGLE, block) is None for block in blocks[double:]):
        _unwritable("the blocks", _sides(block.parts for block in blocks))
    layout: Layout = [(str(index), DOUBLE) for index in range(double)]
    return layout + [(f"single_{index}", SINGLE) for index in range(len(blocks) - double)]


def _unwritable(at: str, got: str) -> NoReturn:
    raise ScheduleError(
        "the schedule cannot be written in ECAD's format",
        at=at,
        got=got,
        want="compute or reuse of branches, in blocks as PixArt's or FLUX's",
        next="write it as dcc's own JSON",
    )


def _wrong_ecad(at: str, got: str, want: str) -> NoReturn:
    raise ScheduleError("the file is not a schedule of ECAD", at=at, got=got, want=want)


def _entry(value: Mapping[str, Any], key: str, kind: type, at: str) -> Any:
    if not isinstance(value.get(key), kind):
        _wrong_ecad(f"{at}: {key}", type(value.get(key)).__name__, "an object")
    return value[key]


def _count(content: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        _wrong_ecad(key, "something else", f"an integer from {least} to {most}")
    return value


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else None


def read_notation(text: str, components: Sequence[str], calls: int) -> Schedule:
    """The schedule that a cache-dit configuration (`F1B0_...`) or a step mask spells. Raises ScheduleError."""
    text = text.strip()
    if len(text) > NOTATION_LIMIT or "\n" in text:
        raise ScheduleError("this is neither a step mask nor JSON", got=repr(text[:40]), want=MASKS)
    if re.match(r"(DBCache_|DBPrune_)?F\d+B\d+", text):
        return read_cache_config(text, components, calls)
    return read_steps_mask(text, components, calls)


MASKS = "slow, medium, fast or ultra; runs such as '6,2,1;1,3' (computed; cached); or 0 and 1 for each call"


def steps_mask(mask: str | Sequence[int], calls: int) -> tuple[bool, ...]:
    """For each call, whether it is computed: of a preset's name, runs, digits (`SCM1101`), or a list of 0 and 1.

    Runs alternate, computed first, and are cut after `calls`. A preset's last call is computed. Raises ScheduleError.
    """
    if isinstance(mask, str):
        text = mask.strip()
        if text in PRESETS[28]:
            return _preset(text, calls)
        if re.fullmatch(r"\d{1,4}(,\d{1,4})*;\d{1,4}(,\d{1,4})*", text.replace(" ", "")):
            compute, cache = ([int(item) for item in half.split(",")] for half in text.split(";"))
            bits = _runs(compute, cache)
            if len(bits) < calls:
                _wrong_mask(f"runs of {len(bits)} calls in all", f"at least {calls}")
            return tuple(bits[:calls])
        digits = text.removeprefix("SCM").removeprefix("=")
        if not re.fullmatch("[01]+", digits):
            _wrong_mask(repr(text[:60]), MASKS)
        mask = [int(digit) for digit in digits]
    if not all(bit in (0, 1) for bit in mask):
        _wrong_mask(f"a list of {len(mask)} values", "0 and 1 only")
    if len(mask) != calls:
        _wrong_mask(f"{len(mask)} steps", f"{calls}, one per call")
    return tuple(bool(bit) for bit in mask)


def _preset(name: str, calls: int) -> tuple[bool, ...]:
    base = calls if calls in (4, 6, 8, 9) else 15 if 10 <= calls < 16 else 28
    if (calls < 10 and base != calls) or calls > CALL_LIMIT:
        _wrong_mask(
            f"{name} for {calls} calls", f"4, 6, or 8 to {CALL_LIMIT} calls: cache-dit has no preset for others"
        )
    compute, cache = (list(runs) for runs in PRESETS[base][name])
    if calls > base:
        _stretch(compute, cache, calls)
    bins = (cache, compute)
    for turn in range(max(0, sum(compute) + sum(cache) - calls)):
        # One step less, by turns of the last cached and the last computed run.
        runs = bins[turn % 2] or bins[1 - turn % 2]
        runs[-1] -= 1
        if not runs[-1]:
            runs.pop()
    bits = _runs(compute, cache)
    return (*bits[:-1], True)


def _stretch(compute: list[int], cache: list[int], calls: int) -> None:
    """Rounds in which every run grows by half its share of the new length, until the runs cover `calls`."""
    grow = [[max(int(run * calls / 28 / 2), 1) for run in runs] for runs in (compute, cache)]
    while True:
        for index in range(len(cache)):
            for runs, more in ((compute, grow[0]), (cache, grow[1])):
                runs[index] += more[index]
                if sum(compute) + sum(cache) >= calls:
                    return
        compute[-1] += 1
        if sum(compute) + sum(cache) >= calls:
            return


def _runs(compute: Sequence[int], cache: Sequence[int]) -> list[bool]:
    bits: list[bool] = []
    for computed, cached in zip_longest(compute, cache, fillvalue=0):
        bits += [True] * computed + [False] * cached
    return bits


def _wrong_mask(got: str, want: str) -> NoReturn:
    raise ScheduleError("the step mask cannot be used", got=got, want=want)


def read_steps_mask(
    mask: str | Sequence[int],
    components: Sequence[str],
    calls: int,
    first_blocks: int = 1,
    last_blocks: int = 0,
    order: int = 0,
) -> Schedule:
    """The schedule of a step mask (cache-dit's SCM with its static policy); what `mask` may be, `steps_mask` says.

    Of each stack of blocks, the first `first_blocks` (Fn) and the last `last_blocks` (Bn) are computed in every call;
    the delta of those between is computed where the mask has 1 and extrapolated with `order` where it has 0. A stack
    without blocks between is computed. Raises ScheduleError.
    """
    bits = steps_mask(mask, calls)
    starts, cached = _spans(components, first_blocks, last_blocks)
    units = delta_units(components, starts)
    computes = [[bit or not between for between in cached] for bit in bits]
    name = f"cache-dit {mask}" if isinstance(mask, str) else "SCM" + "".join(str(int(bit)) for bit in bits)
    return from_steps(components, units, computes, order, name=name[:200])


def _spans(components: Sequence[str], first: int, last: int) -> tuple[list[int], list[bool]]:
    """Where runs of components begin, and whether each may be cached."""
    blocks = component_blocks(components)
    if [index for block in blocks for index in block.members] != list(range(len(components))):
        raise ScheduleError("components of different blocks alternate, so no span of blocks can be cached")
    if first < 0 or last < 0:
        raise ScheduleError("a number of blocks is negative", got=f"F{first}B{last}", want="0 or more")
    starts: list[int] = []
    cached: list[bool] = []
    for _, run in groupby(blocks, key=lambda block: block.stack):
        stack = list(run)
        for index, block in enumerate(stack):
            between = first <= index < len(stack) - last
            if index == 0 or between != cached[-1]:
                starts.append(block.members[0])
                cached.append(between)
    if not any(cached):
        raise ScheduleError(
            "the mask leaves no block to cache",
            got=f"F{first}B{last} with {_sides(block.parts for block in blocks)}",
            want="fewer first and last blocks than a stack has",
        )
    return starts, cached


def read_cache_config(text: str, components: Sequence[str], calls: int) -> Schedule:
    """The schedule of a cache-dit configuration such as `F1B0_W8I1M0MC6_R1.0`, where it is a table.

    It is one when the threshold decides nothing (R0 computes all, R1 and more caches all that the counts allow), or
    with a mask and the static policy. M0 and MC0 are no limit, as cache-dit prints them. `T1O1` is a forecast of
    order 1. Raises ScheduleError; for a threshold between, with the pass to use instead.
    """
    match = CACHE_CONFIG.fullmatch(text.strip())
    if match is None:
        raise ScheduleError(
            "this is not a configuration of cache-dit that can be read",
            got=repr(text[:120]),
            want="F1B0_W8I1M0MC6_R1.0, after it _SCM1101_static, _N28, _T1O1",
            next="DBPrune, FoCa and DMD have no static table; use the pass residual_threshold",
        )
    part = match.groupdict()
    if part["calls"] and int(part["calls"]) != calls:
        _wrong_mask(f"{part['calls']} steps (N)", f"{calls} calls")
    if part["refresh"]:
        raise ScheduleError("a forced refresh (FR) cannot be read", got=f"FR{part['refresh']}", want="none")
    threshold = float(part["threshold"])
    if part["mask"] and part["policy"] == "static":
        bits = steps_mask(part["mask"], calls)
    elif threshold == 0:
        bits = (True,) * calls
    elif threshold >= 1 and not part["mask"]:
        warmup, interval, most, run = (int(part[key] or 1) for key in ("warmup", "interval", "most", "run"))
        bits = _counted(calls, warmup, max(interval, 1), most, run)
    else:
        raise ScheduleError(
            "this configuration of cache-dit decides while it runs, so it is no table",
            got=f"R{part['threshold']}, {'dynamic mask' if part['mask'] else 'no mask'}",
            want="R1 or more, or a mask with the policy static",
            next="the pass residual_threshold calibrates such a threshold into a table",
        )
    order = int(part["order"] or 0)
    schedule = read_steps_mask(bits, components, calls, int(part["first"]), int(part["last"]), order)
    return replace(schedule, name=text.strip()[:200])


def _counted(calls: int, warmup: int, interval: int, most: int, run: int) -> tuple[bool, ...]:
    """What DBCache computes when every call is similar enough: warm-up, then as the limits say; 0 is no limit."""
    bits: list[bool] = []
    for call in range(calls):
        warming = call < warmup and call % interval == 0
        spent = bool(most) and bits.count(False) >= most
        long = bool(run) and len(bits) >= run and not any(bits[-run:])
        bits.append(call == 0 or warming or spent or long)
    return tuple(bits)


def moved_to(
    schedule: Schedule, calls: int, program: str, sampler: str, placement: str, note: Note = lambda text: None
) -> Schedule:
    """The schedule as `transfer` gives it, and a note of what it was made for where that is something else."""
    try:
        check_fits(schedule, program, sampler, calls=calls)
    except ScheduleError as error:
        note(f"transferred ({placement}): made for {error.details['got']}, wanted for {error.details['want']}")
    return transfer(schedule, calls, program=program, sampler=sampler, placement=placement)


def transfer(
    schedule: Schedule, calls: int, *, program: str = "", sampler: str = "", placement: str = "nearest"
) -> Schedule:
    """The schedule for another number of calls, and for the `program` and `sampler` with these hashes.

    Relative time runs from 0 at the first call to 1 at the last. `nearest` does what the call nearest in relative
    time did. `interval` keeps the distance between computed calls, in calls, around the same relative time: an
    every-third schedule stays one, where `nearest` gathers the computed calls when there are more. Combinations of n
    values become extrapolations of order n - 1 through the values there are (weights of another form are lost);
    units and guidance differences without a value are computed. With equal calls nothing changes but the hashes.
    Raises ScheduleError.
    """
    if placement not in PLACEMENTS:
        raise ScheduleError("no such placement", got=placement, want=" or ".join(PLACEMENTS))
    if not 1 <= calls <= CALL_LIMIT:
        raise ScheduleError("no such number of calls", got=calls, want=f"1 to {CALL_LIMIT}")
    if calls == schedule.calls:
        return replace(schedule, program=program, sampler=sampler)
    sources = [_nearest(call, calls, schedule.calls) for call in range(calls)]
    modes = _moved_modes([schedule.guidance[source] for source in sources])
    columns = [_moved_column(schedule.column(unit), sources, modes, placement) for unit in range(len(schedule.units))]
    return replace(
        schedule, actions=tuple(zip(*columns, strict=True)), guidance=modes, program=program, sampler=sampler
    )


def _nearest(call: int, calls: int, sources: int) -> int:
    return 0 if calls == 1 else (2 * call * (sources - 1) + calls - 1) // (2 * (calls - 1))


def _moved_modes(modes: Sequence[GuidanceMode]) -> tuple[GuidanceMode, ...]:
    moved: list[GuidanceMode] = []
    known: list[int] = []
    for call, mode in enumerate(modes):
        if mode.kind == "reuse":
            mode = GuidanceMode("reuse", _bounded(known, call, len(mode.weights))) if known else BOTH
        if mode == BOTH:
            known.insert(0, call)
        moved.append(mode)
    return tuple(moved)


def _moved_column(
    column: Sequence[Action], sources: Sequence[int], modes: Sequence[GuidanceMode], placement: str
) -> list[Action]:
    wanted = [column[source].computes for source in sources]
    if placement == "interval":
        wanted = _kept_intervals([action.computes for action in column], len(sources))
    terms = _terms(column)
    computed: list[int] = []
    moved: list[Action] = []
    for call, source in enumerate(sources):
        if column[source] == SKIP:
            moved.append(SKIP)
            continue
        both = modes[call].kind == "both"
        valid = (earlier for earlier in reversed(computed) if not both or modes[earlier].kind == "both")
        known = list(islice(valid, HISTORY_LIMIT))
        if wanted[call] or not known:
            computed.append(call)
            moved.append(COMPUTE)
        else:
            moved.append(forecast(_bounded(known, call, terms[source])))
    return moved


def _terms(column: Sequence[Action]) -> list[int]:
    """How many values each call's combination is meant to have; a call without one takes a neighbour's.

    Early in a schedule a combination has fewer only because there are no more: it is meant as the next one.
    """
    terms = [len(action.weights) for action in column]
    values = list(accumulate(action.computes for action in column))
    for index in reversed(range(len(terms) - 1)):
        if terms[index] in (0, values[index]):
            terms[index] = max(terms[index], terms[index + 1])
    for index in range(1, len(terms)):
        terms[index] = terms[index] or terms[index - 1]
    return [count or 1 for count in terms]


def _bounded(known: Sequence[int], call: int, terms: int) -> tuple[float, ...]:
    """Weights of the highest order below `terms` that stays within what a schedule may hold."""
    for order in range(terms - 1, 0, -1):
        weights = extrapolation(known, call, order)
        if all(abs(weight) <= WEIGHT_LIMIT for weight in weights):
            return weights
    return (1.0,)


def _kept_intervals(computes: Sequence[bool], calls: int) -> list[bool]:
    """Computed calls at the local interval of `computes`: its count, linear between computed calls, scaled."""
    knots = [call for call, computed in enumerate(computes) if computed] + [len(computes)]
    scale = Fraction(calls, len(computes))
    counts = []
    for call in range(calls):
        at = call / scale
        index = max((i for i, knot in enumerate(knots[:-1]) if knot <= at), default=None)
        if index is None:
            counts.append(-1)
            continue
        within = (at - knots[index]) / (knots[index + 1] - knots[index])
        counts.append(int((index + within) * scale))
    return [count > before for before, count in zip([-1, *counts], counts, strict=False)]
