"""What is still there, and what is the same."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from workers import sf_compat
from workers.replica import places

sf_compat.install()
import strawberryfields as sf  # noqa: E402


def program(r: float = 0.1, *, name: str = "a", mode: int = 0) -> sf.Program:
    made = sf.Program(2)
    with made.context as q:
        sf.ops.Sgate(r) | q[0]
        sf.ops.Dgate(2 * made.params(name) + 1) | q[mode]
    return made


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({}, True),
        ({"r": 0.2}, False),
        ({"r": 0.1 + 1e-15}, False),
        ({"name": "b"}, False),
        ({"mode": 1}, False),
    ],
)
def test_a_program_is_its_gates(other: dict, same: bool) -> None:
    space = {"program": program()}
    place = places.Program.of(space, "program", space["program"])
    assert place.is_there()
    space["program"] = program(**other)
    assert place.is_there() == same
    space["program"] = None
    assert not place.is_there()


def test_a_gate_of_a_variable_is_of_that_variable() -> None:
    variables = [tf.Variable(0.1), tf.Variable(0.1)]
    first, again, other = (program(variables[n]) for n in (0, 0, 1))
    assert places.gates_of(first) == places.gates_of(again) != places.gates_of(other)


def test_a_program_that_had_no_gates_is_built_by_the_call() -> None:
    made = sf.Program(1)
    place = places.Program.of({"program": made}, "program", made)
    with made.context as q:
        sf.ops.Vac | q[0]
    assert place.is_there()


@pytest.mark.parametrize(
    "value", [1, "text", np.ones(3), np.float32(0.5), tf.constant([1.0, 2.0]), tf.constant(1.0)]
)
def test_numbers_and_arrays_are_what_they_hold(value) -> None:
    now = places.as_it_is_now(value)
    space = {"x": value}
    place = places.Setting(space, "x", value, now, True)
    assert now is not None
    assert place.is_there()
    space["x"] = value + value
    assert not place.is_there()
    if isinstance(value, np.ndarray):
        space["x"] = value
        value += 1
        assert not place.is_there()


HELD: list[tuple[Any, Any]] = [
    ([1.0, "a"], lambda held: held.append(2)),
    ([1.0, "a"], lambda held: held.reverse()),
    ({"a": {"b": [1, (2.0, None)]}}, lambda held: held["a"]["b"].__setitem__(0, 2)),
    ({"a": 1}, lambda held: held.update(b=held.pop("a"))),
    ((np.ones(2), 1.0), lambda held: held[0].__setitem__(1, 2.0)),
    ([], lambda held: held.append(None)),
    (collections.deque([1.0]), lambda held: held.append(2.0)),
    ({1, 2}, lambda held: held.add(3)),
]


@pytest.mark.parametrize(("value", "change"), HELD)
def test_lists_and_dicts_are_what_is_in_them(value, change) -> None:
    place = places.Setting({"x": value}, "x", value, places.as_it_is_now(value), True)
    assert place.is_container
    assert place.is_there()
    assert hash(place.told)
    place.space["x"] = type(value)(value)  # as another object
    assert place.is_there()
    change(place.space["x"])
    assert not place.is_there()


def test_of_other_things_in_them_which_they_are() -> None:
    first, second = tf.Variable([1.0, 2.0]), object()
    held = {"variables": [first], "other": (second, 1.0)}
    assert places.as_it_is_now(held) is None
    place = places.Contents({"x": held}, "x", held, places.as_it_is_now(held, others=True))
    first.assign([3.0, 4.0])
    assert place.is_there()
    held["variables"][0] = tf.Variable([3.0, 4.0])
    assert not place.is_there()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1.0] * 65,
        [[1.0] * 40] * 2,
        [np.ones(2048)] * 2,
        [object()],
        np.ones(5000),
        np.array(["a"]),
    ],
)
def test_others_are_not_compared(value) -> None:
    assert places.as_it_is_now(value) is None


def test_a_class_answers_until_the_object_does() -> None:
    class Model:
        scale = 1.0

    model = Model()
    space = places.Inherited(vars(model), Model)
    place = places.Setting(space, "scale", 1.0, 1.0, False)
    assert place.is_there()
    model.scale = 2.0
    assert not place.is_there()
