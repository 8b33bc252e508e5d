"""A front as files to look at: front.json, front.csv, front.png and a page that needs nothing but a browser."""

from __future__ import annotations

import base64
import csv
import html
import importlib
import io
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcc.errors import ExportError, UsageError
from dcc.ir.schedule import Action, GuidanceMode, Schedule
from dcc.search.front import FewerSteps, Front, Point, write_files

Array = np.ndarray[Any, np.dtype[Any]]

# Okabe and Ito's colours, which stay apart for the colour-blind. The page has the same in its style sheet.
ACTION_KINDS = ("compute", "reuse", "forecast", "skip")
ACTION_COLOURS = ("#0072b2", "#a6d3ee", "#e69f00", "#e4e4e4")
MODE_KINDS = ("both", "conditional", "reuse")
MODE_LABELS = ("both halves", "conditional only", "reused difference")
MODE_COLOURS = ("#4d4d4d", "#cc79a7", "#009e73")
METHOD_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f3c8d", "#8c564b", "#444444")
METHOD_MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">")
FRONT_COLOUR = "#0072b2"

# Beyond this ratio of the fastest to the slowest the axis of speedups is logarithmic.
LOG_RATIO = 4.0
LOG_TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 200, 500, 1000)
PICTURE_BUDGET = 3 << 20
PICTURE_SIDE = 1024
LEAST_SIDE = 96
LABEL_LIMIT = 40
COLUMNS = (
    "name", "origin", "on_front", "digest", "speedup", "latency_ms", "predicted_ms", "computed_share", "psnr", "ssim",
    "search_psnr", "fewer_steps", "fewer_steps_latency_ms", "fewer_steps_psnr", "fewer_steps_ssim",
)  # fmt: skip


