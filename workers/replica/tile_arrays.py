"""A tile's arrays: its rows out of the arena, filled up to the shape that is computed.

Owns which rows and what fills the missing ones; a sum over the filled rows adds nothing to any
gradient, since their cotangents are zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.exchange.protocol import Frame, Plan
from workers.layout import Buffer, Placed
from workers.tensors import differentiable, tensor_of


def seeds(plan: Plan, rows: int, cotangents: Sequence[np.ndarray | None]) -> list[tf.Tensor]:
    """A cotangent for each real or complex output: zeros where none is given."""
    return [
        tensor_of(np.zeros((rows, *spec.shape), spec.dtype) if given is None else given)
        for spec, given in zip(plan.outputs, cotangents, strict=True)
        if np.dtype(spec.dtype).kind in "fc"
    ]


def by_source(found: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Gradients for each input, then each variable, from those of the differentiable ones."""
    dense = iter([None if g is None else tf.convert_to_tensor(g) for g in found])
    of_inputs = [next(dense) if differentiable(x) else None for x in inputs]
    return [*of_inputs, *dense]


def asked(inputs: Sequence[Any], wanted: Collection[int] | None) -> list[Any]:
    """The inputs; for those that no gradient is wanted for, zeros, which nothing depends on."""
    return [
        tf.zeros_like(x) if differentiable(x) and wanted is not None and n not in wanted else x
        for n, x in enumerate(inputs)
    ]


def first(frame: Frame, rows: int, buffer: Buffer) -> list[np.ndarray]:
    """The frame's first rows."""
    return take(frame.inputs, 0, min(rows, frame.batch), rows, buffer)


def take(
    inputs: tuple[Placed, ...], start: int, stop: int, rows: int, buffer: Buffer
) -> list[np.ndarray]:
    return [pad(placed.view(buffer)[start:stop], rows, repeat=True) for placed in inputs]


def pad(array: np.ndarray, rows: int, *, repeat: bool) -> np.ndarray:
    """``rows`` rows: the last one repeated (inputs), or zeros (cotangents), where some lack."""
    missing = rows - len(array)
    if missing == 0:
        return array
    filler = array[-1:] if repeat else np.zeros_like(array[-1:])
    return np.concatenate([array, np.repeat(filler, missing, axis=0)])


def tangents(
    plan: Plan,
    frame: Frame,
    variables: int,
    start: int,
    stop: int,
    rows: int,
    buffer: Buffer,
) -> list[tf.Tensor | None]:
    """For each differentiable source the cotangent of its gradient; None for zeros.

    The sources are the real and complex inputs that are tensors, then so many ``variables``.
    """
    given = dict(frame.tangents)
    arrays: list[np.ndarray | None] = []
    for n, placed in enumerate(frame.inputs):
        if plan.as_tensor[n] and np.dtype(placed.spec.dtype).kind in "fc":
            part = given[n].view(buffer)[start:stop] if n in given else None
            arrays.append(None if part is None else pad(part, rows, repeat=False))
    for n in range(len(frame.inputs), len(frame.inputs) + variables):
        arrays.append(given[n].view(buffer) if n in given else None)
    return [None if array is None else tensor_of(array) for array in arrays]
