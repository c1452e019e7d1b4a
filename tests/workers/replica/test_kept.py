"""Where calls leave tensors, and how compiled calls leave theirs there."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from workers.errors import AttributeNotSetError, ModelError
from workers.replica.kept import Before, Keeping, Kept, Unset, tensors_of

ROWS: list[Any] = []
last: Any = None


class Part:
    norm: Any = None


class Model:
    def __init__(self) -> None:
        self.part, self.log, self.history = Part(), {"calls": 0}, [tf.constant(0.0)]
        self.recent: collections.deque[Any] = collections.deque(maxlen=2)
        self.same = tf.constant(1.0)

    def __call__(self, x: Any) -> Any:
        global last
        last = x + 1
        ROWS.append(2 * x)
        self.found = {"pair": (x, 3 * x), "rows": 2}
        self.part.norm = x**2
        self.log["x"] = [x]
        self.log["calls"] += 1
        self.history.append(4 * x)
        self.recent.append(x)
        return x


NAMES = ["ROWS", "last", "self.found", "self.history", "self.log['x']", "self.part.norm"]


def kept_by(model: Model, x: float = 5.0) -> dict[str, Kept]:
    before = Before(model, "__call__")
    model(tf.constant(x))
    return {kept.name: kept for kept in before.kept()}


def test_it_is_seen_wherever_a_call_leaves_a_tensor() -> None:
    found = kept_by(Model())
    assert sorted(found) == sorted([*NAMES, "self.recent"])
    assert [name for name, kept in found.items() if not kept.may_be_left] == ["self.recent"]
    assert [name for name, kept in found.items() if kept.is_attribute] == ["self.found"]
    assert [float(x) for x in found["self.found"].tensors()] == [5.0, 15.0]


def test_what_is_written_is_as_the_call_leaves_it() -> None:
    model = Model()
    found = kept_by(model)
    length = len(ROWS)
    for kept in found.values():
        kept.write([tf.constant(float(n)) for n in range(len(kept.specs))])
    assert model.found["rows"] == 2
    assert [float(x) for x in model.found["pair"]] == [0.0, 1.0]
    assert [float(x) for x in model.history] == [0.0, 20.0, 0.0]
    assert float(model.part.norm) == float(model.log["x"][0]) == float(last) == 0.0
    assert len(ROWS) == length + 1
    assert [float(x) for x in model.recent] == [5.0, 0.0]


def test_it_can_be_put_back() -> None:
    model = Model()
    before = Before(model, "__call__")
    length, was = len(ROWS), last
    for _ in range(2):
        model(tf.constant(1.0))
        before.put_back()
        assert not hasattr(model, "found")
        assert model.part.norm is None
        assert (list(model.recent), len(model.history), len(ROWS)) == ([], 1, length)
        assert last is was
    assert model.log["calls"] == 0


@pytest.mark.parametrize(
    ("turn", "whole"),
    [
        ([()], [()]),  # the last row's
        ([(3,)], [(3,)]),
        ([(1, 3)], [(4, 3)]),  # all rows together
        ([()], [()] * 4),  # one more with each
        ([(2,), ()], [(2,), ()] * 4),
    ],
)
def test_of_rows(turn: list[Any], whole: list[Any]) -> None:
    specs = tuple(tf.TensorSpec(shape) for shape in whole)
    kept = Kept({}, "a", "self.a", list(specs), specs)
    stacked = [tf.random.normal([4, *shape]) for shape in turn]
    found = kept.of_rows(stacked)
    assert [x.shape for x in found] == [spec.shape for spec in specs]
    if len(whole) > len(turn):
        np.testing.assert_array_equal(found[len(turn)], stacked[0][1])
    elif turn == [(1, 3)]:
        np.testing.assert_array_equal(found[0], stacked[0][:, 0])
    else:
        np.testing.assert_array_equal(found[0], stacked[0][-1])


@pytest.mark.parametrize("whole", [[(2,)], [()] * 3, [(8, 3)]])
def test_of_rows_in_no_way(whole: list[Any]) -> None:
    specs = tuple(tf.TensorSpec(shape) for shape in whole)
    with pytest.raises(ValueError, match="row"):
        Kept({}, "a", "self.a", list(specs), specs).of_rows([tf.zeros([4, 1, 3])])


def test_a_trace_may_not_look_at_what_an_earlier_call_left() -> None:
    model = Model()
    kept = [kept_by(model)["self.part.norm"]]

    def looking(x: Any) -> Any:
        model.part.norm += x
        return x

    for given, error in (((kept, []), ModelError), (([], kept), AttributeNotSetError)):
        with pytest.raises(error, match=r"self\.part\.norm is"):
            tf.function(Keeping(looking, model, "__call__", *given), autograph=False)(
                tf.constant(1.0)
            )


def test_what_is_unset_says_so_whatever_it_is_asked() -> None:
    unset = Unset("self.last")
    for ask in (
        lambda x: x.trace(),
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x[0],
        lambda x: [*x],
        lambda x: bool(x),
        len,
        float,
        tf.convert_to_tensor,
        np.asarray,
    ):
        with pytest.raises(AttributeNotSetError, match=r"self\.last is not there: .*sequential"):
            ask(unset)
    assert not hasattr(unset, "trace")
    for other in (copy.copy(unset), copy.deepcopy(unset), pickle.loads(pickle.dumps(unset))):
        assert (repr(other), tensors_of(other)) == (repr(unset), [])
