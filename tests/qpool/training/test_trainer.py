"""The trainer: the seed's snippet in qpool's names, and the step's gradients."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import qpool
from qpool.training.gan import QuantumGAN


def small() -> qpool.models.QuantumSFGenerator:
    return qpool.models.QuantumSFGenerator(
        n_modes=2,
        latent_dim=2,
        layers=1,
        cutoff_dim=3,
        encoding_strategy="direct_displacement",
        seed=2,
    )


ROWS = np.random.default_rng(0).normal(size=(20, 2))


def test_train_is_the_same_pooled_or_not(pool) -> None:
    weights = []
    for strategy, options in (("processes", {"pool": pool}), ("sequential", {})):
        with qpool.QuantumGANTrainer(small(), seed=4, **options) as trainer:
            history = trainer.train(ROWS, epochs=2, batch_size=8, strategy=strategy)
            weights.append(trainer.generator.get_weights())
            assert len(history.history["generator_loss"]) == 2
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_step_in_place_is_one_compiled_program_and_gives_the_same_again() -> None:
    histories = []
    for strategy in ("cpu_batch", "threads", "cpu_batch"):
        with qpool.QuantumGANTrainer(small(), seed=4) as trainer:
            histories.append(trainer.train(ROWS, epochs=2, batch_size=8, strategy=strategy).history)
            assert trainer.gan.jit_compile == (strategy == "cpu_batch")
    assert histories[0] == histories[2]
    for name, values in histories[1].items():  # other draws: only the order of size is the same
        np.testing.assert_allclose(histories[0][name], values, atol=2.0)


def test_a_compiled_step_is_the_step() -> None:
    """The same program, compiled and not, on latent rows that do not come from draws."""
    moved = []
    for compiled in (False, True):
        with qpool.parallelize(small(), strategy="cpu_batch") as generator:
            critic = keras.Sequential(
                [
                    keras.Input((2,)),
                    keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.Ones()),
                    keras.layers.Dense(1, kernel_initializer=keras.initializers.Ones()),
                ]
            )
            gan = QuantumGAN(generator, critic, critic_steps=2, penalty=0.0, seed=1)
            assert not generator.supports_jit  # nobody has called it: it is not known
            if compiled:
                generator.with_norm(tf.zeros((2, 2)))
                assert generator.supports_jit
            gan.latent = lambda batch: tf.constant(ROWS[:8], tf.float32)
            gan.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
            assert gan.jit_compile == compiled
            batches = tf.data.Dataset.from_tensors(tf.constant(ROWS[8:16], tf.float32)).repeat(3)
            gan.fit(batches, epochs=1, shuffle=False, verbose=0)
            moved.append([*generator.get_weights(), *critic.get_weights()])
    for ours, theirs in zip(*moved, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_data_is_checked_before_any_worker_starts() -> None:
    trainer = qpool.QuantumGANTrainer(small())
    with pytest.raises(qpool.errors.DataError, match="NaN"):
        trainer.train([[np.nan, 1.0]], epochs=1, batch_size=1)
    with pytest.raises(qpool.errors.DataError, match="smaller batch_size"):
        trainer.train(ROWS, epochs=1, batch_size=21)
    with pytest.raises(qpool.errors.ConfigurationError, match="epochs"):
        trainer.train(ROWS, epochs=0, batch_size=4)
    assert not isinstance(trainer.generator, qpool.ParallelGenerator)


def test_the_generators_gradient_is_of_the_critic_that_judged_its_batch() -> None:
    initial = keras.initializers.GlorotUniform(seed=7)
    generator = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, kernel_initializer=initial)]
    )
    generator.latent_dim = 2
    critic = keras.Sequential(  # smooth: a finite difference across a kink says nothing
        [
            keras.Input((2,)),
            keras.layers.Dense(8, "tanh", kernel_initializer=initial),
            keras.layers.Dense(1, kernel_initializer=initial),
        ]
    )
    gan = QuantumGAN(generator, critic, critic_steps=2, seed=1)
    gan.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
    before = [w.copy() for w in generator.get_weights()]
    judge = keras.models.clone_model(critic)
    judge.set_weights(critic.get_weights())
    gan.train_step(tf.constant(ROWS[:8], tf.float32))
    after = generator.get_weights()
    # By finite differences, with the critic as it was before its own steps.
    draws = keras.random.SeedGenerator(1)
    z = keras.random.normal((8, 2), seed=draws)

    def loss(kernel: np.ndarray) -> float:
        return -float(tf.reduce_mean(judge(tf.linalg.matmul(z, kernel) + before[1])))

    step = 1e-2
    for place in ((0, 0), (1, 1)):
        shift = np.zeros((2, 2), np.float32)
        shift[place] = step
        slope = (loss(before[0] + shift) - loss(before[0] - shift)) / (2 * step)
        moved = (before[0] - after[0])[place] / 0.1
        assert moved == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_the_norm_of_states_is_logged_and_can_be_held(pool) -> None:
    norms = []
    for weight in (0.0, 50.0):
        with qpool.QuantumGANTrainer(small(), seed=4, norm_penalty=weight, pool=pool) as trainer:
            history = trainer.train(ROWS, epochs=6, batch_size=20).history
            norms.append(history["ket_norm"][-1])
    assert 0.5 < norms[0] < norms[1] < 1.0001


def test_losses_clipping_and_schedules(pool) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 4)
    options = {"loss": "non-saturating", "clip_norm": 0.1, "generator_rate": schedule}
    with qpool.QuantumGANTrainer(small(), seed=4, pool=pool, **options) as trainer:
        history = trainer.train(ROWS, epochs=2, batch_size=10).history
        assert trainer.gan.generator_optimizer.global_clipnorm == 0.1
        assert float(trainer.gan.generator_optimizer.learning_rate) < 1e-6
    assert all(value > 0 for value in history["critic_loss"])  # of logits: -log of chances
    for option in ({"loss": "waserstein"}, {"penalty": -1.0}, {"clip_norm": 0.0}):
        with (
            pytest.raises(qpool.errors.ConfigurationError),
            qpool.QuantumGANTrainer(small(), **option) as trainer,
        ):
            trainer.prepare(2, "sequential")


def test_what_does_not_fit_together_is_said_before_training(pool) -> None:
    with qpool.QuantumGANTrainer(small(), pool=pool) as trainer:
        with pytest.raises(qpool.errors.DataError, match="width 2; the data has 3"):
            trainer.train(np.ones((20, 3)), epochs=1, batch_size=10)
        trainer.prepare(2)
        with pytest.raises(qpool.errors.ConfigurationError, match="pooled already"):
            trainer.train(ROWS, epochs=1, batch_size=10, strategy="sequential")


class Shift(tf.Module):
    """A generator with TensorFlow's own variables."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable([0.5, -0.5])

    def __call__(self, z):
        return z + self.w


