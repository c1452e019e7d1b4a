"""Inputs without a value: what is known of them, and what stands in for them."""

import numpy as np
import pytest
import tensorflow as tf

from qpool.bridge import symbolic
from workers.errors import InputError
from workers.layout import ArraySpec


def placeholder(shape, dtype=tf.float32):
    with tf.Graph().as_default():
        return tf.compat.v1.placeholder(dtype, shape)


def test_a_row_is_known_whatever_the_batch() -> None:
    inputs = [placeholder([None, 3]), placeholder([5], tf.int64)]
    assert symbolic.specs(inputs) == [ArraySpec((3,), "<f4"), ArraySpec((), "<i8")]


@pytest.mark.parametrize(
    ("shape", "words"), [(None, "unknown rank"), ([2, None], "only the batch")]
)
def test_what_is_not_known_is_told(shape, words: str) -> None:
    with pytest.raises(InputError, match=words):
        symbolic.specs([placeholder(shape)])


@pytest.mark.parametrize(("batches", "rows"), [((7, 7), 7), ((None, None), 4), ((None, 3), 4)])
def test_stand_ins_have_the_batch_that_will_come(batches, rows: int) -> None:
    inputs = [placeholder([batches[0], 2]), placeholder([batches[1]], tf.int32)]
    for positive in (False, True):
        draws, whole = symbolic.stand_ins(inputs, symbolic.specs(inputs), positive=positive)
        assert draws.shape == (rows, 2)
        assert draws.dtype == np.float32
        assert bool((draws >= 0).all()) == positive
        assert whole.tolist() == [0] * rows
