"""The report: four files that say the same, a page that loads nothing and shows every text as text, whole or none."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_front import COMPONENTS, made_up_front, made_up_points

from dcc.errors import ExportError, UsageError
from dcc.ir.schedule import BOTH, CONDITIONAL, SKIP, Schedule, branch_units, delta_units, from_steps, full_schedule
from dcc.search.front import Front, non_dominated
from dcc.search.report import (
    ACTION_COLOURS,
    ACTION_KINDS,
    FRONT_COLOUR,
    METHOD_COLOURS,
    MODE_COLOURS,
    PICTURE_BUDGET,
    fewer_steps_of,
    front_csv,
    front_html,
    front_png,
    heat_map_png,
    write_report,
)

FILES = ["front.csv", "front.json", "front.png", "index.html"]
HOSTILE = "<script>alert(1)</script>\"'&</script><!--<img src=x onerror=alert(1)>$\\frac{ =1+1 漢"

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def front() -> Front:
    return made_up_front()


@pytest.fixture(scope="module")
def grids(front: Front) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {point.digest: draw.integers(0, 255, (20, 20, 1), dtype=np.uint8) for point in front.everything}


@pytest.fixture(scope="module")
def folder(front: Front, grids: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert [path.name for path in write_report(front, place, grids)] == [FILES[1], FILES[0], *FILES[2:]]
    return place


class Elements(HTMLParser):
    """Every tag with its attributes, and the text inside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data


def page_data(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Elements(text).scripts[0])
    return value


