"""What a function leads to beside its arguments."""

from __future__ import annotations

import functools
import json

import cloudpickle
import keras
import pytest
import scripted
import tensorflow as tf

from workers.replica import functions
from workers.replica.functions import FunctionModel

HELD = tf.Variable(1.0)
BUILT = {"layers": [tf.Variable(2.0), tf.Variable(3.0, trainable=False)]}


def uses(z):
    return inner(z) * len(json.dumps(2))


def inner(z):
    return [z * variable for variable in BUILT["layers"]]


def of_a_library(z):
    return json.dumps(tf.reduce_sum(z))


def held(z, factor=HELD):
    return z * factor


def reached(function):
    return {id(part) for part in FunctionModel(function).reached}


def test_globals_are_followed_through_the_users_functions_alone() -> None:
    model = FunctionModel(uses)
    assert [id(part) for part in model.reached] == [id(BUILT)]
    assert model.trainable_variables == BUILT["layers"][:1]
    assert not FunctionModel(of_a_library).reached
    assert not hasattr(FunctionModel(of_a_library), "trainable_variables")


def test_so_is_what_it_was_given_before_and_what_is_around_it() -> None:
    around = tf.Variable(4.0)

    def closed(z):
        return held(z) + around + empty

    assert reached(closed) == {id(around), id(HELD)}
    empty = 1
    assert reached(functools.partial(held, factor=around)) == {id(around), id(HELD)}
    assert reached(tf.function(closed)) == {id(around), id(HELD)}
    gan = scripted.Gan()
    assert {id(gan), id(scripted.weights), id(scripted.engine)} <= reached(gan.generate)
    assert FunctionModel(gan.generate).__name__ == "generate"


def test_a_name_that_is_bound_anew_is_seen(monkeypatch) -> None:
    model = FunctionModel(inner)
    (place,) = model.look()
    assert place.is_there()
    monkeypatch.setitem(globals(), "BUILT", {"layers": [HELD]})
    assert not place.is_there()
    model.look()
    assert model.trainable_variables == [HELD]


@pytest.mark.parametrize(
    ("value", "function", "takes"),
    [
        (uses, True, True),
        (functools.partial(held, factor=2), True, True),
        (functools.partial(held, 1.0), True, False),
        (tf.function(uses), True, True),
        (lambda: uses, True, False),
        (scripted.Gan, False, False),
        (dict, False, False),
    ],
)
def test_what_a_function_is(value, function: bool, takes: bool) -> None:
    assert (functions.is_function(value), functions.takes_arguments(value)) == (function, takes)


def test_functions_travel_with_their_variables() -> None:
    model = FunctionModel(scripted.generate)
    with functions.travelling(model):
        assert "scripted" in cloudpickle.list_registry_pickle_by_value()
        copy = cloudpickle.loads(cloudpickle.dumps(FunctionModel(inner)))
    assert not cloudpickle.list_registry_pickle_by_value()
    assert copy.call(2.0)[0] == 4.0


class OfTheModule:
    """Its call leads to a variable of the module; what is beside that does not."""

    def __call__(self, z):
        return self.scaled(z)

    def scaled(self, z):
        return z * HELD

    def other(self, z):
        return inner(z)


class Plain:
    def __call__(self, z):
        return z

    def other(self, z):
        return z * HELD


class HoldsALibrarys:
    """What a library's function leads to is the library's."""

    def __init__(self) -> None:
        self.activation = keras.activations.get("tanh")

    def __call__(self, z):
        return self.activation(z)


@pytest.mark.parametrize(
    ("kind", "travels"), [(OfTheModule, True), (Plain, False), (HoldsALibrarys, False)]
)
def test_so_do_classes_whose_calls_lead_to_some(kind, travels: bool) -> None:
    with functions.travelling(kind()):
        assert (__name__ in cloudpickle.list_registry_pickle_by_value()) == travels
