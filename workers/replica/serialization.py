"""How objects that do not pickle are made again in a worker.

The coordinator's pickler (``qpool.shipping``) refers to these functions by name. Also owns what is
true of a model on both sides: which variables it has, in which order, and how each source of
random numbers is seeded.
"""

from __future__ import annotations

import collections
import contextlib
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.replica.places import as_it_is_now


@dataclass
class Shipped:
    """A model with everything a replica must know of it.

    ``variables`` are tf.Variables, in the order in which their values lie in the arena; gradients
    are taken for all of those that are real or complex, so that a layer may be frozen and thawed
    later. ``draws`` are the sources of random numbers that the model holds. ``settings`` are
    those of the coordinator's process that change what a model computes; ``constants`` are numbers
    and texts of the user's modules that it looks at, by module and name.
    """

    model: Any
    variables: list[Any]
    draws: list[Any]
    settings: dict[str, Any]
    constants: tuple[tuple[str, str, Any], ...] = ()

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The places of the variables that gradients are taken for."""
        return differentiable(self.variables, self.draws)


def differentiable(variables: list[Any], draws: list[Any]) -> tuple[int, ...]:
    """Places of the real and complex variables that no draw changes."""
    states = {id(variable) for source in draws for variable in state_variables(source)}
    return tuple(
        place
        for place, variable in enumerate(variables)
        if (variable.dtype.is_floating or variable.dtype.is_complex) and id(variable) not in states
    )


def settings() -> dict[str, Any]:
    """What is set for the whole process and changes what a model computes."""
    import keras

    found = {
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "dtype_policy": keras.config.dtype_policy().name,
    }
    if "strawberryfields" in sys.modules:
        found["hbar"] = sys.modules["strawberryfields"].hbar
    return found


def apply_settings(wanted: dict[str, Any]) -> None:
    """Set this process as the coordinator's is set."""
    import keras

    keras.config.set_floatx(wanted["floatx"])
    keras.config.set_epsilon(wanted["epsilon"])
    keras.config.set_dtype_policy(wanted["dtype_policy"])
    if "hbar" in wanted:
        import strawberryfields

        strawberryfields.hbar = wanted["hbar"]


def apply_constants(wanted: Iterable[tuple[str, str, Any]]) -> None:
    """Have this process's modules hold what the coordinator's did. In the coordinator's own process
    they do, and keep the very objects."""
    for module, name, value in wanted:
        here = sys.modules.get(module)
        if here is not None and as_it_is_now(getattr(here, name, None)) != as_it_is_now(value):
            setattr(here, name, value)


def as_tf_variable(variable: Any) -> Any:
    """A Keras variable's own tf.Variable; a tf.Variable is returned as it is."""
    import tensorflow as tf

    return variable if isinstance(variable, tf.Variable) else variable.value


def trainable_variables(model: Any) -> list[Any]:
    """The model's trainable variables as tf.Variables, each once, in the model's order; none of a
    model that does not say (a simulation)."""
    listed = getattr(model, "trainable_variables", ())
    return _unique(as_tf_variable(variable) for variable in listed)


def _unique(variables: Any) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def inspect(model: Any, wanted: dict[str, Any]) -> Shipped:
    """A model with its variables and draws, found in the same order in every process."""
    import keras
    import tensorflow as tf

    listed = [as_tf_variable(v) for v in getattr(model, "variables", ())]
    parts = list(walk(model))
    variables = [part for part in parts if isinstance(part, tf.Variable)]
    kinds = (
        np.random.Generator,
        np.random.RandomState,
        tf.random.Generator,
        keras.random.SeedGenerator,
    )
    draws = [part for part in parts if isinstance(part, kinds)]
    states = [variable for source in draws for variable in state_variables(source)]
    return Shipped(
        model, _unique([*trainable_variables(model), *listed, *variables, *states]), draws, wanted
    )


