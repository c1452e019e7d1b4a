"""What TensorFlow's tapes are doing, which its public names do not tell.

Owns those private names. Where a TensorFlow has moved one, the answer is the careful one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from tensorflow.python.eager import record as _record
    from tensorflow.python.eager import tape as _tape
except ImportError:  # pragma: no cover - a TensorFlow that has moved them
    _record = _tape = None


def recording() -> bool:
    """Whether any tape could be listening: without one, a call is spared the bookkeeping."""
    return bool(getattr(_record, "could_possibly_record", lambda: True)())


def watched(tensors: Sequence[Any], *, otherwise: bool = True) -> bool:
    """Whether a tape is watching any of these tensors, or what it was made of."""
    ask = getattr(_record, "should_record_backprop", lambda _: otherwise)
    return bool(ask(list(tensors)))


def record_reads(variables: Sequence[Any], values: Sequence[Any]) -> bool:
    """Have tapes know ``values`` as what was read of these variables; False if they cannot be told.

    As an operation each: to a gradient, one that nothing depends on has to stay one without.
    """
    tell = getattr(_record, "record_operation", None)
    accessed = getattr(_tape, "variable_accessed", None)
    if tell is None or accessed is None:
        return False
    for variable, value in zip(variables, values, strict=True):
        if variable.trainable:
            accessed(variable)
        tell("ReadVariableOp", [value], [variable.handle], lambda cotangent: [cotangent])
    return True