def test_a_generator_with_variables_of_tensorflow() -> None:
    model = Shift()
    with qpool.QuantumGANTrainer(model) as trainer:
        trainer.train(ROWS, epochs=1, batch_size=10, strategy="cpu_batch")
    assert np.abs(model.w - [0.5, -0.5]).min() > 1e-4


@pytest.mark.parametrize("make", [small, Shift])
def test_the_generator_ends_with_the_average_of_its_weights(make) -> None:
    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            gan, before = self.model, weights()
            with gan.averaged():
                self.inside = weights()
            for value, was in zip(weights(), before, strict=True):
                np.testing.assert_array_equal(value, was)
            self.seen.append(before)

    def weights() -> list[np.ndarray]:
        found = trainer.gan.generator.trainable_variables
        return [keras.ops.convert_to_numpy(v).copy() for v in found]

    look = Look()
    with qpool.QuantumGANTrainer(make(), seed=4, ema_momentum=0.75) as trainer:
        gan = trainer.prepare(2, "cpu_batch")
        first = weights()
        with gan.averaged():  # no step yet: there is nothing to average
            for value, was in zip(weights(), first, strict=True):
                np.testing.assert_array_equal(value, was)
        trainer.train(ROWS, epochs=1, batch_size=4, strategy="cpu_batch", callbacks=[look])
        last = weights()
    assert len(look.seen) == 5
    for number, (value, inside) in enumerate(zip(last, look.inside, strict=True)):
        average = look.seen[0][number]
        for step in look.seen[1:]:
            average = 0.75 * average + 0.25 * step[number]
        np.testing.assert_allclose(value, average, atol=1e-6)
        np.testing.assert_array_equal(value, inside)
        assert np.abs(value - look.seen[-1][number]).max() > 1e-5
    for momentum in (1.0, "0.9"):
        with pytest.raises(qpool.errors.ConfigurationError, match="between 0 and 1"):
            qpool.QuantumGANTrainer(make(), ema_momentum=momentum)


