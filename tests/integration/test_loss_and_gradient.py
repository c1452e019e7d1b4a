"""A loss that workers compute: what a tape around the call gives, in one exchange."""

from __future__ import annotations

import functools
import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import qpool
from tests.models import Displaced, Drawing, Scale, Several
from workers.errors import ConfigurationError, InputError
from workers.exchange.faults import Fault

pytestmark = pytest.mark.filterwarnings("ignore:.*share cores.*")


def rows(batch: int, width: int = 2, dtype: Any = tf.float32) -> tf.Tensor:
    return 0.3 * tf.random.stateless_normal((batch, width), (batch, 1), dtype=dtype)


def of_tape(model: Any, loss: Any, z: Any, *data: Any) -> tuple[Any, list[Any], Any]:
    with tf.GradientTape() as tape:
        outputs = model(z)
        value = tf.reduce_mean(loss(outputs, *data))
    return value, tape.gradient(value, model.trainable_variables), outputs


def assert_alike(step: Any, expected: Any, tolerance: float) -> None:
    value, gradient, outputs = expected
    np.testing.assert_allclose(step.loss, value, rtol=tolerance, atol=tolerance)
    for a, b in zip(step.gradient, gradient, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        step.outputs,
        outputs,
    )


def critic_of(width: int, dtype: str = "float32") -> keras.Model:
    layers = [keras.layers.Dense(4, "tanh", dtype=dtype), keras.layers.Dense(1, dtype=dtype)]
    made = keras.Sequential([keras.Input((width,), dtype=dtype), *layers])
    made.set_weights([0.1 + 0.01 * np.arange(w.size).reshape(w.shape) for w in made.get_weights()])
    return made


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("processes", tf.complex128),
        ("processes", tf.complex64),
        ("threads", tf.complex64),
        ("cpu_batch", tf.complex128),
        ("sequential", tf.complex64),
        ("auto", tf.complex64),
    ],
)
def test_it_is_what_a_tape_gives(worker, strategy: str, dtype: tf.DType) -> None:
    real = dtype.real_dtype
    model, critic = Displaced(dtype), critic_of(2, real.name)
    options = {"pool": worker} if strategy == "processes" else {}

    def loss(means: Any, targets: Any) -> Any:
        return -critic(means)[:, 0] + tf.reduce_sum((means - targets) ** 2, -1)

    with qpool.parallelize(model, strategy=strategy, **options) as pooled:
        for batch in (1, 7):
            z, targets = rows(batch, dtype=real), rows(batch, dtype=real) + 1.0
            for _ in range(1 if batch > 1 else 2):  # stock takes its time for each sample
                step = pooled.loss_and_gradient(z, loss, targets)
                expected = of_tape(model, loss, z, targets)
                assert_alike(step, expected, 1e-10 if real == tf.float64 else 2e-5)
                # The critic and the model go on; workers are to see both.
                for variable in (*critic.trainable_variables, *model.trainable_variables):
                    variable.assign_add(0.05 * tf.ones_like(variable))
        if strategy in ("processes", "threads"):
            assert [entry["in_workers"] for entry in pooled.stats()["losses"]] == [True]


def test_several_outputs_and_stock_engines(worker) -> None:
    model = Displaced()
    with qpool.parallelize(model, pool=worker, engine="stock") as pooled:
        z = rows(5)
        step = pooled.loss_and_gradient(z, lambda x: x[:, 0] ** 2)
        assert_alike(step, of_tape(model, lambda x: x[:, 0] ** 2, z), 1e-5)
    several = Several()
    z = rows(5)
    kinds = tf.nest.map_structure(type, several(z))

    def loss(outputs: Any) -> Any:
        real = [x for x in tf.nest.flatten(outputs) if x.dtype.is_floating]
        return sum(tf.reduce_sum(tf.reshape(x, (x.shape[0], -1)) ** 2, -1) for x in real)

    with qpool.parallelize(several, pool=worker) as pooled:
        step = pooled.loss_and_gradient(z, loss)
        assert tf.nest.map_structure(type, step.outputs) == kinds
        assert_alike(step, of_tape(several, loss, z), 1e-5)


def bits(step: Any) -> list[bytes]:
    tensors = [step.loss, *step.gradient, *tf.nest.flatten(step.outputs)]
    return [np.asarray(x).tobytes() for x in tensors]


def squares(x: Any) -> Any:
    return tf.reduce_sum(x**2, -1)


def test_the_same_bits_for_any_number_of_workers_and_in_a_graph(pool_of) -> None:
    found = []
    for workers in (1, 2):
        with qpool.parallelize(Displaced(), pool=pool_of(workers), tile=2) as pooled:
            in_graph = tf.function(lambda z, pooled=pooled: pooled.loss_and_gradient(z, squares))
            for batch in (1, 7):
                found.append((batch, bits(pooled.loss_and_gradient(rows(batch), squares))))
                found.append((batch, bits(in_graph(rows(batch)))))
    assert len({tuple(b) for batch, b in found if batch == 1}) == 1
    assert len({tuple(b) for batch, b in found if batch == 7}) == 1


