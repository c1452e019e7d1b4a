"""The class of a pooled object: the model's own, with its methods computed elsewhere.

Owns which methods those are, how a call of one is handed on to the object's ``_qpool`` (what
``parallelize`` made for it), and what the object has beside the model's attributes.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from workers.errors import ConfigurationError, InputError, nearest


class LossAndGradient(NamedTuple):
    """``loss``: a scalar; ``gradient``: a tensor for each trainable variable, None for one that the
    loss does not depend on; ``outputs``: what the model returned."""

    loss: Any
    gradient: list[Any]
    outputs: Any


class ParallelGenerator:
    """What ``parallelize`` adds to a model. Made by it, never directly."""

    __slots__ = ()
    _qpool: Any
    #: The model's ``generate``, or its call where it has none; takes ``strategy=`` too.
    generate: Callable[..., Any]

    def warm_up(self, batch: Any) -> None:
        """Do ahead what the first call and its gradient would do: compile, size, allocate.

        ``batch`` is a batch of inputs, or a number of rows if the model says its ``latent_dim``
        (rows are then drawn from the standard normal distribution).
        """
        import numpy as np
        import tensorflow as tf

        from workers.replica import serialization
        from workers.tensors import leaves

        variables = serialization.trainable_variables(self._qpool.model)
        if isinstance(batch, int) and not isinstance(batch, bool):
            width = getattr(self._qpool.model, "latent_dim", None)
            if not isinstance(width, int):
                raise InputError(
                    "warm_up(rows) needs a model with a latent_dim; pass a batch of inputs instead"
                )
            if batch < 1:
                raise InputError(f"warm_up needs at least one row, not {batch}")
            draws = np.random.default_rng(0).standard_normal((batch, width))
            dtype = variables[0].dtype if variables else tf.float32
            batch = tf.constant(draws, tf.as_dtype(dtype).real_dtype)
        with tf.GradientTape() as tape:
            outputs = leaves(self.generate(batch))
        if variables:
            tape.gradient(outputs, variables)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        """The gradient of each sample: one (batch, *variable.shape) tensor per variable.

        ``cotangent`` has the structure and shapes of the outputs; sample n's outputs are
        contracted with its row n. Variables are in the order of ``trainable_variables``.

        Raises:
            InputError: z has no batch, or the cotangent other shapes; within a ``tf.function``.
        """
        return self._qpool.executor().per_sample_gradients(z, cotangent)

    def loss_and_gradient(
        self, z: Any, loss: Callable[..., Any], *data: Any, method: str | None = None
    ) -> LossAndGradient:
        """The mean of a loss over a batch, its gradient, and the outputs it is of: what a tape
        around the call gives, in one exchange with the workers in place of two.

            step = generator.loss_and_gradient(z, loss)
            optimizer.apply_gradients(zip(step.gradient, generator.trainable_variables))

        Args:
            z: (batch, ...), what the model is called with.
            loss: called with what the model returns for some rows, and with the same rows of
                ``data``; returns a real number for each of them, (rows,), which depends on
                nothing but its own row; further axes are averaged. Variables that it holds (a
                critic's) are kept in step. A function that is made anew with the same around it is
                the same; of arrays and containers that it holds the content is that of the first
                call. An object that can be called does too.
            data: further batches of as many rows, for the loss.
            method: the pooled method to call; default: the model's call, or its ``generate``.

        The gradient is that of the model's trainable variables, in their order; nothing is
        differentiated further. The same bits for any number of workers. A loss that cannot be
        computed by workers (it does not travel, or mixes samples) is computed here, in two
        exchanges: ``stats()["losses"]`` says why. ``cpu_batch`` and ``sequential`` do what a tape
        would.

        Raises:
            InputError: batches of other lengths; a loss that is not one number for each row.
            ConfigurationError: ``method`` is not pooled.
        """
        if method is None:
            method = "__call__" if callable(self._qpool.model) else "generate"
        if method not in self._qpool.methods:
            raise ConfigurationError(
                f"{method!r} is not pooled: {nearest(method, self._qpool.methods)}"
            )
        self._qpool.pooled_calls += 1
        executor = self._qpool.executor()
        outputs, losses, gradient = executor.loss_and_gradient(method, loss, (z, *data))
        self._qpool.called()
        return LossAndGradient(_mean(losses), gradient, outputs)

    def stats(self) -> dict[str, Any]:
        """What was measured: samples/s, CPU use of each worker, time by phase."""
        return self._qpool.stats()

    def __str__(self) -> str:
        """What computes it, and which method is compiled how far."""
        return self._qpool.summary()

    def close(self) -> None:
        """Free what the pooled call holds; the model itself stays as usable as it was."""
        self._qpool.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # A pool does not travel, nor is it stored: a copy is the model itself.
        return _unpooled, (self._qpool.model,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._qpool.model, memo)

    def __copy__(self) -> Any:
        return copy.copy(self._qpool.model)


def _mean(losses: Any) -> Any:
    """``tf.reduce_mean``, at a third of its cost where the rank is known."""
    import numpy as np
    import tensorflow as tf

    losses = tf.convert_to_tensor(losses)
    if losses.shape.rank is None:
        return tf.reduce_mean(losses)
    return tf.raw_ops.Mean(input=losses, axis=np.arange(losses.shape.rank, dtype=np.int32))


def _unpooled(model: Any) -> Any:
    return model


def _within_xla(pooled: Any) -> bool:
    handle = getattr(pooled, "_qpool", None)
    return handle is not None and not handle.closed and handle.executor().within_xla


@functools.cache
def pooled_class(cls: type, methods: tuple[str, ...]) -> type:
    """A subclass of ``cls`` with these methods pooled, by its name and module."""
    namespace: dict[str, Any] = {
        "__slots__": ("_qpool",),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    keras_class = any(base.__module__.startswith("keras.") for base in cls.__mro__)
    if "generate" not in methods:
        namespace["generate"] = _pooled_method("__call__", None, "generate")
    for name in methods:
        # Keras's own __call__ stays in charge (building, masks, scopes); it calls ``call``.
        target = "call" if name == "__call__" and keras_class else name
        namespace[target] = _pooled_method(name, getattr(cls, target, None), target)
    for name in _unpooled_methods(cls, methods):
        namespace[name] = _unpooled_method(name, getattr(cls, name))
    if keras_class:
        # XLA cannot hold the way to a pool; fit(jit_compile="auto") asks this.
        namespace["supports_jit"] = property(_within_xla, lambda self, value: None)
    subclass = type(cls)(cls.__name__, (ParallelGenerator, cls), namespace)
    if keras_class:
        _save_as(subclass, cls)
    return subclass


def _unpooled_methods(cls: type, pooled: Iterable[str]) -> Iterator[str]:
    """Public methods that the user wrote, and that no library knows by name and calls itself."""
    libraries = ("keras.", "tensorflow.", "builtins")
    theirs = [base for base in cls.__mro__ if f"{base.__module__}.".startswith(libraries)]
    for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base)):
        taken = name.startswith("_") or name in pooled or hasattr(ParallelGenerator, name)
        if taken or any(hasattr(base, name) for base in theirs):
            continue
        found = inspect.getattr_static(cls, name)
        generator = inspect.isgeneratorfunction(found) or inspect.iscoroutinefunction(found)
        if inspect.isfunction(found) and not generator:
            yield name


def _unpooled_method(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_qpool", None) is None:
            return original(self, *args, **kwargs)
        return self._qpool.unpooled(name, original.__get__(self), args, kwargs)

    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(method)


def _save_as(subclass: type, cls: type) -> None:
    """Have Keras save instances of ``subclass`` under the name by which it loads ``cls``."""
    import keras

    package, found, name = keras.saving.get_registered_name(cls).rpartition(">")
    if found:
        for registered in (subclass, cls):  # the last one is what the name loads
            keras.saving.register_keras_serializable(package, name)(registered)


def _pooled_method(name: str, original: Any, called: str) -> Callable[..., Any]:
    """The method ``called`` of a pooled object, computed as ``name`` of the model.

    It takes one argument more than the model's own: ``strategy``, for this call.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_qpool", None) is None:
            # Made by something that makes objects of our class (a clone): the model unpooled.
            return original(self, *args, **kwargs)
        strategy = kwargs.pop("strategy", None)
        self._qpool.pooled_calls += 1
        if called == "call" and "training" not in kwargs:
            # Keras hands the phase down by context where a call has no argument for it.
            phase = getattr(self._get_call_context(), "training", None)
            if phase is not None:
                kwargs["training"] = phase
        found = self._qpool.executor(strategy).call(name, args, kwargs)
        self._qpool.called()
        return found

    if inspect.isfunction(original):
        functools.update_wrapper(method, original)
    else:
        method.__name__ = called
    import tensorflow as tf

    # A user's tf.function would otherwise have AutoGraph rewrite the pool's code.
    return tf.autograph.experimental.do_not_convert(method)
