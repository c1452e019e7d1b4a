"""The learning table: how close training comes to real data, over data sets and seeds.

A campaign of the runs that ``qpool train`` would make with the settings shown, so the table can be
gone on with. Run by ``scripts/learn``. Owns the settings and the table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from workers.errors import QPoolError

#: What is learned: three real sets (scikit-learn's), and two densities known from CV-QGAN work.
DATA = ("breast-cancer", "iris", "wine", "ring", "four-gaussians")

#: The same for all of them.
SETTINGS = {
    "cutoff": 10,
    "layers": 2,
    "schedule": "cosine",
    "ema_momentum": 0.998,
    "evaluate_every": 500,
    "checkpoint_every": 1000,
}

#: For data of one heap, and for data that have several, or a hole.
_ONE = {"encoding": "coherent_state", "steps": 2000, "generator_rate": 0.005, "critic_rate": 0.005}
_SEVERAL = {
    "encoding": "classical_neural",
    "steps": 4000,
    "generator_rate": 0.003,
    "critic_rate": 0.003,
}
#: Densities: the critic has to see edges, in a batch and in its own layers, and may be steep there.
_EDGES = {
    **_SEVERAL,
    "batch_size": 200,
    "critic_units": 128,
    "critic_layers": 3,
    "penalty": 0.1,
}
OF_DATA = {
    "breast-cancer": _ONE,
    "wine": _ONE,
    "iris": _SEVERAL,
    "ring": _EDGES,
    "four-gaussians": _EDGES,
}


def cells(data: Iterable[str], seeds: int, steps: int | None) -> list[dict[str, Any]]:
    """The settings of each run."""
    more = {} if steps is None else {"steps": steps}
    return [
        {"data": name, "seed": seed, **OF_DATA.get(name, _SEVERAL), **more}
        for name in data
        for seed in range(1, seeds + 1)
    ]


def learn(
    data: Iterable[str], seeds: int, steps: int | None, folder: Path, console: Any = None
) -> list[dict[str, Any]]:
    """A row for each data set and seed: distances, coverage, ket norm, seconds.

    Raises:
        QPoolError: a run failed; the campaign's directory says why.
    """
    from qpool.training import Campaign

    campaign = Campaign(out=folder, base=SETTINGS, cells=cells(data, seeds, steps), console=console)
    summary = campaign.run()
    if summary["finished"] < len(summary["runs"]):
        raise QPoolError(
            f"{summary['finished']} of {len(summary['runs'])} runs finished: see "
            f"{folder / 'results.csv'}; the same command goes on"
        )
    return [
        {
            "data": row["data"],
            "seed": row["seed"],
            "before": row["energy_distance_before"],
            "after": row["energy_distance_after"],
            "floor": row["energy_distance_floor"],
            "coverage": row["coverage"],
            "ket_norm": row["ket_norm"],
            "seconds": row["training_seconds"],
        }
        for row in summary["runs"]
    ]


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
    try:
        rows = learn(data, seeds, steps, out)
    except QPoolError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    for row in by_data(rows):
        click.echo("  ".join(f"{name} {_cell(value)}" for name, value in row.items()))


if __name__ == "__main__":
    main()
