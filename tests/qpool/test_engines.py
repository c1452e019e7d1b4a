"""The engines that a model holds are found, and missed when they are replaced."""

from __future__ import annotations

import types

import strawberryfields as sf
import tensorflow as tf

from qpool.engines import held_engines
from workers.engine.scope import traced_engines


def new(**options) -> sf.Engine:
    return sf.Engine("tf", backend_options={"cutoff_dim": 4, **options})


def test_in_attributes_lists_and_dicts() -> None:
    first, second, third, other = new(), new(), new(), sf.Engine("gaussian")
    model = types.SimpleNamespace(
        engine=first, more=[0, second], named={"a": types.SimpleNamespace(e=third)}, other=other
    )
    found = held_engines(model)
    assert {id(held.engine) for held in found} == {id(e) for e in (first, second, third, other)}
    assert [held.backend for held in found].count("tf") == 3
    assert "'gaussian'" in str(next(held for held in found if held.backend == "gaussian"))
    assert all(held.is_there() for held in found)
    assert held_engines(types.SimpleNamespace(x=1)) == []


def test_one_that_is_replaced_or_changed_is_missed() -> None:
    model = types.SimpleNamespace(engine=new(), more=[new()], named={"a": new()})
    found = {held.key: held for held in held_engines(model)}
    model.engine = new(dtype=tf.complex128)
    del model.more[0]
    model.named["a"].backend_options["cutoff_dim"] = 5
    assert not any(held.is_there() for held in found.values())
    assert all(held.is_there() for held in held_engines(model))


def test_one_that_is_made_anew_with_the_same_options_is_as_good() -> None:
    model = types.SimpleNamespace(engine=new(), other=new())
    found = held_engines(model)
    model.engine = new()
    with traced_engines():
        model.other = new()  # in a call
    assert all(held.is_there() for held in found)
    model.other = sf.Engine("fock", backend_options={"cutoff_dim": 4})
    assert [held.is_there() for held in found] == [True, False]
