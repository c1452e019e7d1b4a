"""Optimisation: a circuit that has the vibrations of formic acid, found from many starts at once.

Real data: ``strawberryfields.apps.data.Formic``, 20,000 photon-number samples of the vibrational
quanta that formic acid has after an electronic transition. Of its seven modes, the three with most
quanta are taken.

Sought is a circuit (layers of a CV quantum neural network on the vacuum) whose photon numbers are
distributed like that: state preparation by its statistics. What is maximised is the fidelity of the
two distributions, F = (sum_n sqrt(p_n q_n))^2. Where a start ends differs, so there are many; they
are rows of one batch, whose gradients come back through the pool in one piece.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from qpool import applications, cli
from qpool.applications import QUANTUM, REAL

MODES = 3
CUTOFF = 6


def real_quanta() -> tuple[np.ndarray, tuple[int, ...]]:
    """The distribution of quanta in the busiest modes, (CUTOFF,) * MODES, and which those are."""
    samples = np.array(list(applications.need("strawberryfields.apps.data").Formic()))
    samples = samples[:, :7]  # the others are those of the state before, which is the vacuum
    modes = tuple(int(n) for n in np.sort(np.argsort(-samples.mean(axis=0))[:MODES]))
    return distribution(samples[:, modes]), modes


def distribution(samples: np.ndarray) -> np.ndarray:
    """How often each combination of quanta came, (CUTOFF,) * MODES; it adds up to 1."""
    counts = np.zeros((CUTOFF,) * MODES)
    np.add.at(counts, tuple(samples.T), 1.0)
    return counts / counts.sum()


def fidelity(p: Any, q: Any) -> Any:
    """(sum sqrt(p q))^2 of each row of p, (rows, outcomes), with q, (outcomes,)."""
    import tensorflow as tf

    return tf.reduce_sum(tf.sqrt(p * q + 1e-12), axis=1) ** 2


def search(generator: Any, first: Any, wanted: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Adam on each row of parameters by itself: fidelities (steps + 1, starts), and the rows."""
    import keras
    import tensorflow as tf

    rows = tf.Variable(first)
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.05, steps))
    adam.build([rows])
    found = []

    def look() -> Any:
        return tf.reshape(tf.abs(generator(rows)) ** 2, (len(first), -1))

    for _ in range(steps):
        with tf.GradientTape() as tape:
            reached = fidelity(look(), wanted)
            loss = -tf.reduce_sum(reached)
        adam.apply_gradients([(tape.gradient(loss, rows), rows)])
        found.append(reached.numpy())
    return np.array([*found, fidelity(look(), wanted).numpy()]), rows.numpy()


def classical(wanted: np.ndarray, parameters: int, steps: int, seed: int) -> tuple[float, int]:
    """The fidelity of a classical network of that size: quanta -> their log probability."""
    import keras
    import tensorflow as tf

    from qpool.training import comparison

    network = comparison.classical_generator(MODES, 1, parameters, seed)
    quanta = np.stack(np.meshgrid(*[np.arange(CUTOFF)] * MODES, indexing="ij"), axis=-1)
    quanta = tf.constant(quanta.reshape(-1, MODES), tf.float32)
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, steps))

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            p = tf.nn.softmax(tf.transpose(network(quanta)))
            loss = -fidelity(p, wanted)[0]
        gradients = tape.gradient(loss, network.trainable_variables)
        adam.apply(gradients, network.trainable_variables)
        return -loss

    for _ in range(steps):
        reached = float(step())
    return reached, comparison.parameters_of(network)


@applications.application
def optimisation(
    seeds: int, steps: int | None, workers: int | None, long: bool, out: Path, say: Any
):
    """Find a circuit with formic acid's vibrational quanta, from many starts over the pool."""
    import qpool
    from qpool.models import circuit

    real, modes = real_quanta()
    wanted = real.reshape(-1).astype(np.float32)
    layers, starts, steps = (4, 256, steps or 1500) if long else (3, 64, steps or 300)
    program = circuit.build(MODES, layers, lambda program, q: None)
    names = tuple(program.free_params)
    layer = qpool.CircuitLayer(program, inputs=names, readout="ket", cutoff_dim=CUTOFF)
    table, best, curves = [], None, []
    with qpool.parallelize(layer, workers, "processes") as generator:
        for seed in range(1, seeds + 1):
            draws = np.random.default_rng(seed)
            first = draws.normal(0.0, 0.3, (starts, len(names))).astype(np.float32)
            began = time.perf_counter()
            found, rows = search(generator, first, wanted, steps)
            seconds = time.perf_counter() - began
            reached, size = classical(wanted, len(names), 10 * steps, seed)
            row = {
                "seed": seed,
                "starts": starts,
                "best fidelity": float(found[-1].max()),
                "median": float(np.median(found[-1])),
                "worst": float(found[-1].min()),
                "seconds": seconds,
                "circuits a second": starts * (steps + 1) / seconds,
                "numbers": len(names),
                "classical": reached,
                "its numbers": size,
            }
            say(f"seed {seed}: best {row['best fidelity']:.4f}, median {row['median']:.4f}")
            table.append(row)
            curves.append(found)
            if best is None or found[-1].max() > best[0]:
                state = np.abs(np.asarray(generator(rows)))[found[-1].argmax()] ** 2
                best = found[-1].max(), state
    draw(out / "optimisation.png", np.hstack(curves), real, best[1], modes)
    draws = np.random.default_rng(0)
    again = draws.multinomial(20_000, real.ravel() / real.sum()) / 20_000
    alike = float((np.sqrt(again * real.ravel()).sum()) ** 2)
    middle = float(np.median([row["best fidelity"] for row in table]))
    by_network = float(np.median([row["classical"] for row in table]))
    better = "more" if middle > by_network else "no more"
    return {
        "fidelity": table,
        "modes of formic acid": ", ".join(map(str, modes)),
        "verdict": (
            f"The best of {starts} circuits reaches {middle:.4f}, a classical network of as many "
            f"numbers {by_network:.4f}: as a distribution the circuit is {better} than a network. "
            "What it has besides is the state itself, which a device can prepare. 20,000 fresh "
            f"samples of the data's own distribution agree with it to {alike:.4f}."
        ),
    }


def draw(
    path: Path, curves: np.ndarray, real: np.ndarray, found: np.ndarray, modes: tuple[int, ...]
) -> None:
    """The ways of all starts, where they end, and the distributions of single modes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    ways, ends, quanta = figure.subplots(1, 3)
    ways.plot(np.clip(1.0 - curves, 1e-6, None), color=QUANTUM, alpha=0.15, lw=0.8)
    ways.set(yscale="log", xlabel="step", ylabel="1 - fidelity")
    ends.hist(curves[-1], 40, color=QUANTUM)
    ends.set(xlabel="fidelity reached", ylabel="starts")
    width = 0.8 / MODES
    for n, mode in enumerate(modes):
        others = tuple(axis for axis in range(MODES) if axis != n)
        place = np.arange(CUTOFF) + (n - 1) * width
        quanta.bar(place, real.sum(axis=others), width * 0.9, color=REAL, alpha=0.4 + 0.2 * n)
        quanta.plot(place, found.sum(axis=others), "_", ms=12, mew=2, color=QUANTUM)
        quanta.text(place[0], 1.02 * real.sum(axis=others)[0], str(mode), ha="center", fontsize=8)
    quanta.set(
        xlabel="quanta in a mode", title="modes of formic acid: data (bars), best circuit (marks)"
    )
    quanta.title.set_fontsize(9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(optimisation)
