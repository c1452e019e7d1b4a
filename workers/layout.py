"""Named arrays in one block of bytes: shapes and dtypes in, offsets out.

Owns the arithmetic (alignment, sizes, which rows belong to which tile). Knows nothing of shared
memory: a layout is laid over any buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: Arrays start on a cache line, so that two workers never write the same one at an array's edge,
#: and Eigen may use aligned loads.
ALIGNMENT = 64

#: Bytes from one worker's progress counter to the next: a cache line each.
SLOT_BYTES = 64


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype (NumPy's string, e.g. ``'<f4'``) of one array."""

    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(array: np.ndarray) -> ArraySpec:
        return ArraySpec(tuple(array.shape), array.dtype.str)

    @functools.cached_property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @functools.cached_property
    def is_float(self) -> bool:
        """Whether it is of real or complex numbers: what can have a gradient."""
        return np.dtype(self.dtype).kind in "fc"

    @functools.cached_property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def with_rows(self, rows: int) -> ArraySpec:
        """The same array with ``rows`` along a new leading axis."""
        return ArraySpec((rows, *self.shape), self.dtype)


@dataclass(frozen=True)
class Placed:
    """An array and where it starts, in bytes from the beginning of the segment."""

    spec: ArraySpec
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes

    def view(self, buffer: Buffer) -> np.ndarray:
        """The array itself, over ``buffer``, which cannot be closed while the array is there."""
        if isinstance(buffer, Views):
            return buffer.of(self)
        spec = self.spec
        if not spec.size:
            return np.empty(spec.shape, spec.dtype)
        # Not np.ndarray(buffer=...): that lets go of the buffer's lock at once, and an array over
        # a segment that was closed is a segmentation fault.
        return np.frombuffer(buffer, spec.dtype, spec.size, self.offset).reshape(spec.shape)


class Views:
    """Arrays over a buffer, each made once: a step has the same ones as the step before."""

    #: Arrays kept; all are made anew when there are more.
    _MOST = 1 << 14

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._made: dict[int, tuple[Placed, np.ndarray]] = {}

    def of(self, placed: Placed) -> np.ndarray:
        """See ``Placed.view``. It is found by the very object."""
        found = self._made.get(id(placed))
        if found is not None and found[0] is placed:
            return found[1]
        if len(self._made) >= self._MOST:
            self._made.clear()
        array = placed.view(self._buffer)
        self._made[id(placed)] = placed, array
        return array

    def clear(self) -> None:
        """Let go of the buffer."""
        self._made.clear()


Buffer = memoryview | Views


def align(offset: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``offset``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place(specs: Iterable[ArraySpec], start: int = 0) -> tuple[tuple[Placed, ...], int]:
    """Lay arrays one after another from ``start``; return them and the aligned end."""
    placed = []
    offset = align(start)
    for spec in specs:
        placed.append(Placed(spec, offset))
        offset = align(offset + spec.nbytes)
    return tuple(placed), offset


def tile_rows(index: int, tile: int, batch: int) -> tuple[int, int]:
    """First row and one past the last row of tile ``index`` of a batch cut into ``tile`` rows."""
    start = index * tile
    return start, min(start + tile, batch)


def tile_worth(fixed_cost: float, largest: int) -> int:
    """Rows of a tile: the smallest power of two whose rows cost as much as the call itself.

    ``fixed_cost`` is what a call of the model costs beside its rows, counted in rows: 0 for a
    model that loops over its batch, infinite for one whose cost does not depend on it. The result
    is at most ``largest``.
    """
    if fixed_cost >= largest:
        return largest
    return min(largest, 1 << max(0, math.ceil(math.log2(max(fixed_cost, 1.0)))))


def progress_counter(buffer: memoryview, slot: int) -> np.ndarray:
    """Tiles that the workers of this slot have finished, one after another; one int64."""
    return np.frombuffer(buffer, np.int64, 1, slot * SLOT_BYTES)
