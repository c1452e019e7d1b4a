"""Financial time series: windows of daily returns of the S&P 500, 1999 to 2018.

Real data: the index's daily closing values that ship in the package ``arch``. A row is a window of
eight trading days: their logarithmic returns, in per cent.

Generated windows are judged by what is known of returns (Cont, Quantitative Finance 1, 2001):
heavy tails (excess kurtosis), returns that are not correlated while their squares are (volatility
comes in clusters), and how far the value falls within a window (drawdown). Beside them: real
windows that were held out, a classical network of equal size, and the Gaussian with the real
windows' mean and covariance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qpool import applications, cli
from qpool.applications import CLASSICAL, QUANTUM, REAL

DAYS = 8

#: Of the circuit, unless ``--long``.
LAYERS, CUTOFF = 2, 5
LAGS = 5


def real_windows() -> np.ndarray:
    """(windows, DAYS) logarithmic returns in per cent; no day is in two windows."""
    closes = applications.need("arch.data.sp500").load()["Adj Close"].to_numpy()
    returns = 100.0 * np.diff(np.log(closes))
    return returns[: len(returns) // DAYS * DAYS].reshape(-1, DAYS)


def facts(windows: np.ndarray) -> dict[str, float]:
    """The stylised facts of windows of returns, (windows, DAYS), in per cent."""
    values = windows - windows.mean()
    falls = np.cumsum(np.hstack([np.zeros((len(windows), 1)), windows]), axis=1)
    drawdown = (np.maximum.accumulate(falls, axis=1) - falls).max(axis=1)
    return {
        "excess kurtosis": float((values**4).mean() / (values**2).mean() ** 2 - 3.0),
        "autocorrelation": autocorrelation(values)[1],
        "of squares": float(np.mean(autocorrelation(values**2)[1:])),
        "drawdown": float(drawdown.mean()),
        "drawdown, 95%": float(np.percentile(drawdown, 95)),
    }


def autocorrelation(windows: np.ndarray) -> list[float]:
    """Of lags 0 to LAGS, within windows."""
    values = windows - windows.mean()
    pairs = [(values[:, : DAYS - lag], values[:, lag:]) for lag in range(LAGS + 1)]
    return [float((a * b).mean() / (values**2).mean()) for a, b in pairs]


@applications.application
def finance(seeds: int, steps: int | None, workers: int | None, long: bool, out: Path, say: Any):
    """Learn windows of daily returns; compare with a classical network and a Gaussian."""
    import keras

    import qpool
    from qpool.models import QuantumSFGenerator
    from qpool.training import comparison

    columns = tuple(f"day {n + 1} (%)" for n in range(DAYS))
    rows = comparison.split("S&P 500", real_windows(), columns)
    layers, cutoff, latent = (4, 7, 12) if long else (LAYERS, CUTOFF, 12)

    def quantum(seed: int) -> Any:
        """Position and momentum of four modes are eight days; a linear layer gives them scale."""
        circuit = QuantumSFGenerator(
            n_modes=DAYS // 2,
            latent_dim=latent,
            layers=layers,
            cutoff_dim=cutoff,
            encoding_strategy="classical_neural",
            readout="quadratures",
            seed=seed,
        )
        scale = keras.layers.Dense(DAYS, kernel_initializer=keras.initializers.Identity())
        model = keras.Sequential([keras.Input((latent,)), circuit, scale])
        model.latent_dim = latent
        return model

    size = comparison.parameters_of(quantum(1))
    with qpool.Pool(workers) as pool:
        trained = comparison.compare(
            rows,
            {
                "quantum": quantum,
                "classical": lambda seed: comparison.classical_generator(latent, DAYS, size, seed),
            },
            range(1, seeds + 1),
            steps=steps or (4000 if long else 1200),
            batch_size=32,
            options={"quantum": {"pool": pool, "strategy": "processes"}},
            say=say,
        )
    train, held = (rows.train.in_units(x) for x in (rows.train.rows, rows.held))
    draws = np.random.default_rng(0)
    normal = draws.multivariate_normal(train.mean(axis=0), np.cov(train.T), 2000)
    of_normal = (normal - rows.train.shift) / rows.train.scale
    floor = rows.floor()
    made = [rows.train.in_units(t.rows) for t in trained]
    table = [{**t.figures(), **facts(w)} for t, w in zip(trained, made, strict=True)]
    distance = comparison.held_out_distance(of_normal, rows.held)
    table.append({"kind": "Gaussian", "distance": distance, **facts(normal)})
    table.append({"kind": "real, trained on", "distance": floor, **facts(train)})
    table.append({"kind": "real, held out", **facts(held)})
    shown = {t.kind: w for t, w in zip(trained[-2:], made[-2:], strict=True)}
    draw(out / "finance.png", np.vstack([train, held]), {**shown, "Gaussian": normal})
    return {
        "windows of returns": table,
        "verdict": applications.verdict(trained, floor),
        "stylised facts": nearer(table, facts(train), facts(held)),
    }


def nearer(table: list[dict[str, Any]], train: dict[str, float], held: dict[str, float]) -> str:
    """Which generator comes nearer to each fact of the held-out windows, if seeds agree on it."""
    found = []
    for name, value in held.items():
        of = {
            kind: [row[name] for row in table if row["kind"] == kind]
            for kind in ("quantum", "classical")
        }
        off = {kind: np.abs(np.array(values) - value) for kind, values in of.items()}
        best = next(
            (
                f"{kind} is nearer with every seed"
                for kind, other in (("quantum", "classical"), ("classical", "quantum"))
                if len(off[kind]) > 2 and off[kind].max() < off[other].min()
            ),
            "no difference that seeds agree on",
        )
        figures = ", ".join(f"{k} {min(v):.3g} to {max(v):.3g}" for k, v in of.items())
        found.append(f"{name}: {best} ({figures}; real {value:.3g}, trained on {train[name]:.3g})")
    return "; ".join(found)


def draw(path: Path, real: np.ndarray, generated: dict[str, np.ndarray]) -> None:
    """The distribution's tails, the autocorrelation of squares, and drawdowns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    tails, clusters, falls = figure.subplots(1, 3)
    colours = (REAL, QUANTUM, CLASSICAL, "grey")
    for (kind, windows), colour in zip({"real": real, **generated}.items(), colours, strict=True):
        sizes = np.sort(np.abs(windows.ravel()))
        share = 1.0 - np.arange(len(sizes)) / len(sizes)
        tails.plot(sizes, share, color=colour, label=kind)
        lags = range(1, LAGS + 1)
        clusters.plot(
            lags, autocorrelation((windows - windows.mean()) ** 2)[1:], "o-", color=colour
        )
        value = np.cumsum(np.hstack([np.zeros((len(windows), 1)), windows]), axis=1)
        drawdown = (np.maximum.accumulate(value, axis=1) - value).max(axis=1)
        falls.hist(
            drawdown, np.linspace(0, 12, 30), density=True, histtype="step", color=colour, lw=1.6
        )
    tails.set(yscale="log", xlabel="|daily return|, %", ylabel="share beyond", ylim=(3e-5, 1.2))
    tails.legend(frameon=False)
    clusters.set(xlabel="lag, days", ylabel="autocorrelation of squares")
    clusters.axhline(0.0, color="lightgrey", lw=0.8)
    falls.set(xlabel=f"largest fall within {DAYS} days, %", ylabel="density")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(finance)
