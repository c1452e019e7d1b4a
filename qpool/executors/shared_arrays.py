"""What lies where in the arena: progress counters, each model's weights, then a batch's arrays.

    | counters | weights of model 1 | weights of model 2 | ... | scratch: one batch at a time |

Owns the arena's layout and growth, and whether the weights in it are the model's. Scratch is
laid out per plan and batch size (a frame) and used again from step to step; frames overlap, since
only one batch is under way. Knows nothing of workers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.batches import Operands, Task
from workers.exchange import protocol
from workers.exchange.arena import Arena, Segment
from workers.layout import SLOT_BYTES, ArraySpec, Placed, place, progress_counter

_FIRST_SEGMENT = 1 << 20

#: Frames remembered, here and in the workers. Batch sizes that never come back must not pile up:
#: a new frame then takes the number of the oldest.
_FRAMES = 256


@dataclasses.dataclass
class Model:
    """A model's weights in the arena: their specs, their places, the version that is there, and all
    that was ``written`` of it."""

    shipment: bytes
    engine: str
    specs: list[ArraySpec]
    places: tuple[Placed, ...] = ()
    version: int = 0
    written: bytes | None = None


class SharedArrays:
    """The arena of a pool of ``slots`` workers, and what lies in it."""

    def __init__(self, slots: int) -> None:
        self.arena = Arena.create(max(_FIRST_SEGMENT, slots * SLOT_BYTES))
        self.models: dict[int, Model] = {}
        self._first = slots * SLOT_BYTES
        self._scratch = self._first
        self._frames: dict[Any, protocol.Frame] = {}

    @property
    def buffer(self) -> memoryview:
        return self.arena.buffer

    @property
    def segment(self) -> Segment:
        return self.arena.segment

    def progress(self, slot: int) -> int:
        """Tiles that the worker in this slot has finished."""
        return int(progress_counter(self.buffer, slot)[0])

    # -- weights ---------------------------------------------------------------------------

    def add(self, number: int, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> None:
        """Make room for a model's weights and write them."""
        self.models[number] = Model(shipment, engine, [ArraySpec.of(weight) for weight in weights])
        try:
            self._arrange()
        except BaseException:
            del self.models[number]
            raise
        self.write_weights(number, weights)

    def remove(self, number: int) -> bool:
        """Forget a model; False if there is none of that number. Its room is used again later."""
        return self.models.pop(number, None) is not None

    def write_weights(self, number: int, weights: Sequence[np.ndarray]) -> bool:
        """Put the values in the arena if any bit differs from what is there; True if one did."""
        model = self.models[number]
        given = b"".join([weight.tobytes() for weight in weights])
        if model.written == given:
            return False
        # First: if this is interrupted, workers must not take it for the old, and neither must we.
        model.version += 1
        model.written = None
        for view, weight in zip(self.views(model.places), weights, strict=True):
            view[...] = weight
        model.written = given
        return True

    def _arrange(self) -> None:
        """Lay all models' weights after the counters, moving those that are there already."""
        kept = {
            number: [view.copy() for view in self.views(model.places)]
            for number, model in self.models.items()
        }
        offset = self._first
        places = {}
        for number, model in self.models.items():
            places[number], offset = place(model.specs, offset)
        self._reserve(offset)
        for number, model in self.models.items():
            if model.places != places[number]:
                model.places = places[number]
            for former, placed in zip(kept[number], model.places, strict=False):
                placed.view(self.arena.views)[...] = former
        self._scratch = offset
        self._frames.clear()

    def _reserve(self, size: int) -> None:
        """Grow the arena to ``size`` bytes, by a half at least, so that it grows seldom."""
        if size > self.arena.size:
            self.arena.grow(max(size, self.arena.size * 3 // 2))

    # -- scratch ---------------------------------------------------------------------------

    def frame(self, task: Task, operands: Operands, first: int = 0) -> protocol.Frame:
        """Where the arrays of this task lie, for a batch of this size; laid out once.

        ``first`` is the number of the first tile, of a part of a larger batch.
        """
        batch = operands.batch
        key = task, batch, first
        frame = self._frames.get(key)
        if frame is not None:
            return frame
        specs = [ArraySpec.of(array) for array in operands.inputs]
        number = len(self._frames)
        if number == _FRAMES:
            number = self._frames.pop(next(iter(self._frames))).frame
        seeds = [None if c is None else ArraySpec.of(c) for c in operands.cotangents]
        of_inputs = [(n, spec) for n, spec in task.sources if n < len(specs)]
        of_weights = [(n, spec) for n, spec in task.sources if n >= len(specs)]
        tangents = operands.tangents
        rows = tiles.count(batch, task.tile)
        placed, end = place(
            [
                *specs,
                *(spec.with_rows(batch) for spec in task.outputs),
                *(spec for spec in seeds if spec is not None),
                *(spec.with_rows(batch) for _, spec in of_inputs),
                *(spec.with_rows(rows) for _, spec in of_weights),
                *(ArraySpec.of(tangent) for _, tangent in tangents),
                *(spec for spec in seeds if spec is not None and tangents),
            ],
            self._scratch,
        )
        self._reserve(end)
        remaining = iter(placed)

        def take(count: int) -> tuple[Placed, ...]:
            return tuple(itertools.islice(remaining, count))

        frame = protocol.Frame(
            number,
            batch,
            task.tile,
            take(len(specs)),
            take(len(task.outputs)),
            tuple(None if spec is None else next(remaining) for spec in seeds),
            tuple((n, next(remaining)) for n, _ in of_inputs),
            tuple((n, next(remaining)) for n, _ in of_weights),
            tuple((n, next(remaining)) for n, _ in tangents),
            tuple(None if spec is None else next(remaining) for spec in seeds if tangents),
            first,
        )
        self._frames[key] = frame
        return frame

    def views(self, places: Iterable[Placed | None]) -> list[np.ndarray]:
        """The arrays that lie there; None is left out."""
        of = self.arena.views.of
        return [of(placed) for placed in places if placed is not None]

    def write(self, places: Sequence[Placed | None], arrays: Sequence[np.ndarray | None]) -> None:
        """Copy arrays to their places; None goes nowhere."""
        for placed, array in zip(places, arrays, strict=True):
            if placed is not None:
                self.arena.views.of(placed)[...] = array
