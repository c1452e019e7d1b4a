"""TensorFlow's names of what a trace makes, the same in every process that traces the same.

Functions, loops and tensors are named by a counter of all that a process has made, and compiled
code is found on disk by the names in it. When a program is traced, the counter is set to where it
is in every process for that program, whatever was made before. And Keras numbers the layers of a
class: the second model of a process, which computes what the first one did, has the first one's
names within a trace. Owns the counter, and what is cut off names.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

from tensorflow.python.framework import ops

from workers.context import during

#: Numbers for each program: more than any trace takes.
_ROOM = 1 << 24

#: Where the places begin: beyond TensorFlow's own count, and all numbers have 19 digits.
_FIRST = 10**18 // _ROOM + 1

#: What tells a layer's automatic name from that of the one before it.
_NUMBER = re.compile(r"(?<=.)_\d+$")

_unnumbered: ContextVar[bool] = ContextVar("unnumbered", default=False)

_lock = threading.Lock()
_numbers: Iterator[int] = iter(())
_traced: Counter[bytes] = Counter()
_taken: set[int] = set()


def begin(program: str) -> None:
    """Count from where ``program``, described, is counted from in every process.

    No place is used twice: a process that traces the same, or what is described alike, again, does
    so at another place, which is that of every process the second time.
    """
    global _numbers
    told = hashlib.sha256(program.encode())
    with _lock:
        _traced[told.digest()] += 1
        told.update(str(_traced[told.digest()]).encode())
        place = _FIRST + int(told.hexdigest()[:9], 16)  # none of these leaves 63 bits
        while place in _taken:
            place += 1
        _taken.add(place)
        _numbers = itertools.count(place * _ROOM)
        ops.uid = _next


@contextlib.contextmanager
def apart(program: str) -> Iterator[None]:
    """What is made within is counted as ``program`` is; then the count goes on from where it was:
    what is traced around it has the same names, whether this had to be traced or not."""
    global _numbers
    before = _numbers, ops.uid
    begin(program)
    try:
        yield
    finally:
        _numbers, ops.uid = before


def _next() -> int:
    return next(_numbers)


def unnumbered() -> AbstractContextManager[bool]:
    """Name scopes that are opened within have no number at their end. Where two get one name so,
    TensorFlow numbers them as they come in the trace."""
    return during(_unnumbered, True)


_name_scope = ops.Graph.name_scope


def _scope(graph: ops.Graph, name: str | None) -> AbstractContextManager[str]:
    if isinstance(name, str) and _unnumbered.get():
        name = _NUMBER.sub("", name)
    found: AbstractContextManager[str] = _name_scope(graph, name)
    return found


ops.Graph.name_scope = _scope


def rounded() -> None:
    """Where a function is traced, or ends, and before a loop in it: what is made from here on is
    numbered as in another process, although one that has worked before makes a thing or two less.
    """
    while ops.uid() % 1024:
        pass
