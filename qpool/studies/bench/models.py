"""Many models, one after another, in one process: what stays of them, and what each costs.

As in a notebook whose cell is run again, or in a search over seeds: each model is pooled, gives
gradients twice, and is closed. Owns those programs, one for each strategy.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import psutil
import tensorflow as tf

from qpool import Pool, parallelize
from qpool.models import QuantumSFGenerator
from qpool.studies.bench.alone import alone_on_a_core, answer

STRATEGIES = ("cpu_batch", "threads", "processes")
MODELS, BATCH = 50, 16


def models() -> dict[str, Any]:
    """50 models of 2 modes, 2 layers, cutoff 6, other weights each, batch 16: seconds from
    ``parallelize`` to the first gradients, and MiB of the process and of its one worker after each
    is closed."""
    found = {strategy: alone_on_a_core(__name__, strategy) for strategy in STRATEGIES}
    return {"case": "models", "batch": BATCH, "strategies": found}


def draw(found: dict[str, Any], picture: Path) -> None:
    """Memory over models, a line for each process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 3.5))
    for number, (strategy, figures) in enumerate(found["strategies"].items()):
        for which, style in (("mib", "-"), ("worker_mib", ":")):
            if any(figures[which]):
                label = strategy if which == "mib" else f"{strategy}, its worker"
                panel.plot(figures[which], style, color=f"C{number}", label=label)
    panel.set_xlabel("models that are gone")
    panel.set_ylabel("MiB")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _one_after_another(strategy: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"seconds": [], "mib": [], "worker_mib": []}
    z = tf.random.stateless_normal((BATCH, 4), (1, 2))
    pool = Pool(1) if strategy == "processes" else None
    options: dict[str, Any] = {"pool": pool} if pool else {"strategy": strategy}
    if strategy == "threads":
        options["workers"] = 1
    for seed in range(MODELS):
        model = QuantumSFGenerator(n_modes=2, latent_dim=4, layers=2, cutoff_dim=6, seed=seed)
        began = time.perf_counter()
        with parallelize(model, **options) as generator:
            for turn in range(2):
                with tf.GradientTape() as tape:
                    value = tf.reduce_sum(generator(z) ** 2)
                gradients = tape.gradient(value, model.trainable_variables)
                assert all(gradient is not None for gradient in gradients)
                if not turn:
                    found["seconds"].append(time.perf_counter() - began)
            pids = [worker["pid"] for worker in pool.stats()["workers"]] if pool else []
        del model, generator, value, gradients, tape
        gc.collect()
        found["mib"].append(_mib(psutil.Process()))
        found["worker_mib"].append(sum(_mib(psutil.Process(pid)) for pid in pids))
    if pool:
        pool.close()
    return found


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 2**20)


if __name__ == "__main__":
    answer(_one_after_another)
