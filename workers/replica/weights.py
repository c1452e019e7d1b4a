"""A replica's variables, kept in step with the coordinator's.

For a compiled call they are laid over the arena: what the coordinator writes there is what the call
reads, and nothing has to be loaded. A call that runs eagerly may keep what it has read on a tape,
past the next version of it, and gets copies.

Owns where their values lie in the arena, which version of them is held, and that a call has left
them alone. Knows nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import tensorflow as tf

from workers.errors import InputError, StatefulCallError
from workers.layout import Buffer, Placed
from workers.tensors import shared, tensor_of


class Weights:
    """``variables``, of which those with an ``id`` in ``free`` may be changed by a call: the states
    of sources of random draws."""

    def __init__(self, variables: Sequence[tf.Variable], free: Collection[int]) -> None:
        self._variables = variables
        self._held = [n for n, v in enumerate(variables) if id(v) not in free]
        self._untrained = [n for n in self._held if not variables[n].trainable]
        self._places: tuple[Placed, ...] = ()
        self._version = 0
        #: Tensors over the arena, by variable, while those are what the variables have. That they
        #: are kept here has TensorFlow give a variable memory of its own before it writes there.
        self._over_arena: dict[int, tf.Tensor] = {}

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
        self.distrust()

    def load(self, version: int, buffer: Buffer, *, copies: bool = True) -> None:
        """Have the variables be of this version, which is the one in the arena.

        Without ``copies`` they are the arena's own memory, and of its next version too as soon as
        it is written.
        """
        if version == self._version and not (copies and self._over_arena):
            return
        if copies:
            self._over_arena.clear()
        elif not self._over_arena:
            self._lay_over(buffer)
        for n in range(len(self._variables)):
            if n not in self._over_arena:
                _assign(self._variables[n], tensor_of(self._places[n].view(buffer)))
        self._version = version

    def _lay_over(self, buffer: Buffer) -> None:
        """Give the variables the arena's memory: not those that a call may change, nor those of
        another device."""
        for n in self._held:
            variable = self._variables[n]
            here = "GPU" not in variable.device
            tensor = shared(self._places[n].view(buffer)) if here else None
            if tensor is not None:
                _assign(variable, tensor)
                self._over_arena[n] = tensor

    def distrust(self) -> None:
        """Load again before the next use, whatever the version."""
        self._version = 0
        self._over_arena.clear()

    def check_unchanged(self, buffer: Buffer, *, all_of_them: bool = False) -> None:
        """StatefulCallError if a call has changed a variable: one that is not trained, or, where
        ``all_of_them`` are looked at, any."""
        for n in self._held if all_of_them else self._untrained:
            variable, told = self._variables[n], self._places[n].view(buffer)
            if variable.numpy().tobytes() != told.tobytes():
                self.distrust()  # this replica's variables are no longer the model's
                raise StatefulCallError(
                    f"calling the model changed its variable {variable.name!r}, which the pool "
                    "cannot hand back (each worker would change its own). Call it with "
                    "training=False, keep that statistic out of the pooled call, or take "
                    "strategy='cpu_batch', which updates it"
                )


def _assign(variable: tf.Variable, tensor: tf.Tensor) -> None:
    """``variable.assign``, without what that asks and converts (29 us, this 3)."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tensor)
