"""Named benchmark cases: those of the pool, and where those of the engine are."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from qpool.measure.timing import ratio, turns_of
from workers.errors import ConfigurationError, nearest


def speedup(turns: int = 7) -> dict[str, Any]:
    """The seed's circuit with stock SF, forward and weight gradient, batch 16: two workers, one,
    and the unpooled call of the whole batch at once."""
    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(cutoff_dim=8, seed=1)
    z = tf.random.stateless_normal((16, 4), (1, 2))

    def step(generator: Any) -> Callable[[], Any]:
        def call() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(z) ** 2)
            return tape.gradient(loss, model.trainable_variables)

        return call

    with (
        qpool.parallelize(model, workers=1, engine="stock", pin=True) as one,
        qpool.parallelize(model, workers=2, engine="stock", pin=True) as two,
    ):
        unpooled = qpool.parallelize(model, strategy="sequential", engine="stock")
        contenders = {"two workers": step(two), "one worker": step(one), "unpooled": step(unpooled)}
        for call in contenders.values():
            call()
        seconds = turns_of({name: (call, 3) for name, call in contenders.items()}, turns)
        tile = two.stats()["tiles_by_batch"][16]
    return {
        "case": "speedup",
        "batch": 16,
        "tile": tile,
        "samples_per_second": {n: 16 / statistics.median(s) for n, s in seconds.items()},
        "two workers against one": ratio(seconds["one worker"], seconds["two workers"]),
        "two workers against unpooled": ratio(seconds["unpooled"], seconds["two workers"]),
    }


class _Identity:
    """An empty eager model: what is left of a call is the pool's own."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.w = tf.Variable(1.0)
        self.trainable_variables = [self.w]

    def __call__(self, z: Any) -> Any:
        return z


def roundtrip(turns: int = 15) -> dict[str, Any]:
    """A forward call of an empty eager model, z 64x4, two tiles, no tape, beside the step of
    Gymnasium's AsyncVectorEnv with two environments."""
    import tensorflow as tf

    import qpool

    try:
        import gymnasium
    except ImportError:
        raise ConfigurationError(
            "the roundtrip case compares with Gymnasium: pip install 'qpool-sf[test]'"
        ) from None
    import numpy as np

    from qpool.measure.peers import empty_environment

    z = tf.random.stateless_normal((64, 4), (1, 2))
    actions: Any = np.zeros((2, 32, 4), np.float32)
    environments = gymnasium.vector.AsyncVectorEnv([empty_environment] * 2)
    try:
        environments.reset()
        with qpool.parallelize(_Identity(), workers=2, tile=32, engine="stock") as generator:
            before = generator.stats()["pool"]["seconds"]
            seconds = turns_of(
                {
                    "pooled call": (lambda: generator(z), 300),
                    "AsyncVectorEnv step": (lambda: environments.step(actions), 300),
                },
                turns,
            )
            after = generator.stats()["pool"]["seconds"]
    finally:
        environments.close()
    calls = 300 * turns + 1
    return {
        "case": "roundtrip",
        "microseconds": {n: 1e6 * statistics.median(s) for n, s in seconds.items()},
        "microseconds_by_phase": {p: 1e6 * (after[p] - before[p]) / calls for p in after},
        "pooled call against AsyncVectorEnv": ratio(
            seconds["pooled call"], seconds["AsyncVectorEnv step"]
        ),
    }


CASES: dict[str, Callable[..., dict[str, Any]]] = {"speedup": speedup, "roundtrip": roundtrip}

#: Cases of ``engine_bench``, which loads TensorFlow when it is imported.
ENGINE_CASES = ("engine", "wide", "pooled", "loop", "memory", "accuracy")

#: Of modules of their own, which load it too; by their names only, for they take minutes.
OTHER_CASES = ("natural", "scaling", "ray")

#: Of ``strategies_bench``; by their names only.
STRATEGY_CASES = ("strategies", "auto", "utilisation")


def run(name: str) -> dict[str, Any]:
    """Run a named case; ConfigurationError names the nearest known one."""
    if name in CASES:
        return CASES[name]()
    if name in ENGINE_CASES:
        from qpool.measure import engine_bench

        return engine_bench.CASES[name]()
    if name in STRATEGY_CASES:
        from qpool.measure import strategies_bench

        return strategies_bench.CASES[name]()
    if name in OTHER_CASES:
        from qpool.measure import cluster_bench, natural_bench, scaling_bench

        cases: dict[str, Callable[[], dict[str, Any]]] = {
            "natural": natural_bench.natural,
            "scaling": scaling_bench.scaling_model,
            "ray": cluster_bench.ray_overhead,
        }
        return cases[name]()
    known = (*CASES, *ENGINE_CASES, *STRATEGY_CASES, *OTHER_CASES)
    raise ConfigurationError(f"unknown case {name!r}: {nearest(name, known)}")
