"""Errors cross process boundaries and say what to do."""

from __future__ import annotations

import pickle

import pytest

from workers import errors

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.QPoolError)
]


@pytest.mark.parametrize("kind", [k for k in ALL if k is not errors.RemoteError])
def test_every_error_pickles(kind: type[errors.QPoolError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what, and what to do")))
    assert type(again) is kind
    assert str(again) == "what, and what to do"


def test_a_remote_error_keeps_worker_place_traceback_and_original() -> None:
    error = errors.RemoteError(
        "ValueError: no", worker=3, where="forward", traceback="File x", original=ValueError("no")
    )
    again = pickle.loads(pickle.dumps(error))
    assert (again.worker, again.where, again.traceback) == (3, "forward", "File x")
    assert isinstance(again.original, ValueError)
    assert "worker 3" in str(again)
    assert "File x" in str(again)


def test_every_error_is_drawn_in_the_tree() -> None:
    for kind in ALL:
        assert kind.__name__ in errors.__doc__


def test_nearest_names_the_nearest() -> None:
    assert "did you mean 'processes'?" in errors.nearest("proceses", ("processes", "auto"))
    assert "did you mean" not in errors.nearest("zzz", ("processes", "auto"))
