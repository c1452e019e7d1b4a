"""What a call and a model are to ``auto``: their form, stand-ins to measure with, what is put back.

Owns what is asked of arguments and attributes; decides nothing.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.bridge import symbolic
from qpool.bridge.arguments import are_plain, is_eager
from workers.errors import InputError
from workers.replica import serialization
from workers.replica.kept import Before


def in_graph(values: list[Any]) -> bool:
    tensors = [x for x in values if tf.is_tensor(x)]
    return not tf.executing_eagerly() or not all(map(is_eager, tensors))


def rows_of(values: list[Any]) -> int:
    """The batch of a call; 64 where a graph does not know it, or nothing says it."""
    first: Any = values[0] if values else None
    if are_plain(values):
        return 1  # nothing to share out
    if isinstance(first, list | tuple | dict):
        leaves = tf.nest.flatten(first)
        if any(isinstance(leaf, tf.Variable) for leaf in leaves):
            return 1  # weights: it is computed at once
        first = next((leaf for leaf in leaves if tf.is_tensor(leaf)), first)
    shape = first.shape if hasattr(first, "shape") else np.shape([first])[1:]
    if isinstance(shape, tf.TensorShape) and (shape.rank is None or None in shape[1:]):
        raise InputError(
            f"an input of shape {shape} in a graph: expected (batch, ...), of which only the batch "
            "may be unknown; set its shape"
        )
    rows = shape[0] if len(shape) else None
    if rows == 0:
        raise InputError("a batch of no rows: expected at least one")
    return 64 if rows is None else int(rows)


def form_of(value: Any) -> str:
    """What an argument is, but for its rows and its values."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)[1:]}"
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__


@contextlib.contextmanager
def left_as_it_was(model: Any, method: str) -> Iterator[None]:
    """Put back what calls of a model's method change: its variables, the tensors that it and its
    parts hold, and where NumPy's and Python's global sources of random numbers stand."""
    shipped = serialization.inspect(model, {})
    variables = shipped.variables
    values = [variable.numpy() for variable in variables]
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    own = [draw for draw in shipped.draws if isinstance(draw, np.random.Generator)]
    places = [copy.deepcopy(draw.bit_generator.state) for draw in own]
    held = Before(model, method)
    try:
        yield
    finally:
        held.put_back()
        for variable, value in zip(variables, values, strict=True):
            if variable.numpy().tobytes() != value.tobytes():
                variable.assign(value)
        for draw, place in zip(own, places, strict=True):
            draw.bit_generator.state = place
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def stand_ins(values: Any, batch: int) -> Any:
    """Arguments with values: standard normal draws for symbolic tensors."""

    def value(x: Any) -> Any:
        if not tf.is_tensor(x) or is_eager(x):
            return x
        dtype = x.dtype.as_numpy_dtype
        return tf.constant(symbolic.stand_in([batch, *x.shape[1:]], dtype, positive=True))

    return tf.nest.map_structure(value, values)


def plain_attributes(model: Any) -> Iterator[str]:
    """Numbers and names that the model and its parts hold, engines' options among them."""
    for part in serialization.walk(model):
        options = getattr(part, "backend_options", None)
        found = dict(options) if isinstance(options, dict) else {}
        if part is model:
            found |= {name: v for name, v in vars(model).items() if not name.startswith("_")}
            found = {name: v for name, v in found.items() if name not in ("seed", "name")}
        for name, value in found.items():
            if isinstance(value, bool | int | float | str):
                yield f"{name}={value!r}"
