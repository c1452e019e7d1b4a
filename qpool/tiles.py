"""Batch to tiles to shards, and partial sums back. Pure.

A *tile* is what is computed at once; a *shard* is the run of tiles that one worker gets. The
tiles depend on the batch and the model alone, the shards on the workers too: that is why results
have the same bits for any number of workers.
"""

from __future__ import annotations

import itertools

import numpy as np

from workers.layout import tile_worth

#: Larger tiles leave the cache (at cutoff 12, three modes: 0.9 MB for each state kept).
LARGEST_TILE = 64

#: A batch is cut into at least this many tiles, so that there is something to share.
FEWEST_TILES = 2


def largest_tile(batch: int) -> int:
    """The largest tile that a batch may be cut into, a power of two."""
    return min(LARGEST_TILE, 1 << (max(1, batch // FEWEST_TILES).bit_length() - 1))


def default_tile(batch: int, fixed_cost: float) -> int:
    """Rows in a tile: ``workers.layout.tile_worth``, at most ``largest_tile``."""
    return tile_worth(fixed_cost, largest_tile(batch))


def count(batch: int, tile: int) -> int:
    """How many tiles of ``tile`` rows a batch makes; the last one may be ragged."""
    return -(-batch // tile)


def shards(tiles: int, workers: int) -> list[tuple[int, int]]:
    """First tile and one past the last for each worker, as even as can be, in order."""
    base, extra = divmod(tiles, workers)
    bounds = [0]
    for worker in range(workers):
        bounds.append(bounds[-1] + base + (worker < extra))
    return list(itertools.pairwise(bounds))


def sum_in_order(partials: np.ndarray) -> np.ndarray:
    """Add the rows of ``partials`` (tiles, ...) from the first to the last, in their dtype.

    ``np.sum`` may pair terms as it likes; one addition after another has one result only.
    """
    total = partials[0].copy()
    for partial in partials[1:]:
        total += partial
    return total