@pytest.mark.parametrize("point", ["forward", "written", "answer"])
def test_a_worker_that_dies_in_it_changes_no_bit(pool_of, point: str) -> None:
    pool = pool_of(2)
    with qpool.parallelize(Displaced(), pool=pool, tile=2) as pooled:
        expected = bits(pooled.loss_and_gradient(rows(7), squares))
        lost = pool.stats()["replaced_workers"]
        pool.inject(1, Fault(point, "kill"))
        assert bits(pooled.loss_and_gradient(rows(7), squares)) == expected
        assert pool.stats()["replaced_workers"] == lost + 1
        for _ in range(3):  # with the successor, which has rehearsed it
            assert bits(pooled.loss_and_gradient(rows(7), squares)) == expected


def test_draws_follow_from_the_call(pool_of) -> None:
    found = []
    for workers in (1, 2):
        with qpool.parallelize(Drawing(), pool=pool_of(workers), tile=2) as pooled:
            pooled._qpool.executor().calls = 41
            found.append([bits(pooled.loss_and_gradient(rows(7), squares)) for _ in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_frozen_variable_and_one_that_nothing_depends_on(worker) -> None:
    model = Scale()
    idle = tf.Variable(1.0)
    model.idle = idle
    model.trainable_variables = [model.w, idle]
    with qpool.parallelize(model, pool=worker) as pooled:
        step = pooled.loss_and_gradient(rows(4), squares)
        assert step.gradient[1] is None
        model.trainable_variables = [idle]
        assert pooled.loss_and_gradient(rows(4), squares).gradient == [None]
        model.trainable_variables = [model.w]
        (again,) = pooled.loss_and_gradient(rows(4), squares).gradient
        assert again.numpy() == step.gradient[0].numpy()


def locked(lock: Any) -> Any:
    return lambda x: squares(x) * (1.0 if lock.acquire(False) or True else 0.0)


def batch_means(x: Any) -> Any:
    return squares(x - tf.reduce_mean(x, 0))


def mean(x: Any) -> Any:
    return tf.reduce_mean(squares(x))


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (locked(threading.Lock()), "does not pickle"),
        (batch_means, "depends on the other samples"),
        (mean, "with a row for each sample"),
    ],
)
def test_a_loss_that_workers_cannot_compute_is_computed_here(worker, loss: Any, why: str) -> None:
    model = Displaced()
    with qpool.parallelize(model, pool=worker) as pooled:
        for _ in range(2):
            assert_alike(
                pooled.loss_and_gradient(rows(6), loss), of_tape(model, loss, rows(6)), 2e-5
            )
        (entry,) = pooled.stats()["losses"]
        assert not entry["in_workers"]
        assert why in entry["why_not"]


def test_a_loss_made_anew_in_each_step_is_one_and_too_many_are_told_of(worker, caplog) -> None:
    model = Scale()
    with qpool.parallelize(model, pool=worker) as pooled:
        for _ in range(3):
            pooled.loss_and_gradient(rows(4), lambda x: squares(x) + 1.0)
        assert len(pooled.stats()["losses"]) == 1
        for weight in range(12):
            step = pooled.loss_and_gradient(rows(4), lambda x, w=weight: squares(x) * w)
            np.testing.assert_allclose(step.loss, tf.reduce_mean(squares(model(rows(4)))) * weight)
        assert len(pooled.stats()["losses"]) == 8  # beyond these it is computed here
    told = [r.message for r in caplog.records if "belongs in a further batch" in r.message]
    assert len(told) == 1


scale = 1.0


class Weighing:
    """Losses as methods, and as an object that can be called."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.critic = critic_of(2)

    def loss(self, x: Any) -> Any:
        return self.weight * self.critic(x)

    __call__ = loss


def test_a_loss_is_another_one_when_what_it_holds_is(worker) -> None:
    """A script's critic is a name of its module, not of a function around the loss."""
    global scale
    model, held = Scale(), Weighing()

    def weighed(x: Any) -> Any:
        return scale * squares(x)

    def critical(x: Any) -> Any:
        return critic(x)

    with qpool.parallelize(model, pool=worker) as pooled:
        for turn in range(2):
            scale, held.weight = 1.0 + turn, 2.0 + turn
            critic = critic_of(2)
            critic.layers[0].kernel.assign_add(0.3 * turn * tf.ones((2, 4)))
            held.critic = critic
            for loss in (weighed, critical, held.loss, held, functools.partial(times, turn)):
                assert_alike(
                    pooled.loss_and_gradient(rows(6), loss), of_tape(model, loss, rows(6)), 2e-5
                )
        assert all(entry["in_workers"] for entry in pooled.stats()["losses"])


def times(factor: float, x: Any) -> Any:
    return (1.0 + factor) * squares(x)


def test_what_cannot_be_asked_is_refused(worker) -> None:
    with qpool.parallelize(Scale(), pool=worker) as pooled:
        with pytest.raises(ConfigurationError, match="'generte' is not pooled"):
            pooled.loss_and_gradient(rows(4), squares, method="generte")
        pooled.loss_and_gradient(rows(4), squares)
        with pytest.raises(InputError, match="one length"):
            pooled.loss_and_gradient(rows(4), lambda x, y: squares(x - y), rows(3))


def test_its_samples_are_counted(worker) -> None:
    with qpool.parallelize(Scale(), pool=worker) as pooled:
        pooled(rows(3))
        for _ in range(2):
            pooled.loss_and_gradient(rows(8), squares)
        found = pooled.stats()
    assert found["samples"] == 19
    assert set(found["tiles_by_batch"]) == {3, 8}
    assert [entry["with_loss"] for entry in found["compiled"]] == [False, True]