def write_report(
    front: Front, folder: str | os.PathLike[str], images: Mapping[str, Array] | None = None
) -> tuple[Path, ...]:
    """front.json, front.csv, front.png and index.html are in `folder`; their paths.

    `images` gives sample grids by the digest of their schedule, uint8 `[H, W]` or `[H, W, 1, 3 or 4]`, as
    `dcc.picture.grid` makes them; those of other schedules are left out. Large ones are scaled down in the page, so
    that it stays at a few MB. Everything is made before the first file is written, so a failure leaves no part of it.
    Raises UsageError where matplotlib or Pillow is missing or an image is none, and ExportError where the folder
    cannot be written.
    """
    place = Path(folder)
    page = front_html(front, images).encode()
    contents = {
        place / "front.json": front.to_bytes(),
        place / "front.csv": front_csv(front).encode(),
        place / "front.png": front_png(front),
        place / "index.html": page,
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError("the folder cannot be made", at=place, got=error, next="choose another -o") from error
    write_files(contents)
    return tuple(contents)


def front_csv(front: Front) -> str:
    """A row for each point, those of the front first; "inf" is equal samples, nothing is not measured."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for index, point in enumerate(front.everything):
        fewer = point.fewer_steps
        rest = (None,) * 4 if fewer is None else (fewer.steps, fewer.latency_ms, fewer.psnr, fewer.ssim)
        table.writerow((
            _cell(point.name), _cell(point.origin), int(index < len(front.points)), point.digest, point.speedup,
            point.latency_ms, point.predicted_ms, point.computed_share, point.psnr, point.ssim, point.search_psnr,
            *rest,
        ))  # fmt: skip
    return text.getvalue()


def front_png(front: Front) -> bytes:
    """Speedup against PSNR, 1200 pixels wide: the front, the methods, and the runs with fewer plain steps.

    Points of infinite PSNR lie on a line of their own above the scale. Raises UsageError without matplotlib.
    """
    figure = _figure(8.0, 5.6)
    axes = figure.subplots()
    fewer = fewer_steps_of(front)
    values = [*(point.psnr for point in front.everything), *(run.psnr for run in fewer)]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = max((high - low) * 0.06, 0.5)
    top = high + 2.0 * margin
    endless = len(finite) < len(values)

    def height(value: float) -> float:
        return value if math.isfinite(value) else top

    if endless:
        axes.axhline(top - 0.7 * margin, color="#bbbbbb", linewidth=0.8, linestyle=":")
    if fewer:
        speeds = [front.exact_ms / run.latency_ms for run in fewer]
        axes.plot(
            speeds, [height(run.psnr) for run in fewer], color="#8c8c8c", marker=".", linestyle="--", linewidth=1.2,
            label="fewer plain steps", zorder=2,
        )  # fmt: skip
        _label_steps(axes, fewer, speeds, height, (low - margin, top + margin))
    line = [point for point in front.points if math.isfinite(point.psnr)]
    if line:
        axes.plot(
            [point.speedup for point in line], [point.psnr for point in line], color=FRONT_COLOUR, marker="o",
            markersize=5, linewidth=1.8, label="front", zorder=4,
        )  # fmt: skip
    for label, origin, style in _series(front):
        members = [point for point in front.everything if point.origin == origin]
        if origin == "search":
            members = [point for point in front.others if point.origin == origin]
        if members:
            axes.plot(
                [point.speedup for point in members], [height(point.psnr) for point in members], linestyle="none",
                label=label, **style,
            )  # fmt: skip
    axes.set_xlabel("measured speedup against the exact artifact")
    axes.set_ylabel("PSNR on held-out seeds [dB]")
    axes.set_ylim(low - margin, top + margin if endless else high + margin)
    ticks = [tick for tick in _ticker().MaxNLocator(8).tick_values(low, high) if low - margin <= tick <= high + margin]
    labels = [f"{tick:g}" for tick in ticks]
    # The axis does not go up to infinity in the same units, so that its label stands apart.
    axes.set_yticks([*ticks, top] if endless else ticks, [*labels, "equal"] if endless else labels)
    _speed_axis(axes, [*(p.speedup for p in front.everything), *(front.exact_ms / run.latency_ms for run in fewer)])
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(_label(_title(front), 90), fontsize=10, parse_math=False)
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _saved(figure)


def heat_map_png(schedule: Schedule) -> bytes:
    """Components by calls, coloured by what stands in for each, with a strip of the guidance modes above.

    Raises UsageError without matplotlib.
    """
    table = np.array([[_action_kind(action) for action in row] for row in schedule.component_actions()]).T
    modes = np.array([[MODE_KINDS.index(mode.kind) for mode in schedule.guidance]])
    rows, calls = table.shape
    figure = _figure(min(max(3.5, 1.6 + 0.16 * calls), 16.0), min(max(2.6, 1.5 + 0.13 * rows), 16.0))
    strip, cells = figure.subplots(2, 1, sharex=True, height_ratios=(1, max(rows, 6)))
    colors = importlib.import_module("matplotlib.colors")
    for axes, values, colours in ((strip, modes, MODE_COLOURS), (cells, table, ACTION_COLOURS)):
        axes.pcolormesh(
            np.arange(calls + 1) - 0.5, np.arange(len(values) + 1) - 0.5, values, cmap=colors.ListedColormap(colours),
            vmin=-0.5, vmax=len(colours) - 0.5, edgecolors="white", linewidth=0.4 if calls * rows <= 4000 else 0.0,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.tick_params(labelsize=6, length=2)
        for side in axes.spines.values():
            side.set_visible(False)
    every = math.ceil(rows / 100)
    shown = range(0, rows, every)
    cells.set_yticks(list(shown), [_label(schedule.components[row], 28) for row in shown])
    strip.set_yticks([0], ["guidance"])
    strip.tick_params(bottom=False)
    for text in cells.get_yticklabels():
        text.set_parse_math(False)
    cells.xaxis.set_major_locator(_ticker().MaxNLocator(min(calls, 12), integer=True))
    cells.set_xlabel("sampler call", fontsize=7)
    if schedule.name:
        strip.set_title(_label(schedule.name, 60), fontsize=8, parse_math=False)
    patches = importlib.import_module("matplotlib.patches")
    present = [(label, colour) for kind, (label, colour) in enumerate(zip(ACTION_KINDS, ACTION_COLOURS, strict=True))
               if kind in table]  # fmt: skip
    present += [(label, colour) for kind, (label, colour) in enumerate(zip(MODE_LABELS, MODE_COLOURS, strict=True))
                if kind in modes]  # fmt: skip
    handles = [patches.Patch(color=colour, label=label) for label, colour in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=6, frameon=False)
    return _saved(figure)


def front_html(front: Front, images: Mapping[str, Array] | None = None) -> str:
    """The page as text: it loads nothing, and shows every name as text whatever it holds.

    `images` as in `write_report`. Raises UsageError where an image is none, or without Pillow if there are images.
    """
    before, after = PAGE.split("@DATA@")
    # In a script element only "<" matters; the others cost nothing.
    data = json.dumps(_page_data(front, images or {}), allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    return before.replace("@TITLE@", html.escape(_title(front))) + data + after


def fewer_steps_of(front: Front) -> tuple[FewerSteps, ...]:
    """The runs with fewer plain steps beside the points, each number of steps once, most steps first."""
    runs = {point.fewer_steps.steps: point.fewer_steps for point in reversed(front.everything) if point.fewer_steps}
    return tuple(runs[steps] for steps in sorted(runs, reverse=True))


def _title(front: Front) -> str:
    return f"{front.model}, {front.sampler}, {front.steps} steps, batch {front.batch}, {front.target}"


def _cell(text: str) -> str:
    """A spreadsheet would run a text that begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _methods(front: Front) -> list[str]:
    """Origins other than the search and the exact artifact, in order of appearance."""
    return [*dict.fromkeys(point.origin for point in front.everything if point.origin not in ("search", "exact"))]


def _series(front: Front) -> list[tuple[str, str, dict[str, Any]]]:
    """Label, origin and line style of everything drawn as markers alone."""
    series: list[tuple[str, str, dict[str, Any]]] = [
        ("search, not on the front", "search", {"marker": "o", "markersize": 3, "color": "#9cc4de", "zorder": 3})
    ]
    for index, origin in enumerate(_methods(front)):
        style = {
            "marker": METHOD_MARKERS[index % len(METHOD_MARKERS)],
            "color": METHOD_COLOURS[index % len(METHOD_COLOURS)],
            "markersize": 6.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": 5,
        }
        series.append((_label(origin), origin, style))
    exact = {"marker": "*", "markersize": 11, "color": "#222222", "zorder": 6}
    return [*series, ("exact", "exact", exact)]


def _label_steps(
    axes: Any, runs: Sequence[FewerSteps], speeds: Sequence[float], height: Any, limits: tuple[float, float]
) -> None:
    """The number of steps below its mark, left out where it would cover the one before."""
    last = (-math.inf, -math.inf)
    span = max(math.log(max(speeds) / min(speeds)), 0.1)
    for run, speed in zip(runs, speeds, strict=True):
        at = (math.log(speed) / span, height(run.psnr) / (limits[1] - limits[0]))
        if abs(at[0] - last[0]) < 0.05 and abs(at[1] - last[1]) < 0.04:
            continue
        last = at
        axes.annotate(
            f"{run.steps}", (speed, height(run.psnr)), xytext=(0, -5), textcoords="offset points", ha="center",
            va="top", fontsize=7, color="#707070",
        )  # fmt: skip


def _is_log(speeds: Sequence[float]) -> bool:
    return bool(speeds) and max(speeds) > LOG_RATIO * min(speeds)


def _speed_axis(axes: Any, speeds: Sequence[float]) -> None:
    if not speeds:
        return
    low, high = min(speeds), max(speeds)
    if _is_log(speeds):
        axes.set_xscale("log")
        margin = (high / low) ** 0.04
        axes.set_xlim(low / margin, high * margin)
        ticks = [tick for tick in LOG_TICKS if low / margin <= tick <= high * margin]
        axes.xaxis.set_major_locator(_ticker().FixedLocator(ticks))
        axes.xaxis.set_minor_locator(_ticker().NullLocator())
    else:
        margin = max((high - low) * 0.05, 0.05)
        axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:g}x"))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "reports are drawn by matplotlib and Pillow, and one of them is not installed",
            got=f"no {name.partition('.')[0]}",
            next="pip install 'dcc[search]'",
        ) from error


