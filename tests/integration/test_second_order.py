"""Derivatives of derivatives through the pool: a gradient penalty, and what cannot be had."""

from __future__ import annotations

import models
import numpy as np
import pytest
import tensorflow as tf

import qpool
from qpool import errors


def critic_of(seed: int = 4):
    return qpool.models.QuantumSFDiscriminator(
        n_modes=1, layers=1, cutoff_dim=4, seed=seed, dtype="float64"
    )


@pytest.fixture(scope="module")
def critic(worker):
    """A model, and the same model pooled."""
    model = critic_of()
    with qpool.parallelize(model, pool=worker) as pooled:
        yield model, pooled


def rows(batch: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(5).normal(size=(batch, 2)) * 0.4)


def penalty(critic, x):
    """The gradient penalty of Gulrajani et al., NeurIPS 2017."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        score = critic(x)
    slope = tape.gradient(score, x)
    norm = tf.sqrt(tf.reduce_sum(slope**2, axis=1) + 1e-12)
    return tf.reduce_mean((norm - 1) ** 2)


def sources(model) -> list[tf.Variable]:
    return [variable.value for variable in model.trainable_variables]


def pulled_back(critic, model, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = penalty(critic, x) + tf.reduce_mean(critic(x))
    return [value, *tape.gradient(value, [*sources(model), x])]


@pytest.mark.parametrize("batch", [1, 7])
def test_a_gradient_penalty_is_that_of_the_model_in_place(critic, batch: int) -> None:
    model, pooled = critic
    x = rows(batch)
    for ours, theirs in zip(
        pulled_back(pooled, model, x), pulled_back(model, model, x), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-10 * max(1.0, np.abs(theirs).max()))


def test_a_gradient_penalty_in_a_graph(critic) -> None:
    model, pooled = critic
    compiled = tf.function(lambda x: pulled_back(pooled, model, x))
    for batch in (3, 5):
        expected = pulled_back(model, model, rows(batch))
        for ours, theirs in zip(compiled(rows(batch)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * max(1.0, np.abs(theirs).max()))


def test_a_gradient_penalty_against_finite_differences(critic) -> None:
    model, pooled = critic
    x, step = rows(4), 1e-5
    with tf.GradientTape() as tape:
        value = penalty(pooled, x)
    gradients = tape.gradient(value, sources(model))
    for variable, gradient in zip(sources(model), gradients, strict=True):
        former = variable.numpy()
        moved = former.copy()
        place = tuple(0 for _ in moved.shape)
        ends = []
        for sign in (1, -1):
            moved[place] = former[place] + sign * step
            variable.assign(moved)
            ends.append(float(penalty(pooled, x)))
        variable.assign(former)
        numeric = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.asarray(gradient)[place], numeric, atol=1e-7)


def test_the_same_bits_for_any_number_of_workers(pool_of) -> None:
    x = rows(13)
    found = []
    for workers in (1, 3):
        model = critic_of()
        with qpool.parallelize(model, pool=pool_of(workers)) as pooled:
            found.append([np.asarray(t).tobytes() for t in pulled_back(pooled, model, x)])
    assert found[0] == found[1]


def test_complex_outputs_and_weights_are_pulled_back_twice(worker) -> None:
    class Wave(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable([0.3 + 0.4j, 0.1 - 0.2j], dtype=tf.complex128)
            self.unused = tf.Variable(1.0)

        def __call__(self, z):
            return tf.exp(tf.cast(z, tf.complex128) * self.w), tf.math.abs(self.w) * z**3

    model = Wave()

    def second(call):
        z = rows(5)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                wave, cubic = call(z)
                value = tf.reduce_sum(tf.math.real(wave) ** 2 * cubic)
            dz, dw = inner.gradient(value, [z, model.w])
            both = tf.reduce_sum(tf.sin(dz)) + tf.reduce_sum(tf.abs(dw) ** 2)
        found = outer.gradient(both, [z, model.w, model.unused])
        assert found.pop() is None
        return found

    with qpool.parallelize(model, pool=worker) as pooled:
        for ours, theirs in zip(second(pooled), second(model), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def residual_pulled_back(network, model, x):
    """A differential equation's residual, u_xx + u u_x, and its gradient: a third derivative."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                u = network(x)
            slope = inner.gradient(u, x)[:, 0]
        bend = outer.gradient(slope, x)[:, 0]
        value = tf.reduce_mean((bend + u * slope) ** 2)
    return [value, *tape.gradient(value, [*sources(model), x])]


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_residual_is_trained_through(critic, in_graph: bool) -> None:
    model, pooled = critic
    x = rows(3)
    step = tf.function(residual_pulled_back) if in_graph else residual_pulled_back
    for ours, theirs in zip(
        step(pooled, model, x), residual_pulled_back(model, model, x), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-9 * max(1.0, np.abs(theirs).max()))


