"""How runs are packed on cores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpool.training.campaign import packing
from qpool.training.campaign.pace import Pace


@given(st.integers(1, 200), st.integers(1, 200), st.one_of(st.none(), st.integers(1, 50)))
def test_places_are_apart_and_leave_no_core_where_runs_are_few(runs, cores, most) -> None:
    each = packing.cores_each(min(runs, most or runs), cores)
    found = packing.places(range(cores), each, most)
    used = [core for place in found for core in place]
    assert len(used) == len(set(used))
    assert all(len(place) >= each for place in found)
    assert len(found) <= (most or cores)
    assert len(found) >= min(runs, cores, most or cores)
    if each > 1:
        assert len(used) == cores


def test_memory_bounds_how_many_run() -> None:
    assert packing.fits(0, 0, 0)  # the first one measures
    assert not packing.fits(packing.FIRST_GUESS, 1, 0)
    assert packing.fits(2 << 30, 1, 1 << 30)
    assert not packing.fits(2 << 30, 1, 2 << 30)


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 10))
def test_the_time_left_is_between_its_bounds(seconds, places) -> None:
    left = packing.seconds_left(seconds, places)
    longest, mean = max(seconds, default=0.0), sum(seconds) / places
    assert left >= max(longest, mean) * (1 - 1e-9)
    assert left <= (mean + longest) * (1 + 1e-9)


def test_the_longest_runs_come_first_and_others_keep_their_places() -> None:
    assert packing.longest_first(["a", "b", "c", "d"], {"b": 2.0, "d": 3.0}) == ["d", "b", "a", "c"]


def test_what_has_been_seen_tells_what_is_to_come() -> None:
    pace = Pace()
    assert pace.expected("x", 100) is None
    pace.finished("x", 12.0, 1000, 0.01)
    assert pace.expected("x", 500) == 2.0 + 5.0
    assert pace.expected("x", 500, 0.02) == 10.0  # it is under way, and tells its own pace
    assert pace.expected("y", 500) == 7.0  # of another kind nothing better is known
    pace.finished("function", 3.0, 0, None)
    assert pace.expected("function", 0) == 3.0