def _ticker() -> Any:
    return _module("matplotlib.ticker")


def _figure(width: float, height: float) -> Any:
    """A figure of its own, which no window and no global state knows of; 150 pixels an inch."""
    figure = _module("matplotlib.figure").Figure(figsize=(width, height), dpi=150, layout="constrained")
    _module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any) -> bytes:
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold letters that the font lacks: they become boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _label(text: str, limit: int = LABEL_LIMIT) -> str:
    """As it can stand in a figure; legends leave out what begins with an underscore."""
    shown = "".join(mark if mark.isprintable() else "?" for mark in text)
    shown = shown if len(shown) <= limit else f"{shown[: limit - 3]}..."
    return f" {shown}" if shown.startswith("_") else shown


def _action_kind(action: Action) -> int:
    if action.kind == "combine":
        return ACTION_KINDS.index("reuse" if action.weights == (1.0,) else "forecast")
    return ACTION_KINDS.index(action.kind)


def _weights(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.4g}" for weight in weights)


def _action_label(action: Action) -> str:
    kind = ACTION_KINDS[_action_kind(action)]
    return f"forecast {_weights(action.weights)}" if kind == "forecast" else kind


def _mode_label(mode: GuidanceMode) -> str:
    label = MODE_LABELS[MODE_KINDS.index(mode.kind)]
    return label if mode.weights in ((), (1.0,)) else f"{label} {_weights(mode.weights)}"


class _Table:
    """Values by index, each kept once: schedules share nearly all of their actions and names."""

    def __init__(self) -> None:
        self.indices: dict[str, int] = {}
        self.values: list[Any] = []

    def index(self, value: Any) -> int:
        key = json.dumps(value)
        if key not in self.indices:
            self.indices[key] = len(self.values)
            self.values.append(value)
        return self.indices[key]


def _page_data(front: Front, images: Mapping[str, Array]) -> dict[str, Any]:
    """What the page shows, a few hundred kB for 60 schedules of 50 calls and 56 components."""
    actions, modes, layouts = _Table(), _Table(), _Table()
    methods = _methods(front)
    fewer = fewer_steps_of(front)
    exact = front.exact
    pictures = _pictures({p.digest: images[p.digest] for p in front.everything if p.digest in images})
    speeds = [*(p.speedup for p in front.everything), *(front.exact_ms / run.latency_ms for run in fewer)]
    return {
        "facts": [
            ["model", front.model], ["sampler", front.sampler], ["steps", front.steps], ["target", front.target],
            ["batch", front.batch],
            ["guidance scale", "none" if front.guidance_scale is None else front.guidance_scale],
            ["exact", f"{front.exact_ms:.4g} ms"], ["evaluations", front.evaluations],
            ["search took", f"{front.seconds:.0f} s"], ["search seeds", _seeds(front.seeds)],
            ["held-out seeds", _seeds(front.held_out)], ["program", front.program[:16]],
        ],
        "log": _is_log(speeds), "ticks": LOG_TICKS, "methods": methods, "colours": METHOD_COLOURS,
        "points": [
            _page_point(point, index < len(front.points), actions, modes, layouts)
            for index, point in enumerate(front.everything)
        ],
        "fewer": [
            [run.steps, front.exact_ms / run.latency_ms, run.latency_ms, _finite(run.psnr), run.ssim] for run in fewer
        ],
        "actions": actions.values, "modes": modes.values, "layouts": layouts.values,
        "images": pictures, "exact": None if exact is None else exact.digest,
        "history": [row.to_json() for row in front.history],
        "notes": json.dumps(dict(front.notes), indent=2, ensure_ascii=False) if front.notes else "",
    }  # fmt: skip


