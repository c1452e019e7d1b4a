"""A loop over what is kept in stacks, with a gradient: compiled once, however often it turns.

    rows --> [ gather rows, act with the turn's matrix ] for each place of the turn --> rows

Owns the loop and its vjp, which keeps the gathered rows of each turn. Knows nothing of circuits.
Higher derivatives are those of the same steps written out. TensorFlow is to make none of its own:
what goes into a loop, and what comes out, has no gradient but the one that is given here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from workers import names, tensors
from workers.custom_gradient import custom_gradient
from workers.tensors import permuted

#: Numbers of a row that are moved at once.
VECTOR = 8


@dataclass(frozen=True, eq=False)
class Place:
    """One place of the turn.

    Attributes:
        act: (rows, matrix) -> rows.
        index: (turns, rows) int, which rows it takes, a permutation each turn.
        stack: which of the stacks its matrices are in.
        matrices: (turns,) int, where in that stack.
    """

    act: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    index: np.ndarray
    stack: int
    matrices: np.ndarray


def scan(places: Sequence[Place], rows: tf.Tensor, stacks: Sequence[tf.Tensor]) -> tf.Tensor:
    """Apply the places, turn after turn, to ``rows`` of shape (rows, columns), known in full."""

    @custom_gradient
    def scanned(rows: tf.Tensor, *stacks: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        found, kept = _forward(places, rows, stacks)

        def pull_back(cotangent: tf.Tensor) -> Any:
            return _vjp(places, rows, stacks, kept, cotangent)

        return found, pull_back

    found: tf.Tensor = scanned(rows, *stacks)
    return found


def _vjp(
    places: Sequence[Place],
    rows: tf.Tensor,
    stacks: Sequence[tf.Tensor],
    kept: tf.Tensor,
    cotangent: tf.Tensor,
) -> Any:
    @custom_gradient
    def vjp(cotangent: tf.Tensor, rows: tf.Tensor, *stacks: tf.Tensor) -> Any:
        def pull_back(*tangents: tf.Tensor) -> Any:
            given = [rows, *stacks]

            def once(cotangent: tf.Tensor, *given: tf.Tensor) -> list[tf.Tensor]:
                return tensors.vjp(lambda r, *s: _written_out(places, r, s), given, [cotangent])

            return tensors.vjp(once, [cotangent, *given], tangents)

        return _backward(places, kept, stacks, cotangent), pull_back

    # Rows and stacks may be another graph's, to which a further backward pass has no access.
    return vjp(cotangent, tf.identity(rows), *map(tf.identity, stacks))


def _written_out(
    places: Sequence[Place], rows: tf.Tensor, stacks: Sequence[tf.Tensor]
) -> tf.Tensor:
    for turn in range(len(places[0].index)):
        for place in places:
            matrix = stacks[place.stack][place.matrices[turn]]
            rows = place.act(permuted(rows, place.index[turn]), matrix)
    return rows


def _forward(
    places: Sequence[Place], rows: tf.Tensor, stacks: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """The rows at the end, and all that were acted on, in turn: (turns x places, rows, columns)."""
    rows, *stacks = map(tf.stop_gradient, (rows, *stacks))
    turns, each = len(places[0].index), len(places)
    indices = [_Table(place.index) for place in places]
    wheres = [_Table(place.matrices) for place in places]

    def turn(n: tf.Tensor, rows: tf.Tensor, kept: tf.TensorArray) -> tuple:
        for number, place in enumerate(places):
            rows = _gathered(rows, indices[number].at(n))
            kept = kept.write(n * each + number, rows)
            rows = place.act(rows, stacks[place.stack][wheres[number].at(n)])
        return n + 1, rows, kept

    kept = tf.TensorArray(rows.dtype, turns * each, element_shape=rows.shape)
    names.rounded()
    _, rows, kept = tf.while_loop(
        lambda n, *_: n < turns, turn, [tf.constant(0), rows, kept], maximum_iterations=turns
    )
    return tf.stop_gradient(rows), tf.stop_gradient(kept.stack())


def _backward(
    places: Sequence[Place],
    kept: tf.Tensor,
    stacks: Sequence[tf.Tensor],
    cotangent: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Cotangents of the rows at the beginning, and of the stacks."""
    cotangent, kept, *stacks = map(tf.stop_gradient, (cotangent, kept, *stacks))
    turns, each = len(places[0].index), len(places)
    inverses = [_Table(np.argsort(place.index, axis=-1)) for place in places]
    wheres = [_Table(place.matrices) for place in places]

    def turn(n: tf.Tensor, back: tf.Tensor, *gradients: tf.TensorArray) -> tuple:
        found = list(gradients)
        for number, place in reversed(list(enumerate(places))):
            where = wheres[number].at(n)
            rows, matrix = kept[n * each + number], stacks[place.stack][where]
            back, of_matrix = tensors.vjp(place.act, [rows, matrix], [back])
            found[place.stack] = found[place.stack].write(where, of_matrix)
            back = _gathered(back, inverses[number].at(n))
        return n - 1, back, *found

    arrays = [tf.TensorArray(x.dtype, x.shape[0], element_shape=x.shape[1:]) for x in stacks]
    names.rounded()
    _, back, *found = tf.while_loop(
        lambda n, *_: n >= 0,
        turn,
        [tf.constant(turns - 1), cotangent, *arrays],
        maximum_iterations=turns,
    )
    return tuple(map(tf.stop_gradient, (back, *(array.stack() for array in found))))


class _Table:
    """A constant for each turn; one, if it is the same for all."""

    def __init__(self, values: np.ndarray) -> None:
        self._values: np.ndarray = values.astype(np.int32)
        same = bool((values == values[:1]).all())
        self._held = None if same else tf.constant(self._values)

    def at(self, turn: tf.Tensor) -> Any:
        return self._values[0] if self._held is None else self._held[turn]


def _gathered(rows: tf.Tensor, index: Any) -> tf.Tensor:
    """``rows[index]``, moving a few numbers at once, as the machine's vectors do."""
    few = int(np.gcd(rows.shape[-1], VECTOR))
    found = tf.gather(tf.reshape(rows, [rows.shape[0], -1, few]), index)
    return tf.reshape(found, rows.shape)
