"""Schedule files of others: each is read as what it says, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcc.errors import ScheduleError
from dcc.frontend.schedules import (
    PRESETS,
    check_fits,
    component_blocks,
    read_cache_config,
    read_notation,
    read_schedule,
    read_steps_mask,
    steps_mask,
    transfer,
    write_ecad,
)
from dcc.ir.schedule import (
    BOTH,
    COMPUTE,
    CONDITIONAL,
    REUSE,
    REUSE_DIFFERENCE,
    SKIP,
    Schedule,
    Stores,
    branch_units,
    delta_units,
    extrapolation,
    forecast,
    from_steps,
    full_schedule,
)
from dcc.passes import run_passes
from dcc.preparation import pipeline

DATA = Path(__file__).parent / "data"
DIT = [f"blocks.{block}.{part}" for block in range(6) for part in ("attn", "mlp")]
PIXART = [
    f"transformer.transformer_blocks.{block}.{part}" for block in range(3) for part in ("attn1", "attn2", "ff.net")
]
FLUX = [
    *(f"transformer.transformer_blocks.{block}.{part}" for block in range(2) for part in ("attn", "ff", "ff_context")),
    *(f"transformer.single_transformer_blocks.{block}" for block in range(2)),
]  # fmt: skip


def shown(schedule: Schedule) -> list[str]:
    """A line for each call: C computes, r reuses, f forecasts, - skips, by unit."""
    letters = {COMPUTE: "C", REUSE: "r", SKIP: "-"}
    return ["".join(letters.get(action, "f") for action in row) for row in schedule.actions]


def components_of(program: Any) -> list[str]:
    run_passes(program, pipeline(1))
    return [stage.name for stage in program.stages if stage.kind == "component"]


def ecad_file(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "ecad_pixart.json") -> Path:
    value = json.loads((DATA / name).read_text())
    change(value)
    path = folder / name
    path.write_text(json.dumps(value))
    return path


# Blocks


def test_blocks_of_the_families_by_name() -> None:
    assert [block.members for block in component_blocks(DIT)] == [(i, i + 1) for i in range(0, 12, 2)]
    assert [block.parts for block in component_blocks(PIXART)] == [("attn1", "attn2", "ff.net")] * 3
    blocks = component_blocks(FLUX)
    assert [block.stack for block in blocks] == ["transformer.transformer_blocks"] * 2 + [
        "transformer.single_transformer_blocks"
    ] * 2
    assert [len(block.members) for block in blocks] == [3, 3, 1, 1]


def test_blocks_where_names_say_little() -> None:
    wan = ["blocks.0.attn1", "blocks.0", "blocks.0.ffn.net", "blocks.1.attn1", "blocks.1", "blocks.1.ffn.net"]
    assert [block.members for block in component_blocks(wan)] == [(0, 1, 2), (3, 4, 5)]
    uvit = ["in_blocks.0", "in_blocks.0.1", "in_blocks.1", "in_blocks.1.1", "mid_block", "mid_block.1"]
    assert [block.members for block in component_blocks(uvit)] == [(0, 1), (2, 3), (4, 5)]
    wrapped = [f"model.0.layers.{block}.{part}" for block in range(2) for part in ("attn", "mlp")]
    assert [block.members for block in component_blocks(wrapped)] == [(0, 1), (2, 3)]
    assert len(component_blocks(["blocks.0.attn", "blocks.0.mlp"])) == 1


# ECAD


def test_reads_pixart() -> None:
    notes: list[str] = []
    schedule = read_schedule(DATA / "ecad_pixart.json", PIXART, 4, note=notes.append)
    # Step 0 has one zero, on an empty slot.
    assert shown(schedule) == ["CCCCCCCCC", "rrrrrrrrr", "CrrrCrrrC", "CCCCCCCCC"]
    assert schedule.units == branch_units(PIXART)
    assert schedule.name == "pixart_example"
    assert len(notes) == 2
    assert "step 0 reuses 1 of 9" in notes[0]
    assert "height=256" in notes[1]


def test_reads_flux() -> None:
    notes: list[str] = []
    schedule = read_schedule(DATA / "ecad_flux.json", FLUX, 5, note=notes.append)
    assert shown(schedule) == [
        "CCCCCC" + "CC",
        "rrrrCr" + "rr",  # single 0: inputs only; single 1: proj_out again on the same inputs
        "CrrrrC" + "Cr",  # single 0: proj_out on the inputs of call 1
        "rCrCrr" + "Cr",  # single 1: inputs only, in two calls
        "CCCrrr" + "CC",  # single 0: proj_out on a new attention and a kept MLP
    ]
    text = "; ".join(notes)
    assert "1 runs of single_proj_out repeat" in text
    assert "3 runs of single_proj_out mix" in text
    assert "dead" not in text


def single_slots(bits: list[tuple[bool, bool, bool]]) -> tuple[list[object], int]:
    """A slot machine of one single block: what each call gives, and how many runs of its inputs nothing reads."""
    attention = hidden = result = None
    writes: dict[tuple[str, int], bool] = {}
    given: list[object] = []
    for call, (first, second, third) in enumerate(bits):
        if first or call == 0:
            attention = ("attn", call)
            writes[attention] = False
        if second or call == 0:
            hidden = ("mlp", call)
            writes[hidden] = False
        if third or call == 0:
            result = (attention, hidden)
            writes |= {attention: True, hidden: True}  # type: ignore[dict-item]
        given.append(result)
    return given, list(writes.values()).count(False)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=60)
def test_flux_single_blocks_against_their_slots(
    tmp_path_factory: pytest.TempPathFactory, bits: list[tuple[bool, bool, bool]]
) -> None:
    """A reused result is the very result of ECAD's slots; one that mixes inputs is computed; dead work is counted."""
    roles = ("single_attn", "single_proj_mlp", "single_proj_out")
    steps = {f"{call:03}": {"single_0": dict(zip(roles, row, strict=True))} for call, row in enumerate(bits)}
    content = {"num_blocks": 0, "num_single_blocks": 1, "num_inference_steps": len(bits), "name": "", "schedule": steps}
    path = tmp_path_factory.mktemp("single") / "one.json"
    path.write_text(json.dumps({"cache_schedule": content}))
    notes: list[str] = []
    schedule = read_schedule(path, ["single_transformer_blocks.0"], len(bits), note=notes.append)
    results, dead = single_slots(bits)
    for call, ((action,), before) in enumerate(zip(schedule.actions, [None, *results], strict=False)):
        assert action in (COMPUTE, REUSE)
        assert action.computes == (results[call] != before)
    assert dead == sum(int(note.split()[0]) for note in notes if "dead" in note)


