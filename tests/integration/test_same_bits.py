"""A training run has the same bits for any number of workers, whatever befalls them."""

from __future__ import annotations

import pytest

import qpool
from qpool.studies import soak

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*disconnected components.*"),
    pytest.mark.filterwarnings("ignore:.*share cores.*"),
]


#: One row, a prime with a ragged last tile, whole tiles: each shape of a tile is compiled.
BATCHES = (1, 7, 8)


def digests(engine: str, pool: qpool.Pool) -> list[str]:
    training = soak.Training(soak.Episode(3, engine, 1, pool.workers, "forkserver", 4), pool)
    try:
        return [training.step(batch) for batch in BATCHES]
    finally:
        training.generator.close()


@pytest.fixture(scope="module")
def alone(pool_of):
    """What one worker makes of it, by engine."""
    return {engine: digests(engine, pool_of(1)) for engine in soak.ENGINES}


@pytest.mark.parametrize(("workers", "engine"), [(3, "stock"), (5, "traced")])
def test_any_number_of_workers_trains_to_the_same_bits(
    pool_of, alone, workers: int, engine: str
) -> None:
    assert len(set(alone[engine])) == len(BATCHES)
    assert digests(engine, pool_of(workers)) == alone[engine]


def test_spawned_workers_train_to_the_same_bits(alone) -> None:
    with qpool.Pool(workers=2, start_method="spawn") as pool:
        for engine, expected in alone.items():
            assert digests(engine, pool) == expected, engine


def test_a_short_soak(pool_of) -> None:
    found = soak.Found()
    soak.run(soak.Episode(7, "traced", 7, 3, "forkserver", 6), pool_of(1), found)
    assert not found.failed, found.summary()
    assert found.steps == 6
    assert sum(found.injected.values()) >= 3
    assert found.workers_lost >= 1
