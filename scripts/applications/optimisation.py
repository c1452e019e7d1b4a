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


def real_quanta() -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """The distributions of quanta in the busiest modes, (CUTOFF,) * MODES, of one half of the
    samples and of the other, which is held out; and which modes those are."""
    samples = np.array(list(applications.need("strawberryfields.apps.data").Formic()))
    samples = samples[:, :7]  # the others are those of the state before, which is the vacuum
    modes = tuple(int(n) for n in np.sort(np.argsort(-samples.mean(axis=0))[:MODES]))
    samples = np.random.default_rng(0).permutation(samples[:, modes])
    half = len(samples) // 2
    return distribution(samples[:half]), distribution(samples[half:]), modes


def distribution(samples: np.ndarray) -> np.ndarray:
    """How often each combination of quanta came, (CUTOFF,) * MODES; it adds up to 1."""
    counts = np.zeros((CUTOFF,) * MODES)
    np.add.at(counts, tuple(samples.T), 1.0)
    return counts / counts.sum()


def fidelity(p: Any, q: Any) -> Any:
    """(sum sqrt(p q))^2 of each row of p, (rows, outcomes), with q, (outcomes,)."""
    import tensorflow as tf

    # The root has no slope at 0: what is as good as 0 has none here.
    return tf.reduce_sum(tf.sqrt(tf.maximum(p, 1e-30)) * np.sqrt(q), axis=1) ** 2


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


def classical(wanted: np.ndarray, parameters: int, steps: int, seed: int) -> tuple[np.ndarray, int]:
    """What a classical network of about that size learns, (1, outcomes), and its size.

    From quanta it makes the logarithm of their probability.
    """
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
        return p

    for _ in range(steps):
        found = step()
    return found.numpy(), comparison.parameters_of(network)


@applications.application
def optimisation(
    seeds: int, steps: int | None, workers: int | None, long: bool, out: Path, say: Any
):
    """Find a circuit with formic acid's vibrational quanta, from many starts over the pool."""
    import qpool
    from qpool.models import circuit

    real, held, modes = real_quanta()
    wanted, judged = (d.reshape(-1).astype(np.float32) for d in (real, held))
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
            network, size = classical(wanted, len(names), 10 * steps, seed)
            chosen = rows[found[-1].argmax()]
            p = (np.abs(np.asarray(generator(chosen[None]))) ** 2).reshape(1, -1)
            row = {
                "seed": seed,
                "starts": starts,
                "best, held out": float(fidelity(p, judged)[0]),
                "at a higher cutoff": higher(program, names, chosen, judged),
                "best fidelity": float(found[-1].max()),
                "median": float(np.median(found[-1])),
                "worst": float(found[-1].min()),
                "seconds": seconds,
                "circuits a second": starts * (steps + 1) / seconds,
                "numbers": len(names),
                "classical, held out": float(fidelity(network, judged)[0]),
                "its numbers": size,
            }
            say(f"seed {seed}: best {row['best, held out']:.4f}, median {row['median']:.4f}")
            table.append(row)
            curves.append(found)
            if best is None or found[-1].max() > best[0]:
                best = found[-1].max(), p.reshape(real.shape)
    draw(out / "optimisation.png", np.hstack(curves), real, best[1], modes)
    alike = float(fidelity(wanted[None], judged)[0])
    middle, by_network, beyond = (
        float(np.median([row[name] for row in table]))
        for name in ("best, held out", "classical, held out", "at a higher cutoff")
    )
    better = "more" if middle > by_network else "no more"
    return {
        "fidelity": table,
        "modes of formic acid": ", ".join(map(str, modes)),
        "verdict": (
            f"With held-out samples the best of {starts} circuits agrees to {middle:.4f}, a "
            f"classical network of about as many numbers (and ten times the steps, from one "
            f"start) to {by_network:.4f}, the samples that both were fitted to to {alike:.4f}: as "
            f"a distribution the circuit is {better} than a network. What it has besides is a "
            f"state that a device could prepare; simulated up to more quanta it agrees to "
            f"{beyond:.4f}."
        ),
    }


def higher(program: Any, names: tuple[str, ...], row: np.ndarray, judged: np.ndarray) -> float:
    """The fidelity of a found circuit when more quanta are simulated than in the search."""
    import qpool

    more = qpool.CircuitLayer(program, inputs=names, readout="ket", cutoff_dim=CUTOFF + 4)
    p = np.abs(np.asarray(more(row[None])))[0] ** 2
    kept = p[(slice(CUTOFF),) * MODES].reshape(1, -1)
    return float(fidelity(kept, judged)[0])


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
