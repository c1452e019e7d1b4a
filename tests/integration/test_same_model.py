"""What a worker holds is what the coordinator's model is; what cannot be is refused."""

from __future__ import annotations

import collections

import keras
import models
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from pooling import parallelize
from strawberryfields import ops

import qpool
from qpool import errors

Z = tf.constant(np.random.default_rng(3).normal(size=(16, 2)), tf.float32)

Pair = collections.namedtuple("Pair", "first second")


class Flexible:
    """A plain class whose call is given to it."""

    def __init__(self, call, **attributes):
        self.w = tf.Variable(2.0)
        self.b = tf.Variable(3.0)
        self.trainable_variables = [self.w]
        self.function = call
        vars(self).update(attributes)

    def __call__(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def pooled(pool, call, **attributes):
    return parallelize(Flexible(call, **attributes), pool=pool)


def test_hbar_and_floatx_are_the_coordinators() -> None:
    program = sf.Program(1)
    a = program.params("a")
    with program.context as q:
        ops.Dgate(a) | q[0]

    def call(self, z):
        rows = []
        for row in tf.unstack(z):
            engine = sf.Engine("tf", backend_options={"cutoff_dim": 4})
            state = engine.run(self.program, args={"a": row[0]}).state
            rows.append(state.quad_expectation(0)[0] * self.w)
        return tf.cast(tf.stack(rows), keras.config.floatx())

    former, floatx = sf.hbar, keras.config.floatx()
    keras.config.dtype_policy()  # Keras makes it of the floatx that it finds first, and keeps it
    sf.hbar = 1
    keras.config.set_floatx("float64")
    try:
        model = Flexible(call, program=program)
        z = tf.fill((1, 1), 0.2)
        with (
            qpool.Pool(workers=1) as pool,
            parallelize(model, pool=pool, tile=1) as generator,
        ):
            assert generator(z).dtype == tf.float64
            np.testing.assert_allclose(generator(z), model(z), rtol=1e-6)
            sf.hbar = 2
            with pytest.raises(errors.ConfigurationError, match="pool of its own"):
                parallelize(models.Scale(), pool=pool)
    finally:
        sf.hbar = former
        keras.config.set_floatx(floatx)


def test_calls_that_change_or_make_variables_are_refused(pool) -> None:
    def assigns(self, z):
        self.w.assign(self.w * 1.5)
        return z * self.w

    def makes(self, z):
        if self.made is None:
            self.made = tf.Variable(1.0, name="made")
        return z * self.w * self.made

    with pytest.raises(errors.StatefulCallError, match="changed its variable"):
        pooled(pool, assigns)(Z)
    with pytest.raises(errors.StatefulCallError, match="made variables"):
        pooled(pool, makes, made=None)(Z)


def test_losses_added_in_the_call_are_refused(pool) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activity_regularizer="l2")])
    with pytest.raises(errors.StatefulCallError, match="adds losses"):
        parallelize(model, pool=pool)(Z)


def test_samples_that_depend_on_each_other_are_refused(pool) -> None:
    with pytest.raises(errors.InputError, match="depends on the other samples"):
        pooled(pool, lambda self, z: (z - tf.reduce_mean(z, 0)) * self.w)(Z)


def test_rounding_about_zero_is_no_dependence(pool) -> None:
    def call(self, z):
        return z * self.w * 0 + 1e-7 * tf.cast(tf.shape(z)[0], z.dtype)

    assert float(tf.reduce_max(pooled(pool, call)(Z))) < 1e-5


def test_factories_find_what_instances_have(pool) -> None:
    def factory():
        model = Flexible(lambda self, z: z * self.w + self.shift)
        model.shift = tf.Variable(0.0, trainable=False)
        return model

    generator = parallelize(factory, pool=pool)
    generator.shift.assign(10.0)
    np.testing.assert_allclose(generator(Z), 2 * Z + 10, rtol=1e-6)
    fixed = parallelize(lambda: models.FixedBatch(4), pool=pool)
    assert fixed(tf.zeros((6, 1))).shape == (6, 1)
    dropout = parallelize(
        lambda: keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(4), keras.layers.Dropout(0.5)]
        ),
        pool=pool,
    )
    assert np.count_nonzero(dropout(Z, training=True)) < 64


