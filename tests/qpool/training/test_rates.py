"""Learning rates that may change under a compiled optimizer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from qpool.training import building, rates
from qpool.training.config import Config


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_an_optimizer_goes_on_with_other_numbers_uncompiled(schedule: str) -> None:
    optimizer, weight = keras.optimizers.SGD(rates.of(schedule, 0.25, 4)), tf.Variable(0.0)

    @tf.function(jit_compile=True)
    def step() -> None:
        optimizer.apply_gradients([(tf.ones(()), weight)])

    for start, updates in ((0.25, 4), (0.5, 8)):
        rates.change(optimizer, start, updates)
        optimizer.iterations.assign(0)
        theirs = keras.optimizers.schedules.CosineDecay(start, updates)
        for n in range(updates):
            weight.assign(0.0)
            step()
            expected = float(theirs(n)) if schedule == "cosine" else start
            np.testing.assert_allclose(-float(weight), expected, rtol=1e-5)
    assert step.experimental_get_tracing_count() == 1


def test_a_schedule_is_saved_by_its_numbers() -> None:
    optimizer = keras.optimizers.Adam(rates.of("cosine", 0.25, 4))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert float(again._learning_rate(2)) == pytest.approx(0.125)


def test_runs_that_differ_in_numbers_alone_are_one_program() -> None:
    base = Config(strategy="cpu_batch")
    for other in ({"steps": 9}, {"generator_rate": 0.5}, {"critic_rate": 0.5}, {"seed": 3}):
        assert building.program(Config(strategy="cpu_batch", **other)) == building.program(base)
    for other in ({"schedule": "constant"}, {"penalty": 2.0}, {"layers": 3}):
        assert building.program(Config(strategy="cpu_batch", **other)) != building.program(base)
