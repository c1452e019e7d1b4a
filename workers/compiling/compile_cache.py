"""Compiled code that is found again: XLA's executables on disk, for the next worker or run.

TensorFlow writes and reads them, if it is told where (``workers.cache``); a worker's start then
takes the tracing alone. Owns by which names a program is found, that one process at a time compiles
it, and what is done where its file is damaged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workers import collector
from workers.cache import Turn, clear, in_use

log = logging.getLogger("qpool")


def named_lastingly(function: Callable[..., Any], program: str = "") -> Callable[..., Any]:
    """The function, to be traced, by names that are the same in the next process: of what is in it,
    and its own, which TensorFlow gives it when it ends. ``program`` is what tells it from other
    functions of its name."""
    program += getattr(function, "__qualname__", "")

    def pooled(*args: Any) -> Any:
        from workers import names

        if in_use() is None:
            return function(*args)
        names.begin(repr((program, _shapes(args))))
        with collector.waiting(), names.unnumbered():
            found = function(*args)
        names.rounded()
        return found

    return pooled


def _shapes(args: tuple[Any, ...]) -> list[tuple[str, str]]:
    import tensorflow as tf

    return [(str(x.shape), x.dtype.name) for x in tf.nest.flatten(args) if tf.is_tensor(x)]


@contextlib.contextmanager
def turn(definition: bytes) -> Iterator[None]:
    """Within, this process alone compiles what is defined so."""
    place = in_use()
    if place is None:
        yield
        return
    taken, done = Turn(place), False
    taken.take(definition)
    try:
        yield
        done = True
    finally:
        taken.give(made=done)


class Guarded:
    """The function that ``make`` makes, to be compiled. Where the files fail it, all of them are
    deleted, and it is made again, since what was made first, of which all is to be forgotten,
    remembers the failure."""

    def __init__(self, make: Callable[[], Any], forget: Callable[[], Any]) -> None:
        self._make, self._forget = make, forget
        self._place = in_use()
        self._made = make()

    def __call__(self, *args: Any) -> Any:
        if self._place is None:
            return self._made(*args)
        try:
            return self._made(*args)
        except Exception as error:
            if not _due_to_files(error, self._place):
                raise
            log.warning("compiled code in %s is deleted and made anew: %s", self._place, error)
        clear(self._place)
        self._forget()
        self._made = self._make()
        return self._made(*args)

    @property
    def made(self) -> Any:
        """What is called, for now."""
        return self._made


def _due_to_files(error: Exception, place: Path) -> bool:
    """Whether reading a file failed (it is torn), or writing one (the disk is full)."""
    import tensorflow as tf

    if isinstance(error, tf.errors.OutOfRangeError | tf.errors.DataLossError):
        return True
    return isinstance(error, tf.errors.OpError) and any(
        words in str(error) for words in ("cache key", "Failed to parse serialized", str(place))
    )