def test_reads_the_traced_family(traced: Callable[[str], Any]) -> None:
    components = components_of(traced("flux"))
    schedule = read_schedule(DATA / "ecad_flux.json", components, 5)
    assert schedule.components == tuple(components)
    assert schedule.actions == read_schedule(DATA / "ecad_flux.json", FLUX, 5).actions


def test_position_decides_where_names_do_not() -> None:
    names = [f"blocks.{block}{part}" for block in range(3) for part in (".attn1", "", ".ffn.net")]
    assert read_schedule(DATA / "ecad_pixart.json", names, 4).actions == read_schedule(
        DATA / "ecad_pixart.json", PIXART, 4
    ).actions  # fmt: skip


def test_names_decide_before_position() -> None:
    swapped = [PIXART[index] for block in (0, 3, 6) for index in (block, block + 2, block + 1)]
    schedule = read_schedule(DATA / "ecad_pixart.json", swapped, 4)
    assert shown(schedule)[2] == "CrrrrCrCr"


@pytest.mark.parametrize(
    "components", [DIT, PIXART[:6], FLUX, [*PIXART[:8], "transformer.transformer_blocks.2.attn9"][3:]]
)
def test_refuses_other_blocks_and_shows_both_sides(components: list[str]) -> None:
    with pytest.raises(ScheduleError, match="do not fit") as refused:
        read_schedule(DATA / "ecad_pixart.json", components)
    assert refused.value.details["got"] == "3 of (attn1, attn2, ff) in the file"
    assert "in the program" in refused.value.details["want"]
    assert "ecad_pixart.json" in refused.value.details["at"]


