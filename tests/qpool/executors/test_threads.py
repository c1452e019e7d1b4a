"""Tiles in threads: the judge is stock Strawberry Fields, called in place."""

from __future__ import annotations

import random
import threading

import models
import numpy as np
import pytest
import tensorflow as tf

import qpool
from workers.errors import ConfigurationError, PoolClosedError


def generator_model():
    return qpool.models.QuantumSFGenerator(n_modes=1, latent_dim=2, layers=1, cutoff_dim=4, seed=1)


def value_and_gradients(generator, z, variables):
    with tf.GradientTape() as tape:
        tape.watch(z)
        values = generator(z)
        loss = tf.reduce_sum(tf.sin(values))
    return [values, *tape.gradient(loss, [*variables, z])]


@pytest.fixture(scope="module")
def model():
    return generator_model()


@pytest.fixture(scope="module")
def threaded(model):
    with qpool.parallelize(model, 2, "threads", tile=4) as generator:
        yield generator


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_values_and_gradients_are_those_of_stock(model, threaded, batch: int) -> None:
    z = tf.random.stateless_normal((batch, 2), (1, 2))
    stock = qpool.parallelize(model, strategy="sequential", engine="stock")
    ours, expected = (
        value_and_gradients(call, z, model.trainable_variables) for call in (threaded, stock)
    )
    for a, b in zip(ours, expected, strict=True):  # all are of the order of one
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert threaded.stats()["compiled"][0]["level"] == "xla"


def test_the_same_bits_for_any_number_of_threads(model, threaded) -> None:
    z = tf.random.stateless_normal((15, 2), (3, 4))
    variables = model.trainable_variables
    bits = [np.asarray(x).tobytes() for x in value_and_gradients(threaded, z, variables)]
    with qpool.parallelize(model, 3, "threads", tile=4) as other:
        assert bits == [np.asarray(x).tobytes() for x in value_and_gradients(other, z, variables)]


def test_in_a_graph_with_a_batch_that_varies(model, threaded) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def both(z):
        with tf.GradientTape() as tape:  # two calls that depend on nothing of each other
            loss = tf.reduce_sum(threaded(z)) + tf.reduce_sum(threaded(2 * z) ** 2)
        return loss, tape.gradient(loss, model.trainable_variables)

    for batch in (5, 9):
        z = tf.random.stateless_normal((batch, 2), (5, 6))
        with tf.GradientTape() as tape:
            expected = tf.reduce_sum(model(z)) + tf.reduce_sum(model(2 * z) ** 2)
        loss, gradients = both(z)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
        for a, b in zip(gradients, tape.gradient(expected, model.trainable_variables), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_new_weights_are_used(threaded, model) -> None:
    z = tf.random.stateless_normal((6, 2), (1, 2))
    before = model.trainable_variables[0].numpy()
    first = threaded(z)
    model.trainable_variables[0].assign_add(tf.ones_like(before) * 0.3)
    np.testing.assert_allclose(threaded(z), model(z), atol=1e-5)
    assert not np.allclose(threaded(z), first)
    model.trainable_variables[0].assign(before)


def test_a_tile_at_a_time_where_nothing_is_compiled() -> None:
    """Strawberry Fields binds parameters on the program: two runs at once would mix them up."""
    model = models.Displaced(tf.complex128, cutoff=4)
    z = tf.constant(np.random.default_rng(0).normal(size=(9, 2)) * 0.4)
    expected = value_and_gradients(model, z, model.trainable_variables)
    with qpool.parallelize(model, 3, "threads", tile=2, engine="stock") as generator:
        ours = value_and_gradients(generator, z, model.trainable_variables)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


class Noisy(tf.Module):
    """Draws from sources of the whole process, which are its user's here."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(2.0)

    def __call__(self, z):
        return self.w * z + np.random.normal() + random.random() + tf.random.normal(z.shape)


def test_the_users_random_numbers_are_left_alone() -> None:
    """A probe seeds a worker's global sources; here they belong to somebody."""
    model = generator_model()
    tf.random.set_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = tf.random.normal((3,)).numpy(), np.random.random(), random.random()
    tf.random.set_seed(5)
    np.random.seed(5)
    random.seed(5)
    with qpool.parallelize(model, 1, "threads") as generator:
        generator(tf.zeros((2, 2)))
    found = tf.random.normal((3,)).numpy(), np.random.random(), random.random()
    assert expected[0].tobytes() == found[0].tobytes()
    assert expected[1:] == found[1:]


def test_a_model_that_draws_globally_is_pulled_back_through_its_draw() -> None:
    model = Noisy()
    with qpool.parallelize(model, 2, "threads", tile=2) as generator:
        z = tf.ones((4, 1))
        with tf.GradientTape() as tape:
            samples = generator(z)
            loss = tf.reduce_sum(samples**2)
        assert float(tape.gradient(loss, model.w)) == pytest.approx(
            float(tf.reduce_sum(2 * samples)), rel=1e-5
        )
        assert generator.stats()["compiled"][0]["level"] == "eager"
        assert len(np.unique(samples)) == 4


class Broken(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(1.0)

    def __call__(self, z):
        if float(tf.reduce_max(z)) > 5:
            raise LookupError("no such sample")
        return self.w * z


def test_the_models_own_error_comes_through_and_the_threads_stay_usable() -> None:
    with qpool.parallelize(Broken(), 2, "threads", tile=2) as generator:
        generator(tf.ones((4, 1)))
        with pytest.raises(LookupError, match="no such sample"):
            generator(9 * tf.ones((4, 1)))
        np.testing.assert_array_equal(generator(tf.ones((4, 1))), np.ones((4, 1)))


def test_closed_and_refused() -> None:
    before = threading.active_count()
    generator = qpool.parallelize(Broken(), 2, "threads")
    generator(tf.ones((4, 1)))
    assert threading.active_count() > before
    generator.close()
    assert threading.active_count() == before
    with pytest.raises(PoolClosedError):
        generator(tf.ones((4, 1)))
    with pytest.raises(ConfigurationError, match="at least 1"):
        qpool.parallelize(Broken(), 0, "threads")
