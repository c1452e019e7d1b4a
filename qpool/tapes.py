"""What TensorFlow's tapes are doing, which its public names do not tell.

Owns those two private names. Where a TensorFlow has moved one, the answer is the careful one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from tensorflow.python.eager import record as _record
except ImportError:  # pragma: no cover - a TensorFlow that has moved it
    _record = None


def recording() -> bool:
    """Whether any tape could be listening: without one, a call is spared the bookkeeping."""
    return bool(getattr(_record, "could_possibly_record", lambda: True)())


def watched(tensors: Sequence[Any], *, otherwise: bool = True) -> bool:
    """Whether a tape is watching any of these tensors, or what it was made of."""
    ask = getattr(_record, "should_record_backprop", lambda _: otherwise)
    return bool(ask(list(tensors)))
