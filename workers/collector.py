"""Python's cyclic collector, in programs that are ours from the start, and while we trace.

TensorFlow, Keras and Strawberry Fields make 400,000 objects while they load, and all of them stay.
Left as it is, the collector looks through them again and again: importing takes a third longer, a
model is traced slower, and the interpreter looks once more, for a second and a half, as it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

#: New objects before the youngest are looked through; how often that is before the next older are.
_SELDOM = (10_000, 10, 100)


def relax() -> None:
    """Have it look at what is old seldom, and not at all at the end of this process."""
    gc.set_threshold(*_SELDOM)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """It looks at nothing within: for tracing, which makes many objects, and keeps them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Imports within are not looked through, then or later; the collector then is as it was.

    In a process that is forked afterwards it does not touch, and so does not copy, their pages.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


class Gone:
    """Models that a process had: their graphs are cycles, of some ten megabytes each. The collector
    would find them late, so it is asked after every few."""

    _EVERY = 3

    def __init__(self) -> None:
        self._count = 0

    def one_more(self) -> None:
        """Another one is gone."""
        self._count += 1
        if self._count % self._EVERY == 0:
            gc.collect()
