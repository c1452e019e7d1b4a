"""Scientific computing: how energy flows between the two O-H bonds of a water molecule.

Real data: ``strawberryfields.apps.data.Water``, the frequencies of water's normal modes and the
matrix that takes them to modes local to the bonds (the third, the bend, is coupled to neither).

One bond is set swinging (a coherent state with one quantum in the mean), and energy goes over to
the other bond and back. Bonds are not springs: a bond's frequency falls by twice its anharmonicity
chi with each quantum, so that the two fall out of step. The map shows the mean number of quanta in
the bond that was at rest, over time and chi, with its gradient: a large batch, forward and
backward, of a circuit that takes the two motions together in short slices (Trotter).

The classical counterpart has two complex amplitudes in the place of the state; where the maps
differ, the motion is quantum.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from qpool import applications, cli

#: Femtoseconds, and cm^-1, at the map's far ends.
FAR = (400.0, 150.0)
CUTOFF = 10
SLICES = 24

#: Slices of the classical motion: so many that more change nothing that can be seen.
FINE = 2000

#: The phase of a frequency of 1 cm^-1 after 1 fs: 2 pi c.
PHASE = 2 * np.pi * 2.99792458e-5


def real_water() -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of the two stretching modes, (2,) in cm^-1, and (2, 2) normal to local modes."""
    water = applications.need("strawberryfields.apps.data").Water(0)
    return water.w[:2], water.U[:2, :2]


def program(frequencies: np.ndarray, to_local: np.ndarray) -> Any:
    """The circuit, with free parameters ``t`` (fs) and ``chi`` (cm^-1)."""
    import strawberryfields as sf
    from strawberryfields import ops

    made = sf.Program(2)
    t, chi = made.params("t", "chi")
    with made.context as q:
        ops.Dgate(1.0) | q[0]
        for _ in range(SLICES):
            ops.Interferometer(to_local.T) | q
            for mode in range(2):
                # Both turn with the mean frequency, which moves no energy: it is left out.
                detuning = frequencies[mode] - frequencies.mean()
                ops.Rgate(-PHASE / SLICES * detuning * t) | q[mode]
            ops.Interferometer(to_local) | q
            for mode in range(2):
                ops.Kgate(PHASE / SLICES * chi * t) | q[mode]
    return made


def classical(points: np.ndarray, frequencies: np.ndarray, to_local: np.ndarray) -> np.ndarray:
    """The same with an amplitude for each bond: quanta in the second one, (points,)."""
    t, chi = points.T
    a = np.zeros((len(points), 2), complex)
    a[:, 0] = 1.0
    turn = np.exp(-1j * PHASE / FINE * np.outer(t, frequencies - frequencies.mean()))
    for _ in range(FINE):
        a = (a @ to_local * turn) @ to_local.T
        a *= np.exp(1j * (PHASE / FINE * chi * t)[:, None] * (2 * np.abs(a) ** 2 + 1))
    return np.abs(a[:, 1]) ** 2


def exact(points: np.ndarray, frequencies: np.ndarray, to_local: np.ndarray) -> np.ndarray:
    """The circuit's answer with infinitely many slices, by diagonalising its Hamiltonian."""
    lower = np.diag(np.sqrt(np.arange(1.0, CUTOFF)), 1)
    modes = [np.kron(lower, np.eye(CUTOFF)), np.kron(np.eye(CUTOFF), lower)]
    detuned = to_local @ np.diag(frequencies - frequencies.mean()) @ to_local.T
    hopping = sum(detuned[j, k] * modes[j].T @ modes[k] for j in range(2) for k in range(2))
    number = [mode.T @ mode for mode in modes]
    size = np.exp(-0.5) / np.sqrt(np.cumprod([1.0, *range(1, CUTOFF)]))
    first = np.kron(size, np.eye(CUTOFF)[0])
    found = np.empty(len(points))
    for chi in np.unique(points[:, 1]):
        chosen = points[:, 1] == chi
        energies, states = np.linalg.eigh(hopping - chi * sum(n @ n for n in number))
        phases = np.exp(-1j * PHASE * np.outer(points[chosen, 0], energies))
        evolved = (phases * (states.T @ first)) @ states.T
        found[chosen] = (np.abs(evolved) ** 2) @ np.diag(number[1])
    return found


