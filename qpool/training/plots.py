"""Pictures of a run. Drawn with Agg: no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qpool.training.data import DataSet
from qpool.training.journal import read_table

_REAL, _GENERATED = "#33658a", "#f26419"


def samples(path: Path, data: DataSet, generated: np.ndarray, distances: dict[str, float]) -> None:
    """Real and generated samples side by side, in the data's units, with their marginals."""
    figure = _figure((9.6, 5.6))
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


def losses(path: Path, metrics: Path, evaluations: Path) -> None:
    """Losses of each step, and the distance to the real data over the run."""
    figure = _figure((7.2, 5.4))
    above, below = figure.subplots(2, 1, sharex=True)
    rows = read_table(metrics)
    steps = [row["step"] for row in rows]
    for name, colour in (("generator_loss", _GENERATED), ("critic_loss", _REAL)):
        values = [row[name] for row in rows]
        above.plot(steps, values, color=colour, lw=0.8, label=name.replace("_", " "))
    above.set(ylabel="loss")
    above.legend(frameon=False)
    rows = read_table(evaluations)
    steps = [row["step"] for row in rows]
    below.plot(steps, [row["energy_distance"] for row in rows], "o-", ms=3, color=_GENERATED)
    below.set(xlabel="step", ylabel="energy distance", ylim=(0, None))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def workers(path: Path, table: Path) -> None:
    """CPU use of each worker over the run; nothing is drawn of a run without workers."""
    rows = read_table(table)
    if not rows:
        return
    figure = _figure((7.2, 3.0))
    axes = figure.add_subplot()
    for number in sorted({row["worker"] for row in rows}):
        own = [row for row in rows if row["worker"] == number]
        use = [100 * row["cpu_use"] for row in own]
        axes.plot([row["step"] for row in own], use, "o-", ms=3, label=f"worker {number:.0f}")
    axes.set(xlabel="step", ylabel="CPU use of its core, %", ylim=(0, 105))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def wigner(path: Path, generator: Any, seed: int) -> None:
    """The Wigner function of each mode, the others traced out, for one latent draw."""
    from qpool import states

    z = np.random.default_rng(seed).standard_normal((1, generator.latent_dim))
    state = generator.state(z.astype(np.float32))
    grid = np.linspace(-5, 5, 101)
    figure = _figure((3.4 * state.num_modes + 0.6, 3.4))
    panels = np.atleast_1d(figure.subplots(1, state.num_modes, sharey=True))
    for mode, axes in enumerate(panels):
        values = states.wigner(state, mode, grid, grid).numpy()[0]
        size = np.abs(values).max()
        image = axes.imshow(
            values.T,
            origin="lower",
            extent=(grid[0], grid[-1]) * 2,
            cmap="RdBu_r",
            vmin=-size,
            vmax=size,
        )
        axes.set(xlabel="x", title=f"W(x, p) of mode {mode}")
        figure.colorbar(image, ax=axes, shrink=0.7)
    panels[0].set_ylabel("p")
    figure.savefig(path, dpi=120)


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _limits(*values: np.ndarray) -> tuple[float, float]:
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    margin = 0.05 * (high - low)
    return float(low - margin), float(high + margin)
