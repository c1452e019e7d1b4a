"""Deadlines from measured tiles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpool.executors.processes.timeouts import (
    DEFAULT_LIMIT,
    FACTOR,
    LEAST,
    STRETCH,
    Timeouts,
)

seconds = st.floats(1e-6, 1e4)


def test_a_first_tile_may_compile() -> None:
    timeouts = Timeouts()
    timeouts.learn("a", 0.001)
    assert timeouts.seconds("a", first=True) == DEFAULT_LIMIT
    assert Timeouts(fixed=0.5).seconds("a", first=True) == DEFAULT_LIMIT
    assert Timeouts(fixed=5000.0).seconds("a", first=True) == 5000.0


def test_the_callers_own_limit_is_the_limit() -> None:
    timeouts = Timeouts(fixed=0.5)
    timeouts.learn("a", 100.0)
    assert timeouts.seconds("a", first=False) == 0.5


def test_what_was_never_measured_has_the_default() -> None:
    assert Timeouts().seconds("a", first=False) == DEFAULT_LIMIT


@given(st.lists(seconds, min_size=1), seconds)
def test_no_tile_like_those_before_is_shot(measured: list[float], other: float) -> None:
    timeouts = Timeouts()
    for value in measured:
        timeouts.learn("a", value)
    timeouts.learn("b", other)
    allowed = timeouts.seconds("a", first=False)
    assert LEAST <= allowed <= DEFAULT_LIMIT
    assert allowed >= min(FACTOR * max(measured), DEFAULT_LIMIT)


def test_where_a_worker_was_ended_the_next_one_has_longer() -> None:
    timeouts = Timeouts()
    timeouts.learn("a", 0.001)
    assert timeouts.seconds("a", first=False) == LEAST
    timeouts.stretch("a", LEAST)
    assert timeouts.seconds("a", first=False) == STRETCH * LEAST
    timeouts.stretch("a", STRETCH * LEAST)
    assert timeouts.seconds("a", first=False) == STRETCH**2 * LEAST
    assert Timeouts(fixed=1.0).seconds("a", first=False) == 1.0
