"""A model, made ready to travel.

Owns the pickler: cloudpickle, with a function for each kind of object that does not pickle but can
be made again (``workers.replica.serialization``). While it walks the object it notes every
tf.Variable and every source of random numbers, so that nothing a replica holds is missed, wherever
it hangs.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np

from workers.errors import ConfigurationError, ModelError, ShippingError
from workers.replica import functions, serialization, watched
from workers.replica.serialization import Shipped

#: What ``compile`` and ``fit`` hang on a Keras model. A replica is called, never fitted.
_TRAINING_STATE = (
    "optimizer",
    "train_function",
    "test_function",
    "predict_function",
    "history",
    "_loss_tracker",
    "_compile_metrics",
    "_compile_loss",
    "_compile_config",
    "_compiled_trainable_state",
    "_distribute_strategy",
    "_self_unconditional_checkpoint_dependencies",
    "_self_unconditional_dependency_names",
)


@dataclass(frozen=True)
class Shipment:
    """A model as bytes, and what the coordinator keeps of it.

    ``variables`` are in the order of the replica's, ``differentiable`` the places of those that
    gradients are taken for. ``rows`` is the batch size that the model's engines were built with,
    0 for any.
    """

    payload: bytes
    variables: list[Any]
    differentiable: tuple[int, ...]
    rows: int


def pack(model: Any, factory: Callable[[], Any] | None = None) -> Shipment:
    """Make a shipment of ``model``, or of the ``factory`` that made it."""
    settings = serialization.settings()
    if factory is not None:
        shipped = serialization.inspect(model, settings)
        sizes = {_engine_batch_size(part) for part in serialization.walk(model)} - {0}
        made = _FromFactory(factory, settings, watched.constants(model))
        payload = _dump(made, factory, "the factory")
    else:
        found = _Pickler(io.BytesIO())
        with functions.travelling(model):
            _guarded(lambda: found.dump(model), model, "the model")
            variables, draws = list(found.variables.values()), list(found.draws.values())
            constants = watched.constants(model)
            shipped = Shipped(model, variables, draws, settings, constants)
            sizes = found.batch_sizes
            payload = _dump(shipped, model, "the model")
    # A built Keras layer may well have none: one whose parameters are all inputs. So may what does
    # not say that it has any.
    expected = hasattr(model, "trainable_variables") and not getattr(model, "built", False)
    if expected and not shipped.differentiable:
        raise ModelError(
            f"{type(model).__name__} has no variables: expected at least one that is real or "
            "complex. A Keras "
            "model has none until it is built: call it once on a batch, or model.build(shape), "
            "before qpool.parallelize"
        )
    known = {id(variable) for variable in shipped.variables}
    wanted = serialization.trainable_variables(model)
    missing = [variable.name for variable in wanted if id(variable) not in known]
    if missing:
        raise ShippingError(
            f"trainable_variables lists {missing}, which the model's attributes do not lead to, "
            "so a replica would not have them. Keep variables in attributes of the model, or "
            "pass a factory: qpool.parallelize(lambda: Model(...))"
        )
    kinds = [(v.name, np.dtype(v.dtype.as_numpy_dtype).kind) for v in shipped.variables]
    unknown = [name for name, kind in kinds if kind not in "fciub"]
    if unknown:
        raise ShippingError(
            f"variables {unknown} have dtypes that the shared segment cannot hold: expected real, "
            "complex, integer or boolean ones that NumPy has"
        )
    return Shipment(payload, shipped.variables, shipped.differentiable, _batch_size(sizes))


def dumps(value: Any, what: str) -> bytes:
    """Pickle arguments of a call; ShippingError names what cannot be sent."""
    return _dump(value, value, what)


def _batch_size(sizes: set[int]) -> int:
    if len(sizes) > 1:
        raise ConfigurationError(
            f"the model holds engines built for different batch sizes {sorted(sizes)}; expected "
            "one, since a tile has one size. Build them with the same batch_size, or none"
        )
    return next(iter(sizes), 0)


def _engine_batch_size(value: Any) -> int:
    """The batch size that a Strawberry Fields engine was built with; 0 for anything else."""
    options = getattr(value, "backend_options", None)
    return int(options.get("batch_size") or 0) if isinstance(options, dict) else 0


def engines_batch_size(model: Any) -> int:
    """The one batch size that a model's engines were built with; 0 for any."""
    return _batch_size({_engine_batch_size(part) for part in serialization.walk(model)} - {0})


class _FromFactory:
    """Unpickles to what the factory makes, with its variables found there."""

    def __init__(
        self, factory: Callable[[], Any], settings: dict[str, Any], constants: Any
    ) -> None:
        self._factory = factory
        self._settings = settings
        self._constants = constants

    def __reduce__(self) -> tuple[Any, ...]:
        return functions.from_factory, (self._factory, self._settings, self._constants)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, and more; notes variables, random sources and batch sizes on its way."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.variables: dict[int, Any] = {}
        self.draws: dict[int, Any] = {}
        self.batch_sizes: set[int] = set()

    def reducer_override(self, value: Any) -> Any:
        for handle in (_reduce_tensorflow, _reduce_keras, _reduce_strawberryfields):
            reduced = handle(self, value)
            if reduced is not NotImplemented:
                return reduced
        if type(value).__name__ == "DynamicBackend" and type(value).__module__.startswith("keras."):
            # Keras's preprocessing layers hold one; it looks for its state to say that it has none.
            return type(value), (value._backend,)
        if isinstance(value, np.random.Generator | np.random.RandomState):
            self.draws[id(value)] = value
        return super().reducer_override(value)


