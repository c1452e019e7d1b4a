"""Inputs of a pooled call in a graph, which have a shape and no value yet.

Owns what is known of them, and the batches that stand in for them when a plan is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qpool.bridge.arguments import check_array
from workers.errors import InputError
from workers.layout import ArraySpec
from workers.tensors import within_xla

#: Rows of the standard normal draws that stand in for a batch of unknown size when a graph is
#: traced; where the size is known they are as many, and what is compiled for them is used.
_TRACE_ROWS = 4


def specs(inputs: Sequence[Any]) -> list[ArraySpec]:
    """One row of each; InputError where that is not known, or where XLA is to compile the graph."""
    if within_xla():
        raise InputError(
            "a pooled call in a tf.function(jit_compile=True): XLA cannot hold the way to workers. "
            "Leave jit_compile out, or use strategy='cpu_batch', which becomes a part of your "
            "program"
        )
    found = []
    for x in inputs:
        shape, dtype = x.shape, np.dtype(getattr(x.dtype, "as_numpy_dtype", x.dtype))
        if shape.rank is None if isinstance(x, tf.Tensor) else False:
            raise InputError(
                "an input of unknown rank in a graph: expected (batch, ...); set its shape"
            )
        check_array(tuple(shape), dtype)
        tail = tuple(shape)[1:]
        if None in tail:
            raise InputError(
                f"an input of shape {tuple(shape)} in a graph: only the batch may be unknown"
            )
        found.append(ArraySpec(tail, dtype.str))
    return found


def stand_ins(
    inputs: Sequence[Any], specs: Sequence[ArraySpec], *, positive: bool
) -> list[np.ndarray]:
    """A batch of each to learn shapes from: standard normal draws, or their moduli for a model that
    takes only those; zeros for whole numbers."""
    sizes = {x.shape[0] for x in inputs}
    rows = (sizes.pop() if len(sizes) == 1 else None) or _TRACE_ROWS
    return [stand_in((rows, *spec.shape), spec.dtype, positive=positive) for spec in specs]


def stand_in(
    shape: Sequence[int], dtype: Any, *, positive: bool = False, seed: int = 0
) -> np.ndarray:
    """One of them."""
    kind = np.dtype(dtype)
    if kind.kind not in "fc":
        return np.zeros(shape, kind)
    draws = np.random.default_rng(seed).standard_normal(shape)
    return (np.abs(draws) if positive else draws).astype(kind)