def _page_point(point: Point, on_front: bool, actions: _Table, modes: _Table, layouts: _Table) -> dict[str, Any]:
    schedule = point.schedule
    fewer = point.fewer_steps
    units = [[unit.name, unit.first, unit.last, str(unit.stores)] for unit in schedule.units]
    return {
        "name": point.name, "origin": point.origin, "front": on_front, "digest": point.digest,
        "speedup": point.speedup, "latency": point.latency_ms, "predicted": point.predicted_ms,
        "share": point.computed_share, "psnr": _finite(point.psnr), "ssim": point.ssim,
        "searched": point.search_psnr is not None,
        "search": None if point.search_psnr is None else _finite(point.search_psnr),
        "fewer": None if fewer is None else [fewer.steps, fewer.latency_ms, _finite(fewer.psnr), fewer.ssim],
        "layout": layouts.index({"components": schedule.components, "units": units}),
        "calls": schedule.calls,
        "cells": [
            actions.index([_action_kind(action), _action_label(action)]) for row in schedule.actions for action in row
        ],
        "modes": [modes.index([MODE_KINDS.index(mode.kind), _mode_label(mode)]) for mode in schedule.guidance],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seeds(seeds: Sequence[int]) -> str:
    run = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    if run:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds[:12])) + (f", ... ({len(seeds)})" if len(seeds) > 12 else "") or "none"


def _pictures(images: Mapping[str, Array]) -> dict[str, str]:
    """PNG in base64 by digest, scaled down alike until all of them together keep the budget."""
    if not images:
        return {}
    library = _module("PIL.Image")
    opened = {digest: library.fromarray(_pixels(image, digest)) for digest, image in images.items()}
    side = min(PICTURE_SIDE, max(max(picture.size) for picture in opened.values()))
    while True:
        encoded = {digest: _encoded(picture, side) for digest, picture in opened.items()}
        total = sum(map(len, encoded.values()))
        if total <= PICTURE_BUDGET or side <= LEAST_SIDE:
            return {digest: base64.b64encode(data).decode() for digest, data in encoded.items()}
        # A little less than what bytes by area would give, as smaller images compress less well.
        side = max(LEAST_SIDE, int(side * 0.9 * math.sqrt(PICTURE_BUDGET / total)))


def _encoded(picture: Any, side: int) -> bytes:
    data = io.BytesIO()
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    smaller.save(data, format="png")
    return data.getvalue()


def _pixels(image: Array, digest: str) -> Array:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        raise UsageError(
            "this is not an image", at=f"images[{digest[:12]!r}]", got=f"{image.dtype}{list(image.shape)}",
            want="uint8 [H, W] or [H, W, 1, 3 or 4]", next="dcc.picture.grid(to_pixels(samples))",
        )  # fmt: skip
    return np.ascontiguousarray(image[..., 0] if image.ndim == 3 and channels == 1 else image)


