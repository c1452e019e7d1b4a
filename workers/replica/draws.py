"""Random draws of a model that follow (seed, call, tile), wherever a tile is computed.

Owns seeding: of the model's own sources and of the global ones. Knows nothing of what is computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.compiling.streams import Stream
from workers.replica import serialization


class Draws:
    """The sources that a model draws from: ``sources`` of its own, and the process's.

    ``stream`` is what calls of the model have TensorFlow's global generator be, or None.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[Any],
        *,
        stream: Stream | None = None,
        alone: bool = True,
    ) -> None:
        """``alone``: the process is the model's, so that its global sources may be set."""
        self.stream = stream
        self._seed = seed
        self._sources = sources
        self._alone = alone
        self._before: Any = None

    def stands(self) -> list[bytes]:
        """Where the model's own sources stand."""
        return list(map(serialization.where_it_stands, self._sources))

    def in_variables(self, before: list[bytes]) -> bool:
        """Whether each source of the model's own that was drawn from since it stood there stands in
        a variable: a compiled call reads that, and draws what it is seeded to."""
        return all(
            serialization.state_variables(source)
            for source, then, now in zip(self._sources, before, self.stands(), strict=True)
            if then != now
        )

    def seed(self, call: int, index: int, *, everywhere: bool = True) -> None:
        """Set every source to where it stands at the beginning of this tile of this call.

        Without ``everywhere`` the model's own alone: TensorFlow forgets all its kernels and
        functions when its global source is set, which a compiled call never draws from.
        """
        seed = self._of_tile(call, index)
        if not self._alone:
            self._before = global_states()
        elif everywhere:
            tf.random.set_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - the model may draw from NumPy's global source
            random.seed(seed)
        for source in self._sources:
            serialization.reseed(source, seed)
        if self.stream is not None:
            self.stream.seed(seed)

    def drawn_globally_since(self, call: int, index: int) -> bool:
        """Whether anything was drawn from a global source since ``seed(call, index)``, other than
        by way of the stream.

        TensorFlow's is not seen in a process that is not the model's alone.
        """
        if not self._alone:
            return global_states() != self._before
        seed = self._of_tile(call, index)
        untouched = np.random.RandomState(seed).get_state(legacy=False)["state"]
        now = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        if untouched["pos"] != now["pos"] or (untouched["key"] != now["key"]).any():
            return True
        if random.getstate() != random.Random(seed).getstate():
            return True
        # TensorFlow numbers its random operations: the next number says how many there were.
        number = tf.compat.v1.get_seed(None)
        tf.random.set_seed(seed)
        for _ in range(self.stream.taken if self.stream is not None else 0):
            tf.compat.v1.get_seed(None)
        return number != tf.compat.v1.get_seed(None)

    def _of_tile(self, call: int, index: int) -> int:
        sequence = np.random.SeedSequence([self._seed, call, index])
        return int(sequence.generate_state(1)[0]) & 0x7FFFFFFF


def global_states() -> tuple[Any, ...]:
    """Where the sources of random numbers that any code may draw from stand; not TensorFlow's."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    return state["state"]["pos"], state["state"]["key"].tobytes(), random.getstate()
