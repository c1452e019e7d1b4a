"""A sweep told to people: plots, and a report in Markdown and in HTML that can be read alone.

Owns what is drawn and said. What was measured and what a model predicts are told apart: in the
plots by markers and lines, in the report by sections.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qpool import pages
from qpool.studies import scaling
from qpool.studies.sweep import Cell, read
from workers.errors import DataError

#: How far the scaling model is carried.
_FURTHEST = 256

_COLOURS = ("#33658a", "#f26419", "#55a630", "#8338ec", "#d00000", "#2b2d42", "#f6ae2d", "#6a994e")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Cells that differ in the number of workers alone, fewest first, on so many ``cores``."""

    name: str
    rows: tuple[dict[str, Any], ...]
    cores: int

    @property
    def workers(self) -> list[int]:
        return [row["workers"] for row in self.rows]

    def constants(self) -> scaling.Constants | None:
        """The scaling model's, if there are enough measurements with a core for each thread."""
        steps = [
            scaling.Step(r["workers"], r["tiles"], r["step_ms"] / 1e3, r["tile_ms"] / 1e3)
            for r in self.rows
            if r["tile_ms"] and r["workers"] * r["threads"] <= self.cores  # threads tell no tiles
        ]
        try:
            return scaling.fit(steps)
        except DataError:
            return None

    def law(self) -> scaling.Law | None:
        try:
            return scaling.fit_law(self.workers, [r["samples_per_second"] for r in self.rows])
        except DataError:
            return None


def curves(rows: Sequence[dict[str, Any]], cores: int) -> list[Curve]:
    """The rows by what is computed and how, all but the number of workers (of all nodes)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cell = Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})
        each = f", {cell.threads} cores each" if cell.threads > 1 else ""
        if cell.strategy == "ray":
            each = f", {cell.workers} a node{each}"
        together = {**row, "workers": cell.workers * cell.nodes}
        found.setdefault(f"{cell.circuit}, {cell.strategy}{each}", []).append(together)
    return [
        Curve(name, tuple(sorted(rows, key=lambda row: row["workers"])), cores)
        for name, rows in found.items()
    ]


def write(out: Path) -> Path:
    """Draw and write all of it from what is in a sweep's directory; returns the HTML file."""
    rows = read(out / "cells.csv")
    if not rows:
        raise DataError(f"{out} has no measurements yet; run the sweep first")
    said = json.loads((out / "sweep.json").read_text())
    found = curves(rows, said["host"]["cores"])
    pictures = _draw(out, found)
    blocks = _blocks(found, said, pictures)
    (out / "report.md").write_text(pages.markdown(blocks))
    (out / "report.html").write_text(pages.page(blocks, out))
    return out / "report.html"


# -- what is said ------------------------------------------------------------------------------


def _blocks(found: list[Curve], said: dict[str, Any], pictures: list[str]) -> list[pages.Block]:
    host = said["host"]
    blocks: list[pages.Block] = [
        ("title", "A qpool sweep"),
        (
            "text",
            f"{host.get('processor', '')}, {host['cores']} cores for this process; "
            f"{host['platform']}, Python {host['python']}, TensorFlow {host['tensorflow']}, "
            f"qpool {host['qpool']}. A step is a forward pass and the weights' gradient; each "
            f"figure is the median of {said['grid']['turns']} turns, with the slowest and the "
            "fastest.",
        ),
        ("heading", "Measured"),
        ("table", _measured(found)),
    ]
    blocks += [("picture", picture) for picture in pictures]
    blocks += [("heading", "Predicted"), ("text", _HOW)]
    constants = [(curve, curve.constants()) for curve in found]
    known = [(curve, c) for curve, c in constants if c is not None]
    if known:
        blocks.append(("table", _constants(known)))
        blocks.append(("table", _predicted(known)))
    else:
        blocks.append(
            ("text", "Nothing: that takes the processes strategy with two counts of workers.")
        )
    laws = [(curve, law) for curve in found if (law := curve.law()) is not None]
    if laws:
        blocks.append(("table", _laws(laws)))
    return blocks


_HOW = (
    "A step takes serial + W dispatch + ceil(tiles / W) tile (1 + contention (W - 1)), with W "
    "workers. The constants are fitted to those measurements above in which each worker had its "
    "cores, with none of them negative. "
    "Beyond the cores of this machine it is a prediction, of a machine that is like this one, with "
    "more cores and as much memory bandwidth for each."
)


def _measured(found: list[Curve]) -> tuple[list[str], list[list[str]]]:
    header = [
        "what",
        "workers",
        "samples/s",
        "slowest, fastest",
        "speed-up",
        "efficiency",
        "CPU use",
        "core ms/sample",
        "tiles",
        "ms/tile",
        "memory MiB",
        "first call s",
    ]
    lines = []
    for curve in found:
        base = curve.rows[0]
        for row in curve.rows:
            gain = row["samples_per_second"] / base["samples_per_second"]
            lines.append(
                [
                    curve.name,
                    str(row["workers"]),
                    f"{row['samples_per_second']:,.0f}",
                    f"{row['slowest']:,.0f}, {row['fastest']:,.0f}",
                    f"{gain:.2f}",
                    f"{100 * gain * base['workers'] / row['workers']:.0f}%",
                    f"{100 * row['cpu_use']:.0f}%",
                    f"{row['core_ms_per_sample']:.3g}",
                    str(row["tiles"]) if row["tiles"] else "-",
                    f"{row['tile_ms']:.2f}" if row["tile_ms"] else "-",
                    f"{row['memory_mib']:,.0f}",
                    f"{row['first_call_seconds']:.1f}",
                ]
            )
    return header, lines


