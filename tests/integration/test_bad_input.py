"""Wrong input: an error that says what was expected, and a pool that stays usable."""

from __future__ import annotations

import models
import numpy as np
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool
from qpool import errors
from qpool.executors import Executor

Z = tf.ones((4, 2))


@pytest.fixture
def scale(pool):
    with parallelize(models.Scale(), pool=pool) as generator:
        yield generator
        np.testing.assert_allclose(generator(Z), 2.0)  # whatever came before


@pytest.mark.parametrize(
    ("z", "words"),
    [
        (tf.constant(1.0), "rank 0"),
        (np.array(["a", "b"]), "numbers"),
        (object(), "array of numbers"),
        (tf.ones((0, 2)), "empty batch"),
    ],
)
def test_inputs(scale, z, words: str) -> None:
    with pytest.raises(errors.InputError, match=words):
        scale(z)


def test_no_argument_at_all(scale) -> None:
    with pytest.raises(errors.InputError, match="first argument"):
        scale()


def test_the_wrong_dtype_is_the_models_own_error_with_its_traceback(scale) -> None:
    with pytest.raises(errors.RemoteError, match="traceback in the worker") as caught:
        scale(tf.ones((4, 2), tf.float64))
    assert "models.py" in caught.value.traceback


def test_what_the_model_raises_comes_back(pool) -> None:
    with parallelize(models.Raising(), pool=pool) as generator:
        generator(Z)
        with pytest.raises(errors.RemoteError, match="negative latent") as caught:
            generator(-Z)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert "in __call__" in caught.value.traceback
        assert caught.value.worker in (0, 1)
        np.testing.assert_allclose(generator(Z), 2.0)


def test_a_batch_that_nobody_named_goes_as_weights_and_does_not_fit(pool) -> None:
    with parallelize(models.Several(), pool=pool, methods="conditional") as generator:
        labels = tf.constant([0, 1, 0, 1])
        with pytest.raises(errors.InputError, match="sharded="):
            generator.conditional(Z, tf.Variable(labels))
        with pytest.raises(errors.InputError, match="sharded="):
            tf.function(lambda z, y: generator.conditional(z, y))(Z, labels)


def test_one_latent_vector_instead_of_a_batch(pool) -> None:
    class One(models.Scale):
        def __call__(self, z):
            return tf.stack([z[n] * self.w for n in range(4)])

    with (
        parallelize(One(), pool=pool) as generator,
        pytest.raises(errors.RemoteError, match=r"latent vectors: \(batch, width\)"),
    ):
        generator(tf.ones(4))


def test_scalars_instead_of_samples(pool) -> None:
    class Reducing(models.Scale):
        def __call__(self, z):
            return tf.reduce_sum(z * self.w)

    with (
        parallelize(Reducing(), pool=pool) as generator,
        pytest.raises(errors.InputError, match="leading batch axis"),
    ):
        generator(Z)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "two"])
def test_numbers_of_workers(workers) -> None:
    with pytest.raises(errors.ConfigurationError, match="workers"):
        parallelize(models.Scale(), workers=workers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "proceses"}, "did you mean 'processes'"),
        ({"engine": "stok"}, "did you mean 'stock'"),
        ({"start_method": "spwan"}, "did you mean 'spawn'"),
        ({"timeout": 0}, "timeout"),
        ({"tile": 3}, "power of two"),
        ({"tile": 0}, "tile"),
        ({"methods": ("genrate",)}, "genrate"),
    ],
)
def test_options(options, words: str, pool) -> None:
    given = options if {"start_method", "timeout"} & set(options) else {**options, "pool": pool}
    with pytest.raises(errors.ConfigurationError, match=words):
        parallelize(models.Scale(), **given)


def test_models_that_cannot_be_pooled(pool) -> None:
    class NoVariables:
        trainable_variables = ()

        def __call__(self, z):
            return z

    class NoCall:
        def __init__(self):
            self.trainable_variables = [tf.Variable(1.0)]

        def judge(self, x):
            return x

    with pytest.raises(errors.ModelError, match="at least one"):
        parallelize(NoVariables(), pool=pool)
    with pytest.raises(errors.ModelError, match=r"methods=\(.* It has judge"):
        parallelize(NoCall(), pool=pool)
    with pytest.raises(errors.ModelError, match="not a factory"):
        parallelize(3, pool=pool)
    with pytest.raises(errors.ModelError, match="pooled already"):
        parallelize(parallelize(models.Scale(), pool=pool), pool=pool)
    with pytest.raises(errors.ShippingError, match=r"\.parts\['inner'\]\[0\] \(lock\)"):
        parallelize(models.Locked(), pool=pool)


def test_a_model_that_fails_to_build_in_the_workers(pool) -> None:
    import os

    home = os.getpid()

    def factory():
        if os.getpid() != home:
            raise RuntimeError("not here")
        return models.Scale()

    with pytest.raises(errors.RemoteError, match="not here"):
        parallelize(factory, pool=pool)
    with parallelize(models.Scale(), pool=pool) as generator:
        np.testing.assert_allclose(generator(Z), 2.0)


def test_closed(pool) -> None:
    generator = parallelize(models.Scale(), pool=pool)
    generator.close()
    generator.close()
    with pytest.raises(errors.PoolClosedError):
        generator(Z)
    own = qpool.Pool(workers=1)
    own.close()
    with pytest.raises(errors.PoolClosedError):
        parallelize(models.Scale(), pool=own)


def test_more_workers_than_cores_is_said_once() -> None:
    with pytest.warns(RuntimeWarning, match="share cores") as caught:
        qpool.Pool(workers=500)
    assert len(caught) == 1


def test_custom_strategies_must_keep_the_interface() -> None:
    with pytest.raises(errors.ConfigurationError, match="subclass"):
        qpool.register_strategy("mine", object)

    class Half(Executor):
        def call(self, method, args, kwargs):
            return None

    with pytest.raises(errors.ConfigurationError, match="per_sample_gradients"):
        qpool.register_strategy("mine", Half)
