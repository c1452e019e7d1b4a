"""Tiles follow from batch and model, shards cover them, sums have one order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpool import tiles


@given(st.integers(1, 5000), st.floats(0, 1e6) | st.just(float("inf")))
def test_the_default_tile_is_a_bounded_power_of_two(batch: int, fixed: float) -> None:
    tile = tiles.default_tile(batch, fixed)
    assert tile & (tile - 1) == 0
    assert 1 <= tile <= tiles.LARGEST_TILE
    if batch >= tiles.FEWEST_TILES:
        assert tiles.count(batch, tile) >= tiles.FEWEST_TILES


@pytest.mark.parametrize(
    ("batch", "fixed", "tile"),
    [(16, 0.0, 1), (16, 4.2, 8), (64, 4.2, 8), (64, float("inf"), 32), (1, 9.0, 1), (17, 9.0, 8)],
)
def test_default_tiles(batch: int, fixed: float, tile: int) -> None:
    assert tiles.default_tile(batch, fixed) == tile


@given(st.integers(0, 200), st.integers(1, 40))
def test_shards_cover_all_tiles_evenly_and_in_order(count: int, workers: int) -> None:
    cut = tiles.shards(count, workers)
    assert [n for start, stop in cut for n in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in cut]
    assert max(sizes) - min(sizes) <= 1


def test_the_sum_is_taken_in_tile_order() -> None:
    parts = np.array([[1e8], [1.0], [-1e8], [1.0]], np.float32)
    assert tiles.sum_in_order(parts)[0] == np.float32(1.0)  # (1e8 + 1) - 1e8 + 1, rounded so
    assert tiles.sum_in_order(parts[::-1])[0] == np.float32(0.0)


def test_the_sum_leaves_its_terms_alone() -> None:
    parts = np.ones((3, 2), np.complex128)
    np.testing.assert_array_equal(tiles.sum_in_order(parts), [3, 3])
    np.testing.assert_array_equal(parts, 1)
