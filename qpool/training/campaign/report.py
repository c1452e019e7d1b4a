"""What came of a campaign, for people: ``report.html``, which can be read alone, and TensorBoard's
HParams. Owns what is drawn and said; the numbers are ``records``'.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpool import pages
from qpool.training.campaign import records
from qpool.training.campaign.grid import Cell
from qpool.training.campaign.records import Records
from qpool.training.campaign.table import duration

_COLOURS = ("#33658a", "#f26419", "#55a630", "#8338ec", "#d00000", "#2b2d42", "#f6ae2d", "#6a994e")

#: Figures of a training run that the table shows; of a function, all that it returned.
_SHOWN = ("energy_distance_after", "energy_distance_best", "energy_distance_floor", "coverage",
          "ket_norm")  # fmt: skip

#: What a row has beside settings and figures.
_OWN = ("run", "state", "reason", "step", "seconds", "core_hours")

#: Groups that one picture can tell apart.
_MOST_CURVES = 12


def write(of: Records, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the report of these rows (``Records.table``) into the campaign's directory."""
    figures = _figures(rows)
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, row in zip(of.cells, rows, strict=True):
        groups.setdefault(cell.group, []).append((cell, row))
    done = [row for row in rows if row["state"] == records.FINISHED]
    hours = sum(row["core_hours"] for row in rows)
    longest = max((row["seconds"] for row in rows), default=0.0)
    blocks: list[pages.Block] = [
        ("title", f"A campaign: {of.out.name}"),
        (
            "text",
            f"{len(done)} of {len(rows)} runs finished. Cost: {hours:.3g} core hours; the longest "
            f"run took {duration(longest)}.",
        ),
    ]
    if done:
        blocks += [
            ("heading", "By settings"),
            ("text", "Median over the runs of a group, with the least and the greatest."),
            ("table", _by_group(groups, figures)),
        ]
    drawn = _curves(of, groups, of.out / "curves.png")
    if drawn:
        blocks += [("heading", "Learning curves"), ("text", drawn), ("picture", "curves.png")]
    best = _best(done, figures)
    if best is not None:
        blocks += [("heading", f"The best run: {best}")]
        folder = of.run(best)
        for name in ("samples.png", "losses.png", "wigner.png"):
            if (folder / name).exists():
                blocks.append(("picture", str((folder / name).relative_to(of.out))))
    others = [row for row in rows if row["state"] != records.FINISHED]
    if others:
        blocks += [("heading", "Not finished"), ("table", _others(others))]
    blocks += [("heading", "All runs"), ("table", _all(rows, figures))]
    (of.out / "report.html").write_text(pages.page(blocks, of.out))
    _hparams(of, rows, figures)
    return of.out / "report.html"


def _figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the figures that are shown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in _SHOWN if name in names]
    if shown:
        return shown
    settings = {name for row in rows for name in row if not isinstance(row[name], float)}
    return [name for name in names if name not in settings and name not in _OWN]


def _best(done: Sequence[dict[str, Any]], figures: Sequence[str]) -> str | None:
    """The run whose first figure is least; a distance is, of a function's nobody knows."""
    if not done or not figures or figures[0] not in _SHOWN:
        return None
    return str(min(done, key=lambda row: row[figures[0]])["run"])


def _by_group(
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]], figures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, members in groups.items():
        rows = [row for _, row in members if row["state"] == records.FINISHED]
        line = [name or "all", f"{len(rows)} of {len(members)}"]
        for figure in figures:
            values = [row[figure] for row in rows if figure in row]
            line.append(_spread(values))
        line.append(f"{sum(row['core_hours'] for _, row in members):.3g}")
        lines.append(line)
    return ["settings", "runs", *map(_words, figures), "core hours"], lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, least, most = (
        f"{value:.3g}" for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def _others(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return ["run", "state", "at step", "reason"], [
        [row["run"], row["state"], str(row["step"]), row["reason"]] for row in rows
    ]


def _all(
    rows: Sequence[dict[str, Any]], figures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    lines = [
        [row["run"], row["state"], *(f"{row[f]:.4g}" if f in row else "-" for f in figures),
         duration(row["seconds"])]
        for row in rows
    ]  # fmt: skip
    return ["run", "state", *map(_words, figures), "took"], lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def _curves(of: Records, groups: dict[str, list[tuple[Cell, dict[str, Any]]]], path: Path) -> str:
    """Draw the distance over the steps, by group; what is to be said of it, "" if there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from qpool.training.journal import read_table

    found: dict[str, list[dict[float, float]]] = {}
    for name, members in groups.items():
        for cell, _ in members:
            table = of.run(cell.name) / "evaluations.csv"
            if table.exists():
                curve = {row["step"]: row["energy_distance"] for row in read_table(table)}
                found.setdefault(name, []).append(curve)
    if not found:
        return ""
    drawn = list(found.items())[:_MOST_CURVES]
    # Names may be as wide as the picture: they stand below it, a line each.
    figure = Figure(figsize=(9.6, 5.0 + 0.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, curves) in enumerate(drawn):
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        colour = _COLOURS[number % len(_COLOURS)]
        style = "-" if number < len(_COLOURS) else "--"
        axes.plot(steps, np.median(values, axis=0), style, color=colour, label=name or "all")
        if len(curves) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour,
                              alpha=0.15, linewidth=0)  # fmt: skip
    axes.set(xlabel="step", ylabel="energy distance", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    left = len(found) - _MOST_CURVES
    return "Energy distance to the data: the median of each group, and all of it in pale." + (
        f" The first {_MOST_CURVES} groups; {left} more are in results.csv." if left > 0 else ""
    )


def _hparams(of: Records, rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> None:
    """A session for each finished run, for TensorBoard's table of hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import summary_v2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    shutil.rmtree(of.out / "tensorboard", ignore_errors=True)
    for cell, row in zip(of.cells, rows, strict=True):
        if row["state"] != records.FINISHED:
            continue
        writer = EventFileWriter(str(of.out / "tensorboard" / cell.name))
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in cell.own.items()
        }
        session = summary_v2.hparams_pb(settings, trial_id=cell.name)
        writer.add_event(Event(summary=session))
        for figure in figures:
            if figure in row:
                value = Summary.Value(tag=figure, simple_value=row[figure])
                writer.add_event(Event(summary=Summary(value=[value]), step=row["step"]))
        writer.close()
