"""Keras: layers stay layers, fit fits, checkpoints and files keep their keys."""

from __future__ import annotations

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool

Z = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def dense(seed: int = 1) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(
                4, activation="tanh", kernel_initializer=keras.initializers.GlorotUniform(seed)
            ),
            keras.layers.Dense(2, kernel_initializer=keras.initializers.GlorotUniform(seed + 1)),
        ]
    )


class Holder(keras.Model):
    """A model that holds a generator as a layer, as a GAN does."""

    def __init__(self, generator) -> None:
        super().__init__()
        self.generator = generator
        self.scale = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, z):
        return self.scale(self.generator(z))


def functional() -> keras.Model:
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Concatenate()([hidden, inputs]))


def subclassed() -> keras.Model:
    model = models.Net()
    model(Z[:1])
    return model


@pytest.mark.parametrize("make", [dense, functional, subclassed])
@pytest.mark.parametrize("compiled", [False, True])
def test_kinds_of_models_travel(pool, make, compiled: bool) -> None:
    model = make()
    if compiled:
        model.compile("adam", "mse")
        model.fit(Z, np.zeros((12, model(Z).shape[1])), verbose=0, batch_size=12)
    with parallelize(model, pool=pool) as pooled:
        assert isinstance(pooled, keras.Layer)
        np.testing.assert_allclose(pooled(Z), model(Z), rtol=1e-5, atol=1e-6)
        names = [v.path for v in model.variables]
        assert [v.path for v in pooled.variables] == names


def test_dropout_draws_the_same_for_any_number_of_workers(pool_of) -> None:
    model = subclassed()
    found = []
    for workers in (1, 2):
        with parallelize(model, pool=pool_of(workers), tile=2) as pooled:
            pool_of(workers).calls = 10
            found.append(np.asarray(pooled(Z, training=True)))
            assert not np.allclose(found[-1], pooled(Z, training=False))
    np.testing.assert_array_equal(*found)


def test_fit_trains_the_pooled_layer_as_the_plain_one(pool) -> None:
    histories, weights = [], []
    for pooled in (True, False):
        model = dense()
        generator = parallelize(model, pool=pool) if pooled else model
        holder = Holder(generator)
        holder.compile(keras.optimizers.SGD(0.1), "mse")
        history = holder.fit(Z, np.ones((12, 1)), batch_size=5, epochs=2, verbose=0, shuffle=False)
        assert len(holder.trainable_variables) == 6
        histories.append(history.history["loss"])
        weights.append(model.get_weights())
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-5)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpoints_have_the_keys_they_had(pool, tmp_path) -> None:
    model = dense()
    plain = tf.train.Checkpoint(generator=model).save(str(tmp_path / "plain"))
    with parallelize(model, pool=pool) as pooled:
        ours = tf.train.Checkpoint(generator=pooled).save(str(tmp_path / "pooled"))
        assert tf.train.list_variables(ours) == tf.train.list_variables(plain)
        before = model.get_weights()
        model.set_weights([w + 1 for w in before])
        tf.train.Checkpoint(generator=pooled).restore(plain).assert_consumed()
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_module_checkpoints_too(pool, tmp_path) -> None:
    model = models.Several()
    with parallelize(model, pool=pool) as pooled:
        path = tf.train.Checkpoint(g=pooled).save(str(tmp_path / "m"))
        names = {name for name, _ in tf.train.list_variables(path)}
        assert {f"g/{n}/.ATTRIBUTES/VARIABLE_VALUE" for n in ("w", "c", "unused", "shift")} <= names


def test_a_saved_pooled_model_loads_unpooled(pool, tmp_path) -> None:
    model = dense()
    with parallelize(model, pool=pool) as pooled:
        pooled.save(tmp_path / "model.keras")
        pooled.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not isinstance(loaded, qpool.ParallelGenerator)
    np.testing.assert_allclose(loaded(Z), model(Z), rtol=1e-6)
    again = dense(seed=7)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(again(Z), model(Z), rtol=1e-6)


def test_qpools_own_generator_saves_and_loads(pool, tmp_path) -> None:
    model = qpool.models.QuantumSFGenerator(
        n_modes=1, latent_dim=1, layers=1, cutoff_dim=4, encoding_strategy="direct_displacement"
    )
    with parallelize(model, pool=pool) as pooled:
        pooled.save(tmp_path / "generator.keras")
    loaded = keras.saving.load_model(tmp_path / "generator.keras")
    assert type(loaded) is type(model)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unbuilt_model_says_what_to_do(pool) -> None:
    with pytest.raises(qpool.errors.ModelError, match="call it once"):
        parallelize(models.Net(), pool=pool)


def test_batch_statistics_are_refused_in_training_and_used_in_inference(pool) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    with parallelize(model, pool=pool) as pooled:
        np.testing.assert_allclose(pooled(Z), model(Z), rtol=1e-6)
        with pytest.raises(qpool.errors.StatefulCallError, match="moving_mean"):
            pooled(Z, training=True)
        np.testing.assert_allclose(pooled(Z), model(Z), rtol=1e-6)
