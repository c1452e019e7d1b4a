"""Gradients of operations that XLA has and that TensorFlow differentiates to, but not further.

In a program for XLA, the gradient of a slice is an XlaDynamicUpdateSlice, for which TensorFlow
(2.21) has none: a second derivative through ``tf.slice`` cannot be compiled.
"""

from __future__ import annotations

import contextlib

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_dynamic_update_slice


def _of_dynamic_update_slice(
    op: tf.Operation, cotangent: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, None]:
    """``output = input``, but ``update`` from ``indices`` on: each gets what it wrote."""
    _input, update, indices = op.inputs
    of_input = xla_dynamic_update_slice(cotangent, tf.zeros_like(update), indices)
    size = tf.shape(update, out_type=indices.dtype)
    return of_input, tf.slice(cotangent, indices, size), None


def register() -> None:
    """Have TensorFlow know them, unless it does."""
    with contextlib.suppress(KeyError):  # there is one
        tf.RegisterGradient("XlaDynamicUpdateSlice")(_of_dynamic_update_slice)
