"""A tile: some rows of a batch in the arena, filled up to the shape that is computed.

Owns which rows, what fills the missing ones, and where what comes of them is written. A sum over
the filled rows adds nothing to any gradient, since their cotangents are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from workers.errors import InputError
from workers.exchange.protocol import Frame, Plan
from workers.layout import Buffer, Placed, tile_rows
from workers.tensors import tensor_of


class Tile(NamedTuple):
    """Rows ``start`` to ``stop`` of a frame's batch, with which the model is called as so many
    ``rows``: more where it needs them. ``place`` is the tile's number in the frame."""

    plan: Plan
    frame: Frame
    place: int
    start: int
    stop: int
    rows: int
    buffer: Buffer

    @classmethod
    def of(cls, plan: Plan, frame: Frame, index: int, buffer: Buffer) -> Tile:
        """A compiled model gets whole tiles, so that a ragged last one compiles nothing new."""
        start, stop = tile_rows(index, frame.tile, frame.batch)
        needed = stop - start if plan.level == "eager" else frame.tile
        rows = plan.rows or max(plan.least_rows, needed)
        return cls(plan, frame, index, start, stop, rows, buffer)

    @property
    def number(self) -> int:
        """Of all tiles of the call."""
        return self.frame.first + self.place

    def inputs(self) -> list[np.ndarray]:
        """The rows, the last one repeated where some lack."""
        return [_filled(self._part(placed), self.rows) for placed in self.frame.inputs]

    def cotangents(self) -> list[np.ndarray | None]:
        """For each output, None where none is given; zeros for rows that lack."""
        return [None if x is None else self._cotangent(x) for x in self.frame.cotangents]

    def seeds(self) -> list[tf.Tensor]:
        """A cotangent for each real or complex output: zeros where none is given."""
        return [
            tensor_of(np.zeros((self.rows, *spec.shape), spec.dtype) if given is None else given)
            for spec, given in zip(self.plan.outputs, self.cotangents(), strict=True)
            if spec.is_float
        ]

    def seeds_given(self) -> tuple[tuple[int, ...], list[tf.Tensor]]:
        """Which outputs have cotangents, and these."""
        given = {n: x for n, x in enumerate(self.cotangents()) if x is not None}
        return tuple(given), [tensor_of(x) for x in given.values()]

    def tangents(self, variables: int) -> list[tf.Tensor | None]:
        """For each differentiable source the cotangent of its gradient; None for zeros.

        The sources are the real and complex inputs that are tensors, then so many ``variables``.
        """
        frame, given = self.frame, dict(self.frame.tangents)
        arrays: list[np.ndarray | None] = [
            self._cotangent(given[n]) if n in given else None
            for n, placed in enumerate(frame.inputs)
            if self.plan.as_tensor[n] and placed.spec.is_float
        ]
        for n in range(len(frame.inputs), len(frame.inputs) + variables):
            arrays.append(given[n].view(self.buffer) if n in given else None)
        return [None if array is None else tensor_of(array) for array in arrays]

    @property
    def wanted(self) -> tuple[int, ...]:
        """The variables that gradients are written for."""
        return tuple(n - len(self.frame.inputs) for n, _ in self.frame.weight_gradients)

    def write_outputs(self, outputs: Sequence[Any]) -> None:
        """Raise InputError unless they are what the probe found."""
        expected = self.frame.outputs
        if len(outputs) != len(expected):
            raise InputError(
                f"the model returned {len(outputs)} arrays; its first call returned "
                f"{len(expected)}. A pooled method returns the same structure every time"
            )
        for output, placed in zip(outputs, expected, strict=True):
            value = np.asarray(output)
            shape, dtype = (self.rows, *placed.spec.shape[1:]), placed.spec.dtype
            if value.shape != shape or value.dtype.str != dtype:
                raise InputError(
                    f"the model returned shape {value.shape}, dtype {value.dtype} for {self.rows} "
                    f"rows; expected {shape}, {dtype} as in its first call"
                )
            self._write(placed, value)

    def write_gradients(self, gradients: Sequence[Any]) -> list[int]:
        """By source; zeros for None. The sources that have one, and no place for it."""
        frame = self.frame
        places = {n for n, _ in (*frame.input_gradients, *frame.weight_gradients)}
        for n, placed in frame.input_gradients:
            self._write(placed, gradients[n])
        self.write_sums([gradients[n] for n, _ in frame.weight_gradients])
        return [n for n, x in enumerate(gradients) if x is not None and n not in places]

    def write_sums(self, gradients: Sequence[Any]) -> None:
        """Of the variables ``wanted``."""
        for (_, placed), x in zip(self.frame.weight_gradients, gradients, strict=True):
            placed.view(self.buffer)[self.place] = 0 if x is None else np.asarray(x)

    def write_gradients_of_cotangents(self, gradients: Sequence[Any]) -> None:
        """Of those that are given, by output."""
        for placed, x in zip(self.frame.cotangent_gradients, gradients, strict=True):
            if placed is not None:
                self._write(placed, x)

    def _part(self, placed: Placed) -> np.ndarray:
        return placed.view(self.buffer)[self.start : self.stop]

    def _cotangent(self, placed: Placed) -> np.ndarray:
        return _filled(self._part(placed), self.rows, repeat=False)

    def _write(self, placed: Placed, rows: Any) -> None:
        self._part(placed)[...] = 0 if rows is None else np.asarray(rows)[: self.stop - self.start]


def first(frame: Frame, rows: int, buffer: Buffer) -> list[np.ndarray]:
    """The frame's first rows, as many as there are; then the last one again."""
    have = min(rows, frame.batch)
    return [_filled(placed.view(buffer)[:have], rows) for placed in frame.inputs]


def _filled(array: np.ndarray, rows: int, repeat: bool = True) -> np.ndarray:
    """``rows`` rows: the last one repeated (inputs), or zeros (cotangents), where some lack."""
    missing = rows - len(array)
    if missing == 0:
        return array
    filler = array[-1:] if repeat else np.zeros_like(array[-1:])
    return np.concatenate([array, np.repeat(filler, missing, axis=0)])
