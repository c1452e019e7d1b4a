"""A replica's variables: loaded once a version, and looked at after a call."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import tensorflow as tf

from workers.errors import InputError, StatefulCallError
from workers.layout import ArraySpec, place
from workers.replica.weights import Weights


class Held:
    """Three variables (trained, not trained, the state of draws) and an arena with their values."""

    def __init__(self) -> None:
        values = [np.arange(3.0), np.arange(2.0), np.arange(4)]
        trained = [True, False, False]
        self.variables = [tf.Variable(v, trainable=t) for v, t in zip(values, trained, strict=True)]
        self.places, size = place([ArraySpec.of(v) for v in values])
        self.buffer = memoryview(bytearray(size))
        for placed, value in zip(self.places, values, strict=True):
            placed.view(self.buffer)[...] = value
        self.weights = Weights(self.variables, {id(self.variables[2])})
        self.weights.place(self.places)


@pytest.fixture
def held() -> Held:
    return Held()


def test_a_version_is_loaded_once(held: Held) -> None:
    told = held.places[0].view(held.buffer)
    told[...] = 7.0
    held.weights.load(1, held.buffer)
    np.testing.assert_array_equal(held.variables[0], 7.0)
    told[...] = 8.0
    held.weights.load(1, held.buffer)
    np.testing.assert_array_equal(held.variables[0], 7.0)
    held.weights.distrust()
    held.weights.load(1, held.buffer)
    np.testing.assert_array_equal(held.variables[0], 8.0)


@pytest.mark.parametrize(
    ("changed", "all_of_them", "refused"),
    [(0, False, False), (0, True, True), (1, False, True), (1, True, True), (2, True, False)],
)
def test_a_changed_variable(held: Held, changed: int, all_of_them: bool, refused: bool) -> None:
    held.weights.load(1, held.buffer)
    held.variables[changed].assign_add(tf.ones_like(held.variables[changed]))
    if not refused:
        held.weights.check_unchanged(held.buffer, all_of_them=all_of_them)
        return
    with pytest.raises(StatefulCallError, match="changed its variable"):
        held.weights.check_unchanged(held.buffer, all_of_them=all_of_them)
    held.weights.load(1, held.buffer)  # the same version, loaded again
    held.weights.check_unchanged(held.buffer, all_of_them=True)


def test_another_models_variables_are_refused(held: Held) -> None:
    with pytest.raises(InputError, match="expected shapes and dtypes"):
        held.weights.place(held.places[:2])


@pytest.fixture
def laid_over(held: Held) -> Held:
    """With an arena that lies as a mapping does, at the beginning of a page."""
    mapping = mmap.mmap(-1, len(held.buffer))
    mapping[:] = bytes(held.buffer)
    held.buffer = memoryview(mapping)
    held.weights.load(1, held.buffer, copies=False)
    return held


def test_compiled_calls_read_the_arena_itself(laid_over: Held) -> None:
    laid_over.places[0].view(laid_over.buffer)[...] = 7.0
    np.testing.assert_array_equal(laid_over.variables[0], 7.0)
    read_before = laid_over.variables[0].numpy().copy()
    laid_over.places[0].view(laid_over.buffer)[...] = 8.0
    laid_over.weights.load(2, laid_over.buffer, copies=False)
    np.testing.assert_array_equal(laid_over.variables[0], 8.0)
    np.testing.assert_array_equal(read_before, 7.0)


def test_a_call_that_keeps_a_tape_gets_copies(laid_over: Held) -> None:
    laid_over.weights.load(1, laid_over.buffer)
    with tf.GradientTape() as tape:
        square = laid_over.variables[0] ** 2
    laid_over.places[0].view(laid_over.buffer)[...] = 9.0
    np.testing.assert_array_equal(tape.gradient(square, laid_over.variables[0]), [0.0, 2.0, 4.0])
    laid_over.weights.load(2, laid_over.buffer)
    np.testing.assert_array_equal(laid_over.variables[0], 9.0)


@pytest.mark.parametrize("changed", [0, 1])
def test_what_a_call_changes_is_not_changed_in_the_arena(laid_over: Held, changed: int) -> None:
    told = laid_over.places[changed].view(laid_over.buffer).copy()
    variable = laid_over.variables[changed]
    variable.assign_add(tf.ones_like(variable))
    np.testing.assert_array_equal(laid_over.places[changed].view(laid_over.buffer), told)
    with pytest.raises(StatefulCallError, match="changed its variable"):
        laid_over.weights.check_unchanged(laid_over.buffer, all_of_them=True)
    laid_over.weights.load(1, laid_over.buffer, copies=False)
    np.testing.assert_array_equal(variable, told)


def test_the_state_of_draws_is_never_the_arenas(laid_over: Held) -> None:
    laid_over.variables[2].assign_add(tf.ones_like(laid_over.variables[2]))
    np.testing.assert_array_equal(laid_over.places[2].view(laid_over.buffer), np.arange(4))


def test_weights_that_have_moved_are_found_at_their_new_place(laid_over: Held) -> None:
    places, size = place([placed.spec for placed in laid_over.places], 4096)
    mapping = mmap.mmap(-1, size)
    for placed in places:
        placed.view(memoryview(mapping))[...] = 5
    laid_over.weights.place(places)
    laid_over.weights.load(1, memoryview(mapping), copies=False)
    for variable in laid_over.variables:
        np.testing.assert_array_equal(variable, 5)