STEPS = ("cache_schedule", "schedule")


def set_at(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(root: dict[str, Any]) -> None:
        for key in path[:-1]:
            root = root[key]
        root[path[-1]] = value

    return change


def deleted(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(root: dict[str, Any]) -> None:
        for key in path[:-1]:
            root = root[key]
        del root[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (deleted("cache_schedule", "num_blocks"), "num_blocks"),
        (deleted(*STEPS), "schedule"),
        (set_at("cache_schedule", value=[]), "cache_schedule"),
        (set_at("cache_schedule", "num_blocks", value=10**9), "num_blocks"),
        (set_at("cache_schedule", "num_blocks", value=True), "num_blocks"),
        (set_at("cache_schedule", "num_inference_steps", value=5), "4 steps"),
        (set_at("cache_schedule", "num_single_blocks", value=0), "full_attn"),
        (deleted(*STEPS, "002"), "3 steps"),
        (set_at(*STEPS, "2", value={}), "5 steps"),
        (set_at(*STEPS, "x", value={}), "5 steps"),
        (deleted(*STEPS, "002", "1"), "2 blocks"),
        (set_at(*STEPS, "002", value=3), "int"),
        (set_at(*STEPS, "002", "1", value="x"), "str"),
        (set_at(*STEPS, "002", "1", value={}), "nothing"),
        (set_at(*STEPS, "002", "1", "attn1", value=2), "true or false"),
        (set_at(*STEPS, "002", "1", "attn1", value=None), "true or false"),
        (set_at(*STEPS, "002", "1", "mlp", value=True), "mlp"),
        (set_at(*STEPS, "002", "1", "custom_compute_attn", value={}), "function of ECAD's own"),
    ],
)
def test_refuses_a_damaged_ecad_file(change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError) as refused:
        read_schedule(ecad_file(tmp_path, change), PIXART, 4)
    assert words in str(refused.value)


@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, computes: list[list[bool]], flux: bool
) -> None:
    components = FLUX if flux else PIXART[:6]
    rows = [row[: len(components)] for row in computes]
    schedule = from_steps(components, branch_units(components), rows, name="mine")
    path = tmp_path_factory.mktemp("ecad") / "mine.json"
    write_ecad(schedule, path, {"height": 256})
    notes: list[str] = []
    assert read_schedule(path, components, len(rows), note=notes.append) == schedule
    assert notes == ["the file was made with height=256"]