# Text reaches the page only through `textContent` and attributes that JS sets; nothing is parsed as HTML. The
# policy makes the browser refuse every request that a later mistake might make.
PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
:root { --page: #fff; --panel: #f6f7f8; --text: #1b1f24; --soft: #5b646e; --line: #d8dce0; --front: #0072b2;
  --dim: #9cc4de; --plain: #7d7d7d; --exact: #1b1f24; --mark: #d9480f;
  --compute: #0072b2; --reuse: #a6d3ee; --forecast: #e69f00; --skip: #e4e4e4;
  --both: #4d4d4d; --conditional: #cc79a7; --difference: #009e73; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --panel: #1d2125; --text: #e4e7ea; --soft: #9aa4ae; --line: #363c43; --front: #4aa8e0;
    --dim: #35607c; --plain: #8f8f8f; --exact: #f0f0f0; --mark: #ff9a5c;
    --compute: #2f8fce; --reuse: #1d4560; --forecast: #e69f00; --skip: #2a2f34;
    --both: #a0a0a0; --conditional: #cc79a7; --difference: #00b386; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 16px 20px 40px; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 14px; color: var(--soft); font-size: 13px; }
.facts b { color: var(--text); font-weight: 600; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); gap: 18px; align-items: start; }
@media (max-width: 900px) { .two { grid-template-columns: minmax(0, 1fr); } }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.left > * + * { margin-top: 18px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg text.axis { fill: var(--text); } .grid { stroke: var(--line); stroke-width: 1; }
.point { cursor: pointer; stroke: var(--panel); stroke-width: 1; outline: none; }
.point.chosen { stroke: var(--mark); stroke-width: 3; } .point:focus-visible { stroke: var(--text); stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 14px; font-size: 12px; color: var(--soft); margin-top: 6px; }
.legend span { display: inline-flex; align-items: center; gap: 5px; overflow-wrap: anywhere; }
.legend i { width: 12px; height: 12px; border-radius: 2px; flex: none; } .legend svg { width: 14px; height: 14px; }
dl { display: grid; grid-template-columns: auto 1fr auto 1fr; gap: 2px 12px; margin: 0 0 10px; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd.wide { grid-column: 2 / -1; } code { font-size: 12px; }
canvas { display: block; width: 100%; } .read { min-height: 3em; font-size: 12px; color: var(--soft); margin: 6px 0 8px;
  overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; } figure { margin: 0; min-width: 0; }
figure img { width: 100%; display: block; border: 1px solid var(--line); }
figcaption { font-size: 12px; color: var(--soft); }
.scroll { overflow-x: auto; max-height: 560px; overflow-y: auto; } .below { margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: var(--panel); text-align: right; white-space: nowrap; }
td { text-align: right; font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); white-space: nowrap; }
th, td { padding: 3px 8px; } .word { text-align: left; }
td button, th button { all: unset; cursor: pointer; } th button { font-weight: 600; }
td.word, td button { max-width: 26em; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
td button:focus-visible, th button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
tr.chosen td { background: color-mix(in srgb, var(--mark) 18%, transparent); } tbody tr { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 8px 0 0; }
.soft { color: var(--soft); font-size: 12px; }
</style>
</head>
<body>
<noscript>This page draws itself with JavaScript.
The same numbers are in front.csv, and the figure in front.png.</noscript>
<main id="main"></main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["compute", "reuse", "forecast", "skip"], MODES = ["both", "conditional", "difference"];
const MODE_NAMES = ["both halves", "conditional only", "reused difference"];
const SHAPES = ["square", "diamond", "up", "down", "cross", "plus", "left", "right"];
const points = data.points;
let chosen = -1, pinned = false;

// ---- elements -------------------------------------------------------------------------------------------------
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  for (const child of children) node.append(child);
  return node;
}
const el = (name, attributes, ...children) => build(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const fixed = (value, digits) => value === null || value === undefined ? "–" : value.toFixed(digits);
const decibel = value => value === null ? "equal" : value.toFixed(2);
// How far the prediction is off.
const percent = point => {
  const off = 100 * (point.predicted / point.latency - 1);
  return (off < 0 ? "−" : "+") + Math.abs(off).toFixed(1) + " %";
};
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const called = point => point.name || point.origin;

function style(point) {
  if (point.origin === "exact") return ["star", "var(--exact)", 8];
  if (point.origin === "search") return ["circle", point.front ? "var(--front)" : "var(--dim)", point.front ? 5 : 3.5];
  return methodStyle(data.methods.indexOf(point.origin));
}
function methodStyle(index) { return [SHAPES[index % SHAPES.length], data.colours[index % data.colours.length], 6]; }
function outline(shape, r) {
  const a = 0.88 * r, t = r * 0.38, at = list => "M" + list.map(p => p.join(" ")).join("L") + "Z";
  const turn = (list, quarter) => list.map(([x, y]) => [[x, y], [-y, x], [-x, -y], [y, -x]][quarter]);
  const arrow = [[0, -r], [r, a], [-r, a]];
  const plus = [[-t, -r], [t, -r], [t, -t], [r, -t], [r, t], [t, t], [t, r],
    [-t, r], [-t, t], [-r, t], [-r, -t], [-t, -t]];
  const d = Math.SQRT1_2;
  if (shape === "square") return at([[-a, -a], [a, -a], [a, a], [-a, a]]);
  if (shape === "diamond") return at([[0, -r], [r, 0], [0, r], [-r, 0]]);
  if (shape === "up") return at(arrow);
  if (shape === "right") return at(turn(arrow, 1));
  if (shape === "down") return at(turn(arrow, 2));
  if (shape === "left") return at(turn(arrow, 3));
  if (shape === "plus") return at(plus);
  if (shape === "cross") return at(plus.map(([x, y]) => [d * (x - y), d * (x + y)]));
  if (shape === "star") return at([...Array(10).keys()].map(i => {
    const q = i % 2 ? r * 0.45 : r, w = -Math.PI / 2 + i * Math.PI / 5;
    return [q * Math.cos(w), q * Math.sin(w)];
  }));
  return `M${-r} 0A${r} ${r} 0 1 1 ${r} 0A${r} ${r} 0 1 1 ${-r} 0Z`;
}
function mark(shape, fill, r) { return svg("path", {d: outline(shape, r), fill}); }

// ---- scales ---------------------------------------------------------------------------------------------------
function roundTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find(f => f * power >= raw) * power, ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++)
    ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}
function scale(low, high, from, to, log) {
  const f = log ? Math.log : x => x;
  return x => from + (to - from) * (f(x) - f(low)) / (f(high) - f(low));
}

