"""Generators against each other: trained alike over several seeds, judged on held-out rows.

Owns the protocol and the classical generator of equal size that a quantum one is compared with.
What the rows are, and what else is judged of them, is the caller's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qpool.training import data
from qpool.training.data import DataSet
from qpool.training.distance import energy_distance
from workers.errors import ConfigurationError, DataError

#: Draws of generated (or training) rows that a distance is the mean of.
_DRAWS = 20


@dataclasses.dataclass(frozen=True)
class Trained:
    """A generator after training.

    ``rows`` are samples of it, standardised as the training rows are; ``distance`` is the energy
    distance of as many of them as there are held-out rows to those (mean over draws).
    """

    kind: str
    seed: int
    parameters: int
    seconds: float
    distance: float
    rows: np.ndarray

    def figures(self) -> dict[str, Any]:
        """All but the rows."""
        found = dataclasses.asdict(self)
        del found["rows"]
        return found


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows to train on, standardised, and those held out, on the training rows' scale."""

    train: DataSet
    held: np.ndarray

    def floor(self, seed: int = 0) -> float:
        """Energy distance of as many training rows to the held-out ones: real against real."""
        return held_out_distance(self.train.rows, self.held, seed)


def split(
    name: str, rows: np.ndarray, columns: tuple[str, ...], share: float = 1 / 3, seed: int = 0
) -> Split:
    """Hold out a random ``share`` of the rows, (samples, columns); DataError for unusable ones."""
    values = data.check(rows)
    order = np.random.default_rng(seed).permutation(len(values))
    held = round(share * len(values))
    if not 2 <= held <= len(values) - 2:
        raise DataError(f"{held} of {len(values)} rows would be held out; give more rows")
    train = data.standardise(name, values[order[held:]], columns)
    return Split(train, ((values[order[:held]] - train.shift) / train.scale).astype(np.float32))


def held_out_distance(rows: np.ndarray, held: np.ndarray, seed: int = 0) -> float:
    """Energy distance of random rows, as many as are held out, to those; the mean over draws."""
    draws = np.random.default_rng(seed)
    number = min(len(held), len(rows))
    found = [
        energy_distance(rows[draws.permutation(len(rows))[:number]], held) for _ in range(_DRAWS)
    ]
    return float(np.mean(found))


def classical_generator(latent_dim: int, width: int, parameters: int, seed: int) -> Any:
    """A network of two hidden tanh layers with about so many ``parameters``: z -> samples.

    (batch, latent_dim) -> (batch, width). The hidden width is the one that comes nearest.
    """
    import keras

    def size(hidden: int) -> int:
        return (latent_dim + 1 + hidden + 1 + width) * hidden + width

    hidden = min(range(1, 1024), key=lambda h: abs(size(h) - parameters))
    initial = [keras.initializers.GlorotUniform(seed=seed + n) for n in range(3)]
    model = keras.Sequential(
        [
            keras.Input((latent_dim,)),
            keras.layers.Dense(hidden, "tanh", kernel_initializer=initial[0]),
            keras.layers.Dense(hidden, "tanh", kernel_initializer=initial[1]),
            keras.layers.Dense(width, kernel_initializer=initial[2]),
        ],
        name="classical_generator",
    )
    model.latent_dim = latent_dim
    return model


def parameters_of(model: Any) -> int:
    """How many trainable numbers a model has."""
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def compare(
    rows: Split,
    generators: Mapping[str, Callable[[int], Any]],
    seeds: Iterable[int],
    *,
    steps: int,
    batch_size: int = 64,
    rate: float = 0.005,
    critic_steps: int = 5,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    samples: int = 2000,
    say: Callable[[str], None] = lambda _: None,
) -> list[Trained]:
    """Train each kind of generator with each seed as a Wasserstein GAN with the same critic.

    Args:
        rows: training and held-out rows.
        generators: by kind, what makes one from a seed: callable on z, with ``latent_dim``.
        seeds: of weights, latent draws and the order of rows.
        steps: generator updates, rounded up to whole passes over the rows; both learning rates
            fall from ``rate`` by a cosine.
        options: by kind, how it is parallelized (see ``qpool.parallelize``); default: compiled
            in this process.
        samples: how many samples are drawn of a trained generator.
        say: is told each result in a line.
    """
    import keras

    from qpool.generator import parallelize
    from qpool.training import sampling
    from qpool.training.trainer import QuantumGANTrainer

    if steps < 1:
        raise ConfigurationError(f"steps must be at least 1, not {steps}")
    real = rows.train.rows
    batch_size = min(batch_size, len(real))
    epochs = -(-steps // (len(real) // batch_size))
    done = []
    for seed in seeds:
        for kind, make in generators.items():
            keras.utils.set_random_seed(seed)
            model = make(seed)
            how = (options or {}).get(kind, {"strategy": "cpu_batch"})
            began = time.perf_counter()
            with parallelize(model, seed=seed, **how) as generator:
                updates = epochs * (len(real) // batch_size)
                decay = keras.optimizers.schedules.CosineDecay
                trainer = QuantumGANTrainer(
                    generator,
                    generator_rate=decay(rate, updates),
                    critic_rate=decay(rate, updates * critic_steps),
                    critic_steps=critic_steps,
                    seed=seed,
                )
                trainer.train(real, epochs, batch_size)
                seconds = time.perf_counter() - began
                made = sampling.samples(generator, samples, batch_size, seed)
            distance = held_out_distance(made, rows.held)
            done.append(Trained(kind, seed, parameters_of(model), seconds, distance, made))
            say(f"{kind}, seed {seed}: energy distance {distance:.3f} after {seconds:.0f} s")
    return done
