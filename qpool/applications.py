"""What the worked examples (``scripts/applications``) share: their options, tables and verdicts.

Owns how an example is asked and how it answers. What it computes is its own, or the library's.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from qpool.training.comparison import Trained
from workers.errors import ConfigurationError

#: Colours of the plots: what is real, what a quantum model made, what a classical one did.
REAL, QUANTUM, CLASSICAL = "#33658a", "#f26419", "#7a9e7e"


def application(function: Callable[..., Any]) -> click.Command:
    """A command of the options that all examples have, named after ``function``, with its help.

    ``function`` is called with ``seeds``, ``steps``, ``workers``, ``long``, ``out`` (a directory
    that exists) and ``say``, and returns a dictionary of results. They are printed as a table for
    each list of rows in it, or with ``--json`` as they are, and kept as ``results.json``.
    """

    @click.command(
        name=function.__name__,
        context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    )
    @click.option("--seeds", default=3, help="Repetitions, with seeds 1, 2, ...")
    @click.option("--steps", type=int, help="Training steps.  [default: of the example]")
    @click.option("--workers", type=int, help="Worker processes.  [default: physical cores]")
    @click.option("--long", is_flag=True, help="The longer setting: more of what takes time.")
    @click.option("--out", type=click.Path(path_type=Path), help="Directory for plots and results.")
    @click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
    @functools.wraps(function)
    def command(as_json: bool, out: Path | None, **options: Any) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        for name in ("seeds", "steps", "workers"):
            if options[name] is not None and options[name] < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {options[name]}")
        out = out or Path("runs") / "applications" / function.__name__
        out.mkdir(parents=True, exist_ok=True)
        results = function(out=out, say=lambda line: click.echo(line, err=True), **options)
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if as_json:
            click.echo(json.dumps(results))
            return
        for name, value in results.items():
            click.echo(f"\n{name}:")
            click.echo(_table(value) if isinstance(value, list) else f"  {value}")
        click.echo(f"\nplots and results.json are in {out}")

    return command


def need(module: str) -> Any:
    """A module with real data; ConfigurationError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"this example's data are in the package {module.partition('.')[0]!r}, which cannot be "
            f"imported ({error}): pip install 'qpool-sf[applications]'"
        ) from error


def verdict(trained: Sequence[Trained], floor: float) -> str:
    """What the quantum model adds over the classical one of its size, in energy distance."""
    of = {
        kind: [t.distance for t in trained if t.kind == kind] for kind in ("quantum", "classical")
    }
    middle = {kind: statistics.median(found) for kind, found in of.items()}
    said = ", ".join(
        f"{kind} {middle[kind]:.3f} ({min(found):.3f} to {max(found):.3f})"
        for kind, found in of.items()
    )
    if len(of["quantum"]) < 3:
        what = "So few seeds tell nothing of their spread"
    elif max(of["quantum"]) < min(of["classical"]):
        what = "The quantum model is closer to the real data than the classical one with every seed"
    elif min(of["quantum"]) > max(of["classical"]):
        what = "The quantum model adds nothing here: the classical one is closer with every seed"
    else:
        what = "The quantum model adds nothing that can be told from the spread over seeds"
    sizes = {t.kind: t.parameters for t in trained}
    return (
        f"{what}: energy distance {said}; real against real {floor:.3f}. Trained numbers: "
        f"{sizes['quantum']} and {sizes['classical']}."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(names))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