def test_training_goes_on_from_the_weights_and_not_from_their_average() -> None:
    ends = []
    for parts in ((2,), (1, 2)):
        trainer = qpool.QuantumGANTrainer(Shift(), seed=4, ema_momentum=0.75)
        first = 0
        for epochs in parts:
            trainer.train(ROWS, epochs, batch_size=4, strategy="cpu_batch", first_step=first)
            first = 5 * epochs
        arrays = trainer.arrays()
        ends.append([trainer.generator.w.numpy(), *arrays.values()])
        assert np.abs(arrays["generator/0"] - trainer.generator.w.numpy()).max() > 1e-3
        trainer.generator.w.assign([7.0, 7.0])  # by hand: it stays
        trainer.gan.take_weights()
        assert np.all(trainer.generator.w.numpy() == 7.0)
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fit_with_keras_callbacks(pool, tmp_path) -> None:
    with qpool.QuantumGANTrainer(small(), seed=4, pool=pool) as trainer:
        gan = trainer.prepare(2)
        callbacks = [
            keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
            keras.callbacks.ModelCheckpoint(
                str(tmp_path / "at-{epoch}.weights.h5"), save_weights_only=True
            ),
            keras.callbacks.EarlyStopping("critic_loss", patience=0, mode="max"),
        ]
        batches = tf.data.Dataset.from_tensor_slices(np.float32(ROWS)).batch(10).repeat()
        epochs = gan.fit(
            batches, epochs=30, steps_per_epoch=1, verbose=0, shuffle=False, callbacks=callbacks
        ).epoch
    assert len(epochs) < 30
    assert len(list(tmp_path.glob("at-*.weights.h5"))) == len(epochs)
    assert list((tmp_path / "board" / "train").iterdir())


def test_a_quantum_critic_in_the_same_pool(pool) -> None:
    """Its gradient penalty is a second derivative through the pool, within ``fit``'s graph."""
    weights = []
    for pooled in (True, False):
        critic = qpool.models.QuantumSFDiscriminator(layers=1, cutoff_dim=3, seed=5)
        given = qpool.parallelize(critic, pool=pool) if pooled else critic
        options = {"pool": pool} if pooled else {}
        with qpool.QuantumGANTrainer(small(), given, critic_steps=1, seed=4, **options) as trainer:
            trainer.train(ROWS, 2, 10, strategy="processes" if pooled else "sequential")
            weights.append([*trainer.generator.get_weights(), *critic.get_weights()])
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


class Line:
    """A plain class without a circuit: z, scaled and moved."""

    latent_dim = 2

    def __init__(self, dtype: str = "float32") -> None:
        self.scale = tf.Variable([0.5, 1.5], dtype=dtype)
        self.shift = tf.Variable([0.1, -0.2], dtype=dtype)
        self.trainable_variables = [self.scale, self.shift]

    def __call__(self, z):
        return tf.cast(z, self.scale.dtype) * self.scale + self.shift


class Phase(keras.layers.Layer):
    """Doubles what it is given in the training phase."""

    def call(self, x, training=None):
        return 2.0 * x if training else x


def in_phases() -> keras.Sequential:
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.BatchNormalization(),
            Phase(),
            keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.GlorotUniform(1)),
            keras.layers.Dropout(0.25, seed=3),
            keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(2)),
        ]
    )


