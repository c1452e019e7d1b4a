"""Tiles shared out by speed, and speeds learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpool import tiles
from qpool.executors.shares import Run, apportion, learn

SPEEDS = st.dictionaries(st.integers(0, 9), st.floats(0.01, 100.0), min_size=1)


@given(st.integers(0, 50), st.integers(0, 200), SPEEDS)
def test_every_tile_goes_to_one_node_and_nearly_as_its_speed_says(first, count, speeds) -> None:
    runs = apportion(Run(first, first + count), speeds)
    given = [tile for run in runs.values() for tile in range(run.first, run.stop)]
    assert given == list(range(first, first + count))
    whole = sum(speeds.values())
    for node, speed in speeds.items():
        length = runs[node].tiles if node in runs else 0
        assert abs(length - count * speed / whole) < 1


@given(st.integers(0, 200), st.integers(1, 20))
def test_equal_speeds_share_as_tiles_does(count, workers) -> None:
    runs = apportion(Run(0, count), dict.fromkeys(range(workers), 1.0))
    even = [bounds for bounds in tiles.shards(count, workers) if bounds[1] > bounds[0]]
    assert [(run.first, run.stop) for run in runs.values()] == even


def test_what_is_learned_is_how_fast_one_is_against_the_other() -> None:
    speeds = {"a": 1.0, "b": 1.0, "away": 5.0}
    for _ in range(60):
        # Tiles of a and b take 1 and 3 ms here; whatever the tiles cost, that is what counts.
        speeds = learn(speeds, {"a": 4, "b": 4}, {"a": 0.004, "b": 0.012})
        speeds = learn(speeds, {"a": 4, "b": 4}, {"a": 4.0, "b": 12.0})
    assert speeds["a"] / speeds["b"] == pytest.approx(3.0, rel=1e-3)
    assert speeds["a"] + speeds["b"] == pytest.approx(2.0)


def test_one_alone_has_nobody_to_be_compared_with() -> None:
    speeds = {"a": 1.0}
    assert learn(speeds, {"a": 4, "lost": 4}, {"a": 1.0, "lost": 1.0}) == pytest.approx(speeds)
    assert learn(speeds, {"lost": 4}, {"lost": 1.0}) == speeds


def test_one_that_was_slow_for_a_while_has_tiles_again() -> None:
    speeds = {"a": 1.0, "b": 1.0}
    given = 0
    for step in range(500):
        runs = apportion(Run(0, 2), speeds)
        tiles = {n: runs[n].tiles if n in runs else 0 for n in speeds}
        slow = 5.0 if step < 10 else 1.0
        speeds = learn(speeds, tiles, {"a": 0.01 * tiles["a"], "b": 0.01 * slow * tiles["b"]})
        given += tiles["b"] if step >= 250 else 0
    assert given > 200
