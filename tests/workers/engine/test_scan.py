"""A loop over stacks of matrices, against the same steps written out."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers.engine import scan
from workers.engine.scan import Place

ROWS, COLUMNS, TURNS = 6, 5, 4


def multiply(rows: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    return tf.matmul(matrix, rows)


def scale(rows: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    return rows * factors[:, None]


def places(*, alike: bool) -> list[Place]:
    """Two places that multiply by matrices of one stack, one that scales; permutations that are
    the same in each turn or not."""
    draws = np.random.default_rng(0)

    def index() -> np.ndarray:
        if alike:
            return np.tile(draws.permutation(ROWS), (TURNS, 1))
        return np.stack([draws.permutation(ROWS) for _ in range(TURNS)])

    even, odd = np.arange(0, 2 * TURNS, 2), np.arange(1, 2 * TURNS, 2)
    return [
        Place(multiply, index(), 0, even),
        Place(scale, index(), 1, np.arange(TURNS)[::-1].copy()),
        Place(multiply, index(), 0, odd),
    ]


def arguments(dtype: tf.DType) -> list[tf.Tensor]:
    draws = np.random.default_rng(1)
    shapes = [(ROWS, COLUMNS), (2 * TURNS, ROWS, ROWS), (TURNS, ROWS)]
    return [tf.constant(draws.normal(size=shape) / 2, dtype) for shape in shapes]


def derivatives(function, where: list[Place], given: list[tf.Tensor]) -> list[tf.Tensor]:
    """Value, gradients and gradients of those, in one program."""

    @tf.function(jit_compile=True, autograph=False)
    def all_of_them(*given: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as outer:
            outer.watch(given)
            with tf.GradientTape() as inner:
                inner.watch(given)
                rows = function(where, given[0], given[1:])
                total = tf.reduce_sum(tf.sin(rows))
            slopes = inner.gradient(total, given)
            again = tf.add_n([tf.reduce_sum(tf.sin(slope)) for slope in slopes])
        return [rows, *slopes, *outer.gradient(again, given)]

    return all_of_them(*given)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("alike", [True, False])
def test_value_and_derivatives_are_those_of_the_steps_written_out(
    alike: bool, dtype: tf.DType
) -> None:
    where, given = places(alike=alike), arguments(dtype)
    looped = derivatives(scan.scan, where, given)
    written_out = derivatives(scan._written_out, where, given)
    close = 1e-12 if dtype == tf.float64 else 2e-5
    for ours, theirs in zip(looped, written_out, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=close, atol=close * np.abs(theirs).max())


def test_a_tape_outside_of_the_compiled_function_has_both_derivatives_too() -> None:
    where, given = places(alike=False), arguments(tf.float64)

    def slopes(function) -> list[tf.Tensor]:
        compiled = tf.function(
            lambda *x: function(where, x[0], x[1:]), jit_compile=True, autograph=False
        )
        with tf.GradientTape() as outer:
            outer.watch(given)
            with tf.GradientTape() as inner:
                inner.watch(given)
                total = tf.reduce_sum(tf.sin(compiled(*given)))
            first = inner.gradient(total, given)
            again = tf.add_n([tf.reduce_sum(tf.sin(slope)) for slope in first])
        return [*first, *outer.gradient(again, given)]

    for ours, theirs in zip(slopes(scan.scan), slopes(scan._written_out), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_is_compiled_does_not_grow_with_the_turns() -> None:
    def operations(turns: int) -> int:
        index = np.tile(np.arange(ROWS)[::-1], (turns, 1))
        place = Place(multiply, index, 0, np.arange(turns))
        rows, stack = tf.ones([ROWS, COLUMNS]), tf.ones([turns, ROWS, ROWS])

        @tf.function(jit_compile=True, autograph=False)
        def slope(rows: tf.Tensor, stack: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(stack)
                total = tf.reduce_sum(scan.scan([place], rows, [stack]))
            return tape.gradient(total, stack)

        text = slope.experimental_get_compiler_ir(rows, stack)(stage="hlo")
        return text.count(" = ")

    assert operations(24) == operations(2)