def test_files_are_written_back_the_same(tmp_path: Path) -> None:
    schedule = read_schedule(DATA / "ecad_pixart.json", PIXART, 4)
    write_ecad(schedule, tmp_path / "again.json")
    steps = [
        json.loads(path.read_text())["cache_schedule"]["schedule"]
        for path in (DATA / "ecad_pixart.json", tmp_path / "again.json")
    ]
    steps[0]["000"]["2"]["attn1"] = True
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (full_schedule(DIT, 2), "attn, mlp"),
        (from_steps(PIXART, branch_units(PIXART), [[True] * 9, [True] * 9, [False] * 9], order=1), "forecast"),
        (from_steps(PIXART, delta_units(PIXART), [[True], [False]]), "delta"),
        (from_steps(PIXART, branch_units(PIXART), [[True] * 9] * 2, guidance=(BOTH, CONDITIONAL)), "guidance"),
        (Schedule(tuple(PIXART), branch_units(PIXART), ((COMPUTE,) * 9, (SKIP,) * 9)), "skip"),
    ],
)
def test_refuses_to_write_what_ecad_cannot_say(schedule: Schedule, words: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=words):
        write_ecad(schedule, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("name", ["folder", "nowhere/x.json", "file/x.json"])
def test_an_ecad_file_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    schedule = read_schedule(DATA / "ecad_pixart.json", PIXART, 4)
    with pytest.raises(ScheduleError, match="the schedule file cannot be written"):
        write_ecad(schedule, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_ecad_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = read_schedule(DATA / "ecad_pixart.json", PIXART, 4)
    path = tmp_path / "x.json"
    path.write_text("before")

    def full(self: Path, text: str, encoding: str) -> None:
        self.touch()
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(ScheduleError, match="cannot be written"):
        patch.setattr(Path, "write_text", full)
        write_ecad(schedule, path)
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"] and path.read_text() == "before"


# dcc's own files and fronts


def test_reads_dcc_s_own(tmp_path: Path) -> None:
    schedule = replace(full_schedule(DIT, 3), program="a" * 64, sampler="b" * 64)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(schedule.to_json()))
    assert read_schedule(path) == schedule
    assert read_schedule(path, DIT, 3, program="a" * 64, sampler="b" * 64) == schedule
    with pytest.raises(ScheduleError, match="something else") as refused:
        read_schedule(path, DIT, 5, program="c" * 64, sampler="b" * 64)
    assert refused.value.details["got"] == "weights and operations aaaaaaaaaaaa; 3 calls"
    assert refused.value.details["want"] == "weights and operations cccccccccccc; 5 calls"
    assert "transfer" in refused.value.details["next"]
    assert str(path) in refused.value.details["at"]


def test_reads_a_front(tmp_path: Path) -> None:
    points = [full_schedule(DIT, 2), from_steps(DIT, branch_units(DIT), [[True] * 12, [False] * 12])]
    path = tmp_path / "front.json"
    path.write_text(json.dumps({"points": [{"schedule": point.to_json(), "speedup": 1.0} for point in points]}))
    with pytest.raises(ScheduleError, match="--pick"):
        read_schedule(path, DIT, 2)
    picked = read_schedule(path, DIT, 2, pick=lambda front: Schedule.from_json(front["points"][1]["schedule"]))
    assert picked == points[1]
    path.write_text(json.dumps({"points": [{"schedule": points[0].to_json()}]}))
    assert read_schedule(path, DIT, 2) == points[0]
    for wrong in ([], [3], [{}], [{"schedule": 3}], {}):
        path.write_text(json.dumps({"points": wrong}))
        with pytest.raises(ScheduleError):
            read_schedule(path, DIT, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1, 0", b"\xff\xfe", b"hello", b"{}", b'{"kind": "other"}', b'{"kind": 1, "kind": 2}',
        b"[" * 100_000,
        b'{"cache_schedule": NaN}', b'{"x": "\\ud800"}', b"[0.5, 1, 1]", b"[1, 1]", b"1\n1\n1", b'"compute"', b"null",
        b'{"cache_schedule": ' + b"9" * 5000 + b"}", b"[" + b"9" * 5000 + b"]",
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_refuses_what_is_no_schedule(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as refused:
        read_schedule(path, DIT, 3)
    assert str(path) in refused.value.details["at"]
    assert len(str(refused.value)) < 1500


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ScheduleError, match="cannot be read"):
            read_schedule(path)
    with pytest.raises(ScheduleError, match="without the components"):
        read_schedule(DATA / "ecad_pixart.json")


def test_check_fits_lists_components() -> None:
    schedule = full_schedule(DIT, 3)
    check_fits(schedule)
    check_fits(schedule, "p", "s", DIT, 3)
    for other in (DIT[:4], [*DIT[:4], "x", *DIT[5:]], [*DIT, "x"]):
        with pytest.raises(ScheduleError) as refused:
            check_fits(schedule, components=other)
        assert f"{len(other)} components" in refused.value.details["want"]
        assert "transfer" not in refused.value.details["next"]


# Step masks


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("slow", "1111111101110011100110010001"),
        ("medium", "1111110110001100011000110001"),
        ("fast", "1111110100010000100000100001"),
        ("ultra", "1111001000001000000100000001"),
    ],
)
def test_presets_of_28_steps(name: str, digits: str) -> None:
    assert "".join(str(int(bit)) for bit in steps_mask(name, 28)) == digits