def _reduce_tensorflow(pickler: _Pickler, value: Any) -> Any:
    import tensorflow as tf

    if isinstance(value, tf.Variable) and not isinstance(value, type):
        pickler.variables[id(value)] = value
        return NotImplemented
    if isinstance(value, tf.random.Generator):
        pickler.draws[id(value)] = value
        pickler.variables[id(value.state)] = value.state
        return serialization.tf_generator, (value.state, value.algorithm)
    if type(value) is _tf_function_type():
        options = {
            name: getattr(value, f"_{name}", None)
            for name in ("autograph", "jit_compile", "reduce_retracing")
        }
        given = {name: option for name, option in options.items() if option is not None}
        signature = getattr(value, "input_signature", None)
        if signature is not None:
            given["input_signature"] = signature
        return serialization.tf_function, (value.python_function, given)
    if type(value).__module__.startswith(("keras.", "tensorflow.")):
        if hasattr(type(value), "__wrapped__") and isinstance(value, dict | tuple):
            return serialization.itself, (value.__wrapped__,)  # type: ignore[union-attr]
        for base in (list, dict, set):
            if issubclass(type(value), base) and type(value) is not base:
                attributes = dict(getattr(value, "__dict__", {}))
                attributes.pop("_self_unconditional_checkpoint_dependencies", None)
                attributes.pop("_self_unconditional_dependency_names", None)
                state = (attributes, base(value))
                restore = serialization.set_collection
                return serialization.new_collection, (type(value),), state, None, None, restore
    return NotImplemented


def _reduce_keras(pickler: _Pickler, value: Any) -> Any:
    import keras

    if isinstance(value, type):
        return NotImplemented
    if isinstance(value, keras.random.SeedGenerator):
        pickler.draws[id(value)] = value
    if isinstance(value, keras.Optimizer):
        return serialization.itself, (None,)  # a replica is never fitted
    if isinstance(value, keras.Layer | keras.Metric | keras.Loss):
        # Keras itself would save and load a model by its configuration, which user classes
        # seldom have. Its objects are plain Python: their attributes are all they are.
        state = dict(vars(value))
        for name in _TRAINING_STATE:
            state.pop(name, None)
        if isinstance(value, keras.Model):
            state["compiled"] = False
            state["_compile_metrics"] = state["_loss_tracker"] = state["optimizer"] = None
        return serialization.new, (type(value),), state, None, None, serialization.set_state
    return NotImplemented


def _reduce_strawberryfields(pickler: _Pickler, value: Any) -> Any:
    import sys

    if "strawberryfields" not in sys.modules:
        return NotImplemented
    from strawberryfields.engine import LocalEngine
    from strawberryfields.parameters import FreeParameter, MeasuredParameter

    if isinstance(value, LocalEngine):
        options = dict(value.backend_options)
        pickler.batch_sizes |= {_engine_batch_size(value)} - {0}
        return serialization.sf_engine, (type(value), value.backend_name, options)
    if isinstance(value, MeasuredParameter):
        return MeasuredParameter, (value.regref,)
    if isinstance(value, FreeParameter):
        bound, default = (_plain(getattr(value, name, None)) for name in ("val", "default"))
        return serialization.sf_parameter, (value.name, bound, default)
    return NotImplemented


def _plain(value: Any) -> Any:
    """A number that a parameter is bound to; None for what the last run was given."""
    return value if isinstance(value, int | float | complex | np.generic | np.ndarray) else None


@functools.cache
def _tf_function_type() -> Any:
    """The class of what ``tf.function`` returns; it has no public name."""
    import tensorflow as tf

    return type(tf.function(lambda: None))


def _dump(value: Any, culprit: Any, what: str) -> bytes:
    file = io.BytesIO()
    _guarded(lambda: _Pickler(file).dump(value), culprit, what)
    return file.getvalue()


def _guarded(dump: Callable[[], Any], culprit: Any, what: str) -> None:
    try:
        dump()
    except Exception as error:
        path, guilty = _blame(culprit, what)
        raise ShippingError(
            f"{what} cannot be sent to another process: {path} ({type(guilty).__name__}) does "
            f"not pickle: {error}. Make it in the call, drop it, or pass a factory: "
            "qpool.parallelize(lambda: Model(...))"
        ) from error


def _blame(value: Any, path: str, depth: int = 4) -> tuple[str, Any]:
    """The deepest part of ``value`` that still does not pickle, and the way there."""
    for name, part in _parts(value):
        try:
            _Pickler(io.BytesIO()).dump(part)
        except Exception:
            return _blame(part, path + name, depth - 1) if depth else (path + name, part)
    return path, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    closure = getattr(value, "__closure__", None)
    if closure:
        names = value.__code__.co_freevars
        return [
            (f" (its variable {name!r})", cell.cell_contents)
            for name, cell in zip(names, closure, strict=True)
        ]
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]
