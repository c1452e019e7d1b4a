"""Named benchmark cases. Each alternates between the things it compares, and reports ratios.

Machines are noisy and speeds drift, so a figure alone says little: what is compared is timed in
turns within one run, and the ratio is the median over turns, with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from workers.errors import ConfigurationError, nearest


def _turns(
    contenders: dict[str, Callable[[], Any]], turns: int, calls: int
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure a turn, taken alternately."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(turns):
        for name, call in contenders.items():
            seconds = []
            for _ in range(calls):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            found[name].append(statistics.median(seconds))
    return found


def _ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


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
        qpool.parallelize(model, workers=1) as one,
        qpool.parallelize(model, workers=2) as two,
    ):
        contenders = {"two workers": step(two), "one worker": step(one), "unpooled": step(model)}
        for call in contenders.values():
            call()
        seconds = _turns(contenders, turns, calls=3)
        tile = two.stats()["tiles_by_batch"][16]
    return {
        "case": "speedup",
        "batch": 16,
        "tile": tile,
        "samples_per_second": {n: 16 / statistics.median(s) for n, s in seconds.items()},
        "two workers against one": _ratio(seconds["one worker"], seconds["two workers"]),
        "two workers against unpooled": _ratio(seconds["unpooled"], seconds["two workers"]),
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
        with qpool.parallelize(_Identity(), workers=2, tile=32) as generator:
            before = generator.stats()["pool"]["seconds"]
            seconds = _turns(
                {
                    "pooled call": lambda: generator(z),
                    "AsyncVectorEnv step": lambda: environments.step(actions),
                },
                turns,
                calls=300,
            )
            after = generator.stats()["pool"]["seconds"]
    finally:
        environments.close()
    calls = 300 * turns + 1
    return {
        "case": "roundtrip",
        "microseconds": {n: 1e6 * statistics.median(s) for n, s in seconds.items()},
        "microseconds_by_phase": {p: 1e6 * (after[p] - before[p]) / calls for p in after},
        "pooled call against AsyncVectorEnv": _ratio(
            seconds["pooled call"], seconds["AsyncVectorEnv step"]
        ),
    }


CASES: dict[str, Callable[..., dict[str, Any]]] = {"speedup": speedup, "roundtrip": roundtrip}


def run(name: str) -> dict[str, Any]:
    """Run a named case; ConfigurationError names the nearest known one."""
    try:
        case = CASES[name]
    except KeyError:
        raise ConfigurationError(f"unknown case {name!r}: {nearest(name, tuple(CASES))}") from None
    return case()