def test_rare_draws_and_late_ones_are_seeded(pool) -> None:
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(4), keras.layers.Dropout(0.02, seed=1)]
    )
    with parallelize(model, pool=pool) as generator:
        generator(Z, training=True)
        assert generator.stats()["random_draws"] == "seeded"
    late = pooled(
        pool,
        lambda self, z: z * self.w + self.sigma * tf.random.normal(z.shape),
        sigma=tf.Variable(0.0, trainable=False),
    )
    late(Z)
    assert late.stats()["random_draws"] == "seeded"
    late.sigma.assign(1.0)
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(late(Z) ** 2)
    np.testing.assert_array_equal(tape.gradient(loss, late.w), tape.gradient(loss, late.w))


def test_gradients_for_variables_that_are_not_in_trainable_variables(pool) -> None:
    generator = pooled(pool, lambda self, z: z * self.w + self.b**2)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(generator(Z))
    np.testing.assert_allclose(tape.gradient(loss, generator.b), 32 * 2 * 3.0)


def test_a_layer_thawed_after_parallelize(pool) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    with parallelize(model, pool=pool) as generator:
        model.layers[0].trainable = True
        with tf.GradientTape(persistent=True) as tape:
            losses = [tf.reduce_sum(call(Z) ** 2) for call in (generator, model)]
        for variable in (v.value for v in model.trainable_variables):
            ours, theirs = (tape.gradient(loss, variable) for loss in losses)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_gather_after_the_pool(pool) -> None:
    generator = pooled(pool, lambda self, z: z * self.w)

    def loss():
        return tf.reduce_sum(tf.gather(generator(Z), [1, 1, 5]) ** 2)

    expected = 4.0 * float(tf.reduce_sum(tf.gather(Z, [1, 1, 5]) ** 2))
    for run in (loss, tf.function(loss)):
        with tf.GradientTape() as tape:
            value = run()
        assert float(tape.gradient(value, generator.w)) == pytest.approx(expected, rel=1e-5)


def test_an_eager_call_pulled_back_in_a_graph(pool) -> None:
    generator = pooled(pool, lambda self, z: z * self.w)
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(generator(Z) ** 2)
    in_graph = tf.function(lambda: tape.gradient(loss, generator.w))()
    np.testing.assert_allclose(in_graph, 4 * tf.reduce_sum(Z**2), rtol=1e-5)


def test_watched_constants_and_keras_variables_are_weights_of_the_call(pool) -> None:
    generator = pooled(pool, lambda self, z, k=1.0: z * self.w * k)
    k = tf.constant(2.0)
    np.testing.assert_allclose(generator(Z, k), 4 * Z)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(k)
        watched = generator(Z, k)
        np.testing.assert_allclose(watched, 4 * Z)
        stopped = generator(Z, tf.stop_gradient(k))
        of_keras = generator(Z, keras.Variable(3.0))
    np.testing.assert_allclose(tape.gradient(watched, k), tf.reduce_sum(2 * Z), rtol=1e-5)
    assert tape.gradient(stopped, k) is None
    np.testing.assert_allclose(of_keras, 6 * Z)


def test_per_sample_gradients_cannot_be_differentiated(pool) -> None:
    generator = pooled(pool, lambda self, z: z * self.w)
    with tf.GradientTape() as tape:
        rows = generator.per_sample_gradients(Z, 2 * Z)[0]
        loss = tf.reduce_sum(rows**2)
    with pytest.raises(errors.SecondOrderGradientError):
        tape.gradient(loss, generator.w)
    with pytest.raises(errors.InputError, match="eagerly only"):
        tf.function(lambda: generator.per_sample_gradients(Z, Z))()


