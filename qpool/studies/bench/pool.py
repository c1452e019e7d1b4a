"""The pool's benchmark cases: what it gains, what a step costs, what watching costs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from qpool.studies.bench.timing import ratio, turns_of

#: Steps timed together where single ones are too short to compare.
_STEPS = 300


def speedup() -> dict[str, Any]:
    """The seed's circuit with stock SF, forward and weight gradient, batch 16: two workers, one,
    and the unpooled call of the whole batch at once."""
    turns = 7
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


def monitor() -> dict[str, Any]:
    """What watching costs: a reading of the monitor, with its line of JSON and TensorBoard's
    figures, against the second between readings; and training steps watched and not, in turns."""
    turns = 15
    import tempfile
    from pathlib import Path

    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(cutoff_dim=8, seed=1)
    z = tf.random.stateless_normal((64, 4), (1, 2))
    with tempfile.TemporaryDirectory() as folder, qpool.parallelize(model, workers=2) as generator:

        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(z) ** 2)
            return tape.gradient(loss, model.trainable_variables)

        callback = qpool.MonitorCallback(
            generator, 0.0, tensorboard=folder, jsonl=Path(folder) / "monitor.jsonl"
        )
        callback.on_train_begin()
        calm = qpool.MonitorCallback(generator, tensorboard=folder)
        calm.on_train_begin()

        def many() -> None:
            for _ in range(_STEPS):
                step()

        def watched() -> None:
            for n in range(_STEPS):
                step()
                calm.on_train_batch_end(n)

        seconds = turns_of(
            {
                "reading": (lambda: callback.on_train_batch_end(0), 100),
                "steps": (many, 1),
                "steps, watched": (watched, 1),
            },
            turns,
        )
    return {
        "case": "monitor",
        "milliseconds": {
            "a reading": 1e3 * statistics.median(seconds["reading"]),
            "a step": 1e3 * statistics.median(seconds["steps"]) / _STEPS,
        },
        "share of a second": statistics.median(seconds["reading"]),
        "steps watched against not": ratio(seconds["steps, watched"], seconds["steps"]),
    }


def trainer(turns: int = 3) -> dict[str, Any]:
    """Milliseconds of the trainer's step, critic and all, and how many times as fast it is with so
    many workers as with ``cpu_batch``: batches of 64, and on many cores of 32 a core."""
    import contextlib

    import qpool
    from qpool.executors import topology

    cores = topology.budget().workers
    batches = sorted({64, 32 * cores})
    cases = [(m, n, batch) for m, n in ((2, 2), (3, 4)) for batch in batches]
    names = {c: f"{c[0]} modes, {c[1]} layers, cutoff 8, batch {c[2]}" for c in cases}
    found: dict[str, Any] = {"case": "trainer", "cores": cores, **{n: {} for n in names.values()}}
    with contextlib.ExitStack() as stack:
        whole = {c: stack.enter_context(_trainer(c, "cpu_batch")) for c in cases}
        for workers in [2**n for n in range(1, 8) if 2**n <= cores] or [1]:
            with qpool.Pool(workers) as pool:
                for case, name in names.items():
                    with _trainer(case, "processes", pool=pool) as made:
                        both = {"cpu_batch": whole[case], "processes": made}
                        seconds: dict[str, list[float]] = {key: [] for key in both}
                        for _ in range(turns):
                            for key, one in both.items():
                                seconds[key].append(_step_seconds(one, _rows(case)))
                    found[name][f"{workers} workers"] = {
                        "milliseconds": {k: 1e3 * statistics.median(s) for k, s in seconds.items()},
                        "against cpu_batch": ratio(seconds["cpu_batch"], seconds["processes"]),
                    }
    return found


def _rows(case: tuple[int, int, int]) -> Any:
    import numpy as np

    modes, _, batch = case
    return np.random.default_rng(0).normal(size=(batch * 50, modes))


def _trainer(case: tuple[int, int, int], strategy: str, **options: Any) -> Any:
    """A trainer that has made an epoch's steps."""
    import qpool

    modes, layers, _ = case
    model = qpool.models.QuantumSFGenerator(
        n_modes=modes, latent_dim=2 * modes, layers=layers, cutoff_dim=8, seed=1
    )
    made = qpool.QuantumGANTrainer(model, seed=1, **options)
    try:
        made.prepare(modes, strategy)
        _step_seconds(made, _rows(case))
    except BaseException:
        made.close()
        raise
    return made


def _step_seconds(trainer: Any, rows: Any) -> float:
    """The median of an epoch's steps."""
    import time

    import keras

    ends = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    trainer.train(rows, epochs=1, batch_size=len(rows) // 50, callbacks=[watch])
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def loop_of_ones_own() -> dict[str, Any]:
    """Milliseconds of a forward pass and weight gradient in a user's own loop, by strategy: with a
    tape around an eager call, and the same in a ``tf.function``. Batches of 16."""
    turns = 5
    import contextlib

    import tensorflow as tf

    import qpool

    def step_of(generator: Any, z: Any) -> Any:
        def step() -> Any:
            with tf.GradientTape() as tape:
                total = tf.reduce_sum(generator(z) ** 2)
            return tape.gradient(total, generator.trainable_variables)

        return step

    found: dict[str, Any] = {"case": "own-loop", "batch": 16}
    for modes, layers in ((2, 2), (3, 4)):
        z = tf.random.stateless_normal((16, 2 * modes), (1, 2))
        with contextlib.ExitStack() as stack:
            contenders = {}
            for strategy in ("processes", "cpu_batch"):
                model = qpool.models.QuantumSFGenerator(
                    n_modes=modes, latent_dim=2 * modes, layers=layers, cutoff_dim=8, seed=1
                )
                made = stack.enter_context(qpool.parallelize(model, strategy=strategy))
                step = step_of(made, z)
                contenders[f"{strategy}, eager"] = (step, 100)
                contenders[f"{strategy}, tf.function"] = (tf.function(step), 100)
            seconds = turns_of(contenders, turns)
        found[f"{modes} modes, {layers} layers, cutoff 8"] = {
            "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
            "cpu_batch against processes": {
                how: ratio(seconds[f"processes, {how}"], seconds[f"cpu_batch, {how}"])
                for how in ("eager", "tf.function")
            },
        }
    return found
