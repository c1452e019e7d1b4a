"""The tensors among the arguments of a call, which are the inputs of what is compiled for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from workers.exchange.protocol import Sharded

#: First arguments that are no batch, and no number that may be another one each time.
_CONSTANTS = (type(None), bool, int, str)


class Inputs:
    """The tensors among the arguments of a call, each to be told from a mark in its place.

    ``names`` are those of arguments that have a row a sample, beside the first one's; ``batched``:
    the first argument is a batch, and becomes a tensor if it is none.
    """

    def __init__(self, names: Sequence[str], batched: bool) -> None:
        self._names, self._batched = names, batched
        self.tensors: list[tf.Tensor] = []
        self.sharded: list[bool] = []

    def marked(self, value: Any, name: str, first: bool) -> Any:
        """An argument, ``first`` of all or of that ``name``, with marks for tensors in it."""
        shared = self._batched and (first or name in self._names)
        if first and isinstance(value, tf.Variable) and name not in self._names:
            shared = False  # weights
        if isinstance(value, list | tuple | dict):
            of_rows = shared and not any(
                isinstance(leaf, tf.Variable) for leaf in tf.nest.flatten(value)
            )
            return tf.nest.map_structure(
                lambda leaf: self._put(leaf, of_rows) if tf.is_tensor(leaf) else leaf, value
            )
        if first and self._batched and not (tf.is_tensor(value) or isinstance(value, _CONSTANTS)):
            value = tf.convert_to_tensor(value)
        return self._put(value, shared) if tf.is_tensor(value) else value

    def _put(self, value: Any, shared: bool) -> Sharded:
        self.tensors.append(tf.convert_to_tensor(value))
        self.sharded.append(shared and self.tensors[-1].shape.rank != 0)
        return Sharded(len(self.tensors) - 1)