def walk(model: Any) -> Iterator[Any]:
    """Everything that attributes, lists, tuples, sets and dicts lead to, each once, in order."""
    seen: set[int] = set()
    ahead = collections.deque([model])
    while ahead:
        part = ahead.popleft()
        if id(part) in seen or isinstance(part, type | types.ModuleType):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            ahead.extend(part.values())
        elif isinstance(part, list | tuple):
            ahead.extend(part)
        elif not str(type(part).__module__).startswith(("tensorflow.", "numpy")):
            attributes = getattr(part, "__dict__", None)
            ahead.extend(attributes.values() if isinstance(attributes, dict) else ())


@contextlib.contextmanager
def attributes_kept(model: Any, others: Iterable[Any] = ()) -> Iterator[None]:
    """Have the attributes of a model's own objects, and what is in lists and dicts among them, and
    among ``others``, be the same after this as before: what is traced within may set them to
    tensors of a graph, which are of no use to anybody later, and a trace is no call that the model
    should know of."""
    libraries = ("tensorflow.", "keras.", "numpy", "strawberryfields.", "sympy.", "builtins")
    found: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = [
        (attributes, dict(attributes))
        for part in walk(model)
        if not f"{type(part).__module__}.".startswith(libraries)
        and isinstance(attributes := getattr(part, "__dict__", None), dict)
    ]
    others = list(others)
    for names in others:
        if isinstance(names, MutableMapping) and not isinstance(names, dict):
            found.append((names, dict(names)))
    containers: dict[int, tuple[Any, Any]] = {}
    for _, before in (*found, (None, dict(enumerate(others)))):
        _note_containers(before, containers)
    try:
        yield
    finally:
        for attributes, before in found:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            attributes.update(before)
        for container, content in containers.values():
            _put_back(container, content)


def _note_containers(parts: dict[Any, Any], found: dict[int, tuple[Any, Any]]) -> None:
    """Take what is in lists, dicts, sets and deques among the ``parts``, or in one another."""
    ahead = list(parts.values())
    while ahead:
        part = ahead.pop()
        if isinstance(part, list | dict | set | collections.deque) and id(part) not in found:
            found[id(part)] = part, dict(part) if isinstance(part, dict) else list(part)
            ahead += part.values() if isinstance(part, dict) else part


def _put_back(container: Any, content: Any) -> None:
    """Have a container hold what it held, where that is another thing now."""
    if isinstance(container, dict):
        items, before = ([*x.keys(), *x.values()] for x in (container, content))
    else:
        items, before = list(container), content
    if len(items) == len(before) and all(a is b for a, b in zip(items, before, strict=True)):
        return
    set_items(container, content)


def set_items(container: Any, content: Any) -> None:
    """Have a list, dict, set or deque hold this alone. One in which TensorFlow or Keras track what
    is set is told nothing: they compare, which a graph's tensors are not for."""
    storage = getattr(container, "_storage", None)
    if isinstance(storage, list):
        storage[:] = content
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), content)
    else:
        inner = getattr(container, "__wrapped__", container)
        inner.clear()
        (inner.extend if isinstance(inner, collections.deque) else inner.update)(content)
    if hasattr(container, "_update_snapshot"):
        container._update_snapshot()


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


def sf_parameter(name: str, bound: Any, default: Any) -> Any:
    """A free parameter of Strawberry Fields', and a number that it was bound to."""
    from strawberryfields.parameters import FreeParameter

    parameter = FreeParameter(name)
    for attribute, value in (("val", bound), ("default", default)):
        if value is not None or not hasattr(parameter, attribute):
            setattr(parameter, attribute, value)
    return parameter


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


def where_it_stands(source: Any) -> bytes:
    """What drawing from a source of random numbers changes."""
    if isinstance(source, np.random.Generator):
        return pickle.dumps(source.bit_generator.state)
    if isinstance(source, np.random.RandomState):
        return pickle.dumps(source.get_state(legacy=False))
    state: bytes = as_tf_variable(source.state).numpy().tobytes()
    return state


def state_variables(source: Any) -> list[Any]:
    """The tf.Variables that drawing from ``source`` changes."""
    state = getattr(source, "state", None)
    if state is None or isinstance(source, np.random.Generator):
        return []
    return [as_tf_variable(state)]
