"""How objects that do not pickle are made again in a worker.

The coordinator's pickler (``qpool.shipping``) refers to these functions by name. Also owns what is
true of a model on both sides: which variables it has, in which order, and how each source of
random numbers is seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Shipped:
    """A model with everything a replica must know of it.

    ``variables`` are tf.Variables, in the order in which their values lie in the arena;
    ``trainable`` are the places in it of those that gradients are taken for. ``draws`` are the
    sources of random numbers that the model holds.
    """

    model: Any
    variables: list[Any]
    trainable: tuple[int, ...]
    draws: list[Any] = field(default_factory=list)


def as_tf_variable(variable: Any) -> Any:
    """A Keras variable's own tf.Variable; a tf.Variable is returned as it is."""
    import tensorflow as tf

    return variable if isinstance(variable, tf.Variable) else variable.value


def trainable_variables(model: Any) -> list[Any]:
    """The model's trainable variables as tf.Variables, each once, in the model's order."""
    return _unique(as_tf_variable(variable) for variable in model.trainable_variables)


def all_variables(model: Any) -> list[Any]:
    """Trainable variables first, then every other one in ``model.variables``."""
    others = (as_tf_variable(variable) for variable in getattr(model, "variables", ()))
    return _unique([*trainable_variables(model), *others])


def _unique(variables: Any) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def from_factory(factory: Callable[[], Any]) -> Shipped:
    """Call the user's factory; the variables' order follows from the model it makes."""
    model = factory()
    return Shipped(model, all_variables(model), tuple(range(len(trainable_variables(model)))))


def new(cls: type) -> Any:
    """An instance without ``__init__``; its state follows. Keras layers are made this way."""
    return object.__new__(cls)


def set_state(instance: Any, state: dict[str, Any]) -> None:
    """Restore ``__dict__`` without the class's ``__setattr__`` (Keras tracks through it)."""
    instance.__dict__.update(state)


def new_collection(cls: type) -> Any:
    """An empty list, dict or set of a tracking subclass, without its ``__init__``."""
    base = next(base for base in (list, dict, set) if issubclass(cls, base))
    return base.__new__(cls)


def set_collection(instance: Any, state: tuple[dict[str, Any], Any]) -> None:
    """Fill a tracking collection through its plain base class, so that it tracks nothing anew."""
    attributes, items = state
    instance.__dict__.update(attributes)
    if isinstance(instance, list):
        list.extend(instance, items)
    elif isinstance(instance, dict):
        dict.update(instance, items)
    else:
        set.update(instance, items)


def itself(value: Any) -> Any:
    """What a transparent wrapper wraps."""
    return value


def tf_function(python_function: Callable, options: dict[str, Any]) -> Any:
    """A ``tf.function`` with nothing traced yet."""
    import tensorflow as tf

    return tf.function(python_function, **options)


def sf_engine(cls: type, backend: str, options: dict[str, Any]) -> Any:
    """A Strawberry Fields engine, from what it was made of."""
    return cls(backend, backend_options=options)


def tf_generator(state: Any, algorithm: int) -> Any:
    """A ``tf.random.Generator`` at a given state."""
    import tensorflow as tf

    return tf.random.Generator.from_state(state, algorithm)


def reseed(source: Any, seed: int) -> None:
    """Set one of the model's own sources of random numbers to a fixed point."""
    import tensorflow as tf

    if isinstance(source, np.random.Generator):
        source.bit_generator.state = type(source.bit_generator)(seed).state
    elif isinstance(source, np.random.RandomState):
        source.seed(seed)
    elif isinstance(source, tf.random.Generator):
        source.reset_from_seed(seed)
    else:  # keras.random.SeedGenerator: its state is two uint32, (seed, number of draws)
        as_tf_variable(source.state).assign(np.asarray([seed, 0], source.state.dtype))


def state_variables(source: Any) -> list[Any]:
    """The tf.Variables that drawing from ``source`` changes."""
    state = getattr(source, "state", None)
    if state is None or isinstance(source, np.random.Generator):
        return []
    return [as_tf_variable(state)]
