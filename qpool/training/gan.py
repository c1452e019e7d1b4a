"""The adversarial step, as a ``keras.Model``: ``fit``, callbacks and checkpoints are Keras's.

Owns the losses and the order of updates, nothing else. The generator may be pooled or not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from qpool.pooled import ParallelGenerator
from qpool.training import sampling
from qpool.training.config import LOSSES
from qpool.training.parts import Part
from workers.compiling import compile_cache
from workers.errors import CheckpointError, ConfigurationError, nearest
from workers.replica import functions, serialization

#: Which hand the phase on to the layers that they are made of, or take it for quantisation alone.
_OF_NO_PHASE = (
    keras.Sequential,
    Functional,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
)


class QuantumGAN(keras.Model):
    """Generator against critic.

    A step generates one batch and has the critic judge it; then it updates the critic
    ``critic_steps`` times on that batch and on the real one, and the generator once, by the
    judgement that the batch was given. So a step costs one forward and one backward pass of the
    circuit, however many critic steps, and one exchange with a pool's workers, which judge what
    they have generated (``loss_and_gradient``).

    Args:
        generator: z -> samples, with a ``latent_dim``; z is drawn from the standard normal
            distribution, or, if its ``latent_distribution`` is ``truncated_normal``, from that
            one cut at two standard deviations. If it has ``with_norm`` (z -> samples and
            the norm of their states within the cutoff), the norm is logged as ``ket_norm``.
        critic: samples -> (batch, 1). In the training phase, where it has one (dropout, batch
            normalisation); then it judges in this process what a pool has generated.
        critic_steps: critic updates in a step.
        loss: ``"wasserstein"``: means of the critic's values (Arjovsky et al., 2017);
            ``"non-saturating"``: the values are logits of being real (Goodfellow et al., 2014).
        penalty: weight of the gradient penalty on the critic (Gulrajani et al., 2017): the mean of
            (|critic's gradient| - 1)^2 on random points between real and generated samples. It
            takes a second derivative of the critic, not of the generator.
        norm_penalty: weight of the mean of 1 - norm, the weight of a state beyond the cutoff. Of
            its square, which falls off before the states are inside, ten times as much holds less.
        seed: of latent draws.
    """

    def __init__(
        self,
        generator: Any,
        critic: Any,
        *,
        critic_steps: int = 5,
        loss: str = "wasserstein",
        penalty: float = 1.0,
        norm_penalty: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name="quantum_gan")
        if loss not in LOSSES:
            raise ConfigurationError(f"unknown loss {loss!r}: {nearest(str(loss), LOSSES)}")
        for name, value in (("penalty", penalty), ("norm_penalty", norm_penalty)):
            if not value >= 0:
                raise ConfigurationError(f"{name} must be at least 0, not {value}")
        if norm_penalty and not hasattr(generator, "with_norm"):
            raise ConfigurationError(
                f"norm_penalty={norm_penalty} needs a generator that tells the norm of its states: "
                f"{type(generator).__name__} has no with_norm(z) -> (samples, norms)"
            )
        sampling.check(generator)
        self.generator = generator
        self.critic = critic
        self._phases = _has_phases(critic)
        self.critic_steps = critic_steps
        self.loss_kind = loss
        self.penalty = penalty
        self.norm_penalty = norm_penalty
        told = hasattr(generator, "with_norm")
        self._method = "with_norm" if told else "__call__"
        self._loss = _loss_of_samples(
            self._critic if self._phases else critic, loss, norm_penalty, told
        )
        self._draws = keras.random.SeedGenerator(seed)
        #: The generator's weights and their averages, while it has the averages.
        self._aside: tuple[list[Any], list[Any]] | None = None
        self.built = True

    def compile(  # type: ignore[override]
        self, generator_optimizer: Any, critic_optimizer: Any, *, run_eagerly: bool = False
    ) -> None:
        """``run_eagerly`` for a generator that TensorFlow cannot trace (stock SF in place).

        Where XLA compiles the generator (``strategy="cpu_batch"``, once it has been called), the
        whole step is one program of XLA's. No pool can be a part of one: then what is done between
        its calls is compiled by itself.
        """
        pooled = [m for m in (self.generator, self.critic) if isinstance(m, ParallelGenerator)]
        whole = all(model._qpool.executor().within_xla for model in pooled)
        compiled = (whole and not run_eagerly) if pooled else "auto"
        super().compile(run_eagerly=run_eagerly, jit_compile=compiled)
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        optimizers = generator_optimizer, critic_optimizer
        if not self.critic.trainable_variables:
            raise ConfigurationError(
                "the critic has no variables yet: give it a keras.Input((width,)), or call it once"
            )
        generator_optimizer.build(self.generator.trainable_variables)
        critic_optimizer.build(self.critic.trainable_variables)
        sure = _is_plain(self.critic) and all(map(_is_of_keras, optimizers))
        self._learn = Part(self._updates, sure=sure)

    def call(self, z: Any) -> Any:
        return self.generator(z)

    @property
    def has_averages(self) -> bool:
        """Whether the generator has the averages of its weights in their place."""
        return self._aside is not None

    def take_averages(self) -> None:
        """Give the generator the moving averages of its weights, which its optimizer keeps with
        ``use_ema=True``. Without, and before the first step, nothing is done.

        The weights themselves are kept for ``take_weights``.
        """
        optimizer = self.generator_optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # a LossScaleOptimizer's
        if self._aside is None and optimizer.use_ema and int(optimizer.iterations):
            variables = self.generator.trainable_variables
            weights = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
            try:
                optimizer.finalize_variable_values(variables)
            except BaseException:
                self._assign(weights)
                raise
            averages = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
            self._aside = (weights, averages)

    def take_weights(self) -> None:
        """Give the generator the weights again that training goes on with, if it has averages: not
        if anyone has given it others since."""
        if self._aside is not None:
            (weights, averages), self._aside = self._aside, None
            now = map(keras.ops.convert_to_numpy, self.generator.trainable_variables)
            if all(a.tobytes() == b.tobytes() for a, b in zip(now, averages, strict=True)):
                self._assign(weights)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the generator has the averages."""
        already = self.has_averages
        self.take_averages()
        try:
            yield
        finally:
            if not already:
                self.take_weights()

    def _assign(self, values: list[Any]) -> None:
        for variable, value in zip(self.generator.trainable_variables, values, strict=True):
            variable.assign(value)

    def latent(self, batch: int) -> Any:
        """(batch, latent_dim) draws, normal, or as the generator's ``latent_distribution`` says."""
        draw = getattr(keras.random, sampling.distribution(self.generator))
        return draw((batch, self.generator.latent_dim), seed=self._draws)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, by name: weights, optimizers, draws."""
        parts = {
            "generator": _variables(self.generator),
            "critic": _variables(self.critic),
            "generator_optimizer": self.generator_optimizer.variables,
            "critic_optimizer": self.critic_optimizer.variables,
            "draws": [self._draws.state],
        }
        return {
            f"{part}/{number}": variable
            for part, variables in parts.items()
            for number, variable in enumerate(variables)
        }

    def save_own_variables(self, store: Any) -> None:
        """Of a generator or a critic that Keras does not know as a layer, too."""
        for name, variable in self._beside().items():
            store[name] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """See ``save_own_variables``."""
        variables = self._beside()
        if set(store.keys()) != set(variables):
            raise CheckpointError(
                f"the checkpoint is of another model: it has {sorted(store.keys())} beside Keras's "
                f"layers, and here there are {sorted(variables)}"
            )
        for name, variable in variables.items():
            variable.assign(store[name])

    def _beside(self) -> dict[str, Any]:
        parts = {"generator": self.generator, "critic": self.critic}
        return {
            f"{name}_{number}": variable
            for name, part in parts.items()
            if not isinstance(part, keras.layers.Layer)
            for number, variable in enumerate(_variables(part))
        }

    def train_step(self, real: Any) -> dict[str, Any]:
        if tf.executing_eagerly():
            return self._step(real)
        logs: dict[str, Any] = compile_cache.named_lastingly(self._step)(real)
        return logs

    def _step(self, real: Any) -> dict[str, Any]:
        batch = real.shape[0] or tf.shape(real)[0]  # known, workers compile for it at once
        outputs, loss, gradient = self._judged(self.latent(batch))
        fake, *norms = tf.nest.flatten(outputs)
        real = tf.cast(real, fake.dtype)
        shape = (self.critic_steps, batch, 1)
        shares = keras.random.uniform(shape, seed=self._draws) if self.penalty else tf.zeros(shape)
        shares = tf.cast(shares, fake.dtype)
        logs: dict[str, Any] = self._learn(real, fake, norms, shares, loss, gradient)
        return logs

    def _judged(self, z: Any) -> tuple[Any, Any, list[Any]]:
        """What the generator makes of ``z``, its mean loss with the critic as it is, and the
        gradient of that. A critic that goes by the training phase judges the batch as a whole,
        here: its draws and running means are of one process."""
        if isinstance(self.generator, ParallelGenerator) and not self._phases:
            step = self.generator.loss_and_gradient(z, self._loss, method=self._method)
            return step.outputs, step.loss, step.gradient
        variables = serialization.trainable_variables(self.generator)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            outputs = getattr(self.generator, self._method)(z)
            loss = tf.reduce_mean(self._loss(outputs))
        return outputs, loss, tape.gradient(loss, variables)

    def _updates(
        self,
        real: Any,
        fake: Any,
        norms: list[Any],
        shares: Any,
        loss: Any,
        gradient: list[Any],
    ) -> dict[str, Any]:
        """Both updates, and what is logged of the step."""
        critic_loss = self._update_critic(real, fake, shares)
        self.generator_optimizer.apply_gradients(
            zip(gradient, self.generator.trainable_variables, strict=True)
        )
        beyond = sum(1.0 - tf.reduce_mean(norm) for norm in norms)
        return {
            "generator_loss": loss - self.norm_penalty * beyond,
            "critic_loss": critic_loss,
            "gradient_norm": tf.linalg.global_norm(gradient),
            **({"ket_norm": 1.0 - beyond} if norms else {}),
        }

    def _update_critic(self, real: Any, fake: Any, shares: Any) -> Any:
        """A step for each of the ``shares``, which say where between a real and a generated sample
        the slope is looked at."""

        def step(number: Any, _: Any) -> tuple[Any, Any]:
            loss = self._critic_step(real, fake, shares[number])
            return number + 1, tf.cast(loss, tf.float32)

        # A loop: written out it takes three times as long to compile, and longer to run.
        count = self.critic_steps
        loop = tf.while_loop(
            lambda number, _: number < count, step, (0, 0.0), maximum_iterations=count
        )
        return loop[1]

    def _critic_step(self, real: Any, fake: Any, share: Any) -> Any:
        variables = serialization.trainable_variables(self.critic)
        with tf.GradientTape() as tape:
            on_fake, on_real = self._critic(fake), self._critic(real)
            if self.loss_kind == "wasserstein":
                loss = tf.reduce_mean(on_fake) - tf.reduce_mean(on_real)
            else:
                loss = -tf.reduce_mean(tf.math.log_sigmoid(on_real))
                loss -= tf.reduce_mean(tf.math.log_sigmoid(-on_fake))
            if self.penalty:
                slopes = self._gradient_penalty(real, fake, share)
                loss += self.penalty * tf.cast(slopes, loss.dtype)
        gradients = tape.gradient(loss, variables)
        self.critic_optimizer.apply_gradients(
            zip(gradients, self.critic.trainable_variables, strict=True)
        )
        return loss

    def _critic(self, samples: Any) -> Any:
        """In the training phase: dropout drops, running means run."""
        return self.critic(samples, training=True) if self._phases else self.critic(samples)

    def _gradient_penalty(self, real: Any, fake: Any, share: Any) -> Any:
        between = share * real + (1.0 - share) * fake
        with tf.GradientTape() as tape:
            tape.watch(between)
            on_between = self._critic(between)
        square = tf.reduce_sum(tape.gradient(on_between, between) ** 2, axis=-1)
        slope = tf.sqrt(tf.maximum(square, 1e-30))  # which has a derivative at 0
        return tf.reduce_mean((slope - 1.0) ** 2)


def _loss_of_samples(critic: Any, kind: str, norm_penalty: float, told: bool) -> Any:
    """The generator's loss for each sample, of what it returned; ``told`` if that has the norms.

    It is a function within one so that it goes to workers as it is, without this module."""

    def loss(outputs: Any) -> Any:
        value = critic(outputs[0] if told else outputs)
        losses = -(value if kind == "wasserstein" else tf.math.log_sigmoid(value))
        losses = tf.reduce_mean(tf.reshape(losses, [tf.shape(losses)[0], -1]), -1)
        return losses + norm_penalty * (1.0 - outputs[1]) if norm_penalty else losses

    return loss


def _variables(part: Any) -> list[Any]:
    """All of a model's, also of one that does not list them."""
    found = getattr(part, "variables", None)
    return list(found if found is not None else functions.variables(part))


def _has_phases(critic: Any) -> bool:
    """Whether the training phase is another one for it than any other."""
    if not isinstance(critic, keras.layers.Layer):
        call = getattr(critic, "__call__", critic)  # noqa: B004
        return "training" in inspect.signature(call).parameters
    return any(
        part._call_has_training_arg
        for part in critic._flatten_layers()
        if not isinstance(part, _OF_NO_PHASE)
    )


def default_critic(width: int, seed: int = 0, units: int = 32, layers: int = 2) -> keras.Model:
    """A classical critic of hidden ``layers`` of ``units`` each: (batch, width) -> (batch, 1)."""
    initial = [keras.initializers.GlorotUniform(seed=seed + n) for n in range(layers + 1)]
    hidden = [
        keras.layers.Dense(units, "leaky_relu", kernel_initializer=initial[n])
        for n in range(layers)
    ]
    last = keras.layers.Dense(1, kernel_initializer=initial[layers])
    return keras.Sequential([keras.Input((width,)), *hidden, last], name="critic")


def _is_plain(critic: Any) -> bool:
    """Whether it is made of dense layers alone, as the default one is."""
    known = (keras.layers.InputLayer, keras.layers.Dense)
    return isinstance(critic, keras.Sequential) and all(type(x) in known for x in critic.layers)


def _is_of_keras(thing: Any) -> bool:
    return type(thing).__module__.startswith("keras.")
