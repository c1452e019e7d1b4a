"""A replica's variables, kept in step with the coordinator's.

Owns where their values lie in the arena, which version of them is held, and that a call has left
them alone. Knows nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import tensorflow as tf

from workers.errors import InputError, StatefulCallError
from workers.layout import Placed


class Weights:
    """``variables``, of which those with an ``id`` in ``free`` may be changed by a call: the states
    of sources of random draws."""

    def __init__(self, variables: Sequence[tf.Variable], free: Collection[int]) -> None:
        self._variables = variables
        self._held = [n for n, v in enumerate(variables) if id(v) not in free]
        self._untrained = [n for n in self._held if not variables[n].trainable]
        self._places: tuple[Placed, ...] = ()
        self._version = 0

    def place(self, places: tuple[Placed, ...]) -> None:
        """Learn where the values lie."""
        expected = [(tuple(v.shape), v.dtype.as_numpy_dtype) for v in self._variables]
        told = [(p.spec.shape, np.dtype(p.spec.dtype).type) for p in places]
        if expected != told:
            raise InputError(
                "the replica's variables differ from the coordinator's: expected shapes and "
                f"dtypes {told}, came {expected}; a factory must make the same model every time"
            )
        self._places = places

    def load(self, version: int, buffer: memoryview) -> None:
        """Take over the values in the arena, if they are not the ones held already."""
        if version == self._version:
            return
        for variable, placed in zip(self._variables, self._places, strict=True):
            variable.assign(placed.view(buffer))
        self._version = version

    def distrust(self) -> None:
        """Load again before the next use, whatever the version."""
        self._version = 0

    def check_unchanged(self, buffer: memoryview, *, all_of_them: bool = False) -> None:
        """StatefulCallError if a call has changed a variable: one that is not trained, or, where
        ``all_of_them`` are looked at, any."""
        for n in self._held if all_of_them else self._untrained:
            variable, told = self._variables[n], self._places[n].view(buffer)
            if variable.numpy().tobytes() != told.tobytes():
                self.distrust()  # this replica's variables are no longer the model's
                raise StatefulCallError(
                    f"calling the model changed its variable {variable.name!r}, which the pool "
                    "cannot hand back (each worker would change its own). Call it with "
                    "training=False, or keep that statistic out of the pooled call"
                )
