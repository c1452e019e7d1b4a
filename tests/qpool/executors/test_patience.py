"""Deadlines from measured tiles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpool.executors.processes.patience import (
    DEFAULT_LIMIT,
    FACTOR,
    LEAST,
    STRETCH,
    Patience,
)

seconds = st.floats(1e-6, 1e4)


def test_a_first_tile_may_compile() -> None:
    patience = Patience()
    patience.learn("a", 0.001)
    assert patience.seconds("a", first=True) == DEFAULT_LIMIT
    assert Patience(fixed=0.5).seconds("a", first=True) == DEFAULT_LIMIT
    assert Patience(fixed=5000.0).seconds("a", first=True) == 5000.0


def test_the_callers_own_limit_is_the_limit() -> None:
    patience = Patience(fixed=0.5)
    patience.learn("a", 100.0)
    assert patience.seconds("a", first=False) == 0.5


def test_what_was_never_measured_has_the_default() -> None:
    assert Patience().seconds("a", first=False) == DEFAULT_LIMIT


@given(st.lists(seconds, min_size=1), seconds)
def test_no_tile_like_those_before_is_shot(measured: list[float], other: float) -> None:
    patience = Patience()
    for value in measured:
        patience.learn("a", value)
    patience.learn("b", other)
    allowed = patience.seconds("a", first=False)
    assert LEAST <= allowed <= DEFAULT_LIMIT
    assert allowed >= min(FACTOR * max(measured), DEFAULT_LIMIT)


def test_where_a_worker_was_ended_the_next_one_has_longer() -> None:
    patience = Patience()
    patience.learn("a", 0.001)
    assert patience.seconds("a", first=False) == LEAST
    patience.stretch("a", LEAST)
    assert patience.seconds("a", first=False) == STRETCH * LEAST
    patience.stretch("a", STRETCH * LEAST)
    assert patience.seconds("a", first=False) == STRETCH**2 * LEAST
    assert Patience(fixed=1.0).seconds("a", first=False) == 1.0
