"""Layouts do not overlap, are aligned, and tiles cover a batch once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.layout import ALIGNMENT, ArraySpec, Views, place, tile_rows

dtypes = st.sampled_from(["<f4", "<f8", "<c8", "<c16", "<i4", "|b1"])
specs = st.builds(ArraySpec, st.lists(st.integers(0, 5), max_size=3).map(tuple), dtypes)


@given(st.lists(specs, max_size=8), st.integers(0, 1000))
def test_arrays_are_aligned_and_apart(wanted: list[ArraySpec], start: int) -> None:
    placed, end = place(wanted, start)
    assert [p.spec for p in placed] == wanted
    former = start
    for array in placed:
        assert array.offset >= former
        assert array.offset % ALIGNMENT == 0
        former = array.end
    assert end >= former


@given(st.lists(specs, min_size=1, max_size=6))
def test_views_hold_what_is_written(wanted: list[ArraySpec]) -> None:
    placed, end = place(wanted)
    buffer = memoryview(bytearray(max(end, 1)))
    for n, array in enumerate(placed):
        array.view(buffer)[...] = n % 2
    for n, array in enumerate(placed):
        assert (array.view(buffer) == n % 2).all()


@given(st.lists(specs, min_size=1, max_size=6))
def test_views_are_made_once_and_of_the_very_place(wanted: list[ArraySpec]) -> None:
    (placed, end), (equal, _) = place(wanted), place(wanted)
    buffer = memoryview(bytearray(max(end, 1)))
    views = Views(buffer)
    for one, other in zip(placed, equal, strict=True):
        array = one.view(views)
        assert one.view(views) is array
        assert (array.shape, array.dtype.str) == (one.spec.shape, one.spec.dtype)
        array[...] = 1
        np.testing.assert_array_equal(other.view(views), one.view(buffer))
    del array
    views.clear()
    buffer.release()  # nothing is over it any more


def test_views_are_no_more_than_so_many(monkeypatch) -> None:
    monkeypatch.setattr(Views, "_MOST", 3)
    placed, end = place([ArraySpec((2,), "<f8")] * 5)
    views = Views(memoryview(bytearray(end)))
    for n, array in enumerate(placed):
        array.view(views)[...] = n
    assert [array.view(views)[0] for array in placed] == [0, 1, 2, 3, 4]
    assert len(views._made) <= 3


@given(st.integers(1, 300), st.integers(0, 8).map(lambda n: 1 << n))
def test_tiles_cover_a_batch_once(batch: int, tile: int) -> None:
    rows = [tile_rows(n, tile, batch) for n in range(-(-batch // tile))]
    assert [r for start, stop in rows for r in range(start, stop)] == list(range(batch))


def test_spec_of_an_array() -> None:
    assert ArraySpec.of(np.zeros((2, 3), np.float32)) == ArraySpec((2, 3), "<f4")
    assert ArraySpec((2, 3), "<f4").with_rows(5) == ArraySpec((5, 2, 3), "<f4")
    assert ArraySpec((), "<f8").nbytes == 8
