"""A model's variables as arrays. Owns how they are read, which is most of what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from qpool import tapes

#: So many variables are read one by one in less time than all of them by one graph function
#: (55 us each; 210 us and 8 us each; an AMD EPYC, Zen 1, TensorFlow 2.21).
_FEW = 4


class Reader:
    """Reads ``variables``, in their order, as they are when it is called."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self._variables = variables

    def __call__(self) -> list[np.ndarray]:
        # A tape would have the function differentiated, which is of no use to anybody.
        together = len(self._variables) > _FEW and not tapes.recording()
        return [np.asarray(x) for x in (self._together() if together else self._one_by_one())]

    def _one_by_one(self) -> list[tf.Tensor]:
        read = tf.raw_ops.ReadVariableOp
        return [read(resource=v.handle, dtype=v.dtype) for v in self._variables]

    @functools.cached_property
    def _together(self) -> Callable[[], list[tf.Tensor]]:
        with tf.init_scope():
            return tf.function(self._one_by_one, autograph=False).get_concrete_function()