def _constants(known: list[tuple[Curve, scaling.Constants]]) -> tuple[list[str], list[list[str]]]:
    header = ["what", "serial ms", "dispatch ms/worker", "tile ms", "contention/worker"]
    return header, [
        [
            curve.name,
            f"{1e3 * c.serial:.3f}",
            f"{1e3 * c.dispatch:.3f}",
            f"{1e3 * c.tile:.2f}",
            f"{100 * c.contention:.1f}%",
        ]
        for curve, c in known
    ]


def _predicted(known: list[tuple[Curve, scaling.Constants]]) -> tuple[list[str], list[list[str]]]:
    counts = (4, 8, 16, 32, 64, 128, _FURTHEST)
    header = ["predicted speed-up", *(f"{n} workers" for n in counts)]
    lines = []
    for curve, c in known:
        for times in (1, 16):
            tiles = times * curve.rows[0]["tiles"]
            label = curve.name if times == 1 else f"the same, a batch {times} times as large"
            lines.append([label, *(f"{c.speed_up(n, tiles):.1f}" for n in counts)])
    return header, lines


def _laws(laws: list[tuple[Curve, scaling.Law]]) -> tuple[list[str], list[list[str]]]:
    header = ["Universal Scalability Law", "sigma", "kappa", "most useful workers"]
    return header, [
        [
            curve.name,
            f"{law.sigma:.4f}",
            f"{law.kappa:.2e}",
            f"{law.best:.0f}" if law.best < float("inf") else "no limit seen",
        ]
        for curve, law in laws
    ]


# -- what is drawn -----------------------------------------------------------------------------


def _draw(out: Path, found: list[Curve]) -> list[str]:
    """The pictures' file names, those that the measurements are enough for."""
    several = [curve for curve in found if len(curve.rows) > 1]
    names = []
    if several:
        _measured_picture(out / "speed-up.png", several)
        names.append("speed-up.png")
    _bars(out / "strategies.png", found)
    names.append("strategies.png")
    known = [(c, k) for c in several if (k := c.constants()) is not None]
    if known:
        _predicted_picture(out / "prediction.png", known)
        names.append("prediction.png")
    return names


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _measured_picture(path: Path, several: list[Curve]) -> None:
    """Speed-up, efficiency, CPU use and cost against the number of workers."""
    figure = _figure(11, 7.2)
    panels: list[tuple[str, Callable[[Curve, dict[str, Any]], float]]] = [
        ("speed-up", lambda c, r: r["samples_per_second"] / c.rows[0]["samples_per_second"]),
        (
            "efficiency, %",
            lambda c, r: (
                100
                * r["samples_per_second"]
                * c.rows[0]["workers"]
                / (c.rows[0]["samples_per_second"] * r["workers"])
            ),
        ),
        ("CPU use, %", lambda c, r: 100 * r["cpu_use"]),
        ("cost, core ms/sample", lambda c, r: r["core_ms_per_sample"]),
    ]
    axes = figure.subplots(2, 2).flat
    most = max(max(curve.workers) for curve in several)
    for axis, (title, value) in zip(axes, panels, strict=True):
        for curve, colour in zip(several, _cycle(), strict=False):
            heights = [value(curve, row) for row in curve.rows]
            axis.plot(curve.workers, heights, "o-", color=colour, label=curve.name)
        if title == "speed-up":
            axis.plot([1, most], [1, most], ":", color="grey", label="ideal")
        if title.startswith("cost"):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(xlabel="workers", title=title)
        axis.set_xticks(sorted({n for curve in several for n in curve.workers}))
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8)
    figure.suptitle("measured")
    figure.savefig(path, dpi=120)


def _bars(path: Path, found: list[Curve]) -> None:
    """Samples a second of everything, each at its best number of workers."""
    best = [max(curve.rows, key=lambda row: row["samples_per_second"]) for curve in found]
    labels = [
        f"{curve.name}, {row['workers']} workers" if len(curve.rows) > 1 else curve.name
        for curve, row in zip(found, best, strict=True)
    ]
    figure = _figure(11, 0.9 + 0.4 * len(found))
    axis = figure.subplots()
    rates = [row["samples_per_second"] for row in best]
    low = [row["samples_per_second"] - row["slowest"] for row in best]
    high = [row["fastest"] - row["samples_per_second"] for row in best]
    axis.barh(labels, rates, xerr=[low, high], color=_COLOURS[0], ecolor="#555")
    axis.invert_yaxis()
    axis.set(xlabel="samples a second; whiskers: slowest and fastest turn", title="measured")
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def _predicted_picture(path: Path, known: list[tuple[Curve, scaling.Constants]]) -> None:
    """The model's speed-up as lines, what was measured as dots."""
    figure = _figure(9, 5.4)
    axis = figure.subplots()
    counts = [2 ** (n / 4) for n in range(4 * (_FURTHEST.bit_length() - 1) + 1)]
    whole = sorted({round(n) for n in counts})
    for (curve, c), colour in zip(known, _cycle(), strict=False):
        for times, style in ((1, "-"), (16, "--")):
            tiles = times * curve.rows[0]["tiles"]
            label = curve.name if times == 1 else "the same, a batch 16 times as large"
            heights = [c.speed_up(n, tiles) for n in whole]
            axis.plot(whole, heights, style, color=colour, label=label)
        rates = [row["samples_per_second"] for row in curve.rows]
        axis.plot(curve.workers, [rate / rates[0] for rate in rates], "o", color=colour)
    axis.plot([1, _FURTHEST], [1, _FURTHEST], ":", color="grey", label="ideal")
    axis.set(xscale="log", yscale="log", xlabel="workers", ylabel="speed-up")
    axis.set_title("predicted (lines) from what was measured here (dots)")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=120)


def _cycle() -> list[str]:
    return list(_COLOURS) * 16