// ---- the scatter ----------------------------------------------------------------------------------------------
const marks = new Map();
function scatter() {
  const W = 760, H = 470, left = 58, right = 16, bottom = 46;
  const speeds = [...points.map(p => p.speedup), ...data.fewer.map(f => f[1])];
  const levels = [...points.map(p => p.psnr), ...data.fewer.map(f => f[3])];
  const finite = levels.filter(v => v !== null), endless = finite.length < levels.length;
  if (!finite.length) finite.push(0);
  const top = endless ? 44 : 14;
  if (!speeds.length) speeds.push(1, 2);
  let [x0, x1, y0, y1] = [Math.min(...speeds), Math.max(...speeds), Math.min(...finite), Math.max(...finite)];
  if (data.log) { const m = (x1 / x0) ** 0.04; x0 /= m; x1 *= m; }
  else { const m = Math.max((x1 - x0) * 0.05, 0.05); x0 -= m; x1 += m; }
  const my = Math.max((y1 - y0) * 0.06, 0.5); y0 -= my; y1 += my;
  const x = scale(x0, x1, left, W - right, data.log), y = scale(y0, y1, H - bottom, top, false);
  const level = v => v === null ? 20 : y(v);
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label":
    "Speedup against PSNR. Arrow keys move between points, Enter keeps one, Escape lets go."});
  const xs = data.log ? data.ticks.filter(t => t >= x0 && t <= x1) : roundTicks(x0, x1, 8);
  for (const t of xs) root.append(svg("line", {class: "grid", x1: x(t), x2: x(t), y1: 8, y2: H - bottom}),
    svg("text", {x: x(t), y: H - bottom + 17, "text-anchor": "middle"}, t + "x"));
  for (const t of roundTicks(y0, y1, 8)) root.append(
    svg("line", {class: "grid", x1: left, x2: W - right, y1: y(t), y2: y(t)}),
    svg("text", {x: left - 7, y: y(t) + 4, "text-anchor": "end"}, String(t)));
  if (endless) root.append(
    svg("line", {class: "grid", x1: left, x2: W - right, y1: 36, y2: 36, "stroke-dasharray": "2 3"}),
    svg("text", {x: left - 7, y: 24, "text-anchor": "end"}, "equal"));
  root.append(svg("text", {class: "axis", x: (left + W - right) / 2, y: H - 8, "text-anchor": "middle"},
    "measured speedup against the exact artifact"));
  root.append(svg("text", {class: "axis", "text-anchor": "middle",
    transform: `translate(15 ${(top + H - bottom) / 2}) rotate(-90)`}, "PSNR on held-out seeds [dB]"));
  const path = list => list.map((p, i) => (i ? "L" : "M") + p.join(" ")).join("");
  const plain = data.fewer.map(f => [x(f[1]), level(f[3])]);
  if (plain.length) {
    root.append(svg("path", {d: path(plain), fill: "none", stroke: "var(--plain)", "stroke-width": 1.5,
      "stroke-dasharray": "5 4"}));
    let last = [-99, -99];
    data.fewer.forEach((f, i) => {
      const [px, py] = plain[i];
      root.append(svg("circle", {cx: px, cy: py, r: 2.5, fill: "var(--plain)"},
        svg("title", {}, `${f[0]} plain steps: ${f[2].toPrecision(4)} ms, ${decibel(f[3])} dB`)));
      if (Math.hypot(px - last[0], py - last[1]) < 18) return;
      last = [px, py];
      root.append(svg("text", {x: px, y: py + 15, "text-anchor": "middle"}, String(f[0])));
    });
  }
  const line = points.filter(p => p.front && p.psnr !== null).map(p => [x(p.speedup), y(p.psnr)]);
  if (line.length) root.append(svg("path", {d: path(line), fill: "none", stroke: "var(--front)", "stroke-width": 2}));
  // What lies on the front is drawn last and so on top; the focus goes from slow to fast.
  const order = [...points.keys()].sort((a, b) => points[a].front - points[b].front);
  const walk = [...points.keys()].sort((a, b) => points[a].speedup - points[b].speedup);
  for (const index of order) {
    const point = points[index], node = mark(...style(point));
    build(node, {class: "point", transform: `translate(${x(point.speedup)} ${level(point.psnr)})`,
      role: "button", tabindex: -1,
      "aria-label": `${called(point)}, ${point.origin}, ${fixed(point.speedup, 2)}x, ${decibel(point.psnr)} dB`}, []);
    node.addEventListener("mouseenter", () => hover(index));
    node.addEventListener("focus", () => choose(index));
    node.addEventListener("click", () => pin(index));
    node.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
      if (step) marks.get(walk[(walk.indexOf(index) + step + walk.length) % walk.length]).focus();
      else if (event.key === "Enter" || event.key === " ") pin(index);
      else return;
      event.preventDefault();
    });
    marks.set(index, node);
    root.append(node);
  }
  const key = el("div", {class: "legend"});
  const entry = (label, drawing) => key.append(el("span", {}, svg("svg", {viewBox: "-8 -8 16 16"}, drawing), label));
  if (line.length) entry("front", svg("path", {d: "M-8 0H8", stroke: "var(--front)", "stroke-width": 3}));
  if (points.some(p => !p.front && p.origin === "search"))
    entry("search, not on the front", mark("circle", "var(--dim)", 4));
  data.methods.forEach((name, i) => entry(name, mark(...methodStyle(i))));
  if (points.some(p => p.origin === "exact")) entry("exact", mark("star", "var(--exact)", 8));
  if (plain.length) entry("fewer plain steps (number)",
    svg("path", {d: "M-8 0H8", stroke: "var(--plain)", "stroke-width": 2, "stroke-dasharray": "4 2"}));
  return el("section", {class: "panel"}, root, key);
}

