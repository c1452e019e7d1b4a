"""Values and gradients of pooled generators equal the unpooled model's: the judge is stock SF."""

from __future__ import annotations

import models
import numpy as np
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool

BATCHES = (1, 3, 8, 9)


def value_and_gradients(call, z, variables, weights):
    """Values, and gradients of a weighted sum, for the weights and for z."""
    with tf.GradientTape() as tape:
        tape.watch(z)
        values = call(z)
        loss = tf.reduce_sum(weights * tf.sin(values))
    return values, tape.gradient(loss, [*variables, z])


def distance(a, b) -> float:
    """Max norm of the difference over the max norm, per tensor."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


@pytest.fixture(scope="module", params=["complex64", "complex128"])
def truth(request):
    """Stock SF, unpooled, over all batches; and stock complex64's distance from complex128."""
    dtype = tf.as_dtype(request.param)
    model = models.Displaced(dtype, cutoff=4)
    rng = np.random.default_rng(1)
    found = {}
    for batch in BATCHES:
        z = tf.constant(rng.normal(size=(batch, 2)) * 0.5, dtype.real_dtype)
        weights = tf.constant(rng.normal(size=(batch, 2)), dtype.real_dtype)
        found[batch] = z, weights, value_and_gradients(model, z, model.trainable_variables, weights)
    tolerance = 1e-10 if dtype == tf.complex128 else 1e-5
    return model, found, tolerance


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_values_and_gradients_equal_stock(pool_of, truth, workers: int) -> None:
    model, found, tolerance = truth
    with parallelize(model, pool=pool_of(workers)) as generator:
        for batch, (z, weights, (values, gradients)) in found.items():
            ours, pulled = value_and_gradients(generator, z, generator.trainable_variables, weights)
            assert ours.dtype == values.dtype
            assert ours.shape == (batch, 2)
            assert distance(ours, values) <= tolerance
            for a, b in zip(pulled, gradients, strict=True):
                assert a.dtype == b.dtype
                assert distance(a, b) <= tolerance


def test_the_same_bits_for_any_number_of_workers(pool_of, truth) -> None:
    model, found, _ = truth
    results: dict[int, list[bytes]] = {}
    for workers in (1, 2, 3):
        with parallelize(model, pool=pool_of(workers), tile=2) as generator:
            bits = []
            for z, weights, _ in found.values():
                ours, pulled = value_and_gradients(
                    generator, z, generator.trainable_variables, weights
                )
                bits += [np.asarray(x).tobytes() for x in (ours, *pulled)]
            results[workers] = bits
    assert results[1] == results[2] == results[3]


def test_per_sample_gradients_are_those_of_each_sample(pool, truth) -> None:
    model, found, tolerance = truth
    z, weights, _ = found[3]
    with parallelize(model, pool=pool) as generator:
        rows = generator.per_sample_gradients(z, weights)
    for n in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weights[n] * model(z[n : n + 1])[0])
        for ours, theirs in zip(rows, tape.gradient(loss, model.trainable_variables), strict=True):
            assert ours.shape == (3, *theirs.shape)
            assert distance(ours[n], theirs) <= tolerance
    in_place = parallelize(model, strategy="sequential").per_sample_gradients(z, weights)
    for ours, theirs in zip(rows, in_place, strict=True):
        assert distance(ours, theirs) <= tolerance


def test_an_engine_with_a_batch_size_fixes_the_tile(pool) -> None:
    model = models.FixedBatch(4)
    z = tf.constant(np.random.default_rng(0).normal(size=(6, 1)), tf.float32)
    padded = tf.concat([z, z[-1:], z[-1:]], 0)

    def in_place(z):
        return tf.concat([model(padded[:4]), model(padded[4:])], 0)[: len(z)]

    with parallelize(model, pool=pool) as generator:
        with tf.GradientTape() as ours, tf.GradientTape() as theirs:
            a, b = tf.reduce_sum(generator(z) ** 2), tf.reduce_sum(in_place(z) ** 2)
        assert distance(a, b) <= 1e-6
        assert distance(ours.gradient(a, model.w), theirs.gradient(b, model.w)) <= 1e-5
        rows = generator.per_sample_gradients(z, tf.ones((6, 1)))[0]
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(in_place(z))
        assert distance(tf.reduce_sum(rows), tape.gradient(total, model.w)) <= 1e-5
        assert generator.stats()["tiles_by_batch"] == {}
    with pytest.raises(qpool.errors.ConfigurationError, match="batch_size=4"):
        parallelize(model, pool=pool, tile=2)


def test_edges_zero_squeezing_zero_angle_cutoff_two(pool) -> None:
    model = models.Displaced(tf.complex128, cutoff=2)
    model.w.assign(tf.zeros(6, tf.float64))
    z = tf.zeros((3, 2), tf.float64)
    weights = tf.ones((3, 2), tf.float64)
    values, gradients = value_and_gradients(model, z, model.trainable_variables, weights)
    with parallelize(model, pool=pool) as generator:
        ours, pulled = value_and_gradients(generator, z, model.trainable_variables, weights)
    np.testing.assert_allclose(ours, values, atol=1e-12)
    for a, b in zip(pulled, gradients, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, atol=1e-10)
