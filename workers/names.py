"""TensorFlow's names of what a trace makes, the same in every process that traces the same.

Functions, loops and tensors are named by a counter of all that a process has made, and compiled
code is found on disk by the names in it. When a program is traced, the counter is set to where it
is in every process for that program, whatever was made before. Owns the counter.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator

from tensorflow.python.framework import ops

#: Numbers for each program: more than any trace takes.
_ROOM = 1 << 24

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
        # TensorFlow's own count never comes this far, and none of these leaves 63 bits.
        place = 1 + int(told.hexdigest()[:9], 16)
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


def rounded() -> None:
    """Where a function is traced, or ends, and before a loop in it: what is made from here on is
    numbered as in another process, although one that has worked before makes a thing or two less.
    """
    while ops.uid() % 1024:
        pass
