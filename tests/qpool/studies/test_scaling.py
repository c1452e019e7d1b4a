"""The scaling model: what it says is what its constants say, and fits find them again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpool.studies import scaling
from workers.errors import DataError

seconds = st.floats(1e-6, 1.0)
shares = st.floats(0.0, 0.5)


@given(seconds, seconds, seconds, shares, st.integers(1, 64))
def test_a_fit_finds_the_constants_that_made_the_steps(serial, dispatch, tile, contention, tiles):
    made = scaling.Constants(serial, dispatch, tile, contention)
    steps = [
        scaling.Step(
            workers,
            tiles,
            made.step(workers, tiles),
            tile * (1 + contention * (min(workers, tiles) - 1)),
        )
        for workers in (1, 2, 3, 5, 8)
    ]
    found = scaling.fit(steps)
    for step in steps:
        assert found.step(step.workers, tiles) == pytest.approx(step.seconds, rel=1e-6)


def test_without_costs_a_pool_scales_until_tiles_run_out() -> None:
    ideal = scaling.Constants(0.0, 0.0, 1.0, 0.0)
    assert ideal.speed_up(4, 16) == 4
    assert ideal.speed_up(5, 16) == 4  # the largest shard has four tiles
    assert ideal.speed_up(64, 16) == 16
    assert ideal.efficiency(64, 16) == 0.25


def test_what_is_serial_bounds_it() -> None:
    half = scaling.Constants(0.5, 0.0, 0.5 / 1000, 0.0)
    assert half.speed_up(1000, 1000) < 2  # Amdahl


@given(st.floats(1.0, 1e4), st.floats(0.0, 0.5), st.floats(0.0, 0.01))
def test_the_law_is_found_again(rate, sigma, kappa) -> None:
    law = scaling.Law(rate, sigma, kappa)
    workers = [1, 2, 4, 8, 16]
    found = scaling.fit_law(workers, [law.rate_of(w) for w in workers])
    for w in workers:
        assert found.rate_of(w) == pytest.approx(law.rate_of(w), rel=1e-6)


def test_where_more_workers_stop_helping() -> None:
    law = scaling.Law(1.0, 0.0, 0.01)
    assert law.best == pytest.approx(10.0)
    assert law.rate_of(10) > max(law.rate_of(5), law.rate_of(20))
    assert scaling.Law(1.0, 0.1, 0.0).best == np.inf


def test_too_few_measurements() -> None:
    with pytest.raises(DataError, match="two counts of workers"):
        scaling.fit([scaling.Step(2, 8, 1.0, 0.1)])
    with pytest.raises(DataError, match="three counts"):
        scaling.fit_law([1, 2], [1.0, 2.0])
