"""What the soak counts, and the shape of its episodes."""

from __future__ import annotations

import itertools

import pytest

from qpool.studies import soak


def test_episodes_follow_from_the_seed_and_cover_the_grid() -> None:
    first, again = (list(itertools.islice(soak.episodes(5), 32)) for _ in range(2))
    assert first == again
    assert len({(e.engine, e.batch, e.workers) for e in first}) == 32


def test_a_changed_bit_a_lost_step_or_a_leftover_is_a_failure() -> None:
    assert not soak.Found().failed
    for flaw in ({"bits_changed": 1}, {"steps_lost": 1}, {"left_over": 1}, {"errors": ["x"]}):
        assert soak.Found(**flaw).failed


def test_flat_and_growing_memory() -> None:
    steps = [float(n) for n in range(0, 10_001, 100)]
    curves = {
        "step": steps,
        "flat": [200.0] * len(steps),
        "growing": [200.0 + n / 100 for n in steps],
        "warms up": [100.0 if n < 1000 else 150.0 for n in steps],
    }
    found = soak.flatness(curves)
    assert found["flat"]["MiB_per_1000_steps"] == pytest.approx(0, abs=1e-9)
    assert found["growing"]["MiB_per_1000_steps"] == pytest.approx(10)
    assert found["growing"]["end_MiB"] == pytest.approx(300)
    assert found["warms up"]["MiB_per_1000_steps"] == pytest.approx(0, abs=1e-9)
