"""Python's cyclic collector, in programs that are ours from the start.

TensorFlow, Keras and Strawberry Fields make 400,000 objects while they load, and all of them stay.
Left as it is, the collector looks through them again and again: importing takes a third longer, a
model is traced slower, and the interpreter looks once more, for a second and a half, as it ends.
"""

from __future__ import annotations

import atexit
import gc

#: New objects before the youngest are looked through; how often that is before the next older are.
_THRESHOLDS = (100_000, 20, 100)


def relax() -> None:
    """Have it look seldom, and not at all at the end of this process."""
    gc.set_threshold(*_THRESHOLDS)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