// ---- one point ------------------------------------------------------------------------------------------------
const detail = el("section", {class: "panel", id: "detail", "aria-label": "the chosen point"});
function show(point) {
  const numbers = el("dl", {});
  const row = (label, value, wide) => numbers.append(el("dt", {}, label), el("dd", wide ? {class: "wide"} : {}, value));
  row("speedup", fixed(point.speedup, 3) + "x");
  row("PSNR", point.psnr === null ? "equal samples" : decibel(point.psnr) + " dB");
  row("latency", point.latency.toPrecision(4) + " ms");
  row("SSIM", fixed(point.ssim, 4));
  row("predicted", point.predicted === null ? "–" : `${point.predicted.toPrecision(4)} ms (${percent(point)})`);
  row("on search seeds", !point.searched ? "–" : point.search === null ? "equal" : decibel(point.search) + " dB");
  row("computed share", (100 * point.share).toFixed(1) + " %");
  row("origin", point.origin);
  const f = point.fewer, ran = f && `${f[0]} steps in ${f[1].toPrecision(4)} ms: ${decibel(f[2])} dB`;
  row("fewer plain steps", f === null ? "–" : f[3] === null ? ran : `${ran}, SSIM ${fixed(f[3], 4)}`, true);
  row("schedule", el("code", {}, point.digest), true);
  const canvas = el("canvas", {role: "img"}), read = el("div", {class: "read"});
  const samples = el("div", {class: "samples"});
  const sheet = (digest, caption) => { if (data.images[digest]) samples.append(el("figure", {},
    el("img", {src: "data:image/png;base64," + data.images[digest], alt: caption}), el("figcaption", {}, caption))); };
  sheet(point.digest, called(point));
  if (data.exact !== null && data.exact !== point.digest) sheet(data.exact, "exact");
  detail.replaceChildren(el("h2", {}, called(point)), numbers, canvas, swatches(), read, samples);
  heat(point, canvas, read);
}
function swatches() {
  const key = el("div", {class: "legend"});
  const entry = (label, name) => key.append(el("span", {}, el("i", {style: `background: var(--${name})`}), label));
  KINDS.forEach(kind => entry(kind, kind));
  MODES.forEach((mode, i) => entry("guidance: " + MODE_NAMES[i], mode));
  return key;
}
function heat(point, canvas, read) {
  const {components, units} = data.layouts[point.layout], rows = components.length, calls = point.calls;
  const owner = []; units.forEach(([, first, last], u) => { for (let c = first; c <= last; c++) owner[c] = u; });
  const action = (call, component) => data.actions[point.cells[call * units.length + owner[component]]];
  const mode = call => data.modes[point.modes[call]];
  const width = canvas.clientWidth || 560, cell = Math.max(4, Math.min(15, 440 / rows));
  const strip = 10, gap = 4, foot = 28, height = strip + gap + rows * cell + foot;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "10px system-ui, sans-serif";
  const measure = text => pen.measureText(text).width;
  // The end of a name tells components apart.
  const cut = name => {
    if (measure(name) <= 130) return name;
    let kept = Math.min(name.length, 40);
    while (kept > 1 && measure("…" + name.slice(-kept)) > 130) kept--;
    return "…" + name.slice(-kept);
  };
  const names = components.map(cut), left = 8 + Math.max(...names.map(measure), measure("guidance"));
  const wide = (width - left) / calls, seam = Math.min(1, wide / 8, cell / 8);
  const fills = KINDS.map(kind => colour("--" + kind)), modeFills = MODES.map(kind => colour("--" + kind));
  let computed = 0;
  for (let call = 0; call < calls; call++) {
    pen.fillStyle = modeFills[mode(call)[0]];
    pen.fillRect(left + call * wide, 0, wide - seam, strip);
    for (let c = 0; c < rows; c++) {
      const kind = action(call, c)[0]; computed += kind === 0;
      pen.fillStyle = fills[kind];
      pen.fillRect(left + call * wide, strip + gap + c * cell, wide - seam, cell - seam);
    }
  }
  pen.fillStyle = colour("--soft"); pen.textBaseline = "middle"; pen.textAlign = "right";
  pen.fillText("guidance", left - 5, strip / 2);
  const every = Math.ceil(11 / cell);
  for (let c = 0; c < rows; c += every) pen.fillText(names[c], left - 5, strip + gap + (c + 0.5) * cell);
  pen.textAlign = "center"; pen.textBaseline = "top";
  const each = Math.max(1, [1, 2, 5, 10, 20, 50, 100, 200, 500].find(n => n * wide >= 22) || 1000);
  const below = strip + gap + rows * cell;
  for (let call = 0; call < calls; call += each) pen.fillText(String(call), left + (call + 0.5) * wide, below + 3);
  pen.fillText("sampler call", left + (width - left) / 2, below + 15);
  const summary = `${rows} components by ${calls} calls; ${computed} of ${rows * calls} computed.`;
  canvas.setAttribute("aria-label", "Schedule: " + summary); read.textContent = summary;
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    const call = Math.floor((px - left) / wide), c = Math.floor((py - strip - gap) / cell);
    if (call < 0 || call >= calls || c >= rows) { read.textContent = summary; return; }
    if (py < strip + gap) { read.textContent = `call ${call}, guidance: ${mode(call)[1]}`; return; }
    const [name, first, last, stores] = units[owner[c]];
    const unit = first === last ? stores : `${stores} of ${name}, ${last - first + 1} components`;
    read.textContent = `call ${call}, ${components[c]} (${unit}): ${action(call, c)[1]}`;
  };
  canvas.onmouseleave = () => { read.textContent = summary; };
}
function choose(index) {
  if (index !== chosen) {
    if (chosen >= 0) for (const node of [marks.get(chosen), lines.get(chosen)]) node.classList.remove("chosen");
    chosen = index;
    for (const node of [marks.get(index), lines.get(index)]) node.classList.add("chosen");
    for (const [other, node] of marks) node.setAttribute("tabindex", other === index ? 0 : -1);
    show(points[index]);
  }
}
function hover(index) { if (!pinned) choose(index); }
function pin(index) { pinned = !(pinned && index === chosen); choose(index); }