def values_and_gradients(layer: Any, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quanta in the second bond, (points,), and their derivatives by t and chi, (points, 2)."""
    import tensorflow as tf

    z = tf.constant(points, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(z)
        quanta = layer(z)[:, 1]
    return quanta.numpy(), tape.gradient(quanta, z).numpy()


@applications.application
def landscape(seeds: int, steps: int | None, workers: int | None, long: bool, out: Path, say: Any):
    """Map the energy flow in water with its gradient; --steps is the points along each axis."""
    from rich.progress import track

    import qpool

    side = steps or (2000 if long else 900)
    water = real_water()
    axes = [np.linspace(0.0, far, side) for far in FAR]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    made = program(*water)
    options = {"inputs": ("t", "chi"), "readout": "photons", "cutoff_dim": CUTOFF}
    layer = qpool.CircuitLayer(made, **options)
    batch = min(4096, len(points))
    chunks = range(0, len(points), batch)
    padded = np.vstack([points, np.repeat(points[-1:], -len(points) % batch, axis=0)])
    with qpool.parallelize(layer, workers, "processes") as pooled:
        began = time.perf_counter()
        values_and_gradients(pooled, padded[:batch])
        compiled = time.perf_counter() - began
        began = time.perf_counter()
        found = [
            values_and_gradients(pooled, padded[n : n + batch])
            for n in track(chunks, "mapping", transient=True)
        ]
        seconds = time.perf_counter() - began
    quanta, slopes = (np.concatenate([pair[k] for pair in found])[: len(points)] for k in (0, 1))
    say(f"{len(points)} points in {seconds:.0f} s")

    stock, worst = timed_stock(layer, points, quanta, slopes, seeds)
    # The classical motion on fewer points: it takes many slices, and is smooth enough to be seen.
    coarse = np.unique(np.linspace(0, side - 1, min(side, 150)).astype(int))
    few = np.ix_(coarse, coarse)
    some = points.reshape(side, side, 2)[few].reshape(-1, 2)
    apart = np.abs(quanta.reshape(side, side)[few].ravel() - classical(some, *water))
    of_slices = np.abs(quanta.reshape(side, side)[few].ravel() - exact(some, *water))
    draw(out / "landscape.png", axes, coarse, quanta, slopes, apart)
    rows = [
        {
            "how": "qpool",
            "points": len(points),
            "seconds": seconds,
            "points a second": len(points) / seconds,
            "hours for all": seconds / 3600,
        },
        *(
            {
                "how": f"stock Strawberry Fields, {how}",
                "points": number,
                "seconds": taken,
                "points a second": number / taken,
                "hours for all": len(points) * taken / number / 3600,
            }
            for how, (number, taken) in stock.items()
        ),
    ]
    harmonic = some[:, 1] == 0.0
    return {
        "time": rows,
        "first call": f"{compiled:.1f} s more, to compile",
        "worst distance from stock": f"value {worst[0]:.1e}, derivative {worst[1]:.1e} (relative)",
        "verdict": (
            f"Without anharmonicity the classical amplitudes are right (to "
            f"{apart[harmonic].max():.0e} quanta); with it they are off by "
            f"{np.sqrt((apart[~harmonic] ** 2).mean()):.2f} quanta in the root mean square, "
            f"{apart.max():.2f} at most: that much of the map is quantum. Taking the two motions "
            f"in {SLICES} slices is off by {np.sqrt((of_slices**2).mean()):.3f} in the root mean "
            f"square, {of_slices.max():.3f} at most (from the exact evolution)."
        )
        if side > 1
        else "one point tells nothing",
    }


def timed_stock(
    layer: Any, points: np.ndarray, quanta: np.ndarray, slopes: np.ndarray, turns: int
) -> tuple[dict[str, tuple[int, float]], tuple[float, float]]:
    """Stock Strawberry Fields on random points: (points, seconds), and how far from it we are."""
    import qpool

    many = min(256, len(points))
    chosen = np.random.default_rng(0).choice(len(points), many, replace=False)
    scale = np.abs(slopes).max(axis=0)
    worst, taken = [0.0, 0.0], {}
    with qpool.parallelize(layer, strategy="sequential", engine="stock") as stock:
        values_and_gradients(stock, points[:1])  # what is done once is not counted
        for how, groups in (
            ("one at a time", chosen[:8, None]),
            (f"batch_size={many}", chosen[None]),
        ):
            began, number = time.perf_counter(), 0
            for _ in range(turns):
                for group in groups:
                    value, slope = values_and_gradients(stock, points[group])
                    number += len(group)
                    # np.maximum, unlike max, keeps a NaN.
                    worst[0] = np.maximum(worst[0], np.abs(value - quanta[group]).max())
                    off = np.abs(slope - slopes[group]) / scale
                    worst[1] = np.maximum(worst[1], off.max())
            taken[how] = number, time.perf_counter() - began
    return taken, (worst[0], worst[1])


def draw(
    path: Path,
    axes: list[np.ndarray],
    coarse: np.ndarray,
    quanta: np.ndarray,
    slopes: np.ndarray,
    apart: np.ndarray,
) -> None:
    """The map with the gradient's field, and where the classical one differs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    shape = (len(axes[0]), len(axes[1]))
    fewer = [axis[coarse] for axis in axes]
    panels = (
        (axes, quanta, "viridis", "quanta in the bond that was at rest, and the gradient"),
        (fewer, apart, "magma", "distance of the classical amplitudes' map"),
    )
    for panel, (at, values, colours, title) in zip(figure.subplots(1, 2), panels, strict=True):
        heights = values.reshape(len(at[0]), len(at[1])).T
        mesh = panel.pcolormesh(*at, heights, cmap=colours, rasterized=True, shading="nearest")
        figure.colorbar(mesh, ax=panel)
        panel.set(xlabel="time, fs", ylabel="anharmonicity, 1/cm", title=title)
        panel.title.set_fontsize(10)
    few = [np.linspace(0, n - 1, 22).astype(int)[1:-1] for n in shape]
    place = np.ix_(*few)
    arrows = [slopes[:, k].reshape(shape)[place].T * FAR[k] for k in range(2)]
    figure.axes[0].quiver(
        axes[0][few[0]], axes[1][few[1]], *arrows, color="white", width=0.002, alpha=0.8
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(landscape)
