"""What is computed of a batch: the task, its numbers, and what came of it.

Owns what those who ask (``bridge``) and those who compute (``executors``) say to each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from workers.exchange.protocol import Kind
from workers.layout import ArraySpec


@dataclasses.dataclass(frozen=True)
class Task:
    """What is computed of a batch: all but numbers. Who asks keeps it, and asks for it again.

    ``outputs`` are specs of one row of what is handed back. ``sources`` are what gradients are
    taken for, numbered as in the plan, inputs before variables, each with the spec of one input
    row, or of the variable. ``given`` says for each output whether a cotangent comes for it,
    ``tangents`` for which sources cotangents of their gradients come.

    Gradients of inputs have one row per sample; those of variables are summed over tiles in tile
    order, or with ``per_tile`` left as one row per tile. With ``tangents`` the whole vjp is pulled
    back: there are the gradients of its result for the sources, then for the cotangents given.
    """

    plan: int
    kind: Kind
    tile: int
    outputs: tuple[ArraySpec, ...] = ()
    sources: tuple[tuple[int, ArraySpec], ...] = ()
    given: tuple[bool, ...] = ()
    tangents: tuple[int, ...] = ()
    per_tile: bool = False

    def __hash__(self) -> int:  # of each step: specs are left to equality
        return hash((self.plan, self.kind.value, self.tile))


@dataclasses.dataclass
class Operands:
    """A batch's numbers: inputs, the model's weights, a cotangent for each output or None, and by
    source the cotangents of gradients."""

    inputs: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    cotangents: Sequence[np.ndarray | None] = ()
    tangents: Sequence[tuple[int, np.ndarray]] = ()

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.inputs[0])

    def part(self, rows: slice) -> Operands:
        """Those of some samples, without the weights."""
        return Operands(
            [array[rows] for array in self.inputs],
            (),
            [None if array is None else array[rows] for array in self.cotangents],
            [(n, x[rows] if n < len(self.inputs) else x) for n, x in self.tangents],
        )


@dataclasses.dataclass
class Results:
    """What came of a task. ``assignment`` says who computed, and may still hold, which tiles."""

    call: int
    outputs: list[Any]
    gradients: list[np.ndarray]
    assignment: Any
