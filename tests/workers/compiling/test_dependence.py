"""Which rows a graph keeps apart. Where it is not known, the answer is that it does not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from workers.compiling.dependence import rows_are_alone

ROWS = 3

APART = {
    "entry by entry": lambda z, c: tf.tanh(z) * c[0] + 2.0,
    "broadcast": lambda z, c: z + c[None, :2],
    "stacked": lambda z, c: tf.stack([z[0] * 2, z[1], z[2]]),
    "unstacked": lambda z, c: tf.stack([row[0] + c[1] for row in tf.unstack(z)]),
    "gathered": lambda z, c: tf.gather(z, [0, 1, 2]),
    "one gathered": lambda z, c: tf.stack([tf.gather(z, n) for n in range(ROWS)]),
    "product": lambda z, c: tf.matmul(z, tf.reshape(c, [2, 2])),
    "sum over columns": lambda z, c: tf.reduce_sum(z, axis=-1, keepdims=True) * z,
    "reshaped": lambda z, c: tf.reshape(z, [ROWS, 1, 2]),
    "turned behind the rows": lambda z, c: tf.transpose(z[:, None], [0, 2, 1]),
    "joined": lambda z, c: tf.concat([z, z[:, :1]], axis=1),
    "stacked numbers": lambda z, c: tf.stack([row[0] * row[1] for row in tf.unstack(z)], axis=-1),
    "joined rows": lambda z, c: tf.concat([tf.tanh(z[n : n + 1]) for n in range(ROWS)], 0),
    "split": lambda z, c: tf.concat([row + c[0] for row in tf.split(z, ROWS)], axis=0),
    "split unevenly": lambda z, c: tf.concat(tf.split(z, [1, ROWS - 1]), axis=0),
    "split behind the rows": lambda z, c: tf.concat(tf.split(z, 2, axis=1), axis=1),
    "taken by tf.slice": lambda z, c: tf.concat(
        [tf.slice(z, [n, 0], [1, -1]) for n in range(ROWS)], axis=0
    ),
    "written to an array": lambda z, c: written(z, range(ROWS)),
    "a sum of Einstein's": lambda z, c: tf.einsum("bi,ij->bj", z, tf.reshape(c, [2, 2])),
    "one with two of rows": lambda z, c: tf.einsum("bi,bj->bij", z, tf.tanh(z)),
    "one with a number": lambda z, c: tf.einsum("bi,->bi", z, c[0]),
    "a convolution": lambda z, c: tf.nn.conv2d(
        z[:, :, None, None], tf.reshape(c, [2, 2, 1, 1]), 1, "SAME"
    ),
    "the largest of a pool": lambda z, c: tf.nn.max_pool2d(z[:, :, None, None], 2, 1, "SAME"),
    "padded": lambda z, c: tf.pad(z, [[0, 0], [1, 2]]),
    "tiled": lambda z, c: tf.tile(z, [1, 2]),
    "as many as there are": lambda z, c: z + tf.cast(tf.size(tf.nn.relu(z)), tf.float32),
    "softmax": lambda z, c: tf.nn.softmax(z),
    "all of them": lambda z, c: z[0:ROWS],
}

MIXED = {
    "sum over rows": lambda z, c: z - tf.reduce_mean(z, axis=0),
    "sum of all": lambda z, c: z * tf.reduce_sum(z),
    "another order": lambda z, c: tf.reverse(z, [0]),
    "next row": lambda z, c: tf.stack([z[n] + 0.0 * z[(n + 1) % ROWS] for n in range(ROWS)]),
    "other places of a constant": lambda z, c: tf.stack([z[n] * c[n] for n in range(ROWS)]),
    "reshaped through": lambda z, c: tf.reshape(tf.reshape(z, [2, ROWS]), [ROWS, 2]),
    "turned": lambda z, c: tf.transpose(tf.transpose(z)[:, ::-1]),
    "product of rows": lambda z, c: tf.matmul(tf.matmul(z, z, transpose_b=True), z),
    "transposed product": lambda z, c: tf.matmul(z, tf.matmul(z, z, transpose_a=True)),
    "across": lambda z, c: z[:, :1] + tf.reshape(z[:, 0], [1, ROWS])[:, :2],
    "sorted": lambda z, c: tf.sort(z, axis=0),
    "gathered by numbers": lambda z, c: tf.gather(z, tf.cast(z[:, 0], tf.int32)),
    "a row for all": lambda z, c: z + z[0],
    "no rows": lambda z, c: tf.reduce_sum(z),
    "a sum of Einstein's over rows": lambda z, c: tf.einsum("bi,bj->ij", z, z),
    "one that turns": lambda z, c: tf.einsum("bi->ib", z),
    "one of all pairs": lambda z, c: tf.einsum("bi,ci->bc", z, z),
    "padded with rows": lambda z, c: tf.pad(z, [[1, 0], [0, 0]])[:ROWS],
    "tiled with rows": lambda z, c: tf.tile(z, [2, 1])[1 : ROWS + 1],
    "joined in another order": lambda z, c: tf.concat([z[1:], z[:1]], axis=0),
    "split and turned": lambda z, c: tf.concat(tf.split(z, ROWS)[::-1], axis=0),
    "joined as pairs": lambda z, c: tf.concat(
        [tf.reduce_sum(z[:2], axis=0, keepdims=True) + 0 * z[:2], z[2:]], axis=0
    ),
    "slices that overlap": lambda z, c: tf.concat(
        [tf.slice(z, [max(n - 1, 0), 0], [1, 2]) for n in range(ROWS)], axis=0
    ),
    "written to other places": lambda z, c: written(z, [1, 2, 0]),
    "written to the same place": lambda z, c: written(z, [0, 1, 1]),
}


def written(z: tf.Tensor, places) -> tf.Tensor:
    array = tf.TensorArray(tf.float32, size=ROWS, element_shape=[2], clear_after_read=False)
    for n, place in enumerate(places):
        array = array.write(place, tf.sin(z[n]))
    return array.stack()


def alone(call) -> bool:
    with FuncGraph("test").as_default():
        z = tf.compat.v1.placeholder(tf.float32, [ROWS, 2])
        c = tf.compat.v1.placeholder(tf.float32, [4])
        return rows_are_alone([z], [tf.convert_to_tensor(call(z, c))], ROWS)


@pytest.mark.parametrize("call", APART)
def test_what_keeps_rows_apart(call: str) -> None:
    assert alone(APART[call])
    assert not depends(APART[call])


@pytest.mark.parametrize("call", MIXED)
def test_what_mixes_them(call: str) -> None:
    assert not alone(MIXED[call])


def depends(call) -> bool:
    """By numbers: whether an output changes with another row than its own."""
    rng = np.random.default_rng(0)
    z, c = (tf.constant(rng.normal(size=size), tf.float32) for size in ((ROWS, 2), 4))
    before = call(z, c).numpy()
    for row in range(ROWS):
        moved = z.numpy()
        moved[row] += 1.0
        changed = (call(tf.constant(moved), c).numpy() != before).reshape(ROWS, -1).any(axis=1)
        if changed[[n for n in range(ROWS) if n != row]].any():
            return True
    return False
