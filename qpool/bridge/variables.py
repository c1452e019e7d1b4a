"""A model's variables as arrays and tensors: as what a tape of the caller's knows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from qpool.bridge import tapes
from workers.variables import Reader


class TapedReader:
    """Reads ``variables``, in their order, as they are when it is called."""

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self._variables = variables
        self._read = Reader(variables)

    def __call__(self) -> list[np.ndarray]:
        """The values as arrays, which no tape has to see."""
        return [np.asarray(x) for x in self._read()]

    def tensors(self) -> list[tf.Tensor]:
        """The values as tensors. Tapes that are recording see each variable read."""
        values = self._read()
        if not tapes.recording() or tapes.record_reads(self._variables, values):
            return values
        return [v.value() for v in self._variables]
