"""A replica's variables: loaded once a version, and looked at after a call."""

from __future__ import annotations

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