def picture(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")


def share_of(data: bytes, colour: str) -> float:
    """Pixels of exactly this colour over all pixels."""
    pixels = np.asarray(picture(data))
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return float((pixels == wanted).all(axis=-1).mean())


def test_the_folder_holds_the_four_files_and_nothing_else(folder: Path, front: Front) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert Front.read(folder / "front.json") == front
    assert (folder / "front.csv").read_text() == front_csv(front)


def test_the_table_has_a_row_for_each_point(front: Front) -> None:
    rows = list(csv.DictReader(io.StringIO(front_csv(front))))
    assert [row["digest"] for row in rows] == [point.digest for point in front.everything]
    for row, point in zip(rows, front.everything, strict=True):
        assert float(row["psnr"]) == point.psnr
        assert float(row["latency_ms"]) == point.latency_ms
        assert row["on_front"] == str(int(point in front.points))
        assert row["search_psnr"] == ("" if point.search_psnr is None else str(point.search_psnr))
        assert row["fewer_steps"] == (str(point.fewer_steps.steps) if point.fewer_steps else "")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@f", "\tx"])
def test_no_name_is_a_formula_in_a_spreadsheet(front: Front, name: str) -> None:
    kept = replace(front, points=(), others=(replace(front.others[0], name=name),))
    assert next(csv.DictReader(io.StringIO(front_csv(kept))))["name"] == f"'{name}"


def test_the_figure_is_1200_wide_and_shows_front_and_methods(front: Front) -> None:
    data = front_png(front)
    assert picture(data).width == 1200
    assert share_of(data, FRONT_COLOUR) > 0.001
    for colour in METHOD_COLOURS[:3]:
        assert share_of(data, colour) > 0.00002
    assert data == front_png(front)


def some(front: Front, *origins: str) -> Front:
    points, others = non_dominated(point for point in front.everything if point.origin in origins)
    return replace(front, points=points, others=others, history=front.history[:1])


EDGES: dict[str, Callable[[Front], Front]] = {
    "no points": lambda front: some(front),
    "the exact one alone": lambda front: some(front, "exact"),
    "one method": lambda front: some(front, "delta-dit"),
    "no infinite psnr": lambda front: some(front, "fora", "search"),
    "a flat history": lambda front: replace(front, history=(front.history[0],) * 3),
    "one speed": lambda front: replace(front, points=(), others=(front.points[0],) * 3),
    "much faster": lambda front: replace(front, others=(*front.others, replace(front.points[0], speedup=700.0))),
}


@pytest.mark.parametrize("name", EDGES)
def test_fronts_of_every_shape_are_drawn(front: Front, name: str) -> None:
    edge = EDGES[name](front)
    assert picture(front_png(edge)).width == 1200
    assert len(page_data(front_html(edge))["points"]) == len(edge.everything)


def test_runs_with_fewer_steps_are_drawn_once_each(front: Front) -> None:
    runs = fewer_steps_of(front)
    assert [run.steps for run in runs] == sorted({run.steps for run in runs}, reverse=True)
    assert {run.steps for run in runs} == {point.fewer_steps.steps for point in front.everything if point.fewer_steps}


def unpacked(data: dict[str, Any], index: int) -> list[list[str]]:
    """Labels by `[calls][components]`, as the page's script finds them."""
    point = data["points"][index]
    units = data["layouts"][point["layout"]]["units"]
    owner = [place for place, (_, first, last, _) in enumerate(units) for _ in range(first, last + 1)]
    return [
        [data["actions"][point["cells"][call * len(units) + unit]][1] for unit in owner]
        for call in range(point["calls"])
    ]


def test_the_page_holds_every_schedule(folder: Path, front: Front) -> None:
    data = page_data((folder / "index.html").read_text())
    for index, point in enumerate(front.everything):
        assert data["points"][index]["psnr"] == (None if math.isinf(point.psnr) else point.psnr)
        shown = unpacked(data, index)
        for row, actions in zip(shown, point.schedule.component_actions(), strict=True):
            for label, action in zip(row, actions, strict=True):
                weights = [float(word) for word in re.findall(r"-?[\d.]+(?:e-?\d+)?", label)]
                if label.startswith("forecast"):
                    assert weights == pytest.approx(action.weights, rel=1e-3)
                else:
                    assert label == ("reuse" if action.weights == (1.0,) else action.kind)
        modes = [data["modes"][mode][0] for mode in data["points"][index]["modes"]]
        kinds = [("both", "conditional", "reuse")[mode] for mode in modes]
        assert kinds == [mode.kind for mode in point.schedule.guidance]


def test_the_page_holds_the_images_as_they_are(folder: Path, front: Front, grids: dict[str, np.ndarray]) -> None:
    data = page_data((folder / "index.html").read_text())
    assert front.exact is not None
    assert data["exact"] == front.exact.digest
    for digest, grid in grids.items():
        shown = Image.open(io.BytesIO(base64.b64decode(data["images"][digest])))
        np.testing.assert_array_equal(np.asarray(shown), grid[..., 0])


def test_images_of_other_schedules_are_left_out_and_large_ones_shrink(front: Front) -> None:
    draw = np.random.default_rng(0)
    few = replace(front, points=front.points[:3], others=())
    large = {point.digest: draw.integers(0, 255, (900, 450, 3), dtype=np.uint8) for point in few.points}
    data = page_data(front_html(few, {**large, "f" * 64: large[few.points[0].digest]}))
    assert set(data["images"]) == set(large)
    sizes = [len(base64.b64decode(text)) for text in data["images"].values()]
    assert sum(sizes) <= PICTURE_BUDGET
    width, height = Image.open(io.BytesIO(base64.b64decode(data["images"][few.points[0].digest]))).size
    assert height > 200
    assert abs(width - height / 2) <= 1


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8), np.uint8(1)]
)
def test_what_is_no_image_is_refused_before_anything_is_written(front: Front, image: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an image"):
        write_report(front, tmp_path / "report", {front.points[0].digest: np.asarray(image)})
    assert list(tmp_path.iterdir()) == []


def test_the_page_loads_nothing(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Elements(text)
    assert all("src" not in attributes and "href" not in attributes for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "object", "base", "form")] == []
    code = text.replace("http://www.w3.org/2000/svg", "")
    for word in ("http:", "https:", "//cdn", "@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert word not in code
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def hostile_front() -> Front:
    units = branch_units((HOSTILE, "second"))
    odd = from_steps((HOSTILE, "second"), units, [[call % 2 == 0] * 2 for call in range(20)], 1)
    points = []
    for point in made_up_points(searched=4):
        origin = point.origin if point.origin in ("exact", "search") else f"_{HOSTILE}{point.origin}"
        points.append(replace(point, name=HOSTILE + point.name, origin=origin))
    points[3] = replace(points[3], schedule=odd)
    best = {HOSTILE: 3.0}
    history = tuple(replace(row, best=best) for row in made_up_front().history)
    return made_up_front(
        points, model=HOSTILE, sampler=HOSTILE, target=HOSTILE, notes={HOSTILE: HOSTILE}, history=history
    )


def test_names_are_text_wherever_they_stand(front: Front) -> None:
    hostile = hostile_front()
    text = front_html(hostile)
    page, plain = Elements(text), Elements(front_html(front))
    assert page.tags == plain.tags
    assert len(page.scripts) == 2
    assert page.scripts[1] == plain.scripts[1]
    assert page.title.startswith(HOSTILE)
    data = json.loads(page.scripts[0])
    assert [point["name"] for point in data["points"]] == [point.name for point in hostile.everything]
    assert data["notes"] == json.dumps({HOSTILE: HOSTILE}, indent=2, ensure_ascii=False)
    # No text becomes markup in the script either.
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert word not in text
    assert picture(front_png(hostile)).width == 1200
    heat_map_png(replace(hostile.points[0].schedule, name=HOSTILE))
    assert any(HOSTILE in point.schedule.components for point in hostile.everything)
    for point in hostile.everything:
        if HOSTILE in point.schedule.components:
            heat_map_png(point.schedule)


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the page's script, and is not installed")
def test_the_script_is_javascript(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "page.js"
    path.write_text(Elements(front_html(front)).scripts[1])
    subprocess.run(["node", "--check", str(path)], check=True, capture_output=True)


def test_a_large_front_stays_at_a_few_megabytes() -> None:
    """15 points of 50 calls and 56 components; 60 take four times that, and images have a budget of their own."""
    components = tuple(f"transformer_blocks.{block}.{part}" for block in range(28) for part in ("attention", "mlp"))
    large = made_up_front(made_up_points(components, 50, 5), steps=50)
    assert len(large.everything) == 15
    assert len(front_html(large)) < 250_000


def test_the_heat_map_colours_what_the_schedule_does() -> None:
    everything = heat_map_png(full_schedule(COMPONENTS, 20))
    assert share_of(everything, ACTION_COLOURS[0]) > 0.2
    assert share_of(everything, MODE_COLOURS[0]) > 0.005
    for colour in (*ACTION_COLOURS[1:], *MODE_COLOURS[1:]):
        # The edges of letters have every grey.
        assert share_of(everything, colour) < 0.001
    spans = from_steps(COMPONENTS, delta_units(COMPONENTS, (0, 8)), [[True, call % 2 == 0] for call in range(20)], 1)
    rows = [(row[0], SKIP) if call % 4 == 3 else row for call, row in enumerate(spans.actions)]
    schedule = replace(spans, actions=tuple(rows), guidance=(*(BOTH,) * 15, *(CONDITIONAL,) * 5))
    mixed = heat_map_png(schedule)
    # Of 20 calls the second half computes 10, reuses 1 (there is one value yet), forecasts 4 and skips 5.
    share = {kind: share_of(mixed, colour) for kind, colour in zip(ACTION_KINDS, ACTION_COLOURS, strict=True)}
    cells = {"compute": 20 + 10, "reuse": 1, "forecast": 4, "skip": 5}
    for kind, count in cells.items():
        assert share[kind] / share["compute"] == pytest.approx(count / cells["compute"], rel=0.25, abs=0.01)
    assert share_of(mixed, MODE_COLOURS[0]) / share_of(mixed, MODE_COLOURS[1]) == pytest.approx(3.0, rel=0.25)
    assert mixed == heat_map_png(schedule)


@pytest.mark.parametrize(("components", "calls"), [(1, 1), (2, 150), (120, 2)])
def test_heat_maps_of_every_shape(components: int, calls: int) -> None:
    names = tuple(f"component.{index}" for index in range(components))
    size = picture(heat_map_png(full_schedule(names, calls))).size
    assert max(size) <= 2400


@pytest.mark.parametrize("missing", ["matplotlib.figure", "PIL.Image"])
def test_a_missing_package_is_named_and_leaves_nothing(
    front: Front, grids: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=re.escape("pip install 'dcc[search]'")) as caught:
        write_report(front, tmp_path / "report", grids)
    assert caught.value.details["got"] == f"no {missing.split('.')[0]}"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_no_part_of_a_report(front: Front, tmp_path: Path) -> None:
    front = some(front, "exact")
    (tmp_path / "index.html").mkdir()
    (tmp_path / "front.json").write_text("old")
    with pytest.raises(ExportError, match="cannot be written"):
        write_report(front, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.json", "index.html"]
    assert (tmp_path / "front.json").read_text() == "old"
    with pytest.raises(ExportError, match="folder cannot be made"):
        write_report(front, tmp_path / "front.json" / "inside")


def test_a_second_report_replaces_the_first(front: Front, tmp_path: Path) -> None:
    (tmp_path / "evaluations.sqlite").write_text("kept")
    write_report(some(front, "delta-dit"), tmp_path)
    write_report(some(front, "exact"), tmp_path)
    assert Front.read(tmp_path / "front.json") == some(front, "exact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.sqlite", *FILES]


def test_an_empty_schedule_name_shows_the_origin(front: Front) -> None:
    bare: Schedule = replace(front.points[0].schedule, name="")
    kept = replace(front, points=(replace(front.points[0], name="", schedule=bare),), others=())
    assert page_data(front_html(kept))["points"][0]["name"] == ""
    assert picture(heat_map_png(bare)).width > 300
