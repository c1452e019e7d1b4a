"""What TensorFlow's tapes are doing, which its public names do not tell.

Owns those private names. Where a TensorFlow has moved one, the answer is the careful one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

try:
    from tensorflow.python.eager import record as _record
except ImportError:  # pragma: no cover - a TensorFlow that has moved it
    _record = None
try:
    from tensorflow.python.eager import forwardprop_util as _forward
except ImportError:  # pragma: no cover - a TensorFlow that has moved it
    _forward = None


def recording() -> bool:
    """Whether any tape could be listening: without one, a call is spared the bookkeeping."""
    return bool(getattr(_record, "could_possibly_record", lambda: True)())


def watched(tensors: Sequence[Any], *, otherwise: bool = True) -> bool:
    """Whether a tape is watching any of these tensors, or what it was made of."""
    ask = getattr(_record, "should_record_backprop", lambda _: otherwise)
    return bool(ask(list(tensors)))


def forward_mode(tensors: Sequence[Any]) -> bool:
    """Whether a ``tf.autodiff.ForwardAccumulator`` carries tangents of any of these tensors."""
    if _forward is None:  # pragma: no cover
        return True
    return bool(_forward.pack_tangents(list(tensors)).tangents)


def pause() -> AbstractContextManager[Any]:
    """Within this no tape records; where that cannot be had, tapes do more than they need to."""
    stop = getattr(_record, "stop_recording", contextlib.nullcontext)
    found: AbstractContextManager[Any] = stop()
    return found


def value(variable: tf.Variable) -> np.ndarray:
    """The variable's value now. The bare read costs a third of what ``.numpy()`` does."""
    return np.asarray(tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype))
