"""Generator, critic and data, put together: the seed's trainer over Keras's ``fit``."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from qpool.executors import executor_class
from qpool.generator import parallelize
from qpool.measure.batch_size import suggest_batch
from qpool.pooled import ParallelGenerator
from qpool.training import data, sampling
from qpool.training.gan import QuantumGAN, default_critic
from workers.errors import CheckpointError, ConfigurationError


class QuantumGANTrainer:
    """Trains a quantum generator against a critic.

    Args:
        generator: a model with ``latent_dim``, callable on z; pooled already or not.
        critic: a Keras model (batch, width) -> (batch, 1), pooled or not; default: a small
            classical one.
        generator_rate: learning rate of the generator's Adam (beta_1 = 0.5), a number or a Keras
            schedule.
        critic_rate: the critic's.
        critic_steps: of the critic to one of the generator.
        loss: "wasserstein" or another of ``qpool.training.gan.QuantumGAN``, as are the next two.
        penalty: weight of the critic's gradient penalty.
        norm_penalty: weight of what states lack of norm 1 within the cutoff.
        ema_momentum: of a moving average of the generator's weights, 0 to 1: what an evaluation
            sees, and what the generator has after training. It ends nearer to the data than the
            weights themselves, which go around their best place. None: no average.
        clip_norm: gradients of a larger global norm are scaled down to it; None: never.
        seed: of latent draws, shuffling and the default critic.
        options: further keyword arguments of ``qpool.parallelize``, for a generator that is
            not pooled yet; ``train`` does it.
    """

    def __init__(
        self,
        generator: Any,
        critic: Any = None,
        *,
        generator_rate: Any = 0.01,
        critic_rate: Any = 0.01,
        critic_steps: int = 5,
        loss: str = "wasserstein",
        penalty: float = 1.0,
        norm_penalty: float = 0.0,
        ema_momentum: float | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name, value in (
            ("generator_rate", generator_rate),
            ("critic_rate", critic_rate),
            ("clip_norm", 1.0 if clip_norm is None else clip_norm),
        ):
            if isinstance(value, int | float) and not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {value}")
        if critic_steps < 1:
            raise ConfigurationError(f"critic_steps must be at least 1, not {critic_steps}")
        sampling.check(generator)
        self.generator = generator
        self.critic = critic
        self.gan: QuantumGAN | None = None
        self._rates = (generator_rate, critic_rate)
        self._clip_norm = clip_norm
        self._ema: dict[str, Any] = {}
        if ema_momentum is not None:
            if not isinstance(ema_momentum, numbers.Real) or not 0 < ema_momentum < 1:
                raise ConfigurationError(
                    f"ema_momentum must be between 0 and 1, or None, not {ema_momentum}"
                )
            self._ema = {"use_ema": True, "ema_momentum": ema_momentum}
        self._seed = seed
        self._play = {
            "critic_steps": critic_steps,
            "loss": loss,
            "penalty": penalty,
            "norm_penalty": norm_penalty,
        }
        self._options = options

    def prepare(self, width: int, strategy: str = "auto") -> QuantumGAN:
        """Pool the generator and make the GAN, for samples of that width. Does nothing twice."""
        if not isinstance(self.generator, ParallelGenerator):
            self.generator = parallelize(self.generator, strategy=strategy, **self._options)
        former = self.generator._qpool.strategy
        if strategy != "auto" and executor_class(strategy) is not executor_class(former):
            raise ConfigurationError(
                f"strategy={strategy!r}, but the generator is pooled already, with "
                f"strategy={former!r}; make a trainer of the model itself, or leave strategy= out"
            )
        if self.gan is None:
            if self.critic is None:
                self.critic = default_critic(width, self._seed)
            elif isinstance(self.critic, keras.layers.Layer) and not self.critic.built:
                self.critic(tf.zeros((1, width)))
            self.gan = QuantumGAN(
                self.generator,
                self.critic,
                seed=self._seed,
                **self._play,  # type: ignore[arg-type]
            )
            if self.generator.stats()["strategy"] == "cpu_batch":
                self._call_once()
            self.gan.compile(
                *(
                    keras.optimizers.Adam(rate, beta_1=0.5, global_clipnorm=self._clip_norm, **ema)
                    for rate, ema in zip(self._rates, (self._ema, {}), strict=True)
                ),
                run_eagerly=self.generator.stats()["strategy"] == "sequential",
            )
        return self.gan

    def _call_once(self) -> None:
        """Have it found out how far the generator can be compiled."""
        call = getattr(self.generator, "with_norm", self.generator)
        call(tf.zeros((2, self.generator.latent_dim)))

    def train(
        self,
        real_data: Any,
        epochs: int | None = None,
        batch_size: int | str = 32,
        strategy: str = "auto",
        callbacks: Sequence[Any] = (),
        first_step: int = 0,
        steps: int | None = None,
    ) -> keras.callbacks.History:
        """Train for ``epochs`` passes over ``real_data``, (samples, width) rows of numbers, or for
        so many ``steps``, of a batch each.

        Rows that do not fill a batch are left for another epoch (each shuffles anew, from the
        seed and its number). ``first_step`` is how many of these steps are done already, by a run
        that is resumed. With ``batch_size="auto"`` it is the largest useful one, measured
        (``qpool.suggest_batch``), of at most all rows. Returns Keras's History.
        DataError for data that cannot be used, before any worker starts.
        """
        shape = getattr(self.generator, "features", None)
        width = shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None
        if batch_size == "auto":
            found = data.check(real_data, width, 1)
            self.prepare(found.shape[1], strategy)
            batch_size = suggest_batch(self.generator, largest=len(found))
        if not isinstance(batch_size, numbers.Integral):
            raise ConfigurationError(f"batch_size must be a number or 'auto', not {batch_size!r}")
        batch_size = int(batch_size)
        rows: np.ndarray = data.check(real_data, width, batch_size)
        if (epochs is None) == (steps is None):
            raise ConfigurationError(
                f"expected either epochs or steps; came epochs={epochs}, steps={steps}"
            )
        length = epochs if steps is None else steps
        if length < 1 or batch_size < 1:
            raise ConfigurationError(
                f"epochs, steps and batch_size must be at least 1, not {length} and {batch_size}"
            )
        gan = self.prepare(rows.shape[1], strategy)
        gan.take_weights()
        per_epoch = len(rows) // batch_size
        whole = _Whole(list(callbacks), add_history=True, model=gan)
        for first, last in _spans(first_step, steps or length * per_epoch, per_epoch):
            counts = {"epochs": -(-last // per_epoch), "steps": min(per_epoch, last - first)}
            whole.set_params({"verbose": 0, **counts})
            gan.fit(
                self._batches(rows, batch_size, first, last),
                initial_epoch=first // per_epoch,
                epochs=counts["epochs"],
                steps_per_epoch=counts["steps"],
                verbose=0,
                shuffle=False,
                callbacks=whole,
            )
            if gan.stop_training:
                break
        whole.end()
        gan.take_averages()
        return gan.history

    def _batches(self, rows: np.ndarray, batch_size: int, first: int, last: int) -> Any:
        """The batches of steps ``first`` to ``last``: what a step sees follows from its number."""
        per_epoch, seed = len(rows) // batch_size, self._seed
        values = tf.constant(rows)

        def epoch(number: Any) -> Any:
            order = tf.random.experimental.stateless_shuffle(
                tf.range(len(rows)), [tf.constant(seed, tf.int64), number]
            )
            batches = tf.reshape(order[: per_epoch * batch_size], (per_epoch, batch_size))
            return tf.data.Dataset.from_tensor_slices(batches)

        # On one core TensorFlow waits for its tuner of pipelines when one ends: as long as a run.
        untuned = tf.data.Options()
        untuned.autotune.enabled = False
        begun = first // per_epoch
        return (
            tf.data.Dataset.range(begun, -(-last // per_epoch))
            .flat_map(epoch)
            .skip(first - begun * per_epoch)
            .take(last - first)
            .map(lambda chosen: tf.gather(values, chosen))
            .prefetch(2)
            .with_options(untuned)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All that the next step depends on, by name; see ``restore``."""
        assert self.gan is not None, "prepare() comes first"
        averaged = self.gan.has_averages
        self.gan.take_weights()
        found = {
            name: keras.ops.convert_to_numpy(variable).copy()
            for name, variable in self.gan.state().items()
        }
        if averaged:
            self.gan.take_averages()
        return found

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over what ``arrays`` of a trainer made in the same way gave.

        Raises:
            CheckpointError: the names or shapes are others.
        """
        assert self.gan is not None, "prepare() comes first"
        variables = self.gan.state()
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        came = {name: array.shape for name, array in arrays.items()}
        if expected != came:
            different = sorted(
                name for name in {*expected, *came} if expected.get(name) != came.get(name)
            )
            raise CheckpointError(
                f"the checkpoint is of another model: {different[0]} is {came.get(different[0])} "
                f"there and {expected.get(different[0])} here"
            )
        self.gan.take_weights()
        for name, variable in variables.items():
            variable.assign(arrays[name])

    def begin_again(self, arrays: dict[str, np.ndarray], seed: int) -> None:
        """Become what a new trainer with these ``arrays`` and that ``seed`` is; what is compiled
        stays."""
        self.restore(arrays)
        self._seed = seed

    def close(self) -> None:
        """Close the generator's pool."""
        if isinstance(self.generator, ParallelGenerator):
            self.generator.close()

    def __enter__(self) -> QuantumGANTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Whole(keras.callbacks.CallbackList):
    """Callbacks of a training that begins and ends once, in however many pieces Keras has it."""

    _begun = False
    _logs: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Of the first piece."""
        if not self._begun:
            self._begun = True
            super().on_train_begin(logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Of any piece."""
        self._logs = logs

    def end(self) -> None:
        """Of the last one."""
        if self._begun:
            super().on_train_end(self._logs)


def _spans(first: int, last: int, per_epoch: int) -> Iterator[tuple[int, int]]:
    """Steps ``first`` to ``last`` in up to three pieces, each of equal epochs as Keras counts
    them: the rest of an epoch, whole ones, the beginning of one."""
    whole = min(last, -(-first // per_epoch) * per_epoch)
    end = max(whole, last // per_epoch * per_epoch)
    for span in ((first, whole), (whole, end), (end, last)):
        if span[0] < span[1]:
            yield span
