"""Pictures of a run. Drawn with Agg: no display is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qpool.training.data import DataSet

_REAL, _GENERATED = "#33658a", "#f26419"


def samples(path: Path, data: DataSet, generated: np.ndarray, distances: dict[str, float]) -> None:
    """Real and generated samples side by side, in the data's units, with their marginals."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(4, 4, 1), height_ratios=(1, 4))
    sets = (
        ("real", data.in_units(data.rows), _REAL),
        ("generated", data.in_units(generated), _GENERATED),
    )
    limits = [_limits(*(rows[:, n] for _, rows, _ in sets)) for n in range(2)]
    side = figure.add_subplot(grid[1, 2])
    for column, (name, rows, colour) in enumerate(sets):
        main = figure.add_subplot(grid[1, column])
        main.scatter(rows[:, 0], rows[:, 1], s=14, alpha=0.6, color=colour, linewidths=0)
        main.set(xlim=limits[0], ylim=limits[1], xlabel=data.columns[0])
        main.set_title(f"{name} ({len(rows)})", color=colour)
        if column == 0:
            main.set_ylabel(data.columns[1])
        top = figure.add_subplot(grid[0, column], sharex=main)
        bins = np.linspace(*limits[0], 31)
        for other, values, shade in sets:
            top.hist(
                values[:, 0],
                bins,
                density=True,
                histtype="stepfilled" if other == name else "step",
                alpha=0.6 if other == name else 1.0,
                color=shade,
            )
        top.axis("off")
    for name, rows, colour in sets:
        side.hist(
            rows[:, 1],
            np.linspace(*limits[1], 31),
            density=True,
            orientation="horizontal",
            histtype="stepfilled" if name == "real" else "step",
            alpha=0.6 if name == "real" else 1.0,
            color=colour,
        )
    side.set_ylim(limits[1])
    side.axis("off")
    figure.suptitle(
        f"{data.name}: energy distance {distances['before']:.3f} before training, "
        f"{distances['after']:.3f} after, {distances['floor']:.3f} real against real",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def losses(path: Path, history: dict[str, list[float]]) -> None:
    """The losses of each epoch."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("generator_loss", _GENERATED), ("critic_loss", _REAL)):
        values = history[name]
        axes.plot(range(1, len(values) + 1), values, color=colour, label=name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _limits(*values: np.ndarray) -> tuple[float, float]:
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    margin = 0.05 * (high - low)
    return float(low - margin), float(high + margin)