def test_a_cotangent_that_is_the_input_itself(worker) -> None:
    class Wave(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(0.7, dtype=tf.float64)

        def __call__(self, x):
            return tf.sin(self.w * x) * x

    def third(network, model, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    u = network(x)
                slope = inner.gradient(u, x, output_gradients=x)
            value = tf.reduce_sum(outer.gradient(slope, x, output_gradients=x) ** 2)
        return [value, *tape.gradient(value, [model.w, x])]

    model, x = Wave(), rows(3)
    with qpool.parallelize(model, pool=worker) as pooled:
        for ours, theirs in zip(third(pooled, model, x), third(model, model, x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_third_derivative_in_place_is_of_what_the_workers_computed(worker) -> None:
    class Scaled(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.scale = tf.Variable(0.7, dtype=tf.float64), 1.0

        def __call__(self, x):
            return tf.sin(self.w * x * self.scale)

    model, x = Scaled(), rows(2)
    with qpool.parallelize(model, pool=worker) as pooled:
        with tf.GradientTape() as tape:
            value = penalty_slope(pooled, x)
        model.scale = 2.0
        with pytest.raises(errors.SecondOrderGradientError, match="attribute of the model"):
            tape.gradient(value, model.w)


def penalty_slope(network, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = penalty(network, x)
    return tf.reduce_sum(tape.gradient(value, x) ** 2)


def test_a_third_derivative_is_of_the_weights_that_the_call_was_made_with(critic) -> None:
    model, pooled = critic
    x = rows(2)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = pulled_back(pooled, model, x)[-1]
    variable = sources(model)[0]
    before = variable.numpy()
    variable.assign_add(0.1 * tf.ones_like(variable))
    try:
        with pytest.raises(errors.SecondOrderGradientError, match="weights had changed"):
            tape.gradient(value, x)
    finally:
        variable.assign(before)


def test_what_cannot_be_had_says_why(critic, worker) -> None:
    model, pooled = critic
    x = rows(2)
    with tf.GradientTape() as fourth:
        fourth.watch(x)
        value = residual_pulled_back(pooled, model, x)[-1]
    with pytest.raises(errors.SecondOrderGradientError, match="no fourth"):
        fourth.gradient(value, x)
    stock = models.Scale()
    z = tf.constant([[0.1, 0.2]])
    with qpool.parallelize(stock, pool=worker, engine="stock") as pooled:
        with tf.GradientTape() as outer:
            value = penalty(pooled, z)
        with pytest.raises(errors.SecondOrderGradientError, match="engine='stock'"):
            outer.gradient(value, stock.trainable_variables)


def test_both_sides_of_a_gan_in_one_pool(worker) -> None:
    """In a generator step gradients flow through the pooled critic to the pooled generator."""
    generator = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=4, seed=1, dtype="float64")
    critic = critic_of(2)
    z = tf.constant(np.random.default_rng(6).normal(size=(6, 4)) * 0.3)

    def step(generate, judge):
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(judge(generate(z)))
        return [loss, *tape.gradient(loss, sources(generator) + sources(critic))]

    expected = step(generator, critic)
    with (
        qpool.parallelize(generator, pool=worker) as pooled_generator,
        qpool.parallelize(critic, pool=worker) as pooled_critic,
    ):
        for ours, theirs in zip(step(pooled_generator, pooled_critic), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_forward_mode_and_what_is_traced_after_it() -> None:
    """Tapes record nothing where TensorFlow traces for it: what was exported then was zero, and was
    kept on disk."""
    model = qpool.models.QuantumSFDiscriminator(
        n_modes=1, layers=2, cutoff_dim=3, seed=2, dtype="float64"
    )
    x = rows(3)
    with qpool.parallelize(model, strategy="cpu_batch") as pooled:
        pooled(x)
        direction = tf.ones_like(x)
        with tf.autodiff.ForwardAccumulator(x, direction) as forwards:
            score = pooled(x)
        step = 1e-5
        along = (pooled(x + step * direction) - pooled(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(forwards.jvp(score), along, atol=1e-8)
        for ours, theirs in zip(
            pulled_back(pooled, model, x), pulled_back(model, model, x), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * max(1.0, np.abs(theirs).max()))
            assert np.any(np.abs(ours) > 1e-6)