def test_the_training_phase_is_handed_down(pool) -> None:
    class Quiet(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)
            self.dropout = keras.layers.Dropout(0.5)

        def call(self, z):
            return self.dropout(self.dense(z))

    model = Quiet()
    model(Z)
    with parallelize(model, pool=pool) as generator:
        assert np.count_nonzero(generator(Z, training=True)) < 100
        assert np.count_nonzero(generator(Z)) == 128


def test_a_model_that_cannot_take_one_row(pool) -> None:
    def call(self, z):
        assert z.shape[0] >= 2
        return z * self.w

    generator = pooled(pool, call)
    for batch in (16, 9, 3, 2):
        np.testing.assert_allclose(generator(Z[:batch]), 2 * Z[:batch])
    rows = generator.per_sample_gradients(Z[:3], tf.ones((3, 2)))[0]
    np.testing.assert_allclose(rows, tf.reduce_sum(Z[:3], axis=1), rtol=1e-6)


def test_namedtuples_keep_their_class(pool) -> None:
    Local = collections.namedtuple("Local", "first second")
    for kind in (Pair, Local):
        out = pooled(pool, lambda self, z, k=kind: k(z * self.w, z))(Z)
        assert type(out) is kind
        np.testing.assert_allclose(out.first, 2 * Z)


def test_clones_are_unpooled_and_close_leaves_the_model_usable(pool) -> None:
    inputs = keras.Input((2,))
    hidden = keras.layers.Dense(3)(inputs)
    model = keras.Model(inputs, keras.layers.Concatenate()([hidden, inputs]))
    model.compile("sgd", "mse")
    expected = model.predict(Z, verbose=0)
    generator = parallelize(model, pool=pool)
    np.testing.assert_allclose(generator.predict(Z, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert generator.stats()["samples"] == 16
    assert keras.models.clone_model(generator)(Z).shape == (16, 5)
    generator.close()
    np.testing.assert_allclose(model.predict(Z, verbose=0), expected, rtol=1e-6)


def test_a_closed_generator_on_a_shared_pool_says_so(pool) -> None:
    generator = pooled(pool, lambda self, z: z * self.w)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(generator(Z))
    generator.close()
    with pytest.raises(errors.PoolClosedError, match="parallelize the model again"):
        tape.gradient(loss, generator.w)


def test_a_model_that_takes_positive_latents_only_can_be_traced(pool) -> None:
    def call(self, z):
        tf.debugging.assert_non_negative(z)
        return z * self.w

    generator = pooled(pool, call)
    np.testing.assert_allclose(tf.function(lambda z: generator(z))(Z**2), 2 * Z**2, rtol=1e-6)


def test_what_would_go_wrong_unseen_is_refused(pool) -> None:
    class Slotted:
        __slots__ = ("__dict__", "w")

        def __init__(self):
            self.w = tf.Variable(1.0)
            self.trainable_variables = [self.w]

        def __call__(self, z):
            return z * self.w

    with pytest.raises(errors.ModelError, match="__slots__"):
        parallelize(Slotted(), pool=pool)
    with pytest.raises(errors.ModelError, match="hide the methods"):
        pooled(pool, lambda self, z: z, generate=lambda z: z)
    with pytest.raises(errors.ConfigurationError, match="did you mean 'labels'"):
        parallelize(models.Several(), pool=pool, methods="conditional", sharded="lables")
    with pytest.raises(errors.InputError, match="leading batch axis"):
        pooled(pool, lambda self, z: z * self.w)([Z, Z])
    with pytest.warns(UserWarning, match="its own"):
        pooled(pool, lambda self, z: z * self.w, stats=[])


def test_generators_that_are_dropped_are_discarded(pool) -> None:
    import gc

    pooled(pool, lambda self, z: z * self.w)(Z)
    gc.collect()
    with pooled(pool, lambda self, z: z * self.w) as generator:
        generator(Z)
        before = len(pool._performer.shared.models)
        for _ in range(3):
            pooled(pool, lambda self, z: z * self.w)(Z)
        gc.collect()
        generator(Z)
        assert len(pool._performer.shared.models) <= before