# Computed calls of slow, medium, fast and ultra, from cache-dit's own function (commit f86744a of August 2026).
COUNTS = {
    4: (3, 3, 3, 3),
    6: (4, 4, 4, 4),
    8: (7, 6, 5, 4),
    9: (8, 7, 6, 5),
    10: (9, 8, 6, 5),
    15: (11, 9, 7, 6),
    16: (13, 10, 6, 3),
    20: (15, 12, 8, 5),
    28: (18, 15, 11, 8),
    30: (22, 18, 14, 10),
    50: (38, 29, 20, 14),
    100: (71, 56, 38, 27),
}


def test_presets_of_other_lengths() -> None:
    for calls, counts in COUNTS.items():
        assert tuple(sum(steps_mask(name, calls)) for name in PRESETS[28]) == counts, calls


@given(st.integers(8, 200), st.sampled_from(sorted(PRESETS[28])))
def test_presets_fit_any_length(calls: int, name: str) -> None:
    mask = steps_mask(name, calls)
    assert len(mask) == calls
    assert mask[0] and mask[-1]
    assert sum(mask) <= sum(steps_mask("slow", calls))


@pytest.mark.parametrize("calls", [0, 1, 3, 5, 7, 10**6])
def test_presets_refuse_what_cache_dit_refuses(calls: int) -> None:
    with pytest.raises(ScheduleError, match="no preset"):
        steps_mask("fast", calls)


def test_runs_and_digits() -> None:
    digits = "1111110110001100011000110001"
    for mask in (
        "6,2,2,2,2,1;1,3,3,3,3",
        " 6, 2,2,2,2,1 ; 1,3,3,3,3",
        digits,
        f"SCM{digits}",
        [int(d) for d in digits],
    ):
        assert "".join(str(int(bit)) for bit in steps_mask(mask, 28)) == digits
    assert steps_mask("2,1;1,5", 6) == (True, True, False, True, False, False)
    assert steps_mask([True, False], 2) == (True, False)


@pytest.mark.parametrize(
    "mask", ["", "quick", "2;1", "1,2", "1;;2", "a;b", "110", "SCM", [1, 2, 1, 1], [1, 1], ["1"] * 4, "9;" + "9" * 9]
)
def test_refuses_other_masks(mask: Any) -> None:
    with pytest.raises(ScheduleError, match="step mask"):
        steps_mask(mask, 4)


def test_a_mask_computes_the_first_and_last_blocks_always() -> None:
    schedule = read_steps_mask("1010", DIT, 4, first_blocks=2, last_blocks=1)
    assert [(unit.first, unit.last) for unit in schedule.units] == [(0, 3), (4, 9), (10, 11)]
    assert all(unit.stores is Stores.DELTA for unit in schedule.units)
    assert shown(schedule) == ["CCC", "CrC", "CCC", "CrC"]
    assert shown(read_steps_mask("0101", DIT, 4)) == ["CC", "CC", "Cr", "CC"]
    assert len(read_steps_mask("1010", DIT, 4, first_blocks=0).units) == 1


def test_a_mask_forecasts() -> None:
    schedule = read_steps_mask([1, 0, 1, 0, 0], DIT, 5, order=1)
    assert [row[1] for row in schedule.actions[1:]] == [
        REUSE, COMPUTE, forecast(extrapolation((2, 0), 3, 1)), forecast(extrapolation((2, 0), 4, 1))
    ]  # fmt: skip


def test_each_stack_has_its_own_first_and_last_blocks() -> None:
    """cache-dit wraps each list of blocks: FLUX has two."""
    schedule = read_steps_mask("10", FLUX, 2)
    assert [(unit.first, unit.last) for unit in schedule.units] == [(0, 2), (3, 5), (6, 6), (7, 7)]
    assert shown(schedule)[1] == "CrCr"


