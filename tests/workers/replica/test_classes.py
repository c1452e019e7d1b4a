"""A class that travels by value is the user's own where it came from, and a copy elsewhere."""

from __future__ import annotations

import enum
import pickle
from typing import Any

import cloudpickle
import pytest

from workers.replica import classes


def is_as_before(kind: type, before: dict[str, Any]) -> bool:
    """Pickling adds an attribute of its own."""
    return all(vars(kind)[name] is value for name, value in before.items())


def of_a_notebook() -> tuple[type, type]:
    factor = [2]

    class Colour(enum.Enum):
        RED = 1

    class Model:
        colour = Colour.RED

        def scaled(self, x: int) -> int:
            return factor[0] * x

        def factor(self) -> list[int]:
            return factor

    return Model, Colour


@pytest.mark.parametrize("loads", [classes.loads, classes.Classes().loads])
def test_here_it_stays_as_it_is(loads: Any) -> None:
    model, colour = of_a_notebook()
    before = dict(vars(model))
    found = loads(cloudpickle.dumps((model(), colour.RED)))
    assert type(found[0]) is model
    assert found[1] is colour.RED
    assert is_as_before(model, before)
    pickle.loads(cloudpickle.dumps(model()))  # which is why
    assert vars(model)["scaled"] is not before["scaled"]


def test_a_copy_is_another_class_for_all_that_is_read_with_it() -> None:
    model, colour = of_a_notebook()
    before, here = dict(vars(model)), classes.Classes(copies=True)
    first, second = (here.loads(cloudpickle.dumps(model())) for _ in range(2))
    assert type(first) is type(second) is not model
    assert first.scaled(3) == 6
    assert first.colour == here.loads(cloudpickle.dumps(colour.RED)) != colour.RED
    first.factor()[0] = 3
    assert (second.scaled(3), model().scaled(3)) == (9, 6)
    assert type(classes.Classes(copies=True).loads(cloudpickle.dumps(model()))) is not type(first)
    assert is_as_before(model, before)


def test_a_copy_travels_back_as_what_it_is_a_copy_of() -> None:
    model, colour = of_a_notebook()
    before, here = dict(vars(model)), classes.Classes(copies=True)
    copies = here.loads(cloudpickle.dumps((model(), colour.RED)))
    found = classes.loads(cloudpickle.dumps(copies))
    assert type(found[0]) is model
    assert found[1] is colour.RED
    assert is_as_before(model, before)