def test_the_critic_is_in_the_training_phase(pool) -> None:
    """As it is in a loop that one writes oneself, which is here."""
    real = tf.constant(ROWS[:16], tf.float32)
    found = []
    for strategy, options in (("sequential", {}), ("processes", {"pool": pool})):
        critic, line = in_phases(), Line()
        options = {"critic_steps": 1, "penalty": 0.0, "seed": 4, **options}
        with qpool.QuantumGANTrainer(line, critic, **options) as trainer:
            gan = trainer.prepare(2, strategy)
            gan.latent = lambda batch: real
            gan.fit(tf.data.Dataset.from_tensors(real).repeat(3), shuffle=False, verbose=0)
        found.append([*critic.get_weights(), line.scale.numpy()])

    critic, line = in_phases(), Line()
    adams = [keras.optimizers.Adam(0.01, beta_1=0.5) for _ in range(2)]
    for _ in range(3):
        with tf.GradientTape() as tape:
            fake = line(real)
            loss = -tf.reduce_mean(critic(fake, training=True))
        of_line = tape.gradient(loss, line.trainable_variables)
        variables = [variable.value for variable in critic.trainable_variables]
        with tf.GradientTape() as tape:
            on_fake, on_real = critic(fake, training=True), critic(real, training=True)
            loss = tf.reduce_mean(on_fake) - tf.reduce_mean(on_real)
        adams[0].apply(tape.gradient(loss, variables), critic.trainable_variables)
        adams[1].apply(of_line, line.trainable_variables)
    expected = [*critic.get_weights(), line.scale.numpy()]
    for weights in found:
        for ours, theirs in zip(weights, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


class Telling(keras.callbacks.Callback):
    def __init__(self) -> None:
        self.told = []

    def on_train_begin(self, logs=None):
        self.told.append("begin")

    def on_train_end(self, logs=None):
        self.told.append("end")

    def on_epoch_begin(self, epoch, logs=None):
        self.told.append((epoch, self.params["steps"]))


def test_a_run_of_uneven_epochs_is_one_training_to_callbacks() -> None:
    with qpool.QuantumGANTrainer(Line(), critic_steps=1) as trainer:
        telling = Telling()
        history = trainer.train(
            ROWS, steps=11, first_step=2, batch_size=5, strategy="sequential", callbacks=[telling]
        )
    assert telling.told == ["begin", (0, 2), (1, 4), (2, 3), "end"]
    assert history.epoch == [0, 1, 2]
    assert len(history.history["critic_loss"]) == 3


def test_a_plain_class_is_saved_and_restored(tmp_path) -> None:
    file = str(tmp_path / "{epoch}.weights.h5")
    kept = keras.callbacks.ModelCheckpoint(file, save_weights_only=True)
    with qpool.QuantumGANTrainer(line := Line(), critic_steps=1, generator_rate=0.1) as trainer:
        trainer.train(ROWS, epochs=1, batch_size=5, strategy="sequential", callbacks=[kept])
        trained, arrays = line.scale.numpy(), trainer.arrays()
        for restored in (
            lambda: trainer.gan.load_weights(file.format(epoch=1)),
            lambda: trainer.restore(arrays),
        ):
            line.scale.assign([0.0, 0.0])
            restored()
            np.testing.assert_array_equal(line.scale, trained)


@pytest.mark.parametrize("strategy", ["sequential", "cpu_batch"])
def test_a_generator_in_double_precision(strategy: str) -> None:
    with qpool.QuantumGANTrainer(line := Line("float64"), critic_steps=2) as trainer:
        before = line.scale.numpy()
        history = trainer.train(ROWS, epochs=1, batch_size=5, strategy=strategy)
    assert np.isfinite(history.history["critic_loss"]).all()
    assert (line.scale.numpy() != before).all()


def test_a_critic_that_is_not_built() -> None:
    critic = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])
    with qpool.QuantumGANTrainer(Line(), critic, critic_steps=1) as trainer:
        trainer.train(ROWS, steps=1, batch_size=5, strategy="sequential")
    critic = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(qpool.errors.ConfigurationError, match="no variables yet"):
        QuantumGAN(Line(), critic).compile(keras.optimizers.SGD(), keras.optimizers.SGD())


def test_what_is_no_generator_of_samples() -> None:
    with pytest.raises(qpool.errors.ConfigurationError, match="no latent_dim"):
        qpool.QuantumGANTrainer(lambda z: z)
    with pytest.raises(qpool.errors.ConfigurationError, match="cannot be called"):
        qpool.QuantumGANTrainer(object())
    dataset = tf.data.Dataset.from_tensors(ROWS)
    with (
        qpool.QuantumGANTrainer(Line()) as trainer,
        pytest.raises(qpool.errors.DataError, match=r"gan\.fit"),
    ):
        trainer.train(dataset, epochs=1)