// ---- the table ------------------------------------------------------------------------------------------------
const lines = new Map();
const FIELDS = [
  ["name", p => called(p), v => v], ["origin", p => p.origin, v => v],
  ["front", p => p.front ? 1 : 0, v => v ? "yes" : ""],
  ["speedup", p => p.speedup, v => fixed(v, 2) + "x"], ["latency ms", p => p.latency, v => v.toPrecision(4)],
  ["predicted ms", p => p.predicted, v => v === null ? "–" : v.toPrecision(4)],
  ["computed", p => p.share, v => (100 * v).toFixed(1) + " %"],
  ["PSNR dB", p => p.psnr === null ? Infinity : p.psnr, v => v === Infinity ? "equal" : v.toFixed(2)],
  ["SSIM", p => p.ssim, v => fixed(v, 4)],
  ["fewer steps", p => p.fewer && p.fewer[0], v => fixed(v, 0)],
  ["PSNR dB of those", p => p.fewer === null ? null : p.fewer[2] === null ? Infinity : p.fewer[2],
    v => v === null ? "–" : v === Infinity ? "equal" : v.toFixed(2)],
  ["digest", p => p.digest.slice(0, 12), v => v],
];
const words = new Set(["name", "origin", "front", "digest"]);
function table() {
  const head = el("tr", {}), body = el("tbody", {});
  let by = 3, up = true;
  const fill = () => {
    const value = FIELDS[by][1];
    // What was not measured stays below in either direction.
    const order = [...points.keys()].sort((a, b) => {
      const [p, q] = [value(points[a]), value(points[b])];
      if (p === null || q === null) return (p === null) - (q === null) || a - b;
      return (typeof p === "string" ? p.localeCompare(q) : p === q ? 0 : p - q) * (up ? 1 : -1) || a - b;
    });
    body.append(...order.map(index => lines.get(index)));
    [...head.children].forEach((cell, i) => {
      cell.setAttribute("aria-sort", i !== by ? "none" : up ? "ascending" : "descending");
      cell.firstChild.textContent = FIELDS[i][0] + (i !== by ? "" : up ? " ↑" : " ↓");
    });
  };
  FIELDS.forEach(([name], i) => {
    const button = el("button", {type: "button"}, name);
    button.addEventListener("click", () => { up = i === by ? !up : words.has(name); by = i; fill(); });
    head.append(el("th", words.has(name) ? {class: "word", scope: "col"} : {scope: "col"}, button));
  });
  points.forEach((point, index) => {
    const cells = FIELDS.map(([name, value, text], i) => {
      const shown = text(value(point));
      return el("td", words.has(name) ? {class: "word"} : {}, i ? shown : el("button", {type: "button"}, shown));
    });
    const line = el("tr", {}, ...cells);
    cells[0].firstChild.addEventListener("focus", () => hover(index));
    line.addEventListener("mouseenter", () => hover(index));
    line.addEventListener("click", () => pin(index));
    lines.set(index, line);
  });
  fill();
  const whole = el("table", {}, el("thead", {}, head), body);
  return el("section", {class: "panel below"}, el("div", {class: "scroll"}, whole));
}

// ---- how the search went --------------------------------------------------------------------------------------
function progress() {
  const rows = data.history, W = 760, H = 190, left = 58, right = 16, bottom = 40, top = 10;
  let [x0, x1, y0, y1] = [rows[0].evaluations, rows[0].evaluations, rows[0].hypervolume, rows[0].hypervolume];
  for (const r of rows) { x0 = Math.min(x0, r.evaluations); x1 = Math.max(x1, r.evaluations);
    y0 = Math.min(y0, r.hypervolume); y1 = Math.max(y1, r.hypervolume); }
  if (y1 - y0 < 1e-9 * Math.max(1, Math.abs(y1))) { y0 -= 0.5; y1 += 0.5; }
  if (x1 === x0) x1 += 1;
  const x = scale(x0, x1, left, W - right), y = scale(y0, y1, H - bottom, top);
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Hypervolume over evaluations"});
  for (const t of roundTicks(y0, y1, 4)) root.append(
    svg("line", {class: "grid", x1: left, x2: W - right, y1: y(t), y2: y(t)}),
    svg("text", {x: left - 7, y: y(t) + 4, "text-anchor": "end"}, String(t)));
  for (const t of roundTicks(x0, x1, 8)) root.append(
    svg("text", {x: x(t), y: H - bottom + 16, "text-anchor": "middle"}, String(t)));
  root.append(
    svg("text", {class: "axis", x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle"}, "evaluations"),
    svg("text", {class: "axis", "text-anchor": "middle",
      transform: `translate(13 ${(top + H - bottom) / 2}) rotate(-90)`}, "hypervolume"));
  root.append(svg("path", {d: rows.map((r, i) => (i ? "L" : "M") + x(r.evaluations) + " " + y(r.hypervolume)).join(""),
    fill: "none", stroke: "var(--front)", "stroke-width": 2}));
  const level = v => v === null ? "equal" : v.toFixed(2) + " dB";
  const best = Object.entries(rows[rows.length - 1].best).map(([speed, v]) => `${speed}: ${level(v)}`);
  const parts = [el("h2", {}, "Search"), root];
  if (best.length)
    parts.push(el("div", {class: "soft"}, "best PSNR on the search seeds at the end: " + best.join(", ")));
  return el("section", {class: "panel"}, ...parts);
}

// ---- the page -------------------------------------------------------------------------------------------------
const facts = el("div", {class: "facts"},
  ...data.facts.map(([name, value]) => el("span", {}, name + " ", el("b", {}, String(value)))));
const left = el("div", {class: "left"}, scatter());
if (data.history.length > 1) left.append(progress());
document.getElementById("main").append(
  el("h1", {}, "Speed and quality of " + data.facts[0][1]), facts, el("div", {class: "two"}, left, detail), table());
if (data.notes) document.getElementById("main").append(
  el("details", {class: "panel below"}, el("summary", {}, "Notes"), el("pre", {}, data.notes)));
document.addEventListener("keydown", event => { if (event.key === "Escape") pinned = false; });
const again = () => { if (chosen >= 0) show(points[chosen]); };
let waiting = 0;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(again, 100); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
if (points.length) {
  // To begin with, the point in the middle of the front.
  const front = [...points.keys()].filter(index => points[index].front);
  choose(front.length ? front[Math.floor(front.length / 2)] : 0);
} else detail.append("This front has no points.");
</script>
</body>
</html>
"""