def test_refuses_a_mask_that_caches_nothing() -> None:
    with pytest.raises(ScheduleError, match="no block to cache"):
        read_steps_mask("10", DIT, 2, first_blocks=3, last_blocks=3)
    with pytest.raises(ScheduleError, match="negative"):
        read_steps_mask("10", DIT, 2, first_blocks=-1)
    with pytest.raises(ScheduleError, match="alternate"):
        read_steps_mask("10", [DIT[0], DIT[2], DIT[1], DIT[3]], 2)


def test_reads_masks_from_files(tmp_path: Path) -> None:
    path = tmp_path / "mask"
    for content in ("1010", "[1, 0, 1, 0]", "1,1;1,1\n"):
        path.write_text(content)
        assert read_schedule(path, DIT, 4).actions == read_steps_mask("1010", DIT, 4).actions
    with pytest.raises(ScheduleError, match="without the number of calls"):
        read_schedule(path, DIT)


# Configurations of cache-dit


@pytest.mark.parametrize(
    ("text", "middle"),
    [
        ("F1B0_W3I1M0MC0_R1.0", "CCCrrrrrrr"),
        ("F1B0_W3I1M0MC2_R1.0", "CCCrrCrrCr"),
        ("F1B0_W3I1M4MC2_R1", "CCCrrCrrCC"),
        ("F1B0_W4I2M0MC0_R1.0", "CrCrrrrrrr"),
        ("F1B0_W0I1M0MC0_R2.0", "Crrrrrrrrr"),
        ("F1B0_W0I0M0MC0_R1", "Crrrrrrrrr"),
        ("F1B0_W0M0MC3_R1", "CrrrCrrrCr"),
        ("DBCache_F1B0_W8I1M0MC0_R0.08_SCM1101000001_static", "CCrCrrrrrC"),
        ("F1B0_W8I1M0MC0_R0.08_SCM1101000001_static_N10_CFG1_T0O0_S6", "CCrCrrrrrC"),
        ("F1B0_W1I1M0MC1_R0_N10", "C" * 10),
    ],
)
def test_configurations_that_are_tables(text: str, middle: str) -> None:
    schedule = read_notation(text, DIT, 10)
    assert "".join(line[1] for line in shown(schedule)) == middle
    assert {line[0] for line in shown(schedule)} == {"C"}
    assert schedule.name == text


def test_configurations_say_blocks_and_order() -> None:
    schedule = read_cache_config("F2B1_W2I1M0MC0_R1.0_T1O1", DIT, 4)
    assert [(unit.first, unit.last) for unit in schedule.units] == [(0, 3), (4, 9), (10, 11)]
    assert schedule.actions[3][1] == forecast(extrapolation((1, 0), 3, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F1B0_W8I1M0MC6_R0.5", "decides while it runs"),
        ("F1B0_W8I1M0MC6_R0.5_SCM1101000001_dynamic", "dynamic mask"),
        ("F1B0_W8I1M0MC6_R1.5_SCM1101000001_dynamic", "dynamic mask"),
        ("DBPrune_F1B0_W8I1M0MC0_R0.1", "DBPrune"),
        ("F1B0_W8I1M0MC0_R1_FOCA", "FoCa"),
    ],
)
def test_refuses_decisions_at_run_time_and_names_the_pass(text: str, words: str) -> None:
    with pytest.raises(ScheduleError) as refused:
        read_notation(text, DIT, 10)
    assert words in str(refused.value)
    assert "residual_threshold" in refused.value.details["next"]


@pytest.mark.parametrize(
    "text",
    ["F1B0_W8I1M0MC6_R1_N28", "F1B0_W8I1M0MC6_R1_FR5_once", "F1B0", "F1B0_R1", "F6B0_W8I1M0MC6_R1",
     "F1B0_W8I1M0MC6_R1_SCM11_static", "F1B0_W8I1M0MC6_R1\nF1B0_W8I1M0MC6_R1", "1" * 5000],
)  # fmt: skip
def test_refuses_configurations_that_do_not_fit(text: str) -> None:
    with pytest.raises(ScheduleError):
        read_notation(text, DIT, 10)


