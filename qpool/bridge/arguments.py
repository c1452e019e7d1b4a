"""What a pooled call was given: which arguments are sharded, and which go along as constants.

Owns the check of both before anything is sent. Knows neither the pool nor gradients: what gradients
may be asked for, and is no batch, is a weight of the call (``weighted``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.shipping import dumps
from workers.errors import InputError
from workers.exchange.protocol import Sharded, filled, stands_for
from workers.replica import classes
from workers.replica.with_weights import Given


class Arguments:
    """The arguments of a model's pooled methods; ``sharded`` names those beside the first."""

    def __init__(self, model: Any, sharded: Sequence[str]) -> None:
        self._model = model
        self._sharded = frozenset(sharded)
        self._signatures: dict[str, tuple[str, ...]] = {}

    def split(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bytes, list[Any], tuple[bool, ...]]:
        """Pickled arguments with markers for the inputs, the inputs, and which are tensors."""
        if len(args) == 1 and not kwargs and not isinstance(args[0], list | tuple | dict):
            only = _as_input(args[0], "the first argument")
            return _marks(1), [only], (not isinstance(only, np.ndarray),)
        names = self._names(method)
        inputs: list[Any] = []

        def mark(name: str, value: Any, first: bool) -> Any:
            shared = (first or name in self._sharded) and not stands_for(value, Given)
            if not shared or value is None:
                return value
            return _each(value, put, name)

        def put(value: Any, name: str) -> Sharded:
            inputs.append(_as_input(value, name))
            return Sharded(len(inputs) - 1)

        positional = tuple(
            mark(names[n] if n < len(names) else f"argument {n}", value, n == 0)
            for n, value in enumerate(args)
        )
        first_name = names[0] if names and not args else None
        keyword = {name: mark(name, value, name == first_name) for name, value in kwargs.items()}
        if not inputs:
            raise InputError(
                f"{method} was called without its first argument: expected an array with a "
                "leading batch axis"
            )
        return (
            dumps((positional, keyword), "the arguments"),
            inputs,
            tuple(not isinstance(x, np.ndarray) for x in inputs),
        )

    def all_sharded(self, values: Sequence[Any]) -> tuple[bytes, list[Any], tuple[bool, ...]]:
        """What ``split`` gives, for positional arguments that are all sharded."""
        inputs = [_as_input(value, f"argument {n}") for n, value in enumerate(values)]
        as_tensor = tuple(not isinstance(x, np.ndarray) for x in inputs)
        return _marks(len(inputs)), inputs, as_tensor

    def joined(
        self, arguments: bytes, as_tensor: Sequence[bool], inputs: Sequence[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``split`` was given, with these inputs."""
        args, kwargs = classes.loads(arguments)
        given = [
            x if tensor else tf.get_static_value(x)
            for x, tensor in zip(inputs, as_tensor, strict=True)
        ]

        found: tuple[tuple[Any, ...], dict[str, Any]] = filled((args, kwargs), given)
        return found

    def _names(self, method: str) -> tuple[str, ...]:
        if method not in self._signatures:
            self._signatures[method] = argument_names(self._model, method)
        return self._signatures[method]

    def check(self, method: str, arrays: Sequence[np.ndarray]) -> None:
        """InputError unless all inputs have one length, more than 0, and the model's width."""
        for array in arrays:
            check_array(array.shape, array.dtype)
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise InputError(
                "the sharded inputs differ in their leading (batch) axis: expected one length, "
                f"came {[array.shape for array in arrays]}"
            )
        if 0 in lengths:
            raise InputError("an empty batch: expected at least one row")
        if len(arrays) == 1:
            self.check_width(method, arrays[0].shape)

    def check_width(self, method: str, shape: tuple[int | None, ...]) -> None:
        """InputError if the model says its width and the first input has another one."""
        if method not in ("__call__", "generate"):
            return  # another method may take something else
        for name in ("latent_dim", "input_dim"):
            width = getattr(self._model, name, None)
            if isinstance(width, int) and not isinstance(width, bool):
                if len(shape) != 2 or shape[1] not in (width, None):
                    raise InputError(
                        f"expected (batch, {width}), as the model's {name} says; came {shape}"
                    )
                return


@functools.cache
def _marks(count: int) -> bytes:
    """Arguments that are all sharded inputs."""
    return dumps((tuple(map(Sharded, range(count))), {}), "the arguments")


#: What a call may be given that is no array.
_PLAIN = (type(None), bool, int, float, complex, str)


def are_plain(values: Sequence[Any]) -> bool:
    """Whether arguments are such values, the first one, and lists and dicts of them: no batch."""
    first = bool(values) and isinstance(values[0], _PLAIN)
    return first and all(isinstance(x, _PLAIN) for x in tf.nest.flatten(values))


def is_eager(x: Any) -> bool:
    """Whether it is an array, or a tensor that has a value already."""
    return isinstance(x, np.ndarray) or (isinstance(x, tf.Tensor) and hasattr(x, "numpy"))


def _each(value: Any, put: Callable[[Any, str], Sharded], name: str) -> Any:
    """``put(value, name)``; of a list, tuple or dict of arrays, each of them."""
    if not _holds_arrays(value):
        return put(value, name)
    return tf.nest.map_structure(
        lambda x: None if x is None else put(x, f"a part of {name}"), value
    )


def _holds_arrays(value: Any) -> bool:
    """Whether it is a list, tuple or dict of some."""
    return isinstance(value, list | tuple | dict) and any(
        isinstance(part, tf.Tensor | np.ndarray) for part in tf.nest.flatten(value)
    )


def _as_input(value: Any, name: str) -> Any:
    """A sharded input: an ndarray stays one, all else becomes a tensor."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, tf.Tensor):
        return value
    if _holds_arrays(value):
        raise InputError(f"{name} is a {type(value).__name__} of arrays; expected one array")
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be an array of numbers with a leading batch axis; came "
            f"{type(value).__name__}: {error}"
        ) from error


def check_array(shape: tuple[int | None, ...], dtype: np.dtype) -> None:
    """InputError unless these are numbers with a batch axis."""
    if len(shape) == 0:
        raise InputError("expected an array with a leading batch axis; came a scalar (rank 0)")
    if dtype.kind not in "fciub":
        raise InputError(f"expected numbers; came dtype {dtype}")


def argument_names(model: Any, method: str) -> tuple[str, ...]:
    """Names of a pooled method's arguments, in order; none where Python cannot tell.

    A Keras model's ``__call__`` takes anything: what it takes in truth is said by ``call``.
    """
    name = "call" if method == "__call__" and hasattr(model, "call") else method
    try:
        return tuple(inspect.signature(getattr(model, name)).parameters)
    except (TypeError, ValueError):
        return ()
