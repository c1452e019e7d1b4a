"""Molecular generation: four properties of organic molecules, learned from measured ones.

Real data: the critical constants of organic compounds that IUPAC's series of reviews recommends,
with their boiling points, as they ship in the package ``chemicals``. A row is a molecule: molar
mass, boiling temperature, critical temperature, critical pressure.

A generator of rows is judged by its distance to molecules that it never saw, by property
histograms, and by whether what it makes could be a molecule: its boiling point must lie as far
below the critical point as those of real ones do (Guldberg's rule), and the acentric factor that
Lee and Kesler's formula gives it, which no model was shown, within theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qpool import applications, cli
from qpool.applications import CLASSICAL, QUANTUM, REAL

COLUMNS = ("log10 molar mass (g/mol)", "boiling point (K)", "critical point (K)", "log10 Pc (bar)")

#: Of the circuit, unless ``--long``.
LAYERS, CUTOFF = 2, 5

#: Sources of boiling points that are, or may be, estimates.
ESTIMATES = ("JOBACK", "YAWS")


def real_molecules() -> np.ndarray:
    """(molecules, 4): what COLUMNS says."""
    critical = applications.need("chemicals.critical")
    phases = applications.need("chemicals.phase_change")
    rows = []
    critical.Tc("74-82-8")  # has the package load its tables
    for number, known in critical.critical_data_IUPAC.sort_index().iterrows():
        sources = [s for s in phases.Tb_methods(number) if s not in ESTIMATES]
        boils = phases.Tb(number, method=sources[0]) if sources else None
        if boils and known.MW > 0 and known.Tc > 0 and known.Pc > 0:
            rows.append((np.log10(known.MW), boils, known.Tc, np.log10(known.Pc / 1e5)))
    return np.array(rows)


def derived(rows: np.ndarray) -> np.ndarray:
    """(molecules, 2): the reduced boiling point, and Lee and Kesler's acentric factor."""
    boils, critical, pressure = rows[:, 1], rows[:, 2], 10.0 ** rows[:, 3] / 1.01325
    t = boils / critical
    with np.errstate(all="ignore"):  # of rows that are no molecules
        above = -np.log(pressure) - 5.92714 + 6.09648 / t + 1.28862 * np.log(t) - 0.169347 * t**6
        below = 15.2518 - 15.6875 / t - 13.4721 * np.log(t) + 0.43577 * t**6
        return np.stack([t, above / below], axis=1)


def valid(rows: np.ndarray, real: np.ndarray) -> float:
    """The share of rows whose derived properties are both within what real molecules have."""
    low, high = np.percentile(derived(real), [0.5, 99.5], axis=0)
    found = derived(rows)
    return float(np.mean(((found >= low) & (found <= high)).all(axis=1)))


@applications.application
def molecules(seeds: int, steps: int | None, workers: int | None, long: bool, out: Path, say: Any):
    """Learn four properties of organic molecules; compare with a classical network."""
    import qpool
    from qpool.models import QuantumSFGenerator
    from qpool.training import comparison

    rows = comparison.split("molecules", real_molecules(), COLUMNS)
    layers, cutoff = (4, 7) if long else (LAYERS, CUTOFF)

    def quantum(seed: int) -> Any:
        return QuantumSFGenerator(
            n_modes=4,
            latent_dim=8,
            layers=layers,
            cutoff_dim=cutoff,
            encoding_strategy="classical_neural",
            seed=seed,
        )

    size = comparison.parameters_of(quantum(1))
    with qpool.Pool(workers) as pool:
        trained = comparison.compare(
            rows,
            {
                "quantum": quantum,
                "classical": lambda seed: comparison.classical_generator(8, 4, size, seed),
            },
            range(1, seeds + 1),
            steps=steps or (4000 if long else 1200),
            batch_size=32,
            options={"quantum": {"pool": pool, "strategy": "processes"}},
            say=say,
        )
    real, held = (rows.train.in_units(x) for x in (rows.train.rows, rows.held))
    floor = rows.floor()
    table = [{**t.figures(), "valid": valid(rows.train.in_units(t.rows), real)} for t in trained]
    table.append({"kind": "real, held out", "distance": floor, "valid": valid(held, real)})
    draw(out / "molecules.png", held, {t.kind: rows.train.in_units(t.rows) for t in trained[-2:]})
    return {"molecules": table, "verdict": applications.verdict(trained, floor)}


def draw(path: Path, held: np.ndarray, generated: dict[str, np.ndarray]) -> None:
    """Histograms of the four properties, and of the two that follow from them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    names = (*COLUMNS, "reduced boiling point", "acentric factor (not shown to any model)")
    everything = {"held out": held, **generated}
    columns = {kind: np.hstack([rows, derived(rows)]) for kind, rows in everything.items()}
    for n, (axes, name) in enumerate(zip(figure.subplots(2, 3).flat, names, strict=True)):
        low, high = np.percentile(columns["held out"][:, n], [0, 100])
        margin = 0.15 * (high - low)
        bins = np.linspace(low - margin, high + margin, 26)
        for (kind, values), colour in zip(columns.items(), (REAL, QUANTUM, CLASSICAL), strict=True):
            filled = kind == "held out"
            axes.hist(
                values[:, n],
                bins,
                density=True,
                histtype="stepfilled" if filled else "step",
                alpha=0.5 if filled else 1.0,
                lw=1.6,
                color=colour,
                label=kind,
            )
        axes.set(xlabel=name, yticks=())
    figure.axes[0].legend(frameon=False)
    figure.suptitle("properties of organic molecules: held out, and generated")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(molecules)
