"""What a Ray cluster costs beside a local pool of as many workers: on this machine, two nodes."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from qpool.studies.bench.timing import turns_of
from workers.errors import ConfigurationError


def ray_overhead() -> dict[str, Any]:
    """A training step, on two nodes of one worker each and on a local pool of two; and its bits."""
    turns = 7
    import tensorflow as tf

    import qpool
    from qpool.studies.bench.engine import Case

    try:
        import ray
        from ray.cluster_utils import Cluster
    except ImportError:
        raise ConfigurationError("the ray case needs Ray: pip install 'qpool-sf[ray]'") from None
    found: dict[str, Any] = {"case": "ray"}
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        for name, case, batch in (
            ("2 modes, 2 layers, cutoff 8, batch 64", Case(2, 2, 8), 64),
            ("3 modes, 6 layers, cutoff 12, batch 64", Case(3, 6, 12), 64),
        ):
            z = case.z(batch)

            def step(generator: Any, case: Any = case, z: Any = z) -> list[Any]:
                with tf.GradientTape() as tape:
                    samples = generator(z)
                    loss = tf.reduce_sum(samples)
                return [samples, *tape.gradient(loss, case.weights)]

            with (
                qpool.parallelize(case, strategy="ray") as away,
                qpool.parallelize(case, workers=2, pin=False) as here,
            ):
                same = all(
                    np.array_equal(a, b) for a, b in zip(step(away), step(here), strict=True)
                )
                calls = {"ray": (lambda: step(away), 5), "local pool": (lambda: step(here), 5)}
                seconds = turns_of(calls, turns)
            medians = {n: 1e3 * statistics.median(s) for n, s in seconds.items()}
            found[name] = {
                "same_bits": float(same),
                **{f"{n}, ms": value for n, value in medians.items()},
                "overhead, ms": medians["ray"] - medians["local pool"],
            }
    finally:
        ray.shutdown()
        cluster.shutdown()
    return found
