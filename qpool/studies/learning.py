"""The learning table: how close training comes to real data, over data sets and seeds.

Each cell is a run that ``qpool train`` would make with the settings shown, in a process of its own;
a directory that has a finished run already is read, so the table can be gone on with. Run by
``scripts/learn``. Owns the settings and the table.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

#: What is learned: three real sets (scikit-learn's), and two densities known from CV-QGAN work.
DATA = ("breast-cancer", "iris", "wine", "ring", "four-gaussians")

#: The same for all of them, by the names of ``qpool train``'s options.
SETTINGS = {
    "cutoff": 10,
    "layers": 2,
    "schedule": "cosine",
    "ema-momentum": 0.998,
    "evaluate-every": 500,
    "checkpoint-every": 1000,
}

#: For data of one heap, and for data that have several, or a hole.
_ONE = {"encoding": "coherent_state", "steps": 2000, "generator-rate": 0.005, "critic-rate": 0.005}
_SEVERAL = {
    "encoding": "classical_neural",
    "steps": 4000,
    "generator-rate": 0.003,
    "critic-rate": 0.003,
}
#: Densities: the critic has to see edges, in a batch and in its own layers, and may be steep there.
_EDGES = {
    **_SEVERAL,
    "batch-size": 200,
    "critic-units": 128,
    "critic-layers": 3,
    "penalty": 0.1,
}
OF_DATA = {
    "breast-cancer": _ONE,
    "wine": _ONE,
    "iris": _SEVERAL,
    "ring": _EDGES,
    "four-gaussians": _EDGES,
}


def command(data: str, seed: int, steps: int | None, out: Path) -> list[str]:
    """The run of one cell, as a command line after ``qpool``."""
    settings = {**SETTINGS, **OF_DATA.get(data, _SEVERAL)}
    settings |= {} if steps is None else {"steps": steps}
    options = [f"--{name}={value}" for name, value in settings.items()]
    return ["train", f"--data={data}", f"--seed={seed}", *options, "--out", str(out)]


def learn(
    data: Iterable[str], seeds: int, steps: int | None, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each data set and seed: distances, coverage, ket norm, seconds."""
    rows = []
    for name in data:
        for seed in range(1, seeds + 1):
            out = folder / f"{name}-{steps or 'default'}-{seed}"
            if not (out / "summary.json").exists():
                begun = (out / "run.json").exists()
                arguments = ["resume", str(out)] if begun else command(name, seed, steps, out)
                say(f"qpool {' '.join(arguments)}")
                _run(arguments)
            row = {"data": name, "seed": seed, **_figures(out)}
            say("  ".join(_cell(value) for value in row.values()))
            rows.append(row)
    return rows


def by_data(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median over seeds, and the worst of them, for each data set."""
    found = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of_seeds = [row for row in rows if row["data"] == name]
        medians = {
            figure: statistics.median(row[figure] for row in of_seeds)
            for figure in of_seeds[0]
            if figure not in ("data", "seed")
        }
        worst = max(row["after"] for row in of_seeds)
        found.append({"data": name, "seeds": len(of_seeds), **medians, "worst_after": worst})
    return found


def _run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qpool", *arguments],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"qpool {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def _figures(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    distances = summary["energy_distance"]
    return {
        "before": distances["before"],
        "after": distances["after"],
        "floor": distances["floor"],
        "coverage": summary["coverage"],
        "ket_norm": summary["ket_norm"],
        "seconds": summary["training_seconds"],
    }


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value}"


@click.command(context_settings={"show_default": True})
@click.option("--data", multiple=True, default=DATA, help="A data set; may be given again.")
@click.option("--seeds", default=3, help="Runs of each, with seeds 1, 2, ...")
@click.option("--steps", type=int, help="Training steps of a run.  [default: of the data set]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/learn"),
    help="Where the runs' directories are; finished ones are read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all rows as JSON lines.")
def main(data: tuple[str, ...], seeds: int, steps: int, out: Path, as_json: bool) -> None:
    """Train on each data set with several seeds, and print how close it came.

    `after` and `floor` are energy distances of samples of equal sizes: generated against real, and
    real against real, which is the best that can be.
    """
    rows = learn(data, seeds, steps, out, lambda line: click.echo(line, err=True))
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    for row in by_data(rows):
        click.echo("  ".join(f"{name} {_cell(value)}" for name, value in row.items()))


if __name__ == "__main__":
    main()
