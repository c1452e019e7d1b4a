"""What a step costs the coordinator, by how many workers there are: with more than any machine has.

Workers are simulated (``simulated``), so that the coordinator's seconds of CPU are its own part of
a step, in the thread that calls; a step's time is not measured so. From them, and from what a
sample costs one core, follows the batch at which so many workers pay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qpool.studies.bench.alone import alone_on_a_core, answer
from qpool.studies.bench.simulated import simulated_pool

#: Counts of workers, and rows and tiles that each of them gets.
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
_TILE, _TILES = 8, 2

#: Calls that are timed at a time, and how often.
_CALLS, _TURNS = 20, 5

#: Rows by which a sample's cost to a core is measured.
_SAMPLES = 16

#: Modes, layers, cutoff of the circuits whose batches are told.
CIRCUITS = {
    "2 modes, 2 layers, cutoff 8": (2, 2, 8),
    "2 modes, 6 layers, cutoff 12": (2, 6, 12),
    "3 modes, 6 layers, cutoff 12": (3, 6, 12),
}

#: Workers pay where they are at least half as fast as so many times one.
_EFFICIENCY = 0.5


def coordinator() -> dict[str, Any]:
    """CPU microseconds of the coordinator for a forward call, and for a step with its gradient in
    one exchange, by the number of simulated workers; and the batches at which workers pay."""
    calls = {str(workers): _measure(workers) for workers in WORKERS}
    sizes = np.array([[1.0, workers] for workers in WORKERS])
    fixed, each = np.linalg.lstsq(
        sizes, np.array([calls[str(w)]["step_us"] for w in WORKERS]), rcond=None
    )[0]
    circuits = {}
    for name, shape in CIRCUITS.items():
        sample = float(alone_on_a_core(__name__, *shape))
        circuits[name] = {
            "sample_us": 1e6 * sample,
            "batches": {
                str(workers): least_batch(workers, calls[str(workers)]["step_us"], 1e6 * sample)
                for workers in WORKERS
            },
        }
    return {
        "case": "coordinator",
        "by_workers": calls,
        "step_us": {"fixed": float(fixed), "each_worker": float(each)},
        "circuits": circuits,
    }


def least_batch(workers: int, step: float, sample: float) -> int:
    """The least batch of which so many workers make at least half as many times more than one
    core would, that has no coordinator: a step costs the coordinator ``step``, and a core
    ``sample`` for each row, in the same unit of time. Each worker has a tile at least, of as many
    rows as that was measured by."""
    # batch sample / (step + batch sample / workers) >= efficiency workers
    least = _EFFICIENCY * workers * step / (sample * (1 - _EFFICIENCY))
    return max(int(np.ceil(least)), workers * _SAMPLES)


def draw(found: dict[str, Any], picture: Path) -> None:
    """The coordinator's part of a step, and the batches at which workers pay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    for key, label in (("call_us", "forward call"), ("step_us", "step in one exchange")):
        left.plot(WORKERS, [found["by_workers"][str(w)][key] for w in WORKERS], "o-", label=label)
    left.set_ylabel("coordinator's CPU, microseconds")
    for name, circuit in found["circuits"].items():
        right.plot(WORKERS, [circuit["batches"][str(w)] for w in WORKERS], "o-", label=name)
    right.set_ylabel("least batch for half of the ideal speed-up")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(WORKERS, [str(w) for w in WORKERS])
        panel.set_xlabel("workers")
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _measure(workers: int) -> dict[str, float]:
    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(n_modes=2, latent_dim=4, layers=2, cutoff_dim=8)
    z = tf.random.stateless_normal((workers * _TILE * _TILES, 4), (1, 2))
    with (
        simulated_pool(workers) as pool,
        qpool.parallelize(model, pool=pool, tile=_TILE) as generator,
    ):
        return {
            "call_us": _cpu_microseconds(lambda: generator(z)),
            "step_us": _cpu_microseconds(lambda: generator.loss_and_gradient(z, _loss)),
        }


def _loss(samples: Any) -> Any:
    return samples[:, 0]


def _cpu_microseconds(call: Callable[[], Any]) -> float:
    call()
    found = []
    for _ in range(_TURNS):
        began = time.thread_time()
        for _ in range(_CALLS):
            call()
        found.append((time.thread_time() - began) / _CALLS)
    return 1e6 * statistics.median(found)


def _sample_seconds(modes: int, layers: int, cutoff: int) -> float:
    """What a sample's values and gradient cost one core, as a worker computes them."""
    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(
        n_modes=modes, latent_dim=2 * modes, layers=layers, cutoff_dim=cutoff
    )
    z = tf.random.stateless_normal((_SAMPLES, 2 * modes), (1, 2))
    with qpool.parallelize(model, strategy="cpu_batch") as generator:

        @tf.function(jit_compile=True)
        def step() -> Any:
            with tf.GradientTape() as tape:
                mean = tf.reduce_mean(_loss(generator(z)))
            return tape.gradient(mean, model.trainable_variables)

        step()
        found = []
        for _ in range(_TURNS):
            began = time.perf_counter()
            for _ in range(_CALLS):
                step()
            found.append((time.perf_counter() - began) / _CALLS)
    return statistics.median(found) / _SAMPLES


if __name__ == "__main__":
    answer(_sample_seconds)
