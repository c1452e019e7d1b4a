"""Compiled code that is found again: XLA's executables on disk, for the next worker or run.

TensorFlow writes and reads them, if it is told where (``workers.cache``); a worker's start then
takes the tracing alone. Owns by which names a program is found, that one process at a time compiles
it, and what is done where its file is damaged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers import collector
from workers.cache import Turn, clear, in_use

log = logging.getLogger("qpool")


def named_lastingly(
    function: Callable[..., Any], turn: Turn | None = None, program: str = ""
) -> Callable[..., Any]:
    """The function, to be traced, by names that are the same in the next process: of what is in it,
    and its own, which TensorFlow gives it when it ends. ``turn`` is taken then. ``program`` is what
    tells it from other functions of its name."""
    program += getattr(function, "__qualname__", "")

    def pooled(*args: Any) -> Any:
        from workers import names

        if in_use() is None:
            return function(*args)
        names.begin(repr((program, _shapes(args))))
        with collector.waiting(), names.unnumbered():
            found = function(*args)
        names.rounded()
        if turn is not None:
            turn.take(_what_is_traced())
        return found

    return pooled


def _what_is_traced() -> bytes:
    """What a program that has been traced is: its operations and the numbers in them."""
    import tensorflow as tf

    definition = tf.compat.v1.get_default_graph().as_graph_def()
    found: bytes = definition.SerializeToString(deterministic=True)
    return found


def _shapes(args: tuple[Any, ...]) -> list[tuple[str, str]]:
    import tensorflow as tf

    return [(str(x.shape), x.dtype.name) for x in tf.nest.flatten(args) if tf.is_tensor(x)]


def guarded(
    function: Callable[..., Any],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    program: str = "",
) -> Callable[..., Any]:
    """``function`` compiled by ``make``, by one process at a time. Where the files fail it, all of
    them are deleted, and it is made again, since what was made first remembers the failure."""
    place = in_use()
    if place is None:
        return make(function)
    turn = Turn(place)
    named = named_lastingly(function, turn, program)
    made = make(named)

    def in_turn(*args: Any) -> Any:
        done = False
        try:
            found = made(*args)
            done = True
            return found
        finally:
            turn.give(made=done)

    def call(*args: Any) -> Any:
        nonlocal made
        try:
            return in_turn(*args)
        except Exception as error:
            if not _due_to_files(error, place):
                raise
            log.warning("compiled code in %s is deleted and made anew: %s", place, error)
        clear(place)
        made = make(named)
        return in_turn(*args)

    return call


def _due_to_files(error: Exception, place: Path) -> bool:
    """Whether reading a file failed (it is torn), or writing one (the disk is full)."""
    import tensorflow as tf

    if isinstance(error, tf.errors.OutOfRangeError | tf.errors.DataLossError):
        return True
    return isinstance(error, tf.errors.OpError) and any(
        words in str(error) for words in ("cache key", "Failed to parse serialized", str(place))
    )