# Transfer


def every(interval: int, calls: int, order: int = 0) -> Schedule:
    return from_steps(DIT, branch_units(DIT), [[call % interval == 0] * 12 for call in range(calls)], order)


def column(schedule: Schedule, unit: int = 0) -> str:
    return "".join(line[unit] for line in shown(schedule))


def test_transfer_to_the_nearest_call() -> None:
    assert column(every(2, 4)) == "CrCr"
    assert column(transfer(every(2, 4), 7)) == "CrrCCrr"
    assert column(transfer(every(3, 9), 5)) == "CrrCr"
    assert column(transfer(every(3, 9), 1)) == "C"


def test_transfer_that_keeps_intervals() -> None:
    for interval in (1, 2, 3, 5):
        for calls in (10, 20, 47):
            moved = transfer(every(interval, 20), calls, placement="interval")
            assert column(moved) == column(every(interval, calls))
    uneven = from_steps(DIT, branch_units(DIT), [[call in (0, 1, 2, 3, 7, 11, 15)] * 12 for call in range(16)])
    assert column(transfer(uneven, 32, placement="interval")) == "CCCCCCC" + "rrrC" * 6 + "C"


def test_transfer_recomputes_weights() -> None:
    moved = transfer(every(3, 9, order=1), 17, placement="interval")
    for call, row in enumerate(moved.actions):
        if not row[0].computes:
            assert row[0].weights == extrapolation(moved.history(call, 0), call, 1)
    assert column(moved) == column(every(3, 17, order=1))
    assert moved.actions == every(3, 17, order=1).actions


def test_transfer_to_the_same_calls_changes_the_hashes_alone() -> None:
    schedule = Schedule(("a",), branch_units(("a",)), ((COMPUTE,), (forecast((0.9,)),)), program="p", sampler="s")
    assert transfer(schedule, 2) == replace(schedule, program="", sampler="")
    moved = transfer(schedule, 4, program="q", sampler="t")
    assert (moved.program, moved.sampler) == ("q", "t")
    assert column(moved) == "CCrr"


def test_transfer_moves_guidance() -> None:
    rows = [[True], [True], [True]]
    schedule = from_steps(["a"], branch_units(["a"]), rows, guidance=(BOTH, REUSE_DIFFERENCE, CONDITIONAL))
    assert [mode.kind for mode in transfer(schedule, 5).guidance] == [
        "both",
        "reuse",
        "reuse",
        "conditional",
        "conditional",
    ]
    late = from_steps(
        ["a"], branch_units(["a"]), [[True], [True], [False], [False]], guidance=(CONDITIONAL, BOTH, BOTH, BOTH)
    )
    assert column(transfer(late, 8)) == "CCCCrrrr"


@given(st.data())
@settings(max_examples=60)
def test_transfer_is_valid_for_any_schedule(data: st.DataObject) -> None:
    calls = data.draw(st.integers(1, 7))
    kinds = data.draw(st.lists(st.sampled_from([BOTH, CONDITIONAL]), min_size=calls, max_size=calls))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=calls, max_size=calls))
    base = from_steps("abc", delta_units("abc", (0, 1, 2)), rows, data.draw(st.integers(0, 2)), kinds)
    skips = [[*row[:2], SKIP] for row in base.actions]
    base = replace(base, actions=tuple(map(tuple, skips)))
    target = data.draw(st.integers(1, 12))
    for placement in ("nearest", "interval"):
        moved = transfer(base, target, placement=placement)
        assert moved.calls == target
        assert moved.units == base.units
        assert moved.column(2) == (SKIP,) * target
        assert all(action.computes for action in moved.actions[0][:2])


def test_transfer_refuses() -> None:
    for calls, placement in ((0, "nearest"), (10**9, "nearest"), (5, "even")):
        with pytest.raises(ScheduleError, match="no such"):
            transfer(every(2, 4), calls, placement=placement)
